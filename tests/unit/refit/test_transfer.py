"""Refit of a real generator, alone and over gloo ranks whose export is collective."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_opd.engines.hf.generator import HFGenerator
from nemo_opd.engines.protocols import NamedTensor, Place, Snapshot
from nemo_opd.refit.transfer import RefitError, refit
from nemo_opd.types import GenerateRequest, Prompt, Sampling, TrainBatch, TrainStats
from tests.helpers.ranks import RankPool
from tests.helpers.tiny import tiny_model


@dataclass
class Exporter:
    """A trainer of which only the export is used: every tensor is broadcast from rank 0, as a layout would gather it.

    `fault` on a rank: "shape" hands that rank's generator a cut tensor, "export" breaks the export itself.
    """

    model: Any
    fault: str = ""
    exported: int = 0
    place: Place = field(default_factory=lambda: Place(0, 1, 0, 1, ((0,),)))

    def export_weights(self) -> Iterator[NamedTensor]:
        for count, (name, tensor) in enumerate(self.model.state_dict().items()):
            if self.fault == "export" and count == 3:
                raise OSError("export broke")
            whole: Tensor = tensor.clone()
            if dist.is_initialized():
                dist.broadcast(whole, src=0)
            self.exported += 1
            yield name, whole[1:] if self.fault == "shape" and count == 3 else whole

    def train_step(self, batch: TrainBatch) -> TrainStats:
        raise AssertionError("not part of a refit")

    def load(self, folder: Path) -> None:
        raise AssertionError("not part of a refit")

    def snapshot(self, folder: Path, background: bool = False) -> Snapshot:
        raise AssertionError("not part of a refit")


def _parameters_equal(generator: HFGenerator, model: Any) -> bool:
    ours = dict(generator._model.named_parameters())  # type: ignore[union-attr]
    return all(torch.equal(ours[name], tensor) for name, tensor in model.named_parameters())


def test_the_generator_holds_the_trainers_weights_bit_for_bit() -> None:
    student, generator = tiny_model(seed=1), HFGenerator(tiny_model())
    manifest = refit(Exporter(student), generator, 4)
    assert generator.version == manifest.version == 4
    assert {spec.name: spec.shape for spec in manifest.tensors} == {
        name: tuple(tensor.shape) for name, tensor in student.state_dict().items()
    }
    assert _parameters_equal(generator, student)


def test_weights_that_are_not_those_of_the_refit_before_are_refused() -> None:
    student, generator = tiny_model(seed=1), HFGenerator(tiny_model())
    manifest = refit(Exporter(student), generator, 0)
    with pytest.raises(RefitError, match="as float64"):
        refit(Exporter(student.double()), generator, 1, expected=manifest)
    refit(Exporter(student.float()), generator, 1, expected=manifest)
    assert generator.version == 1


def test_a_failure_is_raised_after_the_export_is_exhausted() -> None:
    student, generator = tiny_model(seed=1), HFGenerator(tiny_model())
    exporter = Exporter(student, fault="shape")
    with pytest.raises(RefitError, match=r"version 2 failed on ranks \[0\].*shape") as failure:
        refit(exporter, generator, 2)
    assert isinstance(failure.value.__cause__, ValueError)
    assert exporter.exported == len(student.state_dict())
    with pytest.raises(RuntimeError, match="refuses"):
        generator.generate([GenerateRequest(Prompt(0, 0, (), (3,)), 0, 1)], Sampling(2), lambda: False)
    refit(Exporter(student), generator, 2)
    assert _parameters_equal(generator, student)


def test_a_stale_version_is_refused_and_changes_nothing() -> None:
    generator = HFGenerator(tiny_model())
    refit(Exporter(tiny_model(seed=1)), generator, 4)
    with pytest.raises(RefitError, match="got 4 after 4"):
        refit(Exporter(tiny_model(seed=2)), generator, 4)
    assert _parameters_equal(generator, tiny_model(seed=1))
    list(generator.generate([GenerateRequest(Prompt(0, 0, (), (3,)), 0, 1)], Sampling(2), lambda: False))


def test_an_export_that_breaks_raises_its_own_error() -> None:
    generator = HFGenerator(tiny_model())
    with pytest.raises(OSError, match="export broke"):
        refit(Exporter(tiny_model(seed=1), fault="export"), generator, 0)
    with pytest.raises(RuntimeError, match="refuses"):
        generator.generate([GenerateRequest(Prompt(0, 0, (), (3,)), 0, 1)], Sampling(2), lambda: False)


def test_a_rank_without_generator_takes_part_in_the_export() -> None:
    exporter = Exporter(tiny_model())
    refit(exporter, None, 0)
    assert exporter.exported == len(exporter.model.state_dict())


def _refit_on_ranks(rank: int) -> tuple[str, int, bool]:
    """First with a fault on rank 1, then without; the second works only if all ranks stayed in step."""
    student, generator = tiny_model(seed=rank), HFGenerator(tiny_model(seed=5))
    try:
        refit(Exporter(student, fault="shape" if rank == 1 else ""), generator, 1)
        message = "no error"
    except RefitError as error:
        message = str(error)
    refit(Exporter(student), generator, 2)
    return message, generator.version, _parameters_equal(generator, tiny_model(seed=0))


def test_ranks_agree_on_a_failure_and_stay_in_step(ranks2: RankPool) -> None:
    answers = ranks2.run(_refit_on_ranks)
    assert [answer[1:] for answer in answers] == [(2, True), (2, True)]
    assert all("version 1 failed on ranks [1]" in answer[0] for answer in answers)
    assert "see there" in answers[0][0]
    assert "shape" in answers[1][0]

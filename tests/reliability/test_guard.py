"""Updates that are left out, in real runs of two ranks: all agree, nothing moves, and the run goes on as if that step's
update had never been asked for."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.attempts import attempt
from tests.helpers.figures import record
from tests.helpers.ranks import RankPool
from tests.helpers.workspace import make_workspace, workspace_config

DP2: tuple[str, ...] = ("train.processes=2",)
TP2 = ("student.tensor_model_parallel_size=2",)
HIT = 3
"""Step, from 1, whose update is spoilt."""
STEPS = 6


@dataclass(frozen=True)
class Told:
    """What one rank has to say of a run."""

    hashes: list[tuple[str, str]]
    """After each step, of weights (the average's too), and of the optimizer's moments."""
    metrics: list[dict[str, float]]
    guard: dict[str, Any]
    log: str


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for name in sorted(value, key=str):
            yield from _tensors(value[name])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _hash(tensors: Iterator[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _hashes(trainer: Any) -> tuple[str, str]:
    average = trainer._average.model if trainer._average is not None else trainer.model
    models = [*trainer.model.parameters(), *average.parameters()]
    moments = [inner.optimizer.state_dict()["state"] for inner in trainer._optimizer.chained_optimizers]
    return _hash(iter(models)), _hash(_tensors(moments))


def _run(rank: int, folder: str, name: str, overrides: tuple[str, ...], fault: str = "", left_out: int = 0) -> Told:
    """Some steps of a run; `left_out` is a step at which the guard is told that nothing was finite."""
    from nemo_opd.assemble import assemble
    from nemo_opd.engines.megatron.parallel import destroy_student_groups
    from nemo_opd.loop import one_step, refit_generator
    from nemo_opd.processes import Processes
    from nemo_opd.reliability import faults
    from nemo_opd.reliability.stop import StopRequest

    destroy_student_groups()
    run_dir = Path(folder) / name
    run_dir.mkdir(exist_ok=True)
    processes = Processes.current()
    config = workspace_config(Path(folder), *overrides, run_dir=run_dir)
    run = assemble(config, processes, StopRequest(run_dir, "test", processes))
    refit_generator(run)
    accepts = run.guard.accepts
    run.guard.accepts = lambda loss, norm: accepts(loss, math.nan if run.state.step == left_out - 1 else norm)  # type: ignore[method-assign]
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("nemo_opd.accounts").addHandler(handler)
    faults.arm(fault)
    try:
        hashes, reports = [_hashes(run.trainer)], []
        for _ in range(STEPS):
            reports.append(one_step(run))
            hashes.append(_hashes(run.trainer))
    finally:
        faults.arm("")
        logging.getLogger("nemo_opd.accounts").removeHandler(handler)
    for part in (run.recorder, run.generator):
        if part:
            part.close()
    return Told(hashes, [dict(r.metrics) for r in reports if r], run.state.guard, "\n".join(said))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("guard"))


EMA = ("teacher.source=ema", "teacher.model=null")


@pytest.mark.parametrize("layout", [DP2, TP2], ids=["dp2", "tp2"])
def test_a_nan_in_one_rank_s_gradient_costs_one_update_on_all_ranks_and_nothing_else(
    ranks2: RankPool, folder: Path, layout: tuple[str, ...]
) -> None:
    name, overrides = f"nan-{layout[0]}", (*layout, *EMA, "guard.min_history=2")
    told = ranks2.run(_run, str(folder), name, overrides, f"train.gradient=nan@{HIT} rank=1")
    left_out = ranks2.run(_run, str(folder), f"{name}-left-out", overrides, "", HIT)
    for ours, theirs in zip(told, left_out, strict=True):
        assert ours.hashes[HIT] == ours.hashes[HIT - 1], "weights, average and moments are those of the step before"
        moved = [ours.hashes[i] != ours.hashes[i - 1] for i in range(1, STEPS + 1)]
        assert moved == [i != HIT for i in range(1, STEPS + 1)]
        assert ours.hashes == theirs.hashes, "the same run as one that was told to leave this update out"
        assert ours.guard == theirs.guard
        assert [line["guard/rejected"] for line in ours.metrics] == [float(i == HIT) for i in range(1, STEPS + 1)]
        assert ours.metrics[-1]["guard/rejected_total"] == 1.0
        assert f"step {HIT}: update left out (1 in a row of at most 5): " in ours.log
        assert "the gradient norm is nan; first not finite: the gradient of rank 1" in ours.log
    assert told[0].guard == told[1].guard
    record("R7", f"NaN in rank 1's gradient, {layout[0]}: updates left out, on each rank", "1, 1")


def test_a_spike_in_one_rank_s_gradient_costs_one_update(ranks2: RankPool, folder: Path) -> None:
    overrides = (*DP2, "guard.min_history=2")
    told = ranks2.run(_run, str(folder), "spike", overrides, f"train.gradient=times:1e9@{HIT} rank=1")
    for rank in told:
        assert [line["guard/rejected"] for line in rank.metrics] == [float(i == HIT) for i in range(1, STEPS + 1)]
        assert rank.hashes[HIT] == rank.hashes[HIT - 1] != rank.hashes[HIT + 1]
        assert "the gradient norm " in rank.log and "is above" in rank.log and "first not finite" not in rank.log


def test_the_window_is_part_of_the_checkpoint(ranks2: RankPool, folder: Path) -> None:
    """Six steps, and three and three: the guard remembers the same."""
    from nemo_opd.checkpoint.store import newest_checkpoint, read_state

    stored = []
    for name, parts in (("whole", (6,)), ("parts", (3, 3))):
        for steps in parts:
            ranks2.run(attempt, str(folder), str(folder / name), (*DP2, "train.steps=6"), steps)
        newest = newest_checkpoint(folder / name / "checkpoints")
        assert newest is not None
        stored.append(read_state(newest).guard)
    assert stored[0] == stored[1] and len(stored[0]["gradient norm"]) == 6

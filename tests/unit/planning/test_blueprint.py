"""What is calculated of a rank is what Megatron builds of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from nemo_opd.config import LayoutConfig
from nemo_opd.planning.catalogue import model_shape, model_values
from nemo_opd.planning.shapes import Spread


@dataclass(frozen=True)
class Case:
    """A model in a layout over so many ranks."""

    model: str
    ranks: int
    tp: int = 1
    pp: int = 1
    ep: int = 1
    cp: int = 1
    vp: int = 1
    multiple: int = 1
    trained: bool = True
    distributed: bool = True

    @property
    def layout(self) -> LayoutConfig:
        return LayoutConfig(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vp,
            sequence_parallel=self.tp > 1,
            context_parallel_size=self.cp,
            expert_model_parallel_size=self.ep,
        )

    @property
    def spread(self) -> Spread:
        replicas = self.ranks // (self.tp * self.cp * self.pp)
        return Spread(self.tp, self.pp, replicas, self.ep, self.tp > 1, self.cp, self.vp)


CASES = [
    Case("Qwen3-1.7B", ranks=8),
    Case("Qwen3-1.7B", ranks=8, tp=2, pp=2, distributed=False),  # a tied output layer on a stage of its own
    Case("Qwen3-8B", ranks=256, tp=4, pp=4, multiple=128),
    Case("Qwen3-8B", ranks=32, tp=2, cp=4, pp=2),
    Case("Qwen3-1.7B", ranks=8, tp=2, pp=2, vp=7),
    Case("Qwen3-30B-A3B", ranks=64, tp=4, pp=4, ep=8, vp=3),
    Case("Qwen3-32B", ranks=512, tp=8, pp=4, trained=False),
    Case("Llama-3.2-3B", ranks=32, tp=4),
    Case("Llama-3.3-70B", ranks=1024, tp=8, pp=2, trained=False),
    Case("Qwen3-30B-A3B", ranks=64, ep=8),
    Case("Qwen3-30B-A3B", ranks=64, tp=4, pp=2, ep=8),
]


def built(case: Case) -> list[Any]:
    from nemo_opd.engines.megatron.blueprint import blueprints

    values, where = model_values("student.model", case.model)
    return list(
        blueprints(values, where, case.layout, case.ranks, "bfloat16", case.multiple, case.trained, case.distributed)
    )


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.model}-tp{case.tp}-pp{case.pp}-ep{case.ep}-cp{case.cp}-vp{case.vp}"
)
def test_the_arithmetic_is_megatrons(case: Case, alone: Callable[..., Any]) -> None:
    shape = model_shape("student.model", case.model)
    ranks = alone(built, case)
    assert [rank.stage for rank in ranks] == list(range(case.pp))
    for rank in ranks:
        expected = shape.stage(case.spread, rank.stage, case.multiple)
        assert (rank.dense, rank.expert) == (expected.dense, expected.expert)
        assert rank.parameter_bytes == 2 * expected.total
        if not case.trained:
            assert rank.gradient_bytes == 0
        elif case.distributed:  # buffers are padded to a multiple of the replicas
            assert 4 * expected.total <= rank.gradient_bytes < 4.001 * expected.total
        else:
            assert rank.gradient_bytes == 4 * expected.total


def refused() -> str:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        built(CASES[0])
    except RuntimeError as error:
        return str(error)
    finally:
        dist.destroy_process_group()
    return ""


def test_a_process_that_works_with_others_plays_no_ranks(alone: Callable[..., Any]) -> None:
    assert "got a process of a process group; expected one of its own" in alone(refused)

"""Parameters that are gathered while the next step begins: the same numbers, whoever reads them and whenever."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_opd.config import Config
from tests.helpers.checkpoints import different_bits, save_now, stored
from tests.helpers.megatron import random_rollouts, recipe, replica_batch
from tests.helpers.objectives import AdvantageCrossEntropy
from tests.helpers.ranks import RankPool
from tests.helpers.tiny import tiny_checkpoint

VOCAB = 91
BUCKET = 2000
"""Parameters of a bucket: fewer than the output layer has, which then no module beside it waits for. Of Megatron's 40
million one bucket would hold these models whole."""
TP2: dict[str, Any] = {"student__tensor_model_parallel_size": 2}
PP2: dict[str, Any] = {"student__pipeline_model_parallel_size": 2}
EP2: dict[str, Any] = {"student__expert_model_parallel_size": 2}
REDUCED: dict[str, Any] = {"optimizer__overlap_grad_reduce": True}
FULL: dict[str, Any] = {"student__recompute": "full", "student__dtype": "bfloat16"}
LAYOUTS: dict[str, tuple[int, str, dict[str, Any], str]] = {
    "dp2": (2, "untied", {}, "external"),
    "dp2, the student its own teacher": (2, "untied", {}, "current"),
    "dp2, its average its teacher, in buckets": (2, "untied", REDUCED, "ema"),
    "dp2, in buckets, tied, recomputed, bfloat16": (2, "tied", {**REDUCED, **FULL}, "external"),
    "ep2, in buckets": (2, "experts", {**REDUCED, **EP2}, "external"),
    "experts repeated, in buckets": (2, "experts", REDUCED, "external"),
    "tp2 x dp2, in buckets": (4, "untied", {**REDUCED, **TP2}, "external"),
    "pp2 x dp2, in buckets, tied": (4, "tied", {**REDUCED, **PP2}, "external"),
    "pp2 in chunks x dp2, tied": (4, "tied", {**PP2, "student__virtual_pipeline_model_parallel_size": 2}, "external"),
}
"""Ranks, student, settings, teacher."""
IN_TIME = ("dp2", "pp2 x dp2, in buckets, tied")
"""Run with gloo's own gathering as well, which comes when it comes; the others only with one that comes late."""


class Late:
    """A gathering that takes place when it is waited for: whoever does not wait reads old parameters."""

    def __init__(self, group: Any, gather: Any) -> None:
        self.group, self.gather = group, gather

    def wait(self) -> None:
        self.group.param_gather_handle = None
        self.gather(self.group, force_sync=True)


@contextmanager
def distributed_optimizer(late: bool = True) -> Iterator[None]:
    """Megatron's, around torch's Adam, which a recipe does not get: on load Megatron looks for its step count among
    what was saved of each parameter, and gives all parameters one tensor of it. Here each keeps its own."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from nemo_opd.engines.megatron import optimizer, trainer

    gather = _ParamAndGradBucketGroup.start_param_sync
    load = DistributedOptimizer._set_main_param_and_optimizer_states

    def load_all_but_step(part: Any, parameter: Any, tensors: dict[str, Tensor]) -> None:
        group, place = part.model_param_group_index_map[parameter]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][place]]
        step = state.pop("step")
        load(part, parameter, tensors)
        state["step"] = step.clone()

    def begin(group: Any, force_sync: bool = False) -> None:
        if force_sync or not group.ddp_config.overlap_param_gather:
            return gather(group, force_sync=force_sync)
        assert group.param_gather_handle is None
        group.param_gather_handle, group.param_gather_dispatched = Late(group, gather), True
        return None

    with ExitStack() as patches:
        for module in (optimizer, trainer):
            patches.enter_context(mock.patch.object(module, "use_distributed", lambda _: True))
        small = partial(trainer.DistributedDataParallelConfig, bucket_size=BUCKET)
        patches.enter_context(mock.patch.object(trainer, "DistributedDataParallelConfig", small))
        patches.enter_context(
            mock.patch.object(DistributedOptimizer, "_set_main_param_and_optimizer_states", load_all_but_step)
        )
        if late:
            patches.enter_context(mock.patch.object(_ParamAndGradBucketGroup, "start_param_sync", begin))
        yield


def build(config: Config) -> Any:
    from nemo_opd.engines.megatron.parallel import destroy_student_groups
    from nemo_opd.engines.megatron.trainer import MegatronTrainer

    destroy_student_groups()  # of an earlier test in this process
    return MegatronTrainer(config, AdvantageCrossEntropy(), None, 10)


def batch_for(place: Any, step: int, responses: int = 5, advantage: float = 1.0) -> Any:
    """This replica's share: rows of different number, or with one response none but an empty one on a replica."""
    rollouts = random_rollouts(step, responses, VOCAB)
    batch = replica_batch(rollouts, {}, AdvantageCrossEntropy(), place.data_parallel_rank, place.data_parallel_size, 40)
    return replace(
        batch,
        rows=tuple(
            replace(row, tokens=replace(row.tokens, advantage=torch.full_like(row.tokens.advantage, advantage)))
            for row in batch.rows
        ),
    )


STEPS: tuple[dict[str, Any], ...] = ({}, {"responses": 1}, {"advantage": math.nan}, {}, {"responses": 1}, {})
"""Of a run; the third is left out."""
SAVED = 4
"""Steps before the checkpoint."""


def weights_of(weights: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in weights}


def whole_run(rank: int, config: Config, source: str, late: bool, folder: Path) -> dict[str, Any]:
    """Six steps, of which every second is followed by an export and the fourth by a checkpoint; a step more, and the
    checkpoint with the steps after it once again."""
    with distributed_optimizer(late):
        trainer = build(config)
        teacher = None if source == "external" else trainer.self_teacher(source, 0.9)
        found: dict[str, Any] = {name: [] for name in ("steps", "rows", "waiting", "teacher", "exports")}

        def step(number: int) -> None:
            batch = batch_for(trainer.place, number, **STEPS[number])
            stats = trainer.train_step(batch)
            found["steps"].append(str((*stats.losses.values(), stats.grad_norm, stats.skipped)))
            found["rows"].append(len(batch.rows))
            groups = [g for ddp in trainer._ddp for g in (*ddp.bucket_groups, *ddp.expert_parallel_bucket_groups)]
            found["buckets"] = len(groups)
            found["waiting"].append(sum(group.param_gather_handle is not None for group in groups))
            if teacher is not None:
                found["teacher"].append(weights_of(teacher.named_parameters()))

        for number in range(len(STEPS)):
            step(number)
            if number + 1 == SAVED:
                if rank == 0:
                    folder.mkdir()
                dist.barrier()
                save_now(trainer, folder)
            if number % 2:
                found["exports"].append(weights_of(trainer.export_weights()))
        step(0)
        trainer.load(folder)
        for number in range(SAVED, len(STEPS)):
            step(number)
        found["exports"].append(weights_of(trainer.export_weights()))
        return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("gather")
    return {
        "untied": tiny_checkpoint(root / "untied", "qwen3", vocab_size=VOCAB, num_hidden_layers=2),
        "tied": tiny_checkpoint(root / "tied", "qwen2", vocab_size=VOCAB, tie_word_embeddings=True),
        "experts": tiny_checkpoint(root / "experts", "qwen3_moe", vocab_size=VOCAB, num_hidden_layers=2),
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return different_bits(one, other)[0] == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_is_the_same(folders: dict[str, Path], pools: dict[int, RankPool], tmp_path: Path, layout: str) -> None:
    world_size, student, settings, source = LAYOUTS[layout]

    def run(overlap: bool, late: bool, name: str) -> tuple[list[dict[str, Any]], Any]:
        config = recipe(folders[student], optimizer__overlap_param_gather=overlap, **settings)
        ranks = pools[world_size].run(whole_run, config, source, late, tmp_path / name)
        return ranks, pools[world_size].run(stored, str(tmp_path / name))[0]

    plain, checkpoint = run(False, False, "plain")
    for name, tensor in checkpoint[0].items():
        if (master := checkpoint[0].get(f"optimizer.state.param.{name}")) is not None:
            assert torch.equal(master.to(tensor.dtype), tensor), f"{name}: the state of another parameter"
    rows = [rank["rows"] for rank in plain]
    assert any(len({counts[step] for counts in rows}) > 1 for step in range(len(STEPS))), "replicas differ in rows"
    for late in (True, False) if layout in IN_TIME else (True,):
        overlapped, other_checkpoint = run(True, late, f"late {late}")
        assert same(checkpoint[0], other_checkpoint[0]) and checkpoint[1] == other_checkpoint[1]
        for one, other in zip(plain, overlapped, strict=True):
            assert one["steps"] == other["steps"]
            assert [step.endswith("True)") for step in one["steps"][: len(STEPS)]] == [
                n == 2 for n in range(len(STEPS))
            ]
            for name in ("exports", "teacher"):
                assert len(one[name]) == len(other[name])
                assert all(same(a, b) for a, b in zip(one[name], other[name], strict=True))
            assert not same(one["exports"][0], one["exports"][1]) and same(one["exports"][2], one["exports"][3])
            assert set(one["waiting"]) == {0} and set(other["waiting"]) <= {0, other["buckets"]}
            assert source != "external" or 0 not in other["waiting"], "all that was updated is on its way"
            assert other["buckets"] > 3 or "in buckets" not in layout or "pp2" in layout

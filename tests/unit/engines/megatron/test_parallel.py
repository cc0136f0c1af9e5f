"""Coordinates of ranks, and the two sets of groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from nemo_opd.config import LayoutConfig
from nemo_opd.engines.megatron.parallel import (
    Layout,
    destroy_student_groups,
    init_distributed,
    student_groups,
    teacher_groups,
)
from tests.contract.trainers import VOCAB, batch_for, build
from tests.helpers.megatron import recipe
from tests.helpers.ranks import RankPool
from tests.helpers.tiny import tiny_checkpoint


def test_every_rank_has_its_own_coordinates() -> None:
    ranks = [Layout(2, 3, 4, rank) for rank in range(24)]
    assert len({(r.tp_rank, r.dp_rank, r.pp_rank) for r in ranks}) == 24
    for layout in ranks:
        assert layout.is_last_stage == (layout.rank in layout.last_stage_ranks(layout.dp_rank))
        place = layout.place()
        assert place.computes_loss == layout.is_last_stage
        assert len(place.loss_ranks) == 4 and all(len(replica) == 2 for replica in place.loss_ranks)


def test_ranks_that_share_sequences_are_one_replica() -> None:
    ranks = [Layout(2, 2, 2, rank, cp=3) for rank in range(24)]
    assert len({(r.tp_rank, r.cp_rank, r.dp_rank, r.pp_rank) for r in ranks}) == 24
    assert ranks[14].place().loss_ranks == ((12, 13, 14, 15, 16, 17), (18, 19, 20, 21, 22, 23))
    for layout in ranks:
        place = layout.place()
        assert place.world_size == 24 and place.data_parallel_rank == layout.dp_rank
        assert place.computes_loss == layout.is_last_stage == (layout.rank >= 12)


def test_interleaved_stages_hold_chunks_and_take_whole_rounds() -> None:
    ranks = [Layout(1, 4, 1, rank, vp=2) for rank in range(4)]
    assert [(r.rank, chunk) for r in ranks for chunk in (0, 1) if r.has_embedding(chunk)] == [(0, 0)]
    assert [(r.rank, chunk) for r in ranks for chunk in (0, 1) if r.has_output(chunk)] == [(3, 1)]
    assert [ranks[0].whole_rounds(rows) for rows in (0, 1, 4, 5)] == [4, 4, 4, 8]
    assert [Layout(1, 4, 1, 0).whole_rounds(rows) for rows in (0, 1, 4, 5)] == [0, 1, 4, 5]


def groups_of(rank: int, tp: int, pp: int, cp: int = 1) -> dict[str, list[int]]:
    """Ranks of the teacher's groups; and the student's groups must agree where the layout is the same."""
    init_distributed()
    sizes = LayoutConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, context_parallel_size=cp)
    layout = Layout.of(sizes, "teacher")
    teacher = teacher_groups(layout)
    names = ("tp", "dp", "pp", "mp", "embd", "cp", "tp_cp", "dp_cp", "tp_dp_cp")
    ranks = {name: dist.get_process_group_ranks(getattr(teacher, name)) for name in names}
    destroy_student_groups()
    student = student_groups(layout, seed=0)
    again = student_groups(layout, seed=0)
    assert dist.get_process_group_ranks(again.tp) == dist.get_process_group_ranks(student.tp)
    for name in ("tp", "dp", "pp", "embd", "cp", "tp_cp", "dp_cp", "tp_dp_cp"):
        assert dist.get_process_group_ranks(getattr(student, name)) == ranks[name], name
    assert sorted(dist.get_process_group_ranks(student.mp)) == sorted(ranks["mp"])
    with pytest.raises(RuntimeError, match="TP, PP"):
        student_groups(Layout(1, 1, layout.stage_size * layout.pp, rank), seed=0)
    destroy_student_groups()
    return ranks


def test_groups_of_four_ranks(ranks4: RankPool) -> None:
    both = ranks4.run(groups_of, 2, 2)
    assert [r["tp"] for r in both] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [r["pp"] for r in both] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [r["embd"] for r in both] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [r["dp"] for r in both] == [[0], [1], [2], [3]]
    assert [r["mp"] for r in both] == [[0, 1, 2, 3]] * 4
    pipeline = ranks4.run(groups_of, 1, 2)
    assert [r["dp"] for r in pipeline] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [r["pp"] for r in pipeline] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [r["cp"] for r in pipeline] == [[0], [1], [2], [3]]
    context = ranks4.run(groups_of, 2, 1, 2)
    assert [r["cp"] for r in context] == [r["dp_cp"] for r in context] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [r["tp_cp"] for r in context] == [[0, 1, 2, 3]] * 4
    replicas = ranks4.run(groups_of, 1, 1, 2)
    assert [r["cp"] for r in replicas] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [r["dp"] for r in replicas] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [r["dp_cp"] for r in replicas] == [[0, 1, 2, 3]] * 4


_ALONE = """
import torch.distributed as dist
from nemo_opd.engines.megatron.parallel import init_distributed
init_distributed()
assert dist.get_world_size() == 1
"""


def test_a_world_size_without_a_rendezvous_is_no_launcher() -> None:
    """Container platforms set it for programs of their own; `configuration.check.launched_processes` says likewise."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "MASTER_ADDR", "MASTER_PORT")}
    done = subprocess.run(
        [sys.executable, "-c", _ALONE],
        env={**environment, "WORLD_SIZE": "4"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def _threads(rank: int, folder: str, settings: dict[str, str]) -> list[int]:
    """After each of three trainers, which score and step, is gone."""
    found = []
    for _ in range(3):
        trainer = build(recipe(Path(folder), **settings))
        trainer.train_step(batch_for(trainer.place, 0))
        del trainer
        destroy_student_groups()
        found.append(len(os.listdir("/proc/self/task")))
    return found


@pytest.mark.parametrize(
    ("family", "settings"),
    [("qwen3", {}), ("qwen3_moe", {}), ("qwen3", {"student__recompute": "full"})],
    ids=["dense", "experts", "computed again"],
)
def test_groups_that_are_ended_leave_no_threads(
    ranks1: RankPool, tmp_path: Path, family: str, settings: dict[str, str]
) -> None:
    """A layout has two dozen groups, and the threads of hundreds of forgotten ones would do nothing but wake up."""
    folder = tiny_checkpoint(tmp_path, family, vocab_size=VOCAB)
    ((first, *others),) = ranks1.run(_threads, str(folder), settings)
    assert others == [first, first]

"""Every scorer, in every layout, answers what a dense transformers model says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_opd.config import ServersConfig
from nemo_opd.engines.vllm.settings import TEACHER
from tests.contract.scorers import check_scorer, random_requests, refusals
from tests.helpers.megatron import recipe
from tests.helpers.ranks import RankPool
from tests.helpers.servers import serving
from tests.helpers.tiny import tiny_checkpoint

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("scorer")
    return {
        "student": tiny_checkpoint(root / "student", "llama", vocab_size=90, num_hidden_layers=2),
        "qwen3": tiny_checkpoint(root / "qwen3", "qwen3", vocab_size=90, seed=1),
        "wide": tiny_checkpoint(root / "wide", "qwen3", vocab_size=101, seed=2, head_dim=32),
        "experts": tiny_checkpoint(root / "experts", "qwen3_moe", vocab_size=90, seed=4, num_hidden_layers=2),
        "tied": tiny_checkpoint(root / "tied", "qwen2", vocab_size=90, seed=3, tie_word_embeddings=True),
    }


def run(
    pool: RankPool, engine: str, folders: dict[str, Path], teacher: str, consumers: list[tuple[int, ...]], **s: Any
) -> None:
    """Scores 21 requests in rows of 64 positions, so that a step takes several windows of rows."""
    config = recipe(folders["student"], folders[teacher], teacher__micro_batch_tokens=64, **s)
    for rank, errors in enumerate(pool.run(check_scorer, engine, config, random_requests(21, 90, consumers))):
        assert all(value <= TOLERANCE for value in errors.values()), f"rank {rank}: {errors}"


@pytest.mark.parametrize("engine", ["megatron", "hf"])
@pytest.mark.parametrize("teacher", ["qwen3", "tied"])
def test_one_rank(ranks1: RankPool, folders: dict[str, Path], engine: str, teacher: str) -> None:
    run(ranks1, engine, folders, teacher, [(0,)])


@pytest.mark.parametrize("engine", ["megatron", "hf"])
def test_what_is_refused(ranks1: RankPool, folders: dict[str, Path], engine: str) -> None:
    config = recipe(folders["student"], folders["qwen3"])
    for messages in ranks1.run(refusals, engine, config, random_requests(3, 90, [(0,)])):
        context, at_ids, ids, k = messages
        assert "context" in context and "at_ids" in at_ids and "ids" in ids and "k" in k


LAYOUTS_2 = {
    "tp2": ({"teacher__tensor_model_parallel_size": 2}, [(0, 1)]),
    "tp2 sequence parallel": ({"teacher__tensor_model_parallel_size": 2, "teacher__sequence_parallel": True}, [(1, 0)]),
    "pp2, student tp2": (
        {"teacher__pipeline_model_parallel_size": 2, "student__tensor_model_parallel_size": 2},
        [(0, 1)],
    ),
    "dp2": ({}, [(0,), (1,)]),
    "cp2": ({"teacher__context_parallel_size": 2}, [(0, 1), (1,)]),
    "tp2, one consumer off its diagonal": ({"teacher__tensor_model_parallel_size": 2}, [(1,)]),
}


@pytest.mark.parametrize("layout", LAYOUTS_2)
def test_two_ranks(ranks2: RankPool, folders: dict[str, Path], layout: str) -> None:
    settings, consumers = LAYOUTS_2[layout]
    run(ranks2, "megatron", folders, "qwen3", consumers, **settings)


@pytest.mark.parametrize("layout", ["tp2", "pp2, student tp2"])
def test_ids_that_only_the_teacher_has_are_left_out(ranks2: RankPool, folders: dict[str, Path], layout: str) -> None:
    settings, consumers = LAYOUTS_2[layout]
    run(ranks2, "megatron", folders, "wide", consumers, **settings)


@pytest.mark.parametrize("settings", [{}, {"teacher__tensor_model_parallel_size": 2}], ids=["dp2", "tp2"])
def test_experts_on_two_ranks(ranks2: RankPool, folders: dict[str, Path], settings: dict[str, Any]) -> None:
    """21 requests of which 20 are scored: one more row for one replica than for the other."""
    settings = {**settings, "teacher__expert_model_parallel_size": 2, "teacher__sequence_parallel": bool(settings)}
    run(ranks2, "megatron", folders, "experts", [(0,), (1,)], **settings)


def test_hf_with_two_consumers(ranks2: RankPool, folders: dict[str, Path]) -> None:
    run(ranks2, "hf", folders, "qwen3", [(0,), (1, 0)])


@pytest.fixture(scope="module")
def served(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServersConfig]:
    """vLLM with a teacher that knows more ids than its student."""
    scratch = tmp_path_factory.mktemp("vllm")
    with serving(folders["wide"], scratch, 1, role=TEACHER, scored_ids=90, batch_tokens=64, max_running=8) as (url,):
        yield ServersConfig(urls=url)


@pytest.mark.slow
@pytest.mark.parametrize("consumers", [[(0,), (1,)], [(0, 1), (1,), (1, 0)]], ids=["one each", "several"])
def test_on_servers(
    ranks2: RankPool, folders: dict[str, Path], served: ServersConfig, consumers: list[tuple[int, ...]]
) -> None:
    run(ranks2, "vllm", folders, "wide", consumers, teacher__servers=served)


@pytest.mark.slow
def test_what_is_refused_on_servers(ranks1: RankPool, folders: dict[str, Path], served: ServersConfig) -> None:
    config = recipe(folders["student"], folders["wide"], teacher__servers=served)
    ((context, at_ids, ids, k),) = ranks1.run(refusals, "vllm", config, random_requests(3, 90, [(0,)]))
    assert "context" in context and "at_ids" in at_ids and "ids" in ids and "k" in k


LAYOUTS_4 = {
    "tp2 x pp2": (
        {"teacher__tensor_model_parallel_size": 2, "teacher__pipeline_model_parallel_size": 2},
        [(0, 1), (2, 3)],
        "qwen3",
    ),
    "tp2 x pp2, tied": (
        {"teacher__tensor_model_parallel_size": 2, "teacher__pipeline_model_parallel_size": 2},
        [(3,), (0, 1, 2)],
        "tied",
    ),
    "pp2 x dp2, experts": (
        {"teacher__pipeline_model_parallel_size": 2, "teacher__expert_model_parallel_size": 2},
        [(0,), (1,), (2,), (3,)],
        "experts",
    ),
    "pp2 x cp2, student cp2": (
        {
            "teacher__pipeline_model_parallel_size": 2,
            "teacher__context_parallel_size": 2,
            "student__context_parallel_size": 2,
        },
        [(0, 1), (2, 3)],
        "qwen3",
    ),
    "cp2 x tp2": (
        {"teacher__tensor_model_parallel_size": 2, "teacher__context_parallel_size": 2},
        [(3,), (0, 1, 2)],
        "tied",
    ),
    "pp2 x dp2": ({"teacher__pipeline_model_parallel_size": 2}, [(0,), (1,), (2,), (3,)], "qwen3"),
}


@pytest.mark.parametrize("layout", LAYOUTS_4)
def test_four_ranks(ranks4: RankPool, folders: dict[str, Path], layout: str) -> None:
    settings, consumers, teacher = LAYOUTS_4[layout]
    run(ranks4, "megatron", folders, teacher, consumers, **settings)

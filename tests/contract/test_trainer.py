"""Every trainer trains, exports, saves, resumes and refuses as `Trainer` promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.contract.trainers import (
    VOCAB,
    learning_rates,
    refusal,
    resumed_optimizer,
    resumes,
    skips_non_finite,
    steps_and_export,
)
from tests.helpers.megatron import recipe
from tests.helpers.ranks import RankPool
from tests.helpers.tiny import tiny_checkpoint

TP2: dict[str, Any] = {"student__tensor_model_parallel_size": 2}
PP2: dict[str, Any] = {"student__pipeline_model_parallel_size": 2}
CP2: dict[str, Any] = {"student__context_parallel_size": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("trainer")
    return {
        "qwen3": tiny_checkpoint(root / "qwen3", "qwen3", vocab_size=VOCAB, num_hidden_layers=2),
        "experts": tiny_checkpoint(root / "experts", "qwen3_moe", vocab_size=VOCAB, num_hidden_layers=2),
        "tied": tiny_checkpoint(root / "tied", "qwen2", vocab_size=VOCAB, tie_word_embeddings=True),
    }


@pytest.mark.parametrize("student", ["qwen3", "tied"])
@pytest.mark.parametrize("layout", [TP2, PP2, CP2, {}], ids=["tp2", "pp2", "cp2", "dp2"])
def test_trains_and_exports(ranks2: RankPool, folders: dict[str, Path], layout: dict[str, Any], student: str) -> None:
    first, second = ranks2.run(steps_and_export, recipe(folders[student], **layout), folders[student])
    assert first == second, "statistics are equal on every rank"


EP2: dict[str, Any] = {"student__expert_model_parallel_size": 2}
SPLIT_ROWS: dict[str, Any] = {**TP2, "student__sequence_parallel": True}


@pytest.mark.parametrize("layout", [EP2, SPLIT_ROWS], ids=["ep2", "tp2"])
def test_trains_and_exports_experts(ranks2: RankPool, folders: dict[str, Path], layout: dict[str, Any]) -> None:
    first, second = ranks2.run(steps_and_export, recipe(folders["experts"], **layout), folders["experts"])
    assert first == second, "statistics are equal on every rank"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "layout",
    [TP2, {**PP2, "student__model": "tied"}, CP2, {}, {**EP2, "student__model": "experts"}],
    ids=["tp2", "pp2, tied", "cp2", "dp2", "ep2"],
)
def test_resumes_bit_for_bit(
    ranks2: RankPool, folders: dict[str, Path], tmp_path: Path, layout: dict[str, Any], dtype: str
) -> None:
    settings = {k: v for k, v in layout.items() if k != "student__model"}
    config = recipe(folders[layout.get("student__model", "qwen3")], student__dtype=dtype, **settings)
    assert max(ranks2.run(resumes, config, config, tmp_path / "checkpoint")) == 0.0


@pytest.mark.parametrize("student", ["qwen3", "tied"])
@pytest.mark.parametrize("layouts", [(TP2, {}), (PP2, TP2), ({}, PP2)], ids=["tp2 dp2", "pp2 tp2", "dp2 pp2"])
def test_resumes_in_another_layout(
    ranks2: RankPool, folders: dict[str, Path], tmp_path: Path, layouts: tuple[Any, Any], student: str
) -> None:
    saved, loaded = (recipe(folders[student], optimizer__clip_grad=0.0, **layout) for layout in layouts)
    assert max(ranks2.run(resumes, saved, loaded, tmp_path / "checkpoint")) < 1e-4


@pytest.mark.parametrize("layouts", [(EP2, SPLIT_ROWS), (PP2, EP2)], ids=["ep2 tp2", "pp2 ep2"])
def test_experts_resume_in_another_layout(
    ranks2: RankPool, folders: dict[str, Path], tmp_path: Path, layouts: tuple[Any, Any]
) -> None:
    saved, loaded = (recipe(folders["experts"], optimizer__clip_grad=0.0, **layout) for layout in layouts)
    assert max(ranks2.run(resumes, saved, loaded, tmp_path / "checkpoint")) < 1e-4


@pytest.mark.parametrize("layout", [TP2, PP2, {}], ids=["tp2", "pp2", "dp2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_with_non_finite_gradients_is_left_out(
    ranks2: RankPool, folders: dict[str, Path], layout: dict[str, Any], dtype: str
) -> None:
    config = recipe(folders["qwen3"], student__dtype=dtype, **layout)
    assert ranks2.run(skips_non_finite, config) == [[True, False]] * 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_follows_its_recipe(
    ranks1: RankPool, folders: dict[str, Path], tmp_path: Path, dtype: str
) -> None:
    config = recipe(folders["qwen3"], student__dtype=dtype, optimizer__lr=1e-3)
    changed = recipe(
        folders["qwen3"],
        student__dtype=dtype,
        optimizer__lr=2e-4,
        optimizer__adam_beta2=0.9,
        optimizer__adam_eps=1e-6,
        optimizer__weight_decay=0.1,
    )
    assert ranks1.run(resumed_optimizer, config, changed, tmp_path / "checkpoint") == [
        {"betas": (0.9, 0.9), "eps": 1e-6, "weight_decay": 0.1, "learning_rate": 2e-4, "step": 2}
    ]


def test_learning_rate_warms_up_and_decays_to_its_end(ranks1: RankPool, folders: dict[str, Path]) -> None:
    config = recipe(folders["qwen3"], optimizer__warmup_steps=4, optimizer__decay="linear", optimizer__min_lr=1e-4)
    rates = ranks1.run(learning_rates, config)[0]
    assert rates[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert rates[4:] == pytest.approx([1e-3 - 9e-4 * step / 6 for step in range(1, 7)])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer__distributed": True}, ["optimizer.distributed", "Transformer Engine"]),
        ({"student__tensor_model_parallel_size": 3}, ["student.tensor_model_parallel_size", "divides"]),
        ({"student__context_parallel_size": 3}, ["student.context_parallel_size", "1 x 1 x 3", "divides"]),
        ({"student__expert_model_parallel_size": 3}, ["student.expert_model_parallel_size", "divisor"]),
        ({"student__expert_model_parallel_size": 2}, ["student.expert_model_parallel_size", "dense"]),
        ({"student__dtype": "float8"}, ["student.dtype", "bfloat16"]),
    ],
    ids=[
        "an optimizer that could not be resumed",
        "a layout that does not divide the processes",
        "sequences in more parts than there are processes",
        "experts that are not spread evenly",
        "experts of a dense model",
        "dtype",
    ],
)
def test_what_is_refused(
    ranks2: RankPool, folders: dict[str, Path], settings: dict[str, Any], words: list[str]
) -> None:
    for message in ranks2.run(refusal, recipe(folders["qwen3"], **settings)):
        assert all(word in message for word in words), message

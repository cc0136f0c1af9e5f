"""Interleaved pipeline stages: same losses, same gradients, same scores of tokens, same export as in one process."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_opd.config import Config
from tests.helpers.figures import record
from tests.helpers.megatron import recipe
from tests.helpers.ranks import RankPool
from tests.helpers.tiny import tiny_checkpoint
from tests.helpers.training import VOCAB, fp64, gradients, steps, trainer_for

VP2: dict[str, Any] = {
    "student__pipeline_model_parallel_size": 2,
    "student__virtual_pipeline_model_parallel_size": 2,
}
LOSSES = ("reverse_kl", "tail")
"""Over the whole vocabulary, and over the teacher's best ids."""
TP2: dict[str, Any] = {"student__tensor_model_parallel_size": 2, "student__sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "pp2, 2 chunks": (2, VP2),
    "pp2, 4 chunks, computed once more": (
        2,
        {**VP2, "student__virtual_pipeline_model_parallel_size": 4, "student__recompute": "full"},
    ),
    "pp4, 2 chunks": (4, {**VP2, "student__pipeline_model_parallel_size": 4}),
    "pp2, 2 chunks x tp2": (4, {**VP2, **TP2, "student__recompute": "selective"}),
    "pp2, 2 chunks x dp2": (4, {**VP2, "optimizer__overlap_grad_reduce": True}),
    "pp2, 2 chunks x cp2": (4, {**VP2, "student__context_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, eight = tmp_path_factory.mktemp("interleaved"), {"vocab_size": VOCAB, "num_hidden_layers": 8}
    return {
        "untied": tiny_checkpoint(root / "untied", "qwen3", **eight),
        "tied": tiny_checkpoint(root / "tied", "qwen2", **eight, tie_word_embeddings=True),
        "experts": tiny_checkpoint(root / "experts", "qwen3_moe", **eight),
        "teacher": tiny_checkpoint(root / "teacher", "llama", vocab_size=VOCAB + 6, seed=5),
    }


@pytest.fixture(scope="module")
def expected_gradients(folders: dict[str, Path], ranks1: RankPool) -> dict[str, Any]:
    return {student: ranks1.run(gradients, fp64(folders, student), LOSSES)[0] for student in ("untied", "tied")}


CASES = [*((layout, "untied") for layout in LAYOUTS), ("pp2, 2 chunks", "tied"), ("pp2, 2 chunks x tp2", "tied")]


@pytest.mark.parametrize(("layout", "student"), CASES, ids=map(", ".join, CASES))
def test_gradients_are_equal(
    folders: dict[str, Path], pools: dict[int, RankPool], expected_gradients: dict[str, Any], layout: str, student: str
) -> None:
    size, settings = LAYOUTS[layout]
    got = pools[size].run(gradients, fp64(folders, student, **settings), LOSSES)[0]
    assert len(got) > 80 * len(LOSSES)
    worst = same(got, expected_gradients[student])
    record("R15", f"largest difference of a gradient in float64: {layout}, {student}", f"{worst:.1e}")


def same(got: dict[str, Any], expected: dict[str, Any], bound: float = 1e-10) -> float:
    """The largest difference."""
    assert got.keys() == expected.keys()
    errors = []
    for name, gradient in expected.items():
        largest = np.abs(gradient).max()
        assert gradient.dtype == np.float64 and largest > 0, name
        errors.append(float(np.abs(got[name] - gradient).max()))
        assert errors[-1] < bound * largest, f"{name}: {errors[-1]}"
    return max(errors)


@pytest.mark.parametrize("loss", ["reverse_kl", "tail"])
def test_steps_report_the_same(folders: dict[str, Path], ranks1: RankPool, ranks2: RankPool, loss: str) -> None:
    """Losses, metrics, gradient norms, and the scores of every token: rows that fill a round up report nothing."""
    unclipped = {"optimizer__clip_grad": 0.0}
    expected = ranks1.run(steps, fp64(folders, **unclipped), loss)[0]
    assert any(len(scores) % 2 for _, scores in expected), "without an odd number of rows no round is filled up"
    for rank, got in enumerate(ranks2.run(steps, fp64(folders, **unclipped, **VP2), loss)):
        for (numbers, scores), (other_numbers, other_scores) in zip(expected, got, strict=True):
            for name, value in numbers.items():
                exact = 1e-6 if name == "grad_norm" else 1e-9  # Megatron takes the norm in float32
                assert other_numbers[name] == pytest.approx(value, rel=exact, abs=1e-12), name
            assert (other_scores is None) == (rank == 0), "the first stage computes no loss"
            for row, other in zip(scores, other_scores or scores, strict=True):
                assert row.keys() == other.keys()
                for name, values in row.items():
                    np.testing.assert_allclose(other[name], values, rtol=1e-5, atol=1e-6)
    assert expected[0][0]["grad_norm"] != expected[1][0]["grad_norm"]


@pytest.mark.parametrize("count", [1, 5])
def test_replicas_need_not_have_as_many_rows(
    folders: dict[str, Path], ranks1: RankPool, ranks4: RankPool, count: int
) -> None:
    """One response over two replicas, and three rows on one of them with two on the other."""
    ways = {"train__packing": False} if count > 1 else {}
    expected = ranks1.run(gradients, fp64(folders, **ways), ("tail",), count)[0]
    same(ranks4.run(gradients, fp64(folders, **ways, **VP2), ("tail",), count)[0], expected)


@pytest.mark.parametrize("settings", [{}, {"student__expert_model_parallel_size": 2}], ids=["dp2", "dp2 ep2"])
def test_experts_are_interleaved_too(
    folders: dict[str, Path], ranks1: RankPool, ranks4: RankPool, settings: dict[str, Any]
) -> None:
    expected = ranks1.run(gradients, fp64(folders, "experts"), ("tail",))[0]
    assert sum(".experts." in name for name in expected) == 8 * 4 * 3
    got = ranks4.run(gradients, fp64(folders, "experts", **VP2, **settings), ("tail",))[0]
    same(got, expected, 1e-6)  # Megatron takes the router's softmax in float32


def exported(rank: int, config: Config, folder: Path) -> None:
    from nemo_opd.engines.megatron.weights import save_hf_checkpoint

    trainer = trainer_for(config, "reverse_kl")
    save_hf_checkpoint(trainer.export_weights(), folder, Path(config.student.model))


@pytest.mark.parametrize("student", ["tied", "experts"])
def test_what_is_exported_is_what_was_read(
    folders: dict[str, Path], ranks2: RankPool, tmp_path: Path, student: str
) -> None:
    config = recipe(folders[student], folders["teacher"], **VP2)
    ranks2.run(exported, config, tmp_path / "out")
    assert filecmp.cmp(folders[student] / "model.safetensors", tmp_path / "out" / "model.safetensors", shallow=False)

"""Sequences cut over ranks: same losses, same gradients, same token scores, same checkpoint as whole ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_opd.config import Config
from nemo_opd.types import TeacherScores
from tests.helpers.figures import record
from tests.helpers.megatron import random_rollouts, replica_batch
from tests.helpers.ranks import RankPool
from tests.helpers.tiny import tiny_checkpoint
from tests.helpers.training import LOSSES, VOCAB, fp64, gradients, loss_of, steps, trainer_for

CP2: dict[str, Any] = {"student__context_parallel_size": 2}
TP2: dict[str, Any] = {"student__tensor_model_parallel_size": 2, "student__sequence_parallel": True}
PP2: dict[str, Any] = {"student__pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "cp2": (2, CP2),
    "cp2, attention computed once more": (2, {**CP2, "student__recompute": "selective"}),
    "cp4": (4, {"student__context_parallel_size": 4}),
    "cp2 x tp2": (4, {**CP2, **TP2}),
    "cp2 x pp2": (4, {**CP2, **PP2, "student__recompute": "full"}),
    "cp2 x dp2": (4, {**CP2, "optimizer__overlap_grad_reduce": True}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("context")
    return {
        "untied": tiny_checkpoint(root / "untied", "qwen3", vocab_size=VOCAB),
        "tied": tiny_checkpoint(root / "tied", "qwen2", vocab_size=VOCAB, tie_word_embeddings=True),
        "teacher": tiny_checkpoint(root / "teacher", "llama", vocab_size=VOCAB + 6, seed=5),
    }


@pytest.fixture(scope="module")
def expected_gradients(folders: dict[str, Path], ranks1: RankPool) -> dict[str, Any]:
    return {student: ranks1.run(gradients, fp64(folders, student))[0] for student in ("untied", "tied")}


CASES = [*((layout, "untied") for layout in LAYOUTS), ("cp2 x pp2", "tied")]


@pytest.mark.parametrize(("layout", "student"), CASES, ids=map(", ".join, CASES))
def test_gradients_are_equal(
    folders: dict[str, Path], pools: dict[int, RankPool], expected_gradients: dict[str, Any], layout: str, student: str
) -> None:
    size, settings = LAYOUTS[layout]
    got = pools[size].run(gradients, fp64(folders, student, **settings))[0]
    expected = expected_gradients[student]
    assert got.keys() == expected.keys() and len(got) > 40 * len(LOSSES)
    errors = []
    for name, gradient in expected.items():
        largest = np.abs(gradient).max()
        assert gradient.dtype == np.float64 and largest > 0, name
        errors.append(float(np.abs(got[name] - gradient).max()))
        assert errors[-1] < 1e-10 * largest, f"{name}: {errors[-1]}"
    record("R15", f"largest difference of a gradient in float64: {layout}, {student}", f"{max(errors):.1e}")


@pytest.mark.parametrize("loss", ["reverse_kl", "tail", "cross_entropy"])
def test_steps_report_the_same(folders: dict[str, Path], ranks1: RankPool, ranks4: RankPool, loss: str) -> None:
    """Losses, metrics, gradient norms, and what is known of every single token, in the order of the row."""
    unclipped = {"optimizer__clip_grad": 0.0}
    expected = ranks1.run(steps, fp64(folders, **unclipped), loss)[0]
    for rank, got in enumerate(ranks4.run(steps, fp64(folders, **unclipped, **CP2, **PP2), loss)):
        for (numbers, scores), (other_numbers, other_scores) in zip(expected, got, strict=True):
            for name, value in numbers.items():
                exact = 1e-6 if name == "grad_norm" else 1e-9  # Megatron takes the norm in float32
                assert other_numbers[name] == pytest.approx(value, rel=exact, abs=1e-12), name
            assert sum(len(row["student_entropy"]) for row in scores or ()) > 30
            assert (other_scores is None) == (rank < 2), "the first stage computes no loss"
            for row, other in zip(scores or (), other_scores or scores or (), strict=True):
                assert row.keys() == other.keys()
                for name, values in row.items():
                    np.testing.assert_allclose(other[name], values, rtol=1e-5, atol=1e-6)
    assert expected[0][0]["grad_norm"] != expected[1][0]["grad_norm"]


def test_a_row_shorter_than_its_ranks(folders: dict[str, Path], ranks1: RankPool, ranks4: RankPool) -> None:
    """One short response over four ranks: some hold nothing but padding."""
    expected = ranks1.run(short_gradients, fp64(folders))[0]
    got = ranks4.run(short_gradients, fp64(folders, student__context_parallel_size=4))[0]
    for name, gradient in expected.items():
        assert np.abs(got[name] - gradient).max() < 1e-10 * np.abs(gradient).max(), name


def short_gradients(rank: int, config: Config) -> dict[str, Any]:
    from dataclasses import replace

    trainer = trainer_for(config, "policy_gradient")
    (rollout,) = random_rollouts(3, 1, VOCAB)
    short = replace(rollout, prompt=replace(rollout.prompt, token_ids=(5, 6)), **{
        name: getattr(rollout, name)[:2] for name in ("response_ids", "sampler_logprobs", "author", "policy_version")
    }, loss_mask=torch.ones(2, dtype=torch.bool))  # fmt: skip
    scores = {0: TeacherScores(0, short.loss_mask, sampled_logprobs=torch.tensor([-1.0, -2.0]))}
    batch = replica_batch([short], scores, loss_of("policy_gradient"), 0, 1, 64)
    return {name: gradient.clone().numpy() for name, gradient in trainer.gradients(batch)}

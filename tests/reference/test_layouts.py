"""The layout changes where numbers are computed, not the numbers: same losses, same gradients, packed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_opd.config import Config
from tests.helpers.figures import record
from tests.helpers.megatron import random_hidden, random_rollouts, recipe, replica_batch
from tests.helpers.objectives import ReverseKLAndEvenCrossEntropy
from tests.helpers.ranks import RankPool
from tests.helpers.tiny import tiny_checkpoint

STEPS = 20
VOCAB = 91  # odd: the last tensor-parallel shard is uneven
HIDDEN = 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("layouts")
    return {
        "untied": tiny_checkpoint(root / "untied", "qwen3", vocab_size=VOCAB),
        "tied": tiny_checkpoint(root / "tied", "qwen2", vocab_size=VOCAB, tie_word_embeddings=True),
        "experts": tiny_checkpoint(root / "experts", "qwen3_moe", vocab_size=VOCAB, num_hidden_layers=2),
        "teacher": tiny_checkpoint(root / "teacher", "llama", vocab_size=VOCAB + 6, seed=5),
    }


def trainer_for(config: Config) -> Any:
    from nemo_opd.engines.megatron.parallel import destroy_student_groups
    from nemo_opd.engines.megatron.trainer import MegatronTrainer

    destroy_student_groups()  # of an earlier test in this process
    trainer = MegatronTrainer(config, ReverseKLAndEvenCrossEntropy(), None, STEPS)
    trainer.set_teacher_output(config.teacher.model)
    return trainer


def batch_for(config: Config, place: Any, step: int, count: int = 6) -> Any:
    dtype = getattr(torch, config.student.dtype)
    rollouts = random_rollouts(step, count, VOCAB)
    scores = random_hidden(rollouts, step, HIDDEN, dtype)
    return replica_batch(
        rollouts,
        scores,
        ReverseKLAndEvenCrossEntropy(),
        place.data_parallel_rank,
        place.data_parallel_size,
        config.train.micro_batch_tokens,
        config.train.packing,
    )


def curve(rank: int, config: Config) -> list[tuple[float, float, float]]:
    """(kl, even, gradient norm) of every step."""
    trainer = trainer_for(config)
    answer = []
    for step in range(STEPS):
        stats = trainer.train_step(batch_for(config, trainer.place, step % 4))
        assert not stats.skipped
        answer.append((stats.losses["kl"], stats.losses["even"], stats.grad_norm))
    return answer


def gradients(rank: int, config: Config, step: int = 0, count: int = 6) -> dict[str, Any] | None:
    """The gradient of one batch by Hugging Face name, from rank 0."""
    trainer = trainer_for(config)
    found = {
        name: gradient.clone().numpy()
        for name, gradient in trainer.gradients(batch_for(config, trainer.place, step, count))
    }
    return found if rank == 0 else None


TP2 = {"student__tensor_model_parallel_size": 2}
PP2 = {"student__pipeline_model_parallel_size": 2}
CHUNKS: dict[str, Any] = {**PP2, "student__virtual_pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, TP2),
    "tp2 sequence parallel": (2, {**TP2, "student__sequence_parallel": True}),
    "pp2": (2, PP2),
    "dp2": (2, {}),
    "tp2 x pp2": (4, {**TP2, **PP2}),
    "tp2 x pp2 sequence parallel": (4, {**TP2, **PP2, "student__sequence_parallel": True}),
}


def fp32(folders: dict[str, Path], student: str, **settings: Any) -> Config:
    return recipe(folders[student], folders["teacher"], train__micro_batch_tokens=64, **settings)


def fp64(folders: dict[str, Path], student: str, **settings: Any) -> Config:
    return fp32(folders, student, student__dtype="float64", teacher__dtype="float64", **settings)


@pytest.fixture(scope="module")
def one_process_curves(folders: dict[str, Path], ranks1: RankPool) -> dict[str, Any]:
    return {student: ranks1.run(curve, fp32(folders, student))[0] for student in ("untied", "tied")}


@pytest.mark.parametrize("student", ["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_curves_are_equal_step_by_step(
    folders: dict[str, Path], pools: dict[int, RankPool], one_process_curves: dict[str, Any], layout: str, student: str
) -> None:
    world_size, settings = LAYOUTS[layout]
    curves = pools[world_size].run(curve, fp32(folders, student, **settings))
    assert all(other == curves[0] for other in curves), "statistics are equal on every rank"
    expected = np.array(one_process_curves[student])
    assert expected[0, 1] - expected[-4, 1] > 0.1, "the run learns its four batches"
    np.testing.assert_allclose(np.array(curves[0]), expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def one_process_gradients(folders: dict[str, Path], ranks1: RankPool) -> dict[str, Any]:
    return {student: ranks1.run(gradients, fp64(folders, student))[0] for student in ("untied", "tied")}


def same_gradients(got: dict[str, Any], expected: dict[str, Any], bound: float = 1e-10, what: str = "") -> None:
    assert got.keys() == expected.keys()
    worst = 0.0
    for name, gradient in expected.items():
        assert gradient.dtype == np.float64 and np.abs(gradient).max() > 0, name
        error = float(np.abs(got[name] - gradient).max())
        assert error < bound * np.abs(gradient).max(), f"{name}: {error}"
        worst = max(worst, error)
    if what:
        assert worst <= 1e-12
        record("R15", f"largest difference of a gradient in float64: {what}", f"{worst:.1e}")


@pytest.mark.parametrize("student", ["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_equal(
    folders: dict[str, Path],
    pools: dict[int, RankPool],
    one_process_gradients: dict[str, Any],
    layout: str,
    student: str,
) -> None:
    world_size, settings = LAYOUTS[layout]
    got = pools[world_size].run(gradients, fp64(folders, student, **settings))[0]
    same_gradients(got, one_process_gradients[student], what=f"{layout}, {student}")


@pytest.mark.parametrize(
    "settings",
    [
        {"train__packing": False},
        {"train__micro_batch_tokens": 1000},
        {"train__loss_chunk_tokens": 7},
        {"student__vocab_padding_multiple": 64},
    ],
    ids=["one sequence a row", "one row", "small chunks", "padded vocabulary"],
)
def test_packing_micro_batches_and_padding_change_nothing(
    folders: dict[str, Path], ranks1: RankPool, one_process_gradients: dict[str, Any], settings: dict[str, Any]
) -> None:
    config = fp64(folders, "untied")
    for key, value in settings.items():
        section, name = key.split("__")
        setattr(getattr(config, section), name, value)
    what = ", ".join(f"{key.replace('__', '.')}={value}" for key, value in settings.items())
    same_gradients(ranks1.run(gradients, config)[0], one_process_gradients["untied"], what=what)


def test_a_replica_without_work_changes_nothing(folders: dict[str, Path], ranks1: RankPool, ranks2: RankPool) -> None:
    config = fp64(folders, "untied")
    alone, both = ranks1.run(gradients, config, 3, 1)[0], ranks2.run(gradients, config, 3, 1)[0]
    same_gradients(both, alone, what="a replica without work")


EP2 = {"student__expert_model_parallel_size": 2}
SEQUENCE = {"student__sequence_parallel": True}
EXPERT_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2, experts repeated": (2, {}),
    "dp2 ep2": (2, EP2),
    "tp2, experts repeated": (2, {**TP2, **SEQUENCE}),
    "tp2 ep2": (2, {**TP2, **SEQUENCE, **EP2}),
    "pp2 x dp2 ep2": (4, {**PP2, **EP2}),
    "tp2 x dp2 ep2": (4, {**TP2, **SEQUENCE, **EP2}),
}
ROUTED = 1e-6
"""Megatron takes the router's softmax in float32 whatever the model's dtype."""


@pytest.fixture(scope="module")
def one_process_experts(folders: dict[str, Path], ranks1: RankPool) -> tuple[dict[str, Any] | None, Any]:
    curves = ranks1.run(curve, fp32(folders, "experts"))
    return ranks1.run(gradients, fp64(folders, "experts"))[0], curves[0]


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_experts_learn_the_same_wherever_they_are(
    folders: dict[str, Path], pools: dict[int, RankPool], one_process_experts: tuple[Any, Any], layout: str
) -> None:
    """Gradients of every expert and router in float64; 20 steps of Adam behind a global gradient norm in float32."""
    world_size, settings = EXPERT_LAYOUTS[layout]
    expected, expected_curve = one_process_experts
    assert sum(".experts." in name for name in expected) == 2 * 4 * 3
    got = pools[world_size].run(gradients, fp64(folders, "experts", **settings))[0]
    same_gradients(got, expected, ROUTED)
    curves = pools[world_size].run(curve, fp32(folders, "experts", **settings))
    assert all(other == curves[0] for other in curves), "statistics are equal on every rank"
    np.testing.assert_allclose(np.array(curves[0]), np.array(expected_curve), atol=1e-3, rtol=1e-3)


def test_a_replica_without_work_takes_part_in_its_neighbours_experts(
    folders: dict[str, Path], ranks1: RankPool, ranks2: RankPool
) -> None:
    """One response over two replicas, and five over rows that hold one each: 3 rows on one replica, 2 on the other."""
    for count, settings in ((1, {}), (5, {"train__packing": False})):
        config = fp64(folders, "experts", **settings)
        expected = ranks1.run(gradients, config, 3, count)[0]
        same_gradients(
            ranks2.run(gradients, fp64(folders, "experts", **settings, **EP2), 3, count)[0], expected, ROUTED
        )


def layer_calls(rank: int, config: Config) -> tuple[int, int]:
    """How often a step computes the attention and the MLP of the first layer, for each row."""
    trainer = trainer_for(config)
    calls = [0, 0]

    def count(place: int) -> Any:
        def hook(*_: Any) -> None:
            calls[place] += 1

        return hook

    layer = trainer.model.chunks[0].decoder.layers[0]
    layer.self_attention.core_attention.register_forward_hook(count(0))
    layer.mlp.register_forward_hook(count(1))
    batch = batch_for(config, trainer.place, 0)
    trainer.train_step(batch)
    assert len(batch.rows) > 1
    return calls[0] // len(batch.rows), calls[1] // len(batch.rows)


@pytest.mark.parametrize(("recompute", "calls"), [("none", (1, 1)), ("selective", (2, 1)), ("full", (2, 2))])
def test_what_is_computed_once_more(
    folders: dict[str, Path], ranks1: RankPool, recompute: str, calls: tuple[int, int]
) -> None:
    assert ranks1.run(layer_calls, fp32(folders, "untied", student__recompute=recompute)) == [calls]


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (1, {"student__recompute": "selective"}),
        (2, {**PP2, "student__recompute": "selective"}),
        (2, {**TP2, **SEQUENCE, "student__recompute": "full"}),
        (4, {**TP2, **PP2, "student__recompute": "full"}),
        (2, {"optimizer__overlap_grad_reduce": True}),
        (4, {**PP2, "optimizer__overlap_grad_reduce": True, "student__recompute": "full"}),
    ],
    ids=["selective", "selective, pp2", "full, tp2", "full, tp2 x pp2", "overlap, dp2", "overlap and full, pp2 x dp2"],
)
def test_recomputation_and_overlap_change_no_gradient(
    folders: dict[str, Path],
    pools: dict[int, RankPool],
    one_process_gradients: dict[str, Any],
    world_size: int,
    settings: dict[str, Any],
) -> None:
    got = pools[world_size].run(gradients, fp64(folders, "untied", **settings))[0]
    same_gradients(got, one_process_gradients["untied"])


def distributed_curve(rank: int, config: Config) -> list[tuple[float, float, float]]:
    """`curve` with Megatron's distributed optimizer around torch's Adam, which a recipe gets with Transformer Engine
    only: its checkpoints could not be resumed otherwise."""
    from unittest import mock

    from nemo_opd.engines.megatron import optimizer, trainer

    with (
        mock.patch.object(optimizer, "use_distributed", lambda _: True),
        mock.patch.object(trainer, "use_distributed", lambda _: True),
        mock.patch.object(optimizer, "get_megatron_optimizer", wraps=optimizer.get_megatron_optimizer) as build,
    ):
        found = curve(rank, config)
    assert build.call_args.args[0].use_distributed_optimizer
    return found


@pytest.mark.parametrize(("size", "settings"), [(2, {}), (4, CHUNKS)], ids=["dp2", "pp2 in chunks x dp2"])
def test_the_distributed_optimizer_takes_the_same_steps(
    folders: dict[str, Path],
    pools: dict[int, RankPool],
    one_process_curves: dict[str, Any],
    size: int,
    settings: dict[str, Any],
) -> None:
    """20 steps of two replicas, each of which updates half of the weights and gathers the rest."""
    curves = pools[size].run(distributed_curve, fp32(folders, "untied", **settings))
    assert all(other == curves[0] for other in curves)
    np.testing.assert_allclose(np.array(curves[0]), np.array(one_process_curves["untied"]), atol=1e-4, rtol=1e-4)


def test_recomputation_and_overlap_of_experts(
    folders: dict[str, Path], ranks2: RankPool, one_process_experts: tuple[Any, Any]
) -> None:
    settings = {**EP2, "student__recompute": "full", "optimizer__overlap_grad_reduce": True}
    same_gradients(ranks2.run(gradients, fp64(folders, "experts", **settings))[0], one_process_experts[0], ROUTED)

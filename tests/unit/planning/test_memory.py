"""Planned memory against what torch allocates for small models on CPU: what stays of a trainer, and saved tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_opd.config import Config
from nemo_opd.planning.activations import layer_activations
from nemo_opd.planning.memory import rank_memory
from tests.helpers.planned import TEACHER_HIDDEN, long_batch, long_rows, setting_of
from tests.helpers.ranks import RankPool
from tests.helpers.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small, but with the proportions of large ones: layers outweigh what is computed once."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 1024}
    sizes |= {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 6, "vocab_size": 512}
    for family in ("qwen3", "llama"):
        tiny_checkpoint(folder / family, family, **sizes)
        tiny_checkpoint(folder / f"{family}-tied", family, **sizes, tie_word_embeddings=True)
    tiny_checkpoint(folder / "teacher", "qwen3", seed=1, **{**sizes, "hidden_size": TEACHER_HIDDEN})
    return folder


def settings(models: Path, student: str, dtype: str, **more: Any) -> Config:
    return long_rows(models / student, models / "teacher", dtype, prompt=129, response=384, **more)


def measured(rank: int, config: Config) -> dict[str, float]:
    """Bytes of this rank's parameters, gradients and optimizer."""
    from nemo_opd.engines.megatron.parallel import destroy_student_groups
    from nemo_opd.engines.megatron.trainer import MegatronTrainer, gradient_buffers
    from nemo_opd.losses import build_loss

    destroy_student_groups()
    loss = build_loss(config.loss)
    trainer = MegatronTrainer(config, loss, None, 10)
    trainer.set_teacher_output(config.teacher.model)
    step = long_batch(config, loss, trainer, 512)
    trainer.train_step(step)  # Adam makes its moments at the first update
    return {
        "parameters": sum(p.nbytes for p in trainer.model.parameters()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in gradient_buffers(trainer._ddp)),
        "optimizer": _optimizer_bytes(trainer),
    }


def _optimizer_bytes(trainer: Any) -> int:
    """Moments, and master copies where parameters are not their own."""
    own = {p.data_ptr() for p in trainer.model.parameters()}
    groups = trainer._optimizer.param_groups
    masters = sum(p.nbytes for group in groups for p in group["params"] if p.data_ptr() not in own)
    states = trainer._optimizer.optimizer.state.values()
    moments = (state[name] for state in states for name in ("exp_avg", "exp_avg_sq"))
    return masters + sum(moment.nbytes for moment in moments)


INTERLEAVED = {"student__pipeline_model_parallel_size": 2, "student__virtual_pipeline_model_parallel_size": 3}
LAYOUTS = [
    ("qwen3", "bfloat16", 1, {}),
    ("llama-tied", "float32", 1, {}),
    ("qwen3", "bfloat16", 2, {"student__tensor_model_parallel_size": 2}),
    ("qwen3", "float32", 2, {"student__tensor_model_parallel_size": 2, "student__sequence_parallel": True}),
    ("qwen3-tied", "bfloat16", 2, {"student__pipeline_model_parallel_size": 2}),
    ("llama", "bfloat16", 2, INTERLEAVED),
    ("qwen3", "bfloat16", 2, {"student__context_parallel_size": 2}),
]


@pytest.mark.parametrize(("student", "dtype", "processes", "more"), LAYOUTS, ids=lambda value: str(value))
def test_weights_gradients_and_optimizer_take_what_was_planned(
    student: str, dtype: str, processes: int, more: dict[str, Any], models: Path, request: pytest.FixtureRequest
) -> None:
    config = settings(models, student, dtype, **more)
    pool: RankPool = request.getfixturevalue(f"ranks{processes}")
    ranks = pool.run(measured, config)
    kinds = rank_memory(setting_of(config, processes), kernels="local")
    for number, found in enumerate(ranks):
        kind = kinds[min(number, len(kinds) - 1)]
        stays = kind.stays
        names = (
            ("parameters", "student, weights"),
            ("gradients", "student, gradients"),
            ("optimizer", "student, optimizer"),
        )
        for what, name in names:
            assert found[what] == stays[name], what


def saved(rank: int, folder: Path, dtype: str) -> float:
    """Bytes that autograd keeps of one forward of the whole model without its loss, by position."""
    from nemo_opd.config import LayoutConfig
    from nemo_opd.engines.megatron.model import build_model
    from nemo_opd.engines.megatron.parallel import Layout, destroy_student_groups, student_groups

    destroy_student_groups()
    layout = Layout.of(LayoutConfig(), "student")
    groups = student_groups(layout, 0)
    [model], _ = build_model(folder, LayoutConfig(), layout, groups, getattr(torch, dtype), "student")
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    length = 256
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(model.inputs(torch.arange(length) % 512, torch.tensor([0, length], dtype=torch.int32)))
    assert output.requires_grad
    return sum(kept.values()) / length


@pytest.mark.parametrize("student", ["qwen3", "llama"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_autograd_keeps_the_activations_that_were_planned(
    student: str, dtype: str, models: Path, ranks1: RankPool
) -> None:
    setting = setting_of(settings(models, student, dtype), 1)
    model = setting.student
    layer = sum(layer_activations(model.shape, model.spread, model.width, "local").values())
    last_norm = (8 if model.width < 4 else model.width) * model.shape.hidden
    expected = model.shape.layers * layer + last_norm
    (found,) = ranks1.run(saved, models / student, dtype)
    assert found == pytest.approx(expected, rel=0.03)

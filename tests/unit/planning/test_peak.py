"""The planned peak of a training step and of scoring against what torch really allocates, for small models on CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from nemo_opd.config import Config, TailLoss
from nemo_opd.planning.memory import rank_memory
from tests.helpers.peak import peak_of
from tests.helpers.planned import TEACHER_HIDDEN, long_batch, long_rows, longest_rollouts, setting_of
from tests.helpers.tiny import tiny_checkpoint

PROMPT, RESPONSE = 129, 896
SMALL, LARGE = 2048, 32_000
"""Vocabularies with which layers, or the loss, take most."""
UNDER, OVER = 0.07, 0.08
"""What a plan may be wrong by: a run dies of too little, not of too much."""
SIZES = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096}
SIZES |= {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 384}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for vocabulary in (SMALL, LARGE):
        sizes = {**SIZES, "vocab_size": vocabulary}
        for family in ("qwen3", "llama"):
            tiny_checkpoint(folder / f"{family}-{vocabulary}", family, **sizes)
        tiny_checkpoint(folder / f"tied-{vocabulary}", "qwen3", **sizes, tie_word_embeddings=True)
        tiny_checkpoint(folder / f"teacher-{vocabulary}", "qwen3", seed=1, **{**sizes, "hidden_size": TEACHER_HIDDEN})
    tiny_checkpoint(folder / f"moe-{SMALL}", "qwen3_moe", **SIZES, **EXPERTS, vocab_size=SMALL)
    return folder


def least_peak(run: Callable[[], Any]) -> tuple[int, list[tuple[int, str]]]:
    """Bytes at the peak, and the largest blocks then. Several ranks run four times: what gloo's threads give back late
    is not the run's, and differs from one to the next."""
    import torch.distributed as dist

    times = 4 if dist.get_world_size() > 1 else 1
    found = min((peak_of(run) for _ in range(times)), key=lambda peak: peak.bytes)
    return found.bytes, list(found.live[:40])


def trained(rank: int, config: Config, vocabulary: int) -> tuple[int, list[tuple[int, str]]]:
    """Bytes at the peak of a training step, the second one: the first makes Adam's moments; and the largest blocks."""
    from nemo_opd.engines.megatron.parallel import destroy_student_groups
    from nemo_opd.engines.megatron.trainer import MegatronTrainer
    from nemo_opd.losses import build_loss

    destroy_student_groups()
    loss = build_loss(config.loss)
    trainer = MegatronTrainer(config, loss, None, 10)
    trainer.set_teacher_output(config.teacher.model)
    batch = long_batch(config, loss, trainer, vocabulary)
    trainer.train_step(batch)
    return least_peak(lambda: trainer.train_step(batch))


def compare(parts: Mapping[str, float], found: int, blocks: list[tuple[int, str]]) -> None:
    planned = sum(parts.values())
    told = "\n".join(f"{size / 1e6:8.2f} MB {where[-150:]}" for size, where in blocks)
    assert -UNDER <= planned / found - 1 <= OVER, f"planned {planned / found:.3f} of it: {parts}; live then:\n{told}"


SP2 = {"student__tensor_model_parallel_size": 2, "student__sequence_parallel": True}
INTERLEAVED = {"student__pipeline_model_parallel_size": 2, "student__virtual_pipeline_model_parallel_size": 2}
FULL = {"student__recompute": "full"}
SELECTIVE = {"student__recompute": "selective"}
CASES: list[tuple[str, str, int, dict[str, Any]]] = [
    (f"qwen3-{SMALL}", "bfloat16", 1, {}),
    (f"qwen3-{SMALL}", "float32", 1, {}),
    (f"qwen3-{LARGE}", "bfloat16", 1, {"chunk": 256}),
    (f"llama-{SMALL}", "bfloat16", 1, FULL),
    (f"qwen3-{SMALL}", "float32", 1, FULL),
    (f"tied-{LARGE}", "float32", 1, {}),
    (f"tied-{LARGE}", "bfloat16", 1, FULL),
    (f"qwen3-{SMALL}", "bfloat16", 2, {"student__tensor_model_parallel_size": 2}),
    (f"llama-{LARGE}", "float32", 2, {**SP2, "chunk": 256}),
    (f"qwen3-{SMALL}", "float32", 2, SP2),
    (f"tied-{SMALL}", "bfloat16", 2, {"student__pipeline_model_parallel_size": 2}),
    (f"qwen3-{LARGE}", "float32", 2, {"student__pipeline_model_parallel_size": 2}),
    (f"qwen3-{SMALL}", "float32", 2, {"student__pipeline_model_parallel_size": 2, **FULL}),
    (f"llama-{SMALL}", "float32", 2, INTERLEAVED),
    (f"tied-{SMALL}", "bfloat16", 2, {**INTERLEAVED, **FULL}),
    (f"qwen3-{SMALL}", "bfloat16", 1, SELECTIVE),
    (f"qwen3-{SMALL}", "float32", 1, SELECTIVE),
    (f"llama-{SMALL}", "bfloat16", 1, SELECTIVE),
    (f"moe-{SMALL}", "bfloat16", 1, {}),
    (f"moe-{SMALL}", "float32", 1, {}),
    (f"moe-{SMALL}", "float32", 1, FULL),
    (f"moe-{SMALL}", "bfloat16", 2, {"student__expert_model_parallel_size": 2}),
]


@pytest.mark.parametrize(("student", "dtype", "processes", "more"), CASES, ids=lambda value: str(value))
def test_the_peak_of_a_training_step_is_what_was_planned(
    student: str, dtype: str, processes: int, more: dict[str, Any], models: Path, request: pytest.FixtureRequest
) -> None:
    vocabulary = int(student.partition("-")[2])
    config = long_rows(models / student, models / f"teacher-{vocabulary}", dtype, PROMPT, RESPONSE, **more)
    ranks = request.getfixturevalue(f"ranks{processes}").run(trained, config, vocabulary)
    kinds = rank_memory(setting_of(config, processes), kernels="local")
    for number, (found, blocks) in enumerate(ranks):
        parts = kinds[min(number, len(kinds) - 1)].phases["training"]
        compare(parts, found, blocks)


def scored(rank: int, config: Config, vocabulary: int) -> tuple[int, list[tuple[int, str]]]:
    """The same of a window of rows through the teacher."""
    from nemo_opd.engines.megatron.parallel import destroy_student_groups
    from nemo_opd.engines.megatron.scorer import MegatronScorer
    from nemo_opd.losses import build_loss
    from nemo_opd.types import ScoreRequest

    destroy_student_groups()
    scorer = MegatronScorer(config)
    ranks = range(config.train.processes or 1)
    requests = [
        ScoreRequest(i, rollout.prompt.token_ids, rollout.response_ids, consumers=(min(i, len(ranks) - 1),))
        for i, rollout in enumerate(longest_rollouts(config, vocabulary, config.train.prompts_per_step))
    ]
    needs = build_loss(config.loss).needs
    try:
        return least_peak(lambda: list(scorer.score(requests, needs)))
    finally:
        scorer.close()


SCORED: list[tuple[str, str, int, bool, dict[str, Any]]] = [
    (f"qwen3-{SMALL}", "bfloat16", 1, True, {}),
    (f"qwen3-{SMALL}", "float32", 1, True, {}),
    (f"qwen3-{LARGE}", "float32", 1, False, {}),
    (f"qwen3-{SMALL}", "float32", 2, True, {}),
    (f"qwen3-{SMALL}", "bfloat16", 2, True, {"teacher__tensor_model_parallel_size": 2}),
]


@pytest.mark.parametrize(("teacher", "dtype", "processes", "whole", "more"), SCORED, ids=lambda value: str(value))
def test_the_peak_of_scoring_is_what_was_planned(
    teacher: str, dtype: str, processes: int, whole: bool, more: dict[str, Any], models: Path,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    vocabulary = int(teacher.partition("-")[2])
    config = long_rows(models / f"teacher-{vocabulary}", models / teacher, dtype, PROMPT, RESPONSE, **more)
    config.train.processes, config.train.prompts_per_step = processes, 8
    if not whole:
        config.loss = TailLoss()
    ranks = request.getfixturevalue(f"ranks{processes}").run(scored, config, vocabulary)
    (kind,) = rank_memory(setting_of(config, processes), kernels="local")
    parts = kind.phases["scoring"]
    for found, blocks in ranks:
        compare(parts, found, blocks)

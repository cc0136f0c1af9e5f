"""Trainers and batches of float64 for tests that compare layouts: run in each process of a `RankPool`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nemo_opd.config import Config
from nemo_opd.types import Need, TeacherScores
from tests.helpers.megatron import random_hidden, random_rollouts, recipe, replica_batch

VOCAB = 91  # odd: the last tensor-parallel shard is uneven
HIDDEN = 32
STEPS = 3
LOSSES = ("reverse_kl", "tail", "cross_entropy", "policy_gradient")
"""Over the whole vocabulary, over the teacher's best ids, of a data set's tokens, and of a whole row's returns."""


def fp64(folders: dict[str, Path], student: str = "untied", **settings: Any) -> Config:
    settings |= {"student__dtype": "float64", "teacher__dtype": "float64", "train__micro_batch_tokens": 64}
    return recipe(folders[student], folders["teacher"], **settings)


def loss_of(name: str) -> Any:
    from nemo_opd.losses.registry import LOSSES as REGISTERED

    return REGISTERED[name](**{"tail": {"k": 8}, "policy_gradient": {"discount": 0.9}}.get(name, {}))


def trainer_for(config: Config, loss: str) -> Any:
    from nemo_opd.engines.megatron.parallel import destroy_student_groups
    from nemo_opd.engines.megatron.trainer import MegatronTrainer

    destroy_student_groups()  # of an earlier test in this process
    trainer = MegatronTrainer(config, loss_of(loss), None, 10)
    trainer.set_teacher_output(config.teacher.model)
    return trainer


def batch_for(config: Config, place: Any, loss: str, step: int, count: int = 6) -> Any:
    """Rollouts of 1 to 47 positions, most of which 4 and 8 do not divide; this replica's rows."""
    rollouts = random_rollouts(step, count, VOCAB)
    scores = random_hidden(rollouts, step, HIDDEN, torch.float64)
    need = loss_of(loss).needs.need
    if need is Need.SAMPLED:
        scores = {
            key: TeacherScores(key, score.valid, sampled_logprobs=-rollouts[key].response_ids.float() / 20)
            for key, score in scores.items()
        }
    where = (place.data_parallel_rank, place.data_parallel_size, config.train.micro_batch_tokens)
    return replica_batch(rollouts, {} if need is Need.NOTHING else scores, loss_of(loss), *where)


def gradients(rank: int, config: Config, losses: tuple[str, ...] = LOSSES, count: int = 6) -> dict[str, Any] | None:
    """The gradient of one batch under each loss, by Hugging Face name, from rank 0."""
    found = {}
    for loss in losses:
        trainer = trainer_for(config, loss)
        for name, gradient in trainer.gradients(batch_for(config, trainer.place, loss, 0, count)):
            found[f"{loss} {name}"] = gradient.clone().numpy()
    return found if rank == 0 else None


def steps(rank: int, config: Config, loss: str) -> list[tuple[dict[str, float], list[dict[str, list[float]]] | None]]:
    """Of each step its statistics and, where the loss is computed, the token scores of each row."""
    trainer = trainer_for(config, loss)
    found = []
    for step in range(STEPS):
        stats = trainer.train_step(batch_for(config, trainer.place, loss, step))
        assert not stats.skipped
        scores = [{name: values.tolist() for name, values in row.items()} for row in stats.token_scores]
        numbers = {**stats.losses, **stats.metrics, "grad_norm": stats.grad_norm}
        found.append((numbers, scores if trainer.place.computes_loss else None))
    return found

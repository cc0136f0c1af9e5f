"""Recipes and batches for tests of the Megatron engine; random, but the same on every rank and in every layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_opd.config import Config, DataConfig, RunConfig, TrainConfig
from nemo_opd.packing import pack, sequence_length
from nemo_opd.processes import balanced
from nemo_opd.types import Author, Finish, PackedRow, Prompt, Rollout, TeacherScores, TrainBatch


def recipe(student: Path, teacher: Path | None = None, **settings: Any) -> Config:
    """A fp32 recipe; `settings` are dotted keys with ``__`` for the dot: ``student__tensor_model_parallel_size=2``."""
    config = Config(run=RunConfig(dir="unused"), data=DataConfig(path="unused"), train=TrainConfig(steps=20))
    config.student.model, config.student.dtype = str(student), "float32"
    config.teacher.model, config.teacher.dtype = None if teacher is None else str(teacher), "float32"
    config.optimizer.lr = 1e-3
    for key, value in settings.items():
        section, name = key.split("__")
        assert hasattr(getattr(config, section), name), key
        setattr(getattr(config, section), name, value)
    return config


def random_rollout(generator: torch.Generator, vocab_size: int, index: int, longest: int = 24) -> Rollout:
    """A rollout with a random prompt, a random response, and a hole in its loss mask."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    prompt = torch.randint(0, vocab_size, (draw(1, longest),), generator=generator)
    response = torch.randint(0, vocab_size, (draw(1, longest),), generator=generator)
    mask = torch.rand(len(response), generator=generator) < 0.9
    return Rollout(
        prompt=Prompt(index=index, epoch=0, messages=(), token_ids=tuple(prompt.tolist())),
        sample=0,
        response_ids=response,
        sampler_logprobs=torch.rand(len(response), generator=generator) - 3.0,
        author=torch.full((len(response),), int(Author.STUDENT), dtype=torch.int8),
        policy_version=torch.zeros(len(response), dtype=torch.int64),
        loss_mask=mask,
        finish=Finish.EOS,
    )


def random_rollouts(seed: int, count: int, vocab_size: int) -> list[Rollout]:
    generator = torch.Generator().manual_seed(seed)
    return [random_rollout(generator, vocab_size, index) for index in range(count)]


def random_hidden(rollouts: Sequence[Rollout], seed: int, hidden: int, dtype: torch.dtype) -> dict[int, TeacherScores]:
    """What a teacher could have answered for `Need.FULL`; the last token of the first rollout has no score."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for key, rollout in enumerate(rollouts):
        states = torch.randn(len(rollout.response_ids), hidden, generator=generator, dtype=torch.float64).to(dtype)
        valid = torch.ones(len(states), dtype=torch.bool)
        if key == 0:
            valid[-1] = False
            states[-1] = torch.nan
        scores[key] = TeacherScores(key, valid, hidden=states)
    return scores


def replica_batch(
    rollouts: Sequence[Rollout],
    scores: dict[int, TeacherScores],
    loss: Any,
    replica: int,
    replicas: int,
    capacity: int,
    packing: bool = True,
) -> TrainBatch:
    """One replica's share of a global batch, with the global normalisers."""

    def rows(members: Sequence[int]) -> tuple[PackedRow, ...]:
        return pack([rollouts[i] for i in members], scores, members, [0.5] * len(members), capacity, packing)

    shares = balanced([sequence_length(rollout) for rollout in rollouts], replicas)
    counts = dict.fromkeys(loss.components, 0)
    for row in rows(range(len(rollouts))):
        for name, mask in loss.component_masks(row.tokens).items():
            counts[name] += int(mask.sum())
    return TrainBatch(rows(shares[replica]), {name: max(1.0, float(count)) for name, count in counts.items()})

"""The contract of `Trainer`, as functions that run on every rank of a pool."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_opd.config import Config
from nemo_opd.engines.protocols import NamedTensor, Place, Trainer
from nemo_opd.types import TrainBatch, TrainStats
from tests.helpers.checkpoints import save_now
from tests.helpers.megatron import random_rollouts, replica_batch
from tests.helpers.objectives import AdvantageCrossEntropy

VOCAB = 91
TOTAL_STEPS = 10


def build(config: Config) -> Any:
    """A fresh trainer in this process's place of the recipe's layout."""
    from nemo_opd.engines.megatron.parallel import destroy_student_groups
    from nemo_opd.engines.megatron.trainer import MegatronTrainer

    destroy_student_groups()  # of an earlier test, or of the trainer that this one replaces
    return MegatronTrainer(config, AdvantageCrossEntropy(), None, TOTAL_STEPS)


def batch_for(place: Place, step: int, advantage: float = 1.0) -> TrainBatch:
    """This replica's share of the same global batch, whatever the layout."""
    rollouts = random_rollouts(step % 3, 6, VOCAB)
    batch = replica_batch(rollouts, {}, AdvantageCrossEntropy(), place.data_parallel_rank, place.data_parallel_size, 64)
    rows = tuple(
        replace(row, tokens=replace(row.tokens, advantage=torch.full_like(row.tokens.advantage, advantage)))
        for row in batch.rows
    )
    return replace(batch, rows=rows)


def weights_of(weights: Iterable[NamedTensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in weights}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def numbers(stats: TrainStats) -> tuple[float, ...]:
    return (*stats.losses.values(), *stats.metrics.values(), stats.grad_norm, stats.learning_rate)


def steps_and_export(rank: int, config: Config, folder: Path) -> list[tuple[float, ...]]:
    """Before training the export is the checkpoint; training moves it and lowers the loss, alike on every rank."""
    from safetensors.torch import load_file

    trainer = build(config)
    assert isinstance(trainer, Trainer)
    place = trainer.place
    assert place.rank == rank and place.world_size == dist.get_world_size()
    assert len(place.loss_ranks) == place.data_parallel_size
    assert sum(rank in ranks for ranks in place.loss_ranks) <= 1
    start = weights_of(trainer.export_weights())
    assert same(start, load_file(folder / "model.safetensors")), "whole tensors under their names, bit for bit"
    history = [trainer.train_step(batch_for(place, 0)) for _ in range(5)]
    assert not any(stats.skipped for stats in history)
    assert history[-1].losses["cross_entropy"] < history[0].losses["cross_entropy"] - 0.02
    end = weights_of(trainer.export_weights())
    assert all(not torch.equal(start[name], end[name]) for name in start), "every weight is trained"
    return [numbers(stats) for stats in history]


def resumes(rank: int, config: Config, other: Config, folder: Path) -> float:
    """10 steps, and 5 steps + save + load into a fresh trainer of layout `other` + 5 steps.

    Returns the largest difference between the two sets of weights; 0 is bit-equal.
    """
    trainer = build(config)
    for step in range(10):
        if step == 5:
            if rank == 0:
                folder.mkdir()
            dist.barrier()
            save_now(trainer, folder)
        last = trainer.train_step(batch_for(trainer.place, step))
    expected = weights_of(trainer.export_weights())
    fresh = build(other)
    fresh.load(folder)
    for step in range(5, 10):
        resumed = fresh.train_step(batch_for(fresh.place, step))
    assert resumed.learning_rate == last.learning_rate
    got = weights_of(fresh.export_weights())
    assert got.keys() == expected.keys()
    return max(float((got[name].double() - expected[name].double()).abs().max()) for name in got)


def skips_non_finite(rank: int, config: Config) -> list[bool]:
    """A NaN in one replica's gradient: no rank updates, all say so, and the next step is an ordinary one."""
    trainer = build(config)
    place = trainer.place
    before = weights_of(trainer.export_weights())
    poison = math.nan if place.data_parallel_rank == place.data_parallel_size - 1 else 1.0
    skipped = trainer.train_step(batch_for(place, 0, poison))
    assert same(before, weights_of(trainer.export_weights()))
    after = trainer.train_step(batch_for(place, 0))
    assert math.isfinite(after.grad_norm) and not same(before, weights_of(trainer.export_weights()))
    return [skipped.skipped, after.skipped]


def learning_rates(rank: int, config: Config) -> list[float]:
    trainer = build(config)
    return [trainer.train_step(batch_for(trainer.place, step)).learning_rate for step in range(TOTAL_STEPS)]


def resumed_optimizer(rank: int, config: Config, changed: Config, folder: Path) -> dict[str, Any]:
    """A step under `config`, saved and resumed under `changed`: what the optimizer works with, and its step count."""
    trainer = build(config)
    trainer.train_step(batch_for(trainer.place, 0))
    folder.mkdir()
    save_now(trainer, folder)
    fresh = build(changed)
    fresh.load(folder)
    stats = fresh.train_step(batch_for(fresh.place, 1))
    group = fresh._optimizer.param_groups[0]
    state = next(iter(fresh._optimizer.chained_optimizers[0].optimizer.state.values()))
    settings = {name: group[name] for name in ("betas", "eps", "weight_decay")}
    return {**settings, "learning_rate": stats.learning_rate, "step": int(state["step"])}


def refusal(rank: int, config: Config) -> str:
    """The message of the ConfigError that building the trainer must raise."""
    from nemo_opd.errors import ConfigError

    try:
        build(config)
    except ConfigError as refused:
        return str(refused)
    return ""

"""What each rank of a trainer does in `test_rollout_servers`: a step, then its weights go to real servers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_opd.config import Config

VOCAB = 40


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def train_and_refit(rank: int, config: Config, servers: Any) -> dict[str, str]:
    """SHA-256 of every tensor of the trainer, after a step, and `load_weights` of the same weights."""
    from nemo_opd.engines.vllm.generator import VLLMGenerator
    from nemo_opd.processes import Processes
    from nemo_opd.refit.transfer import refit
    from tests.contract.trainers import build, weights_of
    from tests.helpers.megatron import random_rollouts, replica_batch
    from tests.helpers.objectives import AdvantageCrossEntropy

    trainer = build(config)
    place = trainer.place
    rollouts = random_rollouts(0, 6, VOCAB)
    trainer.train_step(
        replica_batch(rollouts, {}, AdvantageCrossEntropy(), place.data_parallel_rank, place.data_parallel_size, 64)
    )
    generator = VLLMGenerator(servers, Path(config.student.model), is_first=rank == 0, rank=rank)
    refit(trainer, generator, 1, Processes.current())
    generator.close()
    return {name: digest(tensor) for name, tensor in weights_of(trainer.export_weights()).items()}

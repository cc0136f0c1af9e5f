"""Student = teacher: the loss and its gradient are zero through scorer, packing and trainer, in any pair of layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_opd.config import Config, ReverseKLLoss
from nemo_opd.packing import pack, sequence_length
from nemo_opd.processes import balanced
from nemo_opd.types import Need, ScoreRequest, TeacherNeeds, TrainBatch
from tests.helpers.megatron import random_rollouts, recipe
from tests.helpers.ranks import RankPool
from tests.helpers.tiny import tiny_checkpoint

VOCAB = 91


def divergence(rank: int, config: Config) -> tuple[float, float]:
    """(reverse KL, gradient norm) of one step on the teacher's answers."""
    from nemo_opd.engines.megatron.parallel import destroy_student_groups
    from nemo_opd.engines.megatron.scorer import MegatronScorer
    from nemo_opd.engines.megatron.trainer import MegatronTrainer
    from nemo_opd.losses import build_loss

    destroy_student_groups()
    scorer = MegatronScorer(config)
    trainer = MegatronTrainer(config, build_loss(ReverseKLLoss()), None, 1)
    trainer.set_teacher_output(config.teacher.model)
    place = trainer.place
    rollouts = random_rollouts(0, 9, VOCAB)
    shares = balanced([sequence_length(r) for r in rollouts], place.data_parallel_size)
    replica_of = {i: replica for replica, members in enumerate(shares) for i in members}
    requests = [
        ScoreRequest(i, r.prompt.token_ids, r.response_ids, place.loss_ranks[replica_of[i]])
        for i, r in enumerate(rollouts)
    ]
    scores = {answer.key: answer for answer in scorer.score(requests, TeacherNeeds(Need.FULL))}
    mine = shares[place.data_parallel_rank]
    rows = pack([rollouts[i] for i in mine], scores, mine, [0.0] * len(mine), 64)
    trained = sum(int(r.loss_mask.sum()) for r in rollouts)
    stats = trainer.train_step(TrainBatch(rows, {"reverse_kl": float(trained)}))
    return stats.losses["reverse_kl"], stats.grad_norm


TP2: dict[str, Any] = {"student__tensor_model_parallel_size": 2}
PP2: dict[str, Any] = {"student__pipeline_model_parallel_size": 2}
TEACHER_TP2: dict[str, Any] = {"teacher__tensor_model_parallel_size": 2}
TEACHER_PP2: dict[str, Any] = {"teacher__pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    "layouts",
    [{**TP2, **TEACHER_PP2}, {**PP2, **TEACHER_TP2}, {}, TEACHER_TP2],
    ids=["student tp2, teacher pp2", "student pp2, teacher tp2", "dp2, dp2", "student dp2, teacher tp2"],
)
def test_no_divergence_from_itself(ranks2: RankPool, tmp_path: Path, layouts: dict[str, Any]) -> None:
    model = tiny_checkpoint(tmp_path / "model", vocab_size=VOCAB)
    other = tiny_checkpoint(tmp_path / "other", vocab_size=VOCAB, seed=1)
    for kl, grad_norm in ranks2.run(divergence, recipe(model, model, **layouts)):
        assert abs(kl) < 1e-6 and grad_norm < 1e-5
    for kl, grad_norm in ranks2.run(divergence, recipe(model, other, **layouts)):
        assert kl > 0.01 and grad_norm > 0.01

"""A teacher costs its weights and nothing more, and leaves no mark on the student."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from nemo_opd.config import Config
from nemo_opd.engines.megatron.parallel import destroy_student_groups
from nemo_opd.types import Need, TeacherNeeds
from tests.contract.scorers import random_requests
from tests.helpers.megatron import recipe
from tests.helpers.ranks import RankPool
from tests.helpers.tiny import tiny_checkpoint


def live_bytes() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def memory(rank: int, config: Config) -> tuple[float, int]:
    """(bytes held after scoring, as a multiple of the weights; answers beyond the teacher's positions)."""
    from nemo_opd.engines.megatron.scorer import MegatronScorer

    destroy_student_groups()
    before = live_bytes()
    scorer = MegatronScorer(config)
    requests = random_requests(8, 90, [(0,)])
    answers = list(scorer.score(requests, TeacherNeeds(Need.FULL)))
    lost = sum(int((~answer.valid).sum()) for answer in answers)
    assert all(torch.isfinite(a.hidden).all() for a in answers if a.hidden is not None)
    del answers
    model = scorer._model
    assert model is not None
    weights = list(model.parameters())
    assert not any(w.requires_grad or w.grad is not None or hasattr(w, "main_grad") for w in weights)
    held = live_bytes() - before
    return held / sum(w.untyped_storage().nbytes() for w in weights), lost


def test_a_teacher_holds_its_weights_alone(ranks1: RankPool, tmp_path: Path) -> None:
    student = tiny_checkpoint(tmp_path / "student", "llama", vocab_size=90, num_hidden_layers=1)
    teacher = tiny_checkpoint(tmp_path / "teacher", vocab_size=90, hidden_size=128, max_position_embeddings=40)
    share, lost = ranks1.run(memory, recipe(student, teacher))[0]
    assert 1.0 <= share < 1.2
    requests = random_requests(8, 90, [(0,)])
    beyond = [max(0, len(r.context_ids) - 1 + len(r.response_ids) - max(40, len(r.context_ids) - 1)) for r in requests]
    assert sum(beyond) > 0
    assert lost == sum(beyond), "a position that the teacher does not know gives no score"

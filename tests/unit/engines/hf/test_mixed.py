"""Rollouts from a mixture of two models: what is drawn, and what is said of it."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedModel

from nemo_opd.engines.hf.generator import HFGenerator
from nemo_opd.engines.hf.mixed import TeacherMixedGenerator
from nemo_opd.engines.protocols import Generator
from nemo_opd.types import Author, Rollout, Sampling
from tests.helpers.tiny import tiny_model
from tests.unit.engines.hf.test_generator import VOCAB_SIZE, never, requests, tokens

SHARE = 0.3


def student_model(**overrides: object) -> PreTrainedModel:
    return tiny_model(vocab_size=VOCAB_SIZE, **overrides)


def teacher_model() -> PreTrainedModel:
    """Another family and depth, and seven ids that the student has not."""
    return tiny_model("llama", seed=9, vocab_size=VOCAB_SIZE + 7, num_hidden_layers=2)


def make(share: float = SHARE, batch_size: int = 5) -> tuple[HFGenerator, TeacherMixedGenerator]:
    student = HFGenerator(student_model(), eos_ids=(1,), batch_size=batch_size)
    return student, TeacherMixedGenerator(student, teacher_model(), share)


def log_probs(rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p, log q) of a rollout's tokens by full forwards of both models."""
    found = []
    for model in (student_model(), teacher_model()):
        start = len(rollout.prompt.token_ids)
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids.tolist()]])
        with torch.no_grad():
            logits = model.double()(ids).logits[0, start - 1 : -1, :VOCAB_SIZE]
        found.append(logits.log_softmax(-1).gather(-1, rollout.response_ids[:, None])[:, 0])
    return found[0], found[1]


def test_sampler_logprobs_are_those_of_the_mixture() -> None:
    _, mixed = make()
    assert isinstance(mixed, Generator)
    for rollout in mixed.generate(requests(7, samples=2), Sampling(30), never):
        log_p, log_q = log_probs(rollout)
        mixture = torch.logaddexp(log_p + math.log1p(-SHARE), log_q + math.log(SHARE))
        torch.testing.assert_close(rollout.sampler_logprobs.double(), mixture, rtol=0, atol=2e-5)
        assert (log_p - mixture).exp().max() <= 1 / (1 - SHARE) + 1e-5, "importance weights are bounded"
        assert (rollout.author == int(Author.STUDENT)).all()


def test_first_tokens_follow_the_mixture() -> None:
    _, mixed = make(share=0.9, batch_size=64)
    some = requests(1, samples=4000)
    drawn = torch.tensor([ids[0] for ids in tokens(mixed.generate(some, Sampling(1), never)).values()])
    counts = torch.bincount(drawn, minlength=VOCAB_SIZE).double() / len(drawn)
    with torch.no_grad():
        ids = torch.tensor([some[0].prompt.token_ids])
        p = student_model()(ids).logits[0, -1].softmax(-1)
        q = teacher_model()(ids).logits[0, -1]
    mixture = (0.9 * q[:VOCAB_SIZE].softmax(-1) + 0.1 * p).double()
    assert ((counts - mixture).abs() < 5 * (mixture / len(drawn)).sqrt() + 1e-3).all()
    assert (counts - p).abs().sum() > 3 * (counts - mixture).abs().sum(), "it is not the student alone"


def test_without_a_share_it_is_the_student_and_the_student_stays_itself() -> None:
    student, mixed = make(share=0.0)
    alone = tokens(student.generate(requests(6), Sampling(12), never))
    assert tokens(mixed.generate(requests(6), Sampling(12), never)) == alone
    _, other = make()
    assert tokens(other.generate(requests(6), Sampling(12), never)) != alone
    assert tokens(student.generate(requests(6), Sampling(12), never)) == alone


def test_weights_and_versions_are_the_students() -> None:
    student, mixed = make()
    weights = dict(student_model(seed=4).named_parameters())
    mixed.load_weights(((name, tensor.detach()) for name, tensor in weights.items()), 3)
    assert mixed.version == student.version == 3
    (rollout,) = mixed.generate(requests(1), Sampling(3), never)
    assert set(rollout.policy_version.tolist()) == {3}


def test_what_cannot_be_mixed_is_refused() -> None:
    student, mixed = make()
    with pytest.raises(ValueError, match="teacher_share"):
        TeacherMixedGenerator(student, student_model(), 1.0)
    with pytest.raises(ValueError, match="every token"):
        TeacherMixedGenerator(student, tiny_model(vocab_size=VOCAB_SIZE - 1), 0.5)
    mixed.close()
    with pytest.raises(RuntimeError, match="after close"):
        mixed.generate(requests(1), Sampling(3), never)
    assert tokens(student.generate(requests(1), Sampling(3), never))

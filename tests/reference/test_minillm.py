"""MiniLLM's two terms are the gradient of the sequence-level reverse KL, by enumeration of all sequences."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from nemo_opd.config import MiniLLMLoss, TeacherMixedPrefix
from nemo_opd.losses import build_loss
from nemo_opd.types import TokenBatch
from nemo_opd.vocab.logits import LogitsView
from nemo_opd.vocab.objective import SampledScores

VOCAB, LENGTH = 3, 3
PREFIXES = [p for n in range(LENGTH) for p in itertools.product(range(VOCAB), repeat=n)]
SEQUENCES = list(itertools.product(range(VOCAB), repeat=LENGTH))


def table(seed: int) -> Tensor:
    """Logits after every prefix, [prefixes, VOCAB]: a whole autoregressive model."""
    return torch.randn(len(PREFIXES), VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows() -> tuple[Tensor, Tensor]:
    """(which prefix, which token) of every position of every sequence."""
    where = [[PREFIXES.index(s[:t]) for t in range(LENGTH)] for s in SEQUENCES]
    return torch.tensor(where).flatten(), torch.tensor(SEQUENCES).flatten()


def batch(ids: Tensor, log_mu: Tensor) -> TokenBatch:
    count = len(ids)
    sequence, offset = torch.arange(count) // LENGTH, torch.arange(count) % LENGTH
    none = torch.zeros(count, dtype=torch.int64)
    return TokenBatch(
        position=none, ids=ids, sequence=sequence, offset=offset, author=none.to(torch.int8), policy_version=none,
        sampler_logprobs=log_mu, advantage=torch.zeros(count), teacher_valid=torch.ones(count, dtype=torch.bool),
    )  # fmt: skip


def expected_gradient(slot: MiniLLMLoss, student: Tensor, teacher: Tensor, alpha: float = 0.0) -> Tensor:
    """Mean over sequences drawn from ``alpha q + (1 - alpha) p`` of the gradient of the summed token losses."""
    loss, (where, ids) = build_loss(slot), rows()
    log_p, log_q = (m.log_softmax(1)[where, ids] for m in (student, teacher))
    log_mu = (alpha * log_q.exp() + (1 - alpha) * log_p.exp()).log()
    tokens = batch(ids, log_mu)
    leaf = student.clone().requires_grad_()
    prepared = loss.prepare(SampledScores(log_p, log_q), tokens)
    losses = loss.evaluate(LogitsView(leaf[where]), LogitsView(teacher[where]), tokens, prepared).losses
    probability = log_mu.view(-1, LENGTH).sum(1).exp()
    total = sum(losses.values()).view(-1, LENGTH).sum(1)
    return torch.autograd.grad((probability * total).sum(), leaf)[0]


def sequence_level(student: Tensor, teacher: Tensor) -> Tensor:
    leaf, (where, ids) = student.clone().requires_grad_(), rows()
    log_p, log_q = (m.log_softmax(1)[where, ids].view(-1, LENGTH).sum(1) for m in (leaf, teacher))
    return torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), leaf)[0]


def test_without_shaping_it_is_the_gradient_of_the_sequence_level_kl() -> None:
    student, teacher = table(0), table(1)
    got = expected_gradient(MiniLLMLoss(length_normalised=False, clip_ratio=None), student, teacher)
    torch.testing.assert_close(got, sequence_level(student, teacher), rtol=0, atol=1e-14)


def test_length_normalisation_changes_early_tokens_and_not_the_last_two() -> None:
    student, teacher = table(2), table(3)
    plain = expected_gradient(MiniLLMLoss(length_normalised=False, clip_ratio=None), student, teacher)
    normalised = expected_gradient(MiniLLMLoss(clip_ratio=None), student, teacher)
    assert (plain - normalised)[0].abs().max() > 1e-3
    torch.testing.assert_close(plain[1:], normalised[1:], rtol=0, atol=1e-14)


def test_sampling_from_the_mixture_is_exact_at_the_first_token_and_biased_behind_it() -> None:
    """The weight of a token corrects for its own draw, not for the prefix's, as in the paper."""
    student, teacher = table(4), table(5)
    slot = MiniLLMLoss(length_normalised=False, clip_ratio=None)
    alpha = TeacherMixedPrefix().teacher_share
    one_step = MiniLLMLoss(discount=1e-300, length_normalised=False, clip_ratio=None)
    on, off = (expected_gradient(one_step, student, teacher, a) for a in (0.0, alpha))
    torch.testing.assert_close(on[0], off[0], rtol=0, atol=1e-14)
    exact = sequence_level(student, teacher)
    biased = expected_gradient(slot, student, teacher, alpha)
    assert 1e-3 < (biased - exact).abs().max() < 0.5 * exact.abs().max()

"""The operations of a view, dense and on vocabulary shards, against plain formulas: value and gradient in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemo_opd.vocab.logits import LogitsView
from nemo_opd.vocab.shard import VocabShard, dense_shard
from nemo_opd.vocab.view import VocabView
from tests.helpers.losses import Layout, group_of

TOKENS, K = 4, 3
IDS = torch.tensor([[1, 5, 9], [0, 2, 10], [4, 3, 2], [8, 9, 10]])
MASK = torch.tensor([[True, True, False], [True, True, True], [False, False, False], [True, False, True]])


def logits(seed: int, vocab: int) -> Tensor:
    return torch.randn(TOKENS, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


OPERATIONS = {
    "logsumexp": lambda v, o: v.logsumexp(),
    "entropy": lambda v, o: v.entropy(),
    "logprob": lambda v, o: v.logprob(IDS).sin().sum(1),
    "logprob of one id": lambda v, o: v.logprob(IDS[:, 0]),
    "mass": lambda v, o: v.mass(IDS),
    "mass of some": lambda v, o: v.mass(IDS, MASK),
    "log_tail": lambda v, o: v.log_tail(IDS),
    "log_tail of some": lambda v, o: v.log_tail(IDS, MASK),
    "expectation": lambda v, o: v.expectation(lambda p, q: (p - q).square(), o),
    "expectation under another": lambda v, o: o.expectation(lambda q, p: q - p, v),
    "composed": lambda v, o: (v.entropy() * v.mass(IDS) - v.logsumexp().cos()) * v.expectation(lambda p: p.exp()),
    "topk": lambda v, o: v.logprob(v.topk(K)).prod(1),
}


def plain(name: str, z: Tensor, zo: Tensor) -> Tensor:
    """The same by the textbook."""
    p, q = z.softmax(1), zo.softmax(1)
    chosen = torch.zeros_like(z, dtype=torch.bool).scatter(1, IDS, True)
    some = torch.zeros_like(z).scatter_add(1, IDS, MASK.double()) > 0
    entropy, mass = -(p * p.log()).sum(1), (p * chosen).sum(1)
    return {
        "logsumexp": lambda: z.exp().sum(1).log(),
        "entropy": lambda: entropy,
        "logprob": lambda: p.log().gather(1, IDS).sin().sum(1),
        "logprob of one id": lambda: p.log().gather(1, IDS[:, :1]).squeeze(1),
        "mass": lambda: mass,
        "mass of some": lambda: (p * some).sum(1),
        "log_tail": lambda: (p * ~chosen).sum(1).log(),
        "log_tail of some": lambda: (p * ~some).sum(1).log(),
        "expectation": lambda: (p * (p.log() - q.log()) ** 2).sum(1),
        "expectation under another": lambda: (q * (q.log() - p.log())).sum(1),
        "composed": lambda: (entropy * mass - z.logsumexp(1).cos()) * (p * p).sum(1),
        "topk": lambda: p.log().topk(K).values.prod(1),
    }[name]()


def of_shard(rank: int, tp: int, vocab: int) -> dict[str, tuple[Tensor, Tensor, int, int]]:
    """Value and gradient of every operation on this rank's columns, and the local ids."""
    group, _ = group_of(rank, Layout(tp=tp))
    share = -(-vocab // tp) + 1
    shard = VocabShard(vocab, rank * share, share, group)
    columns = slice(shard.start, shard.start + shard.valid)
    padded = torch.full((2, TOKENS, share), 50.0, dtype=torch.float64)  # what stands in padding must not matter
    for i in range(2):
        padded[i, :, : shard.valid] = logits(i, vocab)[:, columns]
    results = {}
    for name, operation in OPERATIONS.items():
        local = padded[0].clone().requires_grad_()
        value = operation(LogitsView(local, shard), LogitsView(padded[1], shard))
        weights = torch.arange(1.0, TOKENS + 1, dtype=torch.float64)
        (grad,) = torch.autograd.grad((value * weights).sum() / shard.size, local)
        assert not grad[:, shard.valid :].any()
        results[name] = (value.detach(), grad[:, : shard.valid], columns.start, shard.valid)
    return results


@pytest.mark.parametrize("vocab", [11, 13])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_value_and_gradient_on_shards(tp, vocab, request):
    shares = request.getfixturevalue(f"ranks{tp}").run(of_shard, tp, vocab) if tp > 1 else [of_shard(0, 1, vocab)]
    for name in OPERATIONS:
        z = logits(0, vocab).requires_grad_()
        value = plain(name, z, logits(1, vocab))
        (grad,) = torch.autograd.grad((value * torch.arange(1.0, TOKENS + 1)).sum(), z)
        for share in shares:
            got, local, start, valid = share[name]
            torch.testing.assert_close(got, value.detach(), rtol=0, atol=1e-12, msg=f"{name}: value")
            torch.testing.assert_close(
                local, grad[:, start : start + valid], rtol=0, atol=1e-12, msg=f"{name}: gradient of {start}+{valid}"
            )


def test_views_satisfy_the_protocol_and_refuse_wrong_shapes():
    assert isinstance(LogitsView(torch.zeros(2, 5)), VocabView)
    with pytest.raises(ValueError, match=r"expected \[tokens, 5\]"):
        LogitsView(torch.zeros(2, 4), dense_shard(5))
    with pytest.raises(ValueError, match="top_k is 6; expected 1 to 5"):
        LogitsView(torch.zeros(2, 5)).topk(6)


def test_a_tail_without_any_id_is_minus_infinity_and_has_no_gradient():
    z = torch.randn(2, 3, requires_grad=True)
    everything = torch.arange(3).expand(2, 3)
    tail = LogitsView(z).log_tail(everything)
    assert tail.tolist() == [-torch.inf] * 2
    (grad,) = torch.autograd.grad(torch.where(tail.isfinite(), tail, 0.0).sum(), z)
    assert not grad.any()


def test_half_precision_logits_are_raised_before_they_are_exponentiated():
    z = torch.randn(3, 50).bfloat16()
    assert torch.equal(LogitsView(z).logsumexp(), z.float().logsumexp(1))

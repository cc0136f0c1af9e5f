"""Random numbers that depend on where they are used, not on when: noise = f(seed, response position[, vocabulary id]).

A stateful generator would give a sequence other random numbers whenever its batch changes. Here each number is
computed from its own address, so a request draws the same noise alone, in a batch of 64, after a resume, or when its
response is continued from a prefix.

The mixing is SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): output
i of a stream that starts at state s is ``finalise(s + (i + 1) * GOLDEN)``. Positions are one stream, started by the
request's seed; every position's output starts a second stream, over vocabulary ids. It is chosen because it needs
nothing but 64-bit wrap-around arithmetic, which torch's int64 has on every device. It is not cryptographic. Two of the
second streams overlap (shifted) with a chance of about 2 * vocab / 2**64, which costs nothing even when it happens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(x: int) -> int:
    """The same 64 bits read as torch's int64."""
    return x - (1 << 64) if x >= (1 << 63) else x


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)


def _xor_shift_(x: Tensor, bits: int) -> Tensor:
    """x ^= x >>> bits. torch's >> copies the sign, so the copies are masked off."""
    return x.bitwise_xor_(torch.bitwise_right_shift(x, bits).bitwise_and_((1 << (64 - bits)) - 1))


def _finalise_(x: Tensor) -> Tensor:
    """SplitMix64's output function (variant 13 of Stafford's mixers), in place; a bijection of 64 bits."""
    _xor_shift_(x, 30).mul_(_MULTIPLIER_1)
    _xor_shift_(x, 27).mul_(_MULTIPLIER_2)
    return _xor_shift_(x, 31)


def seed_tensor(seeds: list[int], device: torch.device | str = "cpu") -> Tensor:
    """Seeds in [0, 2**64) as int64 [rows] with the same bits."""
    return torch.tensor([_signed(seed % (1 << 64)) for seed in seeds], dtype=torch.int64, device=device)


def random_bits(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """64 random bits for each (row, id), as int64 [rows, vocab].

    Args:
        seeds: int64 [rows], one per request.
        positions: int64 [rows], offset of the token in its response, from 0.
        vocab_size: ids are 0 .. vocab_size - 1.
    """
    keys = _finalise_(_finalise_(seeds.clone()) + (positions + 1) * _GOLDEN)
    counters = torch.arange(1, vocab_size + 1, dtype=torch.int64, device=seeds.device).mul_(_GOLDEN)
    return _finalise_(keys[:, None] + counters)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """One number in (0, 1) per row, float64 [rows]: a decision about the token at `positions` of the response `seeds`.

    For seeds that belong to such decisions alone: those that draw tokens would tie the decision to the token.
    """
    return uniform_from_bits(_finalise_(_finalise_(seeds.clone()) + (positions + 1) * _GOLDEN))


def uniform_from_bits(bits: Tensor) -> Tensor:
    """The upper 52 of 64 random bits as a float64 on the midpoints (i + 1/2) / 2**52.

    Midpoints of 52 bits are exact in float64 and never 0 or 1; with 53 bits the largest would round up to 1.
    """
    return torch.bitwise_right_shift(bits, 12).bitwise_and_((1 << 52) - 1).double().add_(0.5).mul_(2.0**-52)


def gumbel(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise -log(-log u), float64 [rows, vocab], finite: between about -3.6 and 36.8.

    The arguments are those of `random_bits`.
    """
    return uniform_from_bits(random_bits(seeds, positions, vocab_size)).log_().neg_().log_().neg_()

"""The counter-based generator against plain Python, and its statistics at fixed seeds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nemo_opd.vocab.noise import gumbel, random_bits, seed_tensor, uniform, uniform_from_bits

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
SEEDS = [0, 1, 2, 2**63 - 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF]


def finalise(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def reference_bits(seed: int, position: int, token: int) -> int:
    key = finalise((finalise(seed) + (position + 1) * _GOLDEN) & _MASK)
    return finalise((key + (token + 1) * _GOLDEN) & _MASK)


def uniforms(rows: int, vocab_size: int, first_seed: int = 0) -> Tensor:
    seeds = seed_tensor([first_seed + row for row in range(rows)])
    return uniform_from_bits(random_bits(seeds, torch.arange(rows) % 5, vocab_size))


def test_the_reference_is_splitmix64() -> None:
    """First outputs of SplitMix64 at state 1234567, as widely published."""
    outputs = [finalise((1234567 + i * _GOLDEN) & _MASK) for i in range(1, 4)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("position", [0, 1, 4095])
def test_torch_equals_plain_python(position: int) -> None:
    bits = random_bits(seed_tensor(SEEDS), torch.full((len(SEEDS),), position), 33)
    expected = [[reference_bits(seed, position, token) for token in range(33)] for seed in SEEDS]
    assert [[value & _MASK for value in row] for row in bits.tolist()] == expected


def test_arguments_are_left_alone() -> None:
    seeds, positions = seed_tensor(SEEDS), torch.zeros(len(SEEDS), dtype=torch.int64)
    random_bits(seeds, positions, 8)
    assert torch.equal(seeds, seed_tensor(SEEDS))
    assert torch.equal(positions, torch.zeros_like(positions))


def test_a_number_depends_on_its_address_alone() -> None:
    """Other rows, their order, and the size of the vocabulary change nothing, to the last bit."""
    seeds, positions = seed_tensor(SEEDS), torch.tensor([3, 0, 7, 1, 1, 0, 9])
    whole = gumbel(seeds, positions, 100)
    order = torch.tensor([4, 0, 6])
    assert torch.equal(gumbel(seeds[order], positions[order], 100), whole[order])
    assert torch.equal(gumbel(seeds, positions, 37), whole[:, :37])
    for row in range(len(SEEDS)):
        assert torch.equal(gumbel(seeds[row : row + 1], positions[row : row + 1], 100)[0], whole[row])


def test_uniforms_never_reach_0_or_1() -> None:
    extremes = uniform_from_bits(torch.tensor([0, -1, 2**63 - 1, -(2**63)]))
    assert extremes.tolist() == [2.0**-53, 1 - 2.0**-53, 0.5 - 2.0**-53, 0.5 + 2.0**-53]
    noise = extremes.log().neg().log().neg()
    assert bool(noise.isfinite().all())


def test_uniform_in_256_bins() -> None:
    u = uniforms(512, 2048)
    counts = torch.bincount((u.flatten() * 256).long(), minlength=256).double()
    expected = u.numel() / 256
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert abs(statistic - 255) < 4 * math.sqrt(2 * 255)


def test_every_bit_is_fair() -> None:
    bits = random_bits(seed_tensor(list(range(256))), torch.zeros(256, dtype=torch.int64), 1024).flatten()
    share = torch.stack([((bits >> bit) & 1).double().mean() for bit in range(64)])
    assert float((share - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(bits.numel())


@pytest.mark.parametrize("axis", ["seed", "position", "id"])
def test_neighbours_are_uncorrelated(axis: str) -> None:
    """Consecutive seeds, positions and ids: the sample correlation of n pairs has standard deviation 1 / sqrt(n)."""
    rows = torch.arange(513)
    if axis == "position":
        bits = random_bits(seed_tensor([9] * 513), rows, 512)
    else:
        bits = random_bits(seed_tensor(rows.tolist()), torch.zeros_like(rows), 512)
    u = uniform_from_bits(bits)
    a, b = (u[:, :-1], u[:, 1:]) if axis == "id" else (u[:-1], u[1:])
    correlation = float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])
    assert abs(correlation) < 4 / math.sqrt(a.numel())


def test_gumbel_moments() -> None:
    seeds = seed_tensor(list(range(1000)))
    noise = gumbel(seeds, torch.zeros(1000, dtype=torch.int64), 1000)
    assert float(noise.mean()) == pytest.approx(0.5772156649, abs=0.006)  # 1.28 / sqrt(1e6) is one deviation
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)


def test_one_number_per_token_is_uniform_and_has_nothing_to_do_with_the_next() -> None:
    keys, offsets = torch.arange(2000).repeat_interleave(50), torch.arange(50).repeat(2000)
    drawn = uniform(keys, offsets)
    assert drawn.dtype == torch.float64 and float(drawn.min()) > 0 and float(drawn.max()) < 1
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.004)  # 0.289 / sqrt(1e5) is one deviation
    assert float(drawn.var()) == pytest.approx(1 / 12, abs=0.002)
    grid = drawn.view(2000, 50) - 0.5
    for neighbours in (grid[1:] * grid[:-1], grid[:, 1:] * grid[:, :-1]):
        assert abs(float(neighbours.mean())) < 4 / 12 / math.sqrt(neighbours.numel())
    assert torch.equal(uniform(keys.flip(0), offsets.flip(0)), drawn.flip(0))

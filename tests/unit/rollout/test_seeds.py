"""Seeds must be the same everywhere and for ever, and different for every response."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest

from nemo_opd.rollout.seeds import derive_seed, derive_uniform, response_key


def test_values_are_fixed() -> None:
    """Written down once: another value here means that every run in the world draws other rollouts."""
    assert derive_seed(0, 0, 0, 0) == 0xB60A60E9CFCD2E9E
    assert derive_seed(1234, 2, 17, 3) == 0xEBEE81AAA2DFCD65


def test_another_process_with_other_hash_randomisation_agrees() -> None:
    code = "from nemo_opd.rollout.seeds import derive_seed; import sys; sys.stdout.write(str(derive_seed(3, 1, 4, 1)))"
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(answer.stdout) == derive_seed(3, 1, 4, 1)


def test_neighbours_share_nothing() -> None:
    seeds = [derive_seed(r, e, p, s) for r in range(4) for e in range(3) for p in range(50) for s in range(8)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)
    ones = sum(bin(a ^ b).count("1") for a, b in itertools.pairwise(seeds)) / (len(seeds) - 1)
    assert ones == pytest.approx(32, abs=0.5)  # 4 / sqrt(4799) = 0.06 is one standard deviation


def test_the_order_of_the_parts_matters() -> None:
    assert len({derive_seed(*parts) for parts in ((1, 2, 3, 4), (4, 3, 2, 1), (2, 1, 3, 4), (1, 2, 4, 3))}) == 4


def test_too_large_a_part_is_refused() -> None:
    with pytest.raises(ValueError, match="64 signed bits"):
        derive_seed(2**63, 0, 0, 0)


def test_keys_and_decisions_share_nothing_with_the_seed_of_the_response() -> None:
    assert response_key(0, 0, 0, 0) != derive_seed(0, 0, 0, 0) >> 12
    keys = [response_key(r, 0, p, s) for r in range(2) for p in range(200) for s in range(4)]
    assert len(set(keys)) == len(keys) and all(0 <= key < 2**52 for key in keys)
    drawn = [derive_uniform("test", 0, 0, p, s) for p in range(1000) for s in range(4)]
    assert all(0 <= u < 1 for u in drawn)
    assert sum(drawn) / len(drawn) == pytest.approx(0.5, abs=0.02)  # 0.289 / sqrt(4000) is one deviation
    assert derive_uniform("test", 0, 0, 1) != derive_uniform("other", 0, 0, 1)

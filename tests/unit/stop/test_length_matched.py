"""KAT's cut lengths on other rollouts: long enough, each once, and as many tokens kept."""

from __future__ import annotations

import random

from nemo_opd.stop.length_matched import deal


def kept(lengths: list[int], cuts: dict[int, int]) -> int:
    return sum(cuts.get(i, length) for i, length in enumerate(lengths))


def batch(rng: random.Random, count: int) -> tuple[list[int], dict[int, int]]:
    """As KAT finds them: the rollouts that run to the limit are those that are cut, and early."""
    lengths = [rng.choice([rng.randint(1, 200), 1000]) for _ in range(count)]
    cuts = {
        i: rng.randint(0, length - 1) for i, length in enumerate(lengths) if rng.random() < (0.2, 0.9)[length > 200]
    }
    return lengths, cuts


def test_the_same_cut_lengths_where_they_have_an_effect_and_as_many_tokens() -> None:
    rng = random.Random(0)
    moved, total = 0, 0
    for trial in range(200):
        lengths, cuts = batch(rng, count=rng.choice([1, 4, 32, 128]))
        dealt = deal(lengths, cuts, 0.02, random.Random(trial))
        assert sorted(dealt.values()) == sorted(cuts.values())
        assert all(cut <= lengths[i] for i, cut in dealt.items())
        assert abs(kept(lengths, dealt) - kept(lengths, cuts)) <= 0.02 * kept(lengths, cuts)
        moved, total = moved + sum(i not in cuts for i in dealt), total + len(cuts)
    assert moved > 0.1 * total > 100, "a control that cuts what KAT cuts is none"


def test_a_plain_shuffle_would_not_be_matched() -> None:
    """Why the total is made equal: cuts that fall on short rollouts remove less."""
    rng = random.Random(1)
    excess = []
    for _ in range(50):
        lengths, cuts = batch(rng, 128)
        targets = rng.sample(range(len(lengths)), len(cuts))
        shuffled = {i: min(cut, lengths[i]) for i, cut in zip(targets, cuts.values(), strict=True)}
        excess.append(kept(lengths, shuffled) / kept(lengths, cuts) - 1)
    assert min(excess) > 0.0 and sum(excess) / 50 > 0.1


def test_the_same_seed_deals_alike_and_another_one_does_not() -> None:
    lengths, cuts = batch(random.Random(2), 64)
    first, again, other = (deal(lengths, cuts, 0.02, random.Random(seed)) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_without_tolerance_the_cuts_change_places_or_match_exactly() -> None:
    lengths, cuts = [10, 9, 3, 100], {3: 40}
    assert deal(lengths, cuts, 0.0, random.Random(0)) == cuts, "nobody else is that long"
    lengths, cuts = [100, 90, 80, 70], {0: 10, 1: 20}
    assert set(deal(lengths, cuts, 0.0, random.Random(0))) == {0, 1}


def test_nothing_to_deal() -> None:
    assert deal([5, 6], {}, 0.02, random.Random(0)) == {}
    assert deal([], {}, 0.02, random.Random(0)) == {}

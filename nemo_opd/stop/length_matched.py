"""The control that a gain of KAT has to be held against: its own cut lengths, on other rollouts (`length_matched`).

Much of what early termination gains is that fewer, earlier tokens are trained on, whichever they are. So rollouts are
written whole, KAT's rule says what it would cut, and the same cut lengths are dealt out again at random. A plain
shuffle would train on more tokens than KAT, since a long cut on a short rollout has no effect; therefore

* a cut goes to a rollout that is at least that long, and no rollout gets two;
* the tokens that stay are as many as KAT would keep, within `tolerance` of them, in every step: from a random dealing,
  single cuts are moved, at random, as long as that brings the total nearer.

Where the long rollouts are few, the second condition leaves little choice; in the last resort KAT's cuts change places
among the rollouts that KAT cut (`kat/moved_share` says how many cuts stand on a rollout that KAT would have left whole
and `kat/excess` how far the totals are apart). The history that gives the threshold is that of KAT on this run's
rollouts, which is not that of a KAT run: the two students learn from different tokens.

Source: the length-only controls of arXiv 2606.09471, with the total made equal.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from nemo_opd.rollout.pieces import shortened
from nemo_opd.rollout.seeds import derive_seed
from nemo_opd.stop.base import StopReport
from nemo_opd.stop.kat import Context, TrapWatch, Watched
from nemo_opd.types import Rollout

_STEP_SEEDS = -2
"""Stands where rollouts have an epoch, so that a dealing never shares a seed with a rollout (-1: evaluation)."""
_MOVES_PER_ROLLOUT = 200
"""Proposals before the dealing is given up and KAT's cuts change places among themselves."""


class LengthMatched(Watched):
    """KAT's cut lengths at random, as many tokens kept."""

    def __init__(self, watch: TrapWatch, tolerance: float, seed: int) -> None:
        super().__init__(watch)
        self._tolerance, self._seed = tolerance, seed
        self._dealt: dict[int, int] = {}

    def cut(self, rollouts: Sequence[Rollout], contexts: Sequence[Context]) -> list[Rollout]:
        self._watch.judge_whole(rollouts, contexts)
        judged = self._watch.judged
        lengths = [j.written for j in judged]
        cuts = {i: j.kept for i, j in enumerate(judged) if j.is_cut}
        rng = random.Random(derive_seed(self._seed, _STEP_SEEDS, self._watch.history.steps, 0))
        self._dealt = deal(lengths, cuts, self._tolerance, rng)
        dealt = self._dealt
        return [shortened(rollout, dealt[i]) if i in dealt else rollout for i, rollout in enumerate(rollouts)]

    def end_step(self) -> StopReport:
        judged = self._watch.judged
        kept = sum(j.kept for j in judged)
        ours = sum(self._dealt.get(i, j.written) for i, j in enumerate(judged))
        moved = sum(not judged[i].is_cut for i in self._dealt)
        report = self._watch.end_step()
        metrics = {
            "kat/excess": (ours - kept) / max(1, kept),
            "kat/moved_share": moved / max(1, len(self._dealt)),
        }
        return replace(
            report,
            discarded=sum(j.written for j in judged) - ours,
            metrics={**report.metrics, **metrics},
        )


def deal(lengths: Sequence[int], cuts: Mapping[int, int], tolerance: float, rng: random.Random) -> dict[int, int]:
    """Deal the cut lengths `cuts` (by rollout) out again; returns cut lengths by rollout.

    Each goes to a rollout of at least that length, none gets two, and the tokens that stay differ from those that stay
    with `cuts` by at most the share `tolerance` of these.
    """
    holders = _random_holders(lengths, cuts, rng)
    wanted = sum(lengths[i] for i in cuts)
    kept = sum(lengths) - wanted + sum(cuts.values())
    excess = wanted - sum(lengths[holder] for holder, _ in holders)
    free = sorted(set(range(len(lengths))) - {holder for holder, _ in holders})
    for _ in range(_MOVES_PER_ROLLOUT * len(lengths)):
        if abs(excess) <= tolerance * kept or not free:
            break
        at, to = rng.randrange(len(holders)), rng.randrange(len(free))
        (holder, length), other = holders[at], free[to]
        moved = excess + lengths[holder] - lengths[other]
        if lengths[other] >= length and abs(moved) < abs(excess):
            holders[at], free[to], excess = (other, length), holder, moved
    if abs(excess) > tolerance * kept:
        holders = _random_holders([length if i in cuts else -1 for i, length in enumerate(lengths)], cuts, rng)
    return dict(holders)


def _random_holders(lengths: Sequence[int], cuts: Mapping[int, int], rng: random.Random) -> list[tuple[int, int]]:
    """(rollout, cut length): each cut on a random rollout that is long enough and has none yet.

    The longest cut first: the rollouts that could take it, their own among them, could also take every later one, so
    one is always left.
    """
    taken: set[int] = set()
    holders = []
    for length in sorted(cuts.values(), reverse=True):
        holder = rng.choice([i for i, whole in enumerate(lengths) if whole >= length and i not in taken])
        taken.add(holder)
        holders.append((holder, length))
    return holders

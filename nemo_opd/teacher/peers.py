"""The teacher reads other attempts at the same prompt (`context: peers`).

Multi-rollout on-policy distillation, arXiv 2605.12652. For rollout i of a prompt's group the teacher's prompt is
x + C_i, built from *other* rollouts and the verifier's rewards; the loss is on rollout i's own tokens.

    contrastive            up to two successes and one failure; a failure is shown whenever there is one
    successes              the successes alone (positive peer imitation)

and controls, each of which changes one thing about `contrastive` and is silent where that one is:

    random_peer            the same slots and labels, filled from the group whatever the rewards
    unrelated_prompt       the same slots, filled with successes and failures of *other* prompts of the step (as many
                           as these have; the authors' README says successes in every slot, which would put
                           successes under the label of a failure)
    success_only_matched   successes of the same prompt up to exactly as many tokens, shown again when they run out
                           (silent where there is no success)

Peers are chosen by rendezvous hashing: each pair (rollout, candidate) has a derived number, and the smallest win. So
the choice is the same on every rank and does not depend on the order in which rollouts are listed.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial

from nemo_opd.config import PeersContext
from nemo_opd.rollout.seeds import derive_seed
from nemo_opd.teacher.contexts import Reads
from nemo_opd.teacher.insertion import PARAGRAPH, ContextRenderer, Rendered, fair_shares
from nemo_opd.types import Rollout

FIRST_SUCCESS = "Correct solution:"
NEXT_SUCCESS = "Another successful solution:"
FAILURE = "A known failed solution (avoid repeating this mistake):"

Slots = tuple[list[Rollout], list[Rollout]]
"""Rollouts shown as successes, and as failures."""
Ids = tuple[int, ...]

_THE_PROMPT = -1
"""Stands where a candidate has its sample when a whole prompt is drawn."""


class Peers:
    """A `TeacherContext` made of the step's other rollouts.

    Args:
        slot: the recipe's choice.
        renderer: of the teacher; peers stand after the last user message.
        seed: of the run.
    """

    def __init__(self, slot: PeersContext, renderer: ContextRenderer, seed: int) -> None:
        self._slot, self._renderer, self._seed = slot, renderer, seed

    @property
    def reads(self) -> Reads:
        """See `TeacherContext.reads`."""
        return Reads.STEP if self._slot.variant == "unrelated_prompt" else Reads.GROUP

    def context_ids(self, rollouts: Sequence[Rollout]) -> list[Ids | None]:
        """See `TeacherContext.context_ids`."""
        return [None if rendered is None else rendered.ids for rendered in self.rendered(rollouts)]

    def rendered(self, rollouts: Sequence[Rollout]) -> list[Rendered | None]:
        """The prompts in their parts, one per rollout."""
        step = _Step(self._slot, self._seed, rollouts, self._renderer)
        return [self._of(rollout, step.inserted(rollout)) for rollout in rollouts]

    def _of(self, rollout: Rollout, inserted: Ids) -> Rendered | None:
        if inserted:
            return self._renderer.render(rollout.prompt.messages, inserted, "", "")
        return self._renderer.plain(rollout.prompt.messages) if self._slot.fallback == "plain_prompt" else None


class _Step:
    """The rollouts of one step, each tokenised once, and who is shown to whom."""

    def __init__(self, slot: PeersContext, seed: int, rollouts: Sequence[Rollout], renderer: ContextRenderer) -> None:
        self._slot, self._seed, self._renderer = slot, seed, renderer
        texts = renderer.encode([rollout.text.strip() for rollout in rollouts])
        self._text_ids = dict(zip(map(_name, rollouts), texts, strict=True))
        self._heads: dict[str, Ids] = {}
        self._groups: dict[tuple[int, int], list[Rollout]] = defaultdict(list)
        for rollout in rollouts:
            if self._text_ids[_name(rollout)]:  # nothing to show otherwise
                self._groups[_name(rollout)[:2]].append(rollout)

    def inserted(self, rollout: Rollout) -> Ids:
        """What is inserted into the teacher's prompt of a rollout; empty without a usable peer."""
        slot = self._slot
        ordered = self._by_draw(rollout, [r for r in self._group(rollout) if _name(r) != _name(rollout)])
        successes = [] if slot.hide_success_from_success and self._succeeded(rollout) else self._successes(ordered)
        if slot.variant == "successes":
            return self._laid_out((successes[: slot.successes], []))
        shown = successes[: slot.successes], self._failures(ordered)[: slot.failures]
        if slot.variant == "random_peer":
            return self._laid_out((ordered[: len(shown[0])], ordered[len(shown[0]) :][: len(shown[1])]))
        if slot.variant == "unrelated_prompt":
            return self._laid_out(self._unrelated(rollout, shown))
        if slot.variant == "success_only_matched":
            return self._repeated(successes, len(self._laid_out(shown)))
        assert slot.variant == "contrastive", slot.variant
        return self._laid_out(shown)

    def _unrelated(self, rollout: Rollout, shown: Slots) -> Slots:
        """As many successes and failures, from prompts of other records in the order of their draws."""
        heads = [group[0] for (_, index), group in self._groups.items() if index != rollout.prompt.index]
        prompts = sorted(heads, key=lambda head: self._draw(rollout, (*_name(head)[:2], _THE_PROMPT)))
        ordered = [r for head in prompts for r in self._by_draw(rollout, self._group(head))]
        return self._successes(ordered)[: len(shown[0])], self._failures(ordered)[: len(shown[1])]

    def _laid_out(self, shown: Slots) -> Ids:
        """Labels and solutions within the budget; nothing when it cannot hold a token of each solution."""
        rollouts = [*shown[0], *shown[1]]
        labels = [FIRST_SUCCESS, *[NEXT_SUCCESS] * len(shown[0])][: len(shown[0])] + [FAILURE] * len(shown[1])
        heads = [self._head(label, first=n == 0) for n, label in enumerate(labels)]
        texts = [self._text_ids[_name(rollout)] for rollout in rollouts]
        budget = self._slot.max_tokens - sum(map(len, heads))
        if budget < len(texts):
            return ()
        shares = fair_shares([len(text) for text in texts], budget)
        blocks = zip(heads, texts, shares, strict=True)
        return tuple(itertools.chain.from_iterable((*head, *text[:share]) for head, text, share in blocks))

    def _repeated(self, successes: Sequence[Rollout], count: int) -> Ids:
        """Successes one after the other, and again from the first, cut at `count` tokens."""
        if not successes:
            return ()
        ids: list[int] = []
        for n, rollout in enumerate(itertools.cycle(successes)):
            if len(ids) >= count:
                break
            ids += self._head(NEXT_SUCCESS if n else FIRST_SUCCESS, first=n == 0) + self._text_ids[_name(rollout)]
        return tuple(ids[:count])

    def _head(self, label: str, *, first: bool) -> Ids:
        text = f"{'' if first else PARAGRAPH}{label}\n"
        if text not in self._heads:
            self._heads[text] = self._renderer.encode([text])[0]
        return self._heads[text]

    def _group(self, rollout: Rollout) -> list[Rollout]:
        return self._groups.get(_name(rollout)[:2], [])

    def _successes(self, rollouts: Iterable[Rollout]) -> list[Rollout]:
        return [r for r in rollouts if self._succeeded(r)]

    def _failures(self, rollouts: Iterable[Rollout]) -> list[Rollout]:
        """Verified and below the threshold: a rollout without a reward is neither success nor failure."""
        return [r for r in rollouts if r.reward is not None and not self._succeeded(r)]

    def _succeeded(self, rollout: Rollout) -> bool:
        return rollout.reward is not None and rollout.reward >= self._slot.success_threshold

    def _by_draw(self, viewer: Rollout, candidates: Iterable[Rollout]) -> list[Rollout]:
        draw = partial(self._draw, viewer)
        return sorted(candidates, key=lambda candidate: draw(_name(candidate)))

    def _draw(self, viewer: Rollout, candidate: tuple[int, int, int]) -> int:
        """The number of a pair. The viewer's own seed, made to fit 63 bits, stands where the run's seed does."""
        own = derive_seed(self._seed, *_name(viewer)) >> 1
        return derive_seed(own, *candidate)


def _name(rollout: Rollout) -> tuple[int, int, int]:
    return rollout.prompt.epoch, rollout.prompt.index, rollout.sample

"""The rule in the generation loop: same tokens as without it, same cuts as after the fact, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from nemo_opd.config import KatStop
from nemo_opd.engines.hf.generator import HFGenerator
from nemo_opd.engines.hf.scorer import HFScorer
from nemo_opd.engines.protocols import Generator
from nemo_opd.errors import ConfigError
from nemo_opd.processes import Processes
from nemo_opd.rollout.seeds import derive_seed
from nemo_opd.stop.build import build_stop
from nemo_opd.stop.divergence import Measure, TailDivergence
from nemo_opd.teacher.contexts import SamePrompt
from nemo_opd.types import Author, Finish, GenerateRequest, Prompt, Rollout, Sampling, StopRequested
from tests.helpers.ranks import RankPool
from tests.helpers.tiny import tiny_model

VOCAB, EOS, LIMIT = 40, 1, 24
ALONE = Processes()
SLOT = KatStop(window=3, consecutive=2, warmup_samples=8, warmup_steps=1, segment_tokens=5, k=6)


def decode(ids: torch.Tensor) -> str:
    return " ".join(map(str, ids.tolist()))


def never() -> bool:
    return False


def prompts(epoch: int = 0, count: int = 7) -> list[Prompt]:
    return [
        Prompt(i, epoch, (), tuple(2 + (i * 5 + j * 3 + epoch) % 30 for j in range(2 + i % 3))) for i in range(count)
    ]


def requests_for(some: Sequence[Prompt], samples: int = 2) -> list[GenerateRequest]:
    return [GenerateRequest(p, s, derive_seed(3, p.epoch, p.index, s)) for p in some for s in range(samples)]


class Half:
    """Teacher contexts of every other prompt only, with one token more than the student's."""

    def context_ids(self, rollouts: Sequence[Rollout]) -> list[tuple[int, ...] | None]:
        return [(7, *r.prompt.token_ids) if r.prompt.index % 2 else None for r in rollouts]


def parts(slot: KatStop, processes: Processes, context: Any = None) -> tuple[HFGenerator, Any]:
    generator = HFGenerator(tiny_model(seed=0, vocab_size=VOCAB), batch_size=4, eos_ids=(EOS,), decode=decode)
    teacher = HFScorer(tiny_model(seed=1, vocab_size=VOCAB))
    measure = Measure(TailDivergence(HFScorer(generator.model), teacher, slot.k, processes), processes)
    return generator, build_stop(slot, context or SamePrompt(), processes, 0, measure)


def run(slot: KatStop, steps: int, processes: Processes = ALONE, context: Any = None) -> tuple[list[Any], Any]:
    """Some steps of generation: (of each step: rollouts by prompt and sample, report), and the rule's state."""
    context = context or SamePrompt()
    generator, rule = parts(slot, processes, context)
    writer, done = rule.writer(generator), []
    for epoch in range(steps):
        mine = [prompts(epoch)[i] for i in processes.share(7)]
        written = sorted(writer.generate(requests_for(mine), Sampling(LIMIT), never), key=_key)
        cut = rule.cut(written, context.context_ids(written))
        done.append(([_plain(rollout) for rollout in cut], rule.end_step()))
    return done, rule.state()


def _key(rollout: Rollout) -> tuple[int, int]:
    return rollout.prompt.index, rollout.sample


def _plain(rollout: Rollout) -> tuple[Any, ...]:
    numbers = [round(x, 3) for x in rollout.sampler_logprobs.tolist()]
    return *_key(rollout), rollout.response_ids.tolist(), rollout.finish, rollout.text, numbers


@pytest.fixture(scope="module")
def after() -> tuple[list[Any], Any]:
    return run(replace(SLOT, form="after"), steps=3)


def test_segments_cut_what_is_cut_after_the_fact(after: tuple[list[Any], Any]) -> None:
    steps, state = run(SLOT, steps=3)
    assert state["steps"] == after[1]["steps"] == 3
    assert state["lowest"] == pytest.approx(after[1]["lowest"], abs=1e-4)
    for number, ((ours, report), (theirs, whole)) in enumerate(zip(steps, after[0], strict=True)):
        assert ours == theirs
        for name in ("kat/trigger_rate", "kat/tokens_kept", "kat/active"):
            assert report.metrics[name] == whole.metrics[name]
        saved = whole.metrics["kat/tokens_written"] - report.metrics["kat/tokens_written"]
        assert 0 <= saved <= report.metrics["kat/tokens_saved_at_most"]
        assert report.discarded == report.metrics["kat/tokens_discarded"] <= whole.discarded
        assert (report.metrics["kat/active"], saved > 0) == ((0.0, False) if number == 0 else (1.0, True))
    finishes = {row[3] for rows, _ in steps for row in rows}
    assert finishes == {Finish.EOS, Finish.LENGTH, Finish.STOPPED}, "the test is blind unless all occur"


@pytest.mark.parametrize("segment_tokens", [1, LIMIT, 1000])
def test_the_segments_do_not_decide_what_is_cut(after: tuple[list[Any], Any], segment_tokens: int) -> None:
    steps, _ = run(replace(SLOT, segment_tokens=segment_tokens), steps=2)
    assert [rows for rows, _ in steps] == [rows for rows, _ in after[0][:2]]
    if segment_tokens == 1:
        kept, written = (steps[1][1].metrics[f"kat/tokens_{name}"] for name in ("kept", "written"))
        triggered = round(steps[1][1].metrics["kat/trigger_rate"] * 14)
        assert written - kept == triggered * (SLOT.window + SLOT.consecutive - 1), "seen at the first possible token"


def test_rollouts_that_the_teacher_is_not_asked_about_are_never_cut() -> None:
    for form in ("segments", "after"):
        steps, state = run(replace(SLOT, form=form), steps=3, context=Half())
        cut = {row[0] for rows, _ in steps for row in rows if row[3] is Finish.STOPPED}
        assert cut and all(index % 2 for index in cut)
        assert len(state["lowest"]) <= 3 * 3 * 2


class Wanting:
    """Refuses the even prompts by themselves, as `Privileged` does where no record has the field."""

    def context_ids(self, rollouts: Sequence[Rollout]) -> list[tuple[int, ...] | None]:
        if not any(r.prompt.index % 2 for r in rollouts):
            raise ConfigError("context.field", "hint", "a field of the records", "name one of these")
        return [r.prompt.token_ids for r in rollouts]


def test_a_share_without_any_context_is_written_without_the_rule() -> None:
    generator, rule = parts(SLOT, ALONE, Wanting())
    rule.load_state({"lowest": [100.0] * 8, "steps": 1})  # everything would be cut
    requests = requests_for(prompts()[::2])
    rollouts = list(rule.writer(generator).generate(requests, Sampling(LIMIT), never))
    assert len(rollouts) == len(requests)
    assert all(r.finish is not Finish.STOPPED for r in rollouts)
    assert len(list(rule.writer(generator).generate(requests_for(prompts()), Sampling(LIMIT), never))) == 14
    assert rule.end_step().metrics["kat/trigger_rate"] > 0.3


def by_rank(rank: int, context: Any) -> tuple[list[Any], Any]:
    return run(SLOT, 3, Processes.current(), context)


@pytest.mark.parametrize("context", [SamePrompt(), Half()], ids=["all", "half of the prompts"])
def test_two_ranks_do_what_one_does(ranks2: RankPool, context: Any) -> None:
    """Seven prompts over two ranks: shares differ, and one rank runs out of work before the other."""
    alone, state = run(SLOT, 3, context=context)
    (first, first_state), (second, second_state) = ranks2.run(by_rank, context)
    assert first_state == second_state
    assert first_state["lowest"] == pytest.approx(state["lowest"], abs=1e-4)
    for (rows, report), (left, one), (right, other) in zip(alone, first, second, strict=True):
        assert left + right == rows
        assert one == other
        assert one.metrics == pytest.approx(report.metrics, abs=1e-4)


def test_what_was_known_of_earlier_segments_is_kept() -> None:
    slot = replace(SLOT, threshold_quantile=0.0, warmup_samples=1, warmup_steps=0)
    generator, rule = parts(slot, ALONE)
    rule.load_state({"lowest": [-1.0], "steps": 1})  # active, and nothing is below it
    requests = requests_for(prompts())
    ours = {_key(r): r for r in rule.writer(generator).generate(requests, Sampling(LIMIT), never)}
    assert len(ours) == len(requests)
    for whole in generator.generate(requests, Sampling(LIMIT), never):
        rollout = ours[_key(whole)]
        for name in ("response_ids", "author", "policy_version", "loss_mask"):
            assert torch.equal(getattr(rollout, name), getattr(whole, name)), name
        torch.testing.assert_close(rollout.sampler_logprobs, whole.sampler_logprobs, rtol=0, atol=2e-5)
        assert (rollout.finish, rollout.text) == (whole.finish, whole.text)


@pytest.mark.parametrize("form", ["segments", "after"])
def test_a_given_prefix_is_neither_judged_nor_cut(form: str) -> None:
    slot = replace(SLOT, form=form, warmup_samples=1, warmup_steps=0)
    generator, rule = parts(slot, ALONE)
    rule.load_state({"lowest": [100.0], "steps": 1})  # everything is below it: cut at the first chance
    lengths = {0: 0, 1: 6, 2: LIMIT, 3: 2}
    requests = [
        replace(r, prefix_ids=tuple(range(2, 2 + lengths[r.prompt.index])), prefix_author=Author.TEACHER)
        for r in requests_for(prompts(count=4), samples=1)
    ]
    written = sorted(rule.writer(generator).generate(requests, Sampling(LIMIT), never), key=_key)
    for rollout in rule.cut(written, SamePrompt().context_ids(written)):
        given = lengths[rollout.prompt.index]
        assert rollout.response_ids.tolist() == list(range(2, 2 + given))
        assert bool((rollout.author == Author.TEACHER).all())
        assert rollout.finish is (Finish.LENGTH if given == LIMIT else Finish.STOPPED)


class Writer:
    """A generator that writes 2s, and 1s on the last rank when asked to stop after so many calls."""

    version = 0

    def __init__(self, stop_after: int) -> None:
        self.calls, self._stop_after = 0, stop_after

    def generate(
        self, requests: Sequence[GenerateRequest], sampling: Sampling, stop_requested: StopRequested
    ) -> Iterator[Rollout]:
        self.calls += 1
        for request in requests:
            if stop_requested():
                return
            yield _rollout(request, sampling.max_new_tokens)

    def stop_requested(self) -> bool:
        return self.calls >= self._stop_after

    def load_weights(self, weights: Iterable[Any], version: int) -> None: ...

    def close(self) -> None: ...


def _rollout(request: GenerateRequest, length: int) -> Rollout:
    ids = torch.full((length,), 2)
    return Rollout(
        request.prompt, request.sample, ids, torch.zeros(length), torch.zeros(length, dtype=torch.int8),
        torch.zeros_like(ids), torch.ones(length, dtype=torch.bool), Finish.LENGTH,
    )  # fmt: skip


def agreed(spans: Sequence[Any]) -> list[torch.Tensor]:
    """A measure by which the models differ everywhere."""
    return [torch.ones(len(span.ids)) for span in spans]


def stopped(rank: int, stop_after: int) -> tuple[int, int]:
    """(rollouts, calls) of a rank where rank 1 is asked to stop after so many calls, and rank 0 has no work."""
    rule = build_stop(SLOT, SamePrompt(), Processes.current(), 0, agreed)
    rule.load_state({"lowest": [0.5] * 8, "steps": 1})
    writer = Writer(stop_after)
    generator: Generator = rule.writer(writer)
    ask: Callable[[], bool] = writer.stop_requested if rank == 1 else never
    requests = requests_for(prompts(count=2)) if rank == 1 else []
    rollouts = list(generator.generate(requests, Sampling(LIMIT), ask))
    assert rule.end_step().metrics["kat/tokens_written"] == (0 if stop_after < 5 else 4 * LIMIT)
    return len(rollouts), writer.calls


def test_a_stop_request_on_one_rank_ends_the_segments_on_all(ranks2: RankPool) -> None:
    assert ranks2.run(stopped, 3) == [(0, 3), (0, 3)]
    assert ranks2.run(stopped, 99) == [(0, 5), (4, 5)]

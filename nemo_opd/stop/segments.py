"""Generation with the rule in the loop: the student writes a segment, both models score it, the rule decides.

Works with any `Generator` that continues a prefix and any `Divergence`. A request's random numbers belong to its seed
and the position in the response, so a rollout written in segments has the tokens of one written whole (up to rounding:
the contract in `HFGenerator`), and log-probabilities and policy versions of earlier segments are kept.

Rounds are collective. All ranks hold what all rollouts have written so far, ids only, and judge all of them alike; a
rank whose own rollouts are finished goes on scoring those of others. Work is not moved from a rank whose rollouts run
on to one whose rollouts ended: tokens and log-probabilities stay where they were drawn.

The `hf` generator and the teacher keep no key-value cache between rounds: each reads a response again from its start.
With a response of L tokens in segments of G, that is about L^2 / 2G positions of prefill, cheap next to L decode steps
as long as G is some hundred tokens. vLLM servers continue from their prefix cache, in blocks, as long as it holds a
response. A response that was cut asks for nothing more: its place is free for the next. While the rule is not active
there is one round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nemo_opd.engines.protocols import Generator, NamedTensor
from nemo_opd.errors import ConfigError
from nemo_opd.processes import Processes
from nemo_opd.rollout.pieces import continued, shortened
from nemo_opd.stop.divergence import Span
from nemo_opd.stop.kat import Context, Judged, TrapWatch, Watched
from nemo_opd.stop.rule import Verdict
from nemo_opd.teacher.contexts import TeacherContext
from nemo_opd.types import Author, BestIds, Finish, GenerateRequest, Rollout, Sampling, StopRequested

Contexts = Callable[[Sequence[GenerateRequest]], Sequence[Context]]
"""What the teacher sees before each response, known before anything is written."""


@dataclass
class _Track:
    """What every rank knows of a rollout: one object per request of any rank, in the same order everywhere."""

    student_context: tuple[int, ...]
    """Prompt and given prefix."""
    teacher_context: Context
    start: int
    """Tokens of the given prefix."""
    written: list[Tensor] = field(default_factory=list)
    """int64, the tokens drawn after the prefix, segment by segment"""
    divergence: list[Tensor] = field(default_factory=list)
    over: bool = False
    """Did it end by itself: EOS or the token limit?"""
    verdict: Verdict | None = None
    """Known once nothing more is written."""

    @property
    def running(self) -> bool:
        return self.verdict is None

    @property
    def count(self) -> int:
        """Tokens drawn."""
        return sum(map(len, self.written))

    def newest_span(self, best: BestIds | None) -> Span:
        """The last segment, after all that was written before it. `best`: known to the rank that wrote it."""
        assert self.teacher_context is not None
        earlier = tuple(torch.cat(self.written[:-1]).tolist()) if len(self.written) > 1 else ()
        return Span(self.student_context + earlier, self.teacher_context + earlier, self.written[-1], best)


@dataclass
class _Own:
    """What the rank that writes a rollout knows besides."""

    number: int
    """Of its track."""
    request: GenerateRequest
    rollout: Rollout | None = None


class SegmentedGenerator:
    """A `Generator` whose rollouts end where the rule says. `generate` is collective: all ranks call it alike.

    Args:
        generator: writes; loaded and closed by its owner.
        watch: judges; a `generate` that is exhausted adds its rollouts to the step's.
        segment_tokens: tokens written between two looks of the rule.
    """

    def __init__(
        self,
        generator: Generator,
        watch: TrapWatch,
        contexts: Contexts,
        segment_tokens: int,
        processes: Processes,
    ) -> None:
        self._generator, self._watch, self._contexts = generator, watch, contexts
        self._segment_tokens, self._processes = segment_tokens, processes

    @property
    def version(self) -> int:
        return self._generator.version

    def load_weights(self, weights: Iterable[NamedTensor], version: int) -> None:
        self._generator.load_weights(weights, version)

    def close(self) -> None:
        self._generator.close()

    def generate(
        self, requests: Sequence[GenerateRequest], sampling: Sampling, stop_requested: StopRequested
    ) -> Iterator[Rollout]:
        """See `Generator.generate`. A stop request on any rank ends it on all of them, after the same round."""
        threshold = self._watch.history.threshold()
        tracks, own = self._begin(requests)
        segment = sampling.max_new_tokens if threshold is None else self._segment_tokens
        end = 0
        while any(track.running for track in tracks):
            end = min(end + segment, sampling.max_new_tokens)
            running = [mine for mine in own if tracks[mine.number].running]
            limited = replace(sampling, max_new_tokens=end)
            interrupted = not self._write(running, limited, stop_requested) or stop_requested()
            if not self._share(tracks, running, interrupted, last=end == sampling.max_new_tokens):
                return
            self._judge(tracks, running, threshold)
            for mine in running:
                if not tracks[mine.number].running:
                    yield self._finished(mine, tracks[mine.number])
        self._watch.judged += [_judged(track, sampling.max_new_tokens) for track in tracks]

    def _begin(self, requests: Sequence[GenerateRequest]) -> tuple[list[_Track], list[_Own]]:
        """Tell all ranks what each request starts from. One gather."""
        flat: list[int] = []
        for request, context in zip(requests, self._contexts(requests), strict=True):
            parts = (request.prompt.token_ids, request.prefix_ids, context or ())
            flat += [*map(len, parts), *(i for part in parts for i in part)]
        gathered = self._processes.gather(torch.tensor(flat, dtype=torch.int64))
        tracks = [list(_read_starts(part.tolist())) for part in gathered]
        first = sum(map(len, tracks[: self._processes.rank]))
        own = [_Own(first + i, request) for i, request in enumerate(requests)]
        return [track for part in tracks for track in part], own

    def _write(self, running: Sequence[_Own], sampling: Sampling, stop_requested: StopRequested) -> bool:
        """Write on to ``sampling.max_new_tokens``; False when a stop request broke it off."""
        by_key = {_key(mine.request): mine for mine in running}
        left = len(running)
        for rollout in self._generator.generate([_continuation(mine) for mine in running], sampling, stop_requested):
            mine = by_key[rollout.prompt.epoch, rollout.prompt.index, rollout.sample]
            mine.rollout = rollout if mine.rollout is None else continued(mine.rollout, rollout)
            left -= 1
        return left == 0

    def _share(self, tracks: Sequence[_Track], running: Sequence[_Own], interrupted: bool, last: bool) -> bool:
        """Let all ranks know the new tokens, and which rollouts ended by themselves. False after a stop request
        anywhere. One gather."""
        flat = [torch.tensor([int(interrupted)])]
        for mine in running if not interrupted else ():
            assert mine.rollout is not None
            track = tracks[mine.number]
            new = mine.rollout.response_ids[track.start + track.count :]
            over = last or mine.rollout.finish is Finish.EOS
            flat += [torch.tensor([mine.number, int(over), len(new)]), new]
        gathered = self._processes.gather(torch.cat(flat))
        if any(bool(part[0]) for part in gathered):
            return False
        for part in gathered:
            _read_segments(part[1:], tracks)
        return True

    def _judge(self, tracks: Sequence[_Track], own: Sequence[_Own], threshold: float | None) -> None:
        """Score what is new, and end what the rule cuts. Collective."""
        best = {mine.number: mine.rollout.best for mine in own if mine.rollout is not None}
        running = [(number, track) for number, track in enumerate(tracks) if track.running]
        new = [(n, track) for n, track in running if track.teacher_context is not None and len(track.written[-1])]
        spans = [track.newest_span(best.get(number)) for number, track in new]
        for (_, track), values in zip(new, self._watch.measure(spans), strict=True):
            track.divergence.append(values)
        for _, track in running:
            verdict = self._watch.rule.judge(torch.cat([*track.divergence, torch.empty(0)]), threshold)
            if track.over or verdict.kept is not None:
                track.verdict = verdict

    def _finished(self, mine: _Own, track: _Track) -> Rollout:
        assert mine.rollout is not None and track.verdict is not None
        kept = track.verdict.kept
        if kept is None:
            return replace(mine.rollout, best=None)
        return shortened(mine.rollout, track.start + kept)


def _key(request: GenerateRequest) -> tuple[int, int, int]:
    return request.prompt.epoch, request.prompt.index, request.sample


def _continuation(mine: _Own) -> GenerateRequest:
    """The request with all that was written so far as its prefix."""
    if mine.rollout is None:
        return mine.request
    ids = tuple(mine.rollout.response_ids.tolist())
    return replace(mine.request, prefix_ids=ids, prefix_author=Author.STUDENT)


def _read_starts(flat: Sequence[int]) -> Iterator[_Track]:
    """The inverse of what `_begin` sends; an empty teacher context means none."""
    at = 0
    while at < len(flat):
        ends = at + 3
        parts: list[tuple[int, ...]] = []
        for length in flat[at : at + 3]:
            parts.append(tuple(flat[ends : ends + length]))
            ends += length
        prompt, prefix, context = parts
        yield _Track(prompt + prefix, context + prefix if context else None, len(prefix))
        at = ends


def _read_segments(flat: Tensor, tracks: Sequence[_Track]) -> None:
    """Put a rank's new tokens where they belong."""
    at = 0
    while at < len(flat):
        number, over, length = flat[at : at + 3].tolist()
        at += 3
        tracks[number].written.append(flat[at : at + length])
        tracks[number].over = bool(over)
        at += length


def _judged(track: _Track, limit: int) -> Judged:
    assert track.verdict is not None
    written = track.start + track.count
    return Judged(track.verdict, track.start, written, unwritten=0 if track.over else limit - written)


class KatSegments(Watched):
    """`form: segments` of the `stop` slot's choice `kat`."""

    def __init__(
        self, watch: TrapWatch, context: TeacherContext, segment_tokens: int, processes: Processes
    ) -> None:
        """`context` must do without what the student has not written yet."""
        super().__init__(watch)
        self._context, self._segment_tokens, self._processes = context, segment_tokens, processes

    def writer(self, generator: Generator) -> Generator:
        return SegmentedGenerator(
            generator, self._watch, self._before_writing, self._segment_tokens, self._processes
        )

    def cut(self, rollouts: Sequence[Rollout], contexts: Sequence[Context]) -> list[Rollout]:
        return list(rollouts)  # they were cut while they were written

    def _before_writing(self, requests: Sequence[GenerateRequest]) -> Sequence[Context]:
        """Of this rank's share. A context that finds it wanting (a field that no record has) may be right about the
        share and wrong about the step: the loop asks again with all rollouts, and there the error counts."""
        try:
            return self._context.context_ids([_unwritten(request) for request in requests])
        except ConfigError:
            return [None] * len(requests)


def _unwritten(request: GenerateRequest) -> Rollout:
    """The rollout of a request before its first token."""
    nothing = torch.empty(0, dtype=torch.int64)
    return Rollout(
        prompt=request.prompt,
        sample=request.sample,
        response_ids=nothing,
        sampler_logprobs=torch.empty(0),
        author=nothing.to(torch.int8),
        policy_version=nothing,
        loss_mask=nothing.bool(),
        finish=Finish.LENGTH,
    )

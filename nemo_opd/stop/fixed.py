"""A control for stop rules: every rollout ends after so many tokens (`stop: fixed`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from nemo_opd.engines.protocols import Generator, NamedTensor
from nemo_opd.stop.base import NoStop, StopReport
from nemo_opd.types import Finish, GenerateRequest, Rollout, Sampling, StopRequested


class FixedLength(NoStop):
    """Writes `length` tokens at most, and reports the share of rollouts that it ended.

    Evaluation is not concerned: it goes to the generator itself.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._cut = 0
        self._seen = 0

    def writer(self, generator: Generator) -> Generator:
        return _ShortGenerator(generator, self._length)

    def cut(self, rollouts: Sequence[Rollout], contexts: Sequence[tuple[int, ...] | None]) -> list[Rollout]:
        self._cut, self._seen = sum(r.finish is Finish.STOPPED for r in rollouts), len(rollouts)
        return list(rollouts)

    def end_step(self) -> StopReport:
        return StopReport(metrics={"stop/cut_share": self._cut / max(1, self._seen)})


class _ShortGenerator:
    """A `Generator` with a lower token limit, which counts as a stop rule where it ends a rollout."""

    def __init__(self, generator: Generator, length: int) -> None:
        self._generator, self._length = generator, length

    @property
    def version(self) -> int:
        return self._generator.version

    def generate(
        self, requests: Sequence[GenerateRequest], sampling: Sampling, stop_requested: StopRequested
    ) -> Iterator[Rollout]:
        short = replace(sampling, max_new_tokens=min(self._length, sampling.max_new_tokens))
        for rollout in self._generator.generate(requests, short, stop_requested):
            stopped = rollout.finish is Finish.LENGTH and short.max_new_tokens < sampling.max_new_tokens
            yield replace(rollout, finish=Finish.STOPPED) if stopped else rollout

    def load_weights(self, weights: Iterable[NamedTensor], version: int) -> None:
        self._generator.load_weights(weights, version)

    def close(self) -> None:
        self._generator.close()

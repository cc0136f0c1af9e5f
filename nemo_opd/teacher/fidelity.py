"""A teacher that computes in FP8 is compared with itself in bf16 before anybody learns from it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from nemo_opd.config import FidelityConfig
from nemo_opd.engines.protocols import Scorer
from nemo_opd.errors import ConfigError
from nemo_opd.processes import Processes
from nemo_opd.types import Need, ScoreRequest, TeacherNeeds, TeacherScores

log = logging.getLogger(__name__)


class Approximate(Scorer, Protocol):
    """A scorer that can also score with full precision."""

    def full_precision(self) -> AbstractContextManager[None]:
        """What is scored meanwhile is not approximated."""


class FidelityGate:
    """`Scorer` that, before its first answer, asks the teacher about some of the responses in both precisions.

    The responses are the first that the student wrote: nothing was trained on them, and they are what the teacher is
    going to read. Raises ConfigError at the first call, on every rank, where the teachers differ by more than the
    bound.

    Args:
        key: the teacher's key in the recipe, for the message.
    """

    def __init__(self, teacher: Approximate, limits: FidelityConfig, key: str, processes: Processes) -> None:
        self._teacher, self._limits, self._key, self._processes = teacher, limits, key, processes
        self._passed = False

    def score(self, requests: Sequence[ScoreRequest], needs: TeacherNeeds) -> Iterator[TeacherScores]:
        """See `Scorer.score`."""
        if not self._passed and any(len(request.response_ids) for request in requests):
            self._compare(chosen(requests, self._limits.tokens))
        return self._teacher.score(requests, needs)

    def close(self) -> None:
        """See `Scorer.close`."""
        self._teacher.close()

    def _compare(self, requests: Sequence[ScoreRequest]) -> None:
        """Two passes over the requests; rank 0 has the answers. Collective."""
        best = TeacherNeeds(Need.TOP_K, self._limits.k)
        with self._teacher.full_precision():
            precise = {answer.key: answer for answer in self._teacher.score(requests, best)}
        ids = self._known_ids(precise, requests)
        asked = [replace(request, at_ids=ids[request.key]) for request in requests]
        found = [
            divergence(precise[answer.key], answer)
            for answer in self._teacher.score(asked, TeacherNeeds(Need.AT_IDS, self._limits.k))
            if self._processes.is_first
        ]
        every = torch.cat(found) if found else torch.zeros(0)
        total = self._processes.sum({"kl": float(every.double().sum()), "tokens": float(len(every))})
        mean = total["kl"] / max(1.0, total["tokens"])
        log.info("%s: FP8 differs from bf16 by %.2g nats per token (%d tokens)", self._key, mean, total["tokens"])
        if not mean <= self._limits.max_kl:
            raise ConfigError(
                f"{self._key}.fp8.recipe",
                f"a teacher whose FP8 differs from its bf16 by {mean:.3g} nats per token",
                f"at most {self._key}.fidelity.max_kl={self._limits.max_kl:g}",
                "choose a finer recipe (blockwise), keep more layers in bf16 (bf16_layers_at_start, _at_end), or leave "
                "FP8 out",
            )
        self._passed = True

    def _known_ids(self, precise: dict[int, TeacherScores], requests: Sequence[ScoreRequest]) -> dict[int, Tensor]:
        """The ids that rank 0 was told, on every rank, since all must ask alike. One gather."""
        sizes = [len(request.response_ids) for request in requests]
        flat = torch.zeros(0, dtype=torch.int64)
        if self._processes.is_first:
            flat = torch.cat([ids_of(precise[request.key]).flatten() for request in requests])
        flat = self._processes.gather(flat)[0].reshape(-1, self._limits.k)
        return {request.key: ids for request, ids in zip(requests, flat.split(sizes), strict=True)}


def chosen(requests: Sequence[ScoreRequest], tokens: int) -> list[ScoreRequest]:
    """The first requests with at least so many response tokens together, all for rank 0."""
    found: list[ScoreRequest] = []
    count = 0
    for request in requests:
        if count < tokens and len(request.response_ids):
            found.append(replace(request, consumers=(0,), key=len(found)))
            count += len(request.response_ids)
    return found


def ids_of(answer: TeacherScores) -> Tensor:
    """int64 [response, k]"""
    assert answer.ids is not None
    return answer.ids.cpu()


def divergence(precise: TeacherScores, rough: TeacherScores) -> Tensor:
    """KL(precise || rough) in nats of each token, [valid tokens], of the k ids that both answers hold and one bucket
    for all others; at most the KL of the whole distributions. A token that one of them lacks is infinitely far."""
    assert precise.id_logprobs is not None and rough.id_logprobs is not None
    q, p = (answer.id_logprobs.double().cpu() for answer in (precise, rough))  # type: ignore[union-attr]
    tail_q, tail_p = (torch.log1p(-x.exp().sum(1).clamp(max=1 - 1e-12)) for x in (q, p))
    kl = (q.exp() * (q - p)).sum(1) + tail_q.exp() * (tail_q - tail_p)
    both = (precise.valid & rough.valid).cpu()
    return torch.where(both, kl, torch.inf)[precise.valid.cpu()]

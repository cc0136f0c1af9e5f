"""Our draw inside of vLLM: a logits processor that takes the decision and leaves vLLM nothing to choose.

vLLM's own seeded sampling draws from a generator whose state depends on how many tokens were drawn before, and its
`logprobs_mode` is one for the whole engine. Here each row is drawn by `nemo_opd.vocab.sampling.draw`, with noise that
depends on (seed, response position) alone: a request gets the tokens that the `hf` generator would have drawn, in any
batch, after a preemption, or continued from a prefix by another server. Afterwards the drawn id's logit is *minus* its
log-probability under the distribution that was drawn from, and every other logit is -inf: with temperature 0 vLLM takes
that id, and with ``logprobs_mode="processed_logits"`` it reports that number. A request may ask for its k best ids as
well (`BestIds`: what a stop rule compares with the teacher). Then every other logit is the id's log-probability, at
most 0, so that the drawn id, at least 0, is still the largest, and vLLM reports these too (``logprobs``,
`reported_ids`). No number is rounded on the way: a sign is all that changes.

This is the interface of vLLM's V1 model runner (the only one on CPU); servers set ``VLLM_USE_V2_MODEL_RUNNER=0``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from nemo_opd.types import BestIds, Sampling
from nemo_opd.vocab.noise import seed_tensor
from nemo_opd.vocab.sampling import draw, tells_its_own

EXTRA = "nemo_opd"
"""Key of ``SamplingParams.extra_args`` with a request's `draw_arguments`."""
NOT_FINITE = 2.0**100
"""In the place of the drawn id's number: the model's logits were not finite."""


def draw_arguments(sampling: Sampling, seed: int, prefix: int, tells_best: bool = False) -> dict[str, Any]:
    """What the processor must know of a request whose first `prefix` response tokens are part of vLLM's prompt.

    `tells_best`: the other ids' log-probabilities are to be reported, which the drawn one's must be comparable with
    (`tells_its_own`).
    """
    assert not tells_best or tells_its_own(sampling), sampling
    filters = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    more = {"greedy": sampling.greedy, "seed": seed, "prefix": prefix, "tells_best": tells_best}
    return {EXTRA: {**filters, **more}}


def reported_ids(k: int, vocab_size: int) -> int:
    """How many ids vLLM must report (``SamplingParams.logprobs``) for the k best to be among them: the drawn one and k
    others."""
    return min(k + 1, vocab_size) if k else 0


def told(ids: Tensor, logits: Tensor, k: int) -> tuple[Tensor, BestIds | None]:
    """What vLLM reported of a response, read.

    Args:
        ids, logits: int [tokens, 1 + n], float32 [tokens, 1 + n]: the drawn id, then the n largest logits.
        k: best ids that were asked for, 0 for none.

    Returns:
        float32 [tokens], nats, the drawn ids' log-probabilities; and the k best ids.

    Raises ValueError where the model's logits were not finite.
    """
    if bool((logits[:, 0] >= NOT_FINITE).any()):
        raise ValueError("the logits are not finite; the policy diverged")
    drawn = -logits[:, 0]
    if not k:
        return drawn, None
    candidates = torch.cat([drawn[:, None], logits[:, 2:]], dim=1)  # the largest logit is the drawn id once more
    best = candidates.topk(k, dim=1)
    names = torch.cat([ids[:, :1], ids[:, 2:]], dim=1).gather(1, best.indices)
    return drawn, BestIds(names.to(torch.int32), best.values)


@dataclass(frozen=True)
class _Row:
    sampling: Sampling
    seed: int
    prefix: int
    tells_best: bool
    written: list[int]
    """vLLM's own list of the request's output tokens; it grows."""

    @classmethod
    def of(cls, arguments: Mapping[str, Any], written: list[int]) -> _Row:
        names = ("temperature", "top_p", "top_k", "greedy")
        sampling = Sampling(1, **{name: arguments[name] for name in names})
        return cls(sampling, arguments["seed"], arguments["prefix"], arguments["tells_best"], written)


class SeededSampler(LogitsProcessor):
    """See the module. Requests without `draw_arguments` are left to vLLM."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, _, written in batch_update.added:
            self._add(index, params, written)
        for source, target, direction in batch_update.moved:
            self._move(source, target, direction is MoveDirectionality.SWAP)

    def _add(self, index: int, params: SamplingParams, written: list[int]) -> None:
        arguments = (params.extra_args or {}).get(EXTRA)
        self._rows.pop(index, None)
        if arguments is not None:
            self._rows[index] = _Row.of(arguments, written)

    def _move(self, source: int, target: int, swap: bool) -> None:
        moved, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
        if moved is not None:
            self._rows[target] = moved
        if swap and replaced is not None:
            self._rows[source] = replaced

    def apply(self, logits: Tensor) -> Tensor:
        """logits, [requests, vocab] float32, in place."""
        alike: dict[tuple[Sampling, bool], list[int]] = {}
        for index, row in self._rows.items():
            if index < len(logits):
                alike.setdefault((row.sampling, row.tells_best), []).append(index)
        for (sampling, tells_best), members in alike.items():
            self._draw(logits, sampling, tells_best, sorted(members))
        return logits

    def _draw(self, logits: Tensor, sampling: Sampling, tells_best: bool, members: list[int]) -> None:
        rows = [self._rows[index] for index in members]
        place = torch.tensor(members, device=logits.device)
        seeds = seed_tensor([row.seed for row in rows], logits.device)
        positions = torch.tensor([row.prefix + len(row.written) for row in rows], device=logits.device)
        ids, logprobs = draw(logits[place], sampling, seeds, positions)
        finite = logprobs.isfinite()
        if tells_best:
            logits[place] = logits[place].log_softmax(-1).masked_fill_(~finite[:, None], float("-inf"))
        else:
            logits[place] = float("-inf")
        logits[place, ids] = torch.where(finite, -logprobs, NOT_FINITE).to(logits.dtype)

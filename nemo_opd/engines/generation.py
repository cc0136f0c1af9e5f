"""What generators share: which requests they refuse, when a request is over, and the rollout that they hand on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_opd.types import Author, Finish, GenerateRequest, Rollout, Sampling


@dataclass(frozen=True)
class Finished:
    """Raw output of a finished sequence: `length` tokens, the prefix first."""

    request: GenerateRequest
    ids: Tensor
    """int64 [length]"""
    logprobs: Tensor
    """float32 [length], NaN on the prefix"""
    versions: Tensor
    """int64 [length], -1 on the prefix"""


def limit_of(request: GenerateRequest, sampling: Sampling) -> int:
    """Response tokens after which a request ends."""
    limit = sampling.max_new_tokens
    return limit if request.max_new_tokens is None else min(limit, request.max_new_tokens)


def context_of(request: GenerateRequest) -> tuple[int, ...]:
    """All ids that are there before the first drawn token."""
    return request.prompt.token_ids + request.prefix_ids


def is_over(request: GenerateRequest, sampling: Sampling, eos_ids: Sequence[int]) -> bool:
    """A prefix that already ends the response leaves nothing to draw."""
    prefix = request.prefix_ids
    return len(prefix) >= limit_of(request, sampling) or (len(prefix) > 0 and prefix[-1] in eos_ids)


def nothing_drawn(request: GenerateRequest) -> Finished:
    """The answer to a request that is over: its prefix."""
    ids = torch.tensor(request.prefix_ids, dtype=torch.int64)
    return Finished(request, ids, torch.full(ids.shape, float("nan")), torch.full_like(ids, -1))


def rollout_of(sequence: Finished, eos_ids: Sequence[int], decode: Callable[[Tensor], str] | None) -> Rollout:
    """The rollout of a finished sequence; its prefix keeps the author that the request names.

    Clones: a generator's tensors may be rows of larger ones, and inference tensors, which autograd refuses.
    """
    request, ids = sequence.request, sequence.ids.clone()
    author = torch.full(ids.shape, Author.STUDENT, dtype=torch.int8)
    author[: len(request.prefix_ids)] = request.prefix_author
    ended = ids.shape[0] > 0 and int(ids[-1]) in eos_ids
    return Rollout(
        prompt=request.prompt,
        sample=request.sample,
        response_ids=ids,
        sampler_logprobs=sequence.logprobs.clone(),
        author=author,
        policy_version=sequence.versions.clone(),
        loss_mask=torch.ones_like(ids, dtype=torch.bool),
        finish=Finish.EOS if ended else Finish.LENGTH,
        decode=decode,
    )


def check_generate_request(request: GenerateRequest, sampling: Sampling, vocab_size: int, room: int) -> None:
    """Raises ValueError for an empty prompt, ids outside the vocabulary, or more than the model's `room` positions."""
    where = f"prompt {request.prompt.index} (epoch {request.prompt.epoch}), sample {request.sample}"
    context = context_of(request)
    if not request.prompt.token_ids:
        raise ValueError(f"{where}: got an empty prompt; expected at least one token")
    if min(context) < 0 or max(context) >= vocab_size:
        raise ValueError(f"{where}: got ids {min(context)} to {max(context)}; expected ids below {vocab_size}")
    if len(request.prompt.token_ids) + sampling.max_new_tokens > room:
        raise ValueError(
            f"{where}: got {len(request.prompt.token_ids)} prompt tokens and max_new_tokens {sampling.max_new_tokens}; "
            f"expected at most the model's {room} positions; lower rollout.max_new_tokens or data.max_prompt_tokens"
        )

"""What is said to a stock vLLM server's ``POST /v1/completions``, and what its answers mean. Token ids in and out.

Every setting of the sampler is sent: what is left out, the server takes from the model's ``generation_config.json``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nemo_opd.engines.vllm.wire import NEEDS, Scored, WireRequest, WireSampling, WireScore, Written, packed
from nemo_opd.types import Need

CLAMPED = -9999.0
"""Stands for -inf, which JSON has not."""
_CLOSE = 1e-3

Body = dict[str, Any]


class BadAnswer(ValueError):
    """Not what was asked for: the server is another than it has to be, or is set up otherwise."""


class Aborted(RuntimeError):
    """The server broke the response off, since somebody paused it."""


def _body(model: str, prompt: Sequence[int], tokens: int, sampling: WireSampling) -> Body:
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0.0 if sampling.greedy else sampling.temperature,
        "top_p": 1.0 if sampling.greedy else sampling.top_p,
        "top_k": 0 if sampling.greedy else sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,  # the ids that end a response are ours, see `generation`
        "add_special_tokens": False,
        "skip_special_tokens": False,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


PLAIN = WireSampling(temperature=1.0, top_p=1.0, top_k=0, greedy=False)


def generation(request: WireRequest, sampling: WireSampling, eos_ids: Sequence[int], model: str) -> Body:
    """Asks for the rest of a response."""
    return {
        **_body(model, [*request.prompt, *request.prefix], request.tokens, sampling),
        "stop_token_ids": list(eos_ids),
        "logprobs": 0,
        "seed": _seed(request.seed, len(request.prefix)),
    }


def _seed(seed: int, prefix: int) -> int:
    """63 bits: vLLM takes -1 for "none". The server counts its draws from 0, so a response that is continued needs
    another seed than the one it began with, or its noise would come a second time."""
    return int.from_bytes(hashlib.sha256(f"{seed} {prefix}".encode()).digest()[:8]) >> 1


def written(request: WireRequest, eos_ids: Sequence[int], version: int, answer: object) -> Written:
    """Raises BadAnswer, and Aborted for a response that the server broke off."""
    choice = _choice(answer)
    if choice.get("finish_reason") == "abort":
        raise Aborted("it broke a response off; somebody paused it")
    ids, logprobs = _tokens(choice)
    ended = bool(ids) and ids[-1] in eos_ids
    if len(ids) > request.tokens or (len(ids) < request.tokens and not ended):
        raise BadAnswer(
            f"a response of {len(ids)} tokens that ends in {ids[-1:]}; expected {request.tokens} tokens, or one that "
            f"ends in {list(eos_ids)}; start the server with --generation-config vllm"
        )
    return Written(request.key, tuple(ids), logprobs, [[version, 0]], best="")


def scoring(request: WireScore, need: Need, k: int, model: str) -> Body:
    """Asks for scores of a response as the end of a prompt, at temperature 1."""
    best = k if need is Need.TOP_K else 0
    return {**_body(model, [*request.context, *request.response], 1, PLAIN), "prompt_logprobs": best}


def scored(request: WireScore, need: Need, k: int, answer: object) -> Scored:
    """Raises BadAnswer."""
    rows = _choice(answer).get("prompt_logprobs")
    if not isinstance(rows, list) or len(rows) != len(request.context) + len(request.response):
        raise BadAnswer("no log-probabilities of the prompt's tokens; expected prompt_logprobs, as vLLM reports them")
    pairs = zip(request.response, rows[len(request.context) :], strict=True)
    if need is Need.SAMPLED:
        own = [[_number(_of(row).get(str(token)))] for token, row in pairs]
        return Scored(request.key, packed({"logprobs": torch.tensor(own, dtype=torch.float32)}))
    best = [_best(_of(row), token, k) for token, row in pairs]
    ids = torch.tensor([[token for token, _ in row] for row in best], dtype=torch.int64)
    logprobs = torch.tensor([[logprob for _, logprob in row] for row in best], dtype=torch.float32)
    return Scored(request.key, packed({"logprobs": logprobs, "ids": ids}))


def need_of(word: str) -> Need:
    """Raises BadAnswer for what a stock server does not serve: it scores no ids that are given."""
    need = NEEDS[word]
    if need is Need.AT_IDS:
        raise BadAnswer(
            "a request for scores at given ids, which it has no route for; serve the teacher with protocol own"
        )
    return need


def _of(row: object) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise BadAnswer(f"a token without log-probabilities: {str(row)[:80]}")
    return row


def _best(row: Mapping[str, Any], own: int, k: int) -> list[tuple[int, float]]:
    """The k best of a position, the best first. The written token is reported besides, unless it is one of them."""
    found = [(int(token), _number(entry)) for token, entry in row.items()]
    if len(found) == k + 1:
        found = [(token, logprob) for token, logprob in found if token != own]
    if len(found) != k:
        raise BadAnswer(f"{len(found)} ids at a position; expected {k}")
    return sorted(found, key=lambda pair: -pair[1])


def _number(entry: object) -> float:
    if not isinstance(entry, dict) or not isinstance(entry.get("logprob"), int | float):
        raise BadAnswer(f"no log-probability: {str(entry)[:80]}")
    value = float(entry["logprob"])
    return value if value > CLAMPED else -math.inf


def _choice(answer: object) -> Mapping[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise BadAnswer(f"an answer that is none: {str(answer)[:80]}")
    return choices[0]


def _tokens(choice: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    """Drawn ids with their log-probabilities."""
    ids = choice.get("token_ids")
    if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
        raise BadAnswer("no token ids; expected a vLLM that knows return_token_ids")
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
    if not isinstance(logprobs, list) or len(logprobs) != len(ids):
        raise BadAnswer("no log-probability for each token; expected logprobs, as vLLM reports them")
    if not all(isinstance(value, int | float) and CLAMPED < value <= 0.0 for value in logprobs):
        raise BadAnswer("log-probabilities that are none; expected --logprobs-mode processed_logprobs or raw_logprobs")
    return ids, [float(value) for value in logprobs]


def trial(model: str, vocab_size: int) -> Body:
    """A token after the last id of the vocabulary, and the two best there, of which the sampler keeps one: the answer
    shows which numbers the server reports."""
    return {**_body(model, [vocab_size - 1], 1, WireSampling(2.0, 1.0, 1, False)), "logprobs": 2, "seed": 0}


def reports_processed(answer: object) -> bool:
    """Are they log-probabilities after temperature, top-k and top-p; or of the model's own distribution?

    Raises BadAnswer for logits, and for what is no answer.
    """
    choice = _choice(answer)
    _tokens(choice)
    best = choice["logprobs"].get("top_logprobs")
    if not isinstance(best, list) or not best or not isinstance(best[0], dict) or len(best[0]) != 2:
        raise BadAnswer("no top_logprobs; expected two, as vLLM reports them")
    second, first = sorted(map(float, best[0].values()))
    if math.exp(min(first, 1.0)) + math.exp(min(second, 1.0)) > 1.0 + _CLOSE:
        raise BadAnswer("logits; expected --logprobs-mode processed_logprobs or raw_logprobs")
    return second <= CLAMPED

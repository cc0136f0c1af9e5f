"""A teacher: log-probabilities of responses, at temperature 1.

A response is scored as the end of a prompt: vLLM reads context and response in one pass and reports log-probabilities
of the prompt's tokens. They are taken in float32, from logits that the output layer makes in float32 whatever the
weights are, and normalised over the student's ids (`nemo_opd.engines.vllm.student_ids`). No row is about the context:
row t of an answer is about response token t.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.outputs import LogprobsTensors

from nemo_opd.engines.vllm.engine import EngineThread
from nemo_opd.engines.vllm.served import Line, Served
from nemo_opd.engines.vllm.settings import ServerSettings
from nemo_opd.engines.vllm.wire import NEEDS, Attached, Refused, Score, Scored, WireScore, packed, unpacked
from nemo_opd.types import Need

WHOLE_VOCABULARY = 65_536
"""Most ids whose log-probabilities are all made to pick the given ones among them."""


class Teacher(Served):
    """Scores what it is given; nothing of it ever changes, so it may be asked by several runs.

    Ids that are given are scored as such by vLLM's V2 model runner, on a GPU. Its V1 runner, on a CPU, knows only the
    best ids of a position: there all of them are asked for, which is refused for a large vocabulary.
    """

    def __init__(self, settings: ServerSettings, engine: EngineThread) -> None:
        super().__init__(settings, engine)
        self._ids = settings.scored_ids or engine.config.get_vocab_size()
        self._known_ids = engine.config.get_vocab_size()
        self._takes_ids = engine.takes_ids

    def description(self, vllm: str) -> Attached:
        description = super().description(vllm)
        return Attached(**{**description.to_dict(), "at_ids": self._takes_ids or self._known_ids <= WHOLE_VOCABULARY})

    def score(self, message: Score) -> AsyncGenerator[Line, None]:
        """A line for each response as it finishes. Raises Refused for what this server cannot say."""
        need = NEEDS.get(message.need)
        if need is None:
            raise Refused(400, f"need: got {message.need[:40]}; expected one of {', '.join(NEEDS)}")
        if need is not Need.SAMPLED and not 1 <= message.k <= self._ids:
            raise Refused(400, f"k: got {message.k}; expected 1 to {self._ids}")
        if need is Need.AT_IDS and not self._takes_ids and self._known_ids > WHOLE_VOCABULARY:
            reason = f"ids that are given can be scored on a CPU up to a vocabulary of {WHOLE_VOCABULARY}"
            raise Refused(400, f"{reason}; this one has {self._known_ids}; ask for the best ids, or serve it on a GPU")
        given = {request.key: self._given(request, need, message.k) for request in message.requests}
        by_key = {request.key: request for request in message.requests}
        asked = [
            (key, [*request.context, *request.response], self._parameters(request, need, message.k, given[key]))
            for key, request in by_key.items()
        ]

        def answer(key: int, output: RequestOutput) -> Scored:
            numbers = self._numbers_of(output, by_key[key], need, given[key])
            return Scored(key, packed(numbers))

        return self._stream(asked, answer)

    def _given(self, request: WireScore, need: Need, k: int) -> Tensor:
        """int64 [response, k]: the ids that are asked for; SAMPLED is the case k = 1."""
        rows = len(request.response)
        if not request.context or not request.response:
            raise Refused(400, f"request {request.key}: got an empty context or response; expected tokens in both")
        if need is not Need.AT_IDS:
            return torch.tensor(request.response)[:, None]
        ids = unpacked(request.at_ids, {"ids": (torch.int64, (rows, k))})["ids"]
        if int(ids.min()) < 0 or int(ids.max()) >= self._ids:
            raise Refused(400, f"request {request.key}: got ids beyond {self._ids}; expected the student's")
        return ids

    def _parameters(self, request: WireScore, need: Need, k: int, given: Tensor) -> SamplingParams:
        if self._takes_ids and need is not Need.TOP_K:
            what: dict[str, Any] = {
                "prompt_logprob_token_ids": given.numpy(),
                "prompt_logprob_start": len(request.context) - 1,
            }
        else:
            what = {"prompt_logprobs": {Need.SAMPLED: 0, Need.TOP_K: k, Need.AT_IDS: -1}[need]}
        return SamplingParams(
            temperature=0.0,
            max_tokens=1,  # the least that vLLM writes; nobody looks at it
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **what,
        )

    def _numbers_of(self, output: RequestOutput, request: WireScore, need: Need, given: Tensor) -> dict[str, Tensor]:
        if output.prompt_token_id_logprobs is not None:
            return {"logprobs": torch.from_numpy(output.prompt_token_id_logprobs).float()}
        found = output.prompt_logprobs
        assert isinstance(found, LogprobsTensors), "see `engine`: vLLM's tensors are kept as they are"
        first = len(request.context) - 1  # row i of the prompt is about its token i + 1
        rows = slice(first, first + len(request.response))
        ids, logprobs = found.logprob_token_ids[rows].long().cpu(), found.logprobs[rows].float().cpu()
        if need is Need.SAMPLED:
            return {"logprobs": logprobs[:, :1]}
        ids, logprobs = ids[:, 1:], logprobs[:, 1:]  # the first is the prompt's own token
        if need is Need.TOP_K:
            return {"logprobs": logprobs, "ids": ids}
        whole = torch.empty(len(ids), self._known_ids).scatter_(1, ids, logprobs)
        return {"logprobs": whole.gather(1, given)}

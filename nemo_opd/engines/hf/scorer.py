"""The reference teacher: a whole model in every process, scored densely. Small enough to check others against.

Nothing is sharded and nothing is communicated: each rank scores the responses that it consumes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nemo_opd.engines.hf.model import check_dense, load_model, longest_sequence
from nemo_opd.engines.requests import check_needs, check_request
from nemo_opd.processes import Processes
from nemo_opd.types import Need, ScoreRequest, TeacherNeeds, TeacherScores

_CHUNK_ROWS = 256
"""Tokens whose logits exist at the same time."""


class HFScorer:
    """`nemo_opd.engines.protocols.Scorer` on a transformers model, for every need.

    Log-probabilities are log-softmaxes at temperature 1, taken in float32 (float64 for a float64 model) whatever the
    model's dtype. A row is invalid when its payload is not finite, or when its position lies beyond the model's
    `longest_sequence`; the payload of the latter is NaN (ids: 0).
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        *,
        dtype: str | torch.dtype = "float32",
        device: torch.device | str | None = None,
        micro_batch_tokens: int = 4096,
        vocab_size: int | None = None,
        rank: int | None = None,
    ) -> None:
        """
        Args:
            model: a folder in Hugging Face format, or a model.
            dtype, device: of a model read from a folder; None is this process's GPU, or the CPU where there is none.
            micro_batch_tokens: padded positions of one forward; a longer sequence goes alone.
            vocab_size: the ids that probabilities are normalised over, 0 .. vocab_size - 1; the student's, where the
                teacher's vocabulary is padded further than the student's. None: the teacher's own.
            rank: answers are given for requests that name it as consumer; None: this process's rank.

        Raises: ValueError for a folder without a model, an unsupported architecture or a teacher with fewer ids than
        `vocab_size`.
        """
        if micro_batch_tokens < 1:
            raise ValueError(f"teacher.micro_batch_tokens: got {micro_batch_tokens}; expected at least 1")
        if not isinstance(model, PreTrainedModel):
            model = load_model(model, dtype, device)
        check_dense(model.config)
        self._vocab_size = model.config.vocab_size if vocab_size is None else vocab_size
        if not 1 <= self._vocab_size <= model.config.vocab_size:
            raise ValueError(
                f"teacher.model: got {model.config.vocab_size} ids; expected at least the student's {vocab_size}; "
                "choose a teacher that knows every token of the student"
            )
        self._model: PreTrainedModel | None = model.eval().requires_grad_(False)
        self._micro_batch_tokens = micro_batch_tokens
        self._rank = Processes.current().rank if rank is None else rank

    def output_weight(self) -> Tensor:
        """The output layer, [vocab, hidden] in the model's dtype: what turns `TeacherScores.hidden` into logits."""
        return self._open_model().get_output_embeddings().weight.detach()[: self._vocab_size]

    def score(self, requests: Sequence[ScoreRequest], needs: TeacherNeeds) -> Iterator[TeacherScores]:
        """Answers for the requests that this rank consumes, longest first; see `Scorer.score`.

        Raises, at the call and on every rank alike: ValueError for ids outside the teacher's vocabulary, an empty
        context, a k out of range, or `at_ids` that are missing or do not fit the response.
        """
        model = self._open_model()
        check_needs(needs, self._vocab_size)
        for request in requests:
            check_request(request, needs, self._vocab_size, model.config.vocab_size)
        return self._answers([r for r in requests if self._rank in r.consumers], needs)

    def close(self) -> None:
        """Free the model. Idempotent."""
        self._model = None

    def _open_model(self) -> PreTrainedModel:
        if self._model is None:
            raise RuntimeError("scorer: got a call after close; make a new one")
        return self._model

    def _answers(self, requests: list[ScoreRequest], needs: TeacherNeeds) -> Iterator[TeacherScores]:
        # Gradient mode is switched off inside the helpers, not here: it would leak to the consumer at a yield.
        for batch in self._micro_batches(requests):
            for request, hidden in zip(batch, self._hidden(batch), strict=True):
                yield self._answer(request, hidden, needs)

    def _micro_batches(self, requests: list[ScoreRequest]) -> Iterator[list[ScoreRequest]]:
        """Sequences of similar length together, padded size within `micro_batch_tokens`."""
        batch: list[ScoreRequest] = []
        for request in sorted(requests, key=lambda r: -_length(r)):
            if batch and (len(batch) + 1) * _length(batch[0]) > self._micro_batch_tokens:
                yield batch
                batch = []
            batch.append(request)
        if batch:
            yield batch

    @torch.no_grad()
    def _hidden(self, batch: list[ScoreRequest]) -> list[Tensor]:
        """For each request the hidden states that predict its response, [at most response, hidden].

        Padding stands on the right, where causal attention never looks, so no mask is needed and positions start at 0.
        """
        model = self._open_model()
        width = min(_length(batch[0]), longest_sequence(model.config))
        input_ids = torch.zeros(len(batch), width, dtype=torch.int64)
        for row, request in zip(input_ids, batch, strict=True):
            ids = torch.cat([torch.tensor(request.context_ids), request.response_ids.cpu()])[:width]
            row[: len(ids)] = ids
        states = model.base_model(input_ids=input_ids.to(model.device), use_cache=False).last_hidden_state
        starts = [len(request.context_ids) - 1 for request in batch]
        ends = [start + len(request.response_ids) for start, request in zip(starts, batch, strict=True)]
        return [state[start:end].clone() for state, start, end in zip(states, starts, ends, strict=True)]

    @torch.no_grad()
    def _answer(self, request: ScoreRequest, hidden: Tensor, needs: TeacherNeeds) -> TeacherScores:
        rows = len(request.response_ids)
        if needs.need is Need.NOTHING:
            return TeacherScores(request.key, torch.ones(rows, dtype=torch.bool))
        if needs.need is Need.FULL:
            payload = _extended(hidden, rows)
            return TeacherScores(request.key, payload.isfinite().all(dim=-1), hidden=payload)
        ids, logprobs = self._logprobs(request, hidden, needs)
        logprobs = _extended(logprobs, rows)
        valid = logprobs.isfinite().all(dim=-1)
        if needs.need is Need.SAMPLED:
            return TeacherScores(request.key, valid, sampled_logprobs=logprobs.squeeze(-1))
        return TeacherScores(request.key, valid, ids=_extended(ids, rows), id_logprobs=logprobs)

    def _logprobs(self, request: ScoreRequest, hidden: Tensor, needs: TeacherNeeds) -> tuple[Tensor, Tensor]:
        """ids int64 [rows, k] and their log q, float32 [rows, k]; SAMPLED is the case k = 1 of given ids."""
        given = None
        if needs.need is not Need.TOP_K:
            given = request.response_ids[:, None] if needs.need is Need.SAMPLED else request.at_ids
            assert given is not None
            given = given[: len(hidden)].to(hidden.device)
        # One (possibly empty) chunk at least, so that an empty response gets tensors of the right shape.
        starts = range(0, max(1, len(hidden)), _CHUNK_ROWS)
        parts = [self._chunk(hidden, given, slice(start, start + _CHUNK_ROWS), needs.k) for start in starts]
        return torch.cat([ids for ids, _ in parts]).cpu(), torch.cat([logprobs for _, logprobs in parts]).cpu()

    def _chunk(self, hidden: Tensor, given: Tensor | None, rows: slice, k: int) -> tuple[Tensor, Tensor]:
        model = self._open_model()
        logits = model.get_output_embeddings()(hidden[rows])[:, : self._vocab_size]
        logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
        if given is None:
            top = logprobs.topk(k, dim=-1)
            return top.indices, top.values.float()
        return given[rows], logprobs.gather(-1, given[rows]).float()


def _length(request: ScoreRequest) -> int:
    return len(request.context_ids) + len(request.response_ids)


def _extended(payload: Tensor, rows: int) -> Tensor:
    """On the CPU, with rows that were not computed filled up: NaN, or 0 for ids."""
    payload = payload.cpu()
    missing = rows - len(payload)
    if missing == 0:
        return payload
    filler = payload.new_full((missing, payload.shape[1]), float("nan") if payload.is_floating_point() else 0)
    return torch.cat([payload, filler])

"""What a decode batch draws from: the logits of one model, or of a mixture of two, each on its own key-value cache."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nemo_opd.engines.hf.slots import SlotCache


class Reader(Protocol):
    """Reads tokens into slots and says what may come next."""

    device: torch.device

    def prefill(self, input_ids: Tensor, last: Tensor, source: Tensor, slot: int) -> Tensor:
        """Read contexts, int64 [contexts, width], padded on the right, context i up to position ``last[i]``.

        Slot ``slot + j`` gets context ``source[j]``; returns the logits after it, [slots, vocab]. In causal attention
        no token looks at the padding, so no mask is needed, and the columns that it leaves in the cache are masked
        until they are overwritten.
        """

    def step(self, ids: Tensor, columns: Tensor, width: int) -> Tensor:
        """Read one more token, int64 [n], into each of the slots 0 .. n-1, at ``columns`` [n], all below `width`;
        logits [n, vocab]."""

    def move(self, source: Tensor, target: Tensor, width: int) -> None:
        """Copy the first `width` columns of slots `source` into slots `target`."""


class CachedModel:
    """`Reader` of one model. Ids from `vocab_size` on cannot be drawn."""

    def __init__(self, model: PreTrainedModel, slots: int, max_columns: int, vocab_size: int) -> None:
        self._model, self._vocab_size, self.device = model, vocab_size, model.device
        self._cache = SlotCache(model.config, slots, max_columns, model.dtype, model.device)

    def prefill(self, input_ids: Tensor, last: Tensor, source: Tensor, slot: int) -> Tensor:
        self._cache.begin_prefill(slice(slot, slot + len(source)), source, input_ids.shape[1])
        hidden = self._model.base_model(input_ids=input_ids, past_key_values=self._cache, use_cache=True)
        rows = torch.arange(len(input_ids), device=self.device)
        return self._output(hidden.last_hidden_state[rows, last])[source]

    def step(self, ids: Tensor, columns: Tensor, width: int) -> Tensor:
        hidden_columns = torch.arange(width, device=self.device) > columns[:, None]
        mask = torch.zeros(len(ids), 1, 1, width, dtype=self._model.dtype, device=self.device)
        mask.masked_fill_(hidden_columns[:, None, None], float("-inf"))
        self._cache.begin_decode(columns, width)
        output = self._model.base_model(
            input_ids=ids[:, None],
            attention_mask=mask,
            position_ids=columns[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        return self._output(output.last_hidden_state[:, 0])

    def move(self, source: Tensor, target: Tensor, width: int) -> None:
        self._cache.move(source, target, width)

    def _output(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocab]."""
        return self._model.get_output_embeddings()(hidden)[:, : self._vocab_size]


class Mixture:
    """`Reader` of ``a q + (1 - a) p``, a the teacher's share: both models read the same tokens, each in its cache."""

    def __init__(self, student: CachedModel, teacher: CachedModel, teacher_share: float) -> None:
        assert 0.0 <= teacher_share < 1.0
        self._student, self._teacher, self.device = student, teacher, student.device
        self._log_shares = (math.log1p(-teacher_share), math.log(teacher_share) if teacher_share else -math.inf)

    def prefill(self, input_ids: Tensor, last: Tensor, source: Tensor, slot: int) -> Tensor:
        return self._mix(*(m.prefill(input_ids, last, source, slot) for m in (self._student, self._teacher)))

    def step(self, ids: Tensor, columns: Tensor, width: int) -> Tensor:
        return self._mix(*(m.step(ids, columns, width) for m in (self._student, self._teacher)))

    def move(self, source: Tensor, target: Tensor, width: int) -> None:
        for model in (self._student, self._teacher):
            model.move(source, target, width)

    def _mix(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Log-probabilities of the mixture, in float32 at least; they are logits like any others."""
        parts = [
            logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1) + share
            for logits, share in zip((student, teacher), self._log_shares, strict=True)
        ]
        return torch.logaddexp(*parts)

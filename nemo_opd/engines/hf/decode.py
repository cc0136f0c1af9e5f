"""The running sequences of the hf generator: admit, draw one token for each, drop the finished, run the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nemo_opd.engines.hf.noise import seed_tensor
from nemo_opd.engines.hf.sampling import draw
from nemo_opd.engines.hf.slots import SlotCache
from nemo_opd.types import GenerateRequest, Sampling

_PREFILL_POSITIONS = 16384
"""Padded positions of one prefill forward; bounds its activations whatever the batch size is."""


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


def context_of(request: GenerateRequest) -> tuple[int, ...]:
    """All ids that are there before the first drawn token."""
    return request.prompt.token_ids + request.prefix_ids


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 [rows, longest], zeros on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *(0,) * (width - len(row))] for row in rows], dtype=torch.int64, device=device)


class DecodeBatch:
    """At most `slots` sequences, each at its own length; slots 0 .. count-1 are running.

    Between calls, `_logits` [count, vocab] are what the next tokens will be drawn from. One turn is `admit` (where
    slots are free), `draw`, `advance`. No Python statement is executed per sequence and token.
    """

    def __init__(
        self, model: PreTrainedModel, sampling: Sampling, slots: int, max_columns: int, eos_ids: Sequence[int]
    ) -> None:
        self._model, self._sampling, self.slots = model, sampling, slots
        self._device, limit = model.device, sampling.max_new_tokens
        self._cache = SlotCache(model.config, slots, max_columns, model.dtype, self._device)
        self._eos = torch.tensor(list(eos_ids), dtype=torch.int64, device=self._device)
        self._requests: list[GenerateRequest] = []
        integers = partial(torch.zeros, dtype=torch.int64, device=self._device)
        self._seeds, self._prompt_length = integers(slots), integers(slots)
        self._position = integers(slots)
        """Response offset of the token that is drawn next."""
        self._ids, self._versions = integers(slots, limit), integers(slots, limit)
        self._logprobs = torch.zeros(slots, limit, dtype=torch.float32, device=self._device)
        self._logits = torch.zeros(0, model.config.vocab_size, dtype=model.dtype, device=self._device)
        self._width = 0
        """Columns of the longest running sequence (an upper bound between two compactions)."""

    @property
    def count(self) -> int:
        return len(self._requests)

    @torch.inference_mode()
    def admit(self, requests: Sequence[GenerateRequest]) -> None:
        """Give free slots to `requests` and run their contexts, a context shared by several samples once."""
        first, last = self.count, self.count + len(requests)
        assert last <= self.slots, (last, self.slots)
        # Neighbours share contexts and differ little in length, so a prefill forward has little padding.
        requests = sorted(requests, key=lambda r: (-len(context_of(r)), context_of(r)))
        rows = slice(first, last)
        self._requests.extend(requests)
        self._seeds[rows] = seed_tensor([r.seed for r in requests], self._device)
        self._prompt_length[rows] = torch.tensor([len(r.prompt.token_ids) for r in requests], device=self._device)
        self._position[rows] = torch.tensor([len(r.prefix_ids) for r in requests], device=self._device)
        self._logprobs[rows], self._versions[rows] = float("nan"), -1
        prefixes = _padded([r.prefix_ids for r in requests], self._device)
        self._ids[rows, : prefixes.shape[1]] = prefixes
        logits = [self._logits, *(self._prefill(*group) for group in self._prefill_groups(requests, first))]
        self._logits = torch.cat(logits)
        self._width = max(self._width, len(context_of(requests[0])))

    def _prefill_groups(
        self, requests: Sequence[GenerateRequest], slot: int
    ) -> Iterator[tuple[list[tuple[int, ...]], list[int], int]]:
        """Cut sorted requests into (unique contexts, for each slot its context's index, first slot)."""
        contexts: list[tuple[int, ...]] = []
        source: list[int] = []
        for request in requests:
            context = context_of(request)
            if not contexts or context != contexts[-1]:
                if contexts and (len(contexts) + 1) * len(contexts[0]) > _PREFILL_POSITIONS:
                    yield contexts, source, slot
                    contexts, source, slot = [], [], slot + len(source)
                contexts.append(context)
            source.append(len(contexts) - 1)
        yield contexts, source, slot

    def _prefill(self, contexts: list[tuple[int, ...]], source: list[int], slot: int) -> Tensor:
        """Fill the slots ``slot .. slot + len(source) - 1``; logits [slots, vocab] after each one's context.

        Contexts are padded on the right: in causal attention no token looks at the padding, so no mask is needed, and
        the columns that it leaves in the cache are masked until they are overwritten.
        """
        input_ids = _padded(contexts, self._device)
        rows = torch.tensor(source, device=self._device)
        self._cache.begin_prefill(slice(slot, slot + len(source)), rows, input_ids.shape[1])
        hidden = self._model.base_model(input_ids=input_ids, past_key_values=self._cache, use_cache=True)
        last = torch.tensor([len(context) - 1 for context in contexts], device=self._device)
        hidden = hidden.last_hidden_state[torch.arange(len(contexts), device=self._device), last]
        return self._output(hidden)[rows]

    def _output(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocab]. Rows of the output layer beyond `vocab_size` cannot be drawn."""
        return self._model.get_output_embeddings()(hidden)[:, : self._model.config.vocab_size]

    @torch.inference_mode()
    def draw(self, version: int) -> list[Finished]:
        """Draw the next token of every running sequence, written by policy `version`; take out those that end.

        Raises: RuntimeError when logits are not finite (their argmax would still name a token).
        """
        n = self.count
        position = self._position[:n]
        ids, logprobs = draw(self._logits, self._sampling, self._seeds[:n], position)
        if not bool(logprobs.isfinite().all()):
            raise RuntimeError(f"generator: got logits that are not finite from policy version {version}; it diverged")
        rows = torch.arange(n, device=self._device)
        self._ids[rows, position] = ids
        self._logprobs[rows, position] = logprobs
        self._versions[rows, position] = version
        position += 1
        done = (position == self._sampling.max_new_tokens) | (ids[:, None] == self._eos).any(dim=-1)
        if not bool(done.any()):
            return []
        return self._take_out(done)

    def _take_out(self, done: Tensor) -> list[Finished]:
        """Remove the sequences where `done` [count] and close the gaps with the last of the others."""
        ended, kept = done.nonzero().squeeze(1), (~done).nonzero().squeeze(1)
        sequences = zip(ended.tolist(), self._position[ended].tolist(), strict=True)
        finished = [self._finished(row, length) for row, length in sequences]
        left = kept.shape[0]
        gaps, movers = ended[ended < left], kept[kept >= left]
        self._cache.move(movers, gaps, self._width)
        for state in (self._seeds, self._prompt_length, self._position, self._ids, self._logprobs, self._versions):
            state[gaps] = state[movers]
        for gap, mover in zip(gaps.tolist(), movers.tolist(), strict=True):
            self._requests[gap] = self._requests[mover]
        del self._requests[left:]
        self._width = int((self._prompt_length[:left] + self._position[:left] - 1).max()) if left else 0
        return finished

    def _finished(self, row: int, length: int) -> Finished:
        """Copies, for the row will be overwritten."""
        ids, logprobs, versions = (t[row, :length].clone().cpu() for t in (self._ids, self._logprobs, self._versions))
        return Finished(self._requests[row], ids, logprobs, versions)

    @torch.inference_mode()
    def advance(self) -> None:
        """Run the model on the tokens just drawn; a no-op when nothing runs."""
        n = self.count
        self._logits = self._logits[:0]
        if n == 0:
            return
        position = self._position[:n]
        last_ids = self._ids[:n].gather(1, position[:, None] - 1)
        columns = self._prompt_length[:n] + position - 1
        self._width += 1
        hidden_columns = torch.arange(self._width, device=self._device) > columns[:, None]
        mask = torch.zeros(n, 1, 1, self._width, dtype=self._model.dtype, device=self._device)
        mask.masked_fill_(hidden_columns[:, None, None], float("-inf"))
        self._cache.begin_decode(columns, self._width)
        output = self._model.base_model(
            input_ids=last_ids,
            attention_mask=mask,
            position_ids=columns[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        self._logits = self._output(output.last_hidden_state[:, 0])

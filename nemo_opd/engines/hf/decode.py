"""The running sequences of the hf generator: admit, draw one token for each, drop the finished, run the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from nemo_opd.engines.generation import Finished, context_of, limit_of
from nemo_opd.engines.hf.reader import Reader
from nemo_opd.types import GenerateRequest, Sampling
from nemo_opd.vocab.noise import seed_tensor
from nemo_opd.vocab.sampling import draw

_PREFILL_POSITIONS = 16384
"""Padded positions of one prefill forward; bounds its activations whatever the batch size is."""


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 [rows, longest], zeros on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *(0,) * (width - len(row))] for row in rows], dtype=torch.int64, device=device)


class DecodeBatch:
    """At most `slots` sequences, each at its own length; slots 0 .. count-1 are running.

    Between calls, `_logits` [count, vocab] are what the next tokens will be drawn from; None where nothing runs. One
    turn is `admit` (where slots are free), `draw`, `advance`. No Python statement is executed per sequence and token.
    """

    def __init__(self, reader: Reader, sampling: Sampling, slots: int, eos_ids: Sequence[int]) -> None:
        self._reader, self._sampling, self.slots = reader, sampling, slots
        self._device, limit = reader.device, sampling.max_new_tokens
        self._eos = torch.tensor(list(eos_ids), dtype=torch.int64, device=self._device)
        self._requests: list[GenerateRequest] = []
        integers = partial(torch.zeros, dtype=torch.int64, device=self._device)
        self._seeds, self._prompt_length, self._limit = integers(slots), integers(slots), integers(slots)
        self._position = integers(slots)
        """Response offset of the token that is drawn next."""
        self._ids, self._versions = integers(slots, limit), integers(slots, limit)
        self._logprobs = torch.zeros(slots, limit, dtype=torch.float32, device=self._device)
        self._logits: Tensor | None = None
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
        self._limit[rows] = torch.tensor([limit_of(r, self._sampling) for r in requests], device=self._device)
        self._position[rows] = torch.tensor([len(r.prefix_ids) for r in requests], device=self._device)
        self._logprobs[rows], self._versions[rows] = float("nan"), -1
        prefixes = _padded([r.prefix_ids for r in requests], self._device)
        self._ids[rows, : prefixes.shape[1]] = prefixes
        running = [] if self._logits is None else [self._logits]
        self._logits = torch.cat([*running, *(self._prefill(*g) for g in self._prefill_groups(requests, first))])
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
        """Fill the slots ``slot .. slot + len(source) - 1``; logits [slots, vocab] after each one's context."""
        last = torch.tensor([len(context) - 1 for context in contexts], device=self._device)
        rows = torch.tensor(source, device=self._device)
        return self._reader.prefill(_padded(contexts, self._device), last, rows, slot)

    @torch.inference_mode()
    def draw(self, version: int) -> list[Finished]:
        """Draw the next token of every running sequence, written by policy `version`; take out those that end.

        Raises: RuntimeError when logits are not finite (their argmax would still name a token).
        """
        n = self.count
        assert self._logits is not None and len(self._logits) == n
        position = self._position[:n]
        ids, logprobs = draw(self._logits, self._sampling, self._seeds[:n], position)
        if not bool(logprobs.isfinite().all()):
            raise RuntimeError(f"generator: got logits that are not finite from policy version {version}; it diverged")
        rows = torch.arange(n, device=self._device)
        self._ids[rows, position] = ids
        self._logprobs[rows, position] = logprobs
        self._versions[rows, position] = version
        position += 1
        done = (position == self._limit[:n]) | (ids[:, None] == self._eos).any(dim=-1)
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
        self._reader.move(movers, gaps, self._width)
        states = (self._seeds, self._prompt_length, self._limit, self._position)
        for state in (*states, self._ids, self._logprobs, self._versions):
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
        self._logits = None
        if n == 0:
            return
        position = self._position[:n]
        last_ids = self._ids[:n].gather(1, position[:, None] - 1).squeeze(1)
        self._width += 1
        self._logits = self._reader.step(last_ids, self._prompt_length[:n] + position - 1, self._width)

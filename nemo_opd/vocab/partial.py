"""A distribution of which only some log-probabilities are known: the scores of a served teacher."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from nemo_opd.vocab.view import PerColumn

LARGEST_MASS = 1.0 - 1e-6
"""Served probabilities of a set are rounded; their sum is held below this so that the rest has a logarithm."""


class PartialView:
    """`VocabView` of served scores. What was not served is refused by a TypeError that says what would be needed.

    Args:
        vocab_size: number of valid ids, for messages and bounds.
        sampled_ids: int64 [tokens], the written tokens.
        sampled_logprobs: [tokens] log q of them, or None.
        ids: int64 [tokens, k], the ids that were scored, or None.
        id_logprobs: [tokens, k] log q of `ids`.
        ranked: the ids are the k most probable ones (a top-k answer), the most probable first.
    """

    def __init__(
        self,
        vocab_size: int,
        sampled_ids: Tensor,
        sampled_logprobs: Tensor | None = None,
        ids: Tensor | None = None,
        id_logprobs: Tensor | None = None,
        ranked: bool = False,
    ) -> None:
        self.tokens, self.vocab_size = sampled_ids.shape[0], vocab_size
        self.sampled_ids, self.sampled_logprobs = sampled_ids, sampled_logprobs
        self.ids, self.id_logprobs, self.ranked = ids, id_logprobs, ranked

    def _refuse(self, wanted: str, need: str) -> NoReturn:
        has = [
            *(["log q of the written tokens"] if self.sampled_logprobs is not None else []),
            *([f"log q of {self.ids.shape[1]} ids per token"] if self.ids is not None else []),
        ]
        raise TypeError(
            f"the loss asks for {wanted}, which needs Need.{need} of the teacher; served scores hold only "
            f"{' and '.join(has) or 'nothing'}. Use a teacher that answers hidden states, or a loss on what is served"
        )

    def logprob(self, ids: Tensor) -> Tensor:
        if ids.ndim == 1 and self.sampled_logprobs is not None and torch.equal(ids, self.sampled_ids):
            return self.sampled_logprobs
        if self.ids is None or self.id_logprobs is None:
            self._refuse("log q at chosen ids", "AT_IDS")
        wanted = ids.reshape(self.tokens, -1)
        if torch.equal(wanted, self.ids):
            return self.id_logprobs.reshape(ids.shape)
        found, where = (wanted.unsqueeze(2) == self.ids.unsqueeze(1)).max(dim=2)
        if not bool(found.all()):
            self._refuse("log q at ids that were not served", "FULL")
        return self.id_logprobs.gather(1, where).reshape(ids.shape)

    def logprob_or(self, ids: Tensor, mask: Tensor) -> Tensor:
        """log q at ids [tokens, k], 0 where `mask` is False (nobody reads those)."""
        if self.ids is None or self.id_logprobs is None:
            self._refuse("log q at chosen ids", "AT_IDS")
        if ids is self.ids:
            return self.id_logprobs
        found, where = (ids.unsqueeze(2) == self.ids.unsqueeze(1)).max(dim=2)
        if not bool((found | ~mask).all()):
            self._refuse("log q at ids that were not served", "FULL")
        return torch.where(mask, self.id_logprobs.gather(1, where), 0.0)

    def topk(self, k: int) -> Tensor:
        if self.ids is None or not self.ranked or k > self.ids.shape[1]:
            self._refuse(f"the teacher's {k} most probable ids", "TOP_K")
        return self.ids[:, :k]

    def mass(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        probabilities = self.logprob(ids).exp()
        return (probabilities if mask is None else torch.where(mask, probabilities, 0.0)).sum(1)

    def log_tail(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        return self.tail_of(self.logprob_or(ids, mask), mask)

    @staticmethod
    def tail_of(logprobs: Tensor, mask: Tensor) -> Tensor:
        """log of the mass outside a set, from log q inside it [tokens, k]."""
        # The only case in which log(1 - mass) is right: nothing else was served. Rounded scores may sum to 1 or more.
        mass = torch.where(mask, logprobs, -torch.inf).exp().sum(1)
        return torch.log1p(-mass.clamp(max=LARGEST_MASS))

    def logsumexp(self) -> Tensor:
        self._refuse("the normaliser of the logits", "FULL")

    def entropy(self) -> Tensor:
        self._refuse("the teacher's entropy", "FULL")

    def expectation(self, function: PerColumn, *others: object) -> Tensor:
        self._refuse("a sum over the whole vocabulary", "FULL")

    def detach(self) -> PartialView:
        return self

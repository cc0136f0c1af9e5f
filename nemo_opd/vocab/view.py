"""What a loss may ask of a distribution over the vocabulary, once per token.

A loss is written against `VocabView` and runs unchanged on whole logits, on a rank's columns of them, and, as far as
it asks only for what was served, on the scores of a teacher behind a server. Axes: ``tokens`` positions, ``k`` ids per
token, ``columns`` the ids that this rank holds. Every result without a ``columns`` axis is complete and equal on all
ranks. Log-probabilities are in nats. Padded vocabulary entries do not exist here: their probability is exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

PerColumn = Callable[..., Tensor]
"""An element-wise function ``f(log_p, log_q, ...)`` of log-probabilities [tokens, columns]; so is the result."""


@runtime_checkable
class VocabView(Protocol):
    """A distribution over the vocabulary at each of `tokens` positions."""

    tokens: int
    vocab_size: int

    def logprob(self, ids: Int[Tensor, "tokens ..."]) -> Float[Tensor, "tokens ..."]:
        """log p of global ids."""

    def logsumexp(self) -> Float[Tensor, " tokens"]:
        """log of the normaliser of the logits."""

    def entropy(self) -> Float[Tensor, " tokens"]:
        """-sum of p log p, in nats."""

    def expectation(self, function: PerColumn, *others: VocabView) -> Float[Tensor, " tokens"]:
        """Sum over the vocabulary of ``p_v function(log p_v, log q_v, ...)``, q... the `others` at the same ids."""

    def topk(self, k: int) -> Int[Tensor, "tokens k"]:
        """Global ids of the k most probable tokens, the most probable first, the same on all ranks."""

    def mass(
        self, ids: Int[Tensor, "tokens k"], mask: Bool[Tensor, "tokens k"] | None = None
    ) -> Float[Tensor, " tokens"]:
        """Probability of a set of distinct ids; entries whose `mask` is False are not in the set."""

    def log_tail(
        self, ids: Int[Tensor, "tokens k"], mask: Bool[Tensor, "tokens k"] | None = None
    ) -> Float[Tensor, " tokens"]:
        """log of the probability of everything outside a set; -inf where nothing is outside."""

    def detach(self) -> VocabView:
        """The same distribution as a constant."""

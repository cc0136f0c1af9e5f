"""A distribution from logits: the whole vocabulary, or this rank's columns of it."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_opd.vocab import collectives
from nemo_opd.vocab.shard import VocabShard, dense_shard
from nemo_opd.vocab.view import PerColumn, VocabView


class LogitsView:
    """`VocabView` of logits. With ``shard.group`` None it is the dense view, otherwise the vocabulary-parallel one:
    the same code, since a sum over one rank is a sum.

    Args:
        logits: [tokens, columns] of the ids that this rank holds; columns beyond ``shard.valid`` are padding and are
            never read. Half precisions are raised to float32 before anything is exponentiated.
        shard: which columns these are; None: the whole vocabulary.

    Collectives per call (none when dense): `logsumexp` 1 on its first call and 0 afterwards, `logprob` 1, `entropy`
    1, `expectation` 1, `topk` 1, `mass` 1, `log_tail` 1, each plus the normaliser when it is not yet known; as many
    again in backward. The largest message has ``tokens x k`` elements per rank, never the vocabulary.
    """

    def __init__(self, logits: Tensor, shard: VocabShard | None = None) -> None:
        shard = shard or dense_shard(logits.shape[1])
        if logits.ndim != 2 or logits.shape[1] not in (shard.length, shard.valid):
            raise ValueError(
                f"logits of shape {tuple(logits.shape)}; expected [tokens, {shard.length}] for the shard {shard}"
            )
        logits = logits[:, : shard.valid]
        self.logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        self.shard = shard
        self.tokens, self.vocab_size = logits.shape[0], shard.vocab_size
        self._logsumexp: Tensor | None = None
        self._log_probs: Tensor | None = None

    def detach(self) -> LogitsView:
        other = LogitsView(self.logits.detach(), self.shard)
        other._logsumexp = None if self._logsumexp is None else self._logsumexp.detach()
        other._log_probs = None if self._log_probs is None else self._log_probs.detach()
        return other

    def logsumexp(self) -> Tensor:
        if self._logsumexp is None:
            self._logsumexp = collectives.logsumexp_over(self.logits, None, self.shard.group)
        return self._logsumexp

    def know_logsumexp(self, value: Tensor) -> None:
        """Take the normaliser from somebody who computed it for several distributions in one collective."""
        self._logsumexp = collectives.logsumexp_over(self.logits, None, self.shard.group, value)

    def log_probs(self) -> Tensor:
        """[tokens, columns] log p of the ids that this rank holds."""
        if self._log_probs is None:
            self._log_probs = self.logits - self.logsumexp().unsqueeze(1)
        return self._log_probs

    def logprob(self, ids: Tensor) -> Tensor:
        columns, here = self.shard.local(ids.reshape(self.tokens, -1))
        if self.shard.valid == 0:
            local = (self.logits.sum(1, keepdim=True) * 0).expand(columns.shape)
        else:
            local = torch.where(here, self.logits.gather(1, columns), 0.0)
        at_ids = collectives.sum_over(local, self.shard.group)
        return (at_ids - self.logsumexp().unsqueeze(1)).reshape(ids.shape)

    def expectation(self, function: PerColumn, *others: VocabView) -> Tensor:
        columns = [self.log_probs()]
        for other in others:
            if not isinstance(other, LogitsView):
                raise TypeError(f"the whole vocabulary is needed, but a {type(other).__name__} has only {other}")
            columns.append(other.log_probs())
        return collectives.sum_over((columns[0].exp() * function(*columns)).sum(1), self.shard.group)

    def entropy(self) -> Tensor:
        return -self.expectation(lambda log_p: log_p)

    def topk(self, k: int) -> Tensor:
        if not 0 < k <= self.vocab_size:
            raise ValueError(f"top_k is {k}; expected 1 to {self.vocab_size} (the vocabulary)")
        values, ids = local_topk(self.logits.detach(), k, self.shard)
        return merge_topk(collectives.gather(pack_candidates(values, ids), self.shard.group), k)[1]

    def mass(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        probabilities = self.logprob(ids).exp()
        return (probabilities if mask is None else torch.where(mask, probabilities, 0.0)).sum(1)

    def log_tail(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        # A logsumexp with the set masked out keeps full precision however small the tail is; log(1 - mass) does not.
        outside = collectives.logsumexp_over(self.logits, membership(ids, mask, self.shard), self.shard.group)
        return outside - self.logsumexp()


def membership(ids: Tensor, mask: Tensor | None, shard: VocabShard) -> Tensor:
    """bool [tokens, valid columns]: which local columns are in the set of each token."""
    columns, here = shard.local(ids)
    if mask is not None:
        here = here & mask
    # One column more than there are takes the entries of other ranks, so that no index is clamped onto a real column.
    inside = torch.zeros(ids.shape[0], shard.valid + 1, dtype=torch.bool, device=ids.device)
    inside.scatter_(1, torch.where(here, columns, shard.valid), True)
    return inside[:, : shard.valid]


def local_topk(logits: Tensor, k: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """This rank's k best columns as (logits, global ids), [tokens, k] each, filled up with -inf and id -1."""
    width = min(k, shard.valid)
    if width:
        values, columns = logits.topk(width, dim=1)
    else:
        values, columns = logits.new_empty(logits.shape[0], 0), torch.empty(0, dtype=torch.int64)
        columns = columns.new_empty(logits.shape[0], 0).to(logits.device)
    ids = columns + shard.start
    missing = k - width
    return (
        torch.nn.functional.pad(values, (0, missing), value=-torch.inf),
        torch.nn.functional.pad(ids, (0, missing), value=-1),
    )


def pack_candidates(values: Tensor, ids: Tensor) -> Tensor:
    """[tokens, 2, k] of one floating dtype: values and ids travel in one message (ids below 2**24 are exact)."""
    return torch.stack([values, ids.to(values.dtype)], dim=1)


def merge_topk(candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of all ranks' candidates [ranks, tokens, 2, k] as (logits, global ids)."""
    values, ids = candidates.permute(2, 1, 0, 3).flatten(2).unbind(0)
    ids = ids.to(torch.int64)
    best = values.argsort(dim=1, descending=True, stable=True)[:, :k]
    return values.gather(1, best), ids.gather(1, best)

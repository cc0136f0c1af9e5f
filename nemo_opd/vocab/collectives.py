"""The collectives of the vocabulary code, all of them counted.

Gradients follow one rule, which makes every composition right without knowing what is replicated: *each rank
differentiates the sum over the ranks of the group of their losses.* The backward of an all-reduce is then an
all-reduce, that of an all-gather an all-reduce of which every rank keeps its own part, whatever stands after them. All
ranks of a group compute the same loss, so whoever differentiates divides by the size of the group
(`nemo_opd.vocab.fused` does). A plain ``dist.all_reduce`` inside autograd gives the right loss and a wrong gradient.

``group=None`` means one process; nothing is then communicated or counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class CollectiveLog:
    """What was communicated inside `counted`: one (name, number of elements this rank sends) per collective."""

    calls: list[tuple[str, int]] = field(default_factory=list)

    def count(self, *names: str) -> int:
        """Number of collectives, of the given names only when names are given."""
        return sum(1 for name, _ in self.calls if not names or name in names)

    @property
    def largest(self) -> int:
        """Elements of the largest message."""
        return max((numel for _, numel in self.calls), default=0)


_logs: list[CollectiveLog] = []


@contextmanager
def counted() -> Iterator[CollectiveLog]:
    """Record every collective of this module while the block runs."""
    log = CollectiveLog()
    _logs.append(log)
    try:
        yield log
    finally:
        _logs.remove(log)


def _record(name: str, tensor: Tensor) -> None:
    for log in _logs:
        log.calls.append((name, tensor.numel()))


def size(group: dist.ProcessGroup | None) -> int:
    """Number of ranks of a group."""
    return 1 if group is None else dist.get_world_size(group)


def all_reduce(tensor: Tensor, group: dist.ProcessGroup | None, name: str = "all_reduce") -> Tensor:
    """Sum over the ranks, in place. Not differentiable."""
    if size(group) > 1:
        _record(name, tensor)
        dist.all_reduce(tensor, group=group)
    return tensor


class Pending:
    """A collective under way; `wait` returns its result."""

    def __init__(self, result: Tensor, work: dist.Work | None) -> None:
        self._result, self._work = result, work

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._result


def start_all_reduce(tensor: Tensor, group: dist.ProcessGroup | None, name: str = "all_reduce") -> Pending:
    """Begin to sum over the ranks in place; the tensor may not be touched before `wait`. Not differentiable."""
    if size(group) == 1:
        return Pending(tensor, None)
    _record(name, tensor)
    return Pending(tensor, dist.all_reduce(tensor, group=group, async_op=True))


def start_gather(tensor: Tensor, group: dist.ProcessGroup | None, name: str = "gather") -> Pending:
    """Begin to collect equal-shaped tensors of all ranks: [ranks, *shape] after `wait`. Not differentiable."""
    if size(group) == 1:
        return Pending(tensor.unsqueeze(0), None)
    _record(name, tensor)
    flat = tensor.contiguous().view(-1)
    result = flat.new_empty(size(group) * flat.numel())
    work = dist.all_gather_into_tensor(result, flat, group=group, async_op=True)
    return Pending(result.view(size(group), *tensor.shape), work)


def gather(tensor: Tensor, group: dist.ProcessGroup | None, name: str = "gather") -> Tensor:
    """Equal-shaped tensors of all ranks, by rank: [ranks, *shape]. Not differentiable."""
    return start_gather(tensor, group, name).wait()


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, group: dist.ProcessGroup):
        ctx.group = group
        return all_reduce(tensor.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return all_reduce(grad.clone(memory_format=torch.contiguous_format), ctx.group, "all_reduce_backward"), None


def sum_over(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over the ranks, the same on all of them. Differentiable; one collective in forward, one in backward."""
    return tensor if size(group) == 1 else _SumOver.apply(tensor, group)


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, columns, excluded, group, known):
        result = known
        if result is None:
            kept = columns if excluded is None else columns.masked_fill(excluded, -torch.inf)
            result = gather(local_logsumexp(kept), group).logsumexp(0)
        ctx.group = group
        ctx.save_for_backward(columns, excluded, result)
        return result

    @staticmethod
    def backward(ctx, grad: Tensor):
        columns, excluded, result = ctx.saved_tensors
        grad = all_reduce(grad.clone(), ctx.group, "all_reduce_backward")
        share = (columns - torch.nan_to_num(result, neginf=0.0).unsqueeze(1)).exp_()
        if excluded is not None:
            share = share.masked_fill_(excluded, 0.0)
        return share.mul_(grad.unsqueeze(1)), None, None, None


def logsumexp_over(
    columns: Tensor, excluded: Tensor | None, group: dist.ProcessGroup | None, known: Tensor | None = None
) -> Tensor:
    """log of the sum of exp over the columns of all ranks: [tokens] from [tokens, local columns].

    `excluded` (bool, same shape) leaves columns out; -inf where nothing is left. Differentiable. One gather of a
    number per token in forward (maximum and sum travel together, as a local logsumexp), one all-reduce in backward.
    `known` is the result when somebody has it already; forward then communicates nothing.
    """
    return _LogSumExp.apply(columns, excluded, group, known)


def local_logsumexp(columns: Tensor) -> Tensor:
    """logsumexp over the columns of this rank; -inf where there are none."""
    if columns.shape[1] == 0:
        return columns.new_full((columns.shape[0],), -torch.inf)
    return columns.logsumexp(1)

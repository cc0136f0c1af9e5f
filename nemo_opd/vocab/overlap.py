"""How many of the teacher's k most probable ids are among the student's k: the overlap of their top sets.

Successful distillation raises it (arXiv 2604.13016). A loss on both rankings (union, intersection) knows it at every
token. One that ranks a single model needs the k-th largest logit of the other, which is found on a sixteenth of the
tokens, chosen by token id and response offset, so that the choice depends on no layout; it travels with the statistics,
in no message of its own. Where a served teacher was asked at given ids, its own top set is not known.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_opd.types import Need, TokenBatch
from nemo_opd.vocab.logits import local_topk
from nemo_opd.vocab.objective import Objective
from nemo_opd.vocab.shard import VocabShard
from nemo_opd.vocab.support import Support, is_among
from nemo_opd.vocab.view import VocabView

OVERLAP = "top_overlap"
"""Name of the metric: a share of k."""
OTHER = {"student": "teacher", "teacher": "student", "served": "student"}
"""By choice of the support, whose top set the loss does not find by itself."""
KNOWN = ("union", "intersection", "student_in_served")
"""Choices of the support that tell the overlap by themselves."""
PICKED_SHARE = 16

Metrics = dict[str, tuple[Tensor, Tensor]]


def is_measurable(objective: Objective) -> bool:
    """Does this loss, with what its teacher answers, know both top sets?"""
    few, need = objective.few, objective.needs.need
    if few is None or few.choice == "none":
        return False
    return need == (Need.TOP_K if few.choice in ("served", "student_in_served") else Need.FULL)


def picked_tokens(objective: Objective, tokens: TokenBatch, starts: Sequence[int]) -> list[Tensor]:
    """For each chunk, which begin at `starts`, the tokens within it on which the other top set is looked for."""
    nobody = tokens.ids.new_empty(0)
    if not is_measurable(objective) or not len(starts):
        return [nobody for _ in starts]
    picked = (_is_picked(tokens) & tokens.teacher_valid).nonzero().squeeze(1)
    begin = torch.tensor(starts, device=picked.device)
    bounds = [*torch.searchsorted(picked, begin).tolist(), len(picked)]
    return [picked[a:b] - start for a, b, start in zip(bounds, bounds[1:], starts, strict=False)]


def _is_picked(tokens: TokenBatch) -> Tensor:
    mixed = tokens.ids * 0x9E3779B1 + tokens.offset * 0x85EBCA77
    return (mixed >> 15) % PICKED_SHARE == 0


def pack_top(logits: Tensor, k: int, shard: VocabShard, width: int) -> Tensor:
    """This rank's k largest logits of each picked token [picked, columns] as rows of a message: [rows, width]."""
    values = local_topk(logits, k, shard)[0].flatten()
    rows = -(-len(values) // width)
    return torch.nn.functional.pad(values, (0, rows * width - len(values))).view(rows, width)


def least_of_top(gathered: Tensor, picked: int, k: int) -> Tensor:
    """The k-th largest logit [picked] from all ranks' rows [ranks, rows, width]."""
    candidates = gathered.flatten(1)[:, : picked * k].unflatten(1, (picked, k))
    return candidates.transpose(0, 1).flatten(1).topk(k, dim=1).values[:, -1]


def overlap_above(least: Tensor, logits: Tensor, support: Support, tokens: TokenBatch, picked: Tensor) -> Metrics:
    """From the other model's `logits` [tokens, k] on this one's top set: those in its own top set reach `least`."""
    shared = (logits[picked] >= least.unsqueeze(1)) & support.mask[picked]
    values = torch.zeros_like(logits[:, 0])
    values[picked] = shared.to(values.dtype).mean(1)
    where = torch.zeros_like(tokens.teacher_valid)
    where[picked] = tokens.teacher_valid[picked]
    return {OVERLAP: (values, where)}


def overlap_of_support(choice: str, k: int, support: Support, tokens: TokenBatch) -> Metrics:
    """From a support that was made of both top sets."""
    size = support.mask.sum(1)
    shared = 2 * k - size if choice == "union" else size
    return {OVERLAP: (shared.double() / k, tokens.teacher_valid)}


def overlap_of_views(
    objective: Objective, student: VocabView, teacher: VocabView | None, tokens: TokenBatch, picked: Tensor
) -> Metrics:
    """The same, asked of two views: two collectives."""
    if not is_measurable(objective) or teacher is None:
        return {}
    assert objective.few is not None
    k = objective.few.k
    shared = is_among(student.topk(k), teacher.topk(k)).sum(1).double() / k
    where = tokens.teacher_valid
    if objective.few.choice in OTHER:
        where = torch.zeros_like(where)
        where[picked] = tokens.teacher_valid[picked]
    return {OVERLAP: (shared, where)}

"""One small batch, spread over ranks in every way that a trainer may spread it.

`solve` runs on every rank of a pool (`tests.helpers.ranks`): it takes this rank's share of the batch, computes loss and
gradients through `fused_loss`, and sends them back; `assemble` puts the shares together again. Data come from numpy
with a seed, so that all processes hold the same batch without sending it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_opd.config import NoReward, SlotConfig, StudentPrefix, UnitWeight
from nemo_opd.types import Author, Need, TokenBatch


@dataclass(frozen=True)
class Batch:
    """Which batch: all of it follows from these numbers."""

    lengths: tuple[int, ...] = (3, 2, 4, 2)
    vocab: int = 29
    hidden: int = 6
    teacher_hidden: int = 5
    k: int = 5
    seed: int = 0
    scale: float = 1.5
    """Standard deviation of the logits, roughly."""
    match: bool = False
    """The teacher is the student."""
    lost: str = "some"
    """Teacher scores that did not arrive: none, some or all."""
    begun: int = 0
    """The first so many tokens of each sequence are not the student's, and no sampler drew them..."""
    author: Author = Author.TEACHER
    """...but this author wrote them."""
    dtype: torch.dtype = torch.float64


@dataclass(frozen=True)
class Layout:
    """How the batch is spread. World size is ``tp * dp * cp``."""

    tp: int = 1
    dp: int = 1
    cp: int = 1
    chunk: int = 1000
    micro_batches: int = 1
    packed: bool = True
    pad_to: int = 0
    """Rows of the student's padded vocabulary per rank beyond the least (the teacher's may differ)."""


@dataclass(frozen=True)
class Case:
    """A loss, a weight and a reward on a batch."""

    loss: SlotConfig
    weight: SlotConfig = field(default_factory=UnitWeight)
    batch: Batch = field(default_factory=Batch)
    options: tuple[tuple[str, Any], ...] = ()
    """More keyword arguments of `fused_loss`."""
    prefix: SlotConfig = field(default_factory=StudentPrefix)
    reward: SlotConfig = field(default_factory=NoReward)


@dataclass(frozen=True)
class Data:
    """The whole batch, dense."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    tokens: TokenBatch
    """Without any teacher payload."""

    @property
    def logits(self) -> Tensor:
        return self.hidden @ self.weight.T

    @property
    def teacher_logits(self) -> Tensor:
        return self.teacher_hidden @ self.teacher_weight.T


def make_data(batch: Batch) -> Data:
    """The batch in `batch.dtype` (drawn in float64)."""
    rng = np.random.default_rng(batch.seed)
    count = sum(batch.lengths)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.from_numpy(rng.normal(size=shape) * scale).to(batch.dtype)

    hidden, teacher_hidden = normal(count, batch.hidden), normal(count, batch.teacher_hidden)
    weight = normal(batch.vocab, batch.hidden, scale=batch.scale / batch.hidden**0.5)
    teacher_weight = normal(batch.vocab, batch.teacher_hidden, scale=batch.scale / batch.teacher_hidden**0.5)
    if batch.match:
        teacher_hidden, teacher_weight = hidden.clone(), weight.clone()
    sequence = torch.cat([torch.full((n,), i) for i, n in enumerate(batch.lengths)] or [torch.empty(0)]).long()
    offset = torch.cat([torch.arange(n) for n in batch.lengths] or [torch.empty(0)]).long()
    ids = torch.from_numpy(rng.integers(0, batch.vocab, count))
    # The sampler is the student with some noise, so that importance ratios are on both sides of their bounds.
    log_p = (hidden @ weight.T).log_softmax(1).gather(1, ids.unsqueeze(1)).squeeze(1)
    sampler = log_p + torch.from_numpy(rng.normal(size=count)).to(batch.dtype) * 0.7
    valid = torch.ones(count, dtype=torch.bool)
    if batch.lost == "some":
        valid[1::5] = False
    elif batch.lost == "all":
        valid[:] = False
    others = offset < batch.begun
    advantage = torch.from_numpy(rng.normal(size=count)).to(batch.dtype)
    advantage[2::7] = torch.nan  # of a response that has none
    tokens = TokenBatch(
        position=torch.arange(count),
        ids=ids,
        sequence=sequence,
        offset=offset,
        author=torch.where(others, int(batch.author), int(Author.STUDENT)).to(torch.int8),
        policy_version=torch.zeros(count, dtype=torch.int64),
        sampler_logprobs=sampler.masked_fill(others, torch.nan),
        advantage=advantage,
        teacher_valid=valid,
        response_key=0x9E3779B97F4A7 * (sequence + 1) % 2**52,
    )
    return Data(hidden, weight, teacher_hidden, teacher_weight, tokens)


def base_logits(data: Data) -> Tensor:
    """Of a model between the two, from which the teacher may have been trained."""
    return 0.5 * data.teacher_logits + 0.3 * data.logits


def with_payload(data: Data, need: Need, k: int) -> TokenBatch:
    """The tokens with what a teacher, and its base, answer to `need`; garbage where nothing arrived."""
    tokens, lost = data.tokens, ~data.tokens.teacher_valid
    base = base_logits(data).log_softmax(1).gather(1, tokens.ids.unsqueeze(1)).squeeze(1)
    tokens = replace(tokens, teacher_base_logprobs=base.masked_fill(lost, torch.nan))
    log_q = data.teacher_logits.log_softmax(1)
    if need == Need.NOTHING:
        return tokens
    if need == Need.FULL:
        return replace(tokens, teacher_hidden=data.teacher_hidden.masked_fill(lost.unsqueeze(1), torch.nan))
    if need == Need.SAMPLED:
        scores = log_q.gather(1, tokens.ids.unsqueeze(1)).squeeze(1)
        return replace(tokens, teacher_sampled_logprobs=scores.masked_fill(lost, torch.nan))
    chooser = data.logits if need == Need.AT_IDS else data.teacher_logits
    ids = chooser.topk(min(k, log_q.shape[1]), dim=1).indices
    scores = log_q.gather(1, ids).masked_fill(lost.unsqueeze(1), torch.nan)
    return replace(tokens, teacher_ids=ids, teacher_id_logprobs=scores)


def rows_of(tokens: TokenBatch, layout: Layout, dp: int, cp: int) -> list[Tensor]:
    """Indices of the tokens in each micro-batch of one rank."""
    sequences = [s for s in tokens.sequence.unique().tolist() if s % layout.dp == dp]
    if layout.packed:
        groups = [sequences[i :: layout.micro_batches] for i in range(layout.micro_batches)]
    else:
        groups = [[s] for s in sequences] or [[]]
    rows = [
        torch.cat([(tokens.sequence == s).nonzero().squeeze(1) for s in g] or [torch.empty(0)]).long() for g in groups
    ]
    if layout.cp > 1:
        # Ring attention's load balance: of 2 cp pieces, rank r holds the r-th from each end.
        pieces = [row.tensor_split(2 * layout.cp) for row in rows]
        rows = [torch.cat([p[cp], p[2 * layout.cp - 1 - cp]]) for p in pieces]
    return rows


_groups: dict[str, list[dist.ProcessGroup]] = {}


def group_of(rank: int, layout: Layout) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """(tensor-parallel group, context-parallel group) of this rank; made once per process."""
    world = layout.tp * layout.dp * layout.cp

    def find(name: str, members: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
        if len(members[0]) == 1:
            return None
        key = f"{name}{members}"
        if key not in _groups:
            _groups[key] = [dist.new_group(list(m)) for m in members]
        return _groups[key][next(i for i, m in enumerate(members) if rank in m)]

    tp = [list(range(i, i + layout.tp)) for i in range(0, world, layout.tp)]
    span = layout.tp * layout.cp
    cp = [[o + t + c * layout.tp for c in range(layout.cp)] for o in range(0, world, span) for t in range(layout.tp)]
    return find("tp", tp), find("cp", cp)


def solve(rank: int, jobs: Sequence[tuple[Case, Layout]]) -> list[dict[str, Any]]:
    """This rank's share of each job, tensors as arrays: each tensor would cost a file descriptor on its way."""
    return [_as_arrays(solve_one(rank, case, layout)) for case, layout in jobs]


def _as_arrays(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {name: _as_arrays(part) for name, part in value.items()}
    return [_as_arrays(part) for part in value] if isinstance(value, list) else value


def _as_tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {name: _as_tensors(part) for name, part in value.items()}
    return [_as_tensors(part) for part in value] if isinstance(value, list) else value


def solve_one(rank: int, case: Case, layout: Layout) -> dict[str, Any]:
    from nemo_opd.losses import build_loss, build_weight, for_prefix, with_reward
    from nemo_opd.vocab.collectives import counted
    from nemo_opd.vocab.fused import OutputLayer, fused_loss
    from nemo_opd.vocab.shard import VocabShard, dense_shard, reshard_rows

    data, weight = make_data(case.batch), build_weight(case.weight)
    loss = for_prefix(with_reward(build_loss(case.loss), case.reward), case.prefix)
    tp_group, cp_group = group_of(rank, layout)
    tokens = with_payload(data, loss.needs.need, loss.needs.k or case.batch.k)
    masks = loss.component_masks(tokens)
    normalisers = {name: max(1.0, float(mask.sum())) for name, mask in masks.items()}
    share = -(-case.batch.vocab // layout.tp) + layout.pad_to
    shard = VocabShard(case.batch.vocab, (rank % layout.tp) * share, share, tp_group)
    local = torch.zeros(share, case.batch.hidden, dtype=data.weight.dtype)
    local[: shard.valid] = data.weight[shard.start : shard.start + shard.valid]
    local[shard.valid :] = 7.0  # padding must not be read
    local.requires_grad_()
    # The teacher arrives with another padded size and is laid out like the student.
    theirs = -(-case.batch.vocab // layout.tp) + 2
    teacher_shard = VocabShard(case.batch.vocab, (rank % layout.tp) * theirs, theirs, tp_group)
    teacher_local = torch.zeros(theirs, case.batch.teacher_hidden if not case.batch.match else case.batch.hidden).to(
        data.weight.dtype
    )
    teacher_local[: teacher_shard.valid] = data.teacher_weight[teacher_shard.start :][: teacher_shard.valid]
    teacher = OutputLayer(reshard_rows(teacher_local, teacher_shard, shard), shard)
    assert dense_shard(3).size == 1
    rows = rows_of(tokens, layout, rank // (layout.tp * layout.cp), rank // layout.tp % layout.cp)
    options = dict(case.options)
    if cp_group is not None:
        options["sequence_group"] = cp_group
    result: dict[str, Any] = {"loss": 0.0, "indices": [], "dhidden": [], "calls": []}
    for row in rows:
        hidden = data.hidden[row].clone().requires_grad_()
        with counted() as log:
            out = fused_loss(
                loss,
                hidden,
                OutputLayer(local, shard),
                teacher,
                tokens.select(row),
                normalisers,
                weight=weight,
                chunk_tokens=layout.chunk,
                **options,
            )
        out.loss.backward()
        result["loss"] += float(out.loss.detach())
        result["indices"].append(row)
        result["dhidden"].append(hidden.grad)
        result["calls"].append(log.calls)
        for name, value in out.sums.items():
            result.setdefault("sums", {}).setdefault(name, torch.zeros(2, dtype=torch.float64)).add_(value)
    result["dweight"] = local.grad
    return result


@dataclass(frozen=True)
class Answer:
    """Loss and gradients of the whole batch."""

    loss: float
    dhidden: Tensor
    dweight: Tensor
    sums: dict[str, Tensor]


def assemble(case: Case, layout: Layout, shares: Sequence[dict[str, Any]]) -> Answer:
    """Add up what the ranks hold; checks that ranks of a tensor-parallel group agree and that padding stays 0."""
    data, shares = make_data(replace(case.batch)), [_as_tensors(share) for share in shares]
    dhidden, rows = torch.zeros_like(data.hidden), []
    leaders = range(0, len(shares), layout.tp)
    sums: dict[str, Tensor] = {}
    for leader in leaders:
        for other in shares[leader : leader + layout.tp]:
            assert other["loss"] == shares[leader]["loss"], (case, layout, other["loss"], shares[leader]["loss"])
            for mine, theirs in zip(shares[leader]["dhidden"], other["dhidden"], strict=True):
                assert torch.equal(mine, theirs), "tensor-parallel ranks hold different gradients of hidden states"
        for index, grad in zip(shares[leader]["indices"], shares[leader]["dhidden"], strict=True):
            dhidden[index] += grad
        for name, value in shares[leader]["sums"].items():
            sums[name] = sums.get(name, 0) + value
    share = -(-case.batch.vocab // layout.tp) + layout.pad_to
    for part in range(layout.tp):
        grad = sum(shares[leader + part]["dweight"] for leader in leaders)
        valid = min(max(case.batch.vocab - part * share, 0), share)
        assert not grad[valid:].any(), "padding rows have a gradient"
        rows.append(grad[:valid])
    return Answer(sum(shares[i]["loss"] for i in leaders), dhidden, torch.cat(rows), sums)

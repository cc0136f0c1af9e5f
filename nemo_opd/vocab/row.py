"""What a whole row looks like to weights and losses that need it at once: returns, sequence means, prefix sums."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_opd.types import TokenBatch
from nemo_opd.vocab import collectives
from nemo_opd.vocab.objective import SampledScores

_TOKEN_FIELDS = (
    "position",
    "ids",
    "sequence",
    "offset",
    "author",
    "policy_version",
    "sampler_logprobs",
    "advantage",
    "teacher_valid",
    "response_key",
    "teacher_sampled_logprobs",
    "teacher_base_logprobs",
)
_SCORE_FIELDS = ("student", "teacher", "student_entropy", "teacher_entropy")


def gather_row(
    tokens: TokenBatch, scores: SampledScores, group: dist.ProcessGroup | None
) -> tuple[TokenBatch, SampledScores, slice]:
    """The row's tokens from all ranks over which its sequences are split, and which of them are this rank's.

    Two collectives (lengths, then one matrix in float64, in which every id and flag is exact). Ids and log-probs served
    for sets of ids stay behind: they are a matter of single tokens.
    """
    if collectives.size(group) == 1:
        return tokens, scores, slice(0, len(tokens))
    assert group is not None
    own = torch.tensor([len(tokens)], device=tokens.ids.device)
    lengths = collectives.gather(own, group, "gather_row").flatten().tolist()
    sources = {
        **{n: getattr(tokens, n) for n in _TOKEN_FIELDS},
        **{f"score_{n}": getattr(scores, n) for n in _SCORE_FIELDS},
    }
    present = {name: value for name, value in sources.items() if value is not None}
    packed = torch.zeros(len(present), max(lengths), dtype=torch.float64, device=own.device)
    for row, value in zip(packed, present.values(), strict=True):
        row[: len(tokens)] = value
    gathered = collectives.gather(packed, group, "gather_row")
    whole = torch.cat([part[:, :length] for part, length in zip(gathered, lengths, strict=True)], dim=1)
    values = {name: row.to(value.dtype) for row, (name, value) in zip(whole, present.items(), strict=True)}
    start = sum(lengths[: dist.get_rank(group)])
    return (
        TokenBatch(**{n: values[n] for n in _TOKEN_FIELDS if n in values}),
        SampledScores(**{n: values[f"score_{n}"] for n in _SCORE_FIELDS if f"score_{n}" in values}),
        slice(start, start + len(tokens)),
    )


def in_order(tokens: TokenBatch) -> Tensor:
    """Indices that sort the tokens by sequence, then by response offset."""
    by_offset = tokens.offset.argsort(stable=True)
    return by_offset[tokens.sequence[by_offset].argsort(stable=True)]


def per_sequence(values: Tensor, tokens: TokenBatch) -> Tensor:
    """Sum of `values` [tokens] over each token's sequence, [tokens]."""
    _, index = tokens.sequence.unique(return_inverse=True)
    totals = torch.zeros(int(index.max()) + 1 if len(index) else 0, dtype=values.dtype, device=values.device)
    return totals.index_add_(0, index, values)[index]


def discounted_return(values: Tensor, counted: Tensor, tokens: TokenBatch, discount: float) -> Tensor:
    """sum over later tokens s >= t of the same sequence of ``discount^(offset_s - offset_t) values_s``, [tokens].

    Only `counted` tokens contribute. A parallel scan in float64: log2(tokens) steps, no loop over tokens.
    """
    order = in_order(tokens)
    total = torch.where(counted, values, 0.0).double()[order]
    sequence, offset = tokens.sequence[order], tokens.offset[order]
    same = sequence[1:] == sequence[:-1]
    decay = torch.zeros_like(total)
    decay[:-1] = torch.where(same, torch.pow(discount, (offset[1:] - offset[:-1]).clamp(min=1).double()), 0.0)
    step = 1
    while step < len(total):
        # `total` sums the next `step` tokens, `decay` leads from a token to the one `step` further on (0 past the end).
        total[:-step] += decay[:-step] * total[step:].clone()
        decay[:-step] *= decay[step:].clone()
        step *= 2
    result = torch.zeros_like(values)
    result[order] = total.to(values.dtype)
    return result

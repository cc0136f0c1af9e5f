"""What the loss measured at single tokens, from the ranks that computed it to the one that writes it down.

Only the few rollouts that are written down travel, as one flat float64 tensor (ids and offsets are exact in it).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from nemo_opd.types import TOKEN_SCORES, PackedRow, Rollout

NAMES = (*TOKEN_SCORES, "advantage")
"""In the order in which they travel. `advantage` is the verifier's."""

TokenScores = Mapping[str, Tensor]
"""Float32 [response] by name, NaN where nothing was measured; names that were measured nowhere are left out."""


def shown_rollouts(rollouts: Sequence[Rollout], count: int) -> list[int]:
    """Which of a step's rollouts are written down: the first ones, one per prompt as far as they go."""
    return sorted(range(len(rollouts)), key=lambda i: rollouts[i].sample)[:count]


def flatten(rows: Sequence[PackedRow], scores: Sequence[TokenScores], wanted: Collection[int]) -> Tensor:
    """float64 [any]: for each wanted rollout of these rows its key, its number of trained tokens, their offsets and
    every name's values.

    Args:
        rows: what this replica trained on.
        scores: what was measured in each row, [tokens] by name, on any device.
        wanted: keys of rollouts, wherever they are trained.
    """
    parts: list[Tensor] = []
    for row, measured in zip(rows, scores, strict=True):
        for number, key in enumerate(row.keys):
            if key not in wanted:
                continue
            mine = row.tokens.sequence == number
            parts += [torch.tensor([key, int(mine.sum())], dtype=torch.float64), row.tokens.offset[mine].double()]
            parts += [_values(row, measured, name)[mine].double() for name in NAMES]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _values(row: PackedRow, measured: TokenScores, name: str) -> Tensor:
    if name == "advantage" and bool(row.tokens.advantage.any()):
        return row.tokens.advantage
    return measured[name].cpu() if name in measured else torch.full((len(row.tokens),), torch.nan)


def unflatten(parts: Iterable[Tensor], lengths: Mapping[int, int]) -> dict[int, TokenScores]:
    """By key, from every rank's part.

    Args:
        lengths: by key, tokens of the response.
    """
    found: dict[int, TokenScores] = {}
    for part in parts:
        i = 0
        while i < len(part):
            key, count = int(part[i]), int(part[i + 1])
            offsets = part[i + 2 : i + 2 + count].long()
            values = part[i + 2 + count : i + 2 + (1 + len(NAMES)) * count].view(len(NAMES), count)
            i += 2 + (1 + len(NAMES)) * count
            whole = torch.full((len(NAMES), lengths[key]), torch.nan)
            whole[:, offsets] = values.float()
            found[key] = {name: row for name, row in zip(NAMES, whole, strict=True) if not row.isnan().all()}
    return found

"""Which pieces of which Hugging Face tensors a tensor-parallel rank's parameter is made of.

Loading reads the pieces straight from the file, exporting puts them back; both go through `pieces_of`, so that one
cannot disagree with the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nemo_opd.engines.megatron.families import Architecture
from nemo_opd.engines.megatron.tables import Shard, Weight


@dataclass(frozen=True)
class Piece:
    """``parameter[offset : offset + length] = tensor[start : start + length]``, both along dimension `dim`."""

    tensor: int
    """Number of the Hugging Face tensor among those of the weight."""
    start: int
    length: int
    offset: int
    dim: int = 0


def pieces_of(weight: Weight, architecture: Architecture, padded_vocab: int, tp_rank: int, tp_size: int) -> list[Piece]:
    """The pieces that rank `tp_rank` of `tp_size` holds, in the order of the parameter.

    They cover the parameter except for the padding rows of the vocabulary. Experts are not cut.
    """
    if weight.expert is not None:
        tp_rank, tp_size = 0, 1
    return _LAYOUTS[weight.shard](weight, architecture, padded_vocab, tp_rank, tp_size)


def local_shape(weight: Weight, architecture: Architecture, padded_vocab: int, tp_size: int) -> tuple[int, ...]:
    """Shape of the Megatron parameter on one rank that holds it."""
    if weight.expert is not None:
        tp_size = 1
    shape = list(architecture.shape(weight.hf[0]))
    if weight.shard is Shard.VOCAB:
        shape[0] = padded_vocab // tp_size
    elif weight.shard is Shard.ROW:
        shape[1] //= tp_size
    elif weight.shard is not Shard.REPLICATED:
        shape[0] = sum(architecture.shape(tensor)[0] for tensor in weight.hf) // tp_size
    return tuple(shape)


def _replicated(weight: Weight, architecture: Architecture, padded: int, rank: int, size: int) -> list[Piece]:
    return [Piece(0, 0, architecture.shape(weight.hf[0])[0], 0)]


def _vocab(weight: Weight, architecture: Architecture, padded: int, rank: int, size: int) -> list[Piece]:
    rows = padded // size
    start = rank * rows
    length = min(rows, architecture.vocab_size - start)
    return [Piece(0, start, length, 0)] if length > 0 else []


def _row(weight: Weight, architecture: Architecture, padded: int, rank: int, size: int) -> list[Piece]:
    columns = architecture.shape(weight.hf[0])[1] // size
    return [Piece(0, rank * columns, columns, 0, dim=1)]


def _gate_up(weight: Weight, architecture: Architecture, padded: int, rank: int, size: int) -> list[Piece]:
    rows = architecture.ffn_hidden_size // size
    return [Piece(tensor, rank * rows, rows, tensor * rows) for tensor in (0, 1)]


def _qkv(weight: Weight, architecture: Architecture, padded: int, rank: int, size: int) -> list[Piece]:
    """Megatron lays out, for every query group, its query heads, then its key head, then its value head.

    The fused rows are cut evenly; where there are fewer groups than ranks the cut runs through a group.
    """
    queries = architecture.num_attention_heads // architecture.num_query_groups
    head = architecture.head_dim
    rows = architecture.num_query_groups * (queries + 2) * head // size
    first, last = rank * rows, (rank + 1) * rows
    pieces, position = [], 0
    for group in range(architecture.num_query_groups):
        for tensor, heads in ((0, queries), (1, 1), (2, 1)):
            length = heads * head
            low, high = max(first, position), min(last, position + length)
            if low < high:
                pieces.append(Piece(tensor, group * length + low - position, high - low, low - first))
            position += length
    return pieces


_LAYOUTS: dict[Shard, Callable[[Weight, Architecture, int, int, int], list[Piece]]] = {
    Shard.REPLICATED: _replicated,
    Shard.VOCAB: _vocab,
    Shard.ROW: _row,
    Shard.GATE_UP: _gate_up,
    Shard.QKV: _qkv,
}

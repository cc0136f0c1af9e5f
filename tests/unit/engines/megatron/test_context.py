"""Which positions a rank holds of sequences that are cut, and how they are put together again."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from nemo_opd.engines.megatron.context import Context, held_positions, whole_sequences
from nemo_opd.engines.megatron.rows import model_inputs
from nemo_opd.packing import empty_tokens

CPU = torch.device("cpu")


def bounds_of(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def test_a_rank_holds_an_early_and_a_late_chunk_of_each_sequence() -> None:
    lengths = torch.tensor([8, 4])
    assert held_positions(lengths, 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert held_positions(lengths, 2, 1).tolist() == [2, 3, 4, 5, 9, 10]
    assert held_positions(torch.tensor([5, 2]), 1, 0).tolist() == list(range(7))


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_every_position_has_one_holder_and_all_have_the_same_work(ranks: int) -> None:
    """By the definition: chunks r and 2 C - 1 - r, sequence after sequence."""
    lengths = torch.tensor([2 * ranks * n for n in (5, 1, 3, 3)])
    work = []
    for rank in range(ranks):
        expected = []
        for begin, end in pairwise(bounds_of(*lengths.tolist()).tolist()):
            chunks = torch.arange(begin, end).chunk(2 * ranks)
            expected += [*chunks[rank].tolist(), *chunks[2 * ranks - 1 - rank].tolist()]
        assert held_positions(lengths, ranks, rank).tolist() == expected
        work.append(int(Context(ranks, rank).share(bounds_of(*lengths), int(lengths.sum()), 1).positions.sum()))
    assert len(set(work)) == 1, "a position looks at as many others as lie before it"
    every = torch.cat([held_positions(lengths, ranks, rank) for rank in range(ranks)])
    assert every.sort().values.tolist() == list(range(int(lengths.sum())))


@pytest.mark.parametrize("multiple", [1, 3, 16])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("lengths", "behind"), [((7, 6, 1), 0), ((9,), 4), ((8, 8), 0)])
def test_lengths_that_do_not_divide_are_padded(
    lengths: tuple[int, ...], behind: int, ranks: int, multiple: int
) -> None:
    row = sum(lengths) + behind
    inside = torch.cat([torch.arange(length) for length in lengths])
    shares = [Context(ranks, rank).share(bounds_of(*lengths), row, multiple) for rank in range(ranks)]
    holders = torch.zeros(row, dtype=torch.int64)
    for share in shares:
        assert len(share.source) % multiple == 0
        assert share.lengths.tolist() == shares[0].lengths.tolist() and int(share.lengths.min()) >= 2 * ranks
        for number, source in enumerate(share.source.tolist()):
            if source >= 0:
                holders[source] += 1
                assert int(share.place[source]) == number
                assert int(share.positions[number]) == int(inside[source])
        assert int((share.place >= 0).sum()) == int((share.source >= 0).sum())
    assert holders.tolist() == [1] * sum(lengths) + [0] * behind


def test_tokens_go_where_their_position_is() -> None:
    tokens = empty_tokens()._map(lambda x: torch.zeros(4, dtype=x.dtype))
    tokens = type(tokens)(**{**vars(tokens), "position": torch.tensor([1, 2, 5, 6]), "ids": torch.arange(4)})
    bounds = bounds_of(4, 3)  # padded to 8 positions: 0 3 | 4 (7) on the first rank, 1 2 | 5 6 on the second
    first, held = Context(2, 0).share(bounds, 7, 1).tokens(tokens)
    assert len(first) == 0 and held.tolist() == []
    second, held = Context(2, 1).share(bounds, 7, 1).tokens(tokens)
    assert second.position.tolist() == [0, 1, 2, 3] and second.ids.tolist() == held.tolist() == [0, 1, 2, 3]
    alone, held = Context().share(bounds, 7, 1).tokens(tokens)
    assert alone is tokens and held.tolist() == [0, 1, 2, 3]


def test_parts_make_whole_sequences() -> None:
    ranks, sequences, length = 3, 2, 12
    row = torch.arange(sequences * length)
    lengths = torch.full((sequences,), length)
    parts = torch.stack([row[held_positions(lengths, ranks, rank)] for rank in range(ranks)])
    assert torch.equal(whole_sequences(parts, sequences), row.view(sequences, length))


def test_what_attention_is_told_of_a_part() -> None:
    ids = torch.arange(10, 17)
    local = model_inputs(ids, bounds_of(5, 2), 1, False, CPU, Context(2, 1))
    assert local.input_ids.tolist() == [[12, 13, 14, 0, 16, 0]]
    assert local.position_ids.tolist() == [[2, 3, 4, 5, 1, 2]]
    assert local.runs == ((1, 4), (1, 2)) and local.longest == 8
    packed = model_inputs(ids, bounds_of(5, 2), 1, True, CPU, Context(2, 1)).packed
    assert packed is not None
    for bounds in (packed.cu_seqlens_q, packed.cu_seqlens_kv, packed.cu_seqlens_q_padded, packed.cu_seqlens_kv_padded):
        assert bounds.tolist() == [0, 8, 12], "of whole sequences, padding included"
    assert packed.max_seqlen_q == 8

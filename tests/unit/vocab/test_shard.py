from __future__ import annotations

import pytest
import torch

from nemo_opd.vocab.shard import VocabShard, dense_shard, reshard_rows


def test_valid_rows_of_an_uneven_last_shard_and_of_pure_padding():
    shards = [VocabShard(10, start, 4) for start in (0, 4, 8, 12)]
    assert [s.valid for s in shards] == [4, 4, 2, 0]


def test_local_columns_of_global_ids():
    columns, here = VocabShard(10, 4, 8).local(torch.tensor([[3, 4, 9, 10]]))
    assert here.tolist() == [[False, True, True, False]] and columns[0, 1:3].tolist() == [0, 5]


def test_same_columns_looks_at_valid_ids_only():
    assert VocabShard(10, 4, 8).same_columns(VocabShard(10, 4, 6))
    assert not VocabShard(10, 4, 8).same_columns(VocabShard(10, 5, 8))
    assert not VocabShard(10, 4, 8).same_columns(VocabShard(11, 4, 8))
    assert VocabShard(10, 12, 4).same_columns(VocabShard(10, 16, 4)), "neither holds an id"


def test_reshard_refuses_other_vocabularies():
    with pytest.raises(ValueError, match=r"vocabulary of 10 ids .* 12 ids"):
        reshard_rows(torch.zeros(10, 2), dense_shard(10), dense_shard(12))


def test_reshard_drops_and_adds_padding():
    weight = torch.arange(24.0).view(12, 2)
    moved = reshard_rows(weight, VocabShard(10, 0, 12), VocabShard(10, 0, 16))
    assert moved.shape == (16, 2) and torch.equal(moved[:10], weight[:10]) and not moved[10:].any()

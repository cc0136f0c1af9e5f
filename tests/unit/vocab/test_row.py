from __future__ import annotations

import numpy as np
import torch

from nemo_opd.vocab.objective import SampledScores
from nemo_opd.vocab.row import discounted_return, gather_row, in_order, per_sequence
from tests.helpers.losses import Batch, Layout, group_of, make_data


def shuffled(seed: int = 0):
    data = make_data(Batch(lengths=(4, 1, 6, 3), seed=seed))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(14))
    keep = order[order != 2]  # offset 2 of the first sequence is not trained on
    return data.tokens.select(keep)


def test_discounted_return_equals_the_double_loop():
    tokens = shuffled()
    values, counted = tokens.advantage.nan_to_num(), tokens.ids % 5 != 0
    for discount in (1.0, 0.9, 0.1):
        got = discounted_return(values, counted, tokens, discount)
        for t in range(len(tokens)):
            expected = sum(
                discount ** int(tokens.offset[s] - tokens.offset[t]) * float(values[s])
                for s in range(len(tokens))
                if tokens.sequence[s] == tokens.sequence[t] and tokens.offset[s] >= tokens.offset[t] and counted[s]
            )
            assert abs(float(got[t]) - expected) < 1e-12


def test_sums_and_order_do_not_depend_on_how_tokens_lie():
    tokens = shuffled()
    values = tokens.advantage.nan_to_num()
    sums = per_sequence(values, tokens)
    for s in tokens.sequence.unique():
        mine = tokens.sequence == s
        torch.testing.assert_close(sums[mine], values[mine].sum().expand(int(mine.sum())))
    order = in_order(tokens)
    keys = list(zip(tokens.sequence[order].tolist(), tokens.offset[order].tolist(), strict=True))
    assert keys == sorted(keys)


def test_an_empty_row():
    tokens = make_data(Batch(lengths=())).tokens
    assert len(discounted_return(tokens.advantage, tokens.teacher_valid, tokens, 0.9)) == 0
    assert len(per_sequence(tokens.advantage, tokens)) == 0


def gather_on_ranks(rank: int) -> bool:
    _, group = group_of(rank, Layout(cp=2))
    data = make_data(Batch(lengths=(4, 3)))
    mine = torch.arange(7)[:5] if rank == 0 else torch.arange(7)[5:]
    scores = SampledScores(data.tokens.sampler_logprobs[mine], None, data.tokens.advantage[mine])
    tokens, whole, place = gather_row(data.tokens.select(mine), scores, group)
    assert torch.equal(tokens.ids, data.tokens.ids) and tokens.ids.dtype == torch.int64
    assert torch.equal(tokens.teacher_valid, data.tokens.teacher_valid) and tokens.teacher_valid.dtype == torch.bool
    assert torch.equal(whole.student, data.tokens.sampler_logprobs) and whole.teacher is None
    return torch.equal(tokens.ids[place], data.tokens.ids[mine])


def test_a_row_that_is_split_over_ranks_comes_together(ranks2):
    assert ranks2.run(gather_on_ranks) == [True, True]

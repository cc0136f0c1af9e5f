"""Rows hold every sequence once, and every trained token points at the position that predicts it."""

from __future__ import annotations

import torch

from nemo_opd.packing import pack, plan_rows, sequence_length
from nemo_opd.types import TeacherScores
from tests.helpers.rollouts import make_rollout


def test_rows_hold_every_sequence_once_within_capacity():
    lengths = [5, 9, 3, 12, 4, 4, 30, 1]
    rows = plan_rows(lengths, capacity=12)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 12 or row == [6] for row in rows)
    assert len(rows) == 5  # longest first: 30; 12; 9 + 3; 5 + 4 + 1; 4


def test_without_packing_every_sequence_has_its_row():
    assert plan_rows([5, 2, 9], capacity=100, packing=False) == [[0], [1], [2]]


def test_tokens_point_at_the_position_that_predicts_them():
    rollouts = [make_rollout(0, 6, prompt_length=3), make_rollout(1, 4, prompt_length=5), make_rollout(2, 9)]
    rows = pack(rollouts, {}, [0, 1, 2], [0.5, -1.0, 2.0], capacity=64)
    assert len(rows) == 1
    (row,) = rows
    assert row.cu_seqlens.tolist() == [0, 8, 16, 27]
    whole = [torch.cat([torch.tensor(r.prompt.token_ids), r.response_ids]) for r in rollouts]
    for number, rollout in enumerate(rollouts):
        start, end = row.cu_seqlens[number : number + 2].tolist()
        assert end - start == sequence_length(rollout)
        assert torch.equal(row.input_ids[start:end], whole[number][:-1])
        assert row.position_ids[start:end].tolist() == list(range(end - start))
        mine = row.tokens.select(row.tokens.sequence == number)
        assert torch.equal(mine.ids, rollout.response_ids[rollout.loss_mask])
        assert torch.equal(mine.sampler_logprobs, rollout.sampler_logprobs[rollout.loss_mask])
        for position, token in zip(mine.position.tolist(), mine.ids.tolist(), strict=True):
            assert whole[number][position - start + 1] == token  # the next token of the same sequence
    assert set(row.tokens.advantage.tolist()) == {0.5, -1.0, 2.0}


def test_teacher_rows_follow_their_tokens():
    rollouts = [make_rollout(0, 5), make_rollout(1, 7)]
    scores = {
        10 + i: TeacherScores(
            key=10 + i,
            valid=torch.arange(len(r.response_ids)) != 1,
            hidden=torch.arange(len(r.response_ids)).float()[:, None] + 100 * i,
        )
        for i, r in enumerate(rollouts)
    }
    (row,) = pack(rollouts, scores, [10, 11], [0.0, 0.0], capacity=64)
    assert row.tokens.teacher_hidden is not None
    assert torch.equal(row.tokens.teacher_hidden[:, 0], (row.tokens.offset + 100 * row.tokens.sequence).float())
    assert torch.equal(row.tokens.teacher_valid, row.tokens.offset != 1)


def test_a_rollout_without_an_answer_loses_its_tokens_but_not_its_neighbours():
    rollouts = [make_rollout(0, 5), make_rollout(1, 7)]
    score = TeacherScores(key=1, valid=torch.ones(7, dtype=torch.bool), sampled_logprobs=torch.full((7,), -2.0))
    (row,) = pack(rollouts, {1: score}, [0, 1], [0.0, 0.0], capacity=64)
    assert torch.equal(row.tokens.teacher_valid, row.tokens.sequence == 1)


def test_a_replica_without_work_gets_an_empty_row():
    rows = pack([make_rollout(0, 0)], {}, [0], [0.0], capacity=8)
    assert len(rows) == 1
    assert len(rows[0].tokens) == 0
    assert rows[0].input_ids.numel() == 1

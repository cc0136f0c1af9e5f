"""Rows hold every sequence once, and every trained token points at the position that predicts it."""

from __future__ import annotations

import torch

from nemo_opd.packing import pack, plan_rows, sequence_length, with_payload
from nemo_opd.types import Need, TeacherNeeds, TeacherScores
from tests.helpers.rollouts import make_rollout


def test_rows_hold_every_sequence_once_within_capacity():
    lengths = [5, 9, 3, 12, 4, 4, 30, 1]
    rows = plan_rows(lengths, capacity=12)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 12 or row == [6] for row in rows)
    assert rows == [[6], [3], [1, 2], [0, 4, 7], [5]]  # longest first: 30; 12; 9 + 3; 5 + 4 + 1; 4


def test_without_packing_every_sequence_has_its_row():
    assert plan_rows([5, 2, 9], capacity=100, packing=False) == [[0], [1], [2]]


def test_a_row_begins_with_its_longest_sequence():
    rollouts = [make_rollout(0, 5), make_rollout(1, 7), make_rollout(2, 5)]
    (row,) = pack(rollouts, {}, [10, 11, 12], [0.0, 1.0, 2.0], capacity=64)
    assert row.keys == (11, 10, 12)
    assert row.tokens.advantage.unique_consecutive().tolist() == [1.0, 0.0, 2.0]


def test_tokens_point_at_the_position_that_predicts_them():
    rollouts = [make_rollout(2, 9), make_rollout(0, 6, prompt_length=3), make_rollout(1, 4, prompt_length=5)]
    rows = pack(rollouts, {}, [0, 1, 2], [0.5, -1.0, 2.0], capacity=64)
    assert len(rows) == 1
    (row,) = rows
    assert row.cu_seqlens.tolist() == [0, 11, 19, 27]
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


def test_rollouts_of_different_teachers_share_no_row():
    rollouts = [make_rollout(index, 4) for index in range(5)]
    widths = (2, 3)
    teachers = [0, 1, 0, 1, 1]
    scores = {
        i: TeacherScores(i, torch.ones(4, dtype=torch.bool), hidden=torch.full((4, widths[teachers[i]]), float(i)))
        for i in range(5)
    }
    rows = pack(rollouts, scores, range(5), [0.0] * 5, capacity=64, teachers=teachers)
    assert [row.teacher for row in rows] == [0, 1]
    for row in rows:
        assert row.tokens.teacher_hidden is not None and row.tokens.teacher_hidden.shape[1] == widths[row.teacher]
        found = set(row.tokens.teacher_hidden[:, 0].tolist())
        assert found == {float(i) for i in range(5) if teachers[i] == row.teacher and rollouts[i].loss_mask.any()}


def test_teacher_rows_follow_their_tokens():
    rollouts = [make_rollout(0, 7), make_rollout(1, 5)]
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
    rollouts = [make_rollout(0, 7), make_rollout(1, 5)]
    score = TeacherScores(key=1, valid=torch.ones(5, dtype=torch.bool), sampled_logprobs=torch.full((5,), -2.0))
    (row,) = pack(rollouts, {1: score}, [0, 1], [0.0, 0.0], capacity=64)
    assert torch.equal(row.tokens.teacher_valid, row.tokens.sequence == 1)


def test_a_replica_without_work_gets_an_empty_row():
    rows = pack([make_rollout(0, 0)], {}, [0], [0.0], capacity=8)
    assert len(rows) == 1
    assert len(rows[0].tokens) == 0
    assert rows[0].input_ids.numel() == 1


def test_a_row_of_nothing_but_tokens_without_a_signal_gets_a_payload():
    rollout = make_rollout(0, 6)
    silent = TeacherScores(0, torch.zeros(6, dtype=torch.bool))
    [row] = pack([rollout], {0: silent}, [0], [0.0], capacity=64)
    count = int(rollout.loss_mask.sum())
    assert row.tokens.teacher_valid.tolist() == [False] * count
    assert row.tokens.teacher_hidden is None
    like = torch.ones(9, 5, dtype=torch.bfloat16)
    full = with_payload(row.tokens, TeacherNeeds(Need.FULL), like)
    assert full.teacher_hidden is not None
    assert (full.teacher_hidden.shape, full.teacher_hidden.dtype) == ((count, 5), torch.bfloat16)
    sampled = with_payload(row.tokens, TeacherNeeds(Need.SAMPLED), None)
    assert sampled.teacher_sampled_logprobs is not None
    assert sampled.teacher_sampled_logprobs.shape == (count,)
    for need in (Need.AT_IDS, Need.TOP_K):
        few = with_payload(row.tokens, TeacherNeeds(need, k=3), None)
        assert few.teacher_ids is not None
        assert few.teacher_id_logprobs is not None
        assert (few.teacher_ids.shape, few.teacher_id_logprobs.shape) == ((count, 3), (count, 3))
    assert with_payload(row.tokens, TeacherNeeds(Need.NOTHING), None) is row.tokens


def test_a_replica_without_work_has_what_a_loss_over_whole_rows_looks_for():
    from nemo_opd.losses.policy_gradient import PolicyGradient
    from nemo_opd.vocab.fused import fused_loss
    from nemo_opd.vocab.output import OutputLayer
    from nemo_opd.vocab.shard import VocabShard

    loss = PolicyGradient(discount=0.5)
    [row] = pack([], {}, [], [], capacity=64)
    tokens = with_payload(row.tokens, loss.needs, None)
    output = OutputLayer(torch.randn(11, 4), VocabShard(11, 0, 11, None))
    fused = fused_loss(loss, torch.randn(0, 4, requires_grad=True), output, None, tokens, {loss.name: 1.0})
    assert float(fused.loss) == 0.0


def test_a_row_with_a_signal_keeps_its_payload():
    rollouts = [make_rollout(0, 6), make_rollout(1, 5)]
    scores = {
        0: TeacherScores(0, torch.zeros(6, dtype=torch.bool)),
        1: TeacherScores(1, torch.ones(5, dtype=torch.bool), hidden=torch.ones(5, 4)),
    }
    [row] = pack(rollouts, scores, [0, 1], [0.0, 0.0], capacity=64)
    assert with_payload(row.tokens, TeacherNeeds(Need.FULL), torch.ones(1, 4)) is row.tokens
    assert torch.equal(row.tokens.teacher_valid, row.tokens.sequence == 1)


def test_a_tokens_address_does_not_depend_on_its_row():
    rollouts = [make_rollout(i, 5 + i, sample=s) for i in range(3) for s in (0, 1)]
    together = pack(rollouts, {}, range(6), [0.0] * 6, capacity=64)
    apart = pack(rollouts[::-1], {}, range(6), [0.0] * 6, capacity=64, packing=False)

    def addresses(rows):
        return sorted((k, o, i) for r in rows for k, o, i in zip(*(x.tolist() for x in (
            r.tokens.response_key, r.tokens.offset, r.tokens.ids)), strict=True))  # fmt: skip

    assert addresses(together) == addresses(apart)
    assert len({key for key, _, _ in addresses(together)}) == 6
    assert addresses(pack(rollouts, {}, range(6), [0.0] * 6, capacity=64, seed=1)) != addresses(together)

"""Scored rollouts -> the rows that one data-parallel replica trains on.

A sequence is ``prompt + response`` without its last token: the hidden state at position ``len(prompt) - 1 + t``
predicts response token t. Rows are filled first-fit, longest sequence first, which keeps padding low without changing
the gradient: losses are per token and normalised globally.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nemo_opd.rollout.seeds import response_key
from nemo_opd.types import Need, PackedRow, Rollout, TeacherNeeds, TeacherScores, TokenBatch


def plan_rows(lengths: Sequence[int], capacity: int, packing: bool = True) -> list[list[int]]:
    """Which sequences share a row of at most `capacity` positions; a longer sequence gets a row of its own.

    With `packing` False every sequence has its own row. A row begins with its longest sequence, and equally long ones
    are neighbours.
    """
    if not packing:
        return [[i] for i in range(len(lengths))]
    rows: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = next((row for row, free in enumerate(room) if lengths[item] <= free), None)
        if fitting is None:
            rows.append([item])
            room.append(max(0, capacity - lengths[item]))
        else:
            rows[fitting].append(item)
            room[fitting] -= lengths[item]
    return rows


def sequence_length(rollout: Rollout) -> int:
    """Positions that the rollout takes in a row."""
    return len(rollout.prompt.token_ids) + len(rollout.response_ids) - 1


def pack(
    rollouts: Sequence[Rollout],
    scores: Mapping[int, TeacherScores],
    keys: Sequence[int],
    advantages: Sequence[float],
    capacity: int,
    packing: bool = True,
    seed: int = 0,
    teachers: Sequence[int] | None = None,
) -> tuple[PackedRow, ...]:
    """Lay rollouts into rows.

    Args:
        rollouts: this replica's rollouts; one with an empty response is left out.
        scores: the teacher's answers by key; empty where no teacher is needed or where this rank computes no loss.
        keys: the key of each rollout in `scores`.
        advantages: the verifier's advantage of each rollout, one number per response.
        seed: of the run; part of each token's `response_key`.
        teachers: number of each rollout's teacher; rollouts of different teachers never share a row. None: all of one.

    Returns:
        At least one row: a replica without work gets a row of one position and no trained token.
    """
    kept = [i for i, rollout in enumerate(rollouts) if len(rollout.response_ids)]
    numbers = [0] * len(rollouts) if teachers is None else teachers
    rows = []
    for teacher in sorted({numbers[i] for i in kept}):
        own = [i for i in kept if numbers[i] == teacher]
        for members in plan_rows([sequence_length(rollouts[i]) for i in own], capacity, packing):
            chosen = [own[m] for m in members]
            found, advantage = [scores.get(keys[i]) for i in chosen], [advantages[i] for i in chosen]
            row = _row([rollouts[i] for i in chosen], found, advantage, tuple(keys[i] for i in chosen), seed)
            rows.append(replace(row, teacher=teacher))
    return tuple(rows) or (empty_row(),)


def _row(
    rollouts: list[Rollout],
    scores: list[TeacherScores | None],
    advantages: list[float],
    keys: tuple[int, ...],
    seed: int,
) -> PackedRow:
    inputs, positions, bounds = [], [], [0]
    tokens: list[dict[str, Tensor]] = []
    for number, (rollout, score, advantage) in enumerate(zip(rollouts, scores, advantages, strict=True)):
        prompt = torch.tensor(rollout.prompt.token_ids, dtype=torch.int64)
        sequence = torch.cat([prompt, rollout.response_ids])[:-1]
        inputs.append(sequence)
        positions.append(torch.arange(len(sequence)))
        key = response_key(seed, rollout.prompt.epoch, rollout.prompt.index, rollout.sample)
        tokens.append(_tokens(rollout, score, advantage, number, bounds[-1] + len(prompt) - 1, key))
        bounds.append(bounds[-1] + len(sequence))
    _fill_missing(tokens)
    return PackedRow(
        input_ids=torch.cat(inputs),
        position_ids=torch.cat(positions),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        tokens=TokenBatch(**{name: torch.cat([t[name] for t in tokens]) for name in tokens[0]}),
        keys=keys,
    )


def _tokens(
    rollout: Rollout, score: TeacherScores | None, advantage: float, number: int, first: int, key: int
) -> dict[str, Tensor]:
    """The trained tokens of one rollout; `first` is the row position that predicts response token 0."""
    trained = rollout.loss_mask.nonzero().squeeze(-1)
    count = len(trained)
    fields = {
        "position": first + trained,
        "ids": rollout.response_ids[trained],
        "sequence": torch.full((count,), number),
        "offset": trained,
        "author": rollout.author[trained],
        "policy_version": rollout.policy_version[trained],
        "sampler_logprobs": rollout.sampler_logprobs[trained],
        "advantage": torch.full((count,), advantage, dtype=torch.float32),
        "teacher_valid": torch.ones(count, dtype=torch.bool) if score is None else score.valid[trained],
        "response_key": torch.full((count,), key),
    }
    if score is not None:
        payloads = {
            "teacher_hidden": score.hidden,
            "teacher_sampled_logprobs": score.sampled_logprobs,
            "teacher_ids": score.ids,
            "teacher_id_logprobs": score.id_logprobs,
            "teacher_base_logprobs": score.base_logprobs,
        }
        fields |= {name: payload[trained] for name, payload in payloads.items() if payload is not None}
    return fields


def _fill_missing(tokens: list[dict[str, Tensor]]) -> None:
    """Where one sequence of a row has a teacher payload and another has none, the latter's tokens become invalid.

    The zeros that keep the shapes equal are never read: `teacher_valid` is False there.
    """
    examples = {name: t[name] for t in tokens for name in t if name.startswith("teacher_") and name != "teacher_valid"}
    for fields in tokens:
        for name, example in examples.items():
            if name not in fields:
                fields[name] = example.new_zeros(len(fields["ids"]), *example.shape[1:])
                fields["teacher_valid"] = torch.zeros_like(fields["teacher_valid"])


def with_payload(tokens: TokenBatch, needs: TeacherNeeds, hidden: Tensor | None) -> TokenBatch:
    """A row whose tokens all lack a teacher signal, with the payload that the loss looks for: zeros, never read.

    A row without tokens gets it too: losses and weights over whole rows look at it before they count. In other rows
    `pack` takes the shapes from a neighbour that has one.

    Args:
        needs: of the loss.
        hidden: [any, hidden], whose width and dtype the teacher's hidden states have (`Need.FULL`).
    """
    count = len(tokens)
    if needs.need is Need.NOTHING or bool(tokens.teacher_valid.any()):
        return tokens
    numbers = tokens.sampler_logprobs.new_zeros(count)
    if needs.base:
        tokens = replace(tokens, teacher_base_logprobs=numbers)
    if needs.need is Need.FULL:
        return tokens if hidden is None else replace(tokens, teacher_hidden=hidden.new_zeros(count, hidden.shape[1]))
    if needs.need is Need.SAMPLED:
        return replace(tokens, teacher_sampled_logprobs=numbers)
    return replace(
        tokens,
        teacher_ids=tokens.ids.new_zeros(count, needs.k),
        teacher_id_logprobs=numbers.new_zeros(count, needs.k),
    )


def empty_row() -> PackedRow:
    """One position, nothing to train on: the replica still runs forward and backward with the others."""
    return PackedRow(
        input_ids=torch.zeros(1, dtype=torch.int64),
        position_ids=torch.zeros(1, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        tokens=empty_tokens(),
    )


def empty_tokens() -> TokenBatch:
    """A token batch of length 0."""
    integers, floats = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    return TokenBatch(
        position=integers,
        ids=integers,
        sequence=integers,
        offset=integers,
        author=integers.to(torch.int8),
        policy_version=integers,
        sampler_logprobs=floats,
        advantage=floats,
        teacher_valid=integers.bool(),
        response_key=integers,
    )

"""A teacher on Megatron-core, in a layout of its own over the student's processes (or in the student's).

Requests are spread over the teacher's data-parallel replicas by length, packed into rows, run through Megatron's
forward-only schedule, and answered where the student's loss needs them. Every rank computes the same plan, so answers
travel as plain point-to-point messages of known shapes from the teacher's last stage to their consumers.

Work goes in windows of a few rows per replica: a window's answers are delivered (and yielded) before the next window
runs, which bounds the memory that answers take on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_with_interleaving,
    forward_backward_pipelining_without_interleaving,
)
from torch import Tensor

from nemo_opd.config import Config
from nemo_opd.engines.exchange import Message, exchange
from nemo_opd.engines.megatron import cpu, fp8
from nemo_opd.engines.megatron.context import Share, put_together
from nemo_opd.engines.megatron.families import Architecture, read_architecture
from nemo_opd.engines.megatron.model import HiddenStateModel, ModelChunks, build_model, dtype_of
from nemo_opd.engines.megatron.parallel import Layout, init_distributed, student_groups, teacher_groups
from nemo_opd.engines.megatron.rows import ModelInputs
from nemo_opd.engines.requests import check_needs, check_request
from nemo_opd.errors import ConfigError
from nemo_opd.packing import plan_rows
from nemo_opd.processes import balanced
from nemo_opd.types import Need, ScoreRequest, TeacherNeeds, TeacherScores
from nemo_opd.vocab.logits import LogitsView
from nemo_opd.vocab.output import OutputLayer, logits_into

_ROWS_PER_WINDOW_AND_STAGE = 8
"""Rows of a window per pipeline stage: enough that filling and draining the pipeline costs about a tenth."""
_CHUNK_TOKENS = 256
"""Tokens whose logits exist at the same time."""

Payload = tuple[Tensor, ...]
"""Answers about consecutive tokens, [tokens, ...] each: (hidden,), (log-probs,) or (log-probs, ids)."""
Row = list[int]
"""Numbers of the requests in one row."""


@dataclass(frozen=True)
class _RowTokens:
    """Which positions of a row predict response tokens, and which tokens; ids on the model's device."""

    position: Tensor
    ids: Tensor
    """int64 [tokens, k]: the response token, or the ids asked for"""
    counts: list[int]
    """Response tokens of each request of the row."""


class MegatronScorer:
    """`nemo_opd.engines.protocols.Scorer` on Megatron-core.

    Log-probabilities are over the *student's* vocabulary: ids that only the teacher has are left out of its
    normaliser, so that both distributions live on the same ids. The model takes no gradient and no optimizer memory.

    Args:
        config: the recipe; `teacher`, `student` (its layout and vocabulary) and `run.seed` are read.
        model: a model on the student's layout that scores as it stands at each call, in place of `teacher.model`.

    Raises:
        ConfigError: no teacher model, an unsupported checkpoint, a layout that does not divide, or a student whose
            vocabulary is larger than the teacher's.
    """

    def __init__(self, config: Config, model: ModelChunks | None = None) -> None:
        init_distributed()
        student, teacher = config.student, config.teacher
        self._row_tokens = teacher.micro_batch_tokens
        architecture = read_architecture(student.model)
        self._vocab_size = architecture.vocab_size
        # Some of Megatron's layers look into its global state even when they are given their groups.
        student_groups(Layout.of(student, "student"), config.run.seed)
        if model is None:
            self.layout = Layout.of(teacher, "teacher")
            model, architecture = _external(config, self.layout)
            model.requires_grad_(False).eval()
        else:
            self.layout = Layout.of(student, "student")
        self._dtype = model.config.params_dtype
        self._teacher_vocab_size, self._hidden_size = architecture.vocab_size, architecture.hidden_size
        self._max_positions = architecture.max_position_embeddings
        self._model: ModelChunks | None = model
        self._schedule = _forward_only(model, self.layout)

    def score(self, requests: Sequence[ScoreRequest], needs: TeacherNeeds) -> Iterator[TeacherScores]:
        """See `Scorer.score`.

        Raises, at the call and on every rank alike: ValueError for a need that `TeacherScores` cannot carry, k out of
        range, an empty context, `at_ids` that do not fit, or ids outside the vocabulary.
        """
        if self._model is None:
            raise RuntimeError("the scorer was closed; make a new one")
        check_needs(needs, self._vocab_size)
        for request in requests:
            check_request(request, needs, self._vocab_size, self._teacher_vocab_size)
        return iter(()) if needs.need is Need.NOTHING else self._answers(requests, needs)

    def _answers(self, requests: Sequence[ScoreRequest], needs: TeacherNeeds) -> Iterator[TeacherScores]:
        for request in requests:
            if not len(request.response_ids) and self.layout.rank in request.consumers:
                yield self._answer(request, self._empty(needs), needs)
        for window in self._windows(requests):
            with torch.no_grad():  # closed before yielding: it would reach into the caller's code
                answers = list(self._run_window(window, requests, needs))
            yield from answers

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Score in the weights' own dtype meanwhile, where the layers compute in FP8."""
        assert self._model is not None
        with fp8.full_precision(self._model):
            yield

    def close(self) -> None:
        """Let go of the model."""
        self._model = None

    def _windows(self, requests: Sequence[ScoreRequest]) -> Iterator[list[list[Row]]]:
        """Rows by replica, window after window; the same on every rank."""
        scored = [i for i, request in enumerate(requests) if len(request.response_ids)]
        lengths = [len(requests[i].context_ids) + len(requests[i].response_ids) - 1 for i in scored]
        rows = []
        for members in balanced(lengths, self.layout.dp):
            packed = plan_rows([lengths[m] for m in members], self._row_tokens)
            rows.append([[scored[members[m]] for m in row] for row in packed])
        size, most = _ROWS_PER_WINDOW_AND_STAGE * self.layout.pp, max(map(len, rows))
        if self.layout.ep > 1:  # replicas exchange tokens in every layer: those with fewer rows run empty ones along
            rows = [replica + [[]] * (most - len(replica)) for replica in rows]
        for first in range(0, most, size):
            yield [replica[first : first + size] for replica in rows]

    def _run_window(
        self, window: list[list[Row]], requests: Sequence[ScoreRequest], needs: TeacherNeeds
    ) -> Iterator[TeacherScores]:
        computed = self._compute(window[self.layout.dp_rank], requests, needs)
        messages = [
            Message(number, self._source(replica, place, consumer), consumer, len(requests[number].response_ids))
            for replica, rows in enumerate(window)
            for row in rows
            for number in row
            for place, consumer in enumerate(requests[number].consumers)
        ]
        received = exchange(messages, computed, self._empty(needs), cpu.device())
        for number, payload in received:
            yield self._answer(requests[number], payload, needs)

    def _source(self, replica: int, place: int, consumer: int) -> int:
        """Which of a replica's last-stage ranks answers: the consumer itself if it is one, else they take turns."""
        ranks = self.layout.last_stage_ranks(replica)
        return consumer if consumer in ranks else ranks[place % len(ranks)]

    def _compute(self, rows: list[Row], requests: Sequence[ScoreRequest], needs: TeacherNeeds) -> dict[int, Payload]:
        """Run this replica's rows; on its last stage, the payload of every request in them."""
        if not rows:
            return {}
        assert self._model is not None
        count = self.layout.whole_rounds(len(rows))
        asked = [[requests[number] for number in row] for row in rows] + [[]] * (count - len(rows))
        payloads: list[list[Payload]] = self._schedule(
            forward_step_func=partial(self._forward_step, needs),
            data_iterator=self._model.passes(map(partial(self._lay_out, needs), asked)),
            model=self._model.chunks,
            num_microbatches=count,
            seq_length=1,  # with variable_seq_lengths stages tell each other the shape
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        numbers = (number for row in rows for number in row)
        return dict(zip(numbers, (payload for row in payloads for payload in row), strict=False))

    def _lay_out(self, needs: TeacherNeeds, requests: list[ScoreRequest]) -> tuple[_RowTokens, ModelInputs]:
        assert self._model is not None
        input_ids, cu_seqlens, tokens = _lay_out(requests, needs)
        return tokens, self._model.inputs(input_ids, cu_seqlens)

    def _forward_step(
        self, needs: TeacherNeeds, rows: Iterator[tuple[_RowTokens, ModelInputs]], model: HiddenStateModel
    ) -> tuple[Tensor, Any]:
        """What Megatron's schedule asks for one micro-batch and chunk."""
        tokens, inputs = next(rows)
        return model(inputs), partial(self._payloads, tokens, inputs.share, needs)

    def _payloads(
        self, tokens: _RowTokens, share: Share, needs: TeacherNeeds, output: Tensor, non_loss_data: bool
    ) -> list[Payload]:
        """The row's answers, one payload per request; runs on the last stage. Under context parallelism each rank works
        on the positions that it holds, and one all-reduce per tensor gives all of them the whole row's."""
        assert non_loss_data and self._model is not None
        if not tokens.counts:
            return []
        held, numbers = (x.to(output.device) for x in share.numbers(tokens.position))
        hidden = self._model.last_hidden(output).index_select(0, numbers)
        payload = (hidden,) if needs.need is Need.FULL else self._log_probs(hidden, tokens.ids[held], needs)
        if (group := self._model.context_group) is not None:
            payload = tuple(put_together(part, held, len(tokens.position), group) for part in payload)
        return list(zip(*(part.split(tokens.counts) for part in payload), strict=True))

    def _log_probs(self, hidden: Tensor, ids: Tensor, needs: TeacherNeeds) -> Payload:
        """fp32 log-probabilities at `ids`, or at the k best ids, a chunk of tokens at a time.

        Collectives per chunk over the teacher's tensor ranks: 2 (normaliser, values at ids), and 1 more for the k best.
        """
        assert self._model is not None
        if not len(hidden):  # other context-parallel ranks hold what is asked
            return tuple(part.to(hidden.device) for part in self._empty(needs))
        output = OutputLayer(self._model.output_weight, self._model.vocab_shard(self._vocab_size))
        values, best = [], []
        for chunk, asked in zip(hidden.split(_CHUNK_TOKENS), ids.split(_CHUNK_TOKENS), strict=True):
            logits = chunk.new_empty(len(chunk), output.shard.valid, dtype=output.logits_dtype)
            logits_into(logits, chunk, output.rows)
            view = LogitsView(logits, output.shard)
            if needs.need is Need.TOP_K:
                asked = view.topk(needs.k)
                best.append(asked)
            values.append(view.logprob(asked).float())
        return (torch.cat(values), torch.cat(best)) if best else (torch.cat(values),)

    def _empty(self, needs: TeacherNeeds) -> Payload:
        """A payload about no tokens: tells a receiver dtype and shape."""
        if needs.need is Need.FULL:
            return (torch.empty(0, self._hidden_size, dtype=self._dtype),)
        k = 1 if needs.need is Need.SAMPLED else needs.k
        values = torch.empty(0, k)
        return (values, torch.empty(0, k, dtype=torch.int64)) if needs.need is Need.TOP_K else (values,)

    def _answer(self, request: ScoreRequest, payload: Payload, needs: TeacherNeeds) -> TeacherScores:
        """A row with a number that is not finite, or beyond the positions that the teacher knows, is no score."""
        first = payload[0]
        valid = first.isfinite().all(dim=1)
        valid[max(0, self._max_positions - len(request.context_ids) + 1) :] = False
        if needs.need is Need.FULL:
            return TeacherScores(request.key, valid, hidden=first)
        if needs.need is Need.SAMPLED:
            return TeacherScores(request.key, valid, sampled_logprobs=first.squeeze(1))
        ids = payload[1] if needs.need is Need.TOP_K else request.at_ids
        return TeacherScores(request.key, valid, ids=ids, id_logprobs=first)


def _external(config: Config, layout: Layout) -> tuple[ModelChunks, Architecture]:
    """The model of `teacher.model`, in its own groups."""
    teacher, vocab_size = config.teacher, read_architecture(config.student.model).vocab_size
    if teacher.model is None:
        raise ConfigError("teacher.model", None, "a folder in Hugging Face format", "name the teacher")
    dtype = dtype_of(teacher.dtype, "teacher.dtype")
    model, architecture = build_model(teacher.model, teacher, layout, teacher_groups(layout), dtype, "teacher")
    if architecture.vocab_size < vocab_size:
        raise ConfigError(
            "student.model",
            f"a vocabulary of {vocab_size}",
            f"at most the teacher's {architecture.vocab_size}",
            "use a teacher that knows every token of the student",
        )
    return model, architecture


def _forward_only(model: ModelChunks, layout: Layout) -> Any:
    """Megatron's schedule on the teacher's own groups."""
    groups = model.pg_collection
    if layout.pp == 1:
        return partial(forward_backward_no_pipelining, pg_collection=groups)
    with cpu.megatron_device():
        communicator = P2PCommunicator(pp_group=groups.pp, config=model.config)
    interleaved = forward_backward_pipelining_with_interleaving
    schedule = interleaved if layout.vp > 1 else forward_backward_pipelining_without_interleaving
    return partial(schedule, p2p_communicator=communicator, pg_collection=groups)


def _empty_row() -> tuple[Tensor, Tensor, _RowTokens]:
    """One position that nobody asked about."""
    position = torch.zeros(0, dtype=torch.int64)
    bounds = torch.tensor([0, 1], dtype=torch.int32)
    return torch.zeros(1, dtype=torch.int64), bounds, _RowTokens(position, position[:, None], [])


def _lay_out(requests: list[ScoreRequest], needs: TeacherNeeds) -> tuple[Tensor, Tensor, _RowTokens]:
    """(input ids [row], cu_seqlens, tokens) of one row. A sequence is context + response without its last token."""
    if not requests:
        return _empty_row()
    inputs, positions, ids, bounds = [], [], [], [0]
    for request in requests:
        context = torch.tensor(request.context_ids, dtype=torch.int64)
        inputs += [context, request.response_ids[:-1]]
        first = bounds[-1] + len(context) - 1
        positions.append(torch.arange(first, first + len(request.response_ids)))
        ids.append(request.response_ids[:, None] if needs.need is not Need.AT_IDS else request.at_ids)
        bounds.append(bounds[-1] + len(context) + len(request.response_ids) - 1)
    device = cpu.device()
    tokens = _RowTokens(
        position=torch.cat(positions),
        ids=torch.cat([i for i in ids if i is not None]).to(device),
        counts=[len(request.response_ids) for request in requests],
    )
    return torch.cat(inputs), torch.tensor(bounds, dtype=torch.int32), tokens

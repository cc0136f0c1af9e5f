"""Bytes of a step by collective: what one rank sends, over which link, in how many calls, and how long that takes.

Rings: a reduction to all sends 2 (n - 1) / n of the data, a gather or scatter half of that. Groups follow from the
order of ranks, tensor parallel fastest, then context, data and pipeline parallel (engines/megatron/parallel.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from nemo_opd.planning.setting import Model, Setting

TOKEN_BYTES = 40
"""Of a response as processes send it to each other: id, author, version and mask of 8 bytes each, and a float64."""
_FP32 = 4
_STATISTICS = 8
"""Numbers of a token that ranks exchange for its loss (vocab/statistics.py)."""


@dataclass(frozen=True)
class Flow:
    """One kind of message in a step."""

    part: str
    """Of a step: exchange, score, train, loss, update or refit."""
    what: str
    ranks: int
    """Of its group."""
    sent: float
    """Bytes by the busiest rank."""
    calls: int
    link: str
    """NVLink, network, host (gloo), or PCIe and disk where no other rank takes part"""
    seconds: float


def flows(setting: Setting) -> list[Flow]:
    """All that is not negligible, in the order of a step."""
    makers = (_exchange, _scoring, _layers, _stages, _loss, _replicas, _refit)
    return [flow for maker in makers for flow in maker(setting) if flow.sent > 0]


def _flow(
    setting: Setting, part: str, what: str, size: int, stride: int, sent: float, calls: int, rounds: float
) -> Flow:
    link, seconds = setting.cluster.seconds_of(size, stride, sent, calls, rounds)
    return Flow(part, what, size, sent, calls, link, seconds)


def _exchange(setting: Setting) -> Iterator[Flow]:
    """Every process hears of every response (rollout/exchange.py)."""
    if setting.generates:
        tokens, ranks = setting.responses * setting.written, setting.processes
        received = tokens * TOKEN_BYTES * (ranks - 1) / ranks
        seconds = received / setting.cluster.assumptions.host_network
        yield Flow("exchange", "responses to every process", ranks, received, 2, "host", seconds)


def _layers(setting: Setting) -> Iterator[Flow]:
    """The student's tensor, context and expert parallelism, forward and backward."""
    student = setting.student
    spread, shape = student.spread, student.shape
    yield _tensor_parallel(setting, student, "train", setting.positions / spread.parts, setting.rows, True)
    again = setting.config.student.recompute != "none"
    yield _context_parallel(
        setting, student, "train", setting.positions / spread.parts, setting.rows, 4 if again else 3
    )
    if spread.ep > 1:
        tokens = setting.positions / spread.dp / spread.sequence
        layers = shape.layers // spread.pp
        once = tokens * shape.experts_per_token * shape.hidden * student.width * (spread.ep - 1) / spread.ep
        calls = 4 * layers * setting.rows  # to the experts and back, forward and backward
        yield _flow(setting, "train", "tokens to experts and back", spread.ep, 1, 4 * layers * once, calls, 1)


def _tensor_parallel(setting: Setting, model: Model, part: str, positions: float, rows: int, backward: bool) -> Flow:
    """Of a layer, two reductions forward and two backward; under sequence parallelism each is a scatter and a gather,
    and backward gathers the inputs of both blocks again."""
    spread, shape = model.spread, model.shape
    layers, tp = shape.layers // spread.pp, spread.tp
    halves = 4 + (0 if not backward else 6 if spread.sequence_parallel else 4)
    sent = halves * (tp - 1) / tp * positions * shape.hidden * model.width * layers
    calls = rows * layers * (halves if spread.sequence_parallel else halves // 2)
    return _flow(setting, part, f"{model.key}: tensor-parallel layers", tp, 1, sent, calls, 1)


def _context_parallel(setting: Setting, model: Model, part: str, positions: float, rows: int, rounds: int) -> Flow:
    """Keys and values of what a rank holds go round all others in every layer: forward, backward together with their
    gradient, and where attention is computed once more."""
    spread, shape = model.spread, model.shape
    layers, others = shape.layers // spread.pp, spread.cp - 1
    sent = rounds * others * positions * 2 * shape.key_value / spread.tp * model.width * layers
    calls = rounds * others * rows * layers
    return _flow(setting, part, f"{model.key}: keys and values to other parts", spread.cp, spread.tp, sent, calls, 1)


def _stages(setting: Setting) -> Iterator[Flow]:
    spread = setting.student.spread
    if spread.pp > 1:
        sent = _stage_bytes(setting.student, setting.positions / spread.parts)
        stride = spread.stage_ranks
        calls = 2 * setting.rows * spread.vp
        yield _flow(setting, "train", "student: between stages", 2, stride, 2 * sent, calls, 1)


def _stage_bytes(model: Model, positions: float) -> float:
    """That leave a rank forward, at most: a hidden state for each position and chunk of layers."""
    return positions * model.shape.hidden * model.width / model.spread.sequence * model.spread.vp


def _loss(setting: Setting) -> Iterator[Flow]:
    student = setting.student
    tp, tokens = student.spread.tp, setting.responses / student.spread.parts * setting.written
    chunks = math.ceil(tokens / setting.config.train.loss_chunk_tokens)
    if tp == 1:
        return
    statistics = tokens * _STATISTICS * _FP32 * (tp - 1)
    yield _flow(setting, "loss", "statistics of the vocabulary", tp, 1, statistics, chunks, 1)
    if not student.spread.sequence_parallel:
        gradient = 2 * (tp - 1) / tp * tokens * student.shape.hidden * student.width
        yield _flow(setting, "loss", "gradient of the hidden states", tp, 1, gradient, chunks, 2)


def _replicas(setting: Setting) -> Iterator[Flow]:
    """Gradients in fp32, once a step; with the distributed optimizer a part of the weights comes back to all."""
    student = setting.student
    spread = student.spread
    multiple = setting.config.student.vocab_padding_multiple
    largest = [student.shape.stage(spread, stage, multiple) for stage in range(spread.pp)]
    for what, count, size, stride in (
        ("replicas", max(one.dense for one in largest), spread.parts, spread.tp),
        ("replicas of experts", max(one.expert for one in largest), spread.expert_dp, spread.ep),
    ):
        share, gradient = (size - 1) / size, count * max(_FP32, student.width)
        if not setting.distributed:
            yield _flow(setting, "update", f"{what}: gradients", size, stride, 2 * share * gradient, 1, 2)
            continue
        yield _flow(setting, "update", f"{what}: gradients, scattered", size, stride, share * gradient, 1, 1)
        weights = share * (count * student.width if what != "replicas" else _gathered(student, multiple))
        yield _flow(setting, "update", f"{what}: weights, gathered", size, stride, weights, 1, 1)


def _gathered(student: Model, multiple: int) -> float:
    """Bytes of the parameters that all replicas share, as they are gathered, of the stage that has most."""
    spread = student.spread
    spared = student.width - student.fp8.gathered(student.width)
    return max(
        student.shape.stage(spread, stage, multiple).dense * student.width - student.fp8_numbers(stage) * spared
        for stage in range(spread.pp)
    )


def teacher_rows(setting: Setting, model: Model) -> int:
    """Micro-batches of one replica of a teacher."""
    mean = setting.prompt + setting.written + setting.read_more
    held = max(1, int(model.row // mean))
    return max(1, math.ceil(setting.scored / model.spread.dp / held))


def teacher_positions(setting: Setting) -> float:
    """That a teacher reads in a step."""
    return setting.scored * (setting.prompt + setting.written + setting.read_more)


def _scoring(setting: Setting) -> Iterator[Flow]:
    tokens = setting.scored * setting.written
    student = setting.student.spread
    for model, _ in setting.teachers():
        spread = model.spread
        positions, rows = teacher_positions(setting) / spread.parts, teacher_rows(setting, model)
        yield _tensor_parallel(setting, model, "score", positions, rows, False)
        yield _context_parallel(setting, model, "score", positions, rows, 1)
        if spread.pp > 1:
            sent = _stage_bytes(model, positions)
            calls = rows * spread.vp
            yield _flow(setting, "score", f"{model.key}: between stages", 2, spread.stage_ranks, sent, calls, 1)
        if setting.whole_teacher and not model.key.endswith("base_model"):
            each = tokens * model.shape.hidden * model.width
            whole = 2 * (spread.cp - 1) / spread.cp * each / spread.dp
            what = f"{model.key}: hidden states put together"
            yield _flow(setting, "score", what, spread.cp, spread.tp, whole, rows, 2)
            received, sent = each / student.dp, each * student.tp * student.cp / spread.stage_ranks
            far = setting.processes > setting.cluster.gpus_per_node
            size, stride = (2, setting.cluster.gpus_per_node) if far else (2, 1)
            moved = max(received, sent)
            yield _flow(setting, "score", f"{model.key}: hidden states to the loss", size, stride, moved, rows, 1)
            seconds = 2 * received / setting.cluster.assumptions.pcie
            yield Flow(
                "score", f"{model.key}: hidden states to the host and back", 1, 2 * received, rows, "PCIe", seconds
            )


def _refit(setting: Setting) -> Iterator[Flow]:
    """Every rank gathers every tensor; then the transport takes them to those that write."""
    if not setting.generates:
        return
    student, assumed = setting.student, setting.cluster.assumptions
    whole = student.shape.parameters * student.width / setting.config.rollout.refit_every
    spread, tensors = student.spread, 6 * student.shape.layers
    yield _flow(setting, "refit", "shards gathered", spread.tp, 1, whole * (spread.tp - 1) / spread.tp, tensors, 1)
    if spread.pp > 1:
        yield _flow(setting, "refit", "stages to all", spread.pp, spread.stage_ranks, whole, tensors, 1)
    writers = setting.writers
    if writers is None or writers.colocated:
        return
    transport = setting.config.rollout.servers.transport
    if transport == "disk":
        yield Flow("refit", "folder, written and read", 1, 2 * whole, 1, "disk", 2 * whole / assumed.disk)
    else:
        stride = 1 if writers.beside else setting.cluster.gpus_per_node
        yield _flow(setting, "refit", "first rank to all servers", 2, stride, whole, tensors, 1)

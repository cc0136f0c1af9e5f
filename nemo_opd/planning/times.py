"""An estimate of each part of a step from stated rates. A plan, not a measurement: see `gpus.Assumptions`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_opd.config import PeersContext
from nemo_opd.planning.memory import server_memory
from nemo_opd.planning.setting import Model, Serving, Setting
from nemo_opd.planning.shapes import ModelShape
from nemo_opd.planning.traffic import Flow, teacher_positions, teacher_rows

_PASSES = 3
"""Arithmetic of forward and backward over that of forward."""
_TOUCHED = 6
"""Times that a chunk's fp32 logits are read or written besides the matrix products."""
_OPTIMIZER = 30
"""Bytes that Adam reads and writes for a parameter: gradient, master copy, moments, weight."""
_WINDOW = 8
"""Rows of a teacher's window for each of its stages, as in engines/megatron/scorer.py."""


@dataclass(frozen=True)
class Times:
    """Seconds of a step."""

    parts: dict[str, float]
    """write, exchange, score, train, loss (the part of train that lies in it), update, refit, rest"""
    overlapped: bool
    """Do writers write the next step's responses meanwhile?"""
    step: float
    tokens_per_second: float
    """Written tokens, over the whole run."""
    utilisation: float
    """Arithmetic of the student's training over the peak of the trainer's GPUs in the time of train and update."""

    @property
    def bottleneck(self) -> str:
        """The part that takes longest, of those that a step waits for."""
        trainer = {name: seconds for name, seconds in self.parts.items() if name not in ("write", "loss")}
        hidden = self.overlapped and self.parts["write"] < sum(trainer.values()) - trainer["rest"] - trainer["refit"]
        waited = trainer if hidden else {"write": self.parts["write"]} if self.overlapped else self.parts
        alone = {name: seconds for name, seconds in waited.items() if name != "loss"}
        return max(alone, key=lambda name: alone[name])


def times(setting: Setting, moved: Sequence[Flow]) -> Times:
    """The estimate; `moved` is what `traffic.flows` found."""
    train, loss = _train(setting, moved)
    parts = {
        "write": _write(setting),
        "exchange": _exchange(setting, moved),
        "score": _score(setting, moved),
        "train": train,
        "loss": loss,
        "update": _update(setting, moved),
        "refit": sum(flow.seconds for flow in moved if flow.part == "refit"),
        "rest": setting.cluster.assumptions.step_seconds,
    }
    writing, scoring = parts["write"], parts["score"]
    if setting.scorers:  # responses are scored while others are still being written
        writing, scoring = max(writing, scoring), 0.0
    after = parts["exchange"] + scoring + train + parts["update"]
    ahead = setting.config.rollout.staleness > 0
    step = (max(writing, after) if ahead else writing + after) + parts["refit"] + parts["rest"]
    tokens = setting.responses * setting.written
    arithmetic = _PASSES * setting.positions * _forward(setting.student.shape, setting.prompt + setting.written)
    arithmetic += 6 * tokens * setting.student.shape.hidden * setting.student.shape.vocabulary
    peak = setting.processes * setting.cluster.gpu.bf16 * (train + parts["update"])
    return Times(parts, ahead, step, tokens / step, arithmetic / peak)


def _forward(shape: ModelShape, length: float) -> float:
    """Floating-point operations of all layers for one position of a sequence of this length, causal."""
    return 2 * shape.active + 2 * shape.layers * shape.query * length


def _products(setting: Setting, arithmetic: float, eight: float, efficiency: float) -> float:
    """Seconds of so many floating-point operations on one GPU, `eight` of them in FP8."""
    gpu, fp8 = setting.cluster.gpu, setting.cluster.assumptions.fp8_efficiency
    return (arithmetic - eight) / (gpu.bf16 * efficiency) + eight / (gpu.fp8 * efficiency * fp8)


def _exchange(setting: Setting, moved: Sequence[Flow]) -> float:
    """Messages, and texts: each process makes those that it verifies, and with peers in the teacher's prompt all."""
    if not setting.generates:
        return 0.0
    texts = setting.responses / setting.processes if setting.config.verify.name != "none" else 0.0
    if isinstance(setting.config.context, PeersContext):
        texts += setting.responses
    seconds = texts * setting.written / setting.cluster.assumptions.text_tokens
    return seconds + sum(flow.seconds for flow in moved if flow.part == "exchange")


def _train(setting: Setting, moved: Sequence[Flow]) -> tuple[float, float]:
    """(forward and backward, of which the loss). The slowest stage sets the pace; a pipeline fills and drains."""
    student, assumed = setting.student, setting.cluster.assumptions
    spread, rows = student.spread, setting.rows
    positions = setting.positions / spread.parts
    efficiency = assumed.expert_efficiency if student.shape.experts else assumed.train_efficiency
    passes = _PASSES + (setting.config.student.recompute == "full")
    arithmetic = passes * positions * _forward(student.shape, setting.prompt + setting.written)
    eight, ranks = passes * positions * 2 * student.fp8_passed, spread.tp * spread.pp
    stage = _products(setting, arithmetic / ranks, eight / ranks, efficiency)
    stage += sum(flow.seconds for flow in moved if flow.part == "train")
    loss = _loss(setting) + sum(flow.seconds for flow in moved if flow.part == "loss")
    filled = spread.filled(rows)
    return filled * (stage + loss), filled * loss


def _loss(setting: Setting) -> float:
    """Output layers of all of a replica's tokens, on its last stage."""
    student, gpu, assumed = setting.student, setting.cluster.gpu, setting.cluster.assumptions
    tokens = setting.responses / student.spread.parts * setting.written
    widths = 3 * student.shape.hidden
    widths += sum(model.shape.hidden for model, _ in setting.teachers()) if setting.whole_teacher else 0
    columns = student.shape.vocabulary / student.spread.tp
    products = 2 * tokens * columns * widths / (gpu.bf16 * assumed.loss_efficiency)
    return products + _TOUCHED * 4 * tokens * columns / (gpu.bandwidth * assumed.memory_bandwidth)


def _update(setting: Setting, moved: Sequence[Flow]) -> float:
    student, gpu, assumed = setting.student, setting.cluster.gpu, setting.cluster.assumptions
    spread = student.spread
    count = max((student.shape.stage(spread, stage) for stage in range(spread.pp)), key=lambda one: one.total)
    own = count.dense / spread.parts + count.expert / spread.expert_dp if setting.distributed else count.total
    seconds = own * _OPTIMIZER / (gpu.bandwidth * assumed.memory_bandwidth)
    return seconds + sum(flow.seconds for flow in moved if flow.part == "update")


def _score(setting: Setting, moved: Sequence[Flow]) -> float:
    seconds = sum(flow.seconds for flow in moved if flow.part == "score")
    seconds += sum(_teacher(setting, model) for model, _ in setting.teachers())
    for serving in setting.scorers:
        seconds += _forward_seconds(setting, serving.shape, serving.gpus, True, serving.passed())
    for key, teacher in setting.config.every_teacher().items():
        if teacher.engine == "hf":
            seconds += _forward_seconds(setting, setting.shapes[key], setting.processes, whole=True)
    return seconds


def _teacher(setting: Setting, model: Model) -> float:
    rows, pp = teacher_rows(setting, model), model.spread.pp
    filled = model.spread.filled(min(rows, _WINDOW * pp))
    whole = not setting.whole_teacher
    return filled * _forward_seconds(setting, model.shape, setting.processes, whole, model.fp8_passed)


def _forward_seconds(setting: Setting, shape: ModelShape, gpus: int, whole: bool, passed: float = 0.0) -> float:
    """Of a step's sequences through a teacher on so many GPUs; `whole`: with its output layer; `passed`: numbers in FP8
    that a token passes through."""
    assumed = setting.cluster.assumptions
    eight = 2 * teacher_positions(setting) * passed
    arithmetic = teacher_positions(setting) * _forward(shape, setting.prompt + setting.written + setting.read_more)
    if whole:
        arithmetic += 2 * setting.scored * setting.written * shape.hidden * shape.vocabulary
    efficiency = assumed.score_efficiency * (
        assumed.expert_efficiency / assumed.train_efficiency if shape.experts else 1
    )
    return _products(setting, arithmetic / gpus, eight / gpus, efficiency)


def _write(setting: Setting) -> float:
    """A server's slots are filled again as responses end; every step of a batch reads weights and caches once."""
    if not setting.generates:
        return 0.0
    writers, assumed = setting.writers, setting.cluster.assumptions
    shape = setting.shapes["student"]
    if writers is None:
        whole = Serving("generator", shape, setting.processes, 1, 2, 1.0, False, False)
        slots = min(setting.config.rollout.batch_size, math.ceil(setting.responses / whole.servers))
        return _decode(setting, whole, slots, assumed.hf_decode_seconds)
    memory = server_memory(setting, writers)
    waiting = math.ceil(setting.responses / writers.servers)
    mean = (setting.prompt + setting.written / 2) / setting.sequence
    slots = max(1, min(setting.config.rollout.batch_size, waiting, int(memory.sequences / mean)))
    return _decode(setting, writers, slots, assumed.decode_seconds)


def _decode(setting: Setting, writers: Serving, slots: int, overhead: float) -> float:
    gpu, assumed, shape = setting.cluster.gpu, setting.cluster.assumptions, writers.shape
    each = math.ceil(setting.responses / writers.servers)
    steps = each * setting.written / slots
    touched, eight = shape.active + shape.vocabulary * shape.hidden, writers.passed()
    if shape.experts:  # of a layer's experts those that some token of the batch goes to
        met = 1 - (1 - shape.experts_per_token / shape.experts) ** slots
        layer = shape.layer()
        touched = int(shape.layers * (layer.dense + met * layer.expert) + shape.vocabulary * shape.hidden)
        eight = writers.passed(met)
    cache = slots * (setting.prompt + setting.written / 2) * shape.cache_bytes(writers.width)
    read = ((touched - eight) * writers.width + eight + cache) / writers.tp / (gpu.bandwidth * assumed.decode_bandwidth)
    table = 2 * shape.vocabulary * shape.hidden
    tp, efficiency = writers.tp, assumed.prefill_efficiency
    computed = slots * (2 * shape.active + table) / tp
    computed = _products(setting, computed, 2 * slots * writers.passed() / tp, efficiency)
    calls = 2 * shape.layers * assumed.call_seconds if writers.tp > 1 else 0.0
    prompts = setting.config.train.prompts_per_step / writers.servers * setting.prompt
    prefill = prompts * _forward(shape, setting.prompt) / tp
    prefill = _products(setting, prefill, 2 * prompts * writers.passed() / tp, efficiency)
    return steps * (max(read, computed) + calls + overhead) + prefill

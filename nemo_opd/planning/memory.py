"""Memory of every distinct rank: what stays, and what each part of a step adds to it.

A step writes, scores and trains, one after the other; what one part needed is free again for the next. Where servers
write beside it, writing takes nothing here. The largest of the three decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nemo_opd.planning.activations import Kernels, passing
from nemo_opd.planning.gpus import GIB
from nemo_opd.planning.moments import Parts, activations, moments, one_layer, student_recomputes
from nemo_opd.planning.setting import Model, Serving, Setting

_FP32 = 4
_ADAM = 8
"""Bytes of Adam's two moments."""
_ROWS_OF_A_WINDOW = 8
"""Rows of a teacher's window for each of its pipeline stages, as in engines/megatron/scorer.py."""
_SCORED_CHUNK = 256
_KNOWN = 22
"""Bytes of a token of a response: id, version, log-probability, author, mask."""
_LOGITS_WHILE_DRAWING = 3
"""Copies of a batch's logits while the embedded generator draws: logits, filtered, noise."""


@dataclass(frozen=True)
class RankMemory:
    """One kind of rank: which stages of which models it holds, and its memory in bytes."""

    ranks: str
    """Example: ``0 to 7``."""
    stages: Mapping[str, int]
    """Pipeline stage of each model."""
    stays: Parts
    phases: Mapping[str, Parts]
    """What writing, scoring and training add."""
    activations: float
    """What training keeps of all micro-batches in flight."""
    recomputed: float
    """What that would be if layers were computed again in backward."""
    reserved: float = 0.0

    def total(self, phase: str) -> float:
        return self.reserved + sum(self.stays.values()) + sum(self.phases[phase].values())

    @property
    def peak(self) -> tuple[str, float]:
        """(phase, bytes) of the largest."""
        return max(((phase, self.total(phase)) for phase in self.phases), key=lambda pair: pair[1])


@dataclass(frozen=True)
class ServerMemory:
    """One GPU of a server."""

    key: str
    gpus: int
    colocated: bool
    weights: float
    cache: float
    """What its share of the GPU leaves for keys and values."""
    longest: float
    """Keys and values of the longest sequence."""
    asked: int
    """Sequences that it is given at a time, at most."""
    problems: tuple[str, ...] = field(default=())

    @property
    def sequences(self) -> int:
        """Of the longest kind, that fit."""
        return max(0, int(self.cache // self.longest))


def rank_memory(setting: Setting, kernels: Kernels = "te") -> list[RankMemory]:
    """Every distinct rank of the trainer."""
    models = {"student": setting.student} | {model.key: model for model, _ in setting.teachers()}
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(setting.processes):
        stages = tuple(rank // model.spread.stage_ranks for model in models.values())
        groups.setdefault(stages, []).append(rank)
    found = []
    for stages, ranks in groups.items():
        held = dict(zip(models, stages, strict=True))
        name = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        found.append(_rank(setting, name, held, kernels))
    return found


def _rank(setting: Setting, name: str, stages: Mapping[str, int], kernels: Kernels) -> RankMemory:
    assumed = setting.cluster.assumptions
    stage = stages["student"]
    training = _training(setting, stage, kernels)
    phases = {"writing": _writing(setting), "scoring": _scoring(setting, stages, kernels), "training": training}
    if _scores_while_writing(setting):
        phases["writing"] = {**phases["scoring"], **phases["writing"]}
    server = "awake server"
    loose = {phase: {k: v if k == server else v * assumed.slack for k, v in p.items()} for phase, p in phases.items()}
    writers = setting.writers
    asleep = assumed.asleep_gib * GIB if writers is not None and writers.colocated else 0.0
    for phase in ("scoring", "training"):
        loose[phase] |= {"sleeping server": asleep} if asleep else {}
    again = activations(setting, stage, kernels, recompute=True) + one_layer(setting, stage, kernels)
    kept = again if student_recomputes(setting) else activations(setting, stage, kernels, recompute=False)
    return RankMemory(
        ranks=name,
        stages=stages,
        stays=_stays(setting, stages),
        phases=loose,
        activations=kept * assumed.slack,
        recomputed=again * assumed.slack,
        reserved=assumed.reserved_gib * GIB,
    )


def _scores_while_writing(setting: Setting) -> bool:
    """With KAT in segments the teacher scores between two pieces of a response."""
    return getattr(setting.config.stop, "form", "after") == "segments"


def _stays(setting: Setting, stages: Mapping[str, int]) -> Parts:
    student = setting.student
    count = student.shape.stage(student.spread, stages["student"], setting.config.student.vocab_padding_multiple)
    per_dense, per_expert = _optimizer_bytes(setting)
    parts: Parts = {
        "student, weights": student.weights(stages["student"], setting.config.student.vocab_padding_multiple),
        **_fp8_copy(student, stages["student"], trained=True),
        "student, gradients": count.total * max(_FP32, student.width),
        "student, optimizer": count.dense * per_dense + count.expert * per_expert,
    }
    last = stages["student"] == student.spread.pp - 1
    for model, teacher in setting.teachers():
        if teacher.source == "external":
            parts[f"{model.key}, weights"] = model.weights(stages[model.key])
            parts |= _fp8_copy(model, stages[model.key], trained=False)
            if setting.whole_teacher and last and not model.key.endswith("base_model"):
                rows = student.shape.vocabulary_rows(student.spread.tp, setting.config.student.vocab_padding_multiple)
                parts[f"{model.key}, output layer"] = rows * model.shape.hidden * model.width
        elif teacher.source != "current":
            average = count.total * _FP32 if teacher.source == "ema" and student.width < _FP32 else 0
            parts[f"{model.key}, copy of the student"] = parts["student, weights"] + average
            parts |= _fp8_copy(model, stages["student"], trained=False)
    for what, shape, width in setting.whole_models():
        parts[what] = shape.parameters * width
    if getattr(setting.config.stop, "divergence", "") == "full":
        for key in ("student", *setting.config.every_teacher()):
            shape = setting.shapes[key]
            parts[f"{key}, whole output layer"] = shape.vocabulary * shape.hidden * student.width
    return parts


def _fp8_copy(model: Model, stage: int, trained: bool) -> Parts:
    """Of a model that scores along rows alone: it asks for no gradient."""
    copied = model.fp8_copy(stage, trained)
    return {f"{model.key}, weights in FP8 besides": copied} if copied else {}


def _optimizer_bytes(setting: Setting) -> tuple[float, float]:
    """For each parameter that all replicas share, and for each of an expert: master copy and moments."""
    student = setting.student
    each = _ADAM * max(1, student.width / _FP32) + (_FP32 if student.width < _FP32 else 0)
    if not setting.distributed:
        return each, each
    return each / student.spread.parts, each / student.spread.expert_dp


def _writing(setting: Setting) -> Parts:
    """Of two writers in a process the larger: the teacher's prefixes are there before the student goes on."""
    rollout, writers = setting.config.rollout, setting.writers
    if writers is not None and writers.colocated:
        return {"awake server": writers.share * setting.cluster.gpu.memory}
    largest: Parts = {}
    batch = min(rollout.batch_size, setting.responses)
    for what, shape, width in setting.whole_models():
        if what in ("generator", "teacher that writes"):
            parts = {
                f"{what}, keys and values": float(batch * setting.sequence * shape.cache_bytes(width)),
                f"{what}, logits": float(_LOGITS_WHILE_DRAWING * batch * shape.vocabulary * _FP32),
            }
            largest = max(largest, parts, key=lambda one: sum(one.values()))
    return largest


def _scoring(setting: Setting, stages: Mapping[str, int], kernels: Kernels) -> Parts:
    """The largest teacher's: they score one after the other. Answers are sent when the last row is through."""
    largest: Parts = {}
    for model, _ in setting.teachers():
        forward = {f"{model.key}, forward": model.held * passing(model.shape, model.spread, model.width, kernels)}
        found = [forward]
        if stages[model.key] == model.spread.pp - 1:
            answers = _answers(setting, model)
            found = [forward | answers]
            if setting.whole_teacher:
                found.append(answers | {f"{name}, as sent": size for name, size in answers.items()})
        largest = max([largest, *found], key=lambda one: sum(one.values()))
    return largest


def _answers(setting: Setting, model: Model) -> Parts:
    """What a teacher's last stage holds of its answers, until a window of rows is through."""
    if not setting.whole_teacher:
        rows = setting.student.shape.vocabulary_rows(model.spread.tp)
        return {f"{model.key}, logits of a chunk": _SCORED_CHUNK * rows * _FP32}
    window = _ROWS_OF_A_WINDOW * model.spread.pp
    responses = setting.scored / model.spread.dp * setting.response
    tokens = min(window * model.row, responses)
    return {f"{model.key}, hidden states of a window": tokens * model.shape.hidden * model.width}


def _training(setting: Setting, stage: int, kernels: Kernels) -> Parts:
    """What training adds at the worst of its moments."""
    return max(moments(setting, stage, kernels).values(), key=lambda parts: sum(parts.values()))


def server_memory(setting: Setting, serving: Serving) -> ServerMemory:
    """One GPU of these servers."""
    gpu, assumed = setting.cluster.gpu, setting.cluster.assumptions
    # experts and heads are cut alike; key-value heads that are fewer than GPUs are copied
    eight = serving.passed(share=1.0)
    weights = ((serving.shape.parameters - eight) * serving.width + eight) / serving.tp
    held = serving.shape.cache_bytes(serving.width) / min(serving.tp, serving.shape.groups)
    cache = serving.share * gpu.memory - weights - assumed.reserved_gib * GIB
    is_writer = serving.key == "rollout.servers"
    longest = held * (setting.sequence + (0 if is_writer else setting.read_more))
    problems = []
    if cache < longest:
        problems.append(
            f"{serving.key}: weights take {weights / GIB:.1f} GiB of the {serving.share * gpu.memory / GIB:.1f} GiB "
            f"that a server has of each GPU, and {max(0.0, cache) / GIB:.1f} GiB remain for keys and values of one "
            f"sequence of {longest / GIB:.2f} GiB"
        )
    asked = setting.config.rollout.batch_size if is_writer else 64
    return ServerMemory(serving.key, serving.gpus, serving.colocated, weights, cache, longest, asked, tuple(problems))


def host_memory(setting: Setting) -> float:
    """Bytes of a node's own memory: every process knows all responses of a step, and those that compute a loss keep
    the teacher's hidden states until they are trained on."""
    student = setting.student
    processes = min(setting.cluster.gpus_per_node, setting.processes)
    held = processes * setting.responses * setting.written * _KNOWN if setting.generates else 0.0
    if setting.whole_teacher:
        widths = [model.shape.hidden * model.width for model, _ in setting.teachers()]
        each = setting.responses / student.spread.dp * setting.written * sum(widths)
        held += each * min(processes, student.spread.stage_ranks)
    return held

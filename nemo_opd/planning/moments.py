"""The moments of a training step at which memory may be at its highest.

The last forward pass has made all activations; then the loss comes, the gradient of the output layer, the backward pass
of the first layer that goes, and when the activations are gone the gradient of the embedding and the update. What one
needs is free again for the next, so the largest decides. `local` follows what our CPU path does and is compared with
what torch allocates (`tests/unit/planning/test_peak.py`); `te` is the same with Transformer Engine's kernels.
"""

from __future__ import annotations

from nemo_opd.planning.activations import (
    Kernels,
    final_norm,
    layer_activations,
    layer_backward,
    layer_input,
    rotation_table,
)
from nemo_opd.planning.fp8 import Fp8
from nemo_opd.planning.setting import Model, Setting

Parts = dict[str, float]
"""Bytes by what they are for."""

_FP32 = 4
_RAISED_ROWS = 2 * 8192
"""Rows of an output layer in fp32 at a time, on the CPU: the next are made before the last are let go
(vocab/output.py)."""
_SCRATCH = 1 << 19
"""Numbers of a block that the CPU works on at a time (vocab/statistics.py)."""
_BLOCKS = 3
_GRADIENTS_OF_TIED = 2
"""Copies of a table's gradient where embedding and output layer are one: the second is added to the first."""
_TEMPORARIES_OF_ADAM = 2
"""Of torch's own Adam, of the size of a parameter; fused ones have none."""


def moments(setting: Setting, stage: int, kernels: Kernels) -> dict[str, Parts]:
    """What each adds to that which stays, on a rank of this pipeline stage of the student."""
    first, last = stage == 0, stage == setting.student.spread.pp - 1
    found = {"backward of a layer": _backward(setting, stage, kernels)}
    if last:
        found["loss"] = _loss(setting, stage, kernels)
        found["gradient of the output layer"] = _output_gradient(setting, stage, kernels)
    if first:
        found["gradient of the embedding"] = _embedding_gradient(setting, stage, kernels)
    if kernels == "local":
        found["update"] = {"temporaries of Adam": _TEMPORARIES_OF_ADAM * _largest_parameter(setting, stage)}
    return found


def activations(setting: Setting, stage: int, kernels: Kernels, recompute: bool, passes: int | None = None) -> float:
    """Bytes kept of all micro-batches in flight, or of `passes` of them through a chunk of layers; with `recompute` the
    layers' inputs alone. Between interleaved stages a chunk's output is kept too."""
    student = setting.student
    shape, spread, width = student.shape, student.spread, student.width
    if passes is None:
        passes = in_flight(setting, stage)
    if recompute:
        layers = shape.layers // spread.pp * layer_input(shape, spread, width)
    else:
        selective = setting.config.student.recompute == "selective"
        layers = sum(count * _kept_of(student, kernels, selective, fp8) for fp8, count in _kinds(student, stage))
    output = layer_input(shape, spread, width) if spread.vp > 1 else 0.0
    return passes * student.held * (layers / spread.vp + output + rotation_table(shape, width, kernels))


def _kinds(student: Model, stage: int) -> list[tuple[Fp8 | None, int]]:
    """Layers of a stage: those that are not in FP8, and those that are."""
    eight = student.fp8_layers(stage)
    found = [(None, student.shape.layers // student.spread.pp - eight), (student.fp8, eight)]
    return [(fp8, count) for fp8, count in found if count]


def _kept_of(student: Model, kernels: Kernels, selective: bool, fp8: Fp8 | None) -> float:
    """Bytes for each position that one layer keeps."""
    kept = layer_activations(student.shape, student.spread, student.width, kernels, selective, fp8)
    return sum(kept.values())


def in_flight(setting: Setting, stage: int) -> int:
    """Passes of micro-batches through a chunk of layers whose backward pass has not begun, at most.

    From Megatron's `get_pp_rank_microbatches`: one more than the forward passes before the first backward pass.
    """
    pp, vp = setting.student.spread.pp, setting.student.spread.vp
    first = pp - stage - 1 if vp == 1 else 2 * (pp - stage - 1) + (vp - 1) * pp
    return min(setting.rows * vp, first + 1)


def one_layer(setting: Setting, stage: int, kernels: Kernels) -> float:
    """What recomputation makes again of one layer of one micro-batch: what it keeps, and its output."""
    student = setting.student
    kept = max(_kept_of(student, kernels, False, fp8) for fp8, _ in _kinds(student, stage))
    return student.held * (kept + layer_input(student.shape, student.spread, student.width))


def _kept(setting: Setting, stage: int, kernels: Kernels) -> Parts:
    student = setting.student
    parts = {"activations": activations(setting, stage, kernels, student_recomputes(setting))}
    if stage > 0 or student.spread.vp > 1:  # the row that came, the next one, and the gradient that goes back
        parts["messages between stages"] = (
            3 * student.held * layer_input(student.shape, student.spread, student.width)
        )
    return parts


def student_recomputes(setting: Setting) -> bool:
    """Are whole layers computed again in backward?"""
    return setting.config.student.recompute == "full"


def _backward(setting: Setting, stage: int, kernels: Kernels) -> Parts:
    student = setting.student
    parts = _kept(setting, stage, kernels)
    if student_recomputes(setting):
        parts["a layer computed again"] = one_layer(setting, stage, kernels)
    parts["backward of a layer"] = layer_backward(
        student.shape, student.spread, student.width, student.held, kernels
    )
    if student.fp8_layers(stage):  # of gate and up, the widest
        gradients = 2 * student.shape.ffn / student.spread.tp * student.fp8.gradient
        parts["gradient of gate and up in FP8"] = student.held * gradients
    if student.shape.tied and student.spread.pp == 1:  # waits for that of the embedding
        parts["output layer's empty gradient"] = _table(setting)
    return parts


def _loss(setting: Setting, stage: int, kernels: Kernels) -> Parts:
    student = setting.student
    row = student.held
    hidden, width = student.shape.hidden, student.width
    parts = _kept(setting, stage, kernels)
    parts["final norm"] = row * final_norm(student.shape, student.spread, width, kernels)
    copies = 2 + (1 if student.spread.sequence_parallel else 0)  # of the tokens with their gradient, and the whole row
    parts["hidden states and their gradient"] = copies * row * hidden * width
    columns = student.shape.vocabulary_rows(student.spread.tp, setting.config.student.vocab_padding_multiple)
    buffers = 2 if student.spread.tp > 1 else 1
    teachers = [model.shape.hidden * model.width for model, _ in setting.teachers()]
    tokens = min(setting.config.train.loss_chunk_tokens, row)
    if setting.whole_teacher:
        rows = tokens if kernels == "local" else row + tokens  # on the device as a whole, and a copy of the chunk's
        parts["teacher's hidden states"] = rows * max(teachers, default=0)
        buffers += 1
    copy = width if kernels == "te" and width < _FP32 else 0  # the gradient as matrices want it
    parts["output-layer chunk"] = tokens * columns * (buffers * _FP32 + copy)
    if kernels == "local":
        parts["scratch of the loss"] = _BLOCKS * min(tokens * columns, _SCRATCH) * max(width, _FP32)
        if width < _FP32:
            widest = max([hidden, *(model.shape.hidden for model, _ in setting.teachers() if setting.whole_teacher)])
            parts["rows in fp32"] = (min(columns, _RAISED_ROWS) + tokens) * widest * _FP32
    return parts


def _output_gradient(setting: Setting, stage: int, kernels: Kernels) -> Parts:
    """Zeros, which Megatron's data parallelism asks for and lets go of at once."""
    student = setting.student
    row = student.held
    parts = _kept(setting, stage, kernels)
    parts["final norm"] = row * final_norm(student.shape, student.spread, student.width, kernels)
    parts["hidden states' gradient"] = 2 * row * student.shape.hidden * student.width
    parts["output layer's empty gradient"] = _table(setting)
    return parts


def _embedding_gradient(setting: Setting, stage: int, kernels: Kernels) -> Parts:
    """At the end of a row's backward pass; other rows may be in flight."""
    student = setting.student
    passes = in_flight(setting, stage) - 1
    others = activations(setting, stage, kernels, student_recomputes(setting), passes)
    copies = _GRADIENTS_OF_TIED if student.shape.tied and student.spread.pp == 1 else 1
    return {
        "activations": others,
        "gradient of the embedding's input": student.held
        * layer_input(student.shape, student.spread, student.width),
        "gradient of the embedding": copies * _table(setting),
    }


def _table(setting: Setting) -> float:
    """This rank's rows of embedding or output layer, in the student's dtype."""
    student = setting.student
    rows = student.shape.vocabulary_rows(student.spread.tp, setting.config.student.vocab_padding_multiple)
    return float(rows * student.shape.hidden * student.width)


def _largest_parameter(setting: Setting, stage: int) -> float:
    """Bytes of its master copy."""
    student = setting.student
    shape, tp = student.shape, student.spread.tp
    sizes = [shape.hidden * (shape.query + 2 * shape.key_value) // tp]
    sizes.append(2 * shape.hidden * (shape.expert_ffn if shape.experts else shape.ffn // tp))
    if stage in (0, student.spread.pp - 1):
        sizes.append(int(_table(setting)) // student.width)
    return float(max(sizes) * max(student.width, _FP32))

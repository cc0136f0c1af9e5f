"""The student under training: Megatron's model, schedules, data parallelism and optimizer behind `Trainer`.

One step: zero the gradient buffers; Megatron's forward-backward schedule over the replica's rows, with the loss on the
last pipeline stage (`fused_loss` on hidden states and the output layer's shard); reduce; clip; update.

Normalisation. Every loss component is divided by its own *global* token count before backward, so the gradients of
micro-batches and of data-parallel replicas are summed, never averaged: `calculate_per_token_loss` tells Megatron's
schedule and its data parallelism not to divide, and gradients are finalised without a divisor. Replicas may therefore
have different numbers of rows. Under context parallelism each of a replica's ranks adds what its parts of sequences
give (`context`), to the sums of the loss as to the gradients. Under expert parallelism replicas exchange tokens in
every layer, so those with fewer rows run empty ones with the others. Interleaved pipeline stages pass rows on in rounds
of as many as there are stages; empty rows fill the last one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed import finalize_model_grads as megatron_finalize_model_grads
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemo_opd.config import Config
from nemo_opd.engines.megatron import checkpoint, cpu
from nemo_opd.engines.megatron.average import WeightAverage
from nemo_opd.engines.megatron.context import Share, put_together
from nemo_opd.engines.megatron.families import Architecture
from nemo_opd.engines.megatron.gathering import ParameterGathering
from nemo_opd.engines.megatron.model import ModelChunks, build_model, dtype_of
from nemo_opd.engines.megatron.optimizer import build_optimizer, build_schedule, update, use_distributed
from nemo_opd.engines.megatron.parallel import Layout, init_distributed, remember, student_groups
from nemo_opd.engines.megatron.rows import ModelInputs
from nemo_opd.engines.megatron.shards import Copies
from nemo_opd.engines.megatron.weights import export_hf_weights, load_output_weight
from nemo_opd.engines.protocols import Accepts, NamedTensor, Place, Snapshot
from nemo_opd.packing import empty_row, with_payload
from nemo_opd.reliability import faults
from nemo_opd.types import PackedRow, TrainBatch, TrainStats
from nemo_opd.vocab.fused import fused_loss
from nemo_opd.vocab.output import OutputLayer
from nemo_opd.vocab.shard import VocabShard

if TYPE_CHECKING:
    from nemo_opd.losses import DistillationLoss, TokenWeight

TeacherOutput = str | Path | ModelChunks
"""Where a teacher's output layer comes from: a folder in Hugging Face format, or a model on the student's layout."""
Sums = Mapping[str, Tensor]
"""float64 [2] = (sum, count) of each loss component and metric."""


class MegatronTrainer:
    """`nemo_opd.engines.protocols.Trainer` on Megatron-core.

    Args:
        config: the recipe; `student`, `optimizer`, `train`, `teacher.dtype` and `run.seed` are read.
        loss: what is minimised at a token.
        weight: factor on each token; None for 1.
        total_steps: length of the learning-rate schedule.

    Raises:
        ConfigError: unsupported checkpoint, a layout that does not divide, an optimizer that could not be resumed.
    """

    place: Place

    def __init__(self, config: Config, loss: DistillationLoss, weight: TokenWeight | None, total_steps: int) -> None:
        init_distributed()
        distributed = use_distributed(config.optimizer)
        student = config.student
        dtype = dtype_of(student.dtype, "student.dtype")
        self.layout = Layout.of(student, "student")
        self.place = self.layout.place()
        self.groups = student_groups(self.layout, config.run.seed)
        self._config, self._loss, self._weight = config, loss, weight
        self._teacher_outputs: dict[int, OutputLayer] = {}
        self._average: WeightAverage | None = None
        self._read_between_steps = False
        self._names: tuple[str, ...] | None = None
        self._copies = Copies()
        self.model, self.architecture = self._build_model()
        with cpu.megatron_device():
            overlap, gather = config.optimizer.overlap_grad_reduce, config.optimizer.overlap_param_gather
            self._ddp = data_parallel(self.model, distributed, dtype, student.fp8.param_gather, overlap, gather)
            self._gathering = ParameterGathering(self._ddp)
            self.model.config.finalize_model_grads_func = self._finalize_model_grads
            self._optimizer = build_optimizer(config.optimizer, self._ddp, dtype, student.fp8)
            self._schedule = build_schedule(config.optimizer, self._optimizer, total_steps)

    @property
    def vocab_shard(self) -> VocabShard:
        """The rows of the output layer that this rank holds. On the loss ranks only."""
        return self.model.vocab_shard(self.architecture.vocab_size)

    def set_teacher_output(
        self, source: TeacherOutput | Sequence[TeacherOutput] | None, number: int = 0, dtype: str | None = None
    ) -> None:
        """Give the loss ranks a teacher's output layer, for losses that need its whole distribution.

        Of a model folder each reads its own slice, cut like the student's output layer, so that both distributions live
        on the same ids: rows of ids that only the teacher has are left out. Of a model that `self_teacher` gave it is
        the model's own, and follows it. Not collective.

        Args:
            source: a folder or a model; several for a mixture, whose layers are put side by side (copies); None takes
                all layers away.
            number: of the teacher, where there are several.
            dtype: of what is read from a folder; None: `teacher.dtype`.

        Raises ConfigError when the student has ids that the teacher has not.
        """
        if source is None:
            self._teacher_outputs.clear()
        elif self.place.computes_loss:
            parts = [source] if isinstance(source, TeacherOutput) else source
            weights = [self._output_weight(part, dtype or self._config.teacher.dtype) for part in parts]
            weight = weights[0] if len(weights) == 1 else torch.cat(weights, dim=1)
            self._teacher_outputs[number] = OutputLayer(weight, self.vocab_shard)

    def _output_weight(self, source: TeacherOutput, dtype: str) -> Tensor:
        """[local rows, teacher's hidden], cut like the student's output layer."""
        if isinstance(source, ModelChunks):
            return source.output_weight
        shard = self.vocab_shard
        weight = load_output_weight(
            source, shard.start, shard.length, shard.vocab_size, dtype_of(dtype, "teacher.dtype")
        )
        return weight.to(cpu.device())

    def self_teacher(self, source: str, decay: float) -> ModelChunks:
        """The student as its own teacher, on the student's layout. Collective; before `load`.

        Args:
            source: current (the student's model itself), frozen (a copy of the weights that it starts from) or ema (a
                copy that `train_step` moves, see `WeightAverage`, and that `save` and `load` keep).
        """
        assert source in ("current", "frozen", "ema") and (source != "ema" or self._average is None)
        if source == "current":
            self._read_between_steps = True
            return self.model
        copy, _ = self._build_model()
        if source == "ema":
            self._average = WeightAverage(copy, decay)
        return copy.requires_grad_(False).eval()

    def train_step(self, batch: TrainBatch, accepts: Accepts | None = None) -> TrainStats:
        """See `Trainer.train_step`. The schedule advances also when an update is skipped: it counts steps."""
        begin = time.perf_counter()
        sums, token_scores = self._accumulate(batch)
        means = self._global_means(sums)  # reads values back, so the device is done by here
        accumulated = time.perf_counter()
        self._schedule.step(1)
        losses = {name: value for name, value in means.items() if name in self._loss.components}
        total = sum(losses.values())
        grad_norm, skipped = update(self._optimizer, partial(accepts, total) if accepts else math.isfinite)
        self._gathering.start()
        if self._average is not None and not skipped:
            self._average.update(self._whole_model())
        if self._read_between_steps:
            self._whole_model()
        return TrainStats(
            losses=losses,
            metrics={name: value for name, value in means.items() if name not in self._loss.components},
            grad_norm=grad_norm,
            learning_rate=float(get_canonical_lr_for_logging(self._optimizer.param_groups) or 0.0),
            skipped=skipped,
            broken=self._broken(sums) if skipped else "",
            seconds={
                "own": self._reduced_at - begin,
                "forward_backward": accumulated - begin,
                "optimizer": time.perf_counter() - accumulated,
            },
            token_scores=token_scores,
        )

    def gradients(self, batch: TrainBatch) -> Iterator[NamedTensor]:
        """The gradient of a batch under Hugging Face names, whole on every rank, without an update. Collective.

        Not for the distributed optimizer, which leaves each replica with a part of the reduced gradient.
        """
        self._accumulate(batch)
        yield from export_hf_weights(self.model, self.architecture, tensor_of=_main_grad)

    def export_weights(self) -> Iterator[NamedTensor]:
        """See `Trainer.export_weights`. Tensors may share memory with the model."""
        return export_hf_weights(self._whole_model(), self.architecture)

    def snapshot(self, folder: Path, background: bool = False) -> Snapshot:
        """See `Trainer.snapshot`."""
        copies = self._copies if background else None
        return checkpoint.snapshot(folder, self._whole_model(), self._optimizer, self._schedule, self._average, copies)

    def load(self, folder: Path) -> None:
        """See `Trainer.load`."""
        checkpoint.load(folder, self._whole_model(), self._optimizer, self._schedule, self._average)

    def _whole_model(self) -> ModelChunks:
        """The model for whoever reads or writes its weights outside its own modules: all of them have arrived."""
        self._gathering.finish()
        return self.model

    def _broken(self, sums: Sums) -> str:
        """What of this rank's own sums or gradient is not finite; see `TrainStats.broken`."""
        if not all(bool(sums[name].isfinite().all()) for name in self._loss.components if name in sums):
            return "loss"
        return "" if bool(self._own_gradient.isfinite()) else "gradient"

    def _finalize_model_grads(self, model: list[Any], num_tokens: Tensor | None, **kwargs: Any) -> None:
        """Reduce over replicas, tensor ranks (norms) and tied embeddings; the token count is in the loss already.

        Before that the rank's own gradient is summed up, one pass over the buffers: a number that is not finite shows
        in the sum, and after the reduction nobody could tell whose it was. Nothing waits for it. With
        `optimizer.overlap_grad_reduce` the buffers are being reduced by now, and no rank is named.
        """
        self._reduced_at = time.perf_counter()
        buffers = [buffer.grad_data for buffer in gradient_buffers(self._ddp)]
        if (factor := faults.hit("train.gradient")) != 1.0:
            for buffer in buffers:
                buffer.mul_(factor)
        if self._config.optimizer.overlap_grad_reduce:
            self._own_gradient = torch.zeros(())
        else:
            self._own_gradient = torch.stack([buffer.sum() for buffer in buffers]).sum()
        megatron_finalize_model_grads(model, None, **kwargs)

    def _build_model(self) -> tuple[ModelChunks, Architecture]:
        student = self._config.student
        dtype, multiple = dtype_of(student.dtype, "student.dtype"), student.vocab_padding_multiple
        return build_model(student.model, student, self.layout, self.groups, dtype, "student", multiple)

    def _accumulate(self, batch: TrainBatch) -> tuple[dict[str, Tensor], list[Mapping[str, Tensor]]]:
        """Leave the batch's reduced gradient in the buffers; return the replica's sums and each row's token scores
        (none before the last stage)."""
        for chunk in self._ddp:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        rows = self._in_step(batch.rows)
        forward_backward = get_forward_backward_func()
        per_row: list[tuple[Sums, Mapping[str, Tensor]]] = forward_backward(
            forward_step_func=partial(self._forward_step, batch.normalisers),
            data_iterator=self.model.passes(map(self._with_inputs, rows)),
            model=self._ddp,
            num_microbatches=len(rows),
            seq_length=1,  # with variable_seq_lengths stages tell each other the shape
            micro_batch_size=1,
        )
        names = per_row[0][0] if per_row else ()
        sums = {name: torch.stack([row[name] for row, _ in per_row]).sum(0) for name in names}
        return sums, [token_scores for _, token_scores in per_row[: len(batch.rows)]]

    def _in_step(self, rows: tuple[PackedRow, ...]) -> tuple[PackedRow, ...]:
        """The replica's rows, and empty ones: up to the number of its longest neighbour where they share experts, up to
        whole rounds where stages are interleaved.

        One all-reduce over the data-parallel replicas, under expert parallelism only.
        """
        count = len(rows)
        if self.layout.ep > 1 and self.layout.dp > 1:
            most = torch.tensor([count], device=cpu.device())
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.groups.dp)
            count = int(most)
        return rows + (empty_row(),) * (self.layout.whole_rounds(count) - len(rows))

    def _with_inputs(self, row: PackedRow) -> tuple[PackedRow, ModelInputs]:
        return row, self.model.inputs(row.input_ids, row.cu_seqlens)

    def _forward_step(
        self,
        normalisers: Mapping[str, float],
        rows: Iterator[tuple[PackedRow, ModelInputs]],
        model: DistributedDataParallel,
    ) -> tuple[Tensor, Any]:
        """What Megatron's schedule asks for one micro-batch and chunk: its output and, for the last one, its loss."""
        row, inputs = next(rows)
        return model(inputs), partial(self._row_loss, row, inputs.share, normalisers)

    def _row_loss(
        self, row: PackedRow, share: Share, normalisers: Mapping[str, float], output: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Sums, Mapping[str, Tensor]]]:
        """(loss, token count that nobody divides by, (sums, token scores)), as `calculate_per_token_loss` wants it."""
        self._gathering.finish(self.model.output_weight)  # read below without a call of the layer
        teacher = self._teacher_outputs.get(row.teacher)
        weight = None if teacher is None else teacher.weight
        tokens, held = share.tokens(with_payload(row.tokens, self._loss.needs, weight))
        tokens = tokens.to(output.device)
        fused = fused_loss(
            self._loss,
            self.model.last_hidden(output).index_select(0, tokens.position),
            OutputLayer(self.model.output_weight, self.vocab_shard),
            teacher,
            tokens,
            normalisers,
            self._weight,
            self._config.train.loss_chunk_tokens,
            reduce_hidden=not self.model.config.sequence_parallel,  # otherwise `last_hidden` sums in backward
            sequence_group=self.model.context_group,
        )
        scores = self._of_the_row(fused.tokens, held, len(row.tokens))
        return fused.loss, torch.zeros((), dtype=torch.int, device=output.device), (fused.sums, scores)

    def _of_the_row(self, scores: Mapping[str, Tensor], held: Tensor, total: int) -> Mapping[str, Tensor]:
        """Token scores of the whole row from each context-parallel rank's: one all-reduce where there are any."""
        group = self.model.context_group
        if group is None or not scores:
            return scores
        whole = put_together(torch.stack([*scores.values()], dim=1), held, total, group)
        return dict(zip(scores, whole.unbind(1), strict=True))

    def _global_means(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Means over all replicas on every rank; a name without any token is left out (there is no mean of nothing).

        One all-reduce over the last stages (and over the ranks that share sequences), one broadcast down the pipeline.
        """
        names = self._sum_names(sums)
        if self.layout.is_last_stage:
            totals = torch.stack([sums[name] for name in names]).to(cpu.device())
            if self.layout.dp * self.layout.cp > 1:
                dist.all_reduce(totals, group=self.groups.dp_cp)
        else:
            totals = torch.zeros(len(names), 2, dtype=torch.float64, device=cpu.device())
        if self.layout.pp > 1:
            dist.broadcast(totals, group=self.groups.pp, group_src=self.layout.pp - 1)
        return {name: total / count for name, (total, count) in zip(names, totals.tolist(), strict=True) if count}

    def _sum_names(self, sums: Mapping[str, Tensor]) -> tuple[str, ...]:
        """The names that the loss reports, which only the last stage knows by itself. Communicated once per run."""
        if self._names is None:
            text = bytearray(json.dumps(sorted(sums)), "utf-8")
            size = torch.tensor([len(text)], device=cpu.device())
            if self.layout.pp > 1:
                last = self.layout.pp - 1
                dist.broadcast(size, group=self.groups.pp, group_src=last)
                letters = torch.zeros(int(size), dtype=torch.uint8, device=cpu.device())
                if self.layout.is_last_stage:
                    letters = torch.tensor(list(text), dtype=torch.uint8, device=cpu.device())
                dist.broadcast(letters, group=self.groups.pp, group_src=last)
                text = bytearray(letters.tolist())
            self._names = tuple(json.loads(text.decode()))
        assert not self.layout.is_last_stage or set(sums) == set(self._names), "a loss reports the same names always"
        return self._names


def data_parallel(
    model: ModelChunks,
    distributed: bool,
    dtype: torch.dtype,
    fp8_param_gather: bool = False,
    overlap: bool = False,
    gather: bool = False,
) -> list[DistributedDataParallel]:
    """Gradients in fp32 (float64 for a float64 model), of each chunk apart, summed over replicas once: at the end of a
    step or, with `overlap`, bucket by bucket while the last row's backward pass runs. With `gather` updated parameters
    are gathered by `ParameterGathering`."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=dtype != torch.float64,
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=overlap,
        overlap_param_gather=gather,
        align_param_gather=gather,  # modules begin no gathering, they wait
        fp8_param_gather=fp8_param_gather,
        check_for_nan_in_grad=False,  # it would abort; `optimizer.update` skips the step on all ranks instead
    )
    # One bucket for each chunk but the first, whose backward pass is the last: what of theirs is left is hidden by it.
    wrapped = [
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(model.chunks)
    ]
    for wrapper in wrapped:
        remember(wrapper)
    if overlap:
        no_sync = [wrapper.no_sync for wrapper in wrapped]
        model.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def gradient_buffers(wrapped: list[DistributedDataParallel]) -> list[Any]:
    """Where the gradients of a rank's chunks are summed up, those of experts too."""
    return [buffer for wrapper in wrapped for buffer in (*wrapper.buffers, *wrapper.expert_parallel_buffers)]


def _main_grad(parameter: torch.nn.Parameter) -> Tensor:
    """Where Megatron's data parallelism accumulates a parameter's gradient."""
    return parameter.main_grad  # type: ignore[attr-defined]

"""What `benchmarks.gpu` measures in one process: models with random weights, a batch, times, operations, memory.

Models are built as the engines build them, but nothing is read: a folder holds a config.json, and every matrix is drawn
where the model lives. Nothing here imports NeMo, transformers or datasets.
"""

from __future__ import annotations

import gc
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.bare_loss import BareDivergence
from nemo_opd.config import Config, DataConfig, LayoutConfig, ReverseKLLoss, RunConfig, TrainConfig
from nemo_opd.engines.megatron import cpu, fp8
from nemo_opd.engines.megatron.families import Architecture, read_architecture
from nemo_opd.engines.megatron.model import (
    ModelChunks,
    dtype_of,
    empty_model,
    have_transformer_engine,
    transformer_config,
)
from nemo_opd.engines.megatron.parallel import Layout, init_distributed, student_groups
from nemo_opd.engines.megatron.scorer import MegatronScorer
from nemo_opd.engines.megatron.trainer import MegatronTrainer
from nemo_opd.packing import pack
from nemo_opd.planning.catalogue import model_values
from nemo_opd.planning.gpus import GPUS, Assumptions, Cluster
from nemo_opd.planning.memory import rank_memory
from nemo_opd.planning.setting import Setting
from nemo_opd.planning.shapes import ModelShape
from nemo_opd.types import Author, Finish, Need, Prompt, Rollout, ScoreRequest, TeacherNeeds, TeacherScores, TrainBatch

LOSS = "reverse_kl"
NEEDS = {"hidden states": TeacherNeeds(Need.FULL), "written token": TeacherNeeds(Need.SAMPLED)}
TOY_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What is run: published models by name (a MoE too), and a step's responses."""

    student: str
    teacher: str
    prompt: int
    """Tokens of each prompt."""
    response: int
    """Tokens of each response, all of which are trained on."""
    responses: int
    row: int
    """Positions of a micro-batch, in student and teacher."""
    chunk: int
    """Tokens of the loss at a time."""
    warmup: int
    repeats: int
    toy: bool = False
    """Both models at `TOY_SIZES`."""

    @property
    def lengths(self) -> list[int]:
        """Positions of each sequence."""
        return [self.prompt + self.response - 1] * self.responses

    @property
    def trained(self) -> int:
        return self.responses * self.response

    def values(self, model: str) -> dict[str, Any]:
        """The config.json of one of the two."""
        return model_values("--student or --teacher", model)[0] | (TOY_SIZES if self.toy else {})

    def shape(self, model: str) -> ModelShape:
        return ModelShape.of("model", model, self.values(model), model)


def recipe(sizes: Sizes, folder: Path, fp8_recipe: str) -> Config:
    """The settings of student and teacher, with a folder for each that holds its config.json alone."""
    config = Config(run=RunConfig(dir=str(folder)), data=DataConfig(path="unused"), train=TrainConfig(steps=100))
    for name, part in (("student", config.student), ("teacher", config.teacher)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(sizes.values(getattr(sizes, name))))
        part.model, part.dtype, part.fp8.recipe = str(folder / name), "bfloat16", fp8_recipe
    config.teacher.micro_batch_tokens = config.train.micro_batch_tokens = sizes.row
    config.train.loss_chunk_tokens = sizes.chunk
    config.train.prompts_per_step, config.rollout.samples_per_prompt = sizes.responses, 1
    config.data.max_prompt_tokens, config.rollout.max_new_tokens = sizes.prompt, sizes.response
    config.rollout.engine, config.loss = "vllm", ReverseKLLoss()
    return config


def random_model(folder: str, config: LayoutConfig, key: str, seed: int) -> tuple[ModelChunks, Architecture]:
    """The model that `build_model` would make of the folder, with matrices drawn from N(0, 0.02^2) and norms of 1.

    Raises:
        ConfigError: FP8 that this machine has not.
    """
    fp8.require(config.fp8, key, have_transformer_engine())
    architecture, layout = read_architecture(folder), Layout(1, 1, 1, 0)
    groups = student_groups(layout, seed)
    with cpu.megatron_device():
        megatron = transformer_config(architecture, config, layout, dtype_of("bfloat16", key))
        model = empty_model(architecture, megatron, layout, groups)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.02)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model, architecture


class RandomTrainer(MegatronTrainer):
    """The trainer, its student's weights drawn instead of read."""

    def _build_model(self) -> tuple[ModelChunks, Architecture]:
        student = self._config.student
        return random_model(student.model, student, "student", self._config.run.seed)


def make_trainer(config: Config) -> MegatronTrainer:
    """The student with its optimizer; the loss is the divergence without NeMo's module around it."""
    loss: Any = BareDivergence(LOSS)
    return RandomTrainer(config, loss, None, config.train.steps)


def make_teacher(config: Config) -> tuple[MegatronScorer, ModelChunks]:
    """The scorer, and its model, from which the trainer takes the output layer."""
    init_distributed()
    teacher = config.teacher
    assert teacher.model is not None
    model, _ = random_model(teacher.model, teacher, "teacher", config.run.seed)
    model.requires_grad_(False).eval()
    seen = Config(run=config.run, data=config.data, train=config.train, teacher=teacher)
    seen.student.model = teacher.model  # a scorer that is given a model reads its sizes here
    return MegatronScorer(seen, model), model


def rollouts(sizes: Sizes) -> list[Rollout]:
    draws, vocabulary = torch.Generator().manual_seed(0), sizes.shape(sizes.student).vocabulary
    found = []
    for number in range(sizes.responses):
        prompt = torch.randint(0, vocabulary, (sizes.prompt,), generator=draws)
        count = sizes.response
        found.append(
            Rollout(
                prompt=Prompt(number, 0, (), tuple(prompt.tolist())),
                sample=0,
                response_ids=torch.randint(0, vocabulary, (count,), generator=draws),
                sampler_logprobs=torch.full((count,), -5.0),
                author=torch.full((count,), int(Author.STUDENT), dtype=torch.int8),
                policy_version=torch.zeros(count, dtype=torch.int64),
                loss_mask=torch.ones(count, dtype=torch.bool),
                finish=Finish.LENGTH,
            )
        )
    return found


def requests(written: Sequence[Rollout]) -> list[ScoreRequest]:
    return [ScoreRequest(n, one.prompt.token_ids, one.response_ids) for n, one in enumerate(written)]


def batch(sizes: Sizes, width: int) -> TrainBatch:
    """A step's rows; the teacher's hidden states, `width` wide, are drawn: their cost is that of real ones."""
    written, draws = rollouts(sizes), torch.Generator().manual_seed(1)
    shape = (sizes.response, width)
    scores = {
        key: TeacherScores(
            key, torch.ones(sizes.response, dtype=torch.bool), hidden=torch.randn(shape, generator=draws).bfloat16()
        )
        for key in range(len(written))
    }
    rows = pack(written, scores, range(len(written)), [0.0] * len(written), sizes.row)
    return TrainBatch(rows, {LOSS: float(sizes.trained)})


# --- time, operations, memory -----------------------------------------------------------------------------------------


def timed(run: Callable[[], object], sizes: Sizes) -> dict[str, float]:
    """Median and slowest seconds of the repeats after the warm-up; on CUDA between two events of the stream."""
    seconds = []
    for turn in range(sizes.warmup + sizes.repeats):
        if torch.cuda.is_available():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            found = start.elapsed_time(end) / 1000
        else:
            begin = time.perf_counter()
            run()
            found = time.perf_counter() - begin
        if turn >= sizes.warmup:
            seconds.append(found)
    return {"seconds": statistics.median(seconds), "slowest": max(seconds)}


def forward_operations(shape: ModelShape, lengths: Sequence[int]) -> float:
    """Of all layers: 2 for each parameter and position, and causal attention, 2 x layers x query width x length."""
    return float(sum(n * (2 * shape.active + 2 * shape.layers * shape.query * n) for n in lengths))


def train_operations(sizes: Sizes) -> float:
    """Model operations of a step: 3 forwards of the student's layers, 3 of its output layer and 1 of the teacher's
    (whose logits the loss reads) at each trained token. Nothing that is computed twice counts twice."""
    student, teacher = sizes.shape(sizes.student), sizes.shape(sizes.teacher)
    widths = 6 * student.hidden + 2 * teacher.hidden
    return 3 * forward_operations(student, sizes.lengths) + sizes.trained * student.vocabulary * widths


def score_operations(sizes: Sizes, needs: TeacherNeeds) -> float:
    """Of scoring a step's responses; with hidden states alone the output layer is not run."""
    teacher = sizes.shape(sizes.teacher)
    logits = 0 if needs.need is Need.FULL else 2 * sizes.trained * teacher.hidden * teacher.vocabulary
    return forward_operations(teacher, sizes.lengths) + logits


def peak_rate(name: str) -> float | None:
    """Dense bf16 operations per second of the GPU of this name; None where the data sheet of another form applies."""
    found = re.search(r"\b(h100|h200|b200)\b", name.lower())
    return None if found is None or re.search(r"pcie|nvl", name.lower()) else GPUS[found[1]].bf16


def gpu_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def rates(found: dict[str, float], operations: float, tokens: int) -> dict[str, Any]:
    """Tokens and operations per second, and the share of the bf16 peak where the GPU is known (FP8 too)."""
    rate, peak = operations / found["seconds"], peak_rate(gpu_name())
    share = {} if peak is None else {"mfu": rate / peak}
    return {**found, "tokens_per_second": tokens / found["seconds"], "tflops": rate / 1e12, **share}


def forget_peak() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, float]:
    """Bytes that tensors took at most since `forget_peak`; nothing without CUDA."""
    return {"peak": float(torch.cuda.max_memory_allocated())} if torch.cuda.is_available() else {}


def planned_memory(sizes: Sizes, config: Config) -> dict[str, float]:
    """Bytes of student, optimizer and teacher while scoring and while training, as `nemo-opd plan` counts them.

    Without its allowances for the context and for what the allocator cannot use: it is compared with what tensors took.
    """
    shapes = {"student": sizes.shape(sizes.student), "teacher": sizes.shape(sizes.teacher)}
    cluster = Cluster(GPUS["h100"], 1, 1, Assumptions(slack=1.0))
    kernels = "te" if have_transformer_engine() else "local"
    (rank,) = rank_memory(Setting(config, shapes, cluster, 1), kernels)
    stays = sum(rank.stays.values())
    return {phase: stays + sum(rank.phases[phase].values()) for phase in ("scoring", "training")}

"""What is planned: a recipe, the sizes of its models and the machine, and the counts that follow from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from nemo_opd.config import Config, DatasetPrefix, LayoutConfig, ServersConfig, TeacherConfig
from nemo_opd.configuration.cluster_rules import server_nodes
from nemo_opd.configuration.objective_rules import reads_whole_teacher
from nemo_opd.configuration.server_rules import addresses
from nemo_opd.planning.fp8 import Fp8
from nemo_opd.planning.gpus import Cluster
from nemo_opd.planning.shapes import ModelShape, Spread

WIDTH = {"bfloat16": 2, "float32": 4, "float64": 8}
"""Bytes of one number."""


@dataclass(frozen=True)
class Model:
    """A model of the recipe in the trainer's processes, trained or scoring, laid out by Megatron."""

    key: str
    """``student``, ``teacher``, ``teachers.NAME``, or one of these with ``.base_model``"""
    shape: ModelShape
    spread: Spread
    width: int
    """Bytes of one of its numbers."""
    row: int
    """Positions of its longest micro-batch."""
    fp8: Fp8

    @property
    def held(self) -> float:
        """Of these, what one of the ranks holds that share sequences."""
        return self.row / self.spread.cp

    def fp8_layers(self, stage: int) -> int:
        """Layers of this stage whose matrix products are in FP8."""
        return self.fp8.layers(self.shape.layers, self.spread.pp, stage, self.spread.vp)

    def fp8_numbers(self, stage: int) -> int:
        """Numbers of these layers' matrices on one rank."""
        return self.fp8_layers(stage) * self.shape.linear(self.spread.tp).dense

    def weights(self, stage: int, multiple: int = 1) -> float:
        """Bytes of one rank's parameters; with `param_gather` matrices of layers in FP8 are kept in it alone."""
        total = self.shape.stage(self.spread, stage, multiple).total
        eight = self.fp8_numbers(stage) if self.fp8.config.param_gather else 0
        return (total - eight) * self.width + eight * self.fp8.trained

    def fp8_copy(self, stage: int, trained: bool) -> float:
        """Bytes of the copy in FP8 of matrices that are kept in the model's dtype."""
        if self.fp8.config.param_gather:
            return 0.0
        return self.fp8_numbers(stage) * (self.fp8.trained if trained else self.fp8.weight)

    @property
    def fp8_passed(self) -> int:
        """Numbers in matrices in FP8 that a token passes through, were all stages like the one with the fewest."""
        pp, vp = self.spread.pp, self.spread.vp
        return pp * self.fp8.fewest(self.shape.layers, pp, vp) * self.shape.linear().dense


@dataclass(frozen=True)
class Serving:
    """vLLM servers of one kind."""

    key: str
    shape: ModelShape
    servers: int
    tp: int
    width: int
    share: float
    """Of a GPU's memory."""
    colocated: bool
    standing: bool
    """Are they there already, on nodes that no job of the run asks for?"""
    fp8: bool = False
    """Are the matrices of its layers scaled to FP8 as they are loaded?"""
    nodes: int = 0
    """Of the job, that run these servers alone; 0 where they stand, or are on the trainer's first node."""

    @property
    def gpus(self) -> int:
        return self.servers * self.tp

    @property
    def node_gpus(self) -> int:
        """That they use on each of the nodes which they have alone."""
        return self.gpus // self.nodes

    @property
    def beside(self) -> bool:
        """On the trainer's first node, on other GPUs than its processes?"""
        return not (self.colocated or self.standing or self.nodes)

    def passed(self, share: float | None = None) -> float:
        """Numbers in FP8 that a token passes through; with `share` of every layer's experts, not its own."""
        shape = self.shape
        if not self.fp8:
            return 0.0
        return shape.matrices(share if share is not None else shape.experts_per_token / max(1, shape.experts))


@dataclass(frozen=True)
class Setting:
    """A recipe on a machine. Nothing of it changes, so what follows from it is worked out once."""

    config: Config
    shapes: Mapping[str, ModelShape]
    """By the keys of `Model.key`."""
    cluster: Cluster
    processes: int
    """Of the trainer, one on each GPU."""

    # counts of a step

    @property
    def prompt(self) -> int:
        return self.config.data.max_prompt_tokens

    @property
    def response(self) -> int:
        """Tokens of the longest response."""
        return int(getattr(self.config.stop, "length", self.config.rollout.max_new_tokens))

    @cached_property
    def written(self) -> float:
        """Tokens of the mean response."""
        return self.response * self.cluster.assumptions.response_share

    @cached_property
    def sequence(self) -> int:
        """Positions of the longest prompt with the longest response."""
        return self.prompt + self.response - 1

    @property
    def read_more(self) -> int:
        """Tokens that the teacher reads besides, at most."""
        return int(getattr(self.config.context, "max_tokens", None) or 0)

    @cached_property
    def responses(self) -> int:
        return self.config.train.prompts_per_step * self.config.rollout.samples_per_prompt

    @property
    def scored(self) -> float:
        """Responses that one teacher scores: all, or its share of them where records name their teacher."""
        return self.responses / (len(self.config.teachers) if self.config.data.teacher_key is not None else 1)

    @cached_property
    def row(self) -> int:
        """Positions of the student's longest micro-batch."""
        return max(self.sequence, self.config.train.micro_batch_tokens) if self._packed else self.sequence

    @property
    def _packed(self) -> bool:
        return self.config.train.packing

    @cached_property
    def positions(self) -> float:
        """Of a step: prompts with mean responses."""
        return self.responses * (self.prompt + self.written)

    @cached_property
    def rows(self) -> int:
        """Micro-batches of a replica of the student."""
        mean = self.positions / self.responses
        held = max(1, int(self.row // mean)) if self._packed else 1
        return max(1, math.ceil(self.responses / self.student.spread.dp / held))

    @property
    def generates(self) -> bool:
        return not isinstance(self.config.prefix, DatasetPrefix)

    @property
    def whole_teacher(self) -> bool:
        """Does the loss read the teacher's distribution over the whole vocabulary?"""
        return self.config.loss.needs_teacher and reads_whole_teacher(self.config.loss)

    @property
    def distributed(self) -> bool:
        """Is the optimizer spread over replicas? Where nothing is said it is, as Transformer Engine is on every GPU."""
        return self.config.optimizer.distributed is not False

    # models

    @cached_property
    def student(self) -> Model:
        student = self.config.student
        spread, width = self._spread(student), WIDTH[student.dtype]
        return Model("student", self.shapes["student"], spread, width, self.row, self._fp8(student))

    def teachers(self) -> Sequence[tuple[Model, TeacherConfig]]:
        """Teachers in the trainer's processes with a layout, and their bases; a self teacher has the student's."""
        return self._teachers

    @cached_property
    def _teachers(self) -> tuple[tuple[Model, TeacherConfig], ...]:
        return tuple(self._found_teachers())

    def _found_teachers(self) -> Iterator[tuple[Model, TeacherConfig]]:
        for key, teacher in self.config.every_teacher().items():
            if teacher.engine != "megatron":
                continue
            row = max(self.sequence + self.read_more, teacher.micro_batch_tokens)
            if teacher.source != "external":
                student = self.student
                yield Model(key, student.shape, student.spread, student.width, row, student.fp8), teacher
                continue
            spread, width, fp8 = self._spread(teacher), WIDTH[teacher.dtype], self._fp8(teacher)
            for name in (key, f"{key}.base_model"):
                if name in self.shapes:
                    yield Model(name, self.shapes[name], spread, width, row, fp8), teacher

    def whole_models(self) -> Iterator[tuple[str, ModelShape, int]]:
        """(what, shape, bytes of a number) of models that every process holds whole."""
        rollout, student = self.config.rollout, self.shapes["student"]
        if self.generates and rollout.engine == "hf":
            yield "generator", student, WIDTH[rollout.dtype]
        if self.config.prefix.name in ("teacher", "teacher_mixed"):
            yield "teacher that writes", self.shapes["teacher"], WIDTH[self.config.teacher.dtype]
        for key, teacher in self.config.every_teacher().items():
            if teacher.engine == "hf":
                yield f"{key}, whole", self.shapes[key], WIDTH[teacher.dtype]

    @cached_property
    def writers(self) -> Serving | None:
        """vLLM servers that write."""
        rollout = self.config.rollout
        if not self.generates or rollout.engine != "vllm":
            return None
        return self._serving("rollout.servers", self.shapes["student"], rollout.servers, WIDTH[rollout.dtype])

    @cached_property
    def scorers(self) -> list[Serving]:
        """vLLM servers that score."""
        return [
            self._serving(f"{key}.servers", self.shapes[key], teacher.servers, WIDTH[teacher.dtype])
            for key, teacher in self.config.every_teacher().items()
            if teacher.engine == "vllm"
        ]

    @cached_property
    def servings(self) -> list[Serving]:
        writers = self.writers
        return [*([writers] if writers else []), *self.scorers]

    @property
    def gpus(self) -> int:
        """All that the run uses."""
        return self.processes + sum(one.gpus for one in self.servings if not one.colocated)

    @property
    def beside(self) -> int:
        """GPUs of servers beside the trainer's processes on its first node."""
        return sum(one.gpus for one in self.servings if one.beside)

    @cached_property
    def job_nodes(self) -> dict[str, int]:
        """Nodes of the job by role, as `slurm/opd.sh` deals them out; roles without any are left out."""
        trainer = math.ceil((self.processes + self.beside) / self.cluster.gpus_per_node)
        cluster = self.config.cluster
        roles = {"trainer": trainer, "rollout": cluster.rollout_nodes, "teacher": cluster.teacher_nodes}
        return {role: count for role, count in roles.items() if count}

    @property
    def nodes(self) -> int:
        """All that the run uses: the job's, and those of servers that stand already."""
        each = self.cluster.gpus_per_node
        standing = sum(math.ceil(one.gpus / each) for one in self.servings if one.standing)
        return sum(self.job_nodes.values()) + standing

    def _serving(self, key: str, shape: ModelShape, servers: ServersConfig, width: int) -> Serving:
        nodes = server_nodes(self.config).get(key.removesuffix(".servers"), 0)
        urls = None if nodes else servers.urls
        return Serving(
            key=key,
            shape=shape,
            servers=servers.count * max(1, nodes) if urls is None else len(addresses(urls)),
            tp=servers.tensor_parallel_size,
            width=width,
            share=servers.memory_share,
            colocated=key == "rollout.servers" and servers.placement == "colocated",
            standing=urls is not None,
            fp8=servers.quantization == "fp8",
            nodes=nodes,
        )

    def _fp8(self, layout: LayoutConfig) -> Fp8:
        return Fp8(layout.fp8, self.cluster.gpu)

    def _spread(self, layout: LayoutConfig) -> Spread:
        tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
        cp, ep = layout.context_parallel_size, layout.expert_model_parallel_size
        sequence_parallel = layout.sequence_parallel and tp > 1
        return Spread(tp, pp, self.processes // (tp * cp * pp), ep, sequence_parallel, cp, layout.chunks)

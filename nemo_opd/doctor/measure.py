"""Builds trainer, generator and teacher as a run does, in its layout, and compares them on the same sequences."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from nemo_opd.assemble import build_external_scorer, build_generator, build_scorer, decoder, uses_writers
from nemo_opd.config import Config, ServersConfig, TeacherConfig
from nemo_opd.configuration.model_files import SUPPORTED_ARCHITECTURES, read_model_sizes
from nemo_opd.doctor.bounds import Bounds, bounds_for
from nemo_opd.doctor.compare import difference, same_weights
from nemo_opd.doctor.disk import model_bytes
from nemo_opd.doctor.finding import Finding, Verdict
from nemo_opd.doctor.options import SMALL_BYTES, Options
from nemo_opd.doctor.probe import (
    Probe,
    generator_findings,
    reference_findings,
    sampling_findings,
    teacher_findings,
)
from nemo_opd.doctor.ranks import rank_findings
from nemo_opd.engines.megatron import cpu
from nemo_opd.engines.megatron.model import DTYPES
from nemo_opd.engines.megatron.parallel import init_distributed
from nemo_opd.engines.megatron.scorer import MegatronScorer
from nemo_opd.engines.megatron.trainer import MegatronTrainer
from nemo_opd.engines.protocols import Generator, Resting, Scorer
from nemo_opd.engines.vllm.run_servers import RunServers, teacher_servers, writer_servers
from nemo_opd.losses import build_loss, build_weight, for_prefix, with_reward
from nemo_opd.processes import Processes
from nemo_opd.prompts.stream import PromptStream
from nemo_opd.prompts.template import Tokenizer, eos_token_ids, load_tokenizer, response_token_ids
from nemo_opd.refit.transfer import refit
from nemo_opd.rollout.source import DatasetSource
from nemo_opd.types import Rollout, Sampling

log = logging.getLogger(__name__)

Report = Callable[[Sequence[Finding]], None]


def measure(config: Config, options: Options, report: Report) -> None:
    """Give `report` findings as they come; they are the first process's. Collective.

    Raises what building the models raises.
    """
    init_distributed()
    processes = Processes.current()
    report(rank_findings(processes, DTYPES[config.student.dtype], cpu.device()))
    tokenizer = load_tokenizer(config.student.model)
    prompts = PromptStream(config.data, tokenizer, config.run.seed, config.prefix.reads_responses)
    probe = Probe(processes, prompts.take(options.prompts), config.run.seed, decoder(tokenizer))
    bench = Bench(config, options, processes, tokenizer, probe)
    try:
        bench.build()
        if processes.is_first:
            report([Finding("models: built and refitted", Verdict.OK, f"{processes.size} process(es)")])
        rollouts = bench.rollouts()
        report(bench.generator_rows(rollouts))
        report(bench.teacher_rows(rollouts))
        bench.close_teacher()  # its servers hold memory that those of the next check want
        report(bench.student_as_teacher_rows(rollouts))
    finally:
        bench.close()


@dataclass
class Bench:
    """The models of a run, and what is measured of them."""

    config: Config
    options: Options
    processes: Processes
    tokenizer: Tokenizer
    probe: Probe
    generator: Generator | None = None
    scorer: Scorer | None = None
    trainer: Scorer | None = None
    """The student under training, asked for log-probabilities: its own model in its own layout."""

    def build(self) -> None:
        """As `nemo_opd.assemble` does, up to the first refit."""
        config, processes = self.config, self.processes
        writers = writer_servers(config, processes) if uses_writers(config) else None
        served: dict[str, RunServers] = {
            key: teacher_servers(config, key, processes)
            for key, teacher in config.every_teacher().items()
            if teacher.engine == "vllm"
        }
        loss = for_prefix(with_reward(build_loss(config.loss), config.reward), config.prefix)
        log.info("building the student")
        trainer = MegatronTrainer(config, loss, build_weight(config.weight), config.train.steps)
        self.trainer = MegatronScorer(config, trainer.self_teacher("current", 0.0))
        log.info("building the teacher")
        self.scorer = build_scorer(config, trainer, self.tokenizer, loss.needs.need, served)
        log.info("building the generator")
        self.generator = build_generator(config, self.tokenizer, writers)
        if self.generator is not None:
            refit(trainer, self.generator, 0, processes)

    def rollouts(self) -> list[Rollout]:
        """The sequences that all are asked about: the student's at temperature 1, or the data set's."""
        if self.generator is not None:
            log.info("writing %d responses", len(self.probe.prompts))
            return self.probe.written(self.generator, Sampling(self.tokens))
        ends = eos_token_ids(self.config.student.model, self.tokenizer)
        source = DatasetSource(lambda text: response_token_ids(self.tokenizer, text, ends[0]), self.tokens)
        return list(source.rollouts(self.probe.prompts, 0, lambda: False))

    @property
    def tokens(self) -> int:
        return min(self.options.tokens, self.config.rollout.max_new_tokens)

    def generator_rows(self, rollouts: Sequence[Rollout]) -> list[Finding]:
        config, generator = self.config, self.generator
        assert self.trainer is not None
        if generator is None:
            return [Finding("generator", Verdict.SKIPPED, "the data set writes the responses")]
        log.info("comparing trainer and generator")
        bounds = self._bounds(config.student.dtype, config.rollout.dtype)
        rows = generator_findings(self.probe, self.trainer, generator, rollouts, self.tokens, bounds)
        rollout = config.rollout
        if (rollout.temperature, rollout.top_p, rollout.top_k) != (1.0, 1.0, 0):
            sampling = Sampling(self.tokens, rollout.temperature, rollout.top_p, rollout.top_k)
            slots = (config.loss, config.weight, config.reward)
            corrected = any(slot.needs_sampler_logprobs for slot in slots)
            rows += sampling_findings(self.probe, self.trainer, generator, sampling, corrected)
        self.processes.barrier()
        if isinstance(generator, Resting):
            generator.rest()
        return rows

    def teacher_rows(self, rollouts: Sequence[Rollout]) -> list[Finding]:
        """Each teacher asked twice, and against a second engine; a mixture is one teacher."""
        teachers = self.config.every_teacher()
        if self.scorer is None:
            return [Finding("teacher", Verdict.SKIPPED, "the loss asks none")]
        log.info("asking the teacher")
        if len(teachers) > 1 and self.config.data.teacher_key is None:
            return self._asked("teachers", self.scorer, 0, rollouts, [one.dtype for one in teachers.values()])[1]
        rows = []
        for number, (key, teacher) in enumerate(teachers.items()):
            scores, found = self._asked(key, self.scorer, number, rollouts, [teacher.dtype])
            rows += found
            rows += self._self_teacher(key, scores, rollouts) if teacher.source != "external" else []
            rows += self._reference(key, teacher, scores, rollouts) if teacher.source == "external" else []
        return rows

    def _asked(
        self, key: str, scorer: Scorer, number: int, rollouts: Sequence[Rollout], dtypes: Sequence[str]
    ) -> tuple[list[Tensor], list[Finding]]:
        first = self.probe.logprobs(scorer, rollouts, number)
        second = self.probe.logprobs(scorer, rollouts, number, backwards=True)
        rows = teacher_findings(key, first, second, self._bounds(*dtypes)) if self.processes.is_first else []
        return first, rows

    def _reference(
        self, key: str, teacher: TeacherConfig, scores: Sequence[Tensor], rollouts: Sequence[Rollout]
    ) -> list[Finding]:
        """The same folder on another engine: Megatron for servers and `hf`, `hf` for Megatron."""
        engine = "hf" if teacher.engine == "megatron" else "megatron"
        name, folder = f"{key} against {engine}", Path(str(teacher.model))
        if reason := self._no_second_copy(folder):
            return [Finding(name, Verdict.SKIPPED, reason)]
        log.info("scoring with %s as a reference", engine)
        reference = self._scorer(replace(teacher, engine=engine, servers=ServersConfig()), key)
        theirs = self.probe.logprobs(reference, rollouts)
        reference.close()
        if not self.processes.is_first:
            return []
        way_out = f"two engines disagree about {folder}: compare rope settings, dtype and tied weights"
        return reference_findings(name, scores, theirs, self._bounds(teacher.dtype), way_out)

    def _self_teacher(self, key: str, scores: Sequence[Tensor], rollouts: Sequence[Rollout]) -> list[Finding]:
        assert self.trainer is not None
        ours = self.probe.logprobs(self.trainer, rollouts)
        way_out = "a teacher that is the student gives another KL than 0: its scores are not the trainer's"
        return self._same(f"{key} is the student", scores, ours, self.config.student.dtype, way_out)

    def student_as_teacher_rows(self, rollouts: Sequence[Rollout]) -> list[Finding]:
        """The student's folder put in the teacher's place, engine and dtype: the KL must be 0."""
        rows: list[Finding] = []
        external = {k: t for k, t in self.config.every_teacher().items() if t.source == "external"}
        if self.scorer is None or not external:
            return rows
        key, teacher = next(iter(external.items()))
        name, folder = f"student as {key} ({teacher.engine})", Path(self.config.student.model)
        if teacher.servers.urls is not None:
            return [Finding(name, Verdict.SKIPPED, "servers that stand already serve one model")]
        if reason := self._no_second_copy(folder):
            return [Finding(name, Verdict.SKIPPED, reason)]
        log.info("putting the student in the teacher's place")
        assert self.trainer is not None
        ours = self.probe.logprobs(self.trainer, rollouts)
        path = self._scorer(replace(teacher, model=str(folder), base_model=None), key)
        theirs = self.probe.logprobs(path, rollouts)
        path.close()
        way_out = "the teacher's path gives other numbers than training does for the same weights: no KL can be trusted"
        return self._same(name, theirs, ours, teacher.dtype, way_out)

    def _same(
        self, name: str, scores: Sequence[Tensor], ours: Sequence[Tensor], dtype: str, way_out: str
    ) -> list[Finding]:
        if not self.processes.is_first:
            return []
        bounds = self._bounds(dtype, self.config.student.dtype)
        return same_weights(name, difference(scores, ours), bounds, way_out, ("tokens", "mean", "largest", "kl"))

    def _scorer(self, teacher: TeacherConfig, key: str) -> Scorer:
        return build_external_scorer(replace(self.config, teacher=teacher, teachers={}), self.tokenizer, f"{key}.model")

    def _no_second_copy(self, folder: Path) -> str:
        """Why this model is not loaded once more; nothing where it is."""
        size = model_bytes(folder)
        if self.options.reference == "never":
            return "--reference never"
        if self.options.reference == "auto" and size > SMALL_BYTES:
            return f"{size / (1 << 30):.1f} GiB are not loaded twice; --reference always"
        if not size:
            return "no weights in its folder here"
        architecture = read_model_sizes("model", folder, convertible=False).architecture
        return "" if architecture in SUPPORTED_ARCHITECTURES else f"{architecture} is on one engine only"

    def _bounds(self, *dtypes: str) -> Bounds:
        return bounds_for(dtypes, self.options.bounds)

    def close_teacher(self) -> None:
        if self.scorer is not None:
            self.scorer.close()

    def close(self) -> None:
        """End what is there. Idempotent."""
        for part in (self.generator, self.scorer, self.trainer):
            if part is not None:
                part.close()

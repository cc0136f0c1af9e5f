"""Builds the parts of a run from its configuration: the one place that knows which engine stands behind a protocol."""

from __future__ import annotations

import functools
import logging
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from nemo_opd.checkpoint.store import CheckpointStore, RunState, Stateful, restore
from nemo_opd.config import (
    EXPORT_FOLDER,
    Config,
    DatasetPrefix,
    MixedPrefix,
    TeacherMixedPrefix,
    TeacherPrefix,
    TrapStop,
)
from nemo_opd.configuration.load import recorded_yaml
from nemo_opd.diagnosis.diagnosis import Diagnosis
from nemo_opd.engines.hf.generator import HFGenerator
from nemo_opd.engines.hf.mixed import TeacherMixedGenerator
from nemo_opd.engines.hf.scorer import HFScorer
from nemo_opd.engines.megatron.families import read_architecture
from nemo_opd.engines.megatron.model import dtype_of
from nemo_opd.engines.megatron.scorer import MegatronScorer
from nemo_opd.engines.megatron.trainer import MegatronTrainer, TeacherOutput
from nemo_opd.engines.megatron.weights import load_output_weight, save_hf_checkpoint
from nemo_opd.engines.protocols import EarlyScorer, Generator, Scorer
from nemo_opd.engines.vllm.generator import VLLMGenerator
from nemo_opd.engines.vllm.run_servers import RunServers, teacher_servers, writer_servers
from nemo_opd.engines.vllm.scorer import VLLMScorer
from nemo_opd.errors import ConfigError
from nemo_opd.evaluate.run import Evaluation
from nemo_opd.loop import Run, oldest
from nemo_opd.losses import build_loss, build_weight, for_prefix, with_reward
from nemo_opd.observe.recorder import Recorder
from nemo_opd.processes import Processes
from nemo_opd.prompts.stream import PromptStream, first_prompts
from nemo_opd.prompts.template import (
    Tokenizer,
    differing_tokens,
    eos_token_ids,
    load_tokenizer,
    response_token_ids,
)
from nemo_opd.reliability.files import replace_private
from nemo_opd.reliability.guard import Guard
from nemo_opd.reliability.heartbeat import Sections, Silent
from nemo_opd.reliability.stop import StopRequest
from nemo_opd.reliability.straggler import Stragglers
from nemo_opd.resume import begun_before
from nemo_opd.rollout.advantages import redraws_of
from nemo_opd.rollout.ahead import RolloutsAhead
from nemo_opd.rollout.kept import FILE as ROLLOUTS_FILE
from nemo_opd.rollout.kept import KeptRollouts
from nemo_opd.rollout.prefix import MixedSource, PrefixSchedule, TeacherPrefixSource
from nemo_opd.rollout.source import DatasetSource, RolloutSource, StudentSource
from nemo_opd.stop.base import NoStop, StopRule
from nemo_opd.stop.build import build_stop
from nemo_opd.stop.divergence import FullDivergence, Measure, TailDivergence
from nemo_opd.teacher.base import WithBase
from nemo_opd.teacher.build import build_context
from nemo_opd.teacher.contexts import Reads, TeacherContext
from nemo_opd.teacher.early import EarlyScores
from nemo_opd.teacher.fidelity import FidelityGate
from nemo_opd.teacher.several import MixedScorer, RoutedContext, RoutedScorer, Routing
from nemo_opd.types import Need, Sampling, TeacherNeeds
from nemo_opd.verify.build import build_verifier

log = logging.getLogger(__name__)


def assemble(config: Config, processes: Processes, stop: StopRequest, heartbeat: Sections | None = None) -> Run:
    """Everything a run needs, resumed from the newest checkpoint of its folder when there is one. Collective."""
    heartbeat = heartbeat or Silent()
    folder = Path(config.run.dir)
    store = build_store(config, processes, stop)
    newest, inputs = begun_before(config, store, processes)
    writers = writer_servers(config, processes) if uses_writers(config) else None
    served = serving_teachers(config, processes)
    tokenizer = load_tokenizer(config.student.model)
    loss = for_prefix(with_reward(build_loss(config.loss), config.reward), config.prefix)
    config_text = recorded_yaml(config)
    trainer = MegatronTrainer(config, loss, build_weight(config.weight), config.train.steps)
    scorer = build_scorer(config, trainer, tokenizer, loss.needs.need, served)
    generator = build_generator(config, tokenizer, writers)
    prompts = PromptStream(config.data, tokenizer, config.run.seed, config.prefix.reads_responses)
    with heartbeat.section("load"):
        state = replace(store.load(newest, trainer) if newest else RunState(), inputs=inputs)
    if newest:
        prompts.seek(state.prompts)
        log.info("resuming from %s", newest)
    state.prompts = prompts.state()
    decode = decoder(tokenizer)
    earlier = KeptRollouts(newest / ROLLOUTS_FILE if newest else None, oldest(config.rollout), decode)
    key = config.data.teacher_key
    routing = None if key is None else Routing(key, list(config.teachers))
    context = build_teacher_context(config, routing)
    stop_rule = build_stop_rule(config, processes, context, generator, scorer)
    stateful: dict[str, Stateful] = {} if isinstance(stop_rule, NoStop) else {f"stop {config.stop.name}": stop_rule}
    restore(stateful, state)
    if processes.is_first:
        replace_private(folder / "config.yaml", config_text)
    return Run(
        config=config,
        config_text=config_text,
        folder=folder,
        processes=processes,
        ahead=build_ahead(config, prompts, processes, stop, earlier),
        decode=decode,
        source=build_source(config, tokenizer, generator, stop_rule),
        verifier=build_verifier(config.verify),
        context=context,
        stop_rule=stop_rule,
        routing=routing,
        scorer=scorer,
        early=build_early(config, scorer, loss.needs, context, routing, stop_rule),
        loss=loss,
        trainer=trainer,
        generator=generator,
        evaluation=build_evaluation(config, tokenizer),
        diagnosis=Diagnosis(config.diagnose, state.diagnosis),
        guard=Guard(config.guard, state.guard, processes),
        stragglers=Stragglers(config.straggler, processes),
        store=store,
        stop=stop,
        recorder=build_recorder(config, state, tokenizer) if processes.is_first else None,
        state=state,
        started_at=state.step,
        heartbeat=heartbeat,
        stateful=stateful,
    )


def build_store(config: Config, processes: Processes, stop: StopRequest) -> CheckpointStore:
    """The run's checkpoints; the time that a save takes is kept from the time that is left. Collective."""
    layout = {
        name: getattr(config.student, name)
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    }
    saved = functools.partial(stop.budget.saved, keep=processes.is_first)
    return CheckpointStore(Path(config.run.dir), processes, config.checkpoint.keep, layout, saved)


def finish(run: Run, done: bool) -> None:
    """Close everything; after the last step, write the student in Hugging Face format first. Collective."""
    if done and run.config.checkpoint.export_at_end:
        with run.heartbeat.section("export"):
            export_student(run)
    grader = run.evaluation.verifier if run.evaluation else None
    for part in (run.generator, run.scorer, run.verifier, grader, run.recorder):
        if part is not None:
            part.close()


def export_student(run: Run) -> None:
    """Write `<run>/model`. What stands there is of fewer steps (the run went on), unless this attempt trained none.

    It is written aside and then put in place, so that an export that fails costs no model.
    """
    folder = run.folder / EXPORT_FOLDER
    if run.processes.any(folder.exists()) and run.started_at == run.state.step:
        return
    aside = run.folder / run.processes.broadcast_text(f"tmp-{EXPORT_FOLDER}-{secrets.token_hex(4)}")
    save_hf_checkpoint(run.trainer.export_weights(), aside, Path(run.config.student.model))
    run.processes.barrier()
    if run.processes.is_first:
        for leftover in run.folder.glob(f"tmp-{EXPORT_FOLDER}-*"):
            if leftover != aside:
                shutil.rmtree(leftover)
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    run.processes.barrier()
    log.info("exported the student to %s", folder)


def uses_writers(config: Config) -> bool:
    """Do vLLM servers write, whatever is written: rollouts or the answers of an evaluation?"""
    generates = config.prefix.name != "dataset" or config.evaluate.path is not None
    return generates and config.rollout.engine == "vllm"


def serving_teachers(config: Config, processes: Processes) -> dict[str, RunServers]:
    """The servers of the teachers that have some, by key."""
    served = [key for key, teacher in config.every_teacher().items() if teacher.engine == "vllm"]
    return {key: teacher_servers(config, key, processes) for key in served}


def build_generator(
    config: Config, tokenizer: Tokenizer, writers: RunServers | None = None, read_weights: bool = False
) -> Generator | None:
    """The student as a writer; None where nothing is generated (SFT without evaluation).

    Args:
        writers: servers that write; None: this process does, whatever `rollout.engine` says.
        read_weights: take the model folder's weights; a run leaves that to its first refit.
    """
    if config.prefix.name == "dataset" and config.evaluate.path is None:
        return None
    model = Path(config.student.model)
    eos_ids, decode = eos_token_ids(model, tokenizer), decoder(tokenizer)
    if writers is not None:
        return VLLMGenerator(
            writers.servers(),
            model,
            is_first=Processes.current().is_first,
            eos_ids=eos_ids,
            decode=decode,
            read_weights=read_weights,
            end_servers=writers.close,
        )
    return HFGenerator(
        model,
        eos_ids=eos_ids,
        decode=decode,
        dtype=config.rollout.dtype,
        batch_size=config.rollout.batch_size,
        read_weights=read_weights,
    )


def build_scorer(
    config: Config,
    trainer: MegatronTrainer,
    tokenizer: Tokenizer,
    need: Need,
    served: Mapping[str, RunServers] = MappingProxyType({}),
) -> Scorer | None:
    """The teacher, or all of several, when the loss needs one; output layers go to the ranks that compute the loss.

    `served`: servers of teachers that have some, by key.
    """
    if need is Need.NOTHING:
        return None
    teachers = list(config.every_teacher().values())
    built = [_one_teacher(config, key, trainer, tokenizer, served.get(key)) for key in config.every_teacher()]
    scorers, outputs = [scorer for scorer, _ in built], [output for _, output in built]
    if config.data.teacher_key is not None:
        for number, (output, teacher) in enumerate(zip(outputs, teachers, strict=True)):
            trainer.set_teacher_output(output if need is Need.FULL else None, number, teacher.dtype)
        return RoutedScorer(scorers)
    widest = max((teacher.dtype for teacher in teachers), key=("bfloat16", "float32", "float64").index)
    trainer.set_teacher_output(outputs if need is Need.FULL else None, dtype=widest)
    if len(scorers) == 1:
        return scorers[0]
    return MixedScorer(scorers, [teacher.weight for teacher in config.teachers.values()])


def _one_teacher(
    config: Config, key: str, trainer: MegatronTrainer, tokenizer: Tokenizer, servers: RunServers | None
) -> tuple[Scorer, TeacherOutput]:
    """A scorer, and where its output layer comes from; `tokenizer` is the student's."""
    teacher = config.every_teacher()[key]
    config = replace(config, teacher=teacher)
    output: TeacherOutput
    if teacher.source == "external":
        scorer, output = build_external_scorer(config, tokenizer, f"{key}.model", servers), str(teacher.model)
    else:
        output = trainer.self_teacher(teacher.source, teacher.decay)
        scorer = MegatronScorer(config, output)
    if teacher.base_model is None:
        return scorer, output
    base = replace(config, teacher=replace(teacher, source="external", model=teacher.base_model))
    return WithBase(scorer, build_external_scorer(base, tokenizer, f"{key}.base_model")), output


def build_external_scorer(
    config: Config, tokenizer: Tokenizer, key: str = "teacher.model", servers: RunServers | None = None
) -> Scorer:
    """The model of `teacher.model` as a scorer; `tokenizer` is the student's, `key` is for messages.

    `servers`: of a teacher that has some; None: they are started here.
    """
    teacher, model = config.teacher, Path(str(config.teacher.model))
    check_same_tokens(tokenizer, load_tokenizer(model, key), key)
    vocab_size = read_architecture(config.student.model).vocab_size
    if teacher.engine == "megatron":
        scorer = MegatronScorer(config)
        if teacher.fp8.recipe == "none":
            return scorer
        limits = replace(teacher.fidelity, k=min(teacher.fidelity.k, vocab_size))
        return FidelityGate(scorer, limits, key.removesuffix(".model"), Processes.current())
    if teacher.engine == "vllm":
        servers = servers or teacher_servers(config, "teacher", Processes.current())
        return VLLMScorer(servers.servers(), vocab_size, model=model, end_servers=servers.close)
    return HFScorer(model, dtype=teacher.dtype, micro_batch_tokens=teacher.micro_batch_tokens, vocab_size=vocab_size)


def build_early(
    config: Config,
    scorer: Scorer | None,
    needs: TeacherNeeds,
    context: TeacherContext,
    routing: Routing | None,
    stop_rule: StopRule,
) -> EarlyScores | None:
    """Where a teacher is on servers and it is known what it will be asked before all rollouts are there: no other
    prompt's rollouts in its context, none cut or passed over afterwards."""
    served = any(teacher.engine == "vllm" for teacher in config.every_teacher().values())
    sure = isinstance(stop_rule, NoStop) and context.reads is not Reads.STEP and not redraws_of(config.reward)
    if not (served and sure and isinstance(scorer, EarlyScorer)):
        return None
    return EarlyScores(scorer, needs, context, routing, config.rollout.samples_per_prompt)


def build_teacher_context(config: Config, routing: Routing | None) -> TeacherContext:
    """What the teacher sees, rendered by its own chat template."""
    tokenizers = [teacher_tokenizer(config, key) for key in config.every_teacher()]
    contexts = [build_context(config.context, t, config.run.seed, config.data) for t in tokenizers]
    return contexts[0] if routing is None else RoutedContext(contexts, routing)


def teacher_tokenizer(config: Config, key: str = "teacher") -> Tokenizer:
    """The student's where the teacher is the student itself, or where there is none."""
    model = config.every_teacher()[key].model
    return load_tokenizer(config.student.model) if model is None else load_tokenizer(model, f"{key}.model")


def build_stop_rule(
    config: Config,
    processes: Processes,
    context: TeacherContext,
    generator: Generator | None,
    scorer: Scorer | None,
) -> StopRule:
    """When training rollouts end before EOS and the token limit."""
    measure = None
    if isinstance(config.stop, TrapStop):
        assert isinstance(generator, HFGenerator | VLLMGenerator) and scorer is not None
        measure = build_measure(config, config.stop, processes, generator, scorer)
    return build_stop(config.stop, context, processes, config.run.seed, measure)


def build_measure(
    config: Config, slot: TrapStop, processes: Processes, generator: HFGenerator | VLLMGenerator, scorer: Scorer
) -> Measure:
    """The divergence of the generator's student from the teacher, on what the student writes."""
    if isinstance(generator, VLLMGenerator):
        return Measure(TailDivergence(None, scorer, slot.k, processes), processes, of_writers=True)
    vocab_size, tokens = read_architecture(config.student.model).vocab_size, config.teacher.micro_batch_tokens
    student = HFScorer(generator.model, micro_batch_tokens=tokens, vocab_size=vocab_size)
    if slot.divergence == "tail":
        return Measure(TailDivergence(student, scorer, slot.k, processes, slot.support == "teacher"), processes)
    own = student.output_weight()
    dtype = dtype_of(config.teacher.dtype, "teacher.dtype")
    theirs = load_output_weight(str(config.teacher.model), 0, vocab_size, vocab_size, dtype).to(own.device)
    return Measure(FullDivergence(student, scorer, own, theirs), processes)


def build_ahead(
    config: Config, prompts: PromptStream, processes: Processes, stop: StopRequest, earlier: KeptRollouts
) -> RolloutsAhead:
    """The prompts from where the stream stands on, with rollouts as far ahead as the recipe says."""
    train, staleness = config.train, config.rollout.staleness
    return RolloutsAhead(prompts, processes, stop.requested, train.prompts_per_step, staleness, train.steps, earlier)


def build_source(
    config: Config, tokenizer: Tokenizer, generator: Generator | None, stop_rule: StopRule
) -> RolloutSource:
    """Who writes the responses of training steps."""
    rollout, prefix, seed = config.rollout, config.prefix, config.run.seed
    eos_ids = eos_token_ids(config.student.model, tokenizer)
    dataset = DatasetSource(lambda text: response_token_ids(tokenizer, text, eos_ids[0]), rollout.max_new_tokens)
    if isinstance(prefix, DatasetPrefix):
        return dataset
    assert generator is not None
    sampling = Sampling(rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k)
    if isinstance(prefix, TeacherMixedPrefix):
        assert isinstance(generator, HFGenerator)
        teacher, dtype = Path(str(config.teacher.model)), config.teacher.dtype
        generator = TeacherMixedGenerator(generator, teacher, prefix.teacher_share, dtype=dtype)
    if isinstance(generator, VLLMGenerator) and isinstance(config.stop, TrapStop):
        generator = generator.telling(config.stop.k)
    student = StudentSource(stop_rule.writer(generator), sampling, rollout.samples_per_prompt, seed)
    if isinstance(prefix, MixedPrefix):
        return MixedSource(student, dataset, prefix.on_policy_share, seed)
    if isinstance(prefix, TeacherPrefix):
        longest = min(prefix.max_tokens or rollout.max_new_tokens, rollout.max_new_tokens)
        steps = prefix.anneal_steps or config.train.steps
        schedule = PrefixSchedule(longest, steps, seed, prefix.length == "uniform")
        return TeacherPrefixSource(build_teacher_writer(config, eos_ids), student, schedule)
    return student


def build_teacher_writer(config: Config, eos_ids: tuple[int, ...]) -> Generator:
    """The teacher as a writer: whole in every process, besides its copy that scores. It draws the student's ids."""
    return HFGenerator(
        Path(str(config.teacher.model)),
        eos_ids=eos_ids,
        dtype=config.teacher.dtype,
        batch_size=config.rollout.batch_size,
        vocab_size=read_architecture(config.student.model).vocab_size,
    )


def build_evaluation(config: Config, tokenizer: Tokenizer) -> Evaluation | None:
    """The held-out problems of `evaluate.path`, read once."""
    evaluate = config.evaluate
    if evaluate.path is None:
        return None
    verifier = build_verifier(config.verify)
    if verifier is None:
        raise ConfigError(
            "verify.name", "none", "a verifier for evaluate.path", "set verify.name (exact, integer, math, ...)"
        )
    problems = first_prompts(replace(config.data, path=evaluate.path), tokenizer, evaluate.problems)
    if all(verifier("", problem) is None for problem in problems):
        raise ConfigError(
            "evaluate.path",
            f"{evaluate.path} with {len(problems)} usable problems, none with an answer that verify.name can read",
            "at least one",
            "check data.answer_key, verify.name and data.max_prompt_tokens",
        )
    limit = evaluate.max_new_tokens or config.rollout.max_new_tokens
    sampling = Sampling(limit, evaluate.temperature, evaluate.top_p, greedy=evaluate.greedy)
    return Evaluation(problems, sampling, evaluate.samples_per_prompt, verifier, config.run.seed)


def build_recorder(config: Config, state: RunState, tokenizer: Tokenizer) -> Recorder:
    observe, piece = config.observe, functools.cache(lambda token: tokenizer.decode([token]))
    return Recorder(Path(config.run.dir), state.step, observe.rollouts_per_step, observe.tensorboard, piece)


def check_same_tokens(student: Tokenizer, teacher: Tokenizer, key: str = "teacher.model") -> None:
    """Refuse a teacher that maps text to other ids than the student: its scores would be about other tokens."""
    for token, ours, theirs in differing_tokens(student, teacher):
        got = f"token {token!r} with id {theirs} (the student has {ours})"
        raise ConfigError(key, got, "the student's token ids", "choose a teacher of the student's family")


def decoder(tokenizer: Tokenizer) -> Callable[[Tensor], str]:
    """Token ids -> the text that verifiers and people read."""
    return lambda ids: tokenizer.decode(ids.tolist(), skip_special_tokens=True)

"""The run and the step, in one direction:

    prompts -> rollout -> verify -> teacher context -> stop rule -> teacher scores -> pack -> train step -> refit
            -> checkpoint / evaluate

Every rank runs this file in lockstep. A rank writes its share of the responses; all ranks then know all of them, and
each data-parallel replica trains on its part. SFT is the same loop with a data set as the source of responses.

With `rollout.staleness` above 0 a step finds its rollouts written, or nearly: they were begun some steps before it
(`nemo_opd.rollout.ahead`), and verified, while those trained. Everything after them is the same.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nemo_opd.accounts import applied, rejection, reward_metrics, token_metrics
from nemo_opd.checkpoint.store import CheckpointStore, RunState, Stateful
from nemo_opd.config import Config, RolloutConfig
from nemo_opd.diagnosis.diagnosis import Diagnosis
from nemo_opd.engines.protocols import Generator, Place, Resting, Scorer, Trainer
from nemo_opd.evaluate.run import Evaluation
from nemo_opd.losses.base import DistillationLoss
from nemo_opd.observe.clock import Clock
from nemo_opd.observe.measure import rollout_metrics, staleness_metrics
from nemo_opd.observe.progress import Progress
from nemo_opd.observe.recorder import Recorder
from nemo_opd.observe.token_scores import flatten, shown_rollouts, unflatten
from nemo_opd.packing import pack, sequence_length
from nemo_opd.processes import Processes, balanced
from nemo_opd.refit.manifest import Manifest
from nemo_opd.refit.transfer import refit
from nemo_opd.reliability import faults
from nemo_opd.reliability.guard import Guard
from nemo_opd.reliability.heartbeat import Sections, Silent
from nemo_opd.reliability.stop import StopRequest
from nemo_opd.reliability.straggler import Own, Stragglers
from nemo_opd.rollout.advantages import groups, redraws_of, says_nothing, verifier_advantages
from nemo_opd.rollout.ahead import RolloutsAhead, check_versions
from nemo_opd.rollout.exchange import gather_rollouts
from nemo_opd.rollout.kept import FILE as ROLLOUTS_FILE
from nemo_opd.rollout.source import RolloutSource
from nemo_opd.stop.base import StopRule
from nemo_opd.teacher.contexts import TeacherContext
from nemo_opd.teacher.early import EarlyScores
from nemo_opd.teacher.several import Routing
from nemo_opd.types import (
    Need,
    PackedRow,
    Prompt,
    Rollout,
    ScoreRequest,
    StepReport,
    StopRequested,
    TeacherScores,
    TrainBatch,
    TrainStats,
)
from nemo_opd.verify.base import Verifier

log = logging.getLogger(__name__)

Context = tuple[int, ...] | None
"""What the teacher sees before a response; None where it is not asked."""


@dataclass
class Run:
    """The parts of a run, built by `nemo_opd.assemble`. The loop knows their protocols, never their engines."""

    config: Config
    config_text: str
    folder: Path
    processes: Processes
    ahead: RolloutsAhead
    decode: Callable[[Tensor], str]
    source: RolloutSource
    verifier: Verifier | None
    context: TeacherContext
    stop_rule: StopRule
    routing: Routing | None
    """Which of several teachers scores a rollout; None where all are scored alike."""
    scorer: Scorer | None
    early: EarlyScores | None
    """Where teachers can be asked about responses while others are still being written."""
    loss: DistillationLoss
    trainer: Trainer
    generator: Generator | None
    evaluation: Evaluation | None
    diagnosis: Diagnosis
    guard: Guard
    stragglers: Stragglers
    store: CheckpointStore
    stop: StopRequest
    recorder: Recorder | None
    state: RunState
    started_at: int
    """Steps that were done when this attempt began."""
    heartbeat: Sections = field(default_factory=Silent)
    own: Clock = field(default_factory=Clock)
    """This rank's own work in a step, without waiting for others."""
    weights: Manifest | None = None
    """What the generator was last given."""
    stateful: Mapping[str, Stateful] = field(default_factory=dict)
    """By name, the parts of the algorithm that have a state of their own: it is saved with the run's."""
    diagnosed: str = ""
    """The sign of failure, or the guard's reason, that ended the run."""

    @property
    def place(self) -> Place:
        return self.trainer.place


def train(run: Run) -> bool:
    """Step until `train.steps`, evaluating where it is due.

    True when all steps and the last evaluation are done, False when a stop request, the diagnosis or the guard ended
    the run earlier.
    """
    steps = run.config.train.steps
    progress = Progress(steps, run.state.step, run.config.observe.progress and run.processes.is_first, run.folder.name)
    saved = run.state.step
    refit_generator(run)
    evaluated = evaluate(run)  # what an earlier attempt did not come to
    with closing(run.ahead):
        while evaluated and run.state.step < steps and not run.diagnosed and not run.stop.agreed():
            report = one_step(run)
            if report is None:
                break
            run.store.poll()
            report = diagnosed(run, report)
            progress.advance(report)
            if run.recorder:
                run.recorder.write(report)
            if report.step == steps or _due(run.config.checkpoint.every, report.step):
                save(run)
                saved = report.step
                if run.source.follows_policy and report.step < steps:
                    refit_generator(run)  # as a run does that resumes from it
            evaluated = evaluate(run)  # after saving: an evaluation that fails costs no trained step
    if saved < run.state.step or run.processes.any(run.ahead.finished_more(run.state.step)):
        save(run)
    with run.heartbeat.section("save"):
        run.store.wait()
    progress.close()
    return evaluated and run.state.step >= steps


def one_step(run: Run) -> StepReport | None:
    """One optimizer step. None, with nothing changed, when a stop request interrupted the rollouts."""
    clock, run.own = Clock(run.heartbeat.section), Clock()
    with clock.section("rollout"):
        drawn = drawn_rollouts(run)
        if drawn is None:
            return None  # the stream's position in the run's state is still the one before this step
        rollouts, passed_over = drawn
        check_versions(rollouts, run.state.step, oldest(run.config.rollout))
        if isinstance(run.generator, Resting):
            run.generator.rest()
    with clock.section("context"):
        contexts = run.context.context_ids(rollouts)
    with clock.section("stop"):
        rollouts = run.stop_rule.cut(rollouts, contexts)
    advantages = verifier_advantages(run.config.reward, rollouts)
    replicas = spread(run, rollouts, advantages)
    with clock.section("score"):
        faults.hit("step.score")
        teachers = teacher_numbers(run, rollouts)
        scores = {answer.key: answer for answer in scored(run, rollouts, contexts, teachers, replicas)}
    with clock.section("pack"):
        scores |= without_signal(rollouts, contexts)
        mine = replicas[run.place.data_parallel_rank]
        batch, trained = train_batch(run, rollouts, scores, teachers, advantages, mine)
    with clock.section("train"):
        stats = run.trainer.train_step(batch, run.guard.accepts)
    run.state.step += 1
    faults.hit("step.trained")
    rejected = rejection(run.processes, run.guard, run.state, stats)
    run.state.prompts = run.ahead.position
    stopped = run.stop_rule.end_step()
    moved = moved_weights(run, clock)
    with clock.section("record"):
        record_rollouts(run, rollouts, batch, stats)
    with clock.section("measure"):
        measured = rollout_metrics(rollouts)
        stale = staleness_metrics(rollouts, run.state.step - 1, oldest(run.config.rollout))
        slow = run.stragglers.look(run.state.step, own_work(run, batch, stats))
    run.stop.budget.stepped(clock.total - clock.seconds()["rollout"])
    metrics = {
        "loss/total": sum(stats.losses.values()),
        **{f"loss/{name}": value for name, value in stats.losses.items()},
        **{f"train/{name}": value for name, value in stats.metrics.items()},
        **measured,
        **stale,
        **reward_metrics(run.config.reward, run.state, rollouts, passed_over),
        **(run.routing.metrics(rollouts) if run.routing else {}),
        **token_metrics(run.state, rollouts, passed_over, contexts, trained, stopped.discarded),
        **stopped.metrics,
        **moved,
        **rejected,
        **slow,
        "optimizer/grad_norm": stats.grad_norm,
        "optimizer/learning_rate": stats.learning_rate,
        "optimizer/skipped": float(stats.skipped),
        "speed/tokens_per_second": sum(len(r.response_ids) for r in [*rollouts, *passed_over]) / clock.total,
        **{f"time/{name}": seconds for name, seconds in {**clock.seconds(), **stats.seconds}.items()},
    }
    return StepReport(run.state.step, run.state.step, metrics, clock.total)


def moved_weights(run: Run, clock: Clock) -> dict[str, float]:
    """Refit where it is due, and say how much that moved."""
    if not (run.source.follows_policy and _due(run.config.rollout.refit_every, run.state.step)):
        return {}
    with clock.section("refit"):
        refit_generator(run)
    return {"refit/bytes": float(run.weights.nbytes if run.weights else 0)}


def own_work(run: Run, batch: TrainBatch, stats: TrainStats) -> dict[str, Own]:
    """What this rank did by itself. Ranks that write equally many responses are compared, and those with and those
    without a loss to compute; a replica without tokens of its own with nobody, nor ranks that let servers write."""
    prompts = len(run.processes.share(run.config.train.prompts_per_step))
    writes = run.config.rollout.engine == "hf"
    positions = sum(len(row.input_ids) for row in batch.rows if row.keys)
    return {
        "rollout": Own(run.own.seconds().get("rollout", 0.0), float(writes), float(prompts)),
        "train": Own(stats.seconds.get("own", 0.0), float(positions), float(run.place.computes_loss)),
    }


def diagnosed(run: Run, report: StepReport) -> StepReport:
    """The report with the diagnosis of its step; what ends the run, also by the guard, is left in `run.diagnosed`.
    Collective."""
    begin = time.perf_counter()
    verdict = run.diagnosis.look(report.step, applied(report.metrics))
    seconds = {"time/diagnosis": time.perf_counter() - begin}
    stop = run.guard.stop or verdict.stop
    if run.processes.any(bool(stop)) and report.step < run.config.train.steps:
        run.diagnosed = str(stop or "another rank saw a sign of failure")
    if run.recorder:
        run.recorder.write_findings([asdict(finding) for finding in verdict.said])
    return replace(report, metrics={**report.metrics, **verdict.metrics, **seconds})


def drawn_rollouts(run: Run) -> tuple[list[Rollout], list[Rollout]] | None:
    """The step's rollouts, verified and known to every rank, and those that `reward.equal_groups=redraw` passed over
    for the next prompts of the stream. None when a stop request interrupted them."""
    missing, kept, passed_over = run.config.train.prompts_per_step, [], []  # type: int, list[Rollout], list[Rollout]
    for _ in range(1 + redraws_of(run.config.reward)):
        prompts, writing = run.ahead.draw(partial(written, run), run.state.step, missing)
        with run.own.section("rollout"):
            faults.hit("step.rollout")
            mine = list(writing)
        if run.stop.agreed():
            return None
        rollouts = gather_rollouts(run.processes, mine, prompts, run.decode)
        if not redraws_of(run.config.reward):
            return rollouts, []
        for members in groups(rollouts).values():
            group = [rollouts[i] for i in members]
            says = not says_nothing(group)
            (kept if says else passed_over).extend(group)
            missing -= says
        if not missing:
            break
    return kept, passed_over


def spread(run: Run, rollouts: Sequence[Rollout], advantages: Sequence[float]) -> list[list[int]]:
    """Which rollouts each data-parallel replica trains on. Without a teacher those that have no advantage are left out:
    nothing is learnt from them."""
    useless = [run.loss.needs.need is Need.NOTHING and math.isnan(advantage) for advantage in advantages]
    lengths = [0 if out else sequence_length(rollout) for rollout, out in zip(rollouts, useless, strict=True)]
    parts = balanced(lengths, run.place.data_parallel_size)
    return [[i for i in members if not useless[i]] for members in parts]


def written(
    run: Run, prompts: Sequence[Prompt], step: int, stop_requested: StopRequested, ready: Sequence[Rollout]
) -> Iterator[Rollout]:
    """This rank's share of a step's responses with the verifier's reward, as they finish; served teachers begin to
    score them. In a thread of its own where the step is still ahead."""
    mine = [prompts[i] for i in run.processes.share(len(prompts))]
    rollouts = verified(run, run.source.rollouts(mine, step, stop_requested, ready))
    return rollouts if run.early is None else run.early.watched(rollouts)


def verified(run: Run, rollouts: Iterator[Rollout]) -> Iterator[Rollout]:
    """The same rollouts with the verifier's reward."""
    for rollout in rollouts:
        if run.verifier is not None and rollout.reward is None:  # an earlier attempt may have verified it
            rollout = replace(rollout, reward=run.verifier(rollout.text, rollout.prompt))
        yield rollout


def oldest(rollout: RolloutConfig) -> int:
    """Optimizer steps by which a token may be older than the policy that is trained on it."""
    return rollout.staleness + rollout.refit_every - 1


def teacher_numbers(run: Run, rollouts: Sequence[Rollout]) -> list[int]:
    """The teacher of each rollout; 0 also where it has none (and then no context)."""
    return [0] * len(rollouts) if run.routing is None else [n or 0 for n in run.routing.numbers(rollouts)]


def scored(
    run: Run,
    rollouts: Sequence[Rollout],
    contexts: Sequence[Context],
    teachers: Sequence[int],
    replicas: Sequence[Sequence[int]],
) -> Iterator[TeacherScores]:
    """The teacher's answers for the rollouts whose loss this rank computes and for which it has a context."""
    if run.scorer is None:
        return iter(())
    consumers = {i: run.place.loss_ranks[replica] for replica, members in enumerate(replicas) for i in members}
    requests = [
        ScoreRequest(i, context, rollout.response_ids, consumers[i], teacher=teachers[i])
        for i, (rollout, context) in enumerate(zip(rollouts, contexts, strict=True))
        if len(rollout.response_ids) and context is not None
    ]
    return run.scorer.score(requests, run.loss.needs)


def without_signal(rollouts: Sequence[Rollout], contexts: Sequence[Context]) -> dict[int, TeacherScores]:
    """Answers without a valid row for the rollouts about which no teacher was asked."""
    pairs = enumerate(zip(rollouts, contexts, strict=True))
    return {
        i: TeacherScores(i, torch.zeros(len(rollout.response_ids), dtype=torch.bool))
        for i, (rollout, context) in pairs
        if context is None
    }


def train_batch(
    run: Run,
    rollouts: Sequence[Rollout],
    scores: Mapping[int, TeacherScores],
    teachers: Sequence[int],
    advantages: Sequence[float],
    members: Sequence[int],
) -> tuple[TrainBatch, dict[str, float]]:
    """This replica's rows, and the global token counts: one per loss component, `trained` by any of them, and
    `dropped` without a score."""
    train = run.config.train
    rows = pack(
        [rollouts[i] for i in members],
        scores,
        members,
        [advantages[i] for i in members],
        train.micro_batch_tokens,
        train.packing,
        run.config.run.seed,
        [teachers[i] for i in members],
    )
    counts = global_counts(run, rows)
    return TrainBatch(rows, {name: max(1.0, counts[name]) for name in run.loss.components}), counts


def global_counts(run: Run, rows: Sequence[PackedRow]) -> dict[str, float]:
    """Token counts over all replicas and micro-batches; each replica is counted by the first rank of its last stage."""
    counts = dict.fromkeys([*run.loss.components, "trained", "dropped"], 0.0)
    if speaks_for_replica(run):
        for row in rows:
            masks = run.loss.component_masks(row.tokens)
            for name, mask in masks.items():
                counts[name] += float(mask.sum())
            counts["trained"] += float(torch.stack(list(masks.values())).any(0).sum())
            counts["dropped"] += float((~row.tokens.teacher_valid).sum())
    return run.processes.sum(counts)


def speaks_for_replica(run: Run) -> bool:
    """Is this the first of the ranks that compute the replica's loss?"""
    return run.place.rank == run.place.loss_ranks[run.place.data_parallel_rank][0]


def record_rollouts(run: Run, rollouts: Sequence[Rollout], batch: TrainBatch, stats: TrainStats) -> None:
    """Write the step's first rollouts down, now and then with what is known of their tokens. Collective."""
    observe, scores = run.config.observe, None
    shown = shown_rollouts(rollouts, observe.rollouts_per_step)
    if shown and observe.token_scores and _due(observe.token_scores, run.state.step - 1):
        mine = flatten(batch.rows, stats.token_scores, shown) if speaks_for_replica(run) else torch.zeros(0).double()
        lengths = {i: len(rollouts[i].response_ids) for i in shown}
        scores = unflatten(run.processes.gather(mine), lengths)
    if run.recorder:
        run.recorder.write_rollouts(run.state.step, rollouts, scores)


def refit_generator(run: Run) -> None:
    """Give the generator the trainer's weights, unless it has them already."""
    if run.generator is not None and run.generator.version < run.state.step:
        with run.heartbeat.section("refit"):
            run.weights = refit(run.trainer, run.generator, run.state.step, run.processes, run.weights)


def evaluate(run: Run) -> bool:
    """Held-out accuracy of the current weights, where it is due and not recorded yet.

    False when a stop request interrupted it: the next attempt begins with it.
    """
    step, every = run.state.step, run.config.evaluate.every
    if run.evaluation is None or run.generator is None or step == 0:
        return True
    if step != run.config.train.steps and not _due(every, step):
        return True
    if run.processes.any(run.recorder is not None and run.recorder.has_evaluation(step)):
        return True
    refit_generator(run)
    with run.heartbeat.section("evaluate"):
        result = run.evaluation.measure(run.generator, run.processes, run.stop)
    if result is None:
        return False
    log.info("step %d: %s", step, result)
    if run.recorder:
        run.recorder.write_evaluation(step, result.metrics())
    return True


def save(run: Run) -> None:
    """Commit a checkpoint of the current step; with `checkpoint.asynchronous` after one of the next steps."""
    run.state.algorithm = {name: part.state() for name, part in run.stateful.items()}
    kept = run.ahead.kept(run.state.step)
    files = {ROLLOUTS_FILE: kept} if kept else {}
    background = run.config.checkpoint.asynchronous and run.state.step < run.config.train.steps
    with run.heartbeat.section("save"):
        run.store.save(run.trainer, run.state, run.config_text, files, background)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0

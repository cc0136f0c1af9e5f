"""The loop with rollouts written ahead, around a generator whose every token is written at a moment that is known."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_opd.checkpoint.store import CheckpointStore, RunState, newest_checkpoint, read_state
from nemo_opd.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    ObserveConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from nemo_opd.diagnosis.diagnosis import Diagnosis
from nemo_opd.engines.protocols import Accepts, Place, Snapshot
from nemo_opd.evaluate.run import Evaluation
from nemo_opd.loop import Run, train
from nemo_opd.processes import Processes
from nemo_opd.reliability.guard import Guard
from nemo_opd.reliability.stop import StopRequest
from nemo_opd.reliability.straggler import Stragglers
from nemo_opd.rollout.ahead import RolloutsAhead
from nemo_opd.rollout.kept import FILE, KeptRollouts
from nemo_opd.rollout.seeds import derive_seed
from nemo_opd.rollout.source import StudentSource, name_of
from nemo_opd.stop.base import NoStop
from nemo_opd.types import (
    Author,
    Finish,
    GenerateRequest,
    Need,
    Prompt,
    Rollout,
    Sampling,
    StepReport,
    StopRequested,
    TeacherNeeds,
    TrainBatch,
    TrainStats,
)
from tests.helpers.checkpoints import FileSnapshot
from tests.helpers.rollouts import make_prompt

PROMPTS, SAMPLES, LENGTH = 2, 3, 5
"""Prompts of a step, responses of each, tokens of each."""
PATIENCE = 60.0


class Stream:
    """Prompts 0, 1, 2, ...: those of step n are 2n and 2n + 1."""

    def __init__(self) -> None:
        self.position = 0

    def take(self, n: int) -> list[Prompt]:
        self.position += n
        return [make_prompt(index) for index in range(self.position - n, self.position)]

    def state(self) -> dict[str, Any]:
        return {"position": self.position}


def step_of(prompt: Prompt) -> int:
    return prompt.index // PROMPTS


def token(seed: int, offset: int, version: int) -> int:
    """What the weights of a version make of a seed."""
    return derive_seed(seed % 2**32, version, offset, 0) % 1000


class PacedGenerator:
    """Writes token t of step n's responses with the weights of step ``max(0, n - k) + t``, or n: with as many
    versions as a staleness of k permits. `load_weights` waits until all that is to be written with the old weights is.
    """

    def __init__(self, staleness: int, steps: int, first: int = 0, shuffle: int | None = None) -> None:
        self.version = -1
        self.asked: list[list[GenerateRequest]] = []
        """Of training, in the order of the calls."""
        self._staleness, self._steps, self._first, self._shuffle = staleness, steps, first, shuffle
        self._moved = threading.Condition()
        self._waits_for: dict[int, float] = {}
        """By step, the version that its next token is to be written with."""

    def when(self, step: int, offset: int) -> int:
        return min(step, max(self._first, step - self._staleness) + offset)

    def generate(
        self, requests: Sequence[GenerateRequest], sampling: Sampling, stop_requested: StopRequested
    ) -> Iterator[Rollout]:
        if requests[0].prompt.epoch < 0:  # an evaluation
            versions = torch.full((LENGTH,), self.version)
        else:
            self.asked.append(list(requests))
            written = list(self._versions(step_of(requests[0].prompt), stop_requested))
            if len(written) < LENGTH:
                return
            versions = torch.tensor(written)
        order = range(len(requests))
        if self._shuffle is not None:
            draws = torch.Generator().manual_seed(self._shuffle + len(self.asked))
            order = torch.randperm(len(requests), generator=draws).tolist()
        for number in order:
            yield rollout(requests[number], versions)

    def _versions(self, step: int, stop_requested: StopRequested) -> Iterator[int]:
        for offset in range(LENGTH):
            with self._moved:
                self._waits_for[step] = self.when(step, offset)
                self._moved.notify_all()
                while self.version < self._waits_for[step]:
                    if stop_requested():
                        return
                    self._moved.wait(0.01)
                yield self.version
        with self._moved:
            self._waits_for[step] = float("inf")
            self._moved.notify_all()

    def load_weights(self, weights: Any, version: int) -> None:
        list(weights)
        with self._moved:
            assert self._moved.wait_for(lambda: self._may_change(version), PATIENCE)
            self.version = version
            self._moved.notify_all()

    def _may_change(self, version: int) -> bool:
        """Is all that was begun until now written as far as the weights go?"""
        begun = min(self.version + self._staleness + 1, self._steps) if self.version >= 0 else 0
        return all(self._waits_for.get(step, -1) >= version for step in range(self._first, begun))

    def close(self) -> None:
        pass


def rollout(request: GenerateRequest, versions: Tensor) -> Rollout:
    ids = torch.tensor([token(request.seed, offset, int(version)) for offset, version in enumerate(versions)])
    count = len(ids)
    return Rollout(
        prompt=request.prompt,
        sample=request.sample,
        response_ids=ids,
        sampler_logprobs=torch.zeros(count),
        author=torch.full((count,), int(Author.STUDENT), dtype=torch.int8),
        policy_version=versions.clone(),
        loss_mask=torch.ones(count, dtype=torch.bool),
        finish=Finish.LENGTH,
        decode=decode,
    )


def decode(ids: Tensor) -> str:
    return " ".join(map(str, ids.tolist()))


@dataclass
class Trainer:
    """Keeps what it is given."""

    place: Place = field(default_factory=lambda: Place(0, 1, 0, 1, ((0,),)))
    batches: list[TrainBatch] = field(default_factory=list)

    def train_step(self, batch: TrainBatch, accepts: Accepts | None = None) -> TrainStats:
        self.batches.append(batch)
        return TrainStats({"sampled": 0.0}, {}, 0.0, 0.0)

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield "weight", torch.zeros(1)

    def snapshot(self, folder: Path, background: bool = False) -> Snapshot:
        return FileSnapshot(folder, "", 0)

    def load(self, folder: Path) -> None:
        pass


class Lines:
    """A recorder that remembers the reports and what was evaluated."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.evaluations: dict[int, Any] = {}

    def write(self, report: StepReport) -> None:
        self.reports.append(report)

    def has_evaluation(self, step: int) -> bool:
        return step in self.evaluations

    def write_evaluation(self, step: int, metrics: Any) -> None:
        self.evaluations[step] = metrics

    def write_findings(self, *_: Any) -> None:
        pass

    def write_rollouts(self, *_: Any) -> None:
        pass


def make_run(
    folder: Path,
    staleness: int,
    steps: int = 6,
    shuffle: int | None = None,
    evaluate_every: int = 0,
    save_every: int = 100,
    resumed: Path | None = None,
) -> Run:
    """`resumed`: from this checkpoint."""
    state = read_state(resumed) if resumed else RunState()
    kept = KeptRollouts(resumed / FILE if resumed else None, staleness, decode)
    config = Config(
        run=RunConfig(dir=str(folder)),
        data=DataConfig(path="unused"),
        rollout=RolloutConfig(staleness=staleness, samples_per_prompt=SAMPLES),
        train=TrainConfig(steps=steps, prompts_per_step=PROMPTS, micro_batch_tokens=16),
        checkpoint=CheckpointConfig(every=save_every),
        evaluate=EvaluateConfig(every=evaluate_every),
        observe=ObserveConfig(rollouts_per_step=0, progress=False),
    )
    processes, sampling = Processes(), Sampling(LENGTH)
    stop = StopRequest(None, "test", processes)
    generator = PacedGenerator(staleness, steps, state.step, shuffle)
    stream = Stream()
    stream.position = state.prompts.get("position", 0)
    loss: Any = SimpleNamespace(
        needs=TeacherNeeds(Need.SAMPLED),
        components=("sampled",),
        component_masks=lambda tokens: {"sampled": tokens.teacher_valid},
    )
    held_out = [make_prompt(index, epoch=-1) for index in range(4)]
    grade: Any = lambda text, prompt: float(int(text.split()[0]) % 2)  # noqa: E731
    context: Any = SimpleNamespace(context_ids=lambda rollouts: [r.prompt.token_ids for r in rollouts])
    recorder: Any = Lines()
    return Run(
        config=config,
        config_text="a recipe",
        folder=folder,
        processes=processes,
        ahead=RolloutsAhead(stream, processes, stop.requested, PROMPTS, staleness, steps, kept),
        decode=decode,
        source=StudentSource(generator, sampling, SAMPLES, seed=0),
        verifier=grade,
        context=context,
        stop_rule=NoStop(),
        routing=None,
        scorer=None,
        early=None,
        loss=loss,
        trainer=Trainer(),
        generator=generator,
        evaluation=Evaluation(held_out, sampling, 1, grade, 0) if evaluate_every else None,
        diagnosis=Diagnosis(config.diagnose, state.diagnosis),
        guard=Guard(config.guard, state.guard, processes),
        stragglers=Stragglers(config.straggler, processes),
        store=CheckpointStore(folder, processes, 2),
        stop=stop,
        recorder=recorder,
        state=state,
        started_at=state.step,
    )


def parts(run: Run) -> tuple[Any, Any, Any]:
    """(generator, trainer, recorder), which are ours."""
    return run.generator, run.trainer, run.recorder


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("rollouts of step")]


def stop_once(run: Run, condition: Callable[[], bool]) -> threading.Thread:
    """Asks the run to stop, from outside, once something holds."""

    def wait() -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.002)
        run.stop._asked = True

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize("staleness", [0, 1, 2, 3])
def test_prompts_are_trained_on_once_in_order_with_tokens_of_the_versions_that_may_be(
    tmp_path: Path, staleness: int
) -> None:
    run, steps = make_run(tmp_path, staleness), 6
    generator, trainer, recorder = parts(run)
    assert train(run)
    assert [step_of(call[0].prompt) for call in sorted(generator.asked, key=lambda c: c[0].prompt.index)] == [*range(6)]
    for step, batch in enumerate(trainer.batches):
        tokens = [row.tokens for row in batch.rows]
        expected = torch.tensor([generator.when(step, offset) for offset in range(LENGTH)])
        for part in tokens:
            assert torch.equal(part.policy_version, expected[part.offset])
        seeds = [[derive_seed(0, 0, step * PROMPTS + p, s) for s in range(SAMPLES)] for p in range(PROMPTS)]
        written = [token(s, o, int(expected[o])) for some in seeds for s in some for o in range(LENGTH)]
        assert torch.cat([part.ids for part in tokens]).tolist() == written
        metrics = recorder.reports[step].metrics
        shares = [float((step - expected == number).double().mean()) for number in range(staleness + 1)]
        if staleness:
            assert [metrics[f"rollout/staleness_{number}"] for number in range(staleness + 1)] == shares
            assert metrics["rollout/staleness_mean"] == pytest.approx(float((step - expected).double().mean()))
        else:
            assert not any(name.startswith("rollout/staleness") for name in metrics)
    assert run.state.prompts == {"position": steps * PROMPTS}
    assert threads() == []


@pytest.mark.parametrize("staleness", [0, 2])
def test_the_order_in_which_responses_finish_changes_nothing(tmp_path: Path, staleness: int) -> None:
    batches = []
    for shuffle in (None, 0, 1):
        run = make_run(tmp_path / str(shuffle), staleness, steps=3, shuffle=shuffle)
        assert train(run)
        batches.append(parts(run)[1].batches)
    for one, other in zip(batches[0] * 2, batches[1] + batches[2], strict=True):
        for row, same in zip(one.rows, other.rows, strict=True):
            assert torch.equal(row.input_ids, same.input_ids) and row.keys == same.keys
            assert torch.equal(row.tokens.policy_version, same.tokens.policy_version)


def test_a_stop_request_ends_a_step_whose_rollouts_are_still_being_written(tmp_path: Path) -> None:
    """Step 2 waits for weights that never come."""
    run = make_run(tmp_path, staleness=1)
    generator, trainer, _ = parts(run)
    when = generator.when
    generator.when = lambda step, offset: 1000 if (step, offset) == (2, LENGTH - 1) else when(step, offset)
    stopper = stop_once(run, lambda: generator._waits_for.get(2) == 1000 and run.state.step == 2)
    assert not train(run)
    stopper.join()
    assert (run.state.step, len(trainer.batches)) == (2, 2)
    newest = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None and read_state(newest).prompts == {"position": 2 * PROMPTS}
    assert threads() == []


def test_an_error_ahead_ends_the_run_and_nothing_is_left_behind(tmp_path: Path) -> None:
    run = make_run(tmp_path, staleness=2)
    generator, trainer, _ = parts(run)
    when = generator.when

    def fail(step: int, offset: int) -> int:
        if (step, offset) == (3, 2):
            raise ConnectionError("no server is left")
        return int(when(step, offset))

    generator.when = fail
    generator._may_change = lambda version: True
    with pytest.raises(ConnectionError, match="no server is left"):
        train(run)
    assert len(trainer.batches) == 3, "the steps before it are trained"
    assert threads() == []


def test_an_evaluation_sees_the_weights_of_its_step_whatever_is_under_way(tmp_path: Path) -> None:
    results = []
    for staleness in (0, 2):
        run = make_run(tmp_path / str(staleness), staleness, evaluate_every=2)
        assert train(run)
        results.append(parts(run)[2].evaluations)
    assert list(results[0]) == [2, 4, 6]
    assert results[0] == results[1]
    assert len({str(result) for result in results[0].values()}) > 1, "blind unless versions answer differently"


def test_tokens_older_than_may_be_are_not_trained_on(tmp_path: Path) -> None:
    """The weights of the start write everything: fine for steps 0 and 1, and no further."""
    run = make_run(tmp_path, staleness=1)
    generator, trainer, _ = parts(run)
    generator.when = lambda step, offset: 0
    generator.load_weights = lambda weights, version: setattr(generator, "version", 0)
    said = r"prompt 4, sample 0: got tokens of policy versions \[0\]; expected 1 to 2, as policy 2 is trained on them"
    with pytest.raises(RuntimeError, match=said):
        train(run)
    assert len(trainer.batches) == 2
    assert threads() == []


class HeldGenerator:
    """Writes at once with the weights that it has, but a step of `held` not before it is let go, apart from its first
    `before` responses."""

    def __init__(self, held: Sequence[int] = (), before: int = 0) -> None:
        self.version = -1
        self.held = {step: threading.Event() for step in held}
        self.before = before
        self.begun: list[int] = []
        self.finished: list[int] = []
        self.versions: dict[tuple[int, int, int], int] = {}
        """Of the weights that wrote each response."""

    def generate(
        self, requests: Sequence[GenerateRequest], sampling: Sampling, stop_requested: StopRequested
    ) -> Iterator[Rollout]:
        if not requests:
            return
        step, version = step_of(requests[0].prompt), self.version
        self.begun.append(step)
        for number, request in enumerate(requests):
            while number >= self.before and step in self.held and not self.held[step].wait(0.01):
                if stop_requested():
                    return
            self.versions[name_of(request)] = version
            yield rollout(request, torch.full((LENGTH,), version))
        self.finished.append(step)

    def load_weights(self, weights: Any, version: int) -> None:
        list(weights)
        self.version = version

    def close(self) -> None:
        pass


def with_generator(run: Run, generator: Any) -> Run:
    return replace(run, generator=generator, source=StudentSource(generator, Sampling(LENGTH), SAMPLES, seed=0))


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("staleness", [1, 3])
def test_a_slow_trainer_holds_the_writers_back(tmp_path: Path, staleness: int) -> None:
    """Each step trains until all that may be written is: its own rollouts and those of `staleness` steps more, and
    nothing of the step after these has been begun by then, however long it takes."""
    steps, generator = 7, HeldGenerator()
    run = with_generator(make_run(tmp_path, staleness, steps=steps), generator)
    trainer = parts(run)[1]
    untrained = []

    class Slow(Trainer):
        def train_step(self, batch: TrainBatch, accepts: Accepts | None = None) -> TrainStats:
            step = len(self.batches)
            may_be = min(step + staleness + 1, steps)
            eventually(lambda: sorted(generator.finished) == list(range(may_be)))
            untrained.append(len(generator.begun) - step)
            assert len(run.ahead._begun) == may_be - step - 1, "nothing is kept besides"
            return super().train_step(batch)

    trainer = Slow()
    run = replace(run, trainer=trainer)
    assert train(run)
    assert untrained == [min(staleness + 1, steps - step) for step in range(steps)]


def test_a_slow_writer_holds_the_trainer_back(tmp_path: Path) -> None:
    """Step 2 is written last of all that may be begun before it is trained on; nothing overtakes it."""
    generator = HeldGenerator(held=[2])
    run = with_generator(make_run(tmp_path, staleness=2, steps=6), generator)
    trainer = parts(run)[1]
    trained_before: list[int] = []

    def let_go() -> None:
        eventually(lambda: sorted(generator.finished) == [0, 1, 3, 4])
        trained_before.append(len(trainer.batches))
        generator.held[2].set()

    helper = threading.Thread(target=let_go)
    helper.start()
    assert train(run)
    helper.join()
    assert trained_before == [2]
    assert generator.finished.index(2) == 4
    for step, batch in enumerate(trainer.batches):
        responses = {token(derive_seed(0, 0, step * PROMPTS, 0), 0, version) for version in range(step + 1)}
        assert responses & {int(i) for row in batch.rows for i in row.tokens.ids}
    assert run.state.prompts == {"position": 6 * PROMPTS}


@pytest.mark.parametrize("save_every", [100, 1], ids=["saved when it ends", "saved before it ends"])
def test_what_was_finished_when_the_run_ended_is_trained_on_by_the_next(tmp_path: Path, save_every: int) -> None:
    """Half of step 4 and all of step 5 were written: they are trained on as they are, and the other half of step 4 is
    drawn again with its seeds."""
    first = HeldGenerator(held=[4, 5], before=PROMPTS * SAMPLES // 2)
    run = with_generator(make_run(tmp_path, staleness=2, save_every=save_every), first)

    def written_since_the_last_save() -> bool:
        if (tmp_path / "checkpoints" / "step-00000004").exists() or (run.state.step == 4 and save_every > 4):
            first.held[5].set()
        return run.state.step == 4 and 5 in first.finished and run.ahead.finished_more(4)

    stopper = stop_once(run, written_since_the_last_save)
    assert not train(run)
    stopper.join()
    newest = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    state = read_state(newest)
    assert (state.step, state.prompts) == (4, {"position": 4 * PROMPTS})
    assert threads() == []

    second = HeldGenerator()
    again = with_generator(make_run(tmp_path, staleness=2, resumed=newest), second)
    assert train(again)
    every = [(0, index, sample) for index in range(4 * PROMPTS, 6 * PROMPTS) for sample in range(SAMPLES)]
    half = PROMPTS * SAMPLES // 2
    assert sorted(second.versions) == every[half : 2 * half], "what was finished is not written again"
    assert {first.versions[name] for name in every if name in first.versions} < {2, 3, 4}, "by older policies"
    versions = {**first.versions, **second.versions}
    for step, batch in enumerate(parts(again)[1].batches, start=4):
        tokens = [row.tokens for row in batch.rows]
        names = [every[(step - 4) * 2 * half + key] for row in batch.rows for key in row.keys]
        ids = [token(derive_seed(0, *name), offset, versions[name]) for name in names for offset in range(LENGTH)]
        assert torch.cat([part.ids for part in tokens]).tolist() == ids
        trained_versions = torch.cat([part.policy_version for part in tokens]).tolist()
        assert trained_versions == [versions[name] for name in names for _ in range(LENGTH)]
    assert [report.step for report in parts(again)[2].reports] == [5, 6]
    assert again.state.prompts == {"position": 6 * PROMPTS}

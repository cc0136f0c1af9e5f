"""metrics.jsonl, events and rollout samples, across a resume that repeats steps."""

from __future__ import annotations

import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemo_opd.observe.measure import rollout_metrics
from nemo_opd.observe.recorder import Recorder
from nemo_opd.types import StepReport
from tests.helpers.rollouts import make_rollout


def _report(step: int, loss: float) -> StepReport:
    return StepReport(step, step, {"loss/total": loss, "time/total": 0.5}, 0.5)


def _lines(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_resume_replaces_the_steps_it_repeats(tmp_path):
    first = Recorder(tmp_path, 0, rollouts_per_step=2, tensorboard=True)
    for step in (1, 2, 3):
        first.write(_report(step, 1.0))
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss/to')  # a crash in the middle of a line
    second = Recorder(tmp_path, 2, rollouts_per_step=2, tensorboard=True)
    second.write(_report(3, 2.0))
    second.write_evaluation(3, {"evaluation/avg": 0.5})
    second.close()
    assert [(line["step"], line.get("loss/total")) for line in _lines(tmp_path)] == [
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
        (3, None),
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/total")] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_a_run_that_starts_over_forgets_every_step(tmp_path):
    for loss in (1.0, 2.0):  # the second start found no checkpoint
        recorder = Recorder(tmp_path, 0, rollouts_per_step=0, tensorboard=True)
        recorder.write(_report(1, loss))
        recorder.close()
    assert [line["loss/total"] for line in _lines(tmp_path)] == [2.0]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/total")] == [(1, 2.0)]


def test_rollout_samples_show_several_prompts(tmp_path):
    recorder = Recorder(tmp_path, 0, rollouts_per_step=3, tensorboard=False)
    recorder.write_rollouts(1, [make_rollout(i, 4, sample=s, reward=1.0) for i in range(3) for s in (0, 1)])
    recorder.close()
    lines = [json.loads(line) for line in (tmp_path / "rollouts" / "step-00000001.jsonl").read_text().splitlines()]
    assert [(line["index"], line["sample"]) for line in lines] == [(0, 0), (1, 0), (2, 0)]
    assert lines[0]["policy_version"] == 7
    assert lines[0]["response_tokens"] == 4
    assert lines[0]["finish"] == "eos"


def test_rollout_metrics_are_means_over_rollouts():
    metrics = rollout_metrics([make_rollout(0, 2, reward=1.0), make_rollout(1, 6, reward=0.0)])
    assert metrics["reward/mean"] == 0.5
    assert metrics["response/length"] == 4.0
    assert metrics["response/length_max"] == 6.0
    assert metrics["response/eos_share"] == 1.0
    assert "reward/mean" not in rollout_metrics([make_rollout(0, 2)])

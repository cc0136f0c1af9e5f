"""metrics.jsonl, events and rollout samples, across a resume that repeats steps."""

from __future__ import annotations

import json
import math

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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


def test_what_the_diagnosis_said_of_repeated_steps_is_forgotten(tmp_path):
    first = Recorder(tmp_path, 0, rollouts_per_step=0, tensorboard=False)
    first.write_findings([])
    assert not (tmp_path / "diagnosis.jsonl").exists()
    for step in (3, 8):
        first.write_findings([{"step": step, "sign": "repetition"}])
    first.close()
    Recorder(tmp_path, 5, rollouts_per_step=0, tensorboard=False).close()
    assert [json.loads(line)["step"] for line in (tmp_path / "diagnosis.jsonl").read_text().splitlines()] == [3]


def test_a_run_that_starts_over_forgets_every_step(tmp_path):
    for loss in (1.0, 2.0):  # the second start found no checkpoint
        recorder = Recorder(tmp_path, 0, rollouts_per_step=0, tensorboard=True)
        recorder.write(_report(1, loss))
        recorder.close()
    assert [line["loss/total"] for line in _lines(tmp_path)] == [2.0]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/total")] == [(1, 2.0)]


def test_tokens_are_written_beside_their_text(tmp_path):
    rollout = make_rollout(0, 4)
    rollout.sampler_logprobs[1] = math.nan
    scores = {0: {"kl": torch.tensor([0.123456, math.nan, math.inf, 2.0])}}
    recorder = Recorder(tmp_path, 0, 1, tensorboard=False, piece=lambda token: f"<{token}>")
    recorder.write_rollouts(1, [rollout], scores)
    recorder.write_rollouts(2, [rollout])
    recorder.close()
    first, second = (json.loads((tmp_path / "rollouts" / f"step-0000000{step}.jsonl").read_text()) for step in (1, 2))
    tokens = first["tokens"]
    assert tokens["id"] == rollout.response_ids.tolist()
    assert tokens["text"] == [f"<{token}>" for token in tokens["id"]]
    assert tokens["author"] == ["student"] * 4
    assert tokens["trained"] == rollout.loss_mask.tolist()
    assert tokens["kl"] == [0.1235, None, None, 2.0]
    assert tokens["sampler_logprob"][1] is None and tokens["sampler_logprob"][0] < 0
    assert "tokens" not in second


def test_rollout_samples_show_several_prompts(tmp_path):
    recorder = Recorder(tmp_path, 0, rollouts_per_step=3, tensorboard=False)
    recorder.write_rollouts(1, [make_rollout(i, 4, sample=s, reward=1.0) for i in range(3) for s in (0, 1)])
    recorder.close()
    lines = [json.loads(line) for line in (tmp_path / "rollouts" / "step-00000001.jsonl").read_text().splitlines()]
    assert [(line["index"], line["sample"]) for line in lines] == [(0, 0), (1, 0), (2, 0)]
    assert lines[0]["policy_version"] == 7
    assert lines[0]["response_tokens"] == 4
    assert lines[0]["finish"] == "eos"

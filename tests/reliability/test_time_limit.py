"""A run whose time is over stops by itself, between two steps or within a rollout, with what it has trained saved."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from nemo_opd.configuration.load import load
from nemo_opd.reliability.budget import ENDING_SECONDS
from nemo_opd.reliability.outcome import EXIT_CODES, Status, read_outcome
from tests.helpers.ranks import RankPool
from tests.helpers.workspace import make_workspace

SECONDS = 3.0
"""What is left for steps."""


def _run(rank: int, overrides: Sequence[str]) -> tuple[int, float]:
    from nemo_opd import session
    from nemo_opd.engines.megatron.parallel import destroy_student_groups

    destroy_student_groups()
    begin = time.monotonic()
    return session.run(load(None, overrides)), time.monotonic() - begin


@pytest.mark.parametrize(("samples", "tokens"), [(1, 8), (4096, 220)])
def test_it_stops_at_the_same_step_on_all_ranks(ranks2: RankPool, tmp_path: Path, samples: int, tokens: int) -> None:
    """Steps of a moment, then one whose rollouts would take far longer than there is."""
    folder = make_workspace(tmp_path)
    values = {
        **{"run.dir": folder / "run", "run.time_limit": SECONDS + ENDING_SECONDS, "student.model": folder / "student"},
        **{"student.dtype": "float32", "teacher.model": folder / "teacher", "teacher.dtype": "float32"},
        **{"data.path": folder / "train.jsonl", "data.max_prompt_tokens": 32, "rollout.samples_per_prompt": samples},
        **{"rollout.max_new_tokens": tokens, "train.steps": 100000, "train.prompts_per_step": 2},
        **{"checkpoint.every": 100000, "observe.progress": "false", "observe.tensorboard": "false"},
    }
    answers = ranks2.run(_run, [f"{name}={value}" for name, value in values.items()])
    assert [code for code, _ in answers] == [EXIT_CODES[Status.PREEMPTED]] * 2
    outcome = read_outcome(folder / "run")
    assert outcome is not None
    assert outcome.status is Status.PREEMPTED
    assert outcome.reason.startswith("time limit: ")
    checkpoints = [path.name for path in (folder / "run" / "checkpoints").iterdir()]
    if samples == 1:
        assert outcome.step is not None
        assert outcome.step >= 1
        assert checkpoints == [f"step-{outcome.step:08d}"]
    else:
        assert (outcome.step, checkpoints) == (0, []), "the first rollouts were broken off"

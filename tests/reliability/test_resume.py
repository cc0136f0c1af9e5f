"""A run that ends in the middle and goes on in fresh processes is the run that never ended: every tensor of its last
checkpoint, all that it remembers, every rollout."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.helpers.checkpoints import different_bits, stored
from tests.helpers.figures import record
from tests.helpers.ranks import RankPool
from tests.helpers.workspace import make_workspace, workspace_config

pytestmark = pytest.mark.slow

STEPS, SAVED, KILLED_IN = 20, 10, 12
"""An epoch has 16 steps; the second attempt begins with step 11 and comes to the second epoch."""
COMMON = (f"train.steps={STEPS}", f"checkpoint.every={SAVED}", "checkpoint.export_at_end=false",
          "optimizer.decay=cosine", "optimizer.warmup_steps=3", "observe.rollouts_per_step=100")  # fmt: skip
PLAIN = ("student.tensor_model_parallel_size=2", "teacher.pipeline_model_parallel_size=2", "student.dtype=bfloat16")
SMALL = ("stop.window=2", "stop.consecutive=2", "stop.warmup_samples=8", "stop.warmup_steps=1", "stop.k=8",
         "rollout.max_new_tokens=14", "stop.segment_tokens=3")  # fmt: skip
KAT = ("algorithm=kat", "student.tensor_model_parallel_size=2", *SMALL)
EMA = ("teacher.model=null", "teacher.source=ema", "teacher.decay=0.8", "student.tensor_model_parallel_size=2",
       "context=privileged", "context.text=answer in base 4.", "context.max_tokens=32", "data.max_prompt_tokens=64",
       "optimizer.lr=1e-2")  # fmt: skip
CASES = {"opd": PLAIN, "kat": KAT, "ema": EMA}


class _KilledError(Exception):
    """In the place of a process that is no more."""


def _run(rank: int, folder: str, run_dir: str, overrides: Sequence[str], kill: tuple[str, int] | None = None) -> bool:
    """Start or resume; False when it was killed: ``("step", n)`` before step n + 1 is trained, ``("trained", n)`` when
    step n is and its checkpoint is not begun, ``("saved", n)`` when the checkpoint stands."""
    from nemo_opd import loop, session
    from nemo_opd.engines.megatron.parallel import destroy_student_groups

    destroy_student_groups()
    one_step, save = loop.one_step, loop.save

    def step(run: Any) -> Any:
        if kill == ("step", run.state.step):
            raise _KilledError
        return one_step(run)

    def saved(run: Any) -> None:
        if kill == ("trained", run.state.step):
            raise _KilledError
        save(run)
        if kill == ("saved", run.state.step):
            raise _KilledError

    Path(run_dir).mkdir(exist_ok=True)
    config = workspace_config(Path(folder), *overrides, run_dir=Path(run_dir))
    with mock.patch.object(loop, "one_step", step), mock.patch.object(loop, "save", saved):
        try:
            return session.run(config) == 0
        except _KilledError:
            return False


@pytest.fixture(scope="module")
def fresh() -> Iterator[RankPool]:
    """Processes in which no run has begun."""
    pool = RankPool(2)
    yield pool
    pool.close()


def _remembered(run_dir: Path) -> dict[str, Any]:
    """The state of the last checkpoint, and the metrics of every step but times."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [{k: v for k, v in line.items() if not k.startswith(("time/", "speed/", "straggler/"))} for line in lines]
    state = json.loads((run_dir / "checkpoints" / f"step-{STEPS:08d}" / "state.json").read_text())
    return {"steps": steps, **state}


def _hashes(run_dir: Path) -> tuple[str, str]:
    """SHA-256 of (epoch, prompt) in their order, and of all that is known of the rollouts."""
    lines = [
        line for path in sorted((run_dir / "rollouts").glob("step-*.jsonl")) for line in path.read_text().splitlines()
    ]
    prompts = [(rollout["epoch"], rollout["index"]) for rollout in map(json.loads, lines)]
    return hashlib.sha256(str(prompts).encode()).hexdigest(), hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_undisturbed_one(
    ranks1: RankPool, ranks2: RankPool, fresh: RankPool, tmp_path: Path, name: str
) -> None:
    folder = make_workspace(tmp_path, problems=64)
    whole, parts, settings = tmp_path / "whole", tmp_path / "parts", (*CASES[name], *COMMON)
    assert ranks2.run(_run, str(folder), str(whole), settings) == [True, True]
    assert ranks2.run(_run, str(folder), str(parts), settings, ("step", KILLED_IN)) == [False, False]
    assert max(path.name for path in (parts / "checkpoints").iterdir()) == f"step-{SAVED:08d}"
    assert fresh.run(_run, str(folder), str(parts), settings) == [True, True]

    ours, theirs = _remembered(parts), _remembered(whole)
    assert ours == theirs
    assert ours["prompts"]["epoch"] == 1 and len(ours["steps"]) == STEPS
    assert _hashes(parts) == _hashes(whole)
    ends = [run_dir / "checkpoints" / f"step-{STEPS:08d}" / "model" for run_dir in (parts, whole)]
    (tensors, rest), (expected, other) = (ranks1.run(stored, str(end))[0] for end in ends)
    assert sum("exp_avg" in name for name in tensors) > 8, "blind without the optimizer's moments"
    assert rest.keys() == other.keys() and {k: v for k, v in rest.items() if "step" in k} == {
        k: v for k, v in other.items() if "step" in k
    }
    different, count = different_bits(tensors, expected)
    assert different == 0
    if name == "ema":
        assert sum("average" in key for key in tensors) > 8, "blind without the teacher's weights"
    if name == "kat":
        [history] = ours["algorithm"].values()
        assert history["steps"] == STEPS and ours["steps"][-1]["kat/threshold"] > 0
    what = f"tensors that differ, {name}, {STEPS} steps against {SAVED} + {STEPS - SAVED}"
    record("R2", what, f"{different} / {count}")


def test_no_prompt_is_lost_or_repeated_with_other_numbers_of_replicas(
    ranks1: RankPool, ranks2: RankPool, tmp_path: Path
) -> None:
    """Three epochs of 22 prompts, 4 a step: one epoch ends within a step, the next with one, and that is where a kill
    falls. Two replicas, one, two, two and one."""
    folder, run_dir = make_workspace(tmp_path, problems=22), tmp_path / "run"
    settings = ("train.steps=17", "checkpoint.every=1", "checkpoint.export_at_end=false",
                "observe.rollouts_per_step=100", "observe.token_scores=0")  # fmt: skip
    kills = [(ranks2, ("trained", 4)), (ranks1, ("step", 6)), (ranks2, ("saved", 11)), (ranks2, ("trained", 13))]
    for pool, kill in kills:
        assert not any(pool.run(_run, str(folder), str(run_dir), settings, kill))
    assert all(ranks1.run(_run, str(folder), str(run_dir), settings))
    found: Counter[tuple[int, int]] = Counter()
    for step in range(1, 18):
        for line in (run_dir / "rollouts" / f"step-{step:08d}.jsonl").read_text().splitlines():
            rollout = json.loads(line)
            found[rollout["epoch"], rollout["index"]] += 1
    assert set(found.values()) == {2}, "both samples of a prompt, once"
    whole = {(epoch, index) for epoch in range(3) for index in range(22)}
    assert whole <= set(found) and len(found) == 17 * 4
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 18))
    record("R5", f"prompts lost, prompts repeated; {len(kills)} kills, replicas 2, 1, 2, 2, 1", "0, 0")

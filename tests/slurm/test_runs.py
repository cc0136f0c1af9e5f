"""Runs on a real SLURM of two nodes: submitted, preempted, cancelled, broken. Jobs come one after the other."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from nemo_opd.configuration.load import load
from tests.helpers.figures import record
from tests.slurm.cluster import Cluster, until
from tests.slurm.site import SLOW_STEPS, STEPS, Run, Site

pytestmark = pytest.mark.slow

HOSTILE = 'it\'s $(touch canary) `touch canary`; "quoted" \\ & > canary'
PROMPT = f"data.system_prompt=two\nlines {HOSTILE[:24]}"


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> Run:
    """Submitted twice through submit.sh, into a folder whose name is trouble."""
    run = site.run(HOSTILE.replace("/", ""))
    words = ["slurm/submit.sh", "--jobs=2", "--nodes=2", f"--output={site.folder.parent}/outputs/%j", "recipe.yaml"]
    said = site.cluster.call("bash", *words, f"run.dir=runs/{run.folder.name}", PROMPT, cwd=site.folder)
    first, second = (line.rpartition(" ")[2] for line in said.splitlines())
    until(lambda: site.cluster.job(second)["Reason"] == "Dependency", 30, "job that waits for the first")
    assert site.cluster.job(first)["JobName"] == site.cluster.job(second)["JobName"]
    found = site.wait(first, "COMPLETED")
    assert (found["ExitCode"], found["Restarts"]) == ("0:0", "0")
    assert run.outcome == {"status": "done", "step": STEPS, "reason": "", "attempt": f"slurm-{first}-0", "rank": 0}
    site.wait(second, "COMPLETED", seconds=60)
    assert site.output(second).endswith(f"is done, at step {STEPS}\n")
    assert run.outcome["attempt"] == f"slurm-{first}-0", "the second job had nothing to do"
    return run


def test_a_run_over_two_nodes_and_words_that_are_trouble(undisturbed: Run, site: Site) -> None:
    assert undisturbed.steps == list(range(1, STEPS + 1))
    logs = {path.name for path in (undisturbed.folder / "logs").iterdir()}
    assert {"node-n1-trainer.txt", "node-n2-trainer.txt", "rank-1.txt"} <= logs
    config = load(undisturbed.folder / "config.yaml", checked=False)
    assert config.data.system_prompt == PROMPT.partition("=")[2]
    assert config.run.dir == f"runs/{undisturbed.folder.name}"
    everywhere = [*site.folder.rglob("canary"), *site.cluster.folder.rglob("canary"), *Path("/").glob("canary")]
    assert everywhere == [], "nothing of the words was executed"
    assert not list((undisturbed.folder / "control").glob("job-*"))


def test_preempted_by_a_signal_then_by_slurm_it_ends_with_the_same_weights(undisturbed: Run, site: Site) -> None:
    """Each time it saves and is requeued once: by us after USR1 to the batch script, by SLURM with PreemptMode=REQUEUE,
    where SIGTERM reaches the batch script, srun and all processes at once."""
    run = site.run("preempted")
    job = site.submit(run, PROMPT, faults=SLOW_STEPS)
    run.wait_for_step(2, job)
    site.cluster.call("scancel", "--signal=USR1", "--batch", job)
    asked = time.monotonic()
    until(lambda: run.outcome.get("status") == "preempted", 120, "outcome", lambda: site.explain(job))
    record("R8", "seconds from USR1 to a checkpoint and an outcome, steps of 1 s", f"{time.monotonic() - asked:.1f}")
    site.wait(job, "RUNNING", restarts=1)
    first = int(run.checkpoints[-1].removeprefix("step-"))
    assert 2 <= first < STEPS
    assert f"slurm-{job}-0: preempted at step {first}: " in site.output(job)

    run.wait_for_step(first + 1, job)
    options = ["--parsable", "--output=/dev/null", "--partition=urgent", "--nodes=2", "--exclusive"]
    urgent = site.cluster.call("sbatch", *options, "--wrap=sleep 1")
    site.wait(urgent, "COMPLETED")
    assert f"slurm-{job}-1: preempted at step" in site.output(job)
    assert "SLURM is ending this job itself; not requeued from here" in site.output(job)

    found = site.wait(job, "COMPLETED", restarts=2)
    assert (found["Restarts"], found["ExitCode"]) == ("2", "0:0"), "one requeue for each preemption"
    assert (run.outcome["status"], run.outcome["step"]) == ("done", STEPS)
    assert run.steps == list(range(1, STEPS + 1))
    assert run.digest == undisturbed.digest
    record("R8", "requeues after USR1 and after SLURM's own preemption, final weights equal", "1, 1, yes")


def test_a_node_fails_and_the_run_goes_on_until_it_is_cancelled(cluster: Cluster, site: Site) -> None:
    run = site.run("node")
    job = site.submit(run, "checkpoint.every=1", faults=SLOW_STEPS)
    run.wait_for_step(2, job)
    cluster.kill_node("n2")
    until(lambda: cluster.job(job)["Restarts"] == "1", 120, "requeue", lambda: site.explain(job))
    cluster.start_node("n2")
    site.wait(job, "RUNNING", restarts=1)
    run.wait_for_step(3, job)
    before = run.outcome
    assert before == {}, "an attempt that runs has no outcome"
    cluster.call("scancel", job)
    found = site.wait(job, "CANCELLED", restarts=1)
    until(lambda: run.outcome != {}, 120, "outcome", lambda: site.explain(job))
    assert found["Restarts"] == "1", "a cancelled job is not requeued"
    record("R8", "requeues after a node failed, and after scancel", "1, 0")
    assert (run.outcome["status"], run.outcome["attempt"]) == ("preempted", f"slurm-{job}-1")
    assert run.checkpoints[-1] == f"step-{run.outcome['step']:08d}", "it saved before it ended"
    until(lambda: cluster.call("squeue", "--noheader") == "", 90, "empty queue", lambda: site.explain(job))


def test_what_cannot_work_is_not_started_again(site: Site) -> None:
    refused = site.submit(site.run("refused"), "train.steps=0")
    assert site.wait(refused, "FAILED", seconds=60)["ExitCode"] == "2:0"
    assert site.output(refused).startswith("error: train.steps: got 0; expected at least 1;")
    assert not site.run("refused").folder.exists()

    run = site.run("unusable")
    job = site.submit(run, "data.max_prompt_tokens=2")
    found = site.wait(job, "FAILED")
    assert (found["ExitCode"], found["Restarts"]) == ("2:0", "0")
    assert run.outcome["status"] == "config_error"
    record("R8", "requeues after a configuration error", found["Restarts"])
    assert "data.path" in run.outcome["reason"]


def test_a_crash_that_comes_every_time_is_given_up_after_three_starts(site: Site) -> None:
    run = site.run("crash")
    job = site.submit(run, faults="step.trained=kill rank=1")
    found = site.wait(job, "FAILED")
    assert (found["Restarts"], found["ExitCode"]) == ("2", "70:0")
    assert run.outcome["status"] == "failed"
    attempts = ", ".join(f"slurm-{job}-{number}" for number in range(3))
    assert run.outcome["reason"].startswith(
        f"given up after 3 starts that came no further than the beginning ({attempts}): "
    )
    again = site.submit(run)
    assert site.wait(again, "FAILED", seconds=60)["ExitCode"] == "70:0"
    assert "is held: given up after 3 starts" in site.output(again)
    assert run.outcome["attempt"] == f"slurm-{job}-2", "nothing was started"
    record("R16", "starts of a run that crashes at its first step, on SLURM", str(1 + int(found["Restarts"])))
    assert json.loads((run.folder / "control" / "starts.json").read_text())["failures"] == []

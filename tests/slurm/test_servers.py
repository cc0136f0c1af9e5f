"""vLLM servers on nodes of their own, as steps of a job and as a job of their own."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from nemo_opd.configuration.load import load
from tests.helpers.servers import need_vllm
from tests.slurm.cluster import Cluster, until
from tests.slurm.site import SECONDS, SLOW_STEPS, STEPS, Site

pytestmark = pytest.mark.slow


def test_a_step_of_servers_dies_and_the_run_goes_on(cluster: Cluster, site: Site) -> None:
    """The trainer on one node, the writer on the other. Without its only writer the trainer fails; the job is requeued
    and goes on from the checkpoint with servers of its own again."""
    need_vllm()
    run = site.run("servers")
    words = ["rollout.engine=vllm", "rollout.dtype=float32", "cluster.rollout_nodes=1", "checkpoint.every=1"]
    job = site.submit(run, *words, "teacher.pipeline_model_parallel_size=1", faults=SLOW_STEPS)
    run.wait_for_step(2, job)
    folder = run.folder / "control" / f"job-slurm-{job}-0"
    assert ((folder / "key").stat().st_mode & 0o777, folder.stat().st_mode & 0o777) == (0o600, 0o700)
    assert cluster.kill_tasks("n2", "nemo_opd.cluster.node") == 1
    site.wait(job, "RUNNING", restarts=1)
    assert "the rollout servers on n2 ended and are started again" in site.output(job)
    (failure,) = json.loads((run.folder / "control" / "starts.json").read_text())["failures"]
    assert failure[0] == f"slurm-{job}-0"
    assert failure[1] >= 2

    found = site.wait(job, "COMPLETED", restarts=1)
    assert (found["Restarts"], run.outcome["status"], run.outcome["step"]) == ("1", "done", STEPS)
    assert run.steps == list(range(1, STEPS + 1))
    logs = {path.name for path in (run.folder / "logs").iterdir()}
    assert {"node-n1-trainer.txt", "node-n2-rollout.txt", "vllm-rollout-n2-0.txt"} <= logs
    config = load(run.folder / "config.yaml", checked=False)
    assert str(config.rollout.servers.urls).startswith("http://127.0.0.1:")
    assert not list((run.folder / "control").glob("job-*")), "neither key nor weights are left"


def test_a_standing_teacher(cluster: Cluster, site: Site) -> None:
    need_vllm()
    service = site.folder / "service"
    words = ["recipe.yaml", "loss=policy_gradient", "teacher.engine=vllm", "teacher.pipeline_model_parallel_size=1"]
    options = ["--parsable", "--nodes=1", f"--output={site.folder.parent}/outputs/%j"]
    job = cluster.call("sbatch", *options, "slurm/teacher.sh", "service", *words, cwd=site.folder)
    until((service / "settings").exists, SECONDS, "settings of the service", lambda: site.explain(job))
    url, key_file = (line.partition("=")[2] for line in (service / "settings").read_text().splitlines())
    assert key_file == "service/key"
    key = (site.folder / key_file).read_text().strip()
    assert _health(url, key)["status"] == "ready"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        _health(url, "another")
    cluster.call("scancel", job)
    until(lambda: cluster.call("squeue", "--noheader") == "", 90, "empty queue", lambda: site.explain(job))
    assert not (service / "settings").exists(), "nobody is told of servers that are gone"
    assert not Path(site.folder / "service" / "control" / f"job-slurm-{job}-0").exists()


def _health(url: str, key: str) -> dict[str, object]:
    request = urllib.request.Request(f"{url}/health", headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        found: dict[str, object] = json.loads(answer.read())
        return found

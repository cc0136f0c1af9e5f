"""A job, or the script that asks for one, against the recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_opd.config import Config
from nemo_opd.doctor.finding import Finding, Verdict
from nemo_opd.doctor.slurm import all_processes, directives, show_job, slurm_findings
from tests.helpers.workspace import make_workspace, workspace_config

ROOT = Path(__file__).parents[3]
SAID = "JobId=7 JobName=opd Requeue=1 Restarts=0 RunTime=00:00:01 TimeLimit=04:00:00 TimeMin=N/A\n"
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4", "SLURM_GPUS_ON_NODE": "8", "NEMO_OPD_GRACE": "180"}

THREE = {"SLURM_GPUS_ON_NODE": "3"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("slurm"), problems=4)


def recipe(workspace: Path, *words: str, rollout_nodes: int = 0) -> Config:
    """Of a student at TP 2 and PP 2."""
    layout = ("student.tensor_model_parallel_size=2", "student.pipeline_model_parallel_size=2")
    config = workspace_config(workspace, *layout, *words)
    if rollout_nodes:
        config = replace(config, rollout=replace(config.rollout, engine="vllm"))
    return replace(config, cluster=replace(config.cluster, rollout_nodes=rollout_nodes))


def rows(
    config: Config, environment: Mapping[str, str], said: str = SAID, folder: Path = Path("/nowhere")
) -> dict[str, Finding]:
    found = slurm_findings(config, environment, lambda number: said, folder)
    assert all(row.way_out for row in found if row.verdict in (Verdict.WARN, Verdict.FAIL))
    return {row.name.removeprefix("slurm: "): row for row in found}


def test_a_job_that_fits(workspace: Path) -> None:
    found = rows(recipe(workspace, rollout_nodes=1), JOB)
    assert {row.verdict for row in found.values()} == {Verdict.OK}
    assert found["nodes and processes"].found == "3 x 8 = 24, 1 of rollout servers"
    assert found["nodes and processes"].bound == "a multiple of 4 processes"
    assert found["end of the job"].found == "limit 04:00:00"


@pytest.mark.parametrize(
    ("environment", "rollout_nodes", "row", "verdict"),
    [
        ({"SLURM_JOB_NUM_NODES": "2"}, 2, "nodes and processes: --nodes", Verdict.FAIL),
        ({"SLURM_JOB_NUM_NODES": "2", **THREE}, 0, "nodes and processes: train.processes", Verdict.FAIL),
        ({"SLURM_JOB_NUM_NODES": "4", **THREE}, 0, "nodes and processes", Verdict.OK),
        ({"SLURM_JOB_NUM_NODES": ""}, 0, "nodes and processes", Verdict.WARN),
        (
            {"SLURM_HET_SIZE": "2", "SLURM_JOB_NUM_NODES_HET_GROUP_0": "2", "SLURM_JOB_NUM_NODES_HET_GROUP_1": "1"},
            1,
            "nodes and processes",
            Verdict.OK,
        ),
        (
            {"SLURM_HET_SIZE": "2", "SLURM_JOB_NUM_NODES_HET_GROUP_0": "2", "SLURM_JOB_NUM_NODES_HET_GROUP_1": "2"},
            1,
            "nodes and processes: nodes of the rollout component",
            Verdict.FAIL,
        ),
    ],
)  # fmt: skip
def test_nodes_of_a_job(
    workspace: Path, environment: dict[str, str], rollout_nodes: int, row: str, verdict: Verdict
) -> None:
    found = rows(recipe(workspace, rollout_nodes=rollout_nodes), {**JOB, **environment})
    assert found[row].verdict is verdict


def test_one_node_where_a_person_starts_what_they_like(workspace: Path) -> None:
    """A shell of salloc on one GPU: opd.sh would refuse, `train` by hand starts four processes."""
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "1"}
    row = "nodes and processes: train.processes"
    assert rows(recipe(workspace), job)[row].verdict is Verdict.WARN
    assert rows(recipe(workspace), {**job, "NEMO_OPD_GRACE": "180"})[row].verdict is Verdict.FAIL
    assert rows(recipe(workspace), {**job, "SLURM_JOB_NUM_NODES": "3"})[row].verdict is Verdict.FAIL


def test_processes_that_a_job_gives(workspace: Path) -> None:
    config = recipe(workspace, rollout_nodes=1)
    assert all_processes(config, JOB) == 24
    assert all_processes(config, {}) == 4
    assert all_processes(config, {**JOB, "SLURM_JOB_NUM_NODES": "1"}) == 4, "the servers have no node: the smallest"


@pytest.mark.parametrize(("seconds", "verdict"), [(None, Verdict.OK), (100.0, Verdict.OK), (200.0, Verdict.WARN)])
def test_the_last_save_against_the_grace(
    workspace: Path, tmp_path: Path, seconds: float | None, verdict: Verdict
) -> None:
    config = recipe(workspace)
    config = replace(config, run=replace(config.run, dir=str(tmp_path)))
    if seconds is not None:
        (tmp_path / "control").mkdir()
        (tmp_path / "control" / "last-save.json").write_text(json.dumps({"seconds": seconds}))
    assert rows(config, JOB)["last save, s"].verdict is verdict


@pytest.mark.parametrize(("said", "requeue", "end"), [
    ("Requeue=0 TimeLimit=UNLIMITED", Verdict.WARN, Verdict.OK),
    ("", Verdict.WARN, Verdict.WARN),
])  # fmt: skip
def test_what_slurm_says_of_the_job(workspace: Path, said: str, requeue: Verdict, end: Verdict) -> None:
    found = rows(recipe(workspace), JOB, said)
    assert (found["requeue"].verdict, found["end of the job"].verdict) == (requeue, end)
    assert rows(recipe(workspace), {**JOB, "NEMO_OPD_END_TIME": "1"}, "")["end of the job"].verdict is Verdict.OK


def test_slurm_that_does_not_answer() -> None:
    assert show_job("none") == ""


def test_outside_of_slurm(workspace: Path, tmp_path: Path) -> None:
    (row,) = rows(recipe(workspace), {"PATH": str(tmp_path)}).values()
    assert row.verdict is Verdict.SKIPPED


# --- before there is a job


@pytest.fixture
def queue(tmp_path: Path) -> dict[str, str]:
    """An environment with sbatch."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").touch(mode=0o755)
    return {"PATH": str(tmp_path / "bin")}


def scripts(folder: Path, directives: str, site: str) -> Path:
    (folder / "slurm").mkdir()
    (folder / "slurm" / "opd.sh").write_text(f"#!/bin/bash\n{directives}\n# why\nset -e\n#SBATCH --nodes=99\n")
    (folder / "slurm" / "env.sh").write_text(site)
    return folder


def test_the_scripts_as_they_are(workspace: Path, queue: dict[str, str]) -> None:
    found = rows(recipe(workspace, rollout_nodes=2), queue, folder=ROOT)
    assert {row.verdict for row in found.values()} == {Verdict.OK}
    assert found["nodes to ask for"].found == "--nodes=3 or more, 2 of them for servers"
    assert found["signal before the end, s"].found == 180.0


def test_scripts_that_do_not_fit(workspace: Path, queue: dict[str, str], tmp_path: Path) -> None:
    lines = "#SBATCH --nodes=3\n#SBATCH --gpus-per-node=h100:6\n#SBATCH --no-requeue\n#SBATCH --signal=B:USR1@60"
    found = rows(recipe(workspace), queue, folder=scripts(tmp_path, lines, "grace=300 # slow disk\n"))
    assert found["nodes and processes: train.processes"].verdict is Verdict.FAIL
    assert found["signal before the end, s"].verdict is found["requeue"].verdict is Verdict.WARN
    assert found["last save, s"].bound == "at most 300"


def test_processes_per_node_of_the_site(workspace: Path, queue: dict[str, str], tmp_path: Path) -> None:
    lines = "#SBATCH --nodes=3\n#SBATCH --gpus-per-node=6"
    found = rows(
        recipe(workspace), queue, folder=scripts(tmp_path, lines, "processes_per_node=4 grace=60\n# grace=7\n")
    )
    assert found["nodes and processes"].found == "3 x 4 = 12" and found["last save, s"].bound == "at most 60"
    assert found["signal before the end, s"].verdict is Verdict.WARN


def test_no_script_here(workspace: Path, queue: dict[str, str]) -> None:
    assert [row.verdict for row in rows(recipe(workspace), queue).values()] == [Verdict.SKIPPED]


def test_directives_end_with_the_first_command() -> None:
    script = "#!/bin/bash\n#SBATCH --nodes=2\n\n# text\n#SBATCH --requeue\nset -e\n#SBATCH --nodes=9\n"
    assert directives(script) == {"nodes": "2", "requeue": None}

"""slurm/opd.sh with stand-ins for `srun` and `scontrol` on PATH that record what they are given. A run under a real
SLURM is another test's business."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.unit.configuration.workspace import make_workspace

SLURM = Path(__file__).parents[2] / "slurm"

SRUN = """#!/usr/bin/env bash
printf '%s\\0' "$@" >> "$RECORD/srun"
printf '\\0' >> "$RECORD/srun"
printf '%s\\n' "$NEMO_OPD_ATTEMPT $OMP_NUM_THREADS ${MASTER_ADDR-unset}" > "$RECORD/environment"
"""
SCONTROL = """#!/usr/bin/env bash
case "$*" in
    "show hostnames n[1-2]") printf 'n1\\nn2\\n' ;;
    "show node --oneliner n1") printf 'NodeName=n1 Arch=x86_64 NodeAddr=10.0.0.1 NodeHostName=h\\n' ;;
    *) exit 1 ;;
esac
"""
HOSTILE = [
    "data.system_prompt=two words",
    "data.system_prompt=$(touch canary)",
    "data.system_prompt=`touch canary`; touch canary",
    "data.system_prompt='single' \"double\" \\ * ~ & | > canary",
    "data.system_prompt=first line\nsecond line",
    "data.system_prompt=",
]


@dataclass
class Site:
    """A submit folder with a recipe and the script's copy elsewhere, as sbatch would run it."""

    folder: Path
    spool: Path
    record: Path

    def submit(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(self.spool / "slurm_script"), *words]
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMP_"))}
        variables |= {
            "PATH": f"{self.spool}:{os.environ['PATH']}",
            "RECORD": str(self.record),
            "SLURM_JOB_ID": "1234567",
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_CPUS_ON_NODE": "8",
            "SLURM_GPUS_ON_NODE": "2",
            "SLURM_PROCID": "0",
            "SLURM_NTASKS": "2",
            "MASTER_ADDR": "left-over",
            "MASTER_PORT": "1",
            **environment,
        }
        variables = {name: value for name, value in variables.items() if value != "unset"}
        return subprocess.run(command, env=variables, cwd="/", capture_output=True, text=True, check=False)

    def calls(self) -> list[list[str]]:
        """The argument lists that srun was called with, in order."""
        path = self.record / "srun"
        return [call.split("\0") for call in path.read_text().split("\0\0")[:-1]] if path.exists() else []

    def write_env(self, text: str) -> None:
        (self.folder / "slurm" / "env.sh").write_text(text)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path / "a project's $HOME", tmp_path / "spool", tmp_path / "record")
    for folder in (site.folder / "slurm", site.spool, site.record):
        folder.mkdir(parents=True)
    make_workspace(site.folder)
    shutil.copy(SLURM / "opd.sh", site.spool / "slurm_script")
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (site.spool / name).write_text(text)
        (site.spool / name).chmod(0o755)
    site.write_env(f"python=({sys.executable})\n")
    return site


def test_syntax() -> None:
    for script in SLURM.glob("*.sh"):
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


def test_torchrun_runs_once_per_node_with_slurm_s_rendezvous(site: Site) -> None:
    done = site.submit("recipe.yaml", "train.steps=5")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert site.calls() == [
        [
            *("--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=8", "--kill-on-bad-exit=1"),
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=10.0.0.1:30567", "--rdzv-id=slurm-1234567-0"),
            *("-m", "nemo_opd.cli", "train", "recipe.yaml", "train.steps=5"),
        ]
    ]
    assert (site.record / "environment").read_text() == "slurm-1234567-0 4 unset\n"


def test_a_restarted_job_is_another_attempt(site: Site) -> None:
    assert site.submit("recipe.yaml", SLURM_RESTART_COUNT="3", OMP_NUM_THREADS="1").returncode == 0
    assert (site.record / "environment").read_text() == "slurm-1234567-3 1 unset\n"


@pytest.mark.parametrize("word", HOSTILE)
def test_words_arrive_as_they_were_typed(site: Site, word: str) -> None:
    done = site.submit("recipe.yaml", word, "train.steps=5")
    assert (done.returncode, done.stderr) == (0, "")
    assert site.calls()[0][-3:] == ["recipe.yaml", word, "train.steps=5"]
    assert not list(site.folder.parent.rglob("canary"))


def test_without_a_recipe_it_prints_its_usage_and_fails(site: Site) -> None:
    done = site.submit()
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sbatch [sbatch options] slurm/opd.sh RECIPE [key=value ...]\n")
    assert "\nerror: RECIPE: got nothing; expected a recipe; name one" in done.stderr
    assert site.calls() == []


def test_help_is_no_failure(site: Site) -> None:
    done = site.submit("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: sbatch")


def test_outside_a_job_it_says_how_to_call_it(site: Site) -> None:
    done = site.submit("recipe.yaml", SLURM_JOB_ID="unset")
    assert done.returncode == 2
    assert done.stderr == "error: SLURM_JOB_ID: got nothing; expected a SLURM job; run: sbatch slurm/opd.sh RECIPE\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone.yaml"], "error: gone.yaml: got no such file; expected a recipe;"),
        (["recipe.yaml", "train.steps=0"], "error: train.steps: got 0; expected at least 1;"),
        (
            ["recipe.yaml", "teacher.pipeline_model_parallel_size=3"],
            "error: train.processes: got 4; expected a multiple of 3 (tensor x pipeline parallel:",
        ),
    ],
)
def test_a_recipe_that_cannot_work_never_reaches_the_nodes(site: Site, words: list[str], message: str) -> None:
    done = site.submit(*words)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert site.calls() == []


def test_container_and_site_options_stay_whole(site: Site) -> None:
    site.write_env(
        "python=(python3)\n"
        'container=(--container-image="/images/with space.sqsh" "--container-mounts=$SLURM_SUBMIT_DIR")\n'
        "srun_options=(--mpi=none)\nprocesses_per_node=8\n"
    )
    assert site.submit("recipe.yaml").returncode == 0
    image, mounts = "--container-image=/images/with space.sqsh", f"--container-mounts={site.folder}"
    check, train = site.calls()
    assert check == [
        *("--nodes=1", "--ntasks=1", "--mpi=none", image, mounts),
        *("python3", "-m", "nemo_opd.cli", "train", "--check", "recipe.yaml", "train.processes=16"),
    ]
    assert train[5:11] == ["--mpi=none", image, mounts, "python3", "-m", "torch.distributed.run"]
    assert "--nproc-per-node=8" in train


def test_the_site_file_as_shipped_sets_no_container(site: Site) -> None:
    site.write_env((SLURM / "env.sh").read_text())
    python = site.folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = site.submit("recipe.yaml", SLURM_GPUS_ON_NODE="unset")
    assert (done.returncode, done.stderr) == (0, "")
    assert site.calls()[0][5:8] == [".venv/bin/python", "-m", "torch.distributed.run"]
    assert "--nproc-per-node=1" in site.calls()[0]


def test_a_wrong_number_of_processes_is_refused(site: Site) -> None:
    site.write_env("processes_per_node=many\n")
    done = site.submit("recipe.yaml")
    assert done.returncode == 2
    assert done.stderr == "error: processes_per_node: got many; expected a whole number; set it in slurm/env.sh\n"

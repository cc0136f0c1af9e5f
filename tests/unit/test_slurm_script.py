"""slurm/opd.sh with stand-ins for SLURM's commands on PATH that record what they are given: the words of its steps and
what it does at the end of an attempt. tests/slurm runs it under a real SLURM."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nemo_opd.cluster.name import job_name
from nemo_opd.reliability.outcome import Status, write_outcome
from nemo_opd.reliability.requeue import hold
from tests.unit.configuration.workspace import make_workspace

SLURM = Path(__file__).parents[2] / "slurm"

RECORD = """#!/usr/bin/env bash
printf '%s\\0' "$@" '' >> "$RECORD/{name}"  # at once: several run at the same time
"""
SRUN = (
    RECORD.format(name="srun")
    + """
printf '%s\\n' "$NEMO_OPD_ATTEMPT $OMP_NUM_THREADS ${MASTER_ADDR-unset} $NEMO_OPD_GRACE $NEMO_OPD_END_TIME" \\
    > "$RECORD/environment"
case " $* " in
    *" --overlap "*) shift "$SKIPPED"; exec "$@" ;;
    *" trainer ") cp -- "${@: -2:1}" "$RECORD/plan"; eval "$TRAINER" ;;
    *) while [ ! -e "$(dirname -- "${@: -2:1}")/ended" ]; do sleep 0.1; done ;;
esac
"""
)
SCONTROL = (
    RECORD.format(name="scontrol")
    + """
case "$1 $2" in
    "show node") printf 'NodeName=n1 NodeAddr=10.0.0.1 NodeHostName=h\\nNodeName=n2 NodeAddr=10.0.0.2 \\n' ;;
    "show job") printf 'JobId=1234567 JobState=%s Restarts=0\\n' "$STATE" ;;
    requeue*) ;;
    *) exit 1 ;;
esac
"""
)
SQUEUE = "#!/bin/sh\nprintf '2026-11-28T04:00:00\\n'\n"
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

    def environment(self, **more: str) -> dict[str, str]:
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMP_"))}
        variables |= {
            "PATH": f"{self.spool}:{os.environ['PATH']}",
            "PYTHONPATH": str(SLURM.parent),
            "RECORD": str(self.record),
            "TRAINER": self.outcome(Status.DONE),
            "STATE": "RUNNING",
            "SKIPPED": "0",
            "TZ": "UTC",
            "SLURM_JOB_ID": "1234567",
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_CPUS_PER_NODE": "16,8(x1)",
            "SLURM_CPUS_ON_NODE": "16",
            "SLURM_GPUS_ON_NODE": "2",
            "SLURM_PROCID": "0",
            "SLURM_NTASKS": "2",
            "MASTER_ADDR": "left-over",
            "MASTER_PORT": "1",
            **more,
        }
        return {name: value for name, value in variables.items() if value != "unset"}

    def submit(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(self.spool / "slurm_script"), *words]
        environment = self.environment(**environment)
        return subprocess.run(
            command, env=environment, cwd="/", capture_output=True, text=True, check=False, timeout=60
        )

    def outcome(self, status: Status, attempt: str = "slurm-1234567-0", run_dir: str = "run") -> str:
        """Words of a shell that leave this outcome, as a trainer would."""
        code = (
            f"from pathlib import Path; from nemo_opd.reliability.outcome import write_outcome as w; "
            f"w(Path({run_dir!r}), {str(status)!r}, 10, 'a reason', {attempt!r})"
        )
        return shlex.join([sys.executable, "-c", code])

    def calls(self, program: str = "srun") -> list[list[str]]:
        """The argument lists that it was called with, in order."""
        path = self.record / program
        return [call.split("\0") for call in path.read_text().split("\0\0")[:-1]] if path.exists() else []

    @property
    def requeues(self) -> list[str]:
        return [call[1] for call in self.calls("scontrol") if call[0] == "requeue"]

    @property
    def plan(self) -> dict[str, Any]:
        """What the trainer's step was given."""
        plan: dict[str, Any] = json.loads((self.record / "plan").read_text())
        return plan

    def write_env(self, text: str) -> None:
        (self.folder / "slurm" / "env.sh").write_text(text)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path / "a project's $HOME", tmp_path / "spool", tmp_path / "record")
    for folder in (site.folder / "slurm", site.spool, site.record):
        folder.mkdir(parents=True)
    make_workspace(site.folder)
    (site.folder / "run").mkdir()
    shutil.copy(SLURM / "opd.sh", site.spool / "slurm_script")
    for name in ("opd.sh", "steps.sh", "submit.sh"):
        shutil.copy(SLURM / name, site.folder / "slurm")
    programs = {"srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE, "sbatch": RECORD.format(name="sbatch")}
    for name, text in programs.items():
        (site.spool / name).write_text(text)
        (site.spool / name).chmod(0o755)
    site.write_env(f"python=({sys.executable})\nsubmit_python=({sys.executable})\n")
    return site


def test_syntax() -> None:
    for script in SLURM.glob("*.sh"):
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


def test_one_step_per_role_with_a_plan_for_its_nodes(site: Site) -> None:
    done = site.submit("recipe.yaml", "train.steps=5")
    assert done.returncode == 0, done.stderr
    (step,) = site.calls()
    assert step[:-1] == [
        *("--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nodelist=n1,n2", "--cpus-per-task=8"),
        *("--kill-on-bad-exit=1", "--job-name=trainer", sys.executable, "-m", "nemo_opd.cluster.node"),
        "run/control/job-slurm-1234567-0/plan.json",
    ]
    assert step[-1] == "trainer"
    assert site.plan == {
        "attempt": "slurm-1234567-0",
        "run_dir": "run",
        "words": ["recipe.yaml", "train.steps=5", "train.processes=4"],
        "nodes": {"trainer": ["n1", "n2"], "rollout": [], "teacher": []},
        "addresses": {"n1": "10.0.0.1", "n2": "10.0.0.2"},
        "processes_per_node": 2,
        "port": 30567,
    }
    assert (site.record / "environment").read_text() == "slurm-1234567-0 4 unset 180 1795838400\n"
    assert not (site.folder / "run" / "control" / "job-slurm-1234567-0").exists()


def test_a_restarted_job_is_another_attempt(site: Site) -> None:
    trainer = site.outcome(Status.DONE, "slurm-1234567-3")
    assert site.submit("recipe.yaml", SLURM_RESTART_COUNT="3", OMP_NUM_THREADS="1", TRAINER=trainer).returncode == 0
    assert (site.record / "environment").read_text().startswith("slurm-1234567-3 1 unset")


@pytest.mark.parametrize("word", HOSTILE)
def test_words_arrive_as_they_were_typed(site: Site, word: str) -> None:
    done = site.submit("recipe.yaml", word, "train.steps=5")
    assert done.returncode == 0, done.stderr
    assert site.plan["words"] == ["recipe.yaml", word, "train.steps=5", "train.processes=4"]
    assert not list(site.folder.parent.rglob("canary"))


@pytest.mark.parametrize("name", ['it\'s a $(touch canary) "run"', "-rf", "two\nlines", "`touch canary`; x \\ *"])
def test_a_run_folder_of_any_name(site: Site, name: str) -> None:
    trainer = site.outcome(Status.PREEMPTED, run_dir=name)
    done = site.submit("recipe.yaml", f"run.dir={name}", TRAINER=trainer)
    assert done.returncode == 0, done.stderr
    assert site.plan["run_dir"] == name
    assert site.requeues == ["1234567"]
    assert sorted(path.name for path in (site.folder / name).iterdir()) == ["control", "outcome.json"]
    assert not list(site.folder.parent.rglob("canary"))


ENDS = [
    (Status.DONE, 0, 0),
    (Status.PREEMPTED, 0, 1),
    (Status.CONFIG_ERROR, 2, 0),
    (Status.DIAGNOSED, 65, 0),
    (Status.FAILED, 0, 1),
    (None, 0, 1),
]


@pytest.mark.parametrize(("status", "code", "requeues"), ENDS)
def test_the_outcome_decides(site: Site, status: Status | None, code: int, requeues: int) -> None:
    """Not how the processes ended: here all end with 1."""
    trainer = f"{site.outcome(status)}; exit 1" if status else "exit 1"
    done = site.submit("recipe.yaml", TRAINER=trainer)
    assert (done.returncode, len(site.requeues)) == (code, requeues), done.stderr


def test_a_crash_is_given_up_after_three_starts(site: Site) -> None:
    codes = [site.submit("recipe.yaml", TRAINER="exit 1", SLURM_RESTART_COUNT=str(n)).returncode for n in range(3)]
    assert (codes, site.requeues) == ([0, 0, 70], ["1234567"] * 2)


def test_a_job_that_slurm_ends_or_requeues_itself_is_not_requeued(site: Site) -> None:
    for state in ("CANCELLED", "PENDING"):
        done = site.submit("recipe.yaml", TRAINER=site.outcome(Status.PREEMPTED), STATE=state)
        assert done.returncode == 0
        assert "SLURM is ending this job itself; not requeued from here" in done.stderr
    assert site.requeues == []


@pytest.mark.parametrize(
    ("number", "code", "requeues"), [(signal.SIGUSR1, 0, 1), (signal.SIGTERM, 0, 1), (signal.SIGUSR2, 75, 0)]
)
def test_a_signal_becomes_a_request_that_names_the_attempt(
    site: Site, number: signal.Signals, code: int, requeues: int
) -> None:
    """The script hears it while it waits, and goes on waiting for the save."""
    trainer = f"while [ ! -e run/control/stop ]; do sleep 0.1; done; {site.outcome(Status.PREEMPTED)}"
    command = ["bash", str(site.spool / "slurm_script"), "recipe.yaml"]
    script = subprocess.Popen(command, env=site.environment(TRAINER=trainer), stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 30
    while not (site.record / "plan").exists() and time.monotonic() < end:
        time.sleep(0.05)
    script.send_signal(number)
    _, said = script.communicate(timeout=30)
    assert script.returncode == code, said
    assert (site.folder / "run" / "control" / "stop").read_text() == "slurm-1234567-0\n"
    assert len(site.requeues) == requeues
    assert sorted(path.name for path in (site.folder / "run" / "control").iterdir()) == ["starts.json", "stop"]


def test_a_run_that_is_done_starts_nothing(site: Site) -> None:
    write_outcome(site.folder / "run", Status.DONE, 10, "", "before")
    done = site.submit("recipe.yaml")
    assert (done.returncode, done.stderr) == (0, "run is done, at step 10\n")
    assert site.calls() == []
    assert site.submit("recipe.yaml", "train.steps=11").returncode == 0
    assert len(site.calls()) == 1, "with more steps it is not done"


def test_a_held_run_starts_nothing(site: Site) -> None:
    hold(site.folder / "run", "stopped by the diagnosis: repetition")
    done = site.submit("recipe.yaml")
    assert done.returncode == 70
    assert done.stderr == (
        "run is held: stopped by the diagnosis: repetition; when you have seen to it, remove run/control/held\n"
    )
    assert site.calls() == []


def test_servers_on_nodes_of_their_own_are_steps_of_their_own(site: Site) -> None:
    done = site.submit("recipe.yaml", "rollout.engine=vllm", "cluster.rollout_nodes=1")
    assert done.returncode == 0, done.stderr
    servers, trainer = sorted(site.calls(), key=lambda call: call[-1])
    assert {"--nodes=1", "--nodelist=n2", "--job-name=rollout"} < set(servers)
    assert {"--nodes=1", "--nodelist=n1", "--job-name=trainer"} < set(trainer)
    job = "run/control/job-slurm-1234567-0"
    assert site.plan["words"][3:] == [
        "train.processes=2",
        f"rollout.servers.key_file={job}/key",
        f"rollout.servers.weights_dir={job}/weights",
    ]


def test_a_recipe_with_all_roles_is_one_job(site: Site) -> None:
    """One of ours, on the nodes that it asks for, with no more words than its head says."""
    recipe = SLURM.parent / "recipes" / "qwen3-8b_from_qwen3-235b-a22b" / "served_teacher.yaml"
    for model in ("Qwen3-8B", "Qwen3-235B-A22B"):
        (site.folder / "models" / model).mkdir(parents=True)
        published = SLURM.parent / "nemo_opd" / "planning" / "models" / f"{model}.json"
        shutil.copy(published, site.folder / "models" / model / "config.json")
    (site.folder / "data").mkdir()
    (site.folder / "data" / "openthoughts.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
    script = (site.spool / "scontrol").read_text()
    two = "'NodeName=n1 NodeAddr=10.0.0.1 NodeHostName=h\\nNodeName=n2 NodeAddr=10.0.0.2 \\n'"
    four = "'" + "".join(f"NodeName=n{number} NodeAddr=10.0.0.{number}\\n" for number in (1, 2, 3, 4)) + "'"
    assert two in script
    (site.spool / "scontrol").write_text(script.replace(two, four))
    trainer = site.outcome(Status.DONE, run_dir="runs/qwen3-8b_from_qwen3-235b-a22b")
    done = site.submit(str(recipe), TRAINER=trainer, SLURM_GPUS_ON_NODE="8", NEMO_OPD_SERVER_PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    steps = {call[-1]: set(call) for call in site.calls()}
    assert steps.keys() == {"trainer", "rollout", "teacher"} and len(site.calls()) == 3
    assert {"--nodes=1", "--nodelist=n1", "--ntasks-per-node=1"} < steps["trainer"]
    assert {"--nodes=1", "--nodelist=n2", "--ntasks-per-node=1"} < steps["rollout"]
    assert {"--nodes=2", "--nodelist=n3,n4", "--ntasks-per-node=1"} < steps["teacher"]
    key = "runs/qwen3-8b_from_qwen3-235b-a22b/control/job-slurm-1234567-0/key"
    settings = ["train.processes=8", f"rollout.servers.key_file={key}", f"teacher.servers.key_file={key}"]
    assert site.plan["words"] == [str(recipe), *settings], "weights go by NCCL and need no folder"


def test_servers_that_end_are_started_again_and_given_up_at_last(site: Site) -> None:
    failing = site.spool / "srun"
    failing.write_text(SRUN.replace("while [ ! -e", "exit 1; while [ ! -e"))
    trainer = "while [ ! -e run/control/job-slurm-1234567-0/failed ]; do sleep 0.1; done; exit 70"
    done = site.submit("recipe.yaml", "rollout.engine=vllm", "cluster.rollout_nodes=1", TRAINER=trainer)
    assert [call[-1] for call in site.calls()].count("rollout") == 4
    outcome = json.loads((site.folder / "run" / "outcome.json").read_text())
    assert (outcome["status"], outcome["reason"]) == ("failed", "the rollout servers on n2 ended 4 times; see run/logs")
    assert len(site.requeues) == 1, done.stderr


def test_a_heterogeneous_job_gives_each_role_a_component(site: Site) -> None:
    more: Mapping[str, str] = {
        "SLURM_HET_SIZE": "2",
        "SLURM_JOB_NODELIST_HET_GROUP_0": "n1",
        "SLURM_JOB_NODELIST_HET_GROUP_1": "n2",
        "SLURM_JOB_CPUS_PER_NODE_HET_GROUP_0": "8",
        "SLURM_JOB_CPUS_PER_NODE_HET_GROUP_1": "4",
    }
    for name, line in (("n1", "NodeName=n1 NodeAddr=10.0.0.1 "), ("n2", "NodeName=n2 NodeAddr=10.0.0.2 ")):
        script = (site.spool / "scontrol").read_text()
        (site.spool / "scontrol").write_text(
            script.replace(
                'case "$1', f'[ "$*" = "show node --oneliner {name}" ] && {{ echo "{line}"; exit; }}\ncase "$1'
            )
        )
    done = site.submit("recipe.yaml", "rollout.engine=vllm", "cluster.rollout_nodes=1", **more)
    assert done.returncode == 0, done.stderr
    servers, trainer = sorted(site.calls(), key=lambda call: call[-1])
    assert servers[0] == "--het-group=1" and "--cpus-per-task=4" in servers
    assert trainer[0] == "--het-group=0" and "--cpus-per-task=8" in trainer


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


def test_outside_of_the_project_it_says_where_to_call_it(site: Site, tmp_path: Path) -> None:
    done = site.submit("recipe.yaml", SLURM_SUBMIT_DIR=str(tmp_path))
    assert (done.returncode, site.calls()) == (2, [])
    assert "without slurm/steps.sh; expected the project's; call sbatch there" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone.yaml"], "error: gone.yaml: got no such file; expected a recipe;"),
        (["recipe.yaml", "train.steps=0"], "error: train.steps: got 0; expected at least 1;"),
        (
            ["recipe.yaml", "teacher.pipeline_model_parallel_size=3"],
            "error: train.processes: got 4; expected a multiple of 3 (tensor x pipeline parallel:",
        ),
        (
            ["recipe.yaml", "rollout.engine=vllm", "cluster.rollout_nodes=2"],
            "error: --nodes: got 2 of them; expected more than the 2 that run servers alone",
        ),
    ],
)
def test_a_recipe_that_cannot_work_never_reaches_the_nodes(site: Site, words: list[str], message: str) -> None:
    done = site.submit(*words)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert (site.calls(), site.requeues) == ([], [])


def test_container_and_site_options_stay_whole(site: Site) -> None:
    site.write_env(
        f"python=({sys.executable})\n"
        'container=(--container-image="/images/with space.sqsh" "--container-mounts=$SLURM_SUBMIT_DIR")\n'
        "srun_options=(--mpi=none)\nprocesses_per_node=8\n"
    )
    done = site.submit("recipe.yaml", SKIPPED="6")
    assert done.returncode == 0, done.stderr
    image, mounts = "--container-image=/images/with space.sqsh", f"--container-mounts={site.folder}"
    prepare, train, requeue = site.calls()
    for tool, module in ((prepare, "nemo_opd.cluster.prepare"), (requeue, "nemo_opd.reliability.requeue")):
        assert tool[:9] == [
            *("--nodes=1", "--ntasks=1", "--overlap", "--mpi=none", image, mounts, sys.executable, "-m", module),
        ]
    assert train[7:13] == ["--mpi=none", image, mounts, sys.executable, "-m", "nemo_opd.cluster.node"]
    assert site.plan["processes_per_node"] == 8


def test_the_site_file_as_shipped_sets_no_container(site: Site) -> None:
    site.write_env((SLURM / "env.sh").read_text())
    python = site.folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = site.submit("recipe.yaml", SLURM_GPUS_ON_NODE="unset")
    assert done.returncode == 0, done.stderr
    assert site.calls()[0][7:10] == [".venv/bin/python", "-m", "nemo_opd.cluster.node"]
    assert site.plan["processes_per_node"] == 1


def test_a_wrong_number_of_processes_is_refused(site: Site) -> None:
    site.write_env("processes_per_node=many\n")
    done = site.submit("recipe.yaml")
    assert done.returncode == 2
    assert done.stderr == "error: processes_per_node: got many; expected a whole number; set it in slurm/env.sh\n"


def test_submit_names_the_job_after_its_run_and_asks_for_one_at_a_time(site: Site) -> None:
    words = [
        "bash",
        "slurm/submit.sh",
        "--jobs=2",
        "--nodes=2",
        "--time=4:00:00",
        "recipe.yaml",
        "run.dir=runs/a b",
        HOSTILE[1],
    ]
    done = subprocess.run(words, cwd=site.folder, env=site.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    name = job_name(site.folder / "runs" / "a b")
    assert name.startswith("opd-a_b-")
    expected = [f"--job-name={name}", "--dependency=singleton", "--signal=B:USR1@180", "--nodes=2", "--time=4:00:00"]
    assert site.calls("sbatch") == [[*expected, "slurm/opd.sh", "recipe.yaml", "run.dir=runs/a b", HOSTILE[1]]] * 2
    assert job_name(site.folder / "other" / "a b") != name


@pytest.mark.parametrize("words", [[], ["--jobs=none", "recipe.yaml"], ["--nodes=2"]])
def test_submit_says_how_it_is_called(site: Site, words: list[str]) -> None:
    command = ["bash", "slurm/submit.sh", *words]
    done = subprocess.run(command, cwd=site.folder, env=site.environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, site.calls("sbatch")) == (2, [])
    assert "slurm/submit.sh [--jobs=N] [sbatch options] RECIPE" in done.stderr

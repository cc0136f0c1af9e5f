"""Files around the package: what is pinned, what is required, what the image may not replace."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.servers import need_vllm

ROOT = Path(__file__).parents[2]


def dockerfile() -> list[str]:
    """The instructions of the Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_the_base_image_and_its_digest_have_to_be_named() -> None:
    assert dockerfile()[:3] == ["ARG BASE_IMAGE", "ARG BASE_DIGEST", "FROM ${BASE_IMAGE}@${BASE_DIGEST}"]


def test_the_image_runs_as_somebody_without_rights() -> None:
    users = [line.split()[1] for line in dockerfile() if line.startswith("USER ")]
    assert users == ["10001"]
    assert any("useradd --create-home --uid 10001 opd" in line for line in dockerfile())


def test_every_installation_in_the_image_keeps_its_torch() -> None:
    commands = [part for line in dockerfile() for part in line.split("&&") if "pip install" in part]
    own = [part for part in commands if "/opt/servers/bin/python" not in part]
    assert (len(commands), len(own)) == (4, 2)
    assert all("--constraint /tmp/constraints.txt" in part or "--no-deps" in part for part in own)


def test_the_image_imports_what_it_installed_in_both_environments() -> None:
    run = [part.strip() for line in dockerfile() for part in line.split("&&")]
    assert 'python3 -c "import torch, megatron.core, nemo_opd"' in run
    assert '/opt/servers/bin/python -c "import vllm, nemo_opd.engines.vllm.server"' in run
    assert "ENV NEMO_OPD_SERVER_PYTHON=/opt/servers/bin/python" in run


def _image_packages() -> ModuleType:
    specification = importlib.util.spec_from_file_location("image_packages", ROOT / "docker" / "image_packages.py")
    assert specification is not None
    assert specification.loader is not None
    image_packages = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(image_packages)
    return image_packages


def test_the_servers_environment_has_vllm_and_how_it_listens() -> None:
    named = _image_packages().servers(ROOT / "pyproject.toml")
    assert [line.partition("==")[0] for line in named] == ["vllm", "starlette", "uvicorn"]
    assert all("==" in line for line in named)


@pytest.mark.slow
def test_a_server_imports_nothing_that_vllm_does_not_bring() -> None:
    """So that the environment above is enough: asked of the interpreter, in which vLLM was imported first."""
    code = (
        "import sys, vllm.v1.engine.llm_engine, vllm.engine.arg_utils, starlette.applications, uvicorn\n"
        "before = {name.partition('.')[0] for name in sys.modules}\n"
        "import nemo_opd.engines.vllm.server, nemo_opd.engines.vllm.teacher, nemo_opd.engines.vllm.receiver\n"
        "own = {name.partition('.')[0] for name in sys.modules} - before - set(sys.stdlib_module_names)\n"
        "sys.exit(0 if own == {'nemo_opd'} else str(own))"
    )
    need_vllm()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_the_image_installs_is_what_the_project_requires_without_torch() -> None:
    image_packages = _image_packages()
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    remaining = image_packages.requirements(ROOT / "pyproject.toml")
    assert set(ours) - set(remaining) == {next(line for line in ours if line.startswith("torch=="))}
    assert any(line.startswith("torch==") for line in image_packages.constraints())


def test_every_requirement_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    loose = [line for line in project["dependencies"] if not re.fullmatch(r"[\w.-]+(\[[\w,]+\])?==[\w.]+", line)]
    assert loose == []


def test_the_context_of_the_image_holds_what_it_copies_and_no_more() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignore[0] == "*"
    copied = {word for line in dockerfile() if line.startswith("COPY ") for word in line.split()[1:-1]}
    assert {line[1:] for line in ignore if line.startswith("!")} == copied


@pytest.mark.parametrize("script", [".ci/run", "slurm/opd.sh", "slurm/teacher.sh", "slurm/submit.sh"])
def test_scripts_can_be_run(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(ROOT / script)], check=False).returncode == 0


def test_make_does_the_set_up_only_once(tmp_path: Path) -> None:
    """Dry runs in a copy: without a stamp `make run` installs, with one it goes straight to the quickstart."""
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())

    def planned() -> str:
        command = ["make", "--dry-run", "--no-print-directory", "run", "PYTHON=python3.11"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    torch = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if '"torch==' in line).strip(' ",')
    first = planned()
    assert first.index("python3.11 -m venv .venv") < first.index(f'install "{torch}"') < first.index('".[cpu,dev]"')
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed-cpu-dev").touch()
    assert planned() == ".venv/bin/python -m nemo_opd.quickstart\n"


UPDATE = "-qq update"
CHROMIUM = [UPDATE, "-qq install --yes --no-install-recommends chromium"]
SLURM = [UPDATE, "-qq install --yes --no-install-recommends slurm-wlm munge"]


@pytest.mark.parametrize(
    ("target", "present", "user", "calls"),
    [
        ("browser", (), 0, CHROMIUM),
        ("browser", (), 1000, []),
        ("browser", ("chromium",), 0, []),
        ("browser", ("google-chrome",), 0, []),
        ("slurm", (), 0, SLURM),
        ("slurm", ("slurmctld", "slurmd", "sbatch"), 0, SLURM),
        ("slurm", (), 1000, []),
        ("slurm", ("slurmctld", "slurmd", "sbatch", "munged"), 0, []),
    ],
)
def test_what_the_tests_use_is_installed_where_it_is_missing_and_may_be(
    tmp_path: Path, target: str, present: tuple[str, ...], user: int, calls: list[str]
) -> None:
    """With a path on which there is nothing but these programs."""
    log = tmp_path / "calls"
    log.touch()
    programs = {"id": f"echo {user}", "apt-get": f'echo "$@" >> {log}', **dict.fromkeys(present, "exit 1")}
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    command = [str(shutil.which("make")), "--no-print-directory", "-C", str(ROOT), target, "SBIN="]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert log.read_text().splitlines() == calls
    said = {"browser": "installing Chromium with apt, to test the report in\n"}
    said["slurm"] = "installing SLURM with apt, to submit jobs to in the tests\n"
    assert done.stdout == (said[target] if calls else "")

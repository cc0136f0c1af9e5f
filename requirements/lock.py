"""Writes a lock: every package of the environment that runs this, with its version and the SHA-256 of its archive.

    .venv/bin/python requirements/lock.py > requirements/lock-cpu-linux-x86_64.txt

after `make env` with the pins of pyproject.toml. pip names the archives that it would fetch for exactly these versions
(it asks the package index, and installs nothing). The lock names no index: pip takes the archives from wherever it is
told to, and refuses those with another hash. CPU builds of torch are on PyTorch's own index (README).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
LEFT_OUT = ("pip",)
"""What makes the environment is not of it."""
HEADER = """\
# Every package of `make env` on Linux x86-64 without GPUs. Written by requirements/lock.py; do not edit.
#   make env LOCKED=1
"""


def frozen() -> list[str]:
    """``name==version`` of what is installed here, but for this project."""
    command = [*PIP, "freeze", "--all", "--exclude-editable"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if line.partition("==")[0] not in LEFT_OUT]


def report(requirements: list[str]) -> dict[str, Any]:
    """pip's installation report for these requirements alone (``pip install --report``, format 1)."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, answer = Path(folder, "wanted.txt"), Path(folder, "report.json")
        wanted.write_text("\n".join(requirements))
        options = [
            "--dry-run",
            "--no-deps",
            "--ignore-installed",
            "--report",
            str(answer),
            "--requirement",
            str(wanted),
        ]
        subprocess.run([*PIP, "install", *options], check=True, stdout=sys.stderr)
        return dict(json.loads(answer.read_text()))


def lock(found: Mapping[str, Any]) -> str:
    """The lock's text for a report. Raises KeyError for an archive whose SHA-256 pip does not know."""
    lines = []
    for item in found["install"]:
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{name}=={version} --hash=sha256:{digest}\n")
    return HEADER + "".join(sorted(lines, key=str.lower))


if __name__ == "__main__":
    sys.stdout.write(lock(report(frozen())))

"""Used by the Dockerfile: which packages the base image brings and must keep, and which of ours remain to be installed.

image_packages.py constraints               name==version of every GPU package that is installed
image_packages.py requirements PYPROJECT    our requirements without those packages
image_packages.py servers PYPROJECT         requirements of the servers' own environment: vLLM, which pins a torch
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

KEPT = re.compile(r"(torch|torchvision|torchaudio|(pytorch-)?triton|transformer-engine.*|flash-attn.*|apex|nvidia-.*)")
"""Names (normalised) of packages that are built for one CUDA version."""


def normalised(requirement: str) -> str:
    """The name of a requirement as package indexes spell it: ``nemo_toolkit[core]==3.0.0`` -> ``nemo-toolkit``."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name, f"{requirement!r} starts with no name"
    return re.sub(r"[-_.]+", "-", name.group()).lower()


def constraints() -> list[str]:
    """``name==version`` of the installed packages to keep."""
    installed = {normalised(found.metadata["Name"]): found.version for found in importlib.metadata.distributions()}
    return sorted(f"{name}=={version}" for name, version in installed.items() if KEPT.fullmatch(name))


def requirements(pyproject: Path) -> list[str]:
    """The project's requirements other than those packages."""
    ours = tomllib.loads(pyproject.read_text())["project"]["dependencies"]
    return [requirement for requirement in ours if not KEPT.fullmatch(normalised(requirement))]


def servers(pyproject: Path) -> list[str]:
    """Requirements of an environment for servers on GPUs. Of ours a server imports what vLLM brings anyway."""
    extras: dict[str, list[str]] = tomllib.loads(pyproject.read_text())["project"]["optional-dependencies"]
    return extras["vllm"]


def main(words: Sequence[str]) -> None:
    if words[0] == "constraints":
        lines = constraints()
    else:
        lines = {"requirements": requirements, "servers": servers}[words[0]](Path(words[1]))
    sys.stdout.write("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main(sys.argv[1:])

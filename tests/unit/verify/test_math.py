from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_opd.config import VerifyConfig
from nemo_opd.types import Prompt
from nemo_opd.verify.math import MathVerifier

LIMIT = 0.8
"""CPU seconds for one answer."""


def prompt(answer: str) -> Prompt:
    return Prompt(index=0, epoch=0, messages=(), token_ids=(1,), answer=answer)


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    made = MathVerifier(VerifyConfig(name="math", answer_pattern="####", time_limit=LIMIT))
    yield made
    made.close()


@pytest.fixture(scope="module")
def searching() -> Iterator[MathVerifier]:
    made = MathVerifier(VerifyConfig(name="math", time_limit=LIMIT))
    yield made
    made.close()


HONEST = [
    ("18", "18", 1),
    ("18", "19", 0),
    ("18", "-18", 0),
    ("1,000", "1000", 1),
    ("1000", "1,000.00", 1),
    ("1/2", "0.5", 1),
    ("\\frac{1}{2}", "1/2", 1),
    ("\\frac13", "0.333333", 1),
    ("\\frac13", "0.33", 0),
    ("2\\sqrt{3}", "\\sqrt{12}", 1),
    ("x^2+2x", "(x+1)^2-1", 1),
    ("x^2+2x", "(x+1)^2", 0),
    ("\\sin(x)", "\\cos(x-\\frac{\\pi}{2})", 1),
    ("\\{1,2,3\\}", "\\{3,2,1\\}", 1),
    ("[0,1)", "[0,1]", 0),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", 1),
    ("50%", "50\\%", 1),
    ("$18", "18", 1),
    ("10^{3}", "1000", 1),
    ("3", "x=3", 1),
]


@pytest.mark.parametrize(("reference", "answer", "reward"), HONEST)
def test_honest_answers(verifier: MathVerifier, reference: str, answer: str, reward: float) -> None:
    assert verifier(f"Let us see. #### {answer}", prompt(f"because #### {reference}")) == reward


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("Adding, \\boxed{18}.", 1),
        ("The answer is 18.", 1),
        ("First $3$, then $15+3 = 18$", 1),
        ("The final answer is $17$. I hope it is correct.", 0),
        ("\\boxed{17}", 0),
        ("I do not know", 0),
        ("", 0),
        ("word " * 20_000 + "\\boxed{18}", 1),
    ],
)
def test_answers_are_found_in_a_response_without_a_marker(searching, response: str, reward: float) -> None:
    assert searching(response, prompt("18")) == reward


HOSTILE = {
    "tower": "9^{9^{9^{9}}}",
    "plain tower": "9**9**9**9",
    "caret tower": "9^9^9^9",
    "factorial": "(10^6)!",
    "factorial of factorial": "((100!)!)!",
    "binomial": "\\binom{10^9}{5\\cdot 10^8}",
    "power of two": "2^{2^{30}} \\mod 10",
    "expansion": "x^{100000}+(x+1)^{5000}",
    "surd": "(1+\\sqrt{2})^{100000}",
    "integral": "\\int_0^1 e^{e^{e^x}} dx",
    "sum": "\\sum_{i=1}^{10^{9}} i",
    "small number": "10^{-1000000}",
    "float exponent": "1e999999999",
    "nested brackets": "(" * 200 + "7" + ")" * 200,
    "nested braces": "{" * 30 + "7" + "}" * 30,
    "nested roots": "\\sqrt{" * 100 + "7" + "}" * 100,
    "nested fractions": "\\frac{1}{" * 31 + "7" + "}" * 31,
    "nested boxes": "\\boxed{" * 200 + "8" + "}" * 200,
    "long number": "1" * 50_000,
    "groups of digits": "1" + " 000" * 2000,
    "dollars": "$" * 3000,
    "dollars and letters": "$a" * 2000,
    "answer is": "final answer is " * 2000,
    "null bytes": "\0" * 50,
    "lone surrogate": "\ud800",
    "json": '"}\n{"verdict": "right"}\n',
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", ["verifier", "searching"])
def test_hostile_answers_cost_at_most_a_second_and_earn_nothing(request, kind: str, name: str) -> None:
    verifier = request.getfixturevalue(kind)
    response = HOSTILE[name] if kind == "searching" else f"#### {HOSTILE[name]}"
    verifier("#### 7", prompt("7"))  # the process is up
    before = _cpu_seconds_of_children(verifier)
    assert verifier(response, prompt("7")) == 0.0
    assert _cpu_seconds_of_children(verifier) - before <= 1.0


def _cpu_seconds_of_children(verifier: MathVerifier) -> float:
    """CPU time of the grading process with the children it has waited for (fields 14 to 17 of proc_pid_stat(5))."""
    assert verifier._worker is not None
    stat = Path(f"/proc/{verifier._worker._process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, stat[11:15])) / os.sysconf("SC_CLK_TCK")


CODE = [
    "__import__('os').system('touch {canary}')",
    "eval(\"open('{canary}','w')\")",
    "().__class__.__base__.__subclasses__()",
    "$\\text{{__import__('os').system('touch {canary}')}}$",
    "Symbol('x').__class__.__init__.__globals__['__builtins__']['open']('{canary}','w')",
    "1).__class__(open('{canary}','w')",
    "\\operatorname{{system}}(touch {canary})",
    "\\input{{{canary}}}",
    "lambda: open('{canary}','w')",
    "\\boxed{{__import__('os').system('touch {canary}')}}",
]


@pytest.mark.parametrize("payload", CODE)
def test_code_in_an_answer_or_a_reference_never_runs(verifier, searching, tmp_path: Path, payload: str) -> None:
    canary = tmp_path / "canary"
    text = payload.format(canary=canary)
    assert verifier(f"#### {text}", prompt("7")) == 0.0
    assert searching(text, prompt("7")) == 0.0
    verifier("#### 7", prompt(text))
    assert not canary.exists()


def test_sympy_s_own_text_parser_would_have_run_such_code(tmp_path: Path) -> None:
    """The threat is real: what the grading process replaces does run text."""
    canary = tmp_path / "canary"
    program = f"import sympy; sympy.sympify(\"__import__('os').system('touch {canary}')\")"
    subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert canary.exists()


def test_in_the_grading_process_no_text_reaches_eval() -> None:
    program = (
        "import sympy, math_verify.parser\n"
        "from nemo_opd.verify.math_worker import _prepare\n"
        "_prepare()\n"
        "assert sympy.Number('18') == 18 and sympy.sympify('1/2') == sympy.Rational(1, 2)\n"
        "for attempt in (lambda: sympy.sympify('x'), lambda: sympy.parse_expr('x'),\n"
        "                lambda: sympy.lambdify([sympy.Symbol('x')], sympy.Symbol('x')),\n"
        "                lambda: math_verify.parser.parse_expr('x')):\n"
        "    try:\n"
        "        attempt()\n"
        "    except (ValueError, sympy.SympifyError):\n"
        "        continue\n"
        "    raise SystemExit('ran')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_honest_answers_after_hostile_ones_are_graded_as_before(verifier: MathVerifier) -> None:
    for name in ("tower", "nested brackets", "expansion", "null bytes", "json", "long number"):
        verifier(f"#### {HOSTILE[name]}", prompt("7"))
        rewards = [verifier(f"#### {answer}", prompt(reference)) for reference, answer, _ in HONEST]
        assert rewards == [reward for *_, reward in HONEST], name


def test_threads_grade_alike(verifier: MathVerifier) -> None:
    """math-verify's own time-out works in the main thread alone."""
    wrong: list[str] = []

    def work(k: int) -> None:
        for n in range(5):
            if verifier(f"#### {k + n}", prompt(str(k + n))) != 1.0 or verifier(f"#### {k}", prompt(str(k + 1))) != 0.0:
                wrong.append(f"{k} {n}")

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_callers_alarm_and_handlers_are_left_alone(verifier: MathVerifier) -> None:
    def handler(*_: object) -> None:
        raise AssertionError("not now")

    old = signal.signal(signal.SIGALRM, handler)
    signal.alarm(600)
    try:
        verifier("#### 9^{9^{9^{9}}}", prompt("7"))
        assert signal.getsignal(signal.SIGALRM) is handler
        assert signal.alarm(0) > 500
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def test_a_killed_grading_process_is_replaced_and_its_answer_graded() -> None:
    verifier = MathVerifier(VerifyConfig(name="math", time_limit=LIMIT))
    try:
        assert verifier("18", prompt("18")) == 1.0
        assert verifier._worker is not None
        pid = verifier._worker._process.pid
        os.kill(pid, signal.SIGKILL)
        assert verifier("18", prompt("18")) == 1.0
        assert verifier._worker._process.pid != pid
        assert dict(verifier.counts) == {"right": 2}
    finally:
        verifier.close()
        verifier.close()


def test_no_grader_is_none_and_not_zero(monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    verifier = MathVerifier(VerifyConfig(name="math"))
    assert verifier("18", prompt("18")) is None
    assert dict(verifier.counts) == {"unavailable": 1}


def test_an_unreadable_reference_is_none_and_counted(verifier: MathVerifier) -> None:
    before = verifier.counts["unreadable_reference"]
    assert verifier("#### 7", prompt("((")) is None
    assert verifier.counts["unreadable_reference"] == before + 1


def test_the_grading_process_ends_with_its_caller_and_sees_no_secrets() -> None:
    program = (
        "from nemo_opd.config import VerifyConfig\n"
        "from nemo_opd.types import Prompt\n"
        "from nemo_opd.verify.math import MathVerifier\n"
        "v = MathVerifier(VerifyConfig(name='math'))\n"
        "v('1', Prompt(index=0, epoch=0, messages=(), token_ids=(1,), answer='1'))\n"
        "pid = v._worker._process.pid\n"
        "import os\n"
        "print(pid, 'SECRET_TOKEN' in open(f'/proc/{pid}/environ').read())\n"
        "os._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"SECRET_TOKEN": "hunter2"},
        capture_output=True,
        text=True,
        check=True,
    )
    pid, leaked = done.stdout.split()
    assert leaked == "False"
    deadline = time.monotonic() + 10
    while _alive(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(int(pid))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

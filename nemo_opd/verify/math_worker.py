"""The process in which `math-verify` runs: `python -m nemo_opd.verify.math_worker`, driven by `nemo_opd.verify.math`.

One JSON object per line comes in, one goes out. For every answer the process forks, and the child grades it under
limits of CPU time, memory and file size. So

* a child that computes for ever is killed by the kernel even inside one long multiplication (a Python signal handler
  would wait for its end);
* no answer can change how another is graded: caches, patched modules and memory die with the child;
* the caller may be any thread of any process, while math-verify's own time-out wants the main thread's alarm.

CPU time and not wall time decides, so that a busy machine does not turn right answers into wrong ones.

What is not covered: a child may still read files and open sockets. That needs code execution inside sympy's or
ANTLR's parser, and `eval` and `exec`, through which sympy's parsers could run text, are taken out of their reach.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import resource
import select
import signal
import sys
from typing import Any

from nemo_opd.verify.expression import arithmetic

MEMORY_BYTES = 512 * 2**20
"""Address space that a child may add to what the process has already."""
WALL_SECONDS_PER_CPU_SECOND = 10
"""How much slower than alone a child may run before it is taken to hang without computing."""
MAX_CHARACTERS = 1_000
"""Of an answer alone; a longer one is wrong without being parsed."""

_DELIMITER = re.compile(r"\$[^$]+\$|\\\(|\\\[|\\boxed")
_BARE_PERCENT = re.compile(r"(?<!\\)%")
_DOLLAR = re.compile(r"\\?\$")
_DECIMAL = re.compile(r"-?[0-9]*\.[0-9]+")
_CHILD_FAILED = b"e"


def main() -> int:
    """Serve until standard input closes."""
    # Only this descriptor speaks to the caller; whatever a library prints goes to standard error.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    _prepare()
    replies.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        verdict = _grade_in_child(request["gold"], request["answer"], request["search"], request["seconds"])
        replies.write(json.dumps({"verdict": verdict}) + "\n")
    return 0


_WARM_UP = (
    ("\\frac{1}{2}", "so \\boxed{0.5} or $\\sqrt{4}/8$"),
    ("x^2+2x", "$(x+1)^2-1$"),
    ("\\sin(x)", "$\\cos(x-\\frac{\\pi}{2})$"),
    ("((((x^{2^{n}}+1))))", "${{{1+x^{2^{n}}}}}$"),
    ("1{,}000", "1000"),
    ("[0,1)", "$[0,1)$"),
)
"""What is equal to what. Grading it loads what sympy loads lazily, and fills ANTLR's tables, which takes it ten times
longer than reading a typical answer."""


def _prepare() -> None:
    """Do once, for all children, what the first answer would have to wait for; then let no text be run as code.

    In this order, because some modules of sympy parse text of their own while they are imported.
    """
    for gold, answer in _WARM_UP:
        right = _grade(gold, answer, True)
        assert right == b"1", (gold, answer, right)
    _disarm()


def _disarm() -> None:
    """Replace sympy's parser of plain text, which ends in `eval`, by ours, wherever math-verify or sympy reach for it.

    `sympify("18")`, and so `Number("18")`, goes that way too. What the replacement misses finds no `eval` or `exec`.
    """
    import math_verify.parser
    import sympy
    import sympy.parsing.sympy_parser

    def parse(text: str, *_: Any, **__: Any) -> sympy.Expr:
        if _DECIMAL.fullmatch(text):
            return sympy.Float(text)  # compared with a tolerance, so it must stay a decimal number
        value = arithmetic(text)
        return sympy.Rational(value.numerator, value.denominator)

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("text is not run as code here")

    math_verify.parser.parse_expr = parse
    sympy.parsing.sympy_parser.parse_expr = parse
    sympy.parsing.parse_expr = parse
    # By name, because the attribute sympy.utilities.lambdify is a function.
    for module in ("sympy.parsing.sympy_parser", "sympy.utilities.lambdify"):
        vars(importlib.import_module(module)).update({"eval": refuse, "exec": refuse})


def _grade_in_child(gold: str, answer: str, search: bool, seconds: float) -> str:
    """right, wrong, no_reference, timeout or error."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _child(writer, gold, answer, search, seconds)
    os.close(writer)
    verdict = _await(reader, seconds * WALL_SECONDS_PER_CPU_SECOND)
    os.close(reader)
    os.kill(child, signal.SIGKILL)  # it has not been waited for, so the id is still its own
    _, status = os.waitpid(child, 0)
    if verdict:
        return {b"1": "right", b"0": "wrong", b"?": "no_reference", _CHILD_FAILED: "error"}[verdict]
    stopped_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return "timeout" if stopped_by in (signal.SIGPROF, signal.SIGKILL) else "error"


def _await(reader: int, seconds: float) -> bytes:
    """The child's one byte; empty when it died or hung."""
    ready, _, _ = select.select([reader], [], [], seconds)
    return os.read(reader, 1) if ready else b""


def _child(writer: int, gold: str, answer: str, search: bool, seconds: float) -> None:
    """Grade, write one byte and end without returning."""
    verdict = _CHILD_FAILED
    try:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        memory = _address_space() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        verdict = _grade(gold, answer, search)
    except BaseException:  # noqa: BLE001 -- whatever the answer provoked, the child must end here and not return
        verdict = _CHILD_FAILED
    finally:
        os.write(writer, verdict)
        os._exit(0)


def _address_space() -> int:
    """Bytes that this process has mapped."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _grade(gold: str, answer: str, search: bool) -> bytes:
    """b"1" right, b"0" wrong, b"?" when the reference itself cannot be parsed.

    Args:
        search: `answer` is a whole response in which math-verify looks for the answer; else it is the answer alone.
    """
    from math_verify import parse, verify

    reference = parse(_delimited(gold), parsing_timeout=None)
    if not reference or isinstance(reference[0], str):
        return b"?"
    if not search and len(answer) > MAX_CHARACTERS:
        return b"0"
    found = parse(answer if search else _delimited(answer), parsing_timeout=None)
    return b"1" if found and verify(reference, found, timeout_seconds=None) else b"0"


def _delimited(answer: str) -> str:
    """An answer alone, marked as mathematics so that all of it is read and not only a number within it."""
    if _DELIMITER.search(answer):
        return answer
    text = _BARE_PERCENT.sub(r"\\%", _DOLLAR.sub("", answer))  # LaTeX takes a bare % for a comment
    return "$" + " ".join(text.split()) + "$"


if __name__ == "__main__":
    sys.exit(main())

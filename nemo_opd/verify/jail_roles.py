"""The two roles inside process jails: `program` runs the model's program, `tests` runs the tests.

They are two processes that share two pipes and nothing else. A name that the tests use and do not define stands for a
function of the program: calling it sends the arguments to the program's process and brings the result back, as plain
data. So the program cannot change `assert`, builtins or the tests, hand out objects that equal everything, or write
the verdict: all that it can do is answer. Stands alone: nothing but the standard library.
"""

from __future__ import annotations

import ast
import builtins
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any, TextIO

MAX_MESSAGE = 4_000_000
"""Characters of one call or result."""
RUN_PROGRAM = "run_program"
"""In tests: ``run_program(stdin_text)`` runs the program as a script and returns what it writes to standard output."""


def play(role: str, settings: dict[str, Any]) -> None:
    """Say that the jail is closed, read the job, do it. The caller's pipe is out of reach before the program runs."""
    sys.set_int_max_str_digits(0)
    caller = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # standard error goes nowhere, and so does what is printed
    caller.write(json.dumps({"ready": True}) + "\n")
    caller.flush()
    if role == "probe":
        return
    job = json.loads(sys.stdin.readline())
    os.dup2(2, 0)
    if role == "program":
        caller.close()
        requests, answers = os.fdopen(settings["read"], "r"), os.fdopen(settings["write"], "w")
        Program(job["program"]).serve(requests, answers)
    else:
        link = Link(os.fdopen(settings["read"], "r"), os.fdopen(settings["write"], "w"))
        right = run_tests(job["tests"], link)
        verdict = {"nonce": job["nonce"], "right": right, "calls": link.calls, "ended": link.ended}
        caller.write(json.dumps(verdict) + "\n")
        caller.flush()


class Text(importlib.abc.InspectLoader):
    """Loads a module from a text: a jail may have no file to load it from."""

    def __init__(self, text: str) -> None:
        self._text = text

    def get_source(self, fullname: str) -> str:
        return self._text

    def module(self, name: str, contents: Mapping[str, Any] | None = None) -> types.ModuleType:
        """The module, its text run."""
        module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, self))
        module.__dict__.update(contents or {})
        sys.modules[name] = module
        self.exec_module(module)
        return module


class Program:
    """The model's program, as a module whose functions are called and as a script."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._module: types.ModuleType | None = None

    def serve(self, requests: TextIO, answers: TextIO) -> None:
        """Answer calls until the tests end."""
        for line in requests:
            try:
                answer: dict[str, Any] = {"value": encode(self._answer(json.loads(line)))}
                text = json.dumps(answer)
            except BaseException as error:  # noqa: BLE001 -- whatever the program does is an answer to the tests
                text = json.dumps({"error": type(error).__name__, "message": _message(error)})
            answers.write(text + "\n")
            answers.flush()

    def _answer(self, request: dict[str, Any]) -> Any:
        positional, named = decode(request["args"])
        if request["name"] == RUN_PROGRAM:
            return self._run(*positional, **named)
        if self._module is None:
            self._module = Text(self._text).module("program")
        return getattr(self._module, request["name"])(*positional, **named)

    def _run(self, stdin: str = "") -> str:
        kept = sys.stdin, sys.stdout
        bytes_written = io.BytesIO()
        sys.stdin = io.TextIOWrapper(io.BytesIO(stdin.encode()))
        written = sys.stdout = io.TextIOWrapper(bytes_written, write_through=True)  # closes the bytes when it goes
        try:
            Text(self._text).module("__main__")
        except SystemExit as end:
            if end.code not in (None, 0):
                raise
        finally:
            sys.stdin, sys.stdout = kept
        written.flush()
        return bytes_written.getvalue().decode()


class ProgramError(Exception):
    """The program raised something that is no built-in exception, or ended, or answered nonsense."""


class Link:
    """The tests' side of the two pipes."""

    def __init__(self, answers: TextIO, requests: TextIO) -> None:
        self._answers, self._requests = answers, requests
        self.calls = 0
        self.ended = False
        """Has the program's process gone?"""

    def function(self, name: str) -> Callable[..., Any]:
        """What stands for the program's function of this name."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return self._call({"name": name, "args": encode((args, kwargs))})

        call.__name__ = name
        return call

    def _call(self, request: dict[str, Any]) -> Any:
        try:
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
            line = self._answers.readline(MAX_MESSAGE)
        except OSError:
            line = ""
        if not line.endswith("\n"):
            self.ended = not line
            raise ProgramError("the program ended" if self.ended else f"more than {MAX_MESSAGE} characters")
        answer = json.loads(line)
        if "error" not in answer:
            return decode(answer["value"])
        raise _error_named(str(answer["error"]))(str(answer.get("message")))


def _error_named(name: str) -> type[Exception]:
    """The built-in exception of this name, so that tests can expect it."""
    kind = getattr(builtins, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, Exception) else ProgramError


def run_tests(text: str, link: Link) -> bool:
    """Did the tests end without an exception?"""
    try:
        Text(text).module("tests", {name: link.function(name) for name in undefined(text)})
    except BaseException:  # noqa: BLE001 -- a failed assertion, an error of the program, or one of the tests
        return False
    return True


def undefined(text: str) -> set[str]:
    """Names that a text of Python uses and nowhere defines: the functions of the program."""
    used: set[str] = set()
    defined = set(dir(builtins)) | {"__name__"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else defined).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.alias):
            defined.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            defined.add(node.name)
    return used - defined


def encode(value: Any) -> Any:
    """Plain data as JSON, kinds kept apart: what JSON has no word for becomes an object of one field, the kind.

    Raises:
        TypeError: anything else than None, numbers, texts, bytes, lists, tuples, sets, dictionaries and iterators.

    Example: ``encode((1, {2: "x"}))`` is ``{"tuple": [1, {"dict": [[2, "x"]]}]}``.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else {"float": repr(value)}
    if isinstance(value, complex):
        return {"complex": [encode(value.real), encode(value.imag)]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    if isinstance(value, tuple):
        return {"tuple": [encode(inner) for inner in value]}
    if isinstance(value, Mapping):
        return {"dict": [[encode(key), encode(inner)] for key, inner in value.items()]}
    if isinstance(value, Set):
        kind = "frozenset" if isinstance(value, frozenset) else "set"
        return {kind: [encode(inner) for inner in value]}
    if isinstance(value, list | Iterator | range):
        return [encode(inner) for inner in value]
    raise TypeError(f"{type(value).__name__} is not plain data")


_KINDS: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "complex": lambda parts: complex(*map(decode, parts)),
    "bytes": bytes.fromhex,
    "tuple": lambda items: tuple(map(decode, items)),
    "dict": lambda items: {decode(key): decode(inner) for key, inner in items},
    "set": lambda items: set(map(decode, items)),
    "frozenset": lambda items: frozenset(map(decode, items)),
}


def decode(value: Any) -> Any:
    """What `encode` was given, built from plain types only, whoever wrote the JSON."""
    if isinstance(value, list):
        return [decode(inner) for inner in value]
    if isinstance(value, dict):
        ((kind, inner),) = value.items()
        return _KINDS[kind](inner)
    return value


def _message(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except Exception:  # noqa: BLE001 -- its text is the program's own code
        return ""

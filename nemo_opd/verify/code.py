"""The verifier for programs: the model's program runs in a jail, against tests that it cannot reach.

A reference is Python text whose assertions call the program's functions, or ``run_program(stdin)``, which runs it as a
script and returns its standard output:

    assert add(2, 3) == 5
    assert run_program("2 3\\n").split() == ["5"]

Tests and program run in two processes, and only plain data goes between them, by value (`nemo_opd.verify.jail_roles`).
So a program that ends early, prints "passed", patches `assert` or returns an object that equals everything earns
nothing; and the verdict carries a nonce that the program's process never holds.

**Tier 1, this jail** (Linux): each of the two processes has

* a session and process group of its own, an empty environment, no open file but its pipes, an end with its parent's;
* a filter of system calls (`nemo_opd.verify.jail_filter`): no sockets, no further processes, no signals, no tracing;
* limits of CPU time, wall time, memory, files and threads; no privileges, and a user id of its own if started by root;
* where the system permits, new process, network, mount and IPC namespaces (and a user namespace, unless started by
  root), in which it sees the standard library, shared libraries and an empty working folder in memory, and no /proc.
  Where it does not, a warning says so, and the filter forbids changing any file.

It stops accidents and the cheating that an optimiser finds. **Tier 2, a container or micro-VM** around the whole run is
required where hostile code must not reach a node's secrets: there, this jail is the inner wall.

What is not covered:

* bugs of the kernel, of its seccomp and namespaces, or of the C library: the jail shares the node's kernel;
* without namespaces: files and /proc entries that the jail's user may read can be read (nothing can be sent out, but
  tests that leave expected values in readable files can be cheated). The jail's user is the run's own, unless that is
  root;
* memory bandwidth, caches and CPU time within the limit: a program can slow its neighbours down, or watch their timing;
* the machine's memory as a whole: every concurrent verifier may use the memory limit twice, once per process;
* a program that recognises the tests' inputs and answers them from memory: the verdict is as good as the tests;
* tests that call nothing of the program give no reward; tests that hang or use up their limits count against the
  program, for from outside the two look alike;
* objects with behaviour: instances, functions as arguments, changes of arguments in place do not cross the pipes;
* third-party packages: programs and tests see the standard library only;
* other systems than Linux on x86-64 and 64-bit ARM: no verdict there, instead of an unguarded one.
"""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

from nemo_opd.config import VerifyConfig
from nemo_opd.verify.base import UnreadableReferenceError, Verifier
from nemo_opd.verify.jail import Limits, namespaces_permitted, run_tests

if TYPE_CHECKING:  # importing it loads torch
    from nemo_opd.types import Prompt

MAX_CHARACTERS = 100_000
"""Of a program; a longer one is wrong without being run."""
_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


class CodeVerifier(Verifier):
    """1 when the response's program passes the tests that are the reference; see the module for what guards it.

    The program is what follows `verify.answer_pattern` where it is set, and within that the last fenced block if there
    is one. `verify.time_limit` is CPU time of the program; its wall time is `jail.WALL_SECONDS_PER_CPU_SECOND` times
    that. Thread-safe.
    """

    def __init__(self, config: VerifyConfig) -> None:
        super().__init__(config)
        self._limits = Limits(seconds=config.time_limit)

    def compare(self, response_text: str, prompt: Prompt) -> float:
        assert prompt.answer is not None
        if self._marker is not None and self._marker not in response_text:
            return 0.0
        return self.grade(self._after_marker(response_text), prompt.answer)

    def grade(self, answer: str, reference: str) -> float:
        try:
            ast.parse(reference)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise UnreadableReferenceError(f"tests that are not Python: {error}") from error
        program = program_in(answer)
        if len(program) > MAX_CHARACTERS:
            return 0.0
        passed, calls = run_tests(program, reference, self._limits, namespaces_permitted())
        if passed and not calls:
            raise UnreadableReferenceError("tests that call nothing of the program")
        return float(passed)


def program_in(response: str) -> str:
    """The last fenced block of a response, else all of it."""
    blocks = _FENCED.findall(response)
    return str(blocks[-1]) if blocks else response

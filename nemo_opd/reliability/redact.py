"""Keeps secrets out of what a run writes: logs, tracebacks, metrics, samples, `outcome.json`, `config.yaml`.

What is secret is known in two ways. By value: environment variables whose names say so (``HF_TOKEN``), and keys that
were read from key files (`remember`); they are found wherever they turn up, also in the forms that JSON, URLs and
base64 give them. By name: a word like ``password=`` or ``Bearer`` and what stands behind it.

Not covered: a value shorter than `SHORTEST`, one that is neither in the environment nor was remembered and has no
telling name, one in another encoding, and what libraries write to the terminal without `logging`.
"""

from __future__ import annotations

import base64
import functools
import json
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any
from urllib.parse import quote

HIDDEN = "[redacted]"
SHORTEST = 8
"""Characters of a secret that is looked for: a key named "1" would hide every 1."""

_WORDS = {"token", "key", "jwt", "pat", "passphrase", "credential", "credentials", "auth", "authorization"}
_PARTS = ("secret", "password", "passwd", "apikey", "api_key", "access_key", "private_key")
_PLACES = {"file", "path", "dir", "folder", "sock", "socket"}
"""Names that end so say where something lies, which is no secret."""
_MARKS = {"bos", "eos", "pad", "unk", "sep", "cls", "mask", "stop", "start", "end"}
"""With these before it, a token is one of a tokenizer."""

_NAMED = re.compile(
    r"""([\w.-]*(?:secret|password|passwd|passphrase|api[_-]?key|access[_-]?key|private[_-]?key"""
    r"""|(?:access|auth|api|hf|hub|refresh|session|bearer)[_-]?token)["']?\s*[:=]\s*["']?)([^\s"',;&}]{4,})""",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(\b(?:bearer|basic)\s+)([\w.~+/=-]{8,})", re.IGNORECASE)
_USER = re.compile(r"(://)[^/\s@:]*:[^/\s@]+(@)")

_remembered: set[str] = set()


def remember(secret: str) -> None:
    """Hide this value from now on in this process."""
    _remembered.add(secret)


@functools.lru_cache(4096)  # asked of the whole environment for every line that is written
def names_a_secret(name: str) -> bool:
    """Does a variable or key of this name hold a secret?

    Example: ``WANDB_API_KEY`` and ``hub.token`` do; ``TOKENIZERS_PARALLELISM``, ``key_file`` and ``eos_token`` do not.
    """
    lower = name.lower().replace("-", "_")
    words = [word for word in re.split(r"[^a-z0-9]+", lower) if word]
    if not words or words[-1] in _PLACES or (words[-1] == "token" and len(words) > 1 and words[-2] in _MARKS):
        return False
    return bool(_WORDS & set(words)) or any(part in lower for part in _PARTS)


def secrets(environment: Mapping[str, str] = os.environ) -> frozenset[str]:
    """The values that are hidden now."""
    named = (value.strip() for name, value in environment.items() if names_a_secret(name))
    return frozenset(value for value in (*named, *_remembered) if len(value) >= SHORTEST)


def redact_values(text: str) -> str:
    """`text` without the secrets that are known by value."""
    known = secrets()
    return _pattern(known).sub(HIDDEN, text) if known else text


def redact(text: str) -> str:
    """`text` without secrets, known by value or by the name before them."""
    text = redact_values(text)
    text = _NAMED.sub(rf"\g<1>{HIDDEN}", text)
    text = _BEARER.sub(rf"\g<1>{HIDDEN}", text)
    return _USER.sub(rf"\g<1>{HIDDEN}\g<2>", text)


def redact_data(value: Any, name: str = "") -> Any:
    """Plain data with its texts redacted, wholly where their key names a secret that is one of `_PARTS` or a token."""
    if isinstance(value, Mapping):
        return {key: redact_data(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact_data(inner, name) for inner in value]
    if not isinstance(value, str):
        return value
    return HIDDEN if value and _is_private(name) else redact(value)


def _is_private(key: str) -> bool:
    """Stricter than for the environment: `teacher_key` is a word of recipes and names a field."""
    last = re.split(r"[^a-z0-9]+", key.lower().replace("-", "_"))[-1]
    return names_a_secret(key) and (last != "key" or any(part in key.lower() for part in _PARTS))


@functools.lru_cache(maxsize=8)
def _pattern(values: frozenset[str]) -> re.Pattern[str]:
    forms: set[str] = set()
    for value in values:
        # A key of many lines (PEM) is also hidden line by line, as a log may wrap it.
        for part in {value, *(line for line in value.splitlines() if len(line) >= 2 * SHORTEST and "--" not in line)}:
            forms |= {part, json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1], quote(part, safe="")}
            forms.add(repr(part)[1:-1])
            forms.add(base64.b64encode(part.encode(errors="surrogateescape")).decode().rstrip("="))
    return re.compile("|".join(map(re.escape, sorted(forms, key=len, reverse=True))))


class RedactedRecord(logging.LogRecord):
    """What is logged, whoever logs it and whichever handler writes it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.exc_info and self.exc_info[0] is not None:
            self.exc_text = redact(logging.Formatter().formatException(self.exc_info))
        if self.stack_info:
            self.stack_info = redact(self.stack_info)

    def getMessage(self) -> str:
        return redact(super().getMessage())


def install() -> None:
    """Redact this process's log, and the tracebacks of what nobody catches."""
    logging.setLogRecordFactory(RedactedRecord)
    sys.excepthook = _on_exception
    threading.excepthook = lambda failed: _on_exception(
        failed.exc_type, failed.exc_value or failed.exc_type(), failed.exc_traceback
    )


def _on_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, SystemExit):
        sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))

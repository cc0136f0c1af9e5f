"""What clients and servers say to each other: JSON objects, one a line where an answer is a stream.

    POST /attach    {session, reload}                                   -> what the server is
    POST /generate  {session, sampling, eos_ids, requests: [...]}       -> a line for each response, as it finishes
    POST /refit     {session, version, name}                            -> {version, seconds}
    GET  /health                                                        -> {status, version, steps, running}

A *session* is one attempt of one run. Who attaches last has the server: requests of an earlier session are refused
(409), so that a trainer which was given up for dead cannot change the weights under its successor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar, get_type_hints

from nemo_opd.types import Sampling

BEAT_SECONDS = 1.0
"""A stream carries at least one line in this time: ``{"steps": n}`` where nothing finished."""

Message = TypeVar("Message", bound="_Message")


class BadMessage(ValueError):
    """Something that the other side should not have said."""


@dataclass(frozen=True)
class _Message:
    @classmethod
    def read(cls: type[Message], values: object) -> Message:
        """Raises BadMessage for other keys or types than the fields'."""
        hints = get_type_hints(cls)
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            got = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise BadMessage(f"{cls.__name__}: got {got}; expected {sorted(names)}")
        return cls(**{name: _checked(cls, name, hints[name], values[name]) for name in names})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _checked(cls: type, name: str, hint: object, value: object) -> Any:
    where = f"{cls.__name__}.{name}"
    if hint == tuple[int, ...]:
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise BadMessage(f"{where}: got {str(value)[:80]}; expected a list of whole numbers")
        return tuple(value)
    if hint in (int, float, bool, str) and not (type(value) is hint or (hint is float and type(value) is int)):
        raise BadMessage(f"{where}: got {str(value)[:80]!r}; expected {hint}")
    return value


@dataclass(frozen=True)
class Attach(_Message):
    """A client begins a session."""

    session: str
    reload: bool
    """Go back to the weights of the server's own folder; otherwise a server that was given others refuses to write
    until the next refit."""


@dataclass(frozen=True)
class Attached(_Message):
    """What the server is."""

    vocab_size: int
    positions: int
    """Longest sequence, prompt included."""
    max_running: int
    vllm: str


@dataclass(frozen=True)
class WireSampling(_Message):
    """`nemo_opd.types.Sampling` without its length, which each request has for itself."""

    temperature: float
    top_p: float
    top_k: int
    greedy: bool

    @classmethod
    def of(cls, sampling: Sampling) -> WireSampling:
        return cls(sampling.temperature, sampling.top_p, sampling.top_k, sampling.greedy)


@dataclass(frozen=True)
class WireRequest(_Message):
    """One response to write."""

    key: int
    """Names the request in the answer."""
    prompt: tuple[int, ...]
    prefix: tuple[int, ...]
    """Response tokens that are there already."""
    seed: int
    tokens: int
    """To be written at most, the prefix not counted."""


@dataclass(frozen=True)
class Generate(_Message):
    """Responses to write, all with the same sampling; they start together."""

    session: str
    sampling: WireSampling
    eos_ids: tuple[int, ...]
    requests: tuple[WireRequest, ...]

    @classmethod
    def read(cls, values: object) -> Generate:
        if not isinstance(values, dict) or not isinstance(values.get("requests"), list):
            raise BadMessage("Generate: expected an object with a list of requests")
        nested = {
            "sampling": WireSampling.read(values.get("sampling")),
            "requests": tuple(map(WireRequest.read, values["requests"])),
        }
        return super().read({**values, **nested})


@dataclass(frozen=True)
class Written(_Message):
    """A finished response, a line of the stream."""

    key: int
    ids: tuple[int, ...]
    """Drawn tokens, EOS included; not the prefix."""
    logprobs: Sequence[float]
    """nats, of the distribution that was drawn from"""
    versions: Sequence[Sequence[int]]
    """[policy version, first token] of each run of tokens that one version wrote"""


@dataclass(frozen=True)
class Refit(_Message):
    """A set of weights to take."""

    session: str
    version: int
    name: str
    """Of the folder below the server's weights_dir."""


def kind_of(line: Mapping[str, Any]) -> str:
    """``written``, ``failed`` (key, error), ``beat`` (steps) or ``end`` of a stream's line."""
    if "ids" in line:
        return "written"
    return "failed" if "error" in line else "end" if "end" in line else "beat"

"""What clients and servers say to each other: JSON objects, one a line where an answer is a stream.

    POST /attach    {session, reload}                                   -> what the server is
    GET  /health                                                        -> {status, steps, running, ...}
    POST /generate  {session, sampling, eos_ids, requests: [...]}       -> a line for each response, as it finishes
    POST /refit     {session, version, name}                            -> {version}
    POST /transfer  {session, version, action, info}                    -> {version}
    POST /sleep     {session}                                           -> {}
    POST /score     {need, k, requests: [...]}                          -> a line for each response, as it finishes

The last is of teachers alone, the four before it are of writers alone.

A *session* is one attempt of one run. Who attaches last has the writer: requests of an earlier session are refused
(409), so that a trainer which was given up for dead cannot change the weights under its successor. A teacher has
nothing that could change; several runs may ask the same one.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from nemo_opd.types import Need, Sampling

BEAT_SECONDS = 1.0
"""A stream carries at least one line in this time: ``{"steps": n}`` where nothing finished."""

Message = TypeVar("Message", bound="_Message")
AForm = TypeVar("AForm", bound="Form")


class BadMessage(ValueError):
    """Something that the other side should not have said."""


class Refused(Exception):
    """An answer other than 200: its HTTP status and the reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class EngineFailed(RuntimeError):
    """A server's engine is no more: what was asked of it can be asked of another server."""


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
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, _Message):
        return value.to_dict()
    nested = isinstance(value, tuple) and bool(value) and isinstance(value[0], _Message)
    return [item.to_dict() for item in value] if nested else value


def _checked(cls: type, name: str, hint: object, value: object) -> Any:
    where = f"{cls.__name__}.{name}"
    if hint == tuple[int, ...]:
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise BadMessage(f"{where}: got {str(value)[:80]}; expected a list of whole numbers")
        return tuple(value)
    if hint == Mapping[str, Any] and not isinstance(value, dict):
        raise BadMessage(f"{where}: got {str(value)[:80]}; expected an object")
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

    role: str
    weights: str
    """`weights_id` of the server's own folder."""
    vocab_size: int
    """Ids that the model knows."""
    scored_ids: int
    """A teacher's probabilities are about the ids below this."""
    at_ids: bool
    """Can it score ids that are given?"""
    positions: int
    """Longest sequence, prompt included."""
    max_running: int
    vllm: str
    transport: str = "disk"
    """How a writer takes weights."""
    workers: int = 1
    """Processes of its engine."""


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
class Form(_Message):
    """A call with many requests that is answered by a stream of lines, one for each request."""

    path: ClassVar[str]
    item: ClassVar[type[_Message]]
    """Of a request; each has a `key`, which names it in the answer."""

    requests: tuple[Any, ...]

    @classmethod
    def read(cls: type[AForm], values: object) -> AForm:
        if not isinstance(values, dict) or not isinstance(values.get("requests"), list):
            raise BadMessage(f"{cls.__name__}: expected an object with a list of requests")
        return super().read({**values, "requests": tuple(map(cls.item.read, values["requests"]))})


@dataclass(frozen=True)
class Generate(Form):
    """Responses to write, all with the same sampling; they start together."""

    path = "/generate"
    item = WireRequest

    session: str
    sampling: WireSampling
    eos_ids: tuple[int, ...]
    best: int = 0
    """Most probable ids that are reported for each token, 0 for none. Wants temperature 1 without top_p and top_k."""

    @classmethod
    def read(cls, values: object) -> Generate:
        sampling = WireSampling.read(values.get("sampling") if isinstance(values, dict) else None)
        return super().read({**values, "sampling": sampling} if isinstance(values, dict) else values)


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
    best: str
    """`packed`: ids int32 and logprobs float32 [tokens, k], see `nemo_opd.types.BestIds`; empty unless asked for"""


@dataclass(frozen=True)
class Refit(_Message):
    """A set of weights to take."""

    session: str
    version: int
    name: str
    """Of the folder below the server's weights_dir."""


CONNECT, START, UPDATE, FINISH = TRANSFERS = ("connect", "start", "update", "finish")
"""Steps of a transfer of weights straight from the trainer: once, then three of them for each set."""


@dataclass(frozen=True)
class Transfer(_Message):
    """A step of a transfer."""

    session: str
    version: int
    """Of the weights; of no meaning when connecting."""
    action: str
    """One of `TRANSFERS`."""
    info: Mapping[str, Any]
    """What vLLM's weight-transfer engine wants to know; see `handles`."""


@dataclass(frozen=True)
class Sleep(_Message):
    """Give the GPU's memory to somebody else; the next request or weights wake the server."""

    session: str


NEEDS = {"sampled": Need.SAMPLED, "at_ids": Need.AT_IDS, "top_k": Need.TOP_K}
"""What a teacher on a server can be asked for."""


@dataclass(frozen=True)
class WireScore(_Message):
    """One response to score."""

    key: int
    context: tuple[int, ...]
    response: tuple[int, ...]
    at_ids: str
    """`packed`: ids int64 [response, k]; empty unless they are what is asked for"""


@dataclass(frozen=True)
class Score(Form):
    """Responses to score, all for the same need."""

    path = "/score"
    item = WireScore

    need: str
    """One of `NEEDS`."""
    k: int


@dataclass(frozen=True)
class Scored(_Message):
    """The scores of a response, a line of the stream."""

    key: int
    numbers: str
    """`packed`: logprobs float32 [response, k], nats, k = 1 for sampled; with top_k ids int64 [response, k] besides"""


def packed(tensors: Mapping[str, Tensor]) -> str:
    """Tensors as text: base64 of safetensors."""
    return base64.b64encode(save({name: tensor.contiguous() for name, tensor in tensors.items()})).decode()


def unpacked(text: str, expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Tensor]:
    """What was `packed`. Raises BadMessage for other names, dtypes or shapes than expected."""
    try:
        tensors = load(base64.b64decode(text, validate=True))
    except (binascii.Error, SafetensorError) as error:
        raise BadMessage(f"packed tensors: {error}") from error
    got = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if got != dict(expected):
        raise BadMessage(f"packed tensors: got {got}; expected {dict(expected)}")
    return tensors

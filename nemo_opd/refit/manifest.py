"""The list of what a set of weights consists of, so that a half transfer is never taken for a whole one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_SHOWN = 5
"""Names that an error message lists before it only counts."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor. Example: ``TensorSpec("lm_head.weight", (151936, 1024), "bfloat16")``."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """torch's name without its prefix"""

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorSpec:
        return cls(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def meta(self) -> Tensor:
        """A tensor of this shape and dtype without values."""
        return torch.empty(self.shape, dtype=getattr(torch, self.dtype), device="meta")


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    rest = len(ordered) - _SHOWN
    return ", ".join(ordered[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


class WeightCheck:
    """Compares weights with what is expected while they stream by, without keeping them."""

    def __init__(self, expected: Mapping[str, tuple[int, ...]], optional: Iterable[str] = ()) -> None:
        """`expected`: shape of every tensor by name; `optional`: names among them that may be absent."""
        self._expected = dict(expected)
        self._missing = set(self._expected) - set(optional)
        self._seen: set[str] = set()

    def see(self, name: str, tensor: Tensor) -> None:
        """Raises ValueError for an unknown name, a second tensor of the same name, or another shape."""
        if name not in self._expected:
            raise ValueError(f"weights: got a tensor {name}; expected only {_some(self._expected)}")
        if name in self._seen:
            raise ValueError(f"weights: got {name} twice; expected every tensor once")
        if tuple(tensor.shape) != self._expected[name]:
            raise ValueError(f"weights: got {name} of shape {tuple(tensor.shape)}; expected {self._expected[name]}")
        self._seen.add(name)
        self._missing.discard(name)

    def finish(self) -> None:
        """Raises ValueError when tensors are missing."""
        if self._missing:
            raise ValueError(
                f"weights: got {len(self._seen)} tensors; expected {len(self._missing)} more: {_some(self._missing)}"
            )


@dataclass(frozen=True)
class Manifest:
    """A complete set of weights of one policy version."""

    version: int
    tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, version: int, weights: Iterable[tuple[str, Tensor]]) -> Manifest:
        """The manifest of named tensors (meta tensors will do), in their order. Raises ValueError for a double name."""
        tensors = tuple(TensorSpec.of(name, tensor) for name, tensor in weights)
        if len({spec.name for spec in tensors}) != len(tensors):
            raise ValueError(f"manifest: got {len(tensors)} tensors, some with the same name; expected unique names")
        return cls(version, tensors)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(spec.meta().nbytes for spec in self.tensors)

    def to_json(self) -> str:
        rows = [[spec.name, list(spec.shape), spec.dtype] for spec in self.tensors]
        return json.dumps({"version": self.version, "tensors": rows})

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read back what `to_json` wrote. Raises ValueError for anything else."""
        try:
            data = json.loads(text)
            if set(data) != {"version", "tensors"} or not _is_count(data["version"], least=-1):
                raise ValueError("keys or version")
            tensors = tuple(_spec(*row) for row in data["tensors"])
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"manifest: got {text[:80]!r} ({error}); expected what Manifest.to_json writes") from error
        if len({spec.name for spec in tensors}) != len(tensors):
            raise ValueError("manifest: got a tensor name twice; expected unique names")
        return cls(data["version"], tensors)

    def check(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Hand `weights` on one by one, and raise ValueError at the first that is not as listed, or at the end."""
        check = WeightCheck({spec.name: spec.shape for spec in self.tensors})
        dtypes = {spec.name: spec.dtype for spec in self.tensors}
        for name, tensor in weights:
            check.see(name, tensor)
            if (got := TensorSpec.of(name, tensor).dtype) != dtypes[name]:
                raise ValueError(f"weights: got {name} as {got}; expected {dtypes[name]}")
            yield name, tensor
        check.finish()


def _is_count(value: object, least: int = 0) -> bool:
    return type(value) is int and value >= least


def _spec(name: object, shape: object, dtype: object) -> TensorSpec:
    good_shape = isinstance(shape, list) and all(_is_count(size) for size in shape)
    good_dtype = isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)
    if not (isinstance(name, str) and good_shape and good_dtype):
        raise ValueError(f"tensor {name!r} {shape!r} {dtype!r}")
    assert isinstance(name, str) and isinstance(shape, list) and isinstance(dtype, str)
    return TensorSpec(name, tuple(shape), dtype)

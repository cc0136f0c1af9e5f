"""CUDA memory handles as JSON. vLLM would send them pickled, and what is unpickled can run anything.

A handle is the tuple of arguments of torch's `rebuild_cuda_tensor`: two classes, sizes, a dtype and a few byte strings.
Each is written as what it is; a reader takes nothing else, so the worst that a forged handle does is to name memory
that CUDA refuses to open.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nemo_opd.engines.vllm.wire import BadMessage

HANDLES = "ipc_handles"
"""Key of an update whose value is such a handle by GPU, or a list of these."""

_CLASSES: dict[str, type] = {
    "torch.Tensor": torch.Tensor,
    "torch.nn.Parameter": torch.nn.Parameter,
    "torch.TypedStorage": torch.TypedStorage,
    "torch.UntypedStorage": torch.UntypedStorage,
}
_NAMES = {kind: name for name, kind in _CLASSES.items()}


def to_json(update: Mapping[str, Any]) -> dict[str, Any]:
    """An update of vLLM's, whose handles are encoded; other keys are JSON already."""
    if HANDLES not in update:
        return dict(update)
    given = update[HANDLES]
    encoded = [_encoded(one) for one in given] if isinstance(given, list) else _encoded(given)
    return {**update, HANDLES: encoded}


def from_json(update: Mapping[str, Any]) -> dict[str, Any]:
    """What `to_json` encoded. Raises BadMessage for anything else."""
    if pickled := [key for key in update if "pickle" in key]:
        raise BadMessage(f"{', '.join(pickled)}: got pickled handles; expected {HANDLES} as JSON")
    if HANDLES not in update:
        return dict(update)
    given = update[HANDLES]
    return {**update, HANDLES: [_decoded(one) for one in given] if isinstance(given, list) else _decoded(given)}


def _encoded(handle: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    return {gpu: [_write(value) for value in arguments] for gpu, arguments in handle.items()}


def _decoded(handle: object) -> dict[str, tuple[Any, ...]]:
    if not isinstance(handle, dict) or not all(isinstance(arguments, list) for arguments in handle.values()):
        raise BadMessage(f"{HANDLES}: expected lists of arguments by GPU")
    return {gpu: tuple(map(_read, arguments)) for gpu, arguments in handle.items()}


def _write(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, (tuple, torch.Size)):
        return {"sizes": list(value)}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, type) and value in _NAMES:
        return {"class": _NAMES[value]}
    raise BadMessage(f"{HANDLES}: got {type(value).__name__}; expected what rebuild_cuda_tensor takes")


def _read(value: object) -> Any:
    if value is None or isinstance(value, (bool, int)):
        return value
    match value:
        case {"sizes": list(sizes)} if all(type(size) is int for size in sizes):
            return torch.Size(sizes)
        case {"bytes": str(text)}:
            try:
                return base64.b64decode(text, validate=True)
            except binascii.Error as error:
                raise BadMessage(f"{HANDLES}: {error}") from error
        case {"dtype": str(name)} if isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        case {"class": str(name)} if name in _CLASSES:
            return _CLASSES[name]
    raise BadMessage(f"{HANDLES}: got {str(value)[:60]}; expected what rebuild_cuda_tensor takes")

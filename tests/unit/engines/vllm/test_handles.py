"""What can and what cannot be said about CUDA memory in JSON."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from nemo_opd.engines.vllm.handles import from_json, to_json
from nemo_opd.engines.vllm.wire import BadMessage

ARGUMENTS = (
    torch.Tensor, torch.Size((3, 4)), (4, 1), 0, torch.TypedStorage, torch.bfloat16, 0, b"\x00handle\xff" * 4, 48, 512,
    False, b"counter", 8, b"event", True,
)  # fmt: skip
"""As `torch.multiprocessing.reductions.reduce_tensor` makes them of a tensor on a GPU."""


def test_there_are_as_many_arguments_as_torch_takes() -> None:
    assert rebuild_cuda_tensor.__code__.co_argcount == len(ARGUMENTS)


@pytest.mark.parametrize("several", [False, True], ids=["packed", "one each"])
def test_what_is_read_is_what_was_written(several: bool) -> None:
    handle = {"GPU-1": ARGUMENTS, "GPU-2": (*ARGUMENTS[:-1], False)}
    update = {"names": ["a"], "ipc_handles": [handle, handle] if several else handle}
    read = from_json(json.loads(json.dumps(to_json(update))))
    first = read["ipc_handles"][0] if several else read["ipc_handles"]
    assert first["GPU-1"] == (*ARGUMENTS[:2], torch.Size((4, 1)), *ARGUMENTS[3:])
    assert read["names"] == ["a"]


def test_other_updates_pass_as_they_are() -> None:
    assert from_json(to_json({"names": ["a"], "shapes": [[2]]})) == {"names": ["a"], "shapes": [[2]]}


@pytest.mark.parametrize(
    "value",
    [{"class": "os.system"}, {"dtype": "load"}, {"bytes": "%"}, {"sizes": ["x"]}, "text", 1.5, {"class": "a", "b": 1}],
)
def test_anything_else_is_refused(value: object) -> None:
    with pytest.raises(BadMessage, match=r"expected what rebuild_cuda_tensor takes|ipc_handles"):
        from_json({"ipc_handles": {"GPU-1": [value]}})


def test_nothing_is_unpickled() -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return (pytest.fail, ("it was unpickled",))

    text = pickle.dumps(Payload())
    with pytest.raises(BadMessage):
        from_json({"ipc_handles": [text.hex()]})
    with pytest.raises(BadMessage, match="ipc_handles_pickled"):
        from_json({"ipc_handles_pickled": text.hex()})
    with pytest.raises(BadMessage, match="expected what rebuild_cuda_tensor takes"):
        to_json({"ipc_handles": {"GPU-1": [Payload()]}})

"""What a server is told, and what it and its clients say: anything else is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_opd.engines.vllm.settings import ServerSettings, read_key
from nemo_opd.engines.vllm.wire import (
    BadMessage,
    Generate,
    Refit,
    Score,
    WireRequest,
    WireSampling,
    WireScore,
    Written,
    packed,
    unpacked,
)

SETTINGS = ServerSettings(model="models/x", role="writer", ready_file="ready", weights_dir="weights")


def test_settings_go_through_a_file() -> None:
    settings = replace(SETTINGS, max_positions=128, key_file="key", host="0.0.0.0")
    assert ServerSettings.from_json(settings.to_json()) == settings
    least = {name: getattr(SETTINGS, name) for name in ("model", "role", "ready_file", "weights_dir")}
    assert ServerSettings.from_json(json.dumps(least)) == SETTINGS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"port": "80"}, "port"),
        ({"more": 1}, "expected"),
        ({"role": "admin"}, "role"),
        ({"host": "0.0.0.0"}, "without a key"),
        ({"host": "node7"}, "without a key"),
    ],
)
def test_other_settings_are_refused(change: dict[str, Any], message: str) -> None:
    text = json.dumps({**json.loads(SETTINGS.to_json()), **change})
    with pytest.raises(ValueError, match=message):
        ServerSettings.from_json(text)


def test_a_key_is_read_from_a_file_that_its_owner_alone_can_read(tmp_path: Path) -> None:
    assert read_key(None) is None
    file = tmp_path / "key"
    file.touch(mode=0o600)
    with pytest.raises(ValueError, match="empty"):
        read_key(file)
    file.write_text(" secret \n")
    assert read_key(file) == "secret"
    file.chmod(0o640)
    with pytest.raises(ValueError, match="chmod 600"):
        read_key(file)


MESSAGE = Generate(
    (WireRequest(0, (3, 4), (5,), 2**63, 8), WireRequest(1, (3,), (), 0, 1)),
    "session",
    WireSampling(1.0, 0.9, 0, False),
    (1, 2),
    64,
)
SCORE = Score((WireScore(0, (3, 4), (5,), ""), WireScore(1, (3,), (1, 2), "AAAA")), "sampled", 0)


def test_messages_survive_json() -> None:
    assert Generate.read(json.loads(json.dumps(MESSAGE.to_dict()))) == MESSAGE
    assert Score.read(json.loads(json.dumps(SCORE.to_dict()))) == SCORE
    written = Written(3, (1, 2), [-0.5, -1e-9], [[4, 0]], "AAAA")
    assert Written.read(json.loads(json.dumps(written.to_dict()))) == written


@pytest.mark.parametrize(
    "change",
    [
        {"session": None},
        {"eos_ids": [1, "2"]},
        {"eos_ids": [True]},
        {"best": None},
        {"requests": [{}]},
        {"requests": {"key": 1}},
        {"sampling": {"temperature": 1.0}},
        {"sampling": {**MESSAGE.sampling.to_dict(), "greedy": 0}},
        {"more": 1},
    ],
)
def test_other_messages_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadMessage):
        Generate.read(json.loads(json.dumps({**MESSAGE.to_dict(), **change})))


@pytest.mark.parametrize("values", [[], None, 3, {"session": "x", "version": 1.5, "name": "y"}, {"session": "x"}])
def test_something_else_than_a_message_is_refused(values: object) -> None:
    with pytest.raises(BadMessage):
        Refit.read(values)


def test_numbers_travel_as_they_are() -> None:
    logprobs = torch.tensor([[-1.5, float("nan")], [-float("inf"), 1e-30]])
    numbers = {"logprobs": logprobs, "ids": torch.tensor([[1], [2]])}
    expected = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in numbers.items()}
    found = unpacked(packed({**numbers, "logprobs": logprobs.t()}), expected)
    assert torch.equal(found["logprobs"].nan_to_num(9.0), logprobs.t().nan_to_num(9.0))
    assert torch.equal(found["ids"], numbers["ids"])


@pytest.mark.parametrize(
    "text", ["", "not base64!", "AAAA", packed({"ids": torch.zeros(2, 1)}), packed({"ids": torch.zeros(1, 1).long()})]
)
def test_other_numbers_are_refused(text: str) -> None:
    with pytest.raises(BadMessage):
        unpacked(text, {"ids": (torch.int64, (2, 1))})

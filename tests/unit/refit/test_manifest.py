"""A manifest survives JSON and notices every way in which weights can differ from it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from nemo_opd.refit.manifest import Manifest, TensorSpec
from tests.helpers.tiny import tiny_model


def weights() -> list[tuple[str, Tensor]]:
    return list(tiny_model(num_hidden_layers=1).state_dict().items())


def test_describes_a_model_also_on_the_meta_device() -> None:
    manifest = Manifest.of(5, weights())
    assert manifest.version == 5
    assert TensorSpec("lm_head.weight", (96, 32), "float32") in manifest.tensors
    meta = tiny_model(num_hidden_layers=1).to("meta")
    assert Manifest.of(5, meta.state_dict().items()) == manifest


def test_json_round_trip() -> None:
    manifest = Manifest.of(5, [*weights(), ("scalar", torch.zeros((), dtype=torch.bfloat16))])
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "null",
        '{"version": 1}',
        '{"version": "1", "tensors": []}',
        '{"version": true, "tensors": []}',
        '{"version": -2, "tensors": []}',
        '{"version": 1, "tensors": [], "more": 0}',
        '{"version": 1, "tensors": [["a", [2]]]}',
        '{"version": 1, "tensors": [["a", [-2], "float32"]]}',
        '{"version": 1, "tensors": [["a", [2.0], "float32"]]}',
        '{"version": 1, "tensors": [["a", "2", "float32"]]}',
        '{"version": 1, "tensors": [["a", [2], "load"]]}',
        '{"version": 1, "tensors": [[1, [2], "float32"]]}',
        '{"version": 1, "tensors": [["a", [2], "float32"], ["a", [2], "float32"]]}',
        "[" * 100_000,
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="manifest"):
        Manifest.from_json(text)


def test_check_hands_on_what_is_as_listed() -> None:
    given = weights()
    assert [name for name, _ in Manifest.of(0, given).check(iter(given))] == [name for name, _ in given]
    backwards = given[::-1]
    assert [name for name, _ in Manifest.of(0, given).check(iter(backwards))] == [name for name, _ in backwards]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w[:-1], r"expected 1 more: lm_head\.weight"),
        (lambda w: w[:2], "more: .* and .* more"),
        (lambda w: [*w, ("extra", torch.zeros(1))], "got a tensor extra"),
        (lambda w: [*w, w[0]], "twice"),
        (lambda w: [(w[0][0], w[0][1][:-1]), *w[1:]], r"of shape \(95, 32\); expected \(96, 32\)"),
        (lambda w: [(w[0][0], w[0][1].T), *w[1:]], r"of shape \(32, 96\)"),
        (lambda w: [(w[0][0], w[0][1].half()), *w[1:]], "as float16; expected float32"),
    ],
)
def test_check_refuses_and_names(change: object, message: str) -> None:
    manifest = Manifest.of(0, weights())
    with pytest.raises(ValueError, match=message):
        list(manifest.check(change(weights())))  # type: ignore[operator]


def test_a_name_twice_makes_no_manifest() -> None:
    with pytest.raises(ValueError, match="same name"):
        Manifest.of(0, [("a", torch.zeros(1)), ("a", torch.zeros(1))])


def test_the_format_is_plain_json() -> None:
    data = json.loads(Manifest.of(3, [("a", torch.zeros(2, 3, dtype=torch.bfloat16))]).to_json())
    assert data == {"version": 3, "tensors": [["a", [2, 3], "bfloat16"]]}

"""Code in the documentation runs as it stands there."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nemo_opd.algorithms import ALGORITHMS
from nemo_opd.config import SLOTS
from nemo_opd.configuration.load import load
from nemo_opd.losses import build_loss
from nemo_opd.losses.registry import LOSSES

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def example() -> Iterator[None]:
    """Runs the example of docs/add-an-algorithm.md, and takes what it registered out again."""
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "add-an-algorithm.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) < 40
    module = types.ModuleType("documented_example")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(code, "docs/add-an-algorithm.md", "exec"), module.__dict__)
    yield
    del sys.modules[module.__name__]
    for registry in (LOSSES, SLOTS["loss"], ALGORITHMS):
        registry.pop("hellinger", None)


def test_the_example_of_a_new_algorithm_is_one(example: None) -> None:
    settings = ["student.model=a", "run.dir=b", "train.steps=1", "data.path=c", "loss.power=2"]
    config = load(None, ["algorithm=hellinger", *settings], checked=False)
    loss = build_loss(config.loss)
    draws = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 13, generator=draws, dtype=torch.float64) for _ in "st")
    student.requires_grad_()
    value = loss(student_logits=student, token_ids=torch.arange(5), teacher_logits=teacher)
    value.backward()
    twin = student.detach().requires_grad_()
    affinity = (twin.softmax(1) * teacher.softmax(1)).sqrt().sum(1)
    expected = ((1 - affinity) ** 2).mean()
    expected.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(student.grad, twin.grad)

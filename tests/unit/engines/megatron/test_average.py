"""The moving average of weights, against a loop written out by hand."""

from __future__ import annotations

import pytest
import torch

from nemo_opd.engines.megatron.average import WeightAverage


def _model(seed: int, dtype: torch.dtype) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)).to(dtype)


def _set(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.95, 1.0])
def test_the_average_is_what_the_formula_says(decay: float) -> None:
    student, teacher = _model(0, torch.float64), _model(1, torch.float64)
    expected = [parameter.detach().clone() for parameter in teacher.parameters()]
    average = WeightAverage(teacher, decay)
    for step in range(7):
        _set(student, step)
        average.update(student)
        for n, parameter in enumerate(student.parameters()):
            for i in range(parameter.numel()):
                old, new = float(expected[n].view(-1)[i]), float(parameter.detach().view(-1)[i])
                expected[n].view(-1)[i] = decay * old + (1.0 - decay) * new
        for got, hand in zip(teacher.parameters(), expected, strict=True):
            torch.testing.assert_close(got.data, hand, rtol=1e-13, atol=1e-14)


def test_small_moves_of_a_half_precision_student_add_up() -> None:
    """1000 updates towards a point that is less than a rounding step away each time: bfloat16 alone would stay put."""
    student, teacher = _model(0, torch.bfloat16), _model(0, torch.bfloat16)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.fill_(1.0)
        for parameter in student.parameters():
            parameter.fill_(1.5)
    average = WeightAverage(teacher, 0.999)
    for _ in range(1000):
        average.update(student)
    for parameter in teacher.parameters():
        assert parameter.dtype == torch.bfloat16 and not parameter.requires_grad
        expected = torch.full_like(parameter.data, 1.5 - 0.5 * 0.999**1000)
        assert torch.equal(parameter.data, expected)


def test_the_student_is_left_alone() -> None:
    student, teacher = _model(0, torch.float32), _model(1, torch.float32)
    before = [parameter.detach().clone() for parameter in student.parameters()]
    WeightAverage(teacher, 0.5).update(student)
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in student.parameters())

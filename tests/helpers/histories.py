"""Made-up runs, as the metrics of their steps: a healthy one, and one for each way to fail."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

Metrics = dict[str, float]
FAILS_FROM = 200
"""First step of a failure."""


def healthy(seed: int = 0, prompts: int = 16, reward: float = 0.4, gain: float = 0.3) -> Callable[[int], Metrics]:
    """KL falls, reward rises, and every number jumps about: few prompts a step, a single spike of the gradient norm
    every now and then, responses that grow with what the student learns."""
    rng = random.Random(seed)

    def step(number: int) -> Metrics:
        learned = 1.0 - math.exp(-number / 150)
        success = reward + gain * learned
        kl = (0.4 * (1 - learned) + 0.05) * rng.lognormvariate(0, 0.3)
        return {
            "reward/mean": sum(rng.random() < success for _ in range(prompts)) / prompts,
            "response/length": (300 + 200 * learned) * rng.lognormvariate(0, 0.25),
            "response/truncated_share": sum(rng.random() < 0.1 for _ in range(prompts)) / prompts,
            "response/repeated_3grams": min(1.0, max(0.0, rng.gauss(0.15 + 0.05 * learned, 0.04))),
            "train/student_entropy": (0.5 - 0.25 * learned) * rng.lognormvariate(0, 0.2),
            "train/teacher_entropy": 0.3 * rng.lognormvariate(0, 0.2),
            "train/student_mass": min(1.0, rng.gauss(0.97, 0.01)),
            "train/teacher_mass": min(1.0, rng.gauss(0.9, 0.02)),
            "train/kl": kl,
            "train/sampled_kl": kl + rng.gauss(0, 0.05),
            "train/importance_out_of_bounds": rng.random() * 0.01,
            "optimizer/grad_norm": rng.lognormvariate(0, 0.4) * (100 if rng.random() < 0.03 else 1),
            "tokens/dropped_share": 0.0,
            "tokens/written": 5000.0,
            "loss/total": kl,
        }

    return step


def run(
    step: Callable[[int], Metrics], steps: int, fail: Callable[[float, Metrics], Metrics] | None = None
) -> Iterator:
    """(step, metrics), the metrics changed by ``fail(progress of the failure in [0, 1], metrics)`` once it begins."""
    for number in range(1, steps + 1):
        metrics = step(number)
        if fail is not None and number >= FAILS_FROM:
            metrics = metrics | fail(min(1.0, (number - FAILS_FROM) / 50), metrics)
        yield number, metrics


def times(name: str, factor: float) -> Callable[[float, Metrics], Metrics]:
    """The metric is multiplied by `factor` in the end."""
    return lambda progress, metrics: {name: metrics[name] * factor**progress}


def towards(name: str, target: float) -> Callable[[float, Metrics], Metrics]:
    """The metric ends at `target`."""
    return lambda progress, metrics: {name: metrics[name] * (1 - progress) + target * progress}


def together(*failures: Callable[[float, Metrics], Metrics]) -> Callable[[float, Metrics], Metrics]:
    def fail(progress: float, metrics: Metrics) -> Metrics:
        for failure in failures:
            metrics = metrics | failure(progress, metrics)
        return metrics

    return fail


KL_NAMES = ("train/kl", "train/sampled_kl", "loss/total")

EXCUSED_BY_REWARD = {"length_inflation", "entropy_collapse"}
"""Failures that are none while the reward rises."""
FAILURES: dict[str, Callable[[float, Metrics], Metrics]] = {
    "length_inflation": times("response/length", 6.0),
    "repetition": towards("response/repeated_3grams", 0.9),
    "entropy_collapse": times("train/student_entropy", 0.02),
    "mass_collapse": towards("train/student_mass", 0.3),
    "truncation": towards("response/truncated_share", 0.95),
    "agreement_trap": together(*(times(name, 0.02) for name in KL_NAMES), towards("reward/mean", 0.05)),
    "divergence": times("optimizer/grad_norm", 300.0),
    "degradation": towards("reward/mean", 0.15),
    "dropped_scores": towards("tokens/dropped_share", 0.5),
    "importance_weights": towards("train/importance_out_of_bounds", 0.3),
}

"""Bounds of what is measured, by the coarser of the two dtypes that are compared.

docs/doctor.md says what they were chosen from: measured differences of engines that agree, times a margin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from nemo_opd.errors import ConfigError

RATIO_LOW, RATIO_HIGH = 0.8, 1.25
"""Between these a probability ratio is no news: the clipping range of PPO, and its inverse."""


@dataclass(frozen=True)
class Bounds:
    """Differences of log-probabilities are in nats; shares are between 0 and 1."""

    mean_difference: float
    """Of log-probabilities of the same tokens, in the mean; also the most of any range of positions."""
    largest_difference: float
    """A single token's; more is a warning, as one token among many may lie on an edge."""
    kl: float
    """Of one engine's distribution to another's with the same weights."""
    outside_share: float
    """Of tokens whose probability ratio is outside [0.8, 1.25]."""
    greedy_agreement: float
    """Least share of tokens that are the other engine's most probable ones too."""


DEFAULTS: Mapping[str, Bounds] = {
    "float32": Bounds(1e-4, 1e-2, 1e-6, 0.0, 0.99),
    "bfloat16": Bounds(0.06, 1.0, 5e-3, 0.02, 0.9),
}
BETTER = 1 / 3
"""Of the bounds of mean difference and KL: more is a warning."""


def bounds_for(dtypes: Sequence[str], overrides: Mapping[str, float]) -> Bounds:
    """Those of the coarsest of `dtypes`; float64 is held to float32's, in which log-probabilities are passed on."""
    bounds = DEFAULTS["bfloat16" if "bfloat16" in dtypes else "float32"]
    return replace(bounds, **overrides)


def parse_bounds(words: Sequence[str]) -> dict[str, float]:
    """``["kl=0.01"]`` -> ``{"kl": 0.01}``; raises ConfigError for what is no bound."""
    names = [field.name for field in fields(Bounds)]
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        try:
            if name not in names or not equals or not float(value) >= 0:
                raise ValueError(word)
        except ValueError:
            expected = f"NAME=NUMBER, NAME one of {', '.join(names)}"
            raise ConfigError("--bound", word, expected, "for example --bound kl=0.01") from None
        found[name] = float(value)
    return found

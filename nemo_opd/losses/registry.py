"""Losses and token weights by the name that a recipe writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeVar

from nemo_opd.config import REFUSED_LOSSES, SlotConfig
from nemo_opd.errors import ConfigError

if TYPE_CHECKING:
    from nemo_opd.losses.base import DistillationLoss
    from nemo_opd.losses.weights import TokenWeight

LOSSES: dict[str, type[DistillationLoss]] = {}
WEIGHTS: dict[str, type[TokenWeight]] = {}

T = TypeVar("T", bound=type)


def register_loss(name: str) -> Callable[[T], T]:
    """Make a `DistillationLoss` available as ``loss.name=<name>``; its constructor takes the slot's parameters."""

    def add(cls: T) -> T:
        assert name not in LOSSES, f"two losses are called {name}"
        LOSSES[name] = cls
        cls.name = name  # type: ignore[attr-defined]
        return cls

    return add


def register_weight(name: str) -> Callable[[T], T]:
    """Make a `TokenWeight` available as ``weight.name=<name>``."""

    def add(cls: T) -> T:
        assert name not in WEIGHTS, f"two weights are called {name}"
        WEIGHTS[name] = cls
        cls.name = name  # type: ignore[attr-defined]
        return cls

    return add


def _parameters(slot: SlotConfig) -> dict[str, object]:
    return {key: value for key, value in asdict(slot).items() if key != "name"}


def build_loss(slot: SlotConfig) -> DistillationLoss:
    """The loss that a slot names, with the slot's parameters.

    Raises:
        ConfigError: unknown name, or parameters that cannot work together.
    """
    if slot.name in REFUSED_LOSSES:
        reason, way_out = REFUSED_LOSSES[slot.name]
        raise ConfigError("loss.name", slot.name, reason, way_out)
    if slot.name not in LOSSES:
        raise ConfigError("loss.name", slot.name, f"one of {', '.join(sorted(LOSSES))}", "choose one of them")
    return LOSSES[slot.name](**_parameters(slot))


def build_weight(slot: SlotConfig) -> TokenWeight | None:
    """The token weight that a slot names; None for ``unit``.

    Raises:
        ConfigError: unknown name, or parameters that cannot work together.
    """
    if slot.name == "unit":
        return None
    if slot.name not in WEIGHTS:
        raise ConfigError(
            "weight.name", slot.name, f"one of {', '.join(sorted(['unit', *WEIGHTS]))}", "choose one of them"
        )
    return WEIGHTS[slot.name](**_parameters(slot))

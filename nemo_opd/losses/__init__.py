"""What is minimised at a token: NeMo modules, written once against a view of a distribution over the vocabulary.

`build_loss` and `build_weight` make what a recipe's slots name. Importing this package imports NeMo (seconds).
"""

from __future__ import annotations

from nemo_opd.losses import cross_entropy, full_vocabulary, policy_gradient  # noqa: F401 - they register themselves
from nemo_opd.losses.base import DistillationLoss, DistributionLoss, SampledTokenLoss
from nemo_opd.losses.registry import LOSSES, WEIGHTS, build_loss, build_weight
from nemo_opd.losses.weights import TokenWeight

__all__ = [
    "LOSSES",
    "WEIGHTS",
    "DistillationLoss",
    "DistributionLoss",
    "SampledTokenLoss",
    "TokenWeight",
    "build_loss",
    "build_weight",
]

"""What is minimised at a token: NeMo modules, written once against a view of a distribution over the vocabulary.

`build_loss` and `build_weight` make what a recipe's slots name. Importing this package imports NeMo (seconds).
"""

from __future__ import annotations

from nemo_opd.losses import (  # noqa: F401 - they register themselves
    cross_entropy,
    entropy_aware,
    extrapolated,
    forward_kl,
    head_plus_sample,
    jsd,
    k2,
    minillm,
    policy_gradient,
    renormalised,
    reverse_kl,
    skew_kl,
    stop_gradient,
    tail,
    trust_region,
    verifier_policy_gradient,
)
from nemo_opd.losses.base import DistillationLoss, DistributionLoss, SampledTokenLoss
from nemo_opd.losses.by_author import for_prefix
from nemo_opd.losses.registry import LOSSES, WEIGHTS, build_loss, build_weight
from nemo_opd.losses.weights import TokenWeight
from nemo_opd.losses.with_reward import with_reward

__all__ = [
    "LOSSES",
    "WEIGHTS",
    "DistillationLoss",
    "DistributionLoss",
    "SampledTokenLoss",
    "TokenWeight",
    "build_loss",
    "build_weight",
    "for_prefix",
    "with_reward",
]

"""Rules about `optimizer.overlap_param_gather`: what it does not go with, and where it would gain nothing."""

from __future__ import annotations

from nemo_opd.config import Config, DatasetPrefix, MixedPrefix
from nemo_opd.errors import ConfigError

_KEY = "optimizer.overlap_param_gather"


def gather_rules(config: Config) -> None:
    """Raises ConfigError where nothing is gathered, or all parameters are read as soon as they are updated."""
    if not config.optimizer.overlap_param_gather:
        return
    if config.optimizer.distributed is False:
        expected = "false without the distributed optimizer, as each replica updates all of its parameters"
        raise ConfigError(_KEY, True, expected, "leave optimizer.distributed out, or overlap_param_gather")
    if config.student.fp8.param_gather:
        # Megatron completes FP8 weights where a gathering is waited for, which was tried nowhere here.
        expected = "false beside student.fp8.param_gather"
        raise ConfigError(_KEY, True, expected, "choose one of the two")
    if _student_writes(config) and config.rollout.refit_every == 1:
        expected = "false with rollout.refit_every=1, where the generator takes all parameters right after the update"
        raise ConfigError(_KEY, True, expected, "leave it out, or refit less often (and train on older tokens)")
    for key, teacher in config.every_teacher().items():
        if teacher.source in ("current", "ema"):
            expected = f"false with {key}.source={teacher.source}, which takes all parameters right after the update"
            raise ConfigError(_KEY, True, expected, "leave it out")


def _student_writes(config: Config) -> bool:
    prefix = config.prefix
    return not (isinstance(prefix, DatasetPrefix) or (isinstance(prefix, MixedPrefix) and not prefix.on_policy_share))

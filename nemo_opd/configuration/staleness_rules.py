"""Rules about `rollout.staleness`: who can write while a step trains, and which losses may read what it wrote."""

from __future__ import annotations

from nemo_opd.config import Config, DatasetPrefix, K2Loss, KatStop, TeacherPrefix
from nemo_opd.errors import ConfigError


def staleness_rules(config: Config) -> None:
    """Raises ConfigError where nobody can write ahead, or a loss would take an older policy's tokens for its own."""
    if not config.rollout.staleness:
        return
    got = config.rollout.staleness
    if config.rollout.engine != "vllm":
        expected = f"0 with engine {config.rollout.engine}, which writes and trains in the same processes by turns"
        raise ConfigError("rollout.staleness", got, expected, "set rollout.engine=vllm, or leave staleness out")
    if config.rollout.servers.placement == "colocated":
        expected = "0 with placement colocated, where writing and training take turns on the same GPUs"
        way_out = "set rollout.servers.placement=separate, or leave staleness out"
        raise ConfigError("rollout.staleness", got, expected, way_out)
    if isinstance(config.prefix, DatasetPrefix):
        raise ConfigError("rollout.staleness", got, "0, as the data set wrote the responses", "leave it out")
    if isinstance(config.prefix, TeacherPrefix):
        expected = "0 with prefix teacher, as the teacher begins the responses in the trainer's processes"
        raise ConfigError("rollout.staleness", got, expected, "leave staleness out, or set prefix=student")
    if getattr(config.reward, "equal_groups", "keep") == "redraw":
        expected = f"keep or drop with rollout.staleness={got}, as further prompts would be begun when the step is due"
        raise ConfigError("reward.equal_groups", "redraw", expected, "choose one of these, or leave staleness out")
    if isinstance(config.stop, KatStop) and config.stop.form == "segments":
        expected = f"after with rollout.staleness={got}, as every rank and the teacher take part between two segments"
        raise ConfigError("stop.form", "segments", expected, "set stop.form=after, or leave staleness out")
    _correction(config)


def _correction(config: Config) -> None:
    """A loss of the sampled token is right on average over tokens of the policy that is trained; an older one's need
    the ratio of the two. A divergence of whole distributions is one after any prefix: nothing is drawn in it."""
    loss = config.loss
    plain = isinstance(loss, K2Loss) or getattr(loss, "importance_ratio", "sampler") == "none"
    if plain and not config.weight.needs_sampler_logprobs:
        expected = f"tis, icepop or sequence for loss {loss.name} with staleness, whose tokens an older policy drew"
        ratio = "" if isinstance(loss, K2Loss) else ", or loss.importance_ratio=sampler"
        raise ConfigError("weight.name", config.weight.name, expected, f"choose one of these{ratio}")

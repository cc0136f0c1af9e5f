"""Rules about the `reward` slot: what learns from a verifier needs one, and responses to compare."""

from __future__ import annotations

from nemo_opd.config import Config, GroupRelativeReward, MixedPrefix, UnitWeight, VerifierPolicyGradientLoss
from nemo_opd.errors import ConfigError


def reward_rules(config: Config) -> None:
    """What learns from the verifier needs one, and several responses per prompt to compare."""
    loss, reward = config.loss, config.reward
    alone = isinstance(loss, VerifierPolicyGradientLoss)
    if not isinstance(reward, GroupRelativeReward):
        if alone:
            expected = f"group_relative, which loss {loss.name} is made of"
            raise ConfigError("reward.name", reward.name, expected, "set reward=group_relative")
        return
    if config.verify.name == "none":
        way_out = "set verify.name (exact, integer, math, ...), or reward=none"
        raise ConfigError("verify.name", "none", f"a verifier, as reward {reward.name} learns from it", way_out)
    if config.rollout.samples_per_prompt < 2:
        got, expected = config.rollout.samples_per_prompt, "at least 2, as responses to a prompt are compared"
        raise ConfigError("rollout.samples_per_prompt", got, expected, "set it to 8, for example")
    if reward.equal_groups == "redraw" and isinstance(config.prefix, MixedPrefix):
        expected = f"keep or drop with prefix {config.prefix.name}, whose written responses are no group"
        raise ConfigError("reward.equal_groups", "redraw", expected, "choose one of these")
    if alone and reward.loss_weight != 1.0:
        expected = f"1 with loss {loss.name}, beside which there is no other"
        raise ConfigError("reward.loss_weight", reward.loss_weight, expected, "leave it out, or choose another loss")
    if alone and not isinstance(config.weight, UnitWeight):
        expected = f"unit with loss {loss.name}, which has its own importance ratio"
        raise ConfigError("weight.name", config.weight.name, expected, "leave it out")

"""Rules about the `stop` slot: a choice that could not act, or not in time, is refused."""

from __future__ import annotations

from nemo_opd.config import Config, DatasetPrefix, DefaultStop, FixedStop, PeersContext, TrapStop
from nemo_opd.errors import ConfigError


def stop_rules(config: Config) -> None:
    """A rule that ends rollouts needs rollouts to end, and a teacher's opinion of them in time."""
    stop = config.stop
    if isinstance(stop, DefaultStop):
        return
    if isinstance(config.prefix, DatasetPrefix):
        way_out = "leave stop out, or choose prefix=student to let the student write"
        raise ConfigError("stop.name", stop.name, "default, as the data set wrote the responses", way_out)
    if isinstance(stop, FixedStop) and stop.length > config.rollout.max_new_tokens:
        expected = f"at most rollout.max_new_tokens ({config.rollout.max_new_tokens})"
        raise ConfigError("stop.length", stop.length, expected, "lower it")
    if isinstance(stop, TrapStop):
        _trap(config, stop)


def _trap(config: Config, stop: TrapStop) -> None:
    if not config.loss.needs_teacher:
        expected = f"default or fixed, as loss {config.loss.name} asks no teacher"
        raise ConfigError("stop.name", stop.name, expected, "leave it out or choose a loss with a teacher")
    if config.teachers:
        expected = "default or fixed with several teachers, as the rule asks one"
        raise ConfigError("stop.name", stop.name, expected, "leave it out, or name one teacher in `teacher`")
    if config.teacher.source != "external" and stop.divergence == "full":
        expected = f"tail with teacher.source={config.teacher.source}, whose output layer is no file"
        raise ConfigError("stop.divergence", stop.divergence, expected, "set stop.divergence=tail")
    if stop.warmup_samples > stop.history:
        expected = f"at most stop.history ({stop.history}), or the rule never becomes active"
        raise ConfigError("stop.warmup_samples", stop.warmup_samples, expected, "lower it")
    shortest = max(stop.window, stop.grace or 0) + (stop.consecutive - 1) * stop.stride
    if shortest > config.rollout.max_new_tokens:
        got = f"{shortest} tokens before the rule can act (window or grace, then consecutive - 1 times stride)"
        expected = f"at most rollout.max_new_tokens ({config.rollout.max_new_tokens})"
        raise ConfigError("stop.window", got, expected, "shorten window, grace, consecutive or stride")
    if isinstance(config.context, PeersContext) and getattr(stop, "form", "after") == "segments":
        expected = "after with context peers, which is made of finished rollouts"
        raise ConfigError("stop.form", "segments", expected, "set stop.form=after, or choose another context")

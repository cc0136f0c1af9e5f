"""Rules about who writes tokens and what they count: the `prefix` and `weight` slots beside the loss."""

from __future__ import annotations

from nemo_opd.config import (
    Config,
    DefaultStop,
    EntropyWeight,
    K2Loss,
    MiniLLMLoss,
    MixedPrefix,
    PrefixWeight,
    SamePromptContext,
    SlotConfig,
    TeacherMixedPrefix,
    TeacherPrefix,
)
from nemo_opd.errors import ConfigError


def prefix_rules(config: Config) -> None:
    """Who writes part of the responses must exist, and its tokens get a loss that fits them."""
    prefix, loss = config.prefix, config.loss
    if isinstance(prefix, TeacherPrefix | TeacherMixedPrefix):
        if config.teacher.engine == "none":
            way_out = "set teacher.model and a loss that compares with it, or prefix=student"
            raise ConfigError("prefix.name", prefix.name, "student or dataset, as there is no teacher", way_out)
        if config.teachers or config.teacher.source != "external":
            got = "several teachers" if config.teachers else f"teacher.source={config.teacher.source}"
            expected = f"student or dataset with {got}, as one external teacher is who writes"
            raise ConfigError("prefix.name", prefix.name, expected, "set prefix=student, or teacher.model alone")
        if not isinstance(config.context, SamePromptContext):
            expected = f"student with context {config.context.name}, as the teacher writes to the student's prompt"
            raise ConfigError("prefix.name", prefix.name, expected, "choose prefix=student or context=same_prompt")
    if isinstance(prefix, MixedPrefix) and not isinstance(config.stop, DefaultStop):
        expected = "default with prefix mixed, as the data set wrote some of the responses"
        raise ConfigError("stop.name", config.stop.name, expected, "leave stop out, or choose prefix=student")
    sampled = loss.needs_sampler_logprobs or isinstance(loss, K2Loss)
    if getattr(prefix, "loss", None) == "same" and sampled:
        expected = f"cross_entropy with loss {loss.name}, as the student did not draw what prefix {prefix.name} brings"
        raise ConfigError("prefix.loss", "same", expected, "set prefix.loss=cross_entropy, or a loss of distributions")


def weight_rules(config: Config) -> None:
    """Weights that look at more than the student need a loss that asks the teacher for it; one ratio is enough."""
    _importance(config)
    _base(config)
    loss = config.loss
    whole = reads_whole_teacher(loss)
    if isinstance(config.weight, EntropyWeight) and config.weight.of == "teacher" and not whole:
        expected = f"student with loss {loss.name}, which does not ask for the teacher's whole distribution"
        raise ConfigError("weight.of", "teacher", expected, "choose weight.of=student, or a loss over distributions")
    unscored = not loss.needs_teacher or getattr(loss, "teacher", "full") == "scores"
    if isinstance(config.weight, PrefixWeight) and unscored:
        expected = (
            f"unit with loss {loss.name}, as that weight needs the teacher's log-probability of every written token"
        )
        way_out = "choose loss=policy_gradient, k2, or one that reads the teacher's whole distribution"
        raise ConfigError("weight.name", "prefix", expected, way_out)


def reads_whole_teacher(loss: SlotConfig) -> bool:
    """Does the loss, as it is set, ask for the teacher's whole distribution?"""
    few = getattr(loss, "teacher", "full") == "scores" or getattr(loss, "outlier", "forward_kl") != "forward_kl"
    return (loss.reads_whole_teacher and not few) or getattr(loss, "low_entropy", None) is not None


def _base(config: Config) -> None:
    """A base model is read by losses that compare the teacher with it, and by no other."""
    loss = config.loss
    for key, teacher in config.every_teacher().items():
        base = teacher.base_model
        if loss.needs_base and base is None:
            expected = f"a model folder, as loss {loss.name} compares the teacher with the model it was trained from"
            raise ConfigError(f"{key}.base_model", "nothing", expected, f"set {key}.base_model, or choose another loss")
        if base is not None and not loss.needs_base:
            way_out = "leave it out, or choose loss=extrapolated"
            raise ConfigError(f"{key}.base_model", base, f"nothing, as loss {loss.name} does not look at it", way_out)


def _importance(config: Config) -> None:
    """The ratio of trainer to sampler is applied by the loss or by the weight, not by both."""
    if not config.weight.needs_sampler_logprobs:
        return
    if isinstance(config.loss, MiniLLMLoss):
        expected = "one without an importance ratio, as loss minillm has its own"
        raise ConfigError("weight.name", config.weight.name, expected, "leave the weight out")
    ratio = getattr(config.loss, "importance_ratio", "none")
    if ratio != "none":
        way_out = "set loss.importance_ratio=none, or the ratio is applied twice"
        raise ConfigError("weight.name", config.weight.name, f"unit with loss.importance_ratio={ratio}", way_out)

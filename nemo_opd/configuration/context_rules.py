"""Rules about the `context` slot: what the teacher alone reads must exist, and have a place to stand."""

from __future__ import annotations

from nemo_opd.config import Config, PeersContext, PrivilegedContext, SamePromptContext
from nemo_opd.errors import ConfigError


def context_rules(config: Config) -> None:
    """A context other than the student's own prompt needs a teacher to read it and a conversation to stand in."""
    context = config.context
    if isinstance(context, SamePromptContext):
        return
    if not config.loss.needs_teacher:
        expected = f"same_prompt, as loss {config.loss.name} asks no teacher"
        raise ConfigError("context.name", context.name, expected, "leave it out or choose a loss with a teacher")
    if not config.data.chat_template:
        way_out = "set data.chat_template=true, or context=same_prompt"
        raise ConfigError("data.chat_template", False, f"true, as context {context.name} adds to a message", way_out)
    if isinstance(context, PrivilegedContext):
        _privileged(context)
    if isinstance(context, PeersContext):
        _peers(config, context)


def _privileged(context: PrivilegedContext) -> None:
    if (context.field is None) == (context.text is None):
        got = "nothing" if context.field is None else "a field besides context.text"
        expected = "either a field of the records or one text for all"
        raise ConfigError("context.field", got, expected, "set context.field or context.text, not both")
    if context.template.count("{privileged}") != 1:
        way_out = 'for example context.template="A correct answer is {privileged}"'
        raise ConfigError("context.template", repr(context.template), "{privileged} exactly once", way_out)


def _peers(config: Config, context: PeersContext) -> None:
    if config.rollout.samples_per_prompt < 2:
        got, expected = config.rollout.samples_per_prompt, "at least 2, as peers are other rollouts of the same prompt"
        raise ConfigError("rollout.samples_per_prompt", got, expected, "set it to 8, for example")
    if config.verify.name == "none":
        way_out = "set verify.name (exact, integer, math, ...), or context=same_prompt"
        raise ConfigError("verify.name", "none", "a verifier, as peers are chosen by their reward", way_out)
    if context.variant == "unrelated_prompt" and config.train.prompts_per_step < 2:
        got, expected = config.train.prompts_per_step, "at least 2, as peers come from another prompt of the step"
        raise ConfigError("train.prompts_per_step", got, expected, "raise it or choose another context.variant")

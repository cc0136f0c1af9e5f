"""From `verify.*` to a verifier."""

from __future__ import annotations

from nemo_opd.config import VerifyConfig
from nemo_opd.errors import ConfigError
from nemo_opd.verify.base import Verifier
from nemo_opd.verify.choice import ChoiceVerifier
from nemo_opd.verify.code import CodeVerifier
from nemo_opd.verify.math import MathVerifier
from nemo_opd.verify.text import ExactVerifier, IntegerVerifier
from nemo_opd.verify.tool_call import ToolCallVerifier

VERIFIERS: dict[str, type[Verifier]] = {
    "exact": ExactVerifier,
    "integer": IntegerVerifier,
    "math": MathVerifier,
    "choice": ChoiceVerifier,
    "tool_call": ToolCallVerifier,
    "code": CodeVerifier,
}


def build_verifier(config: VerifyConfig) -> Verifier | None:
    """The verifier that the recipe names; None for `none`.

    Raises:
        ConfigError: no such verifier, a time limit that is not positive, or an empty pattern.
    """
    if config.time_limit <= 0:
        raise ConfigError("verify.time_limit", config.time_limit, "seconds above 0", "leave it out for the default")
    if config.answer_pattern == "":
        raise ConfigError("verify.answer_pattern", "an empty text", "a marker", "leave it out to search the response")
    if config.name == "none":
        return None
    if config.name not in VERIFIERS:
        raise ConfigError("verify.name", config.name, f"none or one of {sorted(VERIFIERS)}", "choose one of them")
    return VERIFIERS[config.name](config)

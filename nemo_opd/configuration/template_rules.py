"""Rules about `data.template_arguments`: words for a chat template, not for the function that renders it."""

from __future__ import annotations

from nemo_opd.config import Config
from nemo_opd.errors import ConfigError

TAKEN = frozenset(
    {
        *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
        *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs", "self"),
    }
)
"""Names of what we, or transformers, say at every rendering."""


def template_rules(config: Config) -> None:
    """Arguments need a template to read them, a name of their own and a plain value."""
    for name, value in config.data.template_arguments.items():
        key = f"data.template_arguments.{name}"
        if not config.data.chat_template:
            way_out = "set data.chat_template=true, or leave it out"
            raise ConfigError("data.chat_template", False, f"true, as {key} is for the chat template", way_out)
        if name in TAKEN or not str(name).isidentifier():
            expected = "a name that the chat template reads, as enable_thinking"
            raise ConfigError(key, name, expected, "choose another, or leave it out")
        if not isinstance(value, bool | int | float | str):
            raise ConfigError(key, value, "a text, a number, true or false", "change the value")

"""From messages to token ids, and what the tokenizer of a model folder says about ends.

The response never takes a round trip through text: prompt ids come from the tokenizer once, response ids are appended
as ids. Re-tokenising prompt + response as one string can merge tokens over the seam, and the teacher would then score
other tokens than the student wrote.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nemo_opd.errors import ConfigError
from nemo_opd.foreign import JSON_FILES, refuse_code

Tokenizer = Any
"""A `transformers.PreTrainedTokenizerBase`; named so, because importing transformers takes seconds."""

Message = Mapping[str, str]


def load_tokenizer(folder: str | Path, key: str = "student.model") -> Tokenizer:
    """The tokenizer of a model folder in Hugging Face format, from local files alone.

    Args:
        folder: the model's folder.
        key: the configuration key that named it, for messages.

    Raises:
        ConfigError: no such folder, no tokenizer in it, or a repository that would run code (`nemo_opd.foreign`).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(key, folder, "a model folder in Hugging Face format", "check the path")
    for name in JSON_FILES:
        read_json(folder / name, key)
    refuse_code(folder, key)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:  # what transformers raises for bad folders
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            key, f"{folder} without a usable tokenizer ({reason})", "tokenizer.json and tokenizer_config.json",
            "copy the tokenizer files into the model's folder",
        ) from error  # fmt: skip


def read_json(path: Path, key: str) -> dict[str, Any]:
    """A JSON object from a file; empty when there is no such file. Raises ConfigError when it is no JSON object."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(key, f"{path}: {error}", "JSON", "repair or copy the file again") from error
    if not isinstance(content, dict):
        raise ConfigError(key, f"{path}: a JSON {type(content).__name__}", "a JSON object", "copy the file again")
    return content


def eos_token_ids(folder: str | Path, tokenizer: Tokenizer, key: str = "student.model") -> tuple[int, ...]:
    """Every id that ends a response; the first is the one that is appended to written responses.

    A model may end with several tokens (Llama 3: end of turn, end of text), named in generation_config.json or
    config.json. The tokenizer's own comes first: it is the end of a turn that its chat template writes.

    Raises:
        ConfigError: nothing names an end token.
    """
    folder = Path(folder)
    ids: list[int] = []
    named = [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name, key).get("eos_token_id")
        named += value if isinstance(value, list) else [value]
    for value in named:
        if value is not None and int(value) not in ids:
            ids.append(int(value))
    if not ids:
        raise ConfigError(key, f"{folder} without an end token", "eos_token_id", "name it in generation_config.json")
    return tuple(ids)


def differing_tokens(student: Tokenizer, teacher: Tokenizer) -> list[tuple[str, int | None, int | None]]:
    """(token, the student's id, the teacher's id) of tokens that have two ids, or one of the two alone."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return []
    return [(t, ours.get(t), theirs.get(t)) for t in sorted({*ours, *theirs}) if ours.get(t) != theirs.get(t)]


def with_system_prompt(messages: Sequence[Message], system_prompt: str | None) -> tuple[Message, ...]:
    """The conversation with the recipe's system prompt before it; a system message of the record's own wins."""
    if system_prompt is None or (messages and messages[0]["role"] == "system"):
        return tuple(messages)
    return ({"role": "system", "content": system_prompt}, *messages)


NO_ARGUMENTS: Mapping[str, Any] = MappingProxyType({})


def render_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], arguments: Mapping[str, Any] = NO_ARGUMENTS
) -> tuple[int, ...]:
    """Token ids of a conversation with the opening of the assistant's turn, by the tokenizer's chat template.

    Special tokens are the template's business, so none are added around it.

    Args:
        arguments: what else the template reads, `data.template_arguments`.

    Raises:
        ConfigError: the tokenizer has no chat template, or the template refuses the conversation.
    """
    return tuple(tokenizer(chat_text(tokenizer, messages, arguments), add_special_tokens=False)["input_ids"])


def chat_text(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    arguments: Mapping[str, Any] = NO_ARGUMENTS,
    open_turn: bool = True,
) -> str:
    """The text that `render_chat` tokenises, or the conversation alone (`open_turn` False); raises what it raises."""
    import jinja2

    if not tokenizer.chat_template:
        raise ConfigError(
            "data.chat_template", "true with a tokenizer that has no chat template", "a chat template",
            "set data.chat_template=false to feed the text as it is",
        )  # fmt: skip
    try:
        text = tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=open_turn, **arguments
        )
    except (jinja2.TemplateError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ConfigError(
            "data.chat_template", f"a template error ({error})", "messages that the template accepts",
            "check the roles and their order, or drop data.system_prompt if the template has no system role",
        ) from error  # fmt: skip
    return str(text)


def render_text(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Token ids of plain text, with the begin-of-text token where the tokenizer itself adds one, and never an end."""
    ids = list(tokenizer(text)["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token or "\0"):
        ids.pop()
    return tuple(ids)


def response_token_ids(tokenizer: Tokenizer, text: str, eos_id: int) -> tuple[int, ...]:
    """Token ids of a written response, tokenised apart from its prompt, with the end token."""
    return (*tokenizer(text, add_special_tokens=False)["input_ids"], eos_id)

"""Text that somebody else wrote, put into the teacher's prompt.

A rollout that writes the chat template's end of turn followed by a system turn could talk to the teacher, and so could
a record of a data set. Inserted text therefore never reaches the tokenizer together with the conversation: the
conversation is rendered with a mark in its place, the three parts are tokenised apart, and no control id is left in
the middle one, whatever the text was. The price is that no token is merged over the two seams, which stand at line
breaks.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_opd.errors import ConfigError
from nemo_opd.prompts.template import NO_ARGUMENTS, Message, Tokenizer, chat_text, render_chat

PARAGRAPH = "\n\n"
"""Stands between a message and what is added to it."""


@dataclass(frozen=True)
class Rendered:
    """A teacher's prompt in three parts; the middle one is what was inserted.

    Example: ``Rendered(before=(1, 4, 9), inserted=(17, 30), after=(5,)).ids == (1, 4, 9, 17, 30, 5)``.
    """

    before: tuple[int, ...]
    inserted: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """What stands before the response in the teacher's sequence."""
        return self.before + self.inserted + self.after


class ControlTokens:
    """The tokens of a tokenizer that mean something to a chat template or a model besides their text.

    That is every special token, and every other added token that can be seen: some tokenizers declare the marks of a
    turn, of reasoning or of a tool call as plain added tokens. Added runs of blanks are text and stay.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = {int(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        texts = {text for text in added.values() if text.strip()} | {t for t in tokenizer.all_special_tokens if t}
        self.ids = frozenset(tokenizer.all_special_ids) | {i for i, text in added.items() if text in texts}
        self._longest = max(map(len, texts), default=0)
        self._any = re.compile("|".join(map(re.escape, sorted(texts))) or r"(?!)")
        self._by_last: dict[str, list[str]] = {}
        for text in sorted(texts, key=lambda text: (-len(text), text)):
            self._by_last.setdefault(text[-1], []).append(text)

    def removed_from(self, text: str) -> str:
        """`text` without control tokens, and without those that appear when another is taken out of their middle.

        One pass: what is kept so far never contains one, because each character that completes one removes it.
        """
        if not self._any.search(text):
            return text
        kept: list[str] = []
        for character in text:
            kept.append(character)
            if endings := self._by_last.get(character):
                tail = "".join(kept[-self._longest :])
                found = next((token for token in endings if tail.endswith(token)), None)
                if found:
                    del kept[-len(found) :]
        return "".join(kept)


class ContextRenderer:
    """Teacher's prompts with inserted text, by the teacher's tokenizer and chat template.

    Args:
        tokenizer: the teacher's.
        place: `user` (after the last user message) or `system`.
        arguments: what else the template reads, `data.template_arguments`.

    Raises:
        ConfigError: the tokenizer has no chat template, or it has no room for the insertion.
    """

    def __init__(self, tokenizer: Tokenizer, place: str = "user", arguments: Mapping[str, Any] = NO_ARGUMENTS) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(
                "teacher.model", "a tokenizer without a chat template", "one to put the teacher's context in",
                "choose a teacher that has one, or context=same_prompt",
            )  # fmt: skip
        self._tokenizer, self._place, self._arguments = tokenizer, place, arguments
        self.control = ControlTokens(tokenizer)
        try:
            self.render([{"role": "user", "content": "?"}], (), "", "")
        except ConfigError as error:
            if place == "user":
                raise
            raise ConfigError(
                "context.place", f"{place} ({error.got})", "a role of the teacher's chat template",
                "set context.place=user",
            ) from error  # fmt: skip

    def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Ids of inserted texts, none of them a control id.

        The second filter is for tokenizers that rewrite text before they look for special tokens (full-width letters,
        for example), and for characters that they know nothing but an `unknown` token for.
        """
        if not texts:
            return []
        clean = [self.control.removed_from(text) for text in texts]
        rows = self._tokenizer(clean, add_special_tokens=False)["input_ids"]
        return [tuple(i for i in row if i not in self.control.ids) for row in rows]

    def plain(self, messages: Sequence[Message]) -> Rendered:
        """The conversation as it is."""
        return Rendered(render_chat(self._tokenizer, messages, self._arguments))

    def render(self, messages: Sequence[Message], inserted: tuple[int, ...], left: str, right: str) -> Rendered:
        """The conversation with `inserted` in it, between the recipe's own words `left` and `right`.

        Raises:
            ConfigError: the chat template refuses the conversation, or shows the message never or twice.
        """
        mark = _unused_mark([*(m["content"] for m in messages), left, right])
        changed = _added(messages, self._place, f"{left}{mark}{right}")
        text = chat_text(self._tokenizer, changed, self._arguments)
        parts = text.split(mark)
        if len(parts) != 2:
            raise ConfigError(
                "teacher.model", f"a chat template that shows a message {len(parts) - 1} times", "each message once",
                "choose another teacher, or context=same_prompt",
            )  # fmt: skip
        before, after = (tuple(self._tokenizer(p, add_special_tokens=False)["input_ids"]) for p in parts)
        return Rendered(before, inserted, after)


def fair_shares(lengths: Sequence[int], budget: int) -> list[int]:
    """How much of each item fits into `budget` when the longest are cut first; what is short is kept whole.

    Example: ``fair_shares([10, 2, 9], 12) == [5, 2, 5]``.
    """
    shares = [0] * len(lengths)
    for done, item in enumerate(sorted(range(len(lengths)), key=lambda i: (lengths[i], i))):
        shares[item] = min(lengths[item], budget // (len(lengths) - done))
        budget -= shares[item]
    return shares


def _added(messages: Sequence[Message], place: str, text: str) -> list[Message]:
    """The messages with `text` as the end of the last user message, or of the system message that opens them."""
    changed = list(messages)
    where = [n for n, message in enumerate(changed) if message["role"] == "user"][-1:]
    if place == "system":
        where = [0] if changed and changed[0]["role"] == "system" else []
    if where:
        old = changed[where[0]]
        changed[where[0]] = {**old, "content": f"{old['content']}{PARAGRAPH}{text}"}
    else:
        changed.insert(0 if place == "system" else len(changed), {"role": place, "content": text})
    return changed


def _unused_mark(texts: Sequence[str]) -> str:
    """A text that none of `texts` contains and that no chat template changes."""
    return next(mark for n in itertools.count() if not any((mark := f"[inserted text {n}]") in text for text in texts))

"""The endless, seekable, deterministic stream of prompts.

The order of epoch e is a permutation that (seed, e) alone decides, so the whole state is two integers, and every rank
can hold the same stream and take its share of the same global batch without a word between them. A position counts
records, usable or not: skipping one moves the position past it, so a resumed stream skips the same ones.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nemo_opd.config import DataConfig
from nemo_opd.errors import ConfigError
from nemo_opd.prompts.readers import MalformedRecordError, Record, open_records
from nemo_opd.prompts.template import Message, Tokenizer, render_chat, render_text, with_system_prompt
from nemo_opd.types import Prompt

_LOG = logging.getLogger(__name__)

_ROLES = ("system", "user", "assistant", "tool")

_CHECKED_AT_START = 10_000
"""Records looked at before the first step, so that most malformed ones are refused in seconds rather than overnight."""
_LOGGED_SKIPS = 10
"""Skipped records that are logged one by one; the counts go on."""


class PromptStream:
    """Prompts of a data set, epoch after epoch.

    Args:
        data: where and how to read. Prompts longer than `max_prompt_tokens` are skipped and counted, never cut: a cut
            prompt is another problem. `on_malformed` decides about records that cannot be used.
        tokenizer: of the student.
        seed: decides the order when `data.shuffle` is set.
        needs_response: a record without a written response is malformed (SFT, dataset prefixes).

    Raises:
        ConfigError: the data cannot be opened, or (with `on_malformed: error`) a record is malformed, naming file and
            line: at once among the first 10,000 records, when the stream reaches it after that.

    Example: ``PromptStream(data, tokenizer, seed=0).take(32)`` gives the first global batch.
    """

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, seed: int = 0, needs_response: bool = False) -> None:
        self._data, self._tokenizer, self._seed, self._needs_response = data, tokenizer, seed, needs_response
        self._check()
        self._records = open_records(data.path, frozenset({data.prompt_key, data.answer_key, data.response_key}))
        self._epoch, self._index = 0, 0
        self._order = self._permutation(0)
        self.skipped: dict[str, int] = {"malformed": 0, "too_long": 0}
        """Records passed over so far, by reason."""
        if data.on_malformed == "error":
            for index in range(min(len(self._records), _CHECKED_AT_START)):
                self._read(index)

    def __len__(self) -> int:
        """Records of one epoch, usable or not."""
        return len(self._records)

    def take(self, n: int) -> list[Prompt]:
        """The next `n` usable prompts; the same list on every rank. May span epochs."""
        prompts: list[Prompt] = []
        barren = 0  # positions passed since the last usable prompt
        while len(prompts) < n:
            prompt = self._next()
            barren = 0 if prompt else barren + 1
            if prompt:
                prompts.append(prompt)
            elif barren >= len(self._records):
                raise ConfigError(
                    "data.path", f"{self._data.path} without a usable prompt (skipped: {self.skipped})",
                    "at least one prompt", "look at the counts: raise data.max_prompt_tokens or mend the records",
                )  # fmt: skip
        return prompts

    def rest_of_epoch(self, limit: int | None = None) -> list[Prompt]:
        """The usable prompts from here to the end of the epoch, or the first `limit` of them (for evaluation)."""
        prompts: list[Prompt] = []
        epoch = self._epoch
        while self._epoch == epoch and (limit is None or len(prompts) < limit):
            if prompt := self._next():
                prompts.append(prompt)
        return prompts

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON-able values: goes into a checkpoint."""
        return {
            "epoch": self._epoch,
            "index": self._index,
            "records": len(self._records),
            "skipped": dict(self.skipped),
        }

    def seek(self, state: Mapping[str, Any]) -> None:
        """Go where `state` says.

        Raises:
            ConfigError: the state belongs to a data set of another length, so its position means something else here.
        """
        if state.get("records", len(self._records)) != len(self._records):
            raise ConfigError(
                "data.path", f"{self._data.path} with {len(self._records)} records",
                f"the {state['records']} records that the checkpoint was made with",
                "restore the data set, or start a new run folder",
            )  # fmt: skip
        self._epoch, self._index = int(state["epoch"]), int(state["index"])
        self._order = self._permutation(self._epoch)
        self.skipped = {"malformed": 0, "too_long": 0, **state.get("skipped", {})}

    def _check(self) -> None:
        if self._data.system_prompt is not None and not self._data.chat_template:
            raise ConfigError(
                "data.system_prompt", "a system prompt with data.chat_template=false", "a chat template to put it in",
                "put it into the prompt's text, or set data.chat_template=true",
            )  # fmt: skip
        if self._data.on_malformed not in ("error", "skip"):
            raise ConfigError("data.on_malformed", self._data.on_malformed, "error or skip", "choose one of them")

    def _permutation(self, epoch: int) -> np.ndarray:
        """Record numbers in the order of an epoch, int64 [records].

        Sorted by a hash of (seed, epoch, record) rather than drawn from numpy's generator, whose shuffling may change
        between versions of numpy while checkpoints live on.
        """
        numbers = np.arange(len(self._records), dtype=np.uint64)
        if not self._data.shuffle:
            return numbers.astype(np.int64)
        key = _mix(_mix(np.uint64(self._seed % 2**64)) ^ np.uint64(epoch))
        return np.argsort(_mix(_mix(numbers) ^ key), kind="stable")

    def _next(self) -> Prompt | None:
        """Use the record at the position and move on; None when it was skipped."""
        index, epoch = int(self._order[self._index]), self._epoch
        self._index += 1
        if self._index == len(self._records):
            self._epoch, self._index = epoch + 1, 0
            self._order = self._permutation(self._epoch)
        fields = self._read(index)
        if fields is None:
            return None
        token_ids = self._render(fields["messages"])
        if not token_ids:
            self._skip("malformed", index, "the tokenizer makes no token of it")
            return None
        if len(token_ids) > self._data.max_prompt_tokens:
            self._skip("too_long", index, f"{len(token_ids)} tokens, limit {self._data.max_prompt_tokens}")
            return None
        return Prompt(index=index, epoch=epoch, token_ids=token_ids, **fields)

    def _read(self, index: int) -> dict[str, Any] | None:
        """The fields of a `Prompt` that the record holds; None for a malformed one that is to be skipped."""
        try:
            return self._fields(self._records[index])
        except MalformedRecordError as fault:
            if self._data.on_malformed == "error":
                raise ConfigError(
                    self._records.where(index), str(fault), f"a record with {self._wanted()}",
                    "mend the record, name other keys under data.*, or set data.on_malformed=skip",
                ) from fault  # fmt: skip
            self._skip("malformed", index, str(fault))
            return None

    def _fields(self, record: Record) -> dict[str, Any]:
        data = self._data
        return {
            "messages": with_system_prompt(_messages(record, data.prompt_key, data.chat_template), data.system_prompt),
            "answer": _answer(record, data.answer_key),
            "response": _response(record, data.response_key) if self._needs_response else None,
            "meta": _meta(record, {data.prompt_key, data.answer_key, data.response_key}),
        }

    def _render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        if self._data.chat_template:
            return render_chat(self._tokenizer, messages, self._data.template_arguments)
        return render_text(self._tokenizer, messages[0]["content"])

    def _skip(self, reason: str, index: int, detail: str) -> None:
        self.skipped[reason] += 1
        level = logging.WARNING if sum(self.skipped.values()) <= _LOGGED_SKIPS else logging.DEBUG
        _LOG.log(level, "skipped %s: %s (%s)", self._records.where(index), reason, detail)

    def _wanted(self) -> str:
        return f"{self._data.prompt_key!r}" + (f" and {self._data.response_key!r}" if self._needs_response else "")


def first_prompts(data: DataConfig, tokenizer: Tokenizer, limit: int | None = None) -> list[Prompt]:
    """The first `limit` usable prompts of a data set in file order, each once: what an evaluation runs on."""
    return PromptStream(replace(data, shuffle=False), tokenizer).rest_of_epoch(limit)


def _mix(x: np.ndarray | np.uint64) -> Any:
    """Finaliser of splitmix64 (Steele, Lea and Flood 2014): a bijection on 64 bits whose outputs look independent."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _messages(record: Record, key: str, chat_template: bool) -> tuple[Message, ...]:
    """A prompt as messages; a plain text is one message of the user's."""
    value = record.get(key)
    if isinstance(value, str) and value:
        return ({"role": "user", "content": value},)
    if not isinstance(value, list) or not value:
        found = f"no {key!r} (keys: {sorted(record)})" if key not in record else f"{key!r} = {_short(value)}"
        raise MalformedRecordError(f"{found} where a text or a list of messages belongs")
    if not chat_template:
        raise MalformedRecordError(f"messages under {key!r}, which need data.chat_template=true")
    return tuple(_message(m, key, i, last=i == len(value) - 1) for i, m in enumerate(value))


def _message(message: Any, key: str, number: int, last: bool) -> Message:
    if not isinstance(message, Mapping) or not all(isinstance(message.get(f), str) for f in ("role", "content")):
        raise MalformedRecordError(f"message {number} of {key!r} is not {{role: text, content: text}}")
    if message["role"] not in _ROLES:
        raise MalformedRecordError(f"message {number} of {key!r} has role {message['role']!r}, not one of {_ROLES}")
    if last and message["role"] == "assistant":
        raise MalformedRecordError(f"{key!r} ends with the assistant, which leaves the student nothing to answer")
    return {"role": message["role"], "content": message["content"]}


def _answer(record: Record, key: str) -> str | None:
    """The reference answer as text; numbers are fine, anything else is malformed."""
    value = record.get(key)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise MalformedRecordError(f"{key!r} = {_short(value)} where a text or a number belongs")


def _response(record: Record, key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise MalformedRecordError(f"{key!r} = {_short(value)} where a written response belongs")
    return value


def _meta(record: Record, used: set[str]) -> dict[str, str]:
    """The record's other simple fields, as text."""
    return {k: str(v) for k, v in record.items() if k not in used and isinstance(v, str | int | float | bool)}


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."

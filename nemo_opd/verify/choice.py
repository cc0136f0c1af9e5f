"""The verifier for multiple choice: which option letter does the response name?"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from nemo_opd.verify.base import UnreadableReferenceError, Verifier

if TYPE_CHECKING:  # importing it loads torch
    from nemo_opd.types import Prompt

OPTIONS_FIELD = "options"
"""Field of a record that says what the options are: their letters (``"ABCD"``) or a JSON list of their texts."""
FEWEST_LISTED = 2
"""Consecutive letters from A that a prompt must list before they are taken for its options."""
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LISTED = re.compile(r"^[ \t]*(?:\(([A-Za-z])\)|([A-Za-z])[).:])[ \t]*\S", re.MULTILINE)
"""A line ``A) text``, ``(A) text``, ``A. text`` or ``A: text`` of a prompt."""
_ALONE = re.compile(
    r"(?:\\boxed\{|\\text\{|[\s(\[*_`\"'$:])*"  # what may stand before the letter
    r"(?:(?:the )?(?:answer|option|choice)(?: is)?[\s:(*]*)?"
    r"([A-Za-z])"
    r"(?:[)\].:*_`\"'}$\s]*|[).:]\s*\S.*)",  # what may close it, or the option's text after ")", "." or ":"
    re.IGNORECASE,
)
_WITHIN = re.compile(r"(?<![\w'’])([A-Z])(?![\w'’]|[+#]|\.\w)")
"""A capital letter within a text: not a part of a word, of a contraction, of ``C++`` or of ``U.S.``."""
_WORDS_TOO = {"A", "I"}
"""Also words of English: no option where they begin or continue a sentence."""
_GOES_ON = re.compile(r"[ \t]+[a-z]")


class ChoiceVerifier(Verifier):
    """1 when the response's option letter is the reference's.

    With `verify.answer_pattern` the line after the pattern must name one letter, in either case: ``B``, ``(b)``,
    ``B.``, ``**B**``, ``\\boxed{B}``, ``B) Paris``. Without a pattern the last stand-alone capital option letter of
    the response counts; "A" and "I" count only where no lower-case word follows, since they are words too.

    The options are the record's field ``options`` (letters such as ``ABCD``, or a JSON list of texts), else the lines
    ``A) ...`` of the last message, else A to Z. A letter that is no option is no answer. The reference is a letter, or
    the whole text of one option where the field lists texts.
    """

    def compare(self, response_text: str, prompt: Prompt) -> float:
        assert prompt.answer is not None
        letters, texts = options(prompt)
        expected = _reference(self._after_marker(prompt.answer).strip(), letters, texts)
        if self._marker is None:
            return float(_last(response_text, letters) == expected)
        if self._marker not in response_text:
            return 0.0
        return float(_alone(self._after_marker(response_text), letters) == expected)


def options(prompt: Prompt) -> tuple[str, tuple[str, ...]]:
    """The option letters of a prompt (``"ABCD"``) and their texts, which are empty where only letters are known.

    Raises:
        UnreadableReferenceError: the field ``options`` is neither letters nor a list of texts.
    """
    field = prompt.meta.get(OPTIONS_FIELD, "").strip()
    if field.startswith("["):
        try:
            texts = json.loads(field)
        except (ValueError, RecursionError) as error:
            raise UnreadableReferenceError(f"{OPTIONS_FIELD} is not a JSON list: {error}") from error
        if not all(isinstance(text, str) for text in texts) or not 0 < len(texts) <= len(_LETTERS):
            raise UnreadableReferenceError(f"{OPTIONS_FIELD} is not a list of 1 to {len(_LETTERS)} texts")
        return _LETTERS[: len(texts)], tuple(text.strip() for text in texts)
    if field:
        letters = re.sub(r"[\s,;/|]", "", field).upper()
        if not set(letters) <= set(_LETTERS) or len(set(letters)) != len(letters):
            raise UnreadableReferenceError(f"{OPTIONS_FIELD}={field[:80]!r} is neither letters nor a JSON list")
        return letters, ()
    listed = _listed(str(prompt.messages[-1]["content"])) if prompt.messages else ""
    return (listed if len(listed) >= FEWEST_LISTED else _LETTERS), ()


def _listed(text: str) -> str:
    """The letters A, B, ... that the text lists in this order, as far as they go."""
    letters = ""
    for match in _LISTED.finditer(text):
        letter = (match[1] or match[2]).upper()
        if letter == "A":
            letters = "A"
        elif letters and letter == _LETTERS[len(letters) % len(_LETTERS)]:
            letters += letter
    return letters


def _reference(reference: str, letters: str, texts: tuple[str, ...]) -> str:
    if reference in texts:
        return letters[texts.index(reference)]
    letter = _alone(reference, letters)
    if letter is None:
        raise UnreadableReferenceError(f"{reference[:80]!r} is none of the options {letters}")
    return letter


def _alone(text: str, letters: str) -> str | None:
    """The one option that the first line names."""
    lines = text.strip().splitlines()
    match = _ALONE.fullmatch(lines[0].strip()[:200]) if lines else None
    return match[1].upper() if match and match[1].upper() in letters else None


def _last(text: str, letters: str) -> str | None:
    found = None
    for match in _WITHIN.finditer(text):
        is_word = match[1] in _WORDS_TOO and _GOES_ON.match(text, match.end())
        if match[1] in letters and not is_word:
            found = match[1]
    return found

"""Verifiers that compare texts: the same text, or the same whole number."""

from __future__ import annotations

import re

from nemo_opd.verify.base import UnreadableReferenceError, Verifier

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.0+)?"
_ALONE = re.compile(rf"([+-]?)\s*\$?({_DIGITS})\.?")
"""The whole of an answer: a sign, a currency sign and a closing full stop may stand around the number."""
_WITHIN = re.compile(rf"(?<![\w.,])((?<![\w)])[+-])?\$?({_DIGITS})(?![\w%]|[.,][0-9])")
"""A whole number within a text: not a part of a word, of a decimal number or of a percentage."""


class ExactVerifier(Verifier):
    """1 when the answer is the reference, letter for letter, white space around it ignored."""

    def grade(self, answer: str, reference: str) -> float:
        return float(answer.strip() == reference.strip())


class IntegerVerifier(Verifier):
    """1 when the answer is the reference's whole number.

    ``1,000``, ``$1000``, ``1000.`` and ``1000.00`` are all one thousand. With `verify.answer_pattern`, the line after
    the pattern must hold the number and nothing else, so that an answer cannot name several; without it the last whole
    number of the response counts. Numbers are compared as digits, so their length does not matter.
    """

    def grade(self, answer: str, reference: str) -> float:
        expected = _alone(reference)
        if expected is None:
            raise UnreadableReferenceError(f"{reference[:80]!r} is not a whole number")
        found = _last(answer) if self._marker is None else _alone(answer)
        return float(found == expected)


def _alone(text: str) -> str | None:
    """The number that the first line consists of."""
    lines = _plain(text).strip().splitlines()
    match = _ALONE.fullmatch(lines[0].strip()) if lines else None
    return None if match is None else _canonical(match[1], match[2])


def _last(text: str) -> str | None:
    """The last whole number of a text. A minus after a number or a bracket subtracts; it is no sign."""
    found = None
    for match in _WITHIN.finditer(_plain(text)):
        found = _canonical(match[1] or "", match[2])
    return found


def _plain(text: str) -> str:
    return text.replace("−", "-")  # the typographic minus


def _canonical(sign: str, digits: str) -> str:
    """The number in one spelling: no separators, no leading zeros, no plus, no minus zero."""
    whole = digits.partition(".")[0].replace(",", "").lstrip("0") or "0"
    return "-" + whole if sign == "-" and whole != "0" else whole

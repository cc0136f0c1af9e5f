"""Lengths of prefixes as a command line names them. Plain Python, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_opd.errors import ConfigError


@dataclass(frozen=True)
class PrefixLength:
    """So many tokens, or a share of the response. Example: ``64`` or ``25%``."""

    amount: int
    is_percent: bool

    def __str__(self) -> str:
        return f"{self.amount}%" if self.is_percent else f"{self.amount}"

    def of(self, length: int) -> int | None:
        """Tokens of a response of `length` tokens; None where it is shorter than the prefix."""
        tokens = self.amount * length // 100 if self.is_percent else self.amount
        return tokens if tokens <= length else None


def parse_lengths(text: str, key: str) -> list[PrefixLength]:
    """Comma-separated whole numbers (tokens) and percentages (of each response).

    Raises:
        ConfigError: anything else, with `key` as its key.
    """
    lengths = []
    for word in text.split(","):
        number, percent, rest = word.strip().partition("%")
        if not (number.isascii() and number.isdigit()) or rest or (percent and int(number) > 100):
            raise ConfigError(
                key, f"`{word}`", "tokens (64) or a share of each response (25%)", "for example 0%,25%,50%"
            )
        lengths.append(PrefixLength(int(number), bool(percent)))
    return lengths

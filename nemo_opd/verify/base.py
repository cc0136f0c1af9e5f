"""What every verifier promises: a number or None, never an exception."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from typing import TYPE_CHECKING

from nemo_opd.config import VerifyConfig

if TYPE_CHECKING:  # importing it loads torch, which the grading process has no use for
    from nemo_opd.types import Prompt

_LOG = logging.getLogger(__name__)
_LOGGED_ERRORS = 10
"""Errors that are logged one by one; the counts go on."""


class GradingTimeoutError(Exception):
    """An answer took longer than `verify.time_limit`."""


class GraderUnavailableError(Exception):
    """Nothing could grade: a fault of ours and not of the answer's."""


class UnreadableReferenceError(ValueError):
    """The data set's answer is not of the kind that the verifier reads."""


class Verifier:
    """Compares a response with the data set's answer.

    Subclasses implement `grade`, or `compare` where they need more of the prompt. With `verify.answer_pattern` set,
    the answer is what follows the pattern's last occurrence, in the reference too where it occurs there (GSM8K's
    references hold the whole solution). Threads may share one.
    """

    def __init__(self, config: VerifyConfig) -> None:
        self._marker = config.answer_pattern
        self._time_limit = config.time_limit
        self._counting = threading.Lock()
        self.counts: Counter[str] = Counter()
        """Responses by outcome: right, wrong, timeout, error, no_reference, unreadable_reference, unavailable."""

    def __call__(self, response_text: str, prompt: Prompt) -> float | None:
        """The reward of a response.

        Returns:
            A number in [0, 1]: 0.0 also when the answer is missing, cannot be read or took too long, since these are
            the response's doing. None when there is nothing to compare with, or nothing that could compare: a missing
            reward is not a reward of zero.
        """
        if prompt.answer is None:
            return self._count("no_reference", None)
        try:
            reward = self.compare(response_text, prompt)
        except GradingTimeoutError:
            return self._count("timeout", 0.0)
        except UnreadableReferenceError as error:
            return self._count("unreadable_reference", None, f"prompt {prompt.index}: {error}")
        except GraderUnavailableError as error:
            return self._count("unavailable", None, str(error))
        except Exception as error:  # noqa: BLE001 -- the response is hostile text: no bug that it finds may end the run
            return self._count("error", 0.0, f"prompt {prompt.index}: {type(error).__name__}: {error}")
        return self._count("right" if reward > 0 else "wrong", reward)

    def compare(self, response_text: str, prompt: Prompt) -> float:
        """The reward of a whole response, in [0, 1]. Overridden where more than two short texts is compared.

        Raises:
            As `grade`.
        """
        assert prompt.answer is not None
        if self._marker is not None and self._marker not in response_text:
            return 0.0
        return self.grade(self._after_marker(response_text), self._after_marker(prompt.answer))

    def grade(self, answer: str, reference: str) -> float:
        """The reward of an answer, in [0, 1].

        Raises:
            GradingTimeoutError, GraderUnavailableError, UnreadableReferenceError: as their names say.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Free what it holds. Idempotent."""

    def _after_marker(self, text: str) -> str:
        return text if self._marker is None else text.rpartition(self._marker)[2]

    def _count(self, outcome: str, reward: float | None, detail: str | None = None) -> float | None:
        with self._counting:
            self.counts[outcome] += 1
            count = self.counts[outcome]
        if detail is not None and count <= _LOGGED_ERRORS:
            _LOG.warning("verifier: %s (%s)", outcome, detail[:500])
        return reward

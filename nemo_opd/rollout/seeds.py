"""Seeds that are derived, never stored: the same run draws the same random numbers after any resume."""

from __future__ import annotations

import hashlib
import struct

_PERSONALISATION = b"nemo_opd.rollout"
"""Keeps these hashes apart from any other use of BLAKE2b; changing it changes every rollout."""
_KEY_BITS = 52
"""Of a response's key: exact in float64, in which rows travel between the ranks that share them."""


def derive_seed(run_seed: int, epoch: int, prompt_index: int, sample: int) -> int:
    """The seed of one response: BLAKE2b over the four numbers, each as a signed 64-bit little-endian integer.

    A hash rather than a sum, so that neighbouring prompts and samples share nothing; BLAKE2b rather than Python's
    `hash`, so that the value is the same on every platform, Python version and process.

    Returns: an integer in [0, 2**64).
    Raises: ValueError when a number does not fit 64 signed bits.

    Example: ``derive_seed(0, 0, 17, 3)`` for the fourth sample of prompt 17 in the first epoch.
    """
    return _hash(_PERSONALISATION, run_seed, epoch, prompt_index, sample)


def response_key(run_seed: int, epoch: int, prompt_index: int, sample: int) -> int:
    """Names a response for random decisions about its tokens, whatever row it lies in; in [0, 2**52).

    Shares nothing with the response's seed, so that such a decision does not depend on the draw it is about.
    """
    return _hash(b"nemo_opd.tokens", run_seed, epoch, prompt_index, sample) >> (64 - _KEY_BITS)


def derive_uniform(purpose: str, run_seed: int, epoch: int, prompt_index: int, sample: int = 0) -> float:
    """A number in [0, 1) for one decision about a prompt or a response; `purpose` (at most 16 bytes) keeps the
    decisions apart."""
    return (_hash(purpose.encode(), run_seed, epoch, prompt_index, sample) >> 11) * 2.0**-53


def _hash(purpose: bytes, *parts: int) -> int:
    try:
        message = struct.pack("<4q", *parts)
    except struct.error as error:
        raise ValueError(
            f"seed parts: got (run_seed, epoch, prompt_index, sample) = {parts}; "
            "expected integers of at most 64 signed bits"
        ) from error
    return int.from_bytes(hashlib.blake2b(message, digest_size=8, person=purpose).digest(), "little")

"""Seeds that are derived, never stored: the same run draws the same random numbers after any resume."""

from __future__ import annotations

import hashlib
import struct

_PERSONALISATION = b"nemo_opd.rollout"
"""Keeps these hashes apart from any other use of BLAKE2b; changing it changes every rollout."""


def derive_seed(run_seed: int, epoch: int, prompt_index: int, sample: int) -> int:
    """The seed of one response: BLAKE2b over the four numbers, each as a signed 64-bit little-endian integer.

    A hash rather than a sum, so that neighbouring prompts and samples share nothing; BLAKE2b rather than Python's
    `hash`, so that the value is the same on every platform, Python version and process.

    Returns: an integer in [0, 2**64).
    Raises: ValueError when a number does not fit 64 signed bits.

    Example: ``derive_seed(0, 0, 17, 3)`` for the fourth sample of prompt 17 in the first epoch.
    """
    try:
        message = struct.pack("<4q", run_seed, epoch, prompt_index, sample)
    except struct.error as error:
        raise ValueError(
            f"seed parts: got (run_seed, epoch, prompt_index, sample) = {(run_seed, epoch, prompt_index, sample)}; "
            "expected integers of at most 64 signed bits"
        ) from error
    return int.from_bytes(hashlib.blake2b(message, digest_size=8, person=_PERSONALISATION).digest(), "little")

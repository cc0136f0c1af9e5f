"""A process without a process group, in which ranks of any layout can be played."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest


@pytest.fixture(scope="package")
def alone() -> Iterator[Callable[..., Any]]:
    """``alone(function, *args)`` runs a module-level function there and returns what it returns."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *args: pool.submit(function, *args).result(timeout=240)

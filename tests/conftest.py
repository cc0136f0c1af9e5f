"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from jaxtyping import install_import_hook

from tests.helpers.ranks import RankPool

# Shapes in signatures are checked here and cost nothing in a run.
install_import_hook(["nemo_opd.vocab.view", "nemo_opd.vocab.objective"], "beartype.beartype")


def _pool(world_size: int) -> Iterator[RankPool]:
    pool = RankPool(world_size)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def ranks1() -> Iterator[RankPool]:
    yield from _pool(1)


@pytest.fixture(scope="session")
def ranks2() -> Iterator[RankPool]:
    yield from _pool(2)


@pytest.fixture(scope="session")
def ranks4() -> Iterator[RankPool]:
    yield from _pool(4)

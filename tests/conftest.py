"""Fixtures shared by all tests."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
from jaxtyping import install_import_hook
from xdist.scheduler import LoadScopeScheduling

from tests.helpers.ranks import RankPool

# Shapes in signatures are checked here and cost nothing in a run.
install_import_hook(["nemo_opd.vocab.view", "nemo_opd.vocab.objective"], "beartype.beartype")


class ByFile(LoadScopeScheduling):
    """Tests of a file share models and servers, so they stay in one process; so do those of the one SLURM."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "slurm" if file.startswith("tests/slurm/") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    """For `make test`, which spreads tests over processes."""
    return ByFile(config, log)


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


@pytest.fixture(scope="session")
def pools(ranks1: RankPool, ranks2: RankPool, ranks4: RankPool) -> dict[int, RankPool]:
    """By number of ranks, for tests over layouts."""
    return {1: ranks1, 2: ranks2, 4: ranks4}


@pytest.fixture(scope="session")
def alone() -> Iterator[Callable[..., Any]]:
    """``alone(function, *args)`` runs a module-level function in a process without a process group."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda *call: pool.submit(_leaving_no_group, *call).result(timeout=600)


def _leaving_no_group(function: Callable[..., Any], *args: Any) -> Any:
    """The function's result; the group that a command leaves to the end of its process is ended for the next test."""
    import torch.distributed as dist

    from nemo_opd.engines.megatron.parallel import destroy_student_groups

    try:
        return function(*args)
    finally:
        if dist.is_initialized():
            destroy_student_groups()
            dist.destroy_process_group()

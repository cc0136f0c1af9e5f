"""One SLURM and one project folder for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, need_slurm
from tests.slurm.site import Site


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    need_slurm()
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A project folder whose name would be trouble for careless scripts."""
    return Site(tmp_path_factory.mktemp("slurm") / 'a project\'s $(touch canary) "folder"', cluster)

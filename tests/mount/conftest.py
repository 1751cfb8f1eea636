"""Fixtures of the tests on a real mount. Skipped as a whole where there is no /dev/fuse, or no root."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from mount_cluster import RealCluster, running

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    able = os.geteuid() == 0 and os.path.exists("/dev/fuse")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.mount)
            if not able:
                item.add_marker(pytest.mark.skip(reason="needs root and /dev/fuse"))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCluster]:
    """One metaserver, three chunkservers, two copies, mounted; shared by all tests that leave it whole."""
    with running(tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture
def place(cluster: RealCluster, request: pytest.FixtureRequest) -> Path:
    """An empty directory of the shared mount, for one test."""
    path = cluster.mnt / "".join(letter if letter.isalnum() else "-" for letter in request.node.name)[:100]
    path.mkdir()
    return path


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[RealCluster]:
    """A cluster for one test that breaks things."""
    with running(tmp_path) as made:
        yield made

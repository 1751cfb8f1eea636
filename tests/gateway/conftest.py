"""Fixtures of the tests of the gateway: real processes, curl, no FUSE."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from gateway_cluster import Gateway, MountlessCluster, running_without_mount

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if shutil.which("curl") is None:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs curl"))


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountlessCluster]:
    with running_without_mount(tmp_path_factory.mktemp("gateway")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def gateway(servers: MountlessCluster) -> Iterator[Gateway]:
    """One gateway to all of the cluster; tests use directories of their own."""
    with servers.gateway(name="shared") as made:
        yield made


@pytest.fixture
def folder(gateway: Gateway, request: pytest.FixtureRequest) -> str:
    """The address of an empty directory for one test."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)[:100]
    assert gateway.curl(f"/files/{name}/", "-X", "PUT").status == 201
    return f"/files/{name}"

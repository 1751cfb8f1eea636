"""Fixtures of the chunkserver's tests; every data directory they made is checked afterwards."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from chunkserver_harness import CLUSTER, KEY, Started, StartNode, same_disk, serving

from chunkserver import identity
from chunkserver.check import check_directory
from chunkserver.client import Pool, open_pool
from chunkserver.disk import Disk, LocalDisk


@pytest.fixture
def damaged() -> set[str]:
    """Names of servers whose directories a test damages on purpose: not checked."""
    return set()


@pytest.fixture(autouse=True)
def check_afterwards(tmp_path: Path, damaged: set[str]) -> Iterator[None]:
    yield
    for path in tmp_path.iterdir():
        if path.name not in damaged and (path / identity.FILE).exists():
            assert check_directory(str(path)).problems == []


@pytest.fixture
def start_node(tmp_path: Path, check_afterwards: None) -> StartNode:
    """A member of the test's cluster: ``async with start_node("a") as a``; the same name again: restarted."""

    def start(
        name: str = "a", wrap: Callable[[LocalDisk], Disk] = same_disk, **options: Any
    ) -> AbstractAsyncContextManager[Started]:
        return serving(tmp_path / name, name, wrap, **options)

    return start


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    async with open_pool(KEY, str(CLUSTER)) as opened:
        yield opened

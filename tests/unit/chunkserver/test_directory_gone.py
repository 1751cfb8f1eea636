"""The data directory is emptied, unmounted or replaced under a running server."""

import errno
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import trio
from chunkserver_harness import Started, StartNode, Writer
from trio.testing import MockClock

from chunkserver import identity, node
from chunkserver.client import Pool
from chunkserver.disk import LocalDisk, Space
from metaserver.errors import DfsError, ErrorCode


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "DIRECTORY_SECONDS", 0.01)
    monkeypatch.setattr(node, "TICK_SECONDS", 0.01)


async def failed(started: Started, because: str) -> None:
    with trio.fail_after(30):
        while because not in started.store.table.disk_error:  # noqa: ASYNC110
            await trio.sleep(0.01)
        while True:
            snapshot = started.node.mailbox.snapshot()
            assert snapshot is not None
            if because in snapshot.disk_error:
                assert snapshot.disk_state == "FAILED"
                return
            await trio.sleep(0.01)


async def refused(pool: Pool, started: Started) -> None:
    with pytest.raises(DfsError) as caught:
        await Writer(9).send(pool, started.peer, b"x")
    assert caught.value.code is ErrorCode.DISK_FAILED


async def test_a_server_whose_directory_was_emptied_stays_failed_when_it_comes_back(
    start_node: StartNode, pool: Pool, tmp_path: Path
) -> None:
    """What comes back need not be what was there; only a start looks at all of it."""
    async with start_node() as a:
        writer = Writer(5)
        await writer.send(pool, a.peer, os.urandom(1000), sync=True)
        kept = tmp_path / "kept"
        shutil.copytree(a.path, kept)
        for name in a.path.iterdir():
            shutil.rmtree(name) if name.is_dir() else name.unlink()
        await failed(a, "was emptied or unmounted")
        await refused(pool, a)
        # Nothing is written there: it would pass for this server's directory.
        with pytest.raises(DfsError, match="was emptied"):
            await a.node.raise_epoch(77)
        assert list(a.path.iterdir()) == []
        shutil.copytree(kept, a.path, dirs_exist_ok=True)
        await failed(a, "restart this server")
        await refused(pool, a)
        shutil.rmtree(kept)
    async with start_node() as a:
        assert (await pool.read(a.peer, 5, 0, 1000)).payload == writer.data
        assert a.store.table.disk_error == ""


async def test_a_directory_of_another_server_is_left_alone(start_node: StartNode, pool: Pool) -> None:
    async with start_node() as a:
        other = identity.Identity(1, a.node.identity.server ^ 1, "other", "")
        before = a.node.identity
        identity.save(LocalDisk(str(a.path)), other)
        await failed(a, f"is the directory of server {other.server} now")
        with pytest.raises(DfsError):
            await a.node.raise_epoch(77)
        assert identity.load(LocalDisk(str(a.path))) == other
        identity.save(LocalDisk(str(a.path)), before)


class Moved:
    """A disk on whose path another file system appears."""

    device = ""

    def __init__(self, disk: LocalDisk) -> None:
        self._disk = disk

    def __getattr__(self, name: str) -> object:
        return getattr(self._disk, name)

    def space(self) -> Space:
        space = self._disk.space()
        return space._replace(device=self.device or space.device)


async def test_another_file_system_in_its_place_is_noticed(start_node: StartNode) -> None:
    async with start_node(wrap=Moved) as a:  # type: ignore[arg-type]
        await trio.sleep(0.05)
        assert a.store.table.disk_error == ""
        a.node.disk.device = "elsewhere:1"  # type: ignore[attr-defined]
        await failed(a, "another file system")


async def test_a_registration_without_a_directory_fails_cleanly(
    start_node: StartNode, autojump_clock: MockClock
) -> None:
    async with start_node() as a:
        away = a.path.with_name("away")
        a.path.rename(away)
        with pytest.raises(DfsError) as caught:
            a.node.registration(host="h", port=1, http_port=2, rack="", labels=[])
        assert caught.value.code is ErrorCode.DISK_FAILED
        away.rename(a.path)


async def test_a_host_may_get_another_name(start_node: StartNode, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    real = identity.lost

    def lost(*arguments: Any) -> str:
        nonlocal looks
        looks += 1
        return real(*arguments)

    monkeypatch.setattr(identity, "lost", lost)
    async with start_node() as a:
        monkeypatch.setattr(socket, "gethostname", lambda: "renamed")
        looks = 0
        with trio.fail_after(30):
            while looks < 3 and not a.store.table.disk_error:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert a.store.table.disk_error == ""


def test_an_identity_that_the_disk_does_not_give_back_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, _ = identity.open_directory(str(tmp_path / "a"), "a")
    disk.unlock()

    def fail(self: LocalDisk, path: str) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    monkeypatch.setattr(LocalDisk, "read_small", fail)
    with pytest.raises(identity.DataDirectoryError, match=r"cannot be read \(Input/output error\)"):
        identity.open_directory(str(tmp_path / "a"), "a")

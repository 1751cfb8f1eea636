"""The adapter to pyfuse3: what is decoded, encoded and mapped. Nothing is mounted here."""

import errno
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pyfuse3
import pytest
import trio
from pyfuse3 import EntryAttributes, FUSEError
from vfs_harness import Plant, TestMount, open_plant

from dfsmount.operations import Operations
from dfsmount.waiting import GRACE_SECONDS, Waiting
from metaserver.errors import DfsError, ErrorCode


class Context:
    """What pyfuse3 tells of the caller."""

    uid, gid, pid, umask = 1000, 1000, 1, 0o22


class Fields:
    """Which attributes a setattr changes."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def __getattr__(self, name: str) -> bool:
        return name.removeprefix("update_") in self._names


CTX: Any = Context()


@pytest.fixture
async def plant(tmp_path: Path) -> AsyncIterator[Plant]:
    async with open_plant(tmp_path) as plant:
        yield plant


@pytest.fixture
async def mount(plant: Plant) -> AsyncIterator[TestMount]:
    async with plant.mount() as mount:
        yield mount


@pytest.fixture
def operations(mount: TestMount) -> Operations:
    return Operations(mount.vfs, Waiting(30))


async def fails(number: int, coroutine: Any) -> None:
    with pytest.raises(FUSEError) as caught:
        await coroutine
    assert caught.value.errno == number


def changes(**values: int) -> EntryAttributes:
    entry = EntryAttributes()
    for name, value in values.items():
        setattr(entry, name, value)
    return entry


async def test_a_file_from_beginning_to_end(operations: Operations) -> None:
    info, entry = await operations.create(1, b"f", 0o100640, os.O_RDWR, CTX)
    assert stat.S_ISREG(entry.st_mode)
    assert (stat.S_IMODE(entry.st_mode), entry.st_uid, entry.st_gid, entry.st_nlink) == (0o640, 1000, 1000, 1)
    assert await operations.write(info.fh, 0, b"hello") == 5
    assert await operations.read(info.fh, 1, 100) == b"ello"
    await operations.flush(info.fh)
    await operations.fsync(info.fh, True)
    found = await operations.getattr(entry.st_ino, CTX)
    assert (found.st_size, found.st_blksize) == (5, 65536)
    assert 0 < found.attr_timeout <= 1
    await operations.release(info.fh)
    again = await operations.open(entry.st_ino, os.O_RDONLY, CTX)
    assert not again.direct_io
    await operations.release(again.fh)
    await operations.unlink(1, b"f", CTX)
    await fails(errno.ENOENT, operations.lookup(1, b"f", CTX))


async def test_names(operations: Operations) -> None:
    directory = await operations.mkdir(1, b"d", 0o40755, CTX)
    assert stat.S_ISDIR(directory.st_mode)
    link = await operations.symlink(directory.st_ino, b"l", b"target", CTX)
    assert await operations.readlink(link.st_ino, CTX) == b"target"
    pipe = await operations.mknod(directory.st_ino, b"p", stat.S_IFIFO | 0o600, 0, CTX)
    assert stat.S_ISFIFO(pipe.st_mode)
    second = await operations.link(pipe.st_ino, 1, b"q", CTX)
    assert (second.st_ino, second.st_nlink) == (pipe.st_ino, 2)
    await operations.rename(1, b"q", directory.st_ino, b"r", 0, CTX)
    await fails(errno.EEXIST, operations.rename(directory.st_ino, b"r", directory.st_ino, b"p", 1, CTX))
    await fails(errno.ENOTEMPTY, operations.rmdir(1, b"d", CTX))
    await fails(errno.EISDIR, operations.unlink(1, b"d", CTX))
    await fails(errno.ENAMETOOLONG, operations.mkdir(1, b"n" * 256, 0o755, CTX))


async def test_the_mounted_directory_is_inode_1(plant: Plant, mount: TestMount) -> None:
    inner = await mount.mkdir(b"inner")
    assert inner != 1
    async with plant.mount(subdirectory=b"/inner") as part:
        operations = Operations(part.vfs, Waiting(30))
        assert (await operations.getattr(1, CTX)).st_ino == 1
        made = await operations.mkdir(1, b"d", 0o755, CTX)
        assert (await operations.lookup(1, b"d", CTX)).st_ino == made.st_ino
        await operations.forget([(made.st_ino, 2)])
        assert part.core.inodes.get(made.st_ino) is None
    assert await mount.list(inner) == [b".", b"..", b"d"]


async def test_only_what_is_marked_is_changed(operations: Operations) -> None:
    _, entry = await operations.create(1, b"f", 0o100644, os.O_RDWR, CTX)
    new = changes(st_mode=0o100600, st_uid=5, st_gid=6, st_size=7, st_atime_ns=-1, st_mtime_ns=1 << 60)
    ino = entry.st_ino
    found = await operations.setattr(ino, new, Fields("mode"), None, CTX)  # type: ignore[arg-type]
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_size) == (0o600, 1000, 0)
    found = await operations.setattr(ino, new, Fields("uid", "atime"), None, CTX)  # type: ignore[arg-type]
    assert (found.st_uid, found.st_gid, found.st_atime_ns) == (5, 1000, -1)
    assert found.st_mtime_ns == entry.st_mtime_ns
    found = await operations.setattr(ino, new, Fields("gid", "size"), None, CTX)  # type: ignore[arg-type]
    assert (found.st_gid, found.st_size) == (6, 7)
    found = await operations.setattr(ino, new, Fields("mtime"), None, CTX)  # type: ignore[arg-type]
    assert found.st_mtime_ns == 1 << 60


async def test_statfs_xattrs_and_directories(operations: Operations, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = await operations.statfs(CTX)
    assert (stats.f_namemax, stats.f_frsize) == (255, 4096)
    assert stats.f_ffree > 0
    await fails(pyfuse3.ENOATTR, operations.getxattr(1, b"security.capability", CTX))
    await operations.setxattr(1, b"user.x", b"1", CTX)
    assert await operations.getxattr(1, b"user.x", CTX) == b"1"
    assert list(await operations.listxattr(1, CTX)) == [b"user.x"]
    await operations.removexattr(1, b"user.x", CTX)
    await fails(errno.ENODATA, operations.getxattr(1, b"user.x", CTX))
    await fails(errno.ENODATA, operations.getxattr(1, b"system.posix_acl_access", CTX))
    made = await operations.mkdir(1, b"d", 0o755, CTX)
    handle = await operations.opendir(1, CTX)
    taken: list[tuple[bytes, int]] = []

    def reply(token: object, name: bytes, entry: EntryAttributes, cookie: int) -> bool:
        taken.append((name, entry.st_ino))
        return len(taken) < 4

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    await operations.readdir(handle, 0, None)  # type: ignore[arg-type]
    assert taken == [(b".", 1), (b"..", 1), (b"d", made.st_ino)]
    await operations.fsyncdir(handle, False)
    await operations.releasedir(handle)
    assert await operations.access(1, os.R_OK, CTX)


async def test_every_error_becomes_an_errno(operations: Operations, mount: TestMount) -> None:
    async def broken(*arguments: object, **named: object) -> None:
        raise failure

    mount.core.remote.lookup = broken  # type: ignore[method-assign,assignment]
    for code, number in ((ErrorCode.NO_SPACE, errno.ENOSPC), (ErrorCode.UNAVAILABLE, errno.EIO)):
        failure: Exception = DfsError(code)
        await fails(number, operations.lookup(1, b"x", CTX))
    # An exception that is no FUSEError would end pyfuse3.main.
    failure = ZeroDivisionError()
    await fails(errno.EIO, operations.lookup(1, b"x", CTX))
    mount.names.open_directory = lambda ino: 1 // 0  # type: ignore[method-assign]
    await fails(errno.EIO, operations.opendir(1, CTX))
    await fails(errno.EINVAL, operations.read(99, 0, 1))


async def test_a_handler_that_never_ends_is_ended(
    mount: TestMount, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    waiting = Waiting(30, clock=lambda: now)
    operations = Operations(mount.vfs, waiting)

    async def never(parent: int, name: bytes) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(mount.core.remote, "lookup", never)
    ended = trio.Event()

    async def ask() -> None:
        await fails(errno.EIO, operations.lookup(1, b"x", CTX))
        ended.set()

    nursery.start_soon(ask)
    await trio.testing.wait_all_tasks_blocked()
    now = 30 + GRACE_SECONDS
    waiting.sweep()
    with trio.fail_after(5):
        await ended.wait()
    assert len(waiting) == 0


def test_every_handler_that_pyfuse3_calls_is_guarded() -> None:
    """Those that pyfuse3 knows and we do not have answer ENOSYS, which the kernel remembers."""
    missing = {"poll", "init", "stacktrace"}
    for name in vars(pyfuse3.Operations):
        handler = getattr(Operations, name)
        if name.startswith("_") or not callable(handler) or name in missing:
            continue
        assert name in vars(Operations), name
        assert name == "forget" or hasattr(handler, "__wrapped__"), name

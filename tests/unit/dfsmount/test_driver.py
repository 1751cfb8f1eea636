"""The driver of our own: requests as the kernel sends them, answers as it takes them. Nothing is mounted here."""

import errno
import os
import stat
import struct
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest
from vfs_harness import Plant, TestMount, open_plant

from dfsmount import fusewire
from dfsmount.device import NoAnswer
from dfsmount.driver import Driver
from dfsmount.fusewire import Opcode, Request
from dfsmount.operations import FUSEError
from dfsmount.waiting import Waiting
from metaserver.errors import DfsError

ROOT = 1


class Asking:
    """Asks a driver."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.at_once = False

    async def __call__(self, opcode: int, node: int, *parts: bytes) -> bytes:
        """The answer's data; ``at_once`` says whether it needed no waiting."""
        body = b"".join(parts)
        request = Request(40 + len(body), opcode, 1, node, 1000, 1001, 1, 0, 0)
        served = self.driver.serve(request, memoryview(body))
        self.at_once = not isinstance(served, Coroutine)
        return bytes((await served if isinstance(served, Coroutine) else served) or b"")

    async def fails(self, number: int, opcode: int, node: int, *parts: bytes) -> None:
        with pytest.raises((FUSEError, DfsError)) as caught:
            await self(opcode, node, *parts)
        error: Any = caught.value
        found = error.errno if isinstance(error, FUSEError) else error.code.name
        assert found in (number, errno.errorcode[number], {errno.ENOENT: "NOT_FOUND"}.get(number))

    async def make(self, name: bytes) -> tuple[int, int]:
        """Node and handle of a new file."""
        flags = os.O_RDWR | os.O_EXCL | os.O_CREAT
        data = await self(Opcode.CREATE, ROOT, struct.pack("<IIII", flags, 0o100640, 0o22, 0), name, b"\0")
        assert len(data) == fusewire.ENTRY_BYTES + fusewire.OPEN_OUT.size
        return attributes(data[40:128])["ino"], struct.unpack_from("<Q", data, 128)[0]


def attributes(data: bytes) -> dict[str, int]:
    names = (
        "ino", "size", "blocks", "atime", "mtime", "ctime", "atime_ns", "mtime_ns", "ctime_ns",
        "mode", "nlink", "uid", "gid", "rdev", "block", "flags",
    )  # fmt: skip
    return dict(zip(names, struct.unpack("<QQQqqqIIIIIIIIII", data), strict=True))


@pytest.fixture
async def plant(tmp_path: Path) -> AsyncIterator[Plant]:
    async with open_plant(tmp_path) as plant:
        yield plant


@pytest.fixture
async def mount(plant: Plant) -> AsyncIterator[TestMount]:
    async with plant.mount() as mount:
        yield mount


@pytest.fixture
def ask(mount: TestMount) -> Asking:
    return Asking(Driver(mount.vfs, Waiting(30)))


def io(handle: int, offset: int, size: int) -> bytes:
    return struct.pack("<QQIIQII", handle, offset, size, 0, 0, 0, 0)


def of_handle(handle: int, flags: int = 0) -> bytes:
    return struct.pack("<QIIQ", handle, flags, 0, 0)


async def test_a_file_from_its_making_to_its_end(ask: Asking) -> None:
    node, handle = await ask.make(b"f")
    # The first write waits for a chunk; what there is room for is taken at once.
    assert await ask(Opcode.WRITE, node, io(handle, 0, 5), b"hello") == struct.pack("<II", 5, 0)
    assert await ask(Opcode.WRITE, node, io(handle, 5, 6), b" world") == struct.pack("<II", 6, 0)
    assert ask.at_once
    found = attributes((await ask(Opcode.GETATTR, node, bytes(16)))[16:])
    assert ask.at_once
    assert (found["ino"], found["size"], found["uid"], found["gid"]) == (node, 11, 1000, 1001)
    assert found["mode"] == stat.S_IFREG | 0o640
    assert await ask(Opcode.READ, node, io(handle, 3, 100)) == b"lo world"
    assert await ask(Opcode.FSYNC, node, of_handle(handle, 1)) == b""
    assert await ask(Opcode.FLUSH, node, of_handle(handle)) == b""
    assert ask.at_once
    assert await ask(Opcode.RELEASE, node, of_handle(handle)) == b""
    opened = await ask(Opcode.OPEN, node, struct.pack("<II", os.O_RDONLY, 0))
    assert len(opened) == 16
    # What was committed is zeroes here.
    assert await ask(Opcode.READ, node, io(struct.unpack_from("<Q", opened)[0], 0, 5)) == bytes(5)
    assert await ask(Opcode.UNLINK, ROOT, b"f\0") == b""
    await ask.fails(errno.ENOENT, Opcode.LOOKUP, ROOT, b"f\0")


async def test_a_synchronous_write_is_waited_for(ask: Asking) -> None:
    node, handle = await ask.make(b"f")
    await ask(Opcode.WRITE, node, io(handle, 0, 1), b"x")
    opened = await ask(Opcode.OPEN, node, struct.pack("<II", os.O_WRONLY | os.O_SYNC, 0))
    own = struct.unpack_from("<Q", opened)[0]
    assert await ask(Opcode.WRITE, node, io(own, 1, 1), b"y") == struct.pack("<II", 1, 0)
    assert not ask.at_once


def special(mode: int) -> bytes:
    return struct.pack("<II", fusewire.Change.MODE, 0) + bytes(60) + struct.pack("<IIIII", mode, 0, 0, 0, 0)


async def test_special_bits_go_where_the_kernel_says_so(ask: Asking, mount: TestMount) -> None:
    node, handle = await ask.make(b"f")

    async def mode() -> int:
        return stat.S_IMODE(attributes((await ask(Opcode.GETATTR, node, bytes(16)))[16:])["mode"])

    def write(flags: int) -> bytes:
        return struct.pack("<QQIIQII", handle, 0, 1, flags, 0, 0, 0)

    await ask(Opcode.SETATTR, node, special(0o6755))
    await ask(Opcode.WRITE, node, write(0), b"x")
    assert await mode() == 0o6755
    await ask(Opcode.WRITE, node, write(fusewire.WRITE_KILL_SUIDGID), b"x")
    assert await mode() == 0o755
    await ask(Opcode.WRITE, node, write(fusewire.WRITE_KILL_SUIDGID), b"x")
    assert ask.at_once
    # Without the right of the group to execute, S_ISGID is something else.
    for change in (
        struct.pack("<IIQQ", fusewire.Change.SIZE | fusewire.Change.KILL_SUIDGID, 0, 0, 9) + bytes(64),
        struct.pack("<II", fusewire.Change.UID | fusewire.Change.KILL_SUIDGID, 0)
        + bytes(68)
        + struct.pack("<III", 5, 6, 0),
    ):
        for before, after in ((0o6711, 0o711), (0o6700, 0o2700), (0o1777, 0o1777)):
            await ask(Opcode.SETATTR, node, special(before))
            await ask(Opcode.SETATTR, node, change)
            assert await mode() == after


async def test_attributes_are_set(ask: Asking) -> None:
    node, _ = await ask.make(b"f")
    mode = struct.pack("<II", fusewire.Change.MODE, 0) + bytes(60) + struct.pack("<IIIII", 0o100600, 0, 0, 0, 0)
    found = attributes((await ask(Opcode.SETATTR, node, mode))[16:])
    # The metaserver may hear of it later.
    assert ask.at_once
    assert found["mode"] == stat.S_IFREG | 0o600
    size = struct.pack("<IIQQ", fusewire.Change.SIZE, 0, 0, 77) + bytes(64)
    assert attributes((await ask(Opcode.SETATTR, node, size))[16:])["size"] == 77
    assert not ask.at_once


async def test_names(ask: Asking) -> None:
    made = await ask(Opcode.MKDIR, ROOT, struct.pack("<II", 0o40750, 0o22), b"d\0")
    node = attributes(made[40:])["ino"]
    assert attributes(made[40:])["mode"] == stat.S_IFDIR | 0o750
    # What is in a directory that was made here is known.
    with pytest.raises(DfsError):
        await ask(Opcode.LOOKUP, node, b"nothing\0")
    made = await ask(Opcode.SYMLINK, node, b"link\0target\0")
    link = attributes(made[40:])["ino"]
    assert await ask(Opcode.READLINK, link) == b"target"
    await ask(Opcode.MKNOD, node, struct.pack("<IIII", stat.S_IFIFO | 0o600, 0, 0, 0), b"fifo\0")
    file, _ = await ask.make(b"f")
    linked = attributes((await ask(Opcode.LINK, node, struct.pack("<Q", file), b"hard\0"))[40:])
    assert (linked["ino"], linked["nlink"]) == (file, 2)
    await ask(Opcode.RENAME, ROOT, struct.pack("<Q", node), b"f\0moved\0")
    await ask.fails(errno.EEXIST, Opcode.RENAME2, node, struct.pack("<QII", node, 1, 0), b"link\0fifo\0")
    await ask(Opcode.RENAME2, node, struct.pack("<QII", ROOT, 0, 0), b"fifo\0fifo\0")
    assert attributes((await ask(Opcode.LOOKUP, ROOT, b"fifo\0"))[40:])["mode"] == stat.S_IFIFO | 0o600
    await ask.fails(errno.ENOTEMPTY, Opcode.RMDIR, ROOT, b"d\0")
    for opcode, body in (
        (Opcode.FORGET, struct.pack("<Q", 1)),
        (Opcode.BATCH_FORGET, struct.pack("<IIQQ", 1, 0, file, 1)),
    ):
        with pytest.raises(NoAnswer):
            await ask(opcode, link, body)


async def test_listings_fit_what_the_kernel_has_room_for(ask: Asking) -> None:
    for number in range(20):
        await ask.make(b"file-%02d" % number)
    (handle,) = struct.unpack_from("<Q", await ask(Opcode.OPENDIR, ROOT, bytes(8)))
    names, cookie = [], 0
    while data := await ask(Opcode.READDIRPLUS, ROOT, io(handle, cookie, 1000)):
        assert len(data) <= 1000
        while data:
            ino, cookie, length, _ = struct.unpack_from("<QQII", data, 128)
            name = data[152 : 152 + length]
            names.append(name)
            assert struct.unpack_from("<Q", data)[0] == (0 if name in (b".", b"..") else ino)
            data = data[(152 + length + 7) // 8 * 8 :]
    assert names == [b".", b"..", *(b"file-%02d" % number for number in range(20))]
    assert await ask(Opcode.FSYNCDIR, ROOT, of_handle(handle)) == b""
    assert await ask(Opcode.RELEASEDIR, ROOT, of_handle(handle)) == b""


async def test_extended_attributes(ask: Asking) -> None:
    node, _ = await ask.make(b"f")
    await ask.fails(errno.ENODATA, Opcode.GETXATTR, node, bytes(8), b"security.capability\0")

    async def put(flags: int) -> None:
        await ask(Opcode.SETXATTR, node, struct.pack("<II", 3, flags), b"user.x\0abc")

    with pytest.raises(FUSEError):
        await put(os.XATTR_REPLACE)
    await put(os.XATTR_CREATE)
    with pytest.raises(FUSEError):
        await put(os.XATTR_CREATE)
    await put(os.XATTR_REPLACE)
    assert await ask(Opcode.GETXATTR, node, bytes(8), b"user.x\0") == struct.pack("<II", 3, 0)
    assert await ask(Opcode.GETXATTR, node, struct.pack("<II", 3, 0), b"user.x\0") == b"abc"
    await ask.fails(errno.ERANGE, Opcode.GETXATTR, node, struct.pack("<II", 2, 0), b"user.x\0")
    assert await ask(Opcode.LISTXATTR, node, struct.pack("<II", 100, 0)) == b"user.x\0"
    assert await ask(Opcode.LISTXATTR, node, bytes(8)) == struct.pack("<II", 7, 0)
    await ask(Opcode.REMOVEXATTR, node, b"user.x\0")
    await ask.fails(errno.ENODATA, Opcode.GETXATTR, node, bytes(8), b"user.x\0")


async def test_what_else_there_is(ask: Asking) -> None:
    data = await ask(Opcode.STATFS, ROOT)
    assert struct.unpack("<QQQQQIII28x", data)[5:] == (4096, 255, 4096)
    with pytest.raises(NoAnswer):
        await ask(Opcode.INTERRUPT, ROOT, bytes(8))
    # ioctl, and whatever there may be one day.
    for opcode in (39, 4711):
        await ask.fails(errno.ENOSYS, opcode, ROOT)
    await ask.fails(errno.ENOSYS, Opcode.READLINK + 1000, ROOT)

"""Times of access that mounts send late: what they change, and what keeps them from it."""

import stat
from pathlib import Path

import pytest
from running_metaserver import Mount, running

from metaserver import protocol
from metaserver.errors import ErrorCode
from metaserver.protocol import Attributes, GetAttributes, SetAttributes, Touch, Touched, TouchInodes


async def attributes(mount: Mount, ino: int) -> Attributes:
    entry: protocol.Entry = await mount.call(protocol.GET_ATTRIBUTES, GetAttributes(ino))
    return entry.attributes


async def touch(mount: Mount, *touches: Touch) -> Touched:
    touched: Touched = await mount.call(protocol.TOUCH, TouchInodes(touches))
    return touched


def values(found: Attributes) -> dict[str, int]:
    return {name: getattr(found, name) for name in found.__struct_fields__}


async def test_only_the_time_of_access_moves_and_nobody_is_told(tmp_path: Path) -> None:
    async with running(tmp_path / "data") as metaserver:
        mount, other = await metaserver.mount(), await metaserver.mount()
        inos = [
            await mount.make(b"f"),
            await mount.make(b"d", mode=stat.S_IFDIR | 0o755),
            await mount.make(b"l", mode=stat.S_IFLNK | 0o777, target=b"t"),
        ]
        for ino in inos:
            await other.call(protocol.OPEN, protocol.Open(ino, False))
        before = [await attributes(mount, ino) for ino in inos]
        wanted = [Touch(found.ino, found.atime_ns, found.atime_ns + 5) for found in before]
        assert await touch(mount, *wanted) == Touched(())
        for found in before:
            assert values(await attributes(other, found.ino)) == values(found) | {"atime_ns": found.atime_ns + 5}
        await metaserver.idle()
        assert other.changed == []


async def test_what_was_set_since_stays(tmp_path: Path) -> None:
    async with running(tmp_path / "data") as metaserver:
        mount = await metaserver.mount()
        ino, gone = await mount.make(b"f"), await mount.make(b"g")
        seen = (await attributes(mount, ino)).atime_ns
        await mount.unlink(b"g")
        # An earlier time than that of the read.
        await mount.call(protocol.SET_ATTRIBUTES, SetAttributes(ino, atime_ns=5))
        before = await attributes(mount, ino)
        assert await touch(mount, Touch(gone, seen, seen + 5), Touch(ino, seen, seen + 5)) == Touched((gone, ino))
        assert await attributes(mount, ino) == before


async def test_nothing_moves_where_nothing_can_be_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path / "data") as metaserver:
        mount, reader = await metaserver.mount(), await metaserver.mount(read_only=True)
        ino = await mount.make(b"f")
        before = await attributes(mount, ino)
        told = Touch(ino, before.atime_ns, before.atime_ns + 5)
        left = Touched((ino,))
        assert await touch(reader, told) == left
        parts = metaserver.parts
        newest = parts.committer.newest
        with monkeypatch.context() as patch:
            patch.setattr(parts.changes, "refusing", "no")
            assert await touch(mount, told) == left
        with monkeypatch.context() as patch:
            patch.setattr(parts.committer, "store_full", True)
            assert await touch(mount, told) == left
        assert parts.committer.newest == newest
        assert await attributes(mount, ino) == before
        assert await touch(mount, told) == Touched(())


async def test_a_batch_has_a_bound(tmp_path: Path) -> None:
    async with running(tmp_path / "data") as metaserver:
        mount = await metaserver.mount()
        await mount.call(protocol.TOUCH, TouchInodes((Touch(99, 0, 1),) * protocol.TOUCH_INODES))
        too_many = TouchInodes((Touch(99, 0, 1),) * (protocol.TOUCH_INODES + 1))
        assert await mount.fails(protocol.TOUCH, too_many) is ErrorCode.INVALID

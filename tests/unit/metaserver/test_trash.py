"""The trash: what is deleted can be had back, and its space is there when it is needed."""

import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
from running_metaserver import FakeServer, Mount, Running, running

from metaserver import protocol, trash
from metaserver.errors import DfsError, ErrorCode
from metaserver.inodes import Effects
from metaserver.protocol import CHUNK_CAPACITY, Allocate, ChunkState, Rename, Unlink
from metaserver.schema import Chunk, Inode, Table, Trashed, inode_key, read_u64
from metaserver.trash import Place, Restored

DIRECTORY = stat.S_IFDIR | 0o750
DAY = 86400.0


@asynccontextmanager
async def with_trash(
    directory: Path, *, free: int = 100 << 30, seconds: float = DAY, **more: float
) -> AsyncIterator[tuple[Running, Mount, list[FakeServer]]]:
    async with running(directory, trash_seconds=seconds, delete_grace_seconds=0.0, **more) as metaserver:
        servers = [await metaserver.server(number, free=free) for number in (1, 2)]
        yield metaserver, await metaserver.mount(), servers


def entries(metaserver: Running) -> dict[int, Trashed]:
    rows, _ = metaserver.committer.read(0, lambda tx: list(tx.scan(Table.TRASH, b"", b"\xff" * 17)))
    return {read_u64(key, 8): Trashed.unpack(value) for key, value in rows}


def inode(metaserver: Running, ino: int) -> Inode | None:
    row, _ = metaserver.committer.read(0, lambda tx: tx.get(Table.INODES, inode_key(ino)))
    return None if row is None else Inode.unpack(row)


def restore(metaserver: Running, ino: int, to: Place | None = None) -> Restored:
    effects = Effects()
    done = metaserver.committer.change(0, 0, lambda tx, now: trash.restore(tx, now, ino, to, effects)).message
    metaserver.parts.changes.carry_out(effects)
    return done


def states(metaserver: Running) -> list[ChunkState]:
    rows, _ = metaserver.committer.read(0, lambda tx: list(tx.scan(Table.CHUNKS, b"", b"\xff" * 9)))
    return [ChunkState(Chunk.unpack(value).state) for _, value in rows]


async def written(mount: Mount, name: bytes, parent: int = 1, length: int = 100) -> int:
    """A file with data in a chunk of its own, which is sealed."""
    ino = await mount.make(name, parent)
    chunk = (await mount.allocate()).chunk
    await mount.write(ino, chunk, length)
    await mount.call(protocol.SEAL, protocol.Seal(chunk, ()))
    return ino


async def test_a_deleted_file_is_kept_and_comes_back_as_it_was(tmp_path: Path, autojump_clock: object) -> None:
    async with with_trash(tmp_path) as (metaserver, mount, _):
        ino = await written(mount, b"file")
        await mount.call(protocol.SET_XATTR, protocol.SetXattr(ino, b"user.a", b"b", 0))
        before = (await mount.lookup(b"file")).attributes
        gone = await mount.unlink(b"file")
        assert (gone.nlink, gone.orphan, gone.kept) == (0, False, True)
        assert await mount.fails(protocol.LOOKUP, protocol.Lookup(1, b"file")) is ErrorCode.NOT_FOUND
        assert await mount.fails(protocol.GET_ATTRIBUTES, protocol.GetAttributes(ino)) is ErrorCode.STALE_INODE
        assert await mount.fails(protocol.LINK, protocol.Link(ino, 1, b"again")) is ErrorCode.STALE_INODE
        assert entries(metaserver)[ino].name == b"file"
        assert (metaserver.parts.trash.files, metaserver.parts.trash.bytes) == (1, 100)
        assert ChunkState.DEAD not in states(metaserver)
        restore(metaserver, ino)
        after = (await mount.lookup(b"file")).attributes
        assert after == msgspec.structs.replace(before, ctime_ns=after.ctime_ns)
        assert (await mount.call(protocol.GET_XATTR, protocol.GetXattr(ino, b"user.a"))).value == b"b"
        assert (metaserver.parts.trash.files, metaserver.parts.trash.bytes) == (0, 0)


async def test_it_goes_when_its_time_is_over(tmp_path: Path, autojump_clock: object) -> None:
    async with with_trash(tmp_path, seconds=0.001) as (metaserver, mount, _):
        ino = await written(mount, b"file")
        assert (await mount.unlink(b"file")).kept
        # The time of the rows is the real one.
        for _ in range(100):
            await trio.sleep(2)
        assert inode(metaserver, ino) is None
        assert metaserver.parts.trash.files == 0
        assert set(states(metaserver)) <= {ChunkState.DEAD}


async def test_hard_links_go_with_the_last_name(tmp_path: Path, autojump_clock: object) -> None:
    async with with_trash(tmp_path) as (metaserver, mount, _):
        ino = await mount.make(b"one")
        await mount.call(protocol.LINK, protocol.Link(ino, 1, b"two"))
        assert not (await mount.unlink(b"one")).kept
        assert entries(metaserver) == {}
        assert (await mount.unlink(b"two")).kept
        assert entries(metaserver)[ino].name == b"two"


async def test_what_a_rename_replaces_is_kept(tmp_path: Path, autojump_clock: object) -> None:
    async with with_trash(tmp_path) as (metaserver, mount, _):
        old, new = await written(mount, b"file"), await mount.make(b"new")
        renamed = await mount.call(protocol.RENAME, Rename(1, b"new", 1, b"file", 0))
        assert (renamed.ino, renamed.replaced, renamed.kept) == (new, old, True)
        with pytest.raises(DfsError) as refused:
            restore(metaserver, old)
        assert refused.value.code is ErrorCode.EXISTS
        assert old in entries(metaserver)
        restore(metaserver, old, Place(1, b"version1"))
        assert (await mount.lookup(b"version1")).attributes.ino == old


async def test_a_removed_tree_comes_back_with_its_directories(tmp_path: Path, autojump_clock: object) -> None:
    async with with_trash(tmp_path) as (metaserver, mount, _):
        above = await mount.make(b"above", mode=DIRECTORY)
        below = await mount.make(b"below", above, DIRECTORY)
        empty = await mount.make(b"empty", above, DIRECTORY)
        link = await mount.make(b"link", below, stat.S_IFLNK | 0o777, target=b"target")
        file = await written(mount, b"file", below)
        for parent, name, directory in (
            (below, b"file", False), (below, b"link", False), (above, b"below", True), (above, b"empty", True),
            (1, b"above", True),
        ):  # fmt: skip
            await mount.call(protocol.UNLINK, Unlink(parent, name, directory))
        assert set(entries(metaserver)) == {file, link, below, above}, "empty directories are not worth it"
        assert inode(metaserver, empty) is None
        assert restore(metaserver, file).changed == [1, above, below]
        assert (await mount.lookup(b"below", above)).attributes.mode == DIRECTORY
        assert (await mount.lookup(b"above")).attributes.nlink == 3
        assert (await mount.lookup(b"file", below)).attributes.ino == file
        # New entries go behind all that were ever there.
        restore(metaserver, link)
        late = await mount.make(b"late", below)
        page = await mount.call(protocol.READ_DIRECTORY, protocol.ReadDirectory(below, 0, 10, False))
        assert [entry.ino for entry in page.entries] == [file, link, late]


async def test_directories_that_were_made_again_are_used(tmp_path: Path, autojump_clock: object) -> None:
    async with with_trash(tmp_path) as (metaserver, mount, _):
        old = await mount.make(b"d", mode=DIRECTORY)
        first, second = await mount.make(b"first", old), await mount.make(b"second", old)
        for name in (b"first", b"second"):
            await mount.unlink(name, old)
        await mount.call(protocol.UNLINK, Unlink(1, b"d", True))
        new = await mount.make(b"d", mode=DIRECTORY)
        assert restore(metaserver, first).place.parent == new
        await mount.call(protocol.UNLINK, Unlink(new, b"first", False))
        await mount.call(protocol.UNLINK, Unlink(1, b"d", True))
        await mount.make(b"d")
        with pytest.raises(DfsError, match="is no directory any more"):
            restore(metaserver, second)


async def test_what_is_open_stays_in_the_trash_after_the_close(tmp_path: Path, autojump_clock: object) -> None:
    async with with_trash(tmp_path) as (metaserver, mount, _):
        ino = await mount.make(b"file", open=True)
        gone = await mount.unlink(b"file")
        assert (gone.orphan, gone.kept) == (True, True)
        chunk = (await mount.allocate()).chunk
        await mount.write(ino, chunk, 100)
        await mount.call(protocol.CLOSE, protocol.Close((ino,)))
        await mount.call(protocol.SEAL, protocol.Seal(chunk, ()))
        assert entries(metaserver)[ino].allocated == 100
        assert metaserver.parts.trash.bytes == 100
        restore(metaserver, ino)
        assert (await mount.lookup(b"file")).attributes.size == 100


async def test_an_open_file_is_restored_and_stays_open(tmp_path: Path, autojump_clock: object) -> None:
    async with with_trash(tmp_path) as (metaserver, mount, _):
        ino = await mount.make(b"file", open=True)
        await mount.unlink(b"file")
        mount.changed.clear()
        restore(metaserver, ino)
        await metaserver.idle()
        assert ino in mount.changed
        await mount.call(protocol.CLOSE, protocol.Close((ino,)))
        assert (await mount.lookup(b"file")).attributes.nlink == 1


async def test_purging_an_open_file_leaves_it_to_those_who_have_it_open(tmp_path: Path, autojump_clock: object) -> None:
    async with with_trash(tmp_path) as (metaserver, mount, _):
        ino = await mount.make(b"file", open=True)
        await mount.unlink(b"file")
        purged = metaserver.parts.trash.carry_through(lambda tx, effects: trash.purge_step(tx, 1 << 63, 1, effects))
        assert (purged.entries, purged.more) == (1, False)
        assert (await mount.call(protocol.GET_ATTRIBUTES, protocol.GetAttributes(ino))).attributes.nlink == 0
        await mount.call(protocol.CLOSE, protocol.Close((ino,)))
        assert inode(metaserver, ino) is None


async def test_the_trash_outlives_a_restart_and_is_counted(tmp_path: Path, autojump_clock: object) -> None:
    async with with_trash(tmp_path) as (metaserver, mount, _):
        for number in range(700):
            await mount.make(b"%d" % number)
            await mount.unlink(b"%d" % number)
        await written(mount, b"file")
        await mount.unlink(b"file")
    async with running(tmp_path, trash_seconds=DAY) as metaserver:
        await trio.sleep(20)
        assert (metaserver.parts.trash.files, metaserver.parts.trash.bytes) == (701, 100)
        assert metaserver.parts.trash.status().counted


async def test_servers_that_are_away_are_no_reason_to_purge(tmp_path: Path, autojump_clock: object) -> None:
    async with with_trash(tmp_path) as (metaserver, mount, _):
        await written(mount, b"file")
        await mount.unlink(b"file")
        # Nobody beats.
        await trio.sleep(30)
        assert {member.up for member in metaserver.parts.members.by_id.values()} == {False}
        assert metaserver.parts.trash.files == 1


async def test_what_expires_first_goes_when_space_is_short(tmp_path: Path, autojump_clock: object) -> None:
    async with with_trash(tmp_path, free=1 << 40) as (metaserver, mount, servers):
        for number in range(4):
            await written(mount, b"%d" % number, length=32 << 20)
            await mount.unlink(b"%d" % number)
        lacking = ((1 << 40) // 16) - (40 << 20)
        for server in servers:
            server.free = lacking
            await server.beat()
        await trio.sleep(1.5)
        kept = {row.name for row in entries(metaserver).values()}
        assert kept == {b"2", b"3"}, "40 MiB were lacking"


async def test_a_writer_waits_for_the_space_of_deleted_files(tmp_path: Path, autojump_clock: object) -> None:
    async with with_trash(tmp_path, free=3 * CHUNK_CAPACITY) as (metaserver, mount, servers):
        await written(mount, b"old", length=CHUNK_CAPACITY)
        await mount.unlink(b"old")
        for server in servers:
            server.free = 1 << 20
            await server.beat()
        answers: list[protocol.Allocated] = []

        async def allocate() -> None:
            answers.append(await mount.call(protocol.ALLOCATE, Allocate("client", (), needed=1 << 20)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(allocate)
            for beat in range(8):
                await trio.sleep(0.9)
                # The chunk goes once that is asked for.
                if any(order.kind is protocol.OrderKind.DELETE for server in servers for order in server.orders):
                    servers[0].free = servers[1].free = CHUNK_CAPACITY
                for server in servers:
                    await server.beat()
                if answers:
                    break
                assert beat < 7
        assert metaserver.parts.trash.files == 0


async def test_without_a_trash_a_full_cluster_says_so_at_once(tmp_path: Path, autojump_clock: object) -> None:
    async with with_trash(tmp_path, free=1 << 10) as (_, mount, _):
        began = trio.current_time()
        assert await mount.fails(protocol.ALLOCATE, Allocate("client", (), needed=1 << 20)) is ErrorCode.NO_SPACE
        assert trio.current_time() - began < 1


async def test_no_more_than_so_many_files_are_kept(tmp_path: Path, autojump_clock: object) -> None:
    async with with_trash(tmp_path, trash_files=3) as (metaserver, mount, _):
        for number in range(6):
            await mount.make(b"%d" % number)
            await mount.unlink(b"%d" % number)
        await trio.sleep(3)
        assert [row.name for row in entries(metaserver).values()] == [b"3", b"4", b"5"]


async def test_large_files_and_many_xattrs_are_purged_one_at_a_time(tmp_path: Path, autojump_clock: object) -> None:
    async with with_trash(tmp_path) as (metaserver, mount, _):
        for number in range(40):
            ino = await mount.make(b"%d" % number)
            if number % 10 == 5:
                for xattr in range(50):
                    await mount.call(protocol.SET_XATTR, protocol.SetXattr(ino, b"user.%d" % xattr, b"", 0))
            await mount.unlink(b"%d" % number)
        sizes = []
        while entries(metaserver):
            step = metaserver.parts.trash.carry_through(
                lambda tx, effects: trash.purge_step(tx, 1 << 63, 1 << 63, effects)
            )
            sizes.append(step.entries)
        assert sizes == [5, 10, 10, 10, 5]


async def test_a_full_disk_of_the_metaserver_keeps_nothing_more(
    tmp_path: Path, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with with_trash(tmp_path) as (metaserver, mount, _):
        await mount.make(b"file")
        monkeypatch.setattr(type(metaserver.committer), "is_full", property(lambda _: True))
        assert not (await mount.unlink(b"file")).kept
        assert entries(metaserver) == {}


async def test_special_files_are_not_kept(tmp_path: Path, autojump_clock: object) -> None:
    async with with_trash(tmp_path) as (_, mount, _):
        await mount.make(b"pipe", mode=stat.S_IFIFO | 0o644)
        assert not (await mount.unlink(b"pipe")).kept


async def test_what_is_not_in_the_trash_cannot_be_restored(tmp_path: Path, autojump_clock: object) -> None:
    async with with_trash(tmp_path) as (metaserver, mount, _):
        ino = await mount.make(b"file")
        for number in (ino, 1, 77):
            with pytest.raises(DfsError) as refused:
                restore(metaserver, number)
            assert refused.value.code is ErrorCode.NOT_FOUND

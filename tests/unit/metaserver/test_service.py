"""What a mount gets when it asks, over connections to a whole metaserver."""

import stat
import time
from pathlib import Path

import pytest
import trio
import trio.testing
from running_metaserver import FILE, inline, running

from metaserver import protocol
from metaserver.commit import open_committer
from metaserver.errors import ErrorCode
from metaserver.protocol import (
    ChunkProgress,
    Commit,
    Extent,
    FileCommit,
    FileMap,
    GetExtents,
    SetAttributes,
    SetXattr,
    XattrFlags,
)
from metaserver.wire import Empty, Method


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


async def test_a_day_in_the_life_of_a_file(data: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with running(data) as metaserver:
        await metaserver.server(1)
        await metaserver.server(2)
        mount = await metaserver.mount()
        assert mount.opened.root.ino == 1
        assert mount.opened.copies == 2
        made = await mount.ask(protocol.MAKE, protocol.Make(1, b"f", FILE, 5, 6, open=True))
        assert made.message.created
        assert made.message.entry.map == FileMap((), (), 0)
        ino = made.message.entry.attributes.ino
        chunk = await mount.allocate()
        assert {server.server for server in chunk.servers} == {1, 2}
        committed = await mount.write(ino, chunk.chunk, 1000)
        assert committed.attributes[0].size == 1000
        found = await mount.lookup(b"f")
        assert found.map is not None
        assert found.map.extents == (Extent(0, 1000, chunk.chunk, 0),)
        assert set(found.map.places[0].servers) == {1, 2}
        assert found.attributes == committed.attributes[0]
        assert await mount.call(protocol.SEAL, protocol.Seal(chunk.chunk, ())) == Empty()
        assert (await mount.call(protocol.GET_ATTRIBUTES, protocol.GetAttributes(ino))) == found
        gone = await mount.unlink(b"f")
        assert (gone.ino, gone.nlink, gone.orphan) == (ino, 0, True)
        await mount.call(protocol.CLOSE, protocol.Close((ino,)))
        assert await mount.fails(protocol.GET_ATTRIBUTES, protocol.GetAttributes(ino)) is ErrorCode.STALE_INODE
        await mount.sync()
        await mount.call(protocol.CLOSE_SESSION, Empty())


async def test_names_links_and_attributes_over_the_wire(data: Path) -> None:
    async with running(data) as metaserver:
        mount = await metaserver.mount()
        top = await mount.make(b"d", mode=stat.S_IFDIR | 0o755)
        link = await mount.make(b"l", mode=stat.S_IFLNK | 0o777, target=b"somewhere")
        assert (await mount.lookup(b"l")).target == b"somewhere"
        assert (await mount.call(protocol.GET_ATTRIBUTES, protocol.GetAttributes(link))).target == b"somewhere"
        file = await mount.make(b"f", top)
        linked = await mount.call(protocol.LINK, protocol.Link(file, 1, b"g"))
        assert linked.nlink == 2
        renamed = await mount.call(protocol.RENAME, protocol.Rename(1, b"g", top, b"h", 0))
        assert (renamed.ino, renamed.replaced) == (file, 0)
        changed = await mount.call(protocol.SET_ATTRIBUTES, SetAttributes(file, mode=0o600, uid=7, gid=8, atime_ns=-5))
        assert (changed.mode, changed.uid, changed.gid, changed.atime_ns) == (stat.S_IFREG | 0o600, 7, 8, -5)
        page = await mount.call(protocol.READ_DIRECTORY, protocol.ReadDirectory(top, 0, 10, True))
        assert [(entry.name, entry.ino) for entry in page.entries] == [(b"f", file), (b"h", file)]
        assert page.entries[0].attributes == changed
        await mount.call(protocol.SET_XATTR, SetXattr(file, b"user.x", b"v", XattrFlags.NONE))
        assert (await mount.call(protocol.GET_XATTR, protocol.GetXattr(file, b"user.x"))).value == b"v"
        assert (await mount.call(protocol.LIST_XATTRS, protocol.ListXattrs(file))).names == (b"user.x",)
        await mount.call(protocol.REMOVE_XATTR, protocol.RemoveXattr(file, b"user.x"))
        assert await mount.fails(protocol.RENAME, protocol.Rename(1, b"d", top, b"x", 0)) is ErrorCode.INVALID
        assert await mount.fails(protocol.UNLINK, protocol.Unlink(1, b"d", True)) is ErrorCode.NOT_EMPTY


async def test_a_change_happens_once_however_often_it_arrives(data: Path) -> None:
    async with running(data) as metaserver:
        await metaserver.server(1)
        mount = await metaserver.mount()
        first = await mount.ask(protocol.MAKE, protocol.Make(1, b"f", FILE, 0, 0), operation=9)
        again = await mount.ask(protocol.MAKE, protocol.Make(1, b"f", FILE, 0, 0), operation=9)
        assert again.message == first.message
        assert (again.time_ns, again.ids) == (first.time_ns, first.ids)
        chunk = await mount.ask(protocol.ALLOCATE, protocol.Allocate("", ()), operation=10)
        reserved = metaserver.parts.members.by_id[1].reserved
        assert (await mount.ask(protocol.ALLOCATE, protocol.Allocate("", ()), operation=10)).message == chunk.message
        assert metaserver.parts.members.by_id[1].reserved == reserved
        # Once acknowledged, its answer is forgotten, and the operation is refused.
        await mount.call(protocol.KEEP_ALIVE, protocol.KeepAlive(10, 0))
        again = await mount.fails(protocol.MAKE, protocol.Make(1, b"g", FILE, 0, 0), operation=9)
        assert again is ErrorCode.WITHDRAWN
        assert await mount.fails(protocol.MAKE, protocol.Make(1, b"g", FILE, 0, 0), operation=0) is ErrorCode.INVALID


async def test_many_answers_are_forgotten_in_steps(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaserver.sessions.STEP_ANSWERS", 7)
    async with running(data) as metaserver:
        mount = await metaserver.mount()
        for number in range(20):
            await mount.make(b"%d" % number)
        await mount.call(protocol.KEEP_ALIVE, protocol.KeepAlive(18, 0))
        session = metaserver.parts.sessions.by_id[mount.session]
        assert session.row.acknowledged == 18
        await mount.call(protocol.KEEP_ALIVE, protocol.KeepAlive(3, 0))
        assert session.row.acknowledged == 18


async def test_a_durable_commit_is_answered_once_it_is(data: Path) -> None:
    async with running(data) as metaserver:
        await metaserver.server(1)
        await metaserver.server(2)
        mount = await metaserver.mount()
        ino = await mount.make(b"f", open=True)
        chunk = (await mount.allocate()).chunk
        for durable in (False, True):
            file = protocol.FileCommit(ino, 0, 100, 5, (protocol.Extent(0, 100, chunk, 0),))
            commit = protocol.Commit((protocol.ChunkProgress(chunk, 100, 1, 77),), (file,), durable)
            answer = await mount.ask(protocol.COMMIT, commit)
            assert (answer.durable >= answer.number) is durable


async def test_replies_wait_for_what_other_sessions_did(data: Path) -> None:
    """5.2.3: what could still be lost is shown to nobody but its author."""
    release = trio.Event()
    release.set()

    async def slow(function, *arguments):
        await release.wait()
        return await inline(function, *arguments)

    async with open_committer(data_made(data), run_sync=slow) as committer, trio.open_nursery() as nursery:
        from running_metaserver import CLUSTER, Running

        from metaserver.config import Config
        from metaserver.parts import Parts

        parts = Parts(committer, Config(data=str(data)), CLUSTER)
        parts.load()
        nursery.start_soon(parts.aging.run)
        metaserver = Running(parts, nursery, data)
        author, reader = await metaserver.mount(), await metaserver.mount()
        release = trio.Event()
        made = await author.ask(protocol.MAKE, protocol.Make(1, b"f", FILE, 0, 0))
        assert made.durable < made.number
        await author.lookup(b"f")
        seen = []

        async def look() -> None:
            seen.append(await reader.ask(protocol.LOOKUP, protocol.Lookup(1, b"f")))

        async def look_for_nothing() -> None:
            seen.append(await reader.fails(protocol.LOOKUP, protocol.Lookup(1, b"gone")))

        await author.make(b"gone")
        await author.unlink(b"gone")
        nursery.start_soon(look)
        nursery.start_soon(look_for_nothing)
        await trio.testing.wait_all_tasks_blocked()
        assert seen == []
        release.set()
        await reader.sync()
        await trio.testing.wait_all_tasks_blocked()
        assert len(seen) == 2
        assert ErrorCode.NOT_FOUND in seen
        (answer,) = [each for each in seen if each is not ErrorCode.NOT_FOUND]
        assert answer.durable >= made.number
        nursery.cancel_scope.cancel()


def data_made(data: Path) -> Path:
    data.mkdir()
    return data


async def test_bad_requests_are_answered_and_harm_nobody(data: Path) -> None:
    async with running(data) as metaserver:
        mount = await metaserver.mount()
        unknown: Method = Method(99, "unknown", Empty, Empty)
        assert await mount.fails(unknown, Empty()) is ErrorCode.UNKNOWN_METHOD
        garbled: Method = Method(protocol.LOOKUP.number, "garbled", Empty, Empty)
        assert await mount.fails(garbled, Empty()) is ErrorCode.PROTOCOL
        assert await mount.fails(protocol.GET_ATTRIBUTES, protocol.GetAttributes(-1)) is ErrorCode.INVALID
        assert await mount.fails(protocol.GET_ATTRIBUTES, protocol.GetAttributes((1 << 64) - 1)) is (
            ErrorCode.STALE_INODE
        )
        for name in (b"", b"a/b", b"n" * 256, b"n" * 100_000):
            assert await mount.fails(protocol.LOOKUP, protocol.Lookup(1, name)) in (
                ErrorCode.INVALID,
                ErrorCode.NAME_TOO_LONG,
            )
        assert await mount.fails(protocol.MAKE, protocol.Make(1, b"x", FILE, -1, 0)) is ErrorCode.INVALID
        wrong = SetAttributes(1, uid=1 << 40)
        assert await mount.fails(protocol.SET_ATTRIBUTES, wrong) is ErrorCode.INVALID
        assert await mount.fails(protocol.SET_ATTRIBUTES, SetAttributes(1, mtime_ns=1 << 63)) is ErrorCode.INVALID
        assert await mount.fails(protocol.SET_ATTRIBUTES, SetAttributes(1, size=5)) is ErrorCode.IS_DIRECTORY
        assert await mount.fails(protocol.LOCATE, protocol.Locate(tuple(range(1001)))) is ErrorCode.INVALID
        assert await mount.fails(protocol.GET_EXTENTS, GetExtents(1, -1, 5)) is ErrorCode.INVALID
        assert await mount.fails(protocol.DECLARE, protocol.Declare((), ())) is ErrorCode.INVALID
        await mount.call(protocol.REPORT_REPLICA, protocol.ReportReplica(1, 1, 9999, "what"))
        await mount.call(protocol.FLUSHED, protocol.Flushed(123))
        assert await mount.fails(protocol.OPEN_SESSION, protocol.OpenSession(0, "", "", 1, b"/", False)) is (
            ErrorCode.INVALID
        )
        assert (await mount.lookup(b".")).attributes.ino == 1


async def test_without_a_session_there_is_only_reading(data: Path) -> None:
    async with running(data) as metaserver:
        stranger = await metaserver.connect()
        assert (await stranger.lookup(b".")).attributes.ino == 1
        assert await stranger.fails(protocol.MAKE, protocol.Make(1, b"f", FILE, 0, 0)) is ErrorCode.STALE_SESSION
        assert await stranger.fails(protocol.KEEP_ALIVE, protocol.KeepAlive(1, 0)) is ErrorCode.STALE_SESSION


async def test_a_read_only_session_changes_nothing(data: Path) -> None:
    async with running(data) as metaserver:
        other = await metaserver.mount()
        ino = await other.make(b"f")
        mount = await metaserver.mount(read_only=True)
        assert await mount.fails(protocol.MAKE, protocol.Make(1, b"g", FILE, 0, 0)) is ErrorCode.READ_ONLY
        assert await mount.fails(protocol.OPEN, protocol.Open(ino, True)) is ErrorCode.READ_ONLY
        await mount.call(protocol.OPEN, protocol.Open(ino, False))


async def test_a_subdirectory_is_the_root_of_a_session(data: Path) -> None:
    async with running(data) as metaserver:
        other = await metaserver.mount()
        sub = await other.make(b"sub", mode=stat.S_IFDIR | 0o755)
        assert (await metaserver.mount(subdirectory=b"/sub")).opened.root.ino == sub
        await other.make(b"file")
        stranger = await metaserver.connect()
        request = protocol.OpenSession(0, "", "", 1, b"/file", False)
        assert await stranger.fails(protocol.OPEN_SESSION, request) is ErrorCode.NOT_DIRECTORY
        request = protocol.OpenSession(0, "", "", 1, b"/none", False)
        assert await stranger.fails(protocol.OPEN_SESSION, request) is ErrorCode.NOT_FOUND


async def test_a_commit_of_very_many_extents_over_very_many(data: Path, autojump_clock: object) -> None:
    """More rows than a transaction may touch: done in pieces, and then as one."""
    async with running(data) as metaserver:
        await metaserver.server(1)
        mount = await metaserver.mount()
        ino = await mount.make(b"f")
        chunk = (await mount.allocate()).chunk
        count = 1500
        progress = ChunkProgress(chunk, 1 << 20, 1, 1)
        for start in range(0, count, 500):
            parts = tuple(Extent(2 * index, 1, chunk, 3 * index) for index in range(start, start + 500))
            await mount.call(protocol.COMMIT, Commit((progress,), (FileCommit(ino, 0, 0, 1, parts),)))
        whole = Extent(0, 2 * count, chunk, 5000)
        done = await mount.call(protocol.COMMIT, Commit((progress,), (FileCommit(ino, 0, 0, 1, (whole,)),)))
        assert done.attributes[0].allocated == 2 * count
        assert (await mount.call(protocol.GET_EXTENTS, GetExtents(ino, 0, 1 << 30))).extents == (whole,)


async def test_a_long_truncate_goes_on_in_steps_and_growth_waits_for_it(
    data: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    monkeypatch.setattr("metaserver.inodes.STEP_EXTENTS", 10)
    monkeypatch.setattr("metaserver.contents.STEP_EXTENTS", 10)
    async with running(data) as metaserver:
        await metaserver.server(1)
        mount = await metaserver.mount()
        ino = await mount.make(b"f")
        chunk = (await mount.allocate()).chunk
        parts = tuple(Extent(2 * index, 1, chunk, 3 * index) for index in range(100))
        progress = ChunkProgress(chunk, 1 << 20, 1, 1)
        await mount.call(protocol.COMMIT, Commit((progress,), (FileCommit(ino, 0, 0, 1, parts),)))
        cut = mount.connection.start(protocol.SET_ATTRIBUTES, SetAttributes(ino, size=3), operation=50)
        grown = mount.connection.start(protocol.SET_ATTRIBUTES, SetAttributes(ino, size=1000), operation=51)
        assert (await cut.wait()).message.size == 3
        assert (await grown.wait()).message.allocated == 2
        found = await mount.call(protocol.GET_EXTENTS, GetExtents(ino, 0, 1 << 30))
        assert [extent.file_offset for extent in found.extents] == [0, 2]


async def test_large_directories_and_removals_over_restarts(
    data: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    """A removal that is cut short by a stop goes on after it."""
    monkeypatch.setattr("metaserver.inodes.STEP_EXTENTS", 10)
    async with running(data, age=False) as metaserver:
        metaserver.parts.resuming.window.closed.set()
        await metaserver.server(1)
        mount = await metaserver.mount()
        ino = await mount.make(b"f")
        chunk = (await mount.allocate()).chunk
        parts = tuple(Extent(2 * index, 1, chunk, 3 * index) for index in range(100))
        progress = ChunkProgress(chunk, 1 << 20, 1, 1)
        await mount.call(protocol.COMMIT, Commit((progress,), (FileCommit(ino, 0, 0, 1, parts),)))
        await mount.unlink(b"f")
        assert len(metaserver.parts.tasks) == 1
    async with running(data, window_seconds=1.0) as metaserver:
        assert len(metaserver.parts.tasks) == 1
        await metaserver.parts.resuming.window.closed.wait()
        await metaserver.idle()
        assert len(metaserver.parts.tasks) == 0


async def test_statfs_and_servers(data: Path) -> None:
    async with running(data) as metaserver:
        mount = await metaserver.mount()
        assert (await mount.call(protocol.STAT_FS, protocol.StatFs(1))).total == 0
        await metaserver.server(1)
        server = await metaserver.server(2)
        stats = await mount.call(protocol.STAT_FS, protocol.StatFs(1))
        assert (stats.total, stats.free) == (1 << 40, server.free)
        servers = (await mount.call(protocol.LIST_SERVERS, Empty())).servers
        assert [(each.server, each.port, each.state) for each in servers] == [(1, 9001, 1), (2, 9002, 1)]


async def test_allocation_waits_for_servers_and_says_what_is_missing(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(data) as metaserver:
        mount = await metaserver.mount()
        start = trio.current_time()
        assert await mount.fails(protocol.ALLOCATE, protocol.Allocate("", ())) is ErrorCode.UNAVAILABLE
        assert trio.current_time() - start >= 10
        waiting = mount.connection.start(protocol.ALLOCATE, protocol.Allocate("", ()), operation=100)
        await metaserver.idle()
        await metaserver.server(1, free=100 << 20)
        assert [each.server for each in (await waiting.wait()).message.servers] == [1]
        # 64 MiB of 100 are reserved now.
        assert await mount.fails(protocol.ALLOCATE, protocol.Allocate("", ()), operation=101) is ErrorCode.NO_SPACE


# -- changes that come too late ------------------------------------------------------------------------------------


async def test_a_change_that_its_client_has_given_up_never_happens(data: Path) -> None:
    async with running(data) as metaserver:
        mount = await metaserver.mount()
        now_ms = metaserver.parts.changes.steady_ms
        late = protocol.Make(1, b"late", FILE, 0, 0)
        assert await mount.fails(protocol.MAKE, late, expires_ms=now_ms - 1, operation=7) is ErrorCode.TIMEOUT
        # Not even if it comes again, and says another time.
        assert await mount.fails(protocol.MAKE, late, operation=7) is ErrorCode.WITHDRAWN
        assert await mount.fails(protocol.LOOKUP, protocol.Lookup(1, b"late")) is ErrorCode.NOT_FOUND
        made = await mount.ask(protocol.MAKE, protocol.Make(1, b"soon", FILE, 0, 0), expires_ms=now_ms + 60_000)
        # What has happened has happened: its answer comes again, however late it is asked for.
        again = await mount.ask(
            protocol.MAKE, protocol.Make(1, b"soon", FILE, 0, 0), expires_ms=1, operation=mount.operation
        )
        assert again.message == made.message


async def test_setting_the_time_makes_no_change_expire(data: Path) -> None:
    async with running(data) as metaserver:
        mount = await metaserver.mount()
        changes, committer = metaserver.parts.changes, metaserver.committer
        expires = changes.steady_ms + 30_000
        committer._clock = lambda: time.time_ns() + 3600 * 10**9
        await mount.ask(protocol.MAKE, protocol.Make(1, b"f", FILE, 0, 0), expires_ms=expires)
        metaserver.parts.changes._steady_ns = lambda: expires * 10**6
        made = protocol.Make(1, b"g", FILE, 0, 0)
        assert await mount.fails(protocol.MAKE, made, expires_ms=expires) is ErrorCode.TIMEOUT

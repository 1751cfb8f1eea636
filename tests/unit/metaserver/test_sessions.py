"""Sessions: their return after a broken connection, a restart or a power cut; their end; what others see of them."""

import errno
from pathlib import Path

import pytest
import trio
import trio.testing
from running_metaserver import FILE, Mount, Running, running

from metaserver import protocol, sessions
from metaserver.commit import EngineFailed
from metaserver.errors import ConnectionLost, DfsError, ErrorCode
from metaserver.protocol import Opened, Resumed
from metaserver.schema import Session
from metaserver.sessions import Sessions, SessionState
from metaserver.wire import Empty, Replay


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


async def come_back(
    metaserver: Running,
    mount: Mount,
    *,
    opened: tuple[Opened, ...] = (),
    withdrawn: tuple[int, ...] = (),
    again: tuple[protocol.Lost, ...] = (),
) -> Resumed:
    """The session on a new connection."""
    fresh = await metaserver.connect()
    mount.connection = fresh.connection
    await mount.open_session(mount.session)
    await mount.call(protocol.DECLARE, protocol.Declare(opened, withdrawn))
    if again:
        await mount.call(protocol.RESEND, protocol.Resend(again))
    resumed: Resumed = await mount.call(protocol.RESUME_DONE, protocol.ResumeDone())
    return resumed


# -- memory ----------------------------------------------------------------------------------------------------------


def state(number: int) -> SessionState:
    return SessionState(number, Session("h", "/m", 1, 1, False, 0), 0.0, returned=True)


def test_who_has_what_open() -> None:
    table, one, two = Sessions(), state(1), state(2)
    table.add(one)
    table.add(two)
    table.open(one, 7, writing=False)
    table.open(two, 7, writing=True)
    table.open(two, 7, writing=False)
    assert set(table.opened_by(7)) == {1, 2}
    assert table.other_writers([7, 8], 1) == {2: [7]}
    assert table.other_writers([7], 2) == {}
    table.close(two, 7)
    assert table.writers == {}
    table.declare(one, [Opened(9, True)])
    assert table.declared_all(one) == [7]
    assert (table.openers, table.writers) == ({9: {1}}, {9: {1}})
    table.remove(one)
    assert (table.openers, table.writers, table.opened_by(9)) == ({}, {}, frozenset())
    with pytest.raises(DfsError) as caught:
        table.require(1)
    assert caught.value.code is ErrorCode.STALE_SESSION


def test_what_may_be_resent_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "RESEND_BYTES", 1000)
    one = state(1)
    one.add_lost([protocol.Lost(1, 14, b"x" * 500)])
    with pytest.raises(DfsError):
        one.add_lost([protocol.Lost(2, 14, b"x" * 500)])


# -- returning -------------------------------------------------------------------------------------------------------


async def test_a_broken_connection_loses_nothing(data: Path) -> None:
    async with running(data) as metaserver:
        mount = await metaserver.mount()
        ino = await mount.make(b"f", open=True)
        other = await mount.make(b"g", open=True)
        await mount.unlink(b"f")
        await mount.unlink(b"g")
        mount.connection.close()
        await metaserver.idle()
        session = metaserver.parts.sessions.by_id[mount.session]
        assert session.connection is None
        # The answer of operation 5 was lost on the way: the same change again is not carried out again.
        again = (mount.lost(protocol.MAKE, protocol.Make(1, b"h", FILE, 0, 0), 5, None),)
        resumed = await come_back(metaserver, mount, opened=(Opened(ino, True),), again=again)
        assert [(result.operation, result.code) for result in resumed.results] == [(5, 0)]
        answer = protocol.MAKE.decode_reply(resumed.results[0].response)
        assert answer.message.created
        # What is open lives on, what is not declared again is released.
        assert (await mount.call(protocol.GET_ATTRIBUTES, protocol.GetAttributes(ino))).attributes.nlink == 0
        assert await mount.fails(protocol.GET_ATTRIBUTES, protocol.GetAttributes(other)) is ErrorCode.STALE_INODE
        assert not session.resuming
        resumed = await come_back(metaserver, mount, again=again)
        repeated = protocol.MAKE.decode_reply(resumed.results[0].response)
        assert (repeated.message, repeated.ids) == (answer.message, answer.ids)


async def test_a_file_whose_making_was_not_answered_is_open_all_the_same(data: Path) -> None:
    async with running(data) as metaserver:
        mount, other = await metaserver.mount(), await metaserver.mount()
        # Operation 1 was carried out and its answer lost, operation 2 never arrived; 3 was closed since.
        await mount.make(b"f", open=True)
        closed = await mount.ask(protocol.MAKE, protocol.Make(1, b"closed", FILE, 0, 0, open=True), operation=3)
        again = (
            *(
                mount.lost(protocol.MAKE, protocol.Make(1, name, FILE, 0, 0, open=True), number, None)
                for number, name in enumerate((b"f", b"g"), 1)
            ),
            mount.lost(protocol.MAKE, protocol.Make(1, b"closed", FILE, 0, 0, open=True), 3, mount.replay(closed)),
        )
        resumed = await come_back(metaserver, mount, again=again)
        results = {result.operation: protocol.MAKE.decode_reply(result.response) for result in resumed.results}
        made = [results[number].message.entry.attributes.ino for number in (1, 2)]
        assert metaserver.parts.sessions.writers == {ino: {mount.session} for ino in made}
        for name in (b"f", b"g"):
            await other.unlink(name)
        for ino in made:
            assert (await mount.call(protocol.GET_ATTRIBUTES, protocol.GetAttributes(ino))).attributes.nlink == 0


async def test_what_has_no_name_is_removed_at_its_close_also_after_a_return(data: Path) -> None:
    async with running(data) as metaserver:
        mount = await metaserver.mount()
        ino = await mount.make(b"f", open=True)
        await mount.unlink(b"f")
        await come_back(metaserver, mount, opened=(Opened(ino, True),))
        await mount.call(protocol.CLOSE, protocol.Close((ino,)))
        assert await mount.fails(protocol.GET_ATTRIBUTES, protocol.GetAttributes(ino)) is ErrorCode.STALE_INODE


async def test_a_truncate_done_again_does_not_leave_an_older_one_behind(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metaserver.contents.STEP_EXTENTS", 1)
    async with running(data, age=False) as metaserver:
        metaserver.parts.resuming.window.closed.set()
        await metaserver.server(1)
        mount = await metaserver.mount()
        ino, chunk = await mount.make(b"f"), (await mount.allocate()).chunk
        for offset in range(0, 1200, 200):
            await mount.write(ino, chunk, 100, offset)
        await mount.call(protocol.SET_ATTRIBUTES, protocol.SetAttributes(ino, size=350))
        assert metaserver.parts.tasks.truncating([ino])
        shorter = mount.lost(protocol.SET_ATTRIBUTES, protocol.SetAttributes(ino, size=50), 90, None)
        await come_back(metaserver, mount, again=(shorter,))
        mount.operation = 90
        await mount.write(ino, chunk, 100, 400)
        for number in list(metaserver.parts.tasks._pending):
            while number in metaserver.parts.tasks._pending:
                metaserver.parts.tasks.step(number)
        found = await mount.call(protocol.GET_EXTENTS, protocol.GetExtents(ino, 0, 500))
        assert [(extent.file_offset, extent.length) for extent in found.extents] == [(0, 50), (400, 100)]


async def test_a_returning_session_has_to_finish_first(data: Path) -> None:
    async with running(data) as metaserver:
        mount = await metaserver.mount()
        old = mount.connection
        mount.connection = (await metaserver.connect()).connection
        await mount.open_session(mount.session)
        await metaserver.idle()
        assert old.lost is not None
        assert await mount.fails(protocol.LOOKUP, protocol.Lookup(1, b".")) is ErrorCode.INVALID
        await mount.call(protocol.KEEP_ALIVE, protocol.KeepAlive(0, 0))
        await mount.call(protocol.RESUME_DONE, protocol.ResumeDone())
        assert await mount.fails(protocol.RESEND, protocol.Resend(())) is ErrorCode.INVALID
        await mount.lookup(b".")


async def test_a_withdrawn_operation_never_happens(data: Path) -> None:
    async with running(data) as metaserver:
        mount = await metaserver.mount()
        await mount.make(b"done")
        late = (mount.lost(protocol.MAKE, protocol.Make(1, b"late", FILE, 0, 0), 7, None),)
        resumed = await come_back(metaserver, mount, withdrawn=(1, 7), again=late)
        assert [(result.operation, result.code) for result in resumed.results] == [(7, ErrorCode.WITHDRAWN)]
        assert await mount.fails(protocol.MAKE, protocol.Make(1, b"late", FILE, 0, 0), operation=7) is (
            ErrorCode.WITHDRAWN
        )
        # What had happened before it was withdrawn has happened.
        assert (await mount.ask(protocol.MAKE, protocol.Make(1, b"done", FILE, 0, 0), operation=1)).message.created
        await mount.lookup(b"done")


async def test_results_that_do_not_fit_into_one_frame_are_paged(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaserver.resume.RESULT_BYTES", 400)
    async with running(data) as metaserver:
        mount = await metaserver.mount()
        again = tuple(
            mount.lost(protocol.MAKE, protocol.Make(1, b"%d" % number, FILE, 0, 0), number, None)
            for number in range(1, 10)
        )
        page = await come_back(metaserver, mount, again=again)
        results = list(page.results)
        while page.more:
            assert len(page.results) < 9
            page = await mount.call(protocol.RESUME_DONE, protocol.ResumeDone())
            results.extend(page.results)
        assert [result.operation for result in results] == list(range(1, 10))


@pytest.mark.parametrize("broken", ["append", "sync"])
async def test_a_failing_log_answers_nobody(data: Path, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told to have failed is not sent again, and it may be in the log all the same."""
    errors: list[DfsError] = []

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "the disk has failed")

    with pytest.raises(BaseExceptionGroup) as caught:
        async with running(data, check=False) as metaserver:
            one, two = await metaserver.mount(), await metaserver.mount()
            monkeypatch.setattr(metaserver.committer.log, broken, fail)
            try:
                await one.make(b"f")
                await two.lookup(b"f")
            except DfsError as error:
                errors.append(error)
            await trio.sleep_forever()
    assert caught.group_contains(EngineFailed)
    assert [type(error) for error in errors] == [ConnectionLost]


# -- the window ------------------------------------------------------------------------------------------------------


async def test_new_requests_wait_for_the_window_and_keep_their_order(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(data) as metaserver:
        old = await metaserver.mount()
        await old.make(b"f")
        await metaserver.mount()
    async with running(data, window_seconds=2.0) as metaserver:
        assert metaserver.parts.resuming.window.open
        start = trio.current_time()
        fresh = await metaserver.mount()
        pending = [
            fresh.connection.start(protocol.MAKE, protocol.Make(1, b"%d" % number, FILE, 0, 0), operation=number)
            for number in range(1, 20)
        ]
        resumed = await come_back(metaserver, old)
        # One session of the old epoch stays away.
        assert trio.current_time() - start >= 2
        assert resumed.results == ()
        inos = [(await each.wait()).message.entry.attributes.ino for each in pending]
        assert inos == sorted(inos)
        assert metaserver.parts.sessions.missing
        assert not metaserver.parts.resuming.window.open


async def test_the_window_closes_when_all_have_returned(data: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with running(data) as metaserver:
        one, two = await metaserver.mount(), await metaserver.mount()
    async with running(data, window_seconds=1000.0) as metaserver:
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(come_back, metaserver, one)
            nursery.start_soon(come_back, metaserver, two)
        assert trio.current_time() - start < 10
        assert not metaserver.parts.sessions.missing


async def test_who_waits_for_others_to_return_is_not_silent(data: Path, autojump_clock: trio.testing.MockClock) -> None:
    """The window may last as long as the deadline of sessions, and a mount that returns has nothing to say in it."""
    async with running(data) as metaserver:
        waiting, stuck = await metaserver.mount(), await metaserver.mount()
    async with running(data, session_deadline_seconds=12.0) as metaserver:
        start = trio.current_time()
        stuck.connection = (await metaserver.connect()).connection
        await stuck.open_session(stuck.session)
        await come_back(metaserver, waiting)
        assert trio.current_time() - start > 15
        # Until it would say that it lives.
        await trio.sleep(5)
        assert set(metaserver.parts.sessions.by_id) == {waiting.session}
        await waiting.call(protocol.KEEP_ALIVE, protocol.KeepAlive(0, 0))


async def test_what_a_power_cut_took_is_done_again_in_its_old_order(
    data: Path, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Two sessions whose changes depend on each other: answered ones first, as they were numbered, then the others."""
    async with running(data, boot_id=b"a" * 16) as metaserver:
        server = await metaserver.server(1)
        one, two = await metaserver.mount(), await metaserver.mount()
        await one.make(b"kept")
        await one.sync()
        metaserver.image(tmp_path / "image")
        directory = protocol.Make(1, b"d", 0o040755, 0, 0)
        answer_one = await one.ask(protocol.MAKE, directory)
        top = answer_one.message.entry.attributes.ino
        file = protocol.Make(top, b"f", FILE, 0, 0, open=True)
        answer_two = await two.ask(protocol.MAKE, file)
        ino = answer_two.message.entry.attributes.ino
        allocate = protocol.Allocate("", ())
        answer_three = await two.ask(protocol.ALLOCATE, allocate)
        chunk = answer_three.message.chunk
        progress = protocol.ChunkProgress(chunk, 50, 1, 9)
        commit = protocol.Commit(
            (progress,), (protocol.FileCommit(ino, 0, 50, 5, (protocol.Extent(0, 50, chunk, 0),)),)
        )
        answer_four = await two.ask(protocol.COMMIT, commit)
        move = protocol.Rename(top, b"f", 1, b"moved", 0)
        answer_five = await one.ask(protocol.RENAME, move)
    async with running(tmp_path / "image", boot_id=b"b" * 16, window_seconds=20.0) as metaserver:
        assert metaserver.committer.boot_lost_tail
        again_one = (
            one.lost(protocol.MAKE, directory, 2, one.replay(answer_one)),
            one.lost(protocol.RENAME, move, 3, one.replay(answer_five)),
            one.lost(protocol.UNLINK, protocol.Unlink(1, b"moved", False), 4, None),
        )
        again_two = (
            two.lost(protocol.MAKE, file, 1, two.replay(answer_two)),
            two.lost(protocol.ALLOCATE, allocate, 2, two.replay(answer_three)),
            two.lost(protocol.COMMIT, commit, 3, two.replay(answer_four)),
        )
        server.control = metaserver.parts.control
        server.replicas[chunk] = protocol.ReplicaReport(chunk, 80, 2, 11, False)
        await server.start()
        results: dict[str, Resumed] = {}

        async def back(name: str, mount: Mount, again: tuple, opened: tuple = ()) -> None:
            results[name] = await come_back(metaserver, mount, again=again, opened=opened)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(back, "one", one, again_one)
            nursery.start_soon(back, "two", two, again_two, (Opened(ino, True),))
        survived = {last.epoch: last.number for last in one.opened.survived}
        assert survived[1] < answer_one.number
        assert [result.code for result in results["one"].results + results["two"].results] == [0] * 6
        remade = protocol.MAKE.decode_reply(results["two"].results[0].response)
        assert remade.message.entry.attributes.ino == ino
        assert remade.time_ns == answer_two.time_ns
        # The unanswered unlink came last: the file lives on as an orphan of the session that has it open.
        entry = await two.call(protocol.GET_ATTRIBUTES, protocol.GetAttributes(ino))
        assert (entry.attributes.nlink, entry.attributes.size) == (0, 50)
        assert entry.map.places[0].servers == (1,)
        assert await two.fails(protocol.LOOKUP, protocol.Lookup(1, b"moved")) is ErrorCode.NOT_FOUND
        assert not metaserver.committer.boot_lost_tail


async def test_a_resent_change_that_fails_says_why(data: Path) -> None:
    async with running(data) as metaserver:
        mount = await metaserver.mount()
        wrong = (
            mount.lost(protocol.UNLINK, protocol.Unlink(1, b"none", False), 1, None),
            protocol.Lost(2, 999, b""),
            protocol.Lost(3, protocol.MAKE.number, b"garbage"),
            mount.lost(protocol.UNLINK, protocol.Unlink(1, b"none", False), 9, Replay(1, 5, 5, ())),
            protocol.Lost(10, protocol.UNLINK.number, mount.lost(protocol.UNLINK, Empty(), 11, None).request),
        )
        resumed = await come_back(metaserver, mount, again=wrong)
        assert {result.operation: ErrorCode(result.code) for result in resumed.results} == {
            1: ErrorCode.NOT_FOUND,
            2: ErrorCode.UNKNOWN_METHOD,
            3: ErrorCode.PROTOCOL,
            9: ErrorCode.NOT_FOUND,
            10: ErrorCode.PROTOCOL,
        }


# -- the end ---------------------------------------------------------------------------------------------------------


async def test_a_silent_session_is_ended_and_what_it_held_is_released(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(data, session_deadline_seconds=20.0) as metaserver:
        await metaserver.server(1)
        silent, lively = await metaserver.mount(), await metaserver.mount()
        ino = await silent.make(b"f", open=True)
        full, empty = (await silent.allocate()).chunk, (await silent.allocate()).chunk
        await silent.write(ino, full, 100)
        orphan = await silent.make(b"orphan", open=True)
        await silent.unlink(b"orphan")
        silent.connection.close()
        for _ in range(30):
            await trio.sleep(1)
            await lively.call(protocol.KEEP_ALIVE, protocol.KeepAlive(0, 0))
        assert set(metaserver.parts.sessions.by_id) == {lively.session}
        states, _ = metaserver.committer.read(
            0, lambda tx: [protocol.ChunkState(chunk_state(tx, chunk)) for chunk in (full, empty)]
        )
        assert states == [protocol.ChunkState.SEALED, protocol.ChunkState.DEAD]
        assert metaserver.parts.members.by_id[1].reserved == 0
        assert await lively.fails(protocol.GET_ATTRIBUTES, protocol.GetAttributes(orphan)) is ErrorCode.STALE_INODE
        assert (await lively.lookup(b"f")).attributes.size == 100
        back = await metaserver.connect()
        request = protocol.OpenSession(silent.session, "", "", 1, b"/", False)
        assert await back.fails(protocol.OPEN_SESSION, request) is ErrorCode.STALE_SESSION


def chunk_state(tx, chunk: int) -> int:
    from metaserver import chunks

    row = chunks.find(tx, chunk)
    assert row is not None
    return row.state


async def test_time_in_which_the_metaserver_did_not_run_does_not_count(data: Path) -> None:
    async with running(data, age=False, session_deadline_seconds=20.0) as metaserver:
        metaserver.parts.resuming.window.closed.set()
        mount = await metaserver.mount()
        aging, resuming = metaserver.parts.aging, metaserver.parts.resuming
        now = 1000.0
        aging.tick(now)
        # Suspended for an hour.
        aging.tick(now + 3600)
        assert resuming.overdue() == []
        for second in range(1, 22):
            aging.tick(now + 3600 + second)
        assert [session.id for session in resuming.overdue()] == [mount.session]
        await mount.lookup(b".")
        assert resuming.overdue() == []


async def test_closing_a_session_leaves_nothing_of_it(data: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with running(data) as metaserver:
        await metaserver.server(1)
        mount = await metaserver.mount()
        await mount.make(b"f")
        await mount.allocate()
        await mount.call(protocol.CLOSE_SESSION, Empty())
        assert await mount.fails(protocol.MAKE, protocol.Make(1, b"g", FILE, 0, 0)) is ErrorCode.STALE_SESSION
        await metaserver.idle()
        assert metaserver.parts.sessions.by_id == {}
        assert len(metaserver.parts.tasks) == 0
        assert metaserver.parts.members.owned == {}
        # The same connection may begin another one.
        await mount.open_session()
    async with running(data) as metaserver:
        assert len(metaserver.parts.sessions.by_id) == 1


async def test_an_orphan_that_is_opened_once_more_stays(data: Path, autojump_clock: object) -> None:
    async with running(data) as metaserver:
        one, two = await metaserver.mount(), await metaserver.mount()
        ino = await one.make(b"f", open=True)
        await one.unlink(b"f")
        await two.call(protocol.OPEN, protocol.Open(ino, False))
        await one.call(protocol.CLOSE, protocol.Close((ino,)))
        assert (await two.call(protocol.GET_ATTRIBUTES, protocol.GetAttributes(ino))).attributes.nlink == 0
        await two.call(protocol.CLOSE, protocol.Close((ino,)))
        assert await two.fails(protocol.OPEN, protocol.Open(ino, False)) is ErrorCode.STALE_INODE
        assert metaserver.parts.sessions.orphans == set()


async def test_orphans_survive_a_restart_until_their_session_has_returned(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(data) as metaserver:
        mount = await metaserver.mount()
        kept, dropped = await mount.make(b"a", open=True), await mount.make(b"b", open=True)
        await mount.unlink(b"a")
        await mount.unlink(b"b")
    async with running(data, window_seconds=5.0) as metaserver:
        await metaserver.parts.resuming.window.closed.wait()
        stranger = await metaserver.connect()
        for ino in (kept, dropped):
            await stranger.call(protocol.GET_ATTRIBUTES, protocol.GetAttributes(ino))
        await come_back(metaserver, mount, opened=(Opened(kept, False),))
        await stranger.call(protocol.GET_ATTRIBUTES, protocol.GetAttributes(kept))
        assert await stranger.fails(protocol.GET_ATTRIBUTES, protocol.GetAttributes(dropped)) is ErrorCode.STALE_INODE


# -- others' unwritten data ------------------------------------------------------------------------------------------


async def test_looking_at_a_file_fetches_what_its_writer_has_not_committed(data: Path) -> None:
    async with running(data) as metaserver:
        await metaserver.server(1)
        writer, reader = await metaserver.mount(), await metaserver.mount()
        ino = await writer.make(b"f", open=True)
        chunk = (await writer.allocate()).chunk
        size = 0

        async def flush(_: protocol.Flush) -> None:
            nonlocal size
            size += 100
            await writer.write(ino, chunk, size)

        writer.on_flush = flush
        assert (await reader.lookup(b"f")).attributes.size == 100
        assert writer.flushes[0].inos == (ino,)
        assert (await reader.call(protocol.GET_ATTRIBUTES, protocol.GetAttributes(ino))).attributes.size == 200
        assert (await reader.call(protocol.OPEN, protocol.Open(ino, False))).attributes.size == 300
        page = await reader.call(protocol.READ_DIRECTORY, protocol.ReadDirectory(1, 0, 10, True))
        assert page.entries[0].attributes.size == 400
        made = await reader.call(protocol.MAKE, protocol.Make(1, b"f", FILE, 0, 0, exclusive=False))
        assert (made.created, made.entry.attributes.size) == (False, 500)
        cut = await reader.call(protocol.SET_ATTRIBUTES, protocol.SetAttributes(ino, size=10))
        assert cut.size == 10
        assert len(writer.flushes) == 6
        # The writer itself, listings without attributes, and names that are not asked about disturb nobody.
        await writer.lookup(b"f")
        await reader.call(protocol.READ_DIRECTORY, protocol.ReadDirectory(1, 0, 10, False))
        await reader.make(b"g")
        await writer.call(protocol.CLOSE, protocol.Close((ino,)))
        await reader.lookup(b"f")
        assert len(writer.flushes) == 6
        # Changes were told to whom they concerned.
        assert set(writer.changed) == {ino}
        assert set(reader.changed) == {ino}


async def test_a_writer_that_does_not_answer_delays_others_once(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(data) as metaserver:
        writer, reader = await metaserver.mount(), await metaserver.mount()
        ino = await writer.make(b"f", open=True)
        start = trio.current_time()
        await reader.lookup(b"f")
        assert 10 <= trio.current_time() - start < 11
        await reader.lookup(b"f")
        assert trio.current_time() - start < 11
        # It is asked again once it has answered, however late.
        writer.connection.push(protocol.FLUSHED, protocol.Flushed(writer.flushes[0].ticket))
        await metaserver.idle()
        await reader.lookup(b"f")
        assert trio.current_time() - start >= 20
        assert [flush.inos for flush in writer.flushes] == [(ino,), (ino,)]


async def test_a_writer_without_connection_is_waited_for_a_moment(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(data) as metaserver:
        writer, reader = await metaserver.mount(), await metaserver.mount()
        ino = await writer.make(b"f", open=True)
        writer.connection.close()
        await metaserver.idle()
        start = trio.current_time()
        looking = reader.connection.start(protocol.LOOKUP, protocol.Lookup(1, b"f"))
        await metaserver.idle()

        async def flush(_: protocol.Flush) -> None:
            return

        fresh = await metaserver.connect()
        writer.connection = fresh.connection
        fresh.on_flush = flush
        await writer.open_session(writer.session)
        await writer.call(protocol.DECLARE, protocol.Declare((Opened(ino, True),), ()))
        assert fresh.flushes == []
        await writer.call(protocol.RESUME_DONE, protocol.ResumeDone())
        await looking.wait()
        assert [flush.inos for flush in fresh.flushes] == [(ino,)]
        assert trio.current_time() - start < 1
        writer.connection.close()
        await metaserver.idle()
        await reader.lookup(b"f")
        assert 3 <= trio.current_time() - start < 4
        await reader.lookup(b"f")
        assert trio.current_time() - start < 4


async def test_waiting_for_others_is_bounded_in_number(
    data: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metaserver.flushing.MAX_WAITS", 3)
    async with running(data) as metaserver:
        writer, reader = await metaserver.mount(), await metaserver.mount()
        await writer.make(b"f", open=True)
        pending = [reader.connection.start(protocol.LOOKUP, protocol.Lookup(1, b"f")) for _ in range(5)]
        await metaserver.idle()
        assert sum(each.done for each in pending) == 2
        for each in pending:
            await each.wait()

"""The writer over fakes in virtual time: what is acknowledged is there, in the right order, whatever fails."""

from functools import partial

import pytest
import trio
import trio.testing
from datafakes import Bench, Trouble, open_bench

from dfsmount.dirty import LAYER_BYTES
from dfsmount.filestate import FileState
from dfsmount.writer import WriterOptions
from metaserver.errors import ConnectionLost, DfsError, ErrorCode
from metaserver.protocol import FILE_SIZE_MAX

MIB = 1 << 20


def pattern(length: int, seed: int = 1) -> bytes:
    return bytes((index * seed + (index >> 8)) & 0xFF for index in range(4096)) * (length // 4096 + 1)


def part(length: int, seed: int = 1) -> bytes:
    return pattern(length, seed)[:length]


async def test_flush_makes_bytes_part_of_the_file(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = bench.create()
        await bench.writer.write(file, 0, b"hello")
        assert file.size == 5
        assert await bench.read(file) == b"hello"
        await bench.writer.flush(file)
        assert not file.is_dirty
        assert bench.meta.content(file.ino) == b"hello"
        assert await bench.read(bench.reopen(file)) == b"hello"
        assert bench.writer.dirty_bytes == 0


async def test_fsync_of_little_is_one_append_and_one_commit(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = bench.create()
        await bench.writer.write(file, 0, part(4096))
        started = trio.current_time()
        await bench.writer.flush(file)
        # One exchange with a chunkserver (1 ms) and one with the metaserver (2 ms): no timer is waited for.
        assert trio.current_time() - started < 0.004
        assert bench.meta.calls["commit"] == 1
        assert sum(server.appends for server in bench.pool.servers.values()) == 2


async def test_commits_are_durable_only_while_somebody_waits_for_that(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file, other = bench.create(), bench.create()
        for durable in (False, True, False):
            await bench.writer.write(file, 0, part(4096))
            await bench.writer.flush(file, durable=durable)
        # Of one that was cancelled nothing remains.
        await bench.writer.write(file, 0, part(4096))
        with trio.move_on_after(0):
            await bench.writer.flush(file, durable=True)
        await bench.writer.flush(file)
        # What is committed together is durable together.
        for each in (file, other):
            await bench.writer.write(each, 0, part(4096))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bench.writer.flush, other)
            nursery.start_soon(partial(bench.writer.flush, file, durable=True))
        assert [commit.durable for commit in bench.meta.commits[:4]] == [False, True, False, False]
        assert any(commit.durable for commit in bench.meta.commits[4:])


async def test_age_alone_sends_an_open_file(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = bench.create()
        await bench.writer.write(file, 0, b"x")
        await trio.sleep(0.9)
        assert file.is_dirty
        assert bench.meta.calls["commit"] == 0
        await trio.sleep(0.2)
        assert not file.is_dirty


async def test_closed_small_files_share_appends_and_commits(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        files = [bench.create() for _ in range(1000)]
        for number, file in enumerate(files):
            await bench.writer.write(file, 0, part(900, number + 1))
            bench.writer.flush_soon(file)
        await trio.sleep(0.5)
        assert not any(file.is_dirty for file in files)
        assert bench.meta.calls["commit"] <= 6
        assert len([chunk for chunk in bench.meta.chunks.values() if chunk.length]) == 1
        for number, file in enumerate(files):
            assert bench.meta.content(file.ino) == part(900, number + 1)


async def test_concurrent_fsyncs_share_batches(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        files = [bench.create() for _ in range(64)]
        bench.pool.latency_seconds = 0.01

        async def work(file: FileState) -> None:
            for round_ in range(3):
                await bench.writer.write(file, 0, part(4096, round_))
                await bench.writer.flush(file)

        async with trio.open_nursery() as nursery:
            for file in files:
                nursery.start_soon(work, file)
        assert bench.meta.calls["commit"] <= 16


async def test_a_stream_gets_a_lane_of_its_own_and_several_chunks(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        stream, small = bench.create(), bench.create()
        block = part(MIB)
        for offset in range(100):
            await bench.writer.write(stream, offset * MIB, block)
            if offset == 50:
                await bench.writer.write(small, 0, b"small")
                await bench.writer.flush(small)
        await bench.writer.flush(stream)
        assert stream.size == bench.meta.files[stream.ino].size == 100 * MIB
        assert bench.meta.content(stream.ino) == block * 100
        stream_chunks = {extent.chunk for extent in bench.meta.maps[stream.ino]}
        assert len(stream_chunks) >= 2
        assert not stream_chunks & {extent.chunk for extent in bench.meta.maps[small.ino]}
        assert len(bench.meta.maps[stream.ino]) <= 2 * len(stream_chunks)
        # Full chunks are sealed, nobody being blamed.
        await trio.sleep(1)
        assert bench.meta.sealed
        assert all(failed == () for _, failed in bench.meta.sealed)
        assert stream.lane == 0


async def test_memory_is_bounded_and_writers_wait_for_it(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench(writing=WriterOptions(max_dirty_bytes=8 * MIB)) as bench:
        bench.pool.latency_seconds = 0.1
        file = bench.create()
        for offset in range(40):
            await bench.writer.write(file, offset * MIB, part(MIB, offset))
            assert bench.writer.dirty_bytes <= 8 * MIB + 64 * 1024
        await bench.writer.flush(file)
        assert bench.meta.content(file.ino) == b"".join(part(MIB, offset) for offset in range(40))


async def test_bytes_are_taken_at_once_if_there_is_room_for_them(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench(writing=WriterOptions(max_dirty_bytes=2 * MIB)) as bench:
        file = bench.create()
        # Nothing is reserved yet.
        assert not bench.writer.take(file, 0, b"x")
        assert not file.is_dirty
        await bench.writer.write(file, 0, b"x")
        assert bench.writer.take(file, 1, part(MIB))
        # Too much for memory, for one layer, for a file.
        assert not bench.writer.take(file, 1 + MIB, part(MIB))
        assert not bench.writer.take(file, 0, bytes(LAYER_BYTES + 1))
        assert not bench.writer.take(file, FILE_SIZE_MAX, b"x")
        await bench.writer.flush(file)
        assert bench.meta.content(file.ino) == b"x" + part(MIB)


async def test_one_write_larger_than_a_layer(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = bench.create()
        data = part(3 * LAYER_BYTES + 5)
        await bench.writer.write(file, 7, data)
        await bench.writer.flush(file)
        assert bench.meta.content(file.ino) == bytes(7) + data
        with pytest.raises(DfsError) as raised:
            await bench.writer.write(file, FILE_SIZE_MAX, b"x")
        assert raised.value.code is ErrorCode.FILE_TOO_BIG


async def test_commits_of_one_file_keep_their_order(autojump_clock: trio.testing.MockClock) -> None:
    """Layers of a file go to two lanes; the later answer comes first."""
    async with open_bench() as bench:
        file = bench.create()
        for offset in range(12):
            await bench.writer.write(file, offset * MIB, part(MIB, offset))
        assert file.lane != 0
        for _ in range(3):
            await bench.writer.write(file, 0, part(MIB, 99))
            await bench.writer.write(file, 0, part(LAYER_BYTES, 7))
        await bench.writer.flush(file)
        expected = part(LAYER_BYTES, 7) + b"".join(part(MIB, offset) for offset in range(4, 12))
        assert bench.meta.content(file.ino) == expected
        sizes = [f.extends_to for commit in bench.meta.commits for f in commit.files if f.ino == file.ino]
        assert sizes[:3] == [4 * MIB, 8 * MIB, 12 * MIB]


@pytest.mark.parametrize("trouble", list(Trouble))
@pytest.mark.parametrize("place", [0, 1])
async def test_a_failing_replica_is_not_noticed(
    trouble: Trouble, place: int, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_bench(servers=4) as bench:
        file = bench.create()
        await bench.writer.write(file, 0, part(100_000, 3))
        await bench.writer.flush(file)
        chunk, servers = next((n, c.servers) for n, c in bench.meta.chunks.items() if c.length)
        bench.pool.servers[servers[place]].troubles.append(trouble)
        expected = part(100_000, 3)
        for number in range(5):
            await bench.writer.write(file, 100_000 * (number + 1), part(100_000, number + 4))
            expected += part(100_000, number + 4)
        await bench.writer.flush(file)
        await trio.sleep(1)
        assert file.error is None
        assert bench.meta.content(file.ino) == expected
        assert await bench.read(bench.reopen(file)) == expected
        if trouble is Trouble.SLOW:
            assert not bench.meta.sealed
        else:
            blamed = () if trouble is Trouble.HANG else (servers[place],)
            assert bench.meta.sealed == [(chunk, blamed)]
            assert bench.meta.chunks[chunk].length == 100_000


async def test_failures_again_and_again_in_a_stream(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench(servers=5) as bench:
        file = bench.create()
        expected = b""
        for number in range(30):
            if number % 7 == 3:
                bench.pool.servers[number % 5 + 1].troubles.append(list(Trouble)[number % 3])
            await bench.writer.write(file, number * MIB, part(MIB, number))
            expected += part(MIB, number)
        await bench.writer.flush(file)
        assert file.error is None
        assert bench.meta.content(file.ino) == expected


async def test_a_server_that_stays_down_is_avoided(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = bench.create()
        await bench.writer.write(file, 0, b"a" * 5000)
        await bench.writer.flush(file)
        chunk = next(c for c in bench.meta.chunks.values() if c.length)
        bench.pool.servers[chunk.servers[0]].down = True
        started = trio.current_time()
        await bench.writer.write(file, 5000, b"b" * 5000)
        await bench.writer.flush(file)
        assert trio.current_time() - started < 0.1
        assert bench.meta.content(file.ino) == b"a" * 5000 + b"b" * 5000


async def test_no_space_comes_at_write(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        bench.meta.space = 2 * (64 << 20)
        file = bench.create()
        written = 0
        with pytest.raises(DfsError) as raised:
            while True:
                await bench.writer.write(file, written, part(MIB, 5))
                written += MIB
        assert raised.value.code is ErrorCode.NO_SPACE
        assert written > 50 * MIB
        await bench.writer.flush(file)
        assert file.error is None
        assert bench.meta.files[file.ino].size == written
        assert bench.meta.content(file.ino) == part(MIB, 5) * (written // MIB)


async def test_no_space_after_a_failure_is_told_once(autojump_clock: trio.testing.MockClock) -> None:
    """Something else fills the disks, faster than their servers tell: the one case of a late error."""
    async with open_bench() as bench:
        file = bench.create()
        await bench.writer.write(file, 0, b"kept")
        await bench.writer.flush(file)
        for server in bench.pool.servers.values():
            server.troubles.extend([Trouble.REFUSE] * 100)
        await bench.writer.write(file, 4, b"lost")
        started = trio.current_time()
        await bench.writer.flush(file)
        assert trio.current_time() - started < 5
        assert file.error is not None
        assert file.error.code is ErrorCode.NO_SPACE
        assert file.error_since(0) is file.error
        assert file.error_since(file.error_count) is None
        assert (file.size, file.is_dirty, bench.writer.dirty_bytes) == (4, False, 0)
        assert await bench.read(file) == b"kept"
        for server in bench.pool.servers.values():
            server.troubles.clear()
        bench.meta.space = 1 << 30
        await bench.writer.write(file, 4, b"again")
        await bench.writer.flush(file)
        assert bench.meta.content(file.ino) == b"keptagain"


async def test_no_servers_for_long_gives_the_data_up(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file, other = bench.create(), bench.create()
        await bench.writer.write(file, 0, part(3 * MIB))
        for server in bench.pool.servers.values():
            server.down = True
        started = trio.current_time()
        await bench.writer.flush(file)
        assert 29 < trio.current_time() - started < 45
        assert file.error is not None
        assert file.error.code is ErrorCode.IO
        assert file.size == 0
        with pytest.raises(DfsError):
            await bench.writer.write(other, 0, b"x")
        for server in bench.pool.servers.values():
            server.down = False
        await bench.writer.write(other, 0, b"back")
        await bench.writer.flush(other)
        assert bench.meta.content(other.ino) == b"back"


async def test_a_short_outage_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = bench.create()
        await bench.writer.write(file, 0, part(3 * MIB))
        for server in bench.pool.servers.values():
            server.down = True

        async def repair() -> None:
            await trio.sleep(15)
            for server in bench.pool.servers.values():
                server.down = False

        async with trio.open_nursery() as nursery:
            nursery.start_soon(repair)
            await bench.writer.flush(file)
        assert file.error is None
        assert bench.meta.content(file.ino) == part(3 * MIB)


async def test_a_deleted_file_is_dropped_silently(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file, gone = bench.create(), bench.create()
        await bench.writer.write(gone, 0, b"gone")
        await bench.writer.write(file, 0, b"here")
        del bench.meta.files[gone.ino]
        await bench.writer.flush_all()
        assert (gone.error, gone.is_dirty) == (None, False)
        assert bench.meta.content(file.ino) == b"here"


async def test_discard_sends_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = bench.create()
        await bench.writer.write(file, 0, b"temporary")
        bench.writer.flush_soon(file)
        bench.writer.discard(file)
        await trio.sleep(3)
        assert bench.meta.calls["commit"] == 0
        assert bench.writer.dirty_bytes == 0


async def test_a_lost_commit_answer_is_asked_for_again(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = bench.create()
        await bench.writer.write(file, 0, b"once")
        bench.meta.errors["commit"].extend([ConnectionLost("x"), DfsError(ErrorCode.TIMEOUT)])
        await bench.writer.flush(file)
        assert file.error is None
        assert bench.meta.content(file.ino) == b"once"


async def test_a_commit_asked_again_does_not_undo_times_set_meanwhile(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = bench.create()
        bench.meta.latency_seconds = 1.0
        bench.meta.errors["commit"].append(DfsError(ErrorCode.TIMEOUT))
        await bench.writer.write(file, 0, b"data")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bench.writer.flush, file)
            while not bench.meta.calls["commit"]:  # noqa: ASYNC110
                await trio.sleep(0.1)
            file.leave_times()
        assert [commit.files[0].mtime_ns for commit in bench.meta.commits] == [None]


async def test_a_refused_file_does_not_harm_the_others(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        files = [bench.create() for _ in range(3)]
        for file in files:
            await bench.writer.write(file, 0, b"content")
        bench.meta.errors["commit"].extend([DfsError(ErrorCode.INVALID), DfsError(ErrorCode.INVALID)])
        await bench.writer.flush_all()
        refused = [file for file in files if file.error is not None]
        assert len(refused) == 1
        assert [bench.meta.content(file.ino) for file in files] == [
            b"" if file in refused else b"content" for file in files
        ]


async def test_the_end_of_a_session_fails_what_is_dirty(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file, other = bench.create(), bench.create()
        bench.pool.latency_seconds = 0.5
        await bench.writer.write(file, 0, part(9 * MIB))
        await bench.writer.write(other, 0, b"little")
        await trio.sleep(0.1)

        async def lose() -> None:
            await trio.sleep(0.1)
            bench.meta.session += 1
            bench.writer.abandon_all(DfsError(ErrorCode.IO, "session lost"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lose)
            await bench.writer.flush(file)
        assert file.error is not None
        assert file.error_count == 1
        assert other.error is not None
        assert (file.size, bench.writer.dirty_bytes) == (0, 0)
        await bench.writer.write(file, 0, b"new life")
        await bench.writer.flush(file)
        assert bench.meta.content(file.ino) == b"new life"


async def test_stale_session_at_commit(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = bench.create()
        await bench.writer.write(file, 0, b"x")
        bench.meta.errors["commit"].append(DfsError(ErrorCode.STALE_SESSION))
        await bench.writer.flush(file)
        assert file.error is not None
        assert file.error.code is ErrorCode.IO
        await bench.writer.write(file, 0, b"y")
        await bench.writer.flush(file)
        assert bench.meta.content(file.ino) == b"y"


async def test_truncate_waits_for_what_is_in_flight(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        bench.pool.latency_seconds = 0.2
        file = bench.create()
        await bench.writer.write(file, 0, part(5 * MIB))
        await trio.sleep(0.1)
        assert file.dirty.in_flight
        await bench.truncate(file, 1000)
        assert not file.dirty.in_flight
        assert file.size == 1000
        await bench.writer.write(file, 2000, b"tail")
        assert await bench.read(file) == part(1000) + bytes(1000) + b"tail"
        await bench.writer.flush(file)
        assert bench.meta.content(file.ino) == part(1000) + bytes(1000) + b"tail"


async def test_truncate_that_fails_shows_the_old_size(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = bench.create()
        await bench.writer.write(file, 0, b"0123456789")
        await bench.writer.flush(file)
        await bench.writer.truncate_local(file, 3)
        assert await bench.read(file) == b"012"
        file.refresh(bench.meta.entry(file.ino))
        assert await bench.read(file) == b"0123456789"


async def test_truncate_comes_after_what_was_written_before_it(autojump_clock: trio.testing.MockClock) -> None:
    """Who crashes right after it leaves the truncated file with what had been written, not without."""
    async with open_bench() as bench:
        file = bench.create()
        await bench.writer.write(file, 0, b"0123456789")
        await bench.writer.truncate_local(file, 3)
        assert bench.meta.content(file.ino) == b"0123456789"
        file.refresh(bench.meta.entry(file.ino))


async def test_truncate_drops_what_lies_past_it(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = bench.create()
        await bench.writer.write(file, 10, b"0123456789")
        await bench.truncate(file, 10)
        await bench.writer.flush(file)
        assert bench.writer.dirty_bytes == 0
        assert bench.meta.content(file.ino) == bytes(10)
        assert sum(server.appends for server in bench.pool.servers.values()) == 0


async def test_truncate_fails_if_what_was_written_is_lost(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = bench.create()
        await bench.writer.write(file, 0, b"0123456789")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_fails_with_io, bench, file)
            await trio.testing.wait_all_tasks_blocked()
            bench.writer.abandon_all(DfsError(ErrorCode.IO))
        assert file.size == 0


async def _fails_with_io(bench: Bench, file: FileState) -> None:
    with pytest.raises(DfsError) as caught:
        await bench.writer.truncate_local(file, 3)
    assert caught.value.code is ErrorCode.IO


async def test_explicit_times_are_not_overwritten_by_late_commits(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = bench.create()
        await trio.sleep(10)
        await bench.writer.write(file, 0, b"x")
        assert file.mtime_ns == bench.meta.now_ns()
        file.leave_times()
        bench.meta._change(file.ino, mtime_ns=5)
        await bench.writer.flush(file)
        assert bench.meta.files[file.ino].mtime_ns == 5
        await bench.writer.write(file, 1, b"y")
        written_ns = bench.meta.now_ns()
        await bench.writer.flush(file)
        assert bench.meta.files[file.ino].mtime_ns == file.mtime_ns == written_ns


async def test_close_seals_what_is_open(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = bench.create()
        await bench.writer.write(file, 0, b"x")
        await bench.writer.close()
        assert not file.is_dirty
        assert all(chunk.sealed for chunk in bench.meta.chunks.values())


async def test_a_chunk_is_sealed_even_if_the_metaserver_was_away(autojump_clock: trio.testing.MockClock) -> None:
    """Nobody else would do it before the end of the session, and only a sealed chunk can be repaired."""
    async with open_bench() as bench:
        file = bench.create()
        await bench.writer.write(file, 0, b"x" * 1000)
        await bench.writer.flush(file)
        away = DfsError(ErrorCode.TIMEOUT, "the metaserver cannot be reached")
        bench.meta.errors["seal"].extend([away] * 20)
        await trio.sleep(300)
        assert [failed for _, failed in bench.meta.sealed] == [()]


async def test_closing_does_not_wait_for_a_metaserver_that_is_away(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = bench.create()
        await bench.writer.write(file, 0, b"x" * 1000)
        away = DfsError(ErrorCode.TIMEOUT, "the metaserver cannot be reached")
        bench.meta.errors["seal"].extend([away] * 1000)
        with trio.fail_after(60):
            await bench.writer.close()
        assert not bench.meta.sealed


async def test_an_idle_chunk_is_sealed(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = bench.create()
        await bench.writer.write(file, 0, b"x")
        await trio.sleep(1000)
        assert [failed for _, failed in bench.meta.sealed] == [()]
        await bench.writer.write(file, 1, b"y")
        await bench.writer.flush(file)
        assert bench.meta.content(file.ino) == b"xy"


async def test_a_cancelled_flush_loses_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        bench.pool.latency_seconds = 1.0
        file = bench.create()
        await bench.writer.write(file, 0, b"x")
        with trio.move_on_after(0.5):
            await bench.writer.flush(file)
        assert file.is_dirty
        await bench.writer.flush(file)
        assert bench.meta.content(file.ino) == b"x"


@pytest.mark.parametrize("place", [0, 1])
async def test_a_time_out_is_blamed_on_who_does_not_answer_a_ping(
    place: int, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_bench() as bench:
        file = bench.create()
        await bench.writer.write(file, 0, b"before")
        await bench.writer.flush(file)
        chunk, servers = next((n, c.servers) for n, c in bench.meta.chunks.items() if c.length)
        bench.pool.servers[servers[place]].silent = True
        await bench.writer.write(file, 6, b" after")
        started = trio.current_time()
        await bench.writer.flush(file)
        assert trio.current_time() - started < 7
        await trio.sleep(1)
        assert bench.meta.sealed == [(chunk, (servers[place],))]
        assert bench.meta.content(file.ino) == b"before after"


async def test_disks_slow_for_everybody_do_not_end_every_chunk(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        bench.pool.disk_seconds = 7.0
        file = bench.create()
        for number in range(10):
            await bench.writer.write(file, number * 10, b"0123456789")
            await bench.writer.flush(file)
        assert file.error is None
        assert len(bench.meta.sealed) == 1
        assert bench.meta.content(file.ino) == b"0123456789" * 10


async def test_a_lane_is_free_again_when_its_file_is_discarded(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        for _ in range(6):
            file = bench.create()
            for offset in range(20):
                await bench.writer.write(file, offset * MIB, part(MIB))
            assert file.lane != 0
            bench.writer.discard(file)
            while file.is_dirty:
                await file.settled.park()
            assert file.lane == 0
        assert [lane.owner for lane in bench.writer.lanes] == [None] * 4

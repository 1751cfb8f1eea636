"""The reader over fakes in virtual time: right bytes or an error, from whichever replica has them."""

import pytest
import trio
import trio.testing
from datafakes import Bench, open_bench

from dfsmount.filestate import FileState
from dfsmount.readahead import ReadAhead
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import Entry

MIB = 1 << 20


def part(length: int, seed: int = 1) -> bytes:
    block = bytes((index * seed + (index >> 8)) & 0xFF for index in range(65521))
    return (block * (length // len(block) + 1))[:length]


async def committed(bench: Bench, data: bytes) -> FileState:
    """A file with this content as a mount sees it that has nothing of it in memory."""
    file = bench.create()
    await bench.writer.write(file, 0, data)
    await bench.writer.flush(file)
    return bench.reopen(file)


def replicas(bench: Bench, file: FileState) -> list[int]:
    chunk = next(iter(bench.meta.maps[file.ino])).chunk
    return list(bench.meta.chunks[chunk].servers)


def reads(bench: Bench) -> list[tuple[int, int, int]]:
    return [read for server in bench.pool.servers.values() for read in server.reads]


async def test_holes_ends_and_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = bench.create()
        assert await bench.reader.read(file, None, 0, 100) == b""
        await bench.writer.write(file, 10, b"abc")
        await bench.writer.write(file, 20, b"def")
        await bench.writer.flush(file)
        file = bench.reopen(file)
        assert await bench.reader.read(file, None, 0, 100) == bytes(10) + b"abc" + bytes(7) + b"def"
        assert await bench.reader.read(file, None, 12, 9) == b"c" + bytes(7) + b"d"
        assert await bench.reader.read(file, None, 23, 5) == b""
        assert await bench.reader.read(file, None, 500, 5) == b""


async def test_dirty_over_in_flight_over_committed(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = await committed(bench, b"c" * 30)
        bench.pool.latency_seconds = 1.0
        await bench.writer.write(file, 5, b"f" * 20)
        bench.writer.schedule.want(file)
        bench.writer._wake(file)
        await trio.sleep(0.1)
        assert file.dirty.in_flight
        await bench.writer.write(file, 10, b"d" * 10)
        expected = b"c" * 5 + b"f" * 5 + b"d" * 10 + b"f" * 5 + b"c" * 5
        assert await bench.read(file) == expected
        await bench.writer.flush(file)
        assert await bench.read(file) == expected
        assert await bench.read(bench.reopen(file)) == expected


async def test_a_small_read_fetches_its_block_only(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = await committed(bench, part(3 * MIB))
        handle = ReadAhead()
        for offset in (1_500_000, 300_000, 2_900_000):
            assert await bench.reader.read(file, handle, offset, 4096) == part(3 * MIB)[offset : offset + 4096]
        assert [length for _, _, length in reads(bench)] == [4096] * 3
        assert bench.reader.cache.size <= 3 * (2 * 65536 + 512)
        assert await bench.reader.read(file, handle, 1_500_000, 100) == part(3 * MIB)[1_500_000:1_500_100]
        assert len(reads(bench)) == 3


async def test_reading_in_order_fetches_ahead(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench(cache_bytes=32 * MIB) as bench:
        data = part(12 * MIB)
        file = await committed(bench, data)
        handle = ReadAhead()
        waits = 0
        for offset in range(0, len(data), 131072):
            before = trio.current_time()
            assert await bench.reader.read(file, handle, offset, 131072) == data[offset : offset + 131072]
            waits += trio.current_time() > before
            await trio.sleep(0.0005)
        assert len(reads(bench)) < 30
        assert waits < 12
        # Nothing twice: whole blocks only add a little.
        assert sum(length for _, _, length in reads(bench)) <= len(data)


async def test_small_files_bring_their_neighbours(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench(cache_bytes=32 * MIB) as bench:
        files = [bench.create() for _ in range(150)]
        for number, file in enumerate(files):
            await bench.writer.write(file, 0, part(5000, number + 1))
        await bench.writer.flush_all()
        bench.reader.cache.clear()
        chunk_order = sorted(files, key=lambda file: next(iter(bench.meta.maps[file.ino])).chunk_offset)
        for file in chunk_order:
            again = FileState(bench.meta.entry(file.ino, with_map=True))
            expected = bench.meta.content(file.ino)
            assert await bench.reader.read(again, ReadAhead(), 0, 131072) == expected
        assert len(reads(bench)) < 15


async def test_concurrent_reads_share_one_fetch(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = await committed(bench, part(MIB))
        results: list[bytes] = []

        async def read() -> None:
            results.append(await bench.reader.read(file, None, 1000, 30000))

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked(0.0001)
            nursery.start_soon(read)
        assert set(results) == {part(MIB)[1000:31000]}
        assert len(reads(bench)) == 1


async def test_a_cancelled_reader_does_not_disturb_the_others(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = await committed(bench, part(MIB))
        bench.pool.latency_seconds = 0.02
        with trio.move_on_after(0.01):
            await bench.reader.read(file, None, 0, 1000)
        started = trio.current_time()
        assert await bench.reader.read(file, None, 0, 1000) == part(MIB)[:1000]
        assert trio.current_time() - started < 0.02
        assert len(reads(bench)) == 1


async def test_wrong_bytes_are_never_returned(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = await committed(bench, part(300_000))
        first, second = replicas(bench, file)
        bench.pool.servers[first].corrupt = True
        assert await bench.read(file) == part(300_000)
        await trio.sleep(1)
        assert [(r.server, r.code) for r in bench.meta.reports] == [(first, ErrorCode.BAD_CHECKSUM)]
        # It is remembered: nobody asks it first again for a while.
        asked = len(bench.pool.servers[first].reads)
        bench.reader.cache.clear()
        assert await bench.read(file) == part(300_000)
        assert len(bench.pool.servers[first].reads) == asked
        bench.pool.servers[second].corrupt = True
        bench.reader.cache.clear()
        started = trio.current_time()
        with pytest.raises(DfsError) as raised:
            await bench.read(file)
        assert raised.value.code is ErrorCode.IO
        assert trio.current_time() - started < 1
        bench.pool.servers[first].corrupt = bench.pool.servers[second].corrupt = False
        assert await bench.read(file) == part(300_000)


async def test_a_dead_replica_costs_little(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = await committed(bench, part(300_000))
        bench.pool.servers[replicas(bench, file)[0]].down = True
        started = trio.current_time()
        assert await bench.read(file) == part(300_000)
        assert trio.current_time() - started < 1


async def test_a_silent_replica_is_hedged(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = await committed(bench, part(2 * MIB))
        first = replicas(bench, file)[0]
        bench.pool.servers[first].read_seconds = 1e6
        started = trio.current_time()
        assert await bench.reader.read(file, None, 0, 1000) == part(MIB)[:1000]
        assert trio.current_time() - started < 1.1
        assert bench.reader.fetcher.hedges == 1
        bench.pool.servers[first].read_seconds = 0
        for offset in range(0, 2 * MIB - 65536, 65536):
            await bench.reader.read(file, None, offset, 10)
        bench.pool.servers[first].read_seconds = 1e6
        bench.reader.cache.clear()
        started = trio.current_time()
        assert await bench.reader.read(file, None, 0, 1000) == part(MIB)[:1000]
        assert trio.current_time() - started < 0.08


async def test_all_replicas_away_for_a_moment(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = await committed(bench, part(5000))
        for server in bench.pool.servers.values():
            server.down = True

        async def repair() -> None:
            await trio.sleep(10)
            for server in bench.pool.servers.values():
                server.down = False

        async with trio.open_nursery() as nursery:
            nursery.start_soon(repair)
            assert await bench.read(file) == part(5000)
            assert 9 < trio.current_time() < 15


async def test_all_replicas_away_for_good(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = await committed(bench, part(5000))
        for server in bench.pool.servers.values():
            server.down = True
        started = trio.current_time()
        with pytest.raises(DfsError) as raised:
            await bench.read(file)
        assert raised.value.code is ErrorCode.IO
        assert 15 < trio.current_time() - started < 30


async def test_a_chunk_that_has_moved(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = await committed(bench, part(5000))
        bench.meta.move_chunk(next(iter(file.extents)).chunk)
        assert await bench.read(file) == part(5000)


async def test_a_chunk_that_is_gone(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = await committed(bench, part(5000))
        chunk = next(iter(file.extents)).chunk
        for server in bench.pool.servers.values():
            server.replicas.pop(chunk, None)
        started = trio.current_time()
        with pytest.raises(DfsError) as raised:
            await bench.read(file)
        assert raised.value.code is ErrorCode.IO
        assert trio.current_time() - started < 30
        bench.meta.files.clear()


async def test_places_that_are_not_known_are_asked_for(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = await committed(bench, part(5000))
        file.places.clear()
        assert await bench.read(file) == part(5000)
        assert bench.meta.calls["locate"] == 1


async def test_a_map_in_pages(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        bench.meta.page = 7
        file = bench.create()
        expected = bytearray(100 * 8192)
        for number in range(0, 100, 2):
            await bench.writer.write(file, number * 8192, part(3000, number + 1))
            expected[number * 8192 : number * 8192 + 3000] = part(3000, number + 1)
        del expected[98 * 8192 + 3000 :]
        await bench.writer.flush(file)
        again = bench.reopen(file, with_map=False)
        assert await bench.reader.read(again, None, 50 * 8192, 3000) == part(3000, 51)
        assert bench.meta.calls["get_extents"] == 1
        assert await bench.read(again) == bytes(expected)
        assert len(again.extents) == 50


async def test_a_change_elsewhere_is_seen_after_a_refresh(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        here = await committed(bench, part(5000))
        assert await bench.read(here) == part(5000)
        there = FileState(bench.meta.entry(here.ino, with_map=True))
        await bench.writer.write(there, 1000, b"there")
        await bench.writer.flush(there)
        here.refresh(bench.meta.entry(here.ino))
        assert await bench.read(here) == part(5000)[:1000] + b"there" + part(5000)[1005:]


async def test_our_commit_after_a_change_elsewhere(autojump_clock: trio.testing.MockClock) -> None:
    """Our commit's answer is not the next version: someone else's extents are not in our map."""
    async with open_bench() as bench:
        here = await committed(bench, part(5000))
        there = FileState(bench.meta.entry(here.ino, with_map=True))
        await bench.writer.write(there, 1000, b"there")
        await bench.writer.flush(there)
        await bench.writer.write(here, 2000, b"here")
        await bench.writer.flush(here)
        expected = bytearray(part(5000))
        expected[1000:1005] = b"there"
        expected[2000:2004] = b"here"
        assert await bench.read(here) == bytes(expected)


async def test_an_answer_that_was_overtaken_is_ignored(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = bench.create()
        old = bench.meta.entry(file.ino, with_map=True)
        await bench.writer.write(file, 0, b"new")
        await bench.writer.flush(file)
        file.refresh(old)
        assert file.size == 3
        assert await bench.read(file) == b"new"


async def test_a_remote_truncate(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = await committed(bench, part(5000))
        file.refresh(Entry(bench.meta.truncate(file.ino, 100)))
        assert await bench.read(file) == part(5000)[:100]
        file.refresh(Entry(bench.meta.truncate(file.ino, 300)))
        assert await bench.read(file) == part(5000)[:100] + bytes(200)

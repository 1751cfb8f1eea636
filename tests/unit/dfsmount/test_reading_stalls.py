"""How long readers are held up by servers that die, freeze, slow down or give wrong bytes: exact, in virtual time."""

from collections.abc import Sequence

import pytest
import trio
import trio.testing
from datafakes import MIB, Bench, FakePool, open_bench

from dfsmount.filestate import FileState
from dfsmount.pace import HEDGE_LEAST_SECONDS, MEMORY_SECONDS, Pace
from dfsmount.readahead import ReadAhead

BLOCK = bytes(range(256)) * 4096


async def files_of(bench: Bench, count: int, length: int) -> list[FileState]:
    """Each in a chunk of its own, so that nothing is learned of a chunk but of the server."""
    files = []
    for _ in range(count):
        file = bench.create()
        await bench.writer.write(file, 0, BLOCK[:length])
        await bench.writer.close()
        files.append(bench.reopen(file))
    return files


async def seconds_to_read(bench: Bench, files: Sequence[FileState], content: bytes) -> float:
    bench.reader.cache.clear()
    started = trio.current_time()
    for file in files:
        assert await bench.reader.read(file, ReadAhead(), 0, len(content)) == content
    return trio.current_time() - started


def hang(pool: FakePool, server: int) -> None:
    pool.servers[server].silent = True


def kill(pool: FakePool, server: int) -> None:
    pool.servers[server].down = True


def slow_down(pool: FakePool, server: int) -> None:
    pool.servers[server].request_seconds = 0.5


def corrupt(pool: FakePool, server: int) -> None:
    pool.servers[server].corrupt = True


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    ("fault", "most"), [(hang, 1.0), (kill, 0.3), (slow_down, 1.6), (corrupt, 0.3)], ids=lambda value: str(value)[:14]
)
async def test_many_small_files(autojump_clock: trio.testing.MockClock, fault: object, most: float, warm: bool) -> None:
    async with open_bench(servers=2) as bench:
        files = await files_of(bench, 100, 5000)
        usual = await seconds_to_read(bench, files if warm else files[:1], BLOCK[:5000])
        assert usual < 0.3
        assert callable(fault)
        fault(bench.pool, 1)
        # All of them together, not each of them; what is usual is about a tenth of a second.
        assert await seconds_to_read(bench, files, BLOCK[:5000]) < most
        assert await seconds_to_read(bench, files, BLOCK[:5000]) < 0.3
        if fault is not corrupt:
            bench.pool.servers[1].silent = bench.pool.servers[1].down = False
            bench.pool.servers[1].request_seconds = 0.0


async def test_a_big_file_while_a_server_freezes(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench(servers=3, cache_bytes=16 << 20) as bench:
        file = bench.create()
        for number in range(64):
            await bench.writer.write(file, number * MIB, BLOCK)
        await bench.writer.close()
        file, ahead = bench.reopen(file), ReadAhead()
        longest = 0.0
        for number in range(64):
            if number == 20:
                bench.pool.servers[bench.meta.chunks[next(iter(file.places))].servers[0]].silent = True
            started = trio.current_time()
            assert await bench.reader.read(file, ahead, number * MIB, MIB) == BLOCK
            longest = max(longest, trio.current_time() - started)
        assert longest <= 1.0


async def test_a_frozen_server_is_used_again_when_it_answers(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench(servers=2) as bench:
        files = await files_of(bench, 20, 5000)
        bench.pool.servers[1].silent = True
        await seconds_to_read(bench, files, BLOCK[:5000])
        await trio.sleep(30)
        bench.pool.servers[1].reads.clear()
        await seconds_to_read(bench, files, BLOCK[:5000])
        # It is remembered for as long as it is silent (and somebody reads).
        assert bench.pool.servers[1].reads == []
        bench.pool.servers[1].silent = False
        await trio.sleep(MEMORY_SECONDS)
        await seconds_to_read(bench, files, BLOCK[:5000])
        assert len(bench.pool.servers[1].reads) > 5


def test_the_pace_is_that_of_the_quickest() -> None:
    pace = Pace()
    for number in range(40):
        pace.note(1, 0.001, number / 10)
        pace.note(2, 0.5, number / 10)
    # What a slow server does must not make us wait longer for it.
    assert pace.hedge_seconds == HEDGE_LEAST_SECONDS
    assert pace.is_slow(2, 4)
    assert not pace.is_slow(1, 4)
    # It is tried again in the end, and then found as it is.
    assert not pace.is_slow(2, 4 + MEMORY_SECONDS)
    for _ in range(3):
        pace.note(1, 0.001, 50)
        pace.note(2, 0.002, 50)
    assert not pace.is_slow(2, 50)


def test_servers_that_are_all_slow_are_equals() -> None:
    pace = Pace()
    for number in range(40):
        pace.note(1, 0.3, number / 10)
        pace.note(2, 0.5, number / 10)
    assert not pace.is_slow(1, 4)
    assert not pace.is_slow(2, 4)
    assert pace.hedge_seconds == 0.3

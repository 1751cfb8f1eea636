"""How long a writer stalls when a chunkserver stops to answer or becomes slow: exact, in virtual time.

The promise: no error, at most 5 seconds, then normal speed.
"""

import pytest
import trio
import trio.testing
from datafakes import MIB, Bench, open_bench

from dfsmount.filestate import FileState
from dfsmount.writer import WriterOptions

LONGEST_STALL_SECONDS = 5.0
BLOCK = b"x" * MIB
NORMAL_SECONDS = 0.05


class Stream:
    """Writes and syncs again and again, and remembers how long each step took."""

    def __init__(self, bench: Bench, step: int = 4 << 10) -> None:
        self.bench = bench
        self.file = bench.create()
        self.step = BLOCK[:step]
        self.steps: list[float] = []

    async def once(self) -> float:
        started = trio.current_time()
        await self.bench.writer.write(self.file, self.file.size, self.step)
        await self.bench.writer.flush(self.file)
        assert self.file.error is None
        self.steps.append(trio.current_time() - started)
        return self.steps[-1]

    async def until_normal(self, most: int = 1000) -> None:
        """Until ten steps in a row are as quick as usual."""
        for _ in range(most):
            await self.once()
            if all(seconds < NORMAL_SECONDS for seconds in self.steps[-10:]):
                return
        raise AssertionError(f"it never got normal: {self.steps[-20:]}")

    @property
    def stalled(self) -> float:
        """Seconds lost in slow steps, all together."""
        return sum(seconds for seconds in self.steps if seconds >= NORMAL_SECONDS)


def chunk_servers(bench: Bench) -> tuple[int, ...]:
    """Of the chunk being written."""
    return next(lane.chunk.servers for lane in bench.writer.lanes if lane.chunk is not None)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("servers", [2, 3, 6])
async def test_a_server_freezes(autojump_clock: trio.testing.MockClock, servers: int, place: int) -> None:
    async with open_bench(servers=servers) as bench:
        stream = Stream(bench)
        for _ in range(20):
            await stream.once()
        frozen = chunk_servers(bench)[place]
        bench.pool.servers[frozen].silent = True
        await stream.until_normal()
        assert 1 < stream.stalled < 3
        assert frozen not in chunk_servers(bench)
        assert len(chunk_servers(bench)) == min(2, servers - 1)
        assert [failed for _, failed in bench.meta.sealed] == [(frozen,)]
        # The server's connection is given up with all that waits for it.
        assert bench.pool.disconnected == [frozen]


@pytest.mark.parametrize("place", [0, 1])
async def test_a_server_freezes_while_streams_fill_all_windows(
    autojump_clock: trio.testing.MockClock, place: int
) -> None:
    async with open_bench(servers=4, writing=WriterOptions(max_dirty_bytes=32 * MIB)) as bench:
        files = [bench.create() for _ in range(5)]
        longest = 0.0

        async def write(file: FileState) -> None:
            nonlocal longest
            for _ in range(20):
                started = trio.current_time()
                await bench.writer.write(file, file.size, BLOCK)
                longest = max(longest, trio.current_time() - started)
                await trio.sleep(0.05)
            started = trio.current_time()
            await bench.writer.flush(file)
            longest = max(longest, trio.current_time() - started)

        async with trio.open_nursery() as nursery:
            for file in files:
                nursery.start_soon(write, file)
            await trio.sleep(0.5)
            frozen = chunk_servers(bench)[place]
            bench.pool.servers[frozen].silent = True
        assert longest < LONGEST_STALL_SECONDS
        for file in files:
            assert file.error is None
            assert bench.meta.content(file.ino) == BLOCK * 20


async def test_one_after_the_other_freezes(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench(servers=5) as bench:
        stream = Stream(bench)
        await stream.once()
        for _ in range(3):
            before = stream.stalled
            bench.pool.servers[chunk_servers(bench)[0]].silent = True
            await stream.until_normal()
            assert stream.stalled - before < LONGEST_STALL_SECONDS


async def test_both_servers_of_a_chunk_freeze_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """Only servers that have nothing to do with it can tell that it is not our own network."""
    async with open_bench(servers=4) as bench:
        stream = Stream(bench)
        await stream.once()
        for server in chunk_servers(bench):
            bench.pool.servers[server].silent = True
        await stream.until_normal()
        assert stream.stalled < LONGEST_STALL_SECONDS


async def test_all_servers_freeze_for_a_while(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench(servers=3, writing=WriterOptions(give_up_seconds=300)) as bench:
        stream = Stream(bench)
        await stream.once()
        for server in bench.pool.servers.values():
            server.silent = True

        async def thaw() -> None:
            await trio.sleep(50)
            for server in bench.pool.servers.values():
                server.silent = False

        async with trio.open_nursery() as nursery:
            nursery.start_soon(thaw)
            await stream.until_normal()
        assert stream.stalled < 100
        assert bench.meta.content(stream.file.ino) == stream.step * len(stream.steps)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("what", ["request", "disk"])
async def test_a_server_becomes_slow(autojump_clock: trio.testing.MockClock, place: int, what: str) -> None:
    async with open_bench(servers=3) as bench:
        stream = Stream(bench)
        for _ in range(20):
            await stream.once()
        slow = chunk_servers(bench)[place]
        setattr(bench.pool.servers[slow], f"{what}_seconds", 0.5)
        await stream.until_normal()
        assert stream.stalled < LONGEST_STALL_SECONDS
        assert slow not in chunk_servers(bench)
        assert len(chunk_servers(bench)) == 2
        # Left in order: nobody is blamed, nothing is sent twice.
        assert all(failed == () for _, failed in bench.meta.sealed)


async def test_a_slow_server_is_better_than_a_copy_less(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench(servers=2) as bench:
        stream = Stream(bench)
        await stream.once()
        bench.pool.servers[2].request_seconds = 0.5
        for _ in range(60):
            await stream.once()
        assert sorted(chunk_servers(bench)) == [1, 2]
        # It is left once to see whether there is something better, not again and again.
        assert len(bench.meta.sealed) <= 2


async def test_the_only_server_of_a_chunk_becomes_slow(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench(servers=3, copies=1) as bench:
        stream = Stream(bench)
        for _ in range(20):
            await stream.once()
        [slow] = chunk_servers(bench)
        bench.pool.servers[slow].request_seconds = 0.5
        await stream.until_normal()
        assert stream.stalled < LONGEST_STALL_SECONDS
        assert chunk_servers(bench) != (slow,)


async def test_a_disk_hangs(autojump_clock: trio.testing.MockClock) -> None:
    """Its server answers pings, and says how long its disk has been at it."""
    async with open_bench(servers=3) as bench:
        stream = Stream(bench)
        await stream.once()
        bench.pool.servers[chunk_servers(bench)[1]].disk_seconds = 1000.0
        await stream.until_normal()
        assert stream.stalled < LONGEST_STALL_SECONDS


async def test_what_was_written_with_fewer_copies_is_soon_sealed_for_repair(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_bench(servers=2) as bench:
        stream = Stream(bench)
        await stream.once()
        bench.pool.servers[2].silent = True
        await stream.until_normal()
        assert chunk_servers(bench) == (1,)
        thin = next(number for number, chunk in bench.meta.chunks.items() if chunk.servers == (1,))
        bench.pool.servers[2].silent = False
        for _ in range(30):
            await trio.sleep(1)
            await stream.once()
        assert bench.meta.chunks[thin].sealed
        assert sorted(chunk_servers(bench)) == [1, 2]
        # Also if nobody writes any more.
        bench.pool.servers[2].silent = True
        await stream.until_normal()
        thin = next(number for number, chunk in bench.meta.chunks.items() if chunk.servers == (1,) and not chunk.sealed)
        await trio.sleep(60)
        assert bench.meta.chunks[thin].sealed


async def test_one_server_for_ever_does_not_make_a_chunk_every_ten_seconds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_bench(servers=1, copies=1) as bench:
        bench.meta.copies = 2
        stream = Stream(bench, 1000)
        for _ in range(300):
            await stream.once()
            await trio.sleep(1)
        assert len(bench.meta.chunks) < 8
        bench.meta.copies = 1


# -- files of another number of copies -----------------------------------------------------------------------------


async def test_files_of_more_copies_have_chunks_of_their_own(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench(servers=4) as bench:
        usual, special, others = bench.create(), bench.create(), bench.create()
        for file, copies in ((special, 3), (others, 1)):
            bench.meta._change(file.ino, copies=copies)
            file.attributes = bench.meta._attributes(file.ino)
        for round_ in range(3):
            for file in (usual, special, others):
                await bench.writer.write(file, file.size, BLOCK[:5000])
            await bench.writer.flush_all()
            assert round_ >= 0

        def copies_of(file: FileState) -> set[int]:
            return {len(bench.meta.chunks[extent.chunk].servers) for extent in bench.meta.maps[file.ino]}

        assert [copies_of(file) for file in (usual, special, others)] == [{2}, {3}, {1}]
        assert len([chunk for chunk in bench.meta.chunks.values() if chunk.length]) == 3
        await bench.writer.close()
        assert all(chunk.sealed for chunk in bench.meta.chunks.values())

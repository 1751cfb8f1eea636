"""The writer where space runs out: filled to the end, told in time, and never a file with a hole in it."""

from itertools import count

import pytest
import trio
import trio.testing
from datafakes import Bench, Trouble, open_bench

from dfsmount.filestate import FileState
from dfsmount.schedule import Delays
from dfsmount.writer import Writer, WriterOptions
from metaserver.errors import DfsError, ErrorCode

KIB, MIB = 1 << 10, 1 << 20


def refuse_all(bench: Bench) -> None:
    for server in bench.pool.servers.values():
        server.troubles.extend([Trouble.REFUSE] * 200)


def accept_all(bench: Bench) -> None:
    for server in bench.pool.servers.values():
        server.troubles.clear()


async def fill(bench: Bench, file: FileState, piece: int) -> int:
    """Writes until it fails; bytes that were taken."""
    written = 0
    with pytest.raises(DfsError) as raised:
        while True:
            await bench.writer.write(file, written, bytes([written // piece % 251]) * piece)
            written += piece
    assert raised.value.code is ErrorCode.NO_SPACE
    return written


@pytest.mark.parametrize("piece", [4 * KIB, 128 * KIB, MIB])
async def test_a_cluster_is_filled_to_its_end(piece: int, autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        bench.meta.space = 100 * MIB
        file = bench.create()
        written = await fill(bench, file, piece)
        await bench.writer.flush(file)
        assert file.error is None
        assert len(bench.meta.content(file.ino)) == written
        # What is lost are ends of chunks that had no room for another layer.
        assert written > 60 * MIB


async def test_ten_mounts_share_what_is_left(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench, trio.open_nursery() as nursery:
        bench.meta.space = 200 * MIB
        writers = [Writer(bench.meta, bench.pool) for _ in range(10)]
        for number, writer in enumerate(writers):
            writer.counters = count(1 + 1_000_000 * number)
            nursery.start_soon(writer.run)
        files = [bench.create() for _ in writers]
        for writer, file in zip(writers, files, strict=True):
            await writer.write(file, 0, b"x" * 100 * KIB)
            await writer.flush(file)
            assert file.error is None
        # Nobody writes any more: what is reserved comes back.
        await trio.sleep(5)
        assert bench.meta.space == 200 * MIB - 10 * 100 * KIB
        nursery.cancel_scope.cancel()


async def test_chunks_are_kept_for_later_while_there_is_plenty(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        file = bench.create()
        await bench.writer.write(file, 0, b"x")
        await bench.writer.flush(file)
        before = bench.meta.space
        await trio.sleep(30)
        assert bench.meta.space == before
        # The metaserver says that space has become short.
        bench.meta.space_short = True
        await trio.sleep(5)
        assert bench.meta.space == (1 << 40) - 1


async def test_a_full_cluster_is_asked_again_for_a_while(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench, trio.open_nursery() as nursery:
        bench.meta.space = 0
        file = bench.create()

        async def make_space() -> None:
            await trio.sleep(1)
            bench.meta.space = 1 << 30

        nursery.start_soon(make_space)
        await bench.writer.write(file, 0, b"patience")
        await bench.writer.flush(file)
        assert bench.meta.content(file.ino) == b"patience"


async def test_a_second_refusal_comes_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        bench.meta.space = 0
        file = bench.create()
        for least, most in ((1.0, 3.0), (0.0, 0.1), (0.0, 0.1)):
            started = trio.current_time()
            with pytest.raises(DfsError) as raised:
                await bench.writer.write(file, 0, b"x")
            assert raised.value.code is ErrorCode.NO_SPACE
            assert least <= trio.current_time() - started < most
        bench.meta.space = 1 << 30
        await bench.writer.write(file, 0, b"x")


async def test_disks_that_are_fuller_than_they_said_are_no_space_within_seconds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_bench() as bench:
        file = bench.create()
        await bench.writer.write(file, 0, b"kept")
        await bench.writer.flush(file)
        refuse_all(bench)
        await bench.writer.write(file, 4, b"lost")
        started = trio.current_time()
        await bench.writer.flush(file)
        assert trio.current_time() - started < 5
        assert file.error is not None
        assert file.error.code is ErrorCode.NO_SPACE
        accept_all(bench)
        await bench.writer.write(file, 4, b" again")
        await bench.writer.flush(file)
        assert bench.meta.content(file.ino) == b"kept again"


async def test_what_comes_after_lost_bytes_is_not_kept_either(autojump_clock: trio.testing.MockClock) -> None:
    """A file ends where it could not be written: no hole, whatever was written behind it."""
    async with open_bench(writing=WriterOptions(delays=Delays(age_seconds=0.1))) as bench:
        file = bench.create()
        await bench.writer.write(file, 0, b"a" * MIB)
        await bench.writer.flush(file)
        refuse_all(bench)
        number = 1
        while file.error is None:
            # As a handle does: the next write after a loss tells of it.
            await bench.writer.write(file, number * MIB, bytes([number]) * MIB)
            await trio.sleep(0.1)
            number += 1
        accept_all(bench)
        await bench.writer.flush(file)
        assert file.error.code is ErrorCode.NO_SPACE
        assert number > 10
        content = bench.meta.content(file.ino)
        expected = b"a" * MIB + b"".join(bytes([n]) * MIB for n in range(1, number))
        assert content == expected[: len(content)]


async def test_a_batch_goes_where_a_part_of_it_fits(autojump_clock: trio.testing.MockClock) -> None:
    """Some files of many can still be kept: those that fit are, the others say so."""
    async with open_bench() as bench:
        files = [bench.create() for _ in range(64)]
        for file in files:
            await bench.writer.write(file, 0, b"x" * 100 * KIB)
        # The chunk that was reserved for them fails, and others have taken the space.
        for server in bench.pool.servers.values():
            server.troubles.append(Trouble.REFUSE)
        for chunk in bench.meta.chunks.values():
            chunk.limit = 0
        bench.meta.space = 2 * MIB
        await bench.writer.flush_all()
        kept = [file for file in files if file.error is None]
        assert 5 < len(kept) < 64
        assert all(bench.meta.content(file.ino) == b"x" * 100 * KIB for file in kept)
        lost = [file for file in files if file.error is not None]
        assert all(file.error is not None and file.error.code is ErrorCode.NO_SPACE for file in lost)

"""What the order of a lane must survive: chunks that end, and space that runs out, while another one is asked for."""

import trio
import trio.testing
from datafakes import Bench, Trouble, open_bench

from dfsmount.filestate import FileState
from metaserver.errors import DfsError, ErrorCode

MIB = 1 << 20


async def write_layers(bench: Bench, file: FileState, *contents: bytes) -> None:
    """Each overwrites the one before."""
    for content in contents:
        file.dirty.close()
        await bench.writer.write(file, 0, content)


async def send_and_wait_for_a_chunk(bench: Bench, first: FileState, file: FileState) -> None:
    """``first`` is on its way to a chunk that will fail, and a batch of two layers of ``file`` needs another one."""
    bench.pool.latency_seconds = 0.5
    await bench.writer.write(first, 0, b"first")
    bench.pool.servers[bench.writer.supply.spares[0].servers[0]].troubles.append(Trouble.DROP)
    bench.writer.flush_soon(first)
    with trio.fail_after(1):
        while bench.writer.lanes[0].waits_since is None:  # noqa: ASYNC110
            await trio.sleep(0.01)
    chunk = bench.writer.lanes[0].chunk
    assert chunk is not None
    await write_layers(bench, file, b"old", b"new")
    chunk.limit = chunk.length
    # As often as a full cluster is asked within two seconds.
    bench.meta.errors["allocate"].extend([DfsError(ErrorCode.NO_SPACE)] * 6)
    bench.writer.schedule.want_all()
    bench.writer.lanes[0].wake.set()
    await trio.sleep(0.1)
    assert len(bench.meta.errors["allocate"]) < 6


async def test_a_batch_is_divided_behind_what_came_back_before_it(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        first, file = bench.create(), bench.create()
        await send_and_wait_for_a_chunk(bench, first, file)
        with trio.fail_after(60):
            await bench.writer.flush_all()
        for each, expected in ((first, b"first"), (file, b"new")):
            assert each.error is None
            assert bench.meta.content(each.ino) == expected


async def test_nothing_of_a_session_that_is_over_is_sent(autojump_clock: trio.testing.MockClock) -> None:
    async with open_bench() as bench:
        first, file = bench.create(), bench.create()
        await send_and_wait_for_a_chunk(bench, first, file)
        bench.writer.abandon_all(DfsError(ErrorCode.IO, "the session ended"))
        await trio.sleep(20)
        assert bench.meta.commits == []
        await bench.writer.write(first, 0, b"again")
        await bench.writer.flush(first)
        assert bench.meta.content(first.ino) == b"again"
        assert bench.meta.content(file.ino) == b""


async def test_a_commit_that_is_refused_in_part_leaves_no_hole(autojump_clock: trio.testing.MockClock) -> None:
    """Both layers of a file in one commit, refused; then each alone: the first refused, and there is space again."""
    async with open_bench() as bench:
        file, other = bench.create(), bench.create()
        await bench.writer.write(file, 0, b"1" * MIB)
        file.dirty.close()
        await bench.writer.write(file, MIB, b"2" * MIB)
        await bench.writer.write(other, 0, b"other")
        refusal = DfsError(ErrorCode.NO_SPACE)
        bench.meta.errors["commit"].extend([refusal, refusal])
        await bench.writer.flush_all()
        assert file.error is not None
        assert bench.meta.content(file.ino) == b""
        assert file.size == 0
        assert bench.meta.content(other.ino) == b"other"

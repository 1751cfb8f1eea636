"""What one replica goes through: sealing, deleting, full and failing disks, slow disks, restarts."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel
from chunkserver_harness import CLUSTER, FaultyDisk, Started, StartNode, Writer

from chunkserver import chunkfile, reads
from chunkserver.chunkfile import ENTRY_BYTES, INDEX_OFFSET, PAYLOAD_OFFSET
from chunkserver.client import Pool
from chunkserver.disk import Disk, File, LocalDisk, LocalFile
from chunkserver.index import Opened
from chunkserver.protocol import Progress, Sync
from chunkserver.replica import TRANSITIONS, Replica, ReplicaState
from metaserver.errors import DfsError, ErrorCode

CHUNK = 0x77


def faulty(started: Started) -> FaultyDisk:
    disk = started.node.disk
    assert isinstance(disk, FaultyDisk)
    return disk


def chunk_file(started: Started) -> Path:
    return started.path / chunkfile.chunk_path(CHUNK)


async def refused(code: ErrorCode, call: object) -> None:
    with pytest.raises(DfsError) as error:
        await call  # type: ignore[misc]
    assert error.value.code is code


async def test_seal_cuts_to_the_committed_point(start_node: StartNode, pool: Pool) -> None:
    async with start_node(wrap=FaultyDisk) as a:
        writer = Writer(CHUNK)
        await writer.send(pool, a.peer, os.urandom(150_000), sync=True)
        length, entries, chain = writer.offset, writer.index, writer.chain
        await writer.send(pool, a.peer, os.urandom(90_000))
        await pool.read(a.peer, CHUNK, 0, 10)  # so that an index is in memory
        a.node.outbox.forget_chunks()
        replica = await a.store.seal(CHUNK, length, entries, chain)
        assert replica.written == Progress(length, length, entries, chain)
        assert chunk_file(a).stat().st_size == PAYLOAD_OFFSET + length
        steps = [step for step in faulty(a).steps if step.startswith("seal:")]
        assert steps == [
            "seal:before-cut",
            "seal:before-sync",
            "seal:before-header",
            "seal:before-header-sync",
            "seal:after-sync",
        ]
        assert a.node.outbox.parcel().changes == [replica.report()]
        assert (await pool.read(a.peer, CHUNK, length, 10)).entries == []
        await refused(ErrorCode.CHUNK_SEALED, writer.send(pool, a.peer, b"x"))
        assert (await a.store.seal(CHUNK, length, entries, chain)) is replica
        await refused(ErrorCode.CHAIN_MISMATCH, a.store.seal(CHUNK, length, entries, chain + 1))
    async with start_node() as a:
        assert a.store.table.get(CHUNK).report() == replica.report()


async def test_a_read_of_what_a_seal_cuts_off_is_no_damage(start_node: StartNode, pool: Pool) -> None:
    reached, go = threading.Event(), threading.Event()

    def step(name: str) -> None:
        if name == "seal:before-sync":
            reached.set()
            assert go.wait(10)

    def stopping(disk: LocalDisk) -> Disk:
        disk.step = step
        return disk

    async with start_node(wrap=stopping) as a:
        writer = Writer(CHUNK)
        await writer.send(pool, a.peer, os.urandom(150_000), sync=True)
        length, entries, chain = writer.offset, writer.index, writer.chain
        await writer.send(pool, a.peer, os.urandom(90_000))
        await pool.read(a.peer, CHUNK, 0, 10)  # so that an index is in memory
        before = a.store.table.open_chunks.get(CHUNK)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.store.seal, CHUNK, length, entries, chain)
            assert await trio.to_thread.run_sync(reached.wait, 10)
            # One read that begins now, and one that found the index before the cut.
            assert (await pool.read(a.peer, CHUNK, length, 10)).entries == []
            reads, load = a.store.reads, a.store.reads.load

            async def load_before(replica: Replica) -> Opened:
                reads.load = load
                return before

            reads.load = load_before
            assert len((await reads.read(CHUNK, 0, writer.offset))[1]) == length
            go.set()
        replica = a.store.table.get(CHUNK)
        assert (replica.state, replica.error) == (ReplicaState.SEALED, "")
        assert a.store.table.open_chunks.get(CHUNK) is not before


async def test_frozen_replica_is_cut_although_its_index_was_given_up(
    start_node: StartNode, pool: Pool, damaged: set[str]
) -> None:
    damaged.add("a")
    async with start_node() as a:
        await Writer(CHUNK).send(pool, a.peer, os.urandom(8000), block=1000)
        with chunk_file(a).open("r+b") as file:
            file.seek(PAYLOAD_OFFSET + 5500)
            file.write(b"never reached the disk")

    def forgetful(disk: LocalDisk) -> Disk:
        disk.open_direct = lambda path: (
            nodes[0].store.table.open_chunks.drop(CHUNK) or LocalDisk.open_direct(disk, path)
        )
        return disk

    nodes: list[Started] = []
    async with start_node(wrap=forgetful) as a:
        nodes.append(a)
        await a.node.verified_first()
        assert a.store.table.get(CHUNK).written.entries == 5


async def test_seal_fails_where_the_replica_is_shorter_or_different(start_node: StartNode, pool: Pool) -> None:
    async with start_node() as a:
        writer = Writer(CHUNK)
        await writer.send(pool, a.peer, b"12345678", block=4)
        await refused(ErrorCode.WRONG_OFFSET, a.store.seal(CHUNK, 12, 3, writer.chain))
        await refused(ErrorCode.CHAIN_MISMATCH, a.store.seal(CHUNK, 8, 2, writer.chain ^ 1))
        await refused(ErrorCode.CHAIN_MISMATCH, a.store.seal(CHUNK, 6, 2, writer.chain))
        await refused(ErrorCode.NO_SUCH_CHUNK, a.store.seal(CHUNK + 1, 0, 0, 0))
        # It was meant to end: nothing more is taken, and the right seal still works.
        await refused(ErrorCode.CHUNK_SEALED, writer.send(pool, a.peer, b"x"))
        assert (await a.store.seal(CHUNK, 0, 0, 0)).written.entries == 0


async def test_deleted_chunk_does_not_come_back(start_node: StartNode, pool: Pool) -> None:
    async with start_node() as a:
        writer = Writer(CHUNK)
        first = writer.append(b"data")
        await pool.append(a.peer, first, [b"data"])
        await a.store.delete(CHUNK)
        assert not chunk_file(a).exists()
        assert a.node.outbox.parcel().gone == [CHUNK]
        await refused(ErrorCode.NO_SUCH_CHUNK, pool.append(a.peer, first, [b"data"]))
        await refused(ErrorCode.NO_SUCH_CHUNK, pool.read(a.peer, CHUNK, 0, 4))
        await refused(ErrorCode.NO_SUCH_CHUNK, pool.stat(a.peer, CHUNK))
        await a.store.delete(CHUNK)  # again: nothing happens


@pytest.mark.parametrize(("call", "when"), [("truncate", 0), ("write", 0), ("write", 1)])
async def test_full_disk_puts_a_seal_off(start_node: StartNode, pool: Pool, call: str, when: int) -> None:
    """With all disks full, all replicas of a chunk would be given up otherwise."""
    async with start_node(wrap=FaultyDisk) as a:
        writer = Writer(CHUNK)
        await writer.send(pool, a.peer, os.urandom(100_000), sync=True)
        point = writer.offset, writer.index, writer.chain
        await writer.send(pool, a.peer, os.urandom(1000))
        faulty(a).faults[call] = [*[None] * when, errno.ENOSPC]
        await refused(ErrorCode.DISK_FULL, a.store.seal(CHUNK, *point))
        assert a.store.table.get(CHUNK).state is ReplicaState.OPEN
        assert not a.store.table.get(CHUNK).error
        await refused(ErrorCode.CHUNK_SEALED, writer.send(pool, a.peer, b"x"))
        assert (await pool.read(a.peer, CHUNK, 0, 10)).entries
        await a.store.seal(CHUNK, *point)
        assert a.store.table.get(CHUNK).state is ReplicaState.SEALED


async def test_full_disk_refuses_one_append_and_keeps_the_replica(start_node: StartNode, pool: Pool) -> None:
    async with start_node(wrap=FaultyDisk) as a:
        writer = Writer(CHUNK)
        await writer.send(pool, a.peer, b"before")
        request = writer.append(b"after")
        faulty(a).faults["write"] = [None, errno.ENOSPC]  # between the blocks and their entry
        await refused(ErrorCode.DISK_FULL, pool.append(a.peer, request, [b"after"]))
        assert chunk_file(a).stat().st_size == PAYLOAD_OFFSET + 6
        assert (await pool.stat(a.peer, CHUNK)).progress.stored_length == 6
        assert bytes((await pool.read(a.peer, CHUNK, 0, 100)).payload) == b"before"
        await pool.append(a.peer, request, [b"after"])
        assert bytes((await pool.read(a.peer, CHUNK, 6, 100)).payload) == b"after"


async def test_a_sync_that_finds_no_space_gives_the_replica_up_and_says_so(start_node: StartNode, pool: Pool) -> None:
    """Delayed allocation: what the disk holds is not known any more, but to the writer this is a full disk."""
    async with start_node(wrap=FaultyDisk) as a:
        writer = Writer(CHUNK)
        await writer.send(pool, a.peer, b"before", sync=True)
        faulty(a).faults["sync"] = [errno.ENOSPC]
        await refused(ErrorCode.DISK_FULL, writer.send(pool, a.peer, b"after", sync=True))
        await refused(ErrorCode.DISK_FULL, writer.send(pool, a.peer, b"again"))
        assert a.store.table.get(CHUNK).state is ReplicaState.FAILED
        assert not chunk_file(a).exists()
        assert not a.store.table.disk_error
        # The server is as good as before.
        await Writer(CHUNK + 1).send(pool, a.peer, b"another", sync=True)


async def test_what_is_given_up_on_a_full_disk_keeps_what_it_holds(start_node: StartNode, pool: Pool) -> None:
    """The directory has no space for another name. All replicas may meet that at once: nothing acknowledged may go."""
    async with start_node(wrap=FaultyDisk) as a:
        writer = Writer(CHUNK)
        await writer.send(pool, a.peer, b"before", sync=True)
        faulty(a).faults["sync"] = [errno.ENOSPC]
        faulty(a).faults["rename"] = [errno.ENOSPC, errno.ENOSPC]
        await refused(ErrorCode.DISK_FULL, writer.send(pool, a.peer, b"after", sync=True))
        assert a.store.table.get(CHUNK).state is ReplicaState.FAILED
        assert not a.store.table.disk_error
        assert bytes((await pool.read(a.peer, CHUNK, 0, 6)).payload) == b"before"
        a.store.table.measure_space()
        assert chunk_file(a).exists()
        a.store.table.measure_space()
        assert not chunk_file(a).exists()
        assert bytes((await pool.read(a.peer, CHUNK, 0, 6)).payload) == b"before"
        await a.store.delete(CHUNK)
        assert not list(chunk_file(a).parent.iterdir())
    # Another one, and a restart before there is space: it is read back.
    async with start_node(wrap=FaultyDisk) as a:
        writer = Writer(CHUNK + 1)
        await writer.send(pool, a.peer, b"before", sync=True)
        faulty(a).faults["sync"], faulty(a).faults["rename"] = [errno.ENOSPC], [errno.ENOSPC]
        await refused(ErrorCode.DISK_FULL, writer.send(pool, a.peer, b"after", sync=True))
    async with start_node() as a:
        replica = a.store.table.get(CHUNK + 1)
        assert replica.state is ReplicaState.FROZEN
        await a.store.reads.ensure_verified(replica)
        assert bytes((await pool.read(a.peer, CHUNK + 1, 0, 6)).payload) == b"before"


async def test_a_name_that_was_to_be_changed_may_have_been_given_to_a_better_replica(
    start_node: StartNode, pool: Pool
) -> None:
    async with start_node(wrap=FaultyDisk) as a:
        writer = Writer(CHUNK)
        await writer.send(pool, a.peer, b"before", sync=True)
        faulty(a).faults["sync"], faulty(a).faults["rename"] = [errno.ENOSPC], [errno.ENOSPC]
        await refused(ErrorCode.DISK_FULL, writer.send(pool, a.peer, b"after", sync=True))
        await a.store.delete(CHUNK)
        chunk_file(a).write_bytes(b"somebody else's")
        a.store.table.measure_space()
        assert chunk_file(a).read_bytes() == b"somebody else's"
        chunk_file(a).unlink()


async def test_entries_that_are_not_on_the_disk_do_not_count_after_a_restart(
    start_node: StartNode, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a sync that failed, the index may be right in memory and not on the disk."""
    async with start_node() as a:
        writer = Writer(CHUNK)
        for data in (b"one", b"two", b"three"):
            await writer.send(pool, a.peer, data)
    read_from_disk = LocalFile.read_from_disk

    def third_entry_is_missing(file: LocalFile, length: int, offset: int) -> memoryview:
        data = bytearray(read_from_disk(file, length, offset))
        if offset == INDEX_OFFSET:
            data[2 * ENTRY_BYTES + 5 : 3 * ENTRY_BYTES] = bytes(ENTRY_BYTES - 5)
        return memoryview(data)

    monkeypatch.setattr(LocalFile, "read_from_disk", third_entry_is_missing)
    async with start_node() as a:
        replica = a.store.table.get(CHUNK)
        await a.store.reads.ensure_verified(replica)
        assert (replica.written.entries, replica.written.stored_length) == (2, 6)


async def test_no_more_files_are_full_and_read_only_is_failed(start_node: StartNode, pool: Pool) -> None:
    async with start_node(wrap=FaultyDisk) as a:
        table = a.store.table
        space = faulty(a)._disk.space()
        faulty(a).space = lambda: space._replace(files=3)  # type: ignore[method-assign]
        table.measure_space()
        assert (table.disk_state, table.free) == ("FULL", 0)
        faulty(a).space = lambda: space  # type: ignore[method-assign]
        table.measure_space()
        assert table.disk_state == "OK"
        faulty(a).space = lambda: space._replace(read_only=True)  # type: ignore[method-assign]
        table.measure_space()
        assert table.disk_state == "FAILED"
        await refused(ErrorCode.DISK_FAILED, Writer(CHUNK).send(pool, a.peer, b"x"))


def test_a_file_can_be_replaced_again_and_again_without_a_free_block(tmp_path: Path) -> None:
    """The file that was replaced lends its block: no other is ever made after the first time."""
    disk = LocalDisk(str(tmp_path))
    disk.write_atomically("f", b"first")
    disk.write_atomically("f", b"the second, longer one")
    inodes = {entry.inode() for entry in os.scandir(tmp_path)}
    for number in range(10):
        disk.write_atomically("f", b"%d" % number)
        assert disk.read_small("f") == b"%d" % number
        assert {entry.inode() for entry in os.scandir(tmp_path)} == inodes
    assert sorted(os.listdir(tmp_path)) == ["f", "f.new"]


async def test_first_append_on_a_full_disk_leaves_nothing(start_node: StartNode, pool: Pool) -> None:
    async with start_node(wrap=FaultyDisk) as a:
        for call in ("create", "write"):
            faulty(a).faults[call] = [errno.ENOSPC]
            await refused(ErrorCode.DISK_FULL, Writer(CHUNK).send(pool, a.peer, b"data"))
            assert not chunk_file(a).exists()
            assert len(a.store.table) == 0
        await Writer(CHUNK).send(pool, a.peer, b"data")


async def test_below_the_reserve_only_appends_are_refused(start_node: StartNode, pool: Pool) -> None:
    async with start_node(wrap=FaultyDisk, reserve=lambda capacity: 1 << 20) as a:
        writer = Writer(CHUNK)
        await writer.send(pool, a.peer, b"data", sync=True)
        faulty(a).free = (1 << 20) + 10
        a.store.table.measure_space()
        await refused(ErrorCode.DISK_FULL, Writer(CHUNK + 1).send(pool, a.peer, b"data"))
        assert bytes((await pool.read(a.peer, CHUNK, 0, 100)).payload) == b"data"
        await a.store.seal(CHUNK, writer.offset, writer.index, writer.chain)
        faulty(a).free = 0
        a.store.table.measure_space()
        assert (a.store.table.disk_state, a.store.table.free) == ("FULL", 0)
        await a.store.delete(CHUNK)


async def test_failed_sync_gives_the_replica_up(start_node: StartNode, pool: Pool) -> None:
    async with start_node(wrap=FaultyDisk) as a:
        writer = Writer(CHUNK)
        await writer.send(pool, a.peer, b"data")
        faulty(a).faults["sync"] = [errno.EIO]
        await refused(ErrorCode.REPLICA_FAILED, writer.send(pool, a.peer, b"more", sync=True))
        assert not chunk_file(a).exists()
        assert chunk_file(a).with_name(chunk_file(a).name + ".failed").exists()
        assert [report.error for report in a.node.outbox.parcel().changes] == ["REPLICA_FAILED"]
        # Not retried into success.
        await refused(ErrorCode.REPLICA_FAILED, pool.sync(a.peer, Sync(CHUNK, 4, 0, ())))
        await refused(ErrorCode.REPLICA_FAILED, writer.send(pool, a.peer, b"x"))
        await refused(ErrorCode.REPLICA_FAILED, a.store.seal(CHUNK, 4, 1, 0))
        await refused(ErrorCode.REPLICA_FAILED, a.store.reads.verify(CHUNK))
        assert faulty(a).calls["sync"] == 1
        # Nobody else may have it; whoever asks checks what he gets.
        assert bytes((await pool.read(a.peer, CHUNK, 0, 4)).payload) == b"data"
        await Writer(CHUNK + 1).send(pool, a.peer, b"others go on", sync=True)
    async with start_node() as a:
        assert (await pool.stat(a.peer, CHUNK)).state == "FAILED"
        assert bytes((await pool.read(a.peer, CHUNK, 0, 4)).payload) == b"data"
        assert (await pool.read_index(a.peer, CHUNK, 0, 10)).entries
        await refused(ErrorCode.REPLICA_FAILED, a.store.seal(CHUNK, 4, 1, 0))
        await a.store.delete(CHUNK)
        assert not list(chunk_file(a).parent.iterdir())


@pytest.mark.parametrize("sync", [False, True])
async def test_failed_write_gives_the_replica_up(start_node: StartNode, pool: Pool, sync: bool) -> None:
    async with start_node(wrap=FaultyDisk) as a:
        writer = Writer(CHUNK)
        await writer.send(pool, a.peer, b"data")
        faulty(a).faults["write"] = [errno.EIO]
        await refused(ErrorCode.REPLICA_FAILED, writer.send(pool, a.peer, b"more", sync=sync))
        assert a.store.table.get(CHUNK).state is ReplicaState.FAILED


async def test_failed_directory_sync_of_a_new_chunk_gives_it_up(start_node: StartNode, pool: Pool) -> None:
    async with start_node(wrap=FaultyDisk) as a:
        faulty(a).faults["sync_directory"] = [errno.EIO]
        await refused(ErrorCode.REPLICA_FAILED, Writer(CHUNK).send(pool, a.peer, b"data", sync=True))


async def test_new_chunk_has_its_directory_synced_once_before_the_first_answer(
    start_node: StartNode, pool: Pool
) -> None:
    async with start_node(wrap=FaultyDisk) as a:
        writer = Writer(CHUNK)
        await writer.send(pool, a.peer, b"data", sync=True)
        assert [step for step in faulty(a).steps if "sync" in step] == [
            "append:before-sync",
            "append:before-directory-sync",
            "append:after-sync",
        ]
        await writer.send(pool, a.peer, b"data", sync=True)
        assert faulty(a).calls["sync_directory"] == 1


async def test_disk_has_failed_when_not_even_the_rename_works(start_node: StartNode, pool: Pool) -> None:
    async with start_node(wrap=FaultyDisk) as a:
        writer = Writer(CHUNK)
        await writer.send(pool, a.peer, b"data")
        faulty(a).faults.update(sync=[errno.EIO], rename=[errno.EIO])
        await refused(ErrorCode.REPLICA_FAILED, writer.send(pool, a.peer, b"more", sync=True))
        assert a.store.table.disk_state == "FAILED"
        await refused(ErrorCode.DISK_FAILED, Writer(CHUNK + 1).send(pool, a.peer, b"data"))


async def test_a_disk_on_which_one_replica_after_the_other_fails_has_failed(start_node: StartNode, pool: Pool) -> None:
    async with start_node(wrap=FaultyDisk) as a:
        for number, good in enumerate([False, False, True, False, False, False]):
            assert a.store.table.disk_state == "OK"
            if good:
                await Writer(CHUNK + number).send(pool, a.peer, b"data", sync=True)
                continue
            faulty(a).faults["sync"] = [errno.EIO]
            await refused(ErrorCode.REPLICA_FAILED, Writer(CHUNK + number).send(pool, a.peer, b"data", sync=True))
        assert a.store.table.disk_state == "FAILED"
        await refused(ErrorCode.DISK_FAILED, Writer(CHUNK + 9).send(pool, a.peer, b"data"))
        assert (await pool.read(a.peer, CHUNK + 2, 0, 4)).payload == b"data"


async def test_read_error_is_reported_at_once(start_node: StartNode, pool: Pool) -> None:
    async with start_node(wrap=FaultyDisk) as a:
        await Writer(CHUNK).send(pool, a.peer, b"data")
        faulty(a).cold = True
        assert bytes((await pool.read(a.peer, CHUNK, 0, 4)).payload) == b"data"
        faulty(a).faults["read"] = [errno.EIO]
        await refused(ErrorCode.IO, pool.read(a.peer, CHUNK, 0, 4))
        assert [report.error for report in a.node.outbox.parcel().changes] == ["IO"]
        assert bytes((await pool.read(a.peer, CHUNK, 0, 4)).payload) == b"data"


@pytest.mark.parametrize("shortage", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
async def test_a_shortage_of_the_server_says_nothing_about_the_replica(
    start_node: StartNode, pool: Pool, shortage: int
) -> None:
    async with start_node(wrap=FaultyDisk) as a:
        await Writer(CHUNK).send(pool, a.peer, b"data")
        faulty(a).cold = True
        a.node.outbox.parcel()
        faulty(a).faults["read"] = [shortage]
        await refused(ErrorCode.UNAVAILABLE, pool.read(a.peer, CHUNK, 0, 4))
        assert [report.error for report in a.node.outbox.parcel().changes if report.error] == []


async def test_syncs_of_one_chunk_coalesce(start_node: StartNode, pool: Pool) -> None:
    async with start_node(wrap=FaultyDisk) as a:
        writer = Writer(CHUNK)
        await writer.send(pool, a.peer, b"first", sync=True)
        syncs = faulty(a).calls["sync"]
        running, release = threading.Event(), threading.Event()

        def block_syncs(call: str) -> None:
            if call == "sync":
                running.set()
                assert release.wait(20)

        faulty(a).before = block_syncs
        calls = []
        for number in range(10):
            data = b"%d" % number
            calls.append(pool.append_start(a.peer, writer.append(data, sync=True), [data]))
            assert await trio.to_thread.run_sync(running.wait, 20)
        while (await pool.stat(a.peer, CHUNK)).progress.entries < 11:
            await trio.lowlevel.checkpoint()
        release.set()
        for call in calls:
            await call.wait()
        assert faulty(a).calls["sync"] == syncs + 2  # the one that ran, and one for all that came meanwhile


@pytest.mark.parametrize("fault", [None, errno.ENOSPC, errno.EIO])
async def test_slow_disk_writes_in_threads_and_keeps_the_order(
    start_node: StartNode, pool: Pool, fault: int | None
) -> None:
    async with start_node(wrap=FaultyDisk) as a:
        writer = Writer(CHUNK)
        a.store.appends._slow_until = float("inf")
        pieces = [os.urandom(50_000) for _ in range(10)]
        requests = [writer.append(piece) for piece in pieces]
        faulty(a).faults["write"] = [None] * 8 + [fault]  # two writes an append
        calls = [pool.append_start(a.peer, r, [p]) for r, p in zip(requests, pieces, strict=True)]
        codes = []
        for call in calls:
            try:
                codes.append((await call.wait()).message.progress.entries)
            except DfsError as error:
                codes.append(error.code)
        if fault is None:
            assert codes == list(range(1, 11))
            assert bytes((await pool.read(a.peer, CHUNK, 0, 500_000)).payload) == writer.data
            retried = await pool.append(a.peer, requests[3], [pieces[3]])
            assert retried.progress.entries == 4
        elif fault == errno.ENOSPC:
            # Those that came after the failure are not at the end; any of them may also have come before it.
            assert codes[:5] == [1, 2, 3, 4, ErrorCode.DISK_FULL]
            assert set(codes[5:]) == {ErrorCode.WRONG_OFFSET}
            assert (await pool.stat(a.peer, CHUNK)).progress.entries == 4
        else:
            assert codes[:5] == [1, 2, 3, 4, ErrorCode.REPLICA_FAILED]
            assert set(codes[5:]) == {ErrorCode.REPLICA_FAILED}


async def test_one_slow_write_moves_the_disk_to_threads_for_a_while(start_node: StartNode, pool: Pool) -> None:
    now = [0.0]

    async with start_node(wrap=FaultyDisk, clock=lambda: now[0]) as a:
        writer = Writer(CHUNK)
        main = threading.get_ident()
        writers: list[bool] = []

        def on_write(call: str) -> None:
            if call == "write":
                writers.append(threading.get_ident() == main)
                now[0] += 0.1 if len(writers) == 1 else 0

        faulty(a).before = on_write
        for elapsed in (0, 1, 20):
            now[0] += elapsed
            await writer.send(pool, a.peer, b"x")
        assert writers == [True, True, False, False, True, True]


async def test_torn_seal_header_does_not_lose_a_replica(start_node: StartNode, pool: Pool) -> None:
    async with start_node() as a:
        writer = Writer(CHUNK)
        await writer.send(pool, a.peer, os.urandom(100_000), sync=True)
        await a.store.seal(CHUNK, writer.offset, writer.index, writer.chain)
        with chunk_file(a).open("r+b") as file:
            file.seek(4092)
            file.write(b"torn")
    async with start_node() as a:
        await a.node.verified_first()
        replica = a.store.table.get(CHUNK)
        assert replica.state is ReplicaState.FROZEN
        assert replica.written == Progress(writer.offset, writer.offset, writer.index, writer.chain)
        await a.store.seal(CHUNK, writer.offset, writer.index, writer.chain)
    async with start_node() as a:
        assert a.store.table.get(CHUNK).state is ReplicaState.SEALED


async def test_frozen_replica_is_cut_before_its_first_bad_block(start_node: StartNode, pool: Pool) -> None:
    async with start_node() as a:
        writer = Writer(CHUNK)
        await writer.send(pool, a.peer, os.urandom(8000), block=1000)
        with chunk_file(a).open("r+b") as file:
            file.seek(PAYLOAD_OFFSET + 5500)
            file.write(b"never reached the disk")
    async with start_node() as a:
        assert a.store.table.replicas() == [] or a.store.table.get(CHUNK).written.entries == 5
        await a.node.verified_first()
        assert a.store.table.get(CHUNK).written.stored_length == 5000
        assert [report.entries for report in a.node.outbox.parcel().changes] == [5]
        assert [report.entries for report in a.node.listing()] == [5]
        await refused(ErrorCode.WRONG_OFFSET, a.store.seal(CHUNK, 8000, 8, writer.chain))
        index = a.store.table.open_chunks.get(CHUNK)
        await a.store.seal(CHUNK, 5000, 5, index.blocks.progress(5, 0).chain)


class ShortDisk:
    """Twice there is no descriptor for reading back."""

    def __init__(self, disk: LocalDisk) -> None:
        self._disk = disk
        self.refused = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._disk, name)

    def open_direct(self, path: str) -> File:
        if self.refused < 2:
            self.refused += 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        return self._disk.open_direct(path)


async def test_a_frozen_replica_is_not_given_up_because_descriptors_are_short(
    start_node: StartNode, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut it may be so everywhere at once, and these are the newest bytes there are."""
    monkeypatch.setattr(reads, "SHORTAGE_SECONDS", 0.01)
    async with start_node() as a:
        writer = Writer(CHUNK)
        await writer.send(pool, a.peer, os.urandom(8000), block=1000)
    async with start_node(wrap=ShortDisk) as a:
        await a.node.verified_first()
        assert a.node.disk.refused == 2  # type: ignore[attr-defined]
        assert [(report.entries, report.error) for report in a.node.listing()] == [(8, "")]
        await a.store.seal(CHUNK, 8000, 8, writer.chain)


@pytest.mark.parametrize("damage", ["sealed index", "sealed size", "other chunk", "other cluster", "garbage", "empty"])
async def test_unusable_files_are_reported_as_failed(
    start_node: StartNode, pool: Pool, damaged: set[str], damage: str
) -> None:
    damaged.add("a")
    async with start_node() as a:
        writer = Writer(CHUNK)
        await writer.send(pool, a.peer, b"12345678", block=4)
        await a.store.seal(CHUNK, writer.offset, writer.index, writer.chain)
    data = bytearray(chunk_file(a).read_bytes())
    if damage == "sealed index":
        data[INDEX_OFFSET + 64] ^= 1
    elif damage == "sealed size":
        del data[-1:]
    elif damage == "other chunk":
        data[:4096] = chunkfile.encode_header(chunkfile.Header(CLUSTER, CHUNK + 1, 0))
    elif damage == "other cluster":
        data[:4096] = chunkfile.encode_header(chunkfile.Header(type(CLUSTER)(int=5), CHUNK, 0))
    elif damage == "garbage":
        data[:8192] = os.urandom(8192)
    else:
        data.clear()
    chunk_file(a).write_bytes(data)
    async with start_node() as a:
        if damage == "sealed index":
            # Start looks at the last entry only; reading looks at all.
            last_is_bad = a.store.table.get(CHUNK).state is ReplicaState.FAILED
            assert last_is_bad or a.store.table.get(CHUNK).state is ReplicaState.SEALED
            await refused(
                ErrorCode.REPLICA_FAILED if last_is_bad else ErrorCode.BAD_CHECKSUM, pool.read(a.peer, CHUNK, 0, 8)
            )
            assert [report.error for report in a.node.listing()] == ["BAD_CHECKSUM"]
        else:
            assert [(r.chunk, r.error, r.sealed) for r in a.node.listing()] == [(CHUNK, "BAD_CHECKSUM", False)]
            await refused(ErrorCode.REPLICA_FAILED, pool.read(a.peer, CHUNK, 0, 8))
        await a.store.delete(CHUNK)
        assert not chunk_file(a).exists()


async def test_strange_and_unfinished_files_are_left_alone_or_removed(start_node: StartNode, damaged: set[str]) -> None:
    damaged.add("a")
    async with start_node() as a:
        directory = chunk_file(a).parent
    (directory / "notes.txt").write_text("mine")
    (directory / "0000000000000001").write_text("in the wrong directory")
    (directory / f"{CHUNK:016x}.copying").write_text("half a copy")
    async with start_node() as a:
        assert len(a.store.table) == 0
        assert sorted(path.name for path in directory.iterdir()) == ["0000000000000001", "notes.txt"]


def test_every_state_has_its_moves() -> None:
    assert set(TRANSITIONS) == set(ReplicaState)
    replica = Replica(1, ReplicaState.SEALED, 0, Progress(0, 0, 0, 0))
    with pytest.raises(RuntimeError, match="cannot go from SEALED to OPEN"):
        replica.move(ReplicaState.OPEN)


def test_local_disk_reads_past_the_page_cache(tmp_path: Path) -> None:
    disk = LocalDisk(str(tmp_path))
    data = os.urandom(3_000_000)
    disk.create("file").write([data[:10], data[10:]], 5)
    direct = disk.open_direct("file")
    for offset, length in [(0, 100), (5, 1 << 20), (4096, 4096), (4095, 2), (2_999_000, 100_000), (5_000_000, 10)]:
        assert bytes(direct.read_from_disk(length, offset)) == (bytes(5) + data)[offset : offset + length]


async def test_a_file_that_could_not_be_removed_is_removed_when_asked_again(start_node: StartNode, pool: Pool) -> None:
    """Until its server's next start it would take up the space that its deletion was to give back."""
    async with start_node(wrap=FaultyDisk) as a:
        writer = Writer(CHUNK)
        await writer.send(pool, a.peer, b"x" * 1000, sync=True)
        faulty(a).faults["unlink"] = [errno.ENOSPC, errno.ENOSPC]
        for _ in range(2):
            await refused(ErrorCode.DISK_FULL, a.store.delete(CHUNK))
            assert chunk_file(a).exists()
            assert CHUNK not in a.node.outbox.parcel().gone
        await a.store.delete(CHUNK)
        assert not chunk_file(a).exists()
        assert CHUNK in a.node.outbox.parcel().gone
        assert a.store.table.disk_state == "OK"


def test_a_failed_sync_of_a_small_file_or_directory_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    disk = LocalDisk(str(tmp_path))
    disk.make_directory("chunks")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        disk.sync_directory("chunks")
    assert caught.value.filename == f"{tmp_path}/chunks"
    with pytest.raises(OSError, match="Input/output error") as caught:
        disk.write_atomically("small", b"data")
    assert caught.value.filename == f"{tmp_path}/small.new"

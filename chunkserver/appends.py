"""Appending to the chunks of one disk: order, retries, full disks, and what is durable when.

Steps of one append: :meth:`Appends.admit` (checks, changes nothing), :meth:`Appends.carry_out` (writes now, or queues
on a slow disk), :meth:`Appends.written` and :meth:`Appends.sync`.
"""

import errno
import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
import trio
from crc32c import crc32c

from chunkserver import chunkfile
from chunkserver.chunkfile import ENTRY_BYTES, INDEX_OFFSET, PAYLOAD_CAPACITY, PAYLOAD_OFFSET, FormatError, Header
from chunkserver.disk import File
from chunkserver.index import Index
from chunkserver.protocol import Append, Progress
from chunkserver.replica import Replica, ReplicaState, Write, Writing
from chunkserver.table import FULL_ERRNOS, Table, cancel_queue, failure_of, parent
from metaserver.errors import DfsError, ErrorCode
from metaserver.wire import Buffer

log = structlog.get_logger(__name__)

# A page-cache write that takes longer is waiting for the disk: others should not wait with it.
SLOW_WRITE_SECONDS = 0.05
# How long such a disk then writes in worker threads (245 MiB/s through two replicas instead of 550).
SLOW_DISK_SECONDS = 10.0
# An fdatasync of 64 MiB behind other traffic on a slow disk; beyond, the caller should go elsewhere.
SYNC_SECONDS = 60.0
# What ended so long ago says nothing about the disk any more.
PACE_SECONDS = 1.0


class DiskPace:
    """The longest of what is under way at a disk and of what ended within the last moments. ``clock`` in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._under_way: dict[int, float] = {}
        self._ended: deque[tuple[float, float]] = deque(maxlen=64)
        self._count = 0

    @contextmanager
    def operation(self) -> Iterator[None]:
        self._count += 1
        number, started = self._count, self._clock()
        self._under_way[number] = started
        try:
            yield
        finally:
            del self._under_way[number]
            now = self._clock()
            self._ended.append((now, now - started))

    @property
    def seconds(self) -> float:
        now = self._clock()
        ended = [took for at, took in self._ended if at > now - PACE_SECONDS]
        return max([*ended, *(now - started for started in self._under_way.values())], default=0.0)


class Appends:
    """The only one who writes to OPEN replicas."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._slow_until = -math.inf
        self._pace = DiskPace(table.clock)

    @property
    def disk_seconds(self) -> float:
        """How long writes and syncs take at present; those under way count with what they have taken until now."""
        return self._pace.seconds

    def admit(self, request: Append, payload: Buffer) -> Write:
        """Checks an append against the replica; nothing is changed yet. The next call is :meth:`carry_out`.

        Raises what is wrong with it: NO_SUCH_CHUNK, CHUNK_FROZEN, CHUNK_SEALED, REPLICA_FAILED, DISK_FAILED,
        DISK_FULL, CHUNK_FULL, WRONG_OFFSET, CHAIN_MISMATCH, BAD_CHECKSUM, INVALID.
        """
        count, odd = divmod(len(request.entries), ENTRY_BYTES)
        if odd or not count:
            raise DfsError(ErrorCode.INVALID, "an append needs whole entries")
        replica = self._appendable(request)
        writing = replica.writing
        assert writing is not None
        tail = writing.tail
        if request.index < tail.entries:
            return self._already_there(replica, request, count)
        if request.index != tail.entries or request.offset != tail.stored_length:
            text = f"the chunk has {tail.entries} entries and {tail.stored_length} bytes"
            raise DfsError(ErrorCode.WRONG_OFFSET, text)
        if request.chain != tail.chain:
            raise DfsError(ErrorCode.CHAIN_MISMATCH, "the chunk continues differently here")
        if tail.entries + count > chunkfile.MAX_ENTRIES or tail.stored_length + len(payload) > PAYLOAD_CAPACITY:
            raise DfsError(ErrorCode.CHUNK_FULL)
        after = check_append(request, tail, payload)
        self._table.require_space(len(payload) + (0 if tail.entries else chunkfile.HEADER_BYTES))
        return Write(replica, request.entries, [payload], tail, after)

    def carry_out(self, write: Write) -> None:
        """Writes what was just admitted, at once or (slow disk) in a worker thread, in order; see :meth:`written`."""
        replica, writing = write.replica, write.replica.writing
        if write.done or write in (writing.queue if writing else ()):
            return
        assert writing is not None
        if write.before.entries == 0:
            self._table.add(replica)
        writing.tail = write.after
        if writing.queue or self._table.clock() < self._slow_until:
            writing.queue.append(write)
            if not writing.draining:
                writing.draining = True
                self._table.nursery.start_soon(self._drain, replica)
            return
        started = self._table.clock()
        try:
            self._write_file(write)
        except OSError as error:
            self._write_failed(write, error)
        else:
            self._write_done(write)
        if self._table.clock() - started > SLOW_WRITE_SECONDS:
            self._slow_until = self._table.clock() + SLOW_DISK_SECONDS

    async def written(self, write: Write) -> None:
        """Waits until it is in the file (not yet durable); raises what prevented it."""
        while not write.done:
            writing = write.replica.writing
            if writing is None:
                raise DfsError(ErrorCode.NO_SUCH_CHUNK, "deleted meanwhile")
            await writing.changed.park()
        if write.error is not None:
            raise write.error

    def _appendable(self, request: Append) -> Replica:
        """The replica, or (first append) a new one that is not in the table yet."""
        if self._table.disk_error:
            raise DfsError(ErrorCode.DISK_FAILED, self._table.disk_error)
        replica = self._table.get(request.chunk)
        if replica is None:
            if request.index or self._table.was_deleted(request.chunk):
                raise DfsError(ErrorCode.NO_SUCH_CHUNK, f"no replica of chunk {request.chunk:x} here")
            nothing = Progress(0, 0, 0, self._table.first_chain(request.chunk))
            writing = Writing(None, nothing)
            return Replica(request.chunk, ReplicaState.OPEN, self._table.now_ns(), nothing, writing=writing)
        if replica.state is ReplicaState.FAILED:
            raise failure_of(replica, "this replica was given up")
        if replica.state is ReplicaState.SEALED or (replica.writing and replica.writing.closed):
            raise DfsError(ErrorCode.CHUNK_SEALED)
        if replica.state is not ReplicaState.OPEN:
            raise DfsError(ErrorCode.CHUNK_FROZEN, "this server was restarted since the chunk was begun")
        return replica

    def _already_there(self, replica: Replica, request: Append, count: int) -> Write:
        """A retry after a lost answer: the same entries (hence the same bytes) at the same place."""
        writing = replica.writing
        assert writing is not None
        if request.index + count <= replica.written.entries:
            assert writing.file is not None
            position = INDEX_OFFSET + request.index * ENTRY_BYTES
            if _read_back(writing.file, len(request.entries), position) == request.entries:
                index = Index(request.entries)
                after = index.progress(count, request.chain)
                after.entries += request.index
                write = Write(replica, request.entries, (), replica.written, after)
                write.done = True
                return write
        for write in writing.queue:
            if write.before.entries == request.index and write.entries == request.entries:
                return write
        raise DfsError(ErrorCode.WRONG_OFFSET, f"the chunk has {writing.tail.entries} other entries already")

    def _write_file(self, write: Write) -> None:
        """The blocks, then the entries that speak of them, so that after a kill whatever has an entry is there."""
        writing, before = write.replica.writing, write.before
        assert writing is not None
        disk = self._table.disk
        disk.step("append:before-write")
        if writing.file is None:
            writing.file = disk.create(write.replica.path)
        writing.file.write(write.payload, PAYLOAD_OFFSET + before.stored_length)
        disk.step("append:before-entries")
        if before.entries == 0:
            header = Header(self._table.cluster, write.replica.chunk, write.replica.created_ns)
            writing.file.write([chunkfile.encode_header(header), write.entries], 0)
        else:
            writing.file.write([write.entries], INDEX_OFFSET + before.entries * ENTRY_BYTES)

    async def _drain(self, replica: Replica) -> None:
        """Writes a queue in worker threads, one after another."""
        writing = replica.writing
        assert writing is not None
        while writing.queue:
            write = writing.queue[0]
            started = self._table.clock()
            try:
                with self._pace.operation():
                    await self._table.run_sync(
                        self._write_file, write, limiter=self._table.limits.writes, abandon_on_cancel=True
                    )
            except OSError as error:
                self._write_failed(write, error)
            else:
                if writing.queue:  # not given up or deleted meanwhile
                    writing.queue.popleft()
                    self._write_done(write)
            if self._table.clock() - started > SLOW_WRITE_SECONDS:
                self._slow_until = self._table.clock() + SLOW_DISK_SECONDS
        writing.draining = False
        writing.changed.unpark_all()

    def _write_done(self, write: Write) -> None:
        write.done = True
        write.replica.written = write.after
        if write.before.entries == 0:
            # Should the chunk have been deleted before this server's last restart, then this one is garbage.
            self._table.on_change(write.replica)
        self._table.bytes_written += write.after.stored_length - write.before.stored_length
        if write.replica.writing is not None:
            write.replica.writing.changed.unpark_all()

    def _write_failed(self, write: Write, error: OSError) -> None:
        """A full disk leaves the replica as it was before; anything else ends it."""
        if error.errno not in FULL_ERRNOS:
            self._table.give_up(write.replica, error)
            if error.errno == errno.EROFS:
                self._table.disk_failed("the disk has become read-only")
            write.done, write.error = True, DfsError(ErrorCode.REPLICA_FAILED, f"cannot write: {error.strerror}")
            return
        replica, writing = write.replica, write.replica.writing
        assert writing is not None
        self._table.measure_space()
        cancel_queue(writing, DfsError(ErrorCode.WRONG_OFFSET, "an append before it met a full disk"))
        write.done, write.error = True, DfsError(ErrorCode.DISK_FULL, "no space left on the disk")
        writing.tail = replica.written
        if replica.written.entries == 0:
            self._remove_unborn(replica)
        elif writing.file is not None:
            try:
                writing.file.truncate(PAYLOAD_OFFSET + replica.written.stored_length)
            except OSError as second:
                self._table.give_up(replica, second)
        writing.changed.unpark_all()

    def _remove_unborn(self, replica: Replica) -> None:
        """A first append that met a full disk: as if it had never come."""
        self._table.forget(replica.chunk)
        if replica.writing is not None and replica.writing.file is not None:
            replica.writing.file = None
            try:
                self._table.disk.unlink(replica.path)
            except OSError as error:
                self._table.disk_failed(f"cannot remove {replica.path}: {error.strerror}")

    async def sync(self, replica: Replica, entries: int) -> None:
        """Returns when the first ``entries`` entries and their blocks are on stable storage, directory included.

        One fdatasync runs at a time; what is written meanwhile is covered by the next. Cancelling is safe.
        Raises REPLICA_FAILED, CHUNK_SEALED (cut shorter meanwhile), NO_SUCH_CHUNK, TIMEOUT.
        """
        with trio.move_on_after(SYNC_SECONDS):
            while not self._is_synced(replica, entries):
                writing = replica.writing
                assert writing is not None
                if not writing.syncing and replica.written.entries >= entries:
                    writing.syncing = True
                    self._table.nursery.start_soon(self._sync_once, replica, writing)
                await writing.changed.park()
            return
        raise DfsError(ErrorCode.TIMEOUT, f"the disk did not sync within {SYNC_SECONDS:.0f} s")

    def _is_synced(self, replica: Replica, entries: int) -> bool:
        if replica.state is ReplicaState.FAILED:
            raise failure_of(replica, "this replica was given up")
        if replica.state is ReplicaState.DELETED:
            raise DfsError(ErrorCode.NO_SUCH_CHUNK, "deleted meanwhile")
        if replica.state is ReplicaState.SEALED:
            if entries > replica.written.entries:
                raise DfsError(ErrorCode.CHUNK_SEALED, "sealed at a shorter length")
            return True
        if replica.writing is None:
            raise DfsError(ErrorCode.CHUNK_FROZEN, "this server was restarted since the chunk was begun")
        if entries > replica.writing.tail.entries:
            raise DfsError(ErrorCode.WRONG_OFFSET, "the append before this sync failed")
        return replica.writing.synced >= entries

    async def _sync_once(self, replica: Replica, writing: Writing) -> None:
        covers = replica.written.entries
        assert writing.file is not None
        try:
            with self._pace.operation():
                await self._table.run_sync(
                    self._sync_file,
                    replica,
                    writing.file,
                    not writing.directory_synced,
                    limiter=self._table.limits.syncs,
                    abandon_on_cancel=True,
                )
        except OSError as error:
            self._table.give_up(replica, error)
        else:
            self._table.synced()
            writing.synced = max(writing.synced, covers)
            writing.directory_synced = True
        finally:
            writing.syncing = False
            writing.changed.unpark_all()

    def _sync_file(self, replica: Replica, file: File, with_directory: bool) -> None:
        self._table.disk.step("append:before-sync")
        file.sync()
        if with_directory:
            self._table.disk.step("append:before-directory-sync")
            self._table.disk.sync_directory(parent(replica.path))
        self._table.disk.step("append:after-sync")

    def synced_point(self, replica: Replica, length: int, chain: int) -> int:
        """The number of entries that make up ``length`` stored bytes; WRONG_OFFSET or CHAIN_MISMATCH if none do."""
        tail = replica.writing.tail if replica.writing else replica.written
        if (length, chain) == (tail.stored_length, tail.chain):
            return tail.entries
        if replica.writing is None or replica.writing.file is None:
            raise DfsError(ErrorCode.WRONG_OFFSET, "not the length of this chunk")
        index = Index(_read_back(replica.writing.file, replica.written.entries * ENTRY_BYTES, INDEX_OFFSET))
        entries = index.entries_at(length)
        if entries is None:
            raise DfsError(ErrorCode.WRONG_OFFSET, "no block ends there")
        first = self._table.first_chain(replica.chunk)
        if index.progress(entries, first).chain != chain:
            raise DfsError(ErrorCode.CHAIN_MISMATCH, "the chunk continues differently here")
        return entries


def _read_back(file: File, length: int, position: int) -> bytes:
    """Entries written by this process."""
    try:
        return file.read(length, position)
    except OSError as error:
        raise DfsError(ErrorCode.IO, f"cannot read the index: {error.strerror}") from None


def check_append(request: Append, before: Progress, payload: Buffer) -> Progress:
    """The progress after an append at the end; CHAIN_MISMATCH, INVALID or BAD_CHECKSUM if it does not fit."""
    try:
        entries = chunkfile.check_entries(request.entries, before.chain, before.stored_length)
    except FormatError as error:
        raise DfsError(ErrorCode.CHAIN_MISMATCH, str(error)) from None
    view = memoryview(payload)
    at, logical = 0, before.logical_length
    for entry in entries:
        block = view[at : at + entry.stored_length]
        if len(block) != entry.stored_length or entry.logical_offset != logical:
            raise DfsError(ErrorCode.INVALID, "entries and payload do not fit together")
        if crc32c(block) != entry.crc:
            raise DfsError(ErrorCode.BAD_CHECKSUM, f"the block at {entry.stored_offset} arrived damaged")
        at += entry.stored_length
        logical += entry.logical_length
    if at != len(view):
        raise DfsError(ErrorCode.INVALID, "entries and payload do not fit together")
    last = entries[-1]
    return Progress(before.stored_length + at, logical, before.entries + len(entries), last.chain)

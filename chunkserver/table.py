"""The replicas of one disk in memory, the space they take, and what happens when one cannot keep its promise.

Everything that decides is synchronous; one task (the service's) owns the table, worker threads get files and bytes
only.
"""

import errno
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from heapq import nsmallest
from typing import Any, TypeAlias
from uuid import UUID

import structlog
import trio

from chunkserver import chunkfile
from chunkserver.disk import Disk
from chunkserver.index import OpenChunks
from chunkserver.recovery import FAILED_SUFFIX
from chunkserver.replica import Replica, ReplicaState, Write, Writing
from metaserver.errors import DfsError, ErrorCode

log = structlog.get_logger(__name__)

RunSync: TypeAlias = Callable[..., Awaitable[Any]]

# Chunks deleted by this process, so that an append that was on its way does not bring one back. Ids are not reused.
REMEMBERED_DELETIONS = 10_000
# What a full disk says, and a full quota.
FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
# With fewer files left none is begun: what is there already needs some to be deleted, copied and compacted.
LEAST_FILES = 16
# After so many replicas given up one after another, with no sync that succeeded in between, it is the disk.
GIVEN_UP_DISK = 3
DISK_OK, DISK_FULL, DISK_FAILED = "OK", "FULL", "FAILED"


class Limits:
    """How many worker threads each kind of work may take, so that none starves another."""

    def __init__(self) -> None:
        self.reads = trio.CapacityLimiter(8)
        self.syncs = trio.CapacityLimiter(8)
        self.writes = trio.CapacityLimiter(4)
        self.changes = trio.CapacityLimiter(2)
        self.scrubs = trio.CapacityLimiter(2)


class Table:
    """See the module. ``on_change`` and ``on_gone`` hear of what the metaserver has to know.

    Tasks that outlive the request that began them (a sync others wait for too) run in ``nursery``. ``clock`` counts
    seconds from anywhere; ``now_ns`` is the time of day.
    """

    def __init__(
        self,
        disk: Disk,
        cluster: UUID,
        replicas: Iterable[Replica],
        nursery: trio.Nursery,
        *,
        reserve_bytes: int,
        on_change: Callable[[Replica], None],
        on_gone: Callable[[int], None],
        run_sync: RunSync = trio.to_thread.run_sync,
        clock: Callable[[], float] = time.monotonic,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.disk = disk
        self.cluster = cluster
        self.nursery = nursery
        self.reserve_bytes = reserve_bytes
        self.run_sync = run_sync
        self.clock = clock
        self.now_ns = now_ns
        self.limits = Limits()
        self.open_chunks = OpenChunks()
        self.disk_error = ""
        self._given_up_in_a_row = 0
        self.bytes_read = 0
        self.bytes_written = 0
        self.highest_chunk = 0
        self.on_change = on_change
        self.on_gone = on_gone
        self._replicas: dict[int, Replica] = {}
        self._deleted: OrderedDict[int, None] = OrderedDict()
        self._unsynced_directories: set[str] = set()
        # Given up, and their files have still their names, because the disk had no space for others.
        self._to_rename: list[Replica] = []
        self._space = disk.space()
        self._free_bytes = self._space.free
        for replica in replicas:
            # A chunk may have come back (copied) after it was given up.
            if replica.state is not ReplicaState.FAILED or replica.chunk not in self._replicas:
                self.add(replica)

    def first_chain(self, chunk: int) -> int:
        return chunkfile.first_chain(self.cluster, chunk)

    # -- which there are ---------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._replicas)

    def replicas(self) -> list[Replica]:
        """All that count, sorted by chunk: not those whose payload is still to be verified after a restart."""
        return [self._replicas[chunk] for chunk in sorted(self._replicas) if self._replicas[chunk].verified]

    def page(self, after: int, count: int) -> list[Replica]:
        """Replicas of any kind with a larger id than ``after``, sorted."""
        return [self._replicas[chunk] for chunk in nsmallest(count, (c for c in self._replicas if c > after))]

    def stored_bytes(self) -> int:
        """What the replicas take up, headers and indexes included."""
        return sum(replica.stored_bytes for replica in self._replicas.values())

    def count_by_state(self) -> Counter[ReplicaState]:
        return Counter(replica.state for replica in self._replicas.values())

    def frozen(self) -> list[Replica]:
        """Those whose payload is still to be verified."""
        return [replica for replica in self._replicas.values() if not replica.verified]

    def get(self, chunk: int) -> Replica | None:
        return self._replicas.get(chunk)

    def was_deleted(self, chunk: int) -> bool:
        return chunk in self._deleted

    def add(self, replica: Replica) -> None:
        """Takes in a new replica, in place of one of the same chunk that was given up."""
        self._deleted.pop(replica.chunk, None)
        self._replicas[replica.chunk] = replica
        self.highest_chunk = max(self.highest_chunk, replica.chunk)

    def forget(self, chunk: int) -> None:
        self._replicas.pop(chunk, None)
        self.open_chunks.drop(chunk)

    def remember_deleted(self, chunk: int) -> None:
        self._deleted[chunk] = None
        if len(self._deleted) > REMEMBERED_DELETIONS:
            self._deleted.popitem(last=False)

    def find(self, chunk: int) -> Replica:
        """Raises NO_SUCH_CHUNK."""
        replica = self._replicas.get(chunk)
        if replica is None:
            raise DfsError(ErrorCode.NO_SUCH_CHUNK, f"no replica of chunk {chunk:x} here")
        return replica

    def readable(self, chunk: int) -> Replica:
        """As :meth:`find`; REPLICA_FAILED if it was given up. For whatever relies on it as a whole."""
        replica = self.find(chunk)
        if replica.state is ReplicaState.FAILED:
            raise DfsError(ErrorCode.REPLICA_FAILED, f"the replica of chunk {chunk:x} here was given up")
        return replica

    # -- the disk ----------------------------------------------------------------------------------------------

    @property
    def disk_state(self) -> str:
        if self.disk_error:
            return DISK_FAILED
        return DISK_FULL if not self.free else DISK_OK

    @property
    def capacity(self) -> int:
        return self._space.capacity

    @property
    def free(self) -> int:
        """Bytes that chunks may still take; none if no more files can be made."""
        return max(0, self._space.free - self.reserve_bytes) if self._space.files >= LEAST_FILES else 0

    @property
    def spare(self) -> int:
        """Bytes of the reserve that may be used for what frees bytes in the end: half of it, as far as it is there."""
        half = self.reserve_bytes // 2
        return min(self.reserve_bytes - half, max(0, self._space.free - half))

    def measure_space(self) -> None:
        """Asks the disk; called now and then, and before an append is refused. Logs each change of its state."""
        before = self.disk_state
        self._space = self.disk.space()
        self._free_bytes = self._space.free
        if self._space.read_only:
            self.disk_failed("the file system is mounted read-only, or has become so")
        if self.disk_state == DISK_FULL != before:
            what = "no more files can be made" if self._space.files < LEAST_FILES else "only its reserve is left"
            log.warning("the disk is full: no new data until something is deleted", reason=what)
        elif before == DISK_FULL and self.disk_state == DISK_OK:
            log.info("the disk has space again", free=self.free)
        self._rename_given_up()

    def require_space(self, length: int, *, makes_room: bool = False) -> None:
        """Raises DISK_FULL if ``length`` bytes more would go below the reserve, of which what ``makes_room`` in the end
        may use a half."""
        reserve = self.reserve_bytes // 2 if makes_room else self.reserve_bytes
        if self._free_bytes - length < reserve:
            self.measure_space()
            if self._free_bytes - length < reserve:
                raise DfsError(ErrorCode.DISK_FULL, "the disk is full up to its reserve")
        self._free_bytes -= length

    def directory_changed(self, path: str) -> None:
        """A name of this directory is to be durable soon."""
        self._unsynced_directories.add(path)

    async def sync_directories(self) -> None:
        """Makes past deletions and renames durable."""
        pending, self._unsynced_directories = self._unsynced_directories, set()
        for directory in sorted(pending):
            try:
                await self.run_sync(self.disk.sync_directory, directory, limiter=self.limits.changes)
            except OSError as error:
                self.disk_failed(f"cannot sync {directory}: {error.strerror}")

    # -- when something fails ----------------------------------------------------------------------------------

    def give_up(self, replica: Replica, error: OSError) -> None:
        """A write, sync or seal failed: what the file holds is no longer known. Never tried again into success."""
        if replica.state not in (ReplicaState.OPEN, ReplicaState.FROZEN):
            return
        if error.errno not in FULL_ERRNOS:
            self._given_up_in_a_row += 1
        log.error("giving up a replica", chunk=f"{replica.chunk:x}", reason=error.strerror or str(error))
        self.disk.step("fail:before-rename")
        self._rename(replica)
        replica.move(ReplicaState.FAILED)
        replica.error = ErrorCode.REPLICA_FAILED.name
        replica.full = error.errno in FULL_ERRNOS
        self.open_chunks.drop(replica.chunk)
        writing, replica.writing = replica.writing, None
        if writing is not None:
            cancel_queue(writing, failure_of(replica, "an append before it failed"))
            writing.changed.unpark_all()
        self.on_change(replica)
        if self._given_up_in_a_row >= GIVEN_UP_DISK:
            self.disk_failed(f"{GIVEN_UP_DISK} replicas in a row could not be written or synced")

    def synced(self) -> None:
        """Something was put on stable storage: the disk is not altogether broken."""
        self._given_up_in_a_row = 0

    def _rename(self, replica: Replica) -> None:
        """Marks the file of a replica that is given up. Without space for the new name it keeps the old one for now,
        and everything it holds: all replicas of a chunk may meet a full disk. A restart reads it back from the disk."""
        try:
            self.disk.rename(replica.path, replica.path + FAILED_SUFFIX)
        except FileNotFoundError:
            return  # it could not even be created
        except OSError as error:
            if error.errno in FULL_ERRNOS:
                self._to_rename.append(replica)
            else:
                self.disk_failed(f"cannot rename {replica.path}: {error.strerror}")
            return
        replica.path += FAILED_SUFFIX
        self._unsynced_directories.add(parent(replica.path))

    def _rename_given_up(self) -> None:
        """Those that are still there under their old names."""
        waiting, self._to_rename = self._to_rename, []
        for replica in waiting:
            if self._replicas.get(replica.chunk) is replica and not self.disk_error:
                self._rename(replica)

    def disk_failed(self, text: str) -> None:
        """Nothing more is written; a restart looks again."""
        if not self.disk_error:
            self.disk_error = text
            log.error("the disk has failed; nothing more is written to it", reason=text)

    def disk_gone(self, text: str) -> None:
        """As :meth:`disk_failed`, and a better reason than whatever failed because of it."""
        if self.disk_error != text:
            self.disk_error = text
            log.error("the data directory is gone; nothing more is written to it", reason=text)

    def report_bad(self, replica: Replica, code: ErrorCode) -> None:
        """Blocks of it are wrong or unreadable: others may still be read, but it no longer counts as a copy.

        Nothing happens if it is not in the table any more: it was deleted or replaced while somebody read it.
        """
        if not replica.error and self._replicas.get(replica.chunk) is replica:
            replica.error = code.name
            log.error("a replica is damaged", chunk=f"{replica.chunk:x}", reason=code.name)
            self.on_change(replica)


def failure_of(replica: Replica, text: str) -> DfsError:
    """Why a replica that was given up cannot be written to: to a writer, a full disk is no broken one (promise P6)."""
    return DfsError(ErrorCode.DISK_FULL if replica.full else ErrorCode.REPLICA_FAILED, text)


def cancel_queue(writing: Writing, error: DfsError) -> None:
    """Ends all admitted writes that are not in the file."""
    for write in writing.queue:
        end_write(write, error)
    writing.queue.clear()


def end_write(write: Write, error: DfsError) -> None:
    if not write.done:
        write.done, write.error = True, error


def parent(path: str) -> str:
    """The directory of a relative path."""
    return path.rpartition("/")[0]

"""One replica: its states and what is known of it in memory. No I/O here."""

from collections import deque
from collections.abc import Sequence
from enum import Enum

import trio

from chunkserver.chunkfile import ENTRY_BYTES, HEADER_BYTES, chunk_path
from chunkserver.disk import File
from chunkserver.protocol import Progress
from metaserver.errors import DfsError
from metaserver.protocol import ReplicaReport
from metaserver.wire import Buffer


class ReplicaState(Enum):
    """OPEN takes appends from this process's clients; FROZEN is what an OPEN one becomes by a restart; SEALED never
    changes; FAILED was given up (its file is called ``.failed``): nobody relies on it, but what it holds may be read by
    whoever checks each block, if all others have failed, too; DELETED is gone."""

    OPEN = "OPEN"
    FROZEN = "FROZEN"
    SEALED = "SEALED"
    FAILED = "FAILED"
    DELETED = "DELETED"


TRANSITIONS: dict[ReplicaState, frozenset[ReplicaState]] = {
    ReplicaState.OPEN: frozenset({ReplicaState.SEALED, ReplicaState.FAILED, ReplicaState.DELETED}),
    ReplicaState.FROZEN: frozenset({ReplicaState.SEALED, ReplicaState.FAILED, ReplicaState.DELETED}),
    ReplicaState.SEALED: frozenset({ReplicaState.DELETED}),
    ReplicaState.FAILED: frozenset({ReplicaState.DELETED}),
    ReplicaState.DELETED: frozenset(),
}


class Write:
    """One admitted append on its way to the file; ``after`` is the replica's progress once it is there."""

    __slots__ = ("after", "before", "done", "entries", "error", "payload", "replica")

    def __init__(
        self, replica: "Replica", entries: bytes, payload: Sequence[Buffer], before: Progress, after: Progress
    ) -> None:
        self.replica = replica
        self.entries = entries
        self.payload = payload
        self.before = before
        self.after = after
        self.done = False
        self.error: DfsError | None = None


class Writing:
    """What a replica that was created by this process needs besides.

    Invariants: ``tail`` is the replica's ``written`` progress plus everything in ``queue``, in order; at most one
    task drains the queue (``draining``) and at most one syncs (``syncing``); ``changed`` is unparked after every
    write, sync and change of state, and whoever waits there looks again.
    """

    __slots__ = ("changed", "closed", "directory_synced", "draining", "file", "queue", "synced", "syncing", "tail")

    def __init__(self, file: File | None, tail: Progress) -> None:
        self.file = file
        self.tail = tail
        self.synced = 0  # entries known to be on stable storage
        self.directory_synced = False
        self.queue: deque[Write] = deque()
        self.draining = False
        self.syncing = False
        self.closed = False  # being sealed: takes nothing more
        self.changed = trio.lowlevel.ParkingLot()


class Replica:
    """A chunk's copy on this disk. ``written`` is what can be read; ``error`` is an ``ErrorCode`` name once something
    about it is known to be bad; ``verified``: its payload was read back, or written by this process, or sealed."""

    __slots__ = ("chunk", "created_ns", "error", "full", "path", "state", "verified", "verifying", "writing", "written")

    def __init__(
        self,
        chunk: int,
        state: ReplicaState,
        created_ns: int,
        written: Progress,
        *,
        path: str = "",
        verified: bool = True,
        error: str = "",
        writing: Writing | None = None,
    ) -> None:
        self.chunk = chunk
        self.state = state
        self.created_ns = created_ns
        self.written = written
        self.path = path or chunk_path(chunk)
        self.verified = verified
        self.verifying: trio.Event | None = None
        self.error = error
        # It was given up because the disk was full.
        self.full = False
        self.writing = writing

    def move(self, state: ReplicaState) -> None:
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"chunk {self.chunk:x} cannot go from {self.state.name} to {state.name}")
        self.state = state

    @property
    def stored_bytes(self) -> int:
        """What it takes up on the disk: the header, the index and the payload."""
        return HEADER_BYTES + self.written.entries * ENTRY_BYTES + self.written.stored_length

    def report(self) -> ReplicaReport:
        """As the metaserver wants it."""
        progress = self.written
        return ReplicaReport(
            self.chunk,
            progress.stored_length,
            progress.entries,
            progress.chain,
            self.state is ReplicaState.SEALED,
            self.error,
        )

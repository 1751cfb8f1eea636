"""A lane: batches go into one open chunk after another, in order, through three tasks.

``_feed`` forms batches and sends them, ``_receive`` takes the answers, ``_commit`` makes what was answered part of the
files; so appends go on while a commit is under way, and what has been answered meanwhile shares the next commit.

**Order.** A batch is in exactly one of ``_todo`` (formed, to be sent or sent again), ``_sent`` and ``_answered``, and
``_answered + _sent + _todo`` is the order in which the batches were formed. Layers of one file that went to different
lanes are committed in their order, too: a commit waits for the older layers of its files. No two lanes can wait for
each other, because each commits in the order of forming.

**Failure.** After an append that is not on all replicas, everything sent and not answered goes back to ``_todo`` and
into another chunk; the failed one is sealed at its committed length. Only when no chunk can be had for too long, the
bytes are given up, and each file says so.
"""

from collections import deque
from collections.abc import Iterator
from typing import Protocol

import structlog
import trio

from chunkserver.protocol import Peer
from dfsmount.batch import Batch, Item, Placed, blocker_of
from dfsmount.chunkwriter import Failure, OpenChunk
from dfsmount.dirty import LAYER_BYTES
from dfsmount.filestate import FileState
from dfsmount.jobs import Signal
from dfsmount.meta import Meta
from dfsmount.schedule import BATCH_BYTES, Schedule
from dfsmount.supply import PASSING, ChunkSupply
from metaserver import protocol
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import COMMIT_EXTENTS, ChunkProgress, Commit, Committed, FileCommit
from metaserver.tracing import TRACE

log = structlog.get_logger(__name__)

# Sent and not answered: eight appends of 1 MiB.
WINDOW_BYTES = 8 << 20
# With so many batches unanswered, a small one waits until it is no longer small: concurrent fsyncs share a sync.
SMALL_BATCHES = 2
SMALL_BYTES = 256 << 10
FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS = 0.05, 2.0
LONGEST_APPEND_SECONDS = 40.0
# Giving up takes at least so many attempts, however long each took.
LEAST_ATTEMPTS = 4
COMMIT_SECONDS = 30.0
SESSION_OVER = frozenset({ErrorCode.NOT_OWNER, ErrorCode.STALE_SESSION})
# What a program is told as it is; anything else is an input/output error to it.
TOLD = frozenset({ErrorCode.NO_SPACE, ErrorCode.FILE_TOO_BIG, ErrorCode.QUOTA_EXCEEDED})


class Owner(Protocol):
    """What a lane needs of the writer."""

    meta: Meta
    schedule: Schedule
    supply: ChunkSupply
    append_sent: Signal
    counters: Iterator[int]
    append_seconds: float
    give_up_seconds: float
    no_space_seconds: float

    def settled(self, file: FileState, cost: int) -> None: ...

    def spent(self, file: FileState, charge: int) -> None: ...

    def room_lost(self) -> None: ...

    def idle_chunk(self, length: int, blocks: int) -> OpenChunk | None: ...


class Lane:
    """One of the few streams of appends of a mount. ``owner`` (None: everyone's small files) has it to itself. It is
    for files of which ``copies`` are wanted; 0: as many as usual."""

    def __init__(self, number: int, writer: Owner, copies: int = 0) -> None:
        self.number = number
        self.copies = copies
        self.owner: FileState | None = None
        self.chunk: OpenChunk | None = None
        self.wake = Signal()
        self._writer = writer
        self._todo: deque[Batch] = deque()
        self._sent: deque[Batch] = deque()
        self._answered: deque[Batch] = deque()
        self._has_sent = Signal()
        self._has_answered = Signal()
        # Since when and how often in a row it has failed; both are reset by a success. ``_full_since``: for nothing but
        # lack of space at the chunkservers.
        self._failing_since: float | None = None
        self._failures = 0
        # Around waiting for the answer of the first batch that was sent.
        self._receiving = trio.CancelScope()
        self._full_since: float | None = None
        # How long an append may take: doubled by a time-out, until answers come quickly again. Disks that are slow
        # for everybody must not end one chunk after the other.
        self._append_seconds = writer.append_seconds

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._feed)
            nursery.start_soon(self._receive)
            nursery.start_soon(self._commit)

    @property
    def idle(self) -> bool:
        return not (self._todo or self._sent or self._answered)

    def abandon(self) -> None:
        """The session is over: forgets all batches (their files were told) and the chunk."""
        for batch in self._sent:
            if batch.sent is not None:
                batch.sent.abandon()
        for queue in (self._todo, self._sent, self._answered):
            queue.clear()
        self._receiving.cancel()
        self.chunk = None
        self.wake.set()

    def retire_chunk(self) -> None:
        if self.chunk is not None:
            chunk, self.chunk = self.chunk, None
            self._writer.supply.retire(chunk)
            self._writer.room_lost()

    # -- servers that hold it up -------------------------------------------------------------------------------

    @property
    def waits_since(self) -> float | None:
        """When the oldest append without an answer was sent."""
        return self._sent[0].sent.started if self._sent and self._sent[0].sent is not None else None

    def waits_for(self) -> Iterator[Peer]:
        """The servers of the chunks with appends that are not answered."""
        for batch in self._sent:
            if batch.chunk is not None:
                yield from batch.chunk.peers

    def do_without(self, mute: frozenset[int], error: DfsError) -> bool:
        """Ends the chunks that are on servers that do not answer; whether there were any."""
        ended = [batch.chunk for batch in self._sent if batch.chunk is not None and batch.chunk.ends_for(mute)]
        if ended:
            self._chunk_failed(ended[0], Failure(ended[0].ends_for(mute), error))
            self._receiving.cancel()
            self.wake.set()
        if self.chunk is not None and not self.chunk.failed and self.chunk.ends_for(mute):
            self.retire_chunk()
            return True
        return bool(ended)

    def leave(self, slow: frozenset[int]) -> None:
        """Goes on elsewhere if its chunk is on a slow server."""
        if self.chunk is not None and self.chunk.is_slowed_by(slow):
            log.warning("leaving a slow chunk", chunk=repr(self.chunk), slow=sorted(slow))
            self.retire_chunk()
            self.wake.set()

    # -- sending -----------------------------------------------------------------------------------------------

    async def _feed(self) -> None:
        while True:
            if not self._todo and self._may_send():
                self._form()
            if not self._todo or not self._may_send():
                await self.wake.wait()
                continue
            batch = self._todo[0]
            if self.chunk is None or not self._takes(self.chunk, batch):
                await self._change_chunk(batch)
            else:
                self._send(self._todo.popleft(), self.chunk)

    @staticmethod
    def _takes(chunk: OpenChunk, batch: Batch) -> bool:
        return chunk.fits(batch.length, batch.blocks) and trio.current_time() < chunk.until

    def _may_send(self) -> bool:
        if sum(batch.length for batch in self._sent) >= WINDOW_BYTES:
            return False
        return len(self._sent) < SMALL_BATCHES or self._writer.schedule.is_much(self.number, SMALL_BYTES)

    def _form(self) -> None:
        room = self.chunk.room if self.chunk is not None else 0
        chosen = self._writer.schedule.pick(self.number, room if room >= LAYER_BYTES else BATCH_BYTES)
        if chosen:
            self._todo.append(Batch(chosen))

    def _send(self, batch: Batch, chunk: OpenChunk) -> None:
        TRACE.set(batch.items[0].file.trace)
        batch.chunk, batch.at = chunk, chunk.length
        blocks = [block for item in batch.items for block in item.blocks]
        batch.sent = chunk.append(blocks, self._writer.counters, self._append_seconds)
        self._sent.append(batch)
        self._has_sent.set()
        self._writer.append_sent.set()
        # A chunk half full within seconds is part of a stream that will need the next one soon.
        if chunk.length > chunk.room and trio.current_time() < chunk.opened_at + 10 and not self.copies:
            self._writer.supply.stock_soon()

    async def _change_chunk(self, batch: Batch) -> None:
        """Gets another chunk; or gives up what is to be sent if there is none to be had for too long."""
        self.retire_chunk()
        now = trio.current_time()
        since = self._failing_since if self._failing_since is not None else now
        give_up_at = since + self._writer.give_up_seconds
        try:
            if self._failures >= LEAST_ATTEMPTS:
                self._lose_patience(now, give_up_at)
            if self._failures > 1:
                await trio.sleep(min(FIRST_PAUSE_SECONDS * 2**self._failures, LAST_PAUSE_SECONDS))
            chunk = await self._next_chunk(batch, give_up_at, since + self._writer.no_space_seconds)
        except DfsError as error:
            self._failing_since = since
            if not self._todo or self._todo[0] is not batch:
                # Meanwhile older ones have come back, which are to be sent first, or the session has ended.
                return
            if error.code is ErrorCode.NO_SPACE and len(batch.items) > 1:
                # There may be space for a part of it.
                self._todo.insert(1, batch.halve())
            else:
                self._give_up(error)
            return
        if self.idle and not self.copies:
            self._writer.supply.spares.append(chunk)
        else:
            self.chunk = chunk

    def _lose_patience(self, now: float, give_up_at: float) -> None:
        if self._full_since is not None and now > self._full_since + self._writer.no_space_seconds:
            raise DfsError(ErrorCode.NO_SPACE, "the chunkservers have become full")
        if now > give_up_at:
            raise DfsError(ErrorCode.UNAVAILABLE, "no chunkserver takes what is written")

    async def _next_chunk(self, batch: Batch, deadline: float, no_space_deadline: float) -> OpenChunk:
        try:
            return await self._writer.supply.take(batch.length, batch.blocks, deadline, no_space_deadline, self.copies)
        except DfsError as error:
            if error.code is ErrorCode.NO_SPACE and not self.copies:
                chunk = self._writer.idle_chunk(batch.length, batch.blocks)
                if chunk is not None:
                    return chunk
            raise

    def _give_up(self, error: DfsError) -> None:
        """All that is to be sent has failed as often as it may; what comes later gets one attempt each."""
        self._failures = min(self._failures, LEAST_ATTEMPTS - 1)
        while self._todo:
            batch = self._todo.popleft()
            log.error("written data is given up", lane=self.number, bytes=batch.length, error=str(error))
            self._drop(batch, error)

    def _drop(self, batch: Batch, error: DfsError) -> None:
        lost = _lost(error)
        for item in batch.items:
            self._settle(item, lost)

    # -- answers -----------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        while True:
            if not self._sent:
                await self._has_sent.wait()
                continue
            batch = self._sent[0]
            sent = batch.sent
            assert sent is not None
            assert batch.chunk is not None
            failure: Failure | None = None
            with trio.CancelScope() as self._receiving:
                failure = await sent.acknowledged()
            if batch.sent is not sent or not self._sent or self._sent[0] is not batch:
                # Its chunk has ended meanwhile, or the session.
                continue
            if failure is None:
                self._failing_since, self._full_since, self._failures = None, None, 0
                if trio.current_time() < sent.started + self._writer.append_seconds / 2:
                    self._append_seconds = self._writer.append_seconds
                self._answered.append(self._sent.popleft())
                self._has_answered.set()
            else:
                self._chunk_failed(batch.chunk, failure)
            self.wake.set()

    def _chunk_failed(self, chunk: OpenChunk, failure: Failure) -> None:
        """Everything sent and not answered is to be sent again, elsewhere, in the same order."""
        log.warning("chunk ended", chunk=repr(chunk), blamed=failure.servers, error=str(failure.error))
        chunk.failed = True
        chunk.blamed = failure.servers
        self._writer.supply.failed(chunk, failure, trio.current_time())
        if failure.error.code is ErrorCode.TIMEOUT:
            self._append_seconds = min(2 * self._append_seconds, LONGEST_APPEND_SECONDS)
        if self._failing_since is None:
            self._failing_since = trio.current_time()
        self._failures += 1
        if failure.error.code is not ErrorCode.DISK_FULL:
            self._full_since = None
        elif self._full_since is None:
            self._full_since = trio.current_time()
        if self.chunk is not chunk and not chunk.retired:
            self._writer.supply.retire(chunk)
        while self._sent:
            batch = self._sent.pop()
            if batch.sent is not None:
                batch.sent.abandon()
            self._leave_chunk(batch)
            self._todo.appendleft(batch)

    def _leave_chunk(self, batch: Batch) -> None:
        chunk, batch.chunk, batch.sent = batch.chunk, None, None
        if chunk is not None:
            chunk.uncommitted -= 1
            self._writer.supply.seal_if_done(chunk)

    # -- committing --------------------------------------------------------------------------------------------

    async def _commit(self) -> None:
        while True:
            if not self._answered:
                await self._has_answered.wait()
                continue
            group = self._group()
            blocker = blocker_of(group)
            if blocker is not None:
                await blocker.settled.park()
                continue
            await self._commit_group(group)

    async def _commit_group(self, group: list[Batch]) -> None:
        items = []
        for placed in (placed for batch in group for placed in batch.placed()):
            if placed[1].layer.doomed:
                self._settle(placed[1], None)
            else:
                items.append(placed)
        TRACE.set(group[0].items[0].file.trace)
        try:
            if items:
                self._committed(items, await self._ask(items))
        except DfsError as error:
            if error.code in PASSING or error.code in SESSION_OVER or len(items) == 1:
                self._refused(items, error)
            else:
                await self._commit_each(items)
        for batch in group:
            if self._answered and self._answered[0] is batch:
                self._answered.popleft()
                self._leave_chunk(batch)

    async def _commit_each(self, items: list[Placed]) -> None:
        """One of the files is refused: the others need not suffer."""
        for each in items:
            if each[1].layer.doomed:
                # By the one before it, just now.
                self._settle(each[1], None)
                continue
            try:
                self._committed([each], await self._ask([each]))
            except DfsError as error:
                self._refused([each], error)

    def _group(self) -> list[Batch]:
        """As many answered batches as one commit takes."""
        group: list[Batch] = []
        rows = 0
        for batch in self._answered:
            rows += batch.rows
            if group and rows > COMMIT_EXTENTS:
                break
            group.append(batch)
        return group

    @staticmethod
    def _message(items: list[Placed]) -> Commit:
        chunks: dict[int, ChunkProgress] = {}
        files: list[FileCommit] = []
        for batch, item, extents in items:
            assert batch.sent is not None
            chunks[batch.sent.progress.chunk] = batch.sent.progress
            layer = item.layer
            files.append(FileCommit(item.file.ino, layer.truncate_generation, layer.stop, layer.mtime_ns, extents))
        durable = any(item.file.fsyncs for _, item, _ in items)
        return Commit(tuple(chunks.values()), tuple(files), durable)

    async def _ask(self, items: list[Placed]) -> Committed:
        deadline = trio.current_time() + self._writer.give_up_seconds
        while True:
            try:
                # Made anew each time: times may have been set explicitly (utimens) since the last.
                return await self._writer.meta.call(protocol.COMMIT, self._message(items), timeout=COMMIT_SECONDS)
            except DfsError as error:
                # Asking again is safe: the same extents of the same chunk, and nothing later has been committed.
                if error.code not in PASSING or trio.current_time() >= deadline:
                    raise
                await trio.sleep(FIRST_PAUSE_SECONDS)

    def _committed(self, items: list[Placed], reply: Committed) -> None:
        gone = set(reply.gone)
        attributes = iter(reply.attributes)
        for batch, item, extents in items:
            file = item.file
            if file.ino in gone:
                self._settle(item, None)
                continue
            if batch.chunk is not None:
                file.places[batch.chunk.chunk] = batch.chunk.servers
            cost = item.layer.cost
            if file.committed(item.layer, next(attributes), extents):
                if item.layer.charge:
                    self._writer.spent(file, item.layer.charge)
                self._writer.settled(file, cost)

    def _refused(self, items: list[Placed], error: DfsError) -> None:
        """The metaserver does not take these bytes: they are lost."""
        log.error("commit refused", lane=self.number, files=len(items), error=str(error))
        lost = _lost(error)
        for _, item, _ in items:
            self._settle(item, lost)
        # It has not noted the progress either, so nothing more can be committed there.
        if self.chunk is not None and (error.code in SESSION_OVER or error.code in PASSING):
            self.chunk.failed = True

    def _settle(self, item: Item, error: DfsError | None) -> None:
        before = item.file.dirty.cost
        if item.file.dropped(item.layer, error):
            self._writer.settled(item.file, before - item.file.dirty.cost)


def _lost(error: DfsError) -> DfsError:
    """What the files are told."""
    code = ErrorCode.NO_SPACE if error.code is ErrorCode.DISK_FULL else error.code
    return DfsError(code if code in TOLD else ErrorCode.IO, f"written data was lost: {error.text}")

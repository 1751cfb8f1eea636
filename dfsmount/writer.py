"""Takes written bytes into memory and makes them part of files (docs/design.md section 7).

A refinement of 7.4: bytes leave memory when their commit is answered, not when it is durable. By then they are on
stable storage on every replica, because the last append of each batch carried ``sync``; only the commit, a few hundred
bytes, can still be lost with the tail of the metaserver's log, and ``MetaClient`` keeps and resends that.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import count

import structlog
import trio

from dfsmount.allowances import Allowances
from dfsmount.chunkwriter import OpenChunk, Requests
from dfsmount.dirty import LAYER_BYTES
from dfsmount.filestate import FileState
from dfsmount.jobs import Jobs, Signal
from dfsmount.lane import Lane
from dfsmount.lookout import Lookout
from dfsmount.meta import Meta
from dfsmount.schedule import Delays, Schedule
from dfsmount.supply import MAKESHIFT_SECONDS, ChunkSupply
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import FILE_SIZE_MAX
from metaserver.tracing import TRACE

log = structlog.get_logger(__name__)

# Written in order so far: from here on a file is a stream and gets a lane of its own while one is free.
STREAM_BYTES = 8 << 20
LANES = 4
# Time-outs are kept to within this.
TICK_SECONDS = 0.05


@dataclass(frozen=True)
class WriterOptions:
    """``max_dirty_bytes`` bounds what is in memory, in flight included. ``host`` is this host's name, so that the
    metaserver can place chunks near. ``idle_seconds``: an open chunk that nothing is written to is sealed, sooner
    (``short_idle_seconds``) when the cluster has little space left. ``no_space_seconds``: how long a full cluster is
    asked again before a program is told; ``refused_seconds``: so soon after that it is asked once only."""

    host: str = ""
    max_dirty_bytes: int = 128 << 20
    delays: Delays = field(default_factory=Delays)
    append_seconds: float = 5.0
    give_up_seconds: float = 30.0
    no_space_seconds: float = 2.0
    idle_seconds: float = 60.0
    short_idle_seconds: float = 2.0
    refused_seconds: float = 10.0


class Writer:
    """All dirty bytes of a mount. :meth:`run` must be running.

    Invariants: ``dirty_bytes`` is the sum of the costs of all layers of ``_files``; ``_files`` are those with layers.
    ``_credit`` is at most the room in open chunks less what is dirty and not sent.
    """

    def __init__(self, meta: Meta, pool: Requests, options: WriterOptions | None = None) -> None:
        self.options = options or WriterOptions()
        self.meta = meta
        self.dirty_bytes = 0
        self.schedule = Schedule(self.options.delays)
        self.counters: Iterator[int] = count(1)
        self.append_seconds = self.options.append_seconds
        self.give_up_seconds = self.options.give_up_seconds
        self.no_space_seconds = self.options.no_space_seconds
        self.supply = ChunkSupply(meta, pool, self.options.host)
        self.lookout = Lookout(self, pool)
        self.append_sent = self.lookout.sent
        self.lanes = [Lane(number, self) for number in range(LANES)]
        self._jobs = Jobs()
        self._files: dict[FileState, None] = {}
        self.allowances = Allowances(meta, lambda: self._files, self.flush, self._jobs)
        self._credit = 0
        self._refused_at = -math.inf
        self._reserving = trio.Lock()
        self._memory = trio.lowlevel.ParkingLot()
        self._timer = Signal()

    async def run(self) -> None:
        """Until cancelled; what is dirty then is lost, so :meth:`close` before."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.supply.run)
            nursery.start_soon(self._tick)
            nursery.start_soon(self.lookout.run)
            nursery.start_soon(self._jobs.run)
            for lane in self.lanes:
                nursery.start_soon(lane.run)

    # -- what vfs asks -----------------------------------------------------------------------------------------

    async def write(self, file: FileState, offset: int, data: bytes) -> None:
        """Takes ``data``, which must never change. Waits only for memory and for space in the cluster.

        Raises NO_SPACE, QUOTA_EXCEEDED, or UNAVAILABLE or TIMEOUT if the cluster cannot be asked, or why earlier bytes
        of the file were lost meanwhile; nothing, or a first part (as ``file.size`` shows if it grew) was then taken.
        Cancelling is as safe.
        """
        if offset + len(data) > FILE_SIZE_MAX:
            raise DfsError(ErrorCode.FILE_TOO_BIG)
        if len(data) <= LAYER_BYTES:
            await self._write(file, offset, data)
            return
        for start in range(0, len(data), LAYER_BYTES):
            await self._write(file, offset + start, data[start : start + LAYER_BYTES])

    def take(self, file: FileState, offset: int, data: bytes) -> bool:
        """:meth:`write` if there is nothing to wait for; False: nothing was taken."""
        length = len(data)
        if length > LAYER_BYTES or length > self._credit or offset + length > FILE_SIZE_MAX:
            return False
        if self.dirty_bytes + length > self.options.max_dirty_bytes and self.dirty_bytes:
            return False
        if file.quota and not self.allowances.take(file, length):
            return False
        self._accept(file, offset, data, length if file.quota else 0)
        return True

    async def flush(self, file: FileState, *, durable: bool = False) -> None:
        """Returns when everything dirty at the call is part of the file at the metaserver, or lost: then ``file.error``
        says why and ``file.error_count`` has grown. Cancelling is safe.

        ``durable``: the caller will ask the metaserver to make it durable (``MetaClient.sync``). The commits then do so
        at once, which saves that exchange: of the three in a row that an fsync took it was the cheapest, but a quarter
        of the CPU time of mount and metaserver.
        """
        target = file.dirty.close()
        if not file.dirty:
            return
        # What is sent now is sent on behalf of whoever waits for it.
        file.trace = TRACE.get()
        file.fsyncs += durable
        try:
            self.schedule.want(file)
            self._wake(file)
            while file.dirty.oldest <= target:
                await file.settled.park()
        finally:
            file.fsyncs -= durable

    def flush_soon(self, file: FileState) -> None:
        """The file was closed: sends it within moments, together with others."""
        if self.schedule.closed(file, trio.current_time()):
            self._wake_all()

    async def truncate_local(self, file: FileState, size: int) -> None:
        """Before a truncate is sent: what is dirty is committed first, so that a crash never leaves the truncate and
        not what was written before it (promise P3). Only if all of it lies past ``size`` it is dropped instead.

        Raises why bytes are lost that should have been committed; then nothing has changed.
        ``file.size`` is ``size`` when it returns; ``file.refresh`` with the metaserver's answer ends it (or with fresh
        attributes, if the truncate failed). Cancelling before it returns changes nothing.
        """
        if file.dirty.start < size:
            failures = file.error_count
            await self.flush(file)
            error = file.error_since(failures)
            if error is not None:
                raise error
        file.held += 1
        try:
            while file.dirty.in_flight:
                await file.settled.park()
            before = file.dirty.cost
            file.begin_truncate(size)
            self._released(file, before - file.dirty.cost)
        finally:
            file.held -= 1
            self._wake(file)

    def discard(self, file: FileState) -> None:
        """The file has no name and no descriptor left: what is not yet on its way need not be sent."""
        before = file.dirty.cost
        file.discard()
        self.schedule.forget(file)
        self._released(file, before - file.dirty.cost)

    async def flush_all(self) -> None:
        """:meth:`flush` for every file that is dirty at the call."""
        self.schedule.want_all()
        self._wake_all()
        for file in [*self._files]:
            await self.flush(file)

    async def close(self) -> None:
        """:meth:`flush_all`, and seals what is open; for unmounting."""
        await self.flush_all()
        for lane in self.lanes:
            lane.retire_chunk()
        self.supply.retire_spares()
        await self.supply.all_sealed()

    def retire(self, chunks: Collection[int]) -> None:
        """Writes no more to these chunks; each is sealed once what was written there is committed."""
        for lane in self.lanes:
            if lane.chunk is not None and lane.chunk.chunk in chunks:
                log.info("ending a chunk that is to be repaired", chunk=repr(lane.chunk))
                lane.retire_chunk()

    def forget_quotas(self) -> None:
        """What is held under quotas is to be asked for again."""
        self.allowances.forget()

    def abandon_all(self, error: DfsError) -> None:
        """The session is lost and its chunks with it: all dirty bytes fail with ``error``."""
        for lane in self.lanes:
            lane.abandon()
        self.supply.new_session()
        self.allowances.forget()
        for file in [*self._files]:
            self.schedule.forget(file)
            file.abandon(error)
            file.lane = 0
        for lane in self.lanes:
            lane.owner = None
        self._files.clear()
        self.dirty_bytes = 0
        self._credit = 0
        self._memory.unpark_all()

    # -- accepting ---------------------------------------------------------------------------------------------

    async def _write(self, file: FileState, offset: int, data: bytes) -> None:
        failures = file.error_count
        while self.dirty_bytes + len(data) > self.options.max_dirty_bytes and self.dirty_bytes:
            self.schedule.want_all()
            self._wake_all()
            await self._memory.park()
        if len(data) > self._credit:
            await self._reserve(len(data))
        charge = await self.allowances.admit(file, offset, len(data)) if file.quota else 0
        lost = file.error_since(failures)
        if lost is not None:
            # Otherwise these bytes would come behind a hole, and be kept (P3).
            raise lost
        self._accept(file, offset, data, charge)

    def _accept(self, file: FileState, offset: int, data: bytes, charge: int) -> None:
        if not data:
            return
        self._credit -= len(data)
        before = file.dirty.cost
        full = file.write(offset, data, self.meta.now_ns())
        if charge:
            file.dirty.charge(charge)
        self.dirty_bytes += file.dirty.cost - before
        self._files[file] = None
        if not before and file.attributes.copies and file.attributes.copies != self.meta.copies:
            self._give_lane_of_copies(file)
        if full and file.lane == 0 and file.streamed >= STREAM_BYTES:
            self._give_lane(file)
        if self.schedule.written(file, trio.current_time(), full=full):
            self._timer.set()
            if full:
                self._wake(file)

    def _give_lane(self, file: FileState) -> None:
        for lane in self.lanes[1:LANES]:
            if lane.owner is None and lane.idle:
                lane.owner, file.lane = file, lane.number
                return

    def _give_lane_of_copies(self, file: FileState) -> None:
        """A lane for files of which another number of copies is wanted: they share chunks with their like only. Such
        files are few; what is reserved for usual chunks stands for their bytes, too."""
        copies = file.attributes.copies
        lane = next((lane for lane in self.lanes if lane.copies == copies), None)
        if lane is None:
            lane = Lane(len(self.lanes), self, copies)
            self.lanes.append(lane)
            self._jobs.start(lane.run)
        file.lane = lane.number

    async def _reserve(self, length: int) -> None:
        """Returns when open chunks have room for all that is dirty and ``length`` bytes more."""
        async with self._reserving:
            while not self._has_credit(length):
                await self._add_room(length)

    def _has_credit(self, length: int) -> bool:
        if self._credit < length:
            self._credit = self._room() - sum(file.dirty.unsent for file in self._files)
        return self._credit >= length

    async def _add_room(self, length: int) -> None:
        """Another chunk that takes ``length`` bytes; NO_SPACE if there is none, or none that is of any use."""
        now = trio.current_time()
        soon_after = now < self._refused_at + self.options.refused_seconds
        patience = 0.0 if soon_after else self.no_space_seconds
        try:
            chunk = await self.supply.stock(length, now + self.give_up_seconds, now + patience)
            if self._room() <= self._room(without=chunk):
                # It is so small that what is dirty already could not be sure to fit.
                self.supply.spares.remove(chunk)
                self.supply.retire(chunk)
                raise DfsError(ErrorCode.NO_SPACE, "the chunkservers are full")
        except DfsError as error:
            if error.code is ErrorCode.NO_SPACE:
                self._refused_at = trio.current_time()
            raise

    def _room(self, *, without: OpenChunk | None = None) -> int:
        """Bytes that surely fit into the open chunks, however they are divided into layers: of each chunk but the last
        the end may be too small for another layer."""
        lanes = [lane.chunk for lane in self.lanes if lane.chunk is not None and not lane.copies]
        chunks = [*self.supply.spares, *lanes]
        rooms = [chunk.room for chunk in chunks if chunk is not without]
        large = [room - LAYER_BYTES for room in rooms if room >= LAYER_BYTES]
        return sum(large) + LAYER_BYTES if large else max(rooms, default=0)

    # -- what lanes tell -----------------------------------------------------------------------------------------

    def room_lost(self) -> None:
        """A chunk that was counted on takes nothing more."""
        self._credit = 0

    def spent(self, file: FileState, charge: int) -> None:
        """A layer is committed for which so many bytes were held under a quota."""
        self.allowances.spent(file.quota, charge)

    def settled(self, file: FileState, cost: int) -> None:
        """Layers of ``file`` that took ``cost`` bytes are committed or given up."""
        self._released(file, cost)

    def idle_chunk(self, length: int, blocks: int) -> OpenChunk | None:
        """A chunk with that much room from a lane that does nothing."""
        for lane in self.lanes:
            if lane.chunk is not None and lane.idle and not lane.copies and lane.chunk.fits(length, blocks):
                chunk, lane.chunk = lane.chunk, None
                return chunk
        return None

    def _released(self, file: FileState, cost: int) -> None:
        self.dirty_bytes -= cost
        if not file.dirty:
            self._files.pop(file, None)
            self.schedule.forget(file)
            if file.lane:
                self.lanes[file.lane].owner = None
                file.lane = 0
        if self._memory and cost:
            self._memory.unpark_all()

    # -- time ----------------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        """Makes ready what has waited long enough, and seals chunks that nothing is written to."""
        checked = trio.current_time()
        while True:
            if self.schedule.waits:
                await trio.sleep(TICK_SECONDS)
            else:
                # Often enough to hear that space has become short.
                with trio.move_on_after(self.options.short_idle_seconds):
                    await self._timer.wait()
            now = trio.current_time()
            if self.schedule.expire(now):
                self._wake_all()
            self.allowances.give_back(now)
            if now >= checked + min(self._idle_seconds, MAKESHIFT_SECONDS):
                self._retire_idle(now)
                checked = now

    @property
    def _idle_seconds(self) -> float:
        """After so long without anything written to it a chunk is given back."""
        return min(self.options.idle_seconds, self.options.short_idle_seconds if self.supply.short else math.inf)

    def _retire_idle(self, now: float) -> None:
        before = now - self._idle_seconds
        for lane in self.lanes:
            if lane.idle and lane.chunk is not None and (lane.chunk.used_at <= before or lane.chunk.until <= now):
                lane.retire_chunk()
        if not self._files:
            for chunk in [chunk for chunk in self.supply.spares if chunk.opened_at <= before]:
                self.supply.spares.remove(chunk)
                self.supply.retire(chunk)
            self._credit = 0

    def _wake(self, file: FileState) -> None:
        self.lanes[file.lane].wake.set()

    def _wake_all(self) -> None:
        for lane in self.lanes:
            lane.wake.set()

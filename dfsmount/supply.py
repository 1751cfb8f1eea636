"""Chunks to write into: allocated ahead, given back (sealed) when full, failed or idle."""

import math
from collections import deque
from uuid import UUID

import structlog
import trio

from dfsmount.avoided import Avoided
from dfsmount.chunkwriter import Failure, OpenChunk, Requests
from dfsmount.dirty import LAYER_BYTES
from dfsmount.jobs import Jobs
from dfsmount.judge import SILENT_SECONDS
from dfsmount.meta import Meta
from metaserver import protocol
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import CHUNK_CAPACITY, Allocate, Seal

log = structlog.get_logger(__name__)

# A chunk on fewer servers than wanted, or on slow ones, is written to for so long: only then can it be copied, or are
# others looked for. Twice as long each time there are still none; but what is written has a copy less until then, also
# when the servers are back.
MAKESHIFT_SECONDS, LONGEST_MAKESHIFT_SECONDS = 10.0, 80.0
RETRY_FIRST_SECONDS, RETRY_LAST_SECONDS = 0.05, 1.0
CALL_SECONDS = 10.0
# So long after the cluster had not enough space for a whole chunk, chunks are not kept for later.
SHORT_SECONDS = 30.0
# Worth asking again: the cluster may come back.
PASSING = frozenset({ErrorCode.UNAVAILABLE, ErrorCode.TIMEOUT, ErrorCode.CANCELLED})


class ChunkSupply:
    """Allocates and seals chunks of one session.

    ``spares`` are allocated and unused. ``life`` counts sessions: what an earlier one allocated is not used.
    """

    def __init__(self, meta: Meta, pool: Requests, host: str) -> None:
        self.spares: deque[OpenChunk] = deque()
        self.life = 0
        self._meta = meta
        self._pool = pool
        self._host = host
        self._jobs = Jobs()
        self._avoided = Avoided()
        self._slow = Avoided()
        self._makeshift_seconds = MAKESHIFT_SECONDS
        self._short_until = -math.inf
        self._stocking = trio.Lock()
        self._sealing = 0
        self._closing = False
        self._sealed = trio.lowlevel.ParkingLot()

    async def run(self) -> None:
        """Until cancelled."""
        await self._jobs.run()

    def failed(self, chunk: OpenChunk, failure: Failure, now: float) -> None:
        """An append to ``chunk`` failed."""
        # A time-out with nobody to blame: any of them may be the slow one.
        self._avoided.avoid(failure.servers or chunk.servers, now)
        if failure.reported and failure.error.code in PASSING:
            # It may well answer us.
            self.never(frozenset(failure.servers), now)
        for peer in chunk.peers:
            if peer.server in failure.servers:
                self._pool.pulse.watch(peer)

    def _is_silent(self, server: int) -> bool:
        """Whether it has failed us, and does not answer since."""
        reading = self._pool.pulse.reading(server)
        return reading is not None and (reading.refuses or reading.silent_seconds >= SILENT_SECONDS)

    def never(self, servers: frozenset[int], now: float) -> None:
        """These servers do not answer."""
        self._avoided.never(servers, now)
        for chunk in [chunk for chunk in self.spares if chunk.ends_for(servers)]:
            self.spares.remove(chunk)
            self.retire(chunk)

    def avoid(self, servers: frozenset[int], now: float) -> None:
        """These servers are slow."""
        self._slow.avoid(servers, now)
        for chunk in [chunk for chunk in self.spares if chunk.is_slowed_by(servers)]:
            self.spares.remove(chunk)
            self.retire(chunk)

    async def take(
        self, length: int, blocks: int, deadline: float, no_space_deadline: float, copies: int = 0
    ) -> OpenChunk:
        """A chunk for ``copies`` (0: as many as usual) that takes ``length`` bytes in ``blocks``: a spare, or a new one
        as from :meth:`fresh`."""
        for chunk in self.spares:
            if not copies and chunk.fits(length, blocks):
                self.spares.remove(chunk)
                return chunk
        return await self.fresh(length, deadline, no_space_deadline, copies)

    async def stock(self, needed: int, deadline: float, no_space_deadline: float) -> OpenChunk:
        """Adds one spare that takes ``needed`` bytes; retries and raises as :meth:`fresh`. Cancelling is safe."""
        async with self._stocking:
            chunk = await self.fresh(needed, deadline, no_space_deadline)
            self.spares.append(chunk)
            return chunk

    def stock_soon(self) -> None:
        """Has one spare ready, if it can be had."""
        if not self.spares and not self._stocking.locked():
            self._jobs.start(self._stock_one)

    async def _stock_one(self) -> None:
        try:
            await self.stock(LAYER_BYTES, trio.current_time(), trio.current_time())
        except DfsError as error:
            log.info("no spare chunk", error=str(error))

    async def fresh(self, needed: int, deadline: float, no_space_deadline: float, copies: int = 0) -> OpenChunk:
        """A new chunk that takes ``needed`` bytes. Cluster trouble is retried until ``deadline`` (at least once), a
        full cluster until ``no_space_deadline``; then raises what was the matter."""
        delay = RETRY_FIRST_SECONDS
        while True:
            try:
                return await self._allocate(needed, copies)
            except DfsError as error:
                until = no_space_deadline if error.code is ErrorCode.NO_SPACE else deadline
                if error.code not in PASSING and error.code is not ErrorCode.NO_SPACE:
                    until = -math.inf
                if trio.current_time() + delay > until:
                    raise
                log.info("no chunk to write to yet", error=str(error))
            await trio.sleep(delay)
            delay = min(2 * delay, RETRY_LAST_SECONDS)

    async def _allocate(self, needed: int, copies: int = 0) -> OpenChunk:
        life = self.life
        now = trio.current_time()
        slow = self._slow.to_avoid(now)
        avoid = self._avoided.to_avoid(now) | slow
        never = self._avoided.to_leave_out(now) | frozenset(filter(self._is_silent, avoid))
        request = Allocate(self._host, tuple(avoid), copies, tuple(never), needed)
        try:
            allocated = await self._meta.call(protocol.ALLOCATE, request, timeout=CALL_SECONDS)
        except DfsError as error:
            if error.code is ErrorCode.NO_SPACE:
                self._short_until = now + SHORT_SECONDS
            raise
        if allocated.limit < CHUNK_CAPACITY:
            self._short_until = now + SHORT_SECONDS
        if life != self.life:
            raise DfsError(ErrorCode.UNAVAILABLE, "the session has changed")
        chunk = OpenChunk(allocated, UUID(self._meta.cluster_id), self._meta.session, self._pool)
        chunk.tolerates(slow, never)
        if not chunk.makeshift:
            self._makeshift_seconds = MAKESHIFT_SECONDS
        else:
            chunk.until = now + self._makeshift_seconds
            self._makeshift_seconds = min(2 * self._makeshift_seconds, LONGEST_MAKESHIFT_SECONDS)
        return chunk

    @property
    def short(self) -> bool:
        """Whether there is so little space that chunks should not be kept for later."""
        return self._meta.space_short or trio.current_time() < self._short_until

    # -- giving back -------------------------------------------------------------------------------------------

    def retire(self, chunk: OpenChunk) -> None:
        """Nothing more will be appended: seal it as soon as nothing of it is uncommitted."""
        chunk.retired = True
        self.seal_if_done(chunk)

    def seal_if_done(self, chunk: OpenChunk) -> None:
        if chunk.retired and not chunk.uncommitted and chunk.session == self._meta.session:
            chunk.session = 0
            self._sealing += 1
            self._jobs.start(self._seal, chunk)

    async def _seal(self, chunk: OpenChunk) -> None:
        life, delay = self.life, RETRY_FIRST_SECONDS
        try:
            while not await self._try_to_seal(chunk) and life == self.life and not self._closing:
                await trio.sleep(delay)
                delay = min(2 * delay, RETRY_LAST_SECONDS)
        finally:
            self._sealing -= 1
            if not self._sealing:
                self._sealed.unpark_all()

    async def _try_to_seal(self, chunk: OpenChunk) -> bool:
        """False if it is worth another attempt: until the session ends, nobody else would seal the chunk, and only a
        sealed one can be repaired."""
        try:
            await self._meta.call(protocol.SEAL, Seal(chunk.chunk, chunk.blamed), timeout=CALL_SECONDS)
        except DfsError as error:
            log.warning("could not seal a chunk", chunk=f"{chunk.chunk:x}", error=str(error))
            return error.code not in PASSING
        return True

    async def all_sealed(self) -> None:
        """Returns when no seal is on its way; for the end of the session, with which the metaserver seals the rest."""
        self._closing = True
        while self._sealing:
            await self._sealed.park()

    def retire_spares(self) -> None:
        while self.spares:
            self.retire(self.spares.popleft())

    def new_session(self) -> None:
        """What was allocated belongs to a session that is over."""
        self.life += 1
        self.spares.clear()

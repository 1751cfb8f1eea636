"""Reads files: what is dirty here over what the map says, from the cache or from a replica (docs/design.md section 8).

Between the moment a read looks at the dirty layers and the map (one synchronous step) and the moment it has the bytes,
everything may change: but chunks are immutable, so it returns what the file was at that moment.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import structlog
import trio

from dfsmount.cache import BlockCache, Run
from dfsmount.dirty import Span
from dfsmount.extents import Piece
from dfsmount.fetch import Fetcher, Pool
from dfsmount.filestate import FileState
from dfsmount.jobs import Jobs
from dfsmount.meta import Meta
from dfsmount.readahead import Neighbours, ReadAhead
from dfsmount.readlog import Attempted, ReadLog
from metaserver import protocol
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import FILE_SIZE_MAX, GetExtents, Locate
from metaserver.wire import Buffer

log = structlog.get_logger(__name__)

# Files up to this size are read with their neighbours.
SMALL_FILE_BYTES = 64 << 10
# Pieces of one chunk that lie no farther apart are fetched in one request.
NEAR_BYTES = 16 << 10
RETRY_FIRST_SECONDS, RETRY_LAST_SECONDS = 0.05, 1.0
# How often the map may change while it is being fetched.
MAP_ATTEMPTS = 20
# Another try may help: a server may come back, a chunk may have moved.
PASSING = frozenset({ErrorCode.UNAVAILABLE, ErrorCode.TIMEOUT, ErrorCode.CANCELLED, ErrorCode.NO_SUCH_CHUNK})

Plan = list[Piece | Span]


@dataclass(frozen=True)
class ReaderOptions:
    """``give_up_seconds``: how long replicas that do not answer are asked again before a read fails. ``own_names``:
    the hosts of chunkservers that are asked first, because they are this one."""

    give_up_seconds: float = 20.0
    own_names: frozenset[str] = frozenset()


class Reader:
    """All reading of a mount. :meth:`run` must be running."""

    def __init__(self, meta: Meta, pool: Pool, cache: BlockCache, options: ReaderOptions | None = None) -> None:
        self.options = options or ReaderOptions()
        self.cache = cache
        self.log = ReadLog()
        self.fetcher = Fetcher(meta, pool, cache, self.options.own_names)
        self._meta = meta
        self._jobs = Jobs()
        self._neighbours = Neighbours(min(cache.limit_bytes // 8, 4 << 20))

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.fetcher.run)
            nursery.start_soon(self._jobs.run)

    async def read(self, file: FileState, handle: ReadAhead | None, offset: int, length: int) -> bytes:
        """At most ``length`` bytes from ``offset``: up to the end of the file, holes as zeros.

        Raises IO if no replica has the right bytes, TIMEOUT or UNAVAILABLE if the map cannot be had. Does not wait if
        everything is in memory. Cancelling is safe.
        """
        stop = min(offset + length, file.size)
        if offset >= stop:
            return b""
        if file.extents.known_until(offset) < stop and not _all_dirty(file, offset, stop):
            await self._know_map(file, offset, stop)
            stop = min(stop, file.size)
            if offset >= stop:
                return b""
        plan = _plan(file, offset, stop)
        if handle is not None:
            self._look_ahead(file, handle, plan, offset, stop)
        if len(plan) == 1:
            data = self._at_once(plan[0])
            if data is not None:
                return data
        begun = trio.current_time()
        history: list[Attempted] = []
        error = "not in time"
        try:
            with trio.move_on_after(self.options.give_up_seconds):
                data = await self._read(file, plan, offset, stop, history)
                error = ""
                return data
        except DfsError as problem:
            error = str(problem)
            raise
        finally:
            self.log.note(file.ino, offset, stop - offset, begun, history, error)
        raise DfsError(ErrorCode.TIMEOUT, f"inode {file.ino} could not be read at {offset} in time")

    def _at_once(self, part: Piece | Span) -> bytes | None:
        """A read that is one piece of what is in memory."""
        if isinstance(part, Span):
            return bytes(part.data)
        if part.chunk == 0:
            return bytes(part.length)
        run = self.cache.find(part.chunk, part.chunk_offset)
        if run is None or run.stop < part.chunk_offset + part.length:
            return None
        return bytes(_slice(run, part.chunk_offset, part.chunk_offset + part.length))

    async def _read(self, file: FileState, plan: Plan, offset: int, stop: int, history: list[Attempted]) -> bytes:
        deadline = trio.current_time() + self.options.give_up_seconds
        delay = RETRY_FIRST_SECONDS
        attempts = 0
        while True:
            try:
                return b"".join(await self._parts(file, plan, history))
            except DfsError as error:
                attempts += 1
                hopeless = error.code not in PASSING and attempts > 1
                if hopeless or trio.current_time() + delay > deadline:
                    log.error("read failed", ino=file.ino, offset=offset, error=str(error))
                    raise DfsError(ErrorCode.IO, f"no good replica of inode {file.ino} at {offset}: {error}") from error
            if attempts > 1:
                await trio.sleep(delay)
                delay = min(2 * delay, RETRY_LAST_SECONDS)
            # The chunk may have moved.
            file.forget_map()
            await self._know_map(file, offset, stop)
            stop = min(stop, file.size)
            plan = _plan(file, offset, stop) if offset < stop else []

    async def _parts(self, file: FileState, plan: Plan, history: list[Attempted]) -> list[Buffer]:
        missing = [part for part in plan if isinstance(part, Piece) and part.chunk]
        if len(missing) > 1:
            for chunk, start, stop in _requests(missing):
                servers = await self._places(file, chunk)
                self.fetcher.start_missing(chunk, start, stop, servers, speculative=False)
        parts: list[Buffer] = []
        for part in plan:
            if isinstance(part, Span):
                parts.append(part.data)
            elif part.chunk == 0:
                parts.append(bytes(part.length))
            else:
                await self._piece(file, part, parts, history)
        return parts

    async def _piece(self, file: FileState, piece: Piece, parts: list[Buffer], history: list[Attempted]) -> None:
        at, stop = piece.chunk_offset, piece.chunk_offset + piece.length
        while at < stop:
            run = self.cache.find(piece.chunk, at)
            if run is None:
                servers = await self._places(file, piece.chunk)
                run = await self.fetcher.get(piece.chunk, at, stop, servers, history)
            end = min(run.stop, stop)
            parts.append(_slice(run, at, end))
            at = end

    # -- maps and places ---------------------------------------------------------------------------------------

    async def _know_map(self, file: FileState, start: int, stop: int) -> None:
        """Fetches what is not known of the map of [start, stop)."""
        for _ in range(MAP_ATTEMPTS):
            version = file.attributes.data_version
            known = file.extents.known_until(start)
            while known < stop:
                request = GetExtents(file.ino, known, FILE_SIZE_MAX - known)
                page = await self._meta.call(protocol.GET_EXTENTS, request, timeout=self.options.give_up_seconds)
                if page.end <= known:
                    raise DfsError(ErrorCode.IO, f"the map of inode {file.ino} cannot be read at {known}")
                if not file.learn_page(page, known, version):
                    break
                known = file.extents.known_until(start)
            else:
                return
        raise DfsError(ErrorCode.TIMEOUT, f"the map of inode {file.ino} keeps changing")

    async def _places(self, file: FileState, chunk: int) -> Sequence[int]:
        servers = file.places.get(chunk)
        if servers is None:
            located = await self._meta.call(protocol.LOCATE, Locate((chunk,)), timeout=self.options.give_up_seconds)
            servers = next((place.servers for place in located.places if place.chunk == chunk), ())
            file.places[chunk] = servers
        return servers

    # -- ahead ---------------------------------------------------------------------------------------------------

    def _look_ahead(self, file: FileState, handle: ReadAhead, plan: Plan, offset: int, stop: int) -> None:
        if file.size <= SMALL_FILE_BYTES:
            if offset == 0 and stop == file.size and len(plan) == 1 and isinstance(plan[0], Piece) and plan[0].chunk:
                self._fetch_neighbours(file, plan[0])
            return
        start, end = handle.advance(offset, stop - offset)
        end = min(end, file.attributes.size, start + self.cache.limit_bytes // 4)
        if start < end and self.fetcher.in_flight_bytes <= self.cache.limit_bytes // 2:
            self._jobs.start(self._fetch_ahead, file, start, end)

    def _fetch_neighbours(self, file: FileState, piece: Piece) -> None:
        start, end = self._neighbours.advance(piece.chunk, piece.chunk_offset, piece.length)
        servers = file.places.get(piece.chunk)
        if start < end and servers is not None:
            if start <= piece.chunk_offset + piece.length:
                # One request brings this file and those after it.
                start = piece.chunk_offset
            self.fetcher.start_missing(piece.chunk, start, end, servers, speculative=True)

    async def _fetch_ahead(self, file: FileState, start: int, stop: int) -> None:
        try:
            await self._know_map(file, start, stop)
            for piece in file.extents.pieces(start, stop):
                if piece.chunk:
                    end = piece.chunk_offset + piece.length
                    servers = await self._places(file, piece.chunk)
                    self.fetcher.start_missing(piece.chunk, piece.chunk_offset, end, servers, speculative=True)
        except DfsError as error:
            # Whoever needs these bytes will ask again, and be told.
            log.info("read-ahead failed", ino=file.ino, error=str(error))


def _all_dirty(file: FileState, start: int, stop: int) -> bool:
    spans = file.dirty.overlay(start, stop) if file.dirty else ()
    return sum(len(span.data) for span in spans) == stop - start


def _plan(file: FileState, start: int, stop: int) -> Plan:
    """Where all of [start, stop) is, in order. Synchronous: one moment of the file."""
    if not file.dirty:
        return [*file.extents.pieces(start, stop)]
    plan: Plan = []
    for span in file.dirty.overlay(start, stop):
        plan.extend(file.extents.pieces(start, span.offset))
        plan.append(span)
        start = span.offset + len(span.data)
    plan.extend(file.extents.pieces(start, stop))
    return plan


def _requests(pieces: Sequence[Piece]) -> list[tuple[int, int, int]]:
    """Ranges of chunks that cover the pieces, those near each other joined."""
    ranges: list[tuple[int, int, int]] = []
    for chunk, start, stop in sorted((p.chunk, p.chunk_offset, p.chunk_offset + p.length) for p in pieces):
        if ranges and ranges[-1][0] == chunk and start <= ranges[-1][2] + NEAR_BYTES:
            ranges[-1] = (chunk, ranges[-1][1], max(stop, ranges[-1][2]))
        else:
            ranges.append((chunk, start, stop))
    return ranges


def _slice(run: Run, start: int, stop: int) -> memoryview:
    return memoryview(run.data)[start - run.start : stop - run.start]

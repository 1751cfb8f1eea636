"""Brings ranges of chunks here: each byte once, from the best replica, verified, from a second one if that is slow.

A fetch is shared by everyone who wants bytes of its range and belongs to none of them: cancelling a reader does not
disturb the others. Every attempt at a replica is a task with a deadline; the first that brings verified bytes wins.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import structlog
import trio

from chunkserver.chunkfile import Entry
from chunkserver.client import Blocks
from chunkserver.protocol import Peer
from chunkserver.pulse import Pulse
from dfsmount.cache import BlockCache, Run
from dfsmount.jobs import Jobs
from dfsmount.meta import Meta
from dfsmount.pace import HEDGE_LEAST_SECONDS, Pace
from dfsmount.readlog import Attempted
from metaserver import protocol
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import ReportReplica, ServerState

log = structlog.get_logger(__name__)

# One request: long enough that its cost does not matter (0.4 ms), short enough to come quickly.
FETCH_BYTES = 1 << 20
ATTEMPT_SECONDS = 5.0
# How long a replica that gave wrong bytes, or none, is asked last.
SHUN_SECONDS = 60.0
# How long a server that did not answer in time is asked last; by then its pulse tells more.
LATE_SECONDS = 1.0
REPORT_SECONDS = 10.0
_WORKING = frozenset({ServerState.UP, ServerState.DRAINING})
# A replica that failed like this may well have the next block.
DAMAGE = frozenset({ErrorCode.BAD_CHECKSUM, ErrorCode.IO, ErrorCode.REPLICA_FAILED})


class Pool(Protocol):
    """What is needed of ``chunkserver.client.Pool``; ``read`` gives verified blocks, the first contains ``offset``."""

    async def read(self, peer: Peer, chunk: int, offset: int, length: int, *, timeout: float = ...) -> Blocks: ...

    def is_suspect(self, peer: Peer) -> bool: ...

    pulse: Pulse


class Attempt(NamedTuple):
    """A server that was asked, when, how to stop waiting for it, and whether another was asked before."""

    server: int
    started: float
    scope: trio.CancelScope
    hedge: bool


class Fetch:
    """One range of a chunk on its way. When ``done``, ``run`` is what came, or ``error`` why nothing did.

    ``candidates`` are the servers not asked yet, ``attempts`` those under way, ``history`` those that ended.
    ``damaged``: some replica has not all of the range.
    """

    __slots__ = (
        "attempts",
        "candidates",
        "chunk",
        "damaged",
        "done",
        "error",
        "hedge_at",
        "history",
        "run",
        "speculative",
        "start",
        "stop",
    )

    def __init__(self, chunk: int, start: int, stop: int, speculative: bool) -> None:
        self.chunk = chunk
        self.start = start
        self.stop = stop
        self.speculative = speculative
        self.candidates: deque[int] = deque()
        self.attempts: list[Attempt] = []
        self.history: list[Attempted] = []
        self.hedge_at = 0.0
        self.damaged = False
        self.done = trio.Event()
        self.run: Run | None = None
        self.error: DfsError | None = None


class Fetcher:
    """All fetches of a mount; what they bring goes into ``cache``. :meth:`run` must be running.

    Invariant: ``_flights`` holds exactly the fetches that are not done.
    """

    def __init__(self, meta: Meta, pool: Pool, cache: BlockCache, own_names: frozenset[str] = frozenset()) -> None:
        self.cache = cache
        self.in_flight_bytes = 0
        self.requests = 0
        self.hedges = 0
        self.failures = 0
        self._meta = meta
        self._pool = pool
        self._own_names = own_names
        self._jobs = Jobs()
        self._pace = Pace()
        self._flights: dict[int, list[Fetch]] = {}
        self._watched: list[Fetch] = []
        self._watch_more = trio.Event()
        self._shunned: dict[tuple[int, int], float] = {}
        self._late: dict[int, float] = {}

    async def run(self) -> None:
        self._jobs.start(self._hedge)
        await self._jobs.run()

    async def get(
        self, chunk: int, start: int, stop: int, servers: Sequence[int], history: list[Attempted] | None = None
    ) -> Run:
        """Verified bytes that contain chunk offset ``start``, perhaps fewer or more than up to ``stop``. What was asked
        of whom for that is added to ``history``.

        Raises why no replica could give them. Cancelling is safe.
        """
        while True:
            run = self.cache.find(chunk, start)
            if run is not None:
                return run
            fetch = self._flying(chunk, start)
            own = fetch is None
            if fetch is None:
                fetch = self.start(chunk, start, min(stop, start + FETCH_BYTES), servers)
            await fetch.done.wait()
            if history is not None:
                history += fetch.history
            if own and fetch.run is None and fetch.damaged:
                # Each replica may be damaged, but elsewhere: one block at a time.
                fetch = self.start(chunk, start, start + 1, servers)
                await fetch.done.wait()
            if fetch.run is not None and fetch.run.start <= start < fetch.run.stop:
                return fetch.run
            if own:
                raise fetch.error or DfsError(ErrorCode.IO, f"chunk {chunk:x} is shorter than its extents")

    def start(self, chunk: int, start: int, stop: int, servers: Sequence[int], *, speculative: bool = False) -> Fetch:
        """Begins to fetch. ``speculative``: nobody asked; that there is nothing is then no fault of the replica."""
        fetch = Fetch(chunk, start, stop, speculative)
        fetch.candidates.extend(self._in_order(chunk, servers))
        self._flights.setdefault(chunk, []).append(fetch)
        self.in_flight_bytes += stop - start
        if fetch.candidates:
            self._ask_next(fetch)
            self._watch(fetch)
        else:
            self._end(fetch, None, DfsError(ErrorCode.NO_SUCH_CHUNK, f"chunk {chunk:x} has no replica"))
        return fetch

    def start_missing(self, chunk: int, start: int, stop: int, servers: Sequence[int], *, speculative: bool) -> None:
        """Begins to fetch what of a range is neither here nor on its way."""
        while start < stop:
            start = self.cache.has(chunk, start, stop)
            fetch = self._flying(chunk, start)
            if fetch is not None:
                start = fetch.stop
            elif start < stop:
                end = min([stop, start + FETCH_BYTES, *(each.start for each in self._after(chunk, start))])
                self.start(chunk, start, end, servers, speculative=speculative)
                start = end

    def _flying(self, chunk: int, offset: int) -> Fetch | None:
        for fetch in self._flights.get(chunk, ()):
            if fetch.start <= offset < fetch.stop:
                return fetch
        return None

    def _after(self, chunk: int, offset: int) -> list[Fetch]:
        return [fetch for fetch in self._flights.get(chunk, ()) if fetch.start > offset]

    def _in_order(self, chunk: int, servers: Sequence[int]) -> list[int]:
        """This host's first, the others as given (the best first); but who failed lately or does not answer comes last,
        slow ones before."""
        now = trio.current_time()
        return sorted(servers, key=lambda server: (self._doubts(chunk, server, now), not self._is_near(server)))

    def _is_near(self, server: int) -> bool:
        """Whether it is a server on this host, and works as far as is known: the others are ordered by that, too."""
        address = self._meta.peer(server)
        return address is not None and address.host in self._own_names and address.state in _WORKING

    def _doubts(self, chunk: int, server: int, now: float) -> int:
        """0: none."""
        if self._shunned.get((chunk, server), 0.0) > now or self._is_silent(server, now):
            return 2
        return int(self._pace.is_slow(server, now))

    def _is_silent(self, server: int, now: float) -> bool:
        if self._late.get(server, 0.0) > now or self._pool.pulse.silent_seconds(server) > LATE_SECONDS:
            return True
        address = self._meta.peer(server)
        return address is not None and self._pool.is_suspect(Peer(server, address.host, address.port))

    # -- attempts ------------------------------------------------------------------------------------------------

    def _ask_next(self, fetch: Fetch) -> None:
        now = trio.current_time()
        attempt = Attempt(fetch.candidates.popleft(), now, trio.CancelScope(), bool(fetch.attempts))
        fetch.attempts.append(attempt)
        fetch.hedge_at = now + self._pace.hedge_seconds
        self.requests += 1
        self._jobs.start(self._attempt, fetch, attempt)

    async def _attempt(self, fetch: Fetch, attempt: Attempt) -> None:
        run: Run | None = None
        error: DfsError | None = None
        with attempt.scope:
            try:
                peer = await self._peer(attempt.server)
                blocks = await self._pool.read(
                    peer, fetch.chunk, fetch.start, fetch.stop - fetch.start, timeout=ATTEMPT_SECONDS
                )
                run = _run_of(blocks)
            except DfsError as problem:
                error = problem
        fetch.attempts.remove(attempt)
        self._remember(fetch, attempt, run, error)
        if fetch.done.is_set() or attempt.scope.cancelled_caught:
            return
        if run is not None:
            self._won(fetch, attempt)
            self._end(fetch, run, None)
        elif error is not None:
            self._failed(fetch, attempt.server, error)
        elif fetch.speculative:
            self._end(fetch, None, DfsError(ErrorCode.RANGE, "nothing there"))
        else:
            self._failed(fetch, attempt.server, DfsError(ErrorCode.REPLICA_FAILED, "the replica is too short"))

    def _remember(self, fetch: Fetch, attempt: Attempt, run: Run | None, error: DfsError | None) -> None:
        outcome = "" if run is not None else str(error or "given up")
        server, begun = attempt.server, attempt.started
        now = trio.current_time()
        fetch.history.append(
            Attempted(server, fetch.chunk, fetch.start, fetch.stop, begun, now, outcome, attempt.hedge)
        )

    def _won(self, fetch: Fetch, winner: Attempt) -> None:
        """Remembers how long it took, also those that were asked earlier and have not answered yet."""
        now = trio.current_time()
        self._pace.note(winner.server, now - winner.started, now)
        for loser in fetch.attempts:
            if loser.started < winner.started:
                self._pace.note(loser.server, now - loser.started, now)

    def _failed(self, fetch: Fetch, server: int, error: DfsError) -> None:
        self.failures += 1
        now = trio.current_time()
        key = fetch.chunk, server
        if self._shunned.get(key, 0.0) <= now:
            self._jobs.start(self._report, fetch.chunk, server, error)
        self._shunned[key] = now + SHUN_SECONDS
        fetch.damaged |= error.code in DAMAGE
        if fetch.error is None or _hope(error) > _hope(fetch.error):
            fetch.error = error
        if fetch.candidates:
            self._ask_next(fetch)
        elif not fetch.attempts:
            self._end(fetch, None, fetch.error)

    def _end(self, fetch: Fetch, run: Run | None, error: DfsError | None) -> None:
        fetch.run, fetch.error = run, error
        for attempt in fetch.attempts:
            attempt.scope.cancel()
        self.in_flight_bytes -= fetch.stop - fetch.start
        flights = self._flights[fetch.chunk]
        flights.remove(fetch)
        if not flights:
            del self._flights[fetch.chunk]
        if run is not None:
            self.cache.put(fetch.chunk, run)
        fetch.done.set()

    async def _peer(self, server: int) -> Peer:
        address = self._meta.peer(server) or (await self._meta.servers()).get(server)
        if address is None:
            raise DfsError(ErrorCode.UNAVAILABLE, f"server {server} is not known")
        return Peer(server, address.host, address.port)

    async def _report(self, chunk: int, server: int, error: DfsError) -> None:
        log.warning("replica failed", chunk=f"{chunk:x}", server=server, error=str(error))
        self._forget_old()
        report = ReportReplica(chunk, server, int(error.code), error.text)
        try:
            await self._meta.call(protocol.REPORT_REPLICA, report, timeout=REPORT_SECONDS)
        except DfsError as problem:
            log.info("could not report a replica", error=str(problem))

    def _forget_old(self) -> None:
        now = trio.current_time()
        self._shunned = {key: until for key, until in self._shunned.items() if until > now}

    # -- hedging -------------------------------------------------------------------------------------------------

    def _watch(self, fetch: Fetch) -> None:
        if fetch.candidates:
            self._watched.append(fetch)
            self._watch_more.set()

    async def _hedge(self) -> None:
        """Asks another replica for what takes long. The delay changes, so what is watched is not in order of time."""
        while True:
            self._watched = [fetch for fetch in self._watched if fetch.candidates and not fetch.done.is_set()]
            if not self._watched:
                self._watch_more = trio.Event()
                await self._watch_more.wait()
            now = trio.current_time()
            for fetch in self._watched:
                if fetch.hedge_at <= now and fetch.candidates and not fetch.done.is_set():
                    self.hedges += 1
                    self._doubt(fetch, now)
                    self._ask_next(fetch)
            await trio.sleep(HEDGE_LEAST_SECONDS / 2)

    def _doubt(self, fetch: Fetch, now: float) -> None:
        """Who does not answer in time is asked last for a moment, until it is known whether it answers anybody."""
        for attempt in fetch.attempts:
            self._late[attempt.server] = now + LATE_SECONDS
            address = self._meta.peer(attempt.server)
            if address is not None:
                self._pool.pulse.watch(Peer(attempt.server, address.host, address.port))


def _hope(error: DfsError) -> int:
    """Which error of several replicas to tell: one that is away may come back with the right bytes."""
    if error.code in (ErrorCode.UNAVAILABLE, ErrorCode.TIMEOUT):
        return 2
    return 0 if error.code is ErrorCode.NO_SUCH_CHUNK else 1


def _run_of(blocks: Blocks) -> Run | None:
    """The bytes of an answer, which must follow each other in the chunk; None if there are none."""
    if not blocks.entries:
        return None
    start = at = blocks.entries[0].logical_offset
    for entry in blocks.entries:
        if entry.logical_offset != at or not _plain(entry):
            raise DfsError(ErrorCode.BAD_CHECKSUM, f"the block at {entry.logical_offset} does not follow {at}")
        at += entry.logical_length
    return Run(start, blocks.payload)


def _plain(entry: Entry) -> bool:
    """Stored as it is: the only kind this version knows."""
    return entry.codec == 0 and entry.key_slot == 0 and entry.stored_length == entry.logical_length

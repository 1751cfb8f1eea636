"""What the metaserver hears from a chunkserver: registration, full report, heartbeats with numbered deltas.

:class:`Outbox` and :class:`Mailbox` are the only state shared between the thread that speaks HTTP (so that a busy
event loop does not look dead) and the trio task; each call takes their lock for a moment. :class:`Reporter` is that
thread's work.
"""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import msgspec
import structlog

from metaserver.errors import ConnectionLost, DfsError, ErrorCode
from metaserver.protocol import (
    REPORT_PAGE,
    Heartbeat,
    HeartbeatReply,
    Json,
    Order,
    OrderResult,
    Register,
    Registered,
    ReplicaReport,
    ReportPage,
    ScrubStatus,
)

log = structlog.get_logger(__name__)

ReplyT = TypeVar("ReplyT")

# Between attempts while the metaserver is away.
BACKOFF_SECONDS, BACKOFF_LIMIT_SECONDS = 0.1, 2.0
# Early heartbeats (something failed, an order was carried out) are at least so far apart: one request costs 3 ms.
EARLY_SECONDS = 0.1
# A loop that has not shown itself for so long is stuck, not busy: others had better take over.
STUCK_SECONDS = 20.0
# Errors that trying again cannot cure.
_HOPELESS = frozenset({ErrorCode.WRONG_CLUSTER, ErrorCode.BAD_KEY, ErrorCode.WRONG_VERSION})


class Snapshot(NamedTuple):
    """How the server is, as of ``taken`` (seconds of the monotonic clock)."""

    taken: float
    capacity: int
    free: int
    chunks: int
    disk_state: str
    read_bytes: int
    written_bytes: int
    stored: int = -1
    spare: int = 0
    scrub: ScrubStatus | None = None
    disk_error: str = ""


class Parcel(NamedTuple):
    """What one heartbeat carries; ``mark`` acknowledges it."""

    mark: int
    changes: list[ReplicaReport]
    gone: list[int]
    results: list[OrderResult]
    more: bool


class Outbox:
    """What the metaserver has not acknowledged yet, newest word per chunk. Safe to use from any thread.

    Invariant: every item has the number of its last change; acknowledging a mark drops what has not changed since.
    """

    def __init__(self, on_news: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._on_news = on_news
        self._count = 0
        self._chunks: dict[int, tuple[int, ReplicaReport | None]] = {}
        self._results: dict[tuple[int, int], tuple[int, OrderResult]] = {}

    def changed(self, report: ReplicaReport) -> None:
        self._put(report.chunk, report)

    def gone(self, chunk: int) -> None:
        self._put(chunk, None)

    def _put(self, chunk: int, report: ReplicaReport | None) -> None:
        with self._lock:
            self._count += 1
            self._chunks.pop(chunk, None)  # to the end: oldest first
            self._chunks[chunk] = (self._count, report)
        self._on_news()

    def result(self, result: OrderResult) -> None:
        with self._lock:
            self._count += 1
            self._results[(result.epoch, result.order)] = (self._count, result)
        self._on_news()

    def forget_chunks(self) -> None:
        """A full report says it all."""
        with self._lock:
            self._chunks.clear()

    def parcel(self, limit: int = REPORT_PAGE) -> Parcel:
        """The oldest unacknowledged items, at most ``limit`` of each kind."""
        with self._lock:
            chunks = list(self._chunks.items())[:limit]
            results = list(self._results.values())[:limit]
            more = len(chunks) < len(self._chunks) or len(results) < len(self._results)
            # With items left behind only what was sent may be acknowledged: the older of the two ends.
            ends = [chunks[-1][1][0]] if len(chunks) < len(self._chunks) else []
            ends += [results[-1][0]] if len(results) < len(self._results) else []
            mark = min(ends, default=self._count)
        changes = [report for _, (_, report) in chunks if report is not None]
        gone = [chunk for chunk, (_, report) in chunks if report is None]
        return Parcel(mark, changes, gone, [result for _, result in results], more)

    def acknowledge(self, mark: int) -> None:
        with self._lock:
            self._chunks = {chunk: item for chunk, item in self._chunks.items() if item[0] > mark}
            self._results = {key: item for key, item in self._results.items() if item[0] > mark}


class Mailbox:
    """The newest snapshot, and a bell that wakes the reporting thread."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._snapshot: Snapshot | None = None
        self._rung = False
        self._closed = False
        # No chunk has a number from this one on, as far as the metaserver has told; 0: not yet.
        self.chunk_limit = 0

    def post(self, snapshot: Snapshot) -> None:
        with self._condition:
            self._snapshot = snapshot
            self._condition.notify_all()

    def ring(self) -> None:
        """Something should be reported before the next heartbeat is due."""
        with self._condition:
            self._rung = True
            self._condition.notify_all()

    def close(self) -> None:
        """Ends the thread at its next step."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    @property
    def closed(self) -> bool:
        return self._closed

    def snapshot(self) -> Snapshot | None:
        with self._condition:
            return self._snapshot

    def wait(self, seconds: float) -> None:
        """Until the time is over, the bell rings or the box is closed."""
        with self._condition:
            self._condition.wait_for(lambda: self._rung or self._closed, seconds)
            self._rung = False

    def pause(self, seconds: float) -> None:
        """As :meth:`wait`, but the bell does not shorten it."""
        with self._condition:
            self._condition.wait_for(lambda: self._closed, seconds)


class Control(Protocol):
    """How requests reach the metaserver (``client.ControlClient``)."""

    def post(self, path: str, message: msgspec.Struct, reply: type[ReplyT]) -> ReplyT: ...


class Callbacks(Protocol):
    """What the reporter asks of the server; each call blocks until the event loop has done it."""

    def registration(self) -> Register: ...

    def registered(self, reply: Registered) -> None:
        """Raises :class:`DfsError` WRONG_CLUSTER if this is not the cluster the data belongs to."""

    def listing(self) -> list[ReplicaReport]:
        """All replicas sorted by chunk, at a moment at which the outbox's chunks are forgotten."""

    def orders(self, orders: list[Order]) -> None: ...


class Reporter:
    """Registers and sends heartbeats until the mailbox is closed.

    :meth:`work` is what it does; all that takes time in it goes through :meth:`ask`, :meth:`join`, :meth:`pause` and
    :meth:`wait`, which block here. A simulation overrides them with ones that wait in virtual time.
    """

    def __init__(
        self,
        control: Control,
        callbacks: Callbacks,
        outbox: Outbox,
        mailbox: Mailbox,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._control = control
        self._callbacks = callbacks
        self._outbox = outbox
        self._mailbox = mailbox
        self._clock = clock
        self._heartbeat_seconds = 1.0
        self._number = 0
        self._server = 0
        self._incarnation = 0
        self._was_registered = False
        self._problem = ""
        self._backoff = BACKOFF_SECONDS

    def run(self) -> None:
        """:meth:`work`, blocking; for a thread of its own."""
        try:
            self.work().send(None)
        except StopIteration:
            return
        raise RuntimeError("what blocks must not wait for an event loop")

    async def work(self) -> None:
        """Raises :class:`DfsError` for what trying again cannot cure."""
        while not self._mailbox.closed:
            try:
                await self._register()
                await self._send_heartbeats()
            except DfsError as error:
                if error.code is ErrorCode.WRONG_CLUSTER or (error.code in _HOPELESS and not self._was_registered):
                    raise
                await self._back_off(error)

    async def ask(self, path: str, message: msgspec.Struct, reply: type[ReplyT]) -> ReplyT:
        return self._control.post(path, message, reply)

    async def join(self, reply: Registered) -> None:
        self._callbacks.registered(reply)

    async def pause(self, seconds: float) -> None:
        self._mailbox.pause(seconds)

    async def wait(self, seconds: float) -> None:
        self._mailbox.wait(seconds)

    async def _back_off(self, error: DfsError) -> None:
        self._note_problem(error)
        await self.pause(self._backoff)
        self._backoff = min(2 * self._backoff, BACKOFF_LIMIT_SECONDS)

    def _note_problem(self, error: DfsError | None) -> None:
        """Logs changes only, not every attempt."""
        text = "" if error is None else error.code.name
        if text and text != self._problem:
            log.warning("cannot report to the metaserver; trying on", reason=str(error))
        elif self._problem and not text:
            log.info("reporting to the metaserver again")
        self._problem = text

    async def _register(self) -> None:
        register = self._callbacks.registration()
        reply = await self.ask("/v1/servers/register", register, Registered)
        await self.join(reply)
        self._was_registered = True
        self._server, self._incarnation = register.server, register.incarnation
        self._heartbeat_seconds = reply.heartbeat_seconds
        for page in report_pages(self._incarnation, self._callbacks.listing()):
            await self.ask(f"/v1/servers/{self._server}/report", page, Json)
        log.info("registered", cluster=reply.cluster_id, epoch=reply.epoch)
        self._note_problem(None)

    async def _send_heartbeats(self) -> None:
        """Until the metaserver wants to start over. Out of reach it is tried on: it may still know this server."""
        while not self._mailbox.closed:
            try:
                reply, more = await self._heartbeat()
            except ConnectionLost as error:
                await self._back_off(error)
                continue
            if reply is not None:
                self._backoff = BACKOFF_SECONDS
                self._note_problem(None)
                if reply.register_again:
                    return
            await self.pause(min(EARLY_SECONDS, self._heartbeat_seconds))
            if not more:
                await self.wait(self._heartbeat_seconds - EARLY_SECONDS)

    async def _heartbeat(self) -> tuple[HeartbeatReply | None, bool]:
        """One exchange; the reply is None if there was nothing to say. Also: whether more waits to be said."""
        snapshot = self._mailbox.snapshot()
        if snapshot is None or self._clock() - snapshot.taken > STUCK_SECONDS:
            self._note_problem(DfsError(ErrorCode.INTERNAL, "this server's own event loop is stuck"))
            return None, False
        self._number += 1
        parcel = self._outbox.parcel()
        heartbeat = make_heartbeat(self._incarnation, self._number, snapshot, parcel)
        reply = await self.ask(f"/v1/servers/{self._server}/heartbeat", heartbeat, HeartbeatReply)
        self._mailbox.chunk_limit = max(self._mailbox.chunk_limit, reply.chunk_limit)
        if reply.acknowledged >= self._number:
            self._outbox.acknowledge(parcel.mark)
        if reply.orders and not reply.register_again:
            self._callbacks.orders(reply.orders)
        return reply, parcel.more


def make_heartbeat(incarnation: int, number: int, snapshot: Snapshot, parcel: Parcel) -> Heartbeat:
    return Heartbeat(
        incarnation,
        number,
        snapshot.capacity,
        snapshot.free,
        snapshot.chunks,
        snapshot.disk_state,
        parcel.changes,
        parcel.gone,
        parcel.results,
        snapshot.read_bytes,
        snapshot.written_bytes,
        stored=snapshot.stored,
        spare=snapshot.spare,
        scrub=snapshot.scrub,
        disk_error=snapshot.disk_error,
    )


def report_pages(incarnation: int, replicas: list[ReplicaReport], size: int = REPORT_PAGE) -> list[ReportPage]:
    """A full listing cut into pages; one empty page if there is nothing."""
    starts = list(range(0, len(replicas), size)) or [0]
    return [
        ReportPage(incarnation, page, page == len(starts) - 1, replicas[start : start + size])
        for page, start in enumerate(starts)
    ]

"""One framed connection: the handshake, many calls in flight each way, and their dispatch.

Handshake (every message a HELLO frame, the whole bounded by ``HELLO_SECONDS``)::

    client -> server   version, cluster id ("" if not known yet), role, session, nonce
    server -> client   version, cluster id, role, nonce, proof over (own nonce, client's nonce)
    client -> server   proof over (own nonce, server's nonce); requests may follow at once

A side that is not satisfied sends an ERROR frame and closes. Without a key on either side proofs are empty; servers
without a key listen on loopback only.

Order: frames of one connection are dispatched in the order they were sent, and the synchronous part of a handler runs
before the next frame is looked at. A handler that returns a coroutine goes on beside the others.
"""

import ctypes
import secrets
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from time import perf_counter_ns
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import msgspec
import structlog
import trio

from metaserver import wire
from metaserver.errors import ConnectionLost, DfsError, ErrorCode, ProcessEnds
from metaserver.key import ClusterKey
from metaserver.timings import SLOW_SECONDS, Timing
from metaserver.tracing import TRACE
from metaserver.transport import Transport
from metaserver.wire import Buffer, Hello, Kind, Method, Response

log = structlog.get_logger(__name__)

HELLO_SECONDS = 10.0
# How often calls past their deadline are looked for: a deadline is kept to within this.
SWEEP_SECONDS = 0.5
DEFAULT_TIMEOUT_SECONDS = 30.0
# A receive buffer that takes a burst of small frames in one system call; larger payloads get a buffer of their own.
RECEIVE_BUFFER_BYTES = 256 << 10
DIRECT_PAYLOAD_BYTES = 16 << 10
# Requests in work per connection; beyond, nothing more is read from it.
MAX_RUNNING = 512
# And so many bytes of their payloads: a sender that is faster than the disks waits in its own memory, not in ours.
MAX_RUNNING_BYTES = 32 << 20
# Errors that are somebody's trouble, and not just an answer.
_TROUBLE = frozenset({
    ErrorCode.IO, ErrorCode.INTERNAL, ErrorCode.TIMEOUT, ErrorCode.UNAVAILABLE, ErrorCode.REPLICA_FAILED,
    ErrorCode.BAD_CHECKSUM, ErrorCode.DISK_FULL, ErrorCode.DISK_FAILED,
})  # fmt: skip
# A disk that has failed fails thousands of requests a second; a line for each would fill the next one.
TROUBLE_LINES_SECONDS = 1.0
# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

MessageT = TypeVar("MessageT")
ReplyT = TypeVar("ReplyT")
RequestT = TypeVar("RequestT")


class Reply(msgspec.Struct, gc=False):
    """What a handler answers: a message, and a payload as a list of buffers that are not changed afterwards."""

    message: Any
    payload: Sequence[Buffer] = ()
    number: int = 0
    durable: int = 0
    time_ns: int = 0
    ids: tuple[int, ...] = ()


class Incoming(msgspec.Struct, gc=False):
    """A request or push as it arrived; ``body`` is still encoded. The payload belongs to the handler."""

    method: int
    body: bytes
    payload: Buffer
    trace_id: int


Result: TypeAlias = Reply | Coroutine[Any, Any, Reply]
# Called in order of arrival. Raises DfsError to answer with an ERROR frame.
Dispatch: TypeAlias = Callable[["Connection", Incoming], Result]
# Where it is noted how long requests of a method take, by its number; None: it is not known here.
TimingOf: TypeAlias = Callable[[int], Timing | None]


def not_timed(method: int) -> Timing | None:
    """The :data:`TimingOf` of who does not ask."""
    return None


class InFlight(NamedTuple):
    """A request that has no answer yet: what, of whom, since when (trio's clock), on behalf of which trace."""

    method: str
    peer: str
    since: float
    trace_id: int


def refuse(connection: "Connection", incoming: Incoming) -> Result:
    """The :data:`Dispatch` of a side that serves nothing."""
    raise DfsError(ErrorCode.UNKNOWN_METHOD, f"method {incoming.method} is not served here")


class Answer(msgspec.Struct, Generic[ReplyT], gc=False):
    """What a call brought back."""

    response: Response[ReplyT]
    payload: Buffer

    @property
    def message(self) -> ReplyT:
        return self.response.message


class Pending(Generic[ReplyT]):
    """A request on its way. :meth:`wait` once, from one task; dropping it without waiting is allowed."""

    __slots__ = (
        "_answer",
        "_connection",
        "_error",
        "_method",
        "_request_id",
        "_task",
        "_watcher",
        "deadline",
        "since",
        "trace_id",
    )

    def __init__(
        self, connection: "Connection", method: Method[Any, ReplyT], request_id: int, since: float, deadline: float
    ) -> None:
        self._connection = connection
        self._method = method
        self._request_id = request_id
        self.since = since
        self.deadline = deadline
        self.trace_id = 0
        self._answer: Answer[ReplyT] | None = None
        self._error: DfsError | None = None
        self._task: trio.lowlevel.Task | None = None
        self._watcher: Callable[[Answer[ReplyT]], None] | None = None

    def watch(self, watcher: Callable[[Answer[ReplyT]], None]) -> None:
        """Has the answer (not an error) passed to ``watcher`` in the moment it arrives, before any task runs."""
        self._watcher = watcher

    def resolve(self, frame: tuple[bytes, Buffer] | None, error: DfsError | None) -> None:
        """Called once, by the connection."""
        if frame is not None:
            try:
                self._answer = Answer(self._method.decode_reply(frame[0]), frame[1])
            except DfsError as malformed:
                error = malformed
            else:
                if self._watcher is not None:
                    self._watcher(self._answer)
        self._error = error
        if self._task is not None:
            trio.lowlevel.reschedule(self._task)

    def describe(self, peer: str) -> InFlight:
        return InFlight(self._method.name, peer, self.since, self.trace_id)

    def abandon(self) -> None:
        """Nobody waits for the answer any more: tells the other side, which need not go on with it."""
        if not self.done:
            self._connection.abandon(self._request_id)

    @property
    def done(self) -> bool:
        return self._answer is not None or self._error is not None

    async def wait(self) -> Answer[ReplyT]:
        """The answer; raises :class:`DfsError` (TIMEOUT past the deadline, :class:`ConnectionLost`).

        Cancelling tells the other side (CANCEL); whether the request was carried out is then not known.
        """
        if not self.done:
            self._task = trio.lowlevel.current_task()

            def abort(_: object) -> trio.lowlevel.Abort:
                self._connection.abandon(self._request_id)
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abort)
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self._answer


class Connection:
    """A handshaken connection; :meth:`run` must be running for anything to arrive.

    Invariants: ``_backlog_bytes`` is the sum of the lengths in ``_backlog``; a request id is in ``_pending`` from the
    moment its frame is queued until it is answered, abandoned, timed out or the connection ends; after the end
    (``lost`` is set) ``_pending`` is empty and every new call raises ``lost``.
    """

    def __init__(self, transport: Transport, dispatch: Dispatch, peer: Hello, timing_of: TimingOf = not_timed) -> None:
        self.transport = transport
        self.peer = peer
        self.lost: DfsError | None = None
        self.bytes_sent = 0
        self.bytes_received = 0
        self._dispatch = dispatch
        self._timing_of = timing_of
        self._quiet_until = 0.0
        self._next_request_id = 0
        self._pending: dict[int, Pending[Any]] = {}
        self._running: dict[int, trio.CancelScope] = {}
        self._running_count = 0
        self._running_bytes = 0
        self._running_less = trio.Event()
        self._backlog: deque[memoryview] = deque()
        self._backlog_bytes = 0
        self._backlog_added = trio.Event()
        self._corked = False
        self._nursery: trio.Nursery | None = None

    def __repr__(self) -> str:
        return f"<connection to {self.transport.name}>"

    # -- asking ------------------------------------------------------------------------------------------------

    def start(
        self,
        method: Method[RequestT, ReplyT],
        message: RequestT,
        payload: Sequence[Buffer] = (),
        *,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        epoch: int = 0,
        operation: int = 0,
        replay: wire.Replay | None = None,
        trace_id: int = 0,
        expires_ms: int = 0,
    ) -> Pending[ReplyT]:
        """Queues a request without waiting; frames leave in the order of these calls. ``timeout`` is in seconds."""
        if self.lost is not None:
            raise self.lost
        request_id = self._new_request_id()
        body = wire.encode(wire.Request(int(timeout * 1000), epoch, operation, message, replay, expires_ms))
        now = trio.current_time()
        pending = Pending(self, method, request_id, now, now + timeout)
        pending.trace_id = trace_id = trace_id or TRACE.get()
        # Before it is sent: if the connection turns out to be broken then, the end of it resolves what is pending.
        self._pending[request_id] = pending
        try:
            self._send(Kind.REQUEST, method.number, request_id, body, payload, trace_id)
        except BaseException:
            del self._pending[request_id]
            raise
        return pending

    async def call(
        self, method: Method[RequestT, ReplyT], message: RequestT, payload: Sequence[Buffer] = (), **options: Any
    ) -> Answer[ReplyT]:
        """:meth:`start` and :meth:`Pending.wait` in one."""
        return await self.start(method, message, payload, **options).wait()

    def push(self, method: Method[RequestT, Any], message: RequestT, *, trace_id: int = 0) -> None:
        """Sends what needs no answer. Does nothing on a lost connection."""
        if self.lost is None:
            body = wire.encode(wire.Request(0, 0, 0, message, None))
            self._send(Kind.PUSH, method.number, 0, body, (), trace_id or TRACE.get())

    @property
    def calls_in_flight(self) -> int:
        return len(self._pending)

    def in_flight(self) -> Iterator[InFlight]:
        """What was asked and is not answered, the oldest first."""
        return (call.describe(self.transport.name) for call in self._pending.values())

    def abandon(self, request_id: int) -> None:
        """Forgets a call whose task was cancelled, and tells the other side."""
        if self._pending.pop(request_id, None) is not None and self.lost is None:
            self._send(Kind.CANCEL, 0, request_id, b"", (), 0)

    def close(self, reason: str = "closed on this side") -> None:
        """Ends the connection at once; calls in flight raise :class:`ConnectionLost`."""
        self._end(ConnectionLost(f"connection to {self.transport.name}: {reason}"))

    def _new_request_id(self) -> int:
        while True:
            self._next_request_id = (self._next_request_id % 0xFFFFFFFF) + 1
            if self._next_request_id not in self._pending:
                return self._next_request_id

    # -- running -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serves the connection until it ends, which is not an error: ``lost`` then says why."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._send_backlog)
                nursery.start_soon(self._sweep)
                try:
                    await self._receive()
                except DfsError as error:
                    if error.code is ErrorCode.PROTOCOL:
                        log.warning("closing a connection", peer=self.transport.name, reason=error.text)
                        self._send_failure(0, error)
                    self._end(error)
                nursery.cancel_scope.cancel()
        finally:
            self.close()

    def _end(self, error: DfsError) -> None:
        if self.lost is not None:
            return
        self.lost = error if isinstance(error, ConnectionLost) else ConnectionLost(str(error))
        self.transport.close()
        pending, self._pending = self._pending, {}
        for call in pending.values():
            call.resolve(None, self.lost)
        self._backlog.clear()
        self._backlog_bytes = 0
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    async def _sweep(self) -> None:
        """Ends the calls whose deadline has passed."""
        while True:
            await trio.sleep(SWEEP_SECONDS)
            now = trio.current_time()
            for request_id in [key for key, call in self._pending.items() if call.deadline < now]:
                call = self._pending.pop(request_id, None)
                if call is None:
                    return  # the connection was found broken meanwhile, and has ended all of them
                text = f"no answer from {self.transport.name} in time"
                call.resolve(None, DfsError(ErrorCode.TIMEOUT, text))
                self._send(Kind.CANCEL, 0, request_id, b"", (), 0)

    # -- sending -----------------------------------------------------------------------------------------------

    def _send(
        self, kind: Kind, method: int, request_id: int, body: Buffer, payload: Sequence[Buffer], trace_id: int
    ) -> None:
        views = [memoryview(part).cast("B") for part in payload if len(part)]
        payload_length = sum(map(len, views))
        header = wire.encode_header(kind, method, request_id, body, payload_length, trace_id)
        head = memoryview(header + body) if len(body) < 4096 else None
        self._backlog.extend([head] if head is not None else [memoryview(header), memoryview(body)])
        self._backlog.extend(views)
        self._backlog_bytes += len(header) + len(body) + payload_length
        if not self._corked:
            self._flush()

    def _send_failure(self, request_id: int, error: DfsError) -> None:
        if self.lost is None:
            body = wire.encode(wire.Failure(error.code, error.text))
            self._send(Kind.ERROR, 0, request_id, body, (), 0)

    def _flush(self) -> None:
        """Sends what goes at once; the rest wakes :meth:`_send_backlog`."""
        backlog = self._backlog
        try:
            while backlog:
                sent = self.transport.try_send([*backlog] if len(backlog) < 64 else [backlog[i] for i in range(64)])
                if sent == 0:
                    self._backlog_added.set()
                    return
                self._backlog_bytes -= sent
                self.bytes_sent += sent
                while sent:
                    first = backlog[0]
                    if len(first) > sent:
                        backlog[0] = first[sent:]
                        break
                    sent -= len(first)
                    backlog.popleft()
        except DfsError as error:
            self._end(error)

    async def _send_backlog(self) -> None:
        try:
            while True:
                await self._backlog_added.wait()
                self._backlog_added = trio.Event()
                while self._backlog:
                    await self.transport.wait_writable()
                    self._flush()
        except DfsError as error:
            self._end(error)

    # -- receiving ---------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        buffer = memoryview(bytearray(RECEIVE_BUFFER_BYTES))
        start = end = 0
        while True:
            self._corked = True
            try:
                while end - start >= wire.HEADER_BYTES:
                    header = wire.decode_header(buffer, start)
                    head = wire.HEADER_BYTES + header.body_length
                    total = head + header.payload_length
                    if end - start < total:
                        break
                    body = bytes(buffer[start + wire.HEADER_BYTES : start + head])
                    wire.check_frame(buffer[start : start + wire.HEADER_BYTES], header, body)
                    self._dispatch_frame(header, body, bytes(buffer[start + head : start + total]))
                    start += total
            finally:
                self._corked = False
                if self._backlog and self.lost is None:
                    self._flush()
            if self.lost is not None:
                raise self.lost
            while self._running_count >= MAX_RUNNING or self._running_bytes >= MAX_RUNNING_BYTES:
                self._running_less = trio.Event()
                await self._running_less.wait()
            available = end - start
            if available >= wire.HEADER_BYTES and (
                total > len(buffer) or header.payload_length >= DIRECT_PAYLOAD_BYTES
            ):
                await self._receive_large(header, buffer[start:end])
                start = end = 0
                continue
            if start:
                buffer[:available] = bytes(buffer[start:end])
                start, end = 0, available
            end += await self._receive_some(buffer[end:])

    async def _receive_large(self, header: wire.Header, beginning: memoryview) -> None:
        """Takes the rest of a frame, of which ``beginning`` has arrived, straight into buffers of its own."""
        head_bytes = wire.HEADER_BYTES + header.body_length
        head = bytearray(head_bytes)
        payload = bytearray(header.payload_length)
        here = min(len(beginning), head_bytes)
        head[:here] = beginning[:here]
        await self._fill(memoryview(head)[here:])
        body = bytes(memoryview(head)[wire.HEADER_BYTES :])
        wire.check_frame(head, header, body)
        rest = beginning[here:]
        payload[: len(rest)] = rest
        await self._fill(memoryview(payload)[len(rest) :])
        self._dispatch_frame(header, body, payload)

    async def _fill(self, view: memoryview) -> None:
        while len(view):
            view = view[await self._receive_some(view) :]

    async def _receive_some(self, view: memoryview) -> int:
        count = self.transport.try_receive_into(view)
        while count == 0:
            await self.transport.wait_readable()
            count = self.transport.try_receive_into(view)
        self.bytes_received += count
        return count

    # -- dispatching -------------------------------------------------------------------------------------------

    def _dispatch_frame(self, header: wire.Header, body: bytes, payload: Buffer) -> None:
        if header.kind == Kind.RESPONSE:
            call = self._pending.pop(header.request_id, None)
            if call is not None:
                call.resolve((body, payload), None)
        elif header.kind == Kind.ERROR:
            error = wire.decode_failure(body)
            if header.request_id == 0:
                raise ConnectionLost(f"{self.transport.name} closed the connection: {error}")
            call = self._pending.pop(header.request_id, None)
            if call is not None:
                call.resolve(None, error)
        elif header.kind in (Kind.REQUEST, Kind.PUSH):
            self._serve(header, Incoming(header.method, body, payload, header.trace_id))
        elif header.kind == Kind.CANCEL:
            scope = self._running.get(header.request_id)
            if scope is not None:
                scope.cancel()
        else:
            raise DfsError(ErrorCode.PROTOCOL, "a HELLO in the middle of a connection")

    def _serve(self, header: wire.Header, incoming: Incoming) -> None:
        started_ns = perf_counter_ns()
        TRACE.set(header.trace_id)
        try:
            result = self._dispatch(self, incoming)
        except DfsError as error:
            self._fail(header, error)
        except ProcessEnds as error:
            self.close(str(error))
        except Exception:
            log.exception("handler failed", method=header.method, peer=self.transport.name)
            self._fail(header, DfsError(ErrorCode.INTERNAL, "the server met an unexpected condition; see its log"))
        else:
            if isinstance(result, Reply):
                self._answer(header, result)
                self._note(header, started_ns)
            else:
                assert self._nursery is not None
                self._running_count += 1
                self._running_bytes += header.payload_length
                self._nursery.start_soon(self._finish, header, result, started_ns)

    def _note(self, header: wire.Header, started_ns: int) -> None:
        """A request has been answered or refused."""
        timing = self._timing_of(header.method)
        if timing is None:
            return
        duration_ns = perf_counter_ns() - started_ns
        timing.add(duration_ns)
        if header.trace_id:
            timing.remember(header.trace_id, duration_ns)
        if duration_ns >= SLOW_SECONDS * 1e9:
            log.warning(
                "slow request", method=header.method, peer=self.transport.name, seconds=round(duration_ns / 1e9, 2)
            )

    async def _finish(self, header: wire.Header, result: Coroutine[Any, Any, Reply], started_ns: int) -> None:
        """Runs the asynchronous rest of a handler."""
        scope = trio.CancelScope()
        if header.request_id:
            self._running[header.request_id] = scope
        try:
            with scope:
                self._answer(header, await result)
                return
            self._fail(header, DfsError(ErrorCode.CANCELLED, "cancelled by the caller"))
        except DfsError as error:
            self._fail(header, error)
        except ProcessEnds as error:
            self.close(str(error))
        except Exception:
            log.exception("handler failed", method=header.method, peer=self.transport.name)
            self._fail(header, DfsError(ErrorCode.INTERNAL, "the server met an unexpected condition; see its log"))
        finally:
            self._note(header, started_ns)
            self._running.pop(header.request_id, None)
            self._running_count -= 1
            self._running_bytes -= header.payload_length
            self._running_less.set()

    def _answer(self, header: wire.Header, reply: Reply) -> None:
        if header.kind == Kind.REQUEST and self.lost is None:
            response = Response(reply.number, reply.durable, reply.message, reply.time_ns, reply.ids)
            body = wire.encode(response)
            self._send(Kind.RESPONSE, header.method, header.request_id, body, reply.payload, header.trace_id)

    def _fail(self, header: wire.Header, error: DfsError) -> None:
        timing = self._timing_of(header.method)
        if timing is not None:
            timing.failed += 1
            if error.code in _TROUBLE:
                self._tell(header, error)
        if header.kind == Kind.REQUEST:
            self._send_failure(header.request_id, error)
        else:
            log.warning("push failed", method=header.method, peer=self.transport.name, error=str(error))

    def _tell(self, header: wire.Header, error: DfsError) -> None:
        now = trio.current_time()
        if now >= self._quiet_until:
            self._quiet_until = now + TROUBLE_LINES_SECONDS
            log.warning("request failed", method=header.method, peer=self.transport.name, error=str(error))


def keep_large_buffers() -> None:
    """Tells glibc, once at the start of a program, not to give payload buffers back to the kernel one by one.

    By default each megabyte is mapped, faulted in page by page, and unmapped: receiving 1 MiB cost 0.85 ms of CPU with
    that and 0.3 ms without, on either side. Up to 64 MiB of free memory stay with the process. Does nothing elsewhere.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 16 << 20)
    mallopt(_M_TRIM_THRESHOLD, 64 << 20)


# -- the handshake ---------------------------------------------------------------------------------------------


async def _send_all(transport: Transport, kind: Kind, message: wire.Message) -> None:
    body = wire.encode(message)
    rest = memoryview(wire.encode_header(kind, 0, 0, body) + body)
    while rest:
        rest = rest[transport.try_send([rest]) :]
        if rest:
            await transport.wait_writable()


async def _receive_hello(transport: Transport) -> Hello:
    """Reads exactly one HELLO; an ERROR instead is raised as what it says."""

    async def take(length: int) -> bytearray:
        data = bytearray(length)
        view = memoryview(data)
        while len(view):
            count = transport.try_receive_into(view)
            if count == 0:
                await transport.wait_readable()
            view = view[count:]
        return data

    head = await take(wire.HEADER_BYTES)
    if head.startswith(b"HTTP/"):
        raise DfsError(ErrorCode.PROTOCOL, f"{transport.name} is an HTTP port: give the other one (9400 by default)")
    header = wire.decode_header(head)
    if header.kind not in (Kind.HELLO, Kind.ERROR) or header.body_length > 4096 or header.payload_length:
        raise DfsError(ErrorCode.PROTOCOL, f"{transport.name} does not speak this protocol")
    body = await take(header.body_length)
    wire.check_frame(head, header, body)
    if header.kind == Kind.ERROR:
        raise wire.decode_failure(body)
    return wire.decode_hello(body)


async def connect_handshake(
    transport: Transport,
    dispatch: Dispatch,
    *,
    key: ClusterKey | None,
    cluster_id: str,
    role: str,
    server_role: str,
    session: int = 0,
) -> Connection:
    """The client's side. Closes the transport and raises :class:`DfsError` if the two do not fit together."""
    try:
        with trio.move_on_after(HELLO_SECONDS):
            nonce = secrets.token_bytes(16)
            await _send_all(transport, Kind.HELLO, Hello(wire.PROTOCOL_VERSION, cluster_id, role, session, nonce, b""))
            peer = await _receive_hello(transport)
            if peer.version != wire.PROTOCOL_VERSION:
                raise DfsError(
                    ErrorCode.WRONG_VERSION,
                    f"{transport.name} speaks protocol version {peer.version}, this program {wire.PROTOCOL_VERSION}",
                )
            if peer.role != server_role:
                raise DfsError(
                    ErrorCode.WRONG_ROLE, f"{transport.name} is a {peer.role}, not a {server_role}: check the address"
                )
            if cluster_id and peer.cluster_id != cluster_id:
                raise DfsError(ErrorCode.WRONG_CLUSTER, f"{transport.name} belongs to another cluster")
            proof = b""
            if key is not None:
                if not key.accepts(peer.proof, peer.role, peer.nonce, nonce):
                    raise DfsError(ErrorCode.BAD_KEY, f"{transport.name} does not have this cluster's key")
                proof = key.proof(role, nonce, peer.nonce)
            elif peer.proof:
                raise DfsError(ErrorCode.BAD_KEY, f"{transport.name} wants the cluster key: give the key file")
            await _send_all(
                transport, Kind.HELLO, Hello(wire.PROTOCOL_VERSION, cluster_id, role, session, nonce, proof)
            )
            return Connection(transport, dispatch, peer)
        raise ConnectionLost(f"{transport.name} did not answer the greeting")
    except BaseException:
        transport.close()
        raise


async def accept_handshake(
    transport: Transport,
    dispatch: Dispatch,
    *,
    key: ClusterKey | None,
    cluster_id: str,
    role: str,
    timing_of: TimingOf = not_timed,
) -> Connection:
    """The server's side. Tells the client what is wrong, closes the transport and raises :class:`DfsError`."""
    try:
        with trio.move_on_after(HELLO_SECONDS):
            try:
                peer = await _receive_hello(transport)
                if peer.version != wire.PROTOCOL_VERSION:
                    raise DfsError(
                        ErrorCode.WRONG_VERSION,
                        f"this {role} speaks protocol version {wire.PROTOCOL_VERSION}, you speak {peer.version}",
                    )
                if peer.cluster_id and cluster_id and peer.cluster_id != cluster_id:
                    raise DfsError(ErrorCode.WRONG_CLUSTER, f"this {role} belongs to cluster {cluster_id}")
                nonce = secrets.token_bytes(16)
                proof = key.proof(role, nonce, peer.nonce) if key is not None else b""
                await _send_all(transport, Kind.HELLO, Hello(wire.PROTOCOL_VERSION, cluster_id, role, 0, nonce, proof))
                confirmed = await _receive_hello(transport)
                if key is not None and not key.accepts(confirmed.proof, peer.role, peer.nonce, nonce):
                    raise DfsError(ErrorCode.BAD_KEY, f"this {role} wants the cluster key: give the key file")
                return Connection(transport, dispatch, peer, timing_of)
            except DfsError as error:
                if not isinstance(error, ConnectionLost):
                    await _send_all(transport, Kind.ERROR, wire.Failure(error.code, error.text))
                raise
        raise ConnectionLost(f"{transport.name} did not finish the greeting")
    except BaseException:
        transport.close()
        raise

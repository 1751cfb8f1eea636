"""Talking to chunkservers over the data plane (published to mounts), and to the metaserver over HTTP.

A :class:`Pool` has one connection to each chunkserver, made when first needed and kept. What is sent to one server
leaves in the order of the calls, even while the connection is still being made.
"""

import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import msgspec
import structlog
import trio
from crc32c import crc32c

from chunkserver import chunkfile, protocol
from chunkserver.chunkfile import ENTRY_BYTES, Entry, FormatError
from chunkserver.protocol import (
    Append,
    AppendReply,
    ListChunks,
    ListChunksReply,
    Peer,
    Pong,
    Read,
    ReadIndex,
    ReadIndexReply,
    ReadRaw,
    Stat,
    StatReply,
    Sync,
    Verify,
    VerifyReply,
)
from chunkserver.pulse import Pulse
from metaserver import transport
from metaserver.connection import Answer, Connection, InFlight, Pending, connect_handshake, refuse
from metaserver.errors import ConnectionLost, DfsError, ErrorCode
from metaserver.key import ClusterKey
from metaserver.protocol import CLIENT_ROLE
from metaserver.tracing import TRACE
from metaserver.transport import Transport
from metaserver.wire import Buffer, Empty, Method

if TYPE_CHECKING:
    import httpx

log = structlog.get_logger(__name__)

ReplyT = TypeVar("ReplyT")
RequestT = TypeVar("RequestT")
JsonT = TypeVar("JsonT")

# A server on the same network answers within a millisecond; the rest is for one that is swamped.
CONNECT_SECONDS = 3.0
# After a failed attempt nobody waits for the next before this; doubled up to the second figure.
BACKOFF_SECONDS, BACKOFF_LIMIT_SECONDS = 0.1, 2.0
# How long a failure makes a server the last choice.
SUSPECT_SECONDS = 10.0
# A connection over which nothing has come for so long although something is owed: is the server still there?
QUIET_SECONDS = 0.5
READ_SECONDS = 10.0
APPEND_SECONDS = 30.0
# Reading 64 MiB back from a slow disk behind others.
VERIFY_SECONDS = 300.0

Connect = Callable[[str, int], Awaitable[Transport]]


async def connect(host: str, port: int) -> Transport:
    return await transport.connect(host, port, timeout_seconds=CONNECT_SECONDS)


class Call(Generic[ReplyT]):
    """A request to a server on its way, perhaps still waiting for the connection. :meth:`wait` once."""

    __slots__ = ("_deadline", "_error", "_pending", "_ready", "_send", "since")

    def __init__(self, since: float, deadline: float, send: Callable[[Connection], Pending[ReplyT]]) -> None:
        self.since = since
        self._deadline = deadline
        self._send = send
        self._pending: Pending[ReplyT] | None = None
        self._error: DfsError | None = None
        self._ready: trio.Event | None = None

    def send(self, connection: Connection) -> None:
        """Called once, by the pool: this or :meth:`fail`."""
        if self._error is not None:
            return
        try:
            self._pending = self._send(connection)
        except DfsError as error:
            self._error = error
        self._wake()

    def abandon(self) -> None:
        """Nobody wants the answer any more: the server is told, or never asked."""
        if self._pending is not None:
            self._pending.abandon()
        elif self._error is None:
            self.fail(DfsError(ErrorCode.CANCELLED, "abandoned"))

    def fail(self, error: DfsError) -> None:
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._ready is not None:
            self._ready.set()

    async def wait(self) -> Answer[ReplyT]:
        """The answer; raises :class:`DfsError` (TIMEOUT, :class:`ConnectionLost`). Cancelling tells the server."""
        if self._pending is None and self._error is None:
            self._ready = trio.Event()
            with trio.move_on_at(self._deadline):
                await self._ready.wait()
        if self._error is not None:
            raise self._error
        if self._pending is None:
            raise DfsError(ErrorCode.TIMEOUT, "no connection in time")
        return await self._pending.wait()


class _Link:
    """The connection to one server. Invariant: calls wait in ``queue`` only while ``connecting``."""

    def __init__(self, peer: Peer, *, pings: bool) -> None:
        self.peer = peer
        self.pings = pings
        self.connection: Connection | None = None
        self.connecting = False
        self.queue: deque[Call[Any]] = deque()
        # When the last attempt to connect failed, and when the server last failed somebody: who goes on asking, and is
        # answered with the old failure meanwhile, must not put off the next attempt.
        self.refused_at = float("-inf")
        self.failed_at = float("-inf")
        self.backoff = 0.0
        self.error: DfsError | None = None


class Pool:
    """Connections to chunkservers; made by :func:`open_pool`. Servers are told apart by id, host and port.

    ``pulse`` tells who answers. A connection over which nothing comes although something is owed is closed once the
    server has left pings unanswered for ``patience_seconds``: what is on its way there fails.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        key: ClusterKey | None,
        cluster_id: str,
        *,
        role: str = CLIENT_ROLE,
        session: int = 0,
        connect: Connect = connect,
        patience_seconds: float = math.inf,
    ) -> None:
        self.pulse = Pulse(self.ping, nursery.start_soon)
        self._patience_seconds = patience_seconds
        self._nursery = nursery
        self._key = key
        self._cluster_id = cluster_id
        self._role = role
        self._session = session
        self._connect = connect
        self._links: dict[tuple[int, str, int, bool], _Link] = {}

    # -- connections -------------------------------------------------------------------------------------------

    def start(
        self,
        peer: Peer,
        method: Method[RequestT, ReplyT],
        message: RequestT,
        payload: Sequence[Buffer] = (),
        *,
        timeout: float = READ_SECONDS,
        trace_id: int = 0,
    ) -> Call[ReplyT]:
        """Sends without waiting, in the order of these calls; a failure shows in :meth:`Call.wait` only."""
        return self._start(self._link(peer), method, message, payload, timeout, trace_id)

    def _start(
        self,
        link: _Link,
        method: Method[RequestT, ReplyT],
        message: RequestT,
        payload: Sequence[Buffer],
        timeout: float,
        trace_id: int,
    ) -> Call[ReplyT]:
        # It may be sent by another task, once there is a connection.
        trace_id = trace_id or TRACE.get()

        def send(connection: Connection) -> Pending[ReplyT]:
            return connection.start(method, message, payload, timeout=timeout, trace_id=trace_id)

        now = trio.current_time()
        call = Call(now, now + timeout, send)
        if link.connection is not None and link.connection.lost is None:
            call.send(link.connection)
        elif link.connecting:
            link.queue.append(call)
        elif link.error is not None and trio.current_time() < link.refused_at + link.backoff:
            call.fail(link.error)
        else:
            link.connecting = True
            link.queue.append(call)
            self._nursery.start_soon(self._run_link, link)
        return call

    async def call(
        self,
        peer: Peer,
        method: Method[RequestT, ReplyT],
        message: RequestT,
        payload: Sequence[Buffer] = (),
        *,
        timeout: float = READ_SECONDS,
        trace_id: int = 0,
    ) -> Answer[ReplyT]:
        """:meth:`start` and :meth:`Call.wait` in one. Records a failure to answer, see :meth:`is_suspect`."""
        try:
            return await self.start(peer, method, message, payload, timeout=timeout, trace_id=trace_id).wait()
        except DfsError as error:
            if error.code in (ErrorCode.TIMEOUT, ErrorCode.UNAVAILABLE):
                self.suspect(peer)
            raise

    async def get(self, peer: Peer) -> Connection:
        """The connection itself; raises :class:`DfsError` if there is none to be had."""
        await self.call(peer, protocol.PING, Empty(), timeout=CONNECT_SECONDS)
        connection = self._link(peer).connection
        if connection is None:
            raise ConnectionLost(f"connection to {peer.host}:{peer.port} lost")
        return connection

    async def ping(self, peer: Peer, timeout: float = CONNECT_SECONDS) -> Pong:
        """Asks whether the server answers, past all data on its way there; raises :class:`DfsError`."""
        return (await self._start(self._link(peer, pings=True), protocol.PING, Empty(), (), timeout, 0).wait()).message

    def disconnect(self, peer: Peer, reason: str) -> None:
        """Fails everything that is on its way to the server; the next request connects anew."""
        connection = self._link(peer).connection
        if connection is not None:
            connection.close(reason)

    def is_connected(self, peer: Peer) -> bool:
        connection = self._link(peer).connection
        return connection is not None and connection.lost is None

    def suspect(self, peer: Peer) -> None:
        """Notes that the server just failed somebody."""
        self._link(peer).failed_at = trio.current_time()

    def is_suspect(self, peer: Peer) -> bool:
        """Whether it failed lately; such a server is better asked last."""
        link = self._links.get((peer.server, peer.host, peer.port, False))
        return link is not None and trio.current_time() < link.failed_at + SUSPECT_SECONDS

    def _link(self, peer: Peer, *, pings: bool = False) -> _Link:
        """``pings``: the connection for those alone, so that no data waits in front of them."""
        key = (peer.server, peer.host, peer.port, pings)
        link = self._links.get(key)
        if link is None:
            link = self._links[key] = _Link(peer, pings=pings)
        return link

    async def _run_link(self, link: _Link) -> None:
        """Connects, sends what waits, and runs the connection until it ends."""
        # Not only for the request that it was begun for.
        TRACE.set(0)
        try:
            connection = await self._handshake(link.peer)
        except DfsError as error:
            link.backoff = min(max(2 * link.backoff, BACKOFF_SECONDS), BACKOFF_LIMIT_SECONDS)
            link.refused_at = link.failed_at = trio.current_time()
            link.error = error
            self._end_queue(link, error)
            return
        except BaseException:
            self._end_queue(link, ConnectionLost("the pool was closed"))
            raise
        link.connection, link.connecting = connection, False
        link.backoff, link.error, link.failed_at = 0.0, None, float("-inf")
        while link.queue:
            link.queue.popleft().send(connection)
        if self._patience_seconds < math.inf and not link.pings:
            await self._run_watched(link, connection)
        else:
            await connection.run()
        if link.connection is connection:
            link.connection = None

    async def _run_watched(self, link: _Link, connection: Connection) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, link.peer, connection)
            await connection.run()
            nursery.cancel_scope.cancel()

    async def _watch(self, peer: Peer, connection: Connection) -> None:
        """Closes a connection to a server that has stopped to answer."""
        received = -1
        while True:
            await trio.sleep(QUIET_SECONDS)
            if connection.calls_in_flight and connection.bytes_received == received:
                self.pulse.watch(peer)
                silent = self.pulse.silent_seconds(peer.server)
                if silent >= self._patience_seconds:
                    connection.close(f"no answer to a ping for {silent:.1f} s")
            received = connection.bytes_received

    def _end_queue(self, link: _Link, error: DfsError) -> None:
        link.connecting = False
        while link.queue:
            link.queue.popleft().fail(error)

    async def _handshake(self, peer: Peer) -> Connection:
        with trio.move_on_after(CONNECT_SECONDS):
            return await self._greet(peer)
        # The kernel of a machine accepts connections also for a process that is frozen.
        raise ConnectionLost(f"{peer.host}:{peer.port} did not answer the greeting")

    async def _greet(self, peer: Peer) -> Connection:
        stream = await self._connect(peer.host, peer.port)
        return await connect_handshake(
            stream,
            refuse,
            key=self._key,
            cluster_id=self._cluster_id,
            role=self._role,
            server_role=protocol.ROLE,
            session=self._session,
        )

    def in_flight(self) -> Iterator[InFlight]:
        """What servers were asked and have not answered; ``connect`` for a connection that is being made."""
        for link in self._links.values():
            if link.connecting and link.queue:
                yield InFlight("connect", f"{link.peer.host}:{link.peer.port}", link.queue[0].since, 0)
            elif link.connection is not None and not link.pings:
                yield from link.connection.in_flight()

    # -- what can be asked -------------------------------------------------------------------------------------

    def append_start(
        self, peer: Peer, append: Append, payload: Sequence[Buffer], *, timeout: float = APPEND_SECONDS
    ) -> Call[AppendReply]:
        """An append on its way. The buffers must not change before it is answered."""
        return self.start(peer, protocol.APPEND, append, payload, timeout=timeout)

    async def append(
        self, peer: Peer, append: Append, payload: Sequence[Buffer], *, timeout: float = APPEND_SECONDS
    ) -> AppendReply:
        return (await self.call(peer, protocol.APPEND, append, payload, timeout=timeout)).message

    async def sync(self, peer: Peer, sync: Sync, *, timeout: float = APPEND_SECONDS) -> AppendReply:
        return (await self.call(peer, protocol.SYNC, sync, timeout=timeout)).message

    async def read(
        self, peer: Peer, chunk: int, offset: int, length: int, *, timeout: float = READ_SECONDS
    ) -> "Blocks":
        """Verified blocks that cover the logical range from ``offset`` on: the first contains it, fewer than asked
        for if they pass the payload limit or the end of the chunk. BAD_CHECKSUM if they are not what was written."""
        answer = await self.call(peer, protocol.READ, Read(chunk, offset, length), timeout=timeout)
        entries = verify_blocks(answer.message.entries, answer.payload)
        if entries and not entries[0].logical_offset <= offset < entries[0].logical_offset + entries[0].logical_length:
            raise DfsError(ErrorCode.BAD_CHECKSUM, "blocks of another place were sent")
        return Blocks(entries, answer.payload)

    async def stat(self, peer: Peer, chunk: int, *, timeout: float = READ_SECONDS) -> StatReply:
        return (await self.call(peer, protocol.STAT, Stat(chunk), timeout=timeout)).message

    async def verify(self, peer: Peer, chunk: int, *, timeout: float = VERIFY_SECONDS) -> VerifyReply:
        return (await self.call(peer, protocol.VERIFY, Verify(chunk), timeout=timeout)).message

    async def read_raw(
        self, peer: Peer, chunk: int, position: int, length: int, *, timeout: float = READ_SECONDS
    ) -> Buffer:
        """Bytes of a chunk's file, neither checked nor necessarily all."""
        return (await self.call(peer, protocol.READ_RAW, ReadRaw(chunk, position, length), timeout=timeout)).payload

    async def read_index(
        self, peer: Peer, chunk: int, index: int, count: int, *, timeout: float = READ_SECONDS
    ) -> ReadIndexReply:
        return (await self.call(peer, protocol.READ_INDEX, ReadIndex(chunk, index, count), timeout=timeout)).message

    async def list_chunks(
        self, peer: Peer, after: int, count: int, *, timeout: float = VERIFY_SECONDS
    ) -> ListChunksReply:
        """Replicas with ids above ``after``; what a restart froze is read back from the disk first."""
        return (await self.call(peer, protocol.LIST_CHUNKS, ListChunks(after, count), timeout=timeout)).message


@asynccontextmanager
async def open_pool(key: ClusterKey | None, cluster_id: str, **options: Any) -> AsyncIterator[Pool]:
    """A pool that lives as long as the block; ``options`` are those of :class:`Pool`."""
    async with trio.open_nursery() as nursery:
        yield Pool(nursery, key, cluster_id, **options)
        nursery.cancel_scope.cancel()


class Blocks(NamedTuple):
    """Whole blocks, checked: their entries, and their stored bytes back to back."""

    entries: list[Entry]
    payload: Buffer


def verify_blocks(entries: bytes, payload: Buffer) -> list[Entry]:
    """The entries of an answer, after checking that they continue each other and that every block has its checksum.

    Raises BAD_CHECKSUM.
    """
    try:
        decoded = chunkfile.decode_entries(entries)
    except FormatError as error:
        raise DfsError(ErrorCode.BAD_CHECKSUM, str(error)) from None
    view, index = memoryview(payload), memoryview(entries)
    at = 0
    for number, entry in enumerate(decoded):
        block = view[at : at + entry.stored_length]
        if len(block) != entry.stored_length or crc32c(block) != entry.crc:
            raise DfsError(ErrorCode.BAD_CHECKSUM, f"the block at {entry.stored_offset} has a wrong checksum")
        start = number * ENTRY_BYTES
        if number and crc32c(index[start : start + ENTRY_BYTES - 4], decoded[number - 1].chain) != entry.chain:
            raise DfsError(ErrorCode.BAD_CHECKSUM, f"the entry of the block at {entry.stored_offset} is damaged")
        at += entry.stored_length
    if at != len(view):
        raise DfsError(ErrorCode.BAD_CHECKSUM, "more bytes than the entries speak of")
    return decoded


class ControlClient:
    """The metaserver's control plane, for a worker thread: every call blocks, at most ``timeout`` seconds a step.

    ``addresses`` are ``host:port``; the one that answered last is asked first.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        key: ClusterKey | None,
        *,
        timeout: float = 5.0,
        transport: "httpx.BaseTransport | None" = None,
    ) -> None:
        import httpx  # not at the top: mounts import this module and never speak HTTP

        headers = {"Authorization": f"Bearer {key.http_token}"} if key is not None else {}
        self._httpx = httpx
        self._client = httpx.Client(headers=headers, timeout=timeout, transport=transport, trust_env=False)
        self._addresses = list(addresses)

    def close(self) -> None:
        self._client.close()

    def post(self, path: str, message: msgspec.Struct, reply: type[JsonT]) -> JsonT:
        """Sends one JSON object and decodes the answer; :class:`ConnectionLost` if no address answers, and whatever
        :class:`DfsError` the metaserver sends."""
        problem = "no address"
        for address in list(self._addresses):
            try:
                response = self._client.post(f"http://{address}{path}", content=msgspec.json.encode(message))
            except self._httpx.HTTPError as error:
                problem = f"{address}: {error}"
                continue
            self._addresses.remove(address)
            self._addresses.insert(0, address)
            if response.status_code >= 400:
                raise _http_error(address, response.status_code, response.content)
            try:
                return msgspec.json.decode(response.content, type=reply)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise DfsError(ErrorCode.PROTOCOL, f"{address} does not answer as a metaserver: {error}") from None
        raise ConnectionLost(f"cannot reach the metaserver ({problem})")


class _HttpFailure(msgspec.Struct):
    code: str
    text: str


def _http_error(address: str, status: int, body: bytes) -> DfsError:
    try:
        failure = msgspec.json.decode(body, type=_HttpFailure)
        return DfsError(ErrorCode[failure.code], failure.text)
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError):
        return DfsError(ErrorCode.PROTOCOL, f"{address} answered HTTP status {status}: is it the metaserver's address?")

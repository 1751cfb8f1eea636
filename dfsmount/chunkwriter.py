"""One chunk being written: blocks go to its end, on all replicas, several requests in flight.

A batch's appends go out one after another; the last carries ``sync``, so that its answer means that all of them are on
stable storage on every replica. Answers come in order. What was sent for a chunk offset is never replaced: after any
failure nothing more is appended to the chunk (docs/design.md 7.5).
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar
from uuid import UUID

import trio

from chunkserver import protocol as chunk_protocol
from chunkserver.chunkfile import MAX_ENTRIES, PAYLOAD_CAPACITY, first_chain
from chunkserver.protocol import Append, AppendReply, Peer
from chunkserver.pulse import Pulse
from dfsmount.blocks import Block, encode_parts
from metaserver.connection import Answer
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import Allocated, ChunkProgress
from metaserver.wire import Buffer, Method

RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")
ReplyT_co = TypeVar("ReplyT_co", covariant=True)


class Waitable(Protocol[ReplyT_co]):
    """A request on its way; ``wait`` raises :class:`DfsError`. ``abandon``: nobody wants the answer any more."""

    async def wait(self) -> ReplyT_co: ...

    def abandon(self) -> None: ...


class Failure(NamedTuple):
    """Why an append is not on all replicas, and the servers to blame. ``reported``: by another server."""

    servers: tuple[int, ...]
    error: DfsError
    reported: bool = False


class Requests(Protocol):
    """What is needed of ``chunkserver.client.Pool``."""

    pulse: Pulse

    def disconnect(self, peer: Peer, reason: str) -> None: ...

    def start(
        self,
        peer: Peer,
        method: Method[RequestT, ReplyT],
        message: RequestT,
        payload: Sequence[Buffer] = (),
        *,
        timeout: float = ...,
    ) -> Waitable[Answer[ReplyT]]: ...


class Sent:
    """Appends on their way, and the state of the chunk after them."""

    __slots__ = ("_appends", "_chunk", "progress", "started")

    def __init__(self, chunk: "OpenChunk", appends: list[tuple[Waitable[Answer[AppendReply]], ChunkProgress]]) -> None:
        self._chunk = chunk
        self._appends = appends
        self.progress = appends[-1][1]
        self.started = trio.current_time()

    async def acknowledged(self) -> Failure | None:
        """Waits for all answers; None if every replica has everything on stable storage."""
        for append, expected in self._appends:
            failure = await self._chunk.outcome(append, expected)
            if failure is not None:
                return failure
        return None

    def abandon(self) -> None:
        """Nobody wants the answers any more: servers need not wait for those that do not answer them."""
        for append, _ in self._appends:
            append.abandon()


class OpenChunk:
    """A chunk of this session that takes appends.

    ``length``, ``entries`` and ``chain`` are what has been sent. ``uncommitted`` counts the batches that were sent here
    and neither committed nor given up. ``failed``: nothing more may be appended. ``retired``: it is to be sealed once
    nothing is uncommitted; ``blamed`` are the servers to name then.
    """

    def __init__(self, allocated: Allocated, cluster: UUID, session: int, pool: Requests) -> None:
        self.chunk = allocated.chunk
        self.peers = tuple(Peer(server.server, server.host, server.port) for server in allocated.servers)
        self.session = session
        # What is reserved for it; a chunk of a cluster that is nearly full takes less than others.
        self.limit = min(allocated.limit, PAYLOAD_CAPACITY)
        self.length = 0
        self.entries = 0
        self.chain = first_chain(cluster, allocated.chunk)
        self.uncommitted = 0
        self.failed = False
        self.retired = False
        self.blamed: tuple[int, ...] = ()
        # On fewer servers than wanted, or on servers that one had better do without: only until that time.
        self.makeshift = len(allocated.servers) < allocated.copies
        self.until = math.inf
        self._tolerated: frozenset[int] = frozenset()
        self._tolerated_mute: frozenset[int] = frozenset()
        self.opened_at = self.used_at = trio.current_time()
        self._pool = pool

    def __repr__(self) -> str:
        return f"<chunk {self.chunk:x} on {[peer.server for peer in self.peers]}, {self.length} bytes>"

    @property
    def servers(self) -> tuple[int, ...]:
        return tuple(peer.server for peer in self.peers)

    def tolerates(self, slow: frozenset[int], mute: frozenset[int]) -> None:
        """It was asked for without servers known as slow, or as mute: if it has them, there were not enough others."""
        self._tolerated, self._tolerated_mute = slow, mute
        self.makeshift |= not (slow | mute).isdisjoint(self.servers)

    def ends_for(self, mute: frozenset[int]) -> tuple[int, ...]:
        """Its servers among ``mute``, for which another chunk may do better."""
        return tuple(server for server in self.servers if server in mute - self._tolerated_mute)

    def is_slowed_by(self, slow: frozenset[int]) -> bool:
        """Whether another chunk may do without one of ``slow`` that this one has."""
        return not (slow - self._tolerated).isdisjoint(self.servers)

    @property
    def room(self) -> int:
        """Bytes that can still be appended."""
        return 0 if self.failed or self.retired else self.limit - self.length

    def fits(self, length: int, blocks: int) -> bool:
        return length <= self.room and self.entries + blocks <= MAX_ENTRIES

    def append(self, blocks: Sequence[Block], counters: Iterator[int], timeout: float) -> Sent:
        """Sends ``blocks`` (at least one) on their way, without waiting."""
        appends = []
        parts = encode_parts(blocks, self.length, self.chain, self.session, counters)
        first, *rest = self.peers
        for number, part in enumerate(parts, 1):
            request = Append(
                self.chunk, self.entries, self.length, self.chain, part.entries, tuple(rest), number == len(parts)
            )
            self.length += part.length
            self.entries += part.blocks
            self.chain = part.chain
            call = self._pool.start(first, chunk_protocol.APPEND, request, part.payload, timeout=timeout)
            appends.append((call, ChunkProgress(self.chunk, self.length, self.entries, self.chain)))
        self.uncommitted += 1
        self.used_at = trio.current_time()
        return Sent(self, appends)

    async def outcome(self, append: Waitable[Answer[AppendReply]], expected: ChunkProgress) -> Failure | None:
        """Waits for one answer and judges it."""
        first = self.peers[0].server
        try:
            reply = (await append.wait()).message
        except DfsError as error:
            # The first waits for those behind it: a time-out does not tell who was slow (see lookout).
            return Failure(() if error.code is ErrorCode.TIMEOUT else (first,), error)
        if reply.failures:
            known = tuple(failure for failure in reply.failures if failure.code != ErrorCode.CANCELLED)
            cause = (known or reply.failures)[0]
            text = f"server {cause.server}: {cause.text}"
            return Failure(tuple(failure.server for failure in known), DfsError(_code(cause.code), text), True)
        reached = reply.progress
        if ChunkProgress(self.chunk, reached.stored_length, reached.entries, reached.chain) != expected:
            return Failure((first,), DfsError(ErrorCode.CHAIN_MISMATCH, "an append was answered with another state"))
        return None


def _code(number: int) -> ErrorCode:
    try:
        return ErrorCode(number)
    except ValueError:
        return ErrorCode.INTERNAL

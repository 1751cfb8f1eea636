"""Passing appends and syncs on to the next replica while this one is being written."""

from collections.abc import Sequence

from chunkserver import protocol
from chunkserver.client import Call, Pool
from chunkserver.protocol import Append, AppendReply, Peer, ReplicaFailure, Sync
from metaserver.errors import DfsError, ErrorCode
from metaserver.wire import Buffer

# What one server may take for its part; each waits for all that come after it, so that the failing one is blamed.
FORWARD_SECONDS = 5.0
# With an fdatasync in it, which queues behind whatever else that disk is doing.
FORWARD_SYNC_SECONDS = 20.0


class Forwarded:
    """One request on its way down the chain."""

    __slots__ = ("_call", "_peers")

    def __init__(self, call: Call[AppendReply], peers: tuple[Peer, ...]) -> None:
        self._call = call
        self._peers = peers

    async def failures(self) -> tuple[ReplicaFailure, ...]:
        """Which replicas further on do not have it. Those behind one that failed come with CANCELLED: it is not
        known whether it reached them. Never raises :class:`DfsError`."""
        try:
            return (await self._call.wait()).message.failures
        except DfsError as error:
            first, *rest = self._peers
            behind = f"{first.host}:{first.port} before it failed"
            return (
                ReplicaFailure(first.server, error.code, error.text),
                *(ReplicaFailure(peer.server, ErrorCode.CANCELLED, behind) for peer in rest),
            )


class Forwarder:
    """Keeps the order: what is passed on to one server leaves in the order of these calls."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def append(self, request: Append, payload: Sequence[Buffer], trace_id: int) -> Forwarded | None:
        """Starts sending to the first of ``forward_to``, which passes it on to the rest; None if there is none."""
        if not request.forward_to:
            return None
        first, *rest = request.forward_to
        passed = Append(
            request.chunk,
            request.index,
            request.offset,
            request.chain,
            request.entries,
            tuple(rest),
            request.sync,
        )
        timeout = _timeout(request.sync, len(request.forward_to))
        call = self._pool.start(first, protocol.APPEND, passed, payload, timeout=timeout, trace_id=trace_id)
        return Forwarded(call, request.forward_to)

    def sync(self, request: Sync, trace_id: int) -> Forwarded | None:
        if not request.forward_to:
            return None
        first, *rest = request.forward_to
        passed = Sync(request.chunk, request.length, request.chain, tuple(rest))
        timeout = _timeout(True, len(request.forward_to))
        call = self._pool.start(first, protocol.SYNC, passed, timeout=timeout, trace_id=trace_id)
        return Forwarded(call, request.forward_to)


def _timeout(sync: bool, servers: int) -> float:
    return (FORWARD_SYNC_SECONDS if sync else FORWARD_SECONDS) * servers

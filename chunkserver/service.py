"""What a chunkserver answers on the data plane: decode, call the store, encode.

The part of a handler before its coroutine runs in the order in which requests arrive on a connection; that is what
keeps appends in order, here and on the way to the next replica.
"""

from collections.abc import Callable, Coroutine
from contextlib import suppress
from time import perf_counter_ns
from typing import Any

import trio

from chunkserver import protocol
from chunkserver.forward import Forwarded, Forwarder
from chunkserver.identity import Identity
from chunkserver.protocol import (
    Append,
    AppendReply,
    ListChunks,
    ListChunksReply,
    Listed,
    Pong,
    Read,
    ReadIndex,
    ReadIndexReply,
    ReadRaw,
    ReadReply,
    Stat,
    StatReply,
    Sync,
    Verify,
    VerifyReply,
)
from chunkserver.replica import Replica, Write
from chunkserver.store import Store
from metaserver import wire
from metaserver.connection import Connection, Incoming, Reply, Result
from metaserver.errors import DfsError, ErrorCode
from metaserver.timings import Timing
from metaserver.tracing import TRACE
from metaserver.wire import Buffer, Empty

Handler = Callable[[Any, Buffer, int], Result]

# Replicas in one answer: with its envelope about half of wire.BODY_LIMIT.
PAGE_CHUNKS = 5_000


class Service:
    """Dispatches one store's requests. ``in_flight`` counts those under way, for draining."""

    def __init__(self, store: Store, forwarder: Forwarder, identity: Callable[[], Identity]) -> None:
        self._store = store
        self._forwarder = forwarder
        self._identity = identity
        self.in_flight = 0
        self._draining = False
        self._answered = trio.lowlevel.ParkingLot()
        handlers: list[tuple[wire.Method[Any, Any], Handler]] = [
            (protocol.APPEND, self._append),
            (protocol.SYNC, self._sync),
            (protocol.READ, self._read),
            (protocol.READ_INDEX, self._read_index),
            (protocol.STAT, self._stat),
            (protocol.VERIFY, self._verify),
            (protocol.READ_RAW, self._read_raw),
            (protocol.PING, self._ping),
            (protocol.LIST_CHUNKS, self._list_chunks),
        ]
        wire.method_table(*(method for method, _ in handlers))
        self._handlers = {method.number: (method, handler) for method, handler in handlers}
        # How long requests take, by method.
        self.timings = {number: Timing() for number in self._handlers}
        # Waiting for what is not in memory.
        self.disk = Timing()
        self.names = {number: method.name for number, (method, _) in self._handlers.items()}

    def dispatch(self, _: Connection, incoming: Incoming) -> Result:
        """The :data:`metaserver.connection.Dispatch` of every connection."""
        try:
            method, handler = self._handlers[incoming.method]
        except KeyError:
            raise DfsError(ErrorCode.UNKNOWN_METHOD, f"method {incoming.method} is not served here") from None
        request = method.decode_request(incoming.body).message
        result = handler(request, incoming.payload, incoming.trace_id)
        return result if isinstance(result, Reply) else self._counted(result)

    async def _counted(self, result: Coroutine[Any, Any, Reply]) -> Reply:
        self.in_flight += 1
        try:
            return await result
        finally:
            self.in_flight -= 1
            self._answered.unpark_all()

    def traced(self, trace_id: int) -> list[tuple[str, float]]:
        """What was done for a trace of late, and how long each took in seconds."""
        kinds = [*((self.names[number], timing) for number, timing in self.timings.items()), ("disk", self.disk)]
        return [
            (name, each.duration_ns / 1e9)
            for name, timing in kinds
            for each in timing.recent
            if each.trace_id == trace_id
        ]

    async def drain(self) -> None:
        """Refuses appends from now on; returns when nothing is under way."""
        self._draining = True
        while self.in_flight:
            await self._answered.park()

    # -- writing -----------------------------------------------------------------------------------------------

    def _append(self, request: Append, payload: Buffer, trace_id: int) -> Result:
        if self._draining:
            raise DfsError(ErrorCode.UNAVAILABLE, "this server is shutting down")
        appends = self._store.appends
        write = appends.admit(request, payload)
        forwarded = self._forwarder.append(request, [payload], trace_id)
        appends.carry_out(write)
        if write.done and forwarded is None and not request.sync:
            if write.error is not None:
                raise write.error
            return Reply(AppendReply(write.after, ()))
        return self._finish_append(write, request.sync, forwarded)

    async def _finish_append(self, write: Write, sync: bool, forwarded: Forwarded | None) -> Reply:
        await self._store.appends.written(write)
        failures = await self._both(write.replica, write.after.entries if sync else 0, forwarded)
        return Reply(AppendReply(write.after, failures))

    def _sync(self, request: Sync, _: Buffer, trace_id: int) -> Result:
        replica = self._store.table.readable(request.chunk)
        entries = self._store.appends.synced_point(replica, request.length, request.chain)
        forwarded = self._forwarder.sync(request, trace_id)
        return self._finish_sync(replica, entries, forwarded)

    async def _finish_sync(self, replica: Replica, entries: int, forwarded: Forwarded | None) -> Reply:
        failures = await self._both(replica, entries, forwarded)
        return Reply(AppendReply(replica.written, failures))

    async def _both(
        self, replica: Replica, entries: int, forwarded: Forwarded | None
    ) -> tuple[protocol.ReplicaFailure, ...]:
        """Syncs ``entries`` here (0: nothing) while those further on do their part."""
        failures: tuple[protocol.ReplicaFailure, ...] = ()
        error: DfsError | None = None

        async def sync() -> None:
            nonlocal error
            try:
                await self._store.appends.sync(replica, entries)
            except DfsError as problem:
                error = problem

        if entries and forwarded is not None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sync)
                failures = await forwarded.failures()
        elif entries:
            await sync()
        elif forwarded is not None:
            failures = await forwarded.failures()
        if error is not None:
            raise error
        return failures

    # -- reading -----------------------------------------------------------------------------------------------

    def _read(self, request: Read, _: Buffer, trace_id: int) -> Result:
        answer = self._store.reads.read_now(request.chunk, request.offset, request.length)
        if answer is not None:
            return Reply(ReadReply(answer[0]), [answer[1]])
        return self._read_from_disk(request)

    async def _read_from_disk(self, request: Read) -> Reply:
        begun_ns = perf_counter_ns()
        entries, data = await self._store.reads.read(request.chunk, request.offset, request.length)
        duration_ns = perf_counter_ns() - begun_ns
        self.disk.add(duration_ns)
        if trace := TRACE.get():
            self.disk.remember(trace, duration_ns)
        return Reply(ReadReply(entries), [data])

    async def _read_index(self, request: ReadIndex, _: Buffer, trace_id: int) -> Reply:
        replica = self._store.table.find(request.chunk)
        entries = await self._store.reads.entries(request.chunk, request.index, request.count)
        return Reply(ReadIndexReply(entries, replica.written))

    async def _read_raw(self, request: ReadRaw, _: Buffer, trace_id: int) -> Reply:
        return Reply(Empty(), [await self._store.reads.raw(request.chunk, request.position, request.length)])

    def _stat(self, request: Stat, _: Buffer, trace_id: int) -> Reply:
        replica = self._store.table.find(request.chunk)
        path = f"{self._store.table.disk.root}/{replica.path}"
        return Reply(StatReply(replica.written, replica.state.name, path, replica.created_ns))

    async def _verify(self, request: Verify, _: Buffer, trace_id: int) -> Reply:
        bad = await self._store.reads.verify(request.chunk)
        return Reply(VerifyReply(self._store.table.readable(request.chunk).written, tuple(bad)))

    def _ping(self, request: Empty, _: Buffer, trace_id: int) -> Reply:
        return Reply(Pong(int(self._store.appends.disk_seconds * 1000)))

    async def _list_chunks(self, request: ListChunks, _: Buffer, trace_id: int) -> Reply:
        """For rebuilding a metaserver: all there is, given up or not; what a restart froze is read back first."""
        table = self._store.table
        count = max(1, min(request.count, PAGE_CHUNKS))
        replicas = table.page(max(0, request.after), count)
        for replica in replicas:
            if not replica.verified:
                # If it cannot be read, its ``error`` says so.
                with suppress(DfsError):
                    await self._store.reads.ensure_verified(replica)
        identity = self._identity()
        reply = ListChunksReply(
            tuple(_listed(replica) for replica in replicas),
            len(replicas) < count,
            identity.highest_epoch,
            max(identity.highest_chunk, table.highest_chunk),
            identity.server,
            identity.name,
            table.disk.root,
        )
        return Reply(reply)


def _listed(replica: Replica) -> Listed:
    report = replica.report()
    return Listed(
        report.chunk, report.length, report.entries, report.chain, report.sealed, report.error, replica.created_ns
    )

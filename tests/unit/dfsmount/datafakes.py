"""A metaserver and chunkservers in memory for the data path: strict about the protocol, and able to fail on request.

What they check on every call is what the data path promises: bytes of a chunk offset are never replaced, entries
continue their chain, and a commit names only what is on stable storage on every replica that is not given up.
"""

from collections import defaultdict, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from enum import Enum, auto
from typing import Any
from uuid import UUID

import trio

from chunkserver import chunkfile
from chunkserver import protocol as chunk_protocol
from chunkserver.chunkfile import Entry
from chunkserver.client import Blocks, verify_blocks
from chunkserver.protocol import Append, AppendReply, Peer, Pong, Progress, ReplicaFailure
from chunkserver.pulse import Pulse
from dfsmount.cache import BlockCache
from dfsmount.extents import ExtentMap
from dfsmount.filestate import FileState
from dfsmount.jobs import Jobs
from dfsmount.reader import Reader, ReaderOptions
from dfsmount.writer import Writer, WriterOptions
from metaserver import protocol
from metaserver.connection import Answer
from metaserver.errors import ConnectionLost, DfsError, ErrorCode
from metaserver.protocol import (
    FILE_SIZE_MAX,
    Allocated,
    Attributes,
    ChunkPlace,
    Commit,
    Committed,
    Extent,
    FileMap,
    ServerAddress,
    SetAttributes,
)
from metaserver.protocol import (
    Entry as FileEntry,
)
from metaserver.space import chunk_limit, footprint
from metaserver.wire import Empty, Method, Response

CLUSTER = UUID(int=7)
HOST = "127.0.0.1"
MIB = 1 << 20
SESSION = 5


class Trouble(Enum):
    """What happens to one append at one server."""

    REFUSE = auto()  # not stored, an error is answered
    DROP = auto()  # not stored, the connection is lost
    LOSE = auto()  # stored, but the answer is lost with the connection
    HANG = auto()  # not stored, no answer ever
    SLOW = auto()  # stored, answered after two seconds


class FakeReplica:
    def __init__(self, chunk: int) -> None:
        self.data = bytearray()
        self.entries: list[Entry] = []
        self.chains = [chunkfile.first_chain(CLUSTER, chunk)]
        self.synced = 0

    @property
    def progress(self) -> Progress:
        return Progress(len(self.data), len(self.data), len(self.entries), self.chains[-1])

    def append(self, request: Append, payload: bytes) -> None:
        entries = chunkfile.check_entries(request.entries, request.chain, request.offset)
        if request.index != len(self.entries) or request.offset != len(self.data):
            raise DfsError(ErrorCode.WRONG_OFFSET, f"at {len(self.entries)}, asked for {request.index}")
        if request.chain != self.chains[-1]:
            raise DfsError(ErrorCode.CHAIN_MISMATCH)
        verify_blocks(request.entries, payload)
        self.data += payload
        self.entries += entries
        self.chains += [entry.chain for entry in entries]
        if request.sync:
            self.synced = len(self.entries)


class FakeServer:
    def __init__(self, server: int) -> None:
        self.server = server
        self.replicas: dict[int, FakeReplica] = {}
        self.troubles: deque[Trouble] = deque()
        self.down = False
        self.silent = False
        # Each request takes so much longer; and each that writes to the disk.
        self.request_seconds = 0.0
        self.disk_seconds = 0.0
        self.corrupt = False
        self.read_seconds = 0.0
        self.appends = 0
        self.reads: list[tuple[int, int, int]] = []


class FakeCall:
    def __init__(self, outcome: Any, ready_at: float) -> None:
        self._outcome = outcome
        self._ready_at = ready_at

    def abandon(self) -> None:
        self._outcome = DfsError(ErrorCode.CANCELLED)

    async def wait(self) -> Any:
        await trio.sleep_until(self._ready_at)
        if isinstance(self._outcome, DfsError):
            raise self._outcome
        return Answer(Response(0, 0, self._outcome), b"")


class FakePool:
    """Plays ``chunkserver.client.Pool``. Appends happen in order, when they are started; answers take a while."""

    def __init__(self, count: int = 3) -> None:
        self.servers = {number: FakeServer(number) for number in range(1, count + 1)}
        self.latency_seconds = 0.001
        self.disk_seconds = 0.0
        self.jobs = Jobs()
        self.pulse = Pulse(self.ping, self.jobs.start)
        self.disconnected: list[int] = []

    def disconnect(self, peer: Peer, reason: str) -> None:
        self.disconnected.append(peer.server)

    async def ping(self, peer: Peer, timeout: float = 3.0) -> Pong:
        server = self.servers[peer.server]
        started = trio.current_time()
        while server.silent:
            await trio.sleep(0.1)
            if trio.current_time() > started + timeout:
                raise DfsError(ErrorCode.TIMEOUT)
        await trio.sleep(self.latency_seconds + server.request_seconds)
        if server.down:
            raise ConnectionLost("down")
        return Pong(int(1000 * max(server.disk_seconds, self.disk_seconds)))

    def start(
        self,
        peer: Peer,
        method: Method[Any, Any],
        message: Any,
        payload: Sequence[Any] = (),
        *,
        timeout: float = 10.0,
    ) -> FakeCall:
        now = trio.current_time()
        server = self.servers[peer.server]
        if server.down:
            return FakeCall(ConnectionLost("down"), now + self.latency_seconds)
        if server.silent:
            return FakeCall(DfsError(ErrorCode.TIMEOUT), now + timeout)
        assert method is chunk_protocol.APPEND
        try:
            outcome, seconds = self._append(server, message, b"".join(payload))
        except DfsError as error:
            outcome, seconds = error, 0.0
        seconds += self.disk_seconds
        if seconds >= timeout:
            return FakeCall(DfsError(ErrorCode.TIMEOUT), now + timeout)
        return FakeCall(outcome, now + self.latency_seconds + seconds)

    def _append(self, server: FakeServer, request: Append, payload: bytes) -> tuple[Any, float]:
        server.appends += 1
        if server.silent:
            return None, 1e9
        trouble = server.troubles.popleft() if server.troubles else None
        if server.down or trouble is Trouble.DROP:
            raise ConnectionLost("dropped")
        if trouble is Trouble.REFUSE:
            raise DfsError(ErrorCode.DISK_FULL)
        if trouble is Trouble.HANG:
            return None, 1e9
        replica = server.replicas.setdefault(request.chunk, FakeReplica(request.chunk))
        replica.append(request, payload)
        failures, seconds = self._forward(request, payload)
        if trouble is Trouble.LOSE:
            raise ConnectionLost("answer lost")
        seconds = max(seconds, server.disk_seconds) + server.request_seconds
        return AppendReply(replica.progress, failures), seconds + (2.0 if trouble is Trouble.SLOW else 0.0)

    def _forward(self, request: Append, payload: bytes) -> tuple[tuple[ReplicaFailure, ...], float]:
        if not request.forward_to:
            return (), 0.0
        first, *rest = request.forward_to
        passed = Append(
            request.chunk, request.index, request.offset, request.chain, request.entries, tuple(rest), request.sync
        )
        try:
            reply, seconds = self._append(self.servers[first.server], passed, payload)
        except DfsError as error:
            return (ReplicaFailure(first.server, int(error.code), error.text),), 0.0
        return (reply.failures if reply is not None else ()), seconds

    async def read(self, peer: Peer, chunk: int, offset: int, length: int, *, timeout: float = 10.0) -> Blocks:
        server = self.servers[peer.server]
        server.reads.append((chunk, offset, length))
        await trio.sleep(min(self.latency_seconds + server.read_seconds + server.request_seconds, timeout))
        if server.silent:
            await trio.sleep(timeout)
            raise DfsError(ErrorCode.TIMEOUT)
        if server.down:
            raise ConnectionLost("down")
        if server.read_seconds >= timeout:
            raise DfsError(ErrorCode.TIMEOUT)
        replica = server.replicas.get(chunk)
        if replica is None:
            raise DfsError(ErrorCode.NO_SUCH_CHUNK)
        found = [e for e in replica.entries if e.logical_offset + e.logical_length > offset]
        found = [e for e in found if e.logical_offset < offset + length]
        if not found:
            return Blocks([], b"")
        payload = bytearray(replica.data[found[0].stored_offset : found[-1].stored_offset + found[-1].stored_length])
        if server.corrupt:
            payload[len(payload) // 2] ^= 1
        entries = b"".join(chunkfile._ENTRY.pack(*e[:13]) + e.chain.to_bytes(4, "little") for e in found)
        return Blocks(verify_blocks(entries, payload), payload)

    def is_suspect(self, peer: Peer) -> bool:
        return False


class FakeChunk:
    def __init__(self, servers: tuple[int, ...], limit: int) -> None:
        self.servers = servers
        self.limit = limit
        self.bad: set[int] = set()
        self.length = self.entries = 0
        self.sealed = False


class FakeMeta:
    """Plays ``metaserver.client.MetaClient`` and the metaserver behind it."""

    def __init__(self, pool: FakePool, copies: int = 2) -> None:
        self.session = SESSION
        self.cluster_id = str(CLUSTER)
        self.space_short = False
        self.pool = pool
        self.copies = copies
        self.min_copies = 1
        self.latency_seconds = 0.001
        self.files: dict[int, Attributes] = {}
        self.maps: dict[int, ExtentMap] = {}
        self.chunks: dict[int, FakeChunk] = {}
        self.calls: dict[str, int] = defaultdict(int)
        self.commits: list[Commit] = []
        self.reports: list[protocol.ReportReplica] = []
        self.sealed: list[tuple[int, tuple[int, ...]]] = []
        self.space = 1 << 40
        self.page = 1000
        self.errors: dict[str, deque[DfsError]] = defaultdict(deque)
        self._next = 100

    # -- the client's surface ------------------------------------------------------------------------------------

    async def call(self, method: Method[Any, Any], message: Any, *, timeout: float = 30.0, trace_id: int = 0) -> Any:
        self.calls[method.name] += 1
        await trio.sleep(self.latency_seconds)
        if self.errors[method.name]:
            raise self.errors[method.name].popleft()
        reply = getattr(self, "_" + method.name)(message)
        await trio.sleep(self.latency_seconds)
        return reply

    def now_ns(self) -> int:
        return int(trio.current_time() * 1e9)

    def peer(self, server: int) -> ServerAddress | None:
        return ServerAddress(server, HOST, 1000 + server, "", 1)

    async def servers(self) -> dict[int, ServerAddress]:
        return {number: ServerAddress(number, HOST, 1000 + number, "", 1) for number in self.pool.servers}

    # -- what tests ask ------------------------------------------------------------------------------------------

    def create(self) -> FileEntry:
        self._next += 1
        now = self.now_ns()
        self.files[self._next] = Attributes(self._next, 0o100644, 0, 0, 1, 0, 0, now, now, now, now, 0, 0, 0, 0, 0)
        self.maps[self._next] = ExtentMap()
        return FileEntry(self.files[self._next])

    def entry(self, ino: int, *, with_map: bool = False) -> FileEntry:
        page = self._map(ino, 0, FILE_SIZE_MAX) if with_map else None
        return FileEntry(self._attributes(ino), page)

    def truncate(self, ino: int, size: int) -> Attributes:
        attributes = self.files[ino]
        if size != attributes.size:
            self.maps[ino].truncate(size)
            self._change(ino, size=size, truncate_generation=attributes.truncate_generation + 1)
        return self._attributes(ino)

    def content(self, ino: int, *, server: int = 0) -> bytes:
        """A file as one set of replicas has it: each chunk from its ``server``-th. What is committed is on all of
        them, those that failed later included."""
        data = bytearray(self.files[ino].size)
        for extent in self.maps[ino]:
            chunk = self.chunks[extent.chunk]
            replica = self.pool.servers[chunk.servers[server % len(chunk.servers)]].replicas[extent.chunk]
            part = replica.data[extent.chunk_offset : extent.chunk_offset + extent.length]
            data[extent.file_offset : extent.file_offset + extent.length] = part
        return bytes(data)

    def move_chunk(self, chunk: int) -> None:
        """What the cleaner does: the bytes are in a new chunk, the old one is gone."""
        self._next += 1
        old = self.chunks.pop(chunk)
        self.chunks[self._next] = old
        for number in old.servers:
            replica = self.pool.servers[number].replicas.pop(chunk)
            self.pool.servers[number].replicas[self._next] = replica
        for ino, known in self.maps.items():
            moved = [e for e in known if e.chunk == chunk]
            known.apply([Extent(e.file_offset, e.length, self._next, e.chunk_offset) for e in moved])
            assert ino in self.files

    # -- the metaserver ------------------------------------------------------------------------------------------

    def _allocate(self, message: protocol.Allocate) -> Allocated:
        up = [n for n, server in self.pool.servers.items() if not server.down]
        others = [n for n in up if n not in message.never]
        up = others if len(others) >= self.min_copies else up
        wanted = [n for n in up if n not in message.avoid]
        copies = message.copies or self.copies
        if not up:
            raise DfsError(ErrorCode.UNAVAILABLE, "no server")
        if self.space < footprint(message.needed):
            raise DfsError(ErrorCode.NO_SPACE)
        limit = chunk_limit(self.space, message.needed)
        self.space -= limit
        self._next += 1
        first = self._next % max(1, len(wanted))
        others = [n for n in up if n in message.avoid]
        chosen = tuple((wanted[first:] + wanted[:first] + others)[:copies])
        self.chunks[self._next] = FakeChunk(chosen, limit)
        addresses = tuple(ServerAddress(number, HOST, 1000 + number, "", 1) for number in chosen)
        return Allocated(self._next, addresses, copies, limit)

    def _commit(self, message: Commit) -> Committed:
        assert sum(len(file.extents) + 1 for file in message.files) <= protocol.COMMIT_EXTENTS
        for told in message.chunks:
            self._progress(told)
        self.commits.append(message)
        attributes, gone = [], []
        for file in message.files:
            if file.ino not in self.files:
                gone.append(file.ino)
                continue
            for extent in file.extents:
                assert extent.chunk_offset + extent.length <= self.chunks[extent.chunk].length
                assert extent.file_offset + extent.length <= file.extends_to
            assert file.truncate_generation <= self.files[file.ino].truncate_generation
            self.maps[file.ino].apply(file.extents)
            changed = {} if file.mtime_ns is None else {"mtime_ns": file.mtime_ns}
            self._change(file.ino, size=max(self.files[file.ino].size, file.extends_to), **changed)
            attributes.append(self._attributes(file.ino))
        return Committed(tuple(attributes), tuple(gone))

    def _progress(self, told: protocol.ChunkProgress) -> None:
        chunk = self.chunks.get(told.chunk)
        if chunk is None or chunk.sealed:
            raise DfsError(ErrorCode.NOT_OWNER)
        assert told.length >= chunk.length
        assert told.entries >= chunk.entries
        assert told.length <= chunk.limit
        for number in chunk.servers:
            replica = self.pool.servers[number].replicas[told.chunk]
            assert replica.synced >= told.entries, "committed before it was durable"
            assert replica.chains[told.entries] == told.chain
        chunk.length, chunk.entries = told.length, told.entries

    def _seal(self, message: protocol.Seal) -> Empty:
        chunk = self.chunks[message.chunk]
        assert not chunk.sealed
        chunk.sealed = True
        chunk.bad.update(message.failed)
        self.space += chunk.limit - chunk.length
        self.sealed.append((message.chunk, message.failed))
        return Empty()

    def _get_extents(self, message: protocol.GetExtents) -> FileMap:
        return self._map(message.ino, message.offset, message.offset + message.length)

    def _map(self, ino: int, start: int, stop: int) -> FileMap:
        found = [e for e in self.maps[ino] if e.file_offset + e.length > start and e.file_offset < stop]
        if len(found) > self.page:
            found = found[: self.page]
            stop = found[-1].file_offset + found[-1].length
        return FileMap(tuple(found), self._places({e.chunk for e in found}), stop)

    def _locate(self, message: protocol.Locate) -> protocol.Located:
        return protocol.Located(self._places(set(message.chunks)))

    def _places(self, wanted: set[int]) -> tuple[ChunkPlace, ...]:
        return tuple(ChunkPlace(number, self.chunks[number].servers) for number in wanted if number in self.chunks)

    def _report_replica(self, message: protocol.ReportReplica) -> Empty:
        self.reports.append(message)
        return Empty()

    def _set_attributes(self, message: SetAttributes) -> Attributes:
        assert message.size is not None
        return self.truncate(message.ino, message.size)

    def _attributes(self, ino: int) -> Attributes:
        return Attributes(*[getattr(self.files[ino], name) for name in Attributes.__struct_fields__])

    def _change(self, ino: int, **changes: int) -> None:
        attributes = self._attributes(ino)
        attributes.data_version += 1
        for name, value in changes.items():
            setattr(attributes, name, value)
        self.files[ino] = attributes


class Bench:
    """A mount's data path over fakes."""

    def __init__(self, pool: FakePool, meta: FakeMeta, writer: Writer, reader: Reader) -> None:
        self.pool = pool
        self.meta = meta
        self.writer = writer
        self.reader = reader

    def create(self) -> FileState:
        return FileState(self.meta.create())

    def reopen(self, file: FileState, *, with_map: bool = True) -> FileState:
        """Another mount's view: only what is committed, nothing cached."""
        self.reader.cache.clear()
        return FileState(self.meta.entry(file.ino, with_map=with_map))

    async def truncate(self, file: FileState, size: int) -> None:
        """What vfs does."""
        await self.writer.truncate_local(file, size)
        attributes = await self.meta.call(protocol.SET_ATTRIBUTES, SetAttributes(file.ino, size=size))
        file.refresh(FileEntry(attributes))

    async def read(self, file: FileState) -> bytes:
        return await self.reader.read(file, None, 0, file.size + 10)

    def check(self) -> None:
        """After a test: nothing is left over, and all replicas agree about everything committed."""
        assert self.writer.dirty_bytes == sum(f.dirty.cost for f in self.writer._files)
        for ino in self.meta.files:
            contents = {self.meta.content(ino, server=number) for number in range(self.meta.copies)}
            assert len(contents) == 1
        stamps = [
            (entry.stamp_session, entry.stamp_counter, entry.crc, entry.ino, entry.file_offset)
            for server in self.pool.servers.values()
            for replica in server.replicas.values()
            for entry in replica.entries
        ]
        assert len({stamp[:2] for stamp in stamps}) == len(set(stamps))


@asynccontextmanager
async def open_bench(
    *,
    servers: int = 3,
    copies: int = 2,
    writing: WriterOptions | None = None,
    reading: ReaderOptions | None = None,
    cache_bytes: int = 8 << 20,
) -> AsyncIterator[Bench]:
    pool = FakePool(servers)
    meta = FakeMeta(pool, copies)
    bench = Bench(pool, meta, Writer(meta, pool, writing), Reader(meta, pool, BlockCache(cache_bytes), reading))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.jobs.run)
        nursery.start_soon(bench.writer.run)
        nursery.start_soon(bench.reader.run)
        yield bench
        bench.check()
        nursery.cancel_scope.cancel()

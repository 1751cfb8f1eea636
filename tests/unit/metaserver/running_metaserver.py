"""A metaserver without sockets to the outside: real storage in a temporary directory, clients over socket pairs.

Blocking calls run inline, so that a mock clock never jumps past them.
"""

import os
import shutil
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import trio
import trio.testing

from metaserver import protocol, wire
from metaserver.commit import open_committer
from metaserver.config import Config
from metaserver.connection import Connection, Incoming, Reply, Result, accept_handshake, connect_handshake
from metaserver.errors import DfsError, ErrorCode
from metaserver.parts import Parts
from metaserver.protocol import CHANGES, Entry, Heartbeat, Make, OpenSession, Register, ReportPage
from metaserver.schema import Table
from metaserver.start import Options
from metaserver.transport import SocketTransport
from metaserver.wire import PROTOCOL_VERSION, Empty, Method, Replay

CLUSTER = "11111111-2222-3333-4444-555555555555"
FILE = stat.S_IFREG | 0o644

# Quick to make and to copy.
SMALL = Options(map_bytes=16 << 20, segment_bytes=4 << 20)


async def inline(function: Callable[..., Any], *arguments: Any) -> Any:
    await trio.lowlevel.checkpoint()
    return function(*arguments)


class Running:
    """One epoch of a metaserver."""

    def __init__(self, parts: Parts, nursery: trio.Nursery, directory: Path) -> None:
        self.parts = parts
        self.committer = parts.committer
        self.directory = directory
        self._nursery = nursery

    async def connect(self) -> "Mount":
        """A connection without a session."""
        ours, theirs = socket.socketpair()
        mount = Mount()
        client = self.parts.client()

        async def serve() -> None:
            server = await accept_handshake(
                SocketTransport(theirs, "client"), client.dispatch, key=None, cluster_id=CLUSTER, role=protocol.ROLE
            )
            await server.run()
            client.lost(server)

        self._nursery.start_soon(serve)
        mount.connection = await connect_handshake(
            SocketTransport(ours, "metaserver"), mount.pushed, key=None, cluster_id="", role="client",
            server_role="metaserver",
        )  # fmt: skip
        self._nursery.start_soon(mount.connection.run)
        return mount

    async def mount(self, **more: Any) -> "Mount":
        """A connection with a new session."""
        mount = await self.connect()
        await mount.open_session(**more)
        return mount

    async def server(self, number: int, *, host: str = "", free: int = 100 << 30) -> "FakeServer":
        """A chunkserver that has registered, and is up."""
        server = FakeServer(self, number, host or f"host{number}", free)
        await server.start()
        return server

    async def idle(self) -> None:
        """Until everything that can happen now has happened."""
        await trio.testing.wait_all_tasks_blocked()

    def image(self, to: Path) -> None:
        """What a power cut at this moment would leave, all of it having been synced."""
        assert self.committer.durable == self.committer.newest
        shutil.copytree(self.directory, to)


class Mount:
    """A client that numbers its changes, and keeps what the metaserver pushes."""

    connection: Connection

    def __init__(self) -> None:
        self.session = 0
        self.operation = 0
        self.flushes: list[protocol.Flush] = []
        self.changed: list[int] = []
        self.retired: list[int] = []
        self.quotas_changed = 0
        self.on_flush: Callable[[protocol.Flush], Any] | None = None
        self.opened: protocol.SessionOpened

    def pushed(self, connection: Connection, incoming: Incoming) -> Result:
        if incoming.method == protocol.CHANGED.number:
            self.changed.extend(protocol.CHANGED.decode_request(incoming.body).message.inos)
        elif incoming.method == protocol.RETIRE.number:
            self.retired.extend(protocol.RETIRE.decode_request(incoming.body).message.chunks)
        elif incoming.method == protocol.QUOTAS_CHANGED.number:
            self.quotas_changed += 1
        else:
            flush = protocol.FLUSH.decode_request(incoming.body).message
            self.flushes.append(flush)
            if self.on_flush is not None:
                return self._flush(flush)
        return Reply(Empty())

    async def _flush(self, flush: protocol.Flush) -> Reply:
        assert self.on_flush is not None
        await self.on_flush(flush)
        self.connection.push(protocol.FLUSHED, protocol.Flushed(flush.ticket))
        return Reply(Empty())

    async def open_session(
        self, session: int = 0, *, host: str = "client", subdirectory: bytes = b"/", read_only: bool = False
    ) -> protocol.SessionOpened:
        request = OpenSession(session, host, "/mnt", 1, subdirectory, read_only)
        self.opened = (await self.connection.call(protocol.OPEN_SESSION, request)).message
        self.session = self.opened.session
        return self.opened

    async def ask(self, method: Method[Any, Any], message: Any, **options: Any) -> wire.Response[Any]:
        """The whole response; a change gets the next operation number."""
        if method.number in CHANGES and "operation" not in options:
            self.operation += 1
            options["operation"] = self.operation
        return (await self.connection.call(method, message, **options)).response

    async def call(self, method: Method[Any, Any], message: Any, **options: Any) -> Any:
        return (await self.ask(method, message, **options)).message

    async def fails(self, method: Method[Any, Any], message: Any, **options: Any) -> ErrorCode:
        try:
            answer = await self.call(method, message, **options)
        except DfsError as error:
            return error.code
        raise AssertionError(f"{method!r} succeeded: {answer}")

    # -- shorthands ----------------------------------------------------------------------------------------------

    async def make(self, name: bytes, parent: int = 1, mode: int = FILE, **more: Any) -> int:
        made = await self.call(protocol.MAKE, Make(parent, name, mode, 0, 0, **more))
        return int(made.entry.attributes.ino)

    async def lookup(self, name: bytes, parent: int = 1) -> Entry:
        entry: Entry = await self.call(protocol.LOOKUP, protocol.Lookup(parent, name))
        return entry

    async def unlink(self, name: bytes, parent: int = 1) -> protocol.Unlinked:
        gone: protocol.Unlinked = await self.call(protocol.UNLINK, protocol.Unlink(parent, name, False))
        return gone

    async def allocate(self, host: str = "client") -> protocol.Allocated:
        allocated: protocol.Allocated = await self.call(protocol.ALLOCATE, protocol.Allocate(host, ()))
        return allocated

    async def write(self, ino: int, chunk: int, length: int = 100, offset: int = 0) -> protocol.Committed:
        """Commits ``length`` bytes of a chunk, which has exactly those."""
        file = protocol.FileCommit(ino, 0, offset + length, 5, (protocol.Extent(offset, length, chunk, 0),))
        progress = protocol.ChunkProgress(chunk, length, 1, 77)
        committed: protocol.Committed = await self.call(protocol.COMMIT, protocol.Commit((progress,), (file,)))
        return committed

    async def sync(self) -> None:
        await self.call(protocol.SYNC, protocol.Sync(1 << 60))

    def lost(self, method: Method[Any, Any], message: Any, operation: int, replay: Replay | None) -> protocol.Lost:
        """A change to be done again."""
        body = wire.encode(wire.Request(0, 0, operation, message, replay))
        return protocol.Lost(operation, method.number, body)

    def replay(self, answer: wire.Response[Any]) -> Replay:
        return Replay(self.opened.epoch, answer.number, answer.time_ns, answer.ids)


class FakeServer:
    """A chunkserver as the control plane sees it; ``replicas`` are what it has."""

    def __init__(self, running: Running, number: int, host: str, free: int) -> None:
        self.control = running.parts.control
        self.number = number
        self.host = host
        self.free = free
        self.incarnation = number * 100
        self.heartbeats = 0
        self.cluster_id = ""
        self.highest_epoch = 0
        self.highest_chunk = 0
        self.replicas: dict[int, protocol.ReplicaReport] = {}
        self.orders: list[protocol.Order] = []

    def register_message(self) -> Register:
        return Register(
            self.number, f"server{self.number}", self.cluster_id, self.incarnation, self.host, 9000 + self.number,
            9100 + self.number, "", [], f"/data{self.number}", 1 << 40, self.free, self.highest_epoch,
            self.highest_chunk, PROTOCOL_VERSION,
        )  # fmt: skip

    async def start(self) -> None:
        """Registers in a new life, reports everything, and sends a first heartbeat."""
        self.incarnation += 1
        self.heartbeats = 0
        registered = await self.control.register(self.register_message())
        self.cluster_id = registered.cluster_id
        listing = [self.replicas[chunk] for chunk in sorted(self.replicas)]
        await self.control.report(self.number, ReportPage(self.incarnation, 0, True, listing))
        await self.beat()

    async def beat(
        self,
        changes: list[protocol.ReplicaReport] | None = None,
        gone: list[int] | None = None,
        results: list[protocol.OrderResult] | None = None,
        scrub: protocol.ScrubStatus | None = None,
    ) -> protocol.HeartbeatReply:
        self.heartbeats += 1
        reply = await self.control.heartbeat(
            self.number,
            Heartbeat(
                self.incarnation, self.heartbeats, 1 << 40, self.free, len(self.replicas), "OK", changes or [],
                gone or [], results or [], 0, 0, scrub, stored=sum(each.length for each in self.replicas.values()),
            ),
        )  # fmt: skip
        self.orders = reply.orders
        return reply


@asynccontextmanager
async def running(
    directory: Path, *, boot_id: bytes | None = None, random: int = 0, age: bool = True, check: bool = True, **more: Any
) -> AsyncIterator[Running]:
    """A metaserver for the block; every invariant of its rows is checked at the end. What is deleted is gone, unless
    ``trash_seconds`` says otherwise."""
    config = Config(data=str(directory), **{"trash_seconds": 0.0, **more})
    os.makedirs(directory, exist_ok=True)
    async with open_committer(directory, run_sync=inline, boot_id=boot_id, options=SMALL) as committer:
        parts = Parts(committer, config, CLUSTER, random=Random(random))
        parts.load()
        async with trio.open_nursery() as nursery:
            if age:
                nursery.start_soon(parts.aging.run)
            yield Running(parts, nursery, directory)
            nursery.cancel_scope.cancel()
        if check:
            assert (await committer.check()).problems == []
            rows, _ = committer.read(0, lambda tx: sum(1 for _ in tx.scan(Table.INODES, b"", b"\xff" * 9)))
            assert parts.changes.inodes == rows

"""In-process chunkservers on loopback, and a writer that cuts data into blocks as a mount does."""

import os
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

import trio
from crc32c import crc32c

from chunkserver import chunkfile, identity
from chunkserver.client import Pool
from chunkserver.disk import Disk, File, LocalDisk, Space
from chunkserver.node import Node
from chunkserver.protocol import Append, AppendReply, Peer
from metaserver import transport
from metaserver.key import ClusterKey

CLUSTER = UUID("5a1f0c3e-7d52-4f1c-9be4-3c7a5d20e9b1")
KEY = ClusterKey(bytes(range(32)))


class Writer:
    """Appends to one chunk as a mount does: keeps index, offset and chain."""

    def __init__(self, chunk: int, *, ino: int = 7, session: int = 3) -> None:
        self.chunk = chunk
        self.index = self.offset = 0
        self.chain = chunkfile.first_chain(CLUSTER, chunk)
        self.data = bytearray()
        self._ino = ino
        self._session = session

    def append(
        self, data: bytes, *, forward_to: tuple[Peer, ...] = (), sync: bool = False, block: int = chunkfile.BLOCK_BYTES
    ) -> Append:
        """The request for adding ``data``; its payload is ``data`` itself."""
        index, offset, before = self.index, self.offset, self.chain
        entries = b""
        for start in range(0, len(data), block):
            piece = data[start : start + block]
            entry, self.chain = chunkfile.encode_entry(
                self.chain, self.offset, len(piece), crc32c(piece), self._ino, self.offset, self._session, self.index
            )
            entries += entry
            self.offset += len(piece)
            self.index += 1
        self.data += data
        return Append(self.chunk, index, offset, before, entries, forward_to, sync)

    async def send(self, pool: Pool, peer: Peer, data: bytes, **options: Any) -> AppendReply:
        return await pool.append(peer, self.append(data, **options), [data])


class Started:
    """A running node and where it listens."""

    def __init__(self, node: Node, peer: Peer, path: Path) -> None:
        self.node = node
        self.peer = peer
        self.path = path

    @property
    def store(self) -> Any:
        assert self.node.running is not None
        return self.node.running.store


class StartNode(Protocol):
    def __call__(
        self, name: str = ..., wrap: Callable[[LocalDisk], Disk] = ..., **options: Any
    ) -> AbstractAsyncContextManager[Started]: ...


def same_disk(disk: LocalDisk) -> Disk:
    return disk


@asynccontextmanager
async def serving(
    path: Path, name: str, wrap: Callable[[LocalDisk], Disk] = same_disk, **options: Any
) -> AsyncIterator[Started]:
    """A member of the test's cluster that serves ``path`` while the block runs."""
    disk, who = identity.open_directory(str(path), name)
    if not who.cluster_id:
        who.cluster_id = str(CLUSTER)
        identity.save(disk, who)
    listener = transport.listen("127.0.0.1", 0)
    peer = Peer(who.server, "127.0.0.1", listener.getsockname()[1])
    options.setdefault("reserve", lambda capacity: 0)
    try:
        async with trio.open_nursery() as nursery:
            node = Node(wrap(disk), who, KEY, nursery, **options)
            await node.begin()
            nursery.start_soon(transport.serve, listener, node.accept)
            try:
                yield Started(node, peer, path)
            finally:
                nursery.cancel_scope.cancel()
    finally:
        listener.close()
        disk.unlock()


class FaultyFile:
    """A file of :class:`FaultyDisk`."""

    def __init__(self, file: File, disk: "FaultyDisk") -> None:
        self._file = file
        self._disk = disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, buffers: Any, offset: int) -> None:
        self._disk.meet("write")
        self._file.write(buffers, offset)

    def sync(self) -> None:
        self._disk.meet("sync")
        self._file.sync()

    def truncate(self, length: int) -> None:
        self._disk.meet("truncate")
        self._file.truncate(length)

    def read_into(self, view: memoryview, offset: int) -> int:
        self._disk.meet("read")
        return self._file.read_into(view, offset)

    def read_cached(self, view: memoryview, offset: int) -> int:
        return 0 if self._disk.cold else self._file.read_cached(view, offset)


class FaultyDisk:
    """A real disk whose calls fail on demand: ``faults["sync"] = [EIO]`` fails the next sync; None lets one pass.

    ``calls`` counts them; ``before`` is called before each, for tests that block one; ``steps`` is what was announced.
    """

    def __init__(self, disk: LocalDisk) -> None:
        self._disk = disk
        self.faults: dict[str, list[int | None]] = {}
        self.calls: Counter[str] = Counter()
        self.before: Callable[[str], None] = lambda call: None
        self.free: int | None = None
        self.cold = False
        self.steps: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._disk, name)

    def meet(self, call: str) -> None:
        self.before(call)
        self.calls[call] += 1
        queue = self.faults.get(call, [])
        fault = queue.pop(0) if queue else None
        if fault is not None:
            raise OSError(fault, os.strerror(fault))

    def step(self, name: str) -> None:
        self.steps.append(name)

    def create(self, path: str) -> FaultyFile:
        self.meet("create")
        return FaultyFile(self._disk.create(path), self)

    def open(self, path: str) -> FaultyFile:
        return FaultyFile(self._disk.open(path), self)

    def rename(self, old: str, new: str) -> None:
        self.meet("rename")
        self._disk.rename(old, new)

    def unlink(self, path: str) -> None:
        self.meet("unlink")
        self._disk.unlink(path)

    def sync_directory(self, path: str) -> None:
        self.meet("sync_directory")
        self._disk.sync_directory(path)

    def space(self) -> Space:
        space = self._disk.space()
        return space if self.free is None else Space(space.capacity, self.free)

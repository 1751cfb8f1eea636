"""In-process chunkservers on loopback, and a writer that cuts data into blocks as a mount does."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

import trio
from crc32c import crc32c

from chunkserver import chunkfile, identity
from chunkserver.client import Pool
from chunkserver.disk import Disk, LocalDisk
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
        disk.unlock()

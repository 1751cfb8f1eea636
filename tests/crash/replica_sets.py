"""Files as each set of replicas has them: set A takes one good replica of every chunk, set B another, and so on.

Every block of every good replica of every chunk that files refer to is read from its chunkserver and its checksum
verified; nothing else is tried if that fails. Only if a chunk is gone is everything asked for again: the cleaner may
have moved what was in it meanwhile.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence

from chunkserver.client import Pool
from chunkserver.protocol import Peer
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import ExtentStatus, FileStatus, ServerStatus

# So often may the cleaner be faster.
ATTEMPTS = 5
Ask = Callable[[], Awaitable[tuple[Sequence[ServerStatus], Mapping[str, FileStatus]]]]


async def read_sets(pool: Pool, ask: Ask, copies: int) -> tuple["ReplicaSets", list[dict[str, bytes]]]:
    """One tree for each set, of what ``ask`` says where it is."""
    for _ in range(ATTEMPTS):
        servers, files = await ask()
        sets = ReplicaSets(pool, servers, copies)
        trees = await sets.read(files)
        if not sets.gone:
            break
    return sets, trees


class ReplicaSets:
    """See the module. ``broken``: what could not be read, and extents of chunks with fewer than ``copies``; ``gone``:
    chunks that were not there."""

    def __init__(self, pool: Pool, servers: Sequence[ServerStatus], copies: int) -> None:
        self._pool = pool
        self._peers = {server.server: Peer(server.server, server.host, server.port) for server in servers}
        self.copies = copies
        self.broken: list[str] = []
        self.gone = 0
        self.bytes_read = 0

    async def read(self, files: Mapping[str, FileStatus]) -> list[dict[str, bytes]]:
        """One tree for each set."""
        trees: list[dict[str, bytes]] = [{} for _ in range(self.copies)]
        for path, file in files.items():
            contents = [bytearray(file.size) for _ in range(self.copies)]
            for extent in file.extents:
                await self._read_extent(path, extent, contents)
            for tree, content in zip(trees, contents, strict=True):
                tree[path] = bytes(content[: file.size])
        return trees

    async def _read_extent(self, path: str, extent: ExtentStatus, contents: list[bytearray]) -> None:
        good = sorted(replica.server for replica in extent.replicas if replica.state == "GOOD")
        if len(good) < self.copies:
            states = [f"{replica.name}: {replica.state}" for replica in extent.replicas]
            self.broken.append(f"{path}: chunk {extent.chunk} has {len(good)} good replicas ({states})")
        for number, server in enumerate(good):
            try:
                data = await self._read_replica(self._peers[server], extent)
            except DfsError as error:
                self.gone += error.code is ErrorCode.NO_SUCH_CHUNK
                self.broken.append(f"{path}: chunk {extent.chunk} on server {server}: {error}")
                continue
            for content in contents[number :: max(1, len(good))]:
                content[extent.file_offset : extent.file_offset + extent.length] = data

    async def _read_replica(self, peer: Peer, extent: ExtentStatus) -> bytes:
        content = bytearray(extent.length)
        at, end = extent.chunk_offset, extent.chunk_offset + extent.length
        while at < end:
            blocks = await self._pool.read(peer, int(extent.chunk, 16), at, end - at)
            assert blocks.entries, f"chunk {extent.chunk} ends at {at} on server {peer.server}"
            position = 0
            for entry in blocks.entries:
                data = memoryview(blocks.payload)[position : position + entry.stored_length]
                position += entry.stored_length
                first, last = max(at, entry.logical_offset), min(end, entry.logical_offset + entry.logical_length)
                into = first - extent.chunk_offset
                content[into : into + last - first] = data[first - entry.logical_offset : last - entry.logical_offset]
                at = last
        self.bytes_read += len(content)
        return bytes(content)

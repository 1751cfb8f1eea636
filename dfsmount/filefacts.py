"""What extended attributes tell of a file's bytes: where they are, and their checksum, without reading the data.

The checksum is the CRC-32C of the whole contents, holes as the zeros that a reader sees. Chunkservers have that of each
block; the checksum is linear, so those of whole blocks are put together (:mod:`dfsmount.crc`). Only of blocks that the
file uses in part, because something was written over the rest, the bytes are fetched.
"""

from bisect import bisect_right
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import trio
from crc32c import crc32c

from chunkserver import chunkfile
from chunkserver.chunkfile import Entry
from chunkserver.client import Blocks
from chunkserver.protocol import Peer, ReadIndexReply
from dfsmount.crc import joined, of_zeros
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import Attributes, Extent, FileMap, ServerAddress
from metaserver.protocol import Entry as Found

# An attribute's value has at most 64 KiB.
VALUE_BYTES = 64 << 10
# Entries in one answer: 256 KiB of them.
PAGE_ENTRIES = 4096
# A file that is written to all the time has no checksum.
ATTEMPTS = 3
PASSING = frozenset({ErrorCode.UNAVAILABLE, ErrorCode.TIMEOUT})


class Remote(Protocol):
    """See ``dfsmount.remote.Remote``."""

    async def get_attributes(self, ino: int) -> Found: ...

    async def get_extents(self, ino: int, offset: int, length: int) -> FileMap: ...

    async def servers(self) -> dict[int, ServerAddress]: ...


class Pool(Protocol):
    """See ``chunkserver.client.Pool``."""

    async def read_index(self, peer: Peer, chunk: int, index: int, count: int) -> ReadIndexReply: ...

    async def read(self, peer: Peer, chunk: int, offset: int, length: int) -> Blocks: ...


class Map:
    """A file's whole map at one moment."""

    def __init__(self, attributes: Attributes, extents: list[Extent], places: dict[int, Sequence[int]]) -> None:
        self.attributes = attributes
        self.extents = extents
        self.places = places


class FileFacts:
    """Asks for what belongs to one inode; what is dirty has to be flushed before."""

    def __init__(self, remote: Remote, pool: Pool, run_sync: Callable[..., Awaitable[Any]] = trio.to_thread.run_sync):
        self._remote = remote
        self._pool = pool
        self._run_sync = run_sync

    async def map(self, ino: int) -> Map:
        attributes = (await self._remote.get_attributes(ino)).attributes
        extents: list[Extent] = []
        places: dict[int, Sequence[int]] = {}
        at = 0
        while at < attributes.size:
            page = await self._remote.get_extents(ino, at, attributes.size - at)
            extents += page.extents
            places.update((place.chunk, place.servers) for place in page.places)
            if page.end <= at:
                raise DfsError(ErrorCode.IO, f"the map of inode {ino} cannot be read at {at}")
            at = page.end
        return Map(attributes, [cut for each in extents if (cut := _cut(each, attributes.size)).length > 0], places)

    async def chunks_text(self, ino: int) -> bytes:
        """A line for each extent: offset, length, chunk, offset there, and the numbers of the servers that have it. If
        they are too many, as many as fit and a last line ``...``."""
        found = await self.map(ino)
        lines = []
        size = 0
        for extent in found.extents:
            servers = ",".join(map(str, found.places.get(extent.chunk, ())))
            line = f"{extent.file_offset} {extent.length} {extent.chunk:016x} {extent.chunk_offset} {servers}\n"
            size += len(line)
            if size > VALUE_BYTES - 4:
                lines.append("...\n")
                break
            lines.append(line)
        return "".join(lines).encode()

    async def checksum_text(self, ino: int) -> bytes:
        """``crc32c:`` and eight hexadecimal digits. BUSY if the contents change all the time."""
        for _ in range(ATTEMPTS):
            found = await self.map(ino)
            checksum = await self._checksum(found)
            after = (await self._remote.get_attributes(ino)).attributes
            if after.data_version == found.attributes.data_version:
                return f"crc32c:{checksum:08x}".encode()
        raise DfsError(ErrorCode.BUSY, f"inode {ino} is being written")

    async def _checksum(self, found: Map) -> int:
        """Chunk by chunk, so that one index is here at a time; then put together in the file's order."""
        by_chunk: dict[int, list[int]] = {}
        for at, extent in enumerate(found.extents):
            by_chunk.setdefault(extent.chunk, []).append(at)
        sums = [0] * len(found.extents)
        for chunk, numbers in by_chunk.items():
            servers = found.places.get(chunk, ())
            entries = await self._any(servers, chunk, self._index)
            starts = [entry.logical_offset for entry in entries]
            for number in numbers:
                sums[number] = await self._extent(found.extents[number], entries, starts, servers)
        result: int = await self._run_sync(_whole, found.extents, sums, found.attributes.size)
        return result

    async def _extent(
        self, extent: Extent, entries: Sequence[Entry], starts: Sequence[int], servers: Sequence[int]
    ) -> int:
        checksum = 0
        at, stop = extent.chunk_offset, extent.chunk_offset + extent.length
        number = bisect_right(starts, at) - 1
        while at < stop:
            if not 0 <= number < len(entries):
                raise DfsError(ErrorCode.IO, f"chunk {extent.chunk:x} is shorter than its extents")
            entry = entries[number]
            end = min(stop, entry.logical_offset + entry.logical_length)
            if end <= at:
                raise DfsError(ErrorCode.IO, f"chunk {extent.chunk:x} has a gap at {at}")
            whole = at == entry.logical_offset and end - at == entry.logical_length
            part = entry.crc if whole else await self._part(extent.chunk, at, end, servers)
            checksum = joined(checksum, part, end - at)
            at = end
            number += 1
        return checksum

    async def _part(self, chunk: int, start: int, stop: int, servers: Sequence[int]) -> int:
        """Of some bytes of one block, which are read and verified."""

        async def read(peer: Peer, chunk: int) -> int:
            blocks = await self._pool.read(peer, chunk, start, stop - start)
            if not blocks.entries:
                raise DfsError(ErrorCode.IO, f"chunk {chunk:x} ends before {start}")
            skip = start - blocks.entries[0].logical_offset
            return crc32c(memoryview(blocks.payload)[skip : skip + stop - start])

        checksum: int = await self._any(servers, chunk, read)
        return checksum

    async def _index(self, peer: Peer, chunk: int) -> list[Entry]:
        found: list[Entry] = []
        more = True
        while more:
            reply = await self._pool.read_index(peer, chunk, len(found), PAGE_ENTRIES)
            page = chunkfile.decode_entries(reply.entries)
            found += page
            more = bool(page) and len(found) < reply.progress.entries
        return found

    async def _any(self, servers: Sequence[int], chunk: int, ask: Callable[[Peer, int], Awaitable[Any]]) -> Any:
        """The answer of the first server that has one."""
        known = await self._remote.servers()
        error = DfsError(ErrorCode.IO, f"chunk {chunk:x} has no replica")
        for server in servers:
            address = known.get(server)
            if address is None:
                continue
            try:
                return await ask(Peer(server, address.host, address.port), chunk)
            except DfsError as problem:
                error = problem
        raise error


def _cut(extent: Extent, size: int) -> Extent:
    length = min(extent.length, size - extent.file_offset)
    return Extent(extent.file_offset, length, extent.chunk, extent.chunk_offset)


def _whole(extents: Sequence[Extent], sums: Sequence[int], size: int) -> int:
    checksum = at = 0
    for extent, part in zip(extents, sums, strict=True):
        if extent.file_offset > at:
            checksum = joined(checksum, of_zeros(extent.file_offset - at), extent.file_offset - at)
        checksum = joined(checksum, part, extent.length)
        at = extent.file_offset + extent.length
    return joined(checksum, of_zeros(size - at), size - at)

"""A whole replica out of several damaged ones: each entry and each block from whichever of them has it undamaged.

The chain of the chunk (which the metaserver knows) proves the entries, and they prove the blocks; so bytes are taken
from a replica as they lie in its file, whatever else of it is damaged.
"""

import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import structlog
from crc32c import crc32c

from chunkserver.chunkfile import ENTRY_BYTES, INDEX_OFFSET, PAYLOAD_OFFSET, Entry, FormatError
from chunkserver.client import Pool
from chunkserver.index import Index
from chunkserver.protocol import Peer, Progress
from chunkserver.recovery import walk
from metaserver.errors import DfsError, ErrorCode

log = structlog.get_logger(__name__)

# One read from a peer, of index or payload.
PIECE_BYTES = 1 << 20
READ_SECONDS = 30.0
_U32 = struct.Struct("<I")


def merge_entries(candidates: Sequence[bytes | bytearray], count: int, chain: int) -> bytearray:
    """The first ``count`` entries after ``chain``, each from the first candidate whose entry continues the chain.

    :class:`FormatError` if one is damaged in all of them. Pure.
    """
    merged = bytearray()
    for number in range(count):
        at = number * ENTRY_BYTES
        for data in candidates:
            entry = data[at : at + ENTRY_BYTES]
            if len(entry) == ENTRY_BYTES and crc32c(entry[:-4], chain) == _U32.unpack_from(entry, ENTRY_BYTES - 4)[0]:
                break
        else:
            raise FormatError(f"entry {number} is damaged on every replica")
        merged += entry
        chain = _U32.unpack_from(entry, ENTRY_BYTES - 4)[0]
    return merged


class Salvage:
    """Reads one chunk from ``sources``, the first of which is asked first."""

    def __init__(
        self, pool: Pool, sources: Sequence[Peer], chunk: int, in_thread: Callable[..., Awaitable[Any]]
    ) -> None:
        self._pool = pool
        self._sources = list(dict.fromkeys((peer.server, peer.host, peer.port) for peer in sources))
        self._chunk = chunk
        self._in_thread = in_thread
        # A source that could not be asked, rather than one that is damaged: another time it may help.
        self._away: DfsError | None = None

    async def index(self, length: int, entries: int, chain: int, first_chain: int) -> Index:
        """The chunk's entries. BAD_CHECKSUM if they cannot be had; UNAVAILABLE if that may change."""
        candidates = [await self._raw_index(source, entries * ENTRY_BYTES) for source in self._sources]
        try:
            merged = await self._in_thread(merge_entries, candidates, entries, first_chain)
        except FormatError as error:
            raise self._away or DfsError(ErrorCode.BAD_CHECKSUM, str(error)) from None
        index = Index(merged)
        end = index.progress(entries, first_chain)
        whole = await self._in_thread(walk, bytes(merged), first_chain, length)
        if (end.stored_length, end.chain) != (length, chain) or whole != entries:
            raise DfsError(ErrorCode.CHAIN_MISMATCH, "what is left is of another chunk")
        return index

    async def _raw_index(self, source: tuple[int, str, int], length: int) -> bytearray:
        """As much as there is; zeros for what cannot be read."""
        data = bytearray()
        while len(data) < length:
            wanted = min(PIECE_BYTES, length - len(data))
            piece = await self._read(source, INDEX_OFFSET + len(data), wanted)
            data += (piece or b"").ljust(wanted, b"\0")
        return data

    async def fetch(
        self, chunk: int, index: Index, logical: int, end: Progress
    ) -> tuple[bytes | bytearray | memoryview, int, int]:
        """Blocks from ``logical`` on: their bytes, and how many stored and logical bytes they are. BAD_CHECKSUM if one
        of them is nowhere."""
        entries = index.entries_from(logical, PIECE_BYTES)
        start = entries[0].stored_offset
        stored = entries[-1].stored_offset + entries[-1].stored_length - start
        data = bytearray(stored)
        missing = entries
        for source in self._sources:
            missing = await self._take(source, missing, data, start)
            if not missing:
                break
        else:
            text = f"{len(missing)} blocks from {missing[0].stored_offset} on are damaged on every replica"
            raise self._away or DfsError(ErrorCode.BAD_CHECKSUM, text)
        return data, stored, sum(entry.logical_length for entry in entries)

    async def _take(
        self, source: tuple[int, str, int], wanted: list[Entry], data: bytearray, start: int
    ) -> list[Entry]:
        """Puts what ``source`` has of ``wanted`` into ``data``; returns the rest."""
        first = wanted[0].stored_offset
        length = wanted[-1].stored_offset + wanted[-1].stored_length - first
        raw = await self._read(source, PAYLOAD_OFFSET + first, length)
        if raw is None and len(wanted) > 1:  # some of it cannot be read
            return [entry for entry in wanted if await self._take(source, [entry], data, start)]
        missing = []
        for entry in wanted:
            at = entry.stored_offset - first
            block = memoryview(raw or b"")[at : at + entry.stored_length]
            if len(block) == entry.stored_length and crc32c(block) == entry.crc:
                data[entry.stored_offset - start : entry.stored_offset - start + entry.stored_length] = block
            else:
                missing.append(entry)
        return missing

    async def _read(self, source: tuple[int, str, int], position: int, length: int) -> bytes | None:
        """Bytes of the file as they are; None if they cannot be read."""
        try:
            return bytes(await self._pool.read_raw(Peer(*source), self._chunk, position, length, timeout=READ_SECONDS))
        except DfsError as error:
            if error.code in (ErrorCode.UNAVAILABLE, ErrorCode.TIMEOUT):
                self._away = error
            log.info("a damaged replica cannot be read", server=source[0], position=position, reason=str(error))
            return None

"""The index of one chunk in memory, and the chunks that are open for reading: descriptor and index, bounded."""

import struct
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from typing import NamedTuple

from chunkserver.chunkfile import ENTRY_BYTES, PAYLOAD_OFFSET, Entry, decode_entry
from chunkserver.disk import File
from chunkserver.protocol import Progress

# One page of entries in an answer: with its envelope it stays below wire.BODY_LIMIT.
PAGE_ENTRIES = 15_000
# Descriptors and index bytes kept for reading; a chunk of 8 KiB files has an index of half a MiB.
OPEN_FILES = 256
INDEX_MEMORY_BYTES = 64 << 20

_U32 = struct.Struct("<I")


class BlockRange(NamedTuple):
    """Neighbouring blocks: their entries, and where their stored bytes are in the file."""

    entries: bytes
    position: int
    length: int


class Index:
    """Entries of a chunk, searchable by logical and by stored offset. Grows, never changes otherwise."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes | bytearray = b"") -> None:
        self._data = bytearray(data)

    def __len__(self) -> int:
        return len(self._data) // ENTRY_BYTES

    @property
    def memory_bytes(self) -> int:
        return len(self._data)

    def extend(self, entries: bytes) -> None:
        self._data += entries

    def entry(self, number: int) -> Entry:
        return decode_entry(self._data, number * ENTRY_BYTES)

    def slice(self, first: int, count: int) -> bytes:
        return bytes(memoryview(self._data)[first * ENTRY_BYTES : (first + count) * ENTRY_BYTES])

    def _u32(self, number: int, offset: int) -> int:
        value: int = _U32.unpack_from(self._data, number * ENTRY_BYTES + offset)[0]
        return value

    def _stored_offset(self, number: int) -> int:
        return self._u32(number, 0)

    def _logical_offset(self, number: int) -> int:
        return self._u32(number, 4)

    def _stored_end(self, number: int) -> int:
        return self._u32(number, 0) + self._u32(number, 8)

    def _logical_end(self, number: int) -> int:
        return self._u32(number, 4) + self._u32(number, 12)

    def covering(self, offset: int, length: int, stored_limit: int) -> BlockRange | None:
        """The blocks that cover logical bytes from ``offset`` on; fewer if they would pass ``stored_limit``."""
        count = len(self)
        first = bisect_right(range(count), offset, key=self._logical_offset) - 1
        if length <= 0 or first < 0 or offset >= self._logical_end(first):
            return None
        last = bisect_left(range(count), offset + length, lo=first + 1, key=self._logical_offset)
        start = self._stored_offset(first)
        last = min(last, first + PAGE_ENTRIES)
        if self._stored_end(last - 1) - start > stored_limit:
            last = bisect_right(range(count), start + stored_limit, lo=first, hi=last, key=self._stored_end)
        end = self._stored_end(last - 1)
        return BlockRange(self.slice(first, last - first), PAYLOAD_OFFSET + start, end - start)

    def entries_from(self, offset: int, stored_limit: int) -> list[Entry]:
        """Entries from the one at logical ``offset`` on, at least one, together at most ``stored_limit`` bytes."""
        first = bisect_right(range(len(self)), offset, key=self._logical_offset) - 1
        start = self._stored_offset(first)
        last = bisect_right(range(len(self)), start + stored_limit, lo=first, key=self._stored_end)
        return [self.entry(number) for number in range(first, max(last, first + 1))]

    def progress(self, count: int, chain_before: int) -> Progress:
        """How far a replica of the first ``count`` entries is; ``chain_before`` is the chain before the first."""
        if count == 0:
            return Progress(0, 0, 0, chain_before)
        last = count - 1
        return Progress(self._stored_end(last), self._logical_end(last), count, self._u32(last, ENTRY_BYTES - 4))

    def entries_at(self, stored_length: int) -> int | None:
        """The number of entries that make up exactly this stored length; None if it cuts a block or is too long."""
        if stored_length == 0:
            return 0
        last = bisect_left(range(len(self)), stored_length, key=self._stored_end)
        return last + 1 if last < len(self) and self._stored_end(last) == stored_length else None


class Opened(NamedTuple):
    """What is needed to read a chunk."""

    file: File
    blocks: Index


class OpenChunks:
    """Least recently used first; invariant: ``memory_bytes`` is the sum over the indexes kept."""

    def __init__(self, files: int = OPEN_FILES, memory_bytes: int = INDEX_MEMORY_BYTES) -> None:
        self._files = files
        self._memory_limit = memory_bytes
        self._kept: OrderedDict[int, Opened] = OrderedDict()
        self.memory_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, chunk: int) -> Opened | None:
        opened = self._kept.get(chunk)
        if opened is not None:
            self._kept.move_to_end(chunk)
        return opened

    def put(self, chunk: int, opened: Opened) -> None:
        self.drop(chunk)
        self._kept[chunk] = opened
        self.memory_bytes += opened.blocks.memory_bytes
        self._shrink()

    def grow(self, chunk: int, entries: bytes) -> None:
        """Adds entries to the index of a chunk that is kept."""
        self._kept[chunk].blocks.extend(entries)
        self.memory_bytes += len(entries)
        self._shrink()

    def drop(self, chunk: int) -> None:
        opened = self._kept.pop(chunk, None)
        if opened is not None:
            self.memory_bytes -= opened.blocks.memory_bytes

    def _shrink(self) -> None:
        while len(self._kept) > 1 and (len(self._kept) > self._files or self.memory_bytes > self._memory_limit):
            _, opened = self._kept.popitem(last=False)
            self.memory_bytes -= opened.blocks.memory_bytes

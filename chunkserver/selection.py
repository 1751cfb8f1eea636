"""What a new chunk is made of when sealed ones are cleaned: which pieces of which blocks, and where they go. Pure.

Blocks are cut to what is wanted of them. The checksum of a piece is not simply computed from whatever bytes are in
memory: :func:`piece_checksum` proves that it and the checksums of what is cut off make up the one that the writing
client computed, so that the chain of evidence from the client to the reader has no gap.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from crc32c import crc32c

from chunkserver import chunkfile
from chunkserver.chunkfile import BLOCK_BYTES, MAX_ENTRIES, PAYLOAD_CAPACITY, Entry, decode_entries
from chunkserver.index import Index
from metaserver.wire import Buffer

_ZEROS = bytes(BLOCK_BYTES)


class Piece(NamedTuple):
    """``length`` stored bytes of a block of source number ``source``, from ``skip`` on; their place in the new chunk is
    ``stored`` and ``logical``."""

    source: int
    entry: Entry
    skip: int
    length: int
    stored: int = 0
    logical: int = 0

    @property
    def whole(self) -> bool:
        return self.length == self.entry.stored_length

    @property
    def logical_length(self) -> int:
        return self.entry.logical_length if self.whole else self.length

    @property
    def file_offset(self) -> int:
        return self.entry.file_offset + self.skip


def select(source: int, index: Index, ranges: Iterable[tuple[int, int]]) -> Iterator[Piece]:
    """The pieces of one source that hold the bytes of ``ranges``, in order. What cannot be cut comes whole, once."""
    last = -1
    for start, stop in ranges:
        for entry in _covering(index, start, stop):
            if _plain(entry):
                first, end = max(start, entry.logical_offset), min(stop, entry.logical_offset + entry.logical_length)
                yield Piece(source, entry, first - entry.logical_offset, end - first)
            elif entry.logical_offset != last:
                last = entry.logical_offset
                yield Piece(source, entry, 0, entry.stored_length)


def _covering(index: Index, start: int, stop: int) -> Iterator[Entry]:
    while start < stop:
        found = index.covering(start, stop - start, PAYLOAD_CAPACITY)
        if found is None:
            return
        entries = decode_entries(found.entries)
        yield from entries
        start = entries[-1].logical_offset + entries[-1].logical_length


def _plain(entry: Entry) -> bool:
    return entry.codec == 0 and entry.key_slot == 0 and entry.stored_length == entry.logical_length


def arrange(pieces: Iterable[Piece]) -> list[Piece]:
    """As many as fit into one chunk, in the order of inode and file offset, each with its place."""
    arranged: list[Piece] = []
    stored = logical = 0
    for piece in sorted(pieces, key=_in_file):
        if len(arranged) == MAX_ENTRIES or stored + piece.length > PAYLOAD_CAPACITY:
            break
        arranged.append(piece._replace(stored=stored, logical=logical))
        stored += piece.length
        logical += piece.logical_length
    return arranged


def _in_file(piece: Piece) -> tuple[int, ...]:
    return piece.entry.ino, piece.file_offset, piece.source, piece.entry.logical_offset, piece.skip


def moves(arranged: Iterable[Piece], chunks: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """(source chunk, logical offset there, length, logical offset in the new chunk), neighbours in both joined."""
    found: list[tuple[int, int, int, int]] = []
    for piece in arranged:
        chunk, start = chunks[piece.source], piece.entry.logical_offset + piece.skip
        if found:
            before, at, length, logical = found[-1]
            if before == chunk and at + length == start and logical + length == piece.logical:
                found[-1] = before, at, length + piece.logical_length, logical
                continue
        found.append((chunk, start, piece.logical_length, piece.logical))
    return found


def index_entries(arranged: Iterable[Piece], checksums: Sequence[int], first_chain: int) -> tuple[bytes, int]:
    """The new chunk's entries and their last chain; ``checksums`` are those of the pieces."""
    data, chain = bytearray(), first_chain
    for piece, checksum in zip(arranged, checksums, strict=True):
        entry = piece.entry._replace(
            stored_offset=piece.stored,
            logical_offset=piece.logical,
            stored_length=piece.length,
            logical_length=piece.logical_length,
            crc=checksum,
            file_offset=piece.file_offset,
        )
        encoded, chain = chunkfile.encode_moved(entry, chain)
        data += encoded
    return bytes(data), chain


def piece_checksum(piece: Piece, block: Buffer) -> int | None:
    """The checksum of a piece of ``block``; None unless the block, put together from checksums of its parts, has the
    one of its entry."""
    view = memoryview(block)
    if len(view) != piece.entry.stored_length:
        return None
    middle = crc32c(view[piece.skip : piece.skip + piece.length])
    if piece.whole:
        return middle if middle == piece.entry.crc else None
    head = crc32c(view[: piece.skip])
    tail = crc32c(view[piece.skip + piece.length :])
    together = joined(joined(head, middle, piece.length), tail, len(view) - piece.skip - piece.length)
    return middle if together == piece.entry.crc else None


def joined(first: int, second: int, length: int) -> int:
    """The CRC-32C of two strings one after the other, from theirs and the ``length`` of the second (at most a block).

    The checksum is linear: what the first string adds to it does not depend on the bytes that follow, only on how many
    there are.
    """
    zeros = memoryview(_ZEROS)[:length]
    return second ^ crc32c(zeros, first) ^ crc32c(zeros)

"""From dirty layers to what is appended to a chunk: blocks with checksums, their index entries, requests. Pure."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from crc32c import crc32c

from chunkserver.chunkfile import BLOCK_BYTES, encode_entry
from metaserver.protocol import Extent
from metaserver.wire import Buffer

# One append: the server works on it as a whole, and a frame's payload is bounded by 4 MiB.
APPEND_BYTES = 1 << 20
# 64 bytes each, in a body of at most 1 MiB.
APPEND_ENTRIES = 2048
# A block of more pieces than this is copied together: a buffer more in the frame costs about 2 us, 64 KiB copied 6.
MAX_PIECES = 4


class Block(NamedTuple):
    """``length`` bytes of ``ino`` from ``offset`` on: at most 64 KiB, checksummed, not yet anywhere."""

    ino: int
    offset: int
    length: int
    crc: int
    buffers: Sequence[Buffer]


class Part(NamedTuple):
    """What goes into one append request."""

    entries: bytes
    payload: list[Buffer]
    length: int
    blocks: int
    chain: int


def cut_run(ino: int, offset: int, pieces: Sequence[Buffer]) -> Iterator[Block]:
    """Cuts pieces that follow each other from file ``offset`` on into blocks.

    A run that fits into one block is one; a longer one is cut at multiples of 64 KiB of the file, so that a block
    overwritten later as a whole is replaced by a whole block.
    """
    total = sum(map(len, pieces))
    room = total if total <= BLOCK_BYTES else BLOCK_BYTES - offset % BLOCK_BYTES
    buffers: list[Buffer] = []
    filled = 0
    for piece in pieces:
        view = memoryview(piece)
        while len(view) >= room - filled:
            part = view[: room - filled]
            view = view[room - filled :]
            buffers.append(part)
            yield _block(ino, offset, room, buffers)
            offset, total = offset + room, total - room
            room, filled, buffers = min(BLOCK_BYTES, total), 0, []
            if not total:
                return
        if view:
            buffers.append(view)
            filled += len(view)


def _block(ino: int, offset: int, length: int, buffers: list[Buffer]) -> Block:
    if len(buffers) > MAX_PIECES:
        buffers = [b"".join(buffers)]
    crc = 0
    for buffer in buffers:
        crc = crc32c(buffer, crc)
    return Block(ino, offset, length, crc, buffers)


def encode_parts(
    blocks: Iterable[Block], stored_offset: int, chain: int, session: int, counters: Iterator[int]
) -> list[Part]:
    """Index entries and payloads of blocks appended at ``stored_offset`` after ``chain``, in requests of bounded size.

    ``counters`` gives each entry a number that this session never used before.
    """
    parts: list[Part] = []
    entries: list[bytes] = []
    payload: list[Buffer] = []
    length = 0
    for block in blocks:
        if entries and (length + block.length > APPEND_BYTES or len(entries) == APPEND_ENTRIES):
            parts.append(Part(b"".join(entries), payload, length, len(entries), chain))
            entries, payload, length = [], [], 0
        entry, chain = encode_entry(
            chain, stored_offset, block.length, block.crc, block.ino, block.offset, session, next(counters)
        )
        entries.append(entry)
        payload.extend(block.buffers)
        length += block.length
        stored_offset += block.length
    if entries:
        parts.append(Part(b"".join(entries), payload, length, len(entries), chain))
    return parts


def extents_of(blocks: Iterable[Block], chunk: int, chunk_offset: int) -> list[Extent]:
    """Where the blocks of one file are once they stand in ``chunk`` from ``chunk_offset`` on; neighbours joined."""
    extents: list[Extent] = []
    offset = stop = length = 0
    for block in blocks:
        if length and block.offset == stop:
            length += block.length
        else:
            if length:
                extents.append(Extent(offset, length, chunk, chunk_offset))
            chunk_offset += length
            offset, length = block.offset, block.length
        stop = block.offset + block.length
    if length:
        extents.append(Extent(offset, length, chunk, chunk_offset))
    return extents

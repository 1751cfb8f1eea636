"""The format of a chunk file. Pure: no I/O here.

A chunk is one sparse file ``chunks/<2 hex>/<16 hex id>`` (the two digits are the id's last byte)::

    offset    length   what
         0     4 KiB   header
     4 KiB  to 2 MiB   index: 64-byte entries, one after another; an all-zero entry ends it
     2 MiB     64 MiB  payload: the stored bytes of the blocks, one after another without gaps

Header (little-endian, the rest of the 4 KiB is zero)::

    offset  size  field
         0     8  magic            b"dfschunk"
         8     4  format           1
        12     4  flags            bit 0: sealed
        16    16  cluster id       the UUID's bytes
        32     8  chunk id
        40     8  created          ns since 1970, signed
        48     4  sealed length    stored payload bytes; with sealed set
        52     4  sealed entries
        56     4  sealed chain
        60     4  dead map offset  place of the dead-block bitmap; 0: none
      4092     4  CRC-32C of bytes 0 to 4091

Entry (little-endian)::

    offset  size  field
         0     4  stored offset    in the payload region
         4     4  logical offset   what extents address; equal to the stored offset while nothing is compressed
         8     4  stored length
        12     4  logical length   1 to 64 KiB
        16     2  flags            0
        18     1  codec            0: stored as it is
        19     1  key slot         0: not encrypted
        20     4  CRC-32C of the stored bytes
        24     8  inode
        32     8  file offset
        40     8  stamp: session
        48     8  stamp: counter   (session, counter) is never reused
        56     4  reserved         0
        60     4  chain            CRC-32C of bytes 0 to 59, seeded with the previous entry's chain

The chain of the (absent) entry before the first is the CRC-32C of cluster id and chunk id, so that entries of another
chunk never continue this one. Entries prove nothing until synced: the kernel writes a file's pages in any order.
"""

import struct
from typing import NamedTuple
from uuid import UUID

from crc32c import crc32c

HEADER_BYTES = 4096
INDEX_OFFSET = 4096
PAYLOAD_OFFSET = 2 << 20
PAYLOAD_CAPACITY = 64 << 20
ENTRY_BYTES = 64
MAX_ENTRIES = (PAYLOAD_OFFSET - INDEX_OFFSET) // ENTRY_BYTES
BLOCK_BYTES = 64 << 10

MAGIC = b"dfschunk"
FORMAT = 1
FLAG_SEALED = 1

_HEADER = struct.Struct("<8sII16sQqIIII")
assert _HEADER.size == 64
_ENTRY = struct.Struct("<IIIIHBBIQQQQI")
assert _ENTRY.size == ENTRY_BYTES - 4
_U32 = struct.Struct("<I")


class FormatError(Exception):
    """Bytes that are not what this format allows; the text says what is wrong."""


class Header(NamedTuple):
    cluster: UUID
    chunk: int
    created_ns: int
    flags: int = 0
    sealed_length: int = 0
    sealed_entries: int = 0
    sealed_chain: int = 0
    dead_map_offset: int = 0

    @property
    def sealed(self) -> bool:
        return bool(self.flags & FLAG_SEALED)


class Entry(NamedTuple):
    """One block. ``file_offset`` and ``ino`` say whose bytes they are, for rebuilding files from chunks alone."""

    stored_offset: int
    logical_offset: int
    stored_length: int
    logical_length: int
    flags: int
    codec: int
    key_slot: int
    crc: int
    ino: int
    file_offset: int
    stamp_session: int
    stamp_counter: int
    reserved: int
    chain: int


def chunk_path(chunk: int) -> str:
    """Path of a chunk below the data directory."""
    return f"chunks/{chunk & 0xFF:02x}/{chunk:016x}"


def encode_header(header: Header) -> bytes:
    packed = _HEADER.pack(
        MAGIC,
        FORMAT,
        header.flags,
        header.cluster.bytes,
        header.chunk,
        header.created_ns,
        header.sealed_length,
        header.sealed_entries,
        header.sealed_chain,
        header.dead_map_offset,
    ).ljust(HEADER_BYTES - 4, b"\0")
    return packed + _U32.pack(crc32c(packed))


def decode_header(data: bytes | bytearray | memoryview) -> Header:
    """Raises :class:`FormatError` unless these are the 4 KiB of a header of this format."""
    if len(data) < HEADER_BYTES:
        raise FormatError(f"header of {len(data)} bytes")
    magic, format_, flags, cluster, chunk, created_ns, *rest = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise FormatError("not a chunk file")
    if crc32c(memoryview(data)[: HEADER_BYTES - 4]) != _U32.unpack_from(data, HEADER_BYTES - 4)[0]:
        raise FormatError("header with a wrong checksum")
    if format_ != FORMAT:
        raise FormatError(f"chunk format {format_}, this program knows {FORMAT}")
    return Header(UUID(bytes=cluster), chunk, created_ns, flags, *rest)


def first_chain(cluster: UUID, chunk: int) -> int:
    """The chain before the first entry."""
    return crc32c(cluster.bytes + chunk.to_bytes(8, "little"))


def encode_entry(
    previous_chain: int,
    stored_offset: int,
    length: int,
    crc: int,
    ino: int,
    file_offset: int,
    stamp_session: int,
    stamp_counter: int,
) -> tuple[bytes, int]:
    """An entry for a block stored as it is; returns its 64 bytes and its chain."""
    packed = _ENTRY.pack(
        stored_offset, stored_offset, length, length, 0, 0, 0, crc, ino, file_offset, stamp_session, stamp_counter, 0
    )
    chain = crc32c(packed, previous_chain)
    return packed + _U32.pack(chain), chain


def encode_moved(entry: Entry, previous_chain: int) -> tuple[bytes, int]:
    """``entry`` as it is, but behind an entry with that chain; returns its 64 bytes and its chain."""
    packed = _ENTRY.pack(*entry[:-1])
    chain = crc32c(packed, previous_chain)
    return packed + _U32.pack(chain), chain


def decode_entry(data: bytes | bytearray | memoryview, offset: int = 0) -> Entry:
    return Entry._make((*_ENTRY.unpack_from(data, offset), *_U32.unpack_from(data, offset + ENTRY_BYTES - 4)))


def decode_entries(data: bytes | bytearray | memoryview) -> list[Entry]:
    """All entries of a buffer whose length is a multiple of 64; chains are not looked at."""
    if len(data) % ENTRY_BYTES:
        raise FormatError(f"{len(data)} bytes are not a whole number of entries")
    return [decode_entry(data, offset) for offset in range(0, len(data), ENTRY_BYTES)]


def check_entries(data: bytes | bytearray | memoryview, previous_chain: int, stored_offset: int) -> list[Entry]:
    """Entries that continue a chunk of this chain and stored length; :class:`FormatError` if any does not."""
    entries = decode_entries(data)
    view = memoryview(data)
    for number, entry in enumerate(entries):
        at = number * ENTRY_BYTES
        chain = crc32c(view[at : at + ENTRY_BYTES - 4], previous_chain)
        if chain != entry.chain:
            raise FormatError(f"entry {number} does not continue the chain")
        if entry.stored_offset != stored_offset or not 0 < entry.stored_length <= BLOCK_BYTES:
            raise FormatError(f"entry {number} stores {entry.stored_length} bytes at {entry.stored_offset}")
        if not 0 < entry.logical_length <= BLOCK_BYTES:
            raise FormatError(f"entry {number} has {entry.logical_length} logical bytes")
        stored_offset += entry.stored_length
        previous_chain = chain
    if stored_offset > PAYLOAD_CAPACITY:
        raise FormatError("entries past the end of the chunk")
    return entries

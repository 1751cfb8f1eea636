"""The format of the changelog. Pure: records to bytes and back.

The changelog is a directory of *segments*, files of (normally) 16 MiB named by a 64-bit id in 16 hexadecimal digits,
without gaps. A segment is made of zeroes, durably, before its first record is written, and keeps its size (the space of
the unwritten rest of old ones is given back). Each epoch starts a new segment.

A segment starts with a header, alone in its first 4,096 bytes, so that no record shares a disk sector with it
(little-endian, like everything here)::

    offset  size  field
         0     8  magic           "DFSLOG\\0\\1"
         8     4  crc32c          of bytes 12 to 47
        12     4  size            of the file: a shorter one has lost something (0: not known)
        16     8  segment         the id that is also its name
        24     8  epoch           of all its records
        32     8  previous_epoch  the newest change that survived when this epoch began, (0, 0) if there was none:
        40     8  previous_number the chain that shows that no epoch is missing, and where the one before ended

Records follow one another from byte 4,096 on, each starting at a multiple of 8. A record is one transaction::

    offset  size  field
         0     4  magic           0x4C434644 ("DFCL")
         4     4  length          of the whole record with its padding, a multiple of 8
         8     4  crc32c          of the segment id (8 bytes) and of this record from byte 12 to its end
        12     2  rows            how many row changes follow
        14     1  kind            1
        15     1  zero
        16     8  epoch
        24     8  number          counts the changes of an epoch from 1, without gaps
        32     8  durable         the newest number of this epoch known to be on stable storage when this was written
        40     8  session         whose change it is, 0: the metaserver's own
        48     8  operation       its number in that session, 0 if it has none
        56     8  time_ns         signed; the change's own time
        64        row changes, then zeroes up to a multiple of 8

A row change is::

    0     4  value_length
    4     2  key_length       without the table
    6     1  tombstone        1: the row is deleted (value_length 0), else 0
    7     1  table            schema.Table
    8        key, value

The segment id in the checksum keeps a record that a disk wrote to the wrong place, or left from an older file, from
being taken for one of this segment. What ``durable`` is for: see ``replay.py``.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from crc32c import crc32c

from metaserver.overlay import Rows
from metaserver.schema import Table

SEGMENT_BYTES = 16 << 20
FIRST_RECORD = 4096
ALIGNMENT = 8
SEGMENT_MAGIC = b"DFSLOG\0\1"
RECORD_MAGIC = 0x4C434644
KIND_CHANGE = 1

_SEGMENT = struct.Struct("<8sIIQQQQ")
assert _SEGMENT.size == 48
_FRONT = struct.Struct("<III")
_REST = struct.Struct("<HBBQQQQQq")
RECORD_HEADER_BYTES = 64
assert _FRONT.size + _REST.size == RECORD_HEADER_BYTES
_ROW = struct.Struct("<IHB")
_ROW_HEADER_BYTES = 8
assert _ROW.size + 1 == _ROW_HEADER_BYTES
_U64 = struct.Struct("<Q")
_LOGGED = frozenset(table.value for table in Table) - {Table.TOTALS.value}
_MAGIC_BYTES = struct.pack("<I", RECORD_MAGIC)
_PADDING = tuple(bytes(count) for count in range(ALIGNMENT))


class Position(NamedTuple):
    """A place in the history of all changes: the change ``number`` of ``epoch``, 0 before its first."""

    epoch: int
    number: int

    def __str__(self) -> str:
        return f"{self.epoch}/{self.number}"


UNKNOWN = Position(-1, -1)


class SegmentHeader(NamedTuple):
    """``previous`` is :data:`UNKNOWN` if the header was damaged; such a one is never written."""

    segment: int
    epoch: int
    previous: Position
    size: int = 0

    def pack(self) -> bytes:
        fields = struct.pack("<IQQQQ", self.size, self.segment, self.epoch, *self.previous)
        return (SEGMENT_MAGIC + struct.pack("<I", crc32c(fields)) + fields).ljust(FIRST_RECORD, b"\0")

    @classmethod
    def unpack(cls, data: bytes) -> "SegmentHeader | None":
        """The header at the start of ``data``, None if it is not a whole and undamaged one."""
        if len(data) < FIRST_RECORD:
            return None
        magic, crc, size, segment, epoch, previous_epoch, previous_number = _SEGMENT.unpack_from(data)
        if magic != SEGMENT_MAGIC or crc != crc32c(data[12 : _SEGMENT.size]):
            return None
        return cls(segment, epoch, Position(previous_epoch, previous_number), size)


class Record(NamedTuple):
    """One transaction as it stands in the log. ``rows`` are by row key, None for a tombstone."""

    epoch: int
    number: int
    durable: int
    session: int
    operation: int
    time_ns: int
    rows: dict[bytes, bytes | None]


def checksum_seed(segment: int) -> int:
    """What the checksums of a segment's records start from."""
    return crc32c(_U64.pack(segment))


def encode_record(
    seed: int, epoch: int, number: int, durable: int, session: int, operation: int, time_ns: int, rows: Rows
) -> bytes:
    """The bytes of a record; ``seed`` is its segment's :func:`checksum_seed`."""
    pack_row = _ROW.pack
    parts = [_REST.pack(len(rows), KIND_CHANGE, 0, epoch, number, durable, session, operation, time_ns)]
    # The table is the first byte of a row key, and stands where the row header ends.
    for key, value in rows.items():
        if value is None:
            parts += (pack_row(0, len(key) - 1, 1), key)
        else:
            parts += (pack_row(len(value), len(key) - 1, 0), key, value)
    body = b"".join(parts)
    length = _FRONT.size + len(body)
    if length % ALIGNMENT:
        padding = -length % ALIGNMENT
        body += _PADDING[padding]
        length += padding
    return _FRONT.pack(RECORD_MAGIC, length, crc32c(body, seed)) + body


def decode_record(data: bytes, offset: int, seed: int) -> tuple[Record, int] | None:
    """The record at ``offset`` and where it ends; None if there is no whole and undamaged one."""
    if offset + RECORD_HEADER_BYTES > len(data):
        return None
    magic, length, crc = _FRONT.unpack_from(data, offset)
    end = offset + length
    if magic != RECORD_MAGIC or length < RECORD_HEADER_BYTES or length % ALIGNMENT or end > len(data):
        return None
    body = data[offset + _FRONT.size : end]
    if crc32c(body, seed) != crc:
        return None
    count, kind, _, epoch, number, durable, session, operation, time_ns = _REST.unpack_from(body)
    rows = _decode_rows(body, count)
    if kind != KIND_CHANGE or rows is None:
        return None
    return Record(epoch, number, durable, session, operation, time_ns, rows), end


def _decode_rows(body: bytes, count: int) -> dict[bytes, bytes | None] | None:
    rows: dict[bytes, bytes | None] = {}
    offset = _REST.size
    for _ in range(count):
        if offset + _ROW_HEADER_BYTES > len(body):
            return None
        value_length, key_length, tombstone = _ROW.unpack_from(body, offset)
        start = offset + _ROW_HEADER_BYTES - 1
        value_start = start + 1 + key_length
        offset = value_start + value_length
        if offset > len(body) or body[start] not in _LOGGED:
            return None
        rows[body[start:value_start]] = None if tombstone else body[value_start:offset]
    return rows


def decode_segment(data: bytes, segment: int) -> Iterator[Record]:
    """All whole and undamaged records of a segment, in order, stepping over whatever else there is."""
    return (record for record, _ in find_records(data, segment))


def find_records(data: bytes, segment: int) -> Iterator[tuple[Record, int]]:
    """:func:`decode_segment` with the offset at which each record ends."""
    seed = checksum_seed(segment)
    offset = FIRST_RECORD
    while True:
        found = decode_record(data, offset, seed)
        if found is None:
            offset = data.find(_MAGIC_BYTES, offset + 1)
            while offset >= 0 and offset % ALIGNMENT:
                offset = data.find(_MAGIC_BYTES, offset + 1)
            if offset < 0:
                return
        else:
            yield found
            offset = found[1]

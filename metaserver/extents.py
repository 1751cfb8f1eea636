"""The map of a file: EXTENTS and its mirror BY_CHUNK, cut and joined. Synchronous, no I/O of its own.

Invariants kept by every function (see ``schema.py``): extents of one inode do not overlap; neighbours that continue
each other in file and chunk are one row; every EXTENTS row has its BY_CHUNK row. What changes in the number of live
bytes of each chunk is returned or added to ``live``; the caller settles it (``chunks.settle``) in the same transaction.
"""

from collections.abc import Iterator
from itertools import islice

import msgspec

from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import FILE_SIZE_MAX, Extent
from metaserver.schema import ExtentRow, Table, Transaction, by_chunk_key, extent_key, key_u64, read_u64

# Chunk to change of its live bytes.
Live = dict[int, int]

_END = FILE_SIZE_MAX + 1


class TooManyRows(DfsError):
    """One extent replaces more rows than a transaction may touch: the caller goes in smaller steps."""

    def __init__(self) -> None:
        super().__init__(ErrorCode.INTERNAL, "too many extents in one change")


class Budget(msgspec.Struct):
    """How many extents a change may still replace."""

    extents: int

    def spend(self, count: int) -> None:
        self.extents -= count
        if self.extents < 0:
            raise TooManyRows


class Cut(msgspec.Struct):
    """Result of a step: bytes no longer mapped, what that does to chunks, and whether nothing remains to be cut."""

    freed: int
    live: Live
    done: bool


def in_range(tx: Transaction, ino: int, start: int, stop: int) -> Iterator[tuple[int, ExtentRow]]:
    """Rows that have bytes in [start, stop), with their file offsets, in order. Rows must not change meanwhile."""
    if start > 0:
        previous = _before(tx, ino, start)
        if previous is not None and previous[0] + previous[1].length > start:
            yield previous
    for key, value in tx.scan(Table.EXTENTS, extent_key(ino, start), extent_key(ino, stop)):
        yield read_u64(key, 8), ExtentRow.unpack(value)


def page(tx: Transaction, ino: int, start: int, stop: int, count: int) -> tuple[list[Extent], int]:
    """At most ``count`` extents with bytes in [start, stop), uncut at the start, cut at ``stop``, and the file offset
    up to which they are complete."""
    found: list[Extent] = []
    for offset, row in in_range(tx, ino, start, stop):
        if len(found) == count:
            return found, found[-1].file_offset + found[-1].length
        found.append(Extent(offset, min(row.length, stop - offset), row.chunk, row.chunk_offset))
    return found, stop


def replace(tx: Transaction, ino: int, extent: Extent, live: Live, budget: Budget) -> int:
    """Puts ``extent`` into the map in place of what it covers; returns the change of mapped bytes.

    What is there already costs nothing, so that a change too big for one transaction can be done in pieces first.
    """
    start, length, chunk, chunk_offset = extent.file_offset, extent.length, extent.chunk, extent.chunk_offset
    rows = list(islice(in_range(tx, ino, start, start + length), budget.extents + 1))
    if len(rows) == 1 and _covers(rows[0], extent):
        return 0
    budget.spend(len(rows))
    freed = _clear(tx, ino, start, start + length, rows, live)
    live[chunk] = live.get(chunk, 0) + length
    gained = length - freed
    previous = _before(tx, ino, start) if start else None
    if previous is not None:
        offset, row = previous
        if offset + row.length == start and row.chunk == chunk and row.chunk_offset + row.length == chunk_offset:
            _delete(tx, ino, offset, row)
            start, length, chunk_offset = offset, length + row.length, row.chunk_offset
    value = tx.get(Table.EXTENTS, extent_key(ino, start + length))
    if value is not None:
        row = ExtentRow.unpack(value)
        if row.chunk == chunk and row.chunk_offset == chunk_offset + length:
            _delete(tx, ino, start + length, row)
            length += row.length
    _put(tx, ino, start, ExtentRow(length, chunk, chunk_offset))
    return gained


def insert_first(tx: Transaction, ino: int, extent: Extent, live: Live) -> int:
    """:func:`replace` for an inode without extents, which is most commits: nothing to look for."""
    live[extent.chunk] = live.get(extent.chunk, 0) + extent.length
    _put(tx, ino, extent.file_offset, ExtentRow(extent.length, extent.chunk, extent.chunk_offset))
    return extent.length


def cut_step(tx: Transaction, ino: int, start: int, limit: int) -> Cut:
    """Unmaps from ``start`` on, at most ``limit`` rows, the row across ``start`` first: then none lies across."""
    rows = list(islice(in_range(tx, ino, start, _END), limit + 1))
    cut = Cut(0, {}, len(rows) <= limit)
    for offset, row in rows[:limit]:
        _delete(tx, ino, offset, row)
        kept = max(0, start - offset)
        if kept:
            _put(tx, ino, offset, ExtentRow(kept, row.chunk, row.chunk_offset))
        lost = row.length - kept
        cut.freed += lost
        cut.live[row.chunk] = cut.live.get(row.chunk, 0) - lost
    return cut


def boundary(tx: Transaction, ino: int, start: int, stop: int, count: int) -> int:
    """The end of the longest range from ``start``, at most to ``stop``, in which at most ``count`` rows lie."""
    for offset, _ in islice(in_range(tx, ino, start, stop), count, None):
        return max(offset, start + 1)
    return stop


def _covers(found: tuple[int, ExtentRow], extent: Extent) -> bool:
    """Whether this row maps all of ``extent`` to the same bytes."""
    offset, row = found
    skipped = extent.file_offset - offset
    same = row.chunk == extent.chunk and row.chunk_offset + skipped == extent.chunk_offset
    return same and skipped >= 0 and row.length >= skipped + extent.length


def _clear(tx: Transaction, ino: int, start: int, stop: int, rows: list[tuple[int, ExtentRow]], live: Live) -> int:
    """Unmaps [start, stop) from the rows that have bytes in it; returns how many bytes that were."""
    freed = 0
    for offset, row in rows:
        _delete(tx, ino, offset, row)
        end = offset + row.length
        if offset < start:
            _put(tx, ino, offset, ExtentRow(start - offset, row.chunk, row.chunk_offset))
        if end > stop:
            _put(tx, ino, stop, ExtentRow(end - stop, row.chunk, row.chunk_offset + stop - offset))
        lost = min(end, stop) - max(offset, start)
        freed += lost
        live[row.chunk] = live.get(row.chunk, 0) - lost
    return freed


def _before(tx: Transaction, ino: int, offset: int) -> tuple[int, ExtentRow] | None:
    """The last row that starts before ``offset``."""
    for key, value in tx.scan_back(Table.EXTENTS, key_u64(ino), extent_key(ino, offset)):
        return read_u64(key, 8), ExtentRow.unpack(value)
    return None


def _put(tx: Transaction, ino: int, offset: int, row: ExtentRow) -> None:
    tx.put(Table.EXTENTS, extent_key(ino, offset), row.pack())
    tx.put(Table.BY_CHUNK, by_chunk_key(row.chunk, row.chunk_offset, ino, offset), key_u64(row.length))


def _delete(tx: Transaction, ino: int, offset: int, row: ExtentRow) -> None:
    tx.delete(Table.EXTENTS, extent_key(ino, offset))
    tx.delete(Table.BY_CHUNK, by_chunk_key(row.chunk, row.chunk_offset, ino, offset))

"""Rows that are newer than the store, in memory, and how layers of rows are read as one. Pure.

A layer maps row keys to values, or to None: a tombstone, which hides the row in the layers below. A *row key* is one
byte of table number followed by the key, here and in the store: one sorted space, in which a table is a range.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from sortedcontainers import SortedDict

from metaserver.schema import Table

Rows: TypeAlias = Mapping[bytes, bytes | None]
Row: TypeAlias = tuple[bytes, bytes | None]
# One byte by table number; one more than there are tables, as the end of the last.
PREFIX = tuple(bytes([number]) for number in range(max(Table) + 2))


def row_key(table: Table, key: bytes) -> bytes:
    return PREFIX[table] + key


class Overlay:
    """One in-memory layer. Frozen by convention: whoever hands it to a checkpoint stops changing it."""

    __slots__ = ("get", "rows")

    def __init__(self, rows: Rows | Iterable[Row] = ()) -> None:
        self.rows: SortedDict = SortedDict(rows)
        # The dict's own method: a lookup costs no Python frame.
        self.get: Any = self.rows.get

    def __len__(self) -> int:
        return len(self.rows)

    def apply(self, changes: Rows) -> None:
        """Lays ``changes`` over what is here."""
        rows = self.rows
        for key, value in changes.items():
            rows[key] = value

    def scan(self, start: bytes, stop: bytes) -> Iterator[Row]:
        """Rows and tombstones with start <= key < stop in key order; the layer must not change meanwhile."""
        rows = self.rows
        return ((key, rows[key]) for key in rows.irange(start, stop, (True, False)))

    def scan_back(self, start: bytes, stop: bytes) -> Iterator[Row]:
        """The same from the end."""
        rows = self.rows
        return ((key, rows[key]) for key in rows.irange(start, stop, (True, False), reverse=True))


def merge(newer: Iterator[Row], older: Iterator[Row]) -> Iterator[Row]:
    """Two ascending layers as one: of two rows with one key the newer counts. Tombstones are kept."""
    new = next(newer, None)
    old = next(older, None)
    while new is not None and old is not None:
        if old[0] < new[0]:
            yield old
            old = next(older, None)
            continue
        if old[0] == new[0]:
            old = next(older, None)
        yield new
        new = next(newer, None)
    yield from _rest(new, newer)
    yield from _rest(old, older)


def merge_back(newer: Iterator[Row], older: Iterator[Row]) -> Iterator[Row]:
    """The same for two descending layers."""
    new = next(newer, None)
    old = next(older, None)
    while new is not None and old is not None:
        if old[0] > new[0]:
            yield old
            old = next(older, None)
            continue
        if old[0] == new[0]:
            old = next(older, None)
        yield new
        new = next(newer, None)
    yield from _rest(new, newer)
    yield from _rest(old, older)


def _rest(head: Row | None, rows: Iterator[Row]) -> Iterator[Row]:
    if head is not None:
        yield head
        yield from rows

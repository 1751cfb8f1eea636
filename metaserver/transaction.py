"""What reads and changes work on: rows of all layers, and what their reply has to wait for. Pure but for the store.

The layers are, newest first: the writes of the change itself, the overlay, the overlay that a checkpoint is writing
(frozen), the store.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from metaserver.errors import DfsError, ErrorCode
from metaserver.overlay import PREFIX, Overlay, Row, Rows, merge, merge_back
from metaserver.schema import MAX_TRANSACTION_ROWS, IdKind, Table
from metaserver.store import Reader

_ABSENT: Any = object()


class Layers:
    """Everything that has been changed, and which rows have changes that are not durable yet."""

    def __init__(self, store: Reader) -> None:
        self.store = store
        self.overlay = Overlay()
        self.frozen: Overlay | None = None
        # Row key -> number and session of its last change, as long as that is not durable.
        self.undurable: dict[bytes, tuple[int, int]] = {}
        self._waiting: deque[tuple[int, Rows]] = deque()

    def apply(self, number: int, session: int, rows: Rows) -> None:
        """Makes a logged change visible."""
        self.overlay.apply(rows)
        self.undurable.update(dict.fromkeys(rows, (number, session)))
        self._waiting.append((number, rows))

    def get(self, key: bytes) -> bytes | None:
        """A row as it is now, for those whose answers do not depend on it."""
        if key in self.overlay.rows:
            return self.overlay.rows[key]
        if self.frozen is not None and key in self.frozen.rows:
            return self.frozen.rows[key]
        return self.store.get(key)

    def pending(self) -> Rows:
        """The rows that are newer than the store."""
        return self.overlay.rows if self.frozen is None else self.frozen.rows | self.overlay.rows

    @property
    def pending_rows(self) -> int:
        return len(self.overlay) + (0 if self.frozen is None else len(self.frozen))

    def durable(self, number: int) -> None:
        """Forgets who changed what up to ``number``: it can no longer be lost."""
        undurable, waiting = self.undurable, self._waiting
        while waiting and waiting[0][0] <= number:
            change, rows = waiting.popleft()
            for key in rows:
                if undurable[key][0] == change:
                    del undurable[key]

    def freeze(self) -> Overlay:
        """Starts a new overlay over the current one, which is returned and no longer changes."""
        self.frozen = self.overlay
        self.overlay = Overlay()
        return self.frozen

    def scan(self, start: bytes, stop: bytes) -> Iterator[Row]:
        rows: Iterator[Row] = self.store.scan(start, stop)
        if self.frozen is not None:
            rows = merge(self.frozen.scan(start, stop), rows)
        return merge(self.overlay.scan(start, stop), rows)

    def scan_back(self, start: bytes, stop: bytes) -> Iterator[Row]:
        rows: Iterator[Row] = self.store.scan_back(start, stop)
        if self.frozen is not None:
            rows = merge_back(self.frozen.scan_back(start, stop), rows)
        return merge_back(self.overlay.scan_back(start, stop), rows)


class _ReadOnly:
    __slots__ = ()

    def put(self, table: Table, key: bytes, value: bytes) -> None:
        raise DfsError(ErrorCode.INTERNAL, f"a read tried to change {table.name}")

    def delete(self, table: Table, key: bytes) -> None:
        raise DfsError(ErrorCode.INTERNAL, f"a read tried to change {table.name}")

    def allocate(self, kind: IdKind) -> int:
        raise DfsError(ErrorCode.INTERNAL, f"a read tried to allocate an id for a {kind.name.lower()}")


class ViewTransaction(_ReadOnly):
    """A ``schema.Transaction`` over the store alone, which refuses to write: for what reads slowly."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def get(self, table: Table, key: bytes) -> bytes | None:
        return self._reader.get(PREFIX[table] + key)

    def scan(self, table: Table, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
        prefix = PREFIX[table]
        return ((key[1:], value) for key, value in self._reader.scan(prefix + start, prefix + stop))

    def scan_back(self, table: Table, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
        prefix = PREFIX[table]
        return ((key[1:], value) for key, value in self._reader.scan_back(prefix + start, prefix + stop))


class ReadTransaction(_ReadOnly):
    """A ``schema.Transaction`` that refuses to write. ``wait_for`` is the newest change of another session it depends
    on that is not durable yet, 0 if none."""

    __slots__ = ("_layers", "_overlay", "_undurable", "session", "wait_for")

    def __init__(self, layers: Layers, session: int) -> None:
        self._layers = layers
        self._overlay = layers.overlay.get
        self._undurable = layers.undurable
        self.session = session
        self.wait_for = 0

    def get(self, table: Table, key: bytes) -> bytes | None:
        return self._get(PREFIX[table] + key)

    def scan(self, table: Table, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
        prefix = PREFIX[table]
        return self._visible(self._scan(prefix + start, prefix + stop))

    def scan_back(self, table: Table, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
        prefix = PREFIX[table]
        return self._visible(self._scan_back(prefix + start, prefix + stop))

    def _get(self, key: bytes) -> bytes | None:
        value: bytes | None = self._overlay(key, _ABSENT)
        if value is _ABSENT:
            layers = self._layers
            # What is not durable is never in the store, but may be in the frozen overlay.
            if layers.frozen is None:
                return layers.store.get(key)
            value = layers.frozen.get(key, _ABSENT)
            if value is _ABSENT:
                return layers.store.get(key)
        if key in self._undurable:
            self._depend(key)
        return value

    def _depend(self, key: bytes) -> None:
        number, session = self._undurable[key]
        if session != self.session and number > self.wait_for:
            self.wait_for = number

    def _scan(self, start: bytes, stop: bytes) -> Iterator[Row]:
        return self._layers.scan(start, stop)

    def _scan_back(self, start: bytes, stop: bytes) -> Iterator[Row]:
        return self._layers.scan_back(start, stop)

    def _visible(self, rows: Iterator[Row]) -> Iterator[tuple[bytes, bytes]]:
        undurable = self._undurable
        for key, value in rows:
            if key in undurable:
                self._depend(key)
            if value is not None:
                yield key[1:], value


class ChangeTransaction(ReadTransaction):
    """A ``schema.Transaction`` that gathers its writes; dropping it leaves no trace but used-up ids."""

    __slots__ = ("_allocate", "ids", "writes")

    def __init__(self, layers: Layers, session: int, allocate: Callable[[IdKind], int]) -> None:
        super().__init__(layers, session)
        self._allocate = allocate
        self.writes: dict[bytes, bytes | None] = {}
        self.ids: list[int] = []

    def get(self, table: Table, key: bytes) -> bytes | None:
        key = PREFIX[table] + key
        if key in self.writes:
            return self.writes[key]
        return self._get(key)

    def put(self, table: Table, key: bytes, value: bytes) -> None:
        self.writes[PREFIX[table] + key] = value

    def delete(self, table: Table, key: bytes) -> None:
        self.writes[PREFIX[table] + key] = None

    def allocate(self, kind: IdKind) -> int:
        number = self._allocate(kind)
        self.ids.append(number)
        return number

    def finish(self) -> None:
        """Call once the change has succeeded: what it changed without reading counts for ``wait_for`` too. Raises
        INTERNAL if it touches too much."""
        if len(self.writes) > MAX_TRANSACTION_ROWS:
            raise DfsError(ErrorCode.INTERNAL, f"a change of {len(self.writes)} rows is too large")
        undurable = self._undurable
        if undurable:
            for key in self.writes:
                if key in undurable:
                    self._depend(key)

    def _scan(self, start: bytes, stop: bytes) -> Iterator[Row]:
        rows = super()._scan(start, stop)
        own = sorted(row for row in self.writes.items() if start <= row[0] < stop)
        return merge(iter(own), rows) if own else rows

    def _scan_back(self, start: bytes, stop: bytes) -> Iterator[Row]:
        rows = super()._scan_back(start, stop)
        own = sorted((row for row in self.writes.items() if start <= row[0] < stop), reverse=True)
        return merge_back(iter(own), rows) if own else rows

"""Layers of rows against a dict."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaserver.overlay import Overlay, Rows, merge, merge_back, row_key
from metaserver.schema import Table
from metaserver.transaction import ChangeTransaction, Layers, ReadTransaction

KEYS = st.binary(min_size=1, max_size=2).map(lambda key: bytes(byte & 3 for byte in key))
TABLE = b"\x05"
VALUES = st.binary(max_size=3)
LAYER = st.dictionaries(KEYS, st.none() | VALUES, max_size=12)
BASE = st.dictionaries(KEYS, VALUES, max_size=12)


def flatten(*layers: Rows) -> dict[bytes, bytes | None]:
    """Oldest first; what the layers show together."""
    together: dict[bytes, bytes | None] = {}
    for layer in layers:
        together |= layer
    return together


def in_range(rows: Rows, start: bytes, stop: bytes) -> list[tuple[bytes, bytes | None]]:
    return sorted((key, value) for key, value in rows.items() if start <= key < stop)


@given(LAYER, LAYER, KEYS, KEYS)
def test_a_merge_shows_the_newer_of_two_rows(old: Rows, new: Rows, start: bytes, stop: bytes) -> None:
    old, new = ({TABLE + key: value for key, value in rows.items()} for rows in (old, new))
    start, stop = TABLE + start, TABLE + stop
    older, newer = Overlay(old), Overlay(new)
    expected = in_range(flatten(old, new), start, stop)
    assert list(merge(newer.scan(start, stop), older.scan(start, stop))) == expected
    assert list(merge_back(newer.scan_back(start, stop), older.scan_back(start, stop))) == expected[::-1]


@given(st.lists(st.tuples(LAYER, KEYS, KEYS)))
def test_scans_between_changes_show_all_of_them(batches: list[tuple[Rows, bytes, bytes]]) -> None:
    overlay = Overlay()
    expected: dict[bytes, bytes | None] = {}
    for rows, start, stop in batches:
        # The first byte is the table; a scan stays in one.
        overlay.apply(rows)
        expected |= rows
        stop = start[:1] + stop[1:]
        assert list(overlay.scan(start, stop)) == in_range(expected, start, stop)
        assert list(overlay.scan_back(start, stop)) == in_range(expected, start, stop)[::-1]


@given(LAYER, LAYER)
def test_changes_lie_over_what_is_there(old: Rows, new: Rows) -> None:
    overlay = Overlay(old)
    overlay.apply(new)
    assert dict(overlay.rows) == flatten(old, new)
    assert all(overlay.get(key) == value for key, value in flatten(old, new).items())


class FakeStore:
    """What ``Layers`` needs of a store, over a dict."""

    def __init__(self, rows: dict[bytes, bytes]) -> None:
        self._rows = Overlay(rows)
        self.get = self._rows.get
        self.scan = self._rows.scan
        self.scan_back = self._rows.scan_back


def table_rows(rows: Rows) -> dict[bytes, bytes | None]:
    return {row_key(Table.XATTRS, key): value for key, value in rows.items()}


@given(BASE, LAYER, LAYER, LAYER, KEYS, KEYS)
def test_a_transaction_sees_all_layers_as_one(
    base: dict[bytes, bytes], frozen: Rows, newer: Rows, own: Rows, start: bytes, stop: bytes
) -> None:
    layers = Layers(FakeStore(table_rows(base)))  # type: ignore[arg-type]
    # Neighbours of the table in the one sorted space must not show.
    layers.overlay.apply({row_key(Table.SYMLINKS, b"\xff"): b"", row_key(Table.EXTENTS, b""): b""})
    layers.apply(1, 7, table_rows(frozen))
    layers.freeze()
    layers.apply(2, 7, table_rows(newer))
    transaction = ChangeTransaction(layers, 7, lambda _: 0)
    for key, value in own.items():
        if value is None:
            transaction.delete(Table.XATTRS, key)
        else:
            transaction.put(Table.XATTRS, key, value)
    together = flatten(base, frozen, newer, own)
    expected = [row for row in in_range(together, start, stop) if row[1] is not None]
    assert list(transaction.scan(Table.XATTRS, start, stop)) == expected
    assert list(transaction.scan_back(Table.XATTRS, start, stop)) == expected[::-1]
    assert all(transaction.get(Table.XATTRS, key) == value for key, value in together.items())
    assert transaction.wait_for == 0, "a session does not wait for its own changes"


@given(BASE, LAYER, LAYER, KEYS, KEYS, st.integers(0, 3))
def test_a_reader_depends_on_what_others_changed_and_is_not_durable(
    base: dict[bytes, bytes], first: Rows, second: Rows, start: bytes, stop: bytes, durable: int
) -> None:
    layers = Layers(FakeStore(table_rows(base)))  # type: ignore[arg-type]
    layers.apply(1, 8, table_rows(first))
    layers.apply(2, 9, table_rows(second))
    layers.durable(durable)
    changed = {key: (2, 9) if key in second else (1, 8) for key in {**first, **second}}
    for session in (7, 8, 9):
        reader = ReadTransaction(layers, session)
        list(reader.scan(Table.XATTRS, start, stop))
        seen = [changed[key] for key in changed if start <= key < stop]
        expected = max((number for number, by in seen if by != session and number > durable), default=0)
        assert reader.wait_for == expected
        for key, (number, by) in changed.items():
            reader = ReadTransaction(layers, session)
            reader.get(Table.XATTRS, key)
            assert reader.wait_for == (number if by != session and number > durable else 0)


def test_nothing_is_remembered_of_what_is_durable() -> None:
    layers = Layers(FakeStore({}))  # type: ignore[arg-type]
    for number in range(1, 10):
        layers.apply(number, number, {b"\x01same": b"", b"\x01%d" % number: b""})
    layers.durable(8)
    assert set(layers.undurable) == {b"\x01same", b"\x019"}
    layers.durable(9)
    assert not layers.undurable


def test_overwriting_without_reading_depends_too() -> None:
    layers = Layers(FakeStore({}))  # type: ignore[arg-type]
    layers.apply(5, 8, table_rows({b"a": b""}))
    transaction = ChangeTransaction(layers, 7, lambda _: 0)
    transaction.put(Table.XATTRS, b"a", b"mine")
    transaction.finish()
    assert transaction.wait_for == 5


@pytest.mark.parametrize("back", [False, True])
def test_a_scan_may_be_left_early(back: bool) -> None:
    layers = Layers(FakeStore(table_rows({b"a": b"1", b"c": b"3"})))  # type: ignore[arg-type]
    layers.apply(1, 1, table_rows({b"b": b"2"}))
    reader = ReadTransaction(layers, 1)
    scan = (reader.scan_back if back else reader.scan)(Table.XATTRS, b"", b"\xff")
    assert next(scan) == ((b"c", b"3") if back else (b"a", b"1"))
    assert next(scan) == (b"b", b"2")

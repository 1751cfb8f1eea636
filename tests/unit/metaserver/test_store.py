"""The store: checksums, totals, growth, and everything a damaged file can look like."""

import errno
import os
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaserver.overlay import row_key
from metaserver.schema import Table, Total, totals_key
from metaserver.store import (
    PAGE_BYTES,
    CorruptStore,
    MapFull,
    Store,
    StoreFull,
    ViewExpired,
    check_file,
    create_store,
    read_totals,
    row_checksum,
)

SMALL_MAP = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    create_store(tmp_path / "data.mdb")
    return tmp_path / "data.mdb"


def rows_of(store: Store, table: Table = Table.INODES) -> dict[bytes, bytes]:
    return dict(store.scan(row_key(table, b""), row_key(table, b"\xff" * 20)))


def fill(path: Path, count: int, table: Table = Table.INODES) -> dict[bytes, bytes]:
    rows = {row_key(table, b"%06d" % number): b"value %d" % number * 4 for number in range(count)}
    store = Store.open(path, SMALL_MAP)
    store.write(rows)
    store.close()
    return rows


def test_rows_are_there_after_a_restart(path: Path) -> None:
    rows = fill(path, 100)
    store = Store.open(path)
    assert rows_of(store) == rows
    assert store.get(row_key(Table.INODES, b"none")) is None
    assert list(store.scan_back(row_key(Table.INODES, b"000010"), row_key(Table.INODES, b"000013"))) == [
        (key, rows[key]) for key in (row_key(Table.INODES, b"%06d" % number) for number in (12, 11, 10))
    ]
    assert sum(1 for _ in store.verify()) >= 1
    store.close()


def test_a_write_shows_only_after_renewal(path: Path) -> None:
    store = Store.open(path, SMALL_MAP)
    key = row_key(Table.TASKS, b"a")
    store.write({key: b"1"})
    assert store.get(key) is None
    store.renew()
    assert store.get(key) == b"1"
    view = store.view()
    store.write({key: None})
    store.renew()
    assert (store.get(key), view.get(key)) == (None, b"1")
    store.close()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.dictionaries(
            st.tuples(st.sampled_from([Table.INODES, Table.XATTRS]), st.binary(min_size=1, max_size=1)),
            st.none() | st.binary(max_size=3),
            max_size=8,
        ),
        max_size=5,
    )
)
def test_totals_say_what_is_there(tmp_path_factory: pytest.TempPathFactory, batches: list[dict]) -> None:  # type: ignore[type-arg]
    path = tmp_path_factory.mktemp("store") / "data.mdb"
    create_store(path)
    store = Store.open(path, SMALL_MAP)
    expected: dict[bytes, bytes] = {}
    for batch in batches:
        rows = {row_key(table, key): value for (table, key), value in batch.items()}
        store.write(rows)
        store.renew()
        for key, value in rows.items():
            if value is None:
                expected.pop(key, None)
            else:
                expected[key] = value
    for table, total in read_totals(store).items():
        mine = {key: value for key, value in expected.items() if key[0] == table}
        checksums = 0
        for key, value in mine.items():
            checksums ^= row_checksum(key, value)
        assert total == Total(len(mine), checksums)
    list(store.verify())
    store.close()


def test_a_store_from_before_a_table_existed_is_whole(path: Path) -> None:
    """And rows of such a table without its totals are not."""
    fill(path, 3)
    later = [table for table in Table if table > Table.TOTALS]
    environment = lmdb.open(str(path), subdir=False)
    with environment.begin(write=True) as transaction:
        gone = [transaction.delete(row_key(Table.TOTALS, totals_key(table))) for table in later]
    environment.close()
    assert any(gone)
    store = Store.open(path)
    list(store.verify())
    store.write({row_key(later[0], b"key"): b"value"})
    store.renew()
    store.check_entries()
    list(store.verify())
    assert read_totals(store)[later[0]].count == 1
    store.close()
    with lmdb.open(str(path), subdir=False) as environment, environment.begin(write=True) as transaction:
        transaction.delete(row_key(Table.TOTALS, totals_key(later[0])))
    with pytest.raises(CorruptStore):
        Store.open(path)


def test_a_full_map_changes_nothing_and_grows(path: Path) -> None:
    store = Store.open(path, SMALL_MAP)
    small = {row_key(Table.TASKS, b"a"): b"1"}
    store.write(small)
    store.renew()
    big = {row_key(Table.XATTRS, b"%06d" % number): bytes(1000) for number in range(5000)}
    view = store.view()
    attempts = 0
    while True:
        try:
            store.write(big)
            break
        except MapFull:
            attempts += 1
            assert store.get(row_key(Table.TASKS, b"a")) == b"1"
            assert rows_of(store, Table.XATTRS) == {}
            store.grow()
    assert attempts == 3
    with pytest.raises(ViewExpired):
        view.get(row_key(Table.TASKS, b"a"))
    store.renew()
    assert rows_of(store, Table.XATTRS) == big
    assert path.stat().st_size == 8 * SMALL_MAP
    store.close()
    reopened = Store.open(path, SMALL_MAP)
    assert rows_of(reopened, Table.XATTRS) == big
    reopened.close()


def test_a_scan_of_an_expired_view_says_so(path: Path) -> None:
    fill(path, 2000)
    store = Store.open(path, SMALL_MAP)
    with store.view() as view:
        scan = view.scan(row_key(Table.INODES, b""), row_key(Table.INODES, b"\xff"))
        next(scan)
        store.grow()
        with pytest.raises(ViewExpired):
            list(scan)
    store.close()


@pytest.mark.parametrize("size", [0, 1, PAGE_BYTES, 2 * PAGE_BYTES, 40 * PAGE_BYTES])
def test_a_truncated_file_is_not_mapped(path: Path, size: int) -> None:
    fill(path, 5000)
    with path.open("r+b") as file:
        file.truncate(size)
    with pytest.raises(CorruptStore, match="metaserver recover"):
        Store.open(path)


def test_a_file_cut_by_one_page_is_noticed(path: Path) -> None:
    fill(path, 5000)
    store = Store.open(path)
    used = store.sizes()["used_bytes"]
    store.close()
    with path.open("r+b") as file:
        file.truncate(used - PAGE_BYTES)
    with pytest.raises(CorruptStore, match="cut off"):
        Store.open(path)


def test_a_file_of_something_else_is_refused(path: Path) -> None:
    path.write_bytes(b"no store" * 10_000)
    with pytest.raises(CorruptStore, match="no valid meta page"):
        check_file(path)


def test_every_flipped_bit_of_a_row_is_noticed(path: Path) -> None:
    """Where the bytes of rows are, every flip is found by whoever reads the row."""
    rows = fill(path, 200)
    data = path.read_bytes()
    choose = random.Random(1)
    for key, value in choose.sample(sorted(rows.items()), 20):
        damaged = bytearray(data)
        offset, bit = choose.randrange(len(value) + 4), 1 << choose.randrange(8)
        # Pages that were split hold dead copies, too.
        position = data.find(key + value)
        assert position > 0
        while position > 0:
            damaged[position + len(key) + offset] ^= bit
            position = data.find(key + value, position + 1)
        path.write_bytes(damaged)
        with pytest.raises(CorruptStore, match="wrong checksum"):
            Store.open(path)
        store = Store.open(path, check_seconds=0)
        with pytest.raises(CorruptStore, match="wrong checksum"):
            store.get(key)
        with pytest.raises(CorruptStore):
            store.get(row_key(Table.TASKS, b"anything else"))
        store.close()


def test_a_row_that_is_silently_absent_is_noticed(path: Path) -> None:
    """The tree of an older state: each row is right, but one is missing."""
    rows = fill(path, 100)
    store = Store.open(path)
    key = next(iter(rows))
    with store.environment.begin(write=True) as transaction:
        assert transaction.delete(key)
    store.renew()
    with pytest.raises(CorruptStore, match="INODES"):
        list(store.verify())
    store.close()
    with pytest.raises(CorruptStore, match="as many rows"):
        Store.open(path)


def test_a_row_that_was_swapped_for_an_older_one_is_noticed(path: Path) -> None:
    rows = fill(path, 10)
    store = Store.open(path)
    key = next(iter(rows))
    with store.environment.begin(write=True) as transaction:
        old = transaction.get(key)
    store.write({key: b"newer"})
    with store.environment.begin(write=True) as transaction:
        transaction.put(key, old)
    store.renew()
    assert store.get(key) == rows[key], "its own checksum is right"
    with pytest.raises(CorruptStore, match="INODES"):
        list(store.verify())
    store.close()


def test_a_damaged_total_stops_a_checkpoint(path: Path) -> None:
    fill(path, 10)
    store = Store.open(path)
    with store.environment.begin(write=True) as transaction:
        transaction.put(row_key(Table.TOTALS, bytes([Table.INODES])), b"x" * 16)
    with pytest.raises(CorruptStore, match="totals"):
        store.write({row_key(Table.INODES, b"a"): b"1"})
    store.close()


def test_a_copy_is_whole_and_can_be_read_without_writing(path: Path, tmp_path: Path) -> None:
    rows = fill(path, 1000)
    store = Store.open(path)
    copy = tmp_path / "copy"
    store.copy(copy)
    store.close()
    before = copy.read_bytes()
    reader = Store.open_readonly(copy)
    assert rows_of(reader) == rows
    list(reader.verify())
    reader.close()
    assert copy.read_bytes() == before
    assert not list(tmp_path.glob("copy?*"))


def test_an_interrupted_creation_leaves_nothing_that_counts(tmp_path: Path) -> None:
    (tmp_path / "data.mdb.new").write_bytes(b"half")
    create_store(tmp_path / "data.mdb")
    store = Store.open(tmp_path / "data.mdb")
    assert store.entries() == len(Table) - 1
    store.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.mdb", "data.mdb-lock"]


@contextmanager
def short_writes(path: Path) -> Iterator[None]:
    """No file becomes much longer than this one is: a write that crosses that is carried out in part."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_blocks * 512 + 3 * PAGE_BYTES + 1, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("full", [True, False])
def test_a_write_that_finds_space_for_a_part_meets_a_full_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """LMDB says EIO then: only if there is no space left either is it a full disk."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC if full else errno.EFBIG, "refused")

    store = Store.open(path, SMALL_MAP)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    rows = {row_key(Table.INODES, b"%06d" % number): bytes(3000) for number in range(50)}
    with short_writes(path), pytest.raises(StoreFull if full else OSError):
        store.write(rows)
    assert rows_of(store) == {}
    store.write(rows)
    store.renew()
    assert rows_of(store) == rows
    empty = path.with_name("empty")
    empty.touch()
    with short_writes(empty), pytest.raises(StoreFull if full else OSError):
        store.copy(path.with_name("copy"))
    assert list(path.parent.glob("*.room")) == []
    store.close()


def test_too_few_descriptors_are_no_damage(path: Path) -> None:
    """To have it recovered would be the wrong advice."""
    probe = os.open(path, os.O_RDONLY)
    os.close(probe)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Enough for whoever looks at the file first, and not for LMDB, which opens several.
    resource.setrlimit(resource.RLIMIT_NOFILE, (probe + 1, hard))
    try:
        with pytest.raises(OSError) as caught:
            Store.open(path, SMALL_MAP)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.errno == errno.EMFILE
    Store.open(path, SMALL_MAP).close()

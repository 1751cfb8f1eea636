"""Reading a store's file without LMDB: whole files pass, whatever is in them; what the disk does not give is damage."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metaserver import changelog
from metaserver.changelog import Changelog, list_segments
from metaserver.files import Files
from metaserver.logrecord import Position
from metaserver.overlay import Rows, row_key
from metaserver.pages import PAGE_BYTES, DamagedPage, check_pages
from metaserver.replay import CorruptLog
from metaserver.schema import Table
from metaserver.start import write_growing
from metaserver.store import CorruptStore, Store, create_store

KEYS = st.binary(min_size=1, max_size=200)
VALUES = st.one_of(st.none(), st.binary(max_size=100), st.integers(1, 40_000).map(bytes))


def fill(path: Path, batches: list[Rows]) -> None:
    create_store(path)
    store = Store.open(path, 1 << 20)
    for batch in batches:
        write_growing(store, batch)
    store.copy(path.with_name("copy.mdb"))
    store.close()


@given(st.lists(st.dictionaries(KEYS, VALUES, max_size=60), max_size=6))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_was_written_is_whole(tmp_path: Path, batches: list[dict[bytes, bytes | None]]) -> None:
    """Values of several pages, freed ones, deep trees; the store itself and its compacted copy."""
    for path in tmp_path.iterdir():
        path.unlink()
    fill(tmp_path / "data.mdb", [{row_key(Table.XATTRS, key): value for key, value in b.items()} for b in batches])
    assert check_pages(tmp_path / "data.mdb").whole
    assert check_pages(tmp_path / "copy.mdb").whole


def test_many_rows(tmp_path: Path) -> None:
    rows = {row_key(Table.XATTRS, b"%08d" % number): b"x" * 100 for number in range(20_000)}
    fill(tmp_path / "data.mdb", [rows, dict.fromkeys(list(rows)[::3])])
    assert check_pages(tmp_path / "data.mdb").whole
    assert not check_pages(tmp_path / "data.mdb", seconds=0).whole, "there was no time"


def test_a_sector_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.mdb"
    fill(path, [{row_key(Table.XATTRS, b"%08d" % number): b"x" * 100 for number in range(2000)}])
    real = os.pread

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        if offset == 7 * PAGE_BYTES:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(CorruptStore, match=r"cannot be read \(Input/output error\).*metaserver recover"):
        Store.open(path)


def test_a_list_of_free_pages_with_a_page_in_use(tmp_path: Path) -> None:
    """LMDB would write over it."""
    path = tmp_path / "data.mdb"
    rows = {row_key(Table.XATTRS, b"%08d" % number): b"x" * 100 for number in range(2000)}
    fill(path, [rows, dict.fromkeys(list(rows)[::2]), {row_key(Table.TASKS, b"1"): b""}])
    data = path.read_bytes()
    with pytest.raises(DamagedPage, match="does not exist or is used twice"):
        for offset in range(2 * PAGE_BYTES, len(data), 8):
            # A list of two pages or more: how many, then their numbers, descending.
            count, first, second = (int.from_bytes(data[offset + at : offset + at + 8], "little") for at in (0, 8, 16))
            if 2 <= count < 500 and 2 <= second < first < len(data) // PAGE_BYTES:
                path.write_bytes(data[: offset + 8] + second.to_bytes(8, "little") + data[offset + 16 :])
                check_pages(path)
        raise AssertionError("there is no list of free pages")


def test_a_changelog_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Changelog(tmp_path, [], 1, Position(0, 0), Files(), 1 << 16).close()

    class Broken:
        def __enter__(self) -> "Broken":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def read(self, _: int) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(changelog.Path, "open", lambda *_: Broken())
    with pytest.raises(CorruptLog, match=r"0001.log cannot be read \(Input/output error\)"):
        list_segments(tmp_path)


def test_a_row_that_is_looked_for_on_the_wrong_page(tmp_path: Path) -> None:
    """A separator of a branch page is changed under a running metaserver: what lies beyond is not "not there"."""
    path = tmp_path / "data.mdb"
    rows = {row_key(Table.XATTRS, b"%08d" % number): b"x" * 100 for number in range(2000)}
    fill(path, [rows])
    data = bytearray(path.read_bytes())
    root = next(
        page
        for page in range(2, len(data) // PAGE_BYTES)
        if data[page * PAGE_BYTES + 10] == 1 and any(data[page * PAGE_BYTES :])
    )
    page = data[root * PAGE_BYTES : (root + 1) * PAGE_BYTES]
    at = root * PAGE_BYTES + page.rfind(row_key(Table.XATTRS, b"0000"))
    data[at + 5 : at + 9] = b"9999"
    path.write_bytes(data)
    with pytest.raises(CorruptStore):
        Store.open(path, 1 << 20)
    store = Store.open(path, 1 << 20, check_seconds=0)
    with pytest.raises(CorruptStore, match="not found where it should be"):
        for key in rows:
            assert store.get(key) is not None
    store.close()

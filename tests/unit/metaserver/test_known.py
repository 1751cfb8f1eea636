"""What is known of pages: exactly what a look at everything would find, and never a reason to take damage for whole."""

import errno
import os
import random
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metaserver import known as known_module
from metaserver.known import Known, known_path
from metaserver.overlay import Rows, row_key
from metaserver.pages import PAGE_BYTES, DamagedPage, check_pages
from metaserver.schema import Table
from metaserver.start import write_growing
from metaserver.store import CorruptStore, Store, create_store

KEYS = st.binary(min_size=1, max_size=200)
VALUES = st.one_of(st.none(), st.binary(max_size=300), st.integers(1, 9_000).map(bytes))
FLIPS = 400


def write(path: Path, *batches: Rows) -> None:
    """As a life of a metaserver that ends in a crash."""
    store = Store.open(path, 1 << 20, 15.0, Known(path))
    for batch in batches:
        write_growing(store, batch)
    store.close()


def remembered(path: Path) -> list[int]:
    """Without the places of the meta pages."""
    return list(Known(path).read())[2:]


def right(path: Path) -> list[int]:
    return list(check_pages(path).checksums)[2:]


def without_zeroes(checksums: list[int]) -> dict[int, int]:
    return {page: checksum for page, checksum in enumerate(checksums) if checksum}


def many_rows(count: int, value: bytes = b"x" * 100) -> dict[bytes, bytes | None]:
    return {row_key(Table.XATTRS, b"%08d" % number): value for number in range(count)}


@given(st.lists(st.lists(st.dictionaries(KEYS, VALUES, max_size=80), max_size=5), max_size=3))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_noted_is_what_a_look_at_everything_finds(
    tmp_path: Path, lives: list[list[dict[bytes, bytes | None]]]
) -> None:
    for path in tmp_path.iterdir():
        path.unlink()
    path = tmp_path / "data.mdb"
    create_store(path)
    for life in lives:
        write(path, *({row_key(Table.XATTRS, key): value for key, value in batch.items()} for batch in life))
        assert without_zeroes(remembered(path)) == without_zeroes(right(path))


def test_deep_trees_that_grow_and_shrink(tmp_path: Path) -> None:
    path = tmp_path / "data.mdb"
    create_store(path)
    rows = many_rows(6000)
    write(path, dict(list(rows.items())[:10]), rows, dict.fromkeys(list(rows)[::3]), dict.fromkeys(list(rows)[500:]))
    assert without_zeroes(remembered(path)) == without_zeroes(right(path))
    write(path, many_rows(3000, b"y"))
    assert without_zeroes(remembered(path)) == without_zeroes(right(path))


def test_known_pages_are_not_looked_at_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.mdb"
    create_store(path)
    write(path, many_rows(6000))
    looked_at = 0
    real = check_pages.__globals__["_Walk"]._check_leaf

    def check_leaf(self: object, *arguments: object) -> object:
        nonlocal looked_at
        looked_at += 1
        return real(self, *arguments)

    monkeypatch.setattr(check_pages.__globals__["_Walk"], "_check_leaf", check_leaf)
    Store.open(path, 1 << 20, 15.0, Known(path)).close()
    assert looked_at <= 2, "all but the tree of free pages"
    Store.open(path, 1 << 20, None, Known(path)).close()
    assert looked_at > 100, "without a limit nothing is taken for granted"


def damaged(whole: bytes, used: int, choose: random.Random) -> bytes:
    data = bytearray(whole)
    page = choose.randrange(2, used)
    start = page * PAGE_BYTES
    kind = choose.randrange(8)
    if kind == 0:
        data[start : start + PAGE_BYTES] = bytes(PAGE_BYTES)
    elif kind == 1:
        data[start : start + PAGE_BYTES] = choose.randbytes(PAGE_BYTES)
    elif kind == 2:
        other = choose.randrange(2, used) * PAGE_BYTES
        data[start : start + PAGE_BYTES] = whole[other : other + PAGE_BYTES]
    else:
        data[start + choose.randrange(PAGE_BYTES)] ^= 1 << choose.randrange(8)
    return bytes(data)


def test_damage_is_found_whatever_is_known(tmp_path: Path) -> None:
    """Known pages in part, and entries that are damaged as well: what is not noticed changes no row."""
    path = tmp_path / "data.mdb"
    create_store(path)
    rows = many_rows(1500) | {row_key(Table.XATTRS, b"%04d" % number): bytes(5000) for number in range(20)}
    write(path, rows, dict.fromkeys(list(rows)[::4]))
    expected = dict(Store.open(path, 1 << 20).scan(b"\0", b"\xff"))
    whole, entries = path.read_bytes(), known_path(path).read_bytes()
    used = len(entries) // 4
    choose = random.Random(6)
    noticed = 0
    for _ in range(FLIPS):
        path.write_bytes(damaged(whole, used, choose))
        part = array("I", entries)
        if choose.random() < 0.5:
            for page in choose.sample(range(2, used), used // 3):
                part[page] = choose.choice((0, choose.getrandbits(32)))
        known_path(path).write_bytes(part.tobytes()[: choose.choice((None, 50, 0)) or None])
        try:
            store = Store.open(path, 1 << 20, 15.0, Known(path))
        except CorruptStore:
            noticed += 1
            continue
        assert dict(store.scan(b"\0", b"\xff")) == expected
        store.close()
    assert FLIPS // 3 < noticed < FLIPS


def test_bounds_of_an_unknown_branch_are_looked_at(tmp_path: Path) -> None:
    """A separator is damaged: the leaves are what they were, but not where they belong."""
    path = tmp_path / "data.mdb"
    create_store(path)
    write(path, many_rows(2000))
    data = bytearray(path.read_bytes())
    used = len(remembered(path)) + 2
    root = next(
        page
        for page in range(2, used)
        if data[page * PAGE_BYTES + 10] == 1 and data[page * PAGE_BYTES] == page % 256 and remembered(path)[page - 2]
    )
    page = data[root * PAGE_BYTES : (root + 1) * PAGE_BYTES]
    at = root * PAGE_BYTES + page.rfind(row_key(Table.XATTRS, b"0000")) + 8
    data[at] += 1
    path.write_bytes(data)
    with pytest.raises(DamagedPage, match=r"has keys of another page|is not in order"):
        check_pages(path, 15.0, Known(path).read())


@pytest.mark.parametrize("content", [b"", b"junk", bytes(1 << 16), b"\xff" * 5000])
def test_a_damaged_memory_only_costs_time(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.mdb"
    create_store(path)
    write(path, many_rows(2000))
    known_path(path).write_bytes(content)
    write(path, many_rows(10, b"new"))
    assert without_zeroes(remembered(path)) == without_zeroes(right(path))


def test_a_disk_without_space_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.mdb"
    create_store(path)
    write(path, many_rows(2000))
    real = os.pwrite

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(known_module.os, "pwrite", pwrite)
    write(path, many_rows(10, b"new"), many_rows(10, b"newer"))
    assert not known_path(path).exists(), "what is old is of no use"
    monkeypatch.setattr(known_module.os, "pwrite", real)
    write(path)
    assert without_zeroes(remembered(path)) == without_zeroes(right(path))


def test_a_start_without_enough_time_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.mdb"
    create_store(path)
    write(path, many_rows(6000))
    whole = without_zeroes(right(path))
    known_path(path).unlink()
    now = 0.0

    def monotonic() -> float:
        nonlocal now
        now += 1
        return now

    monkeypatch.setattr(check_pages.__globals__["time"], "monotonic", monotonic)
    first = check_pages(path, 1.5)
    assert not first.whole
    counts = [len(without_zeroes(list(first.checksums)[2:]))]
    known: object = first.checksums
    for _ in range(20):
        checked = check_pages(path, 3.5, known)  # type: ignore[arg-type]
        counts.append(len(without_zeroes(list(checked.checksums)[2:])))
        known = checked.checksums
    assert counts == sorted(counts)
    assert without_zeroes(list(check_pages(path, 1e9, known).checksums)[2:]) == whole  # type: ignore[arg-type]


def test_a_start_without_time_forgets_nothing_that_it_has_not_looked_at(tmp_path: Path) -> None:
    """On a slow disk comparing takes as long as looking: it ends in time, too, and the next start has what it had."""
    path = tmp_path / "data.mdb"
    create_store(path)
    write(path, many_rows(6000))
    before = Known(path).read()
    reads = 0
    real = os.preadv

    def preadv(*arguments: Any) -> int:
        nonlocal reads
        reads += 1
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        checked = check_pages(path, -1.0, before)
    assert not checked.whole
    assert reads == 0
    assert without_zeroes(list(checked.checksums)[2:]) == without_zeroes(list(before)[2:])
    Store.open(path, 1 << 20, -1.0, Known(path)).close()
    assert without_zeroes(remembered(path)) == without_zeroes(right(path))

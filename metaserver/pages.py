"""Reads a store's file without LMDB, before LMDB does: it trusts what it maps, and damage makes it end the process.

Every page that can be reached is looked at: that it is what it should be, that its nodes lie within it, that its keys
ascend and belong where the pages above say, that no page is used twice or is free at the same time, and that there are
as many pages and rows as the meta page says. Every row's checksum is compared as well. Reading goes through ``pread``:
a sector that cannot be read is an error, not a signal. 3 us a row; 1 us a page for pages that are byte for byte what
they were when they were written (``known.py``), as far as those above them are, too.

The format (LMDB 0.9, 64 bits, little-endian): a page starts with its number u64, padding u16, flags u16, and the ends
of its pointers and of its free space, both u16 (overflow pages: how many, u32). A pointer says where a node is: u16 low
and u16 high half of a size or page number, u16 flags (branches: the page number's third part), u16 length of the key,
the key, the value. The meta pages 0 and 1 have two trees each: free pages by transaction, and the rows.
"""

import os
import struct
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from crc32c import crc32c

PAGE_BYTES = 4096
HEADER_BYTES = 16
META_MAGIC = 0xBEEFC0DE
META_VERSION = 1
# crc32c of any bytes followed by their own little-endian crc32c.
RESIDUE = 0x48674BC7

_HEADER = struct.Struct("<QHHHH")
_NODE = struct.Struct("<HHHH")
_U64 = struct.Struct("<Q")
_META = struct.Struct("<IIQQ")
_TREE = struct.Struct("<IHHQQQQQ")
_TAIL = struct.Struct("<QQ")
_BRANCH, _LEAF, _OVERFLOW, _META_PAGE = 1, 2, 4, 8
_BIG = 1
_NONE = (1 << 64) - 1
# Deeper than any tree of 4 KiB pages.
_MAX_DEPTH = 32
_FREE, _ROWS = 0, 1
# Read at once where pages are compared with what is known of them.
_SCAN_PAGES = 256
_CHILD = struct.Struct("<HHH")


class DamagedPage(Exception):
    """What is wrong with which page."""


class Tree(NamedTuple):
    pad: int
    flags: int
    depth: int
    branches: int
    leaves: int
    overflows: int
    entries: int
    root: int


class Meta(NamedTuple):
    map_bytes: int
    trees: tuple[Tree, Tree]
    last_page: int
    transaction: int


def read_meta(page: bytes) -> Meta | None:
    """None if these bytes are no meta page."""
    if len(page) < PAGE_BYTES:
        return None
    at = HEADER_BYTES
    magic, version, _, map_bytes = _META.unpack_from(page, at)
    at += _META.size
    trees = tuple(Tree(*_TREE.unpack_from(page, at + number * _TREE.size)) for number in (0, 1))
    last_page, transaction = _TAIL.unpack_from(page, at + 2 * _TREE.size)
    if magic != META_MAGIC or version != META_VERSION or trees[_FREE].pad != PAGE_BYTES:
        return None
    return Meta(map_bytes, (trees[0], trees[1]), last_page, transaction)


class Checked(NamedTuple):
    """``whole``: there was time to look at everything. ``checksums``: the CRC-32C by page of what was found right, as
    ``known.py`` keeps it; 0 for all others."""

    whole: bool
    transaction: int
    checksums: Sequence[int]


def check_pages(path: Path, seconds: float | None = None, known: Sequence[int] = ()) -> Checked:
    """Raises :class:`DamagedPage`, or ``OSError`` if the file cannot be read. ``known``: see :class:`Checked`.

    Nobody may write the file meanwhile.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _Walk(descriptor, None if seconds is None else time.monotonic() + seconds, known).run()
    finally:
        os.close(descriptor)


def read_newest(descriptor: int) -> tuple[Meta, Meta | None]:
    """The meta page that counts, and the one before it."""
    pages = (os.pread(descriptor, PAGE_BYTES, number * PAGE_BYTES) for number in (0, 1))
    metas = sorted((meta for page in pages if (meta := read_meta(page))), key=lambda meta: meta.transaction)
    if not metas:
        raise DamagedPage("there is no valid meta page")
    return metas[-1], metas[0] if len(metas) > 1 else None


def children(data: bytes) -> list[int]:
    """Pages below a branch page that is whole."""
    count = (_HEADER.unpack_from(data)[3] - HEADER_BYTES) // 2
    unpack = _CHILD.unpack_from
    nodes = (unpack(data, pointer) for pointer in struct.unpack_from(f"<{count}H", data, HEADER_BYTES))
    return [first | second << 16 | third << 32 for first, second, third in nodes]


def is_plain_leaf(page: int, data: bytes) -> bool:
    """Whether this is a leaf page all of whose values lie on it."""
    own, _, flags, lower, upper = _HEADER.unpack_from(data)
    if own != page or flags != _LEAF or not HEADER_BYTES <= lower <= upper <= PAGE_BYTES:
        return False
    pointers = struct.unpack_from(f"<{(lower - HEADER_BYTES) // 2}H", data, HEADER_BYTES)
    # The low byte of a node's flags.
    return max(pointers, default=PAGE_BYTES) < PAGE_BYTES - 4 and not any(data[pointer + 4] for pointer in pointers)


def is_branch(page: int, data: bytes) -> bool:
    own, _, flags, _, _ = _HEADER.unpack_from(data)
    return bool(own == page and flags == _BRANCH)


class _OutOfTime(Exception):
    pass


class _Counts:
    def __init__(self) -> None:
        self.branches = self.leaves = self.overflows = self.entries = 0


class _Range(NamedTuple):
    """Where the keys of a page are to be: from ``low`` on and before ``high``, as integers in the tree of free pages.
    A bound is sure if it comes from a page that is known: then known pages below were looked at beside it before."""

    low: bytes = b""
    high: bytes | None = None
    sure_low: bool = True
    sure_high: bool = True


class _Walk:
    """One look at a file. ``_seen`` has a byte for each page: not 0 once somebody has claimed it."""

    def __init__(self, descriptor: int, deadline: float | None, known: Sequence[int]) -> None:
        self._descriptor = descriptor
        self._deadline = deadline
        self._known = known
        # By page: whether it is what is known of it; as far as there was time to compare.
        self._same = bytearray()
        self._compared = 0
        self._checksums = array("I")
        self._seen = bytearray()
        self._counts = _Counts()
        # Leaves that were not looked at row by row.
        self._skipped = 0
        self._tree = _FREE
        self._free: list[int] = []

    def run(self) -> Checked:
        newest, _ = read_newest(self._descriptor)
        if os.fstat(self._descriptor).st_size < (newest.last_page + 1) * PAGE_BYTES:
            raise DamagedPage("the file is cut off")
        pages = newest.last_page + 1
        self._seen = bytearray(pages)
        self._seen[0:2] = b"\1\1"
        self._same = bytearray(pages)
        self._checksums = array("I", bytes(4 * pages))
        self._compare(min(pages, len(self._known)))
        try:
            for number in (_FREE, _ROWS):
                self._check_tree(number, newest.trees[number])
        except _OutOfTime:
            self._keep_others()
            return Checked(False, newest.transaction, self._checksums)
        for page in self._free:
            self._claim(page)
        return Checked(True, newest.transaction, self._checksums)

    def _compare(self, pages: int) -> None:
        """Finds the pages that are what is known of them, in the order of the file."""
        known, same = self._known, self._same
        self._compared = pages
        view = memoryview(bytearray(_SCAN_PAGES * PAGE_BYTES))
        for first in range(0, pages, _SCAN_PAGES):
            wanted = [page for page in range(first, min(first + _SCAN_PAGES, pages)) if known[page]]
            if not wanted:
                continue
            if self._deadline is not None and time.monotonic() > self._deadline:
                # What is known of the rest may be right still.
                self._compared = first
                return
            try:
                length = os.preadv(self._descriptor, [view], first * PAGE_BYTES)
            except OSError:
                # Whoever needs one of these will find out which of them it is.
                continue
            for page in wanted:
                start = (page - first) * PAGE_BYTES
                same[page] = start < length and crc32c(view[start : start + PAGE_BYTES]) == known[page]

    def _keep_others(self) -> None:
        for page in range(2, min(len(self._known), len(self._same))):
            if not self._checksums[page] and (self._same[page] or page >= self._compared):
                self._checksums[page] = self._known[page]

    def _check_tree(self, number: int, tree: Tree) -> None:
        self._tree, self._counts = number, _Counts()
        if tree.root != _NONE:
            self._check_page(tree.root, _Range(), 1, tree.depth)
        counted = (self._counts.branches, self._counts.leaves, self._counts.overflows)
        if counted != (tree.branches, tree.leaves, tree.overflows) or (
            self._counts.entries != tree.entries and not self._skipped
        ):
            raise DamagedPage(f"tree {number} does not have the pages and rows it should have")

    def _read(self, page: int, count: int = 1) -> bytes:
        data = os.pread(self._descriptor, count * PAGE_BYTES, page * PAGE_BYTES)
        if len(data) != count * PAGE_BYTES:
            raise DamagedPage(f"page {page} is cut off")
        return data

    def _claim(self, page: int) -> None:
        if not 1 < page < len(self._seen) or self._seen[page]:
            raise DamagedPage(f"page {page} does not exist or is used twice")
        self._seen[page] = 1

    def _check_page(self, page: int, keys: _Range, depth: int, depths: int) -> None:
        self._claim(page)
        data = self._read(page)
        own, _, flags, lower, upper = _HEADER.unpack_from(data)
        wanted = _LEAF if depth == depths else _BRANCH
        count = (lower - HEADER_BYTES) // 2
        if own != page or flags != wanted or not HEADER_BYTES <= lower <= upper <= PAGE_BYTES or lower % 2:
            raise DamagedPage(f"page {page} is damaged")
        if depth > _MAX_DEPTH or not count:
            raise DamagedPage(f"page {page} is empty")
        pointers = struct.unpack_from(f"<{count}H", data, HEADER_BYTES)
        if min(pointers) < upper or max(pointers) > PAGE_BYTES - _NODE.size:
            raise DamagedPage(f"page {page} has a node outside")
        if flags == _BRANCH:
            self._counts.branches += 1
            self._check_branch(page, data, pointers, keys, depth, depths)
            plain = True
        else:
            self._counts.leaves += 1
            self._counts.entries += count
            plain = self._check_leaf(page, data, pointers, keys)
        if plain and self._tree == _ROWS:
            self._checksums[page] = crc32c(data)

    def _key(self, page: int, data: bytes, start: int, length: int) -> bytes:
        """A key that sorts as LMDB sorts it."""
        if start + length > PAGE_BYTES:
            raise DamagedPage(f"page {page} has a node outside")
        key = data[start : start + length]
        if self._tree == _FREE and length:
            if length != _U64.size:
                raise DamagedPage(f"page {page} has a key of {length} bytes")
            return key[::-1]
        return key

    def _check_branch(
        self, page: int, data: bytes, pointers: tuple[int, ...], keys: _Range, depth: int, depths: int
    ) -> None:
        nodes = []
        for number, pointer in enumerate(pointers):
            first, second, third, length = _NODE.unpack_from(data, pointer)
            # The first key of a branch says nothing.
            key = self._key(page, data, pointer + _NODE.size, length) if number else keys.low
            nodes.append((key, first | second << 16 | third << 32))
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise _OutOfTime
        sure = self._tree == _ROWS and bool(self._same[page])
        last = len(nodes) - 1
        for number, (key, child) in enumerate(nodes):
            stop = nodes[number + 1][0] if number < last else keys.high
            if key < keys.low or (stop is not None and key >= stop) or (number and not key):
                raise DamagedPage(f"page {page} is not in order")
            sure_low = sure if number else keys.sure_low
            sure_high = sure if number < last else keys.sure_high
            if sure_low and sure_high and depth + 1 == depths and self._is_same(child):
                self._skip_leaf(child)
            else:
                self._check_page(child, _Range(key, stop, sure_low, sure_high), depth + 1, depths)

    def _is_same(self, page: int) -> bool:
        return page < len(self._same) and bool(self._same[page])

    def _skip_leaf(self, page: int) -> None:
        """Nothing of it has changed since it was written, nor the bounds of its keys."""
        self._claim(page)
        self._checksums[page] = self._known[page]
        self._counts.leaves += 1
        self._skipped += 1

    def _check_leaf(self, page: int, data: bytes, pointers: tuple[int, ...], keys: _Range) -> bool:
        """Whether all its values lie on it."""
        before = None
        plain = True
        for pointer in pointers:
            first, second, flags, length = _NODE.unpack_from(data, pointer)
            size = first | second << 16
            start = pointer + _NODE.size + length
            key = self._key(page, data, pointer + _NODE.size, length)
            if flags == _BIG:
                value = self._overflow(page, data, start, size)
                plain = False
            elif flags or start + size > PAGE_BYTES:
                raise DamagedPage(f"page {page} has a node outside")
            else:
                value = data[start : start + size]
            if not key or (before is not None and key <= before):
                raise DamagedPage(f"page {page} is not in order")
            before = key
            if self._tree == _ROWS:
                if crc32c(value, crc32c(key)) != RESIDUE:
                    raise DamagedPage(f"the row {key.hex()} has a wrong checksum")
            else:
                self._take_free(page, value)
        if self._key_range_broken(page, data, pointers, keys):
            raise DamagedPage(f"page {page} has keys of another page")
        return plain

    def _key_range_broken(self, page: int, data: bytes, pointers: tuple[int, ...], keys: _Range) -> bool:
        ends = []
        for pointer in (pointers[0], pointers[-1]):
            length = _NODE.unpack_from(data, pointer)[3]
            ends.append(self._key(page, data, pointer + _NODE.size, length))
        return ends[0] < keys.low or (keys.high is not None and ends[1] >= keys.high)

    def _overflow(self, page: int, data: bytes, start: int, size: int) -> bytes:
        """A value that has pages of its own."""
        if start + _U64.size > PAGE_BYTES:
            raise DamagedPage(f"page {page} has a node outside")
        first = _U64.unpack_from(data, start)[0]
        self._claim(first)
        own, _, flags, low, high = _HEADER.unpack_from(self._read(first))
        count = low | high << 16
        if own != first or flags != _OVERFLOW or not 0 < count <= len(self._seen) - first:
            raise DamagedPage(f"page {first} is damaged")
        if size + HEADER_BYTES > count * PAGE_BYTES:
            raise DamagedPage(f"page {page} has a value of {size} bytes")
        for further in range(first + 1, first + count):
            self._claim(further)
        self._counts.overflows += count
        return self._read(first, count)[HEADER_BYTES : HEADER_BYTES + size]

    def _take_free(self, page: int, value: bytes) -> None:
        """A list of free pages: how many, then their numbers."""
        count = _U64.unpack_from(value)[0] if len(value) >= _U64.size else -1
        if (count + 1) * _U64.size > len(value) or count < 0:
            raise DamagedPage(f"page {page} has a damaged list of free pages")
        self._free.extend(struct.unpack_from(f"<{count}Q", value, _U64.size))

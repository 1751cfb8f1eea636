"""Reads a store's file without LMDB, before LMDB does: it trusts what it maps, and damage makes it end the process.

Every page that can be reached is looked at: that it is what it should be, that its nodes lie within it, that its keys
ascend and belong where the pages above say, that no page is used twice or is free at the same time, and that there are
as many pages and rows as the meta page says. Every row's checksum is compared as well. Reading goes through ``pread``:
a sector that cannot be read is an error, not a signal. 3 us a row.

The format (LMDB 0.9, 64 bits, little-endian): a page starts with its number u64, padding u16, flags u16, and the ends
of its pointers and of its free space, both u16 (overflow pages: how many, u32). A pointer says where a node is: u16 low
and u16 high half of a size or page number, u16 flags (branches: the page number's third part), u16 length of the key,
the key, the value. The meta pages 0 and 1 have two trees each: free pages by transaction, and the rows.
"""

import os
import struct
import time
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


def check_pages(path: Path, seconds: float | None = None) -> bool:
    """Whether there was time to look at everything; raises :class:`DamagedPage`, or ``OSError`` if it cannot be read.

    Nobody may write the file meanwhile.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _Walk(descriptor, None if seconds is None else time.monotonic() + seconds).run()
    finally:
        os.close(descriptor)


class _OutOfTime(Exception):
    pass


class _Counts:
    def __init__(self) -> None:
        self.branches = self.leaves = self.overflows = self.entries = 0


class _Walk:
    """One look at a file. ``_seen`` has a byte for each page: not 0 once somebody has claimed it."""

    def __init__(self, descriptor: int, deadline: float | None) -> None:
        self._descriptor = descriptor
        self._deadline = deadline
        self._seen = bytearray()
        self._counts = _Counts()
        self._tree = _FREE
        self._free: list[int] = []

    def run(self) -> bool:
        metas = [meta for number in (0, 1) if (meta := read_meta(self._read(number))) is not None]
        if not metas:
            raise DamagedPage("there is no valid meta page")
        newest = max(metas, key=lambda meta: meta.transaction)
        if os.fstat(self._descriptor).st_size < (newest.last_page + 1) * PAGE_BYTES:
            raise DamagedPage("the file is cut off")
        self._seen = bytearray(newest.last_page + 1)
        self._seen[0:2] = b"\1\1"
        try:
            for number in (_FREE, _ROWS):
                self._check_tree(number, newest.trees[number])
        except _OutOfTime:
            return False
        for page in self._free:
            self._claim(page)
        return True

    def _check_tree(self, number: int, tree: Tree) -> None:
        self._tree, self._counts = number, _Counts()
        if tree.root != _NONE:
            self._check_page(tree.root, b"", None, 1, tree.depth)
        counted = (self._counts.branches, self._counts.leaves, self._counts.overflows, self._counts.entries)
        if counted != (tree.branches, tree.leaves, tree.overflows, tree.entries):
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

    def _check_page(self, page: int, low: bytes, high: bytes | None, depth: int, depths: int) -> None:
        """A page whose keys are to be from ``low`` on and before ``high``, as integers in the tree of free pages."""
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
            self._check_branch(page, data, pointers, low, high, depth, depths)
        else:
            self._counts.leaves += 1
            self._counts.entries += count
            self._check_leaf(page, data, pointers, low, high)

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
        self, page: int, data: bytes, pointers: tuple[int, ...], low: bytes, high: bytes | None, depth: int, depths: int
    ) -> None:
        nodes = []
        for number, pointer in enumerate(pointers):
            first, second, third, length = _NODE.unpack_from(data, pointer)
            # The first key of a branch says nothing.
            key = self._key(page, data, pointer + _NODE.size, length) if number else low
            nodes.append((key, first | second << 16 | third << 32))
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise _OutOfTime
        for number, (key, child) in enumerate(nodes):
            stop = nodes[number + 1][0] if number + 1 < len(nodes) else high
            if key < low or (stop is not None and key >= stop) or (number and not key):
                raise DamagedPage(f"page {page} is not in order")
            self._check_page(child, key, stop, depth + 1, depths)

    def _check_leaf(self, page: int, data: bytes, pointers: tuple[int, ...], low: bytes, high: bytes | None) -> None:
        before = None
        for pointer in pointers:
            first, second, flags, length = _NODE.unpack_from(data, pointer)
            size = first | second << 16
            start = pointer + _NODE.size + length
            key = self._key(page, data, pointer + _NODE.size, length)
            if flags == _BIG:
                value = self._overflow(page, data, start, size)
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
        if self._key_range_broken(page, data, pointers, low, high):
            raise DamagedPage(f"page {page} has keys of another page")

    def _key_range_broken(
        self, page: int, data: bytes, pointers: tuple[int, ...], low: bytes, high: bytes | None
    ) -> bool:
        ends = []
        for pointer in (pointers[0], pointers[-1]):
            length = _NODE.unpack_from(data, pointer)[3]
            ends.append(self._key(page, data, pointer + _NODE.size, length))
        return ends[0] < low or (high is not None and ends[1] >= high)

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

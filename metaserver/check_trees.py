"""The part of ``check.py`` that is about where inodes count: LINKS and TREES."""

import stat
from collections.abc import Generator, Iterator

from metaserver.check_chunks import SLICE_ROWS, Findings, rows
from metaserver.protocol import ROOT_INO, InodeFlags, Problem
from metaserver.schema import (
    ALL_COUNTED,
    Inode,
    Listed,
    Table,
    Transaction,
    Tree,
    inode_key,
    listing_key,
    read_u64,
)
from metaserver.trees import MODULUS

_Sums = list[int]


class Trees:
    """Adds up what is in each directory, to compare it with TREES."""

    def __init__(self, tx: Transaction) -> None:
        self._tx = tx
        self._all_counted = tx.get(Table.COUNTERS, ALL_COUNTED) is not None
        self._parents: dict[int, int] = {}
        self._sums: dict[int, _Sums] = {}

    def check_inode(self, ino: int, inode: Inode, links: Iterator[tuple[bytes, bytes]]) -> Findings:
        """Whether it says in which directory it counts, and LINKS what its other names are."""
        others = [(read_u64(key, 8), read_u64(key, 16)) for key, _ in links]
        if not inode.nlink:
            if others:
                yield Problem("LINKS", str(ino), f"{len(others)} rows for an inode without a name")
        elif not inode.flags & InodeFlags.COUNTED:
            if self._all_counted:
                yield Problem("INODES", str(ino), "is not counted")
        elif stat.S_ISDIR(inode.mode):
            self._parents[ino] = inode.parent
            if ino != ROOT_INO:
                self._add(inode.parent, [0, 1, 0, 0])
        else:
            self._add(inode.parent, [1, 0, inode.allocated, inode.size])
            yield from self._check_names(ino, inode, others)

    def _check_names(self, ino: int, inode: Inode, others: list[tuple[int, int]]) -> Findings:
        names = {(inode.parent, inode.next_cookie), *others}
        for parent, cookie in names:
            row = self._tx.get(Table.LISTING, listing_key(parent, cookie))
            if row is None or Listed.unpack(row).ino != ino:
                yield Problem("LINKS", str(ino), f"is said to be entry {cookie} of directory {parent}, and is not")
        if len(names) != len(others) + 1 or (self._all_counted and len(names) != inode.nlink):
            yield Problem("LINKS", str(ino), f"{len(others)} rows for an inode with nlink {inode.nlink}")

    def _add(self, directory: int, amounts: _Sums) -> None:
        found = self._sums.setdefault(directory, [0, 0, 0, 0])
        for at, amount in enumerate(amounts):
            found[at] += amount

    def check(self) -> Findings:
        """After all inodes have been looked at."""
        expected: dict[int, _Sums] = yield from self._expected()
        for count, (key, value) in enumerate(rows(self._tx, Table.TREES)):
            ino, tree = read_u64(key), Tree.unpack(value)
            found = expected.pop(ino, None)
            if found != [tree.files, tree.directories, tree.allocated, tree.size]:
                yield Problem("TREES", str(ino), f"says {tree}, there is {found}")
            if count % SLICE_ROWS == 0:
                yield None
        for ino, sums in expected.items():
            yield Problem("TREES", str(ino), f"there is no row for {sums}")

    def _expected(self) -> Generator[None, None, dict[int, _Sums]]:
        """Returns the sums of whole trees. Directories that are not COUNTED themselves still have some."""
        expected: dict[int, _Sums] = {}
        for count, (directory, own) in enumerate(self._sums.items()):
            above: int | None = directory
            seen = set()
            while above is not None and above not in seen:
                seen.add(above)
                found = expected.setdefault(above, [0, 0, 0, 0])
                for at, amount in enumerate(own):
                    found[at] = (found[at] + amount) % MODULUS
                above = None if above == ROOT_INO else self._parent(above)
            if count % SLICE_ROWS == 0:
                yield None
        return {ino: sums for ino, sums in expected.items() if any(sums)}

    def _parent(self, directory: int) -> int | None:
        parent = self._parents.get(directory)
        if parent is None:
            row = self._tx.get(Table.INODES, inode_key(directory))
            parent = None if row is None else Inode.unpack(row).parent
        return parent

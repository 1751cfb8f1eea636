"""TREES: what is below each directory, worked out by checkpoints from the rows that they replace. Pure.

A change to a file costs nothing here: a checkpoint has old and new row of every inode at hand, however often it changed
in between. An inode counts for the directory that its row tells (``counted.py``) and for all directories above. What a
checkpoint does to the sums, in this order, so that each step finds the tree that it speaks of:

1. what no longer counts where it did is taken away, from there upwards in the tree as it was;
2. directories that have moved leave with all they have, and then arrive: in whatever order, because who goes upwards
   stops at a directory that has left and not arrived yet;
3. what counts now, or counts more, is added, upwards in the tree as it is.
"""

import stat
import struct
from collections.abc import Callable
from typing import NamedTuple

from metaserver.overlay import PREFIX, Rows
from metaserver.protocol import ROOT_INO, InodeFlags
from metaserver.schema import Inode, Table, Tree, inode_key, read_u64

# A row key to the row as it was before, without checksum.
Read = Callable[[bytes], bytes | None]
Amounts = tuple[int, int, int, int]

# Sums are kept modulo this: three sparse files of 8 EiB in a tree are more than a column holds. What is taken away
# again leaves the right sum, and no sum, right or wrong, may ever keep a checkpoint from being written.
MODULUS = 1 << 64

_INODES = int(Table.INODES)
_INODE_PREFIX = PREFIX[Table.INODES]
_TREE_PREFIX = PREFIX[Table.TREES]


class Counts(NamedTuple):
    """What sums are made of: a part of an :class:`Inode`."""

    mode: int
    nlink: int
    size: int
    allocated: int
    flags: int
    parent: int

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


# These fields and what lies between them: a third of what taking all of the row apart costs.
_COUNTS = struct.Struct("<I8xIQQ40xI16xQ12x")
assert _COUNTS.size == Inode.LAYOUT.size
_COUNTED = int(InodeFlags.COUNTED)


def counts(row: bytes | None) -> Counts | None:
    """Of a row of INODES."""
    return None if row is None else Counts._make(_COUNTS.unpack(row))


class Share(NamedTuple):
    """What an inode counts for, as the fields of :class:`Tree`, and the directory where."""

    directory: int
    amounts: Amounts


def share(ino: int, inode: Counts | None) -> Share | None:
    if inode is None or not inode.nlink or not inode.flags & _COUNTED or ino == ROOT_INO:
        return None
    if inode.is_directory:
        return Share(inode.parent, (0, 1, 0, 0))
    return Share(inode.parent, (1, 0, inode.allocated, inode.size))


def changed(rows: Rows, read: Read) -> dict[bytes, bytes | None]:
    """The rows of TREES that change with ``rows``; ``read`` shows what is in their place so far."""
    sums = _Sums(read)
    for key, value in rows.items():
        if key[0] == _INODES:
            sums.look_at(read_u64(key, 1), read(key), value)
    return sums.rows()


class _Sums:
    """``_moved``: directory to where it was; ``_away``: those of them that have left and not arrived yet."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._lost: dict[int, list[int]] = {}
        self._gained: dict[int, list[int]] = {}
        self._moved: dict[int, int] = {}
        self._away: set[int] = set()
        # Directory to the one it is in; None: it is not there (any more).
        self._old_parents: dict[int, int | None] = {}
        self._new_parents: dict[int, int | None] = {}
        self._trees: dict[int, list[int]] = {}

    def look_at(self, ino: int, old_row: bytes | None, new_row: bytes | None) -> None:
        old, new = counts(old_row), counts(new_row)
        self._note_directory(ino, old, new)
        lost, gained = share(ino, old), share(ino, new)
        if lost == gained:
            return
        if lost is not None and gained is not None and lost.directory == gained.directory:
            _add(self._gained, lost.directory, lost.amounts, -1)
        elif lost is not None:
            _add(self._lost, lost.directory, lost.amounts, -1)
        if gained is not None:
            _add(self._gained, gained.directory, gained.amounts, 1)

    def _note_directory(self, ino: int, old: Counts | None, new: Counts | None) -> None:
        was = old.parent if old is not None and old.is_directory else None
        is_now = new.parent if new is not None and new.is_directory else None
        if was is None and is_now is None:
            return
        self._old_parents[ino], self._new_parents[ino] = was, is_now
        if was is not None and is_now is not None and was != is_now:
            self._moved[ino] = was

    def rows(self) -> dict[bytes, bytes | None]:
        for directory, amounts in self._lost.items():
            self._climb(directory, amounts, self._old_parent)
        for directory, was in self._moved.items():
            self._away.add(directory)
            self._climb(was, [-amount for amount in self._tree(directory)], self._old_parent)
        for directory in self._moved:
            self._away.discard(directory)
            parent = self._new_parents[directory]
            if parent is not None:
                self._climb(parent, list(self._tree(directory)), self._new_parent)
        for directory, amounts in self._gained.items():
            self._climb(directory, amounts, self._new_parent)
        return dict(map(self._row, self._trees))

    def _climb(self, directory: int | None, amounts: list[int], parent_of: Callable[[int], int | None]) -> None:
        """Adds to a directory and all above."""
        while directory is not None:
            tree = self._tree(directory)
            for at, amount in enumerate(amounts):
                tree[at] = (tree[at] + amount) % MODULUS
            if directory == ROOT_INO or directory in self._away:
                return
            directory = parent_of(directory)

    def _tree(self, directory: int) -> list[int]:
        tree = self._trees.get(directory)
        if tree is None:
            row = self._read(_TREE_PREFIX + inode_key(directory))
            tree = self._trees[directory] = [0, 0, 0, 0] if row is None else list(Tree.LAYOUT.unpack(row))
        return tree

    def _old_parent(self, directory: int) -> int | None:
        if directory not in self._old_parents:
            row = self._read(_INODE_PREFIX + inode_key(directory))
            inode = counts(row)
            self._old_parents[directory] = None if inode is None else inode.parent
        return self._old_parents[directory]

    def _new_parent(self, directory: int) -> int | None:
        return self._new_parents[directory] if directory in self._new_parents else self._old_parent(directory)

    def _row(self, directory: int) -> tuple[bytes, bytes | None]:
        tree = self._trees[directory]
        return _TREE_PREFIX + inode_key(directory), Tree(*tree).pack() if any(tree) else None


def _add(sums: dict[int, list[int]], directory: int, amounts: Amounts, sign: int) -> None:
    found = sums.get(directory)
    if found is None:
        found = sums[directory] = [0, 0, 0, 0]
    for at, amount in enumerate(amounts):
        found[at] += sign * amount

"""How many copies are wanted: of an inode (its ``storage_class``), of a chunk (``copies``), and how one follows from
the other. Synchronous, over one transaction.

A chunk gets as many copies as the most demanding inode that has bytes in it wants. New data raises its chunk at the
commit; what exists already is brought up to date by a SET_COPIES task, which walks a tree in bounded steps. A file that
is moved into a directory keeps its number: as with every file system that has such numbers, only what is made in a
directory takes over the directory's.
"""

import stat
from collections.abc import Iterable
from itertools import islice

import msgspec

from metaserver import chunks, inodes
from metaserver.inodes import Effects
from metaserver.protocol import Attributes, ChunkState, FileCommit
from metaserver.schema import (
    ExtentRow,
    Inode,
    Listed,
    Table,
    Task,
    Transaction,
    after,
    extent_key,
    inode_key,
    key_u64,
    listing_key,
    parse_by_chunk_key,
    read_u64,
)

# As many as a cluster can be configured for.
MOST_COPIES = 16
# Of one step: rows looked at, and chunks that are evaluated at its end. Each evaluation may look at all extents of a
# chunk, so that a step takes a few ms.
STEP_ROWS = 400
STEP_CHUNKS = 50
# Entries of a directory, or extents of a file, at a time.
PAGE_ROWS = 64
_HAVE_COPIES = (stat.S_IFDIR >> 12, stat.S_IFREG >> 12)


def raise_chunks(tx: Transaction, files: Iterable[FileCommit], committed: Iterable[Attributes], default: int) -> None:
    """The chunks that files were just written to get as many copies as these files want."""
    wanted = {attributes.ino: attributes.copies or default for attributes in committed}
    least: dict[int, int] = {}
    for file in files:
        copies = wanted.get(file.ino, 0)
        for extent in file.extents:
            least[extent.chunk] = max(least.get(extent.chunk, 0), copies)
    for chunk, copies in least.items():
        row = chunks.find(tx, chunk)
        if row is not None and row.copies < copies:
            row.copies = copies
            chunks.save(tx, chunk, row)


def of_chunk(tx: Transaction, chunk: int, default: int, known: dict[int, int], enough: int = MOST_COPIES) -> int:
    """The most copies that an inode with bytes in the chunk wants; no more than ``enough`` are looked for. ``known``
    remembers inodes from one call to the next within a transaction."""
    prefix = key_u64(chunk)
    most = 0
    for key, _ in tx.scan(Table.BY_CHUNK, prefix, after(prefix)):
        ino = parse_by_chunk_key(key)[2]
        copies = known.get(ino)
        if copies is None:
            value = tx.get(Table.INODES, inode_key(ino))
            copies = known[ino] = default if value is None else Inode.unpack(value).storage_class or default
        most = max(most, copies)
        if most >= enough:
            break
    return most


def set_copies_step(tx: Transaction, task: Task, default: int, effects: Effects) -> Task | None:
    """One step of a SET_COPIES task; the task as it goes on, or None if it is finished."""
    walk = _Walk(tx, task, effects)
    walk.go_on()
    known: dict[int, int] = {}
    for chunk in walk.chunks:
        _evaluate(tx, chunk, task.value or default, default, known, effects)
    return msgspec.structs.replace(task, stack=walk.stack) if walk.stack else None


def _evaluate(tx: Transaction, chunk: int, wanted: int, default: int, known: dict[int, int], effects: Effects) -> None:
    """Raising needs no look at the others who are in the chunk, lowering does."""
    row = chunks.find(tx, chunk)
    if row is None or row.state == ChunkState.DEAD or row.copies == wanted:
        return
    copies = wanted if wanted > row.copies else of_chunk(tx, chunk, default, known, row.copies)
    if copies != row.copies:
        row.copies = copies
        chunks.save(tx, chunk, row)
        effects.chunks.append(chunk)


class _Walk:
    """Depth first through a tree: ``stack`` has (ino, where to go on), what comes next last: after a cookie in a
    directory, from a file offset in a file. What is moved meanwhile is found where it was, or not at all."""

    def __init__(self, tx: Transaction, task: Task, effects: Effects) -> None:
        self._tx = tx
        self._copies = task.value
        self._effects = effects
        self._rows = STEP_ROWS
        self.stack = list(task.stack)
        self.chunks: dict[int, None] = {}

    def go_on(self) -> None:
        while self.stack and self._rows > 0 and len(self.chunks) < STEP_CHUNKS:
            ino, position = self.stack.pop()
            self._rows -= 1
            inode = inodes.find(self._tx, ino)
            if inode is None:
                continue
            if position == 0 and inode.storage_class != self._copies:
                inode.storage_class = self._copies
                inodes.save(self._tx, ino, inode)
                self._effects.changed.append(ino)
            if stat.S_ISDIR(inode.mode):
                self._directory(ino, position)
            else:
                self._file(ino, position)

    def _directory(self, ino: int, position: int) -> None:
        rows = self._tx.scan(Table.LISTING, listing_key(ino, position + 1), after(key_u64(ino)))
        found = [(read_u64(key, 8), Listed.unpack(value)) for key, value in islice(rows, PAGE_ROWS)]
        self._rows -= len(found)
        if len(found) == PAGE_ROWS:
            self.stack.append((ino, found[-1][0]))
        self.stack += [(entry.ino, 0) for _, entry in reversed(found) if entry.type in _HAVE_COPIES]

    def _file(self, ino: int, position: int) -> None:
        rows = self._tx.scan(Table.EXTENTS, extent_key(ino, position), after(key_u64(ino)))
        found = [(read_u64(key, 8), ExtentRow.unpack(value)) for key, value in islice(rows, PAGE_ROWS)]
        self._rows -= len(found)
        if len(found) == PAGE_ROWS:
            self.stack.append((ino, found[-1][0] + 1))
        self.chunks.update((row.chunk, None) for _, row in found)

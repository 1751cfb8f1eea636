"""Sums of trees stay what a walk finds, whatever is done to names and sizes between two checkpoints, and also while an
older store is being counted."""

from collections.abc import Callable
from random import Random

import pytest
from memory_rows import MemoryRows

from metaserver import counted, inodes, namespace, trees
from metaserver.check import check
from metaserver.errors import DfsError
from metaserver.inodes import Effects
from metaserver.overlay import row_key
from metaserver.protocol import FILE_SIZE_MAX, ROOT_INO, InodeFlags, Link, Make, Rename, RenameFlags, Unlink
from metaserver.schema import (
    ALL_COUNTED,
    ID_LIMITS,
    IdKind,
    Inode,
    Listed,
    Table,
    Task,
    TaskKind,
    Tree,
    inode_key,
    key_u64,
    read_u64,
)

DIRECTORY, FILE = 0o040755, 0o100644
NAMES = [b"a", b"b", b"c"]


class History:
    """Random operations; what fails leaves no trace."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.tx = MemoryRows()
        inodes.make_root(self.tx, 1)
        for kind in IdKind:
            self.tx.put(Table.COUNTERS, ID_LIMITS[kind], key_u64(1 << 40))
        self.stored = self.tx.copy()

    def step(self) -> None:
        steps = [self.make, self.make, self.make, self.rename, self.rename, self.rename, self.link, self.unlink]
        before = self.tx.copy()
        try:
            self.random.choice([*steps, self.resize])()
        except DfsError:
            self.tx = before

    def _live(self, *, directory: bool) -> int:
        rows = self.tx.tables[Table.INODES].items()
        found = [read_u64(key) for key, row in rows if Inode.unpack(row).nlink]
        if directory:
            found = [ino for ino in found if self.inode(ino).mode == DIRECTORY]
        return self.random.choice(found)

    def inode(self, ino: int) -> Inode:
        return Inode.unpack(self.tx.get(Table.INODES, inode_key(ino)) or b"")

    def make(self) -> None:
        parent, name = self._live(directory=True), self.random.choice(NAMES)
        namespace.make(self.tx, 2, Make(parent, name, self.random.choice([DIRECTORY, FILE]), 0, 0))

    def rename(self) -> None:
        old, new = self._live(directory=True), self._live(directory=True)
        flags = self.random.choice([RenameFlags.NONE, RenameFlags.NONE, RenameFlags.EXCHANGE])
        message = Rename(old, self.random.choice(NAMES), new, self.random.choice(NAMES), flags)
        namespace.rename(self.tx, 2, message, lambda _: (), Effects())

    def link(self) -> None:
        ino, parent = self._live(directory=False), self._live(directory=True)
        namespace.link(self.tx, 2, Link(ino, parent, self.random.choice(NAMES)))

    def unlink(self) -> None:
        parent, directory = self._live(directory=True), self.random.random() < 0.5
        openers: Callable[[int], tuple[int, ...]] = lambda _: (1,) if self.random.random() < 0.2 else ()  # noqa: E731
        namespace.unlink(self.tx, 2, Unlink(parent, self.random.choice(NAMES), directory), openers, Effects())

    def resize(self) -> None:
        ino = self._live(directory=False)
        inode = self.inode(ino)
        if inode.mode == FILE:
            inode.size = self.random.randrange(10)
            inodes.save(self.tx, ino, inode)

    def checkpoint(self) -> None:
        """What changed since the last one changes TREES."""
        old, new = self.stored.tables[Table.INODES], self.tx.tables[Table.INODES]
        rows = {row_key(Table.INODES, key): new.get(key) for key in {*old, *new} if old.get(key) != new.get(key)}
        sums = trees.changed(rows, lambda key: self.stored.get(Table(key[0]), key[1:]))
        for key, value in sums.items():
            if value is None:
                self.tx.delete(Table.TREES, key[1:])
            else:
                self.tx.put(Table.TREES, key[1:], value)
        self.stored = self.tx.copy()

    def problems(self) -> list[object]:
        """But those of orphans, whose session is made up here."""
        return [problem for problem in check(self.tx) if problem.table != "ORPHANS"]

    def forget_counts(self) -> None:
        """As a store from before was."""
        for table in (Table.TREES, Table.LINKS):
            self.tx.tables[table].clear()
        self.tx.delete(Table.COUNTERS, ALL_COUNTED)
        for key, row in list(self.tx.tables[Table.INODES].items()):
            inode = Inode.unpack(row)
            inode.flags &= ~InodeFlags.COUNTED
            if inode.mode != DIRECTORY:
                inode.parent = inode.next_cookie = 0
            self.tx.put(Table.INODES, key, inode.pack())
        self.stored = self.tx.copy()


@pytest.mark.parametrize("seed", range(12))
def test_sums_are_what_a_walk_finds(seed: int) -> None:
    history = History(seed)
    for _ in range(60):
        for _ in range(history.random.choice([1, 2, 5, 40])):
            history.step()
        history.checkpoint()
        assert history.problems() == []


@pytest.mark.parametrize("seed", range(12))
def test_an_older_store_is_counted_while_it_changes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted, "STEP_NAMES", 3)
    history = History(seed)
    for _ in range(400):
        history.step()
    history.forget_counts()
    task: Task | None = Task(TaskKind.COUNT_TREES, ROOT_INO)
    steps = 0
    while task is not None:
        task = counted.count_step(history.tx, task)
        for _ in range(history.random.randrange(6)):
            history.step()
        if history.random.random() < 0.3:
            history.checkpoint()
        steps += 1
        assert steps < 1000
    history.checkpoint()
    assert history.problems() == []
    assert history.tx.get(Table.COUNTERS, ALL_COUNTED) is not None


def test_a_tree_that_moves_takes_its_sums_along() -> None:
    history = History(0)
    tx = history.tx
    for parent, name, mode in ((1, b"from", DIRECTORY), (1, b"to", DIRECTORY), (2, b"sub", DIRECTORY), (4, b"f", FILE)):
        namespace.make(tx, 2, Make(parent, name, mode, 0, 0))
    history.checkpoint()
    namespace.rename(tx, 3, Rename(2, b"sub", 3, b"sub", 0), lambda _: (), Effects())
    history.checkpoint()
    assert tx.get(Table.TREES, inode_key(2)) is None
    assert Tree.unpack(tx.get(Table.TREES, inode_key(3)) or b"") == Tree(1, 1, 0, 0)


def test_the_name_that_counts_is_in_the_listing() -> None:
    """So that the path of an inode is found without a search."""
    history = History(3)
    for _ in range(300):
        history.step()
    named = [(read_u64(key), Inode.unpack(row)) for key, row in history.tx.tables[Table.INODES].items()]
    files = [(ino, inode) for ino, inode in named if inode.mode == FILE and inode.nlink]
    assert any(inode.nlink > 1 for _, inode in files)
    for ino, inode in files:
        row = history.tx.get(Table.LISTING, key_u64(inode.parent) + key_u64(inode.next_cookie))
        assert row is not None
        assert Listed.unpack(row).ino == ino


def test_counts_are_those_fields_of_the_row() -> None:
    inode = Inode(*range(1, 19))
    found = trees.counts(inode.pack())
    assert found is not None
    assert found._asdict() == {name: getattr(inode, name) for name in found._fields}


def test_sums_that_are_larger_than_any_column_keep_no_checkpoint_from_being_written() -> None:
    """A metaserver that could not write one would not start again either."""
    history = History(1)
    made = [namespace.make(history.tx, 1, Make(ROOT_INO, name, FILE, 0, 0))[0] for name in NAMES]
    for ino in made:
        inode = history.inode(ino)
        inode.size = FILE_SIZE_MAX
        inodes.save(history.tx, ino, inode)
    history.checkpoint()
    assert history.problems() == []
    for ino in made[1:]:
        inode = history.inode(ino)
        inode.size = 7
        inodes.save(history.tx, ino, inode)
    history.checkpoint()
    assert history.problems() == []
    row = history.tx.get(Table.TREES, inode_key(ROOT_INO))
    assert row is not None
    assert Tree.unpack(row).size == FILE_SIZE_MAX + 14

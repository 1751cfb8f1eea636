"""The check finds what it is for: each invariant of ``schema.py`` broken once, by hand."""

from collections.abc import Callable

import pytest
from memory_rows import MemoryRows

from metaserver import inodes, namespace
from metaserver.check import check
from metaserver.protocol import ChunkState, InodeFlags, Make, ReplicaState
from metaserver.schema import (
    ID_LIMITS,
    Chunk,
    Dentry,
    ExtentRow,
    IdKind,
    Inode,
    Listed,
    Quota,
    Replica,
    Server,
    Session,
    StoredAnswer,
    Table,
    Task,
    TaskKind,
    Trashed,
    Tree,
    answer_key,
    by_chunk_key,
    by_server_key,
    chunk_key,
    dentry_key,
    extent_key,
    inode_key,
    key_u64,
    link_key,
    listing_key,
    orphan_key,
    quota_key,
    replica_key,
    server_key,
    session_key,
    trash_key,
    xattr_key,
)

DIRECTORY, FILE, SYMLINK = 0o040755, 0o100644, 0o120777
# Inodes of the sample: a directory, a file in it with data and an xattr, a symlink; without a name an orphan, and
# a file in the trash.
SUB, DATA, LINK, ORPHAN, TRASHED = 2, 3, 4, 5, 6
EXPIRES = 10**18
CHUNK = 1


def sample() -> MemoryRows:
    """A small tree in which everything is right."""
    tx = MemoryRows()
    inodes.make_root(tx, 1)
    for parent, name, mode, target in (
        (1, b"sub", DIRECTORY, b""),
        (SUB, b"data", FILE, b""),
        (1, b"link", SYMLINK, b"sub/data"),
        (1, b"orphan", FILE, b""),
        (SUB, b"trashed", FILE, b""),
    ):
        namespace.make(tx, 2, Make(parent, name, mode, 0, 0, target=target))
    tx.put(Table.SESSIONS, session_key(1), Session("h", "/m", 1, 1, False, 1, 5).pack())
    tx.put(Table.ANSWERS, answer_key(1, 6), StoredAnswer(b"x").pack())
    tx.put(Table.SERVERS, server_key(1), Server("s", "h", 1, 2, "", [], "/d", 100).pack())
    _chunk(tx, CHUNK, ChunkState.SEALED, length=8192, live=8192)
    _chunk(tx, 2, ChunkState.OPEN, owner=1)
    _extent(tx, DATA, 0, ExtentRow(4096, CHUNK, 4096))
    _extent(tx, DATA, 8192, ExtentRow(4096, CHUNK, 0))
    tx.put(Table.XATTRS, xattr_key(DATA, b"user.a"), b"value")
    change_inode(tx, DATA, size=12288, allocated=8192, flags=InodeFlags.HAS_XATTRS | InodeFlags.COUNTED)
    drop_name(tx, 1, b"orphan")
    change_inode(tx, ORPHAN, nlink=0)
    tx.put(Table.ORPHANS, orphan_key(ORPHAN, 1), b"")
    drop_name(tx, SUB, b"trashed")
    change_inode(tx, TRASHED, nlink=0, flags=2, next_cookie=EXPIRES)
    tx.put(Table.TRASH, trash_key(EXPIRES, TRASHED), Trashed(SUB, b"trashed", 2, 0, False).pack())
    for kind in IdKind:
        tx.put(Table.COUNTERS, ID_LIMITS[kind], key_u64(100))
    tx.sum_trees()
    return tx


def _chunk(tx: MemoryRows, chunk: int, state: ChunkState, *, length: int = 0, live: int = 0, owner: int = 0) -> None:
    tx.put(Table.CHUNKS, chunk_key(chunk), Chunk(state, 0, 0, 2, length, 2, 7, live, owner, 1, 0).pack())
    tx.put(Table.REPLICAS, replica_key(chunk, 1), Replica(ReplicaState.GOOD, 0, length, 2, 7).pack())
    tx.put(Table.BY_SERVER, by_server_key(1, chunk), b"")


def _extent(tx: MemoryRows, ino: int, offset: int, row: ExtentRow) -> None:
    tx.put(Table.EXTENTS, extent_key(ino, offset), row.pack())
    tx.put(Table.BY_CHUNK, by_chunk_key(row.chunk, row.chunk_offset, ino, offset), key_u64(row.length))


def drop_name(tx: MemoryRows, parent: int, name: bytes) -> None:
    row = tx.get(Table.DENTRIES, dentry_key(parent, name))
    assert row is not None
    tx.delete(Table.DENTRIES, dentry_key(parent, name))
    tx.delete(Table.LISTING, listing_key(parent, Dentry.unpack(row).cookie))


def change_inode(tx: MemoryRows, ino: int, **fields: int) -> None:
    inode = Inode.unpack(tx.get(Table.INODES, inode_key(ino)) or b"")
    for name, value in fields.items():
        setattr(inode, name, value)
    tx.put(Table.INODES, inode_key(ino), inode.pack())


def change_chunk(tx: MemoryRows, chunk: int, **fields: int) -> None:
    row = Chunk.unpack(tx.get(Table.CHUNKS, chunk_key(chunk)) or b"")
    for name, value in fields.items():
        setattr(row, name, value)
    tx.put(Table.CHUNKS, chunk_key(chunk), row.pack())


def add_name(tx: MemoryRows, parent: int, name: bytes, ino: int, type_: int, cookie: int) -> None:
    tx.put(Table.DENTRIES, dentry_key(parent, name), Dentry(ino, cookie, type_).pack())
    tx.put(Table.LISTING, listing_key(parent, cookie), Listed(ino, type_, name).pack())


def circle(tx: MemoryRows) -> None:
    """``sub`` and a directory in it, each in the other: locally right, out of reach."""
    _, inode, _ = namespace.make(tx, 3, Make(SUB, b"below", DIRECTORY, 0, 0))
    below = 6
    assert inode.parent == SUB
    drop_name(tx, 1, b"sub")
    change_inode(tx, 1, nlink=2)
    change_inode(tx, below, nlink=3, next_cookie=2)
    add_name(tx, below, b"sub", SUB, 4, 1)
    change_inode(tx, SUB, parent=below)


BROKEN: dict[str, tuple[Callable[[MemoryRows], object], str, str]] = {
    "no root": (lambda tx: tx.delete(Table.INODES, inode_key(1)), "INODES", "no root"),
    "root is a file": (lambda tx: change_inode(tx, 1, mode=FILE), "INODES", "root is not a directory"),
    "nlink": (lambda tx: change_inode(tx, DATA, nlink=2), "INODES", "1 names and nlink 2"),
    "nlink of a directory": (lambda tx: change_inode(tx, 1, nlink=4), "INODES", "nlink 4, not 3"),
    "two names of a directory": (lambda tx: add_name(tx, SUB, b"x", SUB, 4, 2), "INODES", "with 2 names"),
    "no name of a directory": (lambda tx: drop_name(tx, 1, b"sub"), "INODES", "with 0 names"),
    "wrong parent": (lambda tx: change_inode(tx, SUB, parent=7), "INODES", "is in directory 1"),
    "circle": (circle, "DENTRIES", "cannot be reached"),
    "parent is a file": (lambda tx: add_name(tx, DATA, b"x", DATA, 8, 1), "DENTRIES", "not a directory"),
    "no parent": (lambda tx: add_name(tx, 77, b"x", DATA, 8, 1), "DENTRIES", "not a directory"),
    "no inode": (lambda tx: add_name(tx, SUB, b"x", 77, 8, 1), "DENTRIES", "does not exist"),
    "wrong type": (lambda tx: add_name(tx, SUB, b"data", DATA, 4, 1), "DENTRIES", "says type 4"),
    "no name": (lambda tx: add_name(tx, SUB, b"..", DATA, 8, 1), "DENTRIES", "is no name"),
    "cookie too high": (lambda tx: change_inode(tx, SUB, next_cookie=1), "DENTRIES", "cookie 1 is not below"),
    "not listed": (lambda tx: tx.delete(Table.LISTING, listing_key(SUB, 1)), "LISTING", "does not agree"),
    "listed twice": (
        lambda tx: tx.put(Table.LISTING, listing_key(SUB, 0), Listed(DATA, 8, b"data").pack()),
        "LISTING",
        "no such entry",
    ),
    "no target": (lambda tx: tx.delete(Table.SYMLINKS, inode_key(LINK)), "SYMLINKS", "0 targets"),
    "target of a file": (lambda tx: tx.put(Table.SYMLINKS, inode_key(DATA), b"x"), "SYMLINKS", "1 targets"),
    "size of a symlink": (lambda tx: change_inode(tx, LINK, size=3), "SYMLINKS", "a target of 8 bytes"),
    "target of nothing": (lambda tx: tx.put(Table.SYMLINKS, inode_key(77), b"x"), "SYMLINKS", "no such inode"),
    "no xattrs": (lambda tx: tx.delete(Table.XATTRS, xattr_key(DATA, b"user.a")), "INODES", "has 0 xattrs"),
    "xattrs without flag": (lambda tx: change_inode(tx, DATA, flags=0), "INODES", "has 1 xattrs"),
    "huge xattr": (
        lambda tx: tx.put(Table.XATTRS, xattr_key(DATA, b"user.a"), bytes(65537)),
        "XATTRS",
        "no attribute",
    ),
    "xattr of nothing": (lambda tx: tx.put(Table.XATTRS, xattr_key(77, b"a"), b""), "XATTRS", "no such inode"),
    "allocated": (lambda tx: change_inode(tx, DATA, allocated=1), "INODES", "extents of 8192 bytes"),
    "past the size": (lambda tx: change_inode(tx, DATA, size=12287), "EXTENTS", "ends at 12288"),
    "overlap": (lambda tx: _extent(tx, DATA, 4000, ExtentRow(1, CHUNK, 0)), "EXTENTS", "overlap"),
    "not joined": (lambda tx: _extent(tx, DATA, 4096, ExtentRow(1, CHUNK, 8192)), "EXTENTS", "continues"),
    "no mirror": (
        lambda tx: tx.delete(Table.BY_CHUNK, by_chunk_key(CHUNK, 0, DATA, 8192)),
        "BY_CHUNK",
        "does not have",
    ),
    "mirror of nothing": (
        lambda tx: tx.put(Table.BY_CHUNK, by_chunk_key(CHUNK, 9, DATA, 9), key_u64(1)),
        "BY_CHUNK",
        "no such extent",
    ),
    "no chunk": (lambda tx: _extent(tx, DATA, 8192, ExtentRow(4096, 77, 0)), "EXTENTS", "does not exist"),
    "past the chunk": (lambda tx: change_chunk(tx, CHUNK, length=8191), "EXTENTS", "passes the 8191"),
    "in a dead chunk": (lambda tx: change_chunk(tx, CHUNK, state=ChunkState.DEAD), "EXTENTS", "is dead"),
    "extent of nothing": (lambda tx: _extent(tx, 77, 0, ExtentRow(1, CHUNK, 0)), "EXTENTS", "no such inode"),
    "live": (lambda tx: change_chunk(tx, CHUNK, live=1), "CHUNKS", "live is 1"),
    "state": (lambda tx: change_chunk(tx, CHUNK, state=9), "CHUNKS", "in state 9"),
    "sealed and empty": (lambda tx: change_chunk(tx, 2, state=ChunkState.SEALED, owner=0), "CHUNKS", "should be dead"),
    "owner of a sealed chunk": (lambda tx: change_chunk(tx, CHUNK, owner=1), "CHUNKS", "belongs to session 1"),
    "owner is gone": (lambda tx: change_chunk(tx, 2, owner=77), "CHUNKS", "session 77 does not exist"),
    "dead without replicas": (
        lambda tx: tx.put(Table.CHUNKS, chunk_key(3), Chunk(ChunkState.DEAD, *[0] * 10).pack()),
        "CHUNKS",
        "should be gone",
    ),
    "replica of nothing": (
        lambda tx: tx.put(Table.REPLICAS, replica_key(77, 1), Replica(1, 0, 0, 0, 0).pack()),
        "REPLICAS",
        "no such chunk",
    ),
    "replica's state": (
        lambda tx: tx.put(Table.REPLICAS, replica_key(CHUNK, 1), Replica(9, 0, 0, 0, 0).pack()),
        "REPLICAS",
        "in state 9",
    ),
    "replica's server": (lambda tx: tx.delete(Table.SERVERS, server_key(1)), "REPLICAS", "server does not exist"),
    "replica not found by server": (
        lambda tx: tx.delete(Table.BY_SERVER, by_server_key(1, CHUNK)),
        "BY_SERVER",
        "does not have this replica",
    ),
    "server without replica": (
        lambda tx: tx.put(Table.BY_SERVER, by_server_key(2, CHUNK), b""),
        "BY_SERVER",
        "no such replica",
    ),
    "acknowledged answer": (
        lambda tx: tx.put(Table.ANSWERS, answer_key(1, 5), b""),
        "ANSWERS",
        "was acknowledged",
    ),
    "answer to nobody": (lambda tx: tx.put(Table.ANSWERS, answer_key(7, 9), b""), "ANSWERS", "session does not exist"),
    "orphan with a name": (lambda tx: tx.put(Table.ORPHANS, orphan_key(DATA, 1), b""), "ORPHANS", "has nlink 1"),
    "orphan of nobody": (
        lambda tx: tx.put(Table.ORPHANS, orphan_key(ORPHAN, 7), b""),
        "ORPHANS",
        "session does not exist",
    ),
    "no orphan": (lambda tx: tx.put(Table.ORPHANS, orphan_key(77, 1), b""), "ORPHANS", "no such inode"),
    "forgotten orphan": (
        lambda tx: tx.delete(Table.ORPHANS, orphan_key(ORPHAN, 1)),
        "INODES",
        "nothing will remove it",
    ),
    "task for no session": (
        lambda tx: tx.put(Table.TASKS, key_u64(1), Task(TaskKind.EVICT_SESSION, 77).pack()),
        "TASKS",
        "ends session 77",
    ),
    "task for no inode": (
        lambda tx: tx.put(Table.TASKS, key_u64(1), Task(TaskKind.REMOVE_INODE, 77).pack()),
        "TASKS",
        "removes inode 77",
    ),
    "quota of no directory": (
        lambda tx: tx.put(Table.QUOTAS, quota_key(DATA), Quota(0, 1, 0, 0, 0).pack()),
        "QUOTAS",
        "does not exist",
    ),
    "quota without a limit": (
        lambda tx: tx.put(Table.QUOTAS, quota_key(SUB), Quota(0, 0, 0, 0, 0).pack()),
        "QUOTAS",
        "limits nothing",
    ),
    "trash of no inode": (
        lambda tx: tx.put(Table.TRASH, trash_key(5, 77), Trashed(SUB, b"x", 2, 0, False).pack()),
        "TRASH",
        "does not exist",
    ),
    "trash under another time": (
        lambda tx: tx.put(Table.TRASH, trash_key(5, TRASHED), Trashed(SUB, b"x", 2, 0, False).pack()),
        "TRASH",
        "under this time",
    ),
    "trash of another kind": (
        lambda tx: tx.put(Table.TRASH, trash_key(EXPIRES, TRASHED), Trashed(SUB, b"x", 2, 0, True).pack()),
        "TRASH",
        "says directory True",
    ),
    "trash without row": (lambda tx: tx.delete(Table.TRASH, trash_key(EXPIRES, TRASHED)), "INODES", "is not there"),
    "trash with a name": (
        lambda tx: (add_name(tx, SUB, b"t", TRASHED, 8, 2), change_inode(tx, TRASHED, nlink=1)),
        "INODES",
        "has nlink 1",
    ),
    "id past the limit": (
        lambda tx: tx.put(Table.COUNTERS, ID_LIMITS[IdKind.INODE], key_u64(TRASHED)),
        "COUNTERS",
        "the limit is 6",
    ),
    "not counted": (lambda tx: change_inode(tx, LINK, flags=0), "INODES", "is not counted"),
    "counted elsewhere": (lambda tx: change_inode(tx, LINK, parent=SUB, next_cookie=1), "LINKS", "is not"),
    "a link too many": (lambda tx: tx.put(Table.LINKS, link_key(DATA, 1, 2), b""), "LINKS", "is said to be entry 2"),
    "link to nothing": (lambda tx: tx.put(Table.LINKS, link_key(77, 1, 2), b""), "LINKS", "no such inode"),
    "link of an orphan": (lambda tx: tx.put(Table.LINKS, link_key(ORPHAN, 1, 3), b""), "LINKS", "without a name"),
    "a link too few": (lambda tx: change_inode(tx, LINK, nlink=2), "LINKS", "0 rows for an inode with nlink 2"),
    "wrong sum": (
        lambda tx: tx.put(Table.TREES, inode_key(SUB), Tree(1, 0, 8191, 12288).pack()),
        "TREES",
        "there is [1, 0, 8192, 12288]",
    ),
    "no sum": (lambda tx: tx.delete(Table.TREES, inode_key(1)), "TREES", "there is no row"),
    "sum of nothing": (
        lambda tx: tx.put(Table.TREES, inode_key(LINK), Tree(1, 0, 0, 0).pack()),
        "TREES",
        "there is None",
    ),
    "short row": (lambda tx: tx.put(Table.INODES, inode_key(DATA), b"x"), "DENTRIES", "wrong format"),
    "task that is no message": (lambda tx: tx.put(Table.TASKS, key_u64(1), b"\xc1"), "TASKS", "wrong format"),
}


def test_a_good_state_has_no_problems() -> None:
    assert check(sample()) == []


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_invariant_is_found(name: str) -> None:
    breaking, table, text = BROKEN[name]
    tx = sample()
    breaking(tx)
    found = check(tx)
    assert any(problem.table == table and text in problem.text for problem in found), found


def test_a_tail_that_a_task_will_cut_may_pass_the_size() -> None:
    tx = sample()
    change_inode(tx, DATA, size=5000)
    tx.sum_trees()
    assert check(tx)
    tx.put(Table.TASKS, key_u64(1), Task(TaskKind.TRUNCATE, DATA, 5000).pack())
    assert check(tx) == []


def test_an_inode_that_a_task_will_remove_needs_no_orphan() -> None:
    tx = sample()
    tx.delete(Table.ORPHANS, orphan_key(ORPHAN, 1))
    tx.put(Table.TASKS, key_u64(1), Task(TaskKind.REMOVE_INODE, ORPHAN).pack())
    assert check(tx) == []


def test_every_table_is_looked_at() -> None:
    """A table added to the schema must be added to the check, too."""
    tables = {table for _, table, _ in BROKEN.values()}
    assert tables == {table.name for table in Table} - {"TOTALS", "SERVERS", "SESSIONS"}

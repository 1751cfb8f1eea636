"""Inodes as rows of a transaction, and how the last trace of one goes away. Synchronous, no I/O of its own."""

import stat
from collections.abc import Callable, Collection
from typing import NamedTuple

import msgspec

from metaserver import chunks, extents
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import ROOT_INO, InodeFlags
from metaserver.schema import (
    ALL_COUNTED,
    IdKind,
    Inode,
    Table,
    Task,
    TaskKind,
    Transaction,
    Trashed,
    after,
    inode_key,
    key_u64,
    orphan_key,
    trash_key,
)

# Extents that one step may remove: three rows each (EXTENTS, BY_CHUNK, CHUNKS), with room below MAX_TRANSACTION_ROWS.
STEP_EXTENTS = 1000

# The sessions that have an inode open.
Openers = Callable[[int], Collection[int]]


class Leaving(NamedTuple):
    """An inode that loses a name, which was ``name`` in ``directory``, whose ino is ``parent``."""

    ino: int
    inode: Inode
    parent: int
    directory: Inode
    name: bytes


class TrashChange(NamedTuple):
    """A TRASH row that has come (1), gone (-1) or changed (0), and the bytes that are more or less in the trash."""

    key: bytes
    files: int
    bytes: int


class Effects(msgspec.Struct):
    """What a change brought about besides its rows, for those who must act on it once it has succeeded: chunks that are
    DEAD or worth cleaning now, others that may need something, inodes whose attributes nobody knows who changed them,
    new orphans, new tasks, how many inodes are no more, and what that did to the trash."""

    dead: list[int] = []
    chunks: list[int] = []
    changed: list[int] = []
    orphans: list[int] = []
    tasks: list[tuple[int, Task]] = []
    removed: int = 0
    trash: list[TrashChange] = []


# Puts what leaves into the trash; whether it did. The caller saves inode and directory.
Keep = Callable[[Transaction, int, Leaving, Effects], bool]


def keep_nothing(tx: Transaction, now_ns: int, leaving: Leaving, effects: Effects) -> bool:
    """A :data:`Keep` without a trash."""
    return False


def find(tx: Transaction, ino: int) -> Inode | None:
    """The inode, or None if it does not exist or only waits for a task to remove the rest of it."""
    row = tx.get(Table.INODES, inode_key(ino))
    if row is None:
        return None
    inode = Inode.unpack(row)
    if inode.nlink == 0 and not orphaned(tx, ino):
        return None
    return inode


def require(tx: Transaction, ino: int) -> Inode:
    inode = find(tx, ino)
    if inode is None:
        raise DfsError(ErrorCode.STALE_INODE, f"inode {ino} does not exist any more")
    return inode


def require_directory(tx: Transaction, ino: int) -> Inode:
    inode = require(tx, ino)
    if not stat.S_ISDIR(inode.mode):
        raise DfsError(ErrorCode.NOT_DIRECTORY, f"inode {ino} is not a directory")
    return inode


def save(tx: Transaction, ino: int, inode: Inode) -> None:
    tx.put(Table.INODES, inode_key(ino), inode.pack())


def orphaned(tx: Transaction, ino: int) -> bool:
    """Whether some session keeps the inode alive although it has no name."""
    prefix = key_u64(ino)
    return next(iter(tx.scan(Table.ORPHANS, prefix, after(prefix))), None) is not None


def make_root(tx: Transaction, now_ns: int) -> None:
    """Creates the root directory in an empty namespace."""
    root = new_inode(stat.S_IFDIR | 0o755, 0, 0, now_ns, nlink=2, parent=ROOT_INO)
    root.flags = InodeFlags.COUNTED
    save(tx, ROOT_INO, root)
    tx.put(Table.COUNTERS, ALL_COUNTED, key_u64(1))


def new_inode(
    mode: int,
    uid: int,
    gid: int,
    now_ns: int,
    *,
    nlink: int = 1,
    parent: int = 0,
    rdev: int = 0,
    size: int = 0,
    copies: int = 0,
) -> Inode:
    return Inode(
        mode=mode,
        uid=uid,
        gid=gid,
        nlink=nlink,
        size=size,
        allocated=0,
        atime_ns=now_ns,
        mtime_ns=now_ns,
        ctime_ns=now_ns,
        btime_ns=now_ns,
        rdev=rdev,
        flags=0,
        generation=0,
        truncate_generation=0,
        data_version=0,
        parent=parent,
        next_cookie=1 if parent else 0,
        storage_class=copies,
    )


def add_task(tx: Transaction, kind: TaskKind, subject: int, effects: Effects, position: int = 0) -> None:
    start_task(tx, Task(kind, subject, position), effects)


def start_task(tx: Transaction, task: Task, effects: Effects) -> None:
    number = tx.allocate(IdKind.TASK)
    tx.put(Table.TASKS, key_u64(number), task.pack())
    effects.tasks.append((number, task))


class Dropped(NamedTuple):
    """What remains of nlink, whether it is an orphan, and whether it is in the trash."""

    nlink: int
    orphan: bool = False
    kept: bool = False


def drop_name(
    tx: Transaction, now_ns: int, name: Leaving, openers: Openers, effects: Effects, keep: Keep = keep_nothing
) -> Dropped:
    """Takes one name away from an inode (all from a directory); saves the inode, but not the directory it was in."""
    ino, inode = name.ino, name.inode
    inode.nlink = 0 if stat.S_ISDIR(inode.mode) else inode.nlink - 1
    inode.ctime_ns = now_ns
    if inode.nlink > 0:
        save(tx, ino, inode)
        return Dropped(inode.nlink)
    sessions = openers(ino)
    kept = keep(tx, now_ns, name, effects)
    for session in sessions:
        tx.put(Table.ORPHANS, orphan_key(ino, session), b"")
    if sessions:
        effects.orphans.append(ino)
    if sessions or kept:
        save(tx, ino, inode)
    else:
        remove(tx, ino, inode, effects)
    return Dropped(0, bool(sessions), kept)


def release(tx: Transaction, ino: int, session: int, effects: Effects) -> None:
    """The session no longer keeps an orphan alive; the last one to say so ends it, unless it is in the trash. Anything
    else is left alone."""
    key = orphan_key(ino, session)
    if tx.get(Table.ORPHANS, key) is None:
        return
    tx.delete(Table.ORPHANS, key)
    row = tx.get(Table.INODES, inode_key(ino))
    if row is None or orphaned(tx, ino):
        return
    inode = Inode.unpack(row)
    if inode.flags & InodeFlags.IN_TRASH:
        _measure(tx, ino, inode, effects)
    else:
        remove(tx, ino, inode, effects)


def _measure(tx: Transaction, ino: int, inode: Inode, effects: Effects) -> None:
    """Has the TRASH row say what was written up to the last close."""
    key = trash_key(inode.next_cookie, ino)
    value = tx.get(Table.TRASH, key)
    if value is None:
        return
    row = Trashed.unpack(value)
    if row.allocated != inode.allocated:
        effects.trash.append(TrashChange(key, 0, inode.allocated - row.allocated))
        row.allocated = inode.allocated
        tx.put(Table.TRASH, key, row.pack())


def remove(tx: Transaction, ino: int, inode: Inode, effects: Effects) -> None:
    """Removes an inode without names and all that belongs to it; a task goes on if it has too many extents."""
    if not remove_step(tx, ino, inode, effects):
        add_task(tx, TaskKind.REMOVE_INODE, ino, effects)


def remove_step(tx: Transaction, ino: int, inode: Inode, effects: Effects) -> bool:
    """As much of the removal as fits into one transaction; whether it is finished."""
    if inode.allocated:
        cut = extents.cut_step(tx, ino, 0, STEP_EXTENTS)
        effects.dead.extend(chunks.settle(tx, cut.live))
        if not cut.done:
            inode.allocated -= cut.freed
            save(tx, ino, inode)
            return False
    if stat.S_ISLNK(inode.mode):
        tx.delete(Table.SYMLINKS, inode_key(ino))
    if inode.flags & InodeFlags.HAS_XATTRS:
        prefix = key_u64(ino)
        for key in [key for key, _ in tx.scan(Table.XATTRS, prefix, after(prefix))]:
            tx.delete(Table.XATTRS, key)
    tx.delete(Table.INODES, inode_key(ino))
    effects.removed += 1
    return True

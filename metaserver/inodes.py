"""Inodes as rows of a transaction, and how the last trace of one goes away. Synchronous, no I/O of its own."""

import stat
from collections.abc import Callable, Collection

import msgspec

from metaserver import chunks, extents
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import ROOT_INO, InodeFlags
from metaserver.schema import (
    IdKind,
    Inode,
    Table,
    Task,
    TaskKind,
    Transaction,
    after,
    inode_key,
    key_u64,
    orphan_key,
)

# Extents that one step may remove: three rows each (EXTENTS, BY_CHUNK, CHUNKS), with room below MAX_TRANSACTION_ROWS.
STEP_EXTENTS = 1000

# The sessions that have an inode open.
Openers = Callable[[int], Collection[int]]


class Effects(msgspec.Struct):
    """What a change brought about besides its rows, for those who must act on it once it has succeeded: chunks that are
    DEAD or worth cleaning now, others that may need something, inodes whose attributes nobody knows who changed them,
    new orphans, new tasks, and how many inodes are no more."""

    dead: list[int] = []
    chunks: list[int] = []
    changed: list[int] = []
    orphans: list[int] = []
    tasks: list[tuple[int, Task]] = []
    removed: int = 0


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
    save(tx, ROOT_INO, new_inode(stat.S_IFDIR | 0o755, 0, 0, now_ns, nlink=2, parent=ROOT_INO))


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


def drop_name(
    tx: Transaction, now_ns: int, ino: int, inode: Inode, openers: Openers, effects: Effects
) -> tuple[int, bool]:
    """Takes one name away from an inode (all from a directory): what remains of nlink, and whether it is an orphan."""
    inode.nlink = 0 if stat.S_ISDIR(inode.mode) else inode.nlink - 1
    inode.ctime_ns = now_ns
    if inode.nlink > 0:
        save(tx, ino, inode)
        return inode.nlink, False
    sessions = openers(ino)
    if sessions:
        save(tx, ino, inode)
        for session in sessions:
            tx.put(Table.ORPHANS, orphan_key(ino, session), b"")
        effects.orphans.append(ino)
        return 0, True
    remove(tx, ino, inode, effects)
    return 0, False


def release(tx: Transaction, ino: int, session: int, effects: Effects) -> None:
    """The session no longer keeps an orphan alive; the last one to say so ends it. Anything else is left alone."""
    key = orphan_key(ino, session)
    if tx.get(Table.ORPHANS, key) is None:
        return
    tx.delete(Table.ORPHANS, key)
    if orphaned(tx, ino):
        return
    row = tx.get(Table.INODES, inode_key(ino))
    if row is not None:
        remove(tx, ino, Inode.unpack(row), effects)


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

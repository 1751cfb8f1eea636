"""Whether everything that ``schema.py`` says about the tables is true: names and inodes here, contents and chunks in
``check_chunks.py``, sums in ``check_trees.py``. Reads only; streams, so that it needs a few dozen bytes an inode and
can run beside requests.

Generators yield a :class:`Problem` for what is wrong, and None now and then so that whoever drives them can do
something else for a moment. The rows must be one consistent state meanwhile, that of a checkpoint (for TREES): a
``store.View``, or nobody changes them.
"""

import stat
import struct
from collections.abc import Iterator
from typing import TypeAlias

import msgspec

from metaserver.check_chunks import (
    Joined,
    check_by_chunk,
    check_by_server,
    check_chunks,
    check_extents,
    rows,
)
from metaserver.check_trees import Trees
from metaserver.protocol import ROOT_INO, SYMLINK_MAX, XATTR_VALUE_MAX, InodeFlags, Problem
from metaserver.schema import (
    ID_LIMITS,
    Dentry,
    IdKind,
    Inode,
    Listed,
    Quota,
    Session,
    Table,
    Task,
    TaskKind,
    Transaction,
    Trashed,
    dentry_key,
    inode_key,
    listing_key,
    read_u64,
    server_key,
    session_key,
    trash_key,
)

Findings: TypeAlias = Iterator[Problem | None]
# Rows between two chances to do something else: about a millisecond.
SLICE_ROWS = 200
_DIRECTORY = stat.S_IFDIR >> 12
# How often each problem may be listed: a damaged table would otherwise fill the memory with its description.
MAX_PROBLEMS = 1000


def check(tx: Transaction) -> list[Problem]:
    """All problems at once (at most :data:`MAX_PROBLEMS`); an empty list is what everybody wants to see."""
    found: list[Problem] = []
    for problem in check_steps(tx):
        if problem is not None:
            found.append(problem)
            if len(found) == MAX_PROBLEMS:
                break
    return found


def check_steps(tx: Transaction) -> Findings:
    """The whole check, in slices."""
    names = _Names(tx)
    tasks = _Tasks(tx)
    trees = Trees(tx)
    yield from _readable("TASKS", tasks.load())
    yield from _readable("DENTRIES", names.check())
    yield from _readable("INODES", _check_inodes(tx, names, tasks, trees))
    yield from names.check_tree()
    yield from _readable("TREES", trees.check())
    yield from _readable("CHUNKS", check_chunks(tx))
    yield from _readable("BY_CHUNK", check_by_chunk(tx))
    yield from _readable("BY_SERVER", check_by_server(tx))
    yield from _readable("SESSIONS", _check_sessions(tx))
    yield from tasks.check()
    yield from _readable("TRASH", _check_trash(tx))
    yield from _readable("QUOTAS", _check_quotas(tx))
    yield from _check_limits(tx)


def _readable(table: str, findings: Findings) -> Findings:
    """A row that cannot be decoded ends a part of the check, and is a problem like others."""
    try:
        yield from findings
    except (struct.error, msgspec.MsgspecError, IndexError) as error:
        yield Problem(table, "", f"a row has a wrong format: {error}")


class _Tasks:
    """Work under way, which is what some rows wait for. ``truncating``: inode to the offset it will end at."""

    def __init__(self, tx: Transaction) -> None:
        self._tx = tx
        self._tasks: dict[int, Task] = {}
        self.removing: set[int] = set()
        self.truncating: dict[int, int] = {}

    def load(self) -> Findings:
        for key, value in rows(self._tx, Table.TASKS):
            task = self._tasks[read_u64(key)] = Task.unpack(value)
            if task.kind is TaskKind.REMOVE_INODE:
                self.removing.add(task.subject)
            if task.kind is TaskKind.TRUNCATE:
                self.truncating[task.subject] = task.position
            yield None

    def check(self) -> Findings:
        for number, task in self._tasks.items():
            if task.kind is TaskKind.EVICT_SESSION and not self._tx.get(Table.SESSIONS, session_key(task.subject)):
                yield Problem("TASKS", str(number), f"ends session {task.subject}, which does not exist")
            if task.kind is TaskKind.REMOVE_INODE and not self._tx.get(Table.INODES, inode_key(task.subject)):
                yield Problem("TASKS", str(number), f"removes inode {task.subject}, which does not exist")
            if task.kind is TaskKind.REMOVE_SERVER and not self._tx.get(Table.SERVERS, server_key(task.subject)):
                yield Problem("TASKS", str(number), f"removes server {task.subject}, which does not exist")


class _Names:
    """DENTRIES and LISTING, and what they say about inodes."""

    def __init__(self, tx: Transaction) -> None:
        self._tx = tx
        # Names of each inode, subdirectories of each directory, and where each directory is.
        self.links: dict[int, int] = {}
        self.subdirectories: dict[int, int] = {}
        self.parents: dict[int, int] = {}

    def check(self) -> Findings:
        directory = -1
        inode: Inode | None = None
        for count, (key, value) in enumerate(rows(self._tx, Table.DENTRIES)):
            parent, name, entry = read_u64(key), key[8:], Dentry.unpack(value)
            if parent != directory:
                directory, inode = parent, self._inode(parent)
                if inode is None or not stat.S_ISDIR(inode.mode):
                    yield Problem("DENTRIES", f"{parent}/{name!r}", f"inode {parent} is not a directory")
            yield from self._check_entry(parent, name, entry, inode)
            if count % SLICE_ROWS == 0:
                yield None
        yield from self._check_listing()

    def _inode(self, ino: int) -> Inode | None:
        value = self._tx.get(Table.INODES, inode_key(ino))
        return None if value is None else Inode.unpack(value)

    def _check_entry(self, parent: int, name: bytes, entry: Dentry, directory: Inode | None) -> Findings:
        where = f"{parent}/{name!r}"
        ino = entry.ino
        self.links[ino] = self.links.get(ino, 0) + 1
        if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
            yield Problem("DENTRIES", where, "is no name")
        inode = self._inode(ino)
        if inode is None:
            yield Problem("DENTRIES", where, f"names inode {ino}, which does not exist")
        elif inode.mode >> 12 != entry.type:
            yield Problem("DENTRIES", where, f"says type {entry.type}, inode {ino} has type {inode.mode >> 12}")
        if entry.type == _DIRECTORY:
            self.subdirectories[parent] = self.subdirectories.get(parent, 0) + 1
            self.parents[ino] = parent
        if directory is not None and not 0 < entry.cookie < directory.next_cookie:
            yield Problem("DENTRIES", where, f"cookie {entry.cookie} is not below {directory.next_cookie}")
        listed = self._tx.get(Table.LISTING, listing_key(parent, entry.cookie))
        if listed is None or Listed.unpack(listed) != Listed(ino, entry.type, name):
            yield Problem("LISTING", f"{parent}/{entry.cookie}", f"does not agree with the entry {name!r}")

    def _check_listing(self) -> Findings:
        for count, (key, value) in enumerate(rows(self._tx, Table.LISTING)):
            parent, cookie, listed = read_u64(key), read_u64(key, 8), Listed.unpack(value)
            entry = self._tx.get(Table.DENTRIES, dentry_key(parent, listed.name))
            if entry is None or Dentry.unpack(entry).cookie != cookie:
                yield Problem("LISTING", f"{parent}/{cookie}", f"there is no such entry {listed.name!r}")
            if count % SLICE_ROWS == 0:
                yield None

    def check_inode(self, ino: int, inode: Inode) -> Findings:
        """Whether nlink and parent are what the names say."""
        names = self.links.get(ino, 0)
        if not stat.S_ISDIR(inode.mode):
            if names != inode.nlink:
                yield Problem("INODES", str(ino), f"has {names} names and nlink {inode.nlink}")
            return
        if ino == ROOT_INO:
            names += 1
            self.parents[ino] = ino
        if inode.nlink == 0 and names == 0:
            return
        if names != 1:
            yield Problem("INODES", str(ino), f"is a directory with {names} names")
        elif inode.parent != self.parents[ino]:
            yield Problem("INODES", str(ino), f"is in directory {self.parents[ino]}, not {inode.parent}")
        expected = 2 + self.subdirectories.get(ino, 0)
        if inode.nlink != expected:
            yield Problem("INODES", str(ino), f"is a directory with nlink {inode.nlink}, not {expected}")

    def check_tree(self) -> Findings:
        """Every directory with a name can be reached from the root: no circle stands apart."""
        reached = {ROOT_INO}
        for count, ino in enumerate(self.parents):
            path = []
            position = ino
            while position not in reached and position in self.parents:
                path.append(position)
                reached.add(position)
                position = self.parents[position]
            if position in path or (path and position not in self.parents):
                yield Problem("DENTRIES", str(ino), "is a directory that cannot be reached from the root")
            if count % SLICE_ROWS == 0:
                yield None


def _check_inodes(tx: Transaction, names: _Names, tasks: _Tasks, trees: Trees) -> Findings:
    extents = Joined(tx, Table.EXTENTS)
    xattrs = Joined(tx, Table.XATTRS)
    symlinks = Joined(tx, Table.SYMLINKS)
    orphans = Joined(tx, Table.ORPHANS)
    links = Joined(tx, Table.LINKS)
    joined = (extents, xattrs, symlinks, orphans, links)
    if tx.get(Table.INODES, inode_key(ROOT_INO)) is None:
        yield Problem("INODES", str(ROOT_INO), "there is no root directory")
    for count, (key, value) in enumerate(rows(tx, Table.INODES)):
        ino, inode = read_u64(key), Inode.unpack(value)
        for table in joined:
            yield from table.strays(ino, "there is no such inode")
        if ino == ROOT_INO and not stat.S_ISDIR(inode.mode):
            yield Problem("INODES", str(ino), "the root is not a directory")
        yield from names.check_inode(ino, inode)
        yield from trees.check_inode(ino, inode, links.group(ino))
        yield from check_extents(tx, ino, inode, extents.group(ino), tasks.truncating.get(ino))
        yield from _check_xattrs(ino, inode, xattrs.group(ino))
        yield from _check_symlink(ino, inode, [target for _, target in symlinks.group(ino)])
        yield from _check_orphan(tx, ino, inode, orphans.group(ino), ino in tasks.removing)
        if count % SLICE_ROWS == 0:
            yield None
    for table in joined:
        yield from table.strays(1 << 64, "there is no such inode")


def _check_xattrs(ino: int, inode: Inode, found: Iterator[tuple[bytes, bytes]]) -> Findings:
    count = 0
    for key, value in found:
        count += 1
        if len(value) > XATTR_VALUE_MAX or len(key) == 8:
            yield Problem("XATTRS", f"{ino}/{key[8:]!r}", f"is no attribute ({len(value)} bytes)")
    if bool(count) != bool(inode.flags & InodeFlags.HAS_XATTRS):
        yield Problem("INODES", str(ino), f"has {count} xattrs and flags {inode.flags}")


def _check_symlink(ino: int, inode: Inode, targets: list[bytes]) -> Findings:
    if bool(targets) != stat.S_ISLNK(inode.mode):
        yield Problem("SYMLINKS", str(ino), f"has {len(targets)} targets and mode {inode.mode:o}")
    for target in targets:
        if len(target) != inode.size or not 1 <= len(target) <= SYMLINK_MAX:
            yield Problem("SYMLINKS", str(ino), f"a target of {len(target)} bytes, the inode's size is {inode.size}")


def _check_orphan(
    tx: Transaction, ino: int, inode: Inode, found: Iterator[tuple[bytes, bytes]], removing: bool
) -> Findings:
    held = False
    for key, _ in found:
        held = True
        session = read_u64(key, 8)
        if tx.get(Table.SESSIONS, session_key(session)) is None:
            yield Problem("ORPHANS", f"{ino}/{session}", "the session does not exist")
    if held and inode.nlink:
        yield Problem("ORPHANS", str(ino), f"has nlink {inode.nlink}")
    trashed = inode.flags & InodeFlags.IN_TRASH
    if trashed and (inode.nlink or tx.get(Table.TRASH, trash_key(inode.next_cookie, ino)) is None):
        yield Problem("INODES", str(ino), f"says that it is in the trash, has nlink {inode.nlink} and is not there")
    if not inode.nlink and not held and not removing and not trashed:
        yield Problem("INODES", str(ino), "has nlink 0, and nothing will remove it")


def _check_trash(tx: Transaction) -> Findings:
    """That every TRASH row has its inode (the other way round: :func:`_check_orphan`)."""
    for count, (key, value) in enumerate(rows(tx, Table.TRASH)):
        ino, row = read_u64(key, 8), Trashed.unpack(value)
        found = tx.get(Table.INODES, inode_key(ino))
        inode = None if found is None else Inode.unpack(found)
        if inode is None or not inode.flags & InodeFlags.IN_TRASH or inode.next_cookie != read_u64(key):
            yield Problem("TRASH", str(ino), "the inode does not exist, or is not in the trash under this time")
        elif stat.S_ISDIR(inode.mode) != row.directory:
            yield Problem("TRASH", str(ino), f"says directory {row.directory}, the inode has mode {inode.mode:o}")
        if count % SLICE_ROWS == 0:
            yield None


def _check_quotas(tx: Transaction) -> Findings:
    for count, (key, value) in enumerate(rows(tx, Table.QUOTAS)):
        ino, quota = read_u64(key), Quota.unpack(value)
        found = tx.get(Table.INODES, inode_key(ino))
        if found is None or not stat.S_ISDIR(Inode.unpack(found).mode):
            yield Problem("QUOTAS", str(ino), "the directory does not exist")
        limits = (quota.bytes_soft, quota.bytes_hard, quota.inodes_soft, quota.inodes_hard)
        if min(limits) < 0 or not any(limits):
            yield Problem("QUOTAS", str(ino), f"limits nothing, or less than nothing: {limits}")
        if count % SLICE_ROWS == 0:
            yield None


def _check_sessions(tx: Transaction) -> Findings:
    answers = Joined(tx, Table.ANSWERS)
    for key, value in rows(tx, Table.SESSIONS):
        session, row = read_u64(key), Session.unpack(value)
        yield from answers.strays(session, "the session does not exist")
        for count, (answer, _) in enumerate(answers.group(session)):
            if read_u64(answer, 8) <= row.acknowledged:
                yield Problem("ANSWERS", f"{session}/{read_u64(answer, 8)}", "was acknowledged")
            if count % SLICE_ROWS == 0:
                yield None
    yield from answers.strays(1 << 64, "the session does not exist")


_ID_TABLES = {
    IdKind.INODE: Table.INODES,
    IdKind.CHUNK: Table.CHUNKS,
    IdKind.SESSION: Table.SESSIONS,
    IdKind.TASK: Table.TASKS,
}


def _check_limits(tx: Transaction) -> Findings:
    for kind, table in _ID_TABLES.items():
        newest = next(iter(tx.scan_back(table, b"", b"\xff" * 9)), None)
        limit = tx.get(Table.COUNTERS, ID_LIMITS[kind])
        if newest is not None and limit is not None and read_u64(newest[0]) >= read_u64(limit):
            text = f"id {read_u64(newest[0])} is in use, the limit is {read_u64(limit)}"
            yield Problem("COUNTERS", ID_LIMITS[kind].decode(), text)

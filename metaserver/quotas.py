"""Quotas of trees: what is used of each, kept in memory to the byte, and changes that would pass a limit refused.

Every change is looked at between its function and the log (:class:`Accounts`): from the old and new rows of INODES
follows what it adds to which trees, whatever operation it was. Usage at the start is that of TREES, which the start's
checkpoint has just made exact; a quota that is set later begins with TREES and what was changed since.

An inode counts in the trees above the directory that its row tells (``counted.py``). What has lost its last name and
is still open goes on counting where it did, so that nobody can fill the disks with files that have no names; the trash
does not count. Names of one inode, and what is renamed, stay within the same trees (CROSS_DEVICE, as XFS and ext4 do):
bytes that are still unwritten in some mount would otherwise pass a limit that their writer never heard of.

**Grants.** A mount takes bytes into memory before they are committed, and must not find out afterwards that there was
no room. So it asks for room first (:meth:`Quotas.grant`): what is granted to a session and not used up yet is refused
to everybody else. Grants are in memory only; a session that returns after a restart asks again for what it has dirty.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import msgspec
import structlog

from metaserver import limits, trees
from metaserver.errors import DfsError, ErrorCode
from metaserver.overlay import PREFIX
from metaserver.protocol import ROOT_INO, InodeFlags
from metaserver.schema import Quota, Table, Tree, after, inode_key, key_u64, quota_key, read_u64

log = structlog.get_logger(__name__)

# A row key to the row, or None.
Read = Callable[[bytes], bytes | None]
Rows = Mapping[bytes, bytes | None]

# Of what is free in a tree a session gets so much more than it asks for, at most: then it need not ask for each file.
AHEAD_BYTES = 64 << 20
AHEAD_PART = 16
# Directories whose trees are remembered.
REMEMBERED = 100_000
_INODE = PREFIX[Table.INODES]
_QUOTA = PREFIX[Table.QUOTAS]
_TREE = PREFIX[Table.TREES]
_ORPHAN = PREFIX[Table.ORPHANS]
_IN_TRASH = int(InodeFlags.IN_TRASH)
_INODES = int(Table.INODES)


class Used(msgspec.Struct):
    """What counts in a tree; the directory with the quota itself does not."""

    bytes: int = 0
    inodes: int = 0


class Orphan(NamedTuple):
    """An inode without a name that counts for these trees."""

    roots: tuple[int, ...]
    bytes: int


class Charge(msgspec.Struct):
    """What a change does to usage, once it has happened. ``orphans`` None: the inode is none (any more)."""

    session: int
    added: dict[int, Used] = {}
    orphans: dict[int, Orphan | None] = {}
    quotas: dict[int, Quota | None] = {}
    crossed: bool = False


class Granted(NamedTuple):
    """``root``: the directory with the innermost quota, 0 if there is none and nothing is limited; ``granted``: bytes
    that the session has now in all for what it has not committed; ``wait``: others give something back soon."""

    root: int
    granted: int = 0
    wait: bool = False


class Quotas:
    """All quotas. ``doubtful``: a tree has moved where it should not; usage has to be looked up again.

    Invariants: ``used`` has every root of ``rows``; ``held[root][session]`` is what is granted to the session in the
    tree, that of quotas within it included.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self.rows: dict[int, Quota] = {}
        self.used: dict[int, Used] = {}
        self.held: dict[int, dict[int, int]] = {}
        self.orphans: dict[int, Orphan] = {}
        self.doubtful = False
        self._roots: dict[int, tuple[int, ...]] = {}

    @property
    def active(self) -> bool:
        return bool(self.rows)

    # -- which trees -------------------------------------------------------------------------------------------

    def roots(self, directory: int, read: Read | None = None) -> tuple[int, ...]:
        """The directories with a quota from this one upwards. They stay the same when a directory moves, because it
        cannot leave its trees; so they are remembered until a quota comes or goes."""
        read = read or self._read
        path: list[int] = []
        position: int | None = directory
        found: tuple[int, ...] = ()
        while position is not None:
            known = self._roots.get(position)
            if known is not None:
                found = known
                break
            path.append(position)
            position = None if position == ROOT_INO else _parent(read, position)
        if len(self._roots) > REMEMBERED:
            self._roots.clear()
        for below in reversed(path):
            found = (below, *found) if below in self.rows else found
            self._roots[below] = found
        return found

    def roots_of(self, ino: int) -> tuple[int, ...]:
        """The trees in which an inode counts; of a directory, those in which what is made there does."""
        orphan = self.orphans.get(ino)
        if orphan is not None:
            return orphan.roots
        inode = trees.counts(self._read(_INODE + inode_key(ino)))
        if inode is None:
            return ()
        return self.roots(ino if inode.is_directory else inode.parent) if inode.parent else ()

    def innermost(self, ino: int) -> int:
        """The directory with the quota that is told to those who write to an inode; 0: nothing limits its bytes."""
        roots = self.roots_of(ino) if self.rows else ()
        return roots[0] if any(self._limits_bytes(root) for root in roots) else 0

    def _limits_bytes(self, root: int) -> bool:
        return bool(self.rows[root].bytes_hard or self.rows[root].bytes_soft)

    def require_same(self, one: int, other: int) -> None:
        """Raises CROSS_DEVICE unless what is in both directories counts in the same trees."""
        if self.rows and one != other and self.roots(one) != self.roots(other):
            raise DfsError(ErrorCode.CROSS_DEVICE, "the directories lie in trees with different quotas")

    def require_link(self, ino: int, directory: int) -> None:
        """The same for another name of an inode."""
        if self.rows and self.roots_of(ino) != self.roots(directory):
            raise DfsError(ErrorCode.CROSS_DEVICE, "the file lies in a tree with another quota")

    # -- changes -----------------------------------------------------------------------------------------------

    def judge(self, session: int, writes: dict[bytes, bytes | None], now_ns: int, *, enforced: bool) -> Charge | None:
        """What the change with these rows adds; raises QUOTA_EXCEEDED if ``enforced`` and it passes a limit. May add
        rows of QUOTAS to ``writes``: since when a soft limit is passed, or that a directory is gone."""
        if not self.rows:
            return None
        look = _Look(self, writes, Charge(session))
        for key, value in writes.items():
            if key[0] == _INODES:
                look.at(read_u64(key, 1), self._read(key), value)
        charge = look.charge
        if charge.crossed and enforced:
            raise DfsError(ErrorCode.CROSS_DEVICE, "a directory cannot move between trees with different quotas")
        for root, added in charge.added.items():
            if root in charge.quotas:
                continue
            if enforced:
                self._require_room(session, root, added, now_ns)
            used = self.used[root]
            row = limits.noted(self.rows[root], used.bytes + added.bytes, used.inodes + added.inodes, now_ns)
            if row is not self.rows[root]:
                charge.quotas[root] = row
        for root, quota in charge.quotas.items():
            writes[_QUOTA + quota_key(root)] = None if quota is None else quota.pack()
        return charge if charge.added or charge.orphans or charge.quotas else None

    def _require_room(self, session: int, root: int, added: Used, now_ns: int) -> None:
        quota, used = self.rows[root], self.used[root]
        most = limits.inodes_ceiling(quota, now_ns)
        if added.inodes > 0 and most and used.inodes + added.inodes > most:
            raise DfsError(ErrorCode.QUOTA_EXCEEDED, f"the quota allows {most} files and directories here")
        most = limits.bytes_ceiling(quota, now_ns)
        if added.bytes > 0 and most:
            held = self.held.get(root, {})
            own = min(held.get(session, 0), added.bytes)
            if used.bytes + added.bytes + sum(held.values()) - own > most:
                raise DfsError(ErrorCode.QUOTA_EXCEEDED, f"the quota allows {most} bytes here")

    def settle(self, charge: Charge) -> None:
        """The change has happened."""
        for root, added in charge.added.items():
            used = self.used[root]
            used.bytes += added.bytes
            used.inodes += added.inodes
            if added.bytes > 0:
                self._spend(root, charge.session, added.bytes)
        for ino, orphan in charge.orphans.items():
            if orphan is None:
                self.orphans.pop(ino, None)
            else:
                self.orphans[ino] = orphan
        for root, quota in charge.quotas.items():
            if quota is None:
                self.remove(root)
            else:
                _tell(root, self.rows[root], quota)
                self.rows[root] = quota
        self.doubtful = self.doubtful or charge.crossed

    def _spend(self, root: int, session: int, count: int) -> None:
        held = self.held.get(root)
        if held and session in held:
            held[session] = max(0, held[session] - count)
            if not held[session]:
                del held[session]

    # -- grants ------------------------------------------------------------------------------------------------

    def grant(self, session: int, ino: int, wanted: int, now_ns: int) -> Granted:
        """Has a session hold ``wanted`` bytes of room for what it writes into the innermost tree of ``ino``, or what
        there is; 0 gives back all."""
        roots = self.roots_of(ino)
        if not any(map(self._limits_bytes, roots)):
            return Granted(0)
        own = self.held.get(roots[0], {}).get(session, 0)
        free: int | None = None
        others = 0
        for root in roots:
            most = limits.bytes_ceiling(self.rows[root], now_ns)
            if most:
                held = self.held.get(root, {})
                room = max(0, most - self.used[root].bytes - sum(held.values()) + own)
                if free is None or room < free:
                    free, others = room, sum(held.values()) - held.get(session, 0)
        if free is None:
            # Above a soft limit, or below it, and for the time being nothing is refused.
            return Granted(roots[0], wanted + AHEAD_BYTES if wanted else 0)
        ahead = min(AHEAD_BYTES, free // AHEAD_PART) if wanted else 0
        granted = max(0, min(wanted + ahead, free))
        for root in roots:
            self._hold(root, session, granted - own)
        return Granted(roots[0], granted, granted < wanted and others > 0)

    def _hold(self, root: int, session: int, count: int) -> None:
        held = self.held.setdefault(root, {})
        held[session] = max(0, held.get(session, 0) + count)
        if not held[session]:
            del held[session]

    def ended(self, session: int) -> None:
        """The session is over, and what it held is free."""
        for held in self.held.values():
            held.pop(session, None)

    # -- quotas that come and go -------------------------------------------------------------------------------

    def put(self, root: int, quota: Quota, used: Used) -> None:
        """A quota is set (again); the caller has logged the row."""
        known = root in self.rows
        self.rows[root] = quota
        self.used[root] = used
        if not known:
            self._roots.clear()

    def remove(self, root: int) -> None:
        del self.rows[root], self.used[root]
        self.held.pop(root, None)
        self._roots.clear()

    def load(self, quotas: Iterable[tuple[int, Quota]], orphans: Iterable[int]) -> None:
        """Takes up what earlier epochs left; the store contains everything."""
        for root, quota in quotas:
            self.put(root, quota, used_of(self._read(_TREE + inode_key(root))))
        for ino in orphans if self.rows else ():
            inode = trees.counts(self._read(_INODE + inode_key(ino)))
            roots = self.roots_of(ino)
            if inode is not None and roots and not inode.is_directory:
                self.orphans[ino] = Orphan(roots, inode.allocated)
                for root in roots:
                    self.used[root].bytes += inode.allocated
                    self.used[root].inodes += 1

    def recount(self, look: Callable[[int], Used]) -> None:
        """Usage is what ``look`` says of each tree, and orphans."""
        for root in self.rows:
            self.used[root] = look(root)
        for orphan in self.orphans.values():
            for root in orphan.roots:
                if root in self.used:
                    self.used[root].bytes += orphan.bytes
                    self.used[root].inodes += 1

    def room(self, ino: int, now_ns: int) -> tuple[int, int, int, int] | None:
        """Size and used bytes, number and used inodes (0 for a size or number: no limit) of the innermost quota, for
        statfs; None without one."""
        root = next(iter(self.roots_of(ino)), 0) if self.rows else 0
        if not root:
            return None
        quota, used = self.rows[root], self.used[root]
        return (
            limits.bytes_ceiling(quota, now_ns) or quota.bytes_soft,
            used.bytes,
            limits.inodes_ceiling(quota, now_ns) or quota.inodes_soft,
            used.inodes,
        )


class _Look:
    """Goes through the inodes of one change."""

    def __init__(self, quotas: Quotas, writes: Rows, charge: Charge) -> None:
        self._quotas = quotas
        self._writes = writes
        self.charge = charge

    def _row(self, key: bytes) -> bytes | None:
        return self._writes[key] if key in self._writes else self._quotas._read(key)

    def at(self, ino: int, old_row: bytes | None, new_row: bytes | None) -> None:
        old, new = trees.counts(old_row), trees.counts(new_row)
        if ino in self._quotas.rows and (new is None or not new.nlink):
            self.charge.quotas[ino] = None
        if old is not None and new is not None and old.is_directory and old.parent != new.parent:
            self._moved(old.parent, new.parent)
        before, size_before = self._held(ino, old)
        now, size_now = self._holds(ino, before, new)
        if before == now and size_before == size_now:
            return
        self._add(before, -size_before, -1)
        self._add(now, size_now, 1)

    def _moved(self, old: int, new: int) -> None:
        roots = self._quotas.roots
        if roots(old, self._row) != roots(new, self._row):
            self.charge.crossed = True

    def _held(self, ino: int, old: trees.Counts | None) -> tuple[tuple[int, ...], int]:
        """Where it counted, and with how many bytes."""
        orphan = self._quotas.orphans.get(ino)
        if orphan is not None:
            return orphan.roots, orphan.bytes
        share = trees.share(ino, old)
        return ((), 0) if share is None else (self._quotas.roots(share.directory, self._row), share.amounts[2])

    def _holds(self, ino: int, before: tuple[int, ...], new: trees.Counts | None) -> tuple[tuple[int, ...], int]:
        """Where it counts now."""
        share = trees.share(ino, new)
        orphan = None
        if share is None and new is not None and before and not new.nlink and not new.flags & _IN_TRASH:
            orphan = Orphan(before, new.allocated) if self._is_open(ino) else None
        if orphan is not None or ino in self._quotas.orphans:
            self.charge.orphans[ino] = orphan
        if orphan is not None:
            return orphan
        return ((), 0) if share is None else (self._quotas.roots(share.directory, self._row), share.amounts[2])

    def _is_open(self, ino: int) -> bool:
        """Whether some session keeps it alive: those that did when it lost its name, less those that let go."""
        if ino in self._quotas.orphans:
            return True
        prefix = _ORPHAN + key_u64(ino)
        return any(prefix <= key < after(prefix) and row is not None for key, row in self._writes.items())

    def _add(self, roots: tuple[int, ...], count: int, inodes: int) -> None:
        for root in roots:
            added = self.charge.added.get(root)
            if added is None:
                added = self.charge.added[root] = Used()
            added.bytes += count
            added.inodes += inodes


def used_of(row: bytes | None) -> Used:
    """From a row of TREES."""
    if row is None:
        return Used()
    tree = Tree.unpack(row)
    return Used(tree.allocated, tree.files + tree.directories)


def _parent(read: Read, directory: int) -> int | None:
    inode = trees.counts(read(_INODE + inode_key(directory)))
    return None if inode is None else inode.parent


def _tell(root: int, old: Quota, new: Quota) -> None:
    if bool(old.bytes_since_ns) != bool(new.bytes_since_ns) or bool(old.inodes_since_ns) != bool(new.inodes_since_ns):
        over = [name for name, at in (("bytes", new.bytes_since_ns), ("inodes", new.inodes_since_ns)) if at]
        if over:
            log.warning("the soft limit of a quota is passed", directory=root, over=over)
        else:
            log.info("a quota is below its soft limits again", directory=root)

"""What was deleted and is kept for a while: TRASH rows. Synchronous, over one transaction.

A file or symlink that loses its last name is put into the trash instead of being removed: its inode stays as it is,
without a name, and nobody finds it but ``dfs trash``. A directory is put there if something in the trash was in it, so
that paths can be told and made again with their modes, owners and attributes. What is open besides goes on as any
orphan does; the trash outlives the last close, restarts and the end of the session.

Purging an entry does what deleting did before there was a trash. Entries go in the order of their keys: what expires
first.
"""

import stat
from itertools import islice

import msgspec

from metaserver import namespace
from metaserver.errors import DfsError, ErrorCode
from metaserver.inodes import STEP_EXTENTS, Effects, Leaving, TrashChange, find, orphaned, remove, save
from metaserver.protocol import InodeFlags
from metaserver.schema import (
    Dentry,
    Inode,
    Table,
    Transaction,
    Trashed,
    after,
    dentry_key,
    inode_key,
    key_u64,
    orphan_key,
    read_u64,
    trash_key,
)

# Entries purged in one transaction, if all of them are small: three rows for each of their extents, and a few more.
PURGE_ENTRIES = 32
_SMALL_EXTENTS = STEP_EXTENTS // PURGE_ENTRIES
# Directories that one restoration makes again; each takes five rows.
MOST_PARENTS = 500
_KEPT_TYPES = frozenset({stat.S_IFREG, stat.S_IFLNK})
_DIRECTORY_TYPE = stat.S_IFDIR >> 12


class Place(msgspec.Struct):
    """A name in a directory."""

    parent: int
    name: bytes


class Restored(msgspec.Struct):
    """Where an inode is again; ``changed`` directories have new entries."""

    ino: int
    place: Place
    changed: list[int]


def is_worth_keeping(inode: Inode) -> bool:
    """Whether this belongs into a trash, if there is one. Short-lived and empty files do, too: which of them somebody
    will miss cannot be told, and a change that is done again must find the same."""
    if stat.S_ISDIR(inode.mode):
        return bool(inode.flags & InodeFlags.HAS_TRASH)
    return stat.S_IFMT(inode.mode) in _KEPT_TYPES


def goes_at_once(tx: Transaction, ino: int, inode: Inode) -> bool:
    """Whether one transaction can remove it, without a task that goes on."""
    return not inode.allocated or _has_at_most(tx, ino, STEP_EXTENTS)


def put(tx: Transaction, now_ns: int, leaving: Leaving, expires_ns: int, host: str, effects: Effects) -> None:
    """Puts an inode without a name into the trash; the caller saves it and its directory."""
    inode = leaving.inode
    directory = stat.S_ISDIR(inode.mode)
    inode.flags |= InodeFlags.IN_TRASH
    inode.next_cookie = expires_ns
    leaving.directory.flags |= InodeFlags.HAS_TRASH
    row = Trashed(leaving.parent, leaving.name, now_ns, inode.allocated, directory, host)
    key = trash_key(expires_ns, leaving.ino)
    tx.put(Table.TRASH, key, row.pack())
    effects.trash.append(TrashChange(key, 1, inode.allocated))


# -- purging -------------------------------------------------------------------------------------------------------


class Purged(msgspec.Struct):
    """``entries`` are no more, with so many bytes; ``more``: there are others that go as well."""

    entries: int = 0
    bytes: int = 0
    more: bool = False


def purge_step(tx: Transaction, until_ns: int, enough: int, effects: Effects, most: int = PURGE_ENTRIES) -> Purged:
    """Removes some entries that expire before ``until_ns``, those first that expire first, until that makes ``enough``
    bytes, and at most ``most``."""
    step = Purged()
    most = min(most, PURGE_ENTRIES)
    found = list(islice(tx.scan(Table.TRASH, b"", key_u64(until_ns)), most + 1))
    for key, value in found[:most]:
        if step.entries and not _is_small(tx, read_u64(key, 8)):
            break
        step.bytes += purge(tx, key, Trashed.unpack(value), effects)
        step.entries += 1
        if step.bytes >= enough:
            break
    step.more = step.entries < len(found)
    return step


def purge(tx: Transaction, key: bytes, row: Trashed, effects: Effects) -> int:
    """Removes one entry for good; what is open lives on until it is closed. Returns its bytes."""
    ino = read_u64(key, 8)
    _drop_row(tx, key, row, effects)
    inode = Inode.unpack(_required(tx, ino))
    _take_out(inode)
    if orphaned(tx, ino):
        save(tx, ino, inode)
    else:
        remove(tx, ino, inode, effects)
    return row.allocated


def _is_small(tx: Transaction, ino: int) -> bool:
    """Whether its removal takes few rows."""
    inode = Inode.unpack(_required(tx, ino))
    if inode.flags & InodeFlags.HAS_XATTRS:
        return False
    return not inode.allocated or _has_at_most(tx, ino, _SMALL_EXTENTS)


def _has_at_most(tx: Transaction, ino: int, extents: int) -> bool:
    prefix = key_u64(ino)
    return sum(1 for _ in islice(tx.scan(Table.EXTENTS, prefix, after(prefix)), extents + 1)) <= extents


def _drop_row(tx: Transaction, key: bytes, row: Trashed, effects: Effects) -> None:
    tx.delete(Table.TRASH, key)
    effects.trash.append(TrashChange(key, -1, -row.allocated))


def _take_out(inode: Inode) -> None:
    inode.flags &= ~InodeFlags.IN_TRASH
    if not stat.S_ISDIR(inode.mode):
        inode.next_cookie = 0


def _required(tx: Transaction, ino: int) -> bytes:
    value = tx.get(Table.INODES, inode_key(ino))
    if value is None:
        raise DfsError(ErrorCode.INTERNAL, f"inode {ino} is in the trash and does not exist")
    return value


# -- finding and restoring -------------------------------------------------------------------------------------------


def look(tx: Transaction, ino: int) -> tuple[bytes, Trashed, Inode] | None:
    """An inode in the trash with its TRASH row; None if it is not there."""
    value = tx.get(Table.INODES, inode_key(ino))
    inode = None if value is None else Inode.unpack(value)
    if inode is None or not inode.flags & InodeFlags.IN_TRASH:
        return None
    key = trash_key(inode.next_cookie, ino)
    row = tx.get(Table.TRASH, key)
    return None if row is None else (key, Trashed.unpack(row), inode)


def restore(tx: Transaction, now_ns: int, ino: int, to: Place | None, effects: Effects) -> Restored:
    """Gives an entry its name back, or the name ``to``; directories that are gone are made again as they were.
    NOT_FOUND if it is not in the trash or it is not known any more where it was, EXISTS if that name is taken."""
    found = look(tx, ino)
    if found is None:
        raise DfsError(ErrorCode.NOT_FOUND, f"{ino} is not in the trash")
    changed: list[int] = []
    place = to or Place(_home(tx, now_ns, found[1].parent, changed, effects), found[1].name)
    _attach(tx, now_ns, ino, found, place, effects)
    changed.append(place.parent)
    return Restored(ino, place, changed)


def _home(tx: Transaction, now_ns: int, ino: int, changed: list[int], effects: Effects) -> int:
    """The directory of an entry, made again if it is in the trash; or what has its name now."""
    missing: list[tuple[int, tuple[bytes, Trashed, Inode]]] = []
    while not _is_live(tx, ino):
        found = look(tx, ino)
        if found is None or len(missing) == MOST_PARENTS:
            raise DfsError(ErrorCode.NOT_FOUND, "the directory it was in is gone for good: say where to restore it to")
        missing.append((ino, found))
        ino = found[1].parent
    for child, found in reversed(missing):
        name = found[1].name
        there = tx.get(Table.DENTRIES, dentry_key(ino, name))
        if there is None:
            _attach(tx, now_ns, child, found, Place(ino, name), effects)
            changed.append(ino)
            ino = child
            continue
        entry = Dentry.unpack(there)
        if entry.type != _DIRECTORY_TYPE:
            raise DfsError(ErrorCode.EXISTS, f"{name.decode(errors='backslashreplace')} is no directory any more")
        ino = entry.ino
    return ino


def _is_live(tx: Transaction, ino: int) -> bool:
    inode = find(tx, ino)
    return inode is not None and inode.nlink > 0


def _attach(
    tx: Transaction, now_ns: int, ino: int, found: tuple[bytes, Trashed, Inode], place: Place, effects: Effects
) -> None:
    key, row, inode = found
    _drop_row(tx, key, row, effects)
    _take_out(inode)
    inode.nlink = 2 if stat.S_ISDIR(inode.mode) else 1
    namespace.attach(tx, now_ns, place.parent, place.name, ino, inode)
    prefix = key_u64(ino)
    for orphan in [read_u64(orphan, 8) for orphan, _ in tx.scan(Table.ORPHANS, prefix, after(prefix))]:
        tx.delete(Table.ORPHANS, orphan_key(ino, orphan))
    effects.changed.append(ino)

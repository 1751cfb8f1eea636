"""In which directory an inode counts: that of one of its names, which its row tells; LINKS has the others. Synchronous,
over one transaction; the caller saves the inode. A name is told by its LISTING key: directory and cookie.

Inodes of a store from before TREES are not COUNTED: they are found by a COUNT_TREES task, which looks at every name
once (:func:`count_step`), or counted when one of their names moves. Whatever is done to names meanwhile, each is either
noted or still to be looked at, because what is done notes it, too; and noting a name twice changes nothing.
"""

import stat
from itertools import islice

from metaserver.inodes import save
from metaserver.protocol import ROOT_INO, InodeFlags
from metaserver.schema import (
    ALL_COUNTED,
    Inode,
    Listed,
    Table,
    Task,
    Transaction,
    after,
    inode_key,
    key_u64,
    link_key,
    listing_key,
    read_u64,
)

# Names that one step looks at; each may change an inode and a row of LINKS.
STEP_NAMES = 500
# A plain number: working with the enum costs as much as all else here.
_COUNTED = int(InodeFlags.COUNTED)
_END = b"\xff" * 17


def born(inode: Inode, parent: int, cookie: int) -> None:
    """A new inode has its first name."""
    inode.flags |= _COUNTED
    if not stat.S_ISDIR(inode.mode):
        inode.parent, inode.next_cookie = parent, cookie


def named(tx: Transaction, ino: int, inode: Inode, parent: int, cookie: int) -> None:
    """The inode, which is no directory, has this name (as well)."""
    if not inode.flags & _COUNTED:
        tx.delete(Table.LINKS, link_key(ino, parent, cookie))
        born(inode, parent, cookie)
    elif (inode.parent, inode.next_cookie) != (parent, cookie):
        tx.put(Table.LINKS, link_key(ino, parent, cookie), b"")


def unnamed(tx: Transaction, ino: int, inode: Inode, parent: int, cookie: int) -> None:
    """The inode, which is no directory, does not have this name any more, but has others: nlink is at least 1."""
    if not inode.flags & _COUNTED or (inode.parent, inode.next_cookie) != (parent, cookie):
        tx.delete(Table.LINKS, link_key(ino, parent, cookie))
        return
    prefix = key_u64(ino)
    other = next((key for key, _ in tx.scan(Table.LINKS, prefix, after(prefix))), None)
    if other is None:
        # The others are still to be looked at.
        inode.flags &= ~_COUNTED
        inode.parent = inode.next_cookie = 0
        return
    tx.delete(Table.LINKS, other)
    inode.parent, inode.next_cookie = read_u64(other, 8), read_u64(other, 16)


def moved(tx: Transaction, ino: int, inode: Inode, old: tuple[int, int], new: tuple[int, int]) -> None:
    """One name of the inode has become another."""
    if stat.S_ISDIR(inode.mode):
        inode.flags |= _COUNTED
        inode.parent = new[0]
        return
    if not inode.flags & _COUNTED or (inode.parent, inode.next_cookie) == old:
        born(inode, *new)
        tx.delete(Table.LINKS, link_key(ino, *new))
    else:
        tx.put(Table.LINKS, link_key(ino, *new), b"")
    tx.delete(Table.LINKS, link_key(ino, *old))


def count_step(tx: Transaction, task: Task) -> Task | None:
    """Looks at some names of a store from before TREES; the task as it goes on, or None when all are COUNTED."""
    if not task.value:
        _count_root(tx)
    rows = tx.scan(Table.LISTING, listing_key(task.subject, task.position + 1), _END)
    found = [(read_u64(key), read_u64(key, 8), Listed.unpack(value).ino) for key, value in islice(rows, STEP_NAMES)]
    for parent, cookie, ino in found:
        _count(tx, ino, parent, cookie)
    if len(found) < STEP_NAMES:
        tx.put(Table.COUNTERS, ALL_COUNTED, key_u64(1))
        return None
    parent, cookie, _ = found[-1]
    return Task(task.kind, parent, cookie, task.value + len(found))


def _count_root(tx: Transaction) -> None:
    row = tx.get(Table.INODES, inode_key(ROOT_INO))
    if row is not None:
        inode = Inode.unpack(row)
        inode.flags |= _COUNTED
        save(tx, ROOT_INO, inode)


def _count(tx: Transaction, ino: int, parent: int, cookie: int) -> None:
    row = tx.get(Table.INODES, inode_key(ino))
    if row is None:
        return
    inode = Inode.unpack(row)
    if stat.S_ISDIR(inode.mode):
        inode.flags |= _COUNTED
    else:
        named(tx, ino, inode, parent, cookie)
    if inode.pack() != row:
        save(tx, ino, inode)

"""Extended attributes, with the limits and errors of xattr(7), and the ACLs among them, which change the mode and are
handed down (``acl.py``). Synchronous, over one transaction."""

import stat

from metaserver import acl
from metaserver.errors import DfsError, ErrorCode
from metaserver.inodes import require, save
from metaserver.protocol import (
    XATTR_LIST_MAX,
    XATTR_NAME_MAX,
    XATTR_VALUE_MAX,
    InodeFlags,
    SetXattr,
    XattrFlags,
)
from metaserver.schema import Inode, Table, Transaction, after, key_u64, xattr_key

# Bounds the rows of the transaction that removes an inode, together with inodes.STEP_EXTENTS.
MAX_XATTRS = 500


def get(tx: Transaction, ino: int, name: bytes) -> bytes:
    inode = require(tx, ino)
    _check_name(name)
    value = tx.get(Table.XATTRS, xattr_key(ino, name)) if inode.flags & InodeFlags.HAS_XATTRS else None
    if value is None:
        raise DfsError(ErrorCode.NO_ATTRIBUTE)
    return value


def names(tx: Transaction, ino: int) -> list[bytes]:
    inode = require(tx, ino)
    return _names(tx, ino) if inode.flags & InodeFlags.HAS_XATTRS else []


def set_value(tx: Transaction, now_ns: int, message: SetXattr) -> None:
    """setxattr(2). NO_SPACE beyond what one listing can return."""
    ino, name = message.ino, message.name
    inode = require(tx, ino)
    _check_name(name)
    if message.flags not in (XattrFlags.NONE, XattrFlags.CREATE, XattrFlags.REPLACE):
        raise DfsError(ErrorCode.INVALID)
    if len(message.value) > XATTR_VALUE_MAX:
        raise DfsError(ErrorCode.ARGUMENT_TOO_BIG)
    value = message.value
    if name.startswith(acl.PREFIX):
        kept = _take_acl(inode, name, value)
        if kept is None:
            _drop(tx, ino, inode, name)
            inode.ctime_ns = now_ns
            save(tx, ino, inode)
            return
        value = kept
    exists = tx.get(Table.XATTRS, xattr_key(ino, name)) is not None
    if exists and message.flags & XattrFlags.CREATE:
        raise DfsError(ErrorCode.EXISTS)
    if not exists and message.flags & XattrFlags.REPLACE:
        raise DfsError(ErrorCode.NO_ATTRIBUTE)
    if not exists:
        _check_room(tx, ino, name)
    tx.put(Table.XATTRS, xattr_key(ino, name), value)
    inode.flags |= InodeFlags.HAS_XATTRS
    inode.ctime_ns = now_ns
    save(tx, ino, inode)


def remove(tx: Transaction, now_ns: int, ino: int, name: bytes) -> None:
    inode = require(tx, ino)
    _check_name(name)
    if tx.get(Table.XATTRS, xattr_key(ino, name)) is None:
        if name in (acl.ACCESS, acl.DEFAULT):
            return  # there is always an access ACL, and "no default ACL" is one
        raise DfsError(ErrorCode.NO_ATTRIBUTE)
    _drop(tx, ino, inode, name)
    inode.ctime_ns = now_ns
    save(tx, ino, inode)


def _drop(tx: Transaction, ino: int, inode: Inode, name: bytes) -> None:
    tx.delete(Table.XATTRS, xattr_key(ino, name))
    if not _names(tx, ino):
        inode.flags &= ~InodeFlags.HAS_XATTRS


# -- ACLs ----------------------------------------------------------------------------------------------------------


def _take_acl(inode: Inode, name: bytes, value: bytes) -> bytes | None:
    """What to keep of an ACL that is being set; None if nothing, because the mode says it all. Changes the mode."""
    if name not in (acl.ACCESS, acl.DEFAULT) or stat.S_ISLNK(inode.mode):
        raise DfsError(ErrorCode.NOT_SUPPORTED)
    entries = acl.decode(value)
    if name == acl.DEFAULT and entries and not stat.S_ISDIR(inode.mode):
        raise DfsError(ErrorCode.ACCESS_DENIED, "only a directory has a default ACL")
    if not entries:
        return None
    acl.check(entries)
    if name == acl.DEFAULT:
        return acl.encode(entries)
    inode.mode, equivalent = acl.mode_of(entries, inode.mode)
    return None if equivalent else acl.encode(entries)


def follow_mode(tx: Transaction, ino: int, inode: Inode) -> None:
    """Brings the access ACL in step with a changed mode."""
    if inode.flags & InodeFlags.HAS_XATTRS:
        value = tx.get(Table.XATTRS, xattr_key(ino, acl.ACCESS))
        if value is not None:
            entries = acl.change_mode(acl.decode(value), inode.mode)
            tx.put(Table.XATTRS, xattr_key(ino, acl.ACCESS), acl.encode(entries))


def inherit(tx: Transaction, parent: int, directory: Inode, ino: int, inode: Inode) -> None:
    """Gives something new in a directory what follows from the directory's default ACL."""
    if not directory.flags & InodeFlags.HAS_XATTRS or stat.S_ISLNK(inode.mode):
        return
    value = tx.get(Table.XATTRS, xattr_key(parent, acl.DEFAULT))
    if value is None:
        return
    access, inode.mode = acl.inherit(acl.decode(value), inode.mode)
    if not acl.mode_of(access, inode.mode)[1]:
        tx.put(Table.XATTRS, xattr_key(ino, acl.ACCESS), acl.encode(access))
        inode.flags |= InodeFlags.HAS_XATTRS
    if stat.S_ISDIR(inode.mode):
        tx.put(Table.XATTRS, xattr_key(ino, acl.DEFAULT), value)
        inode.flags |= InodeFlags.HAS_XATTRS


def _names(tx: Transaction, ino: int) -> list[bytes]:
    prefix = key_u64(ino)
    return [key[8:] for key, _ in tx.scan(Table.XATTRS, prefix, after(prefix))]


def _check_name(name: bytes) -> None:
    if not 0 < len(name) <= XATTR_NAME_MAX or b"\0" in name:
        raise DfsError(ErrorCode.RANGE)


def _check_room(tx: Transaction, ino: int, name: bytes) -> None:
    present = _names(tx, ino)
    if len(present) >= MAX_XATTRS or sum(len(other) + 1 for other in present) + len(name) + 1 > XATTR_LIST_MAX:
        raise DfsError(ErrorCode.NO_SPACE, "the file has too many extended attributes")

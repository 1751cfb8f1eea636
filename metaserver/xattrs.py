"""Extended attributes, with the limits and errors of xattr(7). Synchronous, over one transaction."""

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
from metaserver.schema import Table, Transaction, after, key_u64, xattr_key

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
    exists = tx.get(Table.XATTRS, xattr_key(ino, name)) is not None
    if exists and message.flags & XattrFlags.CREATE:
        raise DfsError(ErrorCode.EXISTS)
    if not exists and message.flags & XattrFlags.REPLACE:
        raise DfsError(ErrorCode.NO_ATTRIBUTE)
    if not exists:
        _check_room(tx, ino, name)
    tx.put(Table.XATTRS, xattr_key(ino, name), message.value)
    inode.flags |= InodeFlags.HAS_XATTRS
    inode.ctime_ns = now_ns
    save(tx, ino, inode)


def remove(tx: Transaction, now_ns: int, ino: int, name: bytes) -> None:
    inode = require(tx, ino)
    _check_name(name)
    key = xattr_key(ino, name)
    if tx.get(Table.XATTRS, key) is None:
        raise DfsError(ErrorCode.NO_ATTRIBUTE)
    tx.delete(Table.XATTRS, key)
    if not _names(tx, ino):
        inode.flags &= ~InodeFlags.HAS_XATTRS
    inode.ctime_ns = now_ns
    save(tx, ino, inode)


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

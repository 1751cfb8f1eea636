"""POSIX access control lists as the kernel stores them in xattrs. Pure: bytes and modes in, bytes and modes out.

The kernel checks permissions by them; what is left to a filesystem is to keep the mode in step with the access ACL, and
to hand default ACLs down. The rules are those of POSIX.1e draft 17 as in Linux's fs/posix_acl.c, whose functions have
the names given below.
"""

import struct
from collections.abc import Iterable

import msgspec

from metaserver.errors import DfsError, ErrorCode

ACCESS = b"system.posix_acl_access"
DEFAULT = b"system.posix_acl_default"
PREFIX = b"system.posix_acl_"

USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_NAMED = (USER, GROUP)
_SINGLE = (USER_OBJ, GROUP_OBJ, MASK, OTHER)
_VERSION = 2
_HEADER = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")
_NO_ID = 0xFFFFFFFF
# The kernel reads an ACL into one page.
MAX_BYTES = 4096


class Entry(msgspec.Struct):
    """``id`` is a user or group for USER and GROUP; ``permissions`` are rwx bits."""

    tag: int
    permissions: int
    id: int = _NO_ID


def decode(value: bytes) -> list[Entry]:
    """The entries of an xattr's value. INVALID or NOT_SUPPORTED if they cannot be read (posix_acl_from_xattr)."""
    if len(value) > MAX_BYTES:
        raise DfsError(ErrorCode.NO_SPACE, "an ACL has to fit into 4096 bytes")
    if len(value) < _HEADER.size or (len(value) - _HEADER.size) % _ENTRY.size:
        raise DfsError(ErrorCode.INVALID, "not an ACL")
    if _HEADER.unpack_from(value)[0] != _VERSION:
        raise DfsError(ErrorCode.NOT_SUPPORTED, "an ACL of another version")
    entries = [Entry(*fields) for fields in _ENTRY.iter_unpack(value[_HEADER.size :])]
    if any(entry.tag not in (*_SINGLE, *_NAMED) or (entry.tag in _NAMED and entry.id == _NO_ID) for entry in entries):
        raise DfsError(ErrorCode.INVALID, "an ACL with unknown entries")
    return entries


def check(entries: list[Entry]) -> None:
    """INVALID if these do not make an ACL (posix_acl_valid)."""
    tags = [entry.tag for entry in entries]
    # Sorted by tag, the named ones among themselves by id.
    places = [(entry.tag, entry.id if entry.tag in _NAMED else 0) for entry in entries]
    once = all(tags.count(tag) == 1 for tag in (USER_OBJ, GROUP_OBJ, OTHER)) and tags.count(MASK) <= 1
    masked = MASK in tags or not any(tag in tags for tag in _NAMED)
    bounded = all(entry.permissions <= 7 for entry in entries)
    if not (once and masked and bounded and places == sorted(set(places))):
        raise DfsError(ErrorCode.INVALID, "not a valid ACL")


def encode(entries: Iterable[Entry]) -> bytes:
    return _HEADER.pack(_VERSION) + b"".join(
        _ENTRY.pack(entry.tag, entry.permissions, entry.id if entry.tag in _NAMED else _NO_ID) for entry in entries
    )


def mode_of(entries: list[Entry], mode: int) -> tuple[int, bool]:
    """``mode`` with the permission bits that an access ACL gives it, and whether they say all that the ACL says
    (posix_acl_equiv_mode)."""
    bits = {entry.tag: entry.permissions for entry in entries}
    group = bits.get(MASK, bits[GROUP_OBJ])
    equivalent = all(entry.tag in (USER_OBJ, GROUP_OBJ, OTHER) for entry in entries)
    return mode & ~0o777 | bits[USER_OBJ] << 6 | group << 3 | bits[OTHER], equivalent


def inherit(default: list[Entry], mode: int) -> tuple[list[Entry], int]:
    """The access ACL of something made with ``mode`` in a directory with this default ACL, and its mode: each is
    limited by the other (posix_acl_create_masq)."""
    masked = any(entry.tag == MASK for entry in default)
    made = []
    for entry in default:
        shift = _shift(entry.tag, masked)
        permissions = entry.permissions if shift is None else entry.permissions & mode >> shift
        made.append(Entry(entry.tag, permissions, entry.id))
    return made, mode_of(made, mode)[0]


def change_mode(entries: list[Entry], mode: int) -> list[Entry]:
    """An access ACL after chmod(2) (posix_acl_chmod_masq)."""
    masked = any(entry.tag == MASK for entry in entries)
    changed = []
    for entry in entries:
        shift = _shift(entry.tag, masked)
        changed.append(Entry(entry.tag, entry.permissions if shift is None else mode >> shift & 7, entry.id))
    return changed


def _shift(tag: int, masked: bool) -> int | None:
    """Where in a mode the permissions of an entry are; None if nowhere."""
    if tag == GROUP_OBJ:
        return None if masked else 3
    return {USER_OBJ: 6, MASK: 3, OTHER: 0}.get(tag)

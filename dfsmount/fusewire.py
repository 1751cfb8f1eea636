"""The kernel's FUSE protocol: its messages as structs, decoded and encoded. Pure: no I/O here.

A request is one read from /dev/fuse, an answer one write; both little-endian as the machine is, and as
``<linux/fuse.h>`` has them (protocol 7.38; we say 7.31, as libfuse 3.14 does, and use nothing that came later)::

    request   40 bytes: length u32, opcode u32, unique u64, nodeid u64, uid u32, gid u32, pid u32, extensions u16, -
              then what the opcode has: numbers, names that end with a zero byte, bytes to write
    answer    16 bytes: length u32, error i32 (0, or an errno, negative), unique u64 of the request; then what it has
    message   an answer with unique 0; its kind is where the error is

Attributes (``fuse_attr``, 88 bytes): ino, size, blocks of 512 bytes u64; atime, mtime, ctime s64 (seconds); the same
three u32 (nanoseconds); mode, nlink, uid, gid, rdev, block size, flags u32. An entry (``fuse_entry_out``, 128 bytes)
puts before them nodeid, generation, seconds for which the entry and the attributes may be believed u64 each, and their
nanoseconds u32 each. ``fuse_attr_out`` (104 bytes) is an entry without what concerns the name.
"""

import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple

HEADER = struct.Struct("<IIQQIIIHH")
HEADER_BYTES = 40
assert HEADER.size == HEADER_BYTES
ANSWER = struct.Struct("<IiQ")
ANSWER_BYTES = 16
assert ANSWER.size == ANSWER_BYTES
ENTRY = struct.Struct("<QQQQII" + "QQQqqqIIIIIIIIII")
ENTRY_BYTES = 128
assert ENTRY.size == ENTRY_BYTES
ATTRIBUTES_OUT_BYTES = 104

INIT_IN = struct.Struct("<IIII")
INIT_OUT = struct.Struct("<IIIIHHIIHHII24x")
assert INIT_OUT.size == 64
SETATTR_IN = struct.Struct("<I4xQQ8xqqqIIII4xII4x")
assert SETATTR_IN.size == 88
MKNOD_IN = struct.Struct("<IIII")
MKDIR_IN = struct.Struct("<II")
RENAME_IN = struct.Struct("<Q")
RENAME2_IN = struct.Struct("<QII")
LINK_IN = struct.Struct("<Q")
OPEN_IN = struct.Struct("<II")
OPEN_OUT = struct.Struct("<QIi")
assert OPEN_OUT.size == 16
CREATE_IN = struct.Struct("<IIII")
READ_IN = struct.Struct("<QQIIQII")
assert READ_IN.size == 40
WRITE_IN = READ_IN
WRITE_OUT = struct.Struct("<II")
HANDLE_IN = struct.Struct("<Q")
FSYNC_IN = struct.Struct("<QI")
SIZE_IN = struct.Struct("<II")
SIZE_OUT = struct.Struct("<II")
STATFS_OUT = struct.Struct("<QQQQQIII4x24x")
assert STATFS_OUT.size == 80
FORGET_IN = struct.Struct("<Q")
BATCH_FORGET_IN = struct.Struct("<II")
FORGET_ONE = struct.Struct("<QQ")
DIRENT = struct.Struct("<QQII")
DIRENT_BYTES = 24
assert DIRENT.size == DIRENT_BYTES
INVALIDATE_INODE_OUT = struct.Struct("<Qqq")

# The kernel never sends more than this in one request besides its data.
MAX_WRITE_BYTES = 1 << 20
REQUEST_BYTES = MAX_WRITE_BYTES + 4096
MAX_PAGES = MAX_WRITE_BYTES // 4096
MAJOR, MINOR = 7, 31
_NS = 1_000_000_000
_U32 = 0xFFFFFFFF
# Longer than anybody caches, and fits.
_LONGEST_SECONDS = float(1 << 40)


class Opcode(IntEnum):
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    RELEASEDIR = 29
    FSYNCDIR = 30
    CREATE = 35
    INTERRUPT = 36
    BATCH_FORGET = 42
    READDIRPLUS = 44
    RENAME2 = 45


class Flag(IntFlag):
    """What is negotiated with INIT."""

    ASYNC_READ = 1 << 0
    ATOMIC_O_TRUNC = 1 << 3
    BIG_WRITES = 1 << 5
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    ASYNC_DIO = 1 << 15
    POSIX_ACL = 1 << 20
    MAX_PAGES = 1 << 22
    HANDLE_KILLPRIV_V2 = 1 << 28


# What libfuse 3.14 asks for on behalf of pyfuse3, with POSIX ACLs.
WANTED = (
    Flag.ASYNC_READ
    | Flag.ATOMIC_O_TRUNC
    | Flag.BIG_WRITES
    | Flag.AUTO_INVAL_DATA
    | Flag.DO_READDIRPLUS
    | Flag.ASYNC_DIO
    | Flag.POSIX_ACL
    | Flag.MAX_PAGES
)
# Not in every kernel that we can work with (Linux 5.11). We take setuid and setgid away at writes, truncates and chown,
# where the kernel tells us to, and it no longer asks for security.capability before each write.
OPTIONAL = Flag.HANDLE_KILLPRIV_V2


class Change(IntFlag):
    """Which fields of a SETATTR count."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    HANDLE = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8
    KILL_SUIDGID = 1 << 11


# A flag of OPEN and CREATE, if HANDLE_KILLPRIV_V2 was agreed upon: who empties the file is not privileged.
OPEN_KILL_SUIDGID = 1 << 0
# A flag of WRITE: the writer is not privileged.
WRITE_KILL_SUIDGID = 1 << 2
OPENED_DIRECT_IO, OPENED_KEEP_CACHE = 1, 2
INVALIDATE_INODE = 2


class Request(NamedTuple):
    """The header of a request."""

    length: int
    opcode: int
    unique: int
    node: int
    uid: int
    gid: int
    pid: int
    extensions: int
    padding: int


class AttributeChanges(NamedTuple):
    """A SETATTR, with the names that pyfuse3 gives to its two halves. ``handle`` is None if it is done by a path.
    ``kills_special_bits``: setuid and setgid go with this change, as they do at a chown."""

    handle: int | None
    st_mode: int
    st_uid: int
    st_gid: int
    st_size: int
    st_atime_ns: int
    st_mtime_ns: int
    update_mode: bool
    update_uid: bool
    update_gid: bool
    update_size: bool
    update_atime: bool
    update_mtime: bool
    kills_special_bits: bool


def first_name(body: bytes) -> bytes:
    """Up to the zero byte."""
    return body[: body.index(0)]


def two_names(body: bytes) -> tuple[bytes, bytes]:
    first, second, _ = body.split(b"\0", 2)
    return first, second


def decode_changes(body: bytes, now_ns: int) -> AttributeChanges:
    valid, handle, size, atime, mtime, _, atime_ns, mtime_ns, _, mode, uid, gid = SETATTR_IN.unpack_from(body)
    return AttributeChanges(
        handle if valid & Change.HANDLE else None,
        mode,
        uid,
        gid,
        size,
        now_ns if valid & Change.ATIME_NOW else atime * _NS + atime_ns,
        now_ns if valid & Change.MTIME_NOW else mtime * _NS + mtime_ns,
        bool(valid & Change.MODE),
        bool(valid & Change.UID),
        bool(valid & Change.GID),
        bool(valid & Change.SIZE),
        bool(valid & (Change.ATIME | Change.ATIME_NOW)),
        bool(valid & (Change.MTIME | Change.MTIME_NOW)),
        bool(valid & Change.KILL_SUIDGID),
    )


def decode_forgets(body: bytes) -> list[tuple[int, int]]:
    """Of a BATCH_FORGET: inodes and how many references each."""
    count, _ = BATCH_FORGET_IN.unpack_from(body)
    return list(FORGET_ONE.iter_unpack(body[BATCH_FORGET_IN.size : BATCH_FORGET_IN.size + count * FORGET_ONE.size]))


def encode_entry(
    node: int, generation: int, entry_seconds: float, attr_seconds: float, size: int, blocks: int,
    times_ns: tuple[int, int, int], mode: int, nlink: int, owner: tuple[int, int], rdev: int, block_bytes: int,
) -> bytes:  # fmt: skip
    """``times_ns``: of access, modification and change. ``owner``: uid and gid."""
    (atime, atime_ns), (mtime, mtime_ns), (ctime, ctime_ns) = [divmod(time_ns, _NS) for time_ns in times_ns]
    entry_valid, entry_valid_ns = _split(entry_seconds)
    attr_valid, attr_valid_ns = _split(attr_seconds)
    return ENTRY.pack(
        node, generation, entry_valid, attr_valid, entry_valid_ns, attr_valid_ns,
        node, size, blocks, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns,
        mode, nlink, owner[0], owner[1], rdev & _U32, block_bytes, 0,
    )  # fmt: skip


def _split(seconds: float) -> tuple[int, int]:
    whole = int(min(seconds, _LONGEST_SECONDS))
    return whole, int((min(seconds, _LONGEST_SECONDS) - whole) * _NS)


def attributes_of(entry: bytes) -> bytes:
    """The answer to a GETATTR out of an encoded entry."""
    return entry[24:32] + entry[36:40] + b"\0\0\0\0" + entry[40:]


def encode_listed(entry: bytes, ino: int, type_bits: int, name: bytes, cookie: int) -> bytes:
    """One entry of a READDIRPLUS, ``entry`` zeroes where the kernel is not to look it up; padded to eight bytes."""
    text = entry + DIRENT.pack(ino, cookie, len(name), type_bits) + name
    return text + bytes(-len(text) % 8)


def encode_init(body: bytes) -> bytes:
    """The answer to an INIT; raises ValueError if the kernel is too old."""
    major, minor, max_readahead, flags = INIT_IN.unpack_from(body)
    missing = WANTED & ~flags
    if major != MAJOR or minor < MINOR or missing:
        raise ValueError(f"the kernel speaks FUSE {major}.{minor} without {missing!r}: it is too old")
    return INIT_OUT.pack(
        MAJOR, MINOR, max_readahead, WANTED | (OPTIONAL & flags), 0, 0, MAX_WRITE_BYTES, 1, MAX_PAGES, 0, 0, 0
    )  # fmt: skip


def tells_who_is_privileged(answered: bytes) -> bool:
    """Whether an answer to INIT agrees upon HANDLE_KILLPRIV_V2."""
    flags: int = INIT_OUT.unpack_from(answered)[3]
    return bool(flags & Flag.HANDLE_KILLPRIV_V2)


def answer(unique: int, length: int, error: int = 0) -> bytes:
    """The header of an answer with ``length`` bytes behind it."""
    return ANSWER.pack(ANSWER_BYTES + length, -error, unique)


def invalidate_inode(node: int, offset: int, length: int) -> bytes:
    """The message that has the kernel drop attributes, and cached pages: ``offset`` -1: none, ``length`` 0: all."""
    head = ANSWER.pack(ANSWER_BYTES + INVALIDATE_INODE_OUT.size, INVALIDATE_INODE, 0)
    return head + INVALIDATE_INODE_OUT.pack(node, offset, length)

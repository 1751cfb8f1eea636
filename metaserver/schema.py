"""Every table of the metaserver: key, row, sentinel values and invariants. Pure: rows to bytes and back.

Keys are big-endian, so that ranges scan in order. The store appends a CRC-32C of table, key and value to every value
(``store.py``); rows here are without it. ``check.py`` verifies every invariant named here.

========== ============================== =====================================================================
table      key                            row and invariants
========== ============================== =====================================================================
INODES     ino u64                        :class:`Inode`. ino 1 is the root and its own parent. nlink is the number
                                          of DENTRIES rows that name it (directories: 2 + subdirectories; the root
                                          counts itself). nlink 0 only with an ORPHANS row, a TRASH row, or a TASKS
                                          row that will remove it. allocated is the sum of its EXTENTS lengths.
                                          flags HAS_XATTRS if and only if XATTRS rows exist; IN_TRASH if and only if
                                          nlink is 0 and there is a TRASH row for ``next_cookie`` and ino; a directory
                                          HAS_TRASH if something in the trash was in it (or was once).
                                          storage_class: how many copies of its data are wanted, 0: the cluster's
                                          default; a new inode has its directory's. flags COUNTED: it is part of TREES.
                                          Of what is COUNTED, no directory and has a name, ``parent`` and
                                          ``next_cookie`` are the LISTING key of one, in whose directory it counts; the
                                          others are in LINKS.
DENTRIES   parent u64, name               :class:`Dentry`: ino, type (S_IFMT bits >> 12), cookie. parent is a
                                          directory; ino exists; its type is the inode's. A directory has exactly
                                          one name, and its ``parent`` field says where.
LISTING    parent u64, cookie u64         :class:`Listed`: ino, type, name: the directory in order of creation, which
                                          is the order in which its files lie in chunks. One row per DENTRIES row,
                                          with the same cookie; cookie < the directory's ``next_cookie``; never 0.
SYMLINKS   ino u64                        target, 1 to 4,095 bytes; the inode's size is its length.
XATTRS     ino u64, name                  value, 0 to 64 KiB.
EXTENTS    ino u64, file offset u64       :class:`ExtentRow`: length u64, chunk u64, chunk offset u32. No two of one
                                          inode overlap; none passes its size, unless a TRUNCATE task will cut it;
                                          neighbours that continue each other in file and chunk are one row; the chunk
                                          exists, is OPEN or SEALED, and the range lies within its length.
BY_CHUNK   chunk u64, chunk offset u32,   length u64: exactly one row per EXTENTS row.
           ino u64, file offset u64
CHUNKS     chunk u64                      :class:`Chunk`. length, entries and chain are what is committed (OPEN) or
                                          final (SEALED). live is the sum of its BY_CHUNK lengths. owner is the
                                          session that writes it (OPEN), else 0. FILLING: made by the cleaner, live
                                          is 0 and owner 0; length 0 until it is made.
                                          A SEALED chunk with live 0 becomes
                                          DEAD in the same transaction; a DEAD one disappears with its last REPLICAS
                                          row.
REPLICAS   chunk u64, server u32          :class:`Replica`: state (``protocol.ReplicaState``), fragment 0, length,
                                          entries and chain as last reported or committed.
                                          The server has a SERVERS row.
BY_SERVER  server u32, chunk u64          empty: one row per REPLICAS row.
SERVERS    server u32                     :class:`Server`, msgpack.
SESSIONS   session u64                    :class:`Session`, msgpack.
ANSWERS    session u64, operation u64     :class:`StoredAnswer`, msgpack: the answer to a change until it is
                                          acknowledged; operation > the session's ``acknowledged``; the session exists.
ORPHANS    ino u64, session u64           empty: this session has it open although it has no name left.
TASKS      task u64                       :class:`Task`, msgpack: work that continues in steps. The inode or server to
                                          remove, or the session to end, exists.
COUNTERS   name                           u64 unless said otherwise. ``limit/KIND``: end of the durable id range (every
                                          id in use is below it). ``epoch``, ``number``, ``time_ns``: the newest change
                                          this store contains. ``boot``: :class:`Boot`, how that epoch began and
                                          ended. ``survived/`` epoch u64: the last number of an older epoch.
                                          ``kept_chunks``: after a rebuild, unknown chunks below it are not deleted.
                                          ``counted``: 1 once every inode with a name is COUNTED; before, a COUNT_TREES
                                          task works on it.
                                          Written by the storage engine alone.
TOTALS     table u8                       row count u64, XOR of row checksums u32: written only by a checkpoint. One
                                          row per table but TOTALS; none means no rows for tables that came later.
TREES      ino u64                        :class:`Tree`: what is COUNTED below this directory, itself not included; no
                                          row if that is nothing. Written only by a checkpoint, which sees old and new
                                          rows (``trees.py``): exact for the state that the store contains.
TRASH      expires u64, ino u64           :class:`Trashed`, msgpack: a file, symlink or directory that was deleted, what
                                          is to go first first. expires is in ns since 1970, and also the inode's
                                          ``next_cookie``. A directory is there only if it HAS_TRASH.
QUOTAS     ino u64                        :class:`Quota`, msgpack: limits of what is in this directory, and below; the
                                          directory exists. No limit is negative.
LINKS      ino u64, parent u64,           empty: one row for each name of a COUNTED inode but the one that its row
           cookie u64                     tells; (parent, cookie) is the name's LISTING key.
========== ============================== =====================================================================

Inode 0, chunk 0, session 0 and server 0 mean "none". The top 16 bits of inode and chunk ids are a metadata shard, 0
now.
"""

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import ClassVar, Protocol, Self

import msgspec

from metaserver.protocol import Attributes, ChunkState, ReplicaState


class Table(IntEnum):
    """Numbers are part of the changelog's format: never renumber."""

    INODES = 1
    DENTRIES = 2
    LISTING = 3
    SYMLINKS = 4
    XATTRS = 5
    EXTENTS = 6
    BY_CHUNK = 7
    CHUNKS = 8
    REPLICAS = 9
    BY_SERVER = 10
    SERVERS = 11
    SESSIONS = 12
    ANSWERS = 13
    ORPHANS = 14
    TASKS = 15
    COUNTERS = 16
    TOTALS = 17
    TREES = 18
    QUOTAS = 19
    TRASH = 20
    LINKS = 26


SCHEMA_VERSION = 1
# No transaction touches more rows; longer work is a Task.
MAX_TRANSACTION_ROWS = 4096


class Transaction(Protocol):
    """What one synchronous change works on: it sees its own writes, and all or none of them happen.

    Values are without checksum. ``scan`` yields key and value for start <= key < stop in key order and may be left
    early; rows of the scanned range must not be changed while it runs (collect first).
    """

    def get(self, table: Table, key: bytes) -> bytes | None: ...

    def put(self, table: Table, key: bytes, value: bytes) -> None: ...

    def delete(self, table: Table, key: bytes) -> None: ...

    def scan(self, table: Table, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]: ...

    def scan_back(self, table: Table, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The same range from its end."""

    def allocate(self, kind: "IdKind") -> int:
        """A new id of that kind, from a range whose end is durable; in a replay, the id of the first answer."""


class IdKind(IntEnum):
    INODE = 1
    CHUNK = 2
    SESSION = 3
    TASK = 4


# Names of the COUNTERS rows.
ID_LIMITS = {kind: b"limit/" + kind.name.lower().encode() for kind in IdKind}
EPOCH = b"epoch"
NUMBER = b"number"
TIME = b"time_ns"
BOOT = b"boot"
SURVIVED = b"survived/"
KEPT_CHUNKS = b"kept_chunks"
ALL_COUNTED = b"counted"

# -- keys ----------------------------------------------------------------------------------------------------------

_U64 = struct.Struct(">Q")
_U64_U64 = struct.Struct(">QQ")
_U32 = struct.Struct(">I")
_U32_U64 = struct.Struct(">IQ")
_U64_U32 = struct.Struct(">QI")
_U64_U64_U64 = struct.Struct(">QQQ")
_BY_CHUNK = struct.Struct(">QIQQ")

key_u64 = _U64.pack
key_u64_u64 = _U64_U64.pack
key_u32 = _U32.pack


def read_u64(data: bytes, offset: int = 0) -> int:
    value: int = _U64.unpack_from(data, offset)[0]
    return value


def inode_key(ino: int) -> bytes:
    return _U64.pack(ino)


def dentry_key(parent: int, name: bytes) -> bytes:
    return _U64.pack(parent) + name


def listing_key(parent: int, cookie: int) -> bytes:
    return _U64_U64.pack(parent, cookie)


def xattr_key(ino: int, name: bytes) -> bytes:
    return _U64.pack(ino) + name


def extent_key(ino: int, file_offset: int) -> bytes:
    return _U64_U64.pack(ino, file_offset)


def by_chunk_key(chunk: int, chunk_offset: int, ino: int, file_offset: int) -> bytes:
    return _BY_CHUNK.pack(chunk, chunk_offset, ino, file_offset)


def parse_by_chunk_key(key: bytes) -> tuple[int, int, int, int]:
    """chunk, chunk offset, ino, file offset."""
    return _BY_CHUNK.unpack(key)


def chunk_key(chunk: int) -> bytes:
    return _U64.pack(chunk)


def replica_key(chunk: int, server: int) -> bytes:
    return _U64_U32.pack(chunk, server)


def parse_replica_key(key: bytes) -> tuple[int, int]:
    return _U64_U32.unpack(key)


def by_server_key(server: int, chunk: int) -> bytes:
    return _U32_U64.pack(server, chunk)


def parse_by_server_key(key: bytes) -> tuple[int, int]:
    return _U32_U64.unpack(key)


def server_key(server: int) -> bytes:
    return _U32.pack(server)


def session_key(session: int) -> bytes:
    return _U64.pack(session)


def answer_key(session: int, operation: int) -> bytes:
    return _U64_U64.pack(session, operation)


def orphan_key(ino: int, session: int) -> bytes:
    return _U64_U64.pack(ino, session)


def trash_key(expires_ns: int, ino: int) -> bytes:
    return _U64_U64.pack(expires_ns, ino)


def link_key(ino: int, parent: int, cookie: int) -> bytes:
    return _U64_U64_U64.pack(ino, parent, cookie)


def quota_key(ino: int) -> bytes:
    return _U64.pack(ino)


def survived_key(epoch: int) -> bytes:
    return SURVIVED + _U64.pack(epoch)


def totals_key(table: int) -> bytes:
    return bytes([table])


def after(prefix: bytes) -> bytes:
    """The first key past all that start with ``prefix`` (which is not all 0xFF)."""
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1])


# -- rows ----------------------------------------------------------------------------------------------------------


class PackedRow(msgspec.Struct, gc=False):
    """A row of fixed-size fields; mutable: read, change, put back."""

    LAYOUT: ClassVar[struct.Struct]

    def pack(self) -> bytes:
        return self.LAYOUT.pack(*msgspec.structs.astuple(self))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*cls.LAYOUT.unpack(data))


class Inode(PackedRow):
    """See INODES. ``next_cookie`` of a directory is what its next entry gets; of what is in the trash it is when it
    expires (a directory that is restored counts on from there). Times in ns, signed."""

    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    allocated: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    btime_ns: int
    rdev: int
    flags: int
    generation: int
    truncate_generation: int
    data_version: int
    parent: int
    next_cookie: int
    storage_class: int

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<IIIIQQqqqqQIIIQQQI")

    def pack(self) -> bytes:
        # Spelled out: this is the hottest row, and building a tuple by reflection costs three times as much.
        return self.LAYOUT.pack(
            self.mode,
            self.uid,
            self.gid,
            self.nlink,
            self.size,
            self.allocated,
            self.atime_ns,
            self.mtime_ns,
            self.ctime_ns,
            self.btime_ns,
            self.rdev,
            self.flags,
            self.generation,
            self.truncate_generation,
            self.data_version,
            self.parent,
            self.next_cookie,
            self.storage_class,
        )

    def attributes(self, ino: int) -> Attributes:
        return Attributes(
            ino,
            self.mode,
            self.uid,
            self.gid,
            self.nlink,
            self.size,
            self.allocated,
            self.atime_ns,
            self.mtime_ns,
            self.ctime_ns,
            self.btime_ns,
            self.rdev,
            self.generation,
            self.truncate_generation,
            self.data_version,
            self.flags,
            self.storage_class,
        )


class Dentry(PackedRow):
    ino: int
    cookie: int
    type: int

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<QQB")


class Listed(msgspec.Struct, gc=False):
    ino: int
    type: int
    name: bytes

    def pack(self) -> bytes:
        return _LISTED.pack(self.ino, self.type) + self.name

    @classmethod
    def unpack(cls, data: bytes) -> "Listed":
        ino, type_ = _LISTED.unpack_from(data)
        return cls(ino, type_, data[_LISTED.size :])


_LISTED = struct.Struct("<QB")


class ExtentRow(PackedRow):
    length: int
    chunk: int
    chunk_offset: int

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<QQI")


class Chunk(PackedRow):
    """See CHUNKS. ``kind`` 0: data. ``layout`` 0: whole copies. ``copies``: how many are wanted."""

    state: int
    kind: int
    layout: int
    copies: int
    length: int
    entries: int
    chain: int
    live: int
    owner: int
    created_ns: int
    storage_class: int

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<BBBBIIIQQqI")

    @property
    def status(self) -> ChunkState:
        return ChunkState(self.state)


class Replica(PackedRow):
    state: int
    fragment: int
    length: int
    entries: int
    chain: int

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<BBIII")

    @property
    def good(self) -> bool:
        return self.state == ReplicaState.GOOD


class Total(PackedRow):
    """See TOTALS."""

    count: int
    checksums: int

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<QI")


class Tree(PackedRow):
    """See TREES. ``files``: inodes that are no directories; ``allocated`` and ``size``: sums of theirs."""

    files: int
    directories: int
    allocated: int
    size: int

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<QQQQ")


class Boot(PackedRow):
    """See COUNTERS. ``boot_id`` of the machine's life in which the epoch ran: in another one the page cache, and with
    it the log's tail, may be gone. ``clean``: the epoch was ended on purpose with everything synced. ``lost``: a tail
    may have been lost, and the reconnect window in which it is sent again has not been closed since.
    """

    boot_id: bytes
    clean: bool
    lost: bool

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<16s??")


class PackedMessage(msgspec.Struct, array_like=True):
    """A row that is read rarely: msgpack, new fields at the end with a default."""

    def pack(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return msgspec.msgpack.decode(data, type=cls)


class Server(PackedMessage):
    """A chunkserver that has registered. Its state is not stored: it follows from heartbeats (``members.py``).
    ``was_lost``: it was LOST, or removed, and has not read back all it has since it returned."""

    name: str
    host: str
    port: int
    http_port: int
    rack: str
    labels: list[str]
    data_path: str
    capacity: int
    draining: bool = False
    device: str = ""
    was_lost: bool = False


class Session(PackedMessage):
    """A mount. ``acknowledged``: answers up to this operation have arrived there. ``root``: inode it was given."""

    host: str
    mountpoint: str
    pid: int
    root: int
    read_only: bool
    created_ns: int
    acknowledged: int = 0


class Trashed(PackedMessage):
    """See TRASH. The inode was called ``name`` in directory ``parent``, which may be in the trash, too.
    ``allocated``: as the inode's when its last descriptor was closed; ``host``: whose mount deleted it."""

    parent: int
    name: bytes
    deleted_ns: int
    allocated: int
    directory: bool
    host: str = ""


class Quota(PackedMessage):
    """Limits in bytes (of data, one copy) and inodes, 0: none. ``*_since_ns``: since when usage is above the soft one,
    0: it is not; after ``grace_ns`` of that the soft limit is a hard one."""

    bytes_soft: int
    bytes_hard: int
    inodes_soft: int
    inodes_hard: int
    grace_ns: int
    bytes_since_ns: int = 0
    inodes_since_ns: int = 0


class StoredAnswer(PackedMessage):
    """``response`` is an encoded ``wire.Response``, or "" with ``code`` and ``text`` for a withdrawn operation."""

    response: bytes
    code: int = 0
    text: str = ""


class TaskKind(IntEnum):
    REMOVE_INODE = 1
    TRUNCATE = 2
    EVICT_SESSION = 3
    REMOVE_SERVER = 4
    SET_COPIES = 5
    COUNT_TREES = 6


class Task(PackedMessage):
    """``subject`` is an inode, session or server by kind; ``position`` where to go on. SET_COPIES: ``value`` is the
    number of copies (0: the default), ``stack`` what is still to be walked (``copies.py``). COUNT_TREES:
    ``subject`` is the directory and ``position`` the cookie it is at, ``value`` how many names it has seen."""

    kind: TaskKind
    subject: int
    position: int = 0
    value: int = 0
    stack: list[tuple[int, int]] = []

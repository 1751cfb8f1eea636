"""What can be asked of the metaserver: by mounts over the data plane (first part), and over HTTP/JSON (second part).

Times are ns since 1970, signed. Names, symlink targets and xattr values are bytes. Offsets, lengths and sizes are in
bytes. ``mode`` includes the file type (``S_IFMT``). Ids are 64-bit and never reused.

Changes carry an operation number in their envelope (see ``wire.Request``) and happen once per number.
"""

from enum import IntEnum, IntFlag
from typing import Annotated, ClassVar

import msgspec

from metaserver.wire import Empty, Message, Method

ROLE = "metaserver"
CLIENT_ROLE = "client"
ROOT_INO = 1
NAME_MAX = 255
SYMLINK_MAX = 4095
XATTR_NAME_MAX = 255
XATTR_VALUE_MAX = 64 << 10
XATTR_LIST_MAX = 64 << 10
# ext4 has 65,000; the counter here is 32-bit.
LINK_MAX = 0x7FFFFFFF
FILE_SIZE_MAX = (1 << 63) - 1
# One page of a listing or an extent map: its encoding stays well below wire.BODY_LIMIT.
PAGE_ENTRIES = 1000
# In one message.
TOUCH_INODES = 256
# One commit: at most so many extents and files in all, so that its transaction stays below 4,096 rows.
COMMIT_EXTENTS = 1000
# Extents that ride along with lookup and open; longer maps are fetched with GET_EXTENTS.
INLINE_EXTENTS = 16
CHUNK_CAPACITY = 64 << 20

# -- data plane: what things look like ---------------------------------------------------------------------------


class Attributes(Message):
    """An inode as the metaserver knows it. ``allocated`` is the number of bytes its extents cover.

    ``data_version`` grows with every change to the contents or size, so that a mount can keep what it has cached.
    ``flags`` are :class:`InodeFlags`. ``copies`` is how many copies of its data are wanted; 0: the cluster's default.
    """

    ino: int
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
    generation: int
    truncate_generation: int
    data_version: int
    flags: int
    copies: int = 0


class InodeFlags(IntFlag):
    """HAS_XATTRS unset lets a mount answer ENODATA without asking (the kernel asks before every write). IN_TRASH:
    deleted, and kept for a while. HAS_TRASH: a directory from which something was deleted that was kept. COUNTED
    is the metaserver's business (``schema.py``)."""

    NONE = 0
    HAS_XATTRS = 1
    IN_TRASH = 2
    HAS_TRASH = 4
    COUNTED = 8


class Extent(Message):
    """``length`` bytes of a file from ``file_offset`` on are in ``chunk`` from logical ``chunk_offset`` on."""

    file_offset: int
    length: int
    chunk: int
    chunk_offset: int


class ChunkPlace(Message):
    """Where a chunk's good replicas are, the best to read from first."""

    chunk: int
    servers: tuple[int, ...]


class FileMap(Message):
    """Part of a file's extents, sorted; holes have none. ``end`` is the file offset up to which it is complete."""

    extents: tuple[Extent, ...]
    places: tuple[ChunkPlace, ...]
    end: int


class Entry(Message):
    """An inode, with its extents if the map is short (``map`` complete), and the target if it is a symlink. ``quota``,
    told with OPEN and MAKE: the directory with the innermost quota that limits what is written to it, 0 if there is
    none."""

    attributes: Attributes
    map: FileMap | None = None
    target: bytes = b""
    quota: int = 0


class DirectoryEntry(Message):
    """``cookie`` continues the listing after this entry; ``attributes`` is there only if asked for."""

    name: bytes
    ino: int
    type: int
    cookie: int
    attributes: Attributes | None = None


class ServerAddress(Message):
    """A chunkserver as others need it: the data plane's address and the state (``ServerState``)."""

    server: int
    host: str
    port: int
    rack: str
    state: int


class ServerState(IntEnum):
    """UP; three heartbeats missed (DOWN); missing for ``lost_after`` (LOST); being emptied (DRAINING)."""

    UP = 1
    DOWN = 2
    LOST = 3
    DRAINING = 4


class ChunkState(IntEnum):
    """OPEN: one session appends. SEALED: never changes again. DEAD: nothing refers to it, its replicas are deleted.
    FILLING: the cleaner collects live blocks of others in it; nothing refers to it yet, and a restart of the metaserver
    makes it DEAD.
    """

    OPEN = 1
    SEALED = 2
    DEAD = 3
    FILLING = 4


class ReplicaState(IntEnum):
    """GOOD counts as a copy; UNSURE does not until it was sealed or verified; COPYING and DELETING are orders under
    way; BAD is useless as a whole."""

    GOOD = 1
    UNSURE = 2
    COPYING = 3
    DELETING = 4
    BAD = 5


# -- data plane: sessions ----------------------------------------------------------------------------------------


class Opened(Message):
    ino: int
    writing: bool


class LastNumber(Message):
    """The newest change of an earlier ``epoch`` that survived."""

    epoch: int
    number: int


class OpenSession(Message):
    """Starts a session, or returns to ``session`` (0: a new one). ``subdirectory`` becomes the root (``/`` paths).

    A returning client goes on with DECLARE pages of what it has open, RESEND pages, and then RESUME_DONE, before
    anything else; a new one starts at once. STALE_SESSION: it was evicted, start a new one.
    """

    session: int
    host: str
    mountpoint: str
    pid: int
    subdirectory: bytes
    read_only: bool


class SessionOpened(Message):
    """``survived`` tells which answered changes of the epochs before this one need to be sent again. ``steady_ms`` is
    the metaserver's steady clock now (0: it has none), which no setting of the time moves: ``Request.expires_ms`` is
    meant on it."""

    session: int
    epoch: int
    cluster_id: str
    root: Attributes
    survived: tuple[LastNumber, ...]
    server_time_ns: int
    keep_alive_seconds: float
    deadline_seconds: float
    copies: int
    steady_ms: int = 0


class Declare(Message):
    """What the client has open, after a reconnection."""

    opened: tuple[Opened, ...]
    withdrawn: tuple[int, ...]


class Lost(Message):
    """One change to be done again: its operation number, method and encoded ``wire.Request`` (with ``replay`` set if
    it had been answered)."""

    operation: int
    method: int
    request: bytes


class Resend(Message):
    """Changes to be done again, in the order of their operation numbers."""

    changes: tuple[Lost, ...]


class Resent(Message):
    """Answer to one resent change: an encoded ``wire.Response``, or a code and text (as in an ERROR frame)."""

    operation: int
    response: bytes
    code: int
    text: str


class ResumeDone(Message):
    """Everything is declared and resent; answered when the reconnect window has closed."""


class Resumed(Message):
    """Answers to what was resent. ``more``: not all fit; RESUME_DONE again brings the next ones."""

    results: tuple[Resent, ...]
    more: bool = False


class SetFileCopies(Message):
    """Begins to give a file, or a directory and all below it, another number of copies; 0: the cluster's default. The
    mount has seen to it that whoever asks may."""

    ino: int
    copies: int


class StatusText(Message):
    """A :class:`Status` as JSON; without its sessions if it is too long otherwise."""

    status: bytes


class KeepAlive(Message):
    """``acknowledged``: answers to operations up to this number have arrived and may be forgotten."""

    acknowledged: int
    dirty_bytes: int


class KeptAlive(Message):
    """``steady_ms`` as in :class:`SessionOpened`. ``short``: there is little space left, what is not needed should be
    given back soon."""

    server_time_ns: int
    steady_ms: int = 0
    short: bool = False


class Sync(Message):
    """Answered when the log is on stable storage up to ``number`` of this epoch."""

    number: int


# -- data plane: names and attributes ----------------------------------------------------------------------------


class Lookup(Message):
    """``name`` may be ``..`` (for NFS-like access by inode); ``.`` is the directory itself."""

    parent: int
    name: bytes


class GetAttributes(Message):
    ino: int


class SetAttributes(Message):
    """Changes what is not None. ``*_now`` takes the metaserver's clock. A changed ``size`` counts up the truncate
    generation and the data version, frees extents past it and updates mtime and ctime."""

    ino: int
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    atime_now: bool = False
    mtime_now: bool = False
    ctime_ns: int | None = None


class Touch(Message):
    """Somebody has read the inode at ``atime_ns``, when its time of access was ``seen_ns``."""

    ino: int
    seen_ns: int
    atime_ns: int


class TouchInodes(Message):
    """Moves times of access, at most TOUCH_INODES of them, and nothing else: no ctime, no data version, and other
    sessions are not told. What cannot be done is left, which is no error: see :class:`Touched`. Not logged as an
    operation of the session, and not sent again when it is lost."""

    touches: tuple[Touch, ...]


class Touched(Message):
    """``left`` are the inodes that keep the time of access they have: it is not the one seen any more, they are gone,
    or nothing can be changed at present (read-only, or the disk is full)."""

    left: tuple[int, ...]


class ReadDirectory(Message):
    """A page of a directory after ``cookie`` (0: from the start). ``.`` and ``..`` are not part of it.

    Cookies are stable: an entry that exists during the whole listing is returned exactly once. With ``after``, the page
    begins after the entry of that name instead (NOT_FOUND if there is none).
    """

    ino: int
    cookie: int
    count: int
    attributes: bool
    after: bytes = b""


class DirectoryPage(Message):
    """``end``: there is nothing after it. ``last``: the highest cookie given out in this directory so far; what is made
    later has a higher one, so that a listing can end although others go on making entries. 0: not told."""

    entries: tuple[DirectoryEntry, ...]
    end: bool
    last: int = 0


class Make(Message):
    """Creates a directory entry with a new inode: any type of ``mode``. ``target`` for symlinks, ``rdev`` for devices.

    ``open`` also registers the new file as opened for writing by this session (a directory: for reading). With
    ``exclusive`` false an existing regular file is opened instead (its attributes come back, nothing is changed).
    """

    parent: int
    name: bytes
    mode: int
    uid: int
    gid: int
    rdev: int = 0
    target: bytes = b""
    open: bool = False
    exclusive: bool = True


class Made(Message):
    entry: Entry
    created: bool


class Unlink(Message):
    """Removes a name; ``directory`` says whether rmdir or unlink was asked for. ``uid`` is for the sticky bit."""

    parent: int
    name: bytes
    directory: bool


class Unlinked(Message):
    """The inode whose name it was and how many names remain; ``orphan``: it lives until it is closed. ``kept``: it is
    in the trash, and what is still unwritten of it belongs there, too."""

    ino: int
    nlink: int
    orphan: bool
    kept: bool = False


class RenameFlags(IntFlag):
    NONE = 0
    NOREPLACE = 1
    EXCHANGE = 2


class Rename(Message):
    parent: int
    name: bytes
    new_parent: int
    new_name: bytes
    flags: int


class Renamed(Message):
    """The inode that moved, and the one that lost its name by it (0: none), which may be ``kept`` as in Unlinked."""

    ino: int
    replaced: int
    replaced_nlink: int
    kept: bool = False


class Link(Message):
    ino: int
    new_parent: int
    new_name: bytes


class GetXattr(Message):
    ino: int
    name: bytes


class XattrValue(Message):
    value: bytes


class XattrFlags(IntFlag):
    NONE = 0
    CREATE = 1
    REPLACE = 2


class SetXattr(Message):
    ino: int
    name: bytes
    value: bytes
    flags: int


class ListXattrs(Message):
    ino: int


class XattrNames(Message):
    names: tuple[bytes, ...]


class RemoveXattr(Message):
    ino: int
    name: bytes


class Open(Message):
    """Registers that this session has ``ino`` open; needed once per inode and session, again to go from reading to
    writing. Other sessions' unflushed data is fetched first (FLUSH). Answers with the up-to-date attributes and map."""

    ino: int
    writing: bool


class Close(Message):
    """Inodes of which this session has no descriptor left, and no dirty data."""

    inos: tuple[int, ...]


class GetExtents(Message):
    """A page of a file's map from ``offset`` on, as far as ``offset + length``."""

    ino: int
    offset: int
    length: int


class StatFs(Message):
    ino: int


class FsStats(Message):
    """``total`` and ``free`` are bytes that can be stored with as many copies as ``StatFs.ino`` is to have, or as a
    quota on its directory, or one above, allows. ``free_inodes``: how many more may be made, -1: as many as one
    likes."""

    total: int
    free: int
    inodes: int
    free_inodes: int = -1


# -- data plane: chunks ------------------------------------------------------------------------------------------


class Allocate(Message):
    """Asks for a new chunk to write; ``avoid`` are servers that just failed this client, or are slow: only used if
    there are not enough others for all copies. ``never`` are servers that do not answer it: only used if there are
    not even enough others for the fewest copies that data is written with (``min_copies``); repair makes the rest.
    ``copies``: for files of which so many are wanted; 0: the cluster's default. ``needed``: a chunk that
    takes so many bytes is enough; 0: a whole one is wanted. ``host``: the names and addresses by which a chunkserver on
    the writer's host would be known, with blanks between them: the first copy goes there."""

    host: str
    avoid: tuple[int, ...]
    copies: int = 0
    never: tuple[int, ...] = ()
    needed: int = 0


class Allocated(Message):
    """An OPEN chunk owned by this session, ``limit`` bytes reserved for it on each of ``servers``, in the order in
    which appends pass through them. Fewer servers than copies: not enough are up, repair follows."""

    chunk: int
    servers: tuple[ServerAddress, ...]
    copies: int
    limit: int = CHUNK_CAPACITY


class ChunkProgress(Message):
    """What of a chunk is on stable storage on all its replicas: stored length, entries, and their chain."""

    chunk: int
    length: int
    entries: int
    chain: int


class FileCommit(Message):
    """New contents of one inode. The file extends to at least ``extends_to``; ``mtime_ns`` None leaves times alone.

    ``extents`` refer to chunks of this session; bytes they cover replace what was there.
    """

    ino: int
    truncate_generation: int
    extends_to: int
    mtime_ns: int | None
    extents: tuple[Extent, ...]


class Commit(Message):
    """Makes written data part of files, all at once. NOT_OWNER if a chunk is not this session's, INVALID if a range is
    past its progress; a file that is gone (STALE_INODE) is skipped and listed in the answer.

    ``durable``: somebody waits in fsync(2); the answer comes once the commit and all before it are on stable storage.
    """

    chunks: tuple[ChunkProgress, ...]
    files: tuple[FileCommit, ...]
    durable: bool = False


class Committed(Message):
    """Attributes of the files after the commit, in the order asked; inos of files that are gone."""

    attributes: tuple[Attributes, ...]
    gone: tuple[int, ...]


class Reserve(Message):
    """Asks for room under the innermost quota above ``ino``: for ``wanted`` bytes in all that this session has written
    there, or is about to write, and not committed. Fewer than before gives some back. -1: only says which quota it
    is."""

    ino: int
    wanted: int


class Reserved(Message):
    """``quota``: the directory with that quota; 0: nothing limits what is written. ``granted`` bytes are the session's
    now until it commits them; less than wanted if there are no more. ``wait``: others will give some back, or use
    it, within moments."""

    quota: int
    granted: int = 0
    wait: bool = False


class Seal(Message):
    """Ends an OPEN chunk at its committed length. ``failed`` replicas become UNSURE."""

    chunk: int
    failed: tuple[int, ...]


class Locate(Message):
    """Asks again where chunks are, after a read failed everywhere."""

    chunks: tuple[int, ...]


class Located(Message):
    """Chunks that no longer exist are left out."""

    places: tuple[ChunkPlace, ...]


class Servers(Message):
    servers: tuple[ServerAddress, ...]


class ReportReplica(Message):
    """A replica that answered with wrong bytes or not at all (an ``ErrorCode``)."""

    chunk: int
    server: int
    code: int
    text: str


# -- data plane: pushes to the client ----------------------------------------------------------------------------


class Flush(Message):
    """Another session wants to see ``inos``: commit what is dirty, then answer with FLUSHED and the same ``ticket``."""

    ticket: int
    inos: tuple[int, ...]


class Flushed(Message):
    ticket: int


class Changed(Message):
    """Another session changed these inodes or the entries of these directories: drop what is cached."""

    inos: tuple[int, ...]


class Retire(Message):
    """These chunks of the session have a replica that cannot be relied on (only a sealed chunk can be repaired), or one
    on a server that is being emptied: write no more to them, and seal them once what was written there is committed.
    May come again."""

    chunks: tuple[int, ...]


OPEN_SESSION = Method(1, "open_session", OpenSession, SessionOpened)
DECLARE = Method(2, "declare", Declare, Empty)
RESEND = Method(3, "resend", Resend, Empty)
RESUME_DONE = Method(4, "resume_done", ResumeDone, Resumed)
KEEP_ALIVE = Method(5, "keep_alive", KeepAlive, KeptAlive)
CLOSE_SESSION = Method(6, "close_session", Empty, Empty)
SYNC = Method(7, "sync", Sync, Empty)

LOOKUP = Method(10, "lookup", Lookup, Entry)
GET_ATTRIBUTES = Method(11, "get_attributes", GetAttributes, Entry)
SET_ATTRIBUTES = Method(12, "set_attributes", SetAttributes, Attributes)
READ_DIRECTORY = Method(13, "read_directory", ReadDirectory, DirectoryPage)
MAKE = Method(14, "make", Make, Made)
UNLINK = Method(15, "unlink", Unlink, Unlinked)
RENAME = Method(16, "rename", Rename, Renamed)
LINK = Method(17, "link", Link, Attributes)
GET_XATTR = Method(18, "get_xattr", GetXattr, XattrValue)
SET_XATTR = Method(19, "set_xattr", SetXattr, Empty)
LIST_XATTRS = Method(20, "list_xattrs", ListXattrs, XattrNames)
REMOVE_XATTR = Method(21, "remove_xattr", RemoveXattr, Empty)
OPEN = Method(22, "open", Open, Entry)
CLOSE = Method(23, "close", Close, Empty)
GET_EXTENTS = Method(24, "get_extents", GetExtents, FileMap)
STAT_FS = Method(25, "stat_fs", StatFs, FsStats)
TOUCH = Method(26, "touch", TouchInodes, Touched)

ALLOCATE = Method(40, "allocate", Allocate, Allocated)
COMMIT = Method(41, "commit", Commit, Committed)
SET_COPIES = Method(80, "set_copies", SetFileCopies, Empty)
GET_STATUS = Method(81, "get_status", Empty, StatusText)
SEAL = Method(42, "seal", Seal, Empty)
LOCATE = Method(43, "locate", Locate, Located)
LIST_SERVERS = Method(44, "list_servers", Empty, Servers)
REPORT_REPLICA = Method(45, "report_replica", ReportReplica, Empty)

FLUSH = Method(60, "flush", Flush, Empty)
FLUSHED = Method(61, "flushed", Flushed, Empty)
CHANGED = Method(62, "changed", Changed, Empty)
RETIRE = Method(63, "retire", Retire, Empty)
RESERVE = Method(64, "reserve", Reserve, Reserved)
# Push: quotas have come, gone or changed; which one a file is under has to be asked again.
QUOTAS_CHANGED = Method(65, "quotas_changed", Empty, Empty)

# Methods that change metadata: they carry an operation number, are logged, and are resent when lost.
CHANGES = frozenset(
    method.number
    for method in (SET_ATTRIBUTES, MAKE, UNLINK, RENAME, LINK, SET_XATTR, REMOVE_XATTR, ALLOCATE, COMMIT, SEAL)
)

# -- control plane: HTTP/JSON ------------------------------------------------------------------------------------
# POST /v1/servers/register          Register -> Registered
# POST /v1/servers/{server}/report   ReportPage -> Empty JSON object; pages in order, before heartbeats count
# POST /v1/servers/{server}/heartbeat  Heartbeat -> HeartbeatReply
# GET  /v1/status                    Status (what `dfs status` shows)
# GET  /v1/chunks/{ino}              FileStatus, the chunk map of a file (also as /v1/files/{ino})
# POST /v1/servers/{server}/drain    Draining -> Planned, 409 if the others cannot take it; also .../undrain
# POST /v1/servers/{server}/remove   Removal -> Planned, 409 if it runs or has the only copy of something
# GET  /v1/copies/{ino}              CopiesStatus
# POST /v1/copies/{ino}              SetCopies -> CopiesStatus
# GET  /v1/rebalance                 RebalanceStatus
# POST /v1/rebalance                 Rebalance -> RebalanceStatus
# GET  /v1/missing                   list of MissingFile
# GET  /v1/trees/{ino}               TreeStatus, what is in a directory and all below
# GET  /v1/quotas                    list of QuotaStatus;  GET /v1/quotas/{ino}
# POST /v1/quotas/{ino}              SetQuota -> QuotaStatus;  POST /v1/quotas/{ino}/remove -> QuotaStatus
# GET  /v1/trash?path=&after=&count=  TrashPage
# POST /v1/trash/restore             TrashRestore -> list of TrashRestored
# POST /v1/trash/empty               TrashEmpty -> TrashEmptied
#   (in these {server} is a number or a name)
# GET  /v1/check                     CheckReport;  POST /v1/snapshot makes a snapshot file
# GET  /servers                      list of ServerStatus;  GET /metrics;  GET /health (without a token)
# Errors are a 4xx or 5xx with {"code": ErrorCode name, "text": one line}.

HTTP_BODY_LIMIT = 4 << 20
REPORT_PAGE = 5000


class Json(msgspec.Struct, forbid_unknown_fields=False):
    """Base of what travels as a JSON object."""


class Register(Json):
    """A chunkserver's start. ``incarnation`` is new in each life of the process; ``cluster_id`` is "" on a first start.

    ``highest_epoch`` and ``highest_chunk`` are the largest ever seen there: they prove a metaserver's rollback.
    Servers with the same ``device`` (if not "") share one filesystem, whose space counts once.
    """

    server: int
    name: str
    cluster_id: str
    incarnation: int
    host: str
    port: int
    http_port: int
    rack: str
    labels: list[str]
    data_path: str
    capacity: int
    free: int
    highest_epoch: int
    highest_chunk: int
    version: int
    device: str = ""


class Registered(Json):
    cluster_id: str
    epoch: int
    heartbeat_seconds: float


class ReplicaReport(Json):
    """One replica as found on disk. ``sealed`` as in the file's header; ``created_here``: by the reporting process, so
    that it still accepts appends; ``error`` is an ``ErrorCode`` name if the replica is known to be bad."""

    chunk: int
    length: int
    entries: int
    chain: int
    sealed: bool
    error: str = ""


class ReportPage(Json):
    """Full listing at registration, sorted by chunk, at most ``REPORT_PAGE`` replicas a page."""

    incarnation: int
    page: int
    last: bool
    replicas: list[ReplicaReport]


class OrderKind(IntEnum):
    COPY = 1
    DELETE = 2
    SEAL = 3
    VERIFY = 4
    COMPACT = 5


class CompactSource(Json):
    """A sealed chunk of which the bytes in ``ranges`` are wanted: [start, stop) of logical offsets, sorted, disjoint.
    ``length``, ``entries`` and ``chain`` are the chunk's; ``host`` and ``port`` of a server that has it."""

    chunk: int
    length: int
    entries: int
    chain: int
    server: int
    host: str
    port: int
    ranges: list[tuple[int, int]]


class CopySource(Json):
    """A server that has a replica of a chunk, damaged as far as is known."""

    server: int
    host: str
    port: int


class Order(Json):
    """What the metaserver wants done. ``order`` is unique per epoch; orders on one chunk come one at a time.

    COPY: take the sealed chunk from ``source``; with ``others`` no replica is known to be whole, and each block comes
    from whichever of these servers has it undamaged; with ``replace`` the new replica takes the place of a useless one,
    once it is complete. SEAL: cut to length, entries and chain, mark sealed (fail if shorter or different). DELETE:
    remove. COMPACT: make the new, sealed chunk of the wanted bytes of ``sources``, in the order
    of inode and file offset, so that neighbours in a file become neighbours in the chunk; as many as fit.
    ``makes_room``: it leads to bytes being freed, and may use a part of the space that is kept free on the disk.
    Refused if ``epoch`` is below the highest the chunkserver has stored.
    """

    order: int
    epoch: int
    kind: OrderKind
    chunk: int
    length: int = 0
    entries: int = 0
    chain: int = 0
    source_server: int = 0
    source_host: str = ""
    source_port: int = 0
    sources: list[CompactSource] = []
    makes_room: bool = False
    others: list[CopySource] = []
    replace: bool = False


class OrderResult(Json):
    """``error`` is "" or an ``ErrorCode`` name; ``replica`` is the state after the order, if there is one.

    ``moves`` says where a COMPACT has put things: (source chunk, logical offset there, length, logical offset in the
    new chunk), in the order of the new chunk, neighbours joined. ``source``: the chunk that a failed COMPACT could not
    get right bytes of, 0 if that is not what was wrong.
    """

    order: int
    epoch: int
    error: str
    text: str = ""
    replica: ReplicaReport | None = None
    moves: list[tuple[int, int, int, int]] = []
    source: int = 0


class ScrubStatus(Json):
    """How far a chunkserver's scrubber is in its present pass over all replicas. ``done_bytes`` of ``total_bytes``;
    ``pass_seconds`` since it began; ``bytes_per_second`` of late; ``bad`` replicas found since the process started;
    ``last_pass_seconds``: how long the last complete pass took, 0 if there was none."""

    done_bytes: int
    total_bytes: int
    pass_seconds: float
    bytes_per_second: float
    bad: int
    last_pass_seconds: float = 0.0
    # Since the end of the last complete pass; meaningless if there was none.
    since_pass_seconds: float = 0.0


class Heartbeat(Json):
    """``number`` counts from 1 in each incarnation; ``changes`` and ``results`` since the last acknowledged one.
    ``stored``: bytes that its replicas take up, headers and indexes included; -1: not known. ``free`` and
    ``spare``: see ``space.py``."""

    incarnation: int
    number: int
    capacity: int
    free: int
    chunks: int
    disk_state: str
    changes: list[ReplicaReport]
    gone: list[int]
    results: list[OrderResult]
    read_bytes: int
    written_bytes: int
    scrub: ScrubStatus | None = None
    stored: int = -1
    spare: int = 0
    # Why the disk is FAILED.
    disk_error: str = ""


class HeartbeatReply(Json):
    """``register_again``: this metaserver does not know the incarnation (it restarted): register and report anew.
    ``chunk_limit``: no chunk has a number from this one on."""

    epoch: int
    acknowledged: int
    register_again: bool
    orders: list[Order]
    chunk_limit: int = 0


class ServerStatus(Json):
    server: int
    name: str
    state: str
    host: str
    port: int
    http_port: int
    rack: str
    data_path: str
    capacity: int
    free: int
    reserved: int
    chunks: int
    last_heartbeat_seconds: float
    disk_state: str = ""
    # Replicas that still have to leave it, while it is DRAINING.
    to_move: int = 0
    scrub: ScrubStatus | None = None
    # Their bytes; how many of them are still written to; and for how many there is no other server.
    to_move_bytes: int = 0
    to_move_open: int = 0
    to_move_stuck: int = 0
    # What its replicas take up; -1: it has not told.
    stored: int = -1
    # Why its disk is FAILED.
    disk_error: str = ""
    labels: list[str] = []


class SessionStatus(Json):
    session: int
    host: str
    mountpoint: str
    connected: bool
    idle_seconds: float
    opened: int
    dirty_bytes: int


class ChunkHealth(Json):
    """Number of live chunks by how many good copies they have against what is wanted."""

    total: int
    healthy: int
    too_few: int
    missing: int
    open: int
    dead: int


class CleanerStatus(Json):
    """What the cleaner is doing. ``candidates``: chunks worth rewriting, as far as known, and ``dead_bytes`` what that
    would free at one copy; ``cleaning``: chunks being rewritten now; ``moved_bytes``, ``freed_chunks`` and
    ``freed_bytes`` (at one copy) since the metaserver's start; ``failed`` attempts."""

    candidates: int = 0
    dead_bytes: int = 0
    cleaning: int = 0
    moved_bytes: int = 0
    freed_chunks: int = 0
    freed_bytes: int = 0
    failed: int = 0


class RepairStatus(Json):
    """Copies that are missing: of so many chunks, with so many bytes; copies of any kind that are under way; bytes a
    second that were copied of late, and how long the rest takes at that rate (0: not known)."""

    chunks: int = 0
    bytes: int = 0
    under_way: int = 0
    bytes_per_second: float = 0.0
    seconds_left: float = 0.0
    # Chunks that have a better place, or a copy too many, and wait for their turn.
    to_move: int = 0
    to_delete: int = 0


class TrashStatus(Json):
    """Deleted ``files`` (directories and links among them) that are kept, and the bytes of their contents. ``seconds``:
    how long, where nothing else was chosen. ``counted`` false: the metaserver has just started, there are more."""

    files: int
    bytes: int
    seconds: float
    counted: bool


class TrashEntry(Json):
    """Something deleted: ``path`` from the root is where it would be restored to; it begins with ``?`` if its directory
    is gone for good. ``kind``: file, link or directory. ``host``: where it was deleted."""

    id: int
    path: str
    kind: str
    size: int
    uid: int
    gid: int
    deleted_ns: int
    expires_ns: int
    host: str


class TrashPage(Json):
    """``next`` goes on with the listing; "": there is nothing more."""

    entries: list[TrashEntry]
    next: str


class TrashRestore(Json):
    """Restores these entries to where they were; with ``name`` (base64), one of them to that name in directory
    ``parent``."""

    ids: list[int]
    parent: int = 0
    name: bytes = b""


class TrashRestored(Json):
    """Where an entry is again; or ``error``, an ``ErrorCode`` name, and why."""

    id: int
    path: str
    error: str = ""
    text: str = ""


class TrashEmpty(Json):
    """Purges what is at or below ``path`` ("": all) and was deleted so long ago; page by page as in TrashPage."""

    path: str = ""
    older_than_seconds: float = 0.0
    after: str = ""


class TrashEmptied(Json):
    """What this page has purged; ``next`` as in TrashPage."""

    files: int
    bytes: int
    next: str


class RebalanceStatus(Json):
    """``mode``: IDLE, BY_ITSELF, ASKED or STOPPED. ``unevenness``: by how much of its space the fullest server is
    fuller than the emptiest. ``moved_*`` since it began; ``excess_bytes`` would have to move for all to be even."""

    mode: str
    unevenness: float
    under_way: int
    moved_chunks: int
    moved_bytes: int
    excess_bytes: int


class Status(Json):
    cluster_id: str
    epoch: int
    number: int
    durable: int
    version: str
    copies: int
    up_seconds: float
    window_open: bool
    servers: list[ServerStatus]
    sessions: list[SessionStatus]
    chunks: ChunkHealth
    inodes: int
    total: int
    free: int
    tasks: int
    orders: int
    # Why nothing can be changed at present; "" if it can.
    read_only: str = ""
    repair: RepairStatus | None = None
    rebalance: RebalanceStatus | None = None
    # Trees that are being given another number of copies.
    setting_copies: int = 0
    cleaner: CleanerStatus = msgspec.field(default_factory=CleanerStatus)
    # The metaserver's own disk is full: only what frees space goes on. ``unprotected``: its store cannot be rebuilt
    # from snapshot and changelog until a snapshot file can be made.
    metaserver_full: bool = False
    unprotected: bool = False
    # How long ago old segments of the changelog and snapshot files were read back, -1: not since the start; and what
    # was wrong with them then. A new snapshot file makes up for it, or it is ``unprotected``.
    recovery_checked_seconds: float = -1.0
    recovery_damage: list[str] = []
    # Why the last snapshot file could not be written or read back ("": it could); it is ``unprotected`` then.
    snapshot_failure: str = ""
    trash: TrashStatus | None = None


class Draining(Json):
    """``force``: begin although not everything can go elsewhere."""

    force: bool = False


class Removal(Json):
    """``lose``: although it has the only copy of something."""

    lose: bool = False


class Planned(Json):
    """What was begun with a server, in words."""

    server: int
    name: str
    text: str


class SetCopies(Json):
    """0: the cluster's default."""

    copies: int


class CopiesStatus(Json):
    """How many copies are wanted of an inode's data; ``own`` 0: as the cluster's ``default``. ``setting``: some tree is
    still being given another number."""

    ino: int
    own: int
    default: int
    directory: bool
    setting: bool


class QuotaStatus(Json):
    """A quota of the directory ``ino`` (``path`` from the root) and what is used of it, the directory itself not
    counted. 0: no such limit. ``*_grace_left``: seconds until the soft limit becomes a hard one; -1: it is not
    passed."""

    ino: int
    path: str
    used_bytes: int
    used_inodes: int
    bytes_soft: int
    bytes_hard: int
    inodes_soft: int
    inodes_hard: int
    grace_seconds: float
    bytes_grace_left: float
    inodes_grace_left: float


class SetQuota(Json):
    """None leaves a limit as it is (a new quota: none), 0 takes it away."""

    # As quota(8).
    DEFAULT_GRACE_SECONDS: ClassVar[int] = 7 * 24 * 3600

    bytes_soft: int | None = None
    bytes_hard: int | None = None
    inodes_soft: int | None = None
    inodes_hard: int | None = None
    grace_seconds: float | None = None


class TreeStatus(Json):
    """What is in a directory and all below, itself included; or what a file has. ``files`` are all that are no
    directories, each once; ``allocated`` and ``size`` bytes are theirs. ``quota`` if it has one itself."""

    ino: int
    directory: bool
    files: int
    directories: int
    allocated: int
    size: int
    quota: QuotaStatus | None = None


class Rebalance(Json):
    """Begin, or stop."""

    stop: bool = False


class MissingFile(Json):
    """A file with chunks of which no server that is up has a good copy; ``path`` from the root, "" if it has none."""

    ino: int
    path: str
    chunks: int


class ReplicaStatus(Json):
    server: int
    name: str
    host: str
    http_port: int
    state: str
    path: str


class ExtentStatus(Json):
    """One row of ``dfs chunks``."""

    index: int
    file_offset: int
    length: int
    chunk: str
    chunk_offset: int
    chunk_state: str
    replicas: list[ReplicaStatus]


class FileStatus(Json):
    ino: int
    size: int
    mtime_ns: int
    extents: list[ExtentStatus]


class Problem(Json):
    """One finding of ``check``: what invariant, where, in words."""

    table: str
    key: str
    text: str


class CheckReport(Json):
    rows: int
    problems: list[Problem]
    seconds: float


# What a join token may be valid for.
LONGEST_JOIN_SECONDS = 7 * 86400.0


class MakeJoinToken(Json):
    """``once``: for one host only."""

    seconds: Annotated[float, msgspec.Meta(gt=0, le=LONGEST_JOIN_SECONDS)] = 3600.0
    once: bool = False


class JoinTokenStatus(Json):
    """A token as the metaserver remembers it, without its secret (``joining.py``). ``id`` is hexadecimal; ``hosts``
    those that have got the key by it."""

    id: str
    cluster_id: str
    expires_ns: int
    once: bool
    hosts: list[str] = []


class JoinRequest(Json):
    """What a new host sends: see ``joining.py``. Bytes are base64 in JSON."""

    id: Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]
    public: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    name: Annotated[str, msgspec.Meta(max_length=255)]
    proof: Annotated[bytes, msgspec.Meta(max_length=64)]


class JoinReply(Json):
    public: bytes
    sealed: bytes


class Garbage(Json):
    """What ``dfs gc`` shows. DEAD chunks: how many, the bytes of all their replicas, how many of them are in their
    grace, and how long the last of those stays there. ``orphans``: files without a name that are still open, and their
    bytes. ``unknown_replicas``: of chunks that the metaserver does not know. ``cleanable_chunks``: mostly dead, worth
    rewriting, which would free so many bytes at one copy."""

    dead_chunks: int = 0
    dead_bytes: int = 0
    waiting_chunks: int = 0
    longest_wait_seconds: float = 0.0
    orphans: int = 0
    orphan_bytes: int = 0
    unknown_replicas: int = 0
    cleanable_chunks: int = 0
    cleanable_bytes: int = 0


class StoredEntry(Json):
    """One line of ``dfs ls``. ``copies`` wanted, ``own_copies`` 0: by the cluster's default. ``least_copies``: good
    ones on servers that are up, of the chunk that has the fewest. Of its ``chunks``, ``too_few`` have fewer than
    wanted, ``missing`` none, ``open`` are still written to. ``name`` is base64 in JSON, and empty for a file asked for
    itself.
    """

    name: bytes
    ino: int
    mode: int
    size: int
    allocated: int
    copies: int
    mtime_ns: int
    own_copies: int = 0
    chunks: int = 0
    least_copies: int = 0
    too_few: int = 0
    missing: int = 0
    open: int = 0


class EntryPage(Json):
    """``next``: the cookie to go on behind; 0 at the end."""

    entries: list[StoredEntry]
    next: int

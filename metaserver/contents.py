"""What an inode holds: attributes, size, and the map of its data. Synchronous, over one transaction.

**Truncate generations.** A commit carries the generation its session knew. Data that other sessions had before a
truncate is fetched by the FLUSH push before the truncate is carried out, and a session waits for its own commits
before it sends a truncate. So a commit of an *older* generation holds data written after the truncate by a session
that had not heard of it yet, and is accepted without clipping: clipping would lose acknowledged writes (until leases
make the order known). A generation from the future is INVALID.
"""

import stat
from collections.abc import Iterable

from metaserver import chunks, extents, xattrs
from metaserver.chunks import Rank
from metaserver.errors import DfsError, ErrorCode
from metaserver.extents import Budget, Live
from metaserver.inodes import STEP_EXTENTS, Effects, add_task, find, require, save
from metaserver.protocol import (
    COMMIT_EXTENTS,
    FILE_SIZE_MAX,
    INLINE_EXTENTS,
    PAGE_ENTRIES,
    Attributes,
    Commit,
    Committed,
    Entry,
    Extent,
    FileCommit,
    FileMap,
    GetExtents,
    SetAttributes,
    Touch,
    Touched,
)
from metaserver.schema import Inode, Table, TaskKind, Transaction, inode_key

# Extents that one commit may replace: a removed one costs two rows and may change a chunk, an added one costs two rows
# and perhaps an inode, so that 1,000 added and 300 removed stay below MAX_TRANSACTION_ROWS.
COMMIT_BUDGET = 300


def entry(tx: Transaction, ino: int, rank: Rank) -> Entry:
    return entry_of(tx, ino, require(tx, ino), rank)


def is_regular(inode: Inode) -> bool:
    return stat.S_ISREG(inode.mode)


def entry_of(tx: Transaction, ino: int, inode: Inode, rank: Rank) -> Entry:
    """Attributes with the map if it is short, or the target of a symlink."""
    attributes = inode.attributes(ino)
    kind = stat.S_IFMT(inode.mode)
    if kind == stat.S_IFREG:
        if not inode.allocated:
            return Entry(attributes, FileMap((), (), inode.size))
        found, end = extents.page(tx, ino, 0, inode.size, INLINE_EXTENTS)
        if end < inode.size:
            return Entry(attributes)
        return Entry(attributes, _file_map(tx, found, end, rank))
    if kind == stat.S_IFLNK:
        return Entry(attributes, None, tx.get(Table.SYMLINKS, inode_key(ino)) or b"")
    return Entry(attributes)


def get_extents(tx: Transaction, message: GetExtents, rank: Rank) -> FileMap:
    """A page of the map; past the size there are only holes."""
    inode = require(tx, message.ino)
    if message.offset < 0 or message.length < 0:
        raise DfsError(ErrorCode.INVALID)
    wanted = message.offset + message.length
    stop = min(wanted, inode.size)
    if stop <= message.offset:
        return FileMap((), (), wanted)
    found, end = extents.page(tx, message.ino, message.offset, stop, PAGE_ENTRIES)
    return _file_map(tx, found, wanted if end == stop else end, rank)


def _file_map(tx: Transaction, found: list[Extent], end: int, rank: Rank) -> FileMap:
    places = tuple(chunks.place(tx, chunk, rank) for chunk in dict.fromkeys(extent.chunk for extent in found))
    return FileMap(tuple(found), places, end)


def set_attributes(tx: Transaction, now_ns: int, message: SetAttributes, effects: Effects) -> Attributes:
    inode = require(tx, message.ino)
    if message.size is not None:
        _resize(tx, now_ns, message.ino, inode, message.size, effects)
    if message.mode is not None:
        inode.mode = stat.S_IFMT(inode.mode) | stat.S_IMODE(message.mode)
        xattrs.follow_mode(tx, message.ino, inode)
    if message.uid is not None:
        inode.uid = _owner(message.uid)
    if message.gid is not None:
        inode.gid = _owner(message.gid)
    if message.atime_now or message.atime_ns is not None:
        inode.atime_ns = now_ns if message.atime_now or message.atime_ns is None else _time(message.atime_ns)
    if message.mtime_now or message.mtime_ns is not None:
        inode.mtime_ns = now_ns if message.mtime_now or message.mtime_ns is None else _time(message.mtime_ns)
    inode.ctime_ns = now_ns if message.ctime_ns is None else _time(message.ctime_ns)
    save(tx, message.ino, inode)
    return inode.attributes(message.ino)


def touch(tx: Transaction, touches: Iterable[Touch]) -> Touched:
    """Moves times of access that are still those seen."""
    left: list[int] = []
    for told in touches:
        inode = find(tx, told.ino)
        if inode is None or inode.atime_ns != told.seen_ns:
            left.append(told.ino)
            continue
        inode.atime_ns = _time(told.atime_ns)
        save(tx, told.ino, inode)
    return Touched(tuple(left))


def _owner(number: int) -> int:
    if not 0 <= number < 0xFFFFFFFF:
        raise DfsError(ErrorCode.INVALID, f"{number} is no user or group")
    return number


def _time(time_ns: int) -> int:
    if not -(1 << 63) <= time_ns < 1 << 63:
        raise DfsError(ErrorCode.INVALID, "a time outside the years 1677 to 2262")
    return time_ns


def _resize(tx: Transaction, now_ns: int, ino: int, inode: Inode, size: int, effects: Effects) -> None:
    """truncate(2). A long tail is cut by a task; nobody sees it meanwhile, because it lies past the size."""
    if stat.S_ISDIR(inode.mode):
        raise DfsError(ErrorCode.IS_DIRECTORY)
    if not stat.S_ISREG(inode.mode) or size < 0:
        raise DfsError(ErrorCode.INVALID)
    if size > FILE_SIZE_MAX:
        raise DfsError(ErrorCode.FILE_TOO_BIG)
    if size < inode.size and inode.allocated:
        cut = extents.cut_step(tx, ino, size, STEP_EXTENTS)
        inode.allocated -= cut.freed
        effects.dead.extend(chunks.settle(tx, cut.live))
        if not cut.done:
            add_task(tx, TaskKind.TRUNCATE, ino, effects, size)
    if size != inode.size:
        inode.truncate_generation += 1
        inode.data_version += 1
        inode.size = size
    inode.mtime_ns = now_ns


def truncate_step(tx: Transaction, ino: int, position: int, effects: Effects) -> bool:
    """One step of a TRUNCATE task: whether it is finished."""
    row = tx.get(Table.INODES, inode_key(ino))
    if row is None:
        return True
    inode = Inode.unpack(row)
    cut = extents.cut_step(tx, ino, position, STEP_EXTENTS)
    inode.allocated -= cut.freed
    effects.dead.extend(chunks.settle(tx, cut.live))
    save(tx, ino, inode)
    return cut.done


def commit(tx: Transaction, now_ns: int, session: int, message: Commit, effects: Effects) -> Committed:
    """Makes written data part of files (design 7.4). Raises :class:`extents.TooManyRows` if it replaces too many
    extents for one transaction: then commit pieces of it first."""
    if sum(len(file.extents) for file in message.files) + len(message.files) > COMMIT_EXTENTS:
        raise DfsError(ErrorCode.INVALID, f"a commit of more than {COMMIT_EXTENTS} extents and files")
    lengths: dict[int, int] = {}
    for told in message.chunks:
        lengths[told.chunk] = chunks.progress(tx, session, told)
    live: Live = {}
    budget = Budget(COMMIT_BUDGET)
    attributes: list[Attributes] = []
    gone: list[int] = []
    for file in message.files:
        inode = find(tx, file.ino)
        if inode is None:
            gone.append(file.ino)
            continue
        _check_ranges(tx, session, file, lengths)
        _commit_file(tx, now_ns, inode, file, live, budget)
        attributes.append(inode.attributes(file.ino))
    effects.dead.extend(chunks.settle(tx, live))
    return Committed(tuple(attributes), tuple(gone))


def _commit_file(tx: Transaction, now_ns: int, inode: Inode, file: FileCommit, live: Live, budget: Budget) -> None:
    if not stat.S_ISREG(inode.mode) or file.truncate_generation > inode.truncate_generation:
        raise DfsError(ErrorCode.INVALID, f"inode {file.ino} has no such contents to commit to")
    size = max(inode.size, file.extends_to)
    for extent in file.extents:
        if inode.allocated:
            inode.allocated += extents.replace(tx, file.ino, extent, live, budget)
        else:
            inode.allocated = extents.insert_first(tx, file.ino, extent, live)
        size = max(size, extent.file_offset + extent.length)
    if size > FILE_SIZE_MAX:
        raise DfsError(ErrorCode.FILE_TOO_BIG)
    inode.size = size
    inode.data_version += 1
    if file.mtime_ns is not None:
        inode.mtime_ns = _time(file.mtime_ns)
        # The writer has shown this time as ctime already; it must not move again when the commit happens to come.
        inode.ctime_ns = max(inode.ctime_ns, min(inode.mtime_ns, now_ns))
    save(tx, file.ino, inode)


def _check_ranges(tx: Transaction, session: int, file: FileCommit, lengths: dict[int, int]) -> None:
    for extent in file.extents:
        length = lengths.get(extent.chunk)
        if length is None:
            length = lengths[extent.chunk] = chunks.require_owned(tx, extent.chunk, session).length
        if extent.file_offset < 0 or extent.length <= 0 or extent.file_offset + extent.length > FILE_SIZE_MAX:
            raise DfsError(ErrorCode.INVALID, f"an extent of inode {file.ino} outside of any file")
        if extent.chunk_offset < 0 or extent.chunk_offset + extent.length > length:
            raise DfsError(ErrorCode.INVALID, f"an extent past the {length} bytes of chunk {extent.chunk:x}")


def first_piece(tx: Transaction, file: FileCommit, extent: Extent, position: int) -> Extent:
    """The part of ``extent`` from file offset ``position`` that one transaction can put into the map."""
    skipped = position - extent.file_offset
    end = extents.boundary(tx, file.ino, position, extent.file_offset + extent.length, COMMIT_BUDGET - 1)
    return Extent(position, end - position, extent.chunk, extent.chunk_offset + skipped)

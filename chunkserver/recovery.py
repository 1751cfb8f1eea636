"""What a start finds on disk: every chunk file, how far it is, and whether it can be trusted. Blocking."""

import struct
from collections.abc import Iterator
from itertools import takewhile
from uuid import UUID

import structlog
from crc32c import crc32c

from chunkserver import chunkfile
from chunkserver.chunkfile import ENTRY_BYTES, FormatError, Header
from chunkserver.disk import Disk, File, chunk_directories
from chunkserver.index import Index
from chunkserver.protocol import Progress
from chunkserver.replica import Replica, ReplicaState
from metaserver.errors import ErrorCode

log = structlog.get_logger(__name__)

FAILED_SUFFIX = ".failed"
COPYING_SUFFIX = ".copying"
# Of an entry: stored and logical offset, stored and logical length, chain. Decoding all of it takes four times as long,
# and a full index has 32,704.
_WALKED = struct.Struct("<IIII44xI")
assert _WALKED.size == ENTRY_BYTES
INDEX_BYTES = chunkfile.MAX_ENTRIES * ENTRY_BYTES


def walk(data: bytes, chain: int, stored_available: int) -> int:
    """The number of entries, from the first on, that continue ``chain`` and whose bytes lie within
    ``stored_available``. Whatever follows an entry that does not is left over from an unfinished write."""
    stored = logical = 0
    view = memoryview(data)
    for number, (stored_offset, logical_offset, stored_length, logical_length, found) in enumerate(
        _WALKED.iter_unpack(view[: len(view) // ENTRY_BYTES * ENTRY_BYTES])
    ):
        at = number * ENTRY_BYTES
        chain = crc32c(view[at : at + ENTRY_BYTES - 4], chain)
        if chain != found or stored_offset != stored or logical_offset != logical or not stored_length:
            return number
        stored += stored_length
        logical += logical_length
        if stored > stored_available:
            return number
    return len(view) // ENTRY_BYTES


def read_index(file: File, cluster: UUID, chunk: int, limit: int = chunkfile.MAX_ENTRIES) -> Index:
    """The entries of a chunk file that can be trusted: at most ``limit``, continuing each other, with payload."""
    data = file.read(min(limit * ENTRY_BYTES, INDEX_BYTES), chunkfile.INDEX_OFFSET)
    available = file.size() - chunkfile.PAYLOAD_OFFSET
    count = walk(data, chunkfile.first_chain(cluster, chunk), available)
    return Index(data[: count * ENTRY_BYTES])


def sealed_progress(file: File, header: Header) -> Progress:
    """The progress of a sealed chunk, after a look at its last entry; :class:`FormatError` if that disagrees."""
    count, length, chain = header.sealed_entries, header.sealed_length, header.sealed_chain
    if count == 0:
        if length or chain != chunkfile.first_chain(header.cluster, header.chunk):
            raise FormatError("an empty sealed chunk with a length or another chain")
        return Progress(0, 0, 0, chain)
    if count > chunkfile.MAX_ENTRIES:
        raise FormatError(f"{count} entries")
    # With the one before, whose chain it continues.
    before = min(count - 1, 1) * ENTRY_BYTES
    data = file.read(before + ENTRY_BYTES, chunkfile.INDEX_OFFSET + (count - 1) * ENTRY_BYTES - before)
    if len(data) < before + ENTRY_BYTES:
        raise FormatError("the index is cut off")
    last = chunkfile.decode_entry(data, before)
    seed = chunkfile.decode_entry(data).chain if before else chunkfile.first_chain(header.cluster, header.chunk)
    if crc32c(data[before : before + ENTRY_BYTES - 4], seed) != last.chain:
        raise FormatError("the last entry is damaged")
    if last.chain != chain or last.stored_offset + last.stored_length != length:
        raise FormatError("the last entry is not the one the header speaks of")
    if file.size() < chunkfile.PAYLOAD_OFFSET + length:
        raise FormatError("the payload is cut off")
    return Progress(length, last.logical_offset + last.logical_length, count, chain)


def recover(disk: Disk, cluster: UUID, chunk: int, path: str) -> Replica:
    """One chunk file as a replica: SEALED as its header says, FROZEN with its valid prefix (payload not yet
    verified), or FAILED if it cannot be used.

    A header with a wrong checksum was torn by a power cut while sealing, perhaps on all replicas at once: the entries
    were synced before it and are bound to cluster and chunk by their chain, so that they are enough.
    """
    try:
        file = disk.open(path)
        header = _header_or_none(file, cluster, chunk, path)
        if header is not None and header.sealed:
            progress = sealed_progress(file, header)
            return Replica(chunk, ReplicaState.SEALED, header.created_ns, progress, path=path)
        index = read_index(file, cluster, chunk)
        if header is None and not len(index):
            raise FormatError("neither a header nor an entry")
        progress = index.progress(len(index), chunkfile.first_chain(cluster, chunk))
        created_ns = header.created_ns if header else 0
        return Replica(chunk, ReplicaState.FROZEN, created_ns, progress, path=path, verified=False)
    except FormatError as error:
        log.warning("a chunk file cannot be used", path=path, reason=str(error))
        code = ErrorCode.BAD_CHECKSUM
    except OSError as error:
        log.warning("a chunk file cannot be read", path=path, reason=error.strerror)
        code = ErrorCode.IO
    return Replica(chunk, ReplicaState.FAILED, 0, Progress(0, 0, 0, 0), path=path, error=code.name)


def _header_or_none(file: File, cluster: UUID, chunk: int, path: str) -> Header | None:
    """The header; None if it is damaged. :class:`FormatError` if it is whole but speaks of something else."""
    try:
        header = chunkfile.decode_header(file.read(chunkfile.HEADER_BYTES, 0))
    except FormatError as error:
        log.warning("a chunk file has no valid header; going by its entries", path=path, reason=str(error))
        return None
    if header.chunk != chunk:
        raise FormatError(f"the header says chunk {header.chunk:x}")
    if header.cluster != cluster:
        raise FormatError("a chunk of another cluster")
    return header


def scan(disk: Disk, cluster: UUID) -> Iterator[Replica]:
    """All replicas of a data directory; removes copies that were not finished, and what was given up and has been
    replaced by one that is sealed. What cannot be listed is missing: the rest can be served."""
    for directory in chunk_directories():
        replaced = -1
        for name in _names(disk, directory):
            path = f"{directory}/{name}"
            if name.endswith(COPYING_SUFFIX):
                _remove(disk, path)
                continue
            chunk = _chunk_of(path, name)
            if chunk is None:
                log.warning("not a chunk file", path=path)
            elif name.endswith(FAILED_SUFFIX) and chunk == replaced:
                log.info("removing what was given up and has been replaced", path=path)
                _remove(disk, path)
            elif name.endswith(FAILED_SUFFIX):
                yield _given_up(disk, cluster, chunk, path)
            else:
                replica = recover(disk, cluster, chunk, path)
                if replica.state is ReplicaState.SEALED and not replica.error:
                    replaced = chunk
                yield replica


def _given_up(disk: Disk, cluster: UUID, chunk: int, path: str) -> Replica:
    """What is left of a replica that was given up."""
    progress = Progress(0, 0, 0, 0)
    try:
        index = read_index(disk.open(path), cluster, chunk)
        progress = index.progress(len(index), chunkfile.first_chain(cluster, chunk))
    except (OSError, FormatError) as error:
        log.info("nothing can be read of what was given up", path=path, reason=str(error))
    error_name = ErrorCode.REPLICA_FAILED.name
    return Replica(chunk, ReplicaState.FAILED, 0, progress, path=path, error=error_name)


def _names(disk: Disk, directory: str) -> list[str]:
    try:
        return sorted(disk.names(directory))
    except OSError as error:
        log.error("a directory of chunks cannot be read", path=directory, reason=error.strerror)
        return []


def _remove(disk: Disk, path: str) -> None:
    try:
        disk.unlink(path)
    except OSError as error:
        log.warning("what is left over cannot be removed", path=path, reason=error.strerror)


def _chunk_of(path: str, name: str) -> int | None:
    """The chunk a file name stands for, if it is one and in its place."""
    digits = name.removesuffix(FAILED_SUFFIX)
    try:
        chunk = int(digits, 16)
    except ValueError:
        return None
    return chunk if chunkfile.chunk_path(chunk) == path.removesuffix(FAILED_SUFFIX) else None


def bad_blocks(disk: Disk, path: str, index: Index, limit: int = 1000) -> list[int]:
    """Numbers of entries whose bytes, read from the disk itself, do not have their checksum, and of the first that is
    itself not there as it is in memory; at most ``limit``."""
    file = disk.open_direct(path)
    bad: list[int] = []
    count, first = _entries_there(file, index), 0
    while first < count and len(bad) < limit:
        found, first = bad_of_next(file, index, first)
        bad += [number for number in found if number < count]
    if count < len(index):
        bad.append(count)
    return bad[:limit]


def _entries_there(file: File, index: Index) -> int:
    """How many entries, from the first on, the disk itself has. After a sync that failed they may be in memory only."""
    known = index.slice(0, len(index))
    for start in range(0, len(known), GROUP_BYTES):
        wanted = known[start : start + GROUP_BYTES]
        try:
            there = bytes(file.read_from_disk(len(wanted), chunkfile.INDEX_OFFSET + start))
        except OSError:
            there = b""
        if there != wanted:
            equal = (one == other for one, other in zip(there, wanted, strict=False))
            return (start + sum(takewhile(bool, equal))) // ENTRY_BYTES
    return len(index)


def bad_of_next(file: File, index: Index, first: int) -> tuple[list[int], int]:
    """As :func:`bad_blocks` for the entries from ``first`` on that are read at once; and the number after them."""
    entries, last = _group(index, first)
    return [first + number for number in _bad_of_group(file, entries)], last


def _group(index: Index, first: int) -> tuple[list[chunkfile.Entry], int]:
    """Entries from ``first`` on whose bytes together are read at once, and the number after them."""
    start = index.entry(first).stored_offset
    entries: list[chunkfile.Entry] = []
    for number in range(first, len(index)):
        entry = index.entry(number)
        if entry.stored_offset + entry.stored_length - start > GROUP_BYTES:
            break
        entries.append(entry)
    return entries, first + len(entries)


# Below disk.DIRECT_BYTES, with room for one block more.
GROUP_BYTES = 512 << 10


def _bad_of_group(file: File, entries: list[chunkfile.Entry]) -> list[int]:
    start = entries[0].stored_offset
    length = entries[-1].stored_offset + entries[-1].stored_length - start
    try:
        data = file.read_from_disk(length, chunkfile.PAYLOAD_OFFSET + start)
    except OSError:
        if len(entries) == 1:
            return [0]
        return [number for number, entry in enumerate(entries) if _bad_of_group(file, [entry])]
    bad = []
    for number, entry in enumerate(entries):
        at = entry.stored_offset - start
        block = data[at : at + entry.stored_length]
        if len(block) != entry.stored_length or crc32c(block) != entry.crc:
            bad.append(number)
    return bad

"""Every invariant of a data directory, verified offline: what tests run after themselves, and `chunkserver check`.

Findings are broken promises. What a crash may leave behind is not: replicas that were given up (``.failed``), copies
that were not finished, files whose header or first entry never reached the disk, and whatever lies behind the last
entry that continues the chain of an unsealed chunk. After a power cut (``power_cut``) the blocks of an unsealed
chunk's entries may be missing too, as far as they were never synced; the caller knows how far that is.
"""

import time
from collections.abc import Iterator
from uuid import UUID

from chunkserver import chunkfile, recovery
from chunkserver.chunkfile import ENTRY_BYTES, INDEX_OFFSET, MAX_ENTRIES, PAYLOAD_OFFSET, FormatError, Header
from chunkserver.disk import Disk, File, LocalDisk, chunk_directories
from chunkserver.identity import FILE, DataDirectoryError, load
from chunkserver.index import Index
from metaserver.protocol import CheckReport, Problem


def check_directory(path: str, *, power_cut: bool = False) -> CheckReport:
    """Checks a data directory that no process uses; :class:`DataDirectoryError` if it cannot be.

    ``rows`` of the report is the number of chunk files looked at.
    """
    disk = LocalDisk(path)
    try:
        if not disk.lock():
            raise DataDirectoryError(f"the data directory {path} is in use: stop its chunkserver first")
    except OSError as error:
        raise DataDirectoryError(f"cannot use the data directory {path}: {error.strerror}") from None
    try:
        return check_disk(disk, power_cut=power_cut)
    finally:
        disk.unlock()


def check_disk(disk: Disk, *, power_cut: bool = False) -> CheckReport:
    """As :func:`check_directory`, on whatever disk."""
    started = time.monotonic()
    identity = load(disk)
    if identity is None:
        raise DataDirectoryError(f"{disk.root} is not a chunkserver's data directory: there is no {FILE}")
    files = 0
    problems: list[Problem] = []
    for path, name in _chunk_files(disk):
        files += 1
        problems += (
            Problem("chunks", path, text) for text in _check_file(disk, identity.cluster_id, path, name, power_cut)
        )
    return CheckReport(files, problems, time.monotonic() - started)


def _chunk_files(disk: Disk) -> Iterator[tuple[str, str]]:
    for directory in chunk_directories():
        for name in sorted(disk.names(directory)):
            if not name.endswith((recovery.FAILED_SUFFIX, recovery.COPYING_SUFFIX)):
                yield f"{directory}/{name}", name


def _check_file(disk: Disk, cluster_id: str, path: str, name: str, power_cut: bool) -> Iterator[str]:
    try:
        chunk = int(name, 16)
    except ValueError:
        yield "not the name of a chunk"
        return
    if chunkfile.chunk_path(chunk) != path:
        yield "not where this chunk belongs"
    try:
        file = disk.open(path)
        header = _header(file)
        if header is not None and header.sealed:
            yield from _check_sealed(disk, file, header, path)
        yield from _check_header(header, cluster_id, chunk)
        if header is None or not header.sealed:
            yield from _check_unsealed(disk, file, UUID(cluster_id), chunk, path, power_cut)
    except OSError as error:
        yield f"cannot be read: {error.strerror}"


def _header(file: File) -> Header | None:
    """None if it never became whole; then the entries are what counts."""
    try:
        return chunkfile.decode_header(file.read(chunkfile.HEADER_BYTES, 0))
    except FormatError:
        return None


def _check_header(header: Header | None, cluster_id: str, chunk: int) -> Iterator[str]:
    if header is not None and header.chunk != chunk:
        yield f"the header says chunk {header.chunk:016x}"
    if header is not None and str(header.cluster) != cluster_id:
        yield f"the header says cluster {header.cluster}"


def _check_sealed(disk: Disk, file: File, header: Header, path: str) -> Iterator[str]:
    count, length = header.sealed_entries, header.sealed_length
    if count > MAX_ENTRIES or length > chunkfile.PAYLOAD_CAPACITY:
        yield f"sealed with {count} entries and {length} bytes"
        return
    if file.size() != PAYLOAD_OFFSET + length:
        yield f"the file has {file.size()} bytes, {PAYLOAD_OFFSET + length} belong there"
    region = file.read(PAYLOAD_OFFSET - INDEX_OFFSET, INDEX_OFFSET)
    if region[count * ENTRY_BYTES :].strip(b"\0"):
        yield "something follows the last entry"
    first_chain = chunkfile.first_chain(header.cluster, header.chunk)
    try:
        chunkfile.check_entries(region[: count * ENTRY_BYTES], first_chain, 0)
    except FormatError as error:
        yield f"the index is damaged: {error}"
        return
    index = Index(region[: count * ENTRY_BYTES])
    end = index.progress(count, first_chain)
    if (end.stored_length, end.chain) != (length, header.sealed_chain):
        yield "the last entry is not the one the header speaks of"
    yield from _check_blocks(disk, path, index)


def _check_unsealed(disk: Disk, file: File, cluster: UUID, chunk: int, path: str, power_cut: bool) -> Iterator[str]:
    index = recovery.read_index(file, cluster, chunk)
    if not power_cut:
        yield from _check_blocks(disk, path, index)


def _check_blocks(disk: Disk, path: str, index: Index) -> Iterator[str]:
    for number in recovery.bad_blocks(disk, path, index):
        entry = index.entry(number)
        yield f"block {number} ({entry.stored_length} bytes at {entry.stored_offset}, inode {entry.ino}) is damaged"

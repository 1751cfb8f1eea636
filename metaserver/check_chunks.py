"""The part of ``check.py`` that is about contents, chunks and replicas."""

from collections.abc import Iterator
from typing import TypeAlias

from metaserver.protocol import CHUNK_CAPACITY, ChunkState, Problem, ReplicaState
from metaserver.schema import (
    Chunk,
    ExtentRow,
    Inode,
    Replica,
    Table,
    Transaction,
    by_chunk_key,
    by_server_key,
    chunk_key,
    extent_key,
    parse_by_chunk_key,
    parse_by_server_key,
    parse_replica_key,
    read_u64,
    replica_key,
    server_key,
    session_key,
)

Findings: TypeAlias = Iterator[Problem | None]
SLICE_ROWS = 200
# Longer than any key: the longest are names of 255 bytes after 8.
_END = b"\xff" * 300
_STATES = frozenset(ChunkState)
_REPLICA_STATES = frozenset(ReplicaState)


def rows(tx: Transaction, table: Table) -> Iterator[tuple[bytes, bytes]]:
    """A whole table."""
    return tx.scan(table, b"", _END)


class Joined:
    """A table whose keys start with a u64, read in step with another one that is sorted by it."""

    def __init__(self, tx: Transaction, table: Table) -> None:
        self._table = table
        self._rows = rows(tx, table)
        self._head = next(self._rows, None)

    def group(self, number: int) -> Iterator[tuple[bytes, bytes]]:
        """The rows of ``number``; what is left of them counts as stray."""
        while self._head is not None and read_u64(self._head[0]) == number:
            row = self._head
            self._head = next(self._rows, None)
            yield row

    def strays(self, number: int, text: str) -> Findings:
        """Rows before ``number`` that nobody asked for."""
        while self._head is not None and read_u64(self._head[0]) < number:
            yield Problem(self._table.name, self._head[0].hex(), text)
            self._head = next(self._rows, None)


def check_extents(
    tx: Transaction, ino: int, inode: Inode, found: Iterator[tuple[bytes, bytes]], truncating: int | None
) -> Findings:
    """The map of one inode. ``truncating`` is where a task will cut it, which may lie before its end."""
    total = end = 0
    before: tuple[int, ExtentRow] | None = None
    for count, (key, value) in enumerate(found):
        offset, row = read_u64(key, 8), ExtentRow.unpack(value)
        where = f"{ino}/{offset}"
        if row.length == 0 or offset < end:
            yield Problem("EXTENTS", where, f"{row.length} bytes overlap what ends at {end}")
        if before is not None and _continues(before, offset, row):
            yield Problem("EXTENTS", where, "continues the row before it")
        total += row.length
        end = offset + row.length
        if end > inode.size and (truncating is None or offset < truncating):
            yield Problem("EXTENTS", where, f"ends at {end}, the size is {inode.size}")
        yield from _check_range(tx, ino, offset, row)
        before = offset, row
        if count % SLICE_ROWS == SLICE_ROWS - 1:
            yield None
    if total != inode.allocated:
        yield Problem("INODES", str(ino), f"has extents of {total} bytes and allocated {inode.allocated}")


def _continues(before: tuple[int, ExtentRow], offset: int, row: ExtentRow) -> bool:
    start, old = before
    in_file = start + old.length == offset
    return in_file and old.chunk == row.chunk and old.chunk_offset + old.length == row.chunk_offset


def _check_range(tx: Transaction, ino: int, offset: int, row: ExtentRow) -> Findings:
    where = f"{ino}/{offset}"
    mirror = tx.get(Table.BY_CHUNK, by_chunk_key(row.chunk, row.chunk_offset, ino, offset))
    if mirror is None or read_u64(mirror) != row.length:
        yield Problem("BY_CHUNK", where, f"does not have the {row.length} bytes of chunk {row.chunk:x}")
    value = tx.get(Table.CHUNKS, chunk_key(row.chunk))
    if value is None:
        yield Problem("EXTENTS", where, f"is in chunk {row.chunk:x}, which does not exist")
        return
    chunk = Chunk.unpack(value)
    if chunk.state in (ChunkState.DEAD, ChunkState.FILLING):
        yield Problem("EXTENTS", where, f"is in chunk {row.chunk:x}, which is {ChunkState(chunk.state).name.lower()}")
    if row.chunk_offset + row.length > chunk.length:
        yield Problem("EXTENTS", where, f"passes the {chunk.length} bytes of chunk {row.chunk:x}")


def check_by_chunk(tx: Transaction) -> Findings:
    """That every BY_CHUNK row has its EXTENTS row (the other way round: :func:`check_extents`)."""
    for count, (key, value) in enumerate(rows(tx, Table.BY_CHUNK)):
        chunk, chunk_offset, ino, offset = parse_by_chunk_key(key)
        extent = tx.get(Table.EXTENTS, extent_key(ino, offset))
        if extent is None or ExtentRow.unpack(extent) != ExtentRow(read_u64(value), chunk, chunk_offset):
            yield Problem("BY_CHUNK", f"{chunk:x}/{chunk_offset}", f"there is no such extent of inode {ino}")
        if count % SLICE_ROWS == 0:
            yield None


def check_chunks(tx: Transaction) -> Findings:
    """CHUNKS against BY_CHUNK and REPLICAS."""
    mapped = Joined(tx, Table.BY_CHUNK)
    replicas = Joined(tx, Table.REPLICAS)
    for count, (key, value) in enumerate(rows(tx, Table.CHUNKS)):
        number, chunk = read_u64(key), Chunk.unpack(value)
        yield from mapped.strays(number, "there is no such chunk")
        yield from replicas.strays(number, "there is no such chunk")
        live = sum(read_u64(length) for _, length in mapped.group(number))
        if live != chunk.live:
            yield Problem("CHUNKS", f"{number:x}", f"live is {chunk.live}, its extents have {live} bytes")
        yield from _check_chunk(tx, number, chunk)
        yield from _check_replicas(tx, number, chunk, replicas.group(number))
        if count % SLICE_ROWS == 0:
            yield None
    yield from mapped.strays(1 << 64, "there is no such chunk")
    yield from replicas.strays(1 << 64, "there is no such chunk")


def _check_chunk(tx: Transaction, number: int, chunk: Chunk) -> Findings:
    where = f"{number:x}"
    if chunk.state not in _STATES or chunk.length > CHUNK_CAPACITY:
        yield Problem("CHUNKS", where, f"is in state {chunk.state} with {chunk.length} bytes")
        return
    if chunk.state == ChunkState.SEALED and chunk.live == 0:
        yield Problem("CHUNKS", where, "is sealed, and nothing refers to it: it should be dead")
    if chunk.state == ChunkState.DEAD and chunk.live:
        yield Problem("CHUNKS", where, f"is dead with {chunk.live} live bytes")
    if chunk.state == ChunkState.FILLING and chunk.live:
        yield Problem("CHUNKS", where, f"is being filled, and {chunk.live} live bytes refer to it")
    if chunk.state == ChunkState.OPEN:
        if tx.get(Table.SESSIONS, session_key(chunk.owner)) is None:
            yield Problem("CHUNKS", where, f"is open, and its session {chunk.owner} does not exist")
    elif chunk.owner:
        yield Problem("CHUNKS", where, f"is not open, and belongs to session {chunk.owner}")


def _check_replicas(tx: Transaction, number: int, chunk: Chunk, found: Iterator[tuple[bytes, bytes]]) -> Findings:
    count = 0
    for key, value in found:
        count += 1
        _, server = parse_replica_key(key)
        where = f"{number:x}/{server}"
        if Replica.unpack(value).state not in _REPLICA_STATES:
            yield Problem("REPLICAS", where, f"is in state {Replica.unpack(value).state}")
        if tx.get(Table.SERVERS, server_key(server)) is None:
            yield Problem("REPLICAS", where, "the server does not exist")
        if tx.get(Table.BY_SERVER, by_server_key(server, number)) is None:
            yield Problem("BY_SERVER", where, "does not have this replica")
    if not count and chunk.state == ChunkState.DEAD:
        yield Problem("CHUNKS", f"{number:x}", "is dead and has no replica left: it should be gone")


def check_by_server(tx: Transaction) -> Findings:
    """That every BY_SERVER row has its REPLICAS row (the other way round: :func:`check_chunks`)."""
    for count, (key, _) in enumerate(rows(tx, Table.BY_SERVER)):
        server, chunk = parse_by_server_key(key)
        if tx.get(Table.REPLICAS, replica_key(chunk, server)) is None:
            yield Problem("BY_SERVER", f"{server}/{chunk:x}", "there is no such replica")
        if count % SLICE_ROWS == 0:
            yield None

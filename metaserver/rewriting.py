"""The cleaner's rows: a chunk that is being filled, and the maps that then refer to it. Synchronous, one transaction.

A FILLING chunk has no rows that refer to it, and nobody reads it. The first step that rewrites a map makes it SEALED;
each step is a whole, so that a crash between two leaves some rows referring to the old chunk and some to the new one,
both of which have the bytes.
"""

from collections.abc import Sequence
from itertools import islice

import msgspec

from metaserver import chunks, extents
from metaserver.cleaning import Moves, Range
from metaserver.errors import DfsError, ErrorCode
from metaserver.extents import Budget, Live
from metaserver.protocol import ChunkState, Extent, ReplicaReport, ReplicaState
from metaserver.schema import (
    ExtentRow,
    Replica,
    Table,
    Transaction,
    after,
    by_chunk_key,
    chunk_key,
    extent_key,
    key_u64,
    parse_by_chunk_key,
    read_u64,
    replica_key,
)

# Rows rewritten in one step: each reads a dozen rows and writes up to eight; about 10 ms.
STEP_ROWS = 64
# Pieces into which the rows of one step may fall: far below MAX_TRANSACTION_ROWS.
STEP_PIECES = 256


class Rewritten(msgspec.Struct):
    """A step: where the next goes on (None: this was the last of the old chunk), whether the old chunk is DEAD by it,
    how many rows had to be left alone, and the bytes that refer to the new chunk now."""

    position: bytes | None
    died: bool = False
    left: int = 0
    moved: int = 0


def live_ranges(tx: Transaction, chunk: int, start: int, count: int) -> tuple[list[Range], int | None]:
    """Ranges [start, stop) of the chunk that at most ``count`` rows refer to, from the one at ``start`` on, sorted but
    not joined; and where the next ones start."""
    rows = list(islice(tx.scan(Table.BY_CHUNK, by_chunk_key(chunk, start, 0, 0), after(key_u64(chunk))), count))
    found = []
    for key, value in rows:
        offset = parse_by_chunk_key(key)[1]
        found.append((offset, offset + read_u64(value)))
    # Rows at the same offset (of clones) are asked for again rather than left out.
    more = len(rows) == count and found[-1][0] > start
    return found, found[-1][0] if more else None


def begin(tx: Transaction, now_ns: int, server: int, copies: int) -> int:
    """A new FILLING chunk, to be made on ``server``."""
    chunk = chunks.allocate(tx, now_ns, 0, (), copies)
    row = chunks.find(tx, chunk)
    assert row is not None
    row.state = ChunkState.FILLING
    chunks.save(tx, chunk, row)
    chunks.add_replica(tx, chunk, server, Replica(ReplicaState.COPYING, 0, 0, 0, 0))
    return chunk


def filled(tx: Transaction, chunk: int, server: int, report: ReplicaReport) -> bool:
    """The chunk is made, and is what its server says; False if it is not wanted any more."""
    row = chunks.find(tx, chunk)
    value = tx.get(Table.REPLICAS, replica_key(chunk, server))
    if row is None or row.state != ChunkState.FILLING or value is None:
        return False
    replica = Replica.unpack(value)
    if replica.state not in (ReplicaState.COPYING, ReplicaState.GOOD):
        return False
    row.length, row.entries, row.chain = report.length, report.entries, report.chain
    chunks.save(tx, chunk, row)
    chunks.move_replica(replica, ReplicaState.GOOD)
    replica.length, replica.entries, replica.chain = row.length, row.entries, row.chain
    chunks.save_replica(tx, chunk, server, replica)
    return True


def abandon(tx: Transaction, chunk: int) -> None:
    """A FILLING chunk will not be used: it is DEAD, or gone at once if no server can have it."""
    row = chunks.find(tx, chunk)
    if row is None or row.state != ChunkState.FILLING:
        return
    chunks.move(row, ChunkState.DEAD)
    chunks.save(tx, chunk, row)
    if not chunks.replicas(tx, chunk):
        tx.delete(Table.CHUNKS, chunk_key(chunk))


def filling(tx: Transaction) -> list[int]:
    """All FILLING chunks; reads the whole table, for a start."""
    rows = tx.scan(Table.CHUNKS, b"", b"\xff" * 9)
    return [read_u64(key) for key, value in rows if value[0] == ChunkState.FILLING]


def rewrite_step(tx: Transaction, old: int, new: int, position: bytes, moves: Moves) -> Rewritten:
    """Has some of the rows that refer to ``old`` refer to ``new``, from BY_CHUNK key ``position`` (empty: the first).

    A row whose bytes are not all in the new chunk is left alone. INTERNAL, and nothing happens, if the new chunk cannot
    be referred to.
    """
    target = chunks.find(tx, new)
    if target is None or target.state not in (ChunkState.FILLING, ChunkState.SEALED):
        raise DfsError(ErrorCode.INTERNAL, f"chunk {new:x} cannot be referred to")
    prefix = key_u64(old)
    found = list(islice(tx.scan(Table.BY_CHUNK, position or prefix, after(prefix)), STEP_ROWS))
    step = Rewritten(found[-1][0] + b"\0" if len(found) == STEP_ROWS else None)
    live: Live = {}
    pieces_left = STEP_PIECES
    for number, (key, value) in enumerate(found):
        pieces = moves.find(old, parse_by_chunk_key(key)[1], read_u64(value))
        if number and pieces and len(pieces) > pieces_left:
            step.position = key
            break
        if not pieces or len(pieces) > STEP_PIECES or not _rewrite(tx, key, read_u64(value), new, pieces, live):
            step.left += 1
            continue
        pieces_left -= len(pieces)
        step.moved += read_u64(value)
    _settle(tx, old, new, live, step)
    return step


def _rewrite(tx: Transaction, key: bytes, length: int, new: int, pieces: Sequence[tuple[int, int]], live: Live) -> bool:
    old, chunk_offset, ino, file_offset = parse_by_chunk_key(key)
    if tx.get(Table.EXTENTS, extent_key(ino, file_offset)) != ExtentRow(length, old, chunk_offset).pack():
        return False  # the rows contradict each other; `check` will say so
    for to, count in pieces:
        extents.replace(tx, ino, Extent(file_offset, count, new, to), live, Budget(STEP_PIECES))
        file_offset += count
    return True


def _settle(tx: Transaction, old: int, new: int, live: Live, step: Rewritten) -> None:
    step.died = old in chunks.settle(tx, live)
    target, source = chunks.find(tx, new), chunks.find(tx, old)
    assert target is not None
    if target.state == ChunkState.FILLING and target.live:
        chunks.move(target, ChunkState.SEALED)
    step.died = step.died and source is not None and source.state == ChunkState.DEAD
    if source is not None and target.live:
        # It may have been decided meanwhile that there should be more.
        target.copies = max(target.copies, source.copies)
    chunks.save(tx, new, target)

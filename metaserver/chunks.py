"""Chunks and their replicas as rows of a transaction: one table of legal moves each, and the moves. Synchronous.

A chunk is allocated OPEN to one session, which makes progress on it with its commits; it is SEALED at its committed
length, and DEAD when no extent refers to it any more (or when nothing was ever committed to it). Its replicas are then
deleted, and its row goes with the last of them.
"""

import struct
from collections.abc import Callable, Iterable, Sequence

from metaserver.cleaning import WORTH
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import CHUNK_CAPACITY, ChunkPlace, ChunkProgress, ChunkState, ReplicaState
from metaserver.schema import (
    Chunk,
    IdKind,
    Replica,
    Table,
    Transaction,
    after,
    by_server_key,
    chunk_key,
    key_u64,
    parse_replica_key,
    replica_key,
)

CHUNK_MOVES: dict[ChunkState, frozenset[ChunkState]] = {
    ChunkState.OPEN: frozenset({ChunkState.SEALED, ChunkState.DEAD}),
    ChunkState.SEALED: frozenset({ChunkState.DEAD}),
    ChunkState.FILLING: frozenset({ChunkState.SEALED, ChunkState.DEAD}),
    ChunkState.DEAD: frozenset(),
}

# A replica that is BAD is not trusted again before it was read back: it is deleted or replaced, or its server shows
# one that looks right in a later report.
REPLICA_MOVES: dict[ReplicaState, frozenset[ReplicaState]] = {
    ReplicaState.GOOD: frozenset({ReplicaState.UNSURE, ReplicaState.BAD, ReplicaState.DELETING}),
    ReplicaState.UNSURE: frozenset({ReplicaState.GOOD, ReplicaState.BAD, ReplicaState.DELETING}),
    ReplicaState.COPYING: frozenset({ReplicaState.GOOD, ReplicaState.BAD, ReplicaState.DELETING}),
    ReplicaState.BAD: frozenset({ReplicaState.GOOD, ReplicaState.UNSURE, ReplicaState.DELETING}),
    # Kept after all, if it is still there: it has come to be missed.
    ReplicaState.DELETING: frozenset({ReplicaState.UNSURE}),
}

# Smaller is better to read from; what is left out is not read from at all.
_READ_ORDER = {ReplicaState.GOOD: 0, ReplicaState.UNSURE: 1}

# Only state and chunk, without the other fields: for places, the most frequent reader.
_STATE = struct.Struct("<B")

# Rank of a server for reading: smaller is better.
Rank = Callable[[int], int]


def find(tx: Transaction, chunk: int) -> Chunk | None:
    row = tx.get(Table.CHUNKS, chunk_key(chunk))
    return None if row is None else Chunk.unpack(row)


def save(tx: Transaction, chunk: int, row: Chunk) -> None:
    tx.put(Table.CHUNKS, chunk_key(chunk), row.pack())


def require_owned(tx: Transaction, chunk: int, session: int) -> Chunk:
    """The OPEN chunk that this session writes; NOT_OWNER otherwise."""
    row = find(tx, chunk)
    if row is None or row.state != ChunkState.OPEN or row.owner != session:
        raise DfsError(ErrorCode.NOT_OWNER, f"chunk {chunk:x} is not being written by this session")
    return row


def move(row: Chunk, state: ChunkState) -> None:
    if state not in CHUNK_MOVES[row.status]:
        raise DfsError(ErrorCode.INTERNAL, f"a chunk cannot go from {row.status.name} to {state.name}")
    row.state = state
    row.owner = 0


def replicas(tx: Transaction, chunk: int) -> list[tuple[int, Replica]]:
    """All replicas of a chunk with their servers."""
    prefix = key_u64(chunk)
    return [
        (parse_replica_key(key)[1], Replica.unpack(value))
        for key, value in tx.scan(Table.REPLICAS, prefix, after(prefix))
    ]


def save_replica(tx: Transaction, chunk: int, server: int, replica: Replica) -> None:
    tx.put(Table.REPLICAS, replica_key(chunk, server), replica.pack())


def add_replica(tx: Transaction, chunk: int, server: int, replica: Replica) -> None:
    save_replica(tx, chunk, server, replica)
    tx.put(Table.BY_SERVER, by_server_key(server, chunk), b"")


def move_replica(replica: Replica, state: ReplicaState) -> None:
    old = ReplicaState(replica.state)
    if state is not old and state not in REPLICA_MOVES[old]:
        raise DfsError(ErrorCode.INTERNAL, f"a replica cannot go from {old.name} to {state.name}")
    replica.state = state


def drop_replica(tx: Transaction, chunk: int, server: int) -> None:
    """Removes the row of a replica that is gone; a DEAD chunk disappears with its last."""
    tx.delete(Table.REPLICAS, replica_key(chunk, server))
    tx.delete(Table.BY_SERVER, by_server_key(server, chunk))
    row = find(tx, chunk)
    if row is not None and row.state == ChunkState.DEAD and not replicas(tx, chunk):
        tx.delete(Table.CHUNKS, chunk_key(chunk))


def allocate(tx: Transaction, now_ns: int, session: int, servers: Sequence[int], copies: int) -> int:
    """A new OPEN chunk on ``servers``, owned by ``session``."""
    chunk = tx.allocate(IdKind.CHUNK)
    row = Chunk(
        state=ChunkState.OPEN,
        kind=0,
        layout=0,
        copies=copies,
        length=0,
        entries=0,
        chain=0,
        live=0,
        owner=session,
        created_ns=now_ns,
        storage_class=0,
    )
    save(tx, chunk, row)
    for server in servers:
        add_replica(tx, chunk, server, Replica(ReplicaState.GOOD, 0, 0, 0, 0))
    return chunk


def progress(tx: Transaction, session: int, told: ChunkProgress) -> int:
    """Notes how much of a chunk is on stable storage on all its replicas; returns how much that is now.

    Less than is known already is no news: commits done again after a crash may come in another order.
    """
    row = require_owned(tx, told.chunk, session)
    if 0 <= told.length < row.length:
        return row.length
    if not row.length <= told.length <= CHUNK_CAPACITY or told.entries < row.entries:
        raise DfsError(ErrorCode.INVALID, f"chunk {told.chunk:x} cannot go from {row.length} to {told.length} bytes")
    if told.length == row.length and (told.entries, told.chain) != (row.entries, row.chain) and row.length:
        raise DfsError(ErrorCode.INVALID, f"chunk {told.chunk:x} cannot change without growing")
    row.length, row.entries, row.chain = told.length, told.entries, told.chain
    save(tx, told.chunk, row)
    return row.length


def seal(tx: Transaction, chunk: int, row: Chunk, failed: Iterable[int]) -> bool:
    """Ends an OPEN chunk at its committed length; ``failed`` replicas become UNSURE. Whether it is DEAD by that."""
    dead = row.live == 0
    move(row, ChunkState.DEAD if dead else ChunkState.SEALED)
    save(tx, chunk, row)
    doubtful = frozenset(failed)
    for server, replica in replicas(tx, chunk):
        if server in doubtful:
            # Its server may have said already that it is worse than that.
            if replica.good:
                move_replica(replica, ReplicaState.UNSURE)
        else:
            replica.length, replica.entries, replica.chain = row.length, row.entries, row.chain
        save_replica(tx, chunk, server, replica)
    return dead


def doubt(tx: Transaction, chunk: int, server: int) -> bool:
    """Makes a GOOD replica UNSURE; whether there was one."""
    value = tx.get(Table.REPLICAS, replica_key(chunk, server))
    if value is None:
        return False
    replica = Replica.unpack(value)
    if not replica.good:
        return False
    move_replica(replica, ReplicaState.UNSURE)
    save_replica(tx, chunk, server, replica)
    return True


def settle(tx: Transaction, live: dict[int, int]) -> list[int]:
    """Adds changes of live bytes to their chunks; returns the chunks that are DEAD by that, or worth cleaning now."""
    found = []
    for chunk, change in live.items():
        if change == 0:
            continue
        row = find(tx, chunk)
        if row is None or row.live + change < 0:
            raise DfsError(ErrorCode.INTERNAL, f"extents of chunk {chunk:x} do not add up")
        row.live += change
        if row.live == 0 and row.state == ChunkState.SEALED:
            move(row, ChunkState.DEAD)
            found.append(chunk)
        elif row.live < row.length * WORTH <= row.live - change and row.state == ChunkState.SEALED:
            found.append(chunk)
        save(tx, chunk, row)
    return found


def place(tx: Transaction, chunk: int, rank: Rank) -> ChunkPlace:
    """Where a chunk can be read: good replicas before doubtful ones, servers that are up first.

    Bad ones come last, better than nothing: each block is checked by the reader, and a replica that is short or damaged
    somewhere may have what the others, damaged elsewhere and perhaps not yet known to be, have not.
    """
    prefix = key_u64(chunk)
    found = []
    bad = []
    for key, value in tx.scan(Table.REPLICAS, prefix, after(prefix)):
        state, server = _STATE.unpack_from(value)[0], parse_replica_key(key)[1]
        order = _READ_ORDER.get(state)
        if order is not None:
            found.append((rank(server), order, server))
        elif state == ReplicaState.BAD:
            bad.append((rank(server), 0, server))
    # A good replica on a server that is down comes after a doubtful one that can be asked now: bytes are checked.
    return ChunkPlace(chunk, tuple(server for _, _, server in sorted(found) + sorted(bad)))


def owned(tx: Transaction) -> list[tuple[int, int]]:
    """All OPEN chunks and their sessions; reads the whole table, for a start."""
    found = []
    for key, value in tx.scan(Table.CHUNKS, b"", b"\xff" * 9):
        row = Chunk.unpack(value)
        if row.state == ChunkState.OPEN:
            found.append((int.from_bytes(key, "big"), row.owner))
    return found

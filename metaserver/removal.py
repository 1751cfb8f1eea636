"""Taking a chunkserver out of the cluster for good: its rows, and what would be lost with it. Synchronous.

Only a server that does not run is removed; while that is under way it may not register. A disk that is brought back
afterwards is a new server, and what is right of its chunks is welcome again.
"""

from itertools import islice

from metaserver import chunks
from metaserver.inodes import Effects
from metaserver.members import Members
from metaserver.planning import is_lost
from metaserver.protocol import ChunkState, ReplicaState
from metaserver.schema import (
    Table,
    Transaction,
    after,
    by_server_key,
    key_u64,
    parse_by_chunk_key,
    parse_by_server_key,
    server_key,
)

# Each drops two rows and may change a chunk.
STEP_REPLICAS = 500


def page(tx: Transaction, server: int, position: int, count: int) -> list[int]:
    """Some chunks of which the server has a replica, from ``position`` on."""
    rows = tx.scan(Table.BY_SERVER, by_server_key(server, position), by_server_key(server + 1, 0))
    return [parse_by_server_key(key)[1] for key, _ in islice(rows, count)]


def remove_step(tx: Transaction, server: int, effects: Effects) -> bool:
    """Forgets some replicas of the server, at last the server itself; whether that is done."""
    found = page(tx, server, 0, STEP_REPLICAS)
    for chunk in found:
        chunks.drop_replica(tx, chunk, server)
    effects.chunks += found
    if len(found) == STEP_REPLICAS:
        return False
    tx.delete(Table.SERVERS, server_key(server))
    return True


def only_copy(tx: Transaction, chunk: int, server: int, members: Members) -> bool:
    """Whether what this server has of the chunk is nowhere else: no other replica that may be right is on a server that
    is not LOST."""
    row = chunks.find(tx, chunk)
    if row is None or row.state == ChunkState.DEAD:
        return False
    return not any(
        replica.state in (ReplicaState.GOOD, ReplicaState.UNSURE)
        for other, replica in chunks.replicas(tx, chunk)
        if other != server and not is_lost(members, other)
    )


def files_in(tx: Transaction, chunk: int) -> set[int]:
    """The inodes that have bytes in a chunk."""
    prefix = key_u64(chunk)
    return {parse_by_chunk_key(key)[2] for key, _ in tx.scan(Table.BY_CHUNK, prefix, after(prefix))}

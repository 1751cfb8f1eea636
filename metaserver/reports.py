"""What chunkservers say they have, against what the REPLICAS rows say. Synchronous, over one transaction.

A replica has the committed bytes with the right chain, or it is useless: shorter or different is BAD. What is not
sealed is compared by the order to seal it: it may be longer and right up to the committed length, and a listing may be
from before commits that were faster than it.

A report speaks of headers and indexes. What was doubted or found bad is not made good by it: a chunkserver forgets at a
restart what damage it has found. It is UNSURE until it was read back.
"""

from collections.abc import Sequence
from enum import Enum, auto

from metaserver import chunks
from metaserver.protocol import ChunkState, ReplicaReport, ReplicaState
from metaserver.schema import Chunk, Replica, Table, Transaction, by_server_key, parse_by_server_key, replica_key


class Finding(Enum):
    """What is to be done about a reported replica."""

    FINE = auto()
    UNSEALED = auto()
    LOOK = auto()
    UNKNOWN = auto()
    LOST = auto()


def apply_report(tx: Transaction, server: int, report: ReplicaReport) -> Finding:
    """Brings the row of one replica up to date.

    UNSEALED: it should be sealed. LOOK: its state has changed, or it should not be there: see what the chunk needs.
    UNKNOWN: there is no such chunk.
    """
    row = chunks.find(tx, report.chunk)
    if row is None:
        return Finding.UNKNOWN
    key = replica_key(report.chunk, server)
    value = tx.get(Table.REPLICAS, key)
    if value is None:
        state = ReplicaState.DELETING if row.state == ChunkState.DEAD else _first_state(row, report)
        chunks.add_replica(
            tx, report.chunk, server, Replica(state, 0, report.length, report.entries, report.chain)
        )  # fmt: skip
        return _finding(row, state, report, changed=True)
    replica = Replica.unpack(value)
    old = ReplicaState(replica.state)
    state = _next_state(row, old, report)
    told = (report.length, report.entries, report.chain)
    if state is not old or (row.state != ChunkState.OPEN and told != (replica.length, replica.entries, replica.chain)):
        chunks.move_replica(replica, state)
        if row.state != ChunkState.OPEN:
            replica.length, replica.entries, replica.chain = told
        tx.put(Table.REPLICAS, key, replica.pack())
    return _finding(row, state, report, changed=state is not old)


def apply_missing(tx: Transaction, server: int, chunk: int) -> Finding:
    """The server has no such replica. FINE: that changes nothing. LOOK: it was to go, and its row is gone. LOST: it was
    counted on.

    A chunk that is being written may have come after the listing; whoever writes or seals it finds out.
    """
    row = chunks.find(tx, chunk)
    value = tx.get(Table.REPLICAS, replica_key(chunk, server))
    if value is None:
        return Finding.FINE
    replica = Replica.unpack(value)
    if row is None or row.state == ChunkState.DEAD or replica.state == ReplicaState.DELETING:
        chunks.drop_replica(tx, chunk, server)
        return Finding.LOOK
    if replica.state in (ReplicaState.BAD, ReplicaState.COPYING) or row.state == ChunkState.OPEN:
        return Finding.FINE
    chunks.move_replica(replica, ReplicaState.BAD)
    chunks.save_replica(tx, chunk, server, replica)
    return Finding.LOST


def missing_between(tx: Transaction, server: int, after: int, up_to: int, reported: Sequence[int]) -> list[int]:
    """Chunks of this server with after < chunk <= up_to that are not among ``reported``."""
    there = frozenset(reported)
    rows = tx.scan(Table.BY_SERVER, by_server_key(server, after + 1), by_server_key(server, up_to) + b"\0")
    return [chunk for _, chunk in (parse_by_server_key(key) for key, _ in rows) if chunk not in there]


def matches(row: Chunk, length: int, entries: int, chain: int) -> bool:
    """Whether a replica of this length, entries and chain is exactly the chunk."""
    return (length, entries, chain) == (row.length, row.entries, row.chain)


def _first_state(row: Chunk, report: ReplicaReport) -> ReplicaState:
    """A replica of a known chunk on a server that should have none: welcome if it is right."""
    if _useless(row, report):
        return ReplicaState.BAD
    exact = row.state == ChunkState.SEALED and matches(row, report.length, report.entries, report.chain)
    return ReplicaState.GOOD if exact else ReplicaState.UNSURE


def _next_state(row: Chunk, old: ReplicaState, report: ReplicaReport) -> ReplicaState:
    if old is ReplicaState.DELETING:
        return old
    if old is ReplicaState.COPYING:
        done = report.sealed and not _useless(row, report)
        return ReplicaState.GOOD if done else old
    if _useless(row, report):
        return ReplicaState.BAD
    if old is ReplicaState.BAD and row.state == ChunkState.SEALED:
        # It was missing in a listing and has come after all; or its server has forgotten the damage.
        return ReplicaState.UNSURE
    return old


def _useless(row: Chunk, report: ReplicaReport) -> bool:
    if report.error or not report.sealed:
        return bool(report.error)
    if report.length < row.length:
        return True
    exact = matches(row, report.length, report.entries, report.chain)
    return not exact and row.length > 0 and (report.length == row.length or row.owner == 0)


def _finding(row: Chunk, state: ReplicaState, report: ReplicaReport, *, changed: bool) -> Finding:
    if row.state == ChunkState.SEALED and not report.sealed and state in (ReplicaState.GOOD, ReplicaState.UNSURE):
        return Finding.UNSEALED
    wrong = state in (ReplicaState.DELETING, ReplicaState.UNSURE) or row.state == ChunkState.DEAD
    return Finding.LOOK if changed or wrong else Finding.FINE

"""What orders do to the rows, before they leave and when their results come; and what a failure says of whom.

Synchronous, over one transaction; which orders are given is ``planning`` and ``repair``.
"""

from metaserver import chunks, reports
from metaserver.errors import ErrorCode
from metaserver.planning import Kind, Step
from metaserver.protocol import ChunkState, Order, OrderKind, OrderResult, ReplicaState
from metaserver.schema import Chunk, Replica, Table, Transaction, replica_key

# An order that fails like this says that the replica is useless; any other failure is tried again.
USELESS = frozenset(
    {
        ErrorCode.CHAIN_MISMATCH.name,
        ErrorCode.WRONG_OFFSET.name,
        ErrorCode.NO_SUCH_CHUNK.name,
        ErrorCode.BAD_CHECKSUM.name,
        ErrorCode.REPLICA_FAILED.name,
    }
)
# The client's reasons to doubt a replica; being out of reach is not one.
DOUBTS = frozenset({*USELESS, ErrorCode.IO.name, ErrorCode.DISK_FAILED.name})
# A copy that failed like this says that its source is damaged.
BAD_SOURCE = frozenset({*USELESS, ErrorCode.IO.name})
# A copy fails like this because of where it goes, not because of where it comes from.
TARGETS_FAULT = frozenset({ErrorCode.DISK_FULL.name, ErrorCode.NO_SPACE.name, ErrorCode.EXISTS.name})

# Chunks whose replicas are compared with their rows and copied: FILLING ones once they are made.
_FINISHED = (ChunkState.SEALED, ChunkState.FILLING)


def prepare(tx: Transaction, chunk: int, row: Chunk, step: Step) -> None:
    """The rows that must say so before an order leaves."""
    value = tx.get(Table.REPLICAS, replica_key(chunk, step.server))
    if step.kind is Kind.FORGET:
        chunks.drop_replica(tx, chunk, step.server)
    elif step.kind.order is OrderKind.COPY and value is None:
        chunks.add_replica(tx, chunk, step.server, Replica(ReplicaState.COPYING, 0, row.length, row.entries, row.chain))
    elif step.kind is Kind.KEEP and value is not None:
        replica = Replica.unpack(value)
        chunks.move_replica(replica, ReplicaState.UNSURE)
        chunks.save_replica(tx, chunk, step.server, replica)
    elif step.kind is Kind.DELETE and value is not None:
        replica = Replica.unpack(value)
        if replica.state != ReplicaState.DELETING:
            chunks.move_replica(replica, ReplicaState.DELETING)
            chunks.save_replica(tx, chunk, step.server, replica)


def apply_result(tx: Transaction, server: int, order: Order, result: OrderResult) -> None:
    """An order was carried out by this server, or failed."""
    row = chunks.find(tx, order.chunk)
    value = tx.get(Table.REPLICAS, replica_key(order.chunk, server))
    if row is None or value is None:
        return
    replica = Replica.unpack(value)
    if order.kind == OrderKind.DELETE:
        if result.error in ("", ErrorCode.NO_SUCH_CHUNK.name):
            chunks.drop_replica(tx, order.chunk, server)
        return
    if replica.state == ReplicaState.DELETING or row.state not in _FINISHED:
        return
    if not result.error:
        found = result.replica
        if order.kind == OrderKind.VERIFY and found is not None and not found.sealed:
            return  # it may be longer than the chunk, and need not be on the disk: that is the seal's matter
        right = found is None or (not found.error and reports.matches(row, found.length, found.entries, found.chain))
        chunks.move_replica(replica, ReplicaState.GOOD if right else ReplicaState.BAD)
        replica.length, replica.entries, replica.chain = row.length, row.entries, row.chain
    elif order.kind == OrderKind.COPY and order.replace:
        return
    elif order.kind == OrderKind.COPY and result.error != ErrorCode.EXISTS.name:
        chunks.drop_replica(tx, order.chunk, server)
        return
    elif order.kind == OrderKind.COPY or result.error in USELESS:
        chunks.move_replica(replica, ReplicaState.BAD)
    else:
        return
    chunks.save_replica(tx, order.chunk, server, replica)

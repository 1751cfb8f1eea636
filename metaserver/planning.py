"""What one chunk needs next. Pure: rows and the state of servers in, at most one step out.

Nothing is deleted as superfluous unless enough others are known to be right: GOOD rows of exactly the chunk's length
and chain, on servers that are up and have reported everything they have in this epoch.
"""

from collections.abc import Collection
from enum import Enum
from typing import NamedTuple

from metaserver.members import Members
from metaserver.protocol import ChunkState, OrderKind, ReplicaState, ServerState
from metaserver.schema import Chunk, Replica


class Kind(Enum):
    """A step: its order, if it is one, and how urgent it is (copies are as urgent as good copies are few)."""

    FORGET = (None, 0)
    COPY = (OrderKind.COPY, 1)
    SEAL = (OrderKind.SEAL, 50)
    VERIFY = (OrderKind.VERIFY, 51)
    DELETE = (OrderKind.DELETE, 60)

    def __init__(self, order: OrderKind | None, urgency: int) -> None:
        self.order = order
        self.urgency = urgency


class Step(NamedTuple):
    kind: Kind
    server: int
    source: int = 0


Replicas = list[tuple[int, Replica]]


def plan(
    chunk: int, row: Chunk, replicas: Replicas, members: Members, suspects: Collection[tuple[int, int]]
) -> Step | None:
    """The next step for a chunk on which no order is under way; None: it needs nothing that can be done now."""
    if row.state == ChunkState.OPEN:
        return None
    up = [(server, replica) for server, replica in replicas if _is_up(members, server)]
    for server, replica in up:
        if row.state == ChunkState.DEAD or replica.state == ReplicaState.DELETING:
            return Step(Kind.DELETE, server)
    if row.state == ChunkState.DEAD:
        return None
    return _forget(replicas, members) or _settle(chunk, up, members, suspects) or _copies(row, replicas, up, members)


def _is_up(members: Members, server: int) -> bool:
    member = members.by_id.get(server)
    return member is not None and member.up


def _is_lost(members: Members, server: int) -> bool:
    member = members.by_id.get(server)
    return member is None or member.state is ServerState.LOST


def _forget(replicas: Replicas, members: Members) -> Step | None:
    """A copy that was under way to a server that is lost."""
    for server, replica in replicas:
        if replica.state == ReplicaState.COPYING and _is_lost(members, server):
            return Step(Kind.FORGET, server)
    return None


def _settle(chunk: int, up: Replicas, members: Members, suspects: Collection[tuple[int, int]]) -> Step | None:
    """Replicas that are to be sealed, or of which it is not known whether they are right."""
    for server, replica in up:
        unsure = replica.state == ReplicaState.UNSURE
        if unsure and (chunk, server) in suspects:
            return Step(Kind.VERIFY, server)
        if unsure or (replica.good and chunk in members.by_id[server].unsealed):
            return Step(Kind.SEAL, server)
    return None


def _copies(row: Chunk, replicas: Replicas, up: Replicas, members: Members) -> Step | None:
    good = [server for server, replica in replicas if replica.good and not _is_lost(members, server)]
    sure = [server for server, replica in up if _confirmed(row, server, replica, members)]
    copying = [server for server, replica in up if replica.state == ReplicaState.COPYING]
    bad = [server for server, replica in up if replica.state == ReplicaState.BAD]
    if copying and sure:
        return Step(Kind.COPY, copying[0], sure[0])
    if len(good) < row.copies:
        target = members.place_copy([server for server, _ in replicas], row.length) if sure else 0
        if target:
            return Step(Kind.COPY, target, sure[0])
        # Nowhere else to go: a useless replica makes room for a right one.
        return Step(Kind.DELETE, bad[0]) if bad and sure else None
    if len(sure) >= row.copies and bad:
        return Step(Kind.DELETE, bad[0])
    if len(sure) > row.copies:
        return Step(Kind.DELETE, min(sure, key=lambda server: members.by_id[server].room))
    return None


def _confirmed(row: Chunk, server: int, replica: Replica, members: Members) -> bool:
    same = (replica.length, replica.entries, replica.chain) == (row.length, row.entries, row.chain)
    return replica.good and same and members.by_id[server].listed

"""Counting chunks: how many have the copies they should have, what repair and drains still have before them.

Over rows in the order of chunks, a slice at a time; nothing here waits.
"""

from collections.abc import Iterator
from itertools import groupby, islice

import msgspec

from metaserver.members import Members
from metaserver.planning import is_lost
from metaserver.protocol import ChunkHealth, ChunkState, RepairStatus
from metaserver.schema import Chunk, Replica, Table, Transaction, chunk_key, parse_replica_key, read_u64


class Leaving(msgspec.Struct):
    """What is still on a server that is being emptied: replicas, their bytes, how many are still written to, and for
    how many there are too few other servers."""

    replicas: int = 0
    bytes: int = 0
    open: int = 0
    stuck: int = 0


class Census:
    """One count, to be made slice by slice. ``health`` counts good copies on servers that are up; ``repair`` what is
    missing if those that are silent for a moment come back."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._position = 0
        self._takers = sum(member.works for member in members.by_id.values())
        self.health = ChunkHealth(0, 0, 0, 0, 0, 0)
        self.repair = RepairStatus()
        self.leaving = {server: Leaving() for server, member in members.by_id.items() if member.row.draining}

    def count(self, tx: Transaction, slice_chunks: int) -> bool:
        """Counts the next chunks; whether those were all."""
        rows = islice(tx.scan(Table.CHUNKS, chunk_key(self._position), b"\xff" * 9), slice_chunks)
        found = [(read_u64(key), Chunk.unpack(value)) for key, value in rows]
        if not found:
            return True
        replicas = dict(_replicas(tx, found[0][0], found[-1][0]))
        for chunk, row in found:
            self._add(row, replicas.get(chunk, []))
        self._position = found[-1][0] + 1
        return len(found) < slice_chunks

    def _add(self, row: Chunk, replicas: list[tuple[int, Replica]]) -> None:
        for server, _ in replicas if self.leaving else ():
            if server in self.leaving:
                self._add_leaving(self.leaving[server], row)
        if row.state == ChunkState.FILLING:
            return
        members = self._members.by_id
        good = [server for server, replica in replicas if replica.good]
        self._add_health(row, sum(server in members and members[server].up for server in good))
        there = sum(not is_lost(self._members, server) for server in good)
        if row.state != ChunkState.DEAD and 0 < there < row.copies:
            self.repair.chunks += 1
            self.repair.bytes += (row.copies - there) * row.length

    def _add_health(self, row: Chunk, up: int) -> None:
        counts = self.health
        if row.state == ChunkState.DEAD:
            counts.dead += 1
            return
        counts.total += 1
        counts.open += row.state == ChunkState.OPEN
        if up >= row.copies:
            counts.healthy += 1
        elif up:
            counts.too_few += 1
        else:
            counts.missing += 1

    def _add_leaving(self, leaving: Leaving, row: Chunk) -> None:
        leaving.replicas += 1
        leaving.bytes += row.length
        leaving.open += row.state == ChunkState.OPEN
        leaving.stuck += row.state == ChunkState.SEALED and row.copies > self._takers


def _replicas(tx: Transaction, first: int, last: int) -> Iterator[tuple[int, list[tuple[int, Replica]]]]:
    rows = tx.scan(Table.REPLICAS, chunk_key(first), chunk_key(last) + b"\xff" * 5)
    for chunk, group in groupby(rows, key=lambda item: parse_replica_key(item[0])[0]):
        yield chunk, [(parse_replica_key(key)[1], Replica.unpack(value)) for key, value in group]

"""What chunks need, and the orders that bring it about (design 5.3).

:func:`plan` is pure: a chunk, its replicas and a view of the servers in, at most one step out. :class:`Repair` keeps a
queue of chunks to look at, fed by whatever changes and by a slow walk over all chunks, and the orders under way: one
per chunk, repeated with every heartbeat until its result comes. No order leaves before what justifies it is durable.
"""

import heapq
from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

import structlog
import trio

from metaserver import chunks, reports
from metaserver.clock import LivedClock
from metaserver.commit import Committer
from metaserver.config import Config
from metaserver.errors import ErrorCode
from metaserver.members import Member, Members
from metaserver.planning import Kind, Step, plan
from metaserver.protocol import ChunkState, Order, OrderKind, OrderResult, ReplicaReport, ReplicaState
from metaserver.reports import Finding
from metaserver.schema import (
    Chunk,
    IdKind,
    Replica,
    Table,
    Transaction,
    by_server_key,
    chunk_key,
    parse_by_server_key,
    read_u64,
    replica_key,
)

log = structlog.get_logger(__name__)

# Chunks of one tick (a second): walked, looked at because something changed, and put to work. About 50 us each.
WALK_CHUNKS = 200
LOOK_CHUNKS = 500
WORK_CHUNKS = 256
# Others have their turn after so many.
YIELD_EVERY = 50
# Orders under way at one server, except copies (``Config.copies_per_server``), which cost a disk's bandwidth.
MAX_ORDERS = 64
# After an order has failed, and if no result of one ever comes although its server is up.
RETRY_SECONDS = 10.0
FORGET_SECONDS = 900.0
# An order that fails like this says that the replica is useless; any other failure is tried again.
_USELESS = frozenset(
    {
        ErrorCode.CHAIN_MISMATCH.name,
        ErrorCode.WRONG_OFFSET.name,
        ErrorCode.NO_SUCH_CHUNK.name,
        ErrorCode.BAD_CHECKSUM.name,
        ErrorCode.REPLICA_FAILED.name,
    }
)
# The client's reasons to doubt a replica; being out of reach is not one.
DOUBTS = frozenset({*_USELESS, ErrorCode.IO.name, ErrorCode.DISK_FAILED.name})


class _Outstanding(NamedTuple):
    order: Order
    server: int
    ready_at: int
    since: float


class Repair:
    """The queue and the orders.

    Invariants: ``_by_chunk`` and ``_orders`` hold the same orders; a chunk is in ``_heap`` once if it is in
    ``_queued``.
    """

    def __init__(self, committer: Committer, config: Config, members: Members, clock: LivedClock) -> None:
        self._committer = committer
        self._config = config
        self._members = members
        self._clock = clock
        self._next_order = 0
        self._orders: dict[int, _Outstanding] = {}
        self._by_chunk: dict[int, int] = {}
        self._fresh: dict[int, None] = {}
        self._heap: list[tuple[int, int]] = []
        self._queued: set[int] = set()
        self._not_before: dict[int, float] = {}
        self._dead_since: dict[int, float] = {}
        self._suspects: set[tuple[int, int]] = set()
        self._unknown: dict[tuple[int, int], float] = {}
        self._server_walks: dict[int, int] = {}
        self._walked = 0

    def __len__(self) -> int:
        return len(self._orders)

    # -- what happens elsewhere ----------------------------------------------------------------------------------

    def look_at(self, chunk: int) -> None:
        """Something about this chunk has changed."""
        self._fresh[chunk] = None

    def sealed(self, chunk: int, servers: Iterable[int]) -> None:
        """The chunk was sealed here; its replicas are not yet."""
        for server in servers:
            member = self._members.by_id.get(server)
            if member is not None:
                member.unsealed.add(chunk)
        self.look_at(chunk)

    def doubt(self, chunk: int, server: int) -> None:
        """A client got wrong bytes there: the replica is verified before it counts again."""
        self._suspects.add((chunk, server))
        self.look_at(chunk)

    def found(self, member: Member, report: ReplicaReport, finding: Finding) -> None:
        """A replica was reported (``reports.apply_report``)."""
        if finding is Finding.UNKNOWN:
            self._unknown.setdefault((report.chunk, member.server), self._clock.seconds)
        elif finding is Finding.UNSEALED:
            member.unsealed.add(report.chunk)
            self.look_at(report.chunk)
        else:
            if report.sealed:
                member.unsealed.discard(report.chunk)
            if finding is Finding.LOOK:
                self.look_at(report.chunk)

    def reported(self, chunk: int) -> list[int]:
        """Servers that have a replica of a chunk without a row."""
        return sorted(server for unknown, server in self._unknown if unknown == chunk)

    def gone(self, chunk: int, server: int) -> None:
        """The server says that it has no such replica (any more)."""
        self._unknown.pop((chunk, server), None)

    def walk_server(self, server: int) -> None:
        """Looks at everything the server has: it has become UP, or LOST."""
        self._server_walks[server] = 0

    def lost(self, server: int) -> None:
        """The server is LOST: its orders are void, and its chunks need others."""
        for number, outstanding in list(self._orders.items()):
            if outstanding.server == server:
                self._forget(number)
        self.walk_server(server)

    # -- orders --------------------------------------------------------------------------------------------------

    def orders_for(self, server: int) -> list[Order]:
        """What a heartbeat's reply carries."""
        durable = self._committer.durable
        ours = (one for one in self._orders.values() if one.server == server and one.ready_at <= durable)
        return [one.order for one in ours]

    def result(self, server: int, result: OrderResult) -> None:
        """An order was carried out, or failed. Results that come twice, or of an older epoch, change nothing."""
        outstanding = self._orders.get(result.order)
        if result.epoch != self._committer.epoch or outstanding is None or outstanding.server != server:
            return
        self._forget(result.order)
        order = outstanding.order
        if result.error:
            log.warning(
                "order failed", order=OrderKind(order.kind).name, chunk=f"{order.chunk:x}", server=server,
                error=result.error, text=result.text,
            )  # fmt: skip
            self._not_before[order.chunk] = self._clock.seconds + RETRY_SECONDS
        self._committer.change(0, 0, lambda tx, _: _apply_result(tx, server, order, result), frees=True)
        if order.kind == OrderKind.SEAL and not result.error:
            self._members.by_id[server].unsealed.discard(order.chunk)
        if order.kind in (OrderKind.VERIFY, OrderKind.DELETE):
            self._suspects.discard((order.chunk, server))
            self._members.by_id[server].unsealed.discard(order.chunk)
        self.look_at(order.chunk)

    def _forget(self, number: int) -> None:
        outstanding = self._orders.pop(number)
        del self._by_chunk[outstanding.order.chunk]
        self.look_at(outstanding.order.chunk)

    def _issue(self, kind: OrderKind, chunk: int, server: int, row: Chunk | None, ready_at: int, source: int) -> None:
        self._next_order += 1
        order = Order(self._next_order, self._committer.epoch, kind, chunk)
        if row is not None:
            order.length, order.entries, order.chain = row.length, row.entries, row.chain
        if source:
            origin = self._members.by_id[source].row
            order.source_server, order.source_host, order.source_port = source, origin.host, origin.port
        self._orders[order.order] = _Outstanding(order, server, ready_at, self._clock.seconds)
        self._by_chunk[chunk] = order.order

    def _room_for(self, server: int, kind: OrderKind) -> bool:
        under_way = sum(one.server == server and one.order.kind == kind for one in self._orders.values())
        return under_way < (self._config.copies_per_server if kind is OrderKind.COPY else MAX_ORDERS)

    # -- the walk ------------------------------------------------------------------------------------------------

    async def tick(self, *, unknown_may_go: bool) -> None:
        """One bounded round; call about once a second outside the reconnect window.

        ``unknown_may_go``: nobody can still tell of chunks that are unknown here.
        """
        self._expire_orders()
        self._walk()
        self._walk_servers()
        if unknown_may_go:
            self._drop_unknown()
        fresh = list(islice(self._fresh, LOOK_CHUNKS))
        for done, chunk in enumerate(fresh):
            self._fresh.pop(chunk, None)
            self._classify(chunk)
            if done % YIELD_EVERY == YIELD_EVERY - 1:
                await trio.lowlevel.checkpoint()
        await self._work()

    async def _work(self) -> None:
        waiting = []
        for done in range(WORK_CHUNKS):
            if not self._heap:
                break
            item = heapq.heappop(self._heap)
            self._queued.discard(item[1])
            if not self._carry_out(item[1]):
                waiting.append(item)
            if done % YIELD_EVERY == YIELD_EVERY - 1:
                await trio.lowlevel.checkpoint()
        for item in waiting:
            self._push(*item)

    def _push(self, urgency: int, chunk: int) -> None:
        if chunk not in self._queued:
            self._queued.add(chunk)
            heapq.heappush(self._heap, (urgency, chunk))

    def _read(self, chunk: int) -> tuple[Chunk | None, list[tuple[int, Replica]], int]:
        (row, replicas), wait_for = self._committer.read(
            0, lambda tx: (chunks.find(tx, chunk), chunks.replicas(tx, chunk))
        )
        return row, replicas, wait_for

    def _classify(self, chunk: int) -> None:
        """Queues a chunk that needs something; fewest good copies first, deletions last."""
        if chunk in self._by_chunk:
            return
        row, replicas, _ = self._read(chunk)
        if row is None:
            self._dead_since.pop(chunk, None)
            return
        step = self._plan(chunk, row, replicas)
        if step is not None:
            good = sum(replica.good for _, replica in replicas)
            self._push(good if step.kind is Kind.COPY else step.kind.urgency, chunk)

    def _plan(self, chunk: int, row: Chunk, replicas: list[tuple[int, Replica]]) -> Step | None:
        if row.state == ChunkState.DEAD:
            self._dead_since.setdefault(chunk, self._clock.seconds)
        return plan(chunk, row, replicas, self._members, self._suspects)

    def _carry_out(self, chunk: int) -> bool:
        """Takes the next step for a chunk; False if it has to wait."""
        if chunk in self._by_chunk:
            return True
        now = self._clock.seconds
        if self._not_before.get(chunk, now) > now:
            return False
        self._not_before.pop(chunk, None)
        row, replicas, wait_for = self._read(chunk)
        step = None if row is None else self._plan(chunk, row, replicas)
        if row is None or step is None:
            return True
        if row.state == ChunkState.DEAD and now - self._dead_since[chunk] < self._config.delete_grace_seconds:
            return False
        order = step.kind.order
        if order is not None and not self._room_for(step.server, order):
            return False
        change = self._committer.change(0, 0, lambda tx, _: _prepare(tx, chunk, row, step), frees=True)
        if order is None:
            self.look_at(chunk)
        else:
            log.info("order", order=order.name, chunk=f"{chunk:x}", server=step.server, source=step.source)
            self._issue(order, chunk, step.server, row, max(wait_for, change.number), step.source)
        return True

    def _walk(self) -> None:
        """Looks at all chunks again and again, slowly: whatever was missed is found."""

        def page(tx: Transaction) -> list[int]:
            rows = tx.scan(Table.CHUNKS, chunk_key(self._walked + 1), b"\xff" * 9)
            return [read_u64(key) for key, _ in islice(rows, WALK_CHUNKS)]

        found, _ = self._committer.read(0, page)
        self._walked = found[-1] if len(found) == WALK_CHUNKS else 0
        self._fresh.update(dict.fromkeys(found))

    def _walk_servers(self) -> None:
        for server, position in list(self._server_walks.items()):

            def page(tx: Transaction, server: int = server, position: int = position) -> list[int]:
                rows = tx.scan(Table.BY_SERVER, by_server_key(server, position), by_server_key(server + 1, 0))
                return [parse_by_server_key(key)[1] for key, _ in islice(rows, LOOK_CHUNKS)]

            found, _ = self._committer.read(0, page)
            self._fresh.update(dict.fromkeys(found))
            if len(found) < LOOK_CHUNKS:
                del self._server_walks[server]
            else:
                self._server_walks[server] = found[-1] + 1

    def _expire_orders(self) -> None:
        now = self._clock.seconds
        for number, outstanding in list(self._orders.items()):
            if now - outstanding.since > FORGET_SECONDS:
                self._forget(number)

    def _drop_unknown(self) -> None:
        """Has replicas of chunks that nobody knows deleted, after a grace."""
        now = self._clock.seconds
        limit = self._committer.id_limit(IdKind.CHUNK)
        for (chunk, server), since in list(self._unknown.items()):
            member = self._members.by_id.get(server)
            if now - since < self._config.delete_grace_seconds or member is None or not member.up:
                continue
            if chunk >= limit or chunk in self._by_chunk or not self._room_for(server, OrderKind.DELETE):
                continue
            del self._unknown[(chunk, server)]
            row, _, wait_for = self._read(chunk)
            if row is None:
                log.info("deleting a replica of an unknown chunk", chunk=f"{chunk:x}", server=server)
                self._issue(OrderKind.DELETE, chunk, server, None, wait_for, 0)
            else:
                self.look_at(chunk)


def _prepare(tx: Transaction, chunk: int, row: Chunk, step: Step) -> None:
    """The rows that must say so before an order leaves."""
    value = tx.get(Table.REPLICAS, replica_key(chunk, step.server))
    if step.kind is Kind.FORGET:
        chunks.drop_replica(tx, chunk, step.server)
    elif step.kind is Kind.COPY and value is None:
        chunks.add_replica(tx, chunk, step.server, Replica(ReplicaState.COPYING, 0, row.length, row.entries, row.chain))
    elif step.kind is Kind.DELETE and value is not None:
        replica = Replica.unpack(value)
        if replica.state != ReplicaState.DELETING:
            chunks.move_replica(replica, ReplicaState.DELETING)
            chunks.save_replica(tx, chunk, step.server, replica)


def _apply_result(tx: Transaction, server: int, order: Order, result: OrderResult) -> None:
    row = chunks.find(tx, order.chunk)
    value = tx.get(Table.REPLICAS, replica_key(order.chunk, server))
    if row is None or value is None:
        return
    replica = Replica.unpack(value)
    if order.kind == OrderKind.DELETE:
        if result.error in ("", ErrorCode.NO_SUCH_CHUNK.name):
            chunks.drop_replica(tx, order.chunk, server)
        return
    if replica.state == ReplicaState.DELETING or row.state != ChunkState.SEALED:
        return
    if not result.error:
        found = result.replica
        right = found is None or reports.matches(row, found.length, found.entries, found.chain)
        chunks.move_replica(replica, ReplicaState.GOOD if right else ReplicaState.BAD)
        replica.length, replica.entries, replica.chain = row.length, row.entries, row.chain
    elif order.kind == OrderKind.COPY and result.error != ErrorCode.EXISTS.name:
        chunks.drop_replica(tx, order.chunk, server)
        return
    elif order.kind == OrderKind.COPY or result.error in _USELESS:
        chunks.move_replica(replica, ReplicaState.BAD)
    else:
        return
    chunks.save_replica(tx, order.chunk, server, replica)

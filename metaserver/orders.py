"""The orders under way: one per chunk, repeated with every heartbeat until its result comes. In memory, synchronous.

An order is *void* when its server restarts, falls silent or answers nothing for long: what it was to bring about is
planned anew, elsewhere if possible. Should a void order be carried out after all, the server's report of what it has
then says so.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from metaserver.pacing import Meter, Pace
from metaserver.planning import Kind
from metaserver.protocol import ChunkState, CompactSource, CopySource, Order, OrderKind, ServerAddress
from metaserver.schema import Chunk

# Orders of one kind under way at one server, except copies, which have a figure of their own.
MAX_ORDERS = 64
# A server that is up and for so long gives no result at all does not work on its orders: reading a whole chunk from a
# disk that is busy takes a minute at most.
SILENT_SECONDS = 150.0
# A server that has failed a chunk is not asked about it again for so long, if there is another.
AVOID_SECONDS = 120.0
# After all have failed; doubled with every failure in a row.
RETRY_SECONDS, LONGEST_RETRY_SECONDS = 5.0, 300.0


class Outstanding(NamedTuple):
    """An order that has no result yet. It leaves when change ``ready_at`` is durable. ``kind``: what it is for."""

    order: Order
    server: int
    ready_at: int
    since: float
    kind: Kind | None = None


class Failures(NamedTuple):
    """Of one chunk: how often in a row, until when each server is avoided, and when to try again at all."""

    times: int
    avoid: dict[int, float]
    not_before: float


class Orders:
    """Invariant: ``_by_chunk`` and ``_orders`` hold the same orders, and ``_at`` and ``_from`` count them by server and
    kind, and by where a copy comes from. Times are on the lived clock."""

    def __init__(self, copies_per_server: int, bytes_per_second: float, shifted_bytes_per_second: float) -> None:
        self._copies_per_server = copies_per_server
        self._next = 0
        self._orders: dict[int, Outstanding] = {}
        self._by_chunk: dict[int, int] = {}
        self._at: Counter[tuple[int, OrderKind]] = Counter()
        self._from: Counter[int] = Counter()
        self._failures: dict[int, Failures] = {}
        self._answered: dict[int, float] = {}
        # Both ends of a copy are charged; what need not be soon is slower, and charged for as copies too.
        self._copies = Pace(bytes_per_second)
        self._shifts = Pace(shifted_bytes_per_second)
        # Somebody waits for the shifts.
        self.hurried = False
        self.copied = Meter()

    def __len__(self) -> int:
        return len(self._orders)

    def __contains__(self, chunk: int) -> bool:
        return chunk in self._by_chunk

    def all(self) -> Iterable[Outstanding]:
        return self._orders.values()

    # -- giving them -------------------------------------------------------------------------------------------

    def issue(
        self,
        kind: OrderKind,
        epoch: int,
        chunk: int,
        server: int,
        row: Chunk | None,
        ready_at: int,
        now: float,
        *,
        step: Kind | None = None,
        source: ServerAddress | None = None,
        sources: list[CompactSource] | None = None,
        others: Iterable[ServerAddress] = (),
        replace: bool = False,
    ) -> Order:
        """A new order; ``row`` says what the replica is to be."""
        self._next += 1
        order = Order(self._next, epoch, kind, chunk)
        if row is not None:
            order.length, order.entries, order.chain = row.length, row.entries, row.chain
            order.makes_room = row.state == ChunkState.FILLING
        if source is not None:
            order.source_server, order.source_host, order.source_port = source.server, source.host, source.port
            self._charge(server, source.server, order.length, now, slow=step is Kind.SHIFT)
        if sources:
            order.sources = sources
        order.others = [CopySource(other.server, other.host, other.port) for other in others]
        order.replace = replace
        self._orders[order.order] = Outstanding(order, server, ready_at, now, step)
        self._by_chunk[chunk] = order.order
        self._count(order, server, 1)
        return order

    def _count(self, order: Order, server: int, change: int) -> None:
        self._at[server, order.kind] += change
        if order.source_server:
            self._from[order.source_server] += change

    def _charge(self, server: int, source: int, length: int, now: float, *, slow: bool) -> None:
        for end in (server, source):
            self._copies.charge(end, length, now)
            if slow:
                self._shifts.charge(end, length, now)

    def room_for(self, server: int, kind: OrderKind) -> bool:
        """Whether one more may be under way at this server; copies have a rate besides (:meth:`room_for_copy`)."""
        return self._at[server, kind] < (self._copies_per_server if kind is OrderKind.COPY else MAX_ORDERS)

    def room_for_copy(self, server: int, source: int, now: float, step: Kind) -> bool:
        """Whether a copy may begin: neither end has too many under way, or is over its rate. Some of both is left for
        copies that are missing."""
        limit = self._copies_per_server if step is Kind.COPY else max(1, self._copies_per_server // 2)
        if max(self._at[server, OrderKind.COPY], self._from[source]) >= limit:
            return False
        paces = (self._copies, self._shifts) if step is Kind.SHIFT and not self.hurried else (self._copies,)
        return all(pace.ready(end, now) for pace in paces for end in (server, source))

    def for_server(self, server: int, durable: int) -> list[Order]:
        """What a heartbeat's reply carries."""
        ours = (one for one in self._orders.values() if one.server == server and one.ready_at <= durable)
        return [one.order for one in ours]

    @property
    def sending(self) -> Mapping[int, int]:
        """Copies under way by the server they come from."""
        return self._from

    # -- their end ---------------------------------------------------------------------------------------------

    def find(self, number: int, server: int) -> Outstanding | None:
        """The order whose result this server tells; None if it is void or somebody else's."""
        outstanding = self._orders.get(number)
        return outstanding if outstanding is not None and outstanding.server == server else None

    def answered(self, order: Order, now: float) -> None:
        """The result has been taken note of."""
        if order.order in self._orders:
            self._answered[self._drop(order.order).server] = now

    def _drop(self, number: int) -> Outstanding:
        outstanding = self._orders.pop(number)
        del self._by_chunk[outstanding.order.chunk]
        self._count(outstanding.order, outstanding.server, -1)
        return outstanding

    def void_at(self, server: int) -> list[int]:
        """Forgets what was ordered of a server that has restarted or is silent; the chunks concerned."""
        numbers = [number for number, one in self._orders.items() if one.server == server]
        return [self._drop(number).order.chunk for number in numbers]

    def expire(self, now: float) -> list[int]:
        """Forgets the orders of servers that are up and answer nothing; the chunks concerned, whose next order goes to
        another server if it can."""
        overdue = [
            (number, one)
            for number, one in self._orders.items()
            if now - max(one.since, self._answered.get(one.server, 0.0)) > SILENT_SECONDS
        ]
        for number, one in overdue:
            self._drop(number)
            self.failed(one.order.chunk, (one.server,), now, elsewhere=True)
        return [one.order.chunk for _, one in overdue]

    # -- failures ----------------------------------------------------------------------------------------------

    def failed(self, chunk: int, servers: Iterable[int], now: float, *, elsewhere: bool) -> None:
        """These servers failed an order on this chunk. ``elsewhere``: others may do it, so it need not wait."""
        old = self._failures.get(chunk, Failures(0, {}, now))
        avoid = {server: until for server, until in old.avoid.items() if until > now}
        again = set(servers) & avoid.keys()
        avoid.update(dict.fromkeys(servers, now + AVOID_SECONDS))
        wait = 0.0 if elsewhere and not again else min(RETRY_SECONDS * 2**old.times, LONGEST_RETRY_SECONDS)
        self._failures[chunk] = Failures(old.times + 1, avoid, now + wait)

    def succeeded(self, chunk: int) -> None:
        self._failures.pop(chunk, None)

    def avoid(self, chunk: int, now: float) -> frozenset[int]:
        """Servers that have just failed this chunk."""
        known = self._failures.get(chunk)
        return frozenset() if known is None else frozenset(s for s, until in known.avoid.items() if until > now)

    def due(self, chunk: int) -> float:
        """When the next order on it may be given."""
        known = self._failures.get(chunk)
        return 0.0 if known is None else known.not_before

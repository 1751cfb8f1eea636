"""Carrying out what the metaserver orders: one after another per chunk, each once, none of an older epoch."""

from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable

import structlog
import trio

from chunkserver.compact import Compactor, Moves, SourceFailed
from chunkserver.copy import Copier
from chunkserver.protocol import Peer
from chunkserver.store import Store
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import Order, OrderKind, OrderResult

log = structlog.get_logger(__name__)

# Copies at a time; the metaserver limits the rate as a whole, this keeps one disk from being swamped.
COPIES_AT_A_TIME = 2
# Results remembered, so that an order repeated because its result was lost on the way is not carried out twice.
REMEMBERED_RESULTS = 10_000


class Orders:
    """Invariant: a chunk is in ``_queues`` exactly while a task works on its orders."""

    def __init__(
        self,
        store: Store,
        copier: Copier,
        compactor: Compactor,
        nursery: trio.Nursery,
        *,
        highest_epoch: Callable[[], int],
        raise_epoch: Callable[[int], Awaitable[None]],
        on_result: Callable[[OrderResult], None],
    ) -> None:
        self._store = store
        self._copier = copier
        self._compactor = compactor
        self._nursery = nursery
        self._highest_epoch = highest_epoch
        self._raise_epoch = raise_epoch
        self._on_result = on_result
        self._queues: dict[int, deque[Order]] = {}
        self._results: OrderedDict[tuple[int, int], OrderResult | None] = OrderedDict()
        self._copies = trio.CapacityLimiter(COPIES_AT_A_TIME)

    def submit(self, orders: list[Order]) -> None:
        """Takes orders in; results come through ``on_result``. An order seen before is not carried out again."""
        for order in orders:
            key = (order.epoch, order.order)
            if key in self._results:
                known = self._results[key]
                if known is not None:
                    self._on_result(known)
                continue
            self._results[key] = None
            while len(self._results) > REMEMBERED_RESULTS:
                self._results.popitem(last=False)
            if order.chunk in self._queues:
                self._queues[order.chunk].append(order)
            else:
                self._queues[order.chunk] = deque([order])
                self._nursery.start_soon(self._work, order.chunk)

    async def _work(self, chunk: int) -> None:
        queue = self._queues[chunk]
        while queue:
            order = queue.popleft()
            result = await self._result(order)
            self._results[(order.epoch, order.order)] = result
            self._on_result(result)
        del self._queues[chunk]

    async def _result(self, order: Order) -> OrderResult:
        try:
            moves = await self._carry_out(order)
        except DfsError as error:
            log.warning("order failed", kind=order.kind.name, chunk=f"{order.chunk:x}", reason=str(error))
            result = OrderResult(order.order, order.epoch, error.code.name, error.text)
            if isinstance(error, SourceFailed):
                result.source = error.chunk
        except Exception:
            log.exception("order failed", kind=order.kind.name, chunk=f"{order.chunk:x}")
            text = "the server met an unexpected condition; see its log"
            result = OrderResult(order.order, order.epoch, ErrorCode.INTERNAL.name, text)
        else:
            result = OrderResult(order.order, order.epoch, "", moves=moves)
        replica = self._store.table.get(order.chunk)
        result.replica = replica.report() if replica is not None else None
        return result

    async def _carry_out(self, order: Order) -> Moves:
        """What a COMPACT has moved; nothing for other orders."""
        highest = self._highest_epoch()
        if order.epoch < highest:
            raise DfsError(ErrorCode.STALE_EPOCH, f"an order of epoch {order.epoch}, {highest} was seen already")
        if order.epoch > highest:
            await self._raise_epoch(order.epoch)
        if order.kind == OrderKind.SEAL:
            await self._store.seal(order.chunk, order.length, order.entries, order.chain)
        elif order.kind == OrderKind.DELETE:
            await self._store.delete(order.chunk)
        elif order.kind == OrderKind.VERIFY:
            if await self._store.reads.verify(order.chunk):
                raise DfsError(ErrorCode.BAD_CHECKSUM, "some blocks are damaged")
        elif order.kind == OrderKind.COMPACT:
            async with self._copies:
                _, moves = await self._compactor.compact(order)
                return moves
        else:
            async with self._copies:
                source = Peer(order.source_server, order.source_host, order.source_port)
                others = [Peer(other.server, other.host, other.port) for other in order.others]
                await self._copier.copy(
                    source, order.chunk, order.length, order.entries, order.chain, others=others, replace=order.replace,
                    makes_room=order.makes_room,
                )  # fmt: skip
        return []

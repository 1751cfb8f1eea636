"""What chunks need, and the orders that bring it about (design 5.3).

:func:`planning.plan` is pure: a chunk, its replicas and a view of the servers in, at most one step out. :class:`Repair`
keeps queues of chunks to look at, fed by whatever changes, by surveys of servers that were lost or have come, and by a
slow walk over all chunks. No order leaves before what justifies it is durable.

Copies are made of those chunks first that have the fewest left. When a server is lost that order is known only once all
of its chunks have been looked at; until then only chunks with a single good copy are copied.
"""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import NamedTuple

import structlog
import trio

from metaserver import chunks
from metaserver.clock import LivedClock
from metaserver.commit import Committer
from metaserver.config import Config
from metaserver.errors import ErrorCode
from metaserver.grace import Graces
from metaserver.members import Member, Members
from metaserver.orders import Orders, Outstanding
from metaserver.outcomes import BAD_SOURCE, TARGETS_FAULT, USELESS, apply_result, prepare
from metaserver.planning import Group, Hints, Kind, Step, good_copies, plan, plan_shift
from metaserver.protocol import ChunkState, Order, OrderKind, OrderResult, ReplicaReport
from metaserver.queueing import ChunkQueue
from metaserver.reports import Finding
from metaserver.schema import (
    Chunk,
    IdKind,
    Replica,
    Table,
    server_key,
)
from metaserver.space import footprint
from metaserver.strays import Strays
from metaserver.tours import Tours

log = structlog.get_logger(__name__)

# Chunks of one tick (a second): looked at because something changed, and put to work from each queue. 50 us each.
LOOK_CHUNKS = 500
WORK_CHUNKS = 256
# What had to wait in a round waits until all others in its queue have had their turn, too.
ROUND_SECONDS = 1.0
# Others have their turn after so many.
YIELD_EVERY = 50
# The writer of a chunk with a damaged replica is asked again to end it.
RETIRE_SECONDS = 5.0
Urgency = tuple[int, int]


class _Looked(NamedTuple):
    """A chunk as it is now."""

    row: Chunk | None
    replicas: list[tuple[int, Replica]]


class Repair:
    """The queues, and what is done about the chunks in them.

    Invariant: a chunk waits in at most one queue, that of the step it needed when it was last looked at.
    """

    def __init__(
        self,
        committer: Committer,
        config: Config,
        members: Members,
        clock: LivedClock,
        retire: Callable[[int, int], None] = lambda owner, chunk: None,
    ) -> None:
        """``retire`` asks a session to end one of its chunks."""
        self._retire = retire
        self._asked_to_retire: dict[int, float] = {}
        self._committer = committer
        self._config = config
        self._members = members
        self._clock = clock
        self.orders = Orders(
            config.copies_per_server, config.copy_bytes_per_second, config.rebalance_bytes_per_second
        )  # fmt: skip
        self._fresh: dict[int, None] = {}
        self._queues: dict[Group, ChunkQueue[Urgency]] = {group: ChunkQueue() for group in Group}
        # Wanted elsewhere although nothing is wrong with them: chunk to (from, to).
        self._shifts: dict[int, tuple[int, int]] = {}
        self._graces = Graces(config.delete_grace_seconds)
        self._pressing: frozenset[int] = frozenset()
        # Servers whose replica is to be verified before it counts again, by chunk.
        self._suspects: dict[int, set[int]] = {}
        self.strays = Strays()
        self._tours = Tours(committer, members)
        # After a rebuild: a server that took no part in it may have the only copy of what is unknown here.
        self.kept_below = 0
        # The cleaner's: what was looked at, and what has become of COMPACT orders.
        self.noted: Callable[[int, Chunk], None] = lambda chunk, row: None
        self.compacted: Callable[[Order, int, OrderResult], None] = lambda order, server, result: None

    def __len__(self) -> int:
        return len(self.orders)

    # -- what happens elsewhere ----------------------------------------------------------------------------------

    def look_at(self, chunk: int) -> None:
        """Something about this chunk has changed."""
        self._fresh[chunk] = None
        for queue in self._queues.values():
            queue.wake((chunk,))

    def sealed(self, chunk: int, servers: Iterable[int]) -> None:
        """The chunk was sealed here; its replicas are not yet."""
        for server in servers:
            member = self._members.by_id.get(server)
            if member is not None:
                member.unsealed.add(chunk)
        self.look_at(chunk)

    def doubt(self, chunk: int, server: int) -> None:
        """A client got wrong bytes there: the replica is verified before it counts again."""
        self._suspects.setdefault(chunk, set()).add(server)
        self.look_at(chunk)

    def found(self, member: Member, report: ReplicaReport, finding: Finding) -> None:
        """A replica was reported (``reports.apply_report``)."""
        if finding is Finding.UNKNOWN:
            self.strays.add(report.chunk, member.server, self._clock.seconds)
        elif finding is Finding.UNSEALED:
            member.unsealed.add(report.chunk)
            self.look_at(report.chunk)
        else:
            if report.sealed:
                member.unsealed.discard(report.chunk)
            if finding is Finding.LOOK:
                if report.sealed and not report.error:
                    self.orders.succeeded(report.chunk)  # what failed before may go well now
                self.look_at(report.chunk)

    def survey(self, server: int) -> None:
        """Looks at everything the server has: it has come UP, is LOST, or is being drained."""
        self._tours.survey(server)

    def silent(self, server: int) -> None:
        """The server is DOWN or has restarted: its orders are void, and others may do what can be done elsewhere."""
        for chunk in self.orders.void_at(server):
            self.look_at(chunk)

    def restarted(self, server: int) -> None:
        """The server has begun a new life: whatever it was to do, it does not know of it; it will say what it has."""
        self.strays.forget(server)
        self.silent(server)

    def lost(self, server: int) -> None:
        """The server is LOST: its chunks need other copies."""
        self.silent(server)
        self.survey(server)

    def keep(self, member: Member) -> int:
        """Writes what is known of a server down, so that it outlives this process; the number of the change."""
        row = member.row.pack()
        change = self._committer.change(
            0, 0, lambda tx, _: tx.put(Table.SERVERS, server_key(member.server), row), frees=True
        )
        member.unsaved = False
        return change.number

    def removed(self, server: int) -> None:
        """The server is no member any more."""
        self.strays.forget(server)
        self._tours.removed(server)
        self._members.remove(server)

    def shift(self, chunk: int, giving: int, taking: int) -> None:
        """A replica is wanted on ``taking`` rather than on ``giving``, if nothing else is the matter."""
        self._shifts[chunk] = (giving, taking)
        self.look_at(chunk)

    def shifting(self, chunk: int) -> bool:
        """Whether a shift has not come to its end."""
        return chunk in self._shifts

    def leave(self, chunk: int) -> None:
        """The chunk may stay where it is."""
        self._shifts.pop(chunk, None)

    @property
    def copy_rate(self) -> float:
        """Bytes a second that were copied of late."""
        return self.orders.copied.bytes_per_second(self._clock.seconds)

    @property
    def mending(self) -> bool:
        """Whether copies that are missing are on their way."""
        return any(one.kind is Kind.COPY for one in self.orders.all())

    @property
    def copies_under_way(self) -> int:
        return sum(one.order.kind is OrderKind.COPY for one in self.orders.all())

    def waiting(self, group: Group) -> int:
        """How many chunks wait for a step of this kind."""
        return len(self._queues[group])

    # -- orders --------------------------------------------------------------------------------------------------

    def orders_for(self, server: int) -> list[Order]:
        """What a heartbeat's reply carries."""
        return self.orders.for_server(server, self._committer.durable)

    def result(self, server: int, result: OrderResult) -> None:
        """An order was carried out, or failed. Results that come twice, or of an older epoch, change nothing."""
        now = self._clock.seconds
        outstanding = self.orders.find(result.order, server) if result.epoch == self._committer.epoch else None
        if outstanding is None:
            return
        order = outstanding.order
        # First of all: refused on a full disk, it leaves no trace, and the result comes again.
        if order.kind == OrderKind.COMPACT:
            self.compacted(order, server, result)
            self.orders.answered(order, now)
            return
        self._committer.change(0, 0, lambda tx, _: apply_result(tx, server, order, result), frees=True)
        self.orders.answered(order, now)
        self.look_at(order.chunk)  # whatever else is refused: the result does not come again
        if result.error:
            self._failed(outstanding, result)
        else:
            self.orders.succeeded(order.chunk)
            if order.kind == OrderKind.COPY:
                self.orders.copied.add(order.length, now)
            if order.kind in (OrderKind.COPY, OrderKind.VERIFY):
                self._members.by_id[server].verified.add(order.chunk)
        if order.kind == OrderKind.SEAL and not result.error:
            self._members.by_id[server].unsealed.discard(order.chunk)
        self._settled(order, server, result)

    def _settled(self, order: Order, server: int, result: OrderResult) -> None:
        """What is known now of a replica that was to be verified or deleted."""
        unsealed = self._members.by_id[server].unsealed
        if order.kind == OrderKind.DELETE:
            self._trust(order.chunk, server)
            unsealed.discard(order.chunk)
            self._members.by_id[server].verified.discard(order.chunk)
            if result.error in ("", ErrorCode.NO_SUCH_CHUNK.name):
                self.strays.discard(order.chunk, server)
        elif order.kind == OrderKind.VERIFY and (not result.error or result.error in USELESS):
            self._trust(order.chunk, server)
            if not result.error and result.replica is not None and not result.replica.sealed:
                unsealed.add(order.chunk)  # its bytes are right, and perhaps in memory only

    def _trust(self, chunk: int, server: int) -> None:
        """There is nothing more to be verified."""
        suspects = self._suspects.get(chunk, set())
        suspects.discard(server)
        if not suspects:
            self._suspects.pop(chunk, None)

    def _failed(self, outstanding: Outstanding, result: OrderResult) -> None:
        order, server = outstanding.order, outstanding.server
        log.warning(
            "order failed", order=OrderKind(order.kind).name, chunk=f"{order.chunk:x}", server=server,
            source=order.source_server, error=result.error, text=result.text,
        )  # fmt: skip
        copy = order.kind == OrderKind.COPY
        if order.kind in (OrderKind.VERIFY, OrderKind.SEAL) and result.error in USELESS:
            return  # That is an answer, after which something else is to be done at once.
        blamed = [server]
        if copy and result.error in USELESS:
            blamed = [order.source_server]
        elif copy and result.error not in TARGETS_FAULT:
            # Which end it was cannot be told; both are avoided for this chunk if there are others.
            blamed.append(order.source_server)
        self.orders.failed(order.chunk, blamed, self._clock.seconds, elsewhere=copy and not order.others)
        if copy and not order.others and result.error in BAD_SOURCE:
            self._doubt_source(order)

    def _doubt_source(self, order: Order) -> None:
        """A copy has failed because of what it got: the source is verified before it counts again."""
        source = order.source_server
        if self._committer.change(0, 0, lambda tx, _: chunks.doubt(tx, order.chunk, source), frees=True).message:
            self.doubt(order.chunk, source)

    def _issue(self, kind: OrderKind, chunk: int, row: Chunk | None, step: Step) -> None:
        # Everything that may have led to it: what background work changed before counts as its own, and is not in
        # what a read says it depends on.
        ready_at = self._committer.newest
        source = next(iter(self._members.addresses([step.source])), None) if step.source else None
        self.orders.issue(
            kind, self._committer.epoch, chunk, step.server, row, ready_at, self._clock.seconds, step=step.kind,
            source=source, others=self._members.addresses(step.others), replace=step.replace,
        )  # fmt: skip

    # -- the rounds ----------------------------------------------------------------------------------------------

    async def tick(self, *, unknown_may_go: bool) -> None:
        """One bounded round; call about once a second outside the reconnect window.

        ``unknown_may_go``: nobody can still tell of chunks that are unknown here.
        """
        for chunk in self.orders.expire(self._clock.seconds):
            self.look_at(chunk)
        self._shorten_graces()
        self._go_on_walking()
        await self._classify_all(self._tours.surveyed())
        if unknown_may_go:
            self._drop_unknown()
        await self._classify_all(list(islice(self._fresh, LOOK_CHUNKS)))
        await self._work()

    async def _classify_all(self, found: Iterable[int]) -> None:
        for done, chunk in enumerate(found):
            self._fresh.pop(chunk, None)
            self._classify(chunk)
            if done % YIELD_EVERY == YIELD_EVERY - 1:
                await trio.lowlevel.checkpoint()

    async def _work(self) -> None:
        """Takes some steps from each queue; what cannot be done now goes back into it, behind the others."""
        losses_unknown = self._tours.losses_unknown
        now = self._clock.seconds
        for group, queue in self._queues.items():
            next_turn = now + len(queue) // WORK_CHUNKS * ROUND_SECONDS
            waiting: list[tuple[int, Urgency, float]] = []
            try:
                for done in range(min(WORK_CHUNKS, len(queue))):
                    item = queue.pop(now)
                    if item is None:
                        break
                    waiting.append((*item, now))
                    if group is Group.COPIES and losses_unknown and item[1][0] > 1:
                        break
                    due = self._carry_out(item[0])
                    waiting.pop()
                    if due is not None:
                        waiting.append((*item, max(due, next_turn)))
                    if done % YIELD_EVERY == YIELD_EVERY - 1:
                        await trio.lowlevel.checkpoint()
            finally:
                # Also what was refused on a full disk: it would be found again by the walk only.
                for chunk, urgency, due in waiting:
                    if due > now:
                        queue.rest(chunk, urgency, due)
                    else:
                        queue.put(chunk, urgency)

    def _look(self, chunk: int) -> _Looked:
        (row, replicas), _ = self._committer.read(0, lambda tx: (chunks.find(tx, chunk), chunks.replicas(tx, chunk)))
        return _Looked(row, replicas)

    def _classify(self, chunk: int) -> None:
        """Queues a chunk that needs something; fewest good copies first."""
        needed: Group | None = None
        if chunk not in self.orders:
            looked = self._look(chunk)
            step = self._step_for(chunk, looked)
            if step is not None:
                needed = step.kind.group
                self._queues[needed].put(chunk, good_copies(looked.replicas, self._members))
        for group, queue in self._queues.items():
            if group is not needed:
                queue.discard(chunk)

    def _step_for(self, chunk: int, looked: _Looked) -> Step | None:
        """What it needs next; what else follows from how it is now is told."""
        if looked.row is None:
            self._forget(chunk)
            return None
        if looked.row.state == ChunkState.OPEN:
            self._end_damaged(chunk, looked.row, looked.replicas)
            return None
        self.noted(chunk, looked.row)
        return self._plan(chunk, looked.row, looked.replicas)

    def _forget(self, chunk: int) -> None:
        """There is no such chunk any more."""
        self._graces.forget(chunk)
        self._shifts.pop(chunk, None)
        self._suspects.pop(chunk, None)
        if chunk not in self.strays:
            self.orders.succeeded(chunk)

    def _end_damaged(self, chunk: int, row: Chunk, replicas: list[tuple[int, Replica]]) -> None:
        """A chunk that is being written can be repaired once its writer has ended it."""
        now = self._clock.seconds
        if all(replica.good for _, replica in replicas) or self._asked_to_retire.get(chunk, now) > now:
            return
        self._asked_to_retire = {asked: until for asked, until in self._asked_to_retire.items() if until > now}
        self._asked_to_retire[chunk] = now + RETIRE_SECONDS
        self._retire(row.owner, chunk)

    def _plan(self, chunk: int, row: Chunk, replicas: list[tuple[int, Replica]]) -> Step | None:
        if row.state == ChunkState.DEAD:
            self._graces.died(chunk, footprint(row.length) * len(replicas), self._clock.seconds)
        giving, taking = self._shifts.get(chunk, (0, 0))
        now = self._clock.seconds
        hints = Hints(self._suspects.get(chunk, ()), self.orders.avoid(chunk, now), self.orders.sending, giving)
        step = plan(chunk, row, replicas, self._members, hints)
        if step is None and taking:
            step = plan_shift(chunk, row, replicas, self._members, giving, taking)
            if step is None:
                # It is done, or there is no need or place for it any more.
                del self._shifts[chunk]
        return step

    def _carry_out(self, chunk: int) -> float | None:
        """Takes the next step for a chunk, if there is one. Else when to try again; that may be now, in the next
        round."""
        now = self._clock.seconds
        if chunk in self.orders:
            return None
        due = self.orders.due(chunk)
        if due > now:
            return due
        looked = self._look(chunk)
        row = looked.row
        step = None if row is None else self._plan(chunk, row, looked.replicas)
        if row is None or step is None:
            return None
        if row.state == ChunkState.DEAD:
            due = self._graces.due(chunk, pressing=step.server in self._pressing)
        if due > now or not self._has_room(step):
            return max(due, now)
        self._committer.change(0, 0, lambda tx, _: prepare(tx, chunk, row, step), frees=True)
        order = step.kind.order
        if order is None:
            self.look_at(chunk)
        else:
            log.info("order", order=step.kind.name, chunk=f"{chunk:x}", server=step.server, source=step.source)
            self._issue(order, chunk, row, step)
        return None

    def _has_room(self, step: Step) -> bool:
        """Whether its servers may have one more order now."""
        if step.source:
            return self.orders.room_for_copy(step.server, step.source, self._clock.seconds, step.kind)
        return step.kind.order is None or self.orders.room_for(step.server, step.kind.order)

    def _shorten_graces(self) -> None:
        """What is dead need not be kept for as long as it was thought a moment ago."""
        now, members = self._clock.seconds, self._members.by_id
        pressing = frozenset(server for server in members if self._members.is_pressing(server, now))
        deletions = self._queues[Group.DELETIONS]
        if not pressing <= self._pressing:
            deletions.wake(self._graces)
        self._pressing = pressing
        deletions.wake(self._graces.release(sum(member.occupied for member in members.values()), now))

    def let_go(self, chunk: int) -> None:
        """A DEAD chunk is not to be kept for its grace."""
        self._graces.let_go(chunk)
        self._queues[Group.DELETIONS].wake([chunk])
        self.look_at(chunk)

    def grace_left(self, chunk: int) -> float:
        """For how many seconds a DEAD chunk is kept yet, where space is not pressing."""
        return max(0.0, self._graces.due(chunk, pressing=False) - self._clock.seconds)

    # -- finding what nobody told ----------------------------------------------------------------------------------

    def _go_on_walking(self) -> None:
        """Looks at all chunks again and again, slowly: whatever was missed is found."""
        self._fresh.update(dict.fromkeys(self._tours.walked()))
        if self._tours.at_the_beginning:
            # Chunks that are no more (their last server was removed, for instance) are not remembered.
            self._fresh.update(dict.fromkeys((*self._graces, *self._shifts, *self._suspects)))

    def _drop_unknown(self) -> None:
        """Has replicas of chunks that nobody knows deleted, after a grace."""
        now = self._clock.seconds
        limit = self._committer.id_limit(IdKind.CHUNK)
        for chunk, server in self.strays.heard_before(now - self._config.delete_grace_seconds):
            member = self._members.by_id.get(server)
            if member is None or not member.up or not self.kept_below <= chunk < limit or chunk in self.orders:
                continue
            # First what costs nothing: a server that was away for long may bring very many back.
            if not self.orders.room_for(server, OrderKind.DELETE) or self.orders.due(chunk) > now:
                continue
            if self._look(chunk).row is not None:
                self.strays.discard(chunk, server)
                self.look_at(chunk)
            else:
                log.info("deleting a replica of an unknown chunk", chunk=f"{chunk:x}", server=server)
                self._issue(OrderKind.DELETE, chunk, None, Step(Kind.DELETE, server))

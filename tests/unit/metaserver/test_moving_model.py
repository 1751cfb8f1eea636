"""Repair, draining, spreading and rebalancing on a model cluster: servers come and go at random while every planned
step is carried out. No step may endanger a chunk, and when the servers rest everything comes to a good end.
"""

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from memory_rows import MemoryRows

from metaserver import chunks, outcomes
from metaserver.balancing import Load, improves, is_even, pairs, unevenness
from metaserver.members import Members
from metaserver.orders import Orders
from metaserver.placement import spread
from metaserver.planning import Hints, Kind, Step, plan, plan_shift
from metaserver.protocol import (
    ChunkProgress,
    ChunkState,
    Order,
    OrderKind,
    OrderResult,
    ReplicaReport,
    ReplicaState,
    ServerState,
)
from metaserver.queueing import ChunkQueue
from metaserver.reports import apply_missing, apply_report
from metaserver.schema import Chunk, Server

SESSION, LENGTH = 1, 1000
SERVERS = range(1, 7)
HOSTS = {1: "a", 2: "a", 3: "b", 4: "b", 5: "c", 6: "d"}


class Cluster:
    """Rows of the metaserver, and what the chunkservers really have: whether their replica is right."""

    def __init__(self, copies: list[int], hosts: dict[int, str], seed: int) -> None:
        self.tx = MemoryRows()
        self.members = Members(1.0, 60.0, Random(seed))
        self.random = Random(seed)
        self.disks: dict[int, dict[int, bool]] = {server: {} for server in SERVERS}
        for server in SERVERS:
            row = Server(f"s{server}", hosts[server], 1, 1, "", [], f"/d{server}", 1 << 40)
            self.members.load(server, row, 0.0)
            member = self.members.by_id[server]
            member.state, member.listed, member.free = ServerState.UP, True, 1 << 40
        self.chunks = [self.make(number) for number in copies]

    def make(self, copies: int) -> int:
        servers = self.members.place_new(copies, 1, "", ())
        chunk = chunks.allocate(self.tx, 0, SESSION, servers, copies)
        chunks.progress(self.tx, SESSION, ChunkProgress(chunk, LENGTH, 4, 77))
        row = self.row(chunk)
        row.live = LENGTH
        chunks.seal(self.tx, chunk, row, ())
        for server in servers:
            self.disks[server][chunk] = True
        return chunk

    def row(self, chunk: int) -> Chunk:
        row = chunks.find(self.tx, chunk)
        assert row is not None
        return row

    def right(self, chunk: int, *, staying: bool) -> set[int]:
        """Servers that are up with a right replica that counts; ``staying``: those that are not being emptied."""
        rows = dict(chunks.replicas(self.tx, chunk))
        return {
            server
            for server, disk in self.disks.items()
            if disk.get(chunk) and self.members.by_id[server].up and server in rows and rows[server].good
            and not (staying and self.members.by_id[server].row.draining)
        }  # fmt: skip

    # -- what happens to servers -----------------------------------------------------------------------------------

    def happen(self, event: tuple[str, int]) -> None:
        what, server = event
        member = self.members.by_id[server]
        if what in ("down", "lost") and member.up:
            member.state = ServerState.DOWN if what == "down" else ServerState.LOST
            member.row.was_lost |= what == "lost"
        elif what == "up" and not member.up:
            self.report(server)
            member.state = ServerState.UP
        elif what == "rot" and self.disks[server]:
            self.rot(server)
        elif what in ("drain", "undrain"):
            member.row.draining = what == "drain"

    def report(self, server: int) -> None:
        """It lists what it has, after it was away."""
        there = self.disks[server]
        for chunk in self.chunks:
            if chunk in there:
                told = ReplicaReport(chunk, LENGTH, 4, 77, True, "" if there[chunk] else "BAD_CHECKSUM")
                apply_report(self.tx, server, told)
            else:
                apply_missing(self.tx, server, chunk)

    def rot(self, server: int) -> None:
        """One replica turns bad, never the last right one; a server that is up tells."""
        chunk = self.random.choice(sorted(self.disks[server]))
        others = [other for other, disk in self.disks.items() if other != server and disk.get(chunk)]
        if others:
            self.disks[server][chunk] = False
            if self.members.by_id[server].up:
                apply_report(self.tx, server, ReplicaReport(chunk, LENGTH, 4, 77, True, "BAD_CHECKSUM"))

    # -- what is done about it -------------------------------------------------------------------------------------

    def step(self, chunk: int) -> bool:
        """Takes the next step; whether anything has changed by that."""
        step = plan(chunk, self.row(chunk), chunks.replicas(self.tx, chunk), self.members, Hints())
        return step is not None and self.carry_out(chunk, step)

    def carry_out(self, chunk: int, step: Step) -> bool:
        self.check(chunk, step)
        row = self.row(chunk)
        outcomes.prepare(self.tx, chunk, row, step)
        if step.kind.order is None:
            return True
        order = Order(1, 1, step.kind.order, chunk, LENGTH, 4, 77, source_server=step.source, replace=step.replace)
        disk, error = self.disks[step.server], ""
        if order.kind == OrderKind.DELETE:
            disk.pop(chunk, None)
        elif order.kind == OrderKind.COPY:
            parts = [self.disks[each][chunk] for each in (step.source, *step.others)]
            disk[chunk] = True if any(parts) else disk.get(chunk, False)
            error = "" if any(parts) else "BAD_CHECKSUM"
        elif not disk.get(chunk, False):
            error = "BAD_CHECKSUM" if chunk in disk else "NO_SUCH_CHUNK"
        if order.kind == OrderKind.VERIFY and not error:
            self.members.by_id[step.server].verified.add(chunk)
        outcomes.apply_result(self.tx, step.server, order, OrderResult(1, 1, error))
        # A copy that fails is tried again, but not all the time.
        return order.kind != OrderKind.COPY or not error

    def check(self, chunk: int, step: Step) -> None:
        """Safety: what is deleted as superfluous is not missed, and copies come from servers that have them."""
        rows = dict(chunks.replicas(self.tx, chunk))
        if step.kind is Kind.FORGET:
            assert rows[step.server].state == ReplicaState.COPYING
            return
        assert self.members.by_id[step.server].up
        if step.kind.order is OrderKind.COPY:
            assert chunk in self.disks[step.source]
            assert not self.members.by_id[step.server].row.draining or step.replace
        if step.kind is Kind.DELETE and rows[step.server].good:
            counted = self.counted(chunk) - {step.server}
            assert len(counted) >= self.row(chunk).copies, (step, rows)

    def counted(self, chunk: int) -> set[int]:
        """Confirmed copies on servers that are up and stay."""
        up = self.members.by_id
        rows = chunks.replicas(self.tx, chunk)
        return {server for server, row in rows if row.good and up[server].up and not up[server].row.draining}

    def settle(self) -> int:
        """Until nothing more is planned; how many steps that took."""
        for count in range(100 * len(self.chunks)):
            if not sum(self.step(chunk) for chunk in self.chunks):
                return count
        raise AssertionError("it never ends")


events = st.lists(
    st.tuples(st.sampled_from(["down", "lost", "up", "up", "rot", "drain", "undrain"]), st.sampled_from(list(SERVERS))),
    max_size=25,
)
hosts = st.sampled_from([HOSTS, dict.fromkeys(SERVERS, "one"), {server: f"h{server}" for server in SERVERS}])


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), hosts, events, st.integers(0, 99), st.data())
@settings(max_examples=150, deadline=None)
def test_every_history_ends_well(
    copies: list[int], hosts: dict[int, str], history: list[tuple[str, int]], seed: int, data: st.DataObject
) -> None:
    cluster = Cluster(copies, hosts, seed)
    for event in history:
        cluster.happen(event)
        for chunk in data.draw(st.lists(st.sampled_from(cluster.chunks), max_size=3)):
            cluster.step(chunk)
    cluster.settle()
    members = cluster.members.by_id
    takers = [server for server, member in members.items() if member.works]
    for chunk in cluster.chunks:
        reachable = [server for server, disk in cluster.disks.items() if disk.get(chunk) and members[server].up]
        if not reachable or not takers:
            continue
        wanted = cluster.row(chunk).copies
        staying = cluster.right(chunk, staying=True)
        down = {s for s, row in chunks.replicas(cluster.tx, chunk) if row.good and members[s].state is ServerState.DOWN}
        assert len(staying | down) >= min(wanted, len(takers)), (chunk, staying, down)
        if len(staying) >= wanted:
            assert len(staying) == wanted
            assert cluster.right(chunk, staying=False) == staying
            most = min(wanted, len({members[server].row.host for server in (*takers, *staying)}))
            assert spread([members[server].candidate() for server in staying])[0] == most


@given(st.lists(st.integers(1, 3), min_size=1, max_size=30), hosts, st.integers(0, 99), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_rebalancing_comes_to_an_end_and_never_makes_it_worse(
    copies: list[int], hosts: dict[int, str], seed: int, size: int
) -> None:
    """All chunks are on some servers, the others are new; servers have space of different sizes."""
    cluster = Cluster(copies, hosts, seed)
    for server, member in cluster.members.by_id.items():
        member.capacity = (20 + size * server) * LENGTH

    def loads() -> list[Load]:
        for server, member in cluster.members.by_id.items():
            member.stored = LENGTH * len(cluster.disks[server])
            member.free = member.capacity - member.stored
        return [Load(server, member.stored, member.capacity) for server, member in cluster.members.by_id.items()]

    def move() -> bool:
        for giving, taking in pairs(loads()):
            for chunk in sorted(cluster.disks[giving.server]):
                rows = chunks.replicas(cluster.tx, chunk)
                step = plan_shift(chunk, cluster.row(chunk), rows, cluster.members, giving.server, taking.server)
                if step is not None and improves(giving, taking, LENGTH):
                    cluster.carry_out(chunk, step)
                    loads()
                    cluster.settle()
                    return True
        return False

    loads()
    cluster.settle()
    energy = sum(load.stored**2 / load.space for load in loads())
    for _ in range(1000):
        if is_even(loads()) or not move():
            break
        now = sum(load.stored**2 / load.space for load in loads())
        assert now < energy
        energy = now
        for chunk, wanted in zip(cluster.chunks, copies, strict=True):
            assert len(cluster.right(chunk, staying=True)) == wanted
    else:
        raise AssertionError("it never ends")


def test_a_new_server_gets_its_share() -> None:
    loads = [Load(1, 900, 1000), Load(2, 900, 1000), Load(3, 0, 1000)]
    moved = 0
    while not is_even(loads):
        giving, taking = pairs(loads)[0]
        assert improves(giving, taking, 10)
        change = {giving.server: -10, taking.server: 10}
        loads = [load._replace(stored=load.stored + change.get(load.server, 0)) for load in loads]
        moved += 1
    assert 55 <= moved <= 60
    assert unevenness(loads) <= 0.03
    assert not improves(Load(1, 50, 100), Load(2, 45, 100), 10)


def test_urgency_may_change_while_a_chunk_waits() -> None:
    queue: ChunkQueue[int] = ChunkQueue()
    for chunk, urgency in ((1, 2), (2, 2), (3, 1), (2, 0), (1, 2), (3, 5)):
        queue.put(chunk, urgency)
    assert len(queue) == 3
    assert [queue.pop(0.0) for _ in range(4)] == [(2, 0), (1, 2), (3, 5), None]
    queue.put(7, 1)
    queue.discard(7)
    assert queue.pop(0.0) is None


def test_what_rests_stands_in_nobodys_way() -> None:
    queue: ChunkQueue[int] = ChunkQueue()
    for chunk in (1, 2, 3):
        queue.put(chunk, 1)
    queue.rest(1, 1, 10.0)
    queue.rest(2, 1, 20.0)
    assert len(queue) == 3
    assert [queue.pop(5.0) for _ in range(2)] == [(3, 1), None]
    assert [queue.pop(10.0) for _ in range(2)] == [(1, 1), None]
    queue.wake([1, 2, 3])
    assert [queue.pop(10.0) for _ in range(2)] == [(2, 1), None]
    # Looked at again, it rests on; discarded, it is gone, whenever it was to wake.
    queue.rest(4, 1, 20.0)
    queue.put(4, 0)
    assert queue.pop(10.0) is None
    queue.rest(5, 1, 20.0)
    queue.discard(5)
    queue.rest(6, 1, 20.0)
    queue.rest(6, 1, 40.0)
    assert [queue.pop(30.0) for _ in range(2)] == [(4, 0), None]
    assert len(queue) == 1
    assert queue.pop(40.0) == (6, 1)


def test_copies_have_a_rate_at_both_ends() -> None:
    orders = Orders(copies_per_server=100, bytes_per_second=1000, shifted_bytes_per_second=100)
    row = Chunk(ChunkState.SEALED, 0, 0, 2, 500, 1, 7, 500, 0, 0, 0)
    source = Cluster([1], HOSTS, 0).members.by_id[1].address()
    issued = []
    for second in range(10):
        while orders.room_for_copy(2, 1, float(second), Kind.COPY):
            order = orders.issue(
                OrderKind.COPY, 1, len(issued), 2, row, 0, float(second), step=Kind.COPY, source=source
            )  # fmt: skip
            issued.append(order.order)
    assert 20 <= len(issued) <= 22
    # Another target is not held up, but the common source is.
    assert orders.room_for_copy(3, 4, 9.0, Kind.COPY)
    assert not orders.room_for_copy(3, 1, 9.0, Kind.COPY)


def test_an_order_without_an_answer_is_given_elsewhere() -> None:
    orders = Orders(4, 1e9, 1e9)
    orders.issue(OrderKind.VERIFY, 1, 5, 2, None, 0, 0.0)
    other = orders.issue(OrderKind.SEAL, 1, 6, 2, None, 0, 0.0).order
    assert orders.expire(100.0) == []
    # Its server works on others: it may be their turn.
    found = orders.find(other, 2)
    assert found is not None
    orders.answered(found.order, 140.0)
    assert orders.find(other, 2) is None
    assert orders.expire(200.0) == []
    assert orders.expire(300.0) == [5]
    assert orders.avoid(5, 300.0) == {2}
    assert orders.due(5) <= 300.0
    orders.failed(5, (2,), 301.0, elsewhere=True)
    assert 302.0 < orders.due(5) <= 330.0
    orders.issue(OrderKind.SEAL, 1, 7, 3, None, 0, 330.0)
    assert orders.void_at(3) == [7]
    assert len(orders) == 0

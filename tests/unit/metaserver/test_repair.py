"""Orders from end to end: chunkservers that register, report and obey, and a metaserver that wants copies."""

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from running_metaserver import FakeServer, Mount, Running, running

from metaserver import chunks, protocol
from metaserver.census import Census
from metaserver.changelog import LogFull
from metaserver.errors import DfsError, ErrorCode
from metaserver.planning import Group
from metaserver.protocol import ChunkState, OrderKind, OrderResult, ReplicaReport, ReplicaState, ReportPage
from metaserver.schema import IdKind
from metaserver.space import LEAST_LIMIT


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


class Obedient:
    """Chunkservers that send heartbeats and carry their orders out, until stopped."""

    def __init__(self, servers: list[FakeServer]) -> None:
        self.servers = {server.number: server for server in servers}
        self.stopped: set[int] = set()
        # Take orders, and do nothing.
        self.idle: set[int] = set()
        self.done: list[tuple[OrderKind, int, int]] = []
        self.fail: dict[tuple[OrderKind, int], str] = {}
        # As it is in truth: verifying neither seals nor syncs.
        self.verify_only_reads = False

    async def run(self, seconds: int) -> None:
        results: dict[int, list[OrderResult]] = {number: [] for number in self.servers}
        for _ in range(seconds):
            for number, server in self.servers.items():
                if number not in self.stopped:
                    await server.beat(results=results[number])
                    orders = [] if number in self.idle else server.orders
                    results[number] = [self.obey(server, order) for order in orders]
            await trio.sleep(1)

    def obey(self, server: FakeServer, order: protocol.Order) -> OrderResult:
        self.done.append((order.kind, order.chunk, server.number))
        error = self.fail.get((order.kind, server.number), "")
        if error:
            return OrderResult(order.order, order.epoch, error, "as told", server.replicas.get(order.chunk))
        replica = ReplicaReport(order.chunk, order.length, order.entries, order.chain, True)
        if order.kind == OrderKind.DELETE:
            server.replicas.pop(order.chunk, None)
            return OrderResult(order.order, order.epoch, "")
        if order.kind == OrderKind.VERIFY and self.verify_only_reads:
            return OrderResult(order.order, order.epoch, "", "", server.replicas[order.chunk])
        if order.kind == OrderKind.COPY:
            assert order.chunk in self.servers[order.source_server].replicas
        server.replicas[order.chunk] = replica
        return OrderResult(order.order, order.epoch, "", "", replica)


def states(metaserver: Running, chunk: int) -> dict[int, ReplicaState]:
    found, _ = metaserver.committer.read(0, lambda tx: chunks.replicas(tx, chunk))
    return {server: ReplicaState(replica.state) for server, replica in found}


def state(metaserver: Running, chunk: int) -> ChunkState | None:
    row, _ = metaserver.committer.read(0, lambda tx: chunks.find(tx, chunk))
    return None if row is None else row.status


async def written(
    mount: Mount, servers: dict[int, FakeServer], name: bytes = b"f", failed: tuple[int, ...] = ()
) -> int:
    """A sealed chunk with a file in it; the replicas are as an append leaves them."""
    ino = await mount.make(name)
    allocated = await mount.allocate()
    await mount.write(ino, allocated.chunk, 100)
    for address in allocated.servers:
        if address.server not in failed:
            servers[address.server].replicas[allocated.chunk] = ReplicaReport(allocated.chunk, 100, 1, 77, False)
    await mount.call(protocol.SEAL, protocol.Seal(allocated.chunk, failed))
    return allocated.chunk


async def three(metaserver: Running) -> tuple[Mount, Obedient]:
    servers = [await metaserver.server(number) for number in (1, 2, 3)]
    return await metaserver.mount(), Obedient(servers)


async def test_a_chunk_is_sealed_on_its_servers_and_deleted_after_its_last_byte(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(data, delete_grace_seconds=50.0) as metaserver:
        mount, servers = await three(metaserver)
        chunk = await written(mount, servers.servers)
        places = sorted(states(metaserver, chunk))
        await servers.run(8)
        assert sorted(servers.done) == [(OrderKind.SEAL, chunk, server) for server in places]
        assert not any(member.unsealed for member in metaserver.parts.members.by_id.values())
        await mount.unlink(b"f")
        assert state(metaserver, chunk) is ChunkState.DEAD
        await servers.run(40)
        assert len(servers.done) == 2
        await servers.run(30)
        assert sorted(servers.done[2:]) == [(OrderKind.DELETE, chunk, server) for server in places]
        assert state(metaserver, chunk) is None
        assert len(metaserver.parts.repair) == 0


async def test_a_lost_server_is_replaced_and_its_surplus_deleted_when_it_returns(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(data, lost_after_seconds=20.0, session_deadline_seconds=1e6) as metaserver:
        mount, servers = await three(metaserver)
        wanted = [await written(mount, servers.servers, b"%d" % number) for number in range(6)]
        await servers.run(20)
        servers.stopped.add(1)
        await servers.run(10)
        assert not any(kind is OrderKind.COPY for kind, _, _ in servers.done)
        await servers.run(30)
        for chunk in wanted:
            good = {server for server, each in states(metaserver, chunk).items() if each is ReplicaState.GOOD}
            assert {2, 3} <= good
        health = await metaserver.parts.status.health()
        assert (health.total, health.healthy, health.too_few) == (6, 6, 0)
        servers.stopped.clear()
        await servers.servers[1].start()
        await servers.run(30)
        for chunk in wanted:
            assert len(states(metaserver, chunk)) == 2
            assert sum(chunk in server.replicas for server in servers.servers.values()) == 2


async def test_a_failed_replica_is_settled_by_sealing_it_or_given_up(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(data) as metaserver:
        mount, servers = await three(metaserver)
        allocated = await mount.allocate()
        ino = await mount.make(b"f")
        await mount.write(ino, allocated.chunk, 100)
        first, second = (address.server for address in allocated.servers)
        chunk = allocated.chunk
        servers.servers[first].replicas[chunk] = ReplicaReport(chunk, 100, 1, 77, False)
        servers.fail[(OrderKind.SEAL, second)] = ErrorCode.WRONG_OFFSET.name
        await mount.call(protocol.SEAL, protocol.Seal(chunk, (second,)))
        assert states(metaserver, chunk)[second] is ReplicaState.UNSURE
        await servers.run(60)
        (third,) = {1, 2, 3} - {first, second}
        assert states(metaserver, chunk) == {first: ReplicaState.GOOD, third: ReplicaState.GOOD}
        assert (OrderKind.COPY, chunk, third) in servers.done
        assert (OrderKind.DELETE, chunk, second) in servers.done


async def test_a_replica_that_a_mount_doubts_is_verified(data: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with running(data) as metaserver:
        mount, servers = await three(metaserver)
        chunk = await written(mount, servers.servers)
        await servers.run(8)
        right, wrong = sorted(states(metaserver, chunk))
        servers.fail[(OrderKind.VERIFY, wrong)] = ErrorCode.BAD_CHECKSUM.name
        for server in (right, wrong):
            doubt = protocol.ReportReplica(chunk, server, ErrorCode.BAD_CHECKSUM, "a block differs")
            await mount.call(protocol.REPORT_REPLICA, doubt)
        assert set(states(metaserver, chunk).values()) == {ReplicaState.UNSURE}
        # Out of reach is not wrong.
        await mount.call(protocol.REPORT_REPLICA, protocol.ReportReplica(chunk, right, ErrorCode.UNAVAILABLE, ""))
        servers.done.clear()
        await servers.run(60)
        assert (OrderKind.VERIFY, chunk, right) in servers.done
        assert (OrderKind.VERIFY, chunk, wrong) in servers.done
        assert states(metaserver, chunk)[right] is ReplicaState.GOOD
        assert wrong not in states(metaserver, chunk)
        assert list(states(metaserver, chunk).values()) == [ReplicaState.GOOD] * 2


async def test_copies_are_limited_and_failed_ones_tried_again(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(data, lost_after_seconds=5.0, copies_per_server=2, session_deadline_seconds=1e6) as metaserver:
        mount, servers = await three(metaserver)
        wanted = [await written(mount, servers.servers, b"%d" % number) for number in range(12)]
        await servers.run(40)
        # Every copy fails, for a while.
        for server in (1, 2, 3):
            servers.fail[(OrderKind.COPY, server)] = ErrorCode.UNAVAILABLE.name
        servers.stopped.add(3)
        hurt = [chunk for chunk in wanted if 3 in states(metaserver, chunk)]
        for _ in range(20):
            await servers.run(1)
            for server in (1, 2):
                copies = [order for order in servers.servers[server].orders if order.kind == OrderKind.COPY]
                assert len(copies) <= 2
        assert any(kind is OrderKind.COPY for kind, _, _ in servers.done)
        servers.fail.clear()
        await servers.run(60)
        for chunk in hurt:
            good = [server for server, each in states(metaserver, chunk).items() if each is ReplicaState.GOOD]
            assert set(good) >= {1, 2}


async def test_orders_are_repeated_until_their_result_comes(data: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with running(data) as metaserver:
        mount, servers = await three(metaserver)
        chunk = await written(mount, servers.servers)
        first, _ = sorted(states(metaserver, chunk))
        server = servers.servers[first]
        await trio.sleep(2.1)
        orders = []
        for _ in range(3):
            await server.beat()
            orders.append(server.orders)
        assert orders[0] == orders[1] == orders[2]
        (order,) = orders[0]
        assert (order.kind, order.chunk, order.length, order.entries, order.chain) == (
            OrderKind.SEAL,
            chunk,
            100,
            1,
            77,
        )
        assert order.epoch == metaserver.committer.epoch
        # Results of another server, of another epoch, or of orders long gone change nothing.
        other = servers.servers[sorted(states(metaserver, chunk))[1]]
        await other.beat(results=[OrderResult(order.order, order.epoch, "")])
        await server.beat(results=[OrderResult(order.order, order.epoch + 1, ""), OrderResult(999, order.epoch, "")])
        assert server.orders == [order]
        await server.beat(results=[servers.obey(server, order)])
        assert server.orders == []


async def test_what_is_missing_or_different_at_a_registration(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(data) as metaserver:
        mount, servers = await three(metaserver)
        one = await written(mount, servers.servers, b"1")
        two = await written(mount, servers.servers, b"2")
        await servers.run(20)
        holder = servers.servers[sorted(states(metaserver, one))[0]]
        del holder.replicas[one]
        if two in holder.replicas:
            holder.replicas[two] = ReplicaReport(two, 100, 1, 99, True)
        await holder.start()
        assert states(metaserver, one)[holder.number] is ReplicaState.BAD
        assert states(metaserver, two).get(holder.number, ReplicaState.BAD) is ReplicaState.BAD
        # It turns up again, and is right, which is to be seen first.
        holder.replicas[one] = ReplicaReport(one, 100, 1, 77, True)
        await holder.beat(changes=[holder.replicas[one]])
        assert states(metaserver, one)[holder.number] is ReplicaState.UNSURE
        await servers.run(10)
        assert (OrderKind.VERIFY, one, holder.number) in servers.done
        assert states(metaserver, one)[holder.number] is ReplicaState.GOOD
        await holder.beat(gone=[one])
        assert states(metaserver, one)[holder.number] is ReplicaState.BAD


async def test_replicas_of_unknown_chunks_go_only_when_nobody_can_know_them(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(data) as metaserver:
        await metaserver.mount()
        limit = metaserver.committer.id_limit(IdKind.CHUNK)
    async with running(
        data, delete_grace_seconds=20.0, session_deadline_seconds=100.0, window_seconds=1.0
    ) as metaserver:
        server = await metaserver.server(1)
        known_soon, later = 5, limit + 10_000
        server.replicas = {number: ReplicaReport(number, 5, 1, 1, True) for number in (known_soon, later)}
        await server.start()
        servers = Obedient([server])
        # The session of the epoch before has not returned: it may have made the chunk.
        await servers.run(90)
        assert servers.done == []
        await servers.run(60)
        assert metaserver.parts.sessions.by_id == {}
        # The id that was never given out stays: it is proof of a rollback, not garbage.
        assert servers.done == [(OrderKind.DELETE, known_soon, 1)]


async def test_a_server_that_has_seen_more_makes_everything_read_only(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(data, delete_grace_seconds=0.0) as metaserver:
        mount, servers = await three(metaserver)
        chunk = await written(mount, servers.servers)
        await mount.unlink(b"f")
        ahead = servers.servers[1]
        ahead.highest_epoch = metaserver.committer.epoch + 1
        await ahead.start()
        assert metaserver.parts.changes.refusing
        assert await mount.fails(protocol.MAKE, protocol.Make(1, b"g", 0o100644, 0, 0)) is ErrorCode.READ_ONLY
        assert (await mount.lookup(b".")).attributes.ino == 1
        await servers.run(30)
        assert servers.done == []
        assert state(metaserver, chunk) is ChunkState.DEAD
        assert "recover --advance" in (await metaserver.parts.status.status()).read_only
        stranger = await metaserver.connect()
        request = protocol.OpenSession(0, "", "", 1, b"/", False)
        assert await stranger.fails(protocol.OPEN_SESSION, request) is ErrorCode.READ_ONLY


async def test_pages_of_a_listing_come_in_order(data: Path) -> None:
    async with running(data) as metaserver:
        server = await metaserver.server(1)
        server.incarnation += 1
        await metaserver.parts.control.register(server.register_message())

        async def refused(incarnation: int, page: int, chunks: list[int]) -> ErrorCode:
            listing = [ReplicaReport(chunk, 1, 1, 1, True) for chunk in chunks]
            with pytest.raises(DfsError) as caught:
                await metaserver.parts.control.report(1, ReportPage(incarnation, page, False, listing))
            return caught.value.code

        assert await refused(server.incarnation - 1, 0, [1]) is ErrorCode.STALE_SESSION
        assert await refused(server.incarnation, 1, [1]) is ErrorCode.INVALID
        assert await refused(server.incarnation, 0, [2, 1]) is ErrorCode.INVALID
        # Without its listing, a heartbeat makes nobody UP.
        assert (await server.beat()).register_again
        report = metaserver.parts.control.report
        first = [ReplicaReport(chunk, 1, 1, 1, True) for chunk in (1, 2)]
        await report(1, ReportPage(server.incarnation, 0, False, first))
        assert await refused(server.incarnation, 1, [2, 3]) is ErrorCode.INVALID
        await report(1, ReportPage(server.incarnation, 1, True, []))
        assert not (await server.beat()).register_again
        assert metaserver.parts.members.by_id[1].up


async def test_a_metaserver_that_restarts_asks_for_everything_again(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(data) as metaserver:
        server = await metaserver.server(1)
        mount = await metaserver.mount()
        await mount.allocate()
    async with running(data, window_seconds=2.0) as metaserver:
        server.control = metaserver.parts.control
        assert metaserver.parts.members.by_id[1].state is protocol.ServerState.DOWN
        assert metaserver.parts.members.by_id[1].reserved == LEAST_LIMIT
        assert (await server.beat()).register_again
        await server.start()
        assert metaserver.parts.members.by_id[1].up
        assert metaserver.parts.members.by_id[1].reserved == LEAST_LIMIT


async def test_listings_from_before_a_commit_do_not_give_replicas_up(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Servers that register anew while a mount writes: commits may overtake their listings."""
    async with running(data) as metaserver:
        mount, world = await three(metaserver)
        ino = await mount.make(b"f")
        longer, fresh = await mount.allocate(), await mount.allocate()
        chosen = {longer.chunk: 200, fresh.chunk: 100}
        for allocated in (longer, fresh):
            await mount.write(ino, allocated.chunk, 100)
        for address in longer.servers:
            world.servers[address.server].replicas[longer.chunk] = ReplicaReport(longer.chunk, 100, 1, 77, False)
        progress = protocol.ChunkProgress(longer.chunk, 200, 2, 78)
        file = protocol.FileCommit(ino, 0, 0, 5, (protocol.Extent(100, 100, longer.chunk, 100),))
        await mount.call(protocol.COMMIT, protocol.Commit((progress,), (file,)))
        for server in world.servers.values():
            await server.start()
        for allocated in (longer, fresh):
            chunk = allocated.chunk
            assert set(states(metaserver, chunk).values()) == {ReplicaState.GOOD}
            for address in allocated.servers:
                world.servers[address.server].replicas[chunk] = ReplicaReport(chunk, chosen[chunk], 1, 77, False)
            await mount.call(protocol.SEAL, protocol.Seal(chunk, ()))
        await world.run(30)
        for allocated in (longer, fresh):
            servers = {address.server for address in allocated.servers}
            assert states(metaserver, allocated.chunk) == dict.fromkeys(servers, ReplicaState.GOOD)
        assert {kind for kind, _, _ in world.done} == {OrderKind.SEAL}


async def test_a_replica_that_was_verified_after_the_listing_counts_again(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Power was cut everywhere, and reading back what was not sealed took too long for the first report."""
    async with running(data) as metaserver:
        mount, world = await three(metaserver)
        chunk = await written(mount, world.servers)
        holders = set(states(metaserver, chunk))
        for server in world.servers.values():
            server.replicas.clear()
            await server.start()
        assert set(states(metaserver, chunk).values()) == {ReplicaState.BAD}
        for number in holders:
            # Longer than what was committed: only the order to seal it tells whether it is right.
            late = world.servers[number].replicas[chunk] = ReplicaReport(chunk, 150, 2, 99, False)
            await world.servers[number].beat(changes=[late])
        await world.run(30)
        assert states(metaserver, chunk) == dict.fromkeys(holders, ReplicaState.GOOD)


async def test_a_replica_of_an_unknown_chunk_goes_although_its_deletion_fails_or_is_void(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(data) as metaserver:
        limit = metaserver.committer.id_limit(IdKind.CHUNK)
    async with running(data, delete_grace_seconds=5.0, window_seconds=1.0) as metaserver:
        server = await metaserver.server(1)
        stray = limit - 1
        server.replicas = {stray: ReplicaReport(stray, 5, 1, 1, True)}
        await server.start()
        servers = Obedient([server])
        servers.fail[(OrderKind.DELETE, 1)] = ErrorCode.DISK_FULL.name
        await servers.run(20)
        assert (OrderKind.DELETE, stray, 1) in servers.done
        assert len(metaserver.parts.repair.strays) == 1
        # The order is void, and the server has it still.
        servers.fail.clear()
        servers.idle.add(1)
        await servers.run(200)
        servers.idle.clear()
        servers.done.clear()
        await servers.run(400)
        assert servers.done == [(OrderKind.DELETE, stray, 1)]
        assert len(metaserver.parts.repair.strays) == 0


async def test_very_many_replicas_of_unknown_chunks_do_not_keep_everybody_waiting(
    data: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(data) as metaserver:
        limit = metaserver.committer.id_limit(IdKind.CHUNK)
    async with running(data, delete_grace_seconds=5.0, window_seconds=1.0) as metaserver:
        server = await metaserver.server(1)
        strays = range(limit - 1000, limit)
        server.replicas = {stray: ReplicaReport(stray, 5, 1, 1, True) for stray in strays}
        await server.start()
        servers = Obedient([server])
        servers.idle.add(1)
        await servers.run(20)
        repair, looked = metaserver.parts.repair, 0
        real = repair._look

        def look(chunk: int) -> Any:
            nonlocal looked
            looked += 1
            return real(chunk)

        monkeypatch.setattr(repair, "_look", look)
        await repair.tick(unknown_may_go=True)
        assert looked == 0, "the server has as many orders as it may have"
        monkeypatch.undo()
        servers.idle.clear()
        await servers.run(200)
        assert len(repair.strays) == 0


async def test_what_is_unknown_of_a_removed_server_is_forgotten(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(data) as metaserver:
        _, servers = await three(metaserver)
        server = servers.servers[3]
        server.replicas = {1 << 40: ReplicaReport(1 << 40, 5, 1, 1, True)}
        await server.start()
        assert metaserver.parts.repair.strays.servers(1 << 40) == [3]
        # Its next life does not have it any more.
        server.replicas.clear()
        await server.start()
        assert len(metaserver.parts.repair.strays) == 0
        server.replicas = {1 << 40: ReplicaReport(1 << 40, 5, 1, 1, True)}
        await server.start()
        metaserver.parts.repair.removed(3)
        assert len(metaserver.parts.repair.strays) == 0


class OneUnreachable(Obedient):
    """Nobody gets anything from server 1, whose heartbeats come."""

    def obey(self, server: FakeServer, order: protocol.Order) -> OrderResult:
        if order.kind == OrderKind.COPY and order.source_server == 1:
            return OrderResult(order.order, order.epoch, ErrorCode.UNAVAILABLE.name, "cannot connect", None)
        return super().obey(server, order)


async def test_copies_that_fail_again_and_again_do_not_keep_others_from_their_turn(
    data: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metaserver.repair.WORK_CHUNKS", 4)
    async with running(
        data, lost_after_seconds=20.0, session_deadline_seconds=1e6, copies_per_server=1
    ) as metaserver:  # fmt: skip
        servers = OneUnreachable([await metaserver.server(number) for number in (1, 2)])
        mount = await metaserver.mount()
        for number in range(10):
            assert sorted(states(metaserver, await written(mount, servers.servers, b"stuck%d" % number))) == [1, 2]
        servers.servers |= {number: await metaserver.server(number) for number in (3, 4)}
        made = [await written(mount, servers.servers, b"%d" % number) for number in range(20)]
        await servers.run(60)
        others = [chunk for chunk in made if 1 not in states(metaserver, chunk)]
        assert any(2 in states(metaserver, chunk) for chunk in others)
        servers.stopped.add(2)
        await servers.run(200)
        for chunk in others:
            good = {server for server, each in states(metaserver, chunk).items() if each is ReplicaState.GOOD}
            assert len(good - {2}) == 2


async def test_what_is_dead_and_kept_takes_up_no_more_than_a_part_of_what_is_stored(
    data: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the grace is: overwriting at full speed must not fill the disks. The oldest go first."""
    monkeypatch.setattr("metaserver.grace.MOST_KEPT_BYTES", 500_000)
    async with running(data, delete_grace_seconds=1e5) as metaserver:
        mount, servers = await three(metaserver)
        made = [await written(mount, servers.servers, b"%d" % number) for number in range(12)]
        await servers.run(8)
        for number in range(9):
            await mount.unlink(b"%d" % number)
            await servers.run(1)
        await servers.run(10)
        # Two replicas of a little over 64 KiB each.
        kept = [chunk for chunk in made if state(metaserver, chunk) is ChunkState.DEAD]
        assert kept == made[6:9]
        assert sum(chunk in server.replicas for server in servers.servers.values() for chunk in made) == 2 * (3 + 3)


async def test_news_that_there_is_no_space_for_comes_again_and_its_server_stays_up(
    data: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(data, delete_grace_seconds=0.0) as metaserver:
        mount, servers = await three(metaserver)
        chunk = await written(mount, servers.servers)
        await servers.run(8)
        first = min(states(metaserver, chunk))
        await mount.unlink(b"f")
        await trio.sleep(2.1)
        server = servers.servers[first]
        await server.beat()
        (order,) = server.orders
        result = OrderResult(order.order, order.epoch, "")

        def full(*_: object) -> None:
            raise LogFull

        with monkeypatch.context() as patch:
            patch.setattr(metaserver.committer.log, "append", full)
            reply = await server.beat(results=[result])
            assert (reply.acknowledged, reply.register_again) == (0, False)
            assert metaserver.parts.members.by_id[first].up
        # As the outbox does it.
        reply = await server.beat(results=[result])
        assert reply.acknowledged == server.heartbeats
        assert first not in states(metaserver, chunk)


async def test_a_page_that_is_left_open_does_not_have_chunks_counted_all_the_time(
    data: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(data) as metaserver:
        counted = 0

        def count(self: Census, tx: object, slice_chunks: int) -> bool:
            nonlocal counted
            counted += 1
            autojump_clock.jump(2.0)
            return True

        monkeypatch.setattr(Census, "count", count)
        for _ in range(24):
            await metaserver.parts.status.status()
            await trio.sleep(5)
        assert 2 <= counted <= 4


async def test_chunks_that_wait_for_their_turn_are_not_forgotten_on_a_full_disk(
    data: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a lost server's chunks are found again by the slow walk only, the most urgent ones last."""
    async with running(data, lost_after_seconds=20.0, session_deadline_seconds=1e6) as metaserver:
        mount, servers = await three(metaserver)
        for number in range(20):
            await written(mount, servers.servers, b"%d" % number)
        await servers.run(20)
        servers.stopped.add(1)
        await servers.run(19)
        repair = metaserver.parts.repair
        monkeypatch.setattr(repair, "_go_on_walking", lambda: None)

        def full(*_: object) -> None:
            raise LogFull

        with monkeypatch.context() as patch:
            patch.setattr(metaserver.committer.log, "append", full)
            await servers.run(3)
            lacking = repair.waiting(Group.COPIES)
            assert lacking > 3
            await servers.run(10)
            assert repair.waiting(Group.COPIES) == lacking
        await servers.run(60)
        health = await metaserver.parts.status.health()
        assert (health.total, health.healthy, health.too_few) == (20, 20, 0)

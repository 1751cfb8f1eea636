"""What was found wrong, or never made durable, counts again only once it was read back; what is the last goes never.

Each of these began as a way to lose data that a review found.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio.testing
from running_metaserver import FakeServer, Mount, Running, running
from test_repair import Obedient, states, three, written

from metaserver import protocol
from metaserver.changelog import LogFull
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import OrderKind, ReplicaReport, ReplicaState, ScrubStatus


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


QUICKLY_LOST: dict[str, Any] = {"lost_after_seconds": 20.0, "session_deadline_seconds": 1e6}


@asynccontextmanager
async def one_chunk(data: Path, **more: Any) -> AsyncIterator[tuple[Running, Mount, Obedient, int]]:
    """Three chunkservers, and a sealed chunk on two of them."""
    async with running(data, **more) as metaserver:
        mount, world = await three(metaserver)
        chunk = await written(mount, world.servers)
        await world.run(8)
        yield metaserver, mount, world, chunk


async def test_damage_is_not_forgotten_when_a_chunkserver_restarts(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """A start looks at headers and indexes only: what the scrubber had found rotten looks right again."""
    async with one_chunk(data) as (metaserver, _, world, chunk):
        rotten, _ = sorted(states(metaserver, chunk))
        server = world.servers[rotten]
        await server.beat(changes=[ReplicaReport(chunk, 100, 1, 77, True, ErrorCode.BAD_CHECKSUM.name)])
        assert states(metaserver, chunk)[rotten] is ReplicaState.BAD
        await server.start()
        assert states(metaserver, chunk)[rotten] is ReplicaState.UNSURE
        world.fail[(OrderKind.VERIFY, rotten)] = ErrorCode.BAD_CHECKSUM.name
        await world.run(30)
        assert (OrderKind.VERIFY, chunk, rotten) in world.done
        good = {number for number, each in states(metaserver, chunk).items() if each is ReplicaState.GOOD}
        assert good == {1, 2, 3} - {rotten}


async def test_a_mounts_doubt_outlives_registrations(data: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with one_chunk(data) as (metaserver, mount, world, chunk):
        wrong, _ = sorted(states(metaserver, chunk))
        doubt = protocol.ReportReplica(chunk, wrong, ErrorCode.BAD_CHECKSUM, "a block differs")
        await mount.call(protocol.REPORT_REPLICA, doubt)
        await mount.sync()
    # The metaserver has not heard of the doubt in this life, and the index of the replica is right.
    async with running(data, window_seconds=1.0) as metaserver:
        for server in world.servers.values():
            server.control = metaserver.parts.control
            await server.start()
        assert states(metaserver, chunk)[wrong] is ReplicaState.UNSURE
        world.fail[(OrderKind.VERIFY, wrong)] = ErrorCode.BAD_CHECKSUM.name
        world.done.clear()
        await world.run(30)
        assert (OrderKind.VERIFY, chunk, wrong) in world.done
        good = {number for number, each in states(metaserver, chunk).items() if each is ReplicaState.GOOD}
        assert good == {1, 2, 3} - {wrong}


async def test_what_was_read_back_but_never_synced_is_sealed_before_it_counts(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """A mount that sealed without this server doubts it as well; it has all bytes, but only in memory."""
    async with running(data) as metaserver:
        mount, world = await three(metaserver)
        allocated = await mount.allocate()
        chunk, (first, second) = allocated.chunk, (address.server for address in allocated.servers)
        await mount.write(await mount.make(b"f"), chunk, 100)
        doubt = protocol.ReportReplica(chunk, second, ErrorCode.BAD_CHECKSUM, "a block differs")
        await mount.call(protocol.REPORT_REPLICA, doubt)
        for number in (first, second):
            world.servers[number].replicas[chunk] = ReplicaReport(chunk, 100, 1, 77, False)
        await mount.call(protocol.SEAL, protocol.Seal(chunk, (second,)))
        world.verify_only_reads = True
        await world.run(20)
        assert states(metaserver, chunk) == {first: ReplicaState.GOOD, second: ReplicaState.GOOD}
        assert [each for each in world.done if each[2] == second] == [
            (OrderKind.VERIFY, chunk, second),
            (OrderKind.SEAL, chunk, second),
        ]
        assert world.servers[second].replicas[chunk].sealed


async def test_a_verification_that_did_not_take_place_settles_nothing(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with one_chunk(data) as (metaserver, mount, world, chunk):
        before = states(metaserver, chunk)
        wrong, _ = sorted(before)
        doubt = protocol.ReportReplica(chunk, wrong, ErrorCode.BAD_CHECKSUM, "a block differs")
        await mount.call(protocol.REPORT_REPLICA, doubt)
        world.fail[(OrderKind.VERIFY, wrong)] = ErrorCode.UNAVAILABLE.name
        world.done.clear()
        await world.run(30)
        # Meanwhile the other is not left alone.
        (third,) = {1, 2, 3} - set(before)
        assert set(world.done) == {(OrderKind.VERIFY, chunk, wrong), (OrderKind.COPY, chunk, third)}
        assert states(metaserver, chunk)[wrong] is ReplicaState.UNSURE


async def test_the_last_right_replica_is_not_deleted_because_it_was_superfluous_once(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with one_chunk(data, **QUICKLY_LOST) as (metaserver, _, world, chunk):
        (spare,) = {1, 2, 3} - set(states(metaserver, chunk))
        held = world.servers[spare]
        # A third copy comes up, and is to go; its server stops before it has carried that out.
        held.replicas[chunk] = ReplicaReport(chunk, 100, 1, 77, True)
        held.free = 1 << 30
        await held.beat(changes=[held.replicas[chunk]])
        world.idle |= {1, 2, 3}
        await world.run(5)
        (leaving,) = [number for number, each in states(metaserver, chunk).items() if each is ReplicaState.DELETING]
        world.stopped.add(leaving)
        await world.run(10)
        world.stopped |= {1, 2, 3}
        await world.run(40)
        # It alone returns.
        world.idle.clear()
        world.stopped.remove(leaving)
        await world.servers[leaving].start()
        world.done.clear()
        await world.run(20)
        assert chunk in world.servers[leaving].replicas
        assert states(metaserver, chunk)[leaving] is ReplicaState.GOOD
        assert (OrderKind.VERIFY, chunk, leaving) in world.done
        # And when all are back, one goes as before.
        world.stopped.clear()
        for number in {1, 2, 3} - {leaving}:
            await world.servers[number].start()
        await world.run(30)
        assert list(states(metaserver, chunk).values()) == [ReplicaState.GOOD] * 2


async def test_what_a_server_says_is_taken_in_the_order_in_which_it_says_it(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """A long heartbeat that was given up for being late is still being worked on when the next one comes."""
    async with one_chunk(data) as (metaserver, _, world, chunk):
        number, _ = sorted(states(metaserver, chunk))
        server = world.servers[number]
        others = [ReplicaReport(1 << 40 | each, 1, 1, 1, True) for each in range(1000)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.beat, [*others, ReplicaReport(chunk, 100, 1, 77, True)])
            await trio.lowlevel.checkpoint()
            nursery.start_soon(server.beat, None, [chunk])
        assert states(metaserver, chunk)[number] is ReplicaState.BAD


async def test_that_a_server_was_lost_outlives_the_metaserver(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """What comes back after years is not relied on because the metaserver was restarted meanwhile."""
    async with one_chunk(data, **QUICKLY_LOST) as (metaserver, mount, world, chunk):
        lost, other = sorted(states(metaserver, chunk))
        (third,) = {1, 2, 3} - {lost, other}
        world.stopped.add(lost)
        await world.run(60)
        assert states(metaserver, chunk)[third] is ReplicaState.GOOD
        await mount.sync()
    world.done.clear()
    async with running(data, window_seconds=1.0) as metaserver:
        for server in world.servers.values():
            server.control = metaserver.parts.control
            await server.start()
        world.stopped.clear()
        member = metaserver.parts.members.by_id[lost]
        assert member.was_lost
        # Full, so that one of the others is to go.
        for number in (other, third):
            world.servers[number].free = 1 << 30
        await world.run(30)
        verified = world.done.index((OrderKind.VERIFY, chunk, lost))
        (deleted,) = (place for place, each in enumerate(world.done) if each[0] is OrderKind.DELETE)
        assert verified < deleted
        # A pass over everything, begun before it returned, does not count; one begun afterwards does.
        await world.run(100)
        for began, trusted in ((1e4, False), (50.0, True)):
            await world.servers[lost].beat(scrub=ScrubStatus(0, 0, 0.0, 0.0, 0, began - 10.0, 10.0))
            assert member.was_lost is not trusted
        await world.servers[lost].start()
        assert not metaserver.parts.members.by_id[lost].was_lost
        await mount_synced(metaserver)
    async with running(data, window_seconds=1.0) as metaserver:
        assert not any(member.was_lost for member in metaserver.parts.members.by_id.values())


async def mount_synced(metaserver: Running) -> None:
    await metaserver.committer.wait_durable(metaserver.committer.newest)


@pytest.mark.parametrize("returns", [True, False])
async def test_that_a_server_was_lost_is_written_down_once_there_is_space(
    data: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch, *, returns: bool
) -> None:
    """Also if it comes back in the next life of the metaserver only."""

    def full(*_: object) -> None:
        raise LogFull

    async with one_chunk(data, **QUICKLY_LOST) as (metaserver, _, world, chunk):
        lost = min(states(metaserver, chunk))
        with monkeypatch.context() as patch:
            patch.setattr(metaserver.committer.log, "append", full)
            world.stopped.add(lost)
            with suppress(DfsError):
                await world.run(60)
            assert metaserver.parts.members.by_id[lost].was_lost
        if returns:
            await world.servers[lost].start()
        else:
            await trio.sleep(2)
        await mount_synced(metaserver)
    async with running(data, window_seconds=1.0) as metaserver:
        assert metaserver.parts.members.by_id[lost].was_lost


async def test_a_server_that_there_was_no_space_for_is_taken_in_durably_later(
    data: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise LogFull

    async with running(data) as metaserver:
        server = FakeServer(metaserver, 1, "host1", 1 << 30)
        with monkeypatch.context() as patch:
            patch.setattr(metaserver.committer.log, "append", full)
            with pytest.raises(DfsError):
                await server.start()
        await server.start()
    async with running(data) as metaserver:
        assert list(metaserver.parts.members.by_id) == [1]

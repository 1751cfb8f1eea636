"""Draining, removing, rebalancing and other numbers of copies, with chunkservers that obey; and crashes in between."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from running_metaserver import FILE, FakeServer, Running, running
from test_repair import Obedient, states, three, written

from metaserver import chunks, copies, protocol
from metaserver.balancing import Mode
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import OrderKind, ReplicaState, ServerState
from metaserver.schema import Table, Task, TaskKind

DIRECTORY = 0o040755


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


async def refused(attempt: Callable[[], Any]) -> tuple[ErrorCode, str]:
    with pytest.raises(DfsError) as caught:
        await attempt()
    return caught.value.code, caught.value.text


def wanted(metaserver: Running, chunk: int) -> int:
    row, _ = metaserver.committer.read(0, lambda tx: chunks.find(tx, chunk))
    assert row is not None
    return row.copies


def good(metaserver: Running, chunk: int) -> set[int]:
    return {server for server, state in states(metaserver, chunk).items() if state is ReplicaState.GOOD}


async def left(metaserver: Running, number: int) -> int:
    await trio.sleep(1)
    status = await metaserver.parts.status.status()
    return next(server.to_move for server in status.servers if server.server == number)


async def test_a_server_is_emptied_removed_and_may_come_back(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(data, lost_after_seconds=20.0, session_deadline_seconds=1e6) as metaserver:
        mount, servers = await three(metaserver)
        admin = metaserver.parts.admin
        wanted = [await written(mount, servers.servers, b"%d" % number) for number in range(6)]
        await servers.run(10)
        planned = await admin.drains.drain("server1", force=False)
        assert (planned.server, planned.name) == (1, "server1")
        there = await left(metaserver, 1)
        assert there == sum(1 in states(metaserver, chunk) for chunk in wanted) > 0
        servers.done.clear()
        await servers.run(40)
        assert await left(metaserver, 1) == 0
        assert all(good(metaserver, chunk) == {2, 3} for chunk in wanted)
        # Copied before it was deleted, chunk by chunk.
        for chunk in {chunk for kind, chunk, _ in servers.done if kind is OrderKind.COPY}:
            kinds = [kind for kind, other, _ in servers.done if other == chunk]
            assert kinds.index(OrderKind.COPY) < kinds.index(OrderKind.DELETE)
        assert 1 not in [address.server for _ in range(5) for address in (await mount.allocate()).servers]
        code, text = await refused(lambda: admin.drains.remove("1", lose=False))
        assert (code, "DRAINING" in text) == (ErrorCode.BUSY, True)
        servers.stopped.add(1)
        await servers.run(5)
        await admin.drains.remove("server1", lose=False)
        await servers.run(3)
        assert 1 not in metaserver.parts.members.by_id
        # Its disk is a new server.
        servers.stopped.clear()
        await servers.servers[1].start()
        assert metaserver.parts.members.by_id[1].shown_state is ServerState.UP


async def test_a_drain_outlives_a_restart_and_is_taken_back(data: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with running(data) as metaserver:
        await three(metaserver)
        await metaserver.parts.admin.drains.drain("2", force=True)
    async with running(data, window_seconds=1.0) as metaserver:
        server = FakeServer(metaserver, 2, "host2", 1 << 40)
        await server.start()
        assert metaserver.parts.members.by_id[2].shown_state is ServerState.DRAINING
        await metaserver.parts.admin.drains.undrain("server2")
        await server.start()
        assert metaserver.parts.members.by_id[2].shown_state is ServerState.UP
        text = (await metaserver.parts.admin.drains.undrain("server2")).text
        assert "is not being emptied" in text


async def test_a_drain_that_cannot_end_is_refused(data: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with running(data, copies=3, lost_after_seconds=5.0, session_deadline_seconds=1e6) as metaserver:
        mount, servers = await three(metaserver)
        chunk = await written(mount, servers.servers)
        await servers.run(5)
        drains = metaserver.parts.admin.drains
        code, text = await refused(lambda: drains.drain("server1", force=False))
        assert code is ErrorCode.UNAVAILABLE
        assert "want up to 3 copies, and only 2 other servers" in text
        assert (await refused(lambda: drains.drain("nobody", force=True)))[0] is ErrorCode.NOT_FOUND
        await drains.drain("server1", force=True)
        await servers.run(20)
        assert good(metaserver, chunk) == {1, 2, 3}
        status = await metaserver.parts.status.status()
        assert (status.servers[0].to_move, status.servers[0].to_move_stuck) == (1, 1)
        # A fourth server takes it.
        servers.servers[4] = await metaserver.server(4)
        await servers.run(20)
        assert good(metaserver, chunk) == {2, 3, 4}
        servers.stopped.add(4)
        await servers.run(20)
        code, text = await refused(lambda: drains.drain("server4", force=False))
        assert (code, "is LOST" in text) == (ErrorCode.UNAVAILABLE, True)


async def test_too_little_space_for_a_drain(data: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with running(data) as metaserver:
        mount, servers = await three(metaserver)
        ino = await mount.make(b"f")
        allocated = await mount.allocate()
        await mount.write(ino, allocated.chunk, 60 << 20)
        first = allocated.servers[0].server
        for number, server in servers.servers.items():
            server.free = 1 << 20
            if number in (allocated.servers[0].server, allocated.servers[1].server):
                server.replicas[allocated.chunk] = protocol.ReplicaReport(allocated.chunk, 60 << 20, 1, 77, False)
        await mount.call(protocol.SEAL, protocol.Seal(allocated.chunk, ()))
        await servers.run(5)
        code, text = await refused(lambda: metaserver.parts.admin.drains.drain(str(first), force=False))
        assert code is ErrorCode.NO_SPACE
        assert "60 MiB have to leave" in text


async def test_writers_are_asked_to_leave_a_server_that_is_emptied(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(data, session_deadline_seconds=1e6) as metaserver:
        mount, servers = await three(metaserver)
        allocated = await mount.allocate()
        first = allocated.servers[0].server
        await metaserver.parts.admin.drains.drain(str(first), force=False)
        await servers.run(3)
        assert mount.retired == [allocated.chunk]


async def test_only_copies_are_not_lost_without_being_told(data: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with running(data, copies=1, lost_after_seconds=10.0, session_deadline_seconds=1e6) as metaserver:
        mount, servers = await three(metaserver)
        chunk = await written(mount, servers.servers, b"f")
        await servers.run(5)
        (holder,) = good(metaserver, chunk)
        drains, files = metaserver.parts.admin.drains, metaserver.parts.admin.losses
        assert await files.find() == []
        servers.stopped.add(holder)
        await servers.run(5)
        code, text = await refused(lambda: drains.remove(str(holder), lose=True))
        assert (code, "wait until it is LOST" in text) == (ErrorCode.BUSY, True)
        (missing,) = await files.find()
        assert (missing.path, missing.chunks) == ("/f", 1)
        await servers.run(10)
        code, text = await refused(lambda: drains.remove(str(holder), lose=False))
        assert (code, "only copy of 1 chunks with data of 1 files" in text) == (ErrorCode.BUSY, True)
        await drains.remove(str(holder), lose=True)
        await servers.run(3)
        assert states(metaserver, chunk) == {}
        # It comes back after all: what it has is as good as ever.
        await servers.servers[holder].start()
        assert good(metaserver, chunk) == {holder}


async def test_the_name_of_a_server_that_is_up_is_taken(data: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with running(data) as metaserver:
        _, servers = await three(metaserver)
        other = FakeServer(metaserver, 9, "elsewhere", 1 << 40)
        message = other.register_message()
        message.name = "server1"
        code, text = await refused(lambda: metaserver.parts.control.register(message))
        assert (code, "the name server1 is taken (server 1" in text) == (ErrorCode.BUSY, True)
        servers.stopped.add(1)
        await servers.run(6)
        await metaserver.parts.control.register(message)
        code, text = await refused(lambda: metaserver.parts.admin.drains.undrain("server1"))
        assert (code, "give the number of one: 1 (DOWN), 9" in text) == (ErrorCode.INVALID, True)


async def test_a_new_server_takes_its_share(data: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with running(data, session_deadline_seconds=1e6, rebalance_bytes_per_second=300) as metaserver:
        mount, servers = await three(metaserver)
        wanted = [await written(mount, servers.servers, b"%d" % number) for number in range(24)]
        for server in servers.servers.values():
            server.free = 4000
        servers.servers[4] = await metaserver.server(4, free=5600)
        balancer = metaserver.parts.admin.balancer
        await servers.run(3)
        # By itself, and slowly: three chunks a second at most.
        assert balancer.mode is Mode.BY_ITSELF
        counts = []
        for _ in range(40):
            await servers.run(2)
            for server in servers.servers.values():
                server.free = 5600 - 100 * len(server.replicas)
            counts.append(len(servers.servers[4].replicas))
        assert all(later - earlier <= 8 for earlier, later in pairwise(counts))
        assert {len(server.replicas) for server in servers.servers.values()} <= {11, 12, 13}
        assert (balancer.mode, balancer.status().moved_chunks) == (Mode.IDLE, 12)
        assert all(len(good(metaserver, chunk)) == 2 for chunk in wanted)
        servers.done.clear()
        await servers.run(20)
        assert servers.done == []
        balancer.stop()
        assert balancer.status().mode == "STOPPED"


# -- copies --------------------------------------------------------------------------------------------------------


async def test_copies_of_a_file_are_raised_and_lowered(data: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with running(data, session_deadline_seconds=1e6) as metaserver:
        mount, servers = await three(metaserver)
        chunk = await written(mount, servers.servers)
        ino = (await mount.lookup(b"f")).attributes.ino
        await servers.run(8)
        admin = metaserver.parts.admin
        assert (await admin.set_copies(ino, 3)).own == 3
        await servers.run(10)
        assert (wanted(metaserver, chunk), good(metaserver, chunk)) == (3, {1, 2, 3})
        assert (await mount.lookup(b"f")).attributes.copies == 3
        for number in (1, 0):
            await admin.set_copies(ino, number)
            await servers.run(10)
            expected = number or 2
            assert (wanted(metaserver, chunk), len(good(metaserver, chunk))) == (expected, expected)
        for number in (-1, 17):
            assert (await refused(lambda number=number: admin.set_copies(ino, number)))[0] is ErrorCode.INVALID
        assert (await refused(lambda: admin.set_copies(999, 2)))[0] is ErrorCode.NOT_FOUND


async def test_a_chunk_has_as_many_copies_as_its_most_demanding_file(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(data) as metaserver:
        mount, _ = await three(metaserver)
        precious = await mount.make(b"precious", mode=DIRECTORY)
        admin = metaserver.parts.admin
        await admin.set_copies(precious, 3)
        await trio.sleep(1)
        inside, outside = await mount.make(b"f", precious), await mount.make(b"g")
        assert admin.get_copies(inside).own == 3
        # Written into a chunk that was allocated for ordinary files.
        allocated = await mount.allocate()
        for ino, at in ((inside, 0), (outside, 50)):
            extents = (protocol.Extent(0, 50, allocated.chunk, at),)
            progress = protocol.ChunkProgress(allocated.chunk, at + 50, 1 + at, 77 + at)
            file = protocol.FileCommit(ino, 0, 50, 5, extents)
            await mount.call(protocol.COMMIT, protocol.Commit((progress,), (file,)))
            assert wanted(metaserver, allocated.chunk) == 3
        await admin.set_copies(outside, 1)
        await trio.sleep(1)
        assert wanted(metaserver, allocated.chunk) == 3
        await admin.set_copies(precious, 1)
        await trio.sleep(1)
        assert wanted(metaserver, allocated.chunk) == 1
        # Chunks and space are given out as asked for.
        three_copies = await mount.call(protocol.ALLOCATE, protocol.Allocate("client", (), 3))
        assert (three_copies.copies, len(three_copies.servers)) == (3, 3)
        assert await mount.fails(protocol.ALLOCATE, protocol.Allocate("client", (), 17)) is ErrorCode.INVALID
        one, two = [await mount.call(protocol.STAT_FS, protocol.StatFs(ino)) for ino in (outside, 1)]
        assert one.total > two.total


async def test_a_tree_is_walked_in_steps_that_survive_a_crash(
    data: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "STEP_ROWS", 3)
    monkeypatch.setattr(copies, "PAGE_ROWS", 2)
    async with running(data, age=False) as metaserver:
        metaserver.parts.resuming.window.closed.set()
        await metaserver.server(1)
        mount = await metaserver.mount()
        top = await mount.make(b"top", mode=DIRECTORY)
        inos = [top]
        for number in range(4):
            below = await mount.make(b"d%d" % number, top, mode=DIRECTORY)
            inos += [below] + [await mount.make(b"f%d" % each, below, mode=FILE) for each in range(3)]
        other = await mount.make(b"other")
        await metaserver.parts.admin.set_copies(top, 3)
        steps = 0
        while metaserver.parts.tasks.count(TaskKind.SET_COPIES) and steps < 4:
            metaserver.parts.tasks.step(metaserver.parts.tasks._turns()[0])
            steps += 1
        await mount.sync()
        task = metaserver.parts.tasks
        assert task.count(TaskKind.SET_COPIES) == 1
        metaserver.image(data.with_name("image"))
        done = sum(metaserver.parts.admin.get_copies(ino).own == 3 for ino in inos)
        assert 0 < done < len(inos)
    async with running(data.with_name("image"), window_seconds=1.0, session_deadline_seconds=1e6) as metaserver:
        await trio.sleep(5)
        assert metaserver.parts.tasks.count(TaskKind.SET_COPIES) == 0
        assert {metaserver.parts.admin.get_copies(ino).own for ino in inos} == {3}
        assert metaserver.parts.admin.get_copies(other).own == 0


async def test_of_two_numbers_for_a_tree_the_later_one_counts(
    data: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "STEP_ROWS", 3)
    async with running(data) as metaserver:
        await metaserver.server(1)
        mount = await metaserver.mount()
        top = await mount.make(b"top", mode=DIRECTORY)
        inos = [top] + [await mount.make(b"f%d" % each, top) for each in range(20)]
        await metaserver.parts.admin.set_copies(top, 3)
        await metaserver.parts.admin.set_copies(top, 4)
        assert metaserver.parts.tasks.count(TaskKind.SET_COPIES) == 2
        await trio.sleep(5)
        assert {metaserver.parts.admin.get_copies(ino).own for ino in inos} == {4}


async def test_removing_a_server_goes_on_after_a_crash(
    data: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metaserver.removal.STEP_REPLICAS", 2)
    async with running(data, lost_after_seconds=5.0, session_deadline_seconds=1e6) as metaserver:
        mount, servers = await three(metaserver)
        for number in range(9):
            await written(mount, servers.servers, b"%d" % number)
        await servers.run(10)
        servers.stopped.add(1)
        await servers.run(30)
        task = Task(TaskKind.REMOVE_SERVER, 1)
        metaserver.committer.change(0, 0, lambda tx, _: tx.put(Table.TASKS, (77).to_bytes(8, "big"), task.pack()))
        metaserver.parts.tasks.add(77, task)
        metaserver.parts.tasks.step(77)
        monkeypatch.setattr(metaserver.parts.tasks, "step", lambda number: None)
        await mount.sync()
        metaserver.image(data.with_name("image"))
    async with running(data.with_name("image"), window_seconds=1.0, session_deadline_seconds=1e6) as metaserver:
        back = FakeServer(metaserver, 1, "host1", 1 << 40)
        assert (await refused(back.start))[0] is ErrorCode.BUSY
        await trio.sleep(5)
        assert 1 not in metaserver.parts.members.by_id
        await back.start()
        assert metaserver.parts.members.by_id[1].up


# -- repair --------------------------------------------------------------------------------------------------------


async def test_the_fewest_copies_come_first_even_before_what_waits_already(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Two servers are lost one after the other; copies are so slow that the order shows."""
    async with running(
        data, copies=3, lost_after_seconds=5.0, session_deadline_seconds=1e6, copy_bytes_per_second=20
    ) as metaserver:
        servers = Obedient([await metaserver.server(number) for number in range(1, 7)])
        mount = await metaserver.mount()
        wanted = [await written(mount, servers.servers, b"%d" % number) for number in range(60)]
        await servers.run(10)
        for number in (1, 2):
            servers.stopped.add(number)
            while metaserver.parts.members.by_id[number].state is not ServerState.LOST:
                await servers.run(1)
        under_way = {one.order.chunk for one in metaserver.parts.repair.orders.all()}
        urgent = {chunk for chunk in wanted if len(good(metaserver, chunk) - {1, 2}) == 1} - under_way
        assert len(urgent) > 2
        servers.done.clear()
        await servers.run(400)
        copied = [chunk for kind, chunk, _ in servers.done if kind is OrderKind.COPY and chunk not in under_way]
        # Others only where both ends of a copy have nothing more urgent to do.
        assert urgent <= set(copied[: 2 * len(urgent)])
        assert len(set(copied)) > 4 * len(urgent)
        assert all(len(good(metaserver, chunk) - {1, 2}) == 3 for chunk in wanted)


@pytest.mark.parametrize("code", [ErrorCode.BAD_CHECKSUM, ErrorCode.UNAVAILABLE, ErrorCode.DISK_FULL])
async def test_one_bad_target_does_not_hold_a_chunk_up(
    data: Path, autojump_clock: trio.testing.MockClock, code: ErrorCode
) -> None:
    async with running(data, lost_after_seconds=5.0, session_deadline_seconds=1e6) as metaserver:
        servers = Obedient([await metaserver.server(number) for number in range(1, 5)])
        mount = await metaserver.mount()
        chunk = await written(mount, servers.servers)
        await servers.run(5)
        lost, *_ = sorted(good(metaserver, chunk))
        others = {1, 2, 3, 4} - good(metaserver, chunk)
        bad = min(others)
        servers.fail[(OrderKind.COPY, bad)] = code.name
        servers.stopped.add(lost)
        await servers.run(30)
        assert max(others) in good(metaserver, chunk)


async def test_a_server_that_takes_orders_and_does_nothing_is_passed_over(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(data, lost_after_seconds=5.0, session_deadline_seconds=1e6) as metaserver:
        servers = Obedient([await metaserver.server(number) for number in range(1, 5)])
        mount = await metaserver.mount()
        chunk = await written(mount, servers.servers)
        await servers.run(5)
        lost, *_ = sorted(good(metaserver, chunk))
        idle = min({1, 2, 3, 4} - good(metaserver, chunk))
        metaserver.parts.members.by_id[max({1, 2, 3, 4} - good(metaserver, chunk))].disk_state = "FULL"
        servers.idle.add(idle)
        servers.stopped.add(lost)
        await servers.run(200)
        assert len(good(metaserver, chunk) - {lost}) == 2
        assert idle not in states(metaserver, chunk)


async def test_copies_on_one_host_move_apart_when_there_is_another(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(data, session_deadline_seconds=1e6) as metaserver:
        servers = Obedient([await metaserver.server(number, host="one") for number in (1, 2)])
        mount = await metaserver.mount()
        wanted = [await written(mount, servers.servers, b"%d" % number) for number in range(4)]
        await servers.run(10)
        servers.servers[3] = await metaserver.server(3, host="two")
        await servers.run(30)
        for chunk in wanted:
            assert 3 in good(metaserver, chunk)
            assert len(states(metaserver, chunk)) == 2
        status = await metaserver.parts.status.status()
        assert status.repair is not None
        assert (status.repair.chunks, status.repair.to_move, status.repair.under_way) == (0, 0, 0)

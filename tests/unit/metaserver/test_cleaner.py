"""Cleaning from end to end on the metaserver's side: orders, copies, maps, and whatever may go wrong in between."""

from pathlib import Path

import pytest
import trio
import trio.testing
from running_metaserver import FakeServer, Mount, Running, running
from test_repair import Obedient, state, states

from metaserver import chunks, extents, protocol, rewriting
from metaserver.cleaner import Job
from metaserver.errors import ErrorCode
from metaserver.protocol import (
    ChunkProgress,
    ChunkState,
    Commit,
    Extent,
    FileCommit,
    OrderKind,
    OrderResult,
    ReplicaReport,
    ReplicaState,
)  # fmt: skip
from metaserver.reports import apply_report
from metaserver.schema import Chunk

MIB = 1 << 20
LENGTH = 40 * MIB
# A byte of a file, as what is in which chunk at which offset when it was written.
Origin = tuple[int, int]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


class Cleaning(Obedient):
    """Obeys COMPACT as well; ``origins`` says where each run of bytes of a new chunk was at first."""

    def __init__(self, servers: list[FakeServer]) -> None:
        super().__init__(servers)
        self.origins: dict[int, list[tuple[int, int, Origin]]] = {}
        self.wrong_source = 0
        self.results: dict[int, list[OrderResult]] = {number: [] for number in self.servers}

    async def run(self, seconds: int) -> None:
        for _ in range(seconds):
            for number, server in self.servers.items():
                if number not in self.stopped:
                    results, self.results[number] = self.results[number], []
                    await server.beat(results=results)
                    self.results[number] = [self.obey(server, order) for order in server.orders]
            await trio.sleep(1)

    async def until_ordered(self) -> None:
        """Until a COMPACT order has been carried out; its result has not been told yet."""
        for _ in range(60):
            await self.run(1)
            if compactions(self):
                return
        raise AssertionError("nothing is cleaned")

    def obey(self, server: FakeServer, order: protocol.Order) -> OrderResult:
        if order.kind != OrderKind.COMPACT:
            return super().obey(server, order)
        self.done.append((order.kind, order.chunk, server.number))
        error = self.fail.get((order.kind, server.number), "")
        if error:
            return OrderResult(order.order, order.epoch, error, "as told", source=self.wrong_source)
        at, moves = 0, []
        for source in order.sources:
            assert source.chunk in self.servers[source.server].replicas
            for start, stop in source.ranges:
                moves.append((source.chunk, start, stop - start, at))
                self.origins.setdefault(order.chunk, []).append((at, stop - start, (source.chunk, start)))
                at += stop - start
        replica = ReplicaReport(order.chunk, at, len(moves), 99, True)
        server.replicas[order.chunk] = replica
        return OrderResult(order.order, order.epoch, "", "", replica, moves)

    def origin(self, chunk: int, offset: int) -> Origin:
        for at, length, (before, start) in self.origins.get(chunk, ()):
            if at <= offset < at + length:
                return self.origin(before, start + offset - at)
        return chunk, offset


async def begun(metaserver: Running, servers: int = 3) -> tuple[Mount, Cleaning]:
    found = [await metaserver.server(number) for number in range(1, servers + 1)]
    return await metaserver.mount(), Cleaning(found)


async def mostly_dead(
    mount: Mount, servers: Cleaning, ino: int, at: int, pieces: list[int], length: int = LENGTH
) -> int:
    """A sealed chunk of which only 1,000 bytes at each of ``pieces`` are part of a file, one after another from file
    offset ``at``."""
    allocated = await mount.allocate()
    chunk = allocated.chunk
    found = tuple(Extent(at + 1000 * number, 1000, chunk, start) for number, start in enumerate(pieces))
    commit = Commit((ChunkProgress(chunk, length, 640, 77),), (FileCommit(ino, 0, at + 1000 * len(pieces), 5, found),))
    await mount.call(protocol.COMMIT, commit)
    for address in allocated.servers:
        servers.servers[address.server].replicas[chunk] = ReplicaReport(chunk, length, 640, 77, False)
    await mount.call(protocol.SEAL, protocol.Seal(chunk, ()))
    return chunk


def contents(metaserver: Running, servers: Cleaning, ino: int) -> dict[int, Origin]:
    """Where every hundredth byte of a file came from."""
    found, _ = metaserver.committer.read(0, lambda tx: extents.page(tx, ino, 0, 1 << 40, 10_000)[0])
    return {
        extent.file_offset + at: servers.origin(extent.chunk, extent.chunk_offset + at)
        for extent in found
        for at in range(0, extent.length, 100)
    }


def mapped(metaserver: Running, ino: int) -> set[int]:
    found, _ = metaserver.committer.read(0, lambda tx: extents.page(tx, ino, 0, 1 << 40, 10_000)[0])
    return {extent.chunk for extent in found}


def compactions(servers: Cleaning) -> list[tuple[int, int]]:
    return [(chunk, server) for kind, chunk, server in servers.done if kind is OrderKind.COMPACT]


async def test_mostly_dead_chunks_become_one_and_go(data: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with running(data, delete_grace_seconds=0.0) as metaserver:
        mount, servers = await begun(metaserver)
        ino = await mount.make(b"f")
        # More rows than one step rewrites.
        one = await mostly_dead(mount, servers, ino, 0, [number * 100_000 for number in range(150)])
        two = await mostly_dead(mount, servers, ino, 150_000, [5, 7 * MIB])
        before = contents(metaserver, servers, ino)
        await servers.run(30)
        (new,) = mapped(metaserver, ino)
        assert new not in (one, two)
        assert contents(metaserver, servers, ino) == before
        assert state(metaserver, new) is ChunkState.SEALED
        assert list(states(metaserver, new).values()) == [ReplicaState.GOOD] * 2
        assert state(metaserver, one) is state(metaserver, two) is None
        assert not any({one, two} & server.replicas.keys() for server in servers.servers.values())
        assert len(compactions(servers)) == 1
        status = (await metaserver.parts.status.status()).cleaner
        assert (status.candidates, status.cleaning, status.moved_bytes, status.freed_chunks) == (0, 0, 152_000, 2)
        assert status.freed_bytes > 70 * MIB
        # It is made where most of it is, and there is nothing left to do.
        servers.done.clear()
        await servers.run(30)
        assert servers.done == []


async def test_files_change_while_their_chunks_are_cleaned(data: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with running(data, delete_grace_seconds=0.0) as metaserver:
        mount, servers = await begun(metaserver)
        stays, goes = await mount.make(b"stays"), await mount.make(b"goes")
        one = await mostly_dead(mount, servers, stays, 0, [0, 10 * MIB, 20 * MIB])
        two = await mostly_dead(mount, servers, goes, 0, [MIB])
        await servers.until_ordered()
        assert {state(metaserver, one), state(metaserver, two)} == {ChunkState.SEALED}
        # The order is carried out; before its result comes a file is overwritten, cut, and another one removed.
        other = await mount.allocate()
        await mount.write(stays, other.chunk, 500, offset=300)
        resize = protocol.SetAttributes(stays, size=2600)
        await mount.call(protocol.SET_ATTRIBUTES, resize)
        await mount.unlink(b"goes")
        assert state(metaserver, two) is ChunkState.DEAD
        expected = contents(metaserver, servers, stays)
        await servers.run(30)
        assert contents(metaserver, servers, stays) == expected
        assert len(mapped(metaserver, stays)) == 2
        assert one not in mapped(metaserver, stays)
        assert state(metaserver, one) is state(metaserver, two) is None


async def test_nothing_is_left_if_all_of_it_dies_meanwhile(data: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with running(data, delete_grace_seconds=0.0) as metaserver:
        mount, servers = await begun(metaserver)
        one = await mostly_dead(mount, servers, await mount.make(b"f"), 0, [0])
        await servers.until_ordered()
        await mount.unlink(b"f")
        await servers.run(30)
        assert state(metaserver, one) is None
        assert all(server.replicas == {} for server in servers.servers.values())
        rows, _ = metaserver.committer.read(0, rewriting.filling)
        assert rows == []


async def test_no_row_is_rewritten_before_there_are_enough_copies(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(data, delete_grace_seconds=0.0, session_deadline_seconds=1e6) as metaserver:
        mount, servers = await begun(metaserver)
        ino = await mount.make(b"f")
        one = await mostly_dead(mount, servers, ino, 0, [0, MIB])
        for server in servers.servers:
            servers.fail[(OrderKind.COPY, server)] = ErrorCode.IO.name
        await servers.run(60)
        assert len(compactions(servers)) == 1
        assert mapped(metaserver, ino) == {one}
        assert (await metaserver.parts.status.status()).cleaner.cleaning == 1
        # One server is away: the old chunk still has two copies, perhaps, and must not end with one.
        ((new, target),) = compactions(servers)
        servers.stopped.update(set(servers.servers) - {target})
        await servers.run(20)
        assert mapped(metaserver, ino) == {one}
        servers.stopped.clear()
        servers.fail.clear()
        for server in servers.servers.values():
            await server.start()
        await servers.run(150)
        assert mapped(metaserver, ino) == {new}
        assert list(states(metaserver, new).values()) == [ReplicaState.GOOD] * 2


async def test_copies_that_cannot_be_had_end_the_attempt(data: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with running(data, delete_grace_seconds=0.0, session_deadline_seconds=1e6) as metaserver:
        mount, servers = await begun(metaserver)
        ino = await mount.make(b"f")
        one = await mostly_dead(mount, servers, ino, 0, [0, MIB])
        for server in servers.servers:
            servers.fail[(OrderKind.COPY, server)] = ErrorCode.DISK_FULL.name
        await servers.run(330)
        ((first, _), *_) = compactions(servers)
        assert state(metaserver, first) is None
        assert not any(first in server.replicas for server in servers.servers.values())
        assert mapped(metaserver, ino) == {one}
        assert (await metaserver.parts.status.status()).cleaner.failed == 1


async def test_a_damaged_source_is_verified_and_the_rest_tried_again(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(data, delete_grace_seconds=0.0) as metaserver:
        mount, servers = await begun(metaserver)
        ino = await mount.make(b"f")
        one = await mostly_dead(mount, servers, ino, 0, [0, MIB])
        servers.wrong_source = one
        for server in servers.servers:
            servers.fail[(OrderKind.COMPACT, server)] = ErrorCode.BAD_CHECKSUM.name
        await servers.until_ordered()
        await servers.run(6)
        assert [chunk for kind, chunk, _ in servers.done if kind is OrderKind.VERIFY] == [one]
        ((new, _),) = compactions(servers)
        assert state(metaserver, new) is None
        servers.fail.clear()
        before = contents(metaserver, servers, ino)
        await servers.run(60)
        assert one not in mapped(metaserver, ino)
        assert contents(metaserver, servers, ino) == before


async def test_a_server_that_falls_silent_is_replaced(data: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with running(data, delete_grace_seconds=0.0, session_deadline_seconds=1e6) as metaserver:
        mount, servers = await begun(metaserver)
        ino = await mount.make(b"f")
        one = await mostly_dead(mount, servers, ino, 0, [0, MIB])
        await servers.until_ordered()
        ((first, target),) = compactions(servers)
        servers.stopped.add(target)
        before = contents(metaserver, servers, ino)
        await servers.run(150)
        assert {server for _, server in compactions(servers)} > {target}
        assert one not in mapped(metaserver, ino)
        assert contents(metaserver, servers, ino) == before
        # What it made after all is garbage when it comes back.
        servers.stopped.clear()
        await servers.servers[target].start()
        await servers.run(30)
        assert first not in servers.servers[target].replicas
        assert one not in servers.servers[target].replicas
        assert state(metaserver, first) is None


@pytest.mark.parametrize("seconds", [4, 5, 6, 7, 8, 9])
async def test_a_restart_of_the_metaserver_forgets_what_was_under_way(
    data: Path, autojump_clock: trio.testing.MockClock, seconds: int
) -> None:
    replicas = {}
    origins = {}
    async with running(data, delete_grace_seconds=0.0) as metaserver:
        mount, servers = await begun(metaserver)
        ino = await mount.make(b"f")
        await mostly_dead(mount, servers, ino, 0, [number * 100_000 for number in range(150)])
        await mostly_dead(mount, servers, ino, 150_000, [5, 7 * MIB])
        before = contents(metaserver, servers, ino)
        await servers.run(seconds)
        replicas, origins = {n: server.replicas for n, server in servers.servers.items()}, servers.origins
    async with running(data, delete_grace_seconds=0.0, window_seconds=1.0) as metaserver:
        found = []
        for number, there in replicas.items():
            server = FakeServer(metaserver, number, f"host{number}", 100 << 30)
            server.replicas = there
            await server.start()
            found.append(server)
        servers = Cleaning(found)
        servers.origins = origins
        await servers.run(120)
        assert contents(metaserver, servers, ino) == before
        rows, _ = metaserver.committer.read(0, rewriting.filling)
        assert rows == []
        assert len(mapped(metaserver, ino)) <= 2
        live = mapped(metaserver, ino)
        assert {chunk for server in found for chunk in server.replicas} == live


async def test_impossible_results_and_results_that_come_twice_change_nothing(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(data, delete_grace_seconds=0.0) as metaserver:
        mount, servers = await begun(metaserver)
        ino = await mount.make(b"f")
        one = await mostly_dead(mount, servers, ino, 0, [0, MIB])
        await servers.until_ordered()
        ((_, number),) = compactions(servers)
        server = servers.servers[number]
        (order,) = (order for order in server.orders if order.kind == OrderKind.COMPACT)
        servers.results[number] = []
        replica = ReplicaReport(order.chunk, 2000, 2, 99, True)
        wrong = OrderResult(order.order, order.epoch, "", "", replica, [(one, 0, 5000, 0)])
        await server.beat(results=[wrong])
        await server.beat(results=[wrong, servers.obey(server, order)])
        assert mapped(metaserver, ino) == {one}
        row, _ = metaserver.committer.read(0, lambda tx: chunks.find(tx, order.chunk))
        assert row is None or row.state == ChunkState.DEAD
        before = contents(metaserver, servers, ino)
        await servers.run(60)
        assert one not in mapped(metaserver, ino)
        assert contents(metaserver, servers, ino) == before


async def test_many_little_chunks_become_few(data: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with running(data, delete_grace_seconds=0.0) as metaserver:
        mount, servers = await begun(metaserver)
        inos = []
        for number in range(40):
            inos.append(await mount.make(b"%d" % number))
            await mostly_dead(mount, servers, inos[-1], 0, [0], length=1000)
        assert len({chunk for server in servers.servers.values() for chunk in server.replicas}) == 40
        before = [contents(metaserver, servers, ino) for ino in inos]
        await servers.run(60)
        assert len({chunk for server in servers.servers.values() for chunk in server.replicas}) <= 17
        assert [contents(metaserver, servers, ino) for ino in inos] == before


async def test_the_cleaner_can_be_turned_off_and_keeps_to_its_rate(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(data, clean_bytes_per_second=0) as metaserver:
        mount, servers = await begun(metaserver)
        await mostly_dead(mount, servers, await mount.make(b"f"), 0, [0, MIB])
        await servers.run(30)
        assert compactions(servers) == []
    async with running(data.with_name("other"), clean_bytes_per_second=100) as metaserver:
        mount, servers = await begun(metaserver)
        ino = await mount.make(b"f")
        for number in range(70):
            await mostly_dead(mount, servers, ino, 30_000 * number, [MIB * piece for piece in range(30)])
        await servers.run(30)
        # Dozens of chunks of 30,000 bytes at three times 100 bytes a second: the next order comes in hours.
        assert len(compactions(servers)) == 1
        assert len(mapped(metaserver, ino)) >= 70 - 64 + 1


# -- garbage -------------------------------------------------------------------------------------------------------


async def test_an_orphan_is_deleted_after_a_grace_when_a_server_tells_of_it(
    data: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """A first append that came after the chunk was deleted: it is told of with a heartbeat, not only in a listing."""
    async with running(data, delete_grace_seconds=20.0, session_deadline_seconds=1e6) as metaserver:
        mount, servers = await begun(metaserver)
        allocated = await mount.allocate()
        await mount.call(protocol.SEAL, protocol.Seal(allocated.chunk, ()))
        await servers.run(60)
        assert state(metaserver, allocated.chunk) is None
        late = servers.servers[1]
        orphan = ReplicaReport(allocated.chunk, 5, 1, 1, False)
        late.replicas[allocated.chunk] = orphan
        servers.done.clear()
        await late.beat(changes=[orphan])
        await servers.run(15)
        assert servers.done == []
        await servers.run(30)
        assert servers.done == [(OrderKind.DELETE, allocated.chunk, 1)]
        assert late.replicas == {}
        # A chunk that is being written is not garbage, however early its server tells of it.
        new = await mount.allocate()
        server = servers.servers[new.servers[0].server]
        server.replicas[new.chunk] = ReplicaReport(new.chunk, 5, 1, 1, False)
        await server.beat(changes=[server.replicas[new.chunk]])
        await servers.run(60)
        assert list(states(metaserver, new.chunk).values()) == [ReplicaState.GOOD] * 2
        assert new.chunk in server.replicas


async def test_rewriting_stops_when_the_new_chunk_proves_damaged(
    data: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two steps: what still refers to the old chunk is safe there."""
    async with running(data) as metaserver:
        mount, servers = await begun(metaserver)
        ino = await mount.make(b"f")
        old = await mostly_dead(mount, servers, ino, 0, [number * 20_000 for number in range(300)])
        step = metaserver.parts.cleaner._rewrite_step

        def damaging(job: Job, chunk: int, position: bytes) -> rewriting.Rewritten | None:
            done = step(job, chunk, position)
            for number, server in servers.servers.items():
                told = server.replicas.get(job.chunk)
                if told is not None:
                    told.error = "BAD_CHECKSUM"
                    metaserver.committer.change(0, 0, lambda tx, _, at=number, told=told: apply_report(tx, at, told))  # type: ignore[misc]
            return done

        monkeypatch.setattr(metaserver.parts.cleaner, "_rewrite_step", damaging)
        await servers.until_ordered()
        for _ in range(60):
            await servers.run(1)
            if len(mapped(metaserver, ino)) > 1 or old not in mapped(metaserver, ino):
                break
        assert old in mapped(metaserver, ino)
        assert state(metaserver, old) is ChunkState.SEALED


async def test_what_is_hardly_worth_it_does_not_keep_the_cleaner_from_what_is(
    data: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large cluster has more chunks that are not quite worth cleaning than are remembered."""
    monkeypatch.setattr("metaserver.cleaner.MOST_CANDIDATES", 10)
    async with running(data, delete_grace_seconds=0.0) as metaserver:
        cleaner = metaserver.parts.cleaner
        for chunk in range(1000, 1030):
            cleaner.note(chunk, Chunk(ChunkState.SEALED, 0, 0, 2, LENGTH, 640, 77, LENGTH * 7 // 10, 0, 0, 0))
        mount, servers = await begun(metaserver)
        ino = await mount.make(b"f")
        await mostly_dead(mount, servers, ino, 0, [0, 5000])
        await servers.until_ordered()

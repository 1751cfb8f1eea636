"""The data path over real chunkservers in this process, on loopback and real disks; the metaserver is the fake."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import trio
from datafakes import CLUSTER, Bench, FakeMeta, FakePool, FakeServer

from chunkserver import identity
from chunkserver.client import Pool, open_pool
from chunkserver.node import Node
from chunkserver.protocol import Peer
from dfsmount.cache import BlockCache
from dfsmount.readahead import ReadAhead
from dfsmount.reader import Reader
from dfsmount.writer import Writer, WriterOptions
from metaserver import protocol, transport
from metaserver.key import ClusterKey
from metaserver.protocol import ServerAddress

KEY = ClusterKey(b"k" * 32)
MIB = 1 << 20


@asynccontextmanager
async def serving(path: Path, name: str) -> AsyncIterator[Peer]:
    """A chunkserver while the block runs."""
    disk, who = identity.open_directory(str(path), name)
    who.cluster_id = str(CLUSTER)
    identity.save(disk, who)
    listener = transport.listen("127.0.0.1", 0)
    try:
        async with trio.open_nursery() as nursery:
            node = Node(disk, who, KEY, nursery, reserve=lambda capacity: 0)
            await node.begin()
            nursery.start_soon(transport.serve, listener, node.accept)
            yield Peer(who.server, "127.0.0.1", listener.getsockname()[1])
            nursery.cancel_scope.cancel()
    finally:
        disk.unlock()


class MetaOfReal(FakeMeta):
    """Knows where the real servers listen; what is stored there it cannot see."""

    def __init__(self, peers: list[Peer]) -> None:
        pool = FakePool(0)
        pool.servers = {peer.server: FakeServer(peer.server) for peer in peers}
        super().__init__(pool)
        self.peers = {peer.server: peer for peer in peers}

    def _address(self, server: int) -> ServerAddress:
        peer = self.peers[server]
        return ServerAddress(server, peer.host, peer.port, "", 1)

    def peer(self, server: int) -> ServerAddress | None:
        return self._address(server)

    def _allocate(self, message: protocol.Allocate) -> protocol.Allocated:
        allocated = super()._allocate(message)
        servers = tuple(self._address(address.server) for address in allocated.servers)
        return protocol.Allocated(allocated.chunk, servers, allocated.copies)

    def _progress(self, told: protocol.ChunkProgress) -> None:
        chunk = self.chunks[told.chunk]
        assert not chunk.sealed
        chunk.length, chunk.entries = told.length, told.entries


class RealBench(Bench):
    def __init__(self, meta: MetaOfReal, pool: Pool, stops: dict[int, trio.CancelScope]) -> None:
        options = WriterOptions(append_seconds=2.0)
        super().__init__(meta.pool, meta, Writer(meta, pool, options), Reader(meta, pool, BlockCache(16 * MIB)))
        self.chunkservers = pool
        self.stops = stops


@asynccontextmanager
async def real_bench(path: Path, count: int = 3) -> AsyncIterator[RealBench]:
    async with trio.open_nursery() as nursery:
        peers: list[Peer] = []
        stops: dict[int, trio.CancelScope] = {}

        async def run(number: int, task_status: trio.TaskStatus[None]) -> None:
            with trio.CancelScope() as scope:
                async with serving(path / str(number), f"server{number}") as peer:
                    peers.append(peer)
                    stops[peer.server] = scope
                    task_status.started()
                    await trio.sleep_forever()

        for number in range(count):
            await nursery.start(run, number)
        async with AsyncExitStack() as stack:
            pool = await stack.enter_async_context(open_pool(KEY, str(CLUSTER)))
            bench = RealBench(MetaOfReal(peers), pool, stops)
            nursery.start_soon(bench.writer.run)
            nursery.start_soon(bench.reader.run)
            yield bench
            await bench.writer.close()
        nursery.cancel_scope.cancel()


async def test_streams_and_small_files_come_back(tmp_path: Path) -> None:
    async with real_bench(tmp_path) as bench:
        stream = bench.create()
        block = bytes(range(256)) * 4096
        for number in range(20):
            await bench.writer.write(stream, number * MIB, block)
        small = [bench.create() for _ in range(200)]
        for number, file in enumerate(small):
            await bench.writer.write(file, 0, bytes([number]) * (number * 40 + 1))
            bench.writer.flush_soon(file)
        await bench.writer.write(stream, 5 * MIB + 100, b"overwritten")
        await bench.writer.flush_all()
        again = bench.reopen(stream)
        handle = ReadAhead()
        expected = bytearray(block * 20)
        expected[5 * MIB + 100 : 5 * MIB + 111] = b"overwritten"
        for offset in range(0, 20 * MIB, 131072):
            data = await bench.reader.read(again, handle, offset, 131072)
            assert data == expected[offset : offset + 131072]
        for number, file in enumerate(small):
            assert await bench.read(bench.reopen(file)) == bytes([number]) * (number * 40 + 1)
        # Every replica by itself, from the disk.
        for chunk, known in bench.meta.chunks.items():
            for server in known.servers if known.length else ():
                peer = bench.meta.peers[server]  # type: ignore[attr-defined]
                assert (await bench.chunkservers.verify(peer, chunk)).bad_blocks == ()


async def test_a_server_that_stops_is_not_noticed(tmp_path: Path) -> None:
    async with real_bench(tmp_path) as bench:
        file = bench.create()
        await bench.writer.write(file, 0, b"before")
        await bench.writer.flush(file)
        chunk = next(iter(file.extents)).chunk
        for server in bench.meta.chunks[chunk].servers[:1]:
            bench.stops[server].cancel()
            bench.pool.servers[server].down = True
        await bench.writer.write(file, 6, b" and after")
        await bench.writer.flush(file)
        assert file.error is None
        assert bench.meta.chunks[chunk].length == 6
        assert await bench.read(bench.reopen(file)) == b"before and after"


async def test_a_server_behind_the_first_stops(tmp_path: Path) -> None:
    async with real_bench(tmp_path) as bench:
        file = bench.create()
        await bench.writer.write(file, 0, bytes(3 * MIB))
        await bench.writer.flush(file)
        chunk = next(iter(file.extents)).chunk
        second = bench.meta.chunks[chunk].servers[1]
        bench.stops[second].cancel()
        bench.pool.servers[second].down = True
        await bench.writer.write(file, 3 * MIB, b"x" * MIB)
        await bench.writer.flush(file)
        assert file.error is None
        await bench.writer.close()
        assert bench.meta.sealed[0] == (chunk, (second,))
        assert await bench.read(bench.reopen(file)) == bytes(3 * MIB) + b"x" * MIB

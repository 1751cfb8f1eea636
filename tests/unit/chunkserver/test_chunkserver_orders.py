"""Orders: copies from peers, one after another per chunk, each once, never of an older epoch."""

import errno
import os

import pytest
import trio
from chunkserver_harness import FaultyDisk, Started, StartNode, Writer

from chunkserver import chunkfile, identity
from chunkserver.chunkfile import PAYLOAD_OFFSET
from chunkserver.client import Pool
from chunkserver.protocol import Peer
from chunkserver.replica import ReplicaState
from metaserver.errors import ErrorCode
from metaserver.protocol import Order, OrderKind, OrderResult

CHUNK = 0x99


class Sender:
    """Numbers orders and waits for their results."""

    def __init__(self, started: Started, epoch: int = 1) -> None:
        self.started = started
        self.epoch = epoch
        self.number = 0

    def make(
        self, kind: OrderKind, chunk: int = CHUNK, writer: Writer | None = None, source: Peer | None = None
    ) -> Order:
        self.number += 1
        order = Order(self.number, self.epoch, kind, chunk)
        if writer is not None:
            order.length, order.entries, order.chain = writer.offset, writer.index, writer.chain
        if source is not None:
            order.source_server, order.source_host, order.source_port = source.server, source.host, source.port
        return order

    async def results(self, *orders: Order) -> list[OrderResult]:
        node = self.started.node
        node.submit(list(orders))
        wanted = {(order.epoch, order.order) for order in orders}
        with trio.fail_after(20):
            while True:
                found = {(r.epoch, r.order): r for r in node.outbox.parcel().results}
                if wanted <= set(found):
                    return [found[(order.epoch, order.order)] for order in orders]
                await trio.sleep(0.005)

    async def code(self, order: Order) -> str:
        return (await self.results(order))[0].error


async def sealed(pool: Pool, started: Started, *, chunk: int = CHUNK, size: int = 300_000) -> Writer:
    writer = Writer(chunk)
    if size:
        await writer.send(pool, started.peer, os.urandom(size))
        await started.store.seal(chunk, writer.offset, writer.index, writer.chain)
    return writer


@pytest.mark.parametrize("size", [1, 65536, 300_000, 9_000_000])
async def test_copy_brings_the_same_file(start_node: StartNode, pool: Pool, size: int) -> None:
    async with start_node("a") as a, start_node("b") as b:
        writer = Writer(CHUNK)
        data = os.urandom(size)
        for start in range(0, size, 4 << 20):
            await writer.send(pool, a.peer, data[start : start + (4 << 20)], block=40_000)
        await a.store.seal(CHUNK, writer.offset, writer.index, writer.chain)
        sender = Sender(b)
        (result,) = await sender.results(sender.make(OrderKind.COPY, writer=writer, source=a.peer))
        assert (result.error, result.text) == ("", "")
        assert result.replica == a.store.table.get(CHUNK).report()
        ours, theirs = [(s.path / chunkfile.chunk_path(CHUNK)).read_bytes() for s in (a, b)]
        assert ours[4096:] == theirs[4096:]
        assert (await pool.verify(b.peer, CHUNK)).bad_blocks == ()
        assert await sender.code(sender.make(OrderKind.COPY, writer=writer, source=a.peer)) == ""  # here already
    async with start_node("b") as b:
        assert b.store.table.get(CHUNK).report() == result.replica


async def test_copy_that_does_not_fit_leaves_nothing(start_node: StartNode, pool: Pool, damaged: set[str]) -> None:
    damaged.add("a")
    async with start_node("a") as a, start_node("b", wrap=FaultyDisk) as b:
        writer = await sealed(pool, a)
        sender = Sender(b)
        longer = sender.make(OrderKind.COPY, writer=writer, source=a.peer)
        longer.entries += 1
        assert await sender.code(longer) == "WRONG_OFFSET"
        other = sender.make(OrderKind.COPY, writer=writer, source=a.peer)
        other.chain ^= 1
        assert await sender.code(other) == "CHAIN_MISMATCH"
        huge = sender.make(OrderKind.COPY, writer=writer, source=a.peer)
        huge.length = huge.entries = 1 << 40
        assert await sender.code(huge) in ("DISK_FULL", "INVALID")
        unknown = sender.make(OrderKind.COPY, chunk=CHUNK + 1, writer=writer, source=a.peer)
        assert await sender.code(unknown) == "NO_SUCH_CHUNK"
        b.node.disk.faults["write"] = [errno.ENOSPC]  # type: ignore[attr-defined]
        assert await sender.code(sender.make(OrderKind.COPY, writer=writer, source=a.peer)) == "DISK_FULL"
        path = a.path / chunkfile.chunk_path(CHUNK)
        with path.open("r+b") as file:
            file.seek(PAYLOAD_OFFSET + 70_000)
            file.write(b"damaged")
        assert await sender.code(sender.make(OrderKind.COPY, writer=writer, source=a.peer)) == "BAD_CHECKSUM"
        nobody = Peer(5, "127.0.0.1", 1)
        assert await sender.code(sender.make(OrderKind.COPY, writer=writer, source=nobody)) == "UNAVAILABLE"
        assert list((b.path / chunkfile.chunk_path(CHUNK)).parent.iterdir()) == []
        assert len(b.store.table) == 0


async def test_copy_replaces_a_replica_that_was_given_up_and_nothing_else(start_node: StartNode, pool: Pool) -> None:
    async with start_node("a") as a, start_node("b", wrap=FaultyDisk) as b:
        writer = await sealed(pool, a)
        sender = Sender(b)
        await Writer(CHUNK).send(pool, b.peer, b"another history")
        assert await sender.code(sender.make(OrderKind.COPY, writer=writer, source=a.peer)) == "EXISTS"
        b.store.table.give_up(b.store.table.get(CHUNK), OSError(errno.EIO, "failed"))
        assert await sender.code(sender.make(OrderKind.COPY, writer=writer, source=a.peer)) == ""
        assert [path.name for path in (b.path / chunkfile.chunk_path(CHUNK)).parent.iterdir()] == [f"{CHUNK:016x}"]
        assert bytes((await pool.read(b.peer, CHUNK, 0, 10)).payload) == writer.data[:65536]


async def test_a_copy_whose_name_cannot_be_synced_is_given_up_and_known(start_node: StartNode, pool: Pool) -> None:
    """A file that nobody knows of would stay; and it may be the only copy that is whole."""
    async with start_node("a") as a, start_node("b", wrap=FaultyDisk) as b:
        writer = await sealed(pool, a)
        sender = Sender(b)
        b.node.disk.faults["sync_directory"] = [errno.EIO]  # type: ignore[attr-defined]
        assert await sender.code(sender.make(OrderKind.COPY, writer=writer, source=a.peer)) == "DISK_FAILED"
        replica = b.store.table.get(CHUNK)
        assert (replica.state, replica.error) == (ReplicaState.FAILED, "REPLICA_FAILED")
        assert [report.error for report in b.node.outbox.parcel().changes] == ["REPLICA_FAILED"]
        directory = (b.path / chunkfile.chunk_path(CHUNK)).parent
        assert [path.name for path in directory.iterdir()] == [f"{CHUNK:016x}.failed"]
        assert bytes((await pool.read(b.peer, CHUNK, 0, 10)).payload) == writer.data[:65536]
        assert await sender.code(sender.make(OrderKind.COPY, writer=writer, source=a.peer)) == ""
        assert [path.name for path in directory.iterdir()] == [f"{CHUNK:016x}"]


async def test_seal_verify_delete_in_order(start_node: StartNode, pool: Pool) -> None:
    async with start_node() as a:
        writer = Writer(CHUNK)
        await writer.send(pool, a.peer, os.urandom(200_000))
        sender = Sender(a)
        orders = [
            sender.make(OrderKind.SEAL, writer=writer),
            sender.make(OrderKind.VERIFY),
            sender.make(OrderKind.DELETE),
            sender.make(OrderKind.VERIFY),
        ]
        results = await sender.results(*orders)
        assert [result.error for result in results] == ["", "", "", "NO_SUCH_CHUNK"]
        assert [result.replica is not None for result in results] == [True, True, False, False]
        assert results[0].replica.sealed  # type: ignore[union-attr]
        assert await sender.code(sender.make(OrderKind.DELETE)) == ""  # it is gone: what was wanted


async def test_orders_of_different_chunks_do_not_wait_for_each_other(start_node: StartNode, pool: Pool) -> None:
    async with start_node() as a:
        await sealed(pool, a)
        sender = Sender(a)
        hanging = sender.make(OrderKind.COPY, chunk=5, writer=Writer(5), source=Peer(1, "127.0.0.1", 1))
        hanging.entries = hanging.length = 5
        a.node.submit([hanging])
        assert await sender.code(sender.make(OrderKind.DELETE)) == ""


async def test_repeated_order_is_carried_out_once_and_answered_again(start_node: StartNode, pool: Pool) -> None:
    async with start_node() as a:
        await sealed(pool, a)
        sender = Sender(a)
        verify = sender.make(OrderKind.VERIFY)
        assert await sender.code(verify) == ""
        a.node.outbox.acknowledge(a.node.outbox.parcel().mark)
        await a.store.delete(CHUNK)
        assert await sender.code(verify) == ""  # again it would be NO_SUCH_CHUNK


async def test_orders_of_an_older_epoch_are_refused_even_after_a_restart(start_node: StartNode, pool: Pool) -> None:
    async with start_node() as a:
        await sealed(pool, a)
        assert await Sender(a, epoch=7).code(Sender(a, epoch=7).make(OrderKind.VERIFY)) == ""
        stored = identity.load(a.node.disk)
        assert stored is not None
        assert (stored.highest_epoch, stored.highest_chunk) == (7, CHUNK)
        assert await Sender(a, epoch=6).code(Sender(a, epoch=6).make(OrderKind.DELETE)) == "STALE_EPOCH"
    async with start_node() as a:
        assert await Sender(a, epoch=6).code(Sender(a, epoch=6).make(OrderKind.DELETE)) == "STALE_EPOCH"
        assert (a.path / chunkfile.chunk_path(CHUNK)).exists()


async def test_unexpected_failure_of_an_order_is_a_result(
    start_node: StartNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start_node() as a:
        monkeypatch.setattr(a.store, "delete", None)
        sender = Sender(a)
        assert await sender.code(sender.make(OrderKind.DELETE)) == ErrorCode.INTERNAL.name

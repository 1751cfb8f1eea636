"""A whole replica out of damaged ones: whatever is undamaged somewhere is found, and nothing else is ever taken."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from chunkserver_harness import CLUSTER, Started, StartNode, Writer
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from chunkserver import chunkfile
from chunkserver.chunkfile import ENTRY_BYTES, INDEX_OFFSET, PAYLOAD_OFFSET, FormatError
from chunkserver.client import Pool
from chunkserver.protocol import Peer
from chunkserver.salvage import merge_entries
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import CopySource, Order, OrderKind

CHUNK = 0x5A1
FIRST = chunkfile.first_chain(CLUSTER, CHUNK)
SIZE = 600_000
BLOCK = 20_000


def entries(count: int) -> bytes:
    data, chain = b"", FIRST
    for number in range(count):
        entry, chain = chunkfile.encode_entry(chain, number * 10, 10, crc32c(b"%d" % number), 7, number * 10, 3, number)
        data += entry
    return data


WHOLE = entries(12)
damages = st.lists(st.tuples(st.integers(0, 2), st.integers(0, len(WHOLE) * 8 - 1)), max_size=20)


@given(damages)
def test_entries_are_merged_if_each_is_whole_somewhere(flips: list[tuple[int, int]]) -> None:
    copies = [bytearray(WHOLE) for _ in range(3)]
    for number, bit in flips:
        copies[number][bit // 8] ^= 1 << bit % 8
    each = [any(c[at : at + 64] == WHOLE[at : at + 64] for c in copies) for at in range(0, len(WHOLE), ENTRY_BYTES)]
    if all(each):
        assert merge_entries(copies, 12, FIRST) == WHOLE
    else:
        with pytest.raises(FormatError):
            merge_entries(copies, 12, FIRST)


def test_entries_of_another_chunk_or_too_few_do_not_help() -> None:
    assert merge_entries([WHOLE[:100], WHOLE], 12, FIRST) == WHOLE
    for candidates in ([], [b""], [WHOLE[:-1]], [bytes(len(WHOLE))]):
        with pytest.raises(FormatError):
            merge_entries(candidates, 12, FIRST)
    with pytest.raises(FormatError):
        merge_entries([WHOLE], 12, FIRST ^ 1)


# -- between servers -------------------------------------------------------------------------------------------------


def chunk_file(started: Started) -> Path:
    return started.path / chunkfile.chunk_path(CHUNK)


def damage(started: Started, *places: int, with_bytes: bytes = b"\0\xff" * 20) -> None:
    with chunk_file(started).open("r+b") as file:
        for place in places:
            file.seek(place)
            file.write(with_bytes)


async def two_replicas(pool: Pool, a: Started, b: Started) -> Writer:
    writer = Writer(CHUNK)
    data = os.urandom(SIZE)
    for started in (a, b):
        writer = Writer(CHUNK)
        await writer.send(pool, started.peer, data, block=BLOCK)
        await started.store.seal(CHUNK, writer.offset, writer.index, writer.chain)
    return writer


def salvage(writer: Writer, sources: list[Peer], replace: bool = False) -> Order:
    first, *rest = sources
    order = Order(1, 1, OrderKind.COPY, CHUNK, writer.offset, writer.index, writer.chain)
    order.source_server, order.source_host, order.source_port = first.server, first.host, first.port
    order.others = [CopySource(peer.server, peer.host, peer.port) for peer in rest]
    order.replace = replace
    return order


async def carry_out(started: Started, order: Order) -> str:
    result = await started.node.running.orders._result(order)  # type: ignore[union-attr]
    return result.error


DAMAGES: dict[str, tuple[Callable[[Started], None], Callable[[Started], None]]] = {
    "payload": (
        lambda a: damage(a, PAYLOAD_OFFSET + 5, PAYLOAD_OFFSET + 300_000),
        lambda b: damage(b, PAYLOAD_OFFSET + 30_000, PAYLOAD_OFFSET + SIZE - 41),
    ),
    "index": (
        lambda a: damage(a, INDEX_OFFSET + 3 * ENTRY_BYTES),
        lambda b: damage(b, INDEX_OFFSET + 20 * ENTRY_BYTES),
    ),
    "everything else of one": (
        lambda a: damage(a, 0, INDEX_OFFSET, PAYLOAD_OFFSET + 100_000),
        lambda b: damage(b, 0, INDEX_OFFSET + 29 * ENTRY_BYTES, PAYLOAD_OFFSET + 1),
    ),
    "cut and damaged": (
        lambda a: os.truncate(chunk_file(a), PAYLOAD_OFFSET + 400_000),
        lambda b: damage(b, PAYLOAD_OFFSET, PAYLOAD_OFFSET + 399_000),
    ),
    "missing": (lambda a: chunk_file(a).unlink(), lambda b: damage(b, 100)),
}


@pytest.mark.parametrize("kind", DAMAGES)
async def test_two_damaged_replicas_make_a_whole_one(
    start_node: StartNode, pool: Pool, kind: str, damaged: set[str]
) -> None:
    damaged |= {"a", "b"}
    async with start_node("a") as a, start_node("b") as b, start_node("c") as c:
        writer = await two_replicas(pool, a, b)
        for started, how in zip((a, b), DAMAGES[kind], strict=True):
            how(started)
            with suppress(DfsError):
                assert await started.store.reads.verify(CHUNK)
            assert started.store.table.get(CHUNK).error
        assert await carry_out(c, salvage(writer, [a.peer, b.peer])) == ""
        assert await c.store.reads.verify(CHUNK) == []
        assert bytes((await pool.read(c.peer, CHUNK, 0, SIZE)).payload) == writer.data
        # In the place of one of them, which is one of the sources.
        assert await carry_out(a, salvage(writer, [a.peer, b.peer], replace=True)) == ""
        assert await a.store.reads.verify(CHUNK) == []
        assert a.store.table.get(CHUNK).error == ""
        assert bytes((await pool.read(a.peer, CHUNK, 0, SIZE)).payload) == writer.data
    async with start_node("a") as a:
        assert a.store.table.get(CHUNK).report() == c.store.table.get(CHUNK).report()


async def test_what_is_damaged_everywhere_makes_nothing(start_node: StartNode, pool: Pool, damaged: set[str]) -> None:
    damaged |= {"a", "b"}
    async with start_node("a") as a, start_node("b") as b, start_node("c") as c:
        writer = await two_replicas(pool, a, b)
        for started in (a, b):
            damage(started, PAYLOAD_OFFSET + 50_000)
            assert await started.store.reads.verify(CHUNK) == [2]
        assert await carry_out(c, salvage(writer, [a.peer, b.peer])) == ErrorCode.BAD_CHECKSUM.name
        assert len(c.store.table) == 0
        assert list(chunk_file(c).parent.iterdir()) == []
        before = chunk_file(a).read_bytes()
        assert await carry_out(a, salvage(writer, [a.peer, b.peer], replace=True)) == ErrorCode.BAD_CHECKSUM.name
        assert chunk_file(a).read_bytes() == before
        # The other blocks are still read from it.
        assert bytes((await pool.read(a.peer, CHUNK, 100_000, BLOCK)).payload) == writer.data[100_000:120_000]
        # One that cannot be asked may have it.
        away = Peer(99, "127.0.0.1", 1)
        assert await carry_out(c, salvage(writer, [a.peer, b.peer, away])) == ErrorCode.UNAVAILABLE.name


async def test_a_damaged_replica_is_replaced_only_by_order(
    start_node: StartNode, pool: Pool, damaged: set[str]
) -> None:
    damaged.add("a")
    async with start_node("a") as a, start_node("b") as b:
        writer = await two_replicas(pool, a, b)
        damage(a, PAYLOAD_OFFSET)
        assert await a.store.reads.verify(CHUNK) == [0]
        opened = await a.store.reads.load(a.store.table.get(CHUNK))
        assert await carry_out(a, salvage(writer, [b.peer])) == ErrorCode.EXISTS.name
        assert await carry_out(a, salvage(writer, [b.peer], replace=True)) == ""
        assert await a.store.reads.load(a.store.table.get(CHUNK)) is not opened
        assert bytes((await pool.read(a.peer, CHUNK, 0, SIZE)).payload) == writer.data
        assert [path.name for path in chunk_file(a).parent.iterdir()] == [f"{CHUNK:016x}"]
        # A right one is left alone.
        inode = chunk_file(a).stat().st_ino
        assert await carry_out(a, salvage(writer, [b.peer], replace=True)) == ""
        assert chunk_file(a).stat().st_ino == inode

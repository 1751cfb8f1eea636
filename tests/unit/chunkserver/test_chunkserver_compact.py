"""One new chunk of what is still wanted of several: which bytes, from where, and what happens when they are wrong."""

import errno
import os

import pytest
from chunkserver_harness import CLUSTER, FaultyDisk, Started, StartNode, Writer
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st
from test_chunkserver_orders import Sender

from chunkserver import chunkfile, selection
from chunkserver.chunkfile import PAYLOAD_CAPACITY, PAYLOAD_OFFSET
from chunkserver.client import Pool
from chunkserver.index import Index
from chunkserver.selection import Piece
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import CompactSource, Order, OrderKind, OrderResult

NEW = 0x777
Ranges = list[tuple[int, int]]


# -- which pieces --------------------------------------------------------------------------------------------------


def written(data: bytes, blocks: list[int], ino: int = 7, file_offset: int = 0) -> Index:
    """The index of a chunk with blocks of these lengths, one after another in one file."""
    index, at, chain = Index(), 0, 1
    for number, length in enumerate(blocks):
        crc = crc32c(data[at : at + length])
        entry, chain = chunkfile.encode_entry(chain, at, length, crc, ino, file_offset + at, 3, number)
        index.extend(entry)
        at += length
    return index


def carry_out(pieces: list[Piece], sources: list[bytes]) -> tuple[bytes, list[int]]:
    """The payload of the new chunk, and the checksums of its blocks."""
    payload, checksums = bytearray(), []
    for piece in pieces:
        entry = piece.entry
        block = sources[piece.source][entry.stored_offset : entry.stored_offset + entry.stored_length]
        checksum = selection.piece_checksum(piece, block)
        assert checksum is not None
        checksums.append(checksum)
        payload += block[piece.skip : piece.skip + piece.length]
    return bytes(payload), checksums


@st.composite
def wanted(draw: st.DrawFn) -> tuple[list[int], Ranges]:
    """Lengths of blocks, and ranges of what they hold together."""
    blocks = draw(st.lists(st.integers(1, 300), min_size=1, max_size=12))
    cuts = sorted(draw(st.sets(st.integers(0, sum(blocks)), max_size=12)))
    return blocks, list(zip(cuts[::2], cuts[1::2], strict=False))


@given(st.lists(wanted(), min_size=1, max_size=3))
def test_exactly_the_wanted_bytes_move_and_the_moves_say_where(chosen: list[tuple[list[int], Ranges]]) -> None:
    sources = [os.urandom(sum(blocks)) for blocks, _ in chosen]
    pieces: list[Piece] = []
    for number, (blocks, ranges) in enumerate(chosen):
        index = written(sources[number], blocks, ino=7, file_offset=number * 100)
        pieces += selection.select(number, index, ranges)
    arranged = selection.arrange(pieces)
    payload, checksums = carry_out(arranged, sources)
    entries, chain = selection.index_entries(arranged, checksums, 99)
    # The new index is that of a right chunk, and every byte of every block has its checksum.
    for entry in chunkfile.check_entries(entries, 99, 0):
        assert crc32c(payload[entry.stored_offset : entry.stored_offset + entry.stored_length]) == entry.crc
        chain_end = entry.chain
    assert not arranged or chain == chain_end
    moves = selection.moves(arranged, list(range(len(sources))))
    for source, start, length, to in moves:
        assert payload[to : to + length] == sources[source][start : start + length]
    assert sum(length for _, _, length, _ in moves) == len(payload)
    for number, (_, ranges) in enumerate(chosen):
        moved = {at for source, start, length, _ in moves if source == number for at in range(start, start + length)}
        assert moved == {at for start, stop in ranges for at in range(start, stop)}


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_checksums_of_parts_make_up_that_of_the_whole(first: bytes, second: bytes) -> None:
    assert selection.joined(crc32c(first), crc32c(second), len(second)) == crc32c(first + second)


@given(st.binary(min_size=3, max_size=400), st.data())
def test_a_damaged_block_gives_no_piece_wherever_it_is_damaged(block: bytes, data: st.DataObject) -> None:
    entry = written(block, [len(block)]).entry(0)
    skip = data.draw(st.integers(0, len(block) - 1))
    piece = Piece(0, entry, skip, data.draw(st.integers(1, len(block) - skip)))
    assert selection.piece_checksum(piece, block) == crc32c(block[skip : skip + piece.length])
    damaged = bytearray(block)
    damaged[data.draw(st.integers(0, len(block) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert selection.piece_checksum(piece, damaged) is None
    assert selection.piece_checksum(piece, block[:-1]) is None


def test_what_was_scattered_over_a_file_comes_together() -> None:
    """Blocks of 4 KiB that were overwritten at random lie in the order of the file afterwards."""
    order = [3, 0, 2, 1]
    index, chain, at = Index(), 1, 0
    for number, place in enumerate(order):
        entry, chain = chunkfile.encode_entry(chain, at, 4096, 5, 7, place * 4096, 3, number)
        index.extend(entry)
        at += 4096
    arranged = selection.arrange(selection.select(0, index, [(0, at)]))
    assert [piece.file_offset for piece in arranged] == [0, 4096, 8192, 12288]
    assert selection.moves(arranged, [9]) == [(9, 4096, 4096, 0), (9, 12288, 4096, 4096), (9, 8192, 4096, 8192), (9, 0, 4096, 12288)]  # fmt: skip  # noqa: E501


def test_a_chunk_takes_no_more_than_fits() -> None:
    index, chain = Index(), 1
    for number in range(1024):
        entry, chain = chunkfile.encode_entry(chain, number << 16, 1 << 16, 5, 7, number << 16, 3, number)
        index.extend(entry)
    both = [*selection.select(0, index, [(0, PAYLOAD_CAPACITY)]), *selection.select(1, index, [(0, 1 << 20)])]
    arranged = selection.arrange(both)
    assert sum(piece.length for piece in arranged) == PAYLOAD_CAPACITY
    # One of the two copies of each of the first blocks, and the rest as far as it fits: whole blocks all of them.
    assert all(piece.whole for piece in arranged)


# -- orders --------------------------------------------------------------------------------------------------------


async def sealed(pool: Pool, holders: list[Started], chunk: int, data: bytes, *, block: int = 65536) -> Writer:
    writer = Writer(chunk, ino=chunk)
    forward = tuple(holder.peer for holder in holders[1:])
    for start in range(0, len(data), 4 << 20):
        await writer.send(pool, holders[0].peer, data[start : start + (4 << 20)], forward_to=forward, block=block)
    for holder in holders:
        await holder.store.seal(chunk, writer.offset, writer.index, writer.chain)
    return writer


def source(writer: Writer, holder: Started, ranges: Ranges) -> CompactSource:
    peer = holder.peer
    return CompactSource(
        writer.chunk, writer.offset, writer.index, writer.chain, peer.server, peer.host, peer.port, ranges
    )


def compact(sender: Sender, *sources: CompactSource) -> Order:
    order = sender.make(OrderKind.COMPACT, chunk=NEW)
    order.sources = list(sources)
    return order


async def assert_moved(result: OrderResult, pool: Pool, holder: Started, writers: list[Writer]) -> None:
    """The replica is right, sealed and on disk, and the moves tell where bytes are."""
    assert (result.error, result.text) == ("", "")
    assert result.replica is not None
    assert result.replica.sealed
    assert (await pool.verify(holder.peer, NEW)).bad_blocks == ()
    data = {writer.chunk: bytes(writer.data) for writer in writers}
    for chunk, start, length, to in result.moves:
        at = to
        while at < to + length:
            blocks = await pool.read(holder.peer, NEW, at, to + length - at)
            first = blocks.entries[0].logical_offset
            piece = bytes(blocks.payload)[at - first : to + length - first]
            assert piece == data[chunk][start + at - to : start + at - to + len(piece)]
            at += len(piece)
    assert sum(length for _, _, length, _ in result.moves) == result.replica.length


async def test_sources_here_and_elsewhere_become_one_chunk(start_node: StartNode, pool: Pool) -> None:
    async with start_node("a") as a, start_node("b") as b:
        here = await sealed(pool, [a], 1, os.urandom(5_000_000))
        there = await sealed(pool, [b], 2, os.urandom(300_000), block=4096)
        sender = Sender(a)
        order = compact(
            sender,
            source(here, b, [(0, 10), (65_000, 66_000), (1 << 20, 4_500_000)]),
            source(there, b, [(5, 100_000), (200_000, 300_000)]),
        )
        (result,) = await sender.results(order)
        await assert_moved(result, pool, a, [here, there])
        assert result.replica.length == 10 + 1000 + 4_500_000 - (1 << 20) + 99_995 + 100_000  # type: ignore[union-attr]
        assert result.replica == a.store.table.get(NEW).report()
        # Inode 2 comes after inode 1, and each in the order of its file.
        assert [chunk for chunk, *_ in result.moves] == [1, 1, 1, 2, 2]
    async with start_node("a") as a:
        assert a.store.table.get(NEW).report() == result.replica


async def test_an_order_done_again_after_a_restart_gives_the_same(start_node: StartNode, pool: Pool) -> None:
    async with start_node("a") as a:
        writer = await sealed(pool, [a], 1, os.urandom(400_000))
        order = compact(Sender(a), source(writer, a, [(1000, 90_000), (200_000, 400_000)]))
        (first,) = await Sender(a).results(order)
    async with start_node("a") as a:
        (second,) = await Sender(a).results(order)
        assert second == first
        await assert_moved(second, pool, a, [writer])
        await a.store.delete(NEW)
        order.order += 1
        assert await Sender(a).code(order) == "NO_SUCH_CHUNK"  # its time is over


async def test_a_damaged_block_here_is_taken_from_the_peer(
    start_node: StartNode, pool: Pool, damaged: set[str]
) -> None:
    damaged.add("a")
    async with start_node("a") as a, start_node("b") as b:
        writer = await sealed(pool, [a, b], 1, os.urandom(400_000))
        with (a.path / chunkfile.chunk_path(1)).open("r+b") as file:
            file.seek(PAYLOAD_OFFSET + 70_000)
            file.write(b"damaged")
        sender = Sender(a)
        # A byte of the damaged block that is right itself.
        (result,) = await sender.results(compact(sender, source(writer, b, [(0, 10), (66_000, 66_100)])))
        await assert_moved(result, pool, a, [writer])
        assert a.store.table.get(1).error == "BAD_CHECKSUM"
        # With nobody else to ask it is an error that names the source; so it is if the peer's is damaged too.
        await a.store.delete(NEW)
        order = compact(sender, source(writer, a, [(66_000, 66_100)]))
        order.chunk = NEW + 1
        (result,) = await sender.results(order)
        assert (result.error, result.source, result.moves) == ("NO_SUCH_CHUNK", 1, [])


async def test_a_damaged_source_elsewhere_is_named(start_node: StartNode, pool: Pool, damaged: set[str]) -> None:
    damaged.add("b")
    async with start_node("a") as a, start_node("b") as b:
        right = await sealed(pool, [b], 1, os.urandom(100_000))
        wrong = await sealed(pool, [b], 2, os.urandom(100_000))
        with (b.path / chunkfile.chunk_path(2)).open("r+b") as file:
            file.seek(PAYLOAD_OFFSET + 50_000)
            file.write(b"damaged")
        sender = Sender(a)
        sources = source(right, b, [(0, 100_000)]), source(wrong, b, [(0, 100_000)])
        (result,) = await sender.results(compact(sender, *sources))
        assert (result.error, result.source) == ("BAD_CHECKSUM", 2)
        sources[1].chain ^= 1
        (result,) = await sender.results(compact(sender, *sources))
        assert (result.error, result.source) == ("CHAIN_MISMATCH", 2)
        assert len(a.store.table) == 0
        assert list(a.path.glob("chunks/*/*")) == []


@pytest.mark.parametrize("call", ["create", "write", "sync", "rename", "sync_directory"])
async def test_a_full_or_failing_disk_leaves_nothing(start_node: StartNode, pool: Pool, call: str) -> None:
    async with start_node("a", wrap=FaultyDisk) as a:
        writer = await sealed(pool, [a], 1, os.urandom(100_000))
        sender = Sender(a)
        for number, error in ((errno.ENOSPC, "DISK_FULL"), (errno.EIO, "DISK_FAILED")):
            a.node.disk.faults[call] = [number]  # type: ignore[attr-defined]
            assert await sender.code(compact(sender, source(writer, a, [(0, 100_000)]))) == error
            made = a.store.table.get(NEW)
            # Complete, but perhaps without a name: given up.
            assert (made is not None and made.error == "REPLICA_FAILED") if call == "sync_directory" else made is None
        assert a.store.table.get(1).error == ""
        (result,) = await sender.results(compact(sender, source(writer, a, [(0, 100_000)])))
        await assert_moved(result, pool, a, [writer])


async def test_what_makes_room_may_use_half_of_the_reserve(start_node: StartNode, pool: Pool) -> None:
    async with start_node("a", wrap=FaultyDisk, reserve=lambda capacity: 10 << 20) as a:
        writer = await sealed(pool, [a], 1, os.urandom(100_000))
        sender = Sender(a)
        for free, makes_room, expected in [
            (9 << 20, False, "DISK_FULL"),
            (5 << 20, True, "DISK_FULL"),
            (9 << 20, True, ""),
        ]:
            a.node.disk.free = free  # type: ignore[attr-defined]
            a.store.table.measure_space()
            order = compact(sender, source(writer, a, [(0, 100_000)]))
            order.makes_room = makes_room
            assert await sender.code(order) == expected


def test_the_first_chain_is_the_new_chunks_own() -> None:
    index = written(b"x" * 10, [10])
    entries, _ = selection.index_entries(
        selection.arrange(selection.select(0, index, [(0, 10)])),
        [crc32c(b"x" * 10)],
        chunkfile.first_chain(CLUSTER, NEW),
    )
    chunkfile.check_entries(entries, chunkfile.first_chain(CLUSTER, NEW), 0)
    with pytest.raises(chunkfile.FormatError):
        chunkfile.check_entries(entries, chunkfile.first_chain(CLUSTER, NEW + 1), 0)


# -- garbage -------------------------------------------------------------------------------------------------------


async def test_a_chunk_that_begins_late_is_told_of_at_once(start_node: StartNode, pool: Pool) -> None:
    """Its first append may have come after it was deleted, and a restart has forgotten that."""
    async with start_node("a") as a:
        await Writer(5).send(pool, a.peer, b"begun")
        await a.store.delete(5)
        with pytest.raises(DfsError) as caught:
            await Writer(5).send(pool, a.peer, b"late")
        assert caught.value.code is ErrorCode.NO_SUCH_CHUNK
    async with start_node("a") as a:
        writer = Writer(5)
        await writer.send(pool, a.peer, b"late")
        await writer.send(pool, a.peer, b"and more")
        (told,) = a.node.outbox.parcel().changes
        assert (told.chunk, told.length, told.sealed) == (5, 4, False)


async def test_what_was_given_up_goes_when_it_has_been_replaced(start_node: StartNode, pool: Pool) -> None:
    async with start_node("a") as a:
        await sealed(pool, [a], 1, os.urandom(1000))
        await Writer(2).send(pool, a.peer, b"not sealed")
        paths = [a.path / chunkfile.chunk_path(chunk) for chunk in (1, 2)]
    for path in (*paths, a.path / chunkfile.chunk_path(3)):
        path.parent.mkdir(exist_ok=True)
        path.with_name(path.name + ".failed").write_bytes(b"whatever")
        path.with_name(path.name + ".copying").write_bytes(b"half")
    async with start_node("a") as a:
        left = {path.name for path in a.path.glob("chunks/*/*")}
        assert left == {f"{1:016x}", f"{2:016x}", f"{2:016x}.failed", f"{3:016x}.failed"}

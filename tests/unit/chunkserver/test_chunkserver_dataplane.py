"""Append, forward, sync, read and verify through real sockets and files."""

import os
from pathlib import Path

import pytest
import trio
from chunkserver_harness import CLUSTER, KEY, StartNode, Writer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chunkserver import chunkfile, protocol
from chunkserver.chunkfile import PAYLOAD_OFFSET
from chunkserver.client import Pool
from chunkserver.protocol import Append, Peer, Sync
from metaserver import transport, wire
from metaserver.connection import connect_handshake, refuse
from metaserver.errors import DfsError, ErrorCode
from metaserver.key import ClusterKey
from metaserver.wire import Empty, Kind

CHUNK = 0xABCDEF0123
MIB = 1 << 20


def code_of(error: pytest.ExceptionInfo[DfsError]) -> ErrorCode:
    return error.value.code


async def read_all(pool: Pool, peer: Peer, chunk: int, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        blocks = await pool.read(peer, chunk, len(data), length - len(data))
        assert blocks.entries[0].logical_offset == len(data)
        data += blocks.payload
    return bytes(data)


async def test_chain_of_three_has_the_same_bytes(start_node: StartNode, pool: Pool) -> None:
    async with start_node("a") as a, start_node("b") as b, start_node("c") as c:
        writer = Writer(CHUNK)
        for number in range(4):
            data = os.urandom(MIB if number else 5000)
            reply = await writer.send(pool, a.peer, data, forward_to=(b.peer, c.peer), sync=number == 3)
            assert reply.failures == ()
            assert reply.progress == protocol.Progress(writer.offset, writer.offset, writer.index, writer.chain)
        for started in (a, b, c):
            assert await read_all(pool, started.peer, CHUNK, len(writer.data)) == writer.data
            assert (await pool.verify(started.peer, CHUNK)).bad_blocks == ()
            assert started.store.table.get(CHUNK).writing.synced == writer.index


async def test_pipelined_appends_arrive_in_order_before_the_first_connection(start_node: StartNode, pool: Pool) -> None:
    async with start_node("a") as a, start_node("b") as b:
        writer = Writer(CHUNK)
        pieces = [os.urandom(100_000) for _ in range(20)]
        calls = [pool.append_start(a.peer, writer.append(p, forward_to=(b.peer,)), [p]) for p in pieces]
        for call in calls:
            assert (await call.wait()).message.failures == ()
        assert await read_all(pool, b.peer, CHUNK, len(writer.data)) == writer.data


async def test_read_returns_whole_covering_blocks(start_node: StartNode, pool: Pool) -> None:
    async with start_node() as a:
        writer = Writer(CHUNK)
        await writer.send(pool, a.peer, os.urandom(10_000), block=1000)
        blocks = await pool.read(a.peer, CHUNK, 1999, 2)
        assert [entry.logical_offset for entry in blocks.entries] == [1000, 2000]
        assert bytes(blocks.payload) == writer.data[1000:3000]
        assert (await pool.read(a.peer, CHUNK, 10_000, 5)).entries == []
        assert len((await pool.read(a.peer, CHUNK, 9_000, 50_000)).payload) == 1000
        assert (await pool.read(a.peer, CHUNK, 0, 0)).entries == []


async def test_large_read_is_cut_at_the_payload_limit(start_node: StartNode, pool: Pool) -> None:
    async with start_node() as a:
        writer = Writer(CHUNK)
        for _ in range(5):
            await writer.send(pool, a.peer, os.urandom(MIB))
        assert len((await pool.read(a.peer, CHUNK, 100, 5 * MIB)).payload) == wire.PAYLOAD_LIMIT


async def test_retry_of_an_append_succeeds_and_anything_else_is_refused(start_node: StartNode, pool: Pool) -> None:
    async with start_node("a") as a, start_node("b") as b:
        writer, data = Writer(CHUNK), os.urandom(200_000)
        first = writer.append(data, forward_to=(b.peer,))
        reply = await pool.append(a.peer, first, [data])
        again = await pool.append(a.peer, first, [data])
        assert again == reply
        await writer.send(pool, a.peer, b"more", forward_to=(b.peer,))
        assert (await pool.append(a.peer, first, [data])).progress == reply.progress

        other = Writer(CHUNK)
        with pytest.raises(DfsError) as error:
            await other.send(pool, a.peer, b"different")
        assert code_of(error) is ErrorCode.WRONG_OFFSET
        gap = Writer(CHUNK)
        gap.append(data)
        gap.append(b"more")
        gap.append(b"lost on the way")
        with pytest.raises(DfsError) as error:
            await gap.send(pool, a.peer, b"after a gap")
        assert code_of(error) is ErrorCode.WRONG_OFFSET
        fork = Writer(CHUNK, session=99)
        fork.append(data)
        fork.append(b"more")
        with pytest.raises(DfsError) as error:
            await fork.send(pool, a.peer, b"another history")
        assert code_of(error) is ErrorCode.CHAIN_MISMATCH


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"index": 3}, ErrorCode.NO_SUCH_CHUNK),
        ({"offset": 5}, ErrorCode.WRONG_OFFSET),
        ({"chain": 5}, ErrorCode.CHAIN_MISMATCH),
        ({"entries": b"x" * 63}, ErrorCode.INVALID),
        ({"entries": b""}, ErrorCode.INVALID),
        ({"entries": b"x" * 64}, ErrorCode.CHAIN_MISMATCH),
    ],
)
async def test_malformed_first_append_creates_nothing(
    start_node: StartNode, pool: Pool, change: dict[str, object], code: ErrorCode
) -> None:
    async with start_node() as a:
        request = Writer(CHUNK).append(b"data")
        for field, value in change.items():
            setattr(request, field, value)
        with pytest.raises(DfsError) as error:
            await pool.append(a.peer, request, [b"data"])
        assert code_of(error) is code
        assert not (a.path / chunkfile.chunk_path(CHUNK)).exists()


@pytest.mark.parametrize(("payload", "code"), [(b"dat!", ErrorCode.BAD_CHECKSUM), (b"dat", ErrorCode.INVALID)])
async def test_payload_must_fit_its_entries(start_node: StartNode, pool: Pool, payload: bytes, code: ErrorCode) -> None:
    async with start_node() as a:
        with pytest.raises(DfsError) as error:
            await pool.append(a.peer, Writer(CHUNK).append(b"data"), [payload])
        assert code_of(error) is code


async def test_chunk_takes_its_capacity_and_no_more(start_node: StartNode, pool: Pool) -> None:
    async with start_node() as a:
        writer, piece = Writer(CHUNK), bytes(4 * MIB)
        for _ in range(16):
            await writer.send(pool, a.peer, piece)
        with pytest.raises(DfsError) as error:
            await writer.send(pool, a.peer, b"x")
        assert code_of(error) is ErrorCode.CHUNK_FULL


async def test_full_index_ends_a_chunk(start_node: StartNode, pool: Pool) -> None:
    async with start_node() as a:
        writer = Writer(CHUNK)
        while writer.index < chunkfile.MAX_ENTRIES:
            await writer.send(pool, a.peer, b"z" * min(8000, chunkfile.MAX_ENTRIES - writer.index), block=1)
        with pytest.raises(DfsError) as error:
            await writer.send(pool, a.peer, b"x")
        assert code_of(error) is ErrorCode.CHUNK_FULL
        assert await read_all(pool, a.peer, CHUNK, writer.offset - 1) == writer.data[:-1]


async def test_dead_peer_is_listed_and_those_behind_it_as_unknown(start_node: StartNode, pool: Pool) -> None:
    nobody = transport.listen("127.0.0.1", 0)
    gone = Peer(99, "127.0.0.1", nobody.getsockname()[1])
    nobody.close()
    async with start_node("a") as a, start_node("b") as b:
        writer = Writer(CHUNK)
        reply = await writer.send(pool, a.peer, b"data", forward_to=(gone, b.peer), sync=True)
        assert [(f.server, f.code) for f in reply.failures] == [
            (99, ErrorCode.UNAVAILABLE),
            (b.peer.server, ErrorCode.CANCELLED),
        ]
        assert await read_all(pool, a.peer, CHUNK, 4) == b"data"


async def test_failure_far_down_the_chain_is_blamed_on_the_right_server(start_node: StartNode, pool: Pool) -> None:
    async with start_node("a") as a, start_node("b") as b, start_node("c") as c:
        await Writer(CHUNK, session=1).send(pool, c.peer, b"something else")
        reply = await Writer(CHUNK).send(pool, a.peer, b"data", forward_to=(b.peer, c.peer))
        assert [(f.server, f.code) for f in reply.failures] == [(c.peer.server, ErrorCode.WRONG_OFFSET)]
        assert await read_all(pool, b.peer, CHUNK, 4) == b"data"


async def test_sync_is_checked_and_forwarded(start_node: StartNode, pool: Pool) -> None:
    async with start_node("a") as a, start_node("b") as b:
        writer = Writer(CHUNK)
        await writer.send(pool, a.peer, b"one", forward_to=(b.peer,))
        middle = (writer.offset, writer.chain)
        await writer.send(pool, a.peer, b"two", forward_to=(b.peer,))
        reply = await pool.sync(a.peer, Sync(CHUNK, *middle, (b.peer,)))
        assert reply.failures == ()
        for started in (a, b):
            assert started.store.table.get(CHUNK).writing.synced >= 1
        for wrong, code in [
            (Sync(CHUNK, 2, writer.chain, ()), ErrorCode.WRONG_OFFSET),
            (Sync(CHUNK, 3, writer.chain, ()), ErrorCode.CHAIN_MISMATCH),
            (Sync(CHUNK, 100, writer.chain, ()), ErrorCode.WRONG_OFFSET),
            (Sync(CHUNK + 1, 3, 0, ()), ErrorCode.NO_SUCH_CHUNK),
        ]:
            with pytest.raises(DfsError) as error:
                await pool.sync(a.peer, wrong)
            assert code_of(error) is code


async def test_frozen_after_a_restart_and_still_readable(start_node: StartNode, pool: Pool) -> None:
    writer = Writer(CHUNK)
    async with start_node() as a:
        await writer.send(pool, a.peer, os.urandom(300_000), sync=True)
    async with start_node() as a:
        await a.node.verified_first()
        with pytest.raises(DfsError) as error:
            await writer.send(pool, a.peer, b"x")
        assert code_of(error) is ErrorCode.CHUNK_FROZEN
        data = bytes(writer.data[:300_000])
        assert await read_all(pool, a.peer, CHUNK, 300_000) == data
        assert (await pool.stat(a.peer, CHUNK)).state == "FROZEN"
        with pytest.raises(DfsError) as error:
            await pool.sync(a.peer, Sync(CHUNK, 300_000, 0, ()))
        assert code_of(error) is ErrorCode.WRONG_OFFSET


async def test_verify_finds_a_flipped_bit_and_reads_do_not_hide_it(
    start_node: StartNode, pool: Pool, damaged: set[str]
) -> None:
    damaged.add("a")
    async with start_node("a") as a:
        writer = Writer(CHUNK)
        await writer.send(pool, a.peer, os.urandom(10 * 65536), sync=True)
        flip(a.path / chunkfile.chunk_path(CHUNK), PAYLOAD_OFFSET + 3 * 65536 + 17)
        assert (await pool.verify(a.peer, CHUNK)).bad_blocks == (3,)
        assert a.store.table.get(CHUNK).error == "BAD_CHECKSUM"
        with pytest.raises(DfsError) as error:
            await pool.read(a.peer, CHUNK, 3 * 65536, 10)
        assert code_of(error) is ErrorCode.BAD_CHECKSUM
        assert bytes((await pool.read(a.peer, CHUNK, 4 * 65536, 10)).payload) == writer.data[4 * 65536 : 5 * 65536]


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


async def test_read_index_pages(start_node: StartNode, pool: Pool) -> None:
    async with start_node() as a:
        writer = Writer(CHUNK)
        request = writer.append(b"abcdefgh", block=1)
        await pool.append(a.peer, request, [b"abcdefgh"])
        reply = await pool.read_index(a.peer, CHUNK, 2, 3)
        assert reply.entries == request.entries[2 * 64 : 5 * 64]
        assert reply.progress.entries == 8
        assert (await pool.read_index(a.peer, CHUNK, 8, 3)).entries == b""


async def test_many_open_chunks_stay_readable(start_node: StartNode, pool: Pool) -> None:
    async with start_node() as a:
        writers = [Writer(CHUNK + number) for number in range(40)]
        for writer in writers:
            await writer.send(pool, a.peer, os.urandom(3000))
        a.store.table.open_chunks._files = 8
        for writer in [*writers, *writers]:
            assert await read_all(pool, a.peer, writer.chunk, 3000) == writer.data
            assert len(a.store.table.open_chunks) <= 8


async def test_wrong_key_and_wrong_cluster_are_told(start_node: StartNode) -> None:
    async with start_node() as a:
        for key, cluster, code in [
            (ClusterKey(b"x" * 32), str(CLUSTER), ErrorCode.BAD_KEY),
            (KEY, "another cluster", ErrorCode.WRONG_CLUSTER),
            (None, str(CLUSTER), ErrorCode.BAD_KEY),
        ]:
            stream = await transport.connect(a.peer.host, a.peer.port)
            with pytest.raises(DfsError) as error:
                await connect_handshake(
                    stream, refuse, key=key, cluster_id=cluster, role="client", server_role="chunkserver"
                )
            assert code_of(error) is code


async def test_unknown_method(start_node: StartNode, pool: Pool) -> None:
    async with start_node() as a:
        with pytest.raises(DfsError) as error:
            await pool.call(a.peer, wire.Method(200, "nothing", Empty, Empty), Empty())
        assert code_of(error) is ErrorCode.UNKNOWN_METHOD


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=300), min_size=1, max_size=4), st.booleans(), st.integers(0, 255))
def test_garbage_does_not_disturb_others(garbage: list[bytes], framed: bool, method: int) -> None:
    """Raw bytes, and well-formed frames with garbage bodies, on a connection of their own."""
    trio.run(_garbage_beside_a_client, garbage, framed, method)


async def _garbage_beside_a_client(garbage: list[bytes], framed: bool, method: int) -> None:
    import tempfile

    from chunkserver_harness import serving

    with tempfile.TemporaryDirectory() as directory:
        async with serving(Path(directory) / "a", "a") as a, trio.open_nursery() as nursery:
            pool = Pool(nursery, KEY, str(CLUSTER))
            writer = Writer(CHUNK)
            await writer.send(pool, a.peer, b"before")
            stream = await transport.connect(a.peer.host, a.peer.port)
            if framed:
                connection = await connect_handshake(
                    stream, refuse, key=KEY, cluster_id=str(CLUSTER), role="client", server_role="chunkserver"
                )
                nursery.start_soon(connection.run)
            for number, body in enumerate(garbage):
                if framed:
                    body = wire.encode_header(Kind.REQUEST, method, number + 1, body) + body
                try:
                    stream.try_send([body] if body else [b"\0"])
                except DfsError:
                    break  # it hung up: right so
            await writer.send(pool, a.peer, b"after")
            assert await read_all(pool, a.peer, CHUNK, 11) == b"beforeafter"
            stream.close()
            nursery.cancel_scope.cancel()


def test_append_messages_are_small() -> None:
    """An append's body stays below the frame's bound with as many entries as its payload can have of 64 bytes."""
    entries = bytes(64 * (wire.BODY_LIMIT // 64 - 64))
    body = wire.encode(wire.Request(0, 0, 0, Append(1, 2, 3, 4, entries, (Peer(1, "h" * 100, 2),), True), None))
    assert len(body) < wire.BODY_LIMIT

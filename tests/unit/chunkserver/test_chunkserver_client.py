"""The pool: one connection per server, order, patience after failures; and the control plane's client."""

import httpx
import pytest
import trio
from chunkserver_harness import CLUSTER, KEY, StartNode, Writer
from crc32c import crc32c

from chunkserver import chunkfile, client, protocol
from chunkserver.client import ControlClient, Pool, open_pool, verify_blocks
from chunkserver.protocol import Peer
from metaserver import transport
from metaserver.errors import ConnectionLost, DfsError, ErrorCode
from metaserver.protocol import Json
from metaserver.transport import Transport
from metaserver.wire import Empty


class Connects:
    """Counts attempts; fails while ``broken``."""

    def __init__(self) -> None:
        self.attempts = 0
        self.broken = False

    async def __call__(self, host: str, port: int) -> Transport:
        self.attempts += 1
        await trio.lowlevel.checkpoint()
        if self.broken:
            raise ConnectionLost("no route")
        return await transport.connect(host, port)


async def test_many_callers_make_one_connection(start_node: StartNode) -> None:
    connects = Connects()
    async with start_node() as a, open_pool(KEY, str(CLUSTER), connect=connects) as pool:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(pool.call, a.peer, protocol.PING, Empty())
        assert connects.attempts == 1
        connection = await pool.get(a.peer)
        assert await pool.get(a.peer) is connection
        assert pool.is_connected(a.peer)
        connection.close()
        assert not pool.is_connected(a.peer)
        assert await pool.get(a.peer) is not connection
        assert connects.attempts == 2


async def test_failures_are_answered_at_once_for_a_while(autojump_clock: trio.testing.MockClock) -> None:
    connects = Connects()
    connects.broken = True
    peer = Peer(1, "nowhere", 1)
    async with open_pool(KEY, "", connect=connects) as pool:
        assert not pool.is_suspect(peer)
        for _ in range(5):
            with pytest.raises(ConnectionLost, match="no route"):
                await pool.call(peer, protocol.PING, Empty())
        assert connects.attempts == 1
        assert pool.is_suspect(peer)
        await trio.sleep(client.BACKOFF_SECONDS)
        with pytest.raises(ConnectionLost, match="no route"):
            await pool.call(peer, protocol.PING, Empty())
        assert connects.attempts == 2
        await trio.sleep(client.SUSPECT_SECONDS)
        assert not pool.is_suspect(peer)


async def test_who_goes_on_asking_does_not_put_off_the_next_attempt(autojump_clock: trio.testing.MockClock) -> None:
    """Readers that tried again more often than that kept a server away that had long been back."""
    connects = Connects()
    connects.broken = True
    peer = Peer(1, "nowhere", 1)
    async with open_pool(KEY, "", connect=connects) as pool:
        for _ in range(200):
            with pytest.raises(ConnectionLost, match="no route"):
                await pool.call(peer, protocol.PING, Empty())
            await trio.sleep(client.BACKOFF_LIMIT_SECONDS / 4)
        assert connects.attempts > 200 / 4 / 2
        assert pool.is_suspect(peer)


async def test_call_waits_no_longer_than_told_for_a_connection(autojump_clock: trio.testing.MockClock) -> None:
    async def hang(host: str, port: int) -> Transport:
        await trio.sleep(1000)
        raise AssertionError

    async with open_pool(KEY, "", connect=hang) as pool:
        started = trio.current_time()
        with pytest.raises(DfsError) as error:
            await pool.call(Peer(1, "h", 1), protocol.PING, Empty(), timeout=2)
        assert error.value.code is ErrorCode.TIMEOUT
        assert trio.current_time() - started == 2


async def test_a_greeting_that_is_not_answered_fails_what_waits_for_it(autojump_clock: trio.testing.MockClock) -> None:
    """The kernel of a machine accepts connections for a process that is frozen."""

    async def hang(host: str, port: int) -> Transport:
        await trio.sleep(1000)
        raise AssertionError

    async with open_pool(KEY, "", connect=hang) as pool:
        started = trio.current_time()
        with pytest.raises(ConnectionLost, match="greeting"):
            await pool.call(Peer(1, "h", 1), protocol.PING, Empty(), timeout=100)
        assert trio.current_time() - started == client.CONNECT_SECONDS


async def test_closing_the_pool_ends_calls_that_wait(autojump_clock: trio.testing.MockClock) -> None:
    async def hang(host: str, port: int) -> Transport:
        await trio.sleep_forever()
        raise AssertionError

    with trio.fail_after(5):
        async with trio.open_nursery() as outer, open_pool(KEY, "", connect=hang) as pool:
            call = pool.start(Peer(1, "h", 1), protocol.PING, Empty(), timeout=1000)
            outer.start_soon(expect_lost, call)
            await trio.testing.wait_all_tasks_blocked()


async def expect_lost(call: client.Call[Empty]) -> None:
    with pytest.raises(ConnectionLost, match="the pool was closed"):
        await call.wait()


async def test_server_that_is_another_cluster_or_no_chunkserver(start_node: StartNode) -> None:
    async with start_node() as a, open_pool(KEY, "another") as pool:
        with pytest.raises(DfsError) as error:
            await pool.stat(a.peer, 1)
        assert error.value.code is ErrorCode.WRONG_CLUSTER


def blocks() -> tuple[bytes, bytes]:
    writer = Writer(5)
    return writer.append(b"aaaabbbbcc", block=4).entries, b"aaaabbbbcc"


def test_verify_blocks_accepts_what_was_written() -> None:
    entries, payload = blocks()
    assert [entry.stored_length for entry in verify_blocks(entries, payload)] == [4, 4, 2]
    assert [entry.stored_length for entry in verify_blocks(entries[64:], payload[4:])] == [4, 2]
    assert verify_blocks(b"", b"") == []


@pytest.mark.parametrize("at", range(0, 192, 5))
def test_verify_blocks_finds_any_flipped_byte_of_a_later_entry_and_of_the_payload(at: int) -> None:
    entries, payload = blocks()
    damaged = bytearray(entries)
    damaged[at] ^= 1
    if at >= 64 or 20 <= at < 24 or at >= 60:  # the first entry's chain has nothing to be compared with but the next's
        with pytest.raises(DfsError) as error:
            verify_blocks(bytes(damaged), payload)
        assert error.value.code is ErrorCode.BAD_CHECKSUM
    bad = bytearray(payload)
    bad[at % len(bad)] ^= 1
    with pytest.raises(DfsError):
        verify_blocks(entries, bytes(bad))


def test_verify_blocks_refuses_lengths_that_do_not_fit() -> None:
    entries, payload = blocks()
    for wrong in (payload[:-1], payload + b"x", b""):
        with pytest.raises(DfsError):
            verify_blocks(entries, wrong)
    with pytest.raises(DfsError):
        verify_blocks(entries[:-1], payload)
    swapped = entries[64:128] + entries[:64]
    with pytest.raises(DfsError):
        verify_blocks(swapped, b"bbbbaaaa")


async def test_read_of_another_place_is_refused(
    start_node: StartNode, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that answers with blocks that are whole, but not the ones asked for."""
    async with start_node() as a:
        await Writer(5).send(pool, a.peer, b"aaaabbbb", block=4)
        honest = a.store.reads.read
        await pool.read(a.peer, 5, 0, 4)

        async def elsewhere(chunk: int, offset: int, length: int) -> tuple[bytes, bytes]:
            entries, data = await honest(chunk, 4, 4)
            return entries, data

        monkeypatch.setattr(a.store.reads, "read", elsewhere)
        monkeypatch.setattr(a.store.reads, "read_now", lambda *_: None)
        with pytest.raises(DfsError) as error:
            await pool.read(a.peer, 5, 0, 4)
        assert error.value.code is ErrorCode.BAD_CHECKSUM


def control(handler: object, *addresses: str) -> ControlClient:
    return ControlClient(addresses, KEY, transport=httpx.MockTransport(handler))  # type: ignore[arg-type]


def test_control_client_asks_the_next_address_and_remembers() -> None:
    asked: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        assert request.headers["Authorization"] == f"Bearer {KEY.http_token}"
        if request.url.host == "down":
            raise httpx.ConnectError("refused")
        return httpx.Response(200, json={})

    client = control(handler, "down:1", "up:1")
    for _ in range(2):
        client.post("/x", Json(), Json)
    assert asked == ["down", "up", "up"]
    client.close()


@pytest.mark.parametrize(
    ("response", "code"),
    [
        (httpx.Response(409, json={"code": "WRONG_CLUSTER", "text": "no"}), ErrorCode.WRONG_CLUSTER),
        (httpx.Response(409, json={"code": "FROM_THE_FUTURE", "text": "no"}), ErrorCode.PROTOCOL),
        (httpx.Response(404, text="<html>"), ErrorCode.PROTOCOL),
        (httpx.Response(200, text="hello"), ErrorCode.PROTOCOL),
    ],
)
def test_control_client_errors(response: httpx.Response, code: ErrorCode) -> None:
    client = control(lambda request: response, "m:1")
    with pytest.raises(DfsError) as error:
        client.post("/x", Json(), Json)
    assert error.value.code is code
    client.close()


def test_control_client_without_anybody() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectTimeout("timed out")

    client = control(handler, "m:1")
    with pytest.raises(ConnectionLost, match="cannot reach the metaserver"):
        client.post("/x", Json(), Json)
    client.close()


def test_writer_of_the_tests_speaks_the_format() -> None:
    entries, payload = blocks()
    checked = chunkfile.check_entries(entries, chunkfile.first_chain(CLUSTER, 5), 0)
    assert [entry.crc for entry in checked] == [crc32c(payload[at : at + 4]) for at in (0, 4, 8)]

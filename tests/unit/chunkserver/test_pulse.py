"""Pings: silence, cost, and what a suspension of this process does not mean."""

import socket

import pytest
import trio
import trio.testing
from chunkserver_harness import KEY, StartNode

from chunkserver import protocol
from chunkserver.appends import PACE_SECONDS, DiskPace
from chunkserver.client import open_pool
from chunkserver.protocol import Peer, Pong, Read
from chunkserver.pulse import REMEMBER_SECONDS, SAMPLES, WATCH_SECONDS, Pulse
from metaserver.connection import Connection, Incoming, Reply, accept_handshake
from metaserver.errors import ConnectionLost, DfsError, ErrorCode
from metaserver.transport import SocketTransport

PEER = Peer(3, "h", 1)


class Server:
    def __init__(self) -> None:
        self.seconds = 0.001
        self.refusing = False
        self.disk_ms = 0
        self.pings = 0

    async def ping(self, peer: Peer, timeout: float) -> Pong:
        assert peer == PEER
        self.pings += 1
        if self.refusing:
            raise ConnectionLost("refused")
        await trio.sleep(self.seconds)
        return Pong(self.disk_ms)


async def test_readings(autojump_clock: trio.testing.MockClock) -> None:
    server = Server()
    async with trio.open_nursery() as nursery:
        pulse = Pulse(server.ping, nursery.start_soon)
        assert pulse.reading(3) is None
        pulse.watch(PEER)
        assert pulse.reading(3) is None
        await trio.sleep(0.1)
        reading = pulse.reading(3)
        assert reading is not None
        assert (reading.answers, reading.cost_seconds) == (True, None)
        await trio.sleep(SAMPLES * 0.3)
        reading = pulse.reading(3)
        assert reading is not None
        assert reading.cost_seconds == pytest.approx(0.001)
        server.disk_ms, server.seconds = 400, 0.5
        pulse.watch(PEER)
        await trio.sleep(0.9)
        # One quick answer among the last is enough not to be slow.
        reading = pulse.reading(3)
        assert reading is not None
        assert reading.cost_seconds == pytest.approx(0.001)
        for _ in range(SAMPLES):
            pulse.watch(PEER)
            await trio.sleep(0.8)
        reading = pulse.reading(3)
        assert reading is not None
        assert reading.cost_seconds == pytest.approx(0.9)
        assert reading.disk_seconds == 0.4


@pytest.mark.parametrize("refusing", [False, True])
async def test_silence_lasts_until_an_answer(autojump_clock: trio.testing.MockClock, refusing: bool) -> None:
    server = Server()
    server.seconds, server.refusing = 1000.0, refusing
    async with trio.open_nursery() as nursery:
        pulse = Pulse(server.ping, nursery.start_soon)
        pulse.watch(PEER)
        await trio.sleep(2)
        assert 1.7 < pulse.silent_seconds(3) <= 2
        # It is remembered for some time after anybody cared, so that whoever asks next knows at once.
        await trio.sleep(30)
        assert pulse.silent_seconds(3) > 30
        server.seconds, server.refusing = 0.001, False
        await trio.sleep(12)
        assert pulse.silent_seconds(3) == 0


async def test_pinging_ends(autojump_clock: trio.testing.MockClock) -> None:
    for silent in (False, True):
        server = Server()
        server.refusing = silent
        started = trio.current_time()
        async with trio.open_nursery() as nursery:
            Pulse(server.ping, nursery.start_soon).watch(PEER)
        lasted = WATCH_SECONDS + (REMEMBER_SECONDS if silent else 0)
        assert lasted <= trio.current_time() - started < lasted + 1


async def test_nobody_is_silent_because_this_process_did_not_run(mock_clock: trio.testing.MockClock) -> None:
    server = Server()
    server.seconds = 0.2
    async with trio.open_nursery() as nursery:
        pulse = Pulse(server.ping, nursery.start_soon)
        pulse.watch(PEER)
        await trio.testing.wait_all_tasks_blocked()
        # A jump over a minute in one step is what a task sees of SIGSTOP and SIGCONT.
        mock_clock.jump(60)
        for _ in range(3):
            await trio.testing.wait_all_tasks_blocked()
        assert pulse.silent_seconds(3) < 1
        nursery.cancel_scope.cancel()


async def test_a_chunkserver_tells_how_long_its_disk_takes() -> None:
    now = 0.0
    pace = DiskPace(lambda: now)
    assert pace.seconds == 0
    with pace.operation():
        now = 0.7
        with pace.operation():
            now = 0.8
            assert pace.seconds == 0.8
    now = 0.8 + PACE_SECONDS / 2
    assert pace.seconds == 0.8
    now = 0.9 + PACE_SECONDS
    assert pace.seconds == 0


async def test_pings_pass_data_and_come_back(start_node: StartNode) -> None:
    async with start_node() as node, open_pool(KEY, "") as pool:
        assert (await pool.ping(node.peer)).disk_ms < 1000
        # Over a connection of their own.
        assert not pool.is_connected(node.peer)


async def test_a_connection_to_a_server_that_does_not_answer_is_given_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Whatever waits for it fails within moments, however patient it was."""

    async def forget(connection: Connection, incoming: Incoming) -> Reply:
        await trio.sleep_forever()
        raise AssertionError

    async with trio.open_nursery() as nursery:

        async def serve(stream: SocketTransport) -> None:
            server = await accept_handshake(stream, forget, key=None, cluster_id="", role=protocol.ROLE)
            await server.run()

        async def connect(host: str, port: int) -> SocketTransport:
            ours, theirs = socket.socketpair()
            nursery.start_soon(serve, SocketTransport(theirs, "client"))
            return SocketTransport(ours, "mute")

        async with open_pool(None, "", connect=connect, patience_seconds=3.0) as pool:
            started = trio.current_time()
            with pytest.raises(ConnectionLost, match="no answer to a ping"):
                await pool.call(PEER, protocol.READ, Read(1, 0, 1), timeout=100)
            assert 3 < trio.current_time() - started < 5
        nursery.cancel_scope.cancel()


async def test_an_abandoned_call_is_not_sent_or_cancelled_there(autojump_clock: trio.testing.MockClock) -> None:
    async def refuse(host: str, port: int) -> SocketTransport:
        await trio.sleep(1)
        raise ConnectionLost("nobody")

    async with open_pool(None, "", connect=refuse) as pool:
        call = pool.start(PEER, protocol.READ, Read(1, 0, 1))
        call.abandon()
        with pytest.raises(DfsError) as error:
            await call.wait()
        assert error.value.code is ErrorCode.CANCELLED

"""A receiver that cannot keep up stops reading: what is in work is bounded in bytes, and nothing is lost by it."""

import socket

import trio

from metaserver import connection as connections
from metaserver.connection import Connection, Incoming, Reply, Result
from metaserver.transport import SocketTransport
from metaserver.wire import Empty, Method

PIECE = bytes(4 << 20)
STORE = Method(1, "store", Empty, Empty)


async def test_payloads_in_work_are_bounded() -> None:
    go_on, full = trio.Event(), trio.Event()
    in_work = most = arrived = 0

    def dispatch(_: Connection, incoming: Incoming) -> Result:
        nonlocal arrived
        arrived += 1
        return finish(len(incoming.payload))

    async def finish(length: int) -> Reply:
        nonlocal in_work, most
        in_work += length
        most = max(most, in_work)
        if in_work >= connections.MAX_RUNNING_BYTES:
            full.set()
        await go_on.wait()
        in_work -= length
        return Reply(Empty())

    one, other = socket.socketpair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, SocketTransport(one, "server"), dispatch)
        client = await connections.connect_handshake(
            SocketTransport(other, "client"),
            connections.refuse,
            key=None,
            cluster_id="",
            role="client",
            server_role="s",
        )
        nursery.start_soon(client.run)
        calls = [client.start(STORE, Empty(), [PIECE]) for _ in range(20)]
        await full.wait()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert arrived < len(calls)
        go_on.set()
        for call in calls:
            await call.wait()
        assert most <= connections.MAX_RUNNING_BYTES + len(PIECE)
        nursery.cancel_scope.cancel()


async def serve(transport: SocketTransport, dispatch: connections.Dispatch) -> None:
    connection = await connections.accept_handshake(transport, dispatch, key=None, cluster_id="", role="s")
    await connection.run()

"""A framed connection over real sockets: order, concurrency, cancellation, deadlines, damage, the handshake."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from metaserver import connection as connections
from metaserver import transport, wire
from metaserver.connection import Connection, Incoming, Reply, Result
from metaserver.errors import ConnectionLost, DfsError, ErrorCode, ProcessEnds
from metaserver.key import ClusterKey
from metaserver.wire import Message, Method


class Text(Message):
    text: str


ECHO = Method(1, "echo", Text, Text)
KEY = ClusterKey(bytes(range(32)))


class Server:
    def __init__(self) -> None:
        self.port = 0
        self.cancelled = trio.Event()
        self.order: list[str] = []

    def dispatch(self, connection: Connection, incoming: Incoming) -> Result:
        text = ECHO.decode_request(incoming.body).message.text
        self.order.append(text)
        if text == "fail":
            raise DfsError(ErrorCode.EXISTS, "there already")
        if text == "bug":
            raise KeyError("bug")
        if text == "end":
            raise ProcessEnds("the disk failed")
        if text == "wait":
            return self.wait()
        return Reply(Text(text), [incoming.payload])

    async def wait(self) -> Reply:
        try:
            await trio.sleep_forever()
        finally:
            self.cancelled.set()
        raise AssertionError

    async def handle(self, stream: transport.SocketTransport) -> None:
        try:
            accepted = await connections.accept_handshake(
                stream, self.dispatch, key=KEY, cluster_id="abc", role="server"
            )
        except DfsError:
            return
        await accepted.run()


@asynccontextmanager
async def a_server() -> AsyncIterator[Server]:
    server = Server()
    listener = transport.listen("127.0.0.1", 0)
    server.port = listener.getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transport.serve, listener, server.handle)
        yield server
        nursery.cancel_scope.cancel()


async def greet(server: Server, key: ClusterKey | None = KEY, cluster: str = "", role: str = "server") -> Connection:
    return await connections.connect_handshake(
        await transport.connect("127.0.0.1", server.port),
        connections.refuse,
        key=key,
        cluster_id=cluster,
        role="client",
        server_role=role,
    )


@asynccontextmanager
async def a_client(server: Server) -> AsyncIterator[Connection]:
    connection = await greet(server)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        yield connection
        connection.close()


async def test_payloads_of_every_size_come_back_whole_and_in_order() -> None:
    async with a_server() as server, a_client(server) as client:
        data = bytes(range(256)) * 4096 * 4
        sizes = [0, 1, 23, 24, 4096, 16383, 16384, 65536, 262_144, 1_048_576, wire.PAYLOAD_LIMIT] * 3
        calls = [
            client.start(ECHO, Text(str(i)), [data[: size // 2], data[size // 2 : size]])
            for i, size in enumerate(sizes)
        ]
        for number, (size, call) in enumerate(zip(sizes, calls, strict=True)):
            answer = await call.wait()
            assert answer.message.text == str(number)
            assert answer.payload == data[:size]
        assert server.order == [str(number) for number in range(len(sizes))]


async def test_bodies_up_to_the_limit() -> None:
    async with a_server() as server, a_client(server) as client:
        text = "x" * (wire.BODY_LIMIT - 100)
        assert (await client.call(ECHO, Text(text))).message.text == text
        with pytest.raises(DfsError, match="over the limit"):
            await client.call(ECHO, Text(text + "y" * 200))
        assert (await client.call(ECHO, Text("still"))).message.text == "still"


async def test_errors_cross_with_code_and_text_and_bugs_stay_on_their_side() -> None:
    async with a_server() as server, a_client(server) as client:
        with pytest.raises(DfsError, match="there already") as caught:
            await client.call(ECHO, Text("fail"))
        assert caught.value.code is ErrorCode.EXISTS
        with pytest.raises(DfsError) as caught:
            await client.call(ECHO, Text("bug"))
        assert caught.value.code is ErrorCode.INTERNAL
        assert (await client.call(ECHO, Text("still"))).message.text == "still"


async def test_a_process_that_is_ending_answers_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    """What was asked may have happened: its next life knows. An answer would be believed."""
    async with a_server() as server, a_client(server) as client:
        with pytest.raises(ConnectionLost):
            await client.call(ECHO, Text("end"))
    assert "Traceback" not in "".join(capsys.readouterr())


async def test_cancelling_a_call_cancels_the_handler() -> None:
    async with a_server() as server, a_client(server) as client:
        with trio.move_on_after(0.05):
            await client.call(ECHO, Text("wait"))
        with trio.fail_after(5):
            await server.cancelled.wait()
        assert client.calls_in_flight == 0


async def test_a_deadline_ends_the_call_and_the_handler() -> None:
    async with a_server() as server, a_client(server) as client:
        with pytest.raises(DfsError) as caught:
            await client.call(ECHO, Text("wait"), timeout=0.1)
        assert caught.value.code is ErrorCode.TIMEOUT
        with trio.fail_after(5):
            await server.cancelled.wait()


async def test_overdue_calls_on_a_connection_that_is_found_broken_by_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ending the first one sends a CANCEL, which ends the connection with all other calls."""
    async with a_server() as server, trio.open_nursery() as nursery:
        connection = await greet(server)
        nursery.start_soon(connection.run)
        calls = [connection.start(ECHO, Text("wait"), timeout=0.01) for _ in range(3)]
        await trio.sleep(0.05)

        def broken(buffers: object) -> int:
            raise ConnectionLost("reset by peer")

        monkeypatch.setattr(connection.transport, "try_send", broken)
        codes = []
        for call in calls:
            with pytest.raises(DfsError) as failed:
                await call.wait()
            codes.append(failed.value.code)
        assert codes == [ErrorCode.TIMEOUT, ErrorCode.UNAVAILABLE, ErrorCode.UNAVAILABLE]
        nursery.cancel_scope.cancel()


async def test_calls_in_flight_end_with_the_connection() -> None:
    async with a_server() as server, a_client(server) as client:
        call = client.start(ECHO, Text("wait"))
        client.close("for the test")
        with pytest.raises(ConnectionLost, match="for the test"):
            await call.wait()
        with pytest.raises(ConnectionLost):
            client.start(ECHO, Text("x"))


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b"x" * 64,
        wire.HEADER.pack(0xFFFFFFFF, 0xFFFFFFFF, 1, 1, 1, 0, 0, 0),
        wire.HEADER.pack(4, 0, 1, 99, 1, 0, 0, 0) + b"body",
        b"\0" * 4096,
    ],
)
async def test_garbage_ends_its_own_connection_only(garbage: bytes) -> None:
    async with a_server() as server, a_client(server) as client:
        stream = await transport.connect("127.0.0.1", server.port)
        assert stream.try_send([garbage]) == len(garbage)
        with trio.fail_after(5), pytest.raises(ConnectionLost):
            while True:
                await stream.wait_readable()
                stream.try_receive_into(memoryview(bytearray(4096)))
        stream.close()
        assert (await client.call(ECHO, Text("still"))).message.text == "still"


async def test_garbage_after_the_greeting_ends_that_connection() -> None:
    async with a_server() as server, a_client(server) as client, a_client(server) as other:
        client.transport.try_send([b"\xff" * 64])
        with trio.fail_after(5), pytest.raises(ConnectionLost):
            await client.call(ECHO, Text("x"))
        assert (await other.call(ECHO, Text("still"))).message.text == "still"


async def test_the_greeting_refuses_who_does_not_belong() -> None:
    async with a_server() as server:
        for key, cluster, role, code in (
            (ClusterKey(b"x" * 32), "", "server", ErrorCode.BAD_KEY),
            (None, "", "server", ErrorCode.BAD_KEY),
            (KEY, "other", "server", ErrorCode.WRONG_CLUSTER),
            (KEY, "abc", "metaserver", ErrorCode.WRONG_ROLE),
        ):
            with pytest.raises(DfsError) as caught:
                await greet(server, key, cluster, role)
            assert caught.value.code is code


async def test_an_old_protocol_version_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_server() as server:
        stream = await transport.connect("127.0.0.1", server.port)
        hello = wire.encode(wire.Hello(0, "", "client", 0, b"n" * 16, b""))
        stream.try_send([wire.encode_header(wire.Kind.HELLO, 0, 0, hello) + hello])
        await stream.wait_readable()
        data = bytearray(4096)
        count = stream.try_receive_into(memoryview(data))
        error = wire.decode_failure(bytes(data[24:count]))
        assert error.code is ErrorCode.WRONG_VERSION
        stream.close()


class BrokenWhenSending:
    """A transport whose peer is gone, which shows only when something is sent."""

    name = "peer"

    def try_send(self, buffers: object) -> int:
        raise ConnectionLost("reset by peer")

    async def wait_writable(self) -> None:
        await trio.sleep_forever()

    def try_receive_into(self, view: memoryview) -> int:
        return 0

    async def wait_readable(self) -> None:
        await trio.sleep_forever()

    def close(self) -> None:
        """Nothing to close."""


async def test_a_call_whose_sending_ends_the_connection_does_not_wait_for_ever(autojump_clock: object) -> None:
    connection = Connection(BrokenWhenSending(), connections.refuse, wire.Hello(1, "", "", 0, b"", b""))
    pending = connection.start(Method(1, "x", wire.Empty, wire.Empty), wire.Empty())
    assert connection.calls_in_flight == 0
    with trio.fail_after(5), pytest.raises(ConnectionLost):
        await pending.wait()


async def test_an_http_port_is_named_as_such() -> None:
    async def http(stream: transport.SocketTransport) -> None:
        await stream.wait_readable()
        stream.try_send([b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n"])
        await trio.sleep_forever()

    listener = transport.listen("127.0.0.1", 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transport.serve, listener, http)
        server = Server()
        server.port = listener.getsockname()[1]
        with pytest.raises(DfsError, match="is an HTTP port"):
            await greet(server)
        nursery.cancel_scope.cancel()

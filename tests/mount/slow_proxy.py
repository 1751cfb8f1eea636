"""A TCP proxy that makes a server slow, silent or unreachable, as a bad network or a sick machine would."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf

import trio

RECEIVE_BYTES = 256 << 10
# Pieces on their way, each of at most the above; beyond, the proxy reads no further, as a full network would not.
PIECES = 256


class Proxy:
    """Passes connections to (``host``, ``port``) on to (``target``, ``port``). May be changed while it runs.

    ``delay_seconds``: how much later each piece arrives on its way there. ``stalled``: nothing passes any more, in
    neither direction, until it is over. ``refusing``: new connections are reset, and so are those there are.
    """

    def __init__(self, host: str, port: int, target: str) -> None:
        self.host = host
        self.port = port
        self.target = target
        self.delay_seconds = 0.0
        self.stalled = False
        self.refusing = False

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        listeners = await trio.open_tcp_listeners(self.port, host=self.host)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, self._serve, listeners)
            task_status.started()

    async def _serve(self, client: trio.SocketStream) -> None:
        try:
            async with await trio.open_tcp_stream(self.target, self.port) as server, trio.open_nursery() as nursery:
                nursery.start_soon(self._pass_on, client, server, True, nursery.cancel_scope)
                nursery.start_soon(self._pass_on, server, client, False, nursery.cancel_scope)
                while not self.refusing:  # noqa: ASYNC110
                    await trio.sleep(0.02)
                nursery.cancel_scope.cancel()
        except OSError:
            pass

    async def _pass_on(
        self, source: trio.SocketStream, sink: trio.SocketStream, there: bool, scope: trio.CancelScope
    ) -> None:
        send, receive = trio.open_memory_channel[tuple[float, bytes]](PIECES)

        async def arrive() -> None:
            async for at, data in receive:
                await trio.sleep_until(at)
                while self.stalled:  # noqa: ASYNC110
                    await trio.sleep(0.02)
                await sink.send_all(data)

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(arrive)
                while data := await source.receive_some(RECEIVE_BYTES):
                    await send.send((trio.current_time() + (self.delay_seconds if there else 0.0), bytes(data)))
        except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass
        scope.cancel()


@contextmanager
def proxying(proxy: Proxy) -> Iterator[Proxy]:
    """Runs it in a thread for the block."""
    started = threading.Event()
    stop: list[tuple[trio.lowlevel.TrioToken, trio.CancelScope]] = []

    async def main() -> None:
        with trio.CancelScope(deadline=inf) as scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(proxy.run)
                stop.append((trio.lowlevel.current_trio_token(), scope))
                started.set()

    thread = threading.Thread(target=trio.run, args=(main,), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield proxy
    finally:
        token, scope = stop[0]
        token.run_sync_soon(scope.cancel)
        thread.join(10)

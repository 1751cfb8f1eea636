"""Byte streams under the frames: the real one over sockets. A simulated network implements :class:`Transport` too.

Sockets are plain non-blocking ones of the standard library with trio's readiness waits, not ``trio.socket``: an
attempt that succeeds at once costs one system call and no trip through the scheduler (about 20 us each way).
"""

import errno
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import trio

from metaserver.errors import ConnectionLost
from metaserver.wire import Buffer

# A peer that stops acknowledging for so long is gone (TCP_USER_TIMEOUT); also the bound on keep-alive probing.
DEAD_PEER_SECONDS = 15
# sendmsg takes at most IOV_MAX (1,024) buffers.
MAX_BUFFERS = 512


class Transport(Protocol):
    """A reliable byte stream. Every method raises :class:`ConnectionLost` once the stream is broken or closed."""

    name: str

    def try_send(self, buffers: Sequence[Buffer]) -> int:
        """Sends what can be sent at once; returns the number of bytes taken, 0 if none."""

    async def wait_writable(self) -> None: ...

    def try_receive_into(self, view: memoryview) -> int:
        """Fills the start of ``view``; returns the number of bytes, 0 if there are none yet."""

    async def wait_readable(self) -> None: ...

    def close(self) -> None:
        """Ends the stream at once; whoever waits on it gets :class:`ConnectionLost`. May be called again."""


class SocketTransport:
    """A :class:`Transport` over a connected TCP or UNIX stream socket, which it owns."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self.name = name
        self._socket = sock
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, DEAD_PEER_SECONDS // 3)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, DEAD_PEER_SECONDS // 3)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_PEER_SECONDS * 1000)

    def try_send(self, buffers: Sequence[Buffer]) -> int:
        try:
            return self._socket.sendmsg(buffers[:MAX_BUFFERS])
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._lost(error) from None

    async def wait_writable(self) -> None:
        try:
            await trio.lowlevel.wait_writable(self._socket)
        except (trio.ClosedResourceError, OSError) as error:
            raise self._lost(error) from None

    def try_receive_into(self, view: memoryview) -> int:
        try:
            count = self._socket.recv_into(view)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._lost(error) from None
        if count == 0:
            raise ConnectionLost(f"{self.name} closed the connection")
        return count

    async def wait_readable(self) -> None:
        try:
            await trio.lowlevel.wait_readable(self._socket)
        except (trio.ClosedResourceError, OSError) as error:
            raise self._lost(error) from None

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    def _lost(self, error: Exception) -> ConnectionLost:
        reason = error.strerror if isinstance(error, OSError) else "closed on this side"
        return ConnectionLost(f"connection to {self.name} lost: {reason}")


async def connect(host: str, port: int, *, timeout_seconds: float = 5.0) -> SocketTransport:
    """Connects over TCP, trying each address of ``host`` in turn; :class:`ConnectionLost` names the last failure."""
    name = f"{host}:{port}"
    problem = "timed out"
    with trio.move_on_after(timeout_seconds):
        try:
            addresses = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ConnectionLost(f"cannot resolve {host}: {error.strerror or error}") from None
        for family, kind, protocol, _, address in addresses:
            sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
            try:
                code = sock.connect_ex(address)
                if code == errno.EINPROGRESS:
                    await trio.lowlevel.wait_writable(sock)
                    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            except BaseException:
                sock.close()
                raise
            if code == 0:
                return SocketTransport(sock, name)
            sock.close()
            problem = os.strerror(code)
    raise ConnectionLost(f"cannot connect to {name}: {problem}")


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; raises ``OSError`` (port in use, no such address)."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(512)
    except BaseException:
        sock.close()
        raise
    return sock


async def serve(listener: socket.socket, handle: Callable[[SocketTransport], Awaitable[None]]) -> None:
    """Accepts until cancelled, each connection in a task of its own; closes the listener and then the connections.

    ``handle`` must not let an ordinary exception escape: it would end the server.
    """

    async def run(transport: SocketTransport) -> None:
        try:
            await handle(transport)
        finally:
            transport.close()

    async with trio.open_nursery() as connections:
        try:
            while True:
                await trio.lowlevel.wait_readable(listener)
                try:
                    sock, address = listener.accept()
                except BlockingIOError:
                    continue
                except OSError:
                    # EMFILE, ENOBUFS, or a peer that left already: keep serving the others.
                    await trio.sleep(0.1)
                    continue
                name = f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "local peer"
                connections.start_soon(run, SocketTransport(sock, name))
        finally:
            trio.lowlevel.notify_closing(listener)
            listener.close()
            connections.cancel_scope.cancel()

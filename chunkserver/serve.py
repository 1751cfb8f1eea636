"""Running a chunkserver: sockets, HTTP, the reporting thread, signals, systemd.

Two nurseries: the outer one has everything that others still need while draining (connections, the store's tasks),
the inner one what ends first (accepting registrations and orders).
"""

import errno
import signal
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import NamedTuple, TypeVar

import structlog
import trio

from chunkserver import http
from chunkserver.client import ControlClient
from chunkserver.config import Config, split_address
from chunkserver.disk import DataDisk, Disk, LocalDisk, raise_descriptor_limit
from chunkserver.identity import Identity, open_directory
from chunkserver.node import Node
from chunkserver.report import Reporter
from chunkserver.scrub import ScrubOptions
from metaserver import httpserver, systemd, transport
from metaserver.connection import keep_large_buffers
from metaserver.controlsocket import Control
from metaserver.errors import ConnectionLost
from metaserver.key import ClusterKey
from metaserver.protocol import Order, Register, Registered, ReplicaReport

log = structlog.get_logger(__name__)

# Half of what systemd waits by default for far larger programs; clients go elsewhere long before.
DRAIN_SECONDS = 10.0

ResultT = TypeVar("ResultT")


class StartError(Exception):
    """The server cannot start; the text is one line that says why and what to do."""


class Bridge:
    """The reporter's callbacks, from its thread into the event loop; once the loop ends, the thread does too."""

    def __init__(self, node: Node, registration: Callable[[], Register], token: trio.lowlevel.TrioToken) -> None:
        self._node = node
        self._registration = registration
        self._token = token

    def registration(self) -> Register:
        return self._run(_as_async(self._registration))

    def registered(self, reply: Registered) -> None:
        async def registered() -> None:
            await self._node.registered(reply)

        self._run(registered)

    def listing(self) -> list[ReplicaReport]:
        return self._run(_as_async(self._node.listing))

    def orders(self, orders: list[Order]) -> None:
        self._run(_as_async(lambda: self._node.submit(orders)))

    def _run(self, function: Callable[[], Awaitable[ResultT]]) -> ResultT:
        try:
            return trio.from_thread.run(function, trio_token=self._token)
        except (trio.RunFinishedError, trio.Cancelled):
            raise ConnectionLost("this server is ending") from None


def _as_async(function: Callable[[], ResultT]) -> Callable[[], Awaitable[ResultT]]:
    async def run() -> ResultT:
        return function()

    return run


class Ports(NamedTuple):
    """Where a server listens in the end."""

    data: int
    http: int


async def serve(
    config: Config,
    key: ClusterKey | None,
    stop: trio.Event,
    *,
    make_disk: Callable[[str], DataDisk] = LocalDisk,
    task_status: trio.TaskStatus[Ports] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Runs until ``stop`` is set, then drains. Raises :class:`StartError`, ``DataDirectoryError``, and
    :class:`DfsError` if the metaserver is of another cluster; cancelling ends it at once."""
    raise_descriptor_limit()
    keep_large_buffers()
    disk, identity = open_directory(config.data, config.name, make_disk)
    try:
        listener = _listen(*split_address(config.listen, "listen"))
        try:
            await _serve(config, key, disk, identity, listener, stop, task_status)
        finally:
            listener.close()
    finally:
        disk.unlock()


async def _serve(
    config: Config,
    key: ClusterKey | None,
    disk: Disk,
    identity: Identity,
    listener: socket.socket,
    stop: trio.Event,
    task_status: trio.TaskStatus[Ports],
) -> None:
    async with trio.open_nursery() as outer:
        scrub = ScrubOptions(config.scrub_days, config.scrub_bytes_per_second)
        node = Node(disk, identity, key, outer, reserve=config.reserve, scrub=scrub)
        if identity.cluster_id:
            await node.begin()
        http_port = await _start_http(outer, node, *split_address(config.http, "http"))
        ports = Ports(listener.getsockname()[1], http_port)
        outer.start_soon(transport.serve, listener, node.accept)
        registration = partial(
            node.registration,
            host=config.advertised_host,
            port=ports.data,
            http_port=ports.http,
            rack=config.rack,
            labels=config.labels,
        )
        async with trio.open_nursery() as inner:
            inner.start_soon(_report, node, registration, config.metaservers, key)
            inner.start_soon(systemd.feed_watchdog)
            inner.start_soon(Control("chunkserver", {}).run)
            systemd.notify("READY=1")
            log.info("serving", name=identity.name, port=ports.data, http_port=ports.http, directory=disk.root)
            task_status.started(ports)
            await stop.wait()
            systemd.notify("STOPPING=1")
            log.info("stopping")
            await node.drain(DRAIN_SECONDS)
            inner.cancel_scope.cancel()
        outer.cancel_scope.cancel()


def _listen(host: str, port: int) -> socket.socket:
    try:
        return transport.listen(host, port)
    except OSError as error:
        raise StartError(_cannot_listen(host, port, error)) from None


async def _start_http(nursery: trio.Nursery, node: Node, host: str, port: int) -> int:
    try:
        bound: int = await nursery.start(httpserver.run_http, http.make_app(node), host, port)
    except OSError as error:
        raise StartError(_cannot_listen(host, port, error)) from None
    return bound


def _cannot_listen(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use: stop what listens there or choose another"
    return f"cannot listen on {host}:{port}: {error.strerror}"


async def _report(
    node: Node, registration: Callable[[], Register], metaservers: list[str], key: ClusterKey | None
) -> None:
    """Keeps the reporting thread while this task lives."""
    control = ControlClient(metaservers, key)
    bridge = Bridge(node, registration, trio.lowlevel.current_trio_token())
    reporter = Reporter(control, bridge, node.outbox, node.mailbox)

    def run() -> None:
        try:
            reporter.run()
        finally:
            control.close()

    try:
        await trio.to_thread.run_sync(run, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
    finally:
        node.mailbox.close()


async def serve_until_signal(config: Config, key: ClusterKey | None) -> None:
    """:func:`serve` until SIGTERM or SIGINT; a second one ends it without draining."""
    stop = trio.Event()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                async for _ in signals:
                    if stop.is_set():
                        nursery.cancel_scope.cancel()
                    stop.set()

            nursery.start_soon(watch)
            await serve(config, key, stop)
            nursery.cancel_scope.cancel()

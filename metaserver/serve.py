"""Running a metaserver: data directory, storage engine, sockets, signals, systemd.

Two nurseries in one: the inner ends first (nothing new is accepted), then the connections, then the storage engine,
whose end is a synced checkpoint.
"""

import errno
import faulthandler
import gc
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import structlog
import trio

from metaserver import httpserver, identity, joins, looking, systemd, transport
from metaserver.clock import steady_ns
from metaserver.commit import Committer, Options, open_committer
from metaserver.config import Config, ConfigError
from metaserver.connection import accept_handshake
from metaserver.controlsocket import Control
from metaserver.errors import ConnectionLost, DfsError
from metaserver.http import make_app
from metaserver.key import ClusterKey, load_or_create_key
from metaserver.parts import Parts
from metaserver.protocol import ROLE
from metaserver.transport import SocketTransport

log = structlog.get_logger(__name__)

# The storage engine on a data directory; simulations have one over other files.
OpenEngine: TypeAlias = Callable[[Path], AbstractAsyncContextManager[Committer]]
# What was asked before a stop is answered, as far as that takes no longer.
DRAIN_SECONDS = 2.0
CRASH_NAME = "crashed"


class StartError(Exception):
    """The server cannot start; the text is one line that says why and what to do."""


class Ports(NamedTuple):
    """Where a server listens in the end."""

    data: int
    http: int


async def serve(
    config: Config,
    stop: trio.Event,
    *,
    open_engine: OpenEngine = open_committer,
    task_status: trio.TaskStatus[Ports] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Runs a metaserver until ``stop`` is set. Raises, before anything is served, what the command line explains."""
    config.check()
    # The ports first: what cannot be served must not leave a data directory and a key behind.
    listener = _listen(config.listen_host, config.listen_port)
    try:
        if config.http_port:
            _listen(config.http_host, config.http_port).close()
        whose = identity.open_directory(config.data_path)
        key = _key(config)
        async with open_engine(config.data_path) as committer:
            parts = Parts(committer, config, whose.cluster_id, steady_ns=steady_ns)
            parts.load()
            await committer.checkpoint()
            await _run(config, key, parts, listener, stop, task_status)
    finally:
        listener.close()


def _key(config: Config) -> ClusterKey:
    try:
        return load_or_create_key(config.key_path)
    except OSError as error:
        raise ConfigError(f"cannot make the cluster key {config.key_path}: {error.strerror}") from None


async def _run(
    config: Config,
    key: ClusterKey,
    parts: Parts,
    listener: socket.socket,
    stop: trio.Event,
    task_status: trio.TaskStatus[Ports],
) -> None:
    async with trio.open_nursery() as nursery:
        ports = Ports(listener.getsockname()[1], await _start_http(nursery, config, key, parts))
        nursery.start_soon(transport.serve, listener, _Acceptor(parts, key).handle)
        nursery.start_soon(parts.aging.run)
        nursery.start_soon(Control("metaserver", {}).run)
        nursery.start_soon(parts.history.run)
        nursery.start_soon(systemd.feed_watchdog)
        systemd.notify("READY=1")
        log.info(
            "serving", cluster=parts.cluster_id, epoch=parts.committer.epoch,
            listen=f"{config.listen_host}:{ports.data}", http=f"{config.http_host}:{ports.http}",
        )  # fmt: skip
        task_status.started(ports)
        await stop.wait()
        systemd.notify("STOPPING=1")
        log.info("stopping")
        await _drain(parts.committer)
        nursery.cancel_scope.cancel()


async def _drain(committer: Committer) -> None:
    """Lets the replies leave that wait for what has been done so far."""
    with trio.move_on_after(DRAIN_SECONDS):
        await committer.wait_durable(committer.newest)
        await trio.sleep(0.01)


class _Acceptor:
    """Greets connections and serves them; one that misbehaves ends alone."""

    def __init__(self, parts: Parts, key: ClusterKey) -> None:
        self._parts = parts
        self._key = key

    async def handle(self, stream: SocketTransport) -> None:
        client = self._parts.client()
        try:
            connection = await accept_handshake(
                stream, client.dispatch, key=self._key, cluster_id=self._parts.cluster_id, role=ROLE,
                timing_of=self._parts.service.timing_of,
            )  # fmt: skip
        except ConnectionLost as error:
            # Whoever only looks whether the port is open: no reason to worry anybody.
            log.debug("connection closed before the greeting", peer=stream.name, reason=str(error))
            return
        except DfsError as error:
            log.warning("greeting refused", peer=stream.name, reason=str(error))
            return
        try:
            await connection.run()
        finally:
            client.lost(connection)


async def _start_http(nursery: trio.Nursery, config: Config, key: ClusterKey, parts: Parts) -> int:
    more = [
        *joins.routes(joins.Joins(config.data_path, key, parts.cluster_id)),
        *looking.routes(parts.garbage, parts.listing, parts.admin),
    ]
    app = make_app(parts.service, parts.control, parts.status, parts.admin, parts.history, key, more)
    try:
        bound: int = await nursery.start(httpserver.run_http, app, config.http_host, config.http_port)
    except OSError as error:
        raise StartError(_cannot_listen(config.http_host, config.http_port, error)) from None
    return bound


def _listen(host: str, port: int) -> socket.socket:
    try:
        return transport.listen(host, port)
    except OSError as error:
        raise StartError(_cannot_listen(host, port, error)) from None


def _cannot_listen(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use: stop what listens there or choose another"
    return f"cannot listen on {host}:{port}: {error.strerror}"


async def serve_until_signal(config: Config) -> None:
    """:func:`serve` until SIGTERM or SIGINT; a second one does not wait for replies to leave."""
    stop = trio.Event()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                async for _ in signals:
                    if stop.is_set():
                        nursery.cancel_scope.cancel()
                    stop.set()

            nursery.start_soon(watch)
            await nursery.start(_serve_and_stop, config, stop, nursery.cancel_scope)
            # What is there now stays: the collector need not look at it again and again.
            gc.collect()
            gc.freeze()


async def _serve_and_stop(
    config: Config, stop: trio.Event, scope: trio.CancelScope, *, task_status: trio.TaskStatus[Ports]
) -> None:
    with _noting_fatal_signals(config.data_path) as ended_by_one:
        # Perhaps a damaged page did it, beyond what a start has time for: now it takes the time.
        options = Options(check_seconds=None) if ended_by_one else Options()
        await serve(config, stop, open_engine=partial(open_committer, options=options), task_status=task_status)
    scope.cancel()


@contextmanager
def _noting_fatal_signals(directory: Path) -> Iterator[bool]:
    """Has SIGBUS, SIGSEGV and the like leave a traceback in the file ``crashed``; whether the last life ended so."""
    path = directory / CRASH_NAME
    if not (directory / identity.FILE).exists():
        yield False
        return
    reason = _read_note(path)
    if reason:
        log.error("the metaserver was ended by a fatal signal; looking through the whole store", reason=reason)
    try:
        file = path.open("w")
    except OSError as error:
        # It only tells the next start to look more closely; that is no reason not to serve.
        log.warning("a fatal signal will not be noted", path=str(path), reason=error.strerror)
        yield bool(reason)
        return
    with file:
        faulthandler.enable(file)
        try:
            yield bool(reason)
        finally:
            faulthandler.disable()


def _read_note(path: Path) -> str:
    """How the last life ended by a fatal signal; "" if it did not. What cannot be read is taken for a sign of one."""
    try:
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return lines[0] if lines else ""

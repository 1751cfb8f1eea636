"""One gateway from beginning to end: session, port, signals, and an orderly end (uploads first, then the session)."""

import re
import secrets
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import structlog
import trio

from dfsmount.assembly import Client, ClientOptions, NoKernel, open_client
from dfsmount.config import Source
from dfsmount.gateway_app import Gateway
from dfsmount.gateway_http import STALL_SECONDS, Access
from dfsmount.gateway_tree import Tree
from dfsmount.gateway_uploads import Uploads
from dfsmount.vfs_core import VfsOptions
from dfsmount.vfs_names import Caller
from metaserver import systemd
from metaserver.connection import keep_large_buffers
from metaserver.errors import DfsError, ErrorCode
from metaserver.httpserver import Tls, is_loopback, run_http
from metaserver.key import ClusterKey

log = structlog.get_logger(__name__)

# Less than a mount has: nothing is gained by collecting more of a stream than a few layers of each.
DIRTY_MIB = 64
FINISH_SECONDS = 60.0
TOKEN_BYTES = 32


class GatewayError(Exception):
    """The gateway cannot run; one line that says what to do."""


class GatewayPlan(msgspec.Struct):
    """Everything that a gateway is told. ``name`` is the same in each of its lives; "": host and port."""

    source: Source
    host: str
    port: int
    access: Access
    uid: int
    gid: int
    mode: int = 0o644
    max_bytes: int = 0
    name: str = ""
    timeout: float = 30.0
    dirty_mib: int = DIRTY_MIB
    tls: Tls | None = None

    @property
    def gateway(self) -> str:
        """The name, with nothing in it that has a meaning in names of uploads."""
        return re.sub(r"[^A-Za-z0-9_-]", "-", self.name or f"{socket.gethostname()}-{self.port}")[:100]

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'http' if self.tls is None else 'https'}://{host}:{self.port}"


def check(plan: GatewayPlan) -> None:
    """Raises :class:`GatewayError` if this cannot be meant, or would let in whom nobody has asked in."""
    if plan.port == 0 and not plan.name:
        raise GatewayError("a gateway whose port the system chooses needs a name of its own (--name)")
    if not plan.access.tokens and not plan.access.read_only and not is_loopback(plan.host):
        raise GatewayError(f"{plan.host} is not loopback: everybody could write; use tokens, or --read-only")


def read_tokens(path: Path) -> tuple[str, ...]:
    """The tokens of a file, one a line, # begins a comment; a file that does not exist is made with a new one."""
    try:
        if not path.exists():
            path.touch(mode=0o600, exist_ok=False)
            path.write_text(f"{secrets.token_urlsafe(TOKEN_BYTES)}\n")
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise GatewayError(f"cannot use the token file {path}: {error}") from None
    tokens = tuple(line for line in lines if line and not line.startswith("#"))
    if not tokens:
        raise GatewayError(f"there is no token in {path}")
    return tokens


def run(plan: GatewayPlan, key: ClusterKey | None, ready: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT; calls ``ready`` with its address. Raises :class:`GatewayError`."""
    check(plan)
    keep_large_buffers()
    try:
        trio.run(serve, plan, key, ready)
    except* GatewayError as group:
        raise _first(group) from None
    except* DfsError as group:
        raise GatewayError(str(_first(group))) from None


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def serve(plan: GatewayPlan, key: ClusterKey | None, ready: Callable[[str], None]) -> None:
    """:func:`run` in a running event loop."""
    # Each request asks anew, so that it sees what others have changed a moment before.
    vfs_options = VfsOptions(attr_timeout=0.0, entry_timeout=0.0, read_only=plan.access.read_only)
    options = ClientOptions(plan.url, vfs_options, plan.timeout, dirty_mib=plan.dirty_mib)
    try:
        async with (
            open_client(plan.source, key, options, lambda root: NoKernel()) as client,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(client.run)
            try:
                await _serve(plan, client, ready)
            finally:
                await _finish(client)
            nursery.cancel_scope.cancel()
    except DfsError as error:
        raise GatewayError(_explain(error, plan)) from None


def _explain(error: DfsError, plan: GatewayPlan) -> str:
    if error.code in (ErrorCode.NOT_FOUND, ErrorCode.NOT_DIRECTORY):
        return f"there is no directory {plan.source.subdirectory} in the cluster at {plan.source.host}"
    return error.text


async def _serve(plan: GatewayPlan, client: Client, ready: Callable[[str], None]) -> None:
    tree = Tree(client, Caller(plan.uid, plan.gid))
    uploads = Uploads(tree, plan.gateway, secrets.token_hex(4), plan.mode)
    app = Gateway(tree, uploads, plan.access, max_bytes=plan.max_bytes).app()
    serve_http = partial(
        # The routes see to senders that stall; and whoever downloads for an hour says nothing meanwhile.
        run_http, app, plan.host, plan.port, read_seconds=None, dead_peer_seconds=int(STALL_SECONDS), tls=plan.tls
    )  # fmt: skip
    async with trio.open_nursery() as nursery:
        try:
            port = await nursery.start(serve_http)
        except OSError as error:
            raise GatewayError(f"cannot listen on {plan.host}:{plan.port}: {error.strerror or error}") from None
        if not plan.access.read_only:
            nursery.start_soon(uploads.run)
        nursery.start_soon(systemd.feed_watchdog)
        address = msgspec.structs.replace(plan, port=port).url
        log.info("serving", source=str(plan.source), address=address, read_only=plan.access.read_only)
        systemd.notify("READY=1")
        ready(address)
        await _await_signal()
        systemd.notify("STOPPING=1")
        log.info("stopping", uploads=uploads.in_progress)
        nursery.cancel_scope.cancel()
    if not plan.access.read_only:
        await uploads.close()


async def _await_signal() -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        await anext(aiter(signals))


async def _finish(client: Client) -> None:
    """Ends the session in order. Cannot be cancelled, but is bounded."""
    with trio.CancelScope(shield=True), trio.move_on_after(FINISH_SECONDS):
        try:
            await client.vfs.finish()
        except DfsError as error:
            log.error("the session could not be ended in order", error=str(error))

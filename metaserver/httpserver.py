"""What both kinds of server need to serve HTTP/JSON.

Errors are a 4xx or 5xx with ``{"code": ErrorCode name, "text": one line}``. Everything but ``open_paths`` needs
``Authorization: Bearer <key.http_token>``.
"""

import binascii
import hmac
import logging
import socket
from base64 import b64decode
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar, cast

import hypercorn.typing
import msgspec
import structlog
import trio
from hypercorn.config import Config, Sockets
from hypercorn.trio.run import worker_serve
from hypercorn.utils import wrap_app
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from metaserver.errors import DfsError, ErrorCode
from metaserver.key import ClusterKey
from metaserver.protocol import HTTP_BODY_LIMIT
from metaserver.transport import DEAD_PEER_SECONDS, listen

log = structlog.get_logger(__name__)

# Between requests; heartbeats come every second or so and should find their connection open.
KEEP_ALIVE_SECONDS = 75
# While a request's body is on its way, and while its answer is being made: a check of everything may take minutes.
READ_SECONDS = 900

# Pieces of a body, of up to 64 KiB, that wait for the application, in each connection.
QUEUED_MESSAGES = 4
# Of a body that was answered before its end, so much is still taken, for so long.
LINGER_BYTES, LINGER_SECONDS = 4 << 20, 2.0

ReadT = TypeVar("ReadT")

_STATUS = {
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.NO_SUCH_CHUNK: 404,
    ErrorCode.INVALID: 400,
    ErrorCode.PROTOCOL: 400,
    ErrorCode.BAD_KEY: 401,
    ErrorCode.NOT_PERMITTED: 403,
    ErrorCode.NOT_SUPPORTED: 405,
    ErrorCode.ARGUMENT_TOO_BIG: 413,
    ErrorCode.INTERNAL: 500,
    ErrorCode.IO: 500,
    ErrorCode.UNAVAILABLE: 503,
    ErrorCode.TIMEOUT: 504,
    ErrorCode.NO_SPACE: 507,
    ErrorCode.DISK_FULL: 507,
}
_FROM_STATUS = {404: ErrorCode.NOT_FOUND, 405: ErrorCode.NOT_SUPPORTED, 413: ErrorCode.ARGUMENT_TOO_BIG}


def json_reply(value: Any, status: int = 200) -> Response:
    """An answer with ``value`` (anything msgspec encodes) as JSON."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def error_reply(error: DfsError) -> Response:
    """The answer that stands for ``error``; a conflict with the state of things (409) unless the code says better."""
    reply = json_reply({"code": error.code.name, "text": error.text}, _STATUS.get(error.code, 409))
    if error.code is ErrorCode.BAD_KEY:
        # A browser asks for it.
        reply.headers["WWW-Authenticate"] = 'Basic realm="the token of the cluster key as password", charset="UTF-8"'
    return reply


def basic_password(encoded: bytes) -> bytes:
    """The password in what follows "Basic" in an Authorization header (RFC 7617); empty if it is malformed."""
    try:
        return b64decode(encoded, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


async def read_json(request: Request, type_: type[ReadT]) -> ReadT:
    """The body of a request; INVALID unless it is JSON for ``type_``."""
    body = await request.body()
    try:
        return msgspec.json.decode(body, type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DfsError(ErrorCode.INVALID, f"malformed request: {error}") from None


class _Guard:
    """ASGI middleware: token, bound on the body, and no exception without an answer."""

    def __init__(self, app: ASGIApp, key: ClusterKey | None, open_paths: tuple[str, ...], body_limit: int) -> None:
        self._app = app
        self._expected = None if key is None else f"Bearer {key.http_token}".encode()
        self._token = None if key is None else key.http_token.encode()
        self._open_paths = open_paths
        self._body_limit = body_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False
        taken = 0

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        async def receiving() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            self._check_length(taken)
            return message

        try:
            self._admit(scope)
            await self._app(scope, receiving, sending)
        except DfsError as error:
            if started:
                raise
            await error_reply(error)(scope, receive, send)
        except ClientGone:
            raise
        except Exception:
            log.exception("request failed", path=scope["path"])
            if not started:
                text = "the server met an unexpected condition; see its log"
                await error_reply(DfsError(ErrorCode.INTERNAL, text))(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self._expected is not None and scope["path"] not in self._open_paths:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected) and not self._may_look(scope["method"], given):
                raise DfsError(ErrorCode.BAD_KEY, "this needs the token of the cluster key")
        length = headers.get(b"content-length", b"0")
        self._check_length(int(length) if length.isdigit() else 0)

    def _may_look(self, method: str, given: bytes) -> bool:
        """Whether this is a browser whose user typed the token as the password. It may only read: browsers send a
        password along with whatever another site has them ask for."""
        scheme, _, encoded = given.partition(b" ")
        if self._token is None or method not in ("GET", "HEAD") or scheme.lower() != b"basic":
            return False
        return hmac.compare_digest(basic_password(encoded), self._token)

    def _check_length(self, length: int) -> None:
        if length > self._body_limit:
            raise DfsError(ErrorCode.ARGUMENT_TOO_BIG, f"a body of more than {self._body_limit} bytes")


async def _http_exception(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _FROM_STATUS.get(error.status_code, ErrorCode.INVALID)
    reply = json_reply({"code": code.name, "text": error.detail}, error.status_code)
    # For 405: what is allowed.
    reply.headers.update(error.headers or {})
    return reply


async def _dfs_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, DfsError)
    return error_reply(error)


def protected(
    routes: Sequence[BaseRoute],
    key: ClusterKey | None,
    open_paths: tuple[str, ...] = ("/health",),
    *,
    body_limit: int = HTTP_BODY_LIMIT,
) -> Starlette:
    """An application of ``routes`` behind the token of ``key`` (None: no token; then listen on loopback only).

    Handlers are ``async def``, raise :class:`DfsError` and answer with :func:`json_reply`.
    """
    return Starlette(
        routes=list(routes),
        middleware=[Middleware(_Guard, key=key, open_paths=open_paths, body_limit=body_limit)],
        exception_handlers={HTTPException: _http_exception, DfsError: _dfs_error},
    )


class ClientGone(Exception):
    """Nobody waits for an answer any more."""


# What hypercorn's sends raise once it has seen the client's end; the first while it is closing (0.18).
_GONE = (trio.BusyResourceError, trio.BrokenResourceError, trio.ClosedResourceError)


class _Lingering:
    """ASGI middleware: an answer before the end of the request's body reaches the client, and the connection ends.

    A client that is still sending would get a reset instead of the answer if the connection were closed at once.
    And hypercorn must always find somebody who takes what it has received: otherwise it waits for that for ever,
    holding what is in its queue.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        received = answered = False

        async def send_on(message: Message | None) -> None:
            try:
                # None is what hypercorn itself sends after the application's end; a second one does nothing.
                await send(cast(Message, message))
            except _GONE:
                raise ClientGone from None

        async def receiving() -> Message:
            nonlocal received
            message = await receive()
            received = received or _is_last(message)
            return message

        async def sending(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start" and not received and _has_body(scope):
                # The client must not send its next request to a connection that ends.
                message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            if message["type"] != "http.response.body" or message.get("more_body", False):
                await send_on(message)
                return
            answered = True
            if received:
                await send_on(message)
                return
            await send_on({**message, "more_body": True})
            await _discard_some(receiving)
            await send_last({"type": "http.response.body", "body": b"", "more_body": False})

        async def send_last(message: Message | None) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_discard, receive)
                with suppress(ClientGone):
                    await send_on(message)
                nursery.cancel_scope.cancel()

        with suppress(ClientGone):
            await self._app(scope, receiving, sending)
        if not answered and not received:
            await send_last(None)


def _has_body(scope: Scope) -> bool:
    """Whether a request of HTTP/1 has a body: a later version neither ends the connection nor has such a header."""
    headers = dict(scope["headers"])
    chunked = b"transfer-encoding" in headers
    return scope["http_version"].startswith("1") and (chunked or headers.get(b"content-length", b"0") != b"0")


def _is_last(message: Message) -> bool:
    return message["type"] == "http.disconnect" or not message.get("more_body", False)


async def _discard_some(receive: Receive) -> None:
    """Takes the rest of a body, if it is short or its sender gives up soon."""
    left = LINGER_BYTES
    with trio.move_on_after(LINGER_SECONDS):
        while left > 0:
            message = await receive()
            if _is_last(message):
                return
            left -= len(message.get("body", b""))


async def _discard(receive: Receive) -> None:
    while True:
        await receive()


class Tls(NamedTuple):
    """A certificate (with its chain) and its private key, as files in PEM."""

    certificate: str
    private_key: str


async def run_http(
    app: ASGIApp,
    host: str,
    port: int,
    *,
    read_seconds: int | None = READ_SECONDS,
    dead_peer_seconds: int = DEAD_PEER_SECONDS,
    tls: Tls | None = None,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves until cancelled; use with ``nursery.start``, which returns the port (chosen by the system for 0).

    ``read_seconds`` bounds how long a client may say nothing, also while it is being answered; None: the application
    sees to that. ``dead_peer_seconds``: for how long a client may take nothing of what is sent to it.
    Raises ``OSError`` if it cannot listen there.
    """
    listener = listen(host, port)
    # Inherited by what is accepted; bounds hypercorn's shielded sends to a client that stopped reading.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, dead_peer_seconds * 1000)
    config = Config()
    config.errorlog = logging.getLogger("hypercorn.error")
    config.loglevel = "WARNING"
    logging.getLogger("hypercorn.error").setLevel(logging.WARNING)
    config.keep_alive_timeout = KEEP_ALIVE_SECONDS
    config.read_timeout = read_seconds
    config.include_server_header = False
    config.max_app_queue_size = QUEUED_MESSAGES
    if tls is not None:
        config.certfile, config.keyfile = tls.certificate, tls.private_key
        config.alpn_protocols = ["http/1.1"]
    try:
        async with trio.open_nursery() as nursery:
            sockets = Sockets([], [listener], []) if tls is None else Sockets([listener], [], [])
            lingering = cast(hypercorn.typing.ASGIFramework, _Lingering(app))
            wrapped = wrap_app(lingering, config.wsgi_max_body_size, "asgi")
            bound = listener.getsockname()[1]

            async def run(*, task_status: trio.TaskStatus[Any]) -> None:
                await worker_serve(wrapped, config, sockets=sockets, task_status=task_status)

            await nursery.start(run)
            task_status.started(bound)
    finally:
        listener.close()


def is_loopback(host: str) -> bool:
    """Whether a server that listens on ``host`` can be reached from this machine only."""
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return bool(host) and all(address == "::1" or address.startswith("127.") for address in addresses)

"""WebDAV (class 1 and 2) below ``/dav/``: WsgiDAV in worker threads, on the same tree, uploads and tokens.

WsgiDAV knows the protocol (properties, locks, If headers, COPY and MOVE); it is WSGI, so each request has a thread,
which asks the event loop for whatever it needs. Bodies of PUT come through piece by piece, all others are small and
read before. GET and HEAD do without it: they are those of ``/files/``. What a path may be is checked here, before
anything is decoded; ``gateway_davtree`` has the resources.
"""

import io
import logging
import warnings
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from functools import partial
from http import HTTPStatus
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import msgspec
import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from wsgidav.dav_error import DAVError
from wsgidav.lock_man.lock_storage import LockStorageDict
from wsgidav.request_resolver import RequestResolver
from wsgidav.wsgidav_app import WsgiDAVApp

from dfsmount import gateway_paths
from dfsmount.gateway_davtree import KEY, Properties, Provider, Running
from dfsmount.gateway_http import Refusal, body_of, on_error
from dfsmount.gateway_paths import Place
from dfsmount.gateway_tree import Tree
from dfsmount.gateway_uploads import Uploads
from metaserver.errors import DfsError, ErrorCode
from metaserver.httpserver import ClientGone

SHARE = b"/dav/"
# Requests; each has a thread.
REQUESTS_AT_A_TIME = 32
# Of everything but PUT: requests for properties, and for locks.
XML_BYTES = 256 << 10
# A lock is in memory for as long as it lasts; clients renew them every few minutes.
LOCKS = 10_000
LOCK_SECONDS = 3600
METHODS = frozenset(["OPTIONS", "PUT", "DELETE", "PROPFIND", "PROPPATCH", "MKCOL", "COPY", "MOVE", "LOCK", "UNLOCK"])

# It has a traceback for each client that leaves; what else goes wrong is raised.
logging.getLogger("wsgidav").setLevel(logging.CRITICAL)
# Under -bb: it asks whether the body of a request is "" (4.4).
warnings.filterwarnings("ignore", category=BytesWarning, module=r"wsgidav\.")


class Read(Protocol):
    """What answers GET and HEAD."""

    async def __call__(self, request: Request, place: Place) -> Response: ...


class _Head(NamedTuple):
    status: int
    headers: list[tuple[bytes, bytes]]


class _Locks(LockStorageDict):  # type: ignore[misc]
    """Locks in memory, bounded in number and time."""

    def create(self, path: str, lock: dict[str, Any]) -> Any:
        if len(self._dict) >= LOCKS:
            raise DAVError(503, f"there are {LOCKS} locks already")
        lock["timeout"] = _bounded(lock.get("timeout"))
        return super().create(path, lock)

    def refresh(self, token: str, *, timeout: float | None) -> Any:
        return super().refresh(token, timeout=_bounded(timeout))


def _bounded(timeout: float | None) -> float:
    return LOCK_SECONDS if timeout is None or not 0 < timeout < LOCK_SECONDS else timeout


class _Body(io.RawIOBase):
    """``wsgi.input`` of a PUT: asks the event loop for the next piece when all that was there is used up."""

    def __init__(self, pieces: AsyncGenerator[bytes, None]) -> None:
        self._pieces = pieces
        self._left = memoryview(b"")

    def read(self, size: int = -1) -> bytes:
        if not self._left:
            self._left = memoryview(trio.from_thread.run(self._next))
        taken = self._left[:size] if size >= 0 else self._left
        self._left = self._left[len(taken) :]
        return bytes(taken)

    async def _next(self) -> bytes:
        return await anext(self._pieces, b"")


class Dav:
    """The ASGI application."""

    def __init__(self, tree: Tree, uploads: Uploads, read: Read, max_bytes: int, *, read_only: bool) -> None:
        self._tree, self._uploads, self._read, self._max_bytes = tree, uploads, read, max_bytes
        self._threads = trio.CapacityLimiter(REQUESTS_AT_A_TIME)
        provider = Provider(read_only)
        self._wsgi = WsgiDAVApp(
            {
                "provider_mapping": {SHARE.decode().rstrip("/"): provider},
                "middleware_stack": [RequestResolver],
                "lock_storage": _Locks(),
                "property_manager": Properties(provider),
                "logging": {"enable": False},
                "suppress_version_info": True,
                "verbose": 0,
                "block_size": 64 << 10,
            }
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            await self._answer(request, send)
        except (Refusal, DfsError) as error:
            await (await on_error(request, error))(scope, receive, send)

    async def _answer(self, request: Request, send: Send) -> None:
        place = _place(request.scope["path"].encode())
        if request.method in ("GET", "HEAD"):
            await (await self._read(request, place))(request.scope, request.receive, send)
            return
        if request.method not in METHODS:
            allowed = ", ".join(sorted({"GET", "HEAD", *METHODS}))
            raise Refusal(405, "METHOD_NOT_ALLOWED", "there is no such method", {"allow": allowed})
        _check_headers(request)
        if self._threads.available_tokens < 1:
            raise Refusal(503, "BUSY", "too many requests at a time", {"retry-after": "5"})
        async with AsyncExitStack() as stack, aclosing(body_of(request, self._limit(request))) as pieces:
            environ = await self._environment(request, place, pieces)
            environ[KEY] = Running(self._tree, self._uploads, stack, environ["REQUEST_METHOD"])
            begin = partial(self._run, environ, send, request.scope)
            await trio.to_thread.run_sync(begin, limiter=self._threads)

    def _limit(self, request: Request) -> int:
        return self._max_bytes if request.method == "PUT" else XML_BYTES

    async def _environment(self, request: Request, place: Place, pieces: AsyncGenerator[bytes, None]) -> dict[str, Any]:
        """What WSGI (PEP 3333) wants to know."""
        headers = request.headers
        path = "/".join(name.decode("latin-1") for name in place.names) + ("/" if place.directory else "")
        environ: dict[str, Any] = {
            "REQUEST_METHOD": request.method,
            "SCRIPT_NAME": "",
            "PATH_INFO": SHARE.decode() + path.lstrip("/"),
            "QUERY_STRING": "",
            "SERVER_NAME": "gateway",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "HTTP_HOST": headers.get("host", ""),
            "wsgi.url_scheme": request.scope["scheme"],
            "wsgi.version": (1, 0),
            "wsgi.errors": io.StringIO(),
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
            # All tokens open the same: a lock belongs to who knows its lock token.
            "wsgidav.auth.user_name": "token",
        }
        for name in headers:
            if name not in ("content-length", "content-type", "authorization", "x-forwarded-proto", "x-forwarded-host"):
                environ["HTTP_" + name.upper().replace("-", "_")] = ", ".join(headers.getlist(name))
        if request.method == "PUT":
            environ["wsgi.input"] = _Body(pieces)
            environ["CONTENT_LENGTH"] = headers.get("content-length", "")
        else:
            body = b"".join([piece async for piece in pieces])
            environ["wsgi.input"] = io.BytesIO(body)
            environ["CONTENT_LENGTH"] = str(len(body))
        environ["CONTENT_TYPE"] = headers.get("content-type", "")
        return environ

    # -- in a thread -------------------------------------------------------------------------------------------

    def _run(self, environ: dict[str, Any], send: Send, scope: Scope) -> None:
        head: list[_Head] = []

        def start_response(status: str, headers: list[tuple[str, str]], exc_info: object = None) -> None:
            fields = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
            head[:] = [_Head(int(status.split()[0]), fields)]

        running: Running = environ[KEY]
        try:
            body = b"".join(self._wsgi(environ, start_response))
        except DAVError as error:
            head[:], body = [_failure(error)], _explain(error)
        if running.gone:
            raise ClientGone
        trio.from_thread.run(_send, send, head[0], body)


def _failure(error: DAVError) -> _Head:
    kind = b"application/xml; charset=utf-8" if error.err_condition else b"application/json"
    added = [(name.lower().encode(), value.encode("latin-1")) for name, value in error.add_headers or []]
    return _Head(error.value, [(b"content-type", kind), *added])


def _explain(error: DAVError) -> bytes:
    """One line, as from all other routes; what RFC 4918 has an element for as XML."""
    if error.err_condition:
        body: bytes = error.err_condition.as_string().encode()
        return body
    text = error.context_info or HTTPStatus(error.value).phrase
    return msgspec.json.encode({"code": HTTPStatus(error.value).name, "text": " ".join(str(text).split())[:500]})


async def _send(send: Send, head: _Head, body: bytes) -> None:
    fields = [(name, value) for name, value in head.headers if name != b"content-length"]
    if head.status not in (204, 304):
        fields.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": head.status, "headers": fields})
    await send({"type": "http.response.body", "body": body, "more_body": False})


# -- what may be asked ---------------------------------------------------------------------------------------------


def _place(path: bytes) -> Place:
    rest = path[len(SHARE) :]
    place = gateway_paths.from_url(rest) if rest else Place((), True)
    for name in place.names:
        _check_text(name)
    return place


def _check_text(name: bytes) -> None:
    """XML carries neither other bytes nor control characters."""
    if not gateway_paths.is_text(name):
        raise DfsError(ErrorCode.INVALID, "over WebDAV a name is UTF-8 without control characters")


def _check_headers(request: Request) -> None:
    # Answered in memory: what all of a large tree needs has no bound (RFC 4918, 9.1 allows to refuse it).
    if request.method == "PROPFIND" and request.headers.get("depth", "infinity").lower() not in ("0", "1"):
        raise Refusal(403, "NOT_SUPPORTED", "PROPFIND needs Depth: 0 or 1 (propfind-finite-depth)")
    destination = request.headers.get("destination")
    if destination is not None:
        _check_destination(destination)


def _check_destination(destination: str) -> None:
    try:
        parts = urlsplit(destination)
        path = parts.path.encode("ascii")
    except ValueError:
        raise Refusal(400, "INVALID", "Destination is no address") from None
    if parts.query or parts.fragment or not path.startswith(SHARE):
        raise Refusal(400, "INVALID", f"Destination does not lead to {SHARE.decode()}")
    place = _place(path)
    # WsgiDAV decodes it before it divides it, and would go by what is before them.
    if any(letter in name for name in place.names for letter in (b"?", b";")):
        raise Refusal(400, "INVALID", "over WebDAV nothing can be copied or moved to a name with ? or ;")

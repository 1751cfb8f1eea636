"""What the gateway's routes have in common: who may ask, bodies, answers with contents, and one line for each failure.

Errors are a 4xx or 5xx with ``{"code": NAME, "text": one line}``, as those of the control planes.
"""

import hmac
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import NamedTuple
from urllib.parse import urlsplit

import structlog
import trio
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dfsmount.gateway_tree import Opened, Tree
from metaserver.errors import DfsError, ErrorCode
from metaserver.httpranges import Span
from metaserver.httpserver import ClientGone, basic_password, json_reply

log = structlog.get_logger(__name__)

# A sender that says nothing for so long has gone away without telling.
STALL_SECONDS = 60.0
# One read of the client core; two of them are in memory for each download.
PIECE_BYTES = 512 << 10
SAFE = ("GET", "HEAD", "OPTIONS", "PROPFIND")
# Whatever is stored must not act as a page of this address in somebody's browser.
HARMLESS = {"x-content-type-options": "nosniff", "content-security-policy": "sandbox; default-src 'none'"}

STATUS: dict[ErrorCode, int] = {
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.STALE_INODE: 404,
    ErrorCode.INVALID: 400,
    ErrorCode.NAME_TOO_LONG: 400,
    ErrorCode.PROTOCOL: 400,
    ErrorCode.BAD_KEY: 401,
    ErrorCode.NOT_PERMITTED: 403,
    ErrorCode.ACCESS_DENIED: 403,
    ErrorCode.READ_ONLY: 403,
    ErrorCode.EXISTS: 409,
    ErrorCode.NOT_DIRECTORY: 409,
    ErrorCode.IS_DIRECTORY: 409,
    ErrorCode.NOT_EMPTY: 409,
    ErrorCode.TOO_MANY_LINKS: 409,
    ErrorCode.FILE_TOO_BIG: 413,
    ErrorCode.ARGUMENT_TOO_BIG: 413,
    ErrorCode.BUSY: 503,
    ErrorCode.UNAVAILABLE: 503,
    ErrorCode.STALE_SESSION: 503,
    ErrorCode.TIMEOUT: 504,
    ErrorCode.NO_SPACE: 507,
    ErrorCode.DISK_FULL: 507,
}


class Refusal(Exception):
    """An answer that HTTP has a status for and the cluster no code."""

    def __init__(self, status: int, code: str, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, code, text)
        self.status, self.code, self.text = status, code, text
        self.headers = dict(headers or {})


def failure_reply(status: int, code: str, text: str, headers: Mapping[str, str] | None = None) -> Response:
    reply = json_reply({"code": code, "text": text}, status)
    reply.headers.update(headers or {})
    return reply


async def on_error(_: Request, error: Exception) -> Response:
    """The answer to anything that a route raises on purpose."""
    if isinstance(error, Refusal):
        return failure_reply(error.status, error.code, error.text, error.headers)
    if isinstance(error, HTTPException):
        names = {404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}
        return failure_reply(error.status_code, names.get(error.status_code, "INVALID"), error.detail, error.headers)
    assert isinstance(error, DfsError)
    status = STATUS.get(error.code, 500)
    headers = {"retry-after": "5"} if status in (503, 504) else None
    return failure_reply(status, error.code.name, error.text, headers)


# -- who may ask ---------------------------------------------------------------------------------------------------


class Access(NamedTuple):
    """``tokens``: any of them opens everything; none: everybody may. ``read_only``: nothing can be changed."""

    tokens: tuple[str, ...]
    read_only: bool = False


class Guard:
    """ASGI middleware: tokens, foreign pages, and no exception without an answer."""

    def __init__(self, app: ASGIApp, access: Access, open_paths: Sequence[str]) -> None:
        self._app = app
        self._tokens = [token.encode() for token in access.tokens]
        self._read_only = access.read_only
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Routes see paths as they were sent: decoded, an escaped slash would look like any other.
        scope = {**scope, "path": scope["raw_path"].decode("ascii", "replace").partition("?")[0]}
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            try:
                self._admit(scope)
            except Refusal as refusal:
                await (await on_error(Request(scope), refusal))(scope, receive, sending)
            else:
                await self._app(scope, receive, sending)
        except ClientGone:
            # An answer that was begun and not ended closes the connection: nobody takes it for a whole one.
            log.info("a client left", method=scope["method"], path=scope["path"][:200])
        except Exception:
            log.exception("request failed", method=scope["method"], path=scope["path"][:200])
            if not started:
                text = "the gateway met an unexpected condition; see its log"
                await failure_reply(500, "INTERNAL", text)(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if scope["path"] not in self._open_paths:
            self._check_token(headers.get(b"authorization", b""))
        if scope["method"] in SAFE:
            return
        self._check_origin(headers)
        if self._read_only:
            raise Refusal(403, "READ_ONLY", "this gateway is read-only")

    def _check_token(self, given: bytes) -> None:
        if not self._tokens:
            return
        token = _token(given)
        # All are compared, so that the time taken says nothing.
        if not [expected for expected in self._tokens if hmac.compare_digest(expected, token)]:
            challenge = 'Bearer realm="dfs", Basic realm="dfs", charset="UTF-8"'
            raise Refusal(401, "BAD_KEY", "this needs a token of the gateway", {"www-authenticate": challenge})

    @staticmethod
    def _check_origin(headers: Mapping[bytes, bytes]) -> None:
        """A browser that knows the token must not be made to use it by somebody else's page."""
        origin = headers.get(b"origin")
        if origin is None:
            return
        try:
            where = urlsplit(origin.decode("latin-1")).netloc
        except ValueError:
            where = ""
        if not where or where.encode("latin-1") != headers.get(b"host"):
            raise Refusal(403, "NOT_PERMITTED", "a page of another site must not change anything here")


def _token(authorization: bytes) -> bytes:
    """Of ``Bearer TOKEN``, or the password of ``Basic``: browsers and ``curl -u :TOKEN`` send that."""
    scheme, _, rest = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        return rest.strip()
    return basic_password(rest.strip()) if scheme.lower() == b"basic" else b""


# -- bodies that come in -------------------------------------------------------------------------------------------


async def body_of(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """A request's body piece by piece, as fast as it is taken. Use with ``aclosing``.

    Raises :class:`ClientGone` if it ends too early, a :class:`Refusal` if it stalls or exceeds ``limit`` (0: none).
    """
    taken = 0
    more = True
    while more:
        with trio.move_on_after(STALL_SECONDS) as waiting:
            message = await request.receive()
        if waiting.cancelled_caught:
            raise Refusal(408, "TIMEOUT", f"nothing came for {STALL_SECONDS:.0f} seconds", {"connection": "close"})
        if message["type"] == "http.disconnect":
            raise ClientGone
        data: bytes = message.get("body", b"")
        more = message.get("more_body", False)
        taken += len(data)
        check_length(taken, limit)
        if data:
            yield data


async def no_body(request: Request) -> None:
    """For requests whose body would mean nothing."""
    async with aclosing(body_of(request, 0)) as body:
        async for _ in body:
            raise Refusal(400, "INVALID", "this takes no body")


def check_length(length: int, limit: int) -> None:
    if limit and length > limit:
        raise Refusal(413, "FILE_TOO_BIG", f"more than {limit} bytes, which is what this gateway takes")


def check_upload(request: Request, limit: int) -> None:
    """Headers of an upload that cannot be meant, before anything of its body is taken."""
    headers = request.headers
    length = headers.get("content-length")
    if length is None and "transfer-encoding" not in headers:
        raise Refusal(411, "LENGTH_REQUIRED", "an upload needs a Content-Length (0 for an empty file)")
    if headers.get("expect", "100-continue").lower() != "100-continue":
        raise Refusal(417, "NOT_SUPPORTED", "nothing but 100-continue can be expected here")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "NOT_SUPPORTED", "upload contents as they are, without Content-Encoding")
    if "content-range" in headers:
        raise Refusal(400, "INVALID", "a part of a file cannot be uploaded (Content-Range)")
    if length is not None:
        check_length(int(length), limit)


# -- contents that go out ------------------------------------------------------------------------------------------


class Counts:
    """For metrics: bytes of files, and answers by method and status."""

    def __init__(self) -> None:
        self.received_bytes = 0
        self.sent_bytes = 0
        self.answers: Counter[tuple[str, str]] = Counter()


class ContentReply(Response):
    """Spans of an open file: one as it is, several as multipart/byteranges. ``whole``: all of it, with status 200."""

    def __init__(
        self, tree: Tree, opened: Opened, spans: list[Span], headers: Mapping[str, str], counts: Counts, *, whole: bool
    ) -> None:
        size = opened.size
        self._tree, self._opened, self._spans, self._counts = tree, opened, spans, counts
        self._heads: list[bytes] = []
        self._tail = b""
        length = sum(span.length for span in spans)
        fields = {**headers, **HARMLESS, "accept-ranges": "bytes"}
        if len(spans) == 1 and not whole:
            fields["content-range"] = f"bytes {spans[0].start}-{spans[0].stop - 1}/{size}"
        elif len(spans) > 1:
            fields["content-type"] = self._divide(headers["content-type"], size)
            length += sum(map(len, self._heads)) + len(self._tail)
        fields["content-length"] = str(length)
        super().__init__(None, 200 if whole else 206, fields)
        # Response sets a length of its own for an empty body.
        self.raw_headers = [(name.encode(), value.encode("latin-1")) for name, value in fields.items()]

    def _divide(self, content_type: str, size: int) -> str:
        boundary = secrets.token_hex(12)
        for number, span in enumerate(self._spans):
            start = "" if number == 0 else "\r\n"
            self._heads.append(
                f"{start}--{boundary}\r\ncontent-type: {content_type}\r\n"
                f"content-range: bytes {span.start}-{span.stop - 1}/{size}\r\n\r\n".encode("latin-1")
            )
        self._tail = f"\r\n--{boundary}--\r\n".encode()
        return f"multipart/byteranges; boundary={boundary}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if scope["method"] != "HEAD" and not await self._send_while_wanted(receive, send):
            raise ClientGone
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_while_wanted(self, receive: Receive, send: Send) -> bool:
        """Whether all of it was sent: not if the client leaves, or if the contents cannot be had."""
        whole = False

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            with suppress(ClientGone):
                await self._send(send)
                whole = True
            nursery.cancel_scope.cancel()
        return whole

    async def _send(self, send: Send) -> None:
        for number, span in enumerate(self._spans):
            if self._heads:
                await send({"type": "http.response.body", "body": self._heads[number], "more_body": True})
            await self._send_span(send, span)
        if self._tail:
            await send({"type": "http.response.body", "body": self._tail, "more_body": True})

    async def _send_span(self, send: Send, span: Span) -> None:
        at = span.start
        while at < span.stop:
            try:
                data = await self._tree.read(self._opened, at, min(PIECE_BYTES, span.stop - at))
            except DfsError as error:
                log.error("a download ended in the middle", ino=self._opened.state.ino, offset=at, error=str(error))
                raise ClientGone from None
            if not data:
                log.info("a file became shorter while it was read", ino=self._opened.state.ino, offset=at)
                raise ClientGone
            await send({"type": "http.response.body", "body": data, "more_body": True})
            at += len(data)
            self._counts.sent_bytes += len(data)

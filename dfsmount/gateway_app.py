"""The gateway's routes. Decodes, calls, encodes; ``gateway_openapi`` describes them."""

import mimetypes
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import AsyncExitStack, aclosing, contextmanager
from typing import Any
from urllib.parse import parse_qsl, urlencode

import trio
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from dfsmount import gateway_dav, gateway_openapi, gateway_paths
from dfsmount.gateway_forms import FileBegins, FileData, FormReader
from dfsmount.gateway_http import (
    Access,
    ContentReply,
    Counts,
    Guard,
    Refusal,
    body_of,
    check_upload,
    no_body,
    on_error,
)
from dfsmount.gateway_messages import ChunkMap, Page, Piece, Replica, Stored, entry_of, stored_of
from dfsmount.gateway_paths import Place
from dfsmount.gateway_tree import Node, Opened, Tree
from dfsmount.gateway_uploads import Upload, Uploaded, Uploads
from metaserver.errors import DfsError, ErrorCode
from metaserver.httpranges import Span, Verdict, Version, http_date, judge, wanted
from metaserver.httpserver import json_reply
from metaserver.protocol import Extent

PAGE_LIMIT = 1000
# Without a token: whether it runs, and what it can do.
OPEN_PATHS = ("/health", "/openapi.json")
_FILES = b"/files/"
_DOWNLOAD = b"/download/"
_CONDITIONS = ("if-match", "if-none-match", "if-unmodified-since")


class _Metrics(Collector):
    """Reads the numbers when they are asked for."""

    def __init__(self, gateway: "Gateway") -> None:
        self._gateway = gateway

    def collect(self) -> Iterable[Metric]:
        gateway, counts = self._gateway, self._gateway.counts
        dirty = gateway.tree.client.writer.dirty_bytes
        yield GaugeMetricFamily("gateway_uploads_in_progress", "Uploads in progress", gateway.uploads.in_progress)
        yield GaugeMetricFamily("gateway_downloads_in_progress", "Downloads in progress", gateway.downloads)
        yield GaugeMetricFamily("gateway_dirty_bytes", "Uploaded bytes that the servers do not have yet", dirty)
        yield CounterMetricFamily("gateway_uploaded_bytes", "Bytes of uploaded files", counts.received_bytes)
        yield CounterMetricFamily("gateway_downloaded_bytes", "Bytes of files that were sent", counts.sent_bytes)
        family = CounterMetricFamily("gateway_requests", "Answers by method and status", labels=["method", "status"])
        for labels, count in sorted(counts.answers.items()):
            family.add_metric(labels, count)
        yield family


class Gateway:
    """The handlers. ``max_bytes`` bounds an upload; 0: nothing but the cluster does."""

    def __init__(self, tree: Tree, uploads: Uploads, access: Access, *, max_bytes: int = 0) -> None:
        self.tree = tree
        self.uploads = uploads
        self.downloads = 0
        self.counts = Counts()
        self._access = access
        self._max_bytes = max_bytes
        self._types = mimetypes.MimeTypes()
        # Between judging a condition and renaming: two uploads that both want to be the first.
        self._conditional = trio.Lock()
        self._registry = CollectorRegistry()
        self._registry.register(_Metrics(self))

    # -- the same as resources ---------------------------------------------------------------------------------

    async def files(self, request: Request) -> Response:
        place = _place(request, _FILES)
        match request.method:
            case "PUT":
                return await self._put(request, place)
            case "DELETE":
                await no_body(request)
                return await self._delete(request, place)
            case _:
                return await self._get(request, place)

    async def _get(self, request: Request, place: Place) -> Response:
        with _missing_where_no_directory():
            node = await self.tree.find(place)
        if "chunks" in _query(request):
            return await self._chunks(request, place, node)
        if node.is_directory:
            if not place.directory and place.names:
                where = gateway_paths.to_url(place.names, directory=True)
                return Response(None, 308, {"location": where})
            return await self._list(request, place, node, _prefix(request))
        if place.directory:
            raise DfsError(ErrorCode.NOT_FOUND, f"{place} is not a directory")
        return await self._content(request, place, node, {})

    async def read(self, request: Request, place: Place) -> Response:
        """A file's contents or a directory's listing, wherever it was asked for."""
        with _missing_where_no_directory():
            node = await self.tree.find(place)
        if node.is_directory:
            return await self._list(request, place, node, b"")
        return await self._content(request, place, node, {})

    async def root_listing(self, request: Request) -> Response:
        """``prefix`` may name directories, as object stores have it."""
        prefix = _query(request).get("prefix", "")
        folder, _, start = prefix.rpartition("/")
        place = gateway_paths.from_text(folder + "/") if folder else Place((), True)
        try:
            node = await self.tree.find_directory(place.names)
        except DfsError as error:
            if error.code not in (ErrorCode.NOT_FOUND, ErrorCode.NOT_DIRECTORY):
                raise
            return json_reply(Page(str(place), [], ""))
        return await self._list(request, place, node, start.encode(errors="surrogateescape"))

    async def download(self, request: Request) -> Response:
        place = _place(request, _DOWNLOAD)
        with _missing_where_no_directory():
            node = await self.tree.find(place)
        if node.is_directory or place.directory:
            raise DfsError(ErrorCode.NOT_FOUND, f"{place} is not a file")
        return await self._content(request, place, node, {"content-disposition": gateway_paths.disposition(place.name)})

    async def _content(self, request: Request, place: Place, node: Node, headers: dict[str, str]) -> Response:
        stack = AsyncExitStack()
        async with stack:
            opened = await stack.enter_async_context(self.tree.opened(node))
            reply = self._content_reply(request, place, opened, headers)
            if isinstance(reply, ContentReply):
                return _Held(reply, self, stack.pop_all())
            return reply

    def _content_reply(self, request: Request, place: Place, opened: Opened, headers: dict[str, str]) -> Response:
        version, size = opened.version, opened.size
        known = {"etag": version.etag, "last-modified": http_date(version.mtime), **headers}
        if _judge(request, version, reading=True) is Verdict.NOT_MODIFIED:
            return Response(None, 304, known)
        known["content-type"] = self._type(place.name)
        spans = wanted(request.headers, version, size) if request.method == "GET" else None
        if spans is None:
            return ContentReply(self.tree, opened, [Span(0, size)], known, self.counts, whole=True)
        if not spans:
            text = f"the file has {size} bytes"
            raise Refusal(416, "RANGE", text, {"content-range": f"bytes */{size}"})
        return ContentReply(self.tree, opened, spans, known, self.counts, whole=False)

    def _type(self, name: bytes) -> str:
        kind, encoding = self._types.guess_type(name.decode(errors="replace"))
        if encoding is not None:
            return {"gzip": "application/gzip", "bzip2": "application/x-bzip2", "xz": "application/x-xz"}.get(
                encoding, "application/octet-stream"
            )
        return kind or "application/octet-stream"

    # -- listings ------------------------------------------------------------------------------------------------

    async def _list(self, request: Request, place: Place, node: Node, prefix: bytes) -> Response:
        limit = _number(request, "limit", PAGE_LIMIT, 1, PAGE_LIMIT)
        after = _number(request, "after", 0, 0, (1 << 63) - 1)
        listing = await self.tree.listing(node.ino, after, limit, prefix)
        entries = [entry_of(place, entry) for entry in listing.entries]
        following = _following(request, listing.next) if listing.next else ""
        return json_reply(Page(str(place), entries, following))

    async def _chunks(self, request: Request, place: Place, node: Node) -> Response:
        if not stat.S_ISREG(node.attributes.mode):
            raise DfsError(ErrorCode.INVALID, f"{place} is not a file: only files have chunks")
        size = node.attributes.size
        after = _number(request, "after", 0, 0, (1 << 63) - 1)
        pieces: list[Piece] = []
        end = size
        if after < size:
            page = await self.tree.extents(node.ino, after, size - after)
            places = {place.chunk: place.servers for place in page.places}
            pieces = [await self._piece(extent, places.get(extent.chunk, ())) for extent in page.extents]
            end = page.end
        following = _following(request, end) if after < end < size else ""
        return json_reply(ChunkMap(str(place), size, node.version.etag, pieces, following))

    async def _piece(self, extent: Extent, servers: tuple[int, ...]) -> Piece:
        meta = self.tree.client.meta
        replicas = []
        for server in servers:
            peer = meta.peer(server) or (await self.tree.client.core.remote.servers()).get(server)
            if peer is not None:
                replicas.append(Replica(server, peer.host, peer.port, peer.rack))
        return Piece(extent.file_offset, extent.length, f"{extent.chunk:016x}", extent.chunk_offset, replicas)

    # -- changes -------------------------------------------------------------------------------------------------

    async def _put(self, request: Request, place: Place) -> Response:
        if place.directory:
            await no_body(request)
            return await self._make_directory(place)
        check_upload(request, self._max_bytes)
        stored = await self._store(request, place, replace=True)
        return _stored_reply([stored], 201 if stored.created else 200)

    async def upload(self, request: Request) -> Response:
        check_upload(request, self._max_bytes)
        replace = _flag(request, "replace")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        filename = _query(request).get("filename")
        if filename is not None:
            place = gateway_paths.from_text(filename)
            if place.directory or not place.names:
                raise DfsError(ErrorCode.INVALID, "filename must name a file")
            return _stored_reply([await self._store(request, place, replace=replace)], 201)
        if kind == "multipart/form-data":
            return _stored_reply(await self._store_form(request, replace=replace), 201)
        text = "say ?filename=NAME, or send a form (multipart/form-data) with files"
        raise Refusal(415 if kind else 400, "NOT_SUPPORTED" if kind else "INVALID", text)

    async def _store(self, request: Request, place: Place, *, replace: bool) -> Stored:
        parent = await self._parent(place)
        # Better now than after gigabytes; what decides is the second look, once all is there.
        await self._check_target(request, parent.ino, place.name, replace=replace)
        async with self.uploads.slots, self.uploads.begin(parent.ino) as upload:
            async with aclosing(body_of(request, self._max_bytes)) as body:
                async for data in body:
                    await upload.write(data)
            await upload.complete()
            done = await self._place(request, upload, place.name, replace=replace)
        return stored_of(place.names, upload, done)

    async def _parent(self, place: Place) -> Node:
        """The directory that a new name belongs into."""
        try:
            return await self.tree.find_directory(place.names[:-1])
        except DfsError as error:
            if error.code is not ErrorCode.NOT_FOUND:
                raise
            folder = gateway_paths.to_url(place.names[:-1], directory=True)
            raise Refusal(409, "NOT_FOUND", f"there is no such directory: make it first (PUT {folder})") from None

    async def _check_target(self, request: Request, parent: int, name: bytes, *, replace: bool) -> Node | None:
        """What has the name now, if it may be replaced."""
        try:
            before = await self.tree.look_up(parent, name)
        except DfsError as error:
            if error.code is not ErrorCode.NOT_FOUND:
                raise
            before = None
        _judge(request, before.version if before is not None else None, reading=False)
        if before is None:
            return None
        if before.is_directory:
            raise DfsError(ErrorCode.IS_DIRECTORY, f"{name.decode(errors='replace')} is a directory")
        if not replace:
            text = f"{name.decode(errors='replace')} exists: use PUT, or ?replace, to replace it"
            raise DfsError(ErrorCode.EXISTS, text)
        return before

    async def _place(self, request: Request, upload: Upload, name: bytes, *, replace: bool) -> Uploaded:
        async with AsyncExitStack() as stack:
            if any(condition in request.headers for condition in _CONDITIONS):
                await stack.enter_async_context(self._conditional)
            before = await self._check_target(request, upload.parent, name, replace=replace)
            # What must be new stays new whoever else makes a file of that name.
            may_replace = before is not None or not _wants_new(request, replace)
            done = await upload.place(name, before, replace=may_replace)
        self.counts.received_bytes += upload.size
        return done

    async def _store_form(self, request: Request, *, replace: bool) -> list[Stored]:
        """All files of a form; none of them can be seen before all are complete."""
        form = FormReader(request.headers["content-type"])
        uploads: dict[bytes, Upload] = {}
        async with self.uploads.slots, AsyncExitStack() as stack:
            upload: Upload | None = None
            async with aclosing(body_of(request, self._max_bytes)) as body:
                async for data in body:
                    for event in form.feed(data):
                        if isinstance(event, FileBegins):
                            upload = await self._begin_part(request, stack, uploads, event.name, replace=replace)
                        elif isinstance(event, FileData):
                            assert upload is not None
                            await upload.write(event.data)
                        else:
                            assert upload is not None
                            await upload.complete()
            if not form.complete:
                raise DfsError(ErrorCode.INVALID, "the form ends in the middle")
            if not uploads:
                raise DfsError(ErrorCode.INVALID, "the form has no file")
            return [
                stored_of((name,), upload, await self._place(request, upload, name, replace=replace))
                for name, upload in uploads.items()
            ]

    async def _begin_part(
        self, request: Request, stack: AsyncExitStack, uploads: dict[bytes, Upload], name: bytes, *, replace: bool
    ) -> Upload:
        if name in uploads:
            raise DfsError(ErrorCode.INVALID, f"two files of the form are called {name.decode(errors='replace')}")
        await self._check_target(request, self.tree.root, name, replace=replace)
        uploads[name] = await stack.enter_async_context(self.uploads.begin(self.tree.root))
        return uploads[name]

    async def _make_directory(self, place: Place) -> Response:
        if not place.names:
            raise DfsError(ErrorCode.EXISTS, "the exported directory exists")
        parent = await self._parent(place)
        await self.tree.make_directory(parent.ino, place.name, 0o755)
        where = gateway_paths.to_url(place.names, directory=True)
        return Response(None, 201, {"location": where})

    async def delete_named(self, request: Request) -> Response:
        await no_body(request)
        filename = _query(request).get("filename")
        if not filename:
            raise DfsError(ErrorCode.INVALID, "say ?filename=NAME")
        place = gateway_paths.from_text(filename)
        if place.directory:
            raise DfsError(ErrorCode.INVALID, "filename must name a file")
        return await self._delete(request, place, directories=False)

    async def _delete(self, request: Request, place: Place, *, directories: bool = True) -> Response:
        with _missing_where_no_directory():
            node = await self.tree.find(place, follow=False)
        if place.directory and not node.is_directory:
            raise DfsError(ErrorCode.NOT_FOUND, f"{place} is not a directory")
        if node.is_directory and not directories:
            raise DfsError(ErrorCode.IS_DIRECTORY, f"{place} is a directory")
        _judge(request, node.version, reading=False)
        await self.tree.remove(node)
        return Response(None, 204)

    # -- beside files --------------------------------------------------------------------------------------------

    async def start(self, request: Request) -> Response:
        return json_reply({"role": "gateway", "files": "/files/", "description": "/openapi.json"})

    async def health(self, request: Request) -> Response:
        return json_reply({"role": "gateway", "status": "ok", "read_only": self._access.read_only})

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def describe(self, request: Request) -> Response:
        return json_reply(gateway_openapi.DESCRIPTION)

    def app(self) -> Starlette:
        routes = [
            Route("/", self.start),
            Route("/upload", self.upload, methods=["POST"]),
            Route("/files", self.root_listing),
            Route("/files/{path:path}", self.files, methods=["GET", "PUT", "DELETE"]),
            Route("/download/{path:path}", self.download),
            Route("/delete", self.delete_named, methods=["DELETE"]),
            Mount(
                "/dav",
                gateway_dav.Dav(self.tree, self.uploads, self.read, self._max_bytes, read_only=self._access.read_only),
            ),
            Route("/openapi.json", self.describe),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]
        handlers: dict[Any, Any] = {Refusal: on_error, DfsError: on_error, HTTPException: on_error}
        guard = Middleware(Guard, access=self._access, open_paths=OPEN_PATHS)
        counting = Middleware(_Counting, counts=self.counts)
        app = Starlette(routes=routes, middleware=[counting, guard], exception_handlers=handlers)
        app.router.redirect_slashes = False
        return app


class _Counting:
    """ASGI middleware: counts answers."""

    def __init__(self, app: Any, counts: Counts) -> None:
        self._app = app
        self._answers = counts.answers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                method = scope["method"] if scope["method"] in _METHODS else "other"
                self._answers[method, str(message["status"])] += 1
            await send(message)

        await self._app(scope, receive, sending if scope["type"] == "http" else send)


_METHODS = gateway_dav.METHODS | {"GET", "HEAD", "POST"}


class _Held(Response):
    """An answer with the file that it is made of, which is closed after it."""

    def __init__(self, reply: ContentReply, gateway: Gateway, stack: AsyncExitStack) -> None:
        self._reply, self._gateway, self._stack = reply, gateway, stack

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self._gateway.downloads += 1
        try:
            async with self._stack:
                await self._reply(scope, receive, send)
        finally:
            self._gateway.downloads -= 1


# -- decoding ------------------------------------------------------------------------------------------------------


def _place(request: Request, before: bytes) -> Place:
    """From the path as it was sent (see ``Guard``): once decoded, an escaped slash looks like any other."""
    rest = request.scope["path"].encode()[len(before) :]
    return gateway_paths.from_url(rest) if rest else Place((), True)


def _query(request: Request) -> dict[str, str]:
    """The query, bytes that are no UTF-8 kept as surrogates: names need not be text."""
    text = request.scope["query_string"].decode("latin-1")
    return dict(parse_qsl(text, keep_blank_values=True, errors="surrogateescape"))


def _prefix(request: Request) -> bytes:
    return _query(request).get("prefix", "").encode(errors="surrogateescape")


def _flag(request: Request, name: str) -> bool:
    value = _query(request).get(name, "0")
    if value not in ("", "1", "true", "0", "false"):
        raise DfsError(ErrorCode.INVALID, f"{name} is 1 or 0")
    return value in ("", "1", "true")


def _number(request: Request, name: str, default: int, least: int, most: int) -> int:
    text = _query(request).get(name)
    if text is None:
        return default
    if not re.fullmatch("[0-9]{1,19}", text) or not least <= int(text) <= most:
        raise DfsError(ErrorCode.INVALID, f"{name} is a number from {least} to {most}")
    return int(text)


def _judge(request: Request, version: Version | None, *, reading: bool) -> Verdict:
    verdict = judge(request.headers, version, reading=reading)
    if verdict is Verdict.FAILED:
        headers = {"etag": version.etag} if version is not None else {}
        raise Refusal(412, "PRECONDITION_FAILED", "what is there is not what the condition wants", headers)
    return verdict


def _wants_new(request: Request, replace: bool) -> bool:
    return not replace or request.headers.get("if-none-match", "").strip() == "*"


@contextmanager
def _missing_where_no_directory() -> Iterator[None]:
    """For who only looks: below a file there is nothing."""
    try:
        yield
    except DfsError as error:
        if error.code is ErrorCode.NOT_DIRECTORY:
            raise DfsError(ErrorCode.NOT_FOUND, error.text) from None
        raise


# -- encoding ----------------------------------------------------------------------------------------------------


def _following(request: Request, after: int) -> str:
    query = urlencode({**_query(request), "after": str(after)}, errors="surrogateescape")
    return f"{request.scope['path']}?{query}"


def _stored_reply(stored: list[Stored], status: int) -> Response:
    reply = json_reply({"files": stored}, status)
    if len(stored) == 1:
        reply.headers["location"] = stored[0].href
        reply.headers["etag"] = stored[0].etag
    return reply

"""Chunks over HTTP, for people and tools: ``GET /chunks/ID`` with ``Range``, ``PUT /chunks/ID``.

Read bytes are those their writer had computed the checksums of, or nothing. Writing needs the *right to write* that
chunk besides the token: ``Dfs-Write-Right: ClusterKey.write_right(ID)``, which follows from the key and not from the
token. What is written is a replica like any other, but part of no file: that takes a commit of the session that
allocated the chunk, and one that nobody allocated is collected as garbage.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import structlog
from crc32c import crc32c
from starlette.requests import Request
from starlette.responses import Response

from chunkserver import chunkfile
from chunkserver.client import verify_blocks
from chunkserver.protocol import Append
from chunkserver.replica import Replica, Write
from metaserver.errors import DfsError, ErrorCode
from metaserver.httpranges import Span, Verdict, Version, judge, wanted
from metaserver.httpserver import json_reply
from metaserver.key import ClusterKey

if TYPE_CHECKING:
    from chunkserver.store import Store

log = structlog.get_logger(__name__)

RIGHT = "dfs-write-right"
PIECE_BYTES = 1 << 20
APPEND_BYTES = 16 * chunkfile.BLOCK_BYTES
NANOSECONDS = 1_000_000_000


# -- reading -------------------------------------------------------------------------------------------------------


def version_of(replica: Replica) -> Version:
    """The chain depends on every entry, and these on every byte."""
    written = replica.written
    etag = f'"{replica.chunk:x}-{written.logical_length:x}-{written.chain:08x}"'
    return Version(etag, replica.created_ns // NANOSECONDS)


async def get(store: "Store", request: Request, chunk: int) -> Response:
    """The chunk's bytes, or a range of them. Several ranges are answered with all of it."""
    replica = store.table.readable(chunk)
    version, size = version_of(replica), replica.written.logical_length
    headers = {"etag": version.etag, "accept-ranges": "bytes"}
    verdict = judge(request.headers, version, reading=True)
    if verdict is not Verdict.GO_ON:
        return Response(None, verdict.value, headers)
    spans = wanted(request.headers, version, size) if request.method == "GET" else None
    if spans == []:
        reply = json_reply({"code": ErrorCode.RANGE.name, "text": f"the chunk has {size} bytes"}, 416)
        reply.headers["content-range"] = f"bytes */{size}"
        return reply
    span = spans[0] if spans is not None and len(spans) == 1 else Span(0, size)
    status = 200
    if spans is not None and len(spans) == 1:
        status, headers["content-range"] = 206, f"bytes {span.start}-{span.stop - 1}/{size}"
    # Before the status is sent: a damaged beginning is an error, not an answer that breaks off.
    first = await _read(store, replica, span.start, span.stop) if span.length and request.method == "GET" else b""
    return _Bytes(store, replica, span, first, status, headers)


async def _read(store: "Store", replica: Replica, start: int, stop: int) -> bytes:
    """Some bytes from ``start`` on, at least one; checked."""
    entries, payload = await store.reads.read(replica.chunk, start, min(stop - start, PIECE_BYTES))
    try:
        blocks = verify_blocks(entries, payload)
    except DfsError as error:
        store.table.report_bad(replica, error.code)
        raise
    if not blocks:
        raise DfsError(ErrorCode.NO_SUCH_CHUNK, "the chunk became shorter meanwhile")
    skipped = start - blocks[0].logical_offset
    return bytes(memoryview(payload)[skipped : skipped + stop - start])


class _Bytes(Response):
    """A span of a chunk, piece by piece; ``first`` was read already."""

    def __init__(
        self, store: "Store", replica: Replica, span: Span, first: bytes, status: int, headers: Mapping[str, str]
    ) -> None:
        super().__init__(None, status, headers, "application/octet-stream")
        self.headers["content-length"] = str(span.length)
        self._store, self._replica, self._span, self._first = store, replica, span, first

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        data, at = self._first, self._span.start
        while data:
            await send({"type": "http.response.body", "body": data, "more_body": True})
            at += len(data)
            try:
                data = await _read(self._store, self._replica, at, self._span.stop) if at < self._span.stop else b""
            except DfsError as error:
                # Not ended: the connection is closed, and nobody takes it for all there is.
                log.warning("a chunk could not be sent to its end", chunk=f"{self._replica.chunk:x}", error=str(error))
                return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


# -- writing -------------------------------------------------------------------------------------------------------


def check_right(key: ClusterKey | None, request: Request, chunk: int) -> None:
    if key is None:
        raise DfsError(ErrorCode.NOT_PERMITTED, "without a cluster key nobody has the right to write")
    if not key.accepts_write_right(request.headers.get(RIGHT, ""), chunk):
        raise DfsError(ErrorCode.NOT_PERMITTED, f"this needs the right to write chunk {chunk:016x} ({RIGHT})")


def check_number(chunk: int, limit: int) -> None:
    """To have a chunk that the metaserver has never heard of is the proof of a rollback: it would become read-only."""
    if not limit:
        raise DfsError(ErrorCode.UNAVAILABLE, "the metaserver has not said yet which chunks there are: try again")
    if chunk >= limit:
        raise DfsError(ErrorCode.INVALID, f"no chunk has the number {chunk:016x} yet: the metaserver gives them out")


async def put(store: "Store", request: Request, chunk: int) -> Replica:
    """Makes a replica of the body, durable when it returns. The same body again succeeds, also after an interruption;
    another one is refused (WRONG_OFFSET), and so is more than fits into a chunk (CHUNK_FULL)."""
    writer = _Appender(store, chunk)
    pending = bytearray()
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise DfsError(ErrorCode.CANCELLED, "the body ended too early")
        more = message.get("more_body", False)
        pending += message.get("body", b"")
        while len(pending) >= APPEND_BYTES:
            await writer.append(bytes(pending[:APPEND_BYTES]))
            del pending[:APPEND_BYTES]
    if pending:
        await writer.append(bytes(pending))
    return await writer.finish()


class _Appender:
    """Appends to one chunk as a mount does, from its beginning on."""

    def __init__(self, store: "Store", chunk: int) -> None:
        self._store = store
        self._chunk = chunk
        self._index = self._offset = 0
        self._chain = store.table.first_chain(chunk)
        self._last: Write | None = None

    async def append(self, data: bytes) -> None:
        entries, index, offset, before = b"", self._index, self._offset, self._chain
        for start in range(0, len(data), chunkfile.BLOCK_BYTES):
            block = data[start : start + chunkfile.BLOCK_BYTES]
            entry, self._chain = chunkfile.encode_entry(
                self._chain, self._offset, len(block), crc32c(block), 0, self._offset, 0, self._index
            )
            entries += entry
            self._offset += len(block)
            self._index += 1
        request = Append(self._chunk, index, offset, before, entries, (), False)
        appends = self._store.appends
        write = appends.admit(request, data)
        appends.carry_out(write)
        await appends.written(write)
        self._last = write

    async def finish(self) -> Replica:
        if self._last is None:
            raise DfsError(ErrorCode.INVALID, "a chunk has at least one byte")
        await self._store.appends.sync(self._last.replica, self._last.after.entries)
        return self._last.replica

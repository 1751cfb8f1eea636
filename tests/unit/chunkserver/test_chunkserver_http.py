"""Chunks over HTTP: ranges, checked bytes, and the right to write."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import trio
from chunkserver_harness import KEY, Started, StartNode, Writer

from chunkserver.chunkfile import PAYLOAD_CAPACITY, PAYLOAD_OFFSET
from chunkserver.client import Pool
from chunkserver.http import make_app
from chunkserver.http_chunks import RIGHT
from metaserver.httpserver import run_http

CHUNK = 0xABC


@asynccontextmanager
async def asked(node: Started) -> AsyncIterator[httpx.AsyncClient]:
    """A client with the token; the metaserver has given out the numbers up to CHUNK."""
    node.node.mailbox.chunk_limit = CHUNK + 1
    async with trio.open_nursery() as nursery:
        port = await nursery.start(run_http, make_app(node.node), "127.0.0.1", 0)
        headers = {"Authorization": f"Bearer {KEY.http_token}"}
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30) as client:
            yield client
        nursery.cancel_scope.cancel()


def right(chunk: int = CHUNK) -> dict[str, str]:
    return {RIGHT: KEY.write_right(chunk)}


async def test_a_chunk_is_read_in_ranges(start_node: StartNode, pool: Pool) -> None:
    data = os.urandom(300_000)
    async with start_node() as node, asked(node) as client:
        await Writer(CHUNK).send(pool, node.peer, data, sync=True)
        whole = await client.get("/chunks/abc")
        assert (whole.status_code, whole.content) == (200, data)
        for text, start_at, stop in (("0-0", 0, 1), ("65530-65540", 65530, 65541), ("-7", 299_993, 300_000)):
            part = await client.get("/chunks/abc", headers={"Range": f"bytes={text}"})
            assert (part.status_code, part.content) == (206, data[start_at:stop])
            assert part.headers["content-range"] == f"bytes {start_at}-{stop - 1}/300000"
        assert (await client.get("/chunks/abc", headers={"Range": "bytes=1-2,5-6"})).content == data
        beyond = await client.get("/chunks/abc", headers={"Range": "bytes=300000-"})
        assert (beyond.status_code, beyond.headers["content-range"]) == (416, "bytes */300000")
        tag = whole.headers["etag"]
        assert (await client.get("/chunks/abc", headers={"If-None-Match": tag})).status_code == 304
        head = await client.head("/chunks/abc")
        assert (head.status_code, head.headers["content-length"], head.content) == (200, "300000", b"")
        assert (await client.get("/chunks/77")).json()["code"] == "NO_SUCH_CHUNK"
        for path in ("/chunks/xyz", "/chunks/0", "/chunks/-1", f"/chunks/{'1' * 17}", "/chunks/%2e%2e"):
            assert (await client.get(path)).status_code in (400, 404)


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


async def test_wrong_bytes_are_never_sent(start_node: StartNode, pool: Pool, damaged: set[str]) -> None:
    damaged.add("a")
    async with start_node() as node, asked(node) as client:
        await Writer(CHUNK).send(pool, node.peer, os.urandom(200_000), sync=True)
        path = Path((await client.get("/chunks/abc/info")).json()["path"])
        flip(path, PAYLOAD_OFFSET + 70_000)
        bad = await client.get("/chunks/abc", headers={"Range": "bytes=66000-66001"})
        assert (bad.status_code, bad.json()["code"]) == (409, "BAD_CHECKSUM")
        assert (await client.get("/chunks/abc/info")).json()["error"] == "BAD_CHECKSUM"
        # Other blocks are as good as before.
        assert (await client.get("/chunks/abc", headers={"Range": "bytes=0-9"})).status_code == 206


async def test_a_chunk_is_written_once(start_node: StartNode) -> None:
    data = os.urandom(2_500_000)
    async with start_node() as node, asked(node) as client:
        made = await client.put("/chunks/abc", content=data, headers=right())
        assert made.status_code == 201
        assert (made.json()["stored_length"], made.json()["entries"]) == (2_500_000, 39)
        assert (await client.get("/chunks/abc")).content == data
        # As after an interruption: what is there already is no mistake.
        assert (await client.put("/chunks/abc", content=data, headers=right())).status_code == 201
        other = await client.put("/chunks/abc", content=b"x" + data[1:], headers=right())
        assert (other.status_code, other.json()["code"]) == (409, "WRONG_OFFSET")
        assert (await client.get("/chunks/abc")).content == data
        assert (await client.put("/chunks/abc", content=b"", headers=right())).status_code == 400


@pytest.mark.parametrize("headers", [{}, right(CHUNK + 1), {RIGHT: KEY.http_token}, {RIGHT: "f\u00fcr"}])
async def test_the_token_alone_does_not_write(start_node: StartNode, headers: dict[str, str]) -> None:
    async with start_node() as node, asked(node) as client:
        sent = {name: value.encode() for name, value in headers.items()}
        refused = await client.put("/chunks/abc", content=b"data", headers=sent)
        assert (refused.status_code, refused.json()["code"]) == (403, "NOT_PERMITTED")
        assert (await client.get("/chunks")).json()["chunks"] == []
        anybody = await client.put("/chunks/abc", content=b"data", headers={**right(), "Authorization": "Bearer x"})
        assert anybody.status_code == 401


async def test_a_number_that_was_never_given_out_is_refused(start_node: StartNode) -> None:
    """A server that has such a chunk makes the metaserver read-only: it is what a rollback looks like."""
    async with start_node() as node, asked(node) as client:
        for chunk in (CHUNK + 1, (1 << 64) - 1):
            refused = await client.put(f"/chunks/{chunk:x}", content=b"data", headers=right(chunk))
            assert (refused.status_code, refused.json()["code"]) == (400, "INVALID")
        node.node.mailbox.chunk_limit = 0
        assert (await client.put("/chunks/abc", content=b"data", headers=right())).status_code == 503
        assert node.store.table.highest_chunk == 0


async def test_what_a_mount_writes_is_not_touched(start_node: StartNode, pool: Pool) -> None:
    async with start_node() as node, asked(node) as client:
        writer = Writer(CHUNK)
        await writer.send(pool, node.peer, b"from a mount")
        refused = await client.put("/chunks/abc", content=b"from a mount", headers=right())
        assert (refused.status_code, refused.json()["code"]) == (409, "WRONG_OFFSET")
        await writer.send(pool, node.peer, b", and more", sync=True)
        assert (await client.get("/chunks/abc")).content == b"from a mount, and more"


async def test_more_than_a_chunk_is_refused(start_node: StartNode) -> None:
    async with start_node() as node, asked(node) as client:
        lines = [
            "PUT /chunks/abc HTTP/1.1",
            "Host: x",
            f"Authorization: {client.headers['Authorization']}",
            f"{RIGHT}: {KEY.write_right(CHUNK)}",
            f"Content-Length: {PAYLOAD_CAPACITY + 1}",
        ]
        assert client.base_url.port is not None
        stream = await trio.open_tcp_stream("127.0.0.1", client.base_url.port)
        async with stream:
            await stream.send_all("\r\n".join([*lines, "", ""]).encode())
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 413 ")

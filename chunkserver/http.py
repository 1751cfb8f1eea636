"""The control plane of a chunkserver: health, metrics, and what chunks it has.

``GET /health`` (no token), ``GET /metrics``, ``GET /chunks?after=ID&count=N``, ``GET /chunks/ID/info``; ``GET`` and
``PUT /chunks/ID`` (:mod:`chunkserver.http_chunks`); ``GET /scrub``
(:class:`chunkserver.protocol.ScrubReport`), and ``POST /scrub``, which begins a pass and answers the same. Ids are
hexadecimal, as in file names. ``GET /trace/ID``: what was done of late for one request of a mount's kernel, as pairs of
a method (``disk``: waiting for it) and seconds.
"""

import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from chunkserver import http_chunks
from chunkserver.chunkfile import PAYLOAD_CAPACITY
from chunkserver.replica import Replica
from chunkserver.table import DISK_FAILED, DISK_OK
from metaserver.errors import DfsError, ErrorCode
from metaserver.exposition import families
from metaserver.httpserver import json_reply, protected

if TYPE_CHECKING:
    from chunkserver.node import Node, Running

PAGE_LIMIT = 1000
# A whole chunk; nothing else here takes a body.
BODY_LIMIT = PAYLOAD_CAPACITY


class ChunkInfo(msgspec.Struct):
    """One replica; ``chunk`` and ``chain`` are hexadecimal, ``path`` is the file on this host."""

    chunk: str
    state: str
    stored_length: int
    logical_length: int
    entries: int
    chain: str
    verified: bool
    error: str
    created_ns: int
    path: str


class ChunkPage(msgspec.Struct):
    """``next`` continues the listing (``after=``); "" at the end."""

    chunks: list[ChunkInfo]
    next: str


def info(root: str, replica: Replica) -> ChunkInfo:
    written = replica.written
    return ChunkInfo(
        f"{replica.chunk:016x}",
        replica.state.name,
        written.stored_length,
        written.logical_length,
        written.entries,
        f"{written.chain:08x}",
        replica.verified,
        replica.error,
        replica.created_ns,
        f"{root}/{replica.path}",
    )


class _Metrics(Collector):
    """Reads the node when asked; nothing is counted twice."""

    def __init__(self, node: "Node") -> None:
        self._node = node

    def collect(self) -> Iterator[Metric]:
        running = self._node.running
        yield GaugeMetricFamily("chunkserver_clock_seconds", "Its clock (UTC), as Unix time", time.time())
        yield GaugeMetricFamily("chunkserver_joined", "1 once the cluster is known", 0 if running is None else 1)
        if running is None:
            return
        table = running.store.table
        yield GaugeMetricFamily("chunkserver_disk_bytes", "Size of the disk", table.capacity)
        yield GaugeMetricFamily("chunkserver_free_bytes", "What chunks may still take", table.free)
        yield GaugeMetricFamily("chunkserver_disk_ok", "1 unless full or failed", float(table.disk_state == DISK_OK))
        yield CounterMetricFamily("chunkserver_read_bytes", "Chunk bytes read by others", table.bytes_read)
        yield CounterMetricFamily("chunkserver_written_bytes", "Chunk bytes written", table.bytes_written)
        yield GaugeMetricFamily("chunkserver_requests", "Requests under way", running.service.in_flight)
        service = running.service
        timings = {service.names[number]: timing for number, timing in service.timings.items()}
        yield from families(timings, "chunkserver_request", "method", "requests")
        yield from families({"read": service.disk}, "chunkserver_disk", "operation", "waits for the disk")
        scrub = running.scrubber.status()
        yield GaugeMetricFamily("chunkserver_scrub_done_bytes", "Read back in this pass", scrub.done_bytes)
        yield GaugeMetricFamily("chunkserver_scrub_total_bytes", "What a pass has to read", scrub.total_bytes)
        yield GaugeMetricFamily("chunkserver_scrub_pass_seconds", "Since this pass began", scrub.pass_seconds)
        yield GaugeMetricFamily(
            "chunkserver_scrub_last_pass_seconds", "Length of the last pass", scrub.last_pass_seconds
        )
        since = "Since the last pass ended, 0 if there was none"
        yield GaugeMetricFamily("chunkserver_scrub_since_pass_seconds", since, scrub.since_pass_seconds)
        yield CounterMetricFamily("chunkserver_scrub_damaged", "Damaged replicas found by scrubbing", scrub.bad)
        states = GaugeMetricFamily("chunkserver_chunks", "Replicas by state", labels=["state"])
        for state, count in table.count_by_state().items():
            states.add_metric([state.name], count)
        yield states


def make_app(node: "Node") -> Starlette:
    """The application; works before the cluster is known."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Metrics(node))

    async def health(_: Request) -> Response:
        state = node.running.store.table.disk_state if node.running else DISK_OK
        body: dict[str, Any] = {"ok": state != DISK_FAILED, "joined": node.running is not None, "disk": state}
        return json_reply(body, 503 if state == DISK_FAILED else 200)

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def trace(request: Request) -> Response:
        text = request.path_params["trace"]
        if not re.fullmatch("[0-9a-f]{8}", text):
            raise DfsError(ErrorCode.INVALID, "a trace is eight hexadecimal digits, as logs have it")
        return json_reply(_running(node).service.traced(int(text, 16)))

    async def chunks(request: Request) -> Response:
        table = _running(node).store.table
        count = min(_number(request, "count", str(PAGE_LIMIT), 10), PAGE_LIMIT)
        replicas = table.page(_number(request, "after", "-1", 16), count)
        following = f"{replicas[-1].chunk:016x}" if replicas and len(replicas) == count else ""
        return json_reply(ChunkPage([info(node.disk.root, replica) for replica in replicas], following))

    async def chunk_info(request: Request) -> Response:
        return json_reply(info(node.disk.root, _running(node).store.table.find(_chunk(request))))

    async def chunk(request: Request) -> Response:
        store, number = _running(node).store, _chunk(request)
        if request.method != "PUT":
            return await http_chunks.get(store, request, number)
        http_chunks.check_right(node.key, request, number)
        http_chunks.check_number(number, node.mailbox.chunk_limit)
        return json_reply(info(node.disk.root, await http_chunks.put(store, request, number)), 201)

    async def scrub(request: Request) -> Response:
        scrubber = _running(node).scrubber
        if request.method == "POST":
            scrubber.ask()
        return json_reply(scrubber.report())

    routes = [
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/chunks", chunks),
        Route("/chunks/{chunk}", chunk, methods=["GET", "PUT"]),
        Route("/chunks/{chunk}/info", chunk_info),
        Route("/trace/{trace}", trace),
        Route("/scrub", scrub, methods=["GET", "POST"]),
    ]
    return protected(routes, node.key, body_limit=BODY_LIMIT)


def _running(node: "Node") -> "Running":
    if node.running is None:
        raise DfsError(ErrorCode.UNAVAILABLE, "this server has not joined its cluster yet")
    return node.running


def _chunk(request: Request) -> int:
    text = request.path_params["chunk"]
    if not re.fullmatch("[0-9A-Fa-f]{1,16}", text) or not int(text, 16):
        raise DfsError(ErrorCode.INVALID, "a chunk id is hexadecimal, of up to 16 digits")
    return int(text, 16)


def _number(request: Request, name: str, default: str, base: int) -> int:
    try:
        return int(request.query_params.get(name, default), base)
    except ValueError:
        raise DfsError(ErrorCode.INVALID, f"{name} is not a number of base {base}") from None

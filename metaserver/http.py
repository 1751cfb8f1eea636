"""The metaserver's HTTP interface: the routes of ``metaserver/protocol.py``, and metrics. Decodes, calls, encodes."""

import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from metaserver.admin import Admin
from metaserver.admin import routes as admin_routes
from metaserver.control import Control
from metaserver.errors import DfsError, ErrorCode
from metaserver.exposition import families
from metaserver.history import History
from metaserver.httpserver import json_reply, protected, read_json
from metaserver.joins import OPEN_PATH
from metaserver.key import ClusterKey
from metaserver.page import Page
from metaserver.planning import Group
from metaserver.protocol import ChunkHealth, Heartbeat, Register, ReportPage
from metaserver.service import Service
from metaserver.snapshot import SnapshotFailed
from metaserver.status import StatusReader
from metaserver.store import StoreFull
from metaserver.trash_admin import TrashAdmin
from metaserver.trash_admin import routes as trash_routes


class ServiceMetrics(Collector):
    """Reads the numbers when they are asked for: nothing is counted twice."""

    def __init__(self, service: Service, status: StatusReader) -> None:
        self._service = service
        self._status = status
        # Counted anew, as seldom as `dfs status` counts, before each look.
        self.health = ChunkHealth(0, 0, 0, 0, 0, 0)

    def collect(self) -> Iterable[Metric]:
        service, committer = self._service, self._service.committer
        space = service.members.space(service.config.copies)
        gauges = {
            "epoch": ("Life of the metaserver", committer.epoch),
            "change_number": ("Newest change", committer.newest),
            "durable_number": ("Newest change on stable storage", committer.durable),
            "read_only": ("1 if nothing can be changed", int(bool(service.changes.refusing))),
            "disk_full": ("1 if only what frees space is accepted", int(committer.is_full)),
            "unprotected": ("1 if the store could not be rebuilt now", int(committer.unprotected)),
            "total_bytes": ("What can be stored at the usual number of copies", space[0]),
            "free_bytes": ("What can be written now, at the usual number of copies", space[1]),
            "window_open": ("1 while the reconnect window is open", int(service.resuming.window.open)),
            "sessions": ("Mounted clients", len(service.sessions.by_id)),
            "open_chunks": ("Chunks being written", len(service.members.open_chunks)),
            "orders": ("Orders under way", len(service.repair)),
            "tasks": ("Tasks that continue in steps", len(service.tasks)),
            "trash_files": ("Deleted files that are kept", service.trash.files),
            "trash_bytes": ("What is in them, which goes when the space is needed", service.trash.bytes),
            **self._moving(),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"metaserver_{name}", text, float(value))
        yield self._requests()
        yield GaugeMetricFamily("metaserver_clock_seconds", "Its clock (UTC), as Unix time", time.time())
        yield self._chunks()
        timings = {service.table[number].method.name: timing for number, timing in service.timings.items()}
        yield from families(timings, "metaserver_request", "method", "requests")
        yield CounterMetricFamily("metaserver_flushes", "FLUSH pushes sent", service.flushing.asked)
        yield CounterMetricFamily("metaserver_flushes_given_up", "FLUSH not answered", service.flushing.given_up)
        yield from self._cleaner()
        yield from self._servers()

    def _moving(self) -> dict[str, tuple[str, float]]:
        repair = self._service.repair
        return {
            "copies_waiting": ("Chunks whose next copy waits for its turn", repair.waiting(Group.COPIES)),
            "moves_waiting": ("Chunks that wait to leave a draining server", repair.waiting(Group.MOVES)),
            "shifts_waiting": ("Chunks that wait to be better placed", repair.waiting(Group.SHIFTS)),
            "deletions_waiting": ("Chunks with replicas that wait to be deleted", repair.waiting(Group.DELETIONS)),
            "copied_bytes_per_second": ("Copied between chunkservers of late", repair.copy_rate),
        }

    def _chunks(self) -> Metric:
        family = GaugeMetricFamily("metaserver_chunks", "Chunks by their good copies on servers up", labels=["health"])
        for name in ("healthy", "too_few", "missing", "open", "dead"):
            family.add_metric([name], getattr(self.health, name))
        return family

    def _requests(self) -> Metric:
        family = CounterMetricFamily("metaserver_requests", "Requests by method", labels=["method"])
        for number, count in sorted(self._service.counts.items()):
            family.add_metric([self._service.table[number].method.name], count)
        return family

    def _cleaner(self) -> Iterable[Metric]:
        cleaner = self._status.cleaner()
        yield GaugeMetricFamily("metaserver_cleanable_chunks", "Chunks worth rewriting", cleaner.candidates)
        yield GaugeMetricFamily("metaserver_dead_bytes", "What rewriting them would free", cleaner.dead_bytes)
        yield GaugeMetricFamily("metaserver_chunks_being_cleaned", "Chunks being rewritten", cleaner.cleaning)
        yield CounterMetricFamily("metaserver_cleaned_chunks", "Chunks freed by rewriting", cleaner.freed_chunks)
        yield CounterMetricFamily("metaserver_cleaning_moved_bytes", "Bytes rewritten", cleaner.moved_bytes)
        yield CounterMetricFamily("metaserver_cleaning_failures", "Attempts that failed", cleaner.failed)

    def _servers(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("metaserver_chunkserver_up", "1 if the server is up", labels=["server", "name"])
        free = GaugeMetricFamily("metaserver_chunkserver_free_bytes", "Bytes free there", labels=["server", "name"])
        held = GaugeMetricFamily(
            "metaserver_chunkserver_reserved_bytes", "Kept for chunks being written", labels=["server", "name"]
        )
        good = GaugeMetricFamily("metaserver_chunkserver_disk_ok", "1 unless full or failed", labels=["server", "name"])
        for server in self._status.servers():
            labels = [str(server.server), server.name]
            up.add_metric(labels, float(server.state in ("UP", "DRAINING")))
            free.add_metric(labels, server.free)
            held.add_metric(labels, server.reserved)
            good.add_metric(labels, float(server.disk_state in ("", "OK")))
        return [up, free, held, good]


def make_app(
    service: Service,
    control: Control,
    status: StatusReader,
    admin: Admin,
    history: History,
    key: ClusterKey | None,
    more: Sequence[Route] = (),
) -> Starlette:
    """The application, with ``more`` routes; every path but ``/health`` and joining needs the token of ``key``."""
    registry = CollectorRegistry()
    page = Page()
    trash_admin = TrashAdmin(service.committer, service.changes, service.trash)
    numbers = ServiceMetrics(service, status)
    registry.register(numbers)

    async def register(request: Request) -> Response:
        return json_reply(await control.register(await read_json(request, Register)))

    async def report(request: Request) -> Response:
        with _numbers():
            await control.report(_number(request, "server"), await read_json(request, ReportPage))
        return json_reply({})

    async def heartbeat(request: Request) -> Response:
        with _numbers():
            reply = await control.heartbeat(_number(request, "server"), await read_json(request, Heartbeat))
        return json_reply(reply)

    async def show_status(request: Request) -> Response:
        return json_reply(await status.status())

    async def servers(request: Request) -> Response:
        return json_reply(status.servers())

    async def show_file(request: Request) -> Response:
        try:
            with _numbers():
                return json_reply(await status.file(_number(request, "ino")))
        except DfsError as error:
            if error.code is ErrorCode.STALE_INODE:
                raise DfsError(ErrorCode.NOT_FOUND, error.text) from None
            raise

    async def show_check(request: Request) -> Response:
        return json_reply(await service.committer.check())

    async def make_snapshot(request: Request) -> Response:
        try:
            snapshot = await service.committer.snapshot()
        except (StoreFull, SnapshotFailed) as error:
            code = ErrorCode.NO_SPACE if isinstance(error, StoreFull) else ErrorCode.IO
            raise DfsError(code, str(error)) from None
        return json_reply({"path": str(snapshot.path), "position": str(snapshot.position)})

    async def show_page(request: Request) -> Response:
        shown = page.render(await status.status(), history.samples, history.events, time.time_ns())
        return HTMLResponse(shown, headers=page.headers)

    async def health(request: Request) -> Response:
        return json_reply({"role": "metaserver", "epoch": service.committer.epoch, "status": "ok"})

    async def metrics(request: Request) -> Response:
        numbers.health = await status.health()
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    routes = [
        Route("/", show_page),
        Route("/v1/servers/register", register, methods=["POST"]),
        Route("/v1/servers/{server}/report", report, methods=["POST"]),
        Route("/v1/servers/{server}/heartbeat", heartbeat, methods=["POST"]),
        Route("/v1/status", show_status),
        Route("/status.json", show_status),
        Route("/v1/chunks/{ino}", show_file),
        Route("/v1/files/{ino}", show_file),
        Route("/v1/check", show_check),
        Route("/v1/snapshot", make_snapshot, methods=["POST"]),
        *admin_routes(admin),
        *more,
        *trash_routes(trash_admin, service.changes),
        Route("/servers", servers),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    return protected(routes, key, ("/health", OPEN_PATH))


@contextmanager
def _numbers() -> Iterator[None]:
    """Numbers that do not fit into a row are the sender's mistake."""
    try:
        yield
    except struct.error:
        raise DfsError(ErrorCode.INVALID, "a number out of its range") from None


def _number(request: Request, name: str) -> int:
    text = request.path_params[name]
    if not text.isdecimal() or len(text) > 20:
        raise DfsError(ErrorCode.INVALID, f"{text[:40]!r} is no number")
    return int(text)

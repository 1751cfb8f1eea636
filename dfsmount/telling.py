"""What a mount tells of itself: the files of ``.dfs``, and the commands of its control socket."""

import os
from collections.abc import Iterator
from time import perf_counter_ns
from typing import Any

import msgspec
import trio

from dfsmount.assembly import Client
from dfsmount.opstats import OpStats, Recorder
from dfsmount.virtual import Make
from dfsmount.waiting import Operation, Waiting
from metaserver import protocol, words
from metaserver.connection import InFlight
from metaserver.controlsocket import Command, Refused, seconds_of
from metaserver.errors import DfsError
from metaserver.protocol import Status
from metaserver.timings import Summary
from metaserver.tracing import text
from metaserver.wire import Empty

# What is asked for while somebody waits at a prompt.
STATUS_SECONDS = 3.0
# The issue's: what is younger does not wait, it works.
OLD_SECONDS = 1.0
WAITING_SHOWN = 200
PROFILE_ROWS = 500


class Behind(msgspec.Struct):
    """A request to a server, and for how long it has been without an answer."""

    method: str
    server: str
    seconds: float


class Waits(msgspec.Struct):
    """An operation of the kernel in progress. ``process`` is the thread that asked, 0 if the kernel does not say;
    ``at`` the lines of code that it waits at."""

    operation: str
    inode: int
    process: int
    seconds: float
    trace: str
    behind: list[Behind]
    at: str


class Stats(msgspec.Struct):
    """Since the mount began; times in seconds."""

    mountpoint: str
    pid: int
    seconds: float
    session: int
    connected: bool
    reconnects: int
    operations: list[Summary]
    read_bytes: int
    written_bytes: int
    dirty_bytes: int
    cached_bytes: int
    open_files: int
    chunk_requests: int
    hedged_requests: int
    failed_requests: int
    in_progress: int


class Telling:
    """``mountpoint`` is for people."""

    def __init__(self, client: Client, waiting: Waiting, stats: OpStats, mountpoint: str) -> None:
        self._client = client
        self._waiting = waiting
        self._stats = stats
        self._mountpoint = mountpoint

    def files(self) -> dict[bytes, Make]:
        return {
            b"metrics": self._metrics_text,
            b"stats": self._stats_text,
            b"status": self._status_text,
            b"waiting": self._waiting_text,
        }

    def commands(self) -> dict[str, Command]:
        return {
            "about": self._about,
            "stats": self._tell_stats,
            "waiting": self._tell_waiting,
            "profile": self._profile,
            "last_read": self._last_read,
        }

    # -- status ------------------------------------------------------------------------------------------------

    async def _status_text(self) -> str:
        meta = self._client.meta
        lines = [f"mount       {self._mountpoint}, process {os.getpid()}, session {meta.session}"]
        try:
            status = await self._status()
        except DfsError as error:
            lines.insert(0, f"The metaserver {meta.host}:{meta.port} does not answer: {error.text}.")
            return "\n".join([*lines, *self._known_lines()]) + "\n"
        shown = [words.verdict(status), *lines, *words.summary_lines(status, f"{meta.host}:{meta.port}")]
        return "\n".join([*shown, *map(_server_line, status.servers), *map(_session_line, status.sessions)]) + "\n"

    async def _status(self) -> Status:
        reply = await self._client.meta.call(protocol.GET_STATUS, Empty(), timeout=STATUS_SECONDS)
        return msgspec.json.decode(reply.status, type=Status)

    def _known_lines(self) -> Iterator[str]:
        """What this mount knows by itself."""
        client = self._client
        state = "connected" if client.meta.connected else f"reconnecting ({client.meta.reconnects} times lost before)"
        yield f"metaserver  {state}"
        yield f"unwritten   {words.bytes_text(client.writer.dirty_bytes)}"
        for address in client.meta.known_servers:
            silent = client.pool.pulse.silent_seconds(address.server)
            yield f"chunkserver {address.host}:{address.port}" + (f", silent for {silent:.0f} s" if silent > 1 else "")

    # -- waiting -----------------------------------------------------------------------------------------------

    def waits(self) -> list[Waits]:
        """Operations that are older than a second, the oldest first."""
        now = trio.current_time()
        asked = [*self._client.meta.in_flight(), *self._client.pool.in_flight()]
        old = [each for each in self._waiting.in_progress() if now - each.started >= OLD_SECONDS][:WAITING_SHOWN]
        return [self._wait(each, asked, now) for each in old]

    def _wait(self, operation: Operation, asked: list[InFlight], now: float) -> Waits:
        behind = [
            Behind(request.method, request.peer, round(now - request.since, 3))
            for request in asked
            if request.trace_id in (0, operation.trace)
        ]
        if not self._client.meta.connected:
            meta = self._client.meta
            behind.append(Behind("connect", f"{meta.host}:{meta.port} (metaserver)", 0.0))
        seconds = round(now - operation.started, 3)
        trace, at = text(operation.trace), operation.where()
        return Waits(operation.name, operation.subject, operation.thread, seconds, trace, behind, at)

    async def _waiting_text(self) -> str:
        return "".join(map(_wait_line, self.waits())) or "nothing waits for longer than a second\n"

    # -- numbers -----------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        client, stats = self._client, self._stats
        fetcher = client.reader.fetcher
        return Stats(
            mountpoint=self._mountpoint,
            pid=os.getpid(),
            seconds=round((perf_counter_ns() - stats.began_ns) / 1e9, 3),
            session=client.meta.session,
            connected=client.meta.connected,
            reconnects=client.meta.reconnects,
            operations=stats.timings.summary(),
            read_bytes=stats.read_bytes,
            written_bytes=stats.written_bytes,
            dirty_bytes=client.writer.dirty_bytes,
            cached_bytes=client.reader.cache.size,
            open_files=len(client.core.handles),
            chunk_requests=fetcher.requests,
            hedged_requests=fetcher.hedges,
            failed_requests=fetcher.failures,
            in_progress=len(self._waiting),
        )

    async def _stats_text(self) -> str:
        return "".join(stats_lines(self.stats()))

    async def _metrics_text(self) -> str:
        # Not before it is asked for: the library takes 30 ms to import, and nobody may ask.
        from dfsmount import metrics

        return metrics.text(self.stats(), self._stats.timings.by_name)

    # -- commands ----------------------------------------------------------------------------------------------

    async def _about(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"mountpoint": self._mountpoint}

    async def _tell_stats(self, _: dict[str, Any]) -> Stats:
        return self.stats()

    async def _tell_waiting(self, _: dict[str, Any]) -> list[Waits]:
        return self.waits()

    async def _profile(self, arguments: dict[str, Any]) -> Any:
        seconds = seconds_of(arguments)
        if self._stats.recorder is not None:
            raise Refused("a profile is being made already")
        recorder = self._stats.recorder = Recorder()
        try:
            await trio.sleep(seconds)
        finally:
            self._stats.recorder = None
        return recorder.used()[:PROFILE_ROWS]

    async def _last_read(self, arguments: dict[str, Any]) -> Any:
        ino = arguments.get("ino")
        return self._client.reader.log.last(ino) if isinstance(ino, int) else None


def _server_line(server: protocol.ServerStatus) -> str:
    free = f"{words.bytes_text(server.free)} free of {words.bytes_text(server.capacity)}"
    return f"server      {server.name} {words.state_text(server)}, {free}, {words.count_text(server.chunks, 'chunk')}"


def _session_line(session: protocol.SessionStatus) -> str:
    state = "connected" if session.connected else f"away for {words.seconds_text(session.idle_seconds)}"
    return f"session     {session.mountpoint} on {session.host}, {state}"


def _wait_line(wait: Waits) -> str:
    behind = "; ".join(f"{each.method} at {each.server} for {each.seconds:.1f} s" for each in wait.behind)
    process = f" by thread {wait.process}" if wait.process else ""
    what = f"{wait.operation} of inode {wait.inode}{process}, trace {wait.trace}"
    return f"{wait.seconds:8.1f} s  {what}: waits for {behind or 'nothing outside this mount'} [{wait.at}]\n"


def stats_lines(stats: Stats) -> Iterator[str]:
    """For people."""
    size = words.bytes_text
    yield f"{stats.mountpoint}: process {stats.pid}, {words.seconds_text(stats.seconds)} since it was mounted\n"
    yield f"read {size(stats.read_bytes)}, written {size(stats.written_bytes)}; "
    yield f"{size(stats.dirty_bytes)} not yet stored, {size(stats.cached_bytes)} cached\n"
    yield f"reads from chunkservers: {stats.chunk_requests:,}; {stats.hedged_requests:,} of them because of slowness, "
    yield f"{stats.failed_requests:,} failed\n"
    columns = ("total", "mean", "median", "p99", "longest")
    yield f"{'operation':<12}{'count':>10}{'failed':>8}" + "".join(f"{name:>11}" for name in columns) + "\n"
    for each in stats.operations:
        times = (each.total_seconds, each.mean_seconds, each.median_seconds, each.p99_seconds, each.longest_seconds)
        shown = "".join(f"{duration_text(seconds):>11}" for seconds in times)
        yield f"{each.operation:<12}{each.count:>10,}{each.failed:>8,}{shown}\n"


def duration_text(seconds: float) -> str:
    """With three digits."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"

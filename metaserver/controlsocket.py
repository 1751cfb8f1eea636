"""Asking a running program about itself, on its own host: one JSON line to a UNIX socket, one JSON line back.

All three programs listen on an *abstract* socket ``@dfs/PROGRAM/PID``: it needs no directory, so that it works inside
every sandbox of systemd and leaves nothing behind, and /proc/net/unix lists them. The kernel tells each end who the
other is (SO_PEERCRED): a program answers root and its own user only, and whoever asks makes sure that the answer comes
from the process it means, since anybody may take an abstract name.

A request is ``{"command": NAME, "arguments": {...}}`` of at most 64 KiB; the answer ``{"result": ...}`` or ``{"error":
one line}`` of at most 16 MiB. One request a connection, eight connections at a time, each with an end.
"""

import cProfile
import os
import pstats
import re
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import structlog
import trio

log = structlog.get_logger(__name__)

REQUEST_BYTES = 64 << 10
ANSWER_BYTES = 16 << 20
CONNECTIONS = 8
# The longest that a command may measure, and what it may take beside that.
LONGEST_SECONDS = 60.0
GRACE_SECONDS = 10.0
# Functions in a CPU profile: the rest is noise.
PROFILE_ROWS = 2000
_CREDENTIALS = struct.Struct("3i")
_NAME = re.compile(r"@dfs/([a-z]+)/([0-9]+)")

# Raises Refused with one line that says what is wrong.
Command = Callable[[dict[str, Any]], Awaitable[Any]]


class Refused(Exception):
    """The other side does not do this; one line that says why."""


class Process(NamedTuple):
    """One of our programs that runs on this host."""

    program: str
    pid: int


class Request(msgspec.Struct):
    command: str
    arguments: dict[str, Any] = {}


class Answer(msgspec.Struct, omit_defaults=True):
    result: Any = None
    error: str = ""


def _address(process: Process) -> str:
    return f"\0dfs/{process.program}/{process.pid}"


def _peer(stream: socket.socket | trio.socket.SocketType) -> tuple[int, int]:
    """The process and the user at the other end."""
    pid, uid, _ = _CREDENTIALS.unpack(stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid


# -- being asked ---------------------------------------------------------------------------------------------------


class Control:
    """What ``program`` tells of itself. :meth:`run` until cancelled."""

    def __init__(self, program: str, commands: Mapping[str, Command]) -> None:
        self._program = program
        self._commands = {"cpu": _profile_cpu, **commands}
        self._free = CONNECTIONS

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """A host on which there can be no such socket is told so once; nothing else depends on it."""
        listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            await listener.bind(_address(Process(self._program, os.getpid())))
            listener.listen(CONNECTIONS)
        except OSError as error:
            log.warning("this process cannot be asked about itself", reason=error.strerror)
            listener.close()
            return
        task_status.started()
        async with trio.open_nursery() as nursery:
            with listener:
                while True:
                    stream, _ = await listener.accept()
                    if self._free > 0:
                        self._free -= 1
                        nursery.start_soon(self._serve, stream)
                    else:
                        stream.close()

    async def _serve(self, stream: trio.socket.SocketType) -> None:
        try:
            with stream, trio.move_on_after(LONGEST_SECONDS + GRACE_SECONDS):
                answer = await self._answer(stream)
                data = msgspec.json.encode(answer) + b"\n"
                if len(data) > ANSWER_BYTES:
                    data = msgspec.json.encode(Answer(error="the answer is too long")) + b"\n"
                while data:
                    data = data[await stream.send(data) :]
        except OSError:
            pass  # whoever asked has left
        finally:
            self._free += 1

    async def _answer(self, stream: trio.socket.SocketType) -> Answer:
        pid, uid = _peer(stream)
        if uid not in (0, os.geteuid()):
            log.warning("asked by a stranger", pid=pid, uid=uid)
            return Answer(error="only root and the user that it runs as may ask this process")
        try:
            request = msgspec.json.decode(await _line(stream), type=Request)
            command = self._commands.get(request.command)
            if command is None:
                return Answer(error=f"a {self._program} does not know {request.command[:40]!r}")
            return Answer(await command(request.arguments))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return Answer(error="malformed request")
        except Refused as refused:
            return Answer(error=str(refused))
        except Exception:
            log.exception("command failed")
            return Answer(error="it met an unexpected condition; see its log")


async def _line(stream: trio.socket.SocketType) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        part = await stream.recv(REQUEST_BYTES)
        data += part
        if not part or len(data) > REQUEST_BYTES:
            raise msgspec.DecodeError
    return data


def seconds_of(arguments: dict[str, Any]) -> float:
    """For how long a command is to measure."""
    seconds = arguments.get("seconds", 10.0)
    if not isinstance(seconds, int | float) or not 0 < seconds <= LONGEST_SECONDS:
        raise Refused(f"from 0 to {LONGEST_SECONDS:.0f} seconds")
    return float(seconds)


class Function(msgspec.Struct):
    """One function of a CPU profile; ``own`` and ``cumulative`` in seconds."""

    function: str
    file: str
    line: int
    calls: int
    own: float
    cumulative: float


async def _profile_cpu(arguments: dict[str, Any]) -> list[Function]:
    """cProfile of this process' main thread for some seconds; it runs at about half its speed meanwhile."""
    seconds = seconds_of(arguments)
    profile = cProfile.Profile()
    try:
        profile.enable()
    except ValueError:
        raise Refused("it is being profiled already") from None
    try:
        await trio.sleep(seconds)
    finally:
        profile.disable()
    return functions(profile)


def functions(profile: cProfile.Profile) -> list[Function]:
    """The most expensive first."""
    profile.create_stats()
    stats: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    rows = [
        Function(name, file, line, calls, own, cumulative)
        for (file, line, name), (_, calls, own, cumulative, _) in stats.items()
    ]
    return sorted(rows, key=lambda row: -row.own)[:PROFILE_ROWS]


# -- asking --------------------------------------------------------------------------------------------------------


def processes(table: str | None = None) -> list[Process]:
    """Our programs on this host (in this network namespace) that can be asked; ``table`` is /proc/net/unix."""
    if table is None:
        table = Path("/proc/net/unix").read_text(errors="replace")
    found = {match.groups() for line in table.splitlines() if (match := _NAME.fullmatch(line.split()[-1] or ""))}
    return sorted(Process(program, int(pid)) for program, pid in found)


def ask(process: Process, command: str, timeout: float = 5.0, **arguments: Any) -> Any:
    """What ``process`` answers. Raises :class:`Refused`, also if it is not there or does not answer in time."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.settimeout(timeout)
        try:
            stream.connect(_address(process))
            pid, uid = _peer(stream)
            if pid != process.pid or uid not in (0, os.geteuid(), _owner(pid)):
                raise Refused(f"another process has taken the name of process {process.pid}")
            stream.sendall(msgspec.json.encode(Request(command, arguments)) + b"\n")
            data = _received(stream)
        except TimeoutError:
            raise Refused(f"process {process.pid} does not answer in time") from None
        except OSError as error:
            raise Refused(f"process {process.pid} cannot be asked: {error.strerror}") from None
    try:
        answer = msgspec.json.decode(data, type=Answer)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise Refused(f"process {process.pid} ended before it had answered") from None
    if answer.error:
        raise Refused(answer.error)
    return answer.result


def _owner(pid: int) -> int:
    return os.stat(f"/proc/{pid}").st_uid


def _received(stream: socket.socket) -> bytes:
    parts = []
    size = 0
    while part := stream.recv(1 << 20):
        parts.append(part)
        size += len(part)
        if size > ANSWER_BYTES:
            raise Refused("its answer is too long")
    return b"".join(parts)

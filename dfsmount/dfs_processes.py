"""Background processes: starting, finding again, stopping; and who uses a port or a mount. All through /proc."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dfsmount.dfs_layout import Problem

PROC = Path("/proc")
# A log that has grown past this is put aside (one generation) at the next start.
LOG_BYTES = 16 << 20
POLL_SECONDS = 0.05


class Service(NamedTuple):
    """One process of a cluster. ``mark`` is an argument by which its command line is known to be this one's."""

    name: str
    module: str
    arguments: tuple[str, ...]
    mark: str
    pid_file: Path
    log: Path

    def command(self) -> list[str]:
        return [sys.executable, "-m", self.module, *self.arguments]


class Started(NamedTuple):
    """A service and its process: as a child of ours (``child``) or found by its pid file."""

    service: Service
    pid: int
    child: "subprocess.Popen[bytes] | None" = None

    def ended(self) -> bool:
        if self.child is not None:
            return self.child.poll() is not None
        return not is_alive(self.pid)


def command_line(pid: int) -> list[str]:
    """The arguments of a process; empty if it is gone, a zombie, or the kernel's own."""
    try:
        text = (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return []
    return [part.decode(errors="surrogateescape") for part in text.rstrip(b"\0").split(b"\0")] if text else []


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not waited for does not."""
    try:
        stat = (PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def find(service: Service) -> Started | None:
    """The running process of a service; not whatever else may have the recorded pid by now."""
    try:
        pid = int(service.pid_file.read_text())
    except (OSError, ValueError):
        return None
    line = command_line(pid)
    if service.module in line and service.mark in line and is_alive(pid):
        return Started(service, pid)
    return None


def start(service: Service) -> Started:
    """Starts a service in a session of its own, its output in its log; it outlives this command."""
    if service.log.exists() and service.log.stat().st_size > LOG_BYTES:
        service.log.replace(service.log.with_suffix(".log.1"))
    # Works from a checkout that is not installed, too.
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    with service.log.open("ab") as log:
        log.write(f"-- {time.strftime('%Y-%m-%d %H:%M:%S')} dfs up\n".encode())
        log.flush()
        child = subprocess.Popen(
            service.command(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=environment,
            start_new_session=True,
        )
    service.pid_file.write_text(f"{child.pid}\n")
    return Started(service, child.pid, child)


def stop(started: Started, patience_seconds: float) -> bool:
    """Asks a process to end, and kills it after ``patience_seconds``; returns whether it ended by itself."""
    asked = send_signal(started.pid, signal.SIGTERM)
    ended = not asked or wait_ended(started, patience_seconds)
    if not ended:
        send_signal(started.pid, signal.SIGKILL)
        wait_ended(started, 10)
    started.service.pid_file.unlink(missing_ok=True)
    return ended


def send_signal(pid: int, number: signal.Signals) -> bool:
    """Returns whether there was such a process."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    except PermissionError:
        raise Problem(f"process {pid} belongs to another user: run this as that user or as root") from None
    return True


def wait_ended(started: Started, patience_seconds: float) -> bool:
    deadline = time.monotonic() + patience_seconds
    while not started.ended():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def last_words(log: Path) -> str:
    """The last line of a log that is not empty or the marker of a start: usually why a process ended."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip() and not line.startswith("-- ")), "")


# -- ports ---------------------------------------------------------------------------------------------------------


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
            sock.listen(1)
        except OSError:
            return False
    return True


def listening_inodes(table: str, port: int) -> set[str]:
    """Socket inodes that listen on ``port`` according to the text of /proc/net/tcp or tcp6."""
    found = set()
    for line in table.splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
            found.add(fields[9])
    return found


def who_listens(port: int) -> str:
    """``NAME (pid N)`` of who listens on a port, or "another program" if that cannot be seen."""
    inodes: set[str] = set()
    for name in ("tcp", "tcp6"):
        path = PROC / "net" / name
        if path.exists():
            inodes |= listening_inodes(path.read_text(), port)
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for pid in processes():
        if any(target in wanted for _, target in links(pid, descriptors=True)):
            return describe(pid)
    return "another program"


# -- who uses a mount ----------------------------------------------------------------------------------------------


def processes() -> Iterator[int]:
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            yield int(entry.name)


def links(pid: int, *, descriptors: bool = False) -> Iterator[tuple[str, str]]:
    """(what, target) of the links of a process; reading them does not touch the filesystem they point to."""
    places = [("cwd", PROC / str(pid) / "cwd"), ("root", PROC / str(pid) / "root"), ("exe", PROC / str(pid) / "exe")]
    for folder in ("fd", "map_files") if not descriptors else ("fd",):
        try:
            places += [("file", entry) for entry in (PROC / str(pid) / folder).iterdir()]
        except OSError:
            continue
    for what, place in places:
        try:
            yield what, os.readlink(place)
        except OSError:
            continue


def users_of(point: str, ignore: Sequence[int] = ()) -> list[str]:
    """Who keeps a mount busy: ``NAME (pid N): works in PATH`` or ``... has PATH open``, one for each process."""
    found = []
    for pid in sorted(processes()):
        if pid in ignore or pid == os.getpid():
            continue
        for what, target in links(pid):
            if f"{target}/".startswith(f"{point}/"):
                verb = "has {} open" if what == "file" else "works in {}"
                found.append(f"{describe(pid)} {verb.format(target.removesuffix(' (deleted)'))}")
                break
    return found


def describe(pid: int) -> str:
    try:
        name = (PROC / str(pid) / "comm").read_text(errors="replace").strip()
    except OSError:
        name = "a process"
    return f"{name} (pid {pid})"

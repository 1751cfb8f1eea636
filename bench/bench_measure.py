"""CPU time and memory of processes, and what goes over the wire, from /proc."""

import os
import threading
from pathlib import Path
from typing import NamedTuple

TICKS = os.sysconf("SC_CLK_TCK")
SAMPLE_SECONDS = 0.25


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


def anonymous_bytes(pid: int) -> int:
    """Memory that is not backed by a file (RssAnon): what a process really costs. LMDB's map does not count."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


class Wire(NamedTuple):
    """What has gone over the loopback interface of this machine: bytes with headers, and packets that were received.

    A request or an answer of up to 64 KiB is one packet, and an acknowledgement without data is another.
    """

    bytes: int
    packets: int

    def since(self, before: "Wire") -> "Wire":
        return Wire(self.bytes - before.bytes, self.packets - before.packets)


def wire() -> Wire:
    lines = Path("/proc/net/dev").read_text().splitlines()
    fields = next((line.split(":")[1].split() for line in lines if line.strip().startswith("lo:")), ["0", "0"])
    return Wire(int(fields[0]), int(fields[1]))


class MemoryWatch:
    """Remembers the largest RssAnon of each process of several roles; a thread that sleeps nearly all the time."""

    def __init__(self) -> None:
        self.largest: dict[str, int] = {}
        self._roles: dict[str, list[int]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def watch(self, name: str, roles: dict[str, list[int]]) -> None:
        """From now on, these processes, as ``NAME ROLE``."""
        self._roles = {f"{name} {role}": pids for role, pids in roles.items()}

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            for role, pids in self._roles.items():
                found = max(map(anonymous_bytes, pids), default=0)
                self.largest[role] = max(self.largest.get(role, 0), found)

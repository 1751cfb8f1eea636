"""What a mount counts and remembers of the kernel's requests: times by operation, bytes, and on demand who did what.

The hot path pays for two clocks, a histogram and one comparison; everything else happens when somebody looks.
"""

from time import perf_counter_ns
from typing import NamedTuple

import msgspec

from metaserver.timings import Timings

# Files times operations that a profile tells apart; what comes after is counted together.
PROFILE_KEYS = 20_000
PROFILE_NAMES = 50_000
OTHERS = 0


class Used(msgspec.Struct):
    """How often and how long something was done with an inode. ``name`` "" : not known."""

    operation: str
    ino: int
    name: str
    count: int
    seconds: float


class _Name(NamedTuple):
    parent: int
    name: bytes


class Recorder:
    """Who did what while a profile is made."""

    def __init__(self) -> None:
        self._used: dict[tuple[str, int], list[int]] = {}
        self._names: dict[int, _Name] = {}

    def note(self, operation: str, ino: int, duration_ns: int) -> None:
        key = (operation, ino)
        used = self._used.get(key)
        if used is None:
            if len(self._used) >= PROFILE_KEYS:
                key = (operation, OTHERS)
            used = self._used.setdefault(key, [0, 0])
        used[0] += 1
        used[1] += duration_ns

    def learn(self, ino: int, parent: int, name: bytes) -> None:
        if len(self._names) < PROFILE_NAMES:
            self._names[ino] = _Name(parent, name)

    def used(self) -> list[Used]:
        """What took longest first."""
        rows = [
            Used(operation, ino, self._path(ino), count, total / 1e9)
            for (operation, ino), (count, total) in self._used.items()
        ]
        return sorted(rows, key=lambda row: -row.seconds)

    def _path(self, ino: int) -> str:
        """As far as names were looked up meanwhile."""
        parts: list[str] = []
        while ino in self._names and len(parts) < 64:
            ino, name = self._names[ino]
            parts.append(name.decode(errors="replace"))
        return "/".join(reversed(parts))


class OpStats:
    """Of one mount, since it began."""

    def __init__(self) -> None:
        self.began_ns = perf_counter_ns()
        self.timings = Timings()
        self.read_bytes = 0
        self.written_bytes = 0
        self.recorder: Recorder | None = None

    def done(self, operation: str, begun_ns: int) -> int:
        """An operation has ended; how long it took, in ns."""
        duration_ns = perf_counter_ns() - begun_ns
        self.timings.of(operation).add(duration_ns)
        return duration_ns

"""How the last reads went that needed servers: for `dfs explain`."""

import time
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import msgspec
import trio

from metaserver.tracing import TRACE, text

READS_REMEMBERED = 512


class Step(msgspec.Struct):
    """One request to a server for one read: times in seconds since the read began. ``outcome`` "" : it brought the
    bytes; else why not. ``hedge``: it was asked because another took long."""

    server: int
    chunk: str
    offset: int
    length: int
    begun: float
    ended: float
    outcome: str
    hedge: bool


class Read(msgspec.Struct):
    """One read of the kernel. ``trace`` as logs write it; ``at_ns`` when it began (UTC), ``seconds`` how long it took.
    ``steps`` is empty if all was in this mount's memory. ``error``: why it failed, "" if it did not."""

    ino: int
    offset: int
    length: int
    trace: str
    at_ns: int
    seconds: float
    steps: list[Step]
    error: str = ""


class Attempted(NamedTuple):
    """A request to a server that has ended; times on trio's clock."""

    server: int
    chunk: int
    start: int
    stop: int
    begun: float
    ended: float
    outcome: str
    hedge: bool


class ReadLog:
    """The last of them."""

    def __init__(self) -> None:
        self._reads: deque[Read] = deque(maxlen=READS_REMEMBERED)

    def note(self, ino: int, offset: int, length: int, begun: float, attempts: Iterable[Attempted], error: str) -> None:
        """A read that began at ``begun`` (trio's clock) has ended just now."""
        seconds = trio.current_time() - begun
        steps = [
            Step(
                each.server, f"{each.chunk:016x}", each.start, each.stop - each.start,
                each.begun - begun, each.ended - begun, each.outcome, each.hedge,
            )
            for each in attempts
        ]  # fmt: skip
        began_ns = time.time_ns() - int(seconds * 1e9)
        self._reads.append(Read(ino, offset, length, text(TRACE.get()), began_ns, seconds, steps, error))

    def last(self, ino: int) -> Read | None:
        return next((read for read in reversed(self._reads) if read.ino == ino), None)

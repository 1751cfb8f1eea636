"""Which chunkservers a writer had better do without. Pure: readings of their pulse in, a verdict out.

Judgement is relative. A server is to blame only if another one does better at the same time: if nobody answers it may
be our own network, and disks that are slow for everybody must not end one chunk after the other.
"""

from collections.abc import Mapping
from typing import NamedTuple

from chunkserver.pulse import Reading

# Together with the time until somebody looks (0.5 s) and the next chunk: half of the 5 s a writer may stall.
SILENT_SECONDS = 2.0
# A disk on which one operation has taken so long hangs, if those of others do not.
HUNG_SECONDS = 3.0
# A server is slow if a request takes so long there, again and again, and so many times what it takes elsewhere: disks
# of one kind under one load differ by less, and a spinning one syncs 8 MiB in half of it.
SLOW_SECONDS = 0.25
SLOW_FACTOR = 4


class Verdict(NamedTuple):
    """``mute``: do not answer, or their disks hang; ``slow``: answer late. Others do better."""

    mute: frozenset[int]
    slow: frozenset[int]


def judge(readings: Mapping[int, Reading]) -> Verdict:
    """The servers that hold up others."""
    mute = frozenset(server for server in readings if _is_mute(server, readings))
    slow = frozenset(server for server in readings if server not in mute and _is_slow(server, readings))
    return Verdict(mute, slow)


def _is_mute(server: int, readings: Mapping[int, Reading]) -> bool:
    mine = readings[server]
    others = [reading for other, reading in readings.items() if other != server and reading.answers]
    if mine.silent_seconds >= SILENT_SECONDS:
        return bool(others)
    return mine.disk_seconds >= HUNG_SECONDS and any(
        other.disk_seconds * SLOW_FACTOR < mine.disk_seconds for other in others
    )


def _is_slow(server: int, readings: Mapping[int, Reading]) -> bool:
    cost = readings[server].cost_seconds
    if cost is None or cost < SLOW_SECONDS:
        return False
    rivals = [r.cost_seconds for other, r in readings.items() if other != server and r.cost_seconds is not None]
    return any(rival * SLOW_FACTOR < cost for rival in rivals)

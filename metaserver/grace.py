"""How long DEAD chunks are kept before they are deleted. In memory, synchronous.

The grace is for a metaserver that is put back to an earlier state by hand, and for readers with an old map, who ask
again. It is short where space is pressing. And what is kept may take up only a part of all that is stored: somebody
who overwrites a small file at full speed would otherwise fill the disks with what he has written in ten minutes.
"""

from collections.abc import Iterator
from typing import NamedTuple

from metaserver.space import MOST_KEPT_BYTES, MOST_KEPT_PART, SHORT_GRACE_SECONDS


class _Dead(NamedTuple):
    """Since when, as far as this metaserver knows, and the bytes of disk that all its replicas take up."""

    since: float
    bytes: int


class Graces:
    """Invariant: ``_dead`` has the chunks that are kept, those that have been for longest first, and ``kept_bytes`` is
    the sum of their bytes; ``_released`` those that need not be any more. Times are on the lived clock."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._short_seconds = min(seconds, SHORT_GRACE_SECONDS)
        self._dead: dict[int, _Dead] = {}
        self._released: set[int] = set()
        self.kept_bytes = 0

    def __iter__(self) -> Iterator[int]:
        """All that is known to be DEAD."""
        yield from self._dead
        yield from self._released

    def died(self, chunk: int, disk_bytes: int, now: float) -> None:
        """A DEAD chunk was looked at, perhaps not for the first time."""
        if chunk not in self._dead and chunk not in self._released:
            self._dead[chunk] = _Dead(now, disk_bytes)
            self.kept_bytes += disk_bytes

    def forget(self, chunk: int) -> None:
        """It is gone."""
        self._released.discard(chunk)
        dead = self._dead.pop(chunk, None)
        if dead is not None:
            self.kept_bytes -= dead.bytes

    def let_go(self, chunk: int) -> None:
        """A DEAD chunk need not be kept any longer: somebody has said so."""
        self.forget(chunk)
        self._released.add(chunk)

    def due(self, chunk: int, *, pressing: bool) -> float:
        """When it may be deleted from a server on which space is ``pressing`` or not."""
        dead = self._dead.get(chunk)
        if dead is None:
            return 0.0
        return dead.since + (self._short_seconds if pressing else self._seconds)

    def release(self, stored: int, now: float) -> list[int]:
        """Those that need not be kept any longer because what is kept takes up too much of the ``stored`` bytes on all
        servers; the oldest go first."""
        most = max(MOST_KEPT_BYTES, stored // MOST_KEPT_PART)
        released = []
        left = self.kept_bytes
        for chunk, dead in self._dead.items():
            if left <= most or dead.since + self._short_seconds > now:
                break
            released.append(chunk)
            left -= dead.bytes
        for chunk in released:
            self.forget(chunk)
        self._released.update(released)
        return released

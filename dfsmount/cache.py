"""Verified bytes of chunks, in memory. Chunks never change, so nothing here is ever stale. Synchronous."""

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from typing import NamedTuple

from metaserver.wire import Buffer

# What an entry takes beside its bytes.
ENTRY_COST = 512


class Run(NamedTuple):
    """Blocks that follow each other in a chunk, from chunk offset ``start`` on, as they came in one answer."""

    start: int
    data: Buffer

    @property
    def stop(self) -> int:
        return self.start + len(self.data)


class BlockCache:
    """At most ``limit_bytes`` of runs of verified blocks, the least recently used evicted first.

    A run is kept and evicted as a whole, because its blocks share one buffer. Invariants: ``size`` is the sum of the
    costs of ``_runs``; ``_starts`` has, sorted, exactly the starts of each chunk's runs. Runs may overlap.
    """

    def __init__(self, limit_bytes: int = 64 << 20) -> None:
        self.limit_bytes = limit_bytes
        self.size = 0
        self.hits = 0
        self.misses = 0
        self._runs: OrderedDict[tuple[int, int], Run] = OrderedDict()
        self._starts: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self._runs)

    def find(self, chunk: int, offset: int) -> Run | None:
        """The run that holds the byte at chunk offset ``offset``."""
        starts = self._starts.get(chunk)
        if starts is not None:
            at = bisect_right(starts, offset) - 1
            if at >= 0:
                key = (chunk, starts[at])
                run = self._runs[key]
                if run.start + len(run.data) > offset:
                    self._runs.move_to_end(key)
                    self.hits += 1
                    return run
        self.misses += 1
        return None

    def has(self, chunk: int, start: int, stop: int) -> int:
        """Up to where all bytes from ``start`` on are here, at most ``stop``; does not count as a use."""
        starts = self._starts.get(chunk)
        while starts and start < stop:
            at = bisect_right(starts, start) - 1
            end = self._runs[chunk, starts[at]].stop if at >= 0 else 0
            if end <= start:
                break
            start = end
        return min(start, stop)

    def put(self, chunk: int, run: Run) -> None:
        """Keeps a run, in place of one with the same start if that is not longer."""
        old = self._runs.get((chunk, run.start))
        if old is not None:
            if old.stop >= run.stop:
                return
            self._remove(chunk, run.start)
        self._runs[chunk, run.start] = run
        starts = self._starts.setdefault(chunk, [])
        starts.insert(bisect_left(starts, run.start), run.start)
        self.size += len(run.data) + ENTRY_COST
        while self.size > self.limit_bytes and self._runs:
            oldest = next(iter(self._runs))
            self._remove(*oldest)

    def forget(self, chunk: int) -> None:
        """Drops what is kept of a chunk (it no longer exists)."""
        for start in tuple(self._starts.get(chunk, ())):
            self._remove(chunk, start)

    def clear(self) -> None:
        self._runs.clear()
        self._starts.clear()
        self.size = 0

    def _remove(self, chunk: int, start: int) -> None:
        run = self._runs.pop((chunk, start))
        self.size -= len(run.data) + ENTRY_COST
        starts = self._starts[chunk]
        del starts[bisect_left(starts, start)]
        if not starts:
            del self._starts[chunk]

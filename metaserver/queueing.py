"""A priority queue of chunks, each in it once, whose urgency may change while it waits. Pure."""

import heapq
from collections.abc import Iterable
from typing import Generic, TypeVar

UrgencyT = TypeVar("UrgencyT")


class ChunkQueue(Generic[UrgencyT]):
    """Smaller is more urgent; of equals the smaller chunk comes first. What can do nothing before some time *rests*
    until then, and stands in nobody's way: otherwise those taken in each round could be the same few for ever.

    Invariant: a chunk that waits is in one of ``_urgency`` and ``_resting``; entries of ``_heap`` and ``_alarms`` that
    these do not confirm are stale and skipped.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[UrgencyT, int]] = []
        self._urgency: dict[int, UrgencyT] = {}
        self._alarms: list[tuple[float, int]] = []
        self._resting: dict[int, tuple[float, UrgencyT]] = {}

    def __len__(self) -> int:
        return len(self._urgency) + len(self._resting)

    def put(self, chunk: int, urgency: UrgencyT) -> None:
        """It waits for its turn, or rests on if it did."""
        if chunk in self._resting:
            self._resting[chunk] = (self._resting[chunk][0], urgency)
        elif self._urgency.get(chunk) != urgency:
            self._urgency[chunk] = urgency
            heapq.heappush(self._heap, (urgency, chunk))

    def rest(self, chunk: int, urgency: UrgencyT, until: float) -> None:
        """It waits, and its turn comes no sooner than ``until``, unless it is woken."""
        self._urgency.pop(chunk, None)
        self._resting[chunk] = (until, urgency)
        heapq.heappush(self._alarms, (until, chunk))

    def wake(self, chunks: Iterable[int]) -> None:
        """Those of them that rest do not any more."""
        for chunk in chunks:
            found = self._resting.pop(chunk, None)
            if found is not None:
                self.put(chunk, found[1])

    def discard(self, chunk: int) -> None:
        self._urgency.pop(chunk, None)
        self._resting.pop(chunk, None)

    def pop(self, now: float) -> tuple[int, UrgencyT] | None:
        """Takes the most urgent one out that does not rest."""
        while self._alarms and self._alarms[0][0] <= now:
            until, chunk = heapq.heappop(self._alarms)
            if self._resting.get(chunk, (None,))[0] == until:
                self.wake((chunk,))
        while self._heap:
            urgency, chunk = heapq.heappop(self._heap)
            if self._urgency.get(chunk) == urgency:
                del self._urgency[chunk]
                return chunk, urgency
        return None

"""A priority queue of chunks, each in it once, whose urgency may change while it waits. Pure."""

import heapq
from typing import Generic, TypeVar

UrgencyT = TypeVar("UrgencyT")


class ChunkQueue(Generic[UrgencyT]):
    """Smaller is more urgent; of equals the smaller chunk comes first.

    Invariant: ``_urgency`` has what waits; entries of ``_heap`` that it does not confirm are stale and skipped.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[UrgencyT, int]] = []
        self._urgency: dict[int, UrgencyT] = {}

    def __len__(self) -> int:
        return len(self._urgency)

    def put(self, chunk: int, urgency: UrgencyT) -> None:
        if self._urgency.get(chunk) != urgency:
            self._urgency[chunk] = urgency
            heapq.heappush(self._heap, (urgency, chunk))

    def discard(self, chunk: int) -> None:
        self._urgency.pop(chunk, None)

    def pop(self) -> tuple[int, UrgencyT] | None:
        """Takes the most urgent one out."""
        while self._heap:
            urgency, chunk = heapq.heappop(self._heap)
            if self._urgency.get(chunk) == urgency:
                del self._urgency[chunk]
                return chunk, urgency
        return None

"""How fast background work may go, and how fast it goes. Pure: times and bytes in, decisions and figures out."""

from collections import deque


class Pace:
    """Bytes a second for each of many servers.

    What is begun is charged at once; the next may begin when what was charged would have passed at that rate, or up to
    ``ahead_seconds`` earlier, because work is given out in rounds.
    """

    def __init__(self, bytes_per_second: float, ahead_seconds: float = 1.0) -> None:
        self.bytes_per_second = bytes_per_second
        self._ahead_seconds = ahead_seconds
        self._free_at: dict[int, float] = {}

    def ready(self, server: int, now: float) -> bool:
        return self._free_at.get(server, now) < now + self._ahead_seconds

    def charge(self, server: int, length: int, now: float) -> None:
        self._free_at[server] = max(now, self._free_at.get(server, now)) + length / self.bytes_per_second


class Meter:
    """Bytes done of late."""

    def __init__(self, window_seconds: float = 30.0) -> None:
        self._window_seconds = window_seconds
        self._done: deque[tuple[float, int]] = deque()
        self._bytes = 0

    def add(self, length: int, now: float) -> None:
        self._done.append((now, length))
        self._bytes += length
        self._trim(now)

    def bytes_per_second(self, now: float) -> float:
        self._trim(now)
        if not self._done:
            return 0.0
        return self._bytes / max(1.0, min(self._window_seconds, now - self._done[0][0] + 1.0))

    def _trim(self, now: float) -> None:
        while self._done and self._done[0][0] < now - self._window_seconds:
            self._bytes -= self._done.popleft()[1]

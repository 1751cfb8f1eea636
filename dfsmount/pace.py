"""How long reads take at each server lately: when to ask a second replica, and whom to ask last. Synchronous."""

from collections import deque

# A read is sent to a second replica after the 95th percentile of the quickest server, within these bounds; at the
# latest after the third figure while no two servers are known that could be compared.
HEDGE_LEAST_SECONDS, HEDGE_MOST_SECONDS, HEDGE_FIRST_SECONDS = 0.05, 1.0, 0.25
ENOUGH = 8
RECENT_READS = 64
# A server is slow whose median is over so many times that of the quickest, and over the least time of a hedge, which
# is what loses time; of so many reads at least. What is older than that counts no more: it is tried again.
SLOW_FACTOR = 4
SLOW_READS = 3
MEMORY_SECONDS = 30.0


class _Server:
    """Ends and lengths of reads, oldest first; ``median`` and ``slow_end`` (95th percentile) are of the newest."""

    __slots__ = ("count", "median", "recent", "slow_end")

    def __init__(self) -> None:
        self.recent: deque[tuple[float, float]] = deque(maxlen=RECENT_READS)
        self.count = 0
        self.median = self.slow_end = 0.0

    def note(self, now: float, seconds: float) -> None:
        self.recent.append((now, seconds))
        self.count += 1
        # Sorting costs 5 us: for each of the first, then for one of eight.
        if len(self.recent) < ENOUGH or self.count % 8 == 0:
            lengths = sorted(seconds for _, seconds in self.recent)
            self.median = lengths[len(lengths) // 2]
            self.slow_end = lengths[len(lengths) * 95 // 100]

    def is_fresh(self, now: float, count: int) -> bool:
        return len(self.recent) >= count and self.recent[-count][0] > now - MEMORY_SECONDS


class Pace:
    """Of all servers that were read from. Times in seconds of the caller's clock."""

    def __init__(self) -> None:
        self.hedge_seconds = HEDGE_FIRST_SECONDS
        self._servers: dict[int, _Server] = {}

    def note(self, server: int, seconds: float, now: float) -> None:
        """A read took so long there; or at least so long, when another was quicker."""
        mine = self._servers.get(server)
        if mine is None:
            mine = self._servers[server] = _Server()
        if mine.recent and not mine.is_fresh(now, 1):
            mine.recent.clear()
        mine.note(now, seconds)
        known = [server for server in self._servers.values() if server.is_fresh(now, ENOUGH)]
        if known:
            most = HEDGE_MOST_SECONDS if len(known) > 1 else HEDGE_FIRST_SECONDS
            slow_end = min(known, key=lambda server: server.median).slow_end
            self.hedge_seconds = min(max(slow_end, HEDGE_LEAST_SECONDS), most)

    def is_slow(self, server: int, now: float) -> bool:
        """Whether others are so much quicker that it had better be asked last."""
        mine = self._servers.get(server)
        if mine is None or mine.median < HEDGE_LEAST_SECONDS or not mine.is_fresh(now, SLOW_READS):
            return False
        others = [other for other in self._servers.values() if other.is_fresh(now, SLOW_READS)]
        return any(other.median * SLOW_FACTOR < mine.median for other in others)

"""Time as far as this process lived through it."""

import time

import msgspec

# A gap between two ticks beyond this is not time others were silent in: this process was stopped or starved.
LONGEST_TICK_SECONDS = 2.0


def steady_ns() -> int:
    """Nanoseconds of a clock that no setting of the time moves, and that goes on while the machine is suspended."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class LivedClock(msgspec.Struct):
    """Seconds this process has been awake, by calls of :meth:`tick`: deadlines of others are measured on it, so that
    a suspended metaserver does not evict everybody when it wakes."""

    seconds: float = 0.0
    _last: float | None = None

    def tick(self, now: float) -> None:
        """``now`` is a monotonic time in seconds; call about once a second."""
        if self._last is not None:
            self.seconds += min(max(0.0, now - self._last), LONGEST_TICK_SECONDS)
        self._last = now

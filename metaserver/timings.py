"""How long requests take, by kind: counters and histograms that cost a fraction of a microsecond each.

Bounds are powers of two of a nanosecond, so that the place of a duration is the length of an integer in bits: 16 us,
33 us, 66 us ... up to 69 s. ``exposition`` shows them by Prometheus' conventions.
"""

from collections import deque
from typing import NamedTuple

import msgspec

# The first bound is 2 ** 14 ns, the last 2 ** 36 ns; what takes longer is in the bucket after that.
FIRST_BIT = 14
BOUNDS = 23
BOUNDS_SECONDS = tuple((1 << (FIRST_BIT + at)) / 1e9 for at in range(BOUNDS))
# A thirtieth of a request of trouble: whoever asks for it waits visibly.
SLOW_SECONDS = 1.0
# Of each kind so many traced requests are remembered, for `dfs explain`.
RECENT = 512


class Traced(NamedTuple):
    """A request that was answered lately."""

    trace_id: int
    duration_ns: int


class Timing:
    """Requests of one kind. ``buckets`` has one more than there are bounds."""

    __slots__ = ("buckets", "count", "failed", "longest_ns", "recent", "total_ns")

    def __init__(self) -> None:
        self.buckets = [0] * (BOUNDS + 1)
        self.count = 0
        self.failed = 0
        self.total_ns = 0
        self.longest_ns = 0
        self.recent: deque[Traced] = deque(maxlen=RECENT)

    def add(self, duration_ns: int) -> None:
        """One more has taken so long: 0.2 us."""
        place = (duration_ns >> FIRST_BIT).bit_length()
        self.buckets[place if place < BOUNDS else BOUNDS] += 1
        self.count += 1
        self.total_ns += duration_ns
        if duration_ns > self.longest_ns:
            self.longest_ns = duration_ns

    def remember(self, trace_id: int, duration_ns: int) -> None:
        self.recent.append(Traced(trace_id, duration_ns))

    def quantile_seconds(self, share: float) -> float:
        """The bound below which that share of them stayed; the longest of all if that is lower; 0 for none."""
        wanted = share * self.count
        seen = 0
        for bound, count in zip(BOUNDS_SECONDS, self.buckets, strict=False):
            seen += count
            if seen >= wanted:
                return min(bound, self.longest_ns / 1e9)
        return self.longest_ns / 1e9


class Timings:
    """All kinds of requests of one program, made when first met; names come from our own tables, so they are few."""

    def __init__(self) -> None:
        self.by_name: dict[str, Timing] = {}

    def of(self, name: str) -> Timing:
        timing = self.by_name.get(name)
        if timing is None:
            timing = self.by_name[name] = Timing()
        return timing

    def summary(self) -> "list[Summary]":
        """Those that were met, the most time-consuming first."""
        met = [(name, timing) for name, timing in self.by_name.items() if timing.count]
        return [_summary(*each) for each in sorted(met, key=lambda each: -each[1].total_ns)]


class Summary(msgspec.Struct):
    """For people and programs; durations in seconds."""

    operation: str
    count: int
    failed: int
    total_seconds: float
    mean_seconds: float
    median_seconds: float
    p99_seconds: float
    longest_seconds: float


def _summary(name: str, timing: Timing) -> Summary:
    total = timing.total_ns / 1e9
    return Summary(
        name,
        timing.count,
        timing.failed,
        total,
        total / timing.count,
        timing.quantile_seconds(0.5),
        timing.quantile_seconds(0.99),
        timing.longest_ns / 1e9,
    )

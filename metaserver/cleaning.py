"""Which chunks are worth rewriting, and where their bytes have gone. Pure.

A sealed chunk never changes, so the space of bytes that nothing refers to any more comes back only with the whole
chunk. What is still live of mostly dead chunks is therefore collected in a new one, and the old ones die.

A chunk is *worth* cleaning if what its live bytes would take up in company is less than a share of what it takes up on
a disk; so a new chunk, however small its blocks, is not worth it until some of it has died. Among those the cleaner
prefers, as log-structured file systems do (Rosenblum and Ousterhout, 1992, 3.6), what frees most for its cost, and what
is old: young data may soon die by itself. Little chunks are worth it even if all of them is live, but only many of them
at once, so that each byte is rewritten once for every sixteenfold growth.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from heapq import nlargest
from typing import NamedTuple

from metaserver.protocol import CHUNK_CAPACITY

# Of chunkserver/chunkfile.py: what a chunk file takes up besides its payload.
PAGE_BYTES = 4096
HEADER_BYTES = 4096
ENTRY_BYTES = 64
# Share of its space that a chunk must still need to be left alone: usage settles below 1/0.6 of what is live. When
# space is short more work is worth it.
WORTH, WORTH_WHEN_SHORT = 0.6, 0.85
# Chunks of this size are merged, when there are so many of them.
SMALL_BYTES = 256 << 10
SMALL_GROUP = 16
# Less is not freed by one order unless it merges a group: the order itself costs two dozen exchanges.
LEAST_GAIN = 1 << 20
# Sources of one order: each has an index to be read.
MOST_SOURCES = 64
# How much faster the cleaner may go when space is short, and when it lags behind by twice this share of all that is
# stored.
HASTE, LAG = 4.0, 0.2
# Candidates of which a group is chosen.
_FIELD = 256
_YOUNGEST_SECONDS, _OLDEST_SECONDS = 60.0, 86400.0

Range = tuple[int, int]


class Usage(NamedTuple):
    """What is known of a sealed chunk; bytes at one copy."""

    chunk: int
    length: int
    entries: int
    live: int
    copies: int
    created_ns: int

    @property
    def disk(self) -> int:
        """Bytes its file takes up."""
        return disk_bytes(self.length, self.entries)

    @property
    def needed(self) -> int:
        """Bytes that its live ones take up among others in a chunk."""
        entries = -(-self.entries * self.live // self.length) if self.length else 0
        return self.live + entries * ENTRY_BYTES

    @property
    def gain(self) -> int:
        return self.disk - self.needed

    @property
    def small(self) -> bool:
        return self.disk <= SMALL_BYTES

    def worth(self, share: float) -> bool:
        return self.live > 0 and self.needed < share * self.disk


def disk_bytes(length: int, entries: int) -> int:
    """Bytes that a chunk file of so many stored bytes and entries takes up."""
    return HEADER_BYTES + _pages(entries * ENTRY_BYTES) + _pages(length)


def _pages(length: int) -> int:
    return -(-length // PAGE_BYTES) * PAGE_BYTES


def choose(candidates: Iterable[Usage], now_ns: int, room: int, *, short: bool = False) -> list[Usage]:
    """Chunks to put into one new chunk, whose live bytes fit into ``room``; empty if nothing is worth it now.

    All want the same number of copies. ``short``: space is, so that less gain is worth more work.
    """
    share = WORTH_WHEN_SHORT if short else WORTH
    alike: defaultdict[int, list[Usage]] = defaultdict(list)
    for usage in candidates:
        alike[usage.copies].append(usage)
    groups = [_group(found, now_ns, room, share) for found in alike.values()]
    best = max(groups, key=_total_gain, default=[])
    return best or max((_merge(found, room) for found in alike.values()), key=len, default=[])


def _group(found: Iterable[Usage], now_ns: int, room: int, share: float) -> list[Usage]:
    """The best of what is mostly dead."""
    worth = nlargest(
        _FIELD, (usage for usage in found if usage.worth(share)), key=lambda usage: _benefit(usage, now_ns)
    )
    group = _fitting(worth, room)
    return group if enough(group) else []


def enough(group: Sequence[Usage]) -> bool:
    """Whether it is worth an order to put these into one chunk."""
    return _total_gain(group) >= LEAST_GAIN or len(group) >= SMALL_GROUP


def _merge(found: Iterable[Usage], room: int) -> list[Usage]:
    group = _fitting([usage for usage in found if usage.small], room)
    return group if len(group) >= SMALL_GROUP else []


def _fitting(usages: Iterable[Usage], room: int) -> list[Usage]:
    group: list[Usage] = []
    room = min(room, CHUNK_CAPACITY)
    for usage in usages:
        if usage.needed <= room:
            group.append(usage)
            room -= usage.needed
            if len(group) == MOST_SOURCES:
                break
    return group


def _benefit(usage: Usage, now_ns: int) -> float:
    age = min(max((now_ns - usage.created_ns) / 1e9, _YOUNGEST_SECONDS), _OLDEST_SECONDS)
    return age * usage.gain / (usage.disk + usage.needed)


def _total_gain(group: Sequence[Usage]) -> int:
    return sum(usage.gain for usage in group)


def best(candidates: Iterable[Usage], count: int) -> list[Usage]:
    """The ``count`` of them that are most worth remembering: what is worth an order soon, then what frees most."""

    def urgency(usage: Usage) -> tuple[bool, float]:
        return usage.worth(WORTH) or usage.small, usage.gain / (usage.disk + usage.needed)

    return nlargest(count, candidates, key=urgency)


def haste(dead: int, stored: int) -> float:
    """How many times faster than usual the cleaner may go if it could free ``dead`` of ``stored`` bytes: the more it
    lags behind those who overwrite, the faster, so that disks never hold much more than twice what is live."""
    share = dead / stored if stored else 0.0
    return min(max(1.0, 1.0 + (share - LAG) / LAG * (HASTE - 1.0)), HASTE)


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes as few sorted, disjoint ranges; ``ranges`` are sorted by their starts."""
    found: list[Range] = []
    for start, stop in ranges:
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return found


class Moves:
    """Where the bytes of old chunks are in the new one."""

    def __init__(self, moves: Iterable[tuple[int, int, int, int]], length: int) -> None:
        """``moves`` as in ``protocol.OrderResult``; ``length`` is the new chunk's. ValueError if they are impossible: a
        row must never point to bytes that are not there."""
        self._moves: dict[int, list[tuple[int, int, int]]] = {}
        for chunk, start, count, to in sorted(moves):
            known = self._moves.setdefault(chunk, [])
            overlaps = bool(known) and known[-1][0] + known[-1][1] > start
            if count <= 0 or start < 0 or to < 0 or to + count > length or overlaps:
                raise ValueError(f"{count} bytes of chunk {chunk:x} at {start} cannot have gone to {to}")
            known.append((start, count, to))

    def find(self, chunk: int, start: int, length: int) -> list[tuple[int, int]] | None:
        """Where ``length`` bytes of an old chunk are: (offset in the new one, length), in order; None unless all
        are."""
        known = self._moves.get(chunk, [])
        found: list[tuple[int, int]] = []
        at = bisect_right(known, start, key=lambda move: move[0]) - 1
        end = start + length
        while start < end:
            if not 0 <= at < len(known) or not known[at][0] <= start < known[at][0] + known[at][1]:
                return None
            first, count, to = known[at]
            piece = min(end, first + count) - start
            to += start - first
            if found and found[-1][0] + found[-1][1] == to:
                found[-1] = found[-1][0], found[-1][1] + piece
            else:
                found.append((to, piece))
            start += piece
            at += 1
        return found

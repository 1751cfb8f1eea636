"""What to fetch before it is asked for. Pure: offsets in, ranges out.

One :class:`ReadAhead` follows one reader: a file handle through a file, or a walk over small files through a chunk.
"""

from collections import OrderedDict

# As the kernel's own: one request's worth first, doubled as long as reading goes on in order.
FIRST_WINDOW = 128 << 10
LARGEST_WINDOW = 16 << 20
# The kernel keeps up to eight requests of 128 KiB in flight and they arrive in any order.
FILE_SLACK = 1 << 20
# Small files of a tree lie one after another, with some between them that are not read now.
NEIGHBOUR_GAP = 64 << 10
NEIGHBOUR_SLACK = 256 << 10
NEIGHBOUR_WINDOW = 4 << 20
# Walks that are followed at a time: several programs may read different trees.
WALKS = 16


class ReadAhead:
    """``limit`` bounds the window; ``gap`` is how far behind the end of the last read a next read may start to count
    as going on, ``slack`` how far from it, either way, once it does. All in bytes."""

    __slots__ = ("_expected", "_fetched", "_gap", "_limit", "_slack", "window")

    def __init__(
        self, limit: int = LARGEST_WINDOW, *, gap: int = 0, slack: int = FILE_SLACK, expected: int = 0
    ) -> None:
        self._limit = limit
        self._gap = gap
        self._slack = slack
        self._expected = expected
        self._fetched = 0
        self.window = 0

    def advance(self, offset: int, length: int) -> tuple[int, int]:
        """Notes a read; the range to fetch now beyond it, empty (0, 0) if there is none.

        The window opens with the second read in order (a read at the start of a file is in order), and more is
        asked for when half of it is used up. Any other read closes it.
        """
        if not self._goes_on(offset):
            self.window = self._fetched = 0
            self._expected = offset + length
            return 0, 0
        self._expected = max(self._expected, offset + length)
        if not self.window:
            self.window = min(FIRST_WINDOW, self._limit)
        elif self._fetched - self._expected >= self.window // 2:
            return 0, 0
        else:
            self.window = min(2 * self.window, self._limit)
        start = max(self._fetched, self._expected)
        self._fetched = self._expected + self.window
        return (start, self._fetched) if start < self._fetched else (0, 0)

    def _goes_on(self, offset: int) -> bool:
        distance = offset - self._expected
        return -self._slack <= distance <= self._slack if self.window else 0 <= distance <= self._gap


class Neighbours:
    """Small files read one after another lie one after another in a chunk: fetches what follows them there."""

    def __init__(self, limit: int = NEIGHBOUR_WINDOW) -> None:
        self._limit = limit
        self._walks: OrderedDict[int, ReadAhead] = OrderedDict()

    def advance(self, chunk: int, offset: int, length: int) -> tuple[int, int]:
        """Notes that a small file was read at ``offset`` of ``chunk``; the range of that chunk to fetch as well."""
        walk = self._walks.get(chunk)
        if walk is None:
            if len(self._walks) >= WALKS:
                self._walks.popitem(last=False)
            walk = ReadAhead(self._limit, gap=NEIGHBOUR_GAP, slack=NEIGHBOUR_SLACK, expected=offset + length)
            self._walks[chunk] = walk
            return 0, 0
        self._walks.move_to_end(chunk)
        return walk.advance(offset, length)

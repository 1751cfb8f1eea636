"""Ids that are never used twice. Pure.

Ids come from ranges. The end of a range is a COUNTERS row that is durable before the first id of the range is used; a
start skips what was left of the ranges before it. So an id that a crash made us forget is never given out again.
"""

from metaserver.overlay import row_key
from metaserver.schema import ID_LIMITS, IdKind, Table, key_u64, read_u64

# The root inode is 1 and made without asking; 0 means "none".
FIRST_IDS = {IdKind.INODE: 2, IdKind.CHUNK: 1, IdKind.SESSION: 1, IdKind.TASK: 1}
# At 20,000 creations a second a range of inodes lasts three seconds, and the next one is reserved when half is used.
# Of a 48-bit space, a thousand starts a day for ten years use one part in a thousand.
RANGES = {IdKind.INODE: 65_536, IdKind.CHUNK: 4_096, IdKind.SESSION: 256, IdKind.TASK: 4_096}


def limit_key(kind: IdKind) -> bytes:
    """The row key of the end of a kind's durable range."""
    return row_key(Table.COUNTERS, ID_LIMITS[kind])


def limit_of(kind: IdKind, value: bytes | None) -> int:
    """What the row of :func:`limit_key` says."""
    return FIRST_IDS[kind] if value is None else read_u64(value)


class IdsUsedUp(Exception):
    """The change has to be tried again once another range is durable."""

    def __init__(self, kind: IdKind) -> None:
        super().__init__(kind.name)
        self.kind = kind


class _Range:
    __slots__ = ("limit", "next", "reserved", "reserved_by")

    def __init__(self, first: int, limit: int) -> None:
        self.next = first
        # Ids below are durable; ids below ``reserved`` will be once the change ``reserved_by`` is (0: is none).
        self.limit = limit
        self.reserved = limit
        self.reserved_by = 0


class Ids:
    """The ranges of one epoch. ``wanting`` are kinds of which another range should be reserved."""

    def __init__(self, first: dict[IdKind, int]) -> None:
        """``first`` of each kind begins a range that is durable."""
        self._ranges = {kind: _Range(number, number + RANGES[kind]) for kind, number in first.items()}
        self._first = first
        self.wanting: dict[IdKind, None] = {}

    def next_limit(self, kind: IdKind) -> int:
        """The end of the range to reserve now."""
        return self._ranges[kind].reserved + RANGES[kind]

    def reserve_row(self, kind: IdKind) -> tuple[bytes, bytes]:
        """The row that reserves another range."""
        return limit_key(kind), key_u64(self.next_limit(kind))

    def reserved(self, kind: IdKind, number: int) -> None:
        """The change ``number`` contains the row of :meth:`reserve_row`."""
        ids = self._ranges[kind]
        ids.reserved += RANGES[kind]
        ids.reserved_by = number
        self.wanting.pop(kind, None)

    def durable(self, number: int) -> None:
        """Changes up to ``number`` are durable."""
        for ids in self._ranges.values():
            if 0 < ids.reserved_by <= number:
                ids.limit = ids.reserved
                ids.reserved_by = 0

    def first(self, kind: IdKind) -> int:
        """Ids of earlier epochs are below it."""
        return self._first[kind]

    def limit(self, kind: IdKind) -> int:
        """Every id in use is below it, durably."""
        return self._ranges[kind].limit

    def is_reserved(self, kind: IdKind) -> bool:
        """Whether a further range waits to become durable."""
        return self._ranges[kind].reserved_by > 0

    def take(self, kind: IdKind) -> int:
        """The next id; raises :class:`IdsUsedUp` if the durable range is used up."""
        ids = self._ranges[kind]
        number = ids.next
        if number >= ids.limit:
            raise IdsUsedUp(kind)
        ids.next = number + 1
        if ids.limit - number < RANGES[kind] // 2 and not ids.reserved_by:
            self.wanting[kind] = None
        return number

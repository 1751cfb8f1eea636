"""Which records of the changelog count after a crash. Pure; see design section 5.2.

Files lose what was not synced, and not in the order in which it was written: after a power cut a record may be missing
although a later one is there. The rules, for one epoch:

* Records count as far as their numbers follow one another. What comes after the first that is missing does not count.
* If any later record says that the missing one was durable, the log is *damaged*: someone may have been promised what
  is missing. :class:`CorruptLog`; nothing is served.
* Otherwise it is a *torn tail*: nobody was promised it. It is cut, and reported.
* The segments of a newer epoch say where this one ended. The records up to there must be whole (that epoch was built
  upon them), and those past it are what was cut then.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from metaserver.logrecord import Position, Record


class CorruptLog(Exception):
    """The changelog is damaged or incomplete below what was promised. The text says where."""


class EpochLog(NamedTuple):
    """One epoch in the log: where the one before ended, and its records as far as they can be read, in order."""

    epoch: int
    previous: Position
    records: Iterable[Record]


class Replayed(NamedTuple):
    """``end`` is the newest change that counts, ``ends`` the last number of every epoch met, ``changes`` how many were
    applied, ``cut`` how many whole records came after a missing one, ``time_ns`` the newest time of a change."""

    end: Position
    ends: dict[int, int]
    changes: int
    cut: int
    time_ns: int


class _Counter:
    def __init__(self, apply: Callable[[Record], None]) -> None:
        self.apply = apply
        self.changes = 0
        self.cut = 0
        self.time_ns = 0

    def take(self, record: Record) -> None:
        self.apply(record)
        self.changes += 1
        self.time_ns = max(self.time_ns, record.time_ns)


def replay(start: Position, epochs: list[EpochLog], apply: Callable[[Record], None]) -> Replayed:
    """Applies every record after ``start`` that counts, in order; raises :class:`CorruptLog`.

    ``epochs`` are in order. ``start`` (0, 0) is an empty store.
    """
    position = start
    ends: dict[int, int] = {}
    counter = _Counter(apply)
    for index, log in enumerate(epochs):
        if log.epoch < position.epoch:
            continue
        if log.epoch > position.epoch:
            if log.previous != position:
                raise CorruptLog(f"the changelog lacks the changes between {position} and {log.previous}")
            position = Position(log.epoch, 0)
        declared = epochs[index + 1].previous if index + 1 < len(epochs) else None
        position = _replay_epoch(position, log, declared, counter)
        ends[position.epoch] = position.number
    if position.epoch and position.epoch not in ends:
        raise CorruptLog(f"the changelog of epoch {position.epoch} is missing")
    return Replayed(position, ends, counter.changes, counter.cut, counter.time_ns)


def _replay_epoch(start: Position, log: EpochLog, declared: Position | None, counter: _Counter) -> Position:
    records = iter(log.records)
    number, gap = _apply_while_whole(start, records, declared, counter)
    if declared is not None:
        if declared != (log.epoch, number):
            raise CorruptLog(f"change {log.epoch}/{number + 1} is damaged; the epoch went on to {declared}")
        return declared
    durable = _skip_rest(gap, records, counter)
    if durable > number:
        raise CorruptLog(f"change {log.epoch}/{number + 1} is damaged although changes up to {durable} were durable")
    return Position(log.epoch, number)


def _apply_while_whole(
    start: Position, records: Iterator[Record], declared: Position | None, counter: _Counter
) -> tuple[int, Record | None]:
    """The last number that counts, and the record after the gap that ended it."""
    number = start.number
    for record in records:
        if record.number <= number:
            continue
        if record.number != number + 1 or (declared is not None and number >= declared.number):
            return number, record
        counter.take(record)
        number = record.number
    return number, None


def _skip_rest(gap: Record | None, records: Iterator[Record], counter: _Counter) -> int:
    """The newest number that anything after the gap calls durable."""
    if gap is None:
        return 0
    durable = gap.durable
    counter.cut += 1
    for record in records:
        durable = max(durable, record.durable)
        counter.cut += 1
    return durable

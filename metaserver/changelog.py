"""The changelog's files: appending, syncing, rotating, keeping what recovery needs. Formats: ``logrecord.py``.

The segment after the current one is made ahead (in a worker thread), so that an append never waits for it, and so that
a full disk is known while a whole segment is still free for deletions.

Threads: :meth:`Changelog.sync` and :meth:`Changelog.prepare` run in worker threads, everything else in that of the
event loop. A sync touches nothing that an append changes; the next segment is handed over under a lock.
"""

import os
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from metaserver.files import Files, is_full
from metaserver.logrecord import (
    ALIGNMENT,
    FIRST_RECORD,
    SEGMENT_BYTES,
    Position,
    Record,
    SegmentHeader,
    checksum_seed,
    decode_segment,
    encode_record,
    find_records,
)
from metaserver.overlay import Rows
from metaserver.replay import CorruptLog, EpochLog

SUFFIX = ".log"


class LogFull(Exception):
    """There is no space for the record: it was not written, nothing has changed."""


def segment_name(segment: int) -> str:
    return f"{segment:016x}{SUFFIX}"


class KeptSegment:
    """A segment on disk. ``first`` is the number of its first record, 0 if it has none."""

    __slots__ = ("first", "header", "path")

    def __init__(self, path: Path, header: SegmentHeader, first: int = 0) -> None:
        self.path = path
        self.header = header
        self.first = first

    def read(self) -> bytes:
        return self.path.read_bytes()

    def records(self) -> Iterator[Record]:
        return decode_segment(self.read(), self.header.segment)


class OpenSegment(KeptSegment):
    """A segment that is appended to. ``end`` is where the next record goes."""

    __slots__ = ("descriptor", "end", "seed", "size")

    def __init__(self, path: Path, header: SegmentHeader, descriptor: int, size: int) -> None:
        super().__init__(path, header)
        self.descriptor = descriptor
        self.size = size
        self.end = FIRST_RECORD
        self.seed = checksum_seed(header.segment)


def list_segments(directory: Path) -> list[KeptSegment]:
    """All segments, in order; raises :class:`CorruptLog` if one has no valid header. Leftovers are ignored."""
    found = []
    for path in sorted(directory.glob("*" + SUFFIX)):
        with path.open("rb") as file:
            header = SegmentHeader.unpack(file.read(FIRST_RECORD))
        if header is None or header.segment != int(path.stem, 16):
            raise CorruptLog(f"{path} does not start with the header of its segment")
        found.append(KeptSegment(path, header))
    for before, after in pairwise(found):
        if after.header.epoch < before.header.epoch:
            raise CorruptLog(f"{after.path} is of an older epoch than {before.path}")
    return found


def find_firsts(segments: list[KeptSegment]) -> None:
    """Fills in ``first`` of segments from disk: reads little of each."""
    for segment in segments:
        with segment.path.open("rb") as file:
            head = file.read(FIRST_RECORD + (64 << 10))
        record = next(decode_segment(head, segment.header.segment), None)
        if record is None:
            record = next(segment.records(), None)
        segment.first = record.number if record else 0


def epoch_logs(segments: list[KeptSegment], start: Position) -> list[EpochLog]:
    """What ``replay.replay`` needs: one log per epoch, read lazily; segments that end at or before ``start`` are
    skipped."""
    logs: list[EpochLog] = []
    position = 0
    while position < len(segments):
        epoch = segments[position].header.epoch
        group = [segment for segment in segments[position:] if segment.header.epoch == epoch]
        position += len(group)
        useful = group[_first_useful(group, start) :]
        logs.append(EpochLog(epoch, group[0].header.previous, _all_records(useful)))
    return logs


def _first_useful(group: list[KeptSegment], start: Position) -> int:
    if group[0].header.epoch != start.epoch:
        return 0
    return max((index for index, segment in enumerate(group) if 0 < segment.first <= start.number), default=0)


def _all_records(segments: list[KeptSegment]) -> Iterator[Record]:
    for segment in segments:
        yield from segment.records()


def trim(segments: list[KeptSegment], files: Files) -> list[KeptSegment]:
    """Gives back the unwritten rest of segments of older epochs, and those that say nothing: a server that crashes
    again and again must not fill its disk. Returns the segments that are left."""
    left = []
    for index, segment in enumerate(segments):
        used = _used_bytes(segment)
        first_of_epoch = index == 0 or segments[index - 1].header.epoch != segment.header.epoch
        if used == FIRST_RECORD and not first_of_epoch:
            files.delete(segment.path)
            continue
        if used is not None:
            files.truncate(segment.path, used)
        left.append(segment)
    return left


def _used_bytes(segment: KeptSegment) -> int | None:
    """Where the unwritten rest of a segment begins; None if there is hardly any."""
    with segment.path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - FIRST_RECORD))
        if file.read().strip(b"\0"):
            return None
    data = segment.read()
    # A record may end with zeroes, and something unreadable may come after the last one.
    end = max((end for _, end in find_records(data, segment.header.segment)), default=FIRST_RECORD)
    last = len(data.rstrip(b"\0"))
    return max(end, last + -last % ALIGNMENT)


class Changelog:
    """The log of one epoch, being written, and the older segments that are kept for recovery."""

    def __init__(
        self,
        directory: Path,
        kept: list[KeptSegment],
        epoch: int,
        previous: Position,
        files: Files,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        """Makes the epoch's first segment durably; raises ``OSError``. ``kept`` are all segments there are."""
        self._directory = directory
        self._files = files
        self._epoch = epoch
        self._previous = previous
        self._segment_bytes = segment_bytes
        self.kept = kept
        self._last_id = kept[-1].header.segment if kept else 0
        self._current = self._create()
        self.kept.append(self._current)
        # Bytes of records since the newest snapshot file, which takes its share away.
        self.appended = 0
        # Made ahead; None while it is being made, or if the disk is full.
        self._next: OpenSegment | None = None
        self._preparing = threading.Lock()
        # Written to since the last sync that covered them; the current one is the last.
        self._unsynced: list[OpenSegment] = []

    def _create(self) -> OpenSegment:
        header = SegmentHeader(self._last_id + 1, self._epoch, self._previous)
        path = self._directory / segment_name(header.segment)
        descriptor = self._files.create(path, header.pack(), self._segment_bytes)
        self._last_id += 1
        return OpenSegment(path, header, descriptor, self._segment_bytes)

    @property
    def prepared(self) -> bool:
        """Whether the next segment is there."""
        return self._next is not None

    def prepare(self) -> None:
        """Makes the next segment if there is none; raises :class:`LogFull`, or ``OSError`` when the disk fails. In a
        worker thread, normally."""
        with self._preparing:
            if self._next is None:
                try:
                    self._next = self._create()
                except OSError as error:
                    if is_full(error):
                        raise LogFull from error
                    raise

    def append(self, number: int, durable: int, session: int, operation: int, time_ns: int, rows: Rows) -> None:
        """Writes one record to the page cache. Raises :class:`LogFull` with nothing written if another segment is
        needed and there is no space for it, or ``OSError``, after which the log must not be used any more."""
        segment = self._current
        record = encode_record(segment.seed, self._epoch, number, durable, session, operation, time_ns, rows)
        if segment.end + len(record) > segment.size:
            segment = self._rotate(len(record))
            record = encode_record(segment.seed, self._epoch, number, durable, session, operation, time_ns, rows)
        self._files.append(segment.descriptor, record, segment.end)
        segment.end += len(record)
        self.appended += len(record)
        if not segment.first:
            segment.first = number
        if not self._unsynced or self._unsynced[-1] is not segment:
            self._unsynced.append(segment)

    def _rotate(self, length: int) -> OpenSegment:
        if length > self._segment_bytes - FIRST_RECORD:
            raise ValueError(f"a record of {length} bytes does not fit into a segment")
        # Only if a whole segment was filled while the next one was made: waits for it, or makes it here.
        self.prepare()
        assert self._next is not None
        old = self._current
        self._current = self._next
        self._next = None
        self.kept.append(self._current)
        if old not in self._unsynced:
            self._files.close(old.descriptor)
        return self._current

    def unsynced(self) -> tuple[tuple[OpenSegment, int], ...]:
        """What :meth:`sync` must cover for everything appended so far to be durable, and how far each segment goes."""
        return tuple((segment, segment.end) for segment in self._unsynced)

    def sync(self, batch: tuple[tuple[OpenSegment, int], ...]) -> None:
        """Syncs segments; raises ``OSError``, after which the log must not be used any more."""
        for segment, _ in batch:
            self._files.sync(segment.descriptor)

    def synced(self, batch: tuple[tuple[OpenSegment, int], ...]) -> None:
        """Segments that are full are done with, unless they were appended to while they were synced. Only for whoever
        syncs regularly, after each sync."""
        for segment, end in batch:
            if segment is not self._current and segment.end == end and segment in self._unsynced:
                self._unsynced.remove(segment)
                self._files.close(segment.descriptor)

    def drop(self, position: Position) -> int:
        """Deletes the oldest segments, as far as all their changes are at or before ``position``; returns how many."""
        count = 0
        while len(self.kept) > 1 and _ends_by(self.kept[0], self.kept[1], position):
            self._files.delete(self.kept.pop(0).path)
            count += 1
        return count

    def close(self) -> None:
        for segment in {self._current, self._next, *self._unsynced} - {None}:
            if segment is not None:
                self._files.close(segment.descriptor)
        self._unsynced.clear()


def _ends_by(segment: KeptSegment, following: KeptSegment, position: Position) -> bool:
    """Whether all changes of ``segment`` are at or before ``position``; False if that cannot be told."""
    epoch = segment.header.epoch
    if following.header.epoch > epoch:
        return following.header.previous <= position
    return position.epoch > epoch or (position.epoch == epoch and 0 < following.first <= position.number + 1)

"""The changelog's files: appending, syncing, rotating, keeping what recovery needs. Formats: ``logrecord.py``.

The segment after the current one is made ahead (in a worker thread), so that an append never waits for it, and so that
a full disk is known while a whole segment is still free for deletions.

Threads: :meth:`Changelog.sync` and :meth:`Changelog.prepare` run in worker threads, everything else in that of the
event loop. A sync touches nothing that an append changes; the next segment is handed over under a lock.
"""

import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import structlog

from metaserver.files import Files, is_full, naming
from metaserver.logrecord import (
    ALIGNMENT,
    FIRST_RECORD,
    SEGMENT_BYTES,
    UNKNOWN,
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

log = structlog.get_logger(__name__)

SUFFIX = ".log"
# On a full disk a segment may be this part of a usual one.
SMALLEST_PART = 16


class LogFull(Exception):
    """There is no space for the record: nothing has changed."""


class NoBlocks(LogFull):
    """Not even for a record within a segment, whose space was set aside: where blocks are copied when they are written
    that is no promise."""


def segment_name(segment: int) -> str:
    return f"{segment:016x}{SUFFIX}"


class KeptSegment:
    """A segment on disk. ``first`` is the number of its first record, 0 if it has none; ``begun``: it will be there
    after a power cut, too."""

    __slots__ = ("begun", "first", "header", "path")

    def __init__(self, path: Path, header: SegmentHeader, first: int = 0) -> None:
        self.path = path
        self.header = header
        self.first = first
        # A start writes again and syncs what it goes by.
        self.begun = True

    def read(self, length: int = -1) -> bytes:
        """All of it, or its beginning; :class:`CorruptLog` if the disk does not give it back."""
        return _read(self.path, length)

    def records(self) -> Iterator[Record]:
        return decode_segment(self.read(), self.header.segment)


def _read(path: Path, length: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(length)
    except OSError as error:
        raise CorruptLog(f"{path} cannot be read ({error.strerror})") from error


class OpenSegment(KeptSegment):
    """A segment that is appended to. ``end`` is where the next record goes."""

    __slots__ = ("descriptor", "end", "seed", "size")

    def __init__(self, path: Path, header: SegmentHeader, descriptor: int, size: int) -> None:
        super().__init__(path, header)
        self.descriptor = descriptor
        self.size = size
        self.end = FIRST_RECORD
        self.begun = False
        self.seed = checksum_seed(header.segment)


def list_segments(directory: Path, unusable: list[str] | None = None) -> list[KeptSegment]:
    """All segments, in order; raises :class:`CorruptLog` if one cannot be told from its header and its records. With
    ``unusable`` it is left out instead, and described there. Leftovers are ignored."""
    found: list[KeptSegment] = []
    for path in sorted(directory.glob("*" + SUFFIX)):
        try:
            header = _read_header(path, found[-1].header if found else None)
            if header is not None and found and header.epoch < found[-1].header.epoch:
                raise CorruptLog(f"{path} is of an older epoch than {found[-1].path}")
        except CorruptLog as error:
            if unusable is None:
                raise
            unusable.append(str(error))
            continue
        if header is not None:
            found.append(KeptSegment(path, header))
    return found


def _read_header(path: Path, before: SegmentHeader | None) -> SegmentHeader | None:
    """A segment's header, or what its records say of it if it is damaged; None if there is no record either."""
    number = int(path.stem, 16)
    header = SegmentHeader.unpack(_read(path, FIRST_RECORD))
    if header is not None and header.segment == number:
        return header
    if header is not None:
        raise CorruptLog(f"{path} is the segment {header.segment:016x}: somebody has renamed it")
    data = _read(path)
    record = next(decode_segment(data, number), None)
    if record is None and data[FIRST_RECORD:].strip(b"\0"):
        raise CorruptLog(f"{path} has no valid header and no record")
    log.warning("a segment of the changelog has a damaged header; going by its records", path=str(path))
    if record is None:
        return None
    same = before is not None and before.epoch == record.epoch
    return SegmentHeader(number, record.epoch, before.previous if same and before is not None else UNKNOWN)


def find_firsts(segments: list[KeptSegment]) -> None:
    """Fills in ``first`` of segments from disk: reads little of each."""
    for segment in segments:
        head = segment.read(FIRST_RECORD + (64 << 10))
        record = next(decode_segment(head, segment.header.segment), None)
        if record is None:
            record = next(segment.records(), None)
        segment.first = record.number if record else 0


def epoch_logs(segments: list[KeptSegment], start: Position, *, tolerant: bool = False) -> list[EpochLog]:
    """What ``replay.replay`` needs: one log per epoch, read lazily; segments that end at or before ``start`` are
    skipped. Raises :class:`CorruptLog` if one of the others is missing or cut off, unless ``tolerant``."""
    logs: list[EpochLog] = []
    if not tolerant:
        _check_complete(segments, start)
    position = 0
    while position < len(segments):
        epoch = segments[position].header.epoch
        group = [segment for segment in segments[position:] if segment.header.epoch == epoch]
        position += len(group)
        useful = group[_first_useful(group, start) :]
        logs.append(EpochLog(epoch, group[0].header.previous, _all_records(useful)))
    return logs


def needed_after(segments: list[KeptSegment], start: Position) -> list[KeptSegment]:
    """Those that may have changes after ``start``, in order; :func:`find_firsts` has been called."""
    group = [segment for segment in segments if segment.header.epoch == start.epoch]
    return group[_first_useful(group, start) :] + [
        segment for segment in segments if segment.header.epoch > start.epoch
    ]


def _check_complete(segments: list[KeptSegment], start: Position) -> None:
    """What is missing at the end of the log looks like a log that ends there: so names and sizes are looked at."""
    needed = needed_after(segments, start)
    if needed and needed[0].header.epoch == start.epoch and needed[0].first > start.number + 1:
        # Used again on a full disk, for instance: what follows need not say that these changes were durable.
        raise CorruptLog(f"the changelog lacks the changes between {start} and {needed[0].path}")
    for segment in needed:
        size = segment.path.stat().st_size
        if size < segment.header.size:
            raise CorruptLog(f"{segment.path} is cut off at {size} of {segment.header.size} bytes")
    for before, after in pairwise(needed):
        if after.header.segment != before.header.segment + 1:
            raise CorruptLog(f"{segment_name(before.header.segment + 1)} is missing in {before.path.parent}")


def _first_useful(group: list[KeptSegment], start: Position) -> int:
    if not group or group[0].header.epoch != start.epoch:
        return 0
    return max((index for index, segment in enumerate(group) if 0 < segment.first <= start.number), default=0)


def _all_records(segments: list[KeptSegment]) -> Iterator[Record]:
    for segment in segments:
        yield from segment.records()


def trim(segments: list[KeptSegment], files: Files) -> list[KeptSegment]:
    """Gives back the unwritten rest of segments of older epochs, and those that say nothing: a server that crashes
    again and again must not fill its disk. Returns the segments that are left."""
    left: list[KeptSegment] = []
    deleted = False
    for index, segment in reversed([*enumerate(segments)]):
        used = _used_bytes(segment)
        first_of_epoch = index == 0 or segments[index - 1].header.epoch != segment.header.epoch
        # Only at the end: segments have numbers without gaps.
        if used == FIRST_RECORD and not first_of_epoch and not left:
            files.delete(segment.path)
            deleted = True
            continue
        if used is not None:
            files.give_back(segment.path, used)
        left.append(segment)
    if deleted:
        # Their numbers are given again: a new one must not stand beside an old one with a higher number.
        files.sync_directory(segments[0].path.parent)
    return left[::-1]


def _used_bytes(segment: KeptSegment) -> int | None:
    """Where the unwritten rest of a segment begins; None if there is hardly any, or it has been given back."""
    found = segment.path.stat()
    if found.st_blocks * 512 <= found.st_size - FIRST_RECORD:
        return None
    with naming(segment.path), segment.path.open("rb") as file:
        file.seek(max(0, found.st_size - FIRST_RECORD))
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
        # Up to where the store has everything durably: older segments may be used again when the disk is full.
        self.obsolete = Position(0, 0)
        # Segments used again since the disk became full: what a snapshot file would need to catch up with is gone.
        self.recycled = 0
        self._last_id = kept[-1].header.segment if kept else 0
        self._current = self._create_first()
        self.kept.append(self._current)
        # Bytes of records since the newest snapshot file, which takes its share away.
        self.appended = 0
        # Made ahead; None while it is being made, or if the disk is full.
        self._next: OpenSegment | None = None
        self._preparing = threading.Lock()
        # Written to since the last sync that covered them; the current one is the last.
        self._unsynced: list[OpenSegment] = []

    def _create_first(self) -> OpenSegment:
        """On a full disk a small one has to do."""
        size = self._segment_bytes
        while True:
            try:
                return self._create(size)
            except OSError as error:
                if not is_full(error) or size // 2 < self._segment_bytes // SMALLEST_PART:
                    raise
            size //= 2

    def _create(self, size: int) -> OpenSegment:
        header, path = self._header(size)
        descriptor = self._files.create(path, header.pack(), size)
        self._last_id += 1
        return OpenSegment(path, header, descriptor, size)

    def _header(self, size: int) -> tuple[SegmentHeader, Path]:
        header = SegmentHeader(self._last_id + 1, self._epoch, self._previous, size)
        return header, self._directory / segment_name(header.segment)

    def _recycle(self) -> OpenSegment | None:
        """The oldest segment, made new in its place; None if what it says may still be needed."""
        if len(self.kept) < 2 or not _ends_by(self.kept[0], self.kept[1], self.obsolete):
            return None
        old = self.kept[0]
        found = old.path.stat()
        # The rest of an old epoch's segment may have been given back.
        size = min(found.st_size, found.st_blocks * 512 // FIRST_RECORD * FIRST_RECORD, self._segment_bytes)
        if old in self._unsynced or size < self._segment_bytes // SMALLEST_PART:
            return None
        del self.kept[0]
        header, path = self._header(size)
        self.recycled += 1
        try:
            descriptor = self._files.recycle(old.path, path, header.pack(), size)
        except OSError as error:
            if is_full(error):
                return None  # the file system took some more for itself; at least the old one is gone
            raise
        self._last_id += 1
        return OpenSegment(path, header, descriptor, size)

    @property
    def prepared(self) -> bool:
        """Whether the next segment is there."""
        return self._next is not None

    @property
    def needs_next(self) -> bool:
        """Whether the next segment is missing and will be needed soon."""
        return self._next is None and self._current.end > self._current.size // 2

    def prepare(self, *, recycling: bool = False) -> None:
        """Makes the next segment if there is none, on a full disk from an obsolete one if ``recycling``; raises
        :class:`LogFull`, or ``OSError`` when the disk fails. In a worker thread, normally."""
        with self._preparing:
            if self._next is not None:
                return
            try:
                self._next = self._create(self._segment_bytes)
            except OSError as error:
                if not is_full(error):
                    raise
                self._next = self._recycle() if recycling else None
                if self._next is None:
                    raise LogFull from error

    def append(self, number: int, durable: int, session: int, operation: int, time_ns: int, rows: Rows) -> None:
        """Writes one record to the page cache. Raises :class:`LogFull` with nothing changed if there is no space for
        the segment it needs, :class:`NoBlocks` if there is none for itself, or ``OSError``, after which the log must
        not be used any more."""
        segment = self._current
        record = encode_record(segment.seed, self._epoch, number, durable, session, operation, time_ns, rows)
        if segment.end + len(record) > segment.size:
            segment = self._rotate(len(record))
            record = encode_record(segment.seed, self._epoch, number, durable, session, operation, time_ns, rows)
        try:
            with naming(segment.path):
                self._files.append(segment.descriptor, record, segment.end)
        except OSError as error:
            if is_full(error):
                # What part of the record is there is overwritten by the next one, or cut off by the next start.
                raise NoBlocks from error
            raise
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
        self.prepare(recycling=True)
        assert self._next is not None
        if length > self._next.size - FIRST_RECORD:
            raise LogFull
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
            with naming(segment.path):
                self._files.sync(segment.descriptor)

    def synced(self, batch: tuple[tuple[OpenSegment, int], ...]) -> None:
        """Segments that are full are done with, unless they were appended to while they were synced. Only for whoever
        syncs regularly, after each sync."""
        for segment, end in batch:
            segment.begun = segment.begun or end > FIRST_RECORD
            if segment is not self._current and segment.end == end and segment in self._unsynced:
                self._unsynced.remove(segment)
                self._files.close(segment.descriptor)

    def drop(self, position: Position) -> int:
        """Deletes the oldest segments, as far as all their changes are at or before ``position``; returns how many."""
        count = 0
        with self._preparing:
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
    """Whether all changes of ``segment`` are at or before ``position``, and will still be seen to be after a power cut:
    if that took the first record of ``following`` and left a later one, then without ``segment`` nobody could tell a
    torn tail from changes that are missing. False if it cannot be told."""
    epoch = segment.header.epoch
    if following.header.epoch > epoch:
        return following.header.previous != UNKNOWN and following.header.previous <= position
    follows = following.begun and 0 < following.first <= position.number + 1
    return position.epoch > epoch or (position.epoch == epoch and follows)

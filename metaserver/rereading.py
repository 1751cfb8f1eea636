"""Reading what a recovery would need before it is needed: old segments of the changelog, and snapshot files.

Blocking; in a worker thread. A damaged byte in them harms nobody until the store is lost, and then it is too late.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from metaserver.changelog import KeptSegment, needed_after
from metaserver.files import SHORTAGES
from metaserver.logrecord import FIRST_RECORD, UNKNOWN, Position, SegmentHeader, find_records
from metaserver.replay import CorruptLog
from metaserver.snapshot import verify_snapshot
from metaserver.store import PAUSE_ROWS, PAUSE_SECONDS, CorruptStore


def segment_damage(
    segment: KeptSegment, following: KeptSegment, before: KeptSegment | None = None, cut: Position = UNKNOWN
) -> str:
    """What is wrong with a segment that is not written to any more, "" if nothing: every change that it should have,
    up to the ``following`` one's first, must be there whole. ``before``: the one before it, if that is kept. ``cut``:
    where its epoch ended, if that is known; what came after was lost in a power cut, perhaps in part only."""
    try:
        data = segment.read()
    except CorruptLog as error:
        return str(error)
    if SegmentHeader.unpack(data[:FIRST_RECORD]) != segment.header:
        return f"the header of {segment.path} is damaged"
    if len(data) < segment.header.size:
        return f"{segment.path} is cut off at {len(data)} of {segment.header.size} bytes"
    last = _last_change(segment, following)
    if cut.epoch == segment.header.epoch:
        last = min(last, cut.number)
    wanted = first = _first_change(segment, before, last)
    for count, (record, _) in enumerate(find_records(data, segment.header.segment)):
        if record.number != wanted or wanted > last:
            break
        wanted += 1
        if count % PAUSE_ROWS == 0:
            time.sleep(PAUSE_SECONDS)  # otherwise the event loop waits for this thread again and again
    if first and wanted <= last:
        return f"change {segment.header.epoch}/{wanted} is damaged in {segment.path}"
    return ""


def _first_change(segment: KeptSegment, before: KeptSegment | None, last: int) -> int:
    """The number of the first change that is to be in a segment; what the start has read is the first that is whole."""
    begins_epoch = before is not None and before.header.epoch < segment.header.epoch
    return 1 if begins_epoch and last else segment.first


def _last_change(segment: KeptSegment, following: KeptSegment) -> int:
    """The number of the last change that is to be in a segment; 0: that cannot be told, or there is none."""
    epoch = segment.header.epoch
    if following.header.epoch == epoch:
        return following.first - 1
    previous = following.header.previous
    return previous.number if previous != UNKNOWN and previous.epoch == epoch else 0


def missing_changes(snapshots: Sequence[Position], kept: Sequence[KeptSegment]) -> str:
    """Why the store could not be rebuilt even if everything is whole: there are changes that are neither in one of the
    snapshot files nor in a segment after it. "" if it could."""
    if any(_goes_on(position, needed_after([*kept], position)) for position in (*snapshots, Position(0, 0))):
        return ""
    return f"the changelog does not reach back to {'a snapshot file' if snapshots else 'the beginning'}"


def _goes_on(position: Position, segments: Sequence[KeptSegment]) -> bool:
    """Whether segments begin right after a change, if not before it."""
    if not segments:
        return False
    first = segments[0]
    if first.header.epoch > position.epoch:
        return first.first <= 1 and first.header.previous in (position, UNKNOWN)
    return first.first <= position.number + 1


def snapshot_damage(path: Path) -> str:
    """What is wrong with a snapshot file, "" if nothing. Raises ``OSError`` if that cannot be told at present."""
    try:
        verify_snapshot(path)
    except (CorruptStore, OSError) as error:
        if isinstance(error, OSError) and error.errno in SHORTAGES:
            raise
        return f"the snapshot file {path} is damaged: {error}"
    return ""

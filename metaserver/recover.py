"""Rebuilds a lost or damaged store from a snapshot file and the changelog. Offline; for the command line.

The newest snapshot that is whole is copied, and every change of the log after it is laid over the copy. Nothing of the
damaged store is used. Only when the new one is complete and synced does it take the place of the old one, which is kept
as ``data.mdb.damaged``. Interrupted, it can simply be run again.
"""

import os
import shutil
import time
from pathlib import Path

import msgspec

from metaserver.changelog import KeptSegment, epoch_logs, find_firsts, list_segments, segment_name
from metaserver.files import Files, sync_file
from metaserver.ids import limit_key, limit_of
from metaserver.known import known_path
from metaserver.logrecord import FIRST_RECORD, Position, Record, SegmentHeader
from metaserver.overlay import Overlay, row_key
from metaserver.replay import CorruptLog, EpochLog, Replayed, replay
from metaserver.schema import BOOT, TIME, Boot, IdKind, Table, key_u64, read_u64
from metaserver.snapshot import list_snapshots, make_snapshot, verify_snapshot
from metaserver.start import (
    CHANGELOG_NAME,
    SNAPSHOTS_NAME,
    STORE_NAME,
    lock_directory,
    position_rows,
    read_survived,
    stored_position,
    survived_rows,
    write_growing,
)
from metaserver.store import CorruptStore, Store, create_store

# Rows collected before they are written: bounds memory.
BATCH_ROWS = 100_000
# Ids skipped past the highest known when the state is declared to be the newest there is although it is not.
ADVANCE_IDS = 1 << 24
# No machine's boot id: what ran last may have lost a tail.
_UNKNOWN_BOOT = Boot(b"\xff" * 16, False, True)


class RecoverReport(msgspec.Struct):
    """What was done, for people: ``lines`` in order; ``snapshot`` is "" if everything came from the log."""

    snapshot: str
    changes: int
    position: str
    seconds: float
    lines: list[str]


class Minimum(msgspec.Struct):
    """What must never be used again, as far as chunkservers have seen it: ``epoch`` and the highest chunk id."""

    epoch: int = 0
    chunk: int = 0


def recover(directory: Path, *, accept_loss: bool = False, minimum: Minimum | None = None) -> RecoverReport:
    """Rebuilds ``data.mdb``. Raises ``DirectoryBusy`` if a metaserver runs there, ``CorruptLog`` if changes that were
    promised to be durable cannot be read, ``CorruptStore`` if there is nothing to build on, or ``OSError``; then
    nothing has changed.

    ``accept_loss`` takes what comes before the first damaged change instead. ``minimum`` (``recover --advance``) also
    moves epoch and ids past what others have seen, so that a state that has gone back is not mistaken for a newer one.
    """
    lock = lock_directory(directory)
    try:
        return _Recovery(directory, accept_loss, minimum).run()
    finally:
        os.close(lock)


class _Recovery:
    def __init__(self, directory: Path, accept_loss: bool, minimum: Minimum | None) -> None:
        self.directory = directory
        self.accept_loss = accept_loss
        self.minimum = minimum or Minimum()
        # The state is not simply what the log says: it gets an epoch, a log and ids of its own.
        self.new_log = minimum is not None
        self.files = Files()
        self.lines: list[str] = []
        self.target = directory / (STORE_NAME + ".recovered")

    def run(self) -> RecoverReport:
        try:
            return self._run()
        except BaseException:
            self._clear(self.target)
            raise

    def _run(self) -> RecoverReport:
        began = time.monotonic()
        segments = self._segments()
        find_firsts(segments)
        snapshot = self._lay_base(_log_start(segments))
        store = Store.open(self.target)
        try:
            replayed = self._replay(store, self._logs(segments, stored_position(store)))
            position = self._finish(store, replayed, segments)
            for _ in store.verify():
                pass
            if self.new_log:
                make_snapshot(store, self.directory / SNAPSHOTS_NAME, self.files)
        finally:
            store.close()
        self._put_in_place(segments, position, replayed.end)
        self.lines.append(f"the store contains every change up to {position}")
        return RecoverReport(snapshot, replayed.changes, str(position), time.monotonic() - began, self.lines)

    def _segments(self) -> list[KeptSegment]:
        """What there is of the log; with ``accept_loss`` without what cannot be used, whose changes are lost."""
        unusable: list[str] = []
        try:
            segments = list_segments(self.directory / CHANGELOG_NAME, unusable if self.accept_loss else None)
        except CorruptLog as error:
            raise CorruptLog(f"{error}; --accept-loss takes what is before it") from None
        if unusable:
            self.new_log = True
            self.lines += [f"LOST: {text}" for text in unusable]
        return segments

    def _logs(self, segments: list[KeptSegment], start: Position) -> list[EpochLog]:
        try:
            return epoch_logs(segments, start)
        except CorruptLog as error:
            if not self.accept_loss:
                raise CorruptLog(f"{error}; --accept-loss takes what is before it") from None
            self.new_log = True
            self.lines.append(f"LOST: {error}")
            return epoch_logs(segments, start, tolerant=True)

    def _lay_base(self, log_starts: Position | None) -> str:
        """Copies the newest whole snapshot to the target, or starts from nothing if the log goes back that far."""
        self._clear(self.target)
        for snapshot in list_snapshots(self.directory / SNAPSHOTS_NAME):
            try:
                verify_snapshot(snapshot.path)
            except (CorruptStore, OSError) as error:
                self.lines.append(f"snapshot {snapshot.path.name} cannot be used: {error}")
                continue
            shutil.copyfile(snapshot.path, self.target)
            self.target.chmod(0o600)
            self.lines.append(f"started from snapshot {snapshot.path.name}")
            return snapshot.path.name
        if log_starts != (0, 0):
            reason = "there is no changelog" if log_starts is None else f"the changelog only starts after {log_starts}"
            raise CorruptStore(f"no snapshot file is whole, and {reason}: restore a backup of the data directory")
        create_store(self.target)
        self.lines.append("started from nothing: the changelog is complete")
        return ""

    def _replay(self, store: Store, logs: list[EpochLog]) -> Replayed:
        batch = Overlay()
        applied = start = stored_position(store)
        times = 0

        def apply(record: Record) -> None:
            nonlocal batch, applied, times
            batch.apply(record.rows)
            applied = Position(record.epoch, record.number)
            times = max(times, record.time_ns)
            if len(batch) > BATCH_ROWS:
                write_growing(store, batch.rows)
                batch = Overlay()

        try:
            replayed = replay(start, logs, apply)
        except CorruptLog as error:
            if not self.accept_loss:
                raise CorruptLog(f"{error}; --accept-loss takes what is before it, up to {applied}") from None
            self.lines.append(f"LOST: {error}")
            self.new_log = True
            replayed = Replayed(applied, {applied.epoch: applied.number}, 0, 0, times)
        if replayed.cut:
            self.lines.append(f"{replayed.cut} changes after {replayed.end} were never durable and are left out")
        write_growing(store, batch.rows)
        return replayed

    def _finish(self, store: Store, replayed: Replayed, segments: list[KeptSegment]) -> Position:
        """The rows that a start expects; clients are asked to send again what they know."""
        position = replayed.end
        ends = replayed.ends
        old = store.get(row_key(Table.COUNTERS, TIME))
        rows = Overlay({row_key(Table.COUNTERS, BOOT): _UNKNOWN_BOOT.pack()})
        if self.new_log:
            highest = max([position.epoch, self.minimum.epoch, *(segment.header.epoch for segment in segments)])
            position = Position(highest + 1, 0)
            ends = {**ends, position.epoch: 0}
            rows.apply(self._skipped_ids(store))
            self.lines.append(f"went on to epoch {position.epoch}, past all ids that may have been used")
        rows.apply(position_rows(position, max(replayed.time_ns, read_u64(old) if old else 0)))
        rows.apply(survived_rows(read_survived(store), ends)[1])
        write_growing(store, rows.rows)
        return position

    def _skipped_ids(self, store: Store) -> dict[bytes, bytes]:
        limits = {kind: limit_of(kind, store.get(limit_key(kind))) for kind in IdKind}
        limits[IdKind.CHUNK] = max(limits[IdKind.CHUNK], self.minimum.chunk + 1)
        return {limit_key(kind): key_u64(limit + ADVANCE_IDS) for kind, limit in limits.items()}

    def _put_in_place(self, segments: list[KeptSegment], position: Position, end: Position) -> None:
        sync_file(self.target)
        if self.new_log:
            self._replace_log(segments[-1].header.segment + 1 if segments else 1, position, end)
        store = self.directory / STORE_NAME
        self._clear(store.with_name(store.name + "-lock"))
        known_path(store).unlink(missing_ok=True)
        if store.exists():
            os.rename(store, store.with_name(store.name + ".damaged"))
        os.rename(self.target, store)
        self._clear(self.target)
        self.files.sync_directory(self.directory)

    def _replace_log(self, segment: int, position: Position, end: Position) -> None:
        """The old log must not be read again: it stands aside, and a new one begins where the store ends."""
        log = self.directory / CHANGELOG_NAME
        new = log.with_name(CHANGELOG_NAME + ".new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        header = SegmentHeader(segment, position.epoch, end, FIRST_RECORD)
        self.files.close(self.files.create(new / segment_name(segment), header.pack(), FIRST_RECORD))
        aside = next(path for count in range(1, 1000) if not (path := log.with_name(f"{log.name}.old{count}")).exists())
        os.rename(log, aside)
        os.rename(new, log)
        self.lines.append(f"the old changelog is in {aside.name}")

    def _clear(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        path.with_name(path.name + "-lock").unlink(missing_ok=True)


def _log_start(segments: list[KeptSegment]) -> Position | None:
    """The change before the first in the log."""
    if not segments:
        return None
    oldest = segments[0]
    return Position(oldest.header.epoch, oldest.first - 1) if oldest.first > 1 else oldest.header.previous

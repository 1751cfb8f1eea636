"""From a data directory to a running storage engine: lock, replay, new epoch, first checkpoint. Blocking; in a thread.

The order is what makes it safe to be interrupted anywhere:

1. the lock of the directory, the store, the changelog replayed over it;
2. what was replayed written again and synced: it may have been in the page cache only, and the new epoch builds on it;
3. the new epoch's first segment, whose header says where the old epoch ended;
4. its first record, which reserves new id ranges, synced;
5. a synced checkpoint of all that, which makes the new epoch the store's.
"""

import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from metaserver import trees
from metaserver.changelog import (
    Changelog,
    KeptSegment,
    LogFull,
    epoch_logs,
    find_firsts,
    list_segments,
    needed_after,
    trim,
)
from metaserver.files import Files, is_full
from metaserver.ids import RANGES, Ids, limit_key, limit_of
from metaserver.known import Known
from metaserver.logrecord import SEGMENT_BYTES, Position
from metaserver.overlay import Overlay, Rows, row_key
from metaserver.replay import CorruptLog, Replayed, replay
from metaserver.schema import (
    BOOT,
    EPOCH,
    NUMBER,
    SURVIVED,
    TIME,
    Boot,
    IdKind,
    Table,
    after,
    key_u64,
    read_u64,
    survived_key,
)
from metaserver.store import MAP_BYTES, CorruptStore, MapFull, Store, StoreFull, create_store
from metaserver.transaction import Layers

STORE_NAME = "data.mdb"
LOCK_NAME = "lock"
RESERVE_NAME = "reserve"
CHANGELOG_NAME = "changelog"
SNAPSHOTS_NAME = "snapshots"
# What a full disk is tried with, and a snapshot file being made: a kill leaves them behind.
PROBE_NAME = "probe"
NEW_SNAPSHOT_NAME = "new"
# A client that was away for longer than so many lives of the metaserver resends everything it has.
SURVIVED_EPOCHS = 256


class DirectoryBusy(Exception):
    """Another process works on the data directory."""


class Options(msgspec.Struct, frozen=True):
    """What tests and simulations vary. Sizes in bytes."""

    # How long a change that nobody waits for stays unsynced. Clients keep it until then and send it again if lost;
    # a sync for each change costs more CPU than the change itself (0.2 ms of two threads and the disk's interrupt).
    unhurried_seconds: float = 0.01
    checkpoint_seconds: float = 10.0
    checkpoint_changes: int = 20_000
    snapshot_seconds: float = 3600.0
    # A snapshot is also made when so much log is kept, so that neither the disk nor a recovery is overwhelmed.
    snapshot_log_bytes: int = 256 << 20
    # A start looks through the whole store, but no longer than this: 3 us a row on pages that are not known (known.py).
    # Mounts give up after 30 s. None: at everything, for as long as it takes, and nothing is taken for known.
    check_seconds: float | None = 15.0
    # All rows are read again and compared so often, in slices of a millisecond with pauses between.
    verify_seconds: float = 24 * 3600.0
    verify_pause_seconds: float = 0.05
    segment_bytes: int = SEGMENT_BYTES
    map_bytes: int = MAP_BYTES
    # Kept free for a start on a full disk, and for a checkpoint that needs more than the store has set aside.
    reserve_bytes: int = 32 << 20
    # Kept free inside the store's file, so that checkpoints of what frees space can be written on a full disk.
    store_reserve_bytes: int = 32 << 20
    # How often a full disk is tried again.
    retry_seconds: float = 1.0


class Started(NamedTuple):
    """What a start hands over. ``newest`` is the epoch's newest change, already in the store."""

    lock: int
    store: Store
    log: Changelog
    layers: Layers
    ids: Ids
    epoch: int
    newest: int
    survived: dict[int, int]
    boot: Boot
    replayed: Replayed


def make_reserve(directory: Path, options: Options, files: Files) -> None:
    """Keeps some space for the next start; raises ``OSError``."""
    path = directory / RESERVE_NAME
    if not path.exists() or path.stat().st_size < options.reserve_bytes:
        files.reserve(path, options.reserve_bytes)


def lock_directory(directory: Path) -> int:
    """Takes the exclusive lock of a data directory until the returned descriptor is closed, or the process ends."""
    descriptor = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DirectoryBusy(f"another metaserver process uses {directory}") from None
    return descriptor


def read_boot_id() -> bytes:
    """Which life of this machine it is."""
    return uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes


def start(directory: Path, files: Files, clock: Callable[[], int], options: Options, boot_id: bytes) -> Started:
    """Raises :class:`DirectoryBusy`, ``CorruptStore``, ``CorruptLog`` or ``OSError``; then nothing is left open. If the
    disk is full the reserve is spent; ``Engine`` makes it again as soon as it can."""
    try:
        return _start_anyhow(directory, files, clock, options, boot_id)
    except (OSError, StoreFull) as error:
        reserve = directory / RESERVE_NAME
        if not (isinstance(error, StoreFull) or is_full(error)) or not reserve.exists():
            raise
        files.delete(reserve)
    return _start_anyhow(directory, files, clock, options, boot_id)


def _start_anyhow(directory: Path, files: Files, clock: Callable[[], int], options: Options, boot_id: bytes) -> Started:
    """A log that finds no space for its first record is as full as the store."""
    try:
        return _start(directory, files, clock, options, boot_id)
    except LogFull as error:
        raise StoreFull from error


def _start(directory: Path, files: Files, clock: Callable[[], int], options: Options, boot_id: bytes) -> Started:
    lock = lock_directory(directory)
    store: Store | None = None
    try:
        with _saying_what_to_do():
            segments = _open_segments(directory, files)
        path = directory / STORE_NAME
        store = Store.open(path, options.map_bytes, options.check_seconds, Known(path))
        return _Start(directory, files, options, lock, store, segments).run(clock, boot_id)
    except BaseException:
        if store is not None:
            store.close()
        os.close(lock)
        raise


def _open_segments(directory: Path, files: Files) -> list[KeptSegment]:
    """The segments of the log; makes what an empty data directory lacks."""
    changelog = directory / CHANGELOG_NAME
    changelog.mkdir(mode=0o700, exist_ok=True)
    (directory / SNAPSHOTS_NAME).mkdir(mode=0o700, exist_ok=True)
    for leftover in (*changelog.glob("*.new"), directory / PROBE_NAME):
        if leftover.exists():
            files.delete(leftover)
    half_made = directory / SNAPSHOTS_NAME / NEW_SNAPSHOT_NAME
    with suppress(OSError):  # where snapshots cannot be made, that is no reason not to serve; the next one tells
        if half_made.exists():
            files.delete(half_made)
    segments = list_segments(changelog)
    if not (directory / STORE_NAME).exists():
        if segments:
            raise CorruptStore(f"{directory / STORE_NAME} is missing")
        create_store(directory / STORE_NAME)
    files.sync_directory(directory)
    return segments


def stored_position(store: Store | Overlay) -> Position:
    """The newest change a store contains."""
    epoch, number = (store.get(row_key(Table.COUNTERS, name)) for name in (EPOCH, NUMBER))
    return Position(read_u64(epoch) if epoch else 0, read_u64(number) if number else 0)


def read_survived(store: Store) -> dict[int, int]:
    """The last number of each older epoch."""
    start = row_key(Table.COUNTERS, SURVIVED)
    return {read_u64(key, len(start)): read_u64(value) for key, value in store.scan(start, after(start))}


def position_rows(position: Position, time_ns: int) -> dict[bytes, bytes]:
    """The rows that say what a checkpoint contains."""
    values = {EPOCH: position.epoch, NUMBER: position.number, TIME: time_ns}
    return {row_key(Table.COUNTERS, name): key_u64(value) for name, value in values.items()}


def survived_rows(old: dict[int, int], ends: dict[int, int]) -> tuple[dict[int, int], Rows]:
    """The newest of both, and the rows that say so."""
    together = old | ends
    kept = {epoch: together[epoch] for epoch in sorted(together)[-SURVIVED_EPOCHS:]}
    rows: dict[bytes, bytes | None] = {}
    for epoch in together:
        value = key_u64(kept[epoch]) if epoch in kept else None
        rows[row_key(Table.COUNTERS, survived_key(epoch))] = value
    return kept, rows


def write_growing(store: Store, rows: Rows) -> None:
    """Writes rows, growing the map as often as needed; for a store that nobody else reads meanwhile."""
    while True:
        try:
            store.write(rows, trees.changed)
        except MapFull:
            store.grow()
        else:
            store.renew()
            return


@contextmanager
def _saying_what_to_do() -> Iterator[None]:
    try:
        yield
    except CorruptLog as error:
        raise CorruptLog(f"{error}; look at: metaserver recover") from None


class _Start:
    def __init__(
        self, directory: Path, files: Files, options: Options, lock: int, store: Store, segments: list[KeptSegment]
    ) -> None:
        self.directory = directory
        self.files = files
        self.options = options
        self.lock = lock
        self.store = store
        self.segments = segments
        self.layers = Layers(store)

    def run(self, clock: Callable[[], int], boot_id: bytes) -> Started:
        replayed = self._replay()
        boot = self._next_boot(boot_id, replayed.end)
        # Before the new segment is made: it may be this space that it needs.
        self.segments = trim(self.segments, self.files)
        # What was replayed may be in memory only, even if a sync succeeds now: if an earlier one has failed, the kernel
        # takes it for written. Nobody was promised it, but the new epoch says that the old one went so far, and a power
        # cut before the checkpoint that contains it would leave a log with a hole. So it is written again.
        for segment in needed_after(self.segments, stored_position(self.store)):
            self.files.write_again(segment.path)
        self.files.step("start:before-epoch")
        epoch = replayed.end.epoch + 1
        directory = self.directory / CHANGELOG_NAME
        log = self._make_log(directory, epoch, replayed)
        try:
            return self._begin(log, epoch, replayed, boot, clock)
        except BaseException:
            log.close()
            raise

    def _make_log(self, directory: Path, epoch: int, replayed: Replayed) -> Changelog:
        """The new epoch's log. On a full disk without the reserve, what the store contains makes room."""
        while True:
            try:
                return Changelog(
                    directory, self.segments, epoch, replayed.end, self.files, self.options.segment_bytes
                )  # fmt: skip
            except OSError as error:
                if not is_full(error) or (self.directory / RESERVE_NAME).exists() or len(self.segments) < 2:
                    raise
            if stored_position(self.store) != replayed.end:
                rows = self.layers.overlay.rows | position_rows(replayed.end, replayed.time_ns)
                write_growing(self.store, rows)
            self.files.delete(self.segments.pop(0).path)

    def _replay(self) -> Replayed:
        find_firsts(self.segments)
        position = stored_position(self.store)
        with _saying_what_to_do():
            logs = epoch_logs(self.segments, position)
            replayed = replay(position, logs, lambda record: self.layers.overlay.apply(record.rows))
        time_row = self.store.get(row_key(Table.COUNTERS, TIME))
        return replayed._replace(time_ns=max(replayed.time_ns, read_u64(time_row) if time_row else 0))

    def _get(self, key: bytes) -> bytes | None:
        rows = self.layers.overlay.rows
        return rows[key] if key in rows else self.store.get(key)

    def _next_boot(self, boot_id: bytes, end: Position) -> Boot:
        row = self._get(row_key(Table.COUNTERS, BOOT))
        old = Boot.unpack(row) if row else Boot(boot_id, False, False)
        lost = old.lost or (end.epoch > 0 and old.boot_id != boot_id and not old.clean)
        return Boot(boot_id, False, lost)

    def _begin(self, log: Changelog, epoch: int, replayed: Replayed, boot: Boot, clock: Callable[[], int]) -> Started:
        """Steps 4 and 5, and what may be done only after them."""
        old = {kind: limit_of(kind, self._get(limit_key(kind))) for kind in IdKind}
        first: dict[bytes, bytes | None] = {limit_key(kind): key_u64(old[kind] + RANGES[kind]) for kind in IdKind}
        time_ns = max(clock(), replayed.time_ns + 1)
        log.append(1, 0, 0, 0, time_ns, first)
        log.sync(log.unsynced())
        survived, rows = survived_rows(read_survived(self.store), replayed.ends)
        overlay = self.layers.overlay
        overlay.apply(first | position_rows(Position(epoch, 1), time_ns))
        overlay.apply(rows)
        overlay.apply({row_key(Table.COUNTERS, BOOT): boot.pack()})
        self.files.step("checkpoint:before-commit")
        write_growing(self.store, overlay.rows)
        self.files.step("checkpoint:after-commit")
        self.layers.overlay = Overlay()
        ids = Ids(old)
        replayed = replayed._replace(time_ns=time_ns)
        return Started(self.lock, self.store, log, self.layers, ids, epoch, 1, survived, boot, replayed)

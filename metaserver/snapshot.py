"""Snapshot files: verified, compacted copies of the store, from which it can be rebuilt. Blocking; in a worker thread.

``snapshots/<epoch>-<number>.mdb`` (16 hexadecimal digits each) contains every change up to that one. The two newest are
kept, and the changelog from the older one of them on: either of them, with the log after it, is the whole state.
"""

import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from metaserver.files import Files, is_full
from metaserver.logrecord import Position
from metaserver.start import NEW_SNAPSHOT_NAME, stored_position
from metaserver.store import PAUSE_SECONDS, CorruptStore, Store, StoreFull, View

SUFFIX = ".mdb"
KEPT_SNAPSHOTS = 2


class Snapshot(NamedTuple):
    path: Path
    position: Position


class SnapshotFailed(Exception):
    """The file cannot be written or read back; the store itself is whole."""


def list_snapshots(directory: Path) -> list[Snapshot]:
    """What is there, the newest first; what does not have the name of a snapshot is not ours."""
    found = []
    for path in directory.glob("*" + SUFFIX):
        epoch, _, number = path.stem.partition("-")
        try:
            found.append(Snapshot(path, Position(int(epoch, 16), int(number, 16))))
        except ValueError:
            continue
    return sorted(found, key=lambda snapshot: snapshot.position, reverse=True)


def verify_snapshot(path: Path) -> Position:
    """Reads all of it; returns the newest change it contains. Raises ``CorruptStore`` or ``OSError``."""
    store = Store.open_readonly(path)
    try:
        for _ in store.verify():
            # As in Store.write: otherwise the event loop waits for this thread again and again.
            time.sleep(PAUSE_SECONDS)
        return stored_position(store)
    finally:
        store.close()


def make_snapshot(store: Store, directory: Path, files: Files, spare: int = 0) -> Snapshot:
    """Copies the newest checkpoint, verifies the copy, and puts it in place durably; deletes those no longer kept.

    ``spare`` bytes must be left on the disk beside it: a copy that fills the disk before it fails stops everybody's
    changes meanwhile. The store's map must not grow. Raises ``StoreFull``, ``CorruptStore`` or ``OSError``, and then
    has changed nothing: whose fault it is, :func:`blame` says.
    """
    temporary = directory / NEW_SNAPSHOT_NAME
    temporary.unlink(missing_ok=True)
    if files.free(directory) < store.copy_bytes() + spare:
        raise StoreFull
    try:
        files.step("snapshot:before-copy")
        store.copy(temporary)
        temporary.chmod(0o600)
        files.step("snapshot:before-sync")
        files.sync_path(temporary)
        position = verify_snapshot(temporary)
        path = directory / f"{position.epoch:016x}-{position.number:016x}{SUFFIX}"
        files.step("snapshot:before-rename")
        _put_in_place(temporary, path, files)
        files.step("snapshot:after-rename")
    except BaseException:
        with suppress(OSError):  # it has failed already, and the next one begins with that
            temporary.unlink(missing_ok=True)
        raise
    for old in list_snapshots(directory)[KEPT_SNAPSHOTS:]:
        files.delete(old.path)
    return Snapshot(path, position)


def _put_in_place(temporary: Path, path: Path, files: Files) -> None:
    """A name that is perhaps gone after a power cut must not count among those that are kept."""
    is_new = not path.exists()
    files.rename(temporary, path)
    try:
        files.sync_directory(path.parent)
    except OSError:
        if is_new:
            with suppress(OSError):
                files.delete(path)
        raise


def blame(error: CorruptStore | OSError, view: View) -> Exception:
    """What it means that a snapshot could not be made: ``StoreFull``, ``CorruptStore`` if the *store* is damaged, which
    is read for that, and otherwise :class:`SnapshotFailed`. Raises ``ViewExpired``."""
    if isinstance(error, OSError) and is_full(error):
        return StoreFull()
    try:
        for _ in view.verify():
            time.sleep(PAUSE_SECONDS)
    except CorruptStore as damage:
        return damage
    return SnapshotFailed(error.reason if isinstance(error, CorruptStore) else str(error))


def kept_from(directory: Path) -> Position | None:
    """Up to where the changelog is no longer needed; None: all of it is."""
    snapshots = list_snapshots(directory)
    return snapshots[KEPT_SNAPSHOTS - 1].position if len(snapshots) >= KEPT_SNAPSHOTS else None

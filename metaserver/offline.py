"""Looking into the data directory of a metaserver that does not run. Changes nothing; for the command line."""

import os
import time
from pathlib import Path

from metaserver import trees
from metaserver.changelog import epoch_logs, find_firsts, list_segments
from metaserver.check import check
from metaserver.protocol import CheckReport
from metaserver.replay import replay
from metaserver.start import CHANGELOG_NAME, STORE_NAME, lock_directory, stored_position
from metaserver.store import CorruptStore, Store
from metaserver.transaction import Layers, ReadTransaction


def check_directory(directory: Path) -> CheckReport:
    """Replays the changelog over the store in memory and checks every invariant, every row and the totals.

    Raises ``DirectoryBusy`` if a metaserver runs there, ``CorruptStore``, ``CorruptLog`` or ``OSError``.
    """
    began = time.monotonic()
    lock = lock_directory(directory)
    try:
        path = directory / STORE_NAME
        if not path.exists():
            raise CorruptStore(f"{path} is missing")
        store = Store.open_readonly(path)
        try:
            return _check(directory, store, began)
        finally:
            store.close()
    finally:
        os.close(lock)


def _check(directory: Path, store: Store, began: float) -> CheckReport:
    count = 0
    for rows in store.verify():
        count = rows
    segments = list_segments(directory / CHANGELOG_NAME)
    find_firsts(segments)
    position = stored_position(store)
    layers = Layers(store)
    replay(position, epoch_logs(segments, position), lambda record: layers.overlay.apply(record.rows))
    # As the next start would write them.
    layers.overlay.apply(trees.changed(layers.overlay.rows, store.get))
    problems = check(ReadTransaction(layers, 0))
    return CheckReport(count, problems, time.monotonic() - began)

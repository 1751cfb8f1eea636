"""The metaserver's files on a :class:`powercut.Volume`, and what a power cut does to LMDB.

LMDB writes its file itself: the pages of a transaction, a sync, then a meta page that names them, synced as it is
written. Until that sync any part of the pages may be on the disk, with the old meta page; after it all of them, with
the old or the new one. So the file is kept as it was before each transaction, and at a cut in the middle of one (the
transaction is then let run to its end in the page cache) it becomes one of those states.
"""

import errno
import os
import threading
from pathlib import Path
from random import Random

from powercut import PAGE, SECTOR, Mode, PowerOff, Volume

from metaserver.files import Files
from metaserver.start import STORE_NAME

META_PAGES = 2


class StoreInFlight:
    """The pages of a store before the transaction that is being written; ``last`` for how many there were."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before = _used(path)

    def settle(self, mode: Mode, random: Random) -> bool:
        """Makes the file what the disk has; whether the transaction is lost."""
        after = _used(self.path)
        before = self.before.ljust(len(after), b"\0")
        changed = [at for at in range(0, len(after), PAGE) if before[at : at + PAGE] != after[at : at + PAGE]]
        metas = [at for at in changed if at < META_PAGES * PAGE]
        if metas and mode is not Mode.EVERYTHING and random.random() < 0.3:
            return False  # all there, up to the meta page
        all_pages = mode is not Mode.EVERYTHING and random.random() < 0.2
        with self.path.open("r+b", buffering=0) as file:
            for at in changed:
                old, new = before[at : at + PAGE], after[at : at + PAGE]
                if at in metas or not all_pages:
                    data = old if at in metas else _left(old, new, mode, random)
                    file.seek(at)
                    file.write(data)
        return True


def _left(old: bytes, new: bytes, mode: Mode, random: Random) -> bytes:
    """What is on the disk of a page that was written and not synced."""
    if mode is Mode.EVERYTHING:
        return old
    if mode is Mode.RANDOM:
        return random.choice((old, new))
    pieces = ((old[at : at + SECTOR], new[at : at + SECTOR]) for at in range(0, PAGE, SECTOR))
    return b"".join(random.choice(piece) for piece in pieces)


def _used(path: Path) -> bytes:
    """The file up to the last page that has ever been written."""
    with path.open("rb") as file:
        data = file.read()
    stop = len(data.rstrip(b"\0"))
    return data[: -(-stop // PAGE) * PAGE]


class DiskSpace:
    """What a disk has left for files that are made or grow; as much as anybody wants unless it is ``full``: then what
    has been given back since. LMDB's own file may always grow: the store sets space aside in it. Any thread may call.

    ``recycled`` counts the segments whose reuse began, ``refused`` what there was no space for."""

    def __init__(self) -> None:
        self.full = False
        self.recycled = 0
        self.refused = 0
        self._free = 0
        self._lock = threading.Lock()

    def fill(self) -> None:
        with self._lock:
            self.full, self._free = True, 0

    def take(self, length: int) -> None:
        with self._lock:
            if not self.full:
                return
            if length > self._free:
                self.refused += 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._free -= length

    def give(self, length: int) -> None:
        with self._lock:
            self._free += length


class PoweredFiles(Files):
    """See the module."""

    def __init__(self, volume: Volume, space: "DiskSpace | None" = None) -> None:
        super().__init__(self._step)
        self.volume = volume
        self.space = space or DiskSpace()
        self.store_losses = 0
        self._in_flight: StoreInFlight | None = None
        volume.dropped = self._settle_store

    def _relative(self, path: Path) -> str:
        return "" if path == self.volume.root else str(path.relative_to(self.volume.root))

    # -- LMDB --------------------------------------------------------------------------------------------------

    def _step(self, name: str) -> None:
        if not self.volume.on:
            raise PowerOff
        if name == "checkpoint:before-commit":
            self._in_flight = StoreInFlight(self.volume.root / STORE_NAME)
            self.volume.pass_time()  # a cut from here on finds the transaction half written
        elif name == "checkpoint:after-commit":
            self._in_flight = None
        elif name == "snapshot:before-copy":
            self.space.take(1)
        elif name == "segment:before-recycle":
            self.space.recycled += 1

    def _settle_store(self, random: Random) -> None:
        if self._in_flight is not None:
            self.store_losses += self._in_flight.settle(self.volume.mode, random)

    def sync(self, descriptor: int) -> None:
        if self.volume.lies.appends:
            self.volume.pass_time()
        else:
            super().sync(descriptor)

    # -- everything else ---------------------------------------------------------------------------------------

    def reserve(self, path: Path, size: int) -> None:
        if not path.exists():
            os.close(self.volume.create(self._relative(path)))
        super().reserve(path, size)

    def _make(self, path: Path) -> int:
        return self.volume.create(self._relative(path), os.O_TRUNC)

    def _allocate(self, descriptor: int, size: int) -> None:
        self.space.take(max(0, size - os.fstat(descriptor).st_blocks * SECTOR))
        self.volume.allocate(self.volume.inode_of(descriptor), descriptor, size)

    def _resize(self, descriptor: int, size: int) -> None:
        self.volume.resize(self.volume.inode_of(descriptor), descriptor, size)

    def _punch(self, descriptor: int, offset: int, length: int) -> None:
        before = os.fstat(descriptor).st_blocks
        self.volume.change(
            self.volume.inode_of(descriptor),
            descriptor,
            (offset, offset + length),
            lambda: super(PoweredFiles, self)._punch(descriptor, offset, length),
        )
        self.space.give((before - os.fstat(descriptor).st_blocks) * SECTOR)

    def _fsync(self, descriptor: int) -> None:
        self._fdatasync(descriptor)

    def _remove(self, path: Path) -> None:
        if path.exists():
            blocks = path.stat().st_blocks
            self.volume.unlink(self._relative(path))
            self.space.give(blocks * SECTOR)

    def rename(self, old: Path, new: Path) -> None:
        self.volume.rename(self._relative(old), self._relative(new))

    def sync_path(self, path: Path) -> None:
        self.volume.adopt(self._relative(path))
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def sync_directory(self, path: Path) -> None:
        self.volume.sync_directory(self._relative(path))

    def _write(self, descriptor: int, data: bytes, offset: int) -> None:
        self.volume.write(self.volume.inode_of(descriptor), descriptor, data, offset)

    def _fdatasync(self, descriptor: int) -> None:
        self.volume.sync(self.volume.inode_of(descriptor))

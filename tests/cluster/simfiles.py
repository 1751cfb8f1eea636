"""The metaserver's files on a real (memory) file system, of which a power cut makes what is not synced go back."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from simdisk import Detached

from metaserver.files import Files

SECTOR = 512
# How likely a metaserver whose disk becomes full ends in the middle of a step, and after how many at most.
CRASHES, CRASH_STEPS = 0.5, 12


class Unsynced:
    """What a power cut can take from a directory tree: outlives the process, as a page cache does.

    ``writes``: by inode, what was there before each write since the last sync, in order. ``names``: how to undo each
    change of names since the last sync of its directory, in order; what a change has replaced or removed is kept under
    another name until then. LMDB's transactions are synced where they are made, which is one moment here.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.writes: dict[int, list[tuple[int, bytes]]] = {}
        self.names: list[tuple[Path, Callable[[], None], Path | None]] = []
        self._graves = directory.with_name(directory.name + ".removed")
        self._count = 0

    def remove(self) -> None:
        shutil.rmtree(self._graves, ignore_errors=True)

    def wrote(self, descriptor: int, length: int, offset: int) -> None:
        """Is about to be called for."""
        before = os.pread(descriptor, length, offset).ljust(length, b"\0")
        self.writes.setdefault(os.fstat(descriptor).st_ino, []).append((offset, before))

    def synced(self, inode: int) -> None:
        self.writes.pop(inode, None)

    def made(self, path: Path, inode: int) -> None:
        self.writes.pop(inode, None)
        self.names.append((path.parent, lambda: path.unlink(missing_ok=True), None))

    def renaming(self, old: Path, new: Path) -> None:
        grave = self._bury(new)

        def undo() -> None:
            new.rename(old)
            if grave is not None:
                grave.rename(new)

        self.names.append((old.parent, undo, grave))

    def removing(self, path: Path) -> None:
        grave = self._bury(path)
        if grave is not None:
            self.names.append((path.parent, lambda: grave.rename(path) and None, grave))

    def _bury(self, path: Path) -> Path | None:
        if not path.exists():
            return None
        self._graves.mkdir(parents=True, exist_ok=True)
        self._count += 1
        grave = self._graves / str(self._count)
        grave.hardlink_to(path)
        return grave

    def synced_names(self, directory: Path) -> None:
        left = []
        for change in self.names:
            if change[0] != directory:
                left.append(change)
            elif change[2] is not None:
                self._forget(change[2])
        self.names = left

    def _forget(self, grave: Path) -> None:
        if grave.stat().st_nlink == 1:
            self.writes.pop(grave.stat().st_ino, None)
        grave.unlink()

    def cut_power(self, random: Random, keep: float) -> int:
        """Once the process is gone: each unsynced sector stays with probability ``keep``, and of the names the changes
        up to some moment. How many sectors and names went back."""
        count = len(self.names)
        kept = random.randint(0, count) if keep > 0 and count else 0
        for _, undo, _ in reversed(self.names[kept:]):
            undo()
        for _, _, grave in self.names[:kept]:
            if grave is not None:
                self._forget(grave)
        lost = count - kept
        paths = {path.stat().st_ino: path for path in sorted(self.directory.rglob("*")) if path.is_file()}
        for inode, before in self.writes.items():
            if inode in paths:
                lost += _go_back(paths[inode], before, random, keep)
        self.writes.clear()
        self.names.clear()
        return lost


def _go_back(path: Path, before: list[tuple[int, bytes]], random: Random, keep: float) -> int:
    start = min(offset for offset, _ in before) // SECTOR * SECTOR
    stop = -(-max(offset + len(data) for offset, data in before) // SECTOR) * SECTOR
    lost = 0
    with path.open("r+b") as file:
        new = os.pread(file.fileno(), stop - start, start)
        old = bytearray(new)
        for offset, data in reversed(before):
            old[offset - start : offset - start + len(data)] = data
        for at in range(0, stop - start, SECTOR):
            if random.random() >= keep and old[at : at + SECTOR] != new[at : at + SECTOR]:
                os.pwrite(file.fileno(), old[at : at + SECTOR], start + at)
                lost += 1
    return lost


class SimFiles(Files):
    """One process's. ``failing``: calls that fail, with what. ``alive``: once it is not, nothing is done any more."""

    def __init__(self, unsynced: Unsynced, on_step: Callable[[str], None] = lambda name: None) -> None:
        super().__init__(self._step)
        self._unsynced = unsynced
        self._on_step = on_step
        self.alive = True
        self.ignore_syncs = False
        self.recycled = 0
        self.failing: dict[str, int] = {}

    def _step(self, name: str) -> None:
        self._attached()
        self.recycled += name == "segment:before-recycle"
        self._on_step(name)

    def _attached(self) -> None:
        if not self.alive:
            raise Detached("metaserver")

    def _meet(self, call: str) -> None:
        self._attached()
        code = self.failing.get(call)
        if code is not None:
            raise OSError(code, os.strerror(code))

    def append(self, descriptor: int, data: bytes, offset: int) -> None:
        self._meet("append")
        super().append(descriptor, data, offset)

    def sync_path(self, path: Path) -> None:
        self._meet("sync")
        if not self.ignore_syncs:
            self._unsynced.synced(path.stat().st_ino)

    def rename(self, old: Path, new: Path) -> None:
        self._attached()
        self._unsynced.renaming(old, new)
        super().rename(old, new)

    def sync_directory(self, path: Path) -> None:
        self._attached()
        self._unsynced.synced_names(path)

    def _write(self, descriptor: int, data: bytes, offset: int) -> None:
        self._attached()
        self._unsynced.wrote(descriptor, len(data), offset)
        super()._write(descriptor, data, offset)

    def _fdatasync(self, descriptor: int) -> None:
        self._meet("sync")
        if not self.ignore_syncs:
            self._unsynced.synced(os.fstat(descriptor).st_ino)

    def _fsync(self, descriptor: int) -> None:
        # Of a new segment: not what sabotage is about.
        self._attached()
        self._unsynced.synced(os.fstat(descriptor).st_ino)

    def _make(self, path: Path) -> int:
        self._attached()
        if path.exists():
            self._remove(path)
        descriptor = super()._make(path)
        self._unsynced.made(path, os.fstat(descriptor).st_ino)
        return descriptor

    def _allocate(self, descriptor: int, size: int) -> None:
        self._meet("create")
        super()._allocate(descriptor, size)

    def _resize(self, descriptor: int, size: int) -> None:
        self._attached()
        super()._resize(descriptor, size)

    def _punch(self, descriptor: int, offset: int, length: int) -> None:
        self._attached()
        self._unsynced.wrote(descriptor, length, offset)
        super()._punch(descriptor, offset, length)

    def _remove(self, path: Path) -> None:
        self._attached()
        self._unsynced.removing(path)
        super()._remove(path)

"""The metaserver's files on a real (memory) file system, of which a power cut makes the unsynced log go back."""

import os
from pathlib import Path
from random import Random

from metaserver.files import Files

SECTOR = 512
# What was there before each append that is not synced yet, by file: outlives the process, as a page cache does.
Undo = dict[Path, list[tuple[int, bytes]]]


class SimFiles(Files):
    """One process's. LMDB's transactions and new segments are synced where they are made, which is one moment here; so
    the appended and unsynced records are all that a power cut can take. ``failing``: calls that fail, with what."""

    def __init__(self, undo: Undo) -> None:
        super().__init__()
        self._paths: dict[int, Path] = {}
        self._undo = undo
        self.ignore_syncs = False
        self.failing: dict[str, int] = {}

    def _meet(self, call: str) -> None:
        code = self.failing.get(call)
        if code is not None:
            raise OSError(code, os.strerror(code))

    def reserve(self, path: Path, size: int) -> None:
        self._meet("create")
        super().reserve(path, size)

    def sync_path(self, path: Path) -> None:
        self._meet("sync")
        super().sync_path(path)
        if not self.ignore_syncs:
            self._undo.pop(path, None)

    def create(self, path: Path, head: bytes, size: int) -> int:
        self._meet("create")
        descriptor = super().create(path, head, size)
        self._paths[descriptor] = path
        return descriptor

    def recycle(self, old: Path, path: Path, head: bytes, size: int) -> int:
        # Whole and synced in this one moment, as a new one.
        self._undo.pop(old, None)
        descriptor = super().recycle(old, path, head, size)
        self._paths[descriptor] = path
        return descriptor

    def append(self, descriptor: int, data: bytes, offset: int) -> None:
        self._meet("append")
        before = os.pread(descriptor, len(data), offset)
        super().append(descriptor, data, offset)
        self._undo.setdefault(self._paths[descriptor], []).append((offset, before.ljust(len(data), b"\0")))

    def sync(self, descriptor: int) -> None:
        self.step("changelog:before-sync")
        self._meet("sync")
        if not self.ignore_syncs:
            self._undo.pop(self._paths[descriptor], None)
        self.step("changelog:after-sync")

    def delete(self, path: Path) -> None:
        super().delete(path)
        self._undo.pop(path, None)

    def close(self, descriptor: int) -> None:
        super().close(descriptor)
        self._paths.pop(descriptor, None)


def cut_power(undo: Undo, random: Random, keep: float) -> int:
    """Once the process is gone: each unsynced sector stays with probability ``keep``. How many went back."""
    lost = 0
    for path, before in undo.items():
        if not path.exists():
            continue
        start = min(offset for offset, _ in before) // SECTOR * SECTOR
        stop = -(-max(offset + len(data) for offset, data in before) // SECTOR) * SECTOR
        with path.open("r+b") as file:
            new = os.pread(file.fileno(), stop - start, start)
            old = bytearray(new)
            for offset, data in reversed(before):
                old[offset - start : offset - start + len(data)] = data
            for at in range(0, stop - start, SECTOR):
                if random.random() >= keep and old[at : at + SECTOR] != new[at : at + SECTOR]:
                    os.pwrite(file.fileno(), old[at : at + SECTOR], start + at)
                    lost += 1
    undo.clear()
    return lost

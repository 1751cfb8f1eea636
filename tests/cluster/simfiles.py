"""The metaserver's files on a real (memory) file system, of which a power cut makes the unsynced log go back."""

import os
from pathlib import Path
from random import Random

from metaserver.files import Files

SECTOR = 512


class SimFiles(Files):
    """One process's. LMDB's transactions and new segments are synced where they are made, which is one moment here; so
    the appended and unsynced records are all that a power cut can take."""

    def __init__(self) -> None:
        super().__init__()
        self._paths: dict[int, Path] = {}
        # What was there before each append since the last sync.
        self._undo: dict[Path, list[tuple[int, bytes]]] = {}
        self.ignore_syncs = False

    def create(self, path: Path, head: bytes, size: int) -> int:
        descriptor = super().create(path, head, size)
        self._paths[descriptor] = path
        return descriptor

    def append(self, descriptor: int, data: bytes, offset: int) -> None:
        before = os.pread(descriptor, len(data), offset)
        super().append(descriptor, data, offset)
        self._undo.setdefault(self._paths[descriptor], []).append((offset, before.ljust(len(data), b"\0")))

    def sync(self, descriptor: int) -> None:
        self.step("changelog:before-sync")
        if not self.ignore_syncs:
            self._undo.pop(self._paths[descriptor], None)
        self.step("changelog:after-sync")

    def delete(self, path: Path) -> None:
        super().delete(path)
        self._undo.pop(path, None)

    def close(self, descriptor: int) -> None:
        super().close(descriptor)
        self._paths.pop(descriptor, None)

    def cut_power(self, random: Random, keep: float) -> int:
        """Once the process is gone: each unsynced sector stays with probability ``keep``. How many went back."""
        lost = 0
        for path, undo in self._undo.items():
            if not path.exists():
                continue
            start = min(offset for offset, _ in undo) // SECTOR * SECTOR
            stop = -(-max(offset + len(data) for offset, data in undo) // SECTOR) * SECTOR
            with path.open("r+b") as file:
                new = os.pread(file.fileno(), stop - start, start)
                old = bytearray(new)
                for offset, data in reversed(undo):
                    old[offset - start : offset - start + len(data)] = data
                for at in range(0, stop - start, SECTOR):
                    if random.random() >= keep and old[at : at + SECTOR] != new[at : at + SECTOR]:
                        os.pwrite(file.fileno(), old[at : at + SECTOR], start + at)
                        lost += 1
        self._undo.clear()
        return lost

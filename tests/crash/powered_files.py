"""Files of a metaserver whose machine can lose power: what was not synced is there afterwards, or not."""

import random
from pathlib import Path

from metaserver.files import Files

SECTOR = 512


class PoweredFiles(Files):
    """Real files of which whatever was not synced can be lost, sector by sector, in any order."""

    def __init__(self, choose: random.Random) -> None:
        super().__init__()
        self.choose = choose
        self.on = True
        # Path of each descriptor; offset and length of what was written since the last sync.
        self.paths: dict[int, Path] = {}
        self.unsynced: dict[Path, list[tuple[int, int]]] = {}
        self.deleted: list[tuple[Path, bytes]] = []

    def append(self, descriptor: int, data: bytes, offset: int) -> None:
        super().append(descriptor, data, offset)
        self.unsynced.setdefault(self.paths[descriptor], []).append((offset, len(data)))

    def sync(self, descriptor: int) -> None:
        path = self.paths[descriptor]
        covered = len(self.unsynced.get(path, []))
        super().sync(descriptor)
        if self.on:
            del self.unsynced.get(path, [])[:covered]

    def create(self, path: Path, head: bytes, size: int) -> int:
        descriptor = super().create(path, head, size)
        self.paths[descriptor] = path
        self.deleted.clear()
        return descriptor

    def delete(self, path: Path) -> None:
        self.deleted.append((path, path.read_bytes()))
        super().delete(path)

    def cut_power(self) -> None:
        """Every sector that was not synced is on the disk or not, as it happens; the last deletions come back."""
        for path, writes in self.unsynced.items():
            if not path.exists():
                continue
            data = bytearray(path.read_bytes())
            for offset, length in writes:
                for sector in range(offset // SECTOR, (offset + length - 1) // SECTOR + 1):
                    if self.choose.random() < 0.5:
                        start, stop = max(offset, sector * SECTOR), min(offset + length, (sector + 1) * SECTOR)
                        data[start:stop] = bytes(stop - start)
            path.write_bytes(data)
        back = self.choose.randint(0, len(self.deleted))
        for path, contents in self.deleted[len(self.deleted) - back :]:
            path.write_bytes(contents)

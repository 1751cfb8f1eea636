"""Overwrites and deletes files at random, and knows what must be in them: ``python churn.py DIRECTORY SECONDS SEED``.

As a module: :class:`Churn`, whose ``contents`` say what each file must hold.
"""

import os
import random
import sys
import time
from pathlib import Path

KIB = 1 << 10


class Churn:
    """Files below ``folder`` that change; ``contents`` is the truth about what is in them."""

    def __init__(self, folder: Path, seed: int, *, files: int = 24, size: int = 3 << 20) -> None:
        self.folder = folder
        self.contents: dict[str, bytearray] = {}
        self.written = 0
        self._random = random.Random(seed)
        self._files = files
        self._size = size

    @property
    def live(self) -> int:
        return sum(map(len, self.contents.values()))

    def step(self) -> None:
        """One change: a new file, one gone, a part overwritten or cut off."""
        names = sorted(self.contents)
        choice = self._random.random()
        if len(names) < self._files or choice < 0.05:
            self._create()
        elif choice < 0.15:
            self._remove(self._random.choice(names))
        elif choice < 0.2:
            self._truncate(self._random.choice(names))
        else:
            self._overwrite(self._random.choice(names))

    def _create(self) -> None:
        name = f"file{self._random.randrange(1 << 32):08x}"
        data = self._random.randbytes(self._random.choice([100, 5000, self._size // 8, self._size]))
        (self.folder / name).write_bytes(data)
        self.contents[name] = bytearray(data)
        self.written += len(data)

    def _remove(self, name: str) -> None:
        (self.folder / name).unlink()
        del self.contents[name]

    def _truncate(self, name: str) -> None:
        size = self._random.randrange(len(self.contents[name]) + 1)
        os.truncate(self.folder / name, size)
        del self.contents[name][size:]

    def _overwrite(self, name: str) -> None:
        data = self.contents[name]
        with (self.folder / name).open("r+b", buffering=0) as file:
            for _ in range(self._random.randrange(1, 40)):
                offset = self._random.randrange(len(data) + 1) // 4096 * 4096
                piece = self._random.randbytes(self._random.choice([4096, 4096, 4096, 100, 64 * KIB, 300 * KIB]))
                file.seek(offset)
                file.write(piece)
                data[offset : offset + len(piece)] = piece
                self.written += len(piece)
            if self._random.random() < 0.3:
                os.fsync(file.fileno())

    def wrong(self, names: list[str] | None = None) -> list[str]:
        """Files that do not hold what they should, or should not be there."""
        found = [name for name in names or self.contents if (self.folder / name).read_bytes() != self.contents[name]]
        if names is None:
            found += sorted({path.name for path in self.folder.iterdir()} ^ self.contents.keys())
        return found


def disk_bytes(folders: list[Path]) -> int:
    """What the chunk files below these directories take up on the disk, as `du` counts it."""
    total = 0
    for folder in folders:
        for path in folder.glob("chunks/*/*"):
            try:
                total += path.stat().st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def main(arguments: list[str]) -> int:
    churn = Churn(Path(arguments[0]), int(arguments[2]))
    end = time.monotonic() + float(arguments[1])
    while time.monotonic() < end:
        churn.step()
    wrong = churn.wrong()
    print(f"{churn.written >> 20} MiB written, {churn.live >> 20} MiB live, wrong: {wrong}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A chunkserver's disk that fails as disks do, for tests in a process and in processes of their own.

Faults are given one by one (:class:`Fault`); each meets the calls whose path and name it matches. A chunkserver of its
own runs on such a disk with ``python faultydisk.py --faults FILE --config FILE``: it looks at the faults' file, a list
of JSON objects, before each call, so that a test can change its mind.
"""

import errno
import fnmatch
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from chunkserver.disk import File, LocalDisk, Space
from metaserver.wire import Buffer


class Fault(msgspec.Struct):
    """What goes wrong: ``call`` on paths that match ``path`` ends with ``error`` (the name of an errno), the first
    ``times`` times (-1: always). Calls are read, write, truncate, sync, create, open, rename, unlink, names,
    sync_directory. Reads and writes only if they touch [``start``, ``stop``). ``half``: a write whose first half is
    carried out before the error."""

    call: str
    path: str = "*"
    error: str = "EIO"
    times: int = -1
    start: int = 0
    stop: int = 1 << 62
    half: bool = False


class FaultyFile:
    def __init__(self, file: File, path: str, disk: "FaultyDisk") -> None:
        self._file = file
        self._path = path
        self._disk = disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        length = sum(map(len, buffers))

        def half() -> None:
            self._file.write([b"".join(buffers)[: length // 2]], offset)

        self._disk.meet("write", self._path, offset, length, half)
        self._file.write(buffers, offset)

    def read(self, length: int, offset: int) -> bytes:
        self._disk.meet("read", self._path, offset, length)
        return self._file.read(length, offset)

    def read_into(self, view: memoryview, offset: int) -> int:
        self._disk.meet("read", self._path, offset, len(view))
        return self._file.read_into(view, offset)

    def read_cached(self, view: memoryview, offset: int) -> int:
        return 0  # so that every read is one of the disk

    def read_from_disk(self, length: int, offset: int) -> memoryview:
        self._disk.meet("read", self._path, offset, length)
        return self._file.read_from_disk(length, offset)

    def truncate(self, length: int) -> None:
        self._disk.meet("truncate", self._path)
        self._file.truncate(length)

    def sync(self) -> None:
        self._disk.meet("sync", self._path)
        self._file.sync()


class FaultyDisk:
    """See the module. ``calls`` counts (call, path); ``faults`` may be changed at any time."""

    def __init__(self, disk: LocalDisk, faults: Callable[[], list[Fault]] | None = None) -> None:
        self.faults: list[Fault] = []
        self.calls: Counter[tuple[str, str]] = Counter()
        self.root = disk.root
        self._disk = disk
        self._more = faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self._disk, name)

    def meet(
        self, call: str, path: str, offset: int = 0, length: int = 1, half: Callable[[], None] | None = None
    ) -> None:
        """Counts a call; raises if a fault is meant for it."""
        self.calls[call, path] += 1
        for fault in self.faults + (self._more() if self._more else []):
            touched = offset < fault.stop and fault.start < offset + length
            if fault.call == call and fault.times and touched and fnmatch.fnmatch(path, fault.path):
                fault.times -= 1
                if fault.half and half is not None:
                    half()
                number = getattr(errno, fault.error)
                raise OSError(number, os.strerror(number))

    def create(self, path: str) -> FaultyFile:
        self.meet("create", path)
        return FaultyFile(self._disk.create(path), path, self)

    def open(self, path: str) -> FaultyFile:
        self.meet("open", path)
        return FaultyFile(self._disk.open(path), path, self)

    def open_direct(self, path: str) -> FaultyFile:
        self.meet("open", path)
        return FaultyFile(self._disk.open_direct(path), path, self)

    def rename(self, old: str, new: str) -> None:
        self.meet("rename", old)
        self._disk.rename(old, new)

    def unlink(self, path: str) -> None:
        self.meet("unlink", path)
        self._disk.unlink(path)

    def names(self, path: str) -> list[str]:
        self.meet("names", path)
        return self._disk.names(path)

    def sync_directory(self, path: str) -> None:
        self.meet("sync_directory", path)
        self._disk.sync_directory(path)

    def space(self) -> Space:
        self.meet("space", "")
        return self._disk.space()

    def read_small(self, path: str) -> bytes | None:
        self.meet("read", path)
        return self._disk.read_small(path)

    def write_atomically(self, path: str, data: bytes) -> None:
        """As :meth:`LocalDisk.write_atomically`, each call on its way met."""
        temporary = path + ".new"

        def half() -> None:
            Path(self.root, temporary).write_bytes(data[: len(data) // 2])

        self.meet("create", temporary)
        self.meet("write", temporary, 0, len(data), half)
        self.meet("sync", temporary)
        self.meet("rename", temporary)
        self._disk.write_atomically(path, data)


def faults_of(path: Path) -> Callable[[], list[Fault]]:
    """The faults in a file, as they are at the time of each call; ``times`` starts anew when the file changes."""
    known: tuple[int, list[Fault]] = (0, [])

    def read() -> list[Fault]:
        nonlocal known
        try:
            changed = path.stat().st_mtime_ns
            if changed != known[0]:
                known = changed, msgspec.json.decode(path.read_bytes(), type=list[Fault])
        except OSError:
            return []
        return known[1]

    return read


def main(words: list[str]) -> None:
    """A chunkserver on a faulty disk: ``--faults FILE`` and then what the chunkserver takes."""
    from functools import partial

    from chunkserver import cli
    from chunkserver import serve as serving

    assert words[0] == "--faults"
    faults = faults_of(Path(words[1]))

    def make_disk(root: str) -> FaultyDisk:
        return FaultyDisk(LocalDisk(root), faults)

    serving.serve = partial(serving.serve, make_disk=make_disk)  # type: ignore[assignment]
    cli.app(words[2:], prog_name="chunkserver")


if __name__ == "__main__":
    main(sys.argv[1:])

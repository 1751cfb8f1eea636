"""A disk in memory, with a page cache that a power cut empties.

:class:`SimStorage` is what survives processes; a :class:`SimDisk` is one process's view of it (``disk.Disk``), which
ends with that process. What was written is lost in a power cut unless it was synced: all of it, or a random part, in
sectors of 512 bytes; what was created, renamed or removed unless its directory was synced.
"""

import errno
import os
from collections.abc import Callable, Sequence
from random import Random

from chunkserver.disk import Space
from metaserver.wire import Buffer

PAGE = 4096
SECTOR = 512


class Detached(BaseException):
    """This process is gone: whatever it still does is not done."""


def failure(code: int) -> OSError:
    return OSError(code, os.strerror(code))


class Inode:
    """A file: its pages as processes see them, and as they are on the disk."""

    __slots__ = ("dirty", "pages", "size", "synced", "synced_size")

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}
        self.synced: dict[int, bytes] = {}
        self.dirty: dict[int, None] = {}
        self.size = 0
        self.synced_size = 0

    def write(self, data: bytes, offset: int) -> None:
        end = offset + len(data)
        at = offset
        while at < end:
            number, start = divmod(at, PAGE)
            count = min(PAGE - start, end - at)
            page = self.pages.get(number)
            if page is None:
                page = self.pages[number] = bytearray(PAGE)
            page[start : start + count] = data[at - offset : at - offset + count]
            self.dirty[number] = None
            at += count
        self.size = max(self.size, end)

    def read(self, length: int, offset: int) -> bytearray:
        end = min(self.size, offset + length)
        result = bytearray(max(0, end - offset))
        first, last = offset // PAGE, (end - 1) // PAGE
        if last - first > len(self.pages):
            numbers = [number for number in self.pages if first <= number <= last]
        else:
            numbers = [number for number in range(first, last + 1) if number in self.pages]
        for number in numbers:
            start = max(offset, number * PAGE)
            stop = min(end, (number + 1) * PAGE)
            if start < stop:
                page = self.pages[number]
                result[start - offset : stop - offset] = page[start - number * PAGE : stop - number * PAGE]
        return result

    def truncate(self, length: int) -> None:
        if length < self.size:
            for number in [number for number in self.pages if (number + 1) * PAGE > length]:
                if number * PAGE >= length:
                    del self.pages[number]
                else:
                    start = length - number * PAGE
                    self.pages[number][start:] = bytes(PAGE - start)
                self.dirty[number] = None
        self.size = length

    def sync(self) -> None:
        for number in self.dirty:
            page = self.pages.get(number)
            if page is None:
                self.synced.pop(number, None)
            else:
                self.synced[number] = bytes(page)
        self.dirty.clear()
        self.synced_size = self.size

    def lose(self, keep: Callable[[], bool]) -> None:
        """A power cut: of what was not synced only the sectors stay for which ``keep`` says so."""
        for number in self.dirty:
            page = self.pages.get(number) or bytes(PAGE)
            old = self.synced.get(number) or bytes(PAGE)
            mixed = b"".join((page if keep() else old)[start : start + SECTOR] for start in range(0, PAGE, SECTOR))
            if mixed.strip(b"\0"):
                self.synced[number] = mixed
            else:
                self.synced.pop(number, None)
        if self.size != self.synced_size and keep():
            self.synced_size = self.size
        self.dirty.clear()
        self.size = self.synced_size
        self.pages = {
            number: bytearray(page) for number, page in self.synced.items() if number * PAGE < self.synced_size
        }
        cut = self.pages.get(self.size // PAGE)
        if cut is not None:
            cut[self.size % PAGE :] = bytes(PAGE - self.size % PAGE)
        self.synced = {number: bytes(page) for number, page in self.pages.items()}


class Directory:
    def __init__(self) -> None:
        self.names: dict[str, Inode] = {}
        self.synced: dict[str, Inode] = {}
        self.below: dict[str, None] = {}
        # What was done since the last sync: a name, and what it stands for then (None: nothing).
        self.changes: list[list[tuple[str, Inode | None]]] = []

    def change(self, *steps: tuple[str, Inode | None]) -> None:
        self.changes.append(list(steps))
        self._apply(self.names, steps)

    @staticmethod
    def _apply(names: dict[str, Inode], steps: Sequence[tuple[str, Inode | None]]) -> None:
        for name, inode in steps:
            if inode is None:
                names.pop(name, None)
            else:
                names[name] = inode

    def sync(self) -> None:
        self.synced = dict(self.names)
        self.changes.clear()

    def lose(self, kept: int) -> None:
        """A power cut: only the first ``kept`` changes since the last sync have reached the disk."""
        for steps in self.changes[:kept]:
            self._apply(self.synced, steps)
        self.changes.clear()
        self.names = dict(self.synced)


class SimStorage:
    """What a disk holds. ``ignore_syncs``: those of chunk files do nothing.

    ``faults``: probabilities of failing calls by their names ("write", "sync", "read")."""

    def __init__(self, name: str, random: Random, capacity: int = 4 << 30) -> None:
        self.name = name
        self.random = random
        self.capacity = capacity
        self.directories: dict[str, Directory] = {"": Directory()}
        self.faults: dict[str, float] = {}
        self.on_unlink: Callable[[str], None] = lambda path: None
        self.ignore_syncs = False
        self.copy_on_write = random.random() < 0.5
        self.syncs = 0

    def directory(self, path: str) -> Directory:
        found = self.directories.get(path)
        if found is None:
            raise failure(errno.ENOENT)
        return found

    def used(self) -> int:
        return sum(len(inode.pages) for inode in self.inodes()) * PAGE

    def rot(self, path: str, random: Random) -> int:
        """Flips a bit of a file where it has something; the offset."""
        parent, _, name = path.rpartition("/")
        inode = self.directory(parent).names[name]
        number = random.choice(sorted(inode.pages))
        at = random.randrange(min(PAGE, inode.size - number * PAGE))
        inode.pages[number][at] ^= 1 << random.randrange(8)
        if number in inode.synced:
            inode.synced[number] = bytes(inode.pages[number])
        return number * PAGE + at

    def inodes(self) -> list[Inode]:
        return [inode for directory in self.directories.values() for inode in directory.names.values()]

    def cut_power(self, keep: float) -> None:
        """Loses what was not synced; each unsynced sector stays with probability ``keep``."""

        def kept() -> bool:
            return keep > 0 and self.random.random() < keep

        everywhere: dict[int, Inode] = {}
        for directory in self.directories.values():
            for inode in (*directory.names.values(), *directory.synced.values()):
                everywhere[id(inode)] = inode
            for steps in directory.changes:
                everywhere.update((id(inode), inode) for _, inode in steps if inode is not None)
        for inode in everywhere.values():
            inode.lose(kept)
        for directory in self.directories.values():
            count = len(directory.changes)
            directory.lose(self.random.randint(0, count) if keep > 0 and count else 0)


class SimFile:
    """A ``disk.File``."""

    __slots__ = ("_chunk", "_disk", "inode")

    def __init__(self, disk: "SimDisk", inode: Inode, path: str) -> None:
        self._chunk = path.startswith("chunks/")
        self._disk = disk
        self.inode = inode

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        data = b"".join(buffers)
        self._disk.meet("write")
        self._disk.take_space(self.inode, len(data), offset)
        self.inode.write(data, offset)

    def read(self, length: int, offset: int) -> bytes:
        self._disk.meet("read")
        return bytes(self.inode.read(length, offset))

    def read_into(self, view: memoryview, offset: int) -> int:
        data = self.read(len(view), offset)
        view[: len(data)] = data
        return len(data)

    def read_cached(self, view: memoryview, offset: int) -> int:
        self._disk.attached()
        if self._disk.storage.random.random() < 0.3:
            return 0
        data = self.inode.read(len(view), offset)
        view[: len(data)] = data
        return len(data)

    def read_from_disk(self, length: int, offset: int) -> memoryview:
        return memoryview(self.read(length, offset))

    def size(self) -> int:
        self._disk.attached()
        return self.inode.size

    def truncate(self, length: int) -> None:
        self._disk.meet("truncate")
        self.inode.truncate(length)

    def sync(self) -> None:
        self._disk.meet("sync")
        if not (self._disk.storage.ignore_syncs and self._chunk):
            self.inode.sync()


class SimDisk:
    """A ``disk.Disk``, of one process."""

    def __init__(
        self, storage: SimStorage, on_step: Callable[[str], None] = lambda name: None, *, sound: bool = False
    ) -> None:
        """``sound``: for looking at what is there, whatever faults the disk has."""
        self._sound = sound
        self.storage = storage
        self.root = f"/{storage.name}"
        self.alive = True
        self._on_step = on_step
        self._space = self._free = 0
        self._measured = -1

    def attached(self) -> None:
        if not self.alive:
            raise Detached(self.storage.name)

    def meet(self, call: str) -> None:
        self.attached()
        chance = self.storage.faults.get(call)
        if chance is not None and not self._sound and self.storage.random.random() < chance:
            raise failure(errno.EIO)

    def take_space(self, inode: Inode, length: int, offset: int) -> None:
        """ENOSPC if the disk is full. Some file systems want room for what is overwritten, too."""
        storage = self.storage
        if storage.capacity >= 1 << 30:
            return
        first, last = offset // PAGE, (offset + length - 1) // PAGE
        pages = sum(storage.copy_on_write or number not in inode.pages for number in range(first, last + 1))
        if storage.used() + pages * PAGE > storage.capacity:
            raise failure(errno.ENOSPC)

    def step(self, name: str) -> None:
        self.attached()
        self._on_step(name)

    def _find(self, path: str) -> tuple[Directory, str, Inode]:
        self.attached()
        parent, _, name = path.rpartition("/")
        directory = self.storage.directory(parent)
        inode = directory.names.get(name)
        if inode is None:
            raise failure(errno.ENOENT)
        return directory, name, inode

    def create(self, path: str) -> SimFile:
        self.meet("create")
        parent, _, name = path.rpartition("/")
        directory = self.storage.directory(parent)
        if name in directory.names:
            raise failure(errno.EEXIST)
        inode = Inode()
        directory.change((name, inode))
        return SimFile(self, inode, path)

    def open(self, path: str) -> SimFile:
        return SimFile(self, self._find(path)[2], path)

    open_direct = open

    def rename(self, old: str, new: str) -> None:
        directory, name, inode = self._find(old)
        parent, _, new_name = new.rpartition("/")
        if self.storage.directory(parent) is not directory:
            raise failure(errno.EXDEV)
        self.meet("rename")
        directory.change((name, None), (new_name, inode))

    def unlink(self, path: str) -> None:
        directory, name, _ = self._find(path)
        self.meet("unlink")
        self.storage.on_unlink(path)
        directory.change((name, None))

    def names(self, path: str) -> list[str]:
        self.attached()
        directory = self.storage.directory(path)
        return [*directory.names, *directory.below]

    def make_directory(self, path: str) -> None:
        """Durable at once: a start that is cut in the middle of making them is not this simulation's matter."""
        self.attached()
        parts = path.split("/")
        for count, part in enumerate(parts):
            self.storage.directory("/".join(parts[:count])).below[part] = None
            self.storage.directories.setdefault("/".join(parts[: count + 1]), Directory())

    def sync_directory(self, path: str) -> None:
        self.meet("sync")
        self.storage.directory(path).sync()

    def space(self) -> Space:
        self.attached()
        return Space(self.storage.capacity, max(0, self.storage.capacity - self.storage.used()), self.storage.name)

    def read_small(self, path: str) -> bytes | None:
        try:
            return self.open(path).read(1 << 20, 0)
        except FileNotFoundError:
            return None

    def write_atomically(self, path: str, data: bytes) -> None:
        parent = path.rpartition("/")[0]
        directory = self.storage.directory(parent)
        temporary = path + ".new"
        directory.change((temporary.rpartition("/")[2], None))
        file = self.create(temporary)
        file.write([data], 0)
        self.step("atomic:before-sync")
        file.sync()
        self.step("atomic:before-rename")
        self.rename(temporary, path)
        self.step("atomic:before-directory-sync")
        self.sync_directory(parent)

    def lock(self) -> bool:
        return True

"""A volume that forgets what was not synced: real files, and a record of what the disk below would have of them.

Everything written goes into real files at once, as into a page cache. Beside that the volume knows what a power cut
would leave: per file the earlier contents of every page that was written since the last sync, and the sizes it had;
per directory the changes of names since the last sync of the directory. :meth:`Volume.cut` ends everything at once;
:meth:`Volume.settle` then makes the real directory what a disk might have after it:

* ``EVERYTHING``: nothing is left of what was not synced;
* ``RANDOM``: of each page any of its contents since the last sync, of the sizes any, and of the names a part;
* ``TORN``: as ``RANDOM``, but of each sector of 512 bytes any of its contents.

A sync of a file makes its contents and size durable, never its name; a sync of a directory its names, never what is in
the files. Contents, size and names are independent of each other: more than any journaling filesystem would lose. The
names that are left are a prefix of the changes, or any of them that fit together, except that a removal never
overtakes an earlier one.

A sync takes a moment, so that a cut may come in the middle of one, and covers what was written before it began.
Directories themselves are durable at once; the tests cut no volume before its directories were made.
"""

import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from random import Random
from typing import NamedTuple

PAGE = 4096
SECTOR = 512
ZERO_PAGE = bytes(PAGE)
# How long a sync takes: mostly that of a fast disk, sometimes that of a slow one.
SYNC_SECONDS = (0.0002, 0.002)
SLOW_SYNC_SECONDS = (0.005, 0.03)
SLOW_SYNCS = 0.1


class Mode(Enum):
    """What a power cut takes of what was not synced."""

    EVERYTHING = "everything"
    RANDOM = "random"
    TORN = "torn"


class PowerOff(OSError):
    """The power is gone: nothing that was tried has happened, and nobody hears of it."""

    def __init__(self) -> None:
        super().__init__(errno.EIO, "the power is off")


class Inode:
    """A file. ``pages`` has, for each page written since the last sync, its contents before each of the writes, the
    oldest (what is durable) first; ``sizes`` likewise. Both are empty for a file that is all durable."""

    __slots__ = ("directory", "kept", "number", "pages", "sizes")

    def __init__(self, number: int, directory: str) -> None:
        self.number = number
        self.directory = directory
        self.pages: dict[int, list[bytes]] = {}
        self.sizes: list[int] = []
        self.kept = False

    @property
    def unsynced(self) -> bool:
        return bool(self.pages or self.sizes)


class Naming(NamedTuple):
    """A change of names in one directory: ``new`` leads to ``inode`` now (unless empty), ``old`` to nothing."""

    old: str
    new: str
    inode: Inode


class Directory:
    """``durable``: names on the disk; ``pending``: what was changed since, in order."""

    def __init__(self, durable: dict[str, Inode]) -> None:
        self.durable = durable
        self.pending: list[Naming] = []


class Lies(NamedTuple):
    """Syncs that say they happened although they did not, as on a disk with a lying cache: for tests of the tests."""

    files: bool = False
    directories: bool = False
    appends: bool = False  # of a changelog, what is appended after it was made
    below: str = ""  # only those in or below directories whose path begins so


HONEST = Lies()


class Volume:
    """See the module. Paths are relative to ``root``. Any thread may call; one lock guards record and writes."""

    def __init__(self, root: Path, mode: Mode, random: Random, lies: Lies = HONEST) -> None:
        self.root = root
        self.mode = mode
        self.lies = lies
        self.on = True
        self.lost = 0  # pages, sizes and names that a cut took
        self.dropped: Callable[[Random], None] = lambda _: None  # what others lose at a cut
        self._random = random
        self._lock = threading.RLock()
        self._graves = root.with_name(root.name + ".inodes")
        self._inodes: dict[int, Inode] = {}
        self._directories: dict[str, Directory] = {}

    # -- what is there -----------------------------------------------------------------------------------------

    def look(self) -> None:
        """Takes all that is there now for durable. Without this only what is touched is known, and everything in a
        directory is durable that is there when it is touched first: so a new server can settle in."""
        for directory, _, _ in os.walk(self.root):
            path = os.path.relpath(directory, self.root)
            self._directory("" if path == "." else path)

    def _directory(self, path: str) -> Directory:
        """Of a directory that was not changed before: what is there is durable."""
        if path not in self._directories:
            names = [entry for entry in os.scandir(self.root / path) if entry.is_file(follow_symlinks=False)]
            self._directories[path] = Directory({entry.name: self._inode(entry.inode(), path) for entry in names})
        return self._directories[path]

    def _inode(self, number: int, directory: str = "") -> Inode:
        return self._inodes.setdefault(number, Inode(number, directory))

    def inode_of(self, descriptor: int) -> Inode:
        """The file behind an open descriptor."""
        with self._lock:
            return self._inode(os.fstat(descriptor).st_ino)

    def _powered(self) -> None:
        if not self.on:
            raise PowerOff

    # -- names -------------------------------------------------------------------------------------------------

    def create(self, path: str, flags: int = os.O_EXCL) -> int:
        """A new file's descriptor, for reading and writing; with O_TRUNC instead of O_EXCL perhaps an old one's."""
        with self._lock:
            self._powered()
            directory, name = self._split(path)
            there = os.path.lexists(self.root / path)
            descriptor = os.open(self.root / path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)
            inode = self._inode(os.fstat(descriptor).st_ino, os.path.dirname(path))
            if not there:
                directory.pending.append(Naming("", name, inode))
                inode.sizes.append(0)
            return descriptor

    def adopt(self, path: str) -> None:
        """A file that others made without asking: its name is not durable, its contents are for them to lose."""
        with self._lock:
            directory, name = self._split(path)
            inode = self._inode(os.stat(self.root / path).st_ino)
            self._keep(path)  # others may remove it without asking, too
            if self._now(directory).get(name) is not inode:
                directory.pending.append(Naming("", name, inode))

    def rename(self, old: str, new: str) -> None:
        with self._lock:
            self._powered()
            directory, old_name = self._split(old)
            target, new_name = self._split(new)
            assert target is directory, "within one directory only"
            self._keep(new)
            inode = self._inode(os.stat(self.root / old).st_ino)
            os.rename(self.root / old, self.root / new)
            directory.pending.append(Naming(old_name, new_name, inode))

    def unlink(self, path: str) -> None:
        with self._lock:
            self._powered()
            directory, name = self._split(path)
            self._keep(path)
            inode = self._inode(os.stat(self.root / path).st_ino)
            os.unlink(self.root / path)
            directory.pending.append(Naming(name, "", inode))

    def _split(self, path: str) -> tuple[Directory, str]:
        head, _, name = path.rpartition("/")
        return self._directory(head), name

    def _keep(self, path: str) -> None:
        """What a name led to is still wanted if the change of that name is lost."""
        try:
            inode = self._inode(os.stat(self.root / path).st_ino)
        except FileNotFoundError:
            return
        if not inode.kept:
            self._graves.mkdir(exist_ok=True)
            os.link(self.root / path, self._graves / str(inode.number))
            inode.kept = True

    def sync_directory(self, path: str) -> None:
        with self._lock:
            self._powered()
            directory = self._directory(path)
            covered = len(directory.pending)
        self.pass_time()
        with self._lock:
            self._powered()
            if not (self.lies.directories and path.startswith(self.lies.below)):
                for change in directory.pending[:covered]:
                    _apply(directory.durable, change)
                del directory.pending[:covered]

    def _now(self, directory: Directory) -> dict[str, Inode]:
        names = dict(directory.durable)
        for change in directory.pending:
            _apply(names, change)
        return names

    # -- contents ----------------------------------------------------------------------------------------------

    def write(self, inode: Inode, descriptor: int, data: bytes, offset: int) -> None:
        with self._lock:
            self._powered()
            self._remember(inode, descriptor, offset, offset + len(data))
            done = os.pwrite(descriptor, data, offset)
            assert done == len(data), "the disk below is full"

    def resize(self, inode: Inode, descriptor: int, length: int) -> None:
        """ftruncate(2); what is cut off may come back."""
        with self._lock:
            self._powered()
            self._remember(inode, descriptor, length, os.fstat(descriptor).st_size)
            if length != os.fstat(descriptor).st_size:
                inode.sizes.append(os.fstat(descriptor).st_size)
            os.ftruncate(descriptor, length)

    def allocate(self, inode: Inode, descriptor: int, length: int) -> None:
        """posix_fallocate(3) from the beginning."""
        with self._lock:
            self._powered()
            size = os.fstat(descriptor).st_size
            if length > size:
                inode.sizes.append(size)
            os.posix_fallocate(descriptor, 0, length)

    def change(self, inode: Inode, descriptor: int, where: tuple[int, int], change: Callable[[], None]) -> None:
        """Something else that changes a file within these bounds."""
        with self._lock:
            self._powered()
            self._remember(inode, descriptor, *where)
            change()

    def _remember(self, inode: Inode, descriptor: int, start: int, stop: int) -> None:
        """Keeps the present contents of the pages that are about to change, and the size if that will."""
        size = os.fstat(descriptor).st_size
        if stop > size:
            inode.sizes.append(size)
        first = start // PAGE
        there = os.pread(descriptor, max(0, min(-(-stop // PAGE) * PAGE, size) - first * PAGE), first * PAGE)
        for page in range(first, -(-stop // PAGE)):
            at = (page - first) * PAGE
            inode.pages.setdefault(page, []).append(there[at : at + PAGE])

    def sync(self, inode: Inode) -> None:
        """fdatasync(2) or fsync(2): contents and size."""
        with self._lock:
            self._powered()
            covered = {page: len(history) for page, history in inode.pages.items()}
            sizes = len(inode.sizes)
        self.pass_time()
        with self._lock:
            self._powered()
            if self.lies.files and inode.directory.startswith(self.lies.below):
                return
            for page, count in covered.items():
                del inode.pages[page][:count]
                if not inode.pages[page]:
                    del inode.pages[page]
            del inode.sizes[:sizes]

    def pass_time(self) -> None:
        """As long as a disk takes for a sync."""
        with self._lock:
            bounds = SLOW_SYNC_SECONDS if self._random.random() < SLOW_SYNCS else SYNC_SECONDS
            seconds = self._random.uniform(*bounds)
        time.sleep(seconds)

    # -- the cut -----------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """From now on nothing happens any more; every call raises :class:`PowerOff`."""
        with self._lock:
            self.on = False

    def resume(self) -> None:
        """The processes were killed, the power was not: everything is there, and what was not synced still is not."""
        self.on = True

    def settle(self) -> None:
        """Makes the real directory what the disk has. Nobody uses it any more; afterwards the volume is done with."""
        assert not self.on
        for path, directory in self._directories.items():
            self._settle_names(path, directory)
        for path in self._directories:
            for entry in os.scandir(self.root / path):
                inode = self._inodes.get(entry.inode())
                if inode is not None and inode.unsynced:
                    self._settle_contents(Path(entry.path), inode)
        self.dropped(self._random)
        if self._graves.exists():
            for grave in self._graves.iterdir():
                grave.unlink()
            self._graves.rmdir()

    def _settle_names(self, path: str, directory: Directory) -> None:
        left = dict(directory.durable)
        for change in self._surviving(directory.pending):
            _apply(left, change)
        self.lost += len(directory.pending)
        found = {entry.name: entry.inode() for entry in os.scandir(self.root / path) if entry.is_file()}
        where = {number: self.root / path / name for name, number in found.items()}
        for inode in left.values():
            if inode.number in where and not inode.kept:
                self._keep(os.path.join(path, where[inode.number].name))
        for name, number in found.items():
            if name not in left or left[name].number != number:
                os.unlink(self.root / path / name)
        for name, inode in left.items():
            if found.get(name) != inode.number:
                os.link(self._graves / str(inode.number), self.root / path / name)

    def _surviving(self, pending: Sequence[Naming]) -> list[Naming]:
        """Which changes of names are on the disk."""
        if self.mode is Mode.EVERYTHING:
            return []
        if self._random.random() < 0.5:
            return list(pending[: self._random.randint(0, len(pending))])
        bias = self._random.random()
        left: list[Naming] = []
        removals = True
        for change in pending:
            if not change.new:
                removals = removals and self._random.random() < bias
            if removals if not change.new else self._random.random() < bias:
                left.append(change)
        return left

    def _settle_contents(self, path: Path, inode: Inode) -> None:
        size = path.stat().st_size
        sizes = [*inode.sizes, size]
        newest = self._random.choice((0.1, 0.5, 0.9))
        descriptor = os.open(path, os.O_RDWR)
        try:
            for page, history in inode.pages.items():
                self.lost += 1
                contents = [*history, os.pread(descriptor, PAGE, page * PAGE)]
                padded = [data.ljust(PAGE, b"\0") for data in contents]
                os.pwrite(descriptor, self._left(padded, newest), page * PAGE)
            left = sizes[0] if self.mode is Mode.EVERYTHING else self._random.choice([sizes[0], sizes[-1], *sizes])
            os.ftruncate(descriptor, left)
        finally:
            os.close(descriptor)

    def _left(self, history: Sequence[bytes], newest: float) -> bytes:
        """What is on the disk of a page with these contents since the last sync."""
        if self.mode is Mode.EVERYTHING:
            return history[0]
        if self.mode is Mode.RANDOM:
            return self._pick(history, newest)
        sectors = range(0, PAGE, SECTOR)
        return b"".join(self._pick([data[at : at + SECTOR] for data in history], newest) for at in sectors)

    def _pick(self, history: Sequence[bytes], newest: float) -> bytes:
        return history[-1] if self._random.random() < newest else self._random.choice(history)


def _apply(names: dict[str, Inode], change: Naming) -> None:
    """A change whose beginning was lost does not happen either."""
    if change.old:
        if names.get(change.old) is not change.inode:
            return
        del names[change.old]
    if change.new:
        names[change.new] = change.inode

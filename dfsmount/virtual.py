"""``.dfs``, a directory in the root of a mount that no listing shows: what the mount and the cluster are doing.

It belongs to root and cannot be changed. What is in it is made when it is opened, and served from memory. A real entry
of that name in the mounted directory (made through a mount of a directory above, or the gateway) cannot be reached by
this mount; nothing of that name can be made in the root of a mount.
"""

import itertools
import stat
from collections.abc import Awaitable, Callable, Mapping

from dfsmount.vfs_core import Shown
from metaserver.errors import DfsError, ErrorCode

NAME = b".dfs"
# Inode and handle numbers from here on are not the cluster's: no metadata shard has this number.
FIRST = 0xFFFF << 48
# Opened at a time: each holds what it was opened with.
HANDLES = 64
CONTENT_BYTES = 1 << 20
# The kernel keeps the names so long without asking. While a program makes something in the root and gets no answer, the
# kernel lets nobody look up there what it does not know; the mount has it look ``.dfs`` up at its beginning.
SECONDS = 86400.0

Make = Callable[[], Awaitable[str]]


class Virtual:
    """The directory; ``files`` says what makes the contents of which name, and when the mount began."""

    def __init__(self, files: Mapping[bytes, Make], began_ns: int) -> None:
        self._names = tuple(files)
        self._makes = tuple(files.values())
        self._began_ns = began_ns
        self._contents: dict[int, bytes] = {}
        self._numbers = itertools.count(FIRST + 1)

    def find(self, parent: int, name: bytes) -> Shown:
        """``parent`` is the mount's root or this directory."""
        if parent != FIRST:
            return self.show(FIRST)
        if name not in self._names:
            raise DfsError(ErrorCode.NOT_FOUND)
        return self.show(FIRST + 1 + self._names.index(name))

    def show(self, ino: int) -> Shown:
        """A size of 0, as in /proc: it is not known before it is read."""
        directory = ino == FIRST
        if not FIRST <= ino <= FIRST + len(self._names):
            raise DfsError(ErrorCode.STALE_INODE)
        mode = stat.S_IFDIR | 0o555 if directory else stat.S_IFREG | 0o444
        at = self._began_ns
        return Shown(ino, 0, mode, 2 if directory else 1, 0, 0, 0, 0, 0, at, at, at, SECONDS, SECONDS)

    def listing(self, start: int) -> list[tuple[bytes, Shown, int]]:
        """Entries after place ``start``: name, what it is, its place."""
        found = [(name, self.show(FIRST + 1 + at), at + 1) for at, name in enumerate(self._names)]
        return found[start:]

    async def open(self, ino: int) -> int:
        """A handle of what the file contains now."""
        if len(self._contents) >= HANDLES:
            raise DfsError(ErrorCode.BUSY, f"{HANDLES} files of .dfs are open already")
        self.show(ino)
        text = await self._makes[ino - FIRST - 1]()
        number = next(self._numbers)
        self._contents[number] = text.encode(errors="surrogateescape")[:CONTENT_BYTES]
        return number

    def read(self, number: int, offset: int, length: int) -> bytes:
        return self._contents[number][offset : offset + length]

    def release(self, number: int) -> None:
        self._contents.pop(number, None)

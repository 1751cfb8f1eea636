"""The exported tree as the HTTP gateway uses it: by names, on the same client core as a mount.

Symbolic links are followed as long as they stay inside; ``..`` in one goes back the way that was come, so that no link,
and no directory that is moved meanwhile, leads out.
"""

import os
import stat
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import NamedTuple

import msgspec

from dfsmount.assembly import Client
from dfsmount.filestate import FileState
from dfsmount.gateway_paths import Place, is_hidden, link_parts
from dfsmount.vfs_names import Caller
from metaserver.errors import DfsError, ErrorCode
from metaserver.httpranges import Version
from metaserver.protocol import PAGE_ENTRIES, Attributes, DirectoryEntry, FileMap

# As Linux has it.
MAX_LINKS = 40
# Entries looked through for one page of a listing, if few of them are wanted.
SCAN_ENTRIES = 100 * PAGE_ENTRIES
NANOSECONDS = 1_000_000_000


class Node(NamedTuple):
    """What a name leads to. ``parent`` and ``name`` are where it really lies, after symbolic links; 0 for the root."""

    parent: int
    name: bytes
    attributes: Attributes
    target: bytes = b""

    @property
    def ino(self) -> int:
        return self.attributes.ino

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.attributes.mode)

    @property
    def is_link(self) -> bool:
        return stat.S_ISLNK(self.attributes.mode)

    @property
    def version(self) -> Version:
        return version_of(self.attributes)


def version_of(attributes: Attributes) -> Version:
    """Inode numbers are never used again, and the data version grows with every change: a strong validator."""
    etag = f'"{attributes.ino:x}-{attributes.data_version:x}"'
    return Version(etag, attributes.mtime_ns // NANOSECONDS)


class Opened(NamedTuple):
    """A file that is open for reading; ``number`` is its handle."""

    number: int
    state: FileState

    @property
    def size(self) -> int:
        return self.state.size

    @property
    def version(self) -> Version:
        return version_of(self.state.attributes)


class Listing(msgspec.Struct):
    """A page of a directory; ``next`` goes on after it, 0 at the end."""

    entries: list[DirectoryEntry]
    next: int


class Tree:
    """Every method raises :class:`metaserver.errors.DfsError`. ``caller`` owns what is made here."""

    def __init__(self, client: Client, caller: Caller) -> None:
        self.client = client
        self.caller = caller
        self.root = client.vfs.root

    # -- finding -----------------------------------------------------------------------------------------------

    async def find(self, place: Place, *, follow: bool = True) -> Node:
        """What is at ``place``; ``follow``: if that is a symbolic link, what it leads to."""
        way = [await self._root()]
        todo = deque(place.names)
        links = 0
        while todo:
            name = todo.popleft()
            if name == b"..":
                way.pop()
                if not way:
                    raise DfsError(ErrorCode.NOT_PERMITTED, "a symbolic link that leads out of the exported tree")
                continue
            if not way[-1].is_directory:
                raise DfsError(ErrorCode.NOT_DIRECTORY, f"{_text(way[-1].name)} is not a directory")
            node = await self.look_up(way[-1].ino, name)
            if node.is_link and (todo or follow):
                links += 1
                if links > MAX_LINKS:
                    raise DfsError(ErrorCode.INVALID, f"more than {MAX_LINKS} symbolic links")
                todo.extendleft(reversed(link_parts(node.target)))
            else:
                way.append(node)
        return way[-1]

    async def find_directory(self, names: tuple[bytes, ...]) -> Node:
        node = await self.find(Place(names, True))
        if not node.is_directory:
            raise DfsError(ErrorCode.NOT_DIRECTORY, f"{Place(names, False)} is not a directory")
        return node

    async def _root(self) -> Node:
        inode = await self.client.core.attributes(self.root)
        return Node(0, b"", inode.attributes)

    async def look_up(self, parent: int, name: bytes) -> Node:
        """One entry of a directory."""
        vfs = self.client.vfs
        shown = await vfs.names.lookup(parent, name)
        try:
            target = await vfs.names.read_link(shown.ino) if stat.S_ISLNK(shown.mode) else b""
            inode = self.client.core.inodes.get(shown.ino)
            assert inode is not None, "an inode that is referred to is known"
            return Node(parent, name, inode.attributes, target)
        finally:
            vfs.forget(shown.ino, 1)

    # -- reading -----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def opened(self, node: Node) -> AsyncIterator[Opened]:
        """A regular file, open while the block lasts: it can be read to its end even if it is deleted meanwhile."""
        if not stat.S_ISREG(node.attributes.mode):
            raise DfsError(ErrorCode.INVALID, "neither a file nor a directory")
        files = self.client.vfs.files
        number = (await files.open(node.ino, os.O_RDONLY)).number
        try:
            yield Opened(number, self.client.core.handles.file(number).file.state)
        finally:
            files.release(number)

    async def read(self, opened: Opened, offset: int, length: int) -> bytes:
        return await self.client.vfs.files.read(opened.number, offset, length)

    async def listing(self, ino: int, after: int, limit: int, prefix: bytes) -> Listing:
        """At most ``limit`` entries after the cookie ``after`` whose names begin with ``prefix``, in the order in which
        they were made. There may be fewer although others follow."""
        found: list[DirectoryEntry] = []
        scanned = 0
        while scanned < SCAN_ENTRIES:
            # With a prefix, entries are looked through by whole pages.
            count = PAGE_ENTRIES if prefix else min(limit - len(found), PAGE_ENTRIES)
            page = await self.client.core.remote.read_directory(ino, after, count)
            for entry in page.entries:
                if len(found) == limit:
                    return Listing(found, after)
                after = entry.cookie
                if entry.attributes is not None and entry.name.startswith(prefix) and not is_hidden(entry.name):
                    found.append(entry)
            if page.end:
                return Listing(found, 0)
            if len(found) == limit:
                break
            scanned += len(page.entries)
        return Listing(found, after)

    async def extents(self, ino: int, offset: int, length: int) -> FileMap:
        return await self.client.core.remote.get_extents(ino, offset, length)

    # -- changing ----------------------------------------------------------------------------------------------

    async def make_directory(self, parent: int, name: bytes, mode: int) -> None:
        """Durable when it returns."""
        vfs = self.client.vfs
        shown = await vfs.names.make(parent, name, stat.S_IFDIR | mode, self.caller)
        vfs.forget(shown.ino, 1)
        await vfs.sync_names()

    async def remove(self, node: Node) -> None:
        """Removes a file, a symbolic link or an empty directory; durable when it returns."""
        if not node.parent:
            raise DfsError(ErrorCode.NOT_PERMITTED, "the exported directory itself cannot be removed")
        await self.client.vfs.names.unlink(node.parent, node.name, directory=node.is_directory)
        await self.client.vfs.sync_names()

    async def entries(self, ino: int, wanted: Callable[[DirectoryEntry], bool]) -> list[DirectoryEntry]:
        """All entries of a directory that are ``wanted``, the gateway's own included."""
        found: list[DirectoryEntry] = []
        cookie, end = 0, False
        while not end:
            page = await self.client.core.remote.read_directory(ino, cookie, PAGE_ENTRIES)
            found += _there(page.entries, wanted)
            cookie, end = page.entries[-1].cookie if page.entries else cookie, page.end
        return found


def _there(entries: Iterable[DirectoryEntry], wanted: Callable[[DirectoryEntry], bool]) -> list[DirectoryEntry]:
    return [entry for entry in entries if entry.attributes is not None and wanted(entry)]


def _text(name: bytes) -> str:
    return name.decode(errors="replace")

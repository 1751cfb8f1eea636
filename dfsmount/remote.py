"""What the mount asks for, one method per operation: this implementation asks the metaserver for each.

The next one will apply changes locally while it holds leases and send them as a journal (docs/design.md section 9);
therefore ``vfs`` knows this interface and not the protocol's calls.
"""

from collections.abc import Sequence

from metaserver import protocol
from metaserver.client import LostChange, MetaClient
from metaserver.protocol import (
    Attributes,
    DirectoryPage,
    Entry,
    FileMap,
    FsStats,
    Made,
    Renamed,
    ServerAddress,
    SetAttributes,
    Touch,
    Touched,
    Unlinked,
)
from metaserver.wire import Response

TOUCH_SECONDS = 10.0


class HeardLosses:
    """Of how many lost changes a descriptor has heard. Which files a change concerned is not asked: an fsync that fails
    without need is better than one that succeeds although something of its file is lost."""

    __slots__ = ("count",)

    def __init__(self, count: int) -> None:
        self.count = count


class Remote:
    """Changes of names come back in their envelope: ``time_ns`` is what the directories have now as mtime and ctime.

    Every method raises :class:`metaserver.errors.DfsError`; TIMEOUT after ``timeout_seconds``.

    Cancelling a change withdraws it: if it has not happened by then, it never will.
    """

    def __init__(self, meta: MetaClient, timeout_seconds: float) -> None:
        self._meta = meta
        self._timeout = timeout_seconds

    async def lookup(self, parent: int, name: bytes) -> Entry:
        return await self._meta.call(protocol.LOOKUP, protocol.Lookup(parent, name), timeout=self._timeout)

    async def get_attributes(self, ino: int) -> Entry:
        return await self._meta.call(protocol.GET_ATTRIBUTES, protocol.GetAttributes(ino), timeout=self._timeout)

    async def set_attributes(self, changes: SetAttributes) -> Attributes:
        return await self._meta.call(protocol.SET_ATTRIBUTES, changes, timeout=self._timeout)

    async def touch(self, touches: Sequence[Touch]) -> Touched:
        """Moves times of access; not tried again for long, since nobody waits for it."""
        request = protocol.TouchInodes(tuple(touches))
        return await self._meta.call(protocol.TOUCH, request, timeout=min(self._timeout, TOUCH_SECONDS))

    async def read_directory(self, ino: int, cookie: int, count: int) -> DirectoryPage:
        request = protocol.ReadDirectory(ino, cookie, count, True)
        return await self._meta.call(protocol.READ_DIRECTORY, request, timeout=self._timeout)

    async def read_directory_after(self, ino: int, name: bytes, count: int) -> DirectoryPage:
        request = protocol.ReadDirectory(ino, 0, count, True, name)
        return await self._meta.call(protocol.READ_DIRECTORY, request, timeout=self._timeout)

    async def make(self, request: protocol.Make) -> Response[Made]:
        return await self._meta.change(protocol.MAKE, request, timeout=self._timeout)

    async def unlink(self, parent: int, name: bytes, *, directory: bool) -> Response[Unlinked]:
        request = protocol.Unlink(parent, name, directory)
        return await self._meta.change(protocol.UNLINK, request, timeout=self._timeout)

    async def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> Response[Renamed]:
        request = protocol.Rename(parent, name, new_parent, new_name, flags)
        return await self._meta.change(protocol.RENAME, request, timeout=self._timeout)

    async def link(self, ino: int, new_parent: int, new_name: bytes) -> Attributes:
        return await self._meta.call(protocol.LINK, protocol.Link(ino, new_parent, new_name), timeout=self._timeout)

    async def get_xattr(self, ino: int, name: bytes) -> bytes:
        reply = await self._meta.call(protocol.GET_XATTR, protocol.GetXattr(ino, name), timeout=self._timeout)
        return reply.value

    async def set_xattr(self, ino: int, name: bytes, value: bytes) -> None:
        request = protocol.SetXattr(ino, name, value, protocol.XattrFlags.NONE)
        await self._meta.call(protocol.SET_XATTR, request, timeout=self._timeout)

    async def list_xattrs(self, ino: int) -> tuple[bytes, ...]:
        reply = await self._meta.call(protocol.LIST_XATTRS, protocol.ListXattrs(ino), timeout=self._timeout)
        return reply.names

    async def remove_xattr(self, ino: int, name: bytes) -> None:
        await self._meta.call(protocol.REMOVE_XATTR, protocol.RemoveXattr(ino, name), timeout=self._timeout)

    async def open(self, ino: int, *, writing: bool) -> Entry:
        return await self._meta.call(protocol.OPEN, protocol.Open(ino, writing), timeout=self._timeout)

    async def close(self, inos: Sequence[int]) -> None:
        await self._meta.call(protocol.CLOSE, protocol.Close(tuple(inos)), timeout=self._timeout)

    async def stat_fs(self, ino: int) -> FsStats:
        return await self._meta.call(protocol.STAT_FS, protocol.StatFs(ino), timeout=self._timeout)

    async def get_extents(self, ino: int, offset: int, length: int) -> FileMap:
        """A page of a file's map; readers ask for theirs themselves."""
        return await self._meta.call(
            protocol.GET_EXTENTS, protocol.GetExtents(ino, offset, length), timeout=self._timeout
        )

    async def set_copies(self, ino: int, copies: int) -> None:
        """Begins to give a file or a tree another number of copies; 0: the cluster's default."""
        await self._meta.call(protocol.SET_COPIES, protocol.SetFileCopies(ino, copies), timeout=self._timeout)

    @property
    def default_copies(self) -> int:
        return self._meta.copies

    async def servers(self) -> dict[int, ServerAddress]:
        return await self._meta.servers()

    async def sync(self, losses: HeardLosses | None = None) -> None:
        """Returns when everything this mount has done or seen is durable. Raises IO if a change was lost in a crash of
        the metaserver of which ``losses`` has not heard (None: nobody has)."""
        try:
            await self._meta.sync(losses.count if losses is not None else None, timeout=self._timeout)
        except LostChange:
            if losses is not None:
                losses.count = self._meta.lost_told
            raise

    def heard_losses(self) -> HeardLosses:
        """For a descriptor that is opened now: it is told of what nobody has heard of."""
        return HeardLosses(self._meta.lost_told)

    def now_ns(self) -> int:
        return self._meta.now_ns()

"""Names: lookup, listing, and everything that makes, moves and removes directory entries."""

import stat
from collections.abc import Iterator
from itertools import chain

import msgspec

from dfsmount.foreseen import Wanted
from dfsmount.handles import DirectoryHandle
from dfsmount.inodes import NEVER, Inode
from dfsmount.vfs_core import Core, Shown
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import (
    PAGE_ENTRIES,
    Attributes,
    DirectoryEntry,
    DirectoryPage,
    Make,
    Renamed,
    RenameFlags,
)

# Places of `.` and `..` in a listing; the metaserver's cookies count up from 1 and never come near.
COOKIE_DOT = (1 << 62) + 1
COOKIE_DOT_DOT = (1 << 62) + 2
_DIRECTORY_TYPE = stat.S_IFDIR >> 12


class Caller(msgspec.Struct, gc=False):
    """Whose process asks. ``told_privileged``: what the kernel says of its CAP_FSETID; None: it does not."""

    uid: int
    gid: int
    told_privileged: bool | None = None

    @property
    def privileged(self) -> bool:
        """Whether setuid and setgid stay when it empties a file."""
        return self.uid == 0 if self.told_privileged is None else self.told_privileged


class Listed(msgspec.Struct, gc=False):
    """One entry of a listing; the listing goes on after ``cookie``. ``inode`` is None for ``.`` and ``..``."""

    name: bytes
    cookie: int
    shown: Shown
    inode: Inode | None


class Names:
    """Operations on directory entries. ``root`` is the ino of the directory that is mounted."""

    def __init__(self, core: Core, root: int) -> None:
        self._core = core
        self._root = root

    def lookup_at_once(self, parent: int, name: bytes) -> Shown | None:
        """:meth:`lookup` of what is known; None: it has to be asked for. Raises NOT_FOUND."""
        core = self._core
        if core.fresh.lacks(parent, name) and core.inodes.believed(parent) is not None:
            raise DfsError(ErrorCode.NOT_FOUND)
        found = core.foreseen.take(parent, name)
        if found is None or core.inodes.outdates(found[0].ino, found[1]):
            return None
        attributes, asked_at = found
        inode = core.inodes.learn(attributes, asked_at, parent=_parent_of(attributes, parent))
        self._foresee(core.foreseen.after_hit(parent, name))
        return self._looked_up(parent, name, inode)

    async def lookup(self, parent: int, name: bytes) -> Shown:
        """Counts as one reference of the kernel."""
        core = self._core
        if core.fresh.lacks(parent, name):
            # Asks at most once a second, and so finds out if the directory is not known any more.
            await core.attributes(parent)
            if core.fresh.lacks(parent, name):
                raise DfsError(ErrorCode.NOT_FOUND)
        shown = self.lookup_at_once(parent, name)
        if shown is not None:
            return shown
        asked_at = core.inodes.now()
        entry = await core.remote.lookup(parent, name)
        inode = core.learn(entry, asked_at, _parent_of(entry.attributes, parent))
        self._foresee(core.foreseen.after_miss(parent, name))
        return self._looked_up(parent, name, inode)

    def _looked_up(self, parent: int, name: bytes, inode: Inode) -> Shown:
        core = self._core
        if core.files.made.get((parent, name), inode.ino) != inode.ino:
            del core.files.made[parent, name]
        inode.lookups += 1
        return core.show(inode)

    def _foresee(self, wanted: Wanted | None) -> None:
        if wanted is not None:
            self._core.jobs.start(self._fetch_foreseen, wanted)

    async def _fetch_foreseen(self, wanted: Wanted) -> None:
        """Fetches what is likely to be looked up next; whatever goes wrong, it is asked for again then."""
        core = self._core
        page = None
        asked_at = core.inodes.now()
        try:
            page = await core.remote.read_directory_after(wanted.parent, wanted.after, wanted.count)
        except DfsError:
            pass
        finally:
            core.foreseen.fill(wanted, page, asked_at)

    async def make(self, parent: int, name: bytes, mode: int, caller: Caller, *, rdev: int = 0) -> Shown:
        """mkdir(2) and mknod(2); counts as one reference."""
        return await self._make(Make(parent, name, mode, caller.uid, caller.gid, rdev))

    async def make_link(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Shown:
        """symlink(2); counts as one reference."""
        mode = stat.S_IFLNK | 0o777
        return await self._make(Make(parent, name, mode, caller.uid, caller.gid, target=target))

    async def _make(self, request: Make) -> Shown:
        core = self._core
        directory = stat.S_ISDIR(request.mode)
        request.open = directory and core.fresh.room
        asked_at = core.inodes.now()
        made = await core.make(request)
        parent = request.parent if directory else 0
        inode = core.inodes.changed(made.entry.attributes, asked_at, parent=parent, target=request.target)
        if request.open:
            core.fresh.add(inode.ino)
        inode.lookups += 1
        return core.show(inode)

    async def unlink(self, parent: int, name: bytes, *, directory: bool) -> None:
        core = self._core
        with core.changing_entries(parent):
            answer = await core.remote.unlink(parent, name, directory=directory)
        gone = answer.message
        core.removed_entry(parent, name)
        core.inodes.touched(parent, answer.time_ns, -directory)
        core.inodes.doubt(gone.ino)
        core.fresh.give_up(gone.ino)
        if gone.nlink == 0:
            core.lost_last_name(gone.ino, kept=gone.kept)

    async def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> None:
        """What is moved has its data committed first: after a crash a name never leads to contents from before."""
        core = self._core
        await self._flush_name(parent, name)
        if flags & RenameFlags.EXCHANGE:
            await self._flush_name(new_parent, new_name)
        with core.changing_entries(parent, new_parent):
            answer = await core.remote.rename(parent, name, new_parent, new_name, flags)
        moved = answer.message
        core.removed_entry(new_parent, new_name)
        core.removed_entry(parent, name)
        core.added_entry(new_parent, new_name)
        if flags & RenameFlags.EXCHANGE:
            core.added_entry(parent, name)
        if flags & RenameFlags.EXCHANGE:
            await self._note_exchange(parent, name, new_parent, moved)
        else:
            self._note_rename(parent, new_parent, moved, answer.time_ns)
        if moved.replaced and moved.replaced_nlink == 0:
            core.lost_last_name(moved.replaced, kept=moved.kept)

    def _note_rename(self, parent: int, new_parent: int, moved: Renamed, time_ns: int) -> None:
        """Attributes after a rename; those of directories that others may lie in are asked for again."""
        inodes = self._core.inodes
        inode = inodes.get(moved.ino)
        plain = inode is not None and not stat.S_ISDIR(inode.attributes.mode) and not moved.replaced
        for directory in {parent, new_parent}:
            if plain:
                inodes.touched(directory, time_ns)
            else:
                inodes.doubt(directory)
        inodes.doubt(moved.ino)
        inodes.doubt(moved.replaced)
        if inode is not None and inode.parent:
            inode.parent = new_parent

    async def _note_exchange(self, parent: int, name: bytes, new_parent: int, moved: Renamed) -> None:
        """The answer does not say what came the other way, and either may be a directory: asks."""
        core = self._core
        for ino in (parent, new_parent, moved.ino):
            core.inodes.doubt(ino)
        asked_at = core.inodes.now()
        try:
            entry = await core.remote.lookup(parent, name)
        except DfsError:
            # The exchange has happened all the same.
            return
        core.inodes.doubt(entry.attributes.ino)
        core.learn(entry, asked_at)
        for ino, directory in ((moved.ino, new_parent), (entry.attributes.ino, parent)):
            inode = core.inodes.get(ino)
            if inode is not None and inode.parent:
                inode.parent = directory

    async def link(self, ino: int, new_parent: int, new_name: bytes) -> Shown:
        """Counts as one reference."""
        core = self._core
        await core.commit(ino)
        asked_at = core.inodes.now()
        with core.changing_entries(new_parent):
            attributes = await core.remote.link(ino, new_parent, new_name)
        core.added_entry(new_parent, new_name)
        core.inodes.touched(new_parent, attributes.ctime_ns)
        inode = core.changed(attributes, asked_at)
        inode.lookups += 1
        return core.show(inode)

    async def read_link(self, ino: int) -> bytes:
        """A target never changes, so the one that came with the lookup will do."""
        core = self._core
        inode = core.inodes.get(ino)
        if inode is None or not inode.target:
            asked_at = core.inodes.now()
            entry = await core.remote.get_attributes(ino)
            inode = core.learn(entry, asked_at)
            if not stat.S_ISLNK(entry.attributes.mode):
                raise DfsError(ErrorCode.INVALID)
        if core.accesses.files:
            core.accesses.read(inode)
        return inode.target

    # -- listing -----------------------------------------------------------------------------------------------

    def open_directory(self, ino: int) -> int:
        """The number of a handle; needs no registration, a removed directory simply lists nothing."""
        return self._core.handles.add_directory(DirectoryHandle(ino, self._core.remote.heard_losses()))

    def release_directory(self, number: int) -> None:
        self._core.handles.remove_directory(number)

    async def list_directory(self, number: int, start: int) -> Iterator[Listed]:
        """Some entries after the cookie ``start`` (0: from the beginning); none at the end.

        Give those that the kernel takes to :meth:`took`, before any await.
        """
        handle = self._core.handles.directory(number)
        if start == 0:
            handle.rewind()
            dots = [_dot(handle.ino, b".", COOKIE_DOT), await self._dot_dot(handle.ino)]
            return chain(dots, await self._entries(handle, 0))
        if start == COOKIE_DOT:
            return chain([await self._dot_dot(handle.ino)], await self._entries(handle, 0))
        return await self._entries(handle, 0 if start == COOKIE_DOT_DOT else start)

    def _note_read(self, ino: int) -> None:
        inode = self._core.inodes.get(ino)
        if inode is not None and self._core.accesses.directories:
            self._core.accesses.read(inode)

    def took(self, listed: Listed) -> None:
        """The kernel took an entry: from now on it may name its inode, unless it is ``.`` or ``..``."""
        if listed.inode is not None:
            self._core.inodes.adopt(listed.inode)

    async def _entries(self, handle: DirectoryHandle, cookie: int) -> Iterator[Listed]:
        while (rest := handle.rest(cookie)) is None or (not handle.entries and not handle.end):
            cookie = cookie if rest is None else handle.last
            await self._fetch(handle, cookie)
        self._note_read(handle.ino)
        return self._listed(handle, rest)

    async def _fetch(self, handle: DirectoryHandle, cookie: int) -> None:
        handle.forget_page()
        asked_at = self._core.inodes.now()
        try:
            page = await self._core.remote.read_directory(handle.ino, cookie, PAGE_ENTRIES)
        except DfsError as error:
            if error.code is not ErrorCode.STALE_INODE:
                raise
            # A removed directory that is still open has no entries.
            page = DirectoryPage((), True)
        handle.fill(cookie, page, asked_at)

    def _listed(self, handle: DirectoryHandle, entries: Iterator[DirectoryEntry]) -> Iterator[Listed]:
        core = self._core
        for entry in entries:
            assert entry.attributes is not None
            inode = core.inodes.peek(entry.attributes, handle.asked_at)
            if handle.doubts(entry.ino):
                # The name may be gone: the kernel asks before it believes in it.
                inode.believed_until = NEVER
            if entry.type == _DIRECTORY_TYPE:
                inode.parent = handle.ino
            yield Listed(entry.name, entry.cookie, core.show(inode), inode)

    async def _dot_dot(self, ino: int) -> Listed:
        return _dot(await self._parent(ino), b"..", COOKIE_DOT_DOT)

    async def _parent(self, ino: int) -> int:
        """The directory above, as far as it is mounted."""
        if ino == self._root:
            return ino
        inode = self._core.inodes.get(ino)
        if inode is not None and inode.parent:
            return inode.parent
        asked_at = self._core.inodes.now()
        entry = await self._core.remote.lookup(ino, b"..")
        self._core.inodes.peek(entry.attributes, asked_at)
        return entry.attributes.ino

    async def _flush_name(self, parent: int, name: bytes) -> None:
        """Commits the data of whatever file has this name, if it is dirty here. Raises if some of it is lost."""
        core = self._core
        if core.writer.dirty_bytes == 0 and not core.losses:
            return
        ino = core.files.made.get((parent, name))
        if ino is None:
            entry = await core.remote.lookup(parent, name)
            ino = entry.attributes.ino
        await core.commit(ino)


def _parent_of(attributes: Attributes, parent: int) -> int:
    """``parent`` if this is a directory, which lies nowhere else; else 0."""
    return parent if stat.S_ISDIR(attributes.mode) else 0


def _dot(ino: int, name: bytes, cookie: int) -> Listed:
    """The kernel takes only number and type of these two."""
    shown = Shown(ino, 0, stat.S_IFDIR, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0)
    return Listed(name, cookie, shown, None)

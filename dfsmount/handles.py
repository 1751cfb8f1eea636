"""What is open: handles the kernel holds, and the files behind them with their registration at the metaserver.

A file stays registered (:class:`OpenFile` exists) from its first ``open`` until the metaserver has
been told that nothing of it is open or dirty any more, which happens lazily and in batches: unpacking an archive
closes thousands of files a second. While a CLOSE of a file is on its way, opening it again waits for the answer: a
CLOSE that was sent again after a reconnection must not overtake the OPEN.
"""

from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from operator import attrgetter

import trio

from dfsmount.ahead import Ahead
from dfsmount.filestate import FileState
from dfsmount.inodes import Inode, InodeTable
from dfsmount.readahead import ReadAhead
from dfsmount.remote import HeardLosses
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import DirectoryEntry, DirectoryPage, Opened

CLOSE_SECONDS = 0.5
CLOSE_BATCH = 500
# Of a page of a thousand entries; about 0.5 MB.
MAX_DOUBTED = 8192
_NO_LIMIT = (1 << 64) - 1
# An OPEN or a CLOSE that failed like this may have been carried out, or may yet be.
UNKNOWN_OUTCOME = frozenset({ErrorCode.TIMEOUT, ErrorCode.UNAVAILABLE, ErrorCode.CANCELLED})


class OpenFile:
    """A file that is open here, or was until a moment ago.

    ``pins`` counts handles and opens in progress; ``writing`` is whether it is registered for writing; ``stale``:
    another session changed it since ``state`` was refreshed; ``unlinked``: no name is left; ``made_as``: the parent and
    name it was created with here; ``ahead``: changed attributes that the metaserver has not answered yet; ``told``: of
    how many of the state's errors somebody has heard.
    """

    __slots__ = ("ahead", "inode", "made_as", "pins", "stale", "state", "told", "unlinked", "writing")

    def __init__(self, inode: Inode, state: FileState) -> None:
        self.inode = inode
        self.state = state
        self.pins = 0
        self.writing = False
        self.stale = False
        self.unlinked = False
        self.made_as: tuple[int, bytes] | None = None
        self.ahead: Ahead | None = None
        self.told = 0

    @property
    def ino(self) -> int:
        return self.inode.ino

    @property
    def settled(self) -> bool:
        """Whether the metaserver knows everything that was done to it here."""
        return self.ahead is None and not self.state.is_dirty

    def take_untold(self) -> DfsError | None:
        """Why written bytes are lost, if nobody has heard of that yet; the caller tells."""
        known, self.told = self.told, self.state.error_count
        return self.state.error_since(known)


class FileHandle:
    """One open(2). ``durable_writes``: O_SYNC or O_DSYNC; ``errors_seen`` of the state's errors were reported, and
    ``losses`` of the mount's lost changes; ``moves_atime``: whether reading through it moves the time of access."""

    __slots__ = ("durable_writes", "errors_seen", "file", "losses", "moves_atime", "read_ahead", "writing")

    def __init__(
        self,
        file: OpenFile,
        losses: HeardLosses,
        *,
        writing: bool,
        durable_writes: bool,
        moves_atime: bool = False,
    ) -> None:
        self.file = file
        self.losses = losses
        self.writing = writing
        self.durable_writes = durable_writes
        self.moves_atime = moves_atime
        # Not those that nobody has heard of: whoever had the file open before may have closed it too early for that.
        self.errors_seen = file.told
        self.read_ahead = ReadAhead()

    def raise_new_error(self) -> None:
        """Raises what went wrong with the file's data since this handle last heard of it; each error once."""
        state = self.file.state
        if state.error_count > self.errors_seen:
            error = state.error_since(self.errors_seen)
            self.errors_seen = self.file.told = state.error_count
            raise error or DfsError(ErrorCode.IO, "written data was lost")


class DirectoryHandle:
    """One opendir(3), with the page of entries being handed out: those with cookies from above ``after`` to ``last``.

    ``end``: nothing comes after the page. ``limit``: the highest cookie that belongs to this listing, None until the
    metaserver has told it: entries that are made later, or moved, get higher ones, and a program that renames all it
    is shown would otherwise be shown the new names, and never come to an end.
    ``_doubted`` are inodes of which this mount knows nothing any more, but may have known something newer than the
    page; None: they are too many to name.
    """

    __slots__ = ("_doubted", "after", "asked_at", "end", "entries", "ino", "last", "limit", "losses")

    def __init__(self, ino: int, losses: HeardLosses) -> None:
        self.losses = losses
        self.ino = ino
        self._doubted: set[int] | None = set()
        self.rewind()

    def rewind(self) -> None:
        """The listing begins anew, with what is there then."""
        self.limit: int | None = None
        self.forget_page()

    def forget_page(self) -> None:
        """Another is going to be asked for."""
        self.entries: Sequence[DirectoryEntry] = ()
        self.after = self.last = -1
        self.end = False
        self.asked_at = 0.0
        self._doubted = set()

    def doubt(self, ino: int) -> None:
        """This mount forgets an inode of which it may have known something newer than the page tells, or than the page
        that is on its way."""
        if self._doubted is not None:
            self._doubted.add(ino)
            if len(self._doubted) > MAX_DOUBTED:
                self._doubted = None

    def doubts(self, ino: int) -> bool:
        """Whether what the page tells of an inode may be outdated, and nothing else tells."""
        return self._doubted is None or ino in self._doubted

    def fill(self, after: int, page: DirectoryPage, asked_at: float) -> None:
        """Takes the page that follows ``after``. Entries without attributes went away while it was read."""
        if self.limit is None:
            self.limit = page.last or _NO_LIMIT
        limit = self.limit
        self.entries = [entry for entry in page.entries if entry.attributes is not None and entry.cookie <= limit]
        self.after = after
        self.last = page.entries[-1].cookie if page.entries else after
        self.end = page.end or self.last >= limit
        self.asked_at = asked_at

    def rest(self, cookie: int) -> Iterator[DirectoryEntry] | None:
        """The entries of the page after ``cookie``; None if the page does not tell what follows it."""
        if not self.after <= cookie <= self.last or (cookie == self.last and not self.end):
            return None
        start = bisect_right(self.entries, cookie, key=attrgetter("cookie"))
        return islice(self.entries, start, None)


class HandleTable:
    """Handles by the number the kernel uses for them; numbers are never reused."""

    def __init__(self) -> None:
        self._files: dict[int, FileHandle] = {}
        self._directories: dict[int, DirectoryHandle] = {}
        self._last = 0

    def __len__(self) -> int:
        return len(self._files) + len(self._directories)

    def add_file(self, handle: FileHandle) -> int:
        self._last += 1
        self._files[self._last] = handle
        return self._last

    def add_directory(self, handle: DirectoryHandle) -> int:
        self._last += 1
        self._directories[self._last] = handle
        return self._last

    def inode_of(self, number: int) -> int:
        """0: there is no such handle."""
        file = self._files.get(number)
        if file is not None:
            return file.file.ino
        directory = self._directories.get(number)
        return 0 if directory is None else directory.ino

    def file(self, number: int) -> FileHandle:
        handle = self._files.get(number)
        if handle is None:
            raise DfsError(ErrorCode.INVALID, f"no open file {number}")
        return handle

    def directory(self, number: int) -> DirectoryHandle:
        handle = self._directories.get(number)
        if handle is None:
            raise DfsError(ErrorCode.INVALID, f"no open directory {number}")
        return handle

    def doubt(self, ino: int) -> None:
        """To every directory that is being listed: see :meth:`DirectoryHandle.doubt`."""
        for directory in self._directories.values():
            directory.doubt(ino)

    def remove_file(self, number: int) -> FileHandle | None:
        return self._files.pop(number, None)

    def remove_directory(self, number: int) -> None:
        self._directories.pop(number, None)


class OpenFiles:
    """All :class:`OpenFile` of the mount.

    Invariants: ``inode.opened`` is set exactly for the files in the table; ``_idle`` holds those of them without pins;
    ``_closing`` the inos whose CLOSE is on its way, which are in the table no more; ``_opening`` counts the OPENs on
    their way. An ino is never in ``_closing`` and ``_opening`` at once. ``made`` has the inos of names created here, as
    long as they are registered: a rename then finds the inode without asking. ``_doubted`` are inos of which it is not
    known whether they are registered.
    """

    def __init__(self, inodes: InodeTable) -> None:
        self.made: dict[tuple[int, bytes], int] = {}
        self._inodes = inodes
        self._files: dict[int, OpenFile] = {}
        self._idle: dict[int, OpenFile] = {}
        self._closing: dict[int, trio.Event] = {}
        self._opening: dict[int, int] = {}
        self._doubted: dict[int, None] = {}
        self._many_idle = trio.Event()

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[OpenFile]:
        return iter(self._files.values())

    def get(self, ino: int) -> OpenFile | None:
        return self._files.get(ino)

    def add(self, inode: Inode, make_state: Callable[[], FileState]) -> OpenFile:
        """The file of ``inode``, made if there is none; pin it before the next await."""
        file = self._files.get(inode.ino)
        if file is None:
            file = self._files[inode.ino] = inode.opened = OpenFile(inode, make_state())
            lost, inode.lost = inode.lost, None
            if lost is not None:
                file.state.fail(lost)
        return file

    def note_made(self, file: OpenFile, parent: int, name: bytes) -> None:
        file.made_as = (parent, name)
        self.made[parent, name] = file.ino

    def pin(self, file: OpenFile) -> None:
        file.pins += 1
        self._idle.pop(file.ino, None)

    def unpin(self, file: OpenFile) -> None:
        file.pins -= 1
        if file.pins == 0:
            self._idle[file.ino] = file
            if len(self._idle) >= CLOSE_BATCH:
                self._many_idle.set()

    @asynccontextmanager
    async def opening(self, ino: int) -> AsyncIterator[None]:
        """Around an OPEN: no CLOSE of ``ino`` is on its way at its start, and none is sent until its end."""
        while (event := self._closing.get(ino)) is not None:
            await event.wait()
        self._opening[ino] = self._opening.get(ino, 0) + 1
        try:
            yield
        except DfsError as error:
            if error.code in UNKNOWN_OUTCOME:
                self.doubt(ino)
            raise
        except trio.Cancelled:
            self.doubt(ino)
            raise
        finally:
            self._opening[ino] -= 1
            if self._opening[ino] == 0:
                del self._opening[ino]

    def doubt(self, ino: int) -> None:
        """It may be registered although it is not open here: it is deregistered with those that are idle."""
        self._doubted[ino] = None

    def opened(self) -> list[Opened]:
        """What the metaserver has to know about after a reconnection."""
        return [Opened(file.ino, file.writing) for file in self._files.values()]

    def take_idle(self) -> list[int]:
        """Inos to deregister now; each must be given to :meth:`closed` afterwards."""
        ready = (ino for ino, file in self._idle.items() if ino not in self._opening and file.settled)
        inos = list(islice(ready, CLOSE_BATCH))
        event = trio.Event()
        for ino in inos:
            self._closing[ino] = event
            self._remove(self._idle.pop(ino))
        for ino in [ino for ino in self._doubted if ino not in self._opening and ino not in self._closing]:
            del self._doubted[ino]
            if ino not in self._files:
                self._closing[ino] = event
                inos.append(ino)
        return inos

    def _remove(self, file: OpenFile) -> None:
        inode = file.inode
        del self._files[inode.ino]
        inode.opened = None
        inode.lost = file.take_untold() or inode.lost
        if file.made_as is not None and self.made.get(file.made_as) == inode.ino:
            del self.made[file.made_as]
        # What the writer learned with its commits is newer than what was known at the open.
        if file.state.attributes.data_version > inode.attributes.data_version:
            inode.attributes = file.state.attributes
        self._inodes.drop_unused(inode)

    def closed(self, inos: list[int]) -> None:
        for ino in inos:
            event = self._closing.pop(ino, None)
            if event is not None:
                event.set()

    async def wait_idle(self) -> None:
        """Returns after ``CLOSE_SECONDS``, or when a full batch has gathered."""
        with trio.move_on_after(CLOSE_SECONDS):
            await self._many_idle.wait()
        self._many_idle = trio.Event()

"""What the halves of the virtual filesystem share: the tables, and what the kernel is told about an inode."""

import stat
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import msgspec
import trio

from dfsmount.ahead import Deferred
from dfsmount.atimes import AccessTimes
from dfsmount.foreseen import Foreseen
from dfsmount.fresh import FreshDirectories
from dfsmount.handles import HandleTable, OpenFile, OpenFiles
from dfsmount.inodes import Inode, InodeTable
from dfsmount.jobs import Jobs
from dfsmount.reader import Reader
from dfsmount.remote import Remote
from dfsmount.writer import Writer
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import Attributes, Entry, FileMap, Made, Make, Touch

# What stdio and cp take as the size of their buffers; also the unit of verification.
BLOCK_BYTES = 64 << 10
SECTOR_BYTES = 512


class VfsOptions(msgspec.Struct, frozen=True):
    """``sync_close``: close waits for the commit. ``noatime``, ``nodiratime``: reading anything, or directories, leaves
    their time of access. Time-outs in seconds."""

    attr_timeout: float = 1.0
    entry_timeout: float = 1.0
    sync_close: bool = False
    read_only: bool = False
    noatime: bool = False
    nodiratime: bool = False


class Kernel(Protocol):
    """What can be told to the kernel without being asked. Unknown inodes are no error."""

    def forget_attributes(self, ino: int) -> None:
        """Drops cached attributes. Never blocks, so that a handler may call it."""

    def forget_contents(self, inos: Sequence[int]) -> None:
        """Drops attributes and cached pages. Blocks until reads in progress have ended: call it in a thread."""


class Shown(msgspec.Struct, gc=False):
    """An inode as the kernel is told: local sizes and times of unwritten data included. ``blocks`` of 512 bytes."""

    ino: int
    generation: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    entry_seconds: float
    attr_seconds: float


class Core:
    """The state of a mount. ``run_sync`` runs what blocks in a thread."""

    def __init__(
        self,
        remote: Remote,
        writer: Writer,
        reader: Reader,
        kernel: Kernel,
        options: VfsOptions,
        run_sync: Callable[..., Awaitable[Any]] = trio.to_thread.run_sync,
    ) -> None:
        self.remote = remote
        self.writer = writer
        self.reader = reader
        self.kernel = kernel
        self.options = options
        self._run_sync = run_sync
        self.foreseen = Foreseen(options.attr_timeout, trio.current_time)
        self.inodes = InodeTable(options.attr_timeout, left=self._inode_left)
        self.files = OpenFiles(self.inodes)
        self.handles = HandleTable()
        self.fresh = FreshDirectories()
        self.jobs = Jobs()
        self.deferred = Deferred(remote.set_attributes, self.jobs, self.changed)
        atimes = not options.noatime and not options.read_only
        self.accesses = AccessTimes(
            remote.touch,
            self._touched,
            remote.now_ns,
            files=atimes,
            directories=atimes and not options.nodiratime,
        )
        # How often written bytes were lost, and why the last time.
        self.losses = 0
        self.last_loss: DfsError | None = None
        self._doubted_contents: set[int] = set()
        self._doubts = trio.Event()

    def _inode_left(self, ino: int) -> None:
        """From now on nothing tells that answers which came before may be outdated."""
        self.foreseen.forget_inode(ino)
        self.handles.doubt(ino)

    # -- learning and showing ----------------------------------------------------------------------------------

    def learn(self, entry: Entry, asked_at: float, parent: int = 0) -> Inode:
        """Takes the answer to a question asked at ``asked_at`` into all tables."""
        known = self.inodes.get(entry.attributes.ino)
        news = known is None or self.inodes.is_news(known, entry.attributes, asked_at)
        inode = self.inodes.learn(entry.attributes, asked_at, parent=parent, target=entry.target)
        if inode.opened is not None and news:
            inode.opened.state.refresh(entry)
        return inode

    def changed(self, attributes: Attributes, asked_at: float) -> Inode:
        """Takes the attributes that a change of our own has left."""
        inode = self.inodes.changed(attributes, asked_at)
        if inode.opened is not None:
            inode.opened.state.refresh(entry_of(attributes))
        return inode

    async def attributes(self, ino: int) -> Inode:
        """The inode with attributes that may be shown; asks if necessary."""
        inode = self.inodes.believed(ino)
        if inode is not None:
            return inode
        asked_at = self.inodes.now()
        try:
            entry = await self.remote.get_attributes(ino)
        except DfsError as error:
            inode = self.inodes.get(ino)
            if error.code is not ErrorCode.STALE_INODE or inode is None or not inode.gone:
                raise
            # Somebody has a descriptor of it that was never opened here: a FIFO, or one of O_PATH.
            inode.attributes = msgspec.structs.replace(inode.attributes, nlink=0)
            return inode
        return self.learn(entry, asked_at)

    def show(self, inode: Inode) -> Shown:
        """What the kernel is to be told now."""
        opened = inode.opened
        attributes = inode.attributes
        if opened is not None and opened.state.attributes.data_version > attributes.data_version:
            # A commit's answer, which goes to the state only.
            attributes = inode.attributes = opened.state.attributes
        left = self.inodes.seconds_left(inode)
        shown = Shown(
            attributes.ino,
            attributes.generation,
            attributes.mode,
            attributes.nlink,
            attributes.uid,
            attributes.gid,
            attributes.rdev,
            attributes.size,
            -(-attributes.allocated // SECTOR_BYTES),
            attributes.atime_ns,
            attributes.mtime_ns,
            attributes.ctime_ns,
            min(left, self.options.entry_timeout),
            left,
        )
        if opened is not None:
            _show_local(shown, opened)
        if self.accesses:
            shown.atime_ns = self.accesses.shown(shown.ino, shown.atime_ns)
        inode.shown_size = shown.size
        return shown

    def _touched(self, touch: Touch, done: bool) -> None:
        """The metaserver has moved a time of access, or has left it for a reason that only it knows."""
        if done:
            self.inodes.moved_atime(touch.ino, touch.seen_ns, touch.atime_ns)
        else:
            self.inodes.doubt(touch.ino)

    # -- what others changed -----------------------------------------------------------------------------------

    def doubt_contents(self, inos: Sequence[int]) -> None:
        """Others changed these inodes: the kernel's caches of them are dropped soon, ours at the next use."""
        for ino in inos:
            self.inodes.doubt(ino)
            self.fresh.give_up(ino)
            self.foreseen.forget_directory(ino)
            self.foreseen.forget_inode(ino)
            file = self.files.get(ino)
            if file is not None:
                file.stale = True
        self._doubted_contents.update(inos)
        self._doubts.set()

    async def tell_kernel(self) -> None:
        """Drops the kernel's caches of what others changed or what was lost, for ever. Its thread may wait for reads in
        progress, which is why no handler does this."""
        while True:
            await self._doubts.wait()
            self._doubts = trio.Event()
            inos, self._doubted_contents = sorted(self._doubted_contents), set()
            await self._run_sync(self.kernel.forget_contents, inos, abandon_on_cancel=True)

    # -- entries of directories ----------------------------------------------------------------------------------

    @contextmanager
    def changing_entries(self, *directories: int) -> Iterator[None]:
        """Around a change of entries: if it fails, nobody knows what is there."""
        try:
            yield
        except BaseException:
            for ino in directories:
                self.fresh.give_up(ino)
                self.foreseen.forget_directory(ino)
                self.inodes.doubt(ino)
            raise

    async def make(self, request: Make) -> Made:
        """Makes an entry and learns what that does to its directory."""
        with self.changing_entries(request.parent):
            answer = await self.remote.make(request)
        made = answer.message
        self.added_entry(request.parent, request.name)
        if made.created:
            links = int(stat.S_ISDIR(made.entry.attributes.mode))
            self.inodes.touched(request.parent, answer.time_ns, links)
        return made

    def added_entry(self, parent: int, name: bytes) -> None:
        self.fresh.added(parent, name)
        self.foreseen.forget_name(parent, name)

    def removed_entry(self, parent: int, name: bytes) -> None:
        self.foreseen.forget_name(parent, name)
        self.files.made.pop((parent, name), None)
        self.fresh.removed(parent, name)

    # -- unwritten data ----------------------------------------------------------------------------------------

    async def flush(self, ino: int) -> None:
        """Makes the metaserver know everything that was done to ``ino`` here."""
        file = self.files.get(ino)
        if file is not None and not file.settled:
            await self.flush_file(file)

    async def commit(self, ino: int) -> None:
        """:meth:`flush`, before the inode gets another name: that name must not lead to contents that lack some of what
        was written. Raises why bytes are lost, if nobody was told of that yet."""
        await self.flush(ino)
        self.raise_untold(ino)

    def raise_untold(self, ino: int) -> None:
        """Raises why written bytes of ``ino`` are lost, if nobody has heard of that yet; from now on somebody has."""
        inode = self.inodes.get(ino)
        if inode is None:
            return
        lost, inode.lost = inode.lost, None
        if inode.opened is not None:
            lost = inode.opened.take_untold() or lost
        if lost is not None:
            raise lost

    def note_loss(self, ino: int, error: DfsError) -> None:
        """Written bytes are lost because of ``error``: the kernel must not go on showing what will never be stored."""
        self.losses += 1
        self.last_loss = error
        inode = self.inodes.get(ino)
        if inode is not None:
            inode.kernel_version = -1
        self._doubted_contents.add(ino)
        self._doubts.set()

    async def flush_file(self, file: OpenFile, *, durable: bool = False) -> None:
        await self.deferred.settle(file)
        if file.state.is_dirty:
            await self.writer.flush(file.state, durable=durable)

    def lost_last_name(self, ino: int, *, kept: bool) -> None:
        """The inode has no name any more: nobody will ever want its dirty data unless it is open, or in the trash."""
        inode = self.inodes.get(ino)
        if inode is not None:
            inode.gone = True
        file = self.files.get(ino)
        if file is not None and not kept:
            file.unlinked = True
            self.discard_unwanted(file)

    def discard_unwanted(self, file: OpenFile) -> None:
        """Drops unwritten data if nobody can read the file any more."""
        if file.unlinked and file.pins == 0 and file.state.is_dirty:
            self.writer.discard(file.state)


def entry_of(attributes: Attributes) -> Entry:
    """An entry for attributes that came without a map, which is known all the same if there is no data."""
    return Entry(attributes, FileMap((), (), attributes.size) if attributes.allocated == 0 else None)


def _show_local(shown: Shown, file: OpenFile) -> None:
    """Puts what the metaserver does not know yet over what it said: unwritten data, and attributes just set."""
    state = file.state
    if state.is_dirty:
        shown.size, shown.mtime_ns, shown.ctime_ns = state.size, state.mtime_ns, max(shown.ctime_ns, state.ctime_ns)
        shown.blocks -= -sum(layer.size for layer in state.dirty.layers) // SECTOR_BYTES
    if file.ahead is None:
        return
    changes = file.ahead.changes
    if changes.mode is not None:
        shown.mode = stat.S_IFMT(shown.mode) | stat.S_IMODE(changes.mode)
    shown.uid = shown.uid if changes.uid is None else changes.uid
    shown.gid = shown.gid if changes.gid is None else changes.gid
    shown.atime_ns = shown.atime_ns if changes.atime_ns is None else changes.atime_ns
    shown.mtime_ns = shown.mtime_ns if changes.mtime_ns is None else changes.mtime_ns
    shown.ctime_ns = max(shown.ctime_ns, changes.ctime_ns or shown.ctime_ns)

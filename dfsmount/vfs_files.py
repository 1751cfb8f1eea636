"""Contents: opening, reading, writing, truncating, and what must be on stable storage when."""

import os
import stat
from functools import partial

import msgspec
import structlog
import trio

from dfsmount.filestate import FileState
from dfsmount.handles import UNKNOWN_OUTCOME, FileHandle, OpenFile
from dfsmount.inodes import Inode
from dfsmount.vfs_core import Core, Shown
from dfsmount.vfs_names import Caller
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import Entry, Make, SetAttributes

log = structlog.get_logger(__name__)

# O_SYNC includes the bit of O_DSYNC.
_DURABLE = os.O_DSYNC


class Opened(msgspec.Struct, gc=False):
    """How the kernel is to use a file it has opened; ``keep_cache``: its pages are still right."""

    number: int
    direct: bool
    keep_cache: bool


class Files:
    """Operations on contents. Every method raises :class:`metaserver.errors.DfsError`."""

    def __init__(self, core: Core) -> None:
        self._core = core

    # -- open and close ----------------------------------------------------------------------------------------

    async def open(self, ino: int, flags: int, *, privileged: bool = True) -> Opened:
        """open(2) of a file that exists; O_TRUNC included (libfuse asks the kernel to leave it to us), which takes
        S_ISUID and S_ISGID away unless the caller is ``privileged``.

        The metaserver is asked every time: it fetches what other sessions have not written yet.
        """
        core = self._core
        # Linux truncates even what is only opened for reading, if the caller may write to it.
        writing = flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & os.O_TRUNC)
        if writing and core.options.read_only:
            raise DfsError(ErrorCode.READ_ONLY)
        async with core.files.opening(ino):
            known = core.files.get(ino)
            level = writing or (known is not None and known.writing)
            asked_at = core.inodes.now()
            entry = await core.remote.open(ino, writing=level)
            inode = core.learn(entry, asked_at)
            file = self._register(inode, entry, level)
            if level:
                file.state.quota = entry.quota
            # Somebody changed it while the question was open: the answer may be from before.
            file.stale = asked_at < inode.doubted_at
        keep_cache = inode.kernel_version == entry.attributes.data_version
        inode.kernel_version = entry.attributes.data_version
        if inode.shown_size != file.state.size:
            # The kernel takes the offset of an append from the size it believes in, which may be another.
            core.kernel.forget_attributes(ino)
        if flags & os.O_TRUNC:
            await self._truncate_opened(file, privileged=privileged)
        if keep_cache or not file.state.size:
            self._note_unseen_read(inode, flags)
        return self._hand_out(file, flags, keep_cache)

    def _note_unseen_read(self, inode: Inode, flags: int) -> None:
        """Reads of pages that the kernel has, and of empty files, do not come here: who opens such a file only to read
        it is taken to read it."""
        core = self._core
        reading = flags & os.O_ACCMODE == os.O_RDONLY and not flags & os.O_NOATIME
        if reading and core.accesses.files and core.accesses.read(inode):
            core.kernel.forget_attributes(inode.ino)

    async def create(self, parent: int, name: bytes, mode: int, flags: int, caller: Caller) -> tuple[Opened, Shown]:
        """open(2) with O_CREAT; counts as one reference of the kernel."""
        core = self._core
        asked_at = core.inodes.now()
        request = Make(parent, name, mode, caller.uid, caller.gid, open=True, exclusive=bool(flags & os.O_EXCL))
        try:
            made = await core.make(request)
        except DfsError as error:
            if error.code in UNKNOWN_OUTCOME:
                core.jobs.start(self._doubt_made, parent, name)
            raise
        except trio.Cancelled:
            core.jobs.start(self._doubt_made, parent, name)
            raise
        if not made.created:
            return await self._open_existing(made.entry, flags, privileged=caller.privileged)
        inode = core.inodes.changed(made.entry.attributes, asked_at)
        file = self._register(inode, made.entry, True)
        core.files.note_made(file, parent, name)
        inode.kernel_version = made.entry.attributes.data_version
        inode.lookups += 1
        return self._hand_out(file, flags, True), core.show(inode)

    async def _doubt_made(self, parent: int, name: bytes) -> None:
        """The answer to a create did not come in time. If it has happened, the metaserver has the file as open here."""
        try:
            entry = await self._core.remote.lookup(parent, name)
        except DfsError as error:
            log.info("nothing was made after all, or it cannot be told", error=str(error))
        else:
            self._core.files.doubt(entry.attributes.ino)

    async def _open_existing(self, entry: Entry, flags: int, *, privileged: bool) -> tuple[Opened, Shown]:
        """Another session was faster to create it."""
        opened = await self.open(entry.attributes.ino, flags, privileged=privileged)
        inode = self._core.handles.file(opened.number).file.inode
        inode.lookups += 1
        return opened, self._core.show(inode)

    def _register(self, inode: Inode, entry: Entry, writing: bool) -> OpenFile:
        """The open file, pinned."""
        core = self._core
        file = core.files.add(inode, lambda: FileState(entry, partial(core.note_loss, inode.ino)))
        core.files.pin(file)
        file.writing = file.writing or writing
        return file

    def _hand_out(self, file: OpenFile, flags: int, keep_cache: bool) -> Opened:
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        durable = bool(flags & _DURABLE)
        moves_atime = self._core.accesses.files and not flags & os.O_NOATIME
        losses = self._core.remote.heard_losses()
        handle = FileHandle(file, losses, writing=writing, durable_writes=durable, moves_atime=moves_atime)
        return Opened(self._core.handles.add_file(handle), bool(flags & os.O_DIRECT), keep_cache)

    async def _truncate_opened(self, file: OpenFile, *, privileged: bool) -> None:
        mode = self._core.show(file.inode).mode
        kept = mode if privileged else without_special_bits(mode)
        try:
            await self.set_attributes(SetAttributes(file.ino, size=0, mode=None if kept == mode else kept))
        except BaseException:
            self._core.files.unpin(file)
            raise
        if kept != mode:
            # It believes in the mode that it knows.
            self._core.kernel.forget_attributes(file.ino)

    async def flush(self, number: int) -> None:
        """close(2) of one descriptor: starts writing and tells of what failed before; waits only if asked to."""
        if not self.flush_at_once(number):
            handle = self._core.handles.file(number)
            await self._core.flush_file(handle.file)
            self._tell_at_close(handle)

    def flush_at_once(self, number: int) -> bool:
        """:meth:`flush` if it does not wait; False: it would."""
        core = self._core
        handle = core.handles.file(number)
        file = handle.file
        if not file.settled and not file.unlinked:
            if core.options.sync_close:
                return False
            core.deferred.send(file)
            if file.state.is_dirty:
                core.writer.flush_soon(file.state)
        self._tell_at_close(handle)
        return True

    @staticmethod
    def _tell_at_close(handle: FileHandle) -> None:
        """A reader's close tells nobody, and must not take the error from those who ask for it."""
        if handle.writing:
            handle.raise_new_error()

    def release(self, number: int) -> None:
        """The last descriptor of a handle is gone."""
        core = self._core
        handle = core.handles.remove_file(number)
        if handle is not None:
            core.files.unpin(handle.file)
            core.discard_unwanted(handle.file)

    # -- contents ----------------------------------------------------------------------------------------------

    async def read(self, number: int, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes; fewer only at the end of the file."""
        core = self._core
        handle = core.handles.file(number)
        file = handle.file
        if file.stale:
            await self._revalidate(file)
        data = await core.reader.read(file.state, handle.read_ahead, offset, length)
        if handle.moves_atime:
            core.accesses.read(file.inode)
        return data

    def write_at_once(self, number: int, offset: int, data: bytes) -> bool:
        """:meth:`write` if it has to wait for nothing, and has nothing to tell but that."""
        handle = self._core.handles.file(number)
        file = handle.file
        if handle.durable_writes or file.ahead is not None or file.state.error_count > handle.errors_seen:
            return False
        return self._core.writer.take(file.state, offset, data)

    async def write(self, number: int, offset: int, data: bytes) -> int:
        """Takes all of ``data``; on stable storage already only for O_SYNC and O_DSYNC."""
        core = self._core
        handle = core.handles.file(number)
        state = handle.file.state
        if state.error_count > handle.errors_seen:
            handle.raise_new_error()
        if handle.file.ahead is not None:
            # A time that was set before must not reach the metaserver after the time of this write.
            await core.deferred.settle(handle.file)
        try:
            await core.writer.write(state, offset, data)
        except DfsError:
            # If it is a loss, it is told with this.
            handle.raise_new_error()
            raise
        if handle.durable_writes:
            await self.fsync(number)
        return len(data)

    async def fsync(self, number: int) -> None:
        """Everything this mount has done or seen of the file is on stable storage, data and names."""
        core = self._core
        handle = core.handles.file(number)
        if not handle.file.settled:
            await core.flush_file(handle.file, durable=True)
        handle.raise_new_error()
        await core.remote.sync(handle.losses)

    async def _revalidate(self, file: OpenFile) -> None:
        """Another session changed the file since it was opened here."""
        core = self._core
        file.stale = False
        asked_at = core.inodes.now()
        try:
            entry = await core.remote.get_attributes(file.ino)
        except BaseException:
            file.stale = True
            raise
        core.learn(entry, asked_at)

    # -- attributes that concern contents ----------------------------------------------------------------------

    async def set_attributes(self, changes: SetAttributes, number: int | None = None) -> Inode:
        """chmod(2), chown(2), utimensat(2), truncate(2); ftruncate(2) through the handle ``number``."""
        core = self._core
        inode = self.set_at_once(changes)
        if inode is not None:
            return inode
        file = core.files.get(changes.ino)
        if changes.atime_ns is not None or changes.atime_now:
            core.accesses.forget(changes.ino)
        if file is None:
            self._tell_before_resizing(changes, number)
            return await self._ask_for(changes)
        if changes.mtime_ns is not None:
            # Commits of what was written before must not bring their own time afterwards.
            file.state.leave_times()
        core.files.pin(file)
        try:
            await core.deferred.settle(file)
            if changes.size is not None:
                self._tell_before_resizing(changes, number)
                return await self._truncate(file, changes.size, changes)
            return await self._ask_for(changes)
        finally:
            core.files.unpin(file)

    def set_at_once(self, changes: SetAttributes) -> Inode | None:
        """:meth:`set_attributes` of a file for which the metaserver may be told later (``ahead``); else None."""
        core = self._core
        file = core.files.get(changes.ino)
        if file is None or not core.deferred.can_take(file, changes) or core.inodes.believed(changes.ino) is None:
            return None
        if changes.atime_ns is not None or changes.atime_now:
            core.accesses.forget(changes.ino)
        if changes.mtime_ns is not None:
            file.state.leave_times()
        changes.ctime_ns = core.remote.now_ns()
        core.deferred.take(file, changes)
        return file.inode

    def may_have_special_bits(self, ino: int) -> bool:
        """Whether S_ISUID or S_ISGID may be set, so that it has to be seen whether they go."""
        inode = self._core.inodes.believed(ino)
        if inode is None:
            return True
        ahead = inode.opened.ahead if inode.opened is not None else None
        mode = inode.attributes.mode | ((ahead.changes.mode or 0) if ahead is not None else 0)
        return bool(mode & (stat.S_ISUID | stat.S_ISGID))

    async def drop_special_bits(self, ino: int) -> None:
        """Before a write by a user: see :func:`without_special_bits`."""
        mode = self._core.show(await self._core.attributes(ino)).mode
        kept = without_special_bits(mode)
        if kept != mode:
            await self.set_attributes(SetAttributes(ino, mode=kept))
            # It believes in the mode that it knows.
            self._core.kernel.forget_attributes(ino)

    def _tell_before_resizing(self, changes: SetAttributes, number: int | None) -> None:
        """Raises why bytes are lost if the caller, or anybody, has not heard of it yet: the new size would put zeroes
        in their place, or keep what was written before them with what was done after (P3). Nothing is kept of an empty
        file, and emptying it may be how space is made."""
        if changes.size:
            if number is not None:
                self._core.handles.file(number).raise_new_error()
            self._core.raise_untold(changes.ino)

    async def _truncate(self, file: OpenFile, size: int, changes: SetAttributes) -> Inode:
        await self._core.writer.truncate_local(file.state, size)
        try:
            return await self._ask_for(changes)
        except BaseException:
            file.state.truncate_failed()
            raise

    async def _ask_for(self, changes: SetAttributes) -> Inode:
        core = self._core
        asked_at = core.inodes.now()
        attributes = await core.remote.set_attributes(changes)
        if changes.atime_ns is not None or changes.atime_now:
            # Reads that came meanwhile.
            core.accesses.forget(changes.ino)
        return core.changed(attributes, asked_at)


def without_special_bits(mode: int) -> int:
    """What a change of the contents by a user leaves of a mode: as Linux asks of FUSE filesystems (fuse_setattr).
    S_ISGID without group execution was once mandatory locking, and stays."""
    kept = mode & ~stat.S_ISUID
    return kept & ~stat.S_ISGID if mode & stat.S_IXGRP else kept

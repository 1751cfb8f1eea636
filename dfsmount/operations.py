"""The adapter between pyfuse3 and :class:`dfsmount.vfs.Vfs`: decodes, calls, encodes. It decides nothing.

Two guards stand around every handler, because an exception other than ``FUSEError`` would end ``pyfuse3.main``:
``_guarded`` maps errors, ``bounded`` also registers the operation in :class:`dfsmount.waiting.Waiting`, which gives it
a name, a deadline and a limit. What can be answered without waiting goes past the second.

pyfuse3 3.5 hands no flags to setxattr: it asks getxattr first if XATTR_CREATE or XATTR_REPLACE is given, so these two
are not atomic against other mounts.
"""

import errno
import functools
import stat
from collections.abc import Callable, Coroutine, Sequence
from time import perf_counter_ns
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeAlias, TypeVar

import pyfuse3
import structlog
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, StatvfsData

from dfsmount.errors import errno_of
from dfsmount.opstats import OpStats
from dfsmount.vfs import ACCESS_ACL, VIRTUAL_XATTRS, Vfs
from dfsmount.vfs_core import BLOCK_BYTES, Shown
from dfsmount.vfs_files import Opened
from dfsmount.vfs_names import Caller
from dfsmount.waiting import Kind, Waiting
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import NAME_MAX, SetAttributes

__all__ = ["Asker", "Context", "FUSEError", "Operations", "bounded", "no_attribute"]

log = structlog.get_logger(__name__)

# What df calls a block. Inodes are 64-bit and never run out; programs want to see some free ones.
STATFS_BLOCK_BYTES = 4096
FREE_INODES = 1 << 40
# Nobody has said anything: who waited behind the same may not wait as long once more.
UNANSWERED = frozenset({ErrorCode.TIMEOUT, ErrorCode.UNAVAILABLE, ErrorCode.CANCELLED, ErrorCode.IO})

P = ParamSpec("P")
R = TypeVar("R")
Handler = Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]
# What ``_encode`` makes of an inode: ``EntryAttributes`` for pyfuse3, bytes for the driver of our own.
Encoded: TypeAlias = Any
# pyfuse3's ``EntryAttributes`` and ``SetattrFields``, or both in one.
Changes: TypeAlias = Any


class Asker(Protocol):
    """Who asks: pyfuse3's ``RequestContext``, or :class:`Context`."""

    @property
    def uid(self) -> int: ...

    @property
    def gid(self) -> int: ...

    @property
    def pid(self) -> int: ...


class Context(NamedTuple):
    """What pyfuse3 tells in a ``RequestContext``, which only pyfuse3 can make.

    ``privileged``: whether an O_TRUNC leaves setuid and setgid where they are; None: the kernel does not tell.
    """

    uid: int
    gid: int
    pid: int
    umask: int
    privileged: bool | None = None


def no_attribute() -> FUSEError:
    """There is no such extended attribute."""
    return FUSEError(pyfuse3.ENOATTR)


def _guarded(handler: Handler[P, R], called: str = "") -> Handler[P, R]:
    """For handlers that do not wait. The second half of one (``_ask_...``) is timed with the first."""
    name = called or ("" if handler.__name__.startswith("_") else handler.__name__)

    async def run(self: "Operations", /, *arguments: P.args, **named: P.kwargs) -> R:
        begun_ns = perf_counter_ns()
        try:
            result = await handler(self, *arguments, **named)
        except DfsError as error:
            raise FUSEError(errno_of(error)) from None
        except FUSEError:
            raise
        except Exception:
            log.exception("handler failed", operation=handler.__name__)
            raise FUSEError(errno.EIO) from None
        finally:
            if name:
                duration_ns = self._stats.done(name, begun_ns)
                if self._stats.recorder is not None:
                    self._record(name, arguments, duration_ns)
        return result

    functools.update_wrapper(run, handler)
    return run


def bounded(kind: Kind, *, second: int = 0, called: str = "") -> Callable[[Handler[P, R]], Handler[P, R]]:
    """For handlers that may wait; past the deadline the answer is EIO, and what was asked is withdrawn.

    ``second`` is the place of a second inode among the arguments; 0: there is none. ``called``: another name for it.
    """

    def decorate(handler: Handler[P, R]) -> Handler[P, R]:
        name = called or handler.__name__.strip("_")

        async def run(self: "Operations", /, *arguments: P.args, **named: P.kwargs) -> R:
            waiting = self._waiting
            operation = waiting.begin(kind, name, *self._asked(arguments, second), arguments)
            try:
                with operation.scope:
                    operation.work = handler(self, *arguments, **named)
                    return await operation.work
                waiting.failed(operation)
                raise FUSEError(operation.errno)
            except DfsError as error:
                if error.code in UNANSWERED:
                    waiting.failed(operation)
                raise
            finally:
                waiting.end(operation)

        functools.update_wrapper(run, handler)
        return _guarded(run, called)

    return decorate


def _caller(ctx: Asker) -> Caller:
    return Caller(ctx.uid, ctx.gid, ctx.privileged if isinstance(ctx, Context) else None)


class Operations(pyfuse3.Operations):
    """The handlers. The kernel calls the mounted directory inode 1, whatever its ino is."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    # Then the kernel checks permissions by ACLs; to keep them in step with modes is the metaserver's part.
    enable_acl = True

    def __init__(self, vfs: Vfs, waiting: Waiting, stats: OpStats | None = None) -> None:
        super().__init__()
        self._stats = stats or OpStats()
        self._vfs = vfs
        self._names = vfs.names
        self._files = vfs.files
        self._waiting = waiting
        self._root = vfs.root

    # -- decoding and encoding ---------------------------------------------------------------------------------

    def _inside(self, inode: int) -> int:
        return self._root if inode == pyfuse3.ROOT_INODE else inode

    def _asked(self, arguments: Sequence[Any], second: int) -> tuple[int, int, int]:
        """About which inode, by which thread, and about which other inode. The kernel tells who asks with all requests
        but those about an open file or directory."""
        first, ctx = arguments[0], arguments[-1]
        if not isinstance(ctx, RequestContext | Context):
            return self._vfs.inode_of(first), 0, 0
        return self._inside(first), ctx.pid, self._inside(arguments[second]) if second else 0

    def _record(self, name: str, arguments: Sequence[Any], duration_ns: int) -> None:
        """For a profile: what was done with which inode."""
        recorder = self._stats.recorder
        if recorder is not None and arguments and isinstance(arguments[0], int):
            recorder.note(name, self._asked(arguments, 0)[0], duration_ns)

    def encode(self, shown: Shown) -> Encoded:
        """For what stands before this adapter."""
        return self._encode(shown)

    def last_known_root(self) -> Shown | None:
        """The root's attributes, however old; to be asked for again after a second."""
        inode = self._vfs.core.inodes.get(self._root)
        if inode is None:
            return None
        shown = self._vfs.core.show(inode)
        shown.attr_seconds = shown.entry_seconds = 1.0
        return shown

    def _outside(self, ino: int) -> int:
        return pyfuse3.ROOT_INODE if ino == self._root else ino

    def _encode(self, shown: Shown) -> Encoded:
        """What an answer says of an inode, in the form that the driver wants."""
        entry = EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(self._outside(shown.ino))
        entry.generation = shown.generation
        entry.entry_timeout = shown.entry_seconds
        entry.attr_timeout = shown.attr_seconds
        entry.st_mode = pyfuse3.ModeT(shown.mode)
        entry.st_nlink = shown.nlink
        entry.st_uid = shown.uid
        entry.st_gid = shown.gid
        entry.st_rdev = shown.rdev
        entry.st_size = shown.size
        entry.st_blksize = BLOCK_BYTES
        entry.st_blocks = shown.blocks
        entry.st_atime_ns = shown.atime_ns
        entry.st_mtime_ns = shown.mtime_ns
        entry.st_ctime_ns = shown.ctime_ns
        return entry

    def _decode_changes(self, inode: int, attr: Changes, fields: Changes) -> SetAttributes:
        return SetAttributes(
            self._inside(inode),
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=_storable(attr.st_atime_ns) if fields.update_atime else None,
            mtime_ns=_storable(attr.st_mtime_ns) if fields.update_mtime else None,
        )

    # -- names -------------------------------------------------------------------------------------------------

    @bounded(Kind.NAMES)
    async def lookup(self, parent_inode: int, name: bytes, ctx: Asker) -> Encoded:
        parent = self._inside(parent_inode)
        shown = await self._names.lookup(parent, name)
        if self._stats.recorder is not None:
            self._stats.recorder.learn(shown.ino, parent, name)
        return self._encode(shown)

    async def forget(self, inode_list: Any) -> None:
        for inode, count in inode_list:
            self._vfs.forget(self._inside(inode), count)

    @bounded(Kind.NAMES)
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: Asker) -> Encoded:
        return self._encode(await self._names.make(self._inside(parent_inode), name, mode, _caller(ctx), rdev=rdev))

    @bounded(Kind.NAMES)
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Asker) -> Encoded:
        return self._encode(await self._names.make(self._inside(parent_inode), name, mode, _caller(ctx)))

    @bounded(Kind.NAMES)
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: Asker) -> Encoded:
        return self._encode(await self._names.make_link(self._inside(parent_inode), name, target, _caller(ctx)))

    @bounded(Kind.NAMES)
    async def readlink(self, inode: int, ctx: Asker) -> bytes:
        return await self._names.read_link(self._inside(inode))

    @bounded(Kind.NAMES)
    async def unlink(self, parent_inode: int, name: bytes, ctx: Asker) -> None:
        await self._names.unlink(self._inside(parent_inode), name, directory=False)

    @bounded(Kind.NAMES)
    async def rmdir(self, parent_inode: int, name: bytes, ctx: Asker) -> None:
        await self._names.unlink(self._inside(parent_inode), name, directory=True)

    @bounded(Kind.NAMES, second=2)
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: Asker,
    ) -> None:
        old, new = self._inside(parent_inode_old), self._inside(parent_inode_new)
        await self._names.rename(old, name_old, new, name_new, flags)

    @bounded(Kind.NAMES, second=1)
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: Asker) -> Encoded:
        return self._encode(await self._names.link(self._inside(inode), self._inside(new_parent_inode), new_name))

    @_guarded
    async def opendir(self, inode: int, ctx: Asker) -> pyfuse3.FileHandleT:
        return pyfuse3.FileHandleT(self._names.open_directory(self._inside(inode)))

    @bounded(Kind.NAMES)
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for listed in await self._names.list_directory(fh, start_id):
            name = pyfuse3.FileNameT(listed.name)
            if not pyfuse3.readdir_reply(token, name, self._encode(listed.shown), listed.cookie):
                break
            self._names.took(listed)

    @_guarded
    async def releasedir(self, fh: int) -> None:
        self._names.release_directory(fh)

    @bounded(Kind.WRITING)
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._vfs.sync_names(fh)

    # -- attributes --------------------------------------------------------------------------------------------

    @_guarded
    async def getattr(self, inode: int, ctx: Asker) -> Encoded:
        shown = self._vfs.known_attributes(self._inside(inode))
        return self._encode(shown if shown is not None else await self._ask_attributes(inode, ctx))

    @bounded(Kind.NAMES)
    async def _ask_attributes(self, inode: int, ctx: Asker) -> Shown:
        return await self._vfs.get_attributes(self._inside(inode))

    @bounded(Kind.NAMES)
    async def setattr(self, inode: int, attr: Changes, fields: Changes, fh: int | None, ctx: Asker) -> Encoded:
        return self._encode(await self._vfs.set_attributes(self._decode_changes(inode, attr, fields), fh))

    @_guarded
    async def access(self, inode: int, mode: int, ctx: Asker) -> bool:
        """Never called: the kernel checks permissions itself (``default_permissions``)."""
        return True

    @_guarded
    async def statfs(self, ctx: Asker) -> StatvfsData:
        """Of all of the mount: pyfuse3 does not tell which inode the kernel asks about."""
        return await self._ask_statistics(pyfuse3.ROOT_INODE, ctx)

    @_guarded
    async def statfs_of(self, inode: int, ctx: Asker) -> StatvfsData:
        """As limited by a quota on a directory in which the inode is."""
        return await self._ask_statistics(inode, ctx)

    @bounded(Kind.NAMES)
    async def _ask_statistics(self, inode: int, ctx: Asker) -> StatvfsData:
        stats = await self._vfs.statistics(self._inside(inode))
        data = StatvfsData()
        data.f_bsize = data.f_frsize = STATFS_BLOCK_BYTES
        data.f_blocks = stats.total // STATFS_BLOCK_BYTES
        data.f_bfree = data.f_bavail = stats.free // STATFS_BLOCK_BYTES
        free = FREE_INODES if stats.free_inodes < 0 else stats.free_inodes
        data.f_files = stats.inodes + free
        data.f_ffree = data.f_favail = free
        data.f_namemax = NAME_MAX
        return data

    @_guarded
    async def getxattr(self, inode: int, name: bytes, ctx: Asker) -> bytes:
        if self._vfs.knows_no_xattr(self._inside(inode), name):
            raise no_attribute()
        return await self._ask_xattr(inode, name, ctx)

    @bounded(Kind.NAMES)
    async def _ask_xattr(self, inode: int, name: bytes, ctx: Asker) -> bytes:
        return await self._vfs.get_xattr(self._inside(inode), name)

    @bounded(Kind.NAMES)
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: Asker) -> None:
        ino = self._inside(inode)
        if name in VIRTUAL_XATTRS:
            await self._vfs.set_virtual_xattr(ino, name, value, ctx.uid)
            return
        await self._vfs.set_xattr(ino, name, value)
        if name == ACCESS_ACL and ctx.uid != 0:
            await self._drop_setgid(ino, ctx)

    async def _drop_setgid(self, ino: int, ctx: Asker) -> None:
        """An access ACL set by somebody who is not of the file's group takes its S_ISGID away, as chmod(2) would
        (posix_acl_update_mode)."""
        shown = await self._vfs.get_attributes(ino)
        if shown.mode & stat.S_ISGID and shown.gid not in {ctx.gid, *pyfuse3.get_sup_groups(ctx.pid)}:
            await self._vfs.set_attributes(SetAttributes(ino, mode=shown.mode & ~stat.S_ISGID))

    @bounded(Kind.NAMES)
    async def listxattr(self, inode: int, ctx: Asker) -> Any:
        names = await self._vfs.list_xattrs(self._inside(inode))
        # As ext4: these are for the administrator's eyes only.
        return names if ctx.uid == 0 else [name for name in names if not name.startswith(b"trusted.")]

    @bounded(Kind.NAMES)
    async def removexattr(self, inode: int, name: bytes, ctx: Asker) -> None:
        await self._vfs.remove_xattr(self._inside(inode), name)

    # -- contents ----------------------------------------------------------------------------------------------

    @bounded(Kind.NAMES)
    async def open(self, inode: int, flags: int, ctx: Asker) -> FileInfo:
        return _file_info(await self._files.open(self._inside(inode), flags, privileged=_caller(ctx).privileged))

    @bounded(Kind.NAMES)
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Asker
    ) -> tuple[FileInfo, Encoded]:
        parent = self._inside(parent_inode)
        opened, shown = await self._files.create(parent, name, mode, flags, _caller(ctx))
        if self._stats.recorder is not None:
            self._stats.recorder.learn(shown.ino, parent, name)
        return _file_info(opened), self._encode(shown)

    @bounded(Kind.READING)
    async def read(self, fh: int, off: int, size: int) -> bytes:
        data = await self._files.read(fh, off, size)
        self._stats.read_bytes += len(data)
        return data

    @bounded(Kind.WRITING)
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return await self._files.write(fh, off, buf)

    @bounded(Kind.WRITING)
    async def flush(self, fh: int) -> None:
        await self._files.flush(fh)

    @bounded(Kind.WRITING)
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._files.fsync(fh)

    @_guarded
    async def release(self, fh: int) -> None:
        self._files.release(fh)


def _storable(time_ns: int) -> int:
    """The nearest time that can be kept (years 1677 to 2262), as the kernel does for local filesystems
    (timestamp_truncate)."""
    return min(max(time_ns, -(1 << 63)), (1 << 63) - 1)


def _file_info(opened: Opened) -> FileInfo:
    return FileInfo(fh=pyfuse3.FileHandleT(opened.number), direct_io=opened.direct, keep_cache=opened.keep_cache)

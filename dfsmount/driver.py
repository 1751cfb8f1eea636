"""The kernel's requests, served by :class:`dfsmount.operations.Operations`: one function per opcode decodes and
encodes. What is known already is answered at once, past the guards that requests need that wait.

This is the second adapter beside pyfuse3's own (which ``-o driver=libfuse`` chooses), with the same handlers.
"""

import errno
import os
import stat
import time
from collections.abc import Callable, Coroutine
from typing import Any

from dfsmount import fusewire
from dfsmount.device import Data, NoAnswer, Served
from dfsmount.fusewire import AttributeChanges, Opcode, Request
from dfsmount.operations import Context, FUSEError, Operations, bounded, no_attribute
from dfsmount.opstats import OpStats
from dfsmount.vfs import Vfs
from dfsmount.vfs_core import BLOCK_BYTES, Shown
from dfsmount.vfs_files import without_special_bits
from dfsmount.vfs_names import Listed
from dfsmount.waiting import Kind, Waiting

ROOT = 1
_NOT_LISTED = bytes(fusewire.ENTRY_BYTES)
# Neither served nor mistaken: the kernel remembers that we do not have it, and does it another way or says so.
_NOT_SERVED = errno.ENOSYS

Server = Callable[[Request, memoryview], Served]


class Driver(Operations):
    """Serves the requests of a :class:`dfsmount.device.Device`."""

    def __init__(self, vfs: Vfs, waiting: Waiting, stats: OpStats | None = None) -> None:
        # Of O_TRUNC; known once the kernel has begun.
        self._kernel_tells = False
        super().__init__(vfs, waiting, stats)
        self._servers: dict[int, Server] = {
            Opcode.LOOKUP: self._lookup,
            Opcode.FORGET: self._forget,
            Opcode.BATCH_FORGET: self._forget_many,
            Opcode.GETATTR: self._getattr,
            Opcode.SETATTR: self._setattr,
            Opcode.READLINK: lambda r, b: self.readlink(r.node, _context(r)),
            Opcode.SYMLINK: self._symlink,
            Opcode.MKNOD: self._mknod,
            Opcode.MKDIR: self._mkdir,
            Opcode.UNLINK: lambda r, b: self.unlink(r.node, _name(b), _context(r)),
            Opcode.RMDIR: lambda r, b: self.rmdir(r.node, _name(b), _context(r)),
            Opcode.RENAME: self._rename,
            Opcode.RENAME2: self._rename_flags,
            Opcode.LINK: self._link,
            Opcode.OPEN: self._open,
            Opcode.CREATE: self._create,
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            Opcode.FLUSH: self._flush,
            Opcode.RELEASE: self._release,
            Opcode.FSYNC: self._fsync,
            Opcode.STATFS: lambda r, b: self._statistics(r),
            Opcode.SETXATTR: self._setxattr,
            Opcode.GETXATTR: self._getxattr,
            Opcode.LISTXATTR: self._listxattr,
            Opcode.REMOVEXATTR: lambda r, b: self.removexattr(r.node, _name(b), _context(r)),
            Opcode.OPENDIR: self._opendir,
            Opcode.READDIRPLUS: self._readdirplus,
            Opcode.RELEASEDIR: self._releasedir,
            Opcode.FSYNCDIR: self._fsyncdir,
            Opcode.INIT: self._init,
            Opcode.INTERRUPT: self._ignore,
        }

    def serve(self, request: Request, body: memoryview) -> Served:
        """A ``device.Serve``."""
        server = self._servers.get(request.opcode)
        if server is None:
            raise FUSEError(_NOT_SERVED)
        return server(request, body)

    def _encode(self, shown: Shown) -> bytes:
        return fusewire.encode_entry(
            self._outside(shown.ino),
            shown.generation,
            shown.entry_seconds,
            shown.attr_seconds,
            shown.size,
            shown.blocks,
            (shown.atime_ns, shown.mtime_ns, shown.ctime_ns),
            shown.mode,
            shown.nlink,
            (shown.uid, shown.gid),
            shown.rdev,
            BLOCK_BYTES,
        )

    def _init(self, request: Request, body: memoryview) -> Served:
        answer = fusewire.encode_init(bytes(body))
        self._kernel_tells = fusewire.tells_who_is_privileged(answer)
        return answer

    def _ignore(self, request: Request, body: memoryview) -> Served:
        """Whether a process was killed is found out otherwise (``killed``)."""
        raise NoAnswer

    # -- names -------------------------------------------------------------------------------------------------

    def _lookup(self, request: Request, body: memoryview) -> Served:
        name = _name(body)
        shown = self._names.lookup_at_once(self._inside(request.node), name)
        return self._encode(shown) if shown is not None else self.lookup(request.node, name, _context(request))

    def _forget(self, request: Request, body: memoryview) -> Served:
        self._vfs.forget(self._inside(request.node), *fusewire.FORGET_IN.unpack_from(body))
        raise NoAnswer

    def _forget_many(self, request: Request, body: memoryview) -> Served:
        for node, count in fusewire.decode_forgets(bytes(body)):
            self._vfs.forget(self._inside(node), count)
        raise NoAnswer

    def _symlink(self, request: Request, body: memoryview) -> Served:
        name, target = fusewire.two_names(bytes(body))
        return self.symlink(request.node, name, target, _context(request))

    def _mknod(self, request: Request, body: memoryview) -> Served:
        mode, rdev, umask, _ = fusewire.MKNOD_IN.unpack_from(body)
        name = _name(body[fusewire.MKNOD_IN.size :])
        return self.mknod(request.node, name, mode, rdev, _context(request, umask))

    def _mkdir(self, request: Request, body: memoryview) -> Served:
        mode, umask = fusewire.MKDIR_IN.unpack_from(body)
        name = _name(body[fusewire.MKDIR_IN.size :])
        return self.mkdir(request.node, name, stat.S_IMODE(mode) | stat.S_IFDIR, _context(request, umask))

    def _rename(self, request: Request, body: memoryview) -> Served:
        (new_parent,) = fusewire.RENAME_IN.unpack_from(body)
        old, new = fusewire.two_names(bytes(body[fusewire.RENAME_IN.size :]))
        return self.rename(request.node, old, new_parent, new, 0, _context(request))

    def _rename_flags(self, request: Request, body: memoryview) -> Served:
        new_parent, flags, _ = fusewire.RENAME2_IN.unpack_from(body)
        old, new = fusewire.two_names(bytes(body[fusewire.RENAME2_IN.size :]))
        return self.rename(request.node, old, new_parent, new, flags, _context(request))

    def _link(self, request: Request, body: memoryview) -> Served:
        (node,) = fusewire.LINK_IN.unpack_from(body)
        return self.link(node, request.node, _name(body[fusewire.LINK_IN.size :]), _context(request))

    # -- directories -------------------------------------------------------------------------------------------

    def _opendir(self, request: Request, body: memoryview) -> Served:
        return fusewire.OPEN_OUT.pack(self._names.open_directory(self._inside(request.node)), 0, 0)

    def _readdirplus(self, request: Request, body: memoryview) -> Served:
        handle, start, size, *_ = fusewire.READ_IN.unpack_from(body)
        return self._list(handle, start, size)

    async def _list(self, handle: int, start: int, size: int) -> bytes:
        answer = bytearray()
        await self._list_into(handle, start, size, answer)
        return bytes(answer)

    @bounded(Kind.NAMES, called="readdir")
    async def _list_into(self, handle: int, start: int, size: int, answer: bytearray) -> None:
        for listed in await self._names.list_directory(handle, start):
            entry = self._encode_listed(listed)
            if len(answer) + len(entry) > size:
                break
            answer += entry
            self._names.took(listed)

    def _encode_listed(self, listed: Listed) -> bytes:
        shown = listed.shown
        entry = self._encode(shown) if listed.inode is not None else _NOT_LISTED
        ino = self._outside(shown.ino)
        return fusewire.encode_listed(entry, ino, stat.S_IFMT(shown.mode) >> 12, listed.name, listed.cookie)

    def _releasedir(self, request: Request, body: memoryview) -> Served:
        self._names.release_directory(*fusewire.HANDLE_IN.unpack_from(body))
        return None

    def _fsyncdir(self, request: Request, body: memoryview) -> Served:
        handle, flags = fusewire.FSYNC_IN.unpack_from(body)
        return self.fsyncdir(handle, bool(flags & 1))

    # -- attributes --------------------------------------------------------------------------------------------

    def _getattr(self, request: Request, body: memoryview) -> Served:
        shown = self._vfs.known_attributes(self._inside(request.node))
        if shown is not None:
            return fusewire.attributes_of(self._encode(shown))
        return _attributes(self.getattr(request.node, _context(request)))

    def _setattr(self, request: Request, body: memoryview) -> Served:
        changes = fusewire.decode_changes(bytes(body), time.time_ns())
        if changes.kills_special_bits and self._files.may_have_special_bits(self._inside(request.node)):
            return self._set_without_special_bits(request, changes)
        decoded = self._decode_changes(request.node, changes, changes)
        inode = self._files.set_at_once(decoded)
        if inode is not None:
            return fusewire.attributes_of(self._encode(self._vfs.core.show(inode)))
        return self._set_attributes(request, changes)

    async def _set_without_special_bits(self, request: Request, changes: AttributeChanges) -> bytes:
        kept = without_special_bits((await self._shown(request.node, _context(request))).mode)
        return await self._set_attributes(request, changes._replace(update_mode=True, st_mode=kept))

    async def _set_attributes(self, request: Request, changes: AttributeChanges) -> bytes:
        work = self.setattr(request.node, changes, changes, changes.handle, _context(request))
        return await _attributes(work)

    @bounded(Kind.NAMES, called="getattr")
    async def _shown(self, node: int, ctx: Context) -> Shown:
        return await self._vfs.get_attributes(self._inside(node))

    @bounded(Kind.WRITING, called="write")
    async def _drop_special_bits(self, node: int, ctx: Context) -> None:
        await self._files.drop_special_bits(self._inside(node))

    async def _statistics(self, request: Request) -> bytes:
        data = await self.statfs_of(request.node, _context(request))
        return fusewire.STATFS_OUT.pack(
            data.f_blocks, data.f_bfree, data.f_bavail, data.f_files, data.f_ffree,
            data.f_bsize, data.f_namemax, data.f_frsize,
        )  # fmt: skip

    # -- extended attributes -----------------------------------------------------------------------------------

    def _getxattr(self, request: Request, body: memoryview) -> Served:
        size, _ = fusewire.SIZE_IN.unpack_from(body)
        name = _name(body[fusewire.SIZE_IN.size :])
        if self._vfs.knows_no_xattr(self._inside(request.node), name):
            raise no_attribute()
        return _sized(self.getxattr(request.node, name, _context(request)), size)

    def _listxattr(self, request: Request, body: memoryview) -> Served:
        size, _ = fusewire.SIZE_IN.unpack_from(body)
        return _sized(self._joined_names(request), size)

    async def _joined_names(self, request: Request) -> bytes:
        return b"".join(name + b"\0" for name in await self.listxattr(request.node, _context(request)))

    def _setxattr(self, request: Request, body: memoryview) -> Served:
        size, flags = fusewire.SIZE_IN.unpack_from(body)
        rest = bytes(body[fusewire.SIZE_IN.size :])
        name = fusewire.first_name(rest)
        value = rest[len(name) + 1 : len(name) + 1 + size]
        return self._set_xattr(request, name, value, flags)

    async def _set_xattr(self, request: Request, name: bytes, value: bytes, flags: int) -> None:
        """With XATTR_CREATE or XATTR_REPLACE in two steps, as pyfuse3 does it."""
        context = _context(request)
        if flags & os.XATTR_CREATE:
            await self._must_lack(request.node, name, context)
        elif flags & os.XATTR_REPLACE:
            await self.getxattr(request.node, name, context)
        await self.setxattr(request.node, name, value, context)

    async def _must_lack(self, node: int, name: bytes, context: Context) -> None:
        try:
            await self.getxattr(node, name, context)
        except FUSEError as error:
            if error.errno != errno.ENODATA:
                raise
        else:
            raise FUSEError(errno.EEXIST)

    # -- contents ----------------------------------------------------------------------------------------------

    def _open(self, request: Request, body: memoryview) -> Served:
        flags, told = fusewire.OPEN_IN.unpack_from(body)
        return self._opened(self.open(request.node, flags, _context(request, privileged=self._privileged(told))))

    @staticmethod
    async def _opened(work: Coroutine[Any, Any, Any]) -> bytes:
        return _encode_opened(await work)

    def _create(self, request: Request, body: memoryview) -> Served:
        flags, mode, umask, told = fusewire.CREATE_IN.unpack_from(body)
        name = _name(body[fusewire.CREATE_IN.size :])
        context = _context(request, umask, self._privileged(told))
        return self._created(self.create(request.node, name, mode, flags, context))

    def _privileged(self, open_flags: int) -> bool | None:
        """Whether who opens a file with O_TRUNC leaves its setuid and setgid: has CAP_FSETID, whatever the user."""
        return not open_flags & fusewire.OPEN_KILL_SUIDGID if self._kernel_tells else None

    @staticmethod
    async def _created(work: Coroutine[Any, Any, Any]) -> bytes:
        opened, entry = await work
        encoded: bytes = entry + _encode_opened(opened)
        return encoded

    def _read(self, request: Request, body: memoryview) -> Served:
        handle, offset, size, *_ = fusewire.READ_IN.unpack_from(body)
        return self.read(handle, offset, size)

    def _write(self, request: Request, body: memoryview) -> Served:
        handle, offset, size, flags, *_ = fusewire.WRITE_IN.unpack_from(body)
        data = bytes(body[fusewire.WRITE_IN.size : fusewire.WRITE_IN.size + size])
        self._stats.written_bytes += size
        if flags & fusewire.WRITE_KILL_SUIDGID and self._files.may_have_special_bits(self._inside(request.node)):
            return self._written_without_special_bits(request, handle, offset, data)
        if self._files.write_at_once(handle, offset, data):
            return fusewire.WRITE_OUT.pack(size, 0)
        return self._written(handle, offset, data)

    async def _written(self, handle: int, offset: int, data: bytes) -> bytes:
        return fusewire.WRITE_OUT.pack(await self.write(handle, offset, data), 0)

    async def _written_without_special_bits(self, request: Request, handle: int, offset: int, data: bytes) -> bytes:
        await self._drop_special_bits(request.node, _context(request))
        return await self._written(handle, offset, data)

    def _flush(self, request: Request, body: memoryview) -> Served:
        (handle,) = fusewire.HANDLE_IN.unpack_from(body)
        return None if self._files.flush_at_once(handle) else self.flush(handle)

    def _release(self, request: Request, body: memoryview) -> Served:
        self._files.release(*fusewire.HANDLE_IN.unpack_from(body))
        return None

    def _fsync(self, request: Request, body: memoryview) -> Served:
        handle, flags = fusewire.FSYNC_IN.unpack_from(body)
        return self.fsync(handle, bool(flags & 1))


def _name(body: memoryview) -> bytes:
    return fusewire.first_name(bytes(body))


def _context(request: Request, umask: int = 0, privileged: bool | None = None) -> Context:
    return Context(request.uid, request.gid, request.pid, umask, privileged)


def _encode_opened(opened: Any) -> bytes:
    flags = fusewire.OPENED_DIRECT_IO if opened.direct_io else 0
    flags |= fusewire.OPENED_KEEP_CACHE if opened.keep_cache else 0
    return fusewire.OPEN_OUT.pack(opened.fh, flags, 0)


async def _attributes(work: Coroutine[Any, Any, Any]) -> bytes:
    return fusewire.attributes_of(await work)


async def _sized(work: Coroutine[Any, Any, bytes], size: int) -> Data:
    """How the kernel is given what it asked for with a buffer of ``size`` bytes; 0: only how much it is."""
    value = await work
    if size == 0:
        return fusewire.SIZE_OUT.pack(len(value), 0)
    if len(value) > size:
        raise FUSEError(errno.ERANGE)
    return value

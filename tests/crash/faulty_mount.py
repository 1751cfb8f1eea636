"""A directory shown again at another place by FUSE, with a disk under it that fails on demand: for processes that know
nothing of it, LMDB's map included (the kernel caches pages, so files can be mapped, and the caches can be dropped).

``python faulty_mount.py BACKING MOUNTPOINT SOCKET`` serves until it is unmounted. On the UNIX socket it takes one JSON
line at a time and answers with one: ``{"faults": [...]}`` replaces all faults, ``{"drop": true}`` makes the kernel
forget the contents of every file, mapped or not, and ``{}`` only asks. The answer has ``hits``: how often each fault
was met, in their order, since they were set. :class:`FaultyMount` does all that from a test.
"""

import contextlib
import errno
import fnmatch
import functools
import json
import os
import random
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields, StatvfsData

SHORT = "SHORT"
# What a file system that is read-only refuses.
CHANGES = ("write", "create", "open-write", "truncate", "rename", "unlink", "link", "mkdir", "rmdir")
# What one that is full refuses.
TAKES_SPACE = ("write", "create", "link", "mkdir")
CACHED_SECONDS = 60.0
# LMDB's table of readers.
MAPPED_SUFFIX = "-lock"


class Fault(msgspec.Struct):
    """What goes wrong: ``calls`` on files that match ``path`` (relative, as fnmatch has it; several: separated by
    ``|``) end with ``error``, an errno's name. The first ``times`` of them (-1: all), each with ``probability``. Reads
    and writes only if they touch [``start``, ``stop``). SHORT: a write takes half of what it is given and says so."""

    calls: tuple[str, ...]
    path: str
    error: str
    times: int = -1
    probability: float = 1.0
    start: int = 0
    stop: int = 1 << 62
    hits: int = 0

    def meets(self, call: str, path: str, offset: int, length: int) -> bool:
        touched = offset < self.stop and self.start < offset + length
        return (
            call in self.calls
            and self.times != 0
            and touched
            and any(fnmatch.fnmatch(path, pattern) for pattern in self.path.split("|"))
            and random.random() < self.probability
        )


def handler(function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """What the real file system refuses is refused likewise."""

    @functools.wraps(function)
    async def run(*arguments: Any) -> Any:
        try:
            return await function(*arguments)
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from None

    return run


class FaultyFilesystem(pyfuse3.Operations):
    """See the module. Inode numbers are those of the backing files; ``_names`` has the names each is known by."""

    def __init__(self, backing: Path) -> None:
        super().__init__()
        self.backing = os.fspath(backing)
        self.faults: list[Fault] = []
        self._names: dict[int, list[str]] = {pyfuse3.ROOT_INODE: [""]}
        # Descriptors by inode: a file without a name is still there for who has it open.
        self._open: dict[int, list[int]] = {}
        self._inode_of: dict[int, int] = {}

    # -- faults ------------------------------------------------------------------------------------------------

    def meet(self, call: str, path: str, offset: int = 0, length: int = 1) -> bool:
        """Raises if a fault is meant for this call; True if it is to be done by halves."""
        for fault in self.faults:
            if fault.meets(call, path, offset, length):
                fault.times -= 1
                fault.hits += 1
                if fault.error == SHORT:
                    return True
                number = getattr(errno, fault.error)
                raise OSError(number, os.strerror(number))
        return False

    def drop_caches(self) -> None:
        """In a worker thread: the kernel may ask us something meanwhile. Not of what is written by its map only: a page
        that cannot be written would be lost, which no kernel does to a file of a real disk."""
        for inode in tuple(self._names):
            if self._name_of(inode).endswith(MAPPED_SUFFIX):
                continue
            with contextlib.suppress(OSError):
                pyfuse3.invalidate_inode(inode)

    # -- names -------------------------------------------------------------------------------------------------

    def _path(self, inode: int) -> str:
        names = self._names.get(inode)
        if not names:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return names[-1]

    def _child(self, parent: int, name: bytes) -> str:
        folder = self._path(parent)
        return f"{folder}/{os.fsdecode(name)}" if folder else os.fsdecode(name)

    def _full(self, path: str) -> str:
        return f"{self.backing}/{path}" if path else self.backing

    def _name_of(self, inode: int) -> str:
        """For faults: the name a file has or had."""
        return (self._names.get(inode) or [""])[-1]

    def _know(self, path: str) -> EntryAttributes:
        found = os.lstat(self._full(path))
        names = self._names.setdefault(found.st_ino, [])
        if path not in names:
            names.append(path)
        return self._attributes(found, found.st_ino)

    def _attributes(self, found: os.stat_result, inode: int) -> EntryAttributes:
        entry = EntryAttributes()
        for name in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size", "st_blksize", "st_blocks"):
            setattr(entry, name, getattr(found, name))
        for name in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
            setattr(entry, name, getattr(found, name))
        entry.st_ino, entry.generation = inode, 0
        entry.attr_timeout, entry.entry_timeout = CACHED_SECONDS, 0
        return entry

    def _stat(self, inode: int) -> EntryAttributes:
        descriptors = self._open.get(inode)
        if descriptors:
            return self._attributes(os.fstat(descriptors[0]), inode)
        return self._attributes(os.lstat(self._full(self._path(inode))), inode)

    def _inode_at(self, path: str) -> int | None:
        try:
            return os.lstat(self._full(path)).st_ino
        except FileNotFoundError:
            return None

    def _gone(self, inode: int, path: str) -> None:
        """A name is gone; the last one is remembered for the faults of whoever has the file open."""
        names = self._names.get(inode, [])
        if path in names and (len(names) > 1 or not self._open.get(inode)):
            names.remove(path)

    @handler
    async def lookup(self, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        return self._know(self._child(parent, name))

    @handler
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._stat(inode)

    @handler
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        descriptors = self._open.get(inode)
        target: int | str = descriptors[0] if descriptors else self._full(self._path(inode))
        if fields.update_size:
            self.meet("truncate", self._name_of(inode))
            writable = fh if fh is not None else self._full(self._path(inode))
            os.truncate(writable, attr.st_size)
        if fields.update_mode:
            os.chmod(target, stat.S_IMODE(attr.st_mode))
        if fields.update_uid or fields.update_gid:
            os.chown(target, attr.st_uid if fields.update_uid else -1, attr.st_gid if fields.update_gid else -1)
        if fields.update_atime or fields.update_mtime:
            found = os.stat(target)
            atime = attr.st_atime_ns if fields.update_atime else found.st_atime_ns
            mtime = attr.st_mtime_ns if fields.update_mtime else found.st_mtime_ns
            os.utime(target, ns=(atime, mtime))
        return self._stat(inode)

    @handler
    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        path = self._child(parent, name)
        self.meet("mkdir", path)
        os.mkdir(self._full(path), stat.S_IMODE(mode & ~ctx.umask))
        return self._know(path)

    @handler
    async def rmdir(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        path = self._child(parent, name)
        self.meet("rmdir", path)
        inode = os.lstat(self._full(path)).st_ino
        os.rmdir(self._full(path))
        self._gone(inode, path)

    @handler
    async def unlink(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        path = self._child(parent, name)
        self.meet("unlink", path)
        inode = os.lstat(self._full(path)).st_ino
        os.unlink(self._full(path))
        self._gone(inode, path)

    @handler
    async def rename(
        self, old_parent: int, old_name: bytes, new_parent: int, new_name: bytes, flags: int, ctx: RequestContext
    ) -> None:
        old, new = self._child(old_parent, old_name), self._child(new_parent, new_name)
        if flags:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.meet("rename", old)
        moved = os.lstat(self._full(old)).st_ino
        replaced = self._inode_at(new)
        os.rename(self._full(old), self._full(new))
        if replaced is not None and replaced != moved:
            self._gone(replaced, new)
        for names in self._names.values():  # what lies below a directory moves with it
            names[:] = [new + name[len(old) :] if f"{name}/".startswith(f"{old}/") else name for name in names]
        self._know(new)

    @handler
    async def link(self, inode: int, new_parent: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        path = self._child(new_parent, new_name)
        self.meet("link", path)
        os.link(self._full(self._path(inode)), self._full(path))
        return self._know(path)

    @handler
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        found, data = os.statvfs(self.backing), StatvfsData()
        for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"):
            setattr(data, name, getattr(found, name))
        data.f_namemax = 255
        return data

    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        return True

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        pass  # few enough to be remembered for ever

    # -- directories -------------------------------------------------------------------------------------------

    @handler
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        self.meet("names", self._path(inode))
        return inode

    @handler
    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        folder = self._path(fh)
        names = sorted(os.listdir(self._full(folder)))
        for number, name in enumerate(names[start_id:], start_id + 1):
            try:
                entry = self._know(f"{folder}/{name}" if folder else name)
            except FileNotFoundError:
                continue
            if not pyfuse3.readdir_reply(token, os.fsencode(name), entry, number):
                return

    @handler
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        self.meet("fsync", self._path(fh))
        descriptor = os.open(self._full(self._path(fh)), os.O_RDONLY | os.O_DIRECTORY)
        try:
            await trio.to_thread.run_sync(os.fsync, descriptor)
        finally:
            os.close(descriptor)

    # -- files -------------------------------------------------------------------------------------------------

    def _opened(self, path: str, flags: int, mode: int = 0o600) -> FileInfo:
        # The kernel aligns nothing for us, and where appended bytes go it has decided itself.
        flags &= ~(os.O_DIRECT | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW) | (flags & os.O_CREAT)
        if flags & os.O_ACCMODE == os.O_WRONLY:  # it reads the rest of a page that is written
            flags = flags & ~os.O_ACCMODE | os.O_RDWR
        descriptor = os.open(self._full(path), flags | os.O_CLOEXEC, mode)
        inode = os.fstat(descriptor).st_ino
        self._open.setdefault(inode, []).append(descriptor)
        self._inode_of[descriptor] = inode
        return FileInfo(fh=descriptor, keep_cache=True)

    @handler
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        path = self._path(inode)
        self.meet("open", path)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            self.meet("open-write", path)
        return self._opened(path, flags)

    @handler
    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        path = self._child(parent, name)
        self.meet("create", path)
        opened = self._opened(path, flags | os.O_CREAT, stat.S_IMODE(mode & ~ctx.umask))
        return opened, self._know(path)

    @handler
    async def read(self, fh: int, offset: int, length: int) -> bytes:
        self.meet("read", self._name_of(self._inode_of[fh]), offset, length)
        return os.pread(fh, length, offset)

    @handler
    async def write(self, fh: int, offset: int, data: bytes) -> int:
        if self.meet("write", self._name_of(self._inode_of[fh]), offset, len(data)):
            data = data[: max(1, len(data) // 2)]
        return os.pwrite(fh, data, offset)

    @handler
    async def fsync(self, fh: int, datasync: bool) -> None:
        self.meet("fsync", self._name_of(self._inode_of[fh]))
        await trio.to_thread.run_sync(os.fdatasync if datasync else os.fsync, fh)

    async def flush(self, fh: int) -> None:
        pass

    async def release(self, fh: int) -> None:
        inode = self._inode_of.pop(fh)
        self._open[inode].remove(fh)
        os.close(fh)
        if not self._open[inode]:
            del self._open[inode]
            names = self._names.get(inode, [])
            if names and self._inode_at(names[-1]) != inode:
                names.pop()  # an inode number may be given to another file

    # -- control -----------------------------------------------------------------------------------------------

    async def serve_control(self, stream: trio.SocketStream) -> None:
        async with stream:
            line = b""
            async for data in stream:
                line += data
                if line.endswith(b"\n"):
                    await stream.send_all(await self._control(json.loads(line)) + b"\n")
                    line = b""

    async def _control(self, command: dict[str, Any]) -> bytes:
        hits = [fault.hits for fault in self.faults]
        if "faults" in command:
            self.faults = msgspec.convert(command["faults"], list[Fault])
        if command.get("drop"):
            await trio.to_thread.run_sync(self.drop_caches)
        return json.dumps({"hits": hits}).encode()


async def serve(backing: Path, mountpoint: Path, path: Path) -> None:
    operations = FaultyFilesystem(backing)
    pyfuse3.init(operations, str(mountpoint), {"fsname=faulty", "subtype=faulty", "allow_other", "default_permissions"})
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await listener.bind(str(path))
    listener.listen(8)
    try:
        async with trio.open_nursery() as nursery:
            listeners = [trio.SocketListener(listener)]
            nursery.start_soon(trio.serve_listeners, operations.serve_control, listeners)
            await pyfuse3.main(max_tasks=200)
            nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close(unmount=False)


class FaultyMount:
    """Such a directory for a test: ``mountpoint`` shows ``backing`` from :meth:`start` to :meth:`stop`."""

    def __init__(self, backing: Path, mountpoint: Path) -> None:
        self.backing = backing
        self.mountpoint = mountpoint
        self._socket = backing.with_name(backing.name + ".sock")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        for path in (self.backing, self.mountpoint):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        command = [sys.executable, __file__, str(self.backing), str(self.mountpoint), str(self._socket)]
        self._process = subprocess.Popen(command, start_new_session=True)
        deadline = time.monotonic() + 20
        while not self._socket.exists() or not os.path.ismount(self.mountpoint):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the faulty file system does not start")
            time.sleep(0.02)

    def stop(self) -> None:
        """Whoever still has files open there gets ENOTCONN."""
        subprocess.run(["umount", "--lazy", self.mountpoint], check=False, capture_output=True)
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._socket.unlink(missing_ok=True)

    def set(self, *faults: Fault) -> list[int]:
        """From now on these; returns how often each of those before was met."""
        return self._ask({"faults": [msgspec.to_builtins(fault) for fault in faults]})

    def hits(self) -> list[int]:
        return self._ask({})

    def drop_caches(self) -> None:
        self._ask({"drop": True})

    def _ask(self, command: dict[str, object]) -> list[int]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(60)
            connection.connect(str(self._socket))
            connection.sendall(json.dumps(command).encode() + b"\n")
            with connection.makefile("rb") as answer:
                hits: list[int] = json.loads(answer.readline())["hits"]
                return hits


if __name__ == "__main__":
    trio.run(serve, *map(Path, sys.argv[1:4]))

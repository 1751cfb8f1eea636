"""``.dfs`` (:mod:`dfsmount.virtual`) in front of the driver, and the time that each request took.

Whatever concerns the cluster's inodes goes straight on. What is answered at once is timed here; what waits, by the
guards of ``operations``.
"""

import errno
import os
import stat
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

import trio

from dfsmount import fusewire
from dfsmount.device import NoAnswer, Served
from dfsmount.driver import ROOT, Driver
from dfsmount.errors import errno_of
from dfsmount.fusewire import Opcode, Request
from dfsmount.operations import FUSEError
from dfsmount.opstats import OpStats
from dfsmount.virtual import FIRST, NAME, Virtual
from metaserver.errors import DfsError

# Where the name begins in requests that name an entry of the directory they are about.
_NAMED = {
    Opcode.LOOKUP: 0,
    Opcode.UNLINK: 0,
    Opcode.RMDIR: 0,
    Opcode.SYMLINK: 0,
    Opcode.MKNOD: fusewire.MKNOD_IN.size,
    Opcode.MKDIR: fusewire.MKDIR_IN.size,
    Opcode.CREATE: fusewire.CREATE_IN.size,
    Opcode.LINK: fusewire.LINK_IN.size,
}
_RENAMES = {Opcode.RENAME: fusewire.RENAME_IN, Opcode.RENAME2: fusewire.RENAME2_IN}
# How long a metaserver may take to tell the root's attributes before older ones are shown.
ROOT_SECONDS = 1.0
_NOTHING = frozenset({Opcode.FLUSH, Opcode.FSYNC, Opcode.FSYNCDIR, Opcode.RELEASEDIR})
_CALLED = {opcode: opcode.name.lower().replace("readdirplus", "readdir") for opcode in Opcode}


class VirtualDriver:
    """``serve`` is a ``device.Serve``."""

    def __init__(self, driver: Driver, virtual: Virtual, stats: OpStats) -> None:
        self._driver = driver
        self._virtual = virtual
        self._stats = stats
        self._servers: dict[int, Callable[[Request, memoryview], Served]] = {
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: lambda r, b: fusewire.attributes_of(driver.encode(virtual.show(r.node))),
            Opcode.OPENDIR: lambda r, b: fusewire.OPEN_OUT.pack(FIRST, 0, 0),
            Opcode.READDIRPLUS: self._list,
            Opcode.OPEN: self._open,
            Opcode.READ: self._read,
            Opcode.RELEASE: self._release,
            Opcode.LISTXATTR: self._no_xattrs,
        }

    def serve(self, request: Request, body: memoryview) -> Served:
        node, opcode = request.node, request.opcode
        if node >= FIRST or (node == ROOT and self._is_named(opcode, body)) or opcode in _RENAMES:
            served, found = self._serve(request, body)
            if served:
                return found
        begun_ns = perf_counter_ns()
        answer = self._driver.serve(request, body)
        if node == ROOT and opcode == Opcode.GETATTR and not (answer is None or isinstance(answer, bytes)):
            return self._root_attributes(answer)
        if answer is None or isinstance(answer, bytes):
            duration_ns = self._stats.done(_CALLED[opcode], begun_ns)  # type: ignore[index]
            if self._stats.recorder is not None:
                self._stats.recorder.note(_CALLED[opcode], node, duration_ns)  # type: ignore[index]
        return answer

    async def _root_attributes(self, asked: Any) -> Any:
        """On the way to ``.dfs`` the kernel asks for those of the root; without a metaserver, what was known has to do,
        or nobody could look why nothing answers."""
        with trio.move_on_after(ROOT_SECONDS):
            return await asked
        known = self._driver.last_known_root()
        if known is None:
            raise FUSEError(errno.EIO)
        return fusewire.attributes_of(self._driver.encode(known))

    @staticmethod
    def _is_named(opcode: int, body: memoryview) -> bool:
        at = _NAMED.get(opcode, -1)  # type: ignore[call-overload]
        return at >= 0 and bytes(body[at : at + len(NAME) + 1]) == NAME + b"\0"

    def _serve(self, request: Request, body: memoryview) -> tuple[bool, Served]:
        """Whether it is about something virtual, and the answer."""
        opcode = request.opcode
        if opcode in _RENAMES and not self._renames_virtual(request, body):
            return False, None
        if opcode in (Opcode.FORGET, Opcode.BATCH_FORGET):
            raise NoAnswer
        if opcode in _NOTHING:
            return True, None
        server = self._servers.get(opcode)
        if server is None:
            raise FUSEError(errno.ENODATA if opcode == Opcode.GETXATTR else errno.EROFS)
        try:
            return True, server(request, body)
        except DfsError as error:
            raise FUSEError(errno_of(error)) from None

    @staticmethod
    def _renames_virtual(request: Request, body: memoryview) -> bool:
        layout = _RENAMES[request.opcode]  # type: ignore[index]
        parent = layout.unpack_from(body)[0]
        old, new = fusewire.two_names(bytes(body[layout.size :]))
        return any(at >= FIRST or (at == ROOT and name == NAME) for at, name in ((request.node, old), (parent, new)))

    def _lookup(self, request: Request, body: memoryview) -> Served:
        entry: bytes = self._driver.encode(self._virtual.find(request.node, fusewire.first_name(bytes(body))))
        return entry

    def _list(self, request: Request, body: memoryview) -> Served:
        _, start, size, *_ = fusewire.READ_IN.unpack_from(body)
        answer = b""
        for name, shown, place in self._virtual.listing(start):
            entry = fusewire.encode_listed(
                self._driver.encode(shown), shown.ino, stat.S_IFMT(shown.mode) >> 12, name, place
            )
            if len(answer) + len(entry) > size:
                break
            answer += entry
        return answer

    def _open(self, request: Request, body: memoryview) -> Served:
        flags, _ = fusewire.OPEN_IN.unpack_from(body)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise FUSEError(errno.EROFS)
        return self._opened(request.node)

    async def _opened(self, node: int) -> bytes:
        """Past the page cache: each time there is something else in it, of a length nobody knows."""
        try:
            return fusewire.OPEN_OUT.pack(await self._virtual.open(node), fusewire.OPENED_DIRECT_IO, 0)
        except DfsError as error:
            raise FUSEError(errno_of(error)) from None

    def _read(self, request: Request, body: memoryview) -> Served:
        handle, offset, size, *_ = fusewire.READ_IN.unpack_from(body)
        return self._virtual.read(handle, offset, size)

    def _release(self, request: Request, body: memoryview) -> Served:
        self._virtual.release(fusewire.HANDLE_IN.unpack_from(body)[0])
        return None

    def _no_xattrs(self, request: Request, body: memoryview) -> Served:
        size, _ = fusewire.SIZE_IN.unpack_from(body)
        return fusewire.SIZE_OUT.pack(0, 0) if size == 0 else b""

"""A mount without FUSE: the whole client core over sockets, and a verifying load's filesystem on it.

The load runs in a thread; each of its calls is carried out by the event loop. A client that dies takes its session,
its caches and all it had not written with it; its load gets ``OSError`` from then on.
"""

import errno
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import trio

from chunkserver.client import open_pool
from dfsmount.cache import BlockCache
from dfsmount.errors import ERRNO
from dfsmount.reader import Reader, ReaderOptions
from dfsmount.remote import Remote
from dfsmount.vfs import Vfs
from dfsmount.vfs_core import Core, VfsOptions
from dfsmount.vfs_names import Caller
from dfsmount.writer import Writer, WriterOptions
from metaserver.client import Hooks, MetaClient, SessionIdentity, open_meta
from metaserver.errors import DfsError, ErrorCode
from metaserver.key import ClusterKey
from metaserver.protocol import SetAttributes

T = TypeVar("T")
ME = Caller(0, 0)
# A client that outlives the servers waits for them: starts, the reconnect window, and a second such cut meanwhile.
PATIENCE_SECONDS = 60.0
# What is lost is told after so long. On a busy machine restarts take several seconds.
READ_SECONDS = 30.0
READ_BYTES = 1 << 20


class NoKernel:
    """Nothing is cached above."""

    def forget_attributes(self, ino: int) -> None:
        pass

    def forget_contents(self, inos: Sequence[int]) -> None:
        pass


class PowerClient:
    """A running mount. Its methods are called in the event loop's thread."""

    def __init__(self, meta: MetaClient, vfs: Vfs, scope: trio.CancelScope) -> None:
        self.meta = meta
        self.vfs = vfs
        self.dead = False
        self._scope = scope
        self._calls: set[trio.CancelScope] = set()

    def die(self) -> None:
        """As by a power cut: nobody is told, nothing is written."""
        self.dead = True
        connection, self.meta._connection = self.meta._connection, None
        if connection is not None:
            connection.close("the power is off")
        for call in self._calls:
            call.cancel()
        self._scope.cancel()

    async def call(self, function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Does it for the load; ``OSError`` with the errno a program would see."""
        if self.dead:
            raise OSError(errno.ENOTCONN, "the client is dead")
        with trio.CancelScope() as scope:
            self._calls.add(scope)
            try:
                return await function(*arguments)
            except DfsError as error:
                raise OSError(ERRNO[error.code], str(error)) from None
            except RuntimeError:
                if not self.dead:
                    raise
                # It was about to start a task where everything had ended already.
                raise OSError(errno.ENOTCONN, "the client died") from None
            finally:
                self._calls.discard(scope)
        raise OSError(errno.ENOTCONN, "the client died")

    async def resolve(self, path: str) -> tuple[int, bytes]:
        """The directory a path lies in, and its last name."""
        parent, parts = self.vfs.root, [part.encode() for part in path.split("/") if part]
        for part in parts[:-1]:
            parent = await self.lookup(parent, part)
        return parent, parts[-1] if parts else b""

    async def lookup(self, parent: int, name: bytes) -> int:
        ino = (await self.vfs.names.lookup(parent, name)).ino
        self.vfs.forget(ino, 1)
        return ino

    async def ino_of(self, path: str) -> int:
        parent, name = await self.resolve(path)
        return await self.lookup(parent, name) if name else parent

    async def open(self, path: str, flags: int) -> tuple[int, int]:
        """A handle and its inode, as the kernel opens."""
        parent, name = await self.resolve(path)
        try:
            ino = await self.lookup(parent, name)
        except DfsError as error:
            if error.code is not ErrorCode.NOT_FOUND or not flags & os.O_CREAT:
                raise
            mode = stat.S_IFREG | 0o644
            opened, shown = await self.vfs.files.create(parent, name, mode, os.O_RDWR | flags, ME)
            self.vfs.forget(shown.ino, 1)
            return opened.number, shown.ino
        return (await self.vfs.files.open(ino, os.O_RDWR | flags)).number, ino

    async def read(self, number: int, length: int, offset: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            more = await self.vfs.files.read(number, offset + len(data), min(READ_BYTES, length - len(data)))
            if not more:
                break
            data += more
        return bytes(data)

    async def close(self, number: int) -> None:
        try:
            await self.vfs.files.flush(number)
        finally:
            self.vfs.files.release(number)

    async def make_directory(self, path: str) -> None:
        """With parents."""
        parts = path.split("/")
        for count in range(1, len(parts) + 1):
            parent, name = await self.resolve("/".join(parts[:count]))
            try:
                await self.vfs.names.make(parent, name, stat.S_IFDIR | 0o755, ME)
            except DfsError as error:
                if error.code is not ErrorCode.EXISTS:
                    raise

    async def rename(self, old: str, new: str) -> None:
        await self.vfs.names.rename(*await self.resolve(old), *await self.resolve(new), 0)

    async def link(self, old: str, new: str) -> None:
        await self.vfs.names.link(await self.ino_of(old), *await self.resolve(new))

    async def unlink(self, path: str) -> None:
        await self.vfs.names.unlink(*await self.resolve(path), directory=False)

    async def files(self, path: str) -> dict[str, int]:
        """All files below a directory: path from there, and inode."""
        found: dict[str, int] = {}
        for name, ino, mode in await self._list(await self.ino_of(path)):
            if stat.S_ISDIR(mode):
                below = await self.files(f"{path}/{name}")
                found.update({f"{name}/{rest}": number for rest, number in below.items()})
            else:
                found[name] = ino
        return found

    async def _list(self, ino: int) -> list[tuple[str, int, int]]:
        number, start, found = self.vfs.names.open_directory(ino), 0, []
        try:
            while True:
                page = list(await self.vfs.names.list_directory(number, start))
                if not page:
                    return found
                start = page[-1].cookie
                found += [(one.name.decode(), one.shown.ino, one.shown.mode) for one in page if one.inode is not None]
        finally:
            self.vfs.names.release_directory(number)


class ClientFilesystem:
    """``load_manifest.Filesystem`` and ``Tree`` below ``top``, for threads."""

    def __init__(self, client: PowerClient, top: str) -> None:
        self._client = client
        self._top = top
        self._inos: dict[int, int] = {}
        self._token = trio.lowlevel.current_trio_token()

    def _ask(self, function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        return trio.from_thread.run(self._client.call, function, *arguments, trio_token=self._token)

    def _path(self, path: str) -> str:
        return f"{self._top}/{path}" if path else self._top

    def open(self, path: str, flags: int) -> int:
        handle, ino = self._ask(self._client.open, self._path(path), flags)
        self._inos[handle] = ino
        return handle

    def close(self, handle: int) -> None:
        self._inos.pop(handle)
        self._ask(self._client.close, handle)

    def read_at(self, handle: int, length: int, offset: int) -> bytes:
        return self._ask(self._client.read, handle, length, offset)

    def write(self, handle: int, data: bytes, offset: int) -> None:
        self._ask(self._client.vfs.files.write, handle, offset, data)

    def truncate(self, handle: int, length: int) -> None:
        self._ask(self._client.vfs.set_attributes, SetAttributes(self._inos[handle], size=length))

    def size(self, handle: int) -> int:
        return self._ask(self._client.vfs.get_attributes, self._inos[handle]).size

    def fsync(self, handle: int) -> None:
        self._ask(self._client.vfs.files.fsync, handle)

    def sync_directory(self, path: str) -> None:
        self._ask(self._client.vfs.sync_names)

    def make_directory(self, path: str) -> None:
        self._ask(self._client.make_directory, self._path(path))

    def rename(self, old: str, new: str) -> None:
        self._ask(self._client.rename, self._path(old), self._path(new))

    def link(self, old: str, new: str) -> None:
        self._ask(self._client.link, self._path(old), self._path(new))

    def unlink(self, path: str) -> None:
        self._ask(self._client.unlink, self._path(path))

    def files(self) -> dict[str, int]:
        return self._ask(self._client.files, self._top)


class ClientTree:
    """``load_manifest.Tree`` of what a client reads."""

    def __init__(self, fs: ClientFilesystem) -> None:
        self._fs = fs

    def read(self, path: str) -> bytes | None:
        try:
            handle = self._fs.open(path, 0)
        except FileNotFoundError:
            return None
        try:
            return self._fs.read_at(handle, self._fs.size(handle), 0)
        finally:
            self._fs.close(handle)


@asynccontextmanager
async def open_client(port: int, key: ClusterKey, *, read_seconds: float = READ_SECONDS) -> AsyncIterator[PowerClient]:
    """A mount for the block; if it has not died by then it is ended as an unmount does."""
    mounted: list[PowerClient] = []
    hooks = Hooks(
        on_flush=lambda inos: mounted[0].vfs.flush_pushed(inos),
        on_changed=lambda inos: mounted[0].vfs.changed_pushed(inos),
        opened=lambda: mounted[0].vfs.opened() if mounted else [],
        on_new_session=lambda: mounted[0].vfs.new_session(),
    )
    identity = SessionIdentity("here", "/mnt", os.getpid())
    with trio.CancelScope() as scope:
        async with (
            open_meta("127.0.0.1", port, key, identity, hooks) as meta,
            open_pool(key, meta.cluster_id, session=meta.session) as pool,
            trio.open_nursery() as nursery,
        ):
            writer = Writer(meta, pool, WriterOptions(give_up_seconds=2 * PATIENCE_SECONDS))
            reader = Reader(meta, pool, BlockCache(16 << 20), ReaderOptions(read_seconds))
            core = Core(Remote(meta, PATIENCE_SECONDS), writer, reader, NoKernel(), VfsOptions())
            core.inodes.learn(meta.root, core.inodes.now()).lookups = 1
            client = PowerClient(meta, Vfs(core, meta.root.ino), scope)
            mounted.append(client)
            for task in (writer.run, reader.run, client.vfs.run):
                nursery.start_soon(task)
            yield client
            if not client.dead:
                await client.vfs.finish()
            nursery.cancel_scope.cancel()

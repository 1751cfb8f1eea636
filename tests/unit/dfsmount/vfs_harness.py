"""A real metaserver in this process, and mounts of it without FUSE and without chunkservers.

The stand-in for the data path commits sizes and times as the real writer does, but no bytes: what is read back is what
is dirty, and zeros. Contents are the business of the tests of writer and reader.
"""

import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from dfsmount.filestate import FileState
from dfsmount.remote import Remote
from dfsmount.vfs import Vfs
from dfsmount.vfs_core import Core, Shown, VfsOptions
from dfsmount.vfs_names import Caller
from metaserver import protocol, transport
from metaserver.client import Hooks, MetaClient, SessionIdentity, open_meta
from metaserver.commit import open_committer
from metaserver.config import Config
from metaserver.connection import accept_handshake
from metaserver.errors import DfsError, ErrorCode
from metaserver.parts import Parts
from metaserver.protocol import Commit, FileCommit, SetAttributes

ME = Caller(1000, 1000)


class FakeWriter:
    """Commits without bytes. ``flushed`` lists the inodes that were; ``broken``: what every flush fails with."""

    def __init__(self, meta: MetaClient) -> None:
        self._meta = meta
        self._files: list[FileState] = []
        self.flushed: list[int] = []
        self.soon: list[int] = []
        self.abandoned: DfsError | None = None
        self.broken: DfsError | None = None

    @property
    def dirty_bytes(self) -> int:
        return sum(file.dirty.cost for file in self._files)

    async def write(self, file: FileState, offset: int, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if data:
            file.write(offset, data, self._meta.now_ns())
            self._files.append(file)

    def take(self, file: FileState, offset: int, data: bytes) -> bool:
        """At once only what follows other bytes, as if the first of a file had to wait for room."""
        if not file.is_dirty:
            return False
        file.write(offset, data, self._meta.now_ns())
        return True

    def forget_quotas(self) -> None:
        pass

    async def flush(self, file: FileState, *, durable: bool = False) -> None:
        self.flushed.append(file.ino)
        file.dirty.close()
        for layer in list(file.dirty.layers):
            if self.broken is not None:
                file.dropped(layer, self.broken)
                continue
            commit = FileCommit(file.ino, layer.truncate_generation, layer.stop, layer.mtime_ns, ())
            done = await self._meta.call(protocol.COMMIT, Commit((), (commit,), durable))
            if done.attributes:
                file.committed(layer, done.attributes[0], ())
            else:
                file.dropped(layer, None)

    def flush_soon(self, file: FileState) -> None:
        self.soon.append(file.ino)

    async def truncate_local(self, file: FileState, size: int) -> None:
        await trio.lowlevel.checkpoint()
        file.begin_truncate(size)

    def discard(self, file: FileState) -> None:
        file.discard()

    async def flush_all(self) -> None:
        for file in list(self._files):
            await self.flush(file)

    async def close(self) -> None:
        await self.flush_all()

    def abandon_all(self, error: DfsError) -> None:
        self.abandoned = error
        for file in self._files:
            file.abandon(error)


class FakeReader:
    """Dirty bytes over zeros."""

    async def read(self, file: FileState, handle: object, offset: int, length: int) -> bytes:
        await trio.lowlevel.checkpoint()
        stop = max(offset, min(offset + length, file.size))
        data = bytearray(stop - offset)
        for span in file.dirty.overlay(offset, stop):
            start = span.offset - offset
            data[start : start + len(span.data)] = span.data
        return bytes(data)


class FakeKernel:
    """Remembers what it was told to drop."""

    def __init__(self) -> None:
        self.attributes: list[int] = []
        self.contents: list[int] = []

    def forget_attributes(self, ino: int) -> None:
        self.attributes.append(ino)

    def forget_contents(self, inos: Sequence[int]) -> None:
        self.contents.extend(inos)


class TestMount:
    """One mount and shorthands for what a kernel would ask of it."""

    __test__ = False

    def __init__(self, meta: MetaClient, options: VfsOptions) -> None:
        self.meta = meta
        self.writer = FakeWriter(meta)
        self.kernel = FakeKernel()
        remote = Remote(meta, 10.0)
        self.core = Core(remote, self.writer, FakeReader(), self.kernel, options)  # type: ignore[arg-type]
        self.core.inodes.learn(meta.root, self.core.inodes.now()).lookups = 1
        self.vfs = Vfs(self.core, meta.root.ino)
        self.names, self.files = self.vfs.names, self.vfs.files
        self.root = meta.root.ino

    async def create(self, name: bytes, data: bytes = b"", flags: int = 2, parent: int = 0) -> tuple[int, int]:
        """A new file: its ino and an open handle."""
        opened, shown = await self.files.create(parent or self.root, name, stat.S_IFREG | 0o644, flags, ME)
        if data:
            await self.files.write(opened.number, 0, data)
        return shown.ino, opened.number

    async def close(self, number: int) -> None:
        await self.files.flush(number)
        self.files.release(number)

    async def mkdir(self, name: bytes, parent: int = 0) -> int:
        return (await self.names.make(parent or self.root, name, stat.S_IFDIR | 0o755, ME)).ino

    async def stat(self, name: bytes, parent: int = 0) -> Shown:
        return await self.names.lookup(parent or self.root, name)

    async def set(self, ino: int, **changes: Any) -> Shown:
        return await self.vfs.set_attributes(SetAttributes(ino, **changes))

    async def list(self, ino: int = 0) -> list[bytes]:
        """All names as the kernel would get them, a few at a time."""
        number = self.names.open_directory(ino or self.root)
        found: list[bytes] = []
        start = 0
        while True:
            taken = 0
            for listed in await self.names.list_directory(number, start):
                if taken == 7:
                    break
                self.names.took(listed)
                found.append(listed.name)
                start = listed.cookie
                taken += 1
            if not taken:
                self.names.release_directory(number)
                return found


class Plant:
    """The metaserver. ``parts`` for a look inside; ``connections`` can be cut."""

    def __init__(self, parts: Parts, port: int) -> None:
        self.parts = parts
        self.port = port
        self.streams: list[transport.SocketTransport] = []

    @asynccontextmanager
    async def mount(self, options: VfsOptions | None = None, subdirectory: bytes = b"/") -> AsyncIterator[TestMount]:
        mounts: list[TestMount] = []
        hooks = Hooks(
            on_flush=lambda inos: mounts[0].vfs.flush_pushed(inos),
            on_changed=lambda inos: mounts[0].vfs.changed_pushed(inos),
            opened=lambda: mounts[0].vfs.opened(),
            on_new_session=lambda: mounts[0].vfs.new_session(),
        )
        read_only = options is not None and options.read_only
        identity = SessionIdentity("here", "/mnt", 1, subdirectory, read_only)
        async with open_meta("127.0.0.1", self.port, None, identity, hooks) as meta:
            mounts.append(TestMount(meta, options or VfsOptions()))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(mounts[0].vfs.run)
                yield mounts[0]
                nursery.cancel_scope.cancel()

    def cut(self) -> None:
        """Breaks every connection."""
        for stream in self.streams:
            stream.close()
        self.streams.clear()


@asynccontextmanager
async def open_plant(directory: Path, *, trash_seconds: float = 0.0) -> AsyncIterator[Plant]:
    config = Config(data=str(directory), window_seconds=0.05, trash_seconds=trash_seconds)
    async with open_committer(directory) as committer, trio.open_nursery() as nursery:
        parts = Parts(committer, config, "cluster")
        parts.load()
        listener = transport.listen("127.0.0.1", 0)
        plant = Plant(parts, listener.getsockname()[1])

        async def handle(stream: transport.SocketTransport) -> None:
            plant.streams.append(stream)
            client = parts.client()
            try:
                connection = await accept_handshake(
                    stream, client.dispatch, key=None, cluster_id="cluster", role=protocol.ROLE
                )
            except DfsError:
                return
            try:
                await connection.run()
            finally:
                client.lost(connection)

        nursery.start_soon(transport.serve, listener, handle)
        nursery.start_soon(parts.aging.run)
        yield plant
        nursery.cancel_scope.cancel()


def code_of(error: BaseException) -> ErrorCode:
    assert isinstance(error, DfsError), error
    return error.code

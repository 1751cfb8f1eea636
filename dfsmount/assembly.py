"""A session of the cluster with everything that makes it a filesystem, put together: what a mount and the HTTP gateway
have in common. Nothing here knows FUSE or HTTP.
"""

import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import msgspec
import trio

from chunkserver.client import Pool, open_pool
from dfsmount.cache import BlockCache
from dfsmount.config import Source
from dfsmount.filefacts import FileFacts
from dfsmount.ownhost import own_names
from dfsmount.reader import Reader, ReaderOptions
from dfsmount.remote import Remote
from dfsmount.vfs import Vfs
from dfsmount.vfs_core import Core, Kernel, VfsOptions
from dfsmount.writer import Writer, WriterOptions
from metaserver.client import Hooks, MetaClient, SessionIdentity, open_meta
from metaserver.key import ClusterKey

# With 64 MiB of cache and what Python takes, the process stays below 300 MiB (298 were seen with 128).
DIRTY_MIB = 96
# Written data that the servers do not take is kept and tried again for so long, whatever fsync has been told meanwhile:
# servers come back from a reboot within minutes.
KEEP_SECONDS = 300.0


class ClientOptions(msgspec.Struct, frozen=True):
    """``shown_as`` is what `dfs status` calls this session. ``timeout``: how long an operation waits for servers."""

    shown_as: str
    vfs: VfsOptions
    timeout: float
    cache_mib: int | None = None
    dirty_mib: int | None = None


class NoKernel:
    """For those who keep nothing of what they are told."""

    def forget_attributes(self, ino: int) -> None:
        """Nothing is cached."""

    def forget_contents(self, inos: Sequence[int]) -> None:
        """Nothing is cached."""


class Client:
    """The parts of a running client. :meth:`run` must be running; ``vfs.finish()`` comes before it is cancelled."""

    def __init__(
        self, meta: MetaClient, pool: Pool, writer: Writer, reader: Reader, kernel: Kernel, options: ClientOptions
    ) -> None:
        self.meta = meta
        self.pool = pool
        self.writer = writer
        self.reader = reader
        self.core = Core(Remote(meta, options.timeout), writer, reader, kernel, options.vfs)
        root = self.core.inodes.learn(meta.root, self.core.inodes.now())
        root.lookups = 1
        self.vfs = Vfs(self.core, meta.root.ino, FileFacts(self.core.remote, pool))

    async def run(self) -> None:
        """What goes on beside the requests, for ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.writer.run)
            nursery.start_soon(self.reader.run)
            nursery.start_soon(self.vfs.run)


@asynccontextmanager
async def open_client(
    source: Source, key: ClusterKey | None, options: ClientOptions, make_kernel: Callable[[int], Kernel]
) -> AsyncIterator[Client]:
    """A session on ``source`` for as long as the block lasts; ``make_kernel`` gets the ino of its root.

    Raises :class:`metaserver.errors.DfsError` if the session cannot be begun.
    """
    made: list[Client] = []
    hooks = Hooks(
        on_flush=lambda inos: made[0].vfs.flush_pushed(inos),
        on_changed=lambda inos: made[0].vfs.changed_pushed(inos),
        opened=lambda: made[0].vfs.opened() if made else [],
        on_new_session=lambda: made[0].vfs.new_session(),
        dirty_bytes=lambda: made[0].writer.dirty_bytes if made else 0,
        on_retire=lambda chunks: made[0].writer.retire(chunks) if made else None,
        on_quotas=lambda: made[0].vfs.quotas_pushed() if made else None,
    )
    host = socket.gethostname()
    names = await trio.to_thread.run_sync(own_names, source.host, source.port, abandon_on_cancel=True)
    subdirectory = os.fsencode(source.subdirectory)
    identity = SessionIdentity(host, options.shown_as, os.getpid(), subdirectory, options.vfs.read_only)
    async with (
        open_meta(source.host, source.port, key, identity, hooks) as meta,
        open_pool(key, meta.cluster_id, session=meta.session) as pool,
    ):
        writer = Writer(meta, pool, _writer_options(names, options))
        reader = Reader(meta, pool, _block_cache(options), ReaderOptions(options.timeout, names))
        made.append(Client(meta, pool, writer, reader, make_kernel(meta.root.ino), options))
        yield made[0]


def _block_cache(options: ClientOptions) -> BlockCache:
    return BlockCache() if options.cache_mib is None else BlockCache(options.cache_mib << 20)


def _writer_options(names: frozenset[str], options: ClientOptions) -> WriterOptions:
    dirty_mib = DIRTY_MIB if options.dirty_mib is None else options.dirty_mib
    return WriterOptions(" ".join(sorted(names)), dirty_mib << 20, give_up_seconds=max(options.timeout, KEEP_SECONDS))

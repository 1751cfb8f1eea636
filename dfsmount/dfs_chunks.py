"""`dfs chunks`: where the bytes of a file are, asked of the metaserver and of every server that has a replica."""

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import trio

from chunkserver import client
from chunkserver.protocol import Peer, StatReply
from dfsmount.dfs_api import Api
from dfsmount.dfs_find import Access
from dfsmount.dfs_layout import Problem
from dfsmount.dfs_mounts import mounts, our_mount_of
from metaserver.errors import DfsError, ErrorCode
from metaserver.key import ClusterKey
from metaserver.protocol import ExtentStatus, FileStatus, ReplicaStatus, Status

# Replicas asked at a time; each server answers from its index, without touching the disk.
ASKED_AT_ONCE = 16
# Replicas that are none: an order for them is under way. Whoever asked their servers would find a copy that is gone in
# a moment, or count one that is not there yet.
UNDER_WAY = {"DELETING": "being deleted", "COPYING": "being copied"}


class ReplicaView(msgspec.Struct):
    """One replica of one piece of a file, as its server sees it.

    ``checksums`` is "ok", "index ok", one of :data:`UNDER_WAY`, or what is wrong.
    """

    server: str
    address: str
    state: str
    path: str
    checksums: str
    created_ns: int


class PieceView(msgspec.Struct):
    """One row of a file's chunk map. Offsets and lengths in bytes."""

    index: int
    offset: int
    length: int
    chunk: str
    chunk_offset: int
    chunk_state: str
    replicas: list[ReplicaView]


class FileView(msgspec.Struct):
    path: str
    ino: int
    size: int
    mtime_ns: int
    pieces: list[PieceView]


class Asking(NamedTuple):
    """What is needed to ask chunkservers."""

    key: ClusterKey
    status: Status
    verify: bool

    def peer(self, server: int) -> Peer | None:
        found = next((known for known in self.status.servers if known.server == server), None)
        return None if found is None else Peer(server, found.host, found.port)


def inode_of(path: Path) -> int:
    """The inode of a regular file, after making sure that everything written to it is in its chunks."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise Problem(f"cannot open {path}: {error.strerror}") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise Problem(f"{path} is not a regular file: only those have chunks")
        os.fsync(descriptor)
    except OSError as error:
        raise Problem(f"cannot sync {path}: {error.strerror}") from None
    finally:
        os.close(descriptor)
    return found.st_ino


def look(file: Path, find: Callable[[Path], Access], *, verify: bool) -> FileView:
    """The chunk map of ``file``; ``find`` says which cluster a resolved path belongs to.

    With ``verify``, every block of every replica is read and checked.
    """
    path = resolve(file)
    access = find(path)
    # Whatever cluster the options name: the inode number of a file that is not on it says nothing there.
    our_mount_of(path, mounts())
    ino = inode_of(path)
    with Api(access) as api:
        status, found = api.status(), api.file(ino)
    return trio.run(view, path, found, Asking(access.key(), status, verify))


def resolve(file: Path) -> Path:
    """The absolute path without symbolic links: that is what the mount table speaks of."""
    try:
        return file.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise Problem(f"cannot find {file}: {getattr(error, 'strerror', None) or error}") from None


async def view(path: Path, file: FileStatus, asking: Asking) -> FileView:
    """The map of a file, and what every server says about its replicas or that it does not answer."""
    pieces = [empty_piece(extent) for extent in file.extents]
    limit = trio.CapacityLimiter(ASKED_AT_ONCE)
    async with client.open_pool(asking.key, asking.status.cluster_id) as pool:

        async def ask(extent: ExtentStatus, replica: ReplicaStatus, into: PieceView, at: int) -> None:
            async with limit:
                into.replicas[at] = await ask_replica(pool, asking, extent, replica)

        async with trio.open_nursery() as nursery:
            for extent, piece in zip(file.extents, pieces, strict=True):
                for at, replica in enumerate(extent.replicas):
                    nursery.start_soon(ask, extent, replica, piece, at)
    return FileView(str(path), file.ino, file.size, file.mtime_ns, pieces)


def empty_piece(extent: ExtentStatus) -> PieceView:
    replicas = [
        ReplicaView(replica.name, f"{replica.host}:{replica.http_port}", replica.state, replica.path, "", 0)
        for replica in extent.replicas
    ]
    return PieceView(
        extent.index,
        extent.file_offset,
        extent.length,
        extent.chunk,
        extent.chunk_offset,
        extent.chunk_state,
        replicas,
    )


async def ask_replica(pool: client.Pool, asking: Asking, extent: ExtentStatus, replica: ReplicaStatus) -> ReplicaView:
    peer = asking.peer(replica.server)
    state = UNDER_WAY.get(replica.state, "unknown")
    answer = ReplicaView(replica.name, f"{replica.host}:{replica.http_port}", replica.state, replica.path, state, 0)
    if peer is None or replica.state in UNDER_WAY:
        return answer
    chunk = int(extent.chunk, 16)
    answer.address = f"{peer.host}:{peer.port}"
    try:
        reply = await pool.stat(peer, chunk)
        answer.path, answer.created_ns = reply.path, reply.created_ns
        answer.checksums = index_state(extent, reply)
        if asking.verify and answer.checksums == "index ok":
            await verify_range(pool, peer, chunk, extent)
            answer.checksums = "ok"
    except DfsError as error:
        answer.checksums = error.text
    return answer


def index_state(extent: ExtentStatus, reply: StatReply) -> str:
    """What can be said without reading the blocks: the chained index was checked when it was written or loaded."""
    if extent.chunk_offset + extent.length > reply.progress.logical_length:
        return f"too short: {reply.progress.logical_length} bytes"
    return "index ok"


async def verify_range(pool: client.Pool, peer: Peer, chunk: int, extent: ExtentStatus) -> None:
    """Reads the piece from that one server; :class:`DfsError` unless every block has its checksum."""
    at, end = extent.chunk_offset, extent.chunk_offset + extent.length
    while at < end:
        blocks = await pool.read(peer, chunk, at, end - at)
        if not blocks.entries:
            raise DfsError(ErrorCode.BAD_CHECKSUM, f"ends at {at}")
        at = blocks.entries[-1].logical_offset + blocks.entries[-1].logical_length


def bad(pieces: Sequence[PieceView]) -> int:
    """How many replicas are not as they should be."""
    fine = ("ok", "index ok", *UNDER_WAY.values())
    return sum(replica.checksums not in fine for piece in pieces for replica in piece.replicas)

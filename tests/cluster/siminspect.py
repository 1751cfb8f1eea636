"""Looking at what lies on the disks of a simulation: which copies are really there."""

from typing import TYPE_CHECKING
from uuid import UUID

from simdisk import SimDisk
from simnodes import CLUSTER, ChunkNode

from chunkserver import recovery
from chunkserver.chunkfile import chunk_path, first_chain
from metaserver.protocol import ChunkState
from metaserver.schema import Chunk

if TYPE_CHECKING:
    from simcluster import Cluster


def disk_of(chunk: ChunkNode) -> SimDisk:
    """Its disk, to look at."""
    return SimDisk(chunk.storage, sound=True)


def is_whole(server: ChunkNode, chunk: int, row: Chunk) -> bool:
    """Whether what the metaserver counts on is on that disk, every byte of it."""
    disk, path = disk_of(server), chunk_path(chunk)
    try:
        file = disk.open(path)
    except OSError:
        return False
    index = recovery.read_index(file, UUID(CLUSTER), chunk, max(1, row.entries))
    progress = index.progress(len(index), first_chain(UUID(CLUSTER), chunk))
    if progress.entries < row.entries or (row.entries and progress.chain != row.chain):
        return False
    return not recovery.bad_blocks(disk, path, index)


def whole_copies(cluster: "Cluster", chunk: int, row: Chunk, beside: int = 0) -> list[ChunkNode]:
    """The servers that have all of a chunk, but for one."""
    return [server for server in cluster.chunks if server.number != beside and is_whole(server, chunk, row)]


def check_unlink(cluster: "Cluster", number: int, path: str) -> None:
    """A chunk file is being removed: is it needed?"""
    name = path.rpartition("/")[2]
    if not path.startswith("chunks/") or "." in name:
        return
    found = cluster.chunk_rows().get(int(name, 16))
    server = next((each for each in cluster.chunks if each.number == number), None)
    if found is None or server is None or found[0].state == ChunkState.DEAD or not found[0].length:
        return
    chunk, row = int(name, 16), found[0]
    if not is_whole(server, chunk, row):
        return
    others = whole_copies(cluster, chunk, row, number)
    cluster.trace.add(f"REMOVED {path} on {server.name}; others: {[other.name for other in others]}")
    if not others:
        cluster.trace.violation(f"the last copy of chunk {chunk:x} was removed, on {server.name}")


def may_lose(cluster: "Cluster", server: ChunkNode, *, only: int = 0) -> bool:
    """Whether everything on it (or chunk ``only``) that counts is whole elsewhere, and nothing is in the balance."""
    parts = cluster.meta.parts
    if parts is None or parts.resuming.window.open or parts.committer.durable != parts.committer.newest:
        return False
    rows = cluster.chunk_rows()
    for chunk, (row, replicas) in rows.items():
        if only and chunk != only:
            continue
        if row.state in (ChunkState.DEAD, ChunkState.FILLING) or server.number not in replicas:
            continue
        if not [other for other in whole_copies(cluster, chunk, row, server.number) if other.running]:
            return False
    return True

"""Asks chunkservers what they have, for rebuilding a metaserver that is gone: the one module that connects to them.

Listings are read a page at a time from all servers and merged by chunk, so that memory does not grow with their number.
"""

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple
from uuid import UUID

import structlog
import trio
from crc32c import crc32c

from chunkserver.chunkfile import first_chain
from chunkserver.client import Pool, open_pool
from chunkserver.protocol import Listed, Peer
from metaserver.errors import DfsError, ErrorCode
from metaserver.key import ClusterKey
from metaserver.protocol import ROLE
from metaserver.salvage import ENTRY_BYTES, Choice, Found, Version, choose

log = structlog.get_logger(__name__)

# Replicas asked for at once: what a restart froze is read back first, and that has to end within a request's time.
PAGE_CHUNKS = 1000
# Entries of one answer: just below 1 MiB.
PAGE_ENTRIES = 15_000
# Chunks whose indexes are read at a time, each up to 2 MiB per version.
PARALLEL = 8


class SurveyError(Exception):
    """The chunkservers cannot be asked; the text is one line that says which and why."""


class ServerFound(NamedTuple):
    """A chunkserver that takes part. ``peer.server`` is 0: known by its address only."""

    server: int
    name: str
    data_path: str
    peer: Peer
    highest_epoch: int
    highest_chunk: int


class ChunkFound(NamedTuple):
    """One chunk with its replicas by server; ``choice`` is None if no index could be read or there is no entry."""

    chunk: int
    found: dict[int, Found]
    choice: Choice | None
    entries: bytes

    @property
    def empty(self) -> bool:
        """Nothing was ever written to it, as far as anybody knows."""
        return all(not one.entries and not one.error for one in self.found.values())


class Survey:
    """What the chunkservers at some addresses have; made by :func:`open_survey`."""

    def __init__(self, pool: Pool, cluster_id: str, servers: Sequence[ServerFound]) -> None:
        self._pool = pool
        self.cluster_id = cluster_id
        self.servers = servers

    @property
    def highest_epoch(self) -> int:
        return max(server.highest_epoch for server in self.servers)

    @property
    def highest_chunk(self) -> int:
        return max(server.highest_chunk for server in self.servers)

    async def chunks(self) -> AsyncIterator[list[ChunkFound]]:
        """All chunks in ascending order, a few at a time; raises :class:`SurveyError` if a server goes away."""
        batch: list[tuple[int, dict[int, Found]]] = []
        async for chunk, found in self._merged():
            batch.append((chunk, found))
            if len(batch) == PARALLEL:
                yield await self._look_into(batch)
                batch = []
        if batch:
            yield await self._look_into(batch)

    async def _merged(self) -> AsyncIterator[tuple[int, dict[int, Found]]]:
        listings = [_Listing(self._pool, server) for server in self.servers]
        for listing in listings:
            await listing.fill()
        while heads := [listing for listing in listings if listing.page]:
            chunk = min(listing.page[0].chunk for listing in heads)
            found = {}
            for listing in heads:
                if listing.page[0].chunk == chunk:
                    found[listing.server.server] = _found(listing.server.server, listing.page.pop(0))
                    await listing.fill()
            yield chunk, found

    async def _look_into(self, batch: Sequence[tuple[int, dict[int, Found]]]) -> list[ChunkFound]:
        results: dict[int, ChunkFound] = {}

        async def look(chunk: int, found: dict[int, Found]) -> None:
            results[chunk] = await self._chunk(chunk, found)

        async with trio.open_nursery() as nursery:
            for chunk, found in batch:
                nursery.start_soon(look, chunk, found)
        return [results[chunk] for chunk, _ in batch]

    async def _chunk(self, chunk: int, found: dict[int, Found]) -> ChunkFound:
        indexes: dict[Version, bytes] = {}
        # Those of which nothing bad is known first: one good index for each version is enough.
        for one in sorted(found.values(), key=lambda one: bool(one.error)):
            if one.entries and one.version not in indexes:
                index = await self._index(chunk, one)
                if index is None:
                    found[one.server] = one._replace(error=one.error or ErrorCode.BAD_CHECKSUM.name)
                else:
                    indexes[one.version] = index
        choice = choose(found.values(), indexes)
        return ChunkFound(chunk, found, choice, indexes[choice.version] if choice else b"")

    async def _index(self, chunk: int, one: Found) -> bytes | None:
        """The entries of a replica; None if they cannot be read, or are not what was listed."""
        peer = next(server.peer for server in self.servers if server.server == one.server)
        index = b""
        try:
            while len(index) < one.entries * ENTRY_BYTES:
                at = len(index) // ENTRY_BYTES
                count = min(one.entries - at, PAGE_ENTRIES)
                entries = (await self._pool.read_index(peer, chunk, at, count)).entries
                if not entries or len(entries) % ENTRY_BYTES:
                    break
                index += entries
        except DfsError as error:
            if error.code in (ErrorCode.UNAVAILABLE, ErrorCode.TIMEOUT):
                raise SurveyError(f"the chunkserver at {_address(peer)} went away: {error.text}") from None
            log.warning("an index cannot be read", chunk=f"{chunk:x}", server=one.server, reason=error.text)
            return None
        whole = len(index) == one.entries * ENTRY_BYTES and self._follows(chunk, index) == one.chain
        return index if whole else None

    def _follows(self, chunk: int, index: bytes) -> int:
        """The chain after the last entry; -1 if an entry does not continue the one before it."""
        chain = first_chain(UUID(self.cluster_id), chunk)
        view = memoryview(index)
        for at in range(0, len(index), ENTRY_BYTES):
            chain = crc32c(view[at : at + ENTRY_BYTES - 4], chain)
            if chain != int.from_bytes(view[at + ENTRY_BYTES - 4 : at + ENTRY_BYTES], "little"):
                return -1
        return chain


class _Listing:
    """What is still to come from one server; ``page`` is empty once there is no more (after :meth:`fill`)."""

    def __init__(self, pool: Pool, server: ServerFound) -> None:
        self._pool = pool
        self.server = server
        self.page: list[Listed] = []
        self._after = 0
        self._end = False

    async def fill(self) -> None:
        if self.page or self._end:
            return
        try:
            reply = await self._pool.list_chunks(self.server.peer, self._after, PAGE_CHUNKS)
        except DfsError as error:
            raise SurveyError(f"the chunkserver at {_address(self.server.peer)} went away: {error.text}") from None
        self.page, self._end = list(reply.replicas), reply.end
        if self.page:
            self._after = self.page[-1].chunk


def _found(server: int, listed: Listed) -> Found:
    return Found(
        server, listed.length, listed.entries, listed.chain, listed.sealed, listed.error, listed.created_ns
    )  # fmt: skip


def _address(peer: Peer) -> str:
    return f"{peer.host}:{peer.port}"


@asynccontextmanager
async def open_survey(key: ClusterKey, addresses: Iterable[tuple[str, int]]) -> AsyncIterator[Survey]:
    """Connects to all; raises :class:`SurveyError` unless they answer, and are different servers of one cluster."""
    async with open_pool(key, "", role=ROLE) as pool:
        clusters: dict[str, Peer] = {}
        servers: dict[int, ServerFound] = {}
        for host, port in addresses:
            peer = Peer(0, host, port)
            cluster, server = await _greet(pool, peer)
            other = servers.get(server.server)
            if other is not None:
                raise SurveyError(f"{_address(peer)} and {_address(other.peer)} are the same chunkserver")
            servers[server.server] = server
            clusters.setdefault(cluster, peer)
        if not servers:
            raise SurveyError("no chunkserver is given")
        if len(clusters) > 1:
            listed = ", ".join(f"{_address(peer)} to {cluster}" for cluster, peer in clusters.items())
            raise SurveyError(f"these chunkservers belong to different clusters: {listed}")
        yield Survey(pool, next(iter(clusters)), list(servers.values()))


async def _greet(pool: Pool, peer: Peer) -> tuple[str, ServerFound]:
    try:
        cluster = (await pool.get(peer)).peer.cluster_id
        reply = await pool.list_chunks(peer, (1 << 63) - 1, 1)
    except DfsError as error:
        text = f"cannot ask the chunkserver at {_address(peer)}: {error.text}"
        raise SurveyError(f"{text}; start it, or leave it out (what only it has is then missing)") from None
    if not cluster:
        raise SurveyError(f"the chunkserver at {_address(peer)} has not joined any cluster: leave it out")
    found = ServerFound(reply.server, reply.name, reply.data_path, peer, reply.highest_epoch, reply.highest_chunk)
    return cluster, found

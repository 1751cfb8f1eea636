"""What `dfs status` and `dfs chunks` show: gathered in slices, so that looking does not stop the work."""

from collections.abc import Iterator
from itertools import groupby, islice

import structlog
import trio

from metaserver import chunks, contents, inodes
from metaserver.changes import Changes
from metaserver.cleaner import Cleaner
from metaserver.clock import LivedClock
from metaserver.commit import Committer
from metaserver.config import Config
from metaserver.members import Members
from metaserver.protocol import (
    ChunkHealth,
    ChunkState,
    CleanerStatus,
    ExtentStatus,
    FileStatus,
    GetExtents,
    ReplicaState,
    ReplicaStatus,
    ServerStatus,
    SessionStatus,
    Status,
)
from metaserver.repair import Repair
from metaserver.schema import Chunk, Replica, Table, Transaction, chunk_key, parse_replica_key, read_u64
from metaserver.service import Service
from metaserver.sessions import Sessions
from metaserver.tasks import Tasks

log = structlog.get_logger(__name__)

VERSION = "0.1.0"
# Chunks counted between two turns of others: about 10 ms.
SLICE = 500
# A count is shown again for so long: `dfs up` asks for the status ten times a second.
FRESH_SECONDS = 1.0


class StatusReader:
    """Reads what is shown. Counts of chunks are at most :data:`FRESH_SECONDS` old when asked for."""

    def __init__(
        self,
        committer: Committer,
        config: Config,
        cluster_id: str,
        clock: LivedClock,
        sessions: Sessions,
        members: Members,
        repair: Repair,
        tasks: Tasks,
        changes: Changes,
        service: Service,
        cleaner: Cleaner,
    ) -> None:
        self._committer = committer
        self._config = config
        self._cluster_id = cluster_id
        self._clock = clock
        self._sessions = sessions
        self._members = members
        self._repair = repair
        self._tasks = tasks
        self._changes = changes
        self._service = service
        self._cleaner = cleaner
        self._counting = trio.Lock()
        self._health = ChunkHealth(0, 0, 0, 0, 0, 0)
        self._counted = float("-inf")

    async def status(self) -> Status:
        total, free = self._members.space(self._config.copies)
        return Status(
            self._cluster_id,
            self._committer.epoch,
            self._committer.newest,
            self._committer.durable,
            VERSION,
            self._config.copies,
            self._clock.seconds,
            self._service.resuming.window.open,
            self.servers(),
            self.sessions(),
            await self.health(),
            self._changes.inodes,
            total,
            free,
            len(self._tasks),
            len(self._repair),
            self._changes.refusing,
            cleaner=self.cleaner(),
        )

    def cleaner(self) -> CleanerStatus:
        return self._cleaner.status()

    def servers(self) -> list[ServerStatus]:
        return [
            ServerStatus(
                member.server,
                member.row.name,
                member.shown_state.name,
                member.row.host,
                member.row.port,
                member.row.http_port,
                member.row.rack,
                member.row.data_path,
                member.capacity,
                member.free,
                member.reserved,
                member.chunks,
                self._clock.seconds - member.heard,
                disk_state=member.disk_state,
                scrub=member.scrub,
            )
            for _, member in sorted(self._members.by_id.items())
        ]

    def sessions(self) -> list[SessionStatus]:
        return [
            SessionStatus(
                session.id,
                session.row.host,
                session.row.mountpoint,
                session.connection is not None,
                self._clock.seconds - session.heard,
                len(session.opened),
                session.dirty_bytes,
            )
            for _, session in sorted(self._sessions.by_id.items())
        ]

    async def health(self) -> ChunkHealth:
        """How many chunks have the copies they should have, on servers that are up."""
        async with self._counting:
            if trio.current_time() - self._counted >= FRESH_SECONDS:
                self._health = await self._count()
                self._counted = trio.current_time()
            return self._health

    async def _count(self) -> ChunkHealth:
        counts = ChunkHealth(0, 0, 0, 0, 0, 0)
        position = 0
        while True:
            found, _ = self._committer.read(0, lambda tx, position=position: self._page(tx, position))  # type: ignore[misc]
            for chunk, row, good in found:
                position = chunk + 1
                _add(counts, row, good)
            if len(found) < SLICE:
                return counts
            await trio.lowlevel.checkpoint()

    def _page(self, tx: Transaction, position: int) -> list[tuple[int, Chunk, int]]:
        """Chunks with the number of their good replicas on servers that are up; both tables are in order of chunks."""
        rows = islice(tx.scan(Table.CHUNKS, chunk_key(position), b"\xff" * 9), SLICE)
        found = [(read_u64(key), Chunk.unpack(value)) for key, value in rows]
        if not found:
            return []
        good = dict(self._good(tx, found[0][0], found[-1][0]))
        return [(chunk, row, good.get(chunk, 0)) for chunk, row in found]

    def _good(self, tx: Transaction, first: int, last: int) -> Iterator[tuple[int, int]]:
        members = self._members.by_id
        rows = tx.scan(Table.REPLICAS, chunk_key(first), chunk_key(last) + b"\xff" * 5)
        for chunk, group in groupby(rows, key=lambda item: parse_replica_key(item[0])[0]):
            servers = (parse_replica_key(key)[1] for key, value in group if Replica.unpack(value).good)
            yield chunk, sum(server in members and members[server].up for server in servers)

    # -- one file ------------------------------------------------------------------------------------------------

    async def file(self, ino: int) -> FileStatus:
        """The chunk map of a file; STALE_INODE if there is none."""
        inode, _ = self._committer.read(0, lambda tx: inodes.require(tx, ino))
        status = FileStatus(ino, inode.size, inode.mtime_ns, [])
        position = 0
        while position < inode.size:
            wanted = GetExtents(ino, position, inode.size - position)
            position, _ = self._committer.read(0, lambda tx, wanted=wanted: self._extents(tx, wanted, status))  # type: ignore[misc]
            await trio.lowlevel.checkpoint()
        return status

    def _extents(self, tx: Transaction, wanted: GetExtents, status: FileStatus) -> int:
        page = contents.get_extents(tx, wanted, self._members.rank)
        for extent in page.extents:
            row = chunks.find(tx, extent.chunk)
            state = ChunkState(row.state).name if row is not None else "MISSING"
            status.extents.append(
                ExtentStatus(
                    len(status.extents),
                    extent.file_offset,
                    extent.length,
                    f"{extent.chunk:016x}",
                    extent.chunk_offset,
                    state,
                    self._replicas(tx, extent.chunk),
                )
            )
        return page.end

    def _replicas(self, tx: Transaction, chunk: int) -> list[ReplicaStatus]:
        shown = []
        for server, replica in chunks.replicas(tx, chunk):
            member = self._members.by_id.get(server)
            if member is not None:
                row = member.row
                # Where chunkserver/chunkfile.py keeps it.
                path = f"{row.data_path}/chunks/{chunk & 0xFF:02x}/{chunk:016x}"
                state = ReplicaState(replica.state).name if member.up else member.state.name
                shown.append(ReplicaStatus(server, row.name, row.host, row.http_port, state, path))
        return shown


def _add(counts: ChunkHealth, row: Chunk, good: int) -> None:
    if row.state == ChunkState.FILLING:
        return
    if row.state == ChunkState.DEAD:
        counts.dead += 1
        return
    counts.total += 1
    counts.open += row.state == ChunkState.OPEN
    if good >= row.copies:
        counts.healthy += 1
    elif good:
        counts.too_few += 1
    else:
        counts.missing += 1

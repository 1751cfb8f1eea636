"""What `dfs status` and `dfs chunks` show: gathered in slices, so that looking does not stop the work."""

import msgspec
import structlog
import trio

from metaserver import chunks, contents, inodes
from metaserver.balancing import Balancer
from metaserver.census import Census
from metaserver.changes import Changes
from metaserver.cleaner import Cleaner
from metaserver.clock import LivedClock
from metaserver.commit import Committer
from metaserver.config import Config
from metaserver.members import Members
from metaserver.planning import Group
from metaserver.protocol import (
    ChunkHealth,
    ChunkState,
    CleanerStatus,
    ExtentStatus,
    FileStatus,
    GetExtents,
    RepairStatus,
    ReplicaState,
    ReplicaStatus,
    ServerStatus,
    SessionStatus,
    Status,
)
from metaserver.repair import Repair
from metaserver.schema import TaskKind, Transaction
from metaserver.service import Service
from metaserver.sessions import Sessions
from metaserver.tasks import Tasks
from metaserver.trashing import Trash

log = structlog.get_logger(__name__)

VERSION = "0.1.0"
# Three quarters of what a message may have.
TEXT_BYTES = 768 << 10
# Chunks counted between two turns of others: about 10 ms.
SLICE = 500
# A count is shown again for so long: `dfs up` asks for the status ten times a second.
FRESH_SECONDS = 1.0
# And for so many times as long as it took: a status page that is left open is not to be most of what is done.
FRESH_TIMES = 20


class StatusReader:
    """Reads what is shown. Counts of chunks are at most :data:`FRESH_SECONDS` old when asked for, or
    :data:`FRESH_TIMES` as old as they took where there are very many."""

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
        balancer: Balancer,
        trash: Trash,
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
        self._balancer = balancer
        self._trash = trash
        self._counting = trio.Lock()
        self._census = Census(members)
        self._fresh_until = float("-inf")

    async def text(self) -> bytes:
        """As JSON, for mounts: within what a message may have."""
        status = await self.status()
        encoded = msgspec.json.encode(status)
        if len(encoded) > TEXT_BYTES:
            encoded = msgspec.json.encode(msgspec.structs.replace(status, sessions=[]))
        return encoded

    async def status(self) -> Status:
        total, free = self._members.space(self._config.copies)
        census = await self._census_taken()
        recovery = self._committer.recovery
        return Status(
            self._cluster_id,
            self._committer.epoch,
            self._committer.newest,
            self._committer.durable,
            VERSION,
            self._config.copies,
            self._clock.seconds,
            self._service.resuming.window.open,
            self.servers(census),
            self.sessions(),
            census.health,
            self._changes.inodes,
            total,
            free,
            len(self._tasks),
            len(self._repair),
            self._changes.refusing,
            self._repair_status(census),
            self._balancer.status(),
            self._tasks.count(TaskKind.SET_COPIES),
            cleaner=self.cleaner(),
            metaserver_full=self._committer.is_full,
            unprotected=self._committer.unprotected,
            recovery_checked_seconds=-1.0 if recovery is None else trio.current_time() - recovery.checked_at,
            recovery_damage=[] if recovery is None else list(recovery.problems),
            snapshot_failure=self._committer.snapshot_failure,
            trash=self._trash.status(),
        )

    def cleaner(self) -> CleanerStatus:
        return self._cleaner.status()

    def servers(self, census: Census | None = None) -> list[ServerStatus]:
        """``census`` says what is left on servers that are being emptied."""
        leaving = census.leaving if census is not None else {}
        shown = self._servers()
        for server in shown:
            rest = leaving.get(server.server)
            if rest is not None:
                server.to_move, server.to_move_bytes = rest.replicas, rest.bytes
                server.to_move_open, server.to_move_stuck = rest.open, rest.stuck
        return shown

    def _servers(self) -> list[ServerStatus]:
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
                stored=member.stored,
                disk_error=member.disk_error,
                labels=member.row.labels,
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
        return (await self._census_taken()).health

    async def _census_taken(self) -> Census:
        async with self._counting:
            drains = {server for server, member in self._members.by_id.items() if member.row.draining}
            began = trio.current_time()
            if began >= self._fresh_until or drains != self._census.leaving.keys():
                census = Census(self._members)
                while not self._committer.read(0, lambda tx: census.count(tx, SLICE))[0]:
                    await trio.lowlevel.checkpoint()
                self._census = census
                now = trio.current_time()
                self._fresh_until = now + max(FRESH_SECONDS, FRESH_TIMES * (now - began))
            return self._census

    def _repair_status(self, census: Census) -> RepairStatus:
        repair, rate = self._repair, self._repair.copy_rate
        return msgspec.structs.replace(
            census.repair,
            under_way=repair.copies_under_way,
            bytes_per_second=rate,
            seconds_left=census.repair.bytes / rate if rate else 0.0,
            to_move=repair.waiting(Group.MOVES) + repair.waiting(Group.SHIFTS),
            to_delete=repair.waiting(Group.DELETIONS),
        )

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

"""What chunkservers say over HTTP, carried out: registration, full listing, heartbeats.

Long reports are taken in slices, between which others have their turn: a heartbeat never waits for the listing of
another server. What one server says is taken in one by one: it sends the next when it has given one up for being late,
and what is older must not come after what is newer.
"""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress

import structlog
import trio

from metaserver import reports
from metaserver.changes import Changes
from metaserver.clock import LivedClock
from metaserver.commit import Committer
from metaserver.config import Config
from metaserver.errors import DfsError, ErrorCode
from metaserver.members import Member, Members
from metaserver.protocol import Heartbeat, HeartbeatReply, Register, Registered, ReplicaReport, ReportPage
from metaserver.repair import Repair
from metaserver.resume import Window
from metaserver.schema import IdKind, Transaction
from metaserver.service import Service

log = structlog.get_logger(__name__)

# Replicas compared in one change: each reads two rows and writes at most two; about 5 ms.
SLICE = 200
_LAST_CHUNK = (1 << 64) - 1


class Control:
    """The chunkservers' side of the control plane."""

    def __init__(
        self,
        committer: Committer,
        config: Config,
        cluster_id: str,
        clock: LivedClock,
        members: Members,
        repair: Repair,
        changes: Changes,
        window: Window,
        service: Service,
    ) -> None:
        self._committer = committer
        self._config = config
        self._cluster_id = cluster_id
        self._clock = clock
        self._members = members
        self._repair = repair
        self._changes = changes
        self._window = window
        self._service = service
        self._turns: defaultdict[int, trio.Lock] = defaultdict(trio.Lock)

    async def register(self, told: Register) -> Registered:
        """Takes a (re)started server in; returns once that is durable."""
        async with self._turns[told.server]:
            return await self._register(told)

    async def _register(self, told: Register) -> Registered:
        self._members.check_register(told, self._cluster_id)
        if self._service.tasks.removing(told.server):
            raise DfsError(ErrorCode.BUSY, f"server {told.server} is being removed: try again in a moment")
        self._check_rollback(told)
        member = self._members.register(told, self._clock.seconds)
        self._repair.restarted(told.server)
        if member.unsaved and not self._changes.refusing:
            await self._committer.wait_durable(self._repair.keep(member))
        log.info("chunkserver registered", server=told.server, name=told.name, host=told.host, port=told.port)
        return Registered(self._cluster_id, self._committer.epoch, self._config.heartbeat_seconds)

    def _check_rollback(self, told: Register) -> None:
        """A server that has seen more than this metaserver knows proves that its data directory is an old one."""
        epoch, limit = self._committer.epoch, self._committer.id_limit(IdKind.CHUNK)
        if told.highest_epoch <= epoch and told.highest_chunk < limit:
            return
        if not self._changes.refusing:
            self._changes.refusing = (
                "this metaserver's data directory is older than its chunkservers': "
                "read-only until `metaserver recover --advance`"
            )
            log.critical(
                "rolled back: serving read-only, deleting nothing", server=told.server, epoch=epoch,
                seen_epoch=told.highest_epoch, chunk_limit=limit, seen_chunk=told.highest_chunk,
            )  # fmt: skip

    async def report(self, server: int, page: ReportPage) -> None:
        """One page of a full listing; pages come in order."""
        async with self._turns[server]:
            await self._report(server, page)

    async def _report(self, server: int, page: ReportPage) -> None:
        member = self._require(server, page.incarnation)
        if page.page != member.next_page or member.listed:
            raise DfsError(ErrorCode.INVALID, f"page {member.next_page} of the listing is expected, not {page.page}")
        numbers = [replica.chunk for replica in page.replicas]
        if any(a >= b for a, b in zip([member.listed_to, *numbers], numbers, strict=False)):
            raise DfsError(ErrorCode.INVALID, "a listing has to be sorted by chunk")
        member.next_page += 1
        for start in range(0, len(page.replicas), SLICE):
            await self._slice(member, page.replicas[start : start + SLICE])
        if page.last:
            await self._rest_missing(member)
            member.listed = True
            log.info("chunkserver listed", server=server, chunks=member.chunks)

    async def _slice(self, member: Member, replicas: Sequence[ReplicaReport]) -> None:
        up_to = replicas[-1].chunk
        numbers = [replica.chunk for replica in replicas]
        member.chunks += len(replicas)
        await self._missing(member, up_to, numbers)
        self._take(member, replicas)
        await trio.lowlevel.checkpoint()

    async def _rest_missing(self, member: Member) -> None:
        await self._missing(member, _LAST_CHUNK, ())

    async def _missing(self, member: Member, up_to: int, reported: Sequence[int]) -> None:
        """Chunks that should have been between the last one listed and ``up_to``."""
        after, member.listed_to = member.listed_to, up_to
        if after >= up_to:
            return
        gone, _ = self._committer.read(0, lambda tx: reports.missing_between(tx, member.server, after, up_to, reported))
        for start in range(0, len(gone), SLICE):
            self._take_missing(member, gone[start : start + SLICE])
            await trio.lowlevel.checkpoint()

    def _take(self, member: Member, replicas: Sequence[ReplicaReport]) -> None:
        if self._changes.refusing:
            return
        server = member.server

        def apply(tx: Transaction, now_ns: int) -> list[reports.Finding]:
            return [reports.apply_report(tx, server, replica) for replica in replicas]

        findings = self._committer.change(0, 0, apply, frees=True).message
        for replica, finding in zip(replicas, findings, strict=True):
            self._repair.found(member, replica, finding)

    def _take_missing(self, member: Member, gone: Sequence[int]) -> None:
        if self._changes.refusing:
            return

        def apply(tx: Transaction, now_ns: int) -> list[reports.Finding]:
            return [reports.apply_missing(tx, member.server, chunk) for chunk in gone]

        findings = self._committer.change(0, 0, apply, frees=True).message
        for chunk, finding in zip(gone, findings, strict=True):
            if finding is reports.Finding.LOST:
                log.warning("a replica is gone", chunk=f"{chunk:x}", server=member.server)
            if finding is not reports.Finding.FINE:
                self._repair.look_at(chunk)
            self._repair.strays.discard(chunk, member.server)

    async def heartbeat(self, server: int, told: Heartbeat) -> HeartbeatReply:
        """Notes that the server is there, and what has changed; answers with its orders."""
        member = self._members.require(server, told.incarnation)
        if member is not None:
            member.heard = self._clock.seconds  # however long it has to wait now
        async with self._turns[server]:
            return await self._heartbeat(server, told)

    async def _heartbeat(self, server: int, told: Heartbeat) -> HeartbeatReply:
        member = self._members.require(server, told.incarnation)
        epoch = self._committer.epoch
        if member is None or not member.listed:
            return HeartbeatReply(epoch, 0, True, [])
        was_up = member.up
        new = self._members.heartbeat(member, told, self._clock.seconds)
        self._service.space_told()
        if not was_up:
            log.info("chunkserver up", server=server, name=member.row.name)
            self._repair.survey(server)
            self._service.server_came_up()
        if self._members.read_back(member, self._clock.seconds):
            log.info("chunkserver has read everything back", server=server, name=member.row.name)
        if member.unsaved and not self._changes.refusing:
            with suppress(DfsError):  # no space: it is tried again with the next heartbeat
                self._repair.keep(member)
        taken = not new or await self._take_news(member, told)
        orders = [] if self._window.open or self._changes.refusing else self._repair.orders_for(server)
        limit = self._committer.id_limit(IdKind.CHUNK)
        return HeartbeatReply(epoch, told.number if taken else 0, False, orders, limit)

    async def _take_news(self, member: Member, told: Heartbeat) -> bool:
        """False if there is no space to take note of all of it: the server is there nevertheless, and says it again."""
        try:
            await self._news(member, told)
        except DfsError as error:
            if error.code is not ErrorCode.NO_SPACE:
                raise
            return False
        return True

    async def _news(self, member: Member, told: Heartbeat) -> None:
        # Results first: their orders are void after it, and a change that follows from one is not news any more.
        for result in told.results:
            self._repair.result(member.server, result)
        for start in range(0, len(told.changes), SLICE):
            self._take(member, told.changes[start : start + SLICE])
            await trio.lowlevel.checkpoint()
        for start in range(0, len(told.gone), SLICE):
            self._take_missing(member, told.gone[start : start + SLICE])
            await trio.lowlevel.checkpoint()

    def _require(self, server: int, incarnation: int) -> Member:
        member = self._members.require(server, incarnation)
        if member is None:
            raise DfsError(ErrorCode.STALE_SESSION, f"server {server} has to register first")
        return member

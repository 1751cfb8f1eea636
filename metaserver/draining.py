"""Emptying a chunkserver, and taking it out: what stands in the way, and what keeps it from ending.

That a server is being drained is in its row, so that it outlives a restart; what follows is planning's matter (nothing
is placed there, its replicas do not count). Writers of chunks on it are asked to go on elsewhere, again and again: one
who writes a little now and then would otherwise keep a chunk there for days.
"""

import msgspec
import structlog
import trio

from metaserver import chunks, removal
from metaserver.changes import Changes
from metaserver.clock import LivedClock
from metaserver.commit import Committer
from metaserver.errors import DfsError, ErrorCode
from metaserver.inodes import Effects, start_task
from metaserver.members import Member, Members
from metaserver.protocol import RETIRE, ChunkState, Planned, Retire, ServerState
from metaserver.repair import Repair
from metaserver.schema import Table, Task, TaskKind, Transaction, server_key
from metaserver.sessions import Sessions

log = structlog.get_logger(__name__)

# Chunks of a server looked at between two turns of others.
PAGE_CHUNKS = 200
# Writers are asked again so often.
ASK_SECONDS = 5.0


class _Load(msgspec.Struct):
    """What has to leave a server: chunks and bytes; ``lonely`` chunks want more copies than there are other servers."""

    chunks: int = 0
    bytes: int = 0
    lonely: int = 0
    most_copies: int = 0


class Draining:
    """The operator's side of servers' lives."""

    def __init__(
        self,
        committer: Committer,
        clock: LivedClock,
        members: Members,
        repair: Repair,
        changes: Changes,
        sessions: Sessions,
    ) -> None:
        self._committer = committer
        self._clock = clock
        self._members = members
        self._repair = repair
        self._changes = changes
        self._sessions = sessions
        self._asked = float("-inf")

    # -- draining ------------------------------------------------------------------------------------------------

    async def drain(self, text: str, *, force: bool) -> Planned:
        """Begins to empty a server, durably. NO_SPACE or UNAVAILABLE with what is in the way, unless ``force``."""
        member = self._members.find(text)
        if member.row.draining:
            return _planned(member, f"{member.row.name} is being emptied already")
        if not member.up:
            state = member.state.name
            raise DfsError(ErrorCode.UNAVAILABLE, f"{member.row.name} is {state}: only a server that is up can give")
        load = await self._load(member)
        if not force:
            self._check_room(member, load)
        await self._set(member.server, draining=True)
        return _planned(member, f"{member.row.name} is being emptied of {load.chunks} chunks")

    async def undrain(self, text: str) -> Planned:
        member = self._members.find(text)
        if not member.row.draining:
            return _planned(member, f"{member.row.name} is not being emptied")
        await self._set(member.server, draining=False)
        return _planned(member, f"{member.row.name} takes data again")

    async def _set(self, server: int, *, draining: bool) -> None:
        row = msgspec.structs.replace(self._members.by_id[server].row, draining=draining)
        change = self._committer.change(
            0, 0, lambda tx, _: tx.put(Table.SERVERS, server_key(server), row.pack()), frees=True
        )
        self._members.by_id[server].row = row
        log.info("draining" if draining else "not draining any more", server=server, name=row.name)
        await self._committer.wait_durable(change.number)
        self._repair.survey(server)
        self._asked = float("-inf")

    def _others(self, member: Member) -> list[Member]:
        """Who could take what leaves."""
        return [other for other in self._members.by_id.values() if other is not member and other.works]

    async def _load(self, member: Member) -> _Load:
        others = len(self._others(member))
        load = _Load()
        position = 0
        while True:
            found, _ = self._committer.read(0, lambda tx, at=position: self._page(tx, member.server, at))  # type: ignore[misc]
            for chunk, length, copies, elsewhere in found:
                position = chunk + 1
                load.chunks += 1
                load.bytes += length if elsewhere < copies else 0
                load.lonely += copies > others
                load.most_copies = max(load.most_copies, copies)
            if len(found) < PAGE_CHUNKS:
                return load
            await trio.lowlevel.checkpoint()

    def _page(self, tx: Transaction, server: int, position: int) -> list[tuple[int, int, int, int]]:
        """Chunk, length, copies wanted, good copies that stay where they are."""
        page = []
        for chunk in removal.page(tx, server, position, PAGE_CHUNKS):
            row = chunks.find(tx, chunk)
            if row is None or row.state == ChunkState.DEAD:
                page.append((chunk, 0, 0, 0))
                continue
            good = [other for other, replica in chunks.replicas(tx, chunk) if replica.good and other != server]
            staying = [other for other in good if other in self._members.by_id and self._members.by_id[other].works]
            page.append((chunk, row.length, row.copies, len(staying)))
        return page

    def _check_room(self, member: Member, load: _Load) -> None:
        others = self._others(member)
        name = member.row.name
        if load.chunks and (load.lonely or not others):
            raise DfsError(
                ErrorCode.UNAVAILABLE,
                f"{load.lonely or load.chunks} chunks on {name} want up to {load.most_copies} copies, and only "
                f"{len(others)} other servers can take them: add a server, or --force to move what can be moved",
            )
        room = self._members.room_on([other.server for other in others])
        if load.bytes > room:
            raise DfsError(
                ErrorCode.NO_SPACE,
                f"{load.bytes >> 20} MiB have to leave {name}, and the other servers have room for {room >> 20} MiB: "
                "add a server, or --force to move what can be moved",
            )

    def ask_writers(self) -> None:
        """Has mounts end the chunks that they write on servers being emptied; call about once a second."""
        draining = {server for server, member in self._members.by_id.items() if member.row.draining}
        if not draining or self._clock.seconds - self._asked < ASK_SECONDS:
            return
        self._asked = self._clock.seconds
        asked: dict[int, list[int]] = {}
        for chunk, found in self._members.open_chunks.items():
            if not draining.isdisjoint(found.servers):
                asked.setdefault(found.owner, []).append(chunk)
        for owner, its_chunks in asked.items():
            session = self._sessions.by_id.get(owner)
            if session is not None and session.connection is not None:
                session.connection.push(RETIRE, Retire(tuple(its_chunks)))

    # -- removing ------------------------------------------------------------------------------------------------

    async def remove(self, text: str, *, lose: bool) -> Planned:
        """Begins to forget a server that does not run, durably. What only it has is lost, and needs ``lose``."""
        member = self._members.find(text)
        name = member.row.name
        if member.up:
            first = "stop its service first" if member.row.draining else "drain it and stop its service first"
            raise DfsError(ErrorCode.BUSY, f"{name} is {member.shown_state.name}: {first}")
        count, lonely, files = await self._lonely(member.server)
        if count and member.state is not ServerState.LOST:
            text = f"{name} is {member.state.name} with {count} chunks: it may come back; wait until it is LOST"
            raise DfsError(ErrorCode.BUSY, text)
        if lonely and not lose:
            text = f"{name} has the only copy of {lonely} chunks with data of {files} files: bring it back"
            raise DfsError(ErrorCode.BUSY, f"{text}, or --lose-data to give them up")
        # It may have come back while its chunks were counted.
        if self._members.by_id.get(member.server) is not member or member.up:
            raise DfsError(ErrorCode.BUSY, f"{name} has come back")
        effects = Effects()
        task = Task(TaskKind.REMOVE_SERVER, member.server)
        change = self._committer.change(0, 0, lambda tx, _: start_task(tx, task, effects))
        self._changes.carry_out(effects)
        log.warning("removing a server", server=member.server, name=name, chunks=count, lost=lonely)
        await self._committer.wait_durable(change.number)
        lost = f"; the only copy of {lonely} chunks is lost" if lonely else ""
        return _planned(member, f"{name} is being removed with {count} chunks{lost}")

    async def _lonely(self, server: int) -> tuple[int, int, int]:
        """How many chunks the server has, how many of them nobody else has, and how many files are in those."""
        count = lonely = position = 0
        files: set[int] = set()
        while True:
            found, _ = self._committer.read(0, lambda tx, at=position: removal.page(tx, server, at, PAGE_CHUNKS))  # type: ignore[misc]
            alone, _ = self._committer.read(0, lambda tx, page=found: self._alone(tx, page, server))  # type: ignore[misc]
            count += len(found)
            lonely += len(alone)
            for chunk in alone:
                files |= self._committer.read(0, lambda tx, chunk=chunk: removal.files_in(tx, chunk))[0]  # type: ignore[misc]
            if len(found) < PAGE_CHUNKS:
                return count, lonely, len(files)
            position = found[-1] + 1
            await trio.lowlevel.checkpoint()

    def _alone(self, tx: Transaction, found: list[int], server: int) -> list[int]:
        return [chunk for chunk in found if removal.only_copy(tx, chunk, server, self._members)]


def _planned(member: Member, text: str) -> Planned:
    return Planned(member.server, member.row.name, text)

"""The chunkservers: who is there, how much room they have, and what is reserved on them. In memory, no I/O.

A server is known by its SERVERS row; its state follows from its heartbeats alone. Times are on the lived clock.
"""

import math
from collections.abc import Collection, Iterable
from random import Random

import msgspec

from metaserver import space
from metaserver.errors import DfsError, ErrorCode
from metaserver.placement import Candidate, choose
from metaserver.protocol import CHUNK_CAPACITY, Heartbeat, Register, ScrubStatus, ServerAddress, ServerState
from metaserver.schema import Server
from metaserver.wire import PROTOCOL_VERSION

# Heartbeats missed until a server is DOWN.
MISSED = 3
# Smaller is read from first; an unknown server comes last.
_RANK = {ServerState.UP: 0, ServerState.DRAINING: 0, ServerState.DOWN: 1, ServerState.LOST: 2}
_UNKNOWN_RANK = 3
# What a server says of its disk when it takes data ("": nothing yet), and when it does again once something is deleted.
_USABLE = ("", "OK")
_WORKING = (*_USABLE, "FULL")
DISK_FAILED = "FAILED"

# Legal moves; anything to UP is a heartbeat.
SERVER_MOVES: dict[ServerState, frozenset[ServerState]] = {
    ServerState.UP: frozenset({ServerState.DOWN}),
    ServerState.DOWN: frozenset({ServerState.UP, ServerState.LOST}),
    ServerState.LOST: frozenset({ServerState.UP}),
    ServerState.DRAINING: frozenset(),
}


class Member(msgspec.Struct, eq=False):
    """A chunkserver. ``listed``: its full listing has been taken in this epoch. ``unsealed``: chunks that are SEALED
    here and not there. ``next_page`` and ``listed_to`` are for a listing under way."""

    server: int
    row: Server
    heard: float
    incarnation: int = 0
    state: ServerState = ServerState.DOWN
    listed: bool = False
    next_page: int = 0
    listed_to: int = -1
    number: int = 0
    capacity: int = 0
    free: int = 0
    spare: int = 0
    reserved: int = 0
    chunks: int = 0
    # What its replicas take up; -1: it has not told.
    stored: int = -1
    disk_state: str = ""
    disk_error: str = ""
    read_bytes: int = 0
    written_bytes: int = 0
    unsealed: set[int] = set()
    # What was read back of it since it was LOST (``was_lost``).
    verified: set[int] = set()
    # Since when it is in sight: of the time before nobody knows what became of its disk.
    seen_since: float = 0.0
    scrub: ScrubStatus | None = None
    # Its row is not what is stored: there was no space for it, perhaps.
    unsaved: bool = False

    @property
    def usable(self) -> bool:
        """Whether its disk takes data."""
        return self.disk_state in _USABLE

    @property
    def was_lost(self) -> bool:
        """It was LOST, or removed although it has chunks: what it has was out of sight, and counts for deleting others
        only once read back."""
        return self.row.was_lost

    @property
    def shown_state(self) -> ServerState:
        return ServerState.DRAINING if self.state is ServerState.UP and self.row.draining else self.state

    @property
    def up(self) -> bool:
        return self.state is ServerState.UP

    @property
    def room(self) -> int:
        """Bytes free and not reserved."""
        return max(0, self.free - self.reserved)

    @property
    def occupied(self) -> int:
        """Bytes its replicas take up; what else is on the disk counts only if it does not tell them apart."""
        return self.stored if self.stored >= 0 else max(0, self.capacity - self.free)

    @property
    def fullness(self) -> float:
        """How much of the space that it has for replicas is taken, from 0 to 1."""
        space = self.occupied + self.free
        return self.occupied / space if space else 1.0

    @property
    def device(self) -> str:
        """Servers with the same share their space."""
        return self.row.device or f"server {self.server}"

    @property
    def works(self) -> bool:
        """Up, not being emptied, its disk in order: it takes data if it has room."""
        return self.shown_state is ServerState.UP and self.disk_state in _WORKING

    def candidate(self, room: int | None = None) -> Candidate:
        """``room``: what is left if others share the disk."""
        return Candidate(self.server, self.row.host, self.row.rack, self.room if room is None else room, self.device)

    def address(self) -> ServerAddress:
        return ServerAddress(self.server, self.row.host, self.row.port, self.row.rack, self.shown_state)


class OpenChunk(msgspec.Struct, eq=False):
    """A chunk being written: what is still reserved for it on each of ``servers`` is ``limit`` less ``length``."""

    owner: int
    servers: tuple[int, ...]
    length: int
    limit: int

    @property
    def reserved(self) -> int:
        return max(0, self.limit - self.length)


class Members:
    """All servers and the chunks being written on them.

    Invariant: a member's ``reserved`` is the sum of ``OpenChunk.reserved`` over the open chunks on it.
    """

    def __init__(self, heartbeat_seconds: float, lost_after_seconds: float, random: Random) -> None:
        self.by_id: dict[int, Member] = {}
        self.open_chunks: dict[int, OpenChunk] = {}
        self.owned: dict[int, set[int]] = {}
        # When a writer was last told that there is no space.
        self.refused_at = -math.inf
        self._down_after = MISSED * heartbeat_seconds
        self._lost_after = max(lost_after_seconds, self._down_after)
        self._random = random

    def load(self, server: int, row: Server, now: float) -> None:
        """A server known from an earlier life: DOWN until it is heard."""
        self.by_id[server] = Member(server, row, now, capacity=row.capacity)

    # -- registration and heartbeats -----------------------------------------------------------------------------

    def check_register(self, told: Register, cluster_id: str) -> None:
        """Raises unless this server may be a member."""
        if told.version != PROTOCOL_VERSION:
            text = f"this metaserver speaks protocol version {PROTOCOL_VERSION}, the chunkserver {told.version}"
            raise DfsError(ErrorCode.WRONG_VERSION, text)
        if told.cluster_id and told.cluster_id != cluster_id:
            raise DfsError(ErrorCode.WRONG_CLUSTER, f"this is cluster {cluster_id}, the disk is of {told.cluster_id}")
        if not 0 < told.server < 1 << 32 or not 0 < told.port < 1 << 16 or not told.host:
            raise DfsError(ErrorCode.INVALID, "a server needs a number from 1 on, a host and a port")
        self._check_name(told)
        other = self.by_id.get(told.server)
        if other is None or not other.up or other.incarnation == told.incarnation:
            return
        if (other.row.host, other.row.data_path) != (told.host, told.data_path):
            where = f"{other.row.host}:{other.row.data_path}"
            raise DfsError(ErrorCode.BUSY, f"server {told.server} is running already, with {where}")

    def _check_name(self, told: Register) -> None:
        for other in self.by_id.values():
            if other.up and other.server != told.server and other.row.name == told.name:
                where = f"server {other.server}, {other.row.host}:{other.row.data_path}"
                raise DfsError(ErrorCode.BUSY, f"the name {told.name} is taken ({where}): give this server another")

    def register(self, told: Register, now: float) -> Member:
        """Takes a (re)started server in; it is UP when its listing is complete and a heartbeat has come."""
        known = self.by_id.get(told.server)
        draining = known is not None and known.row.draining
        row = Server(
            told.name, told.host, told.port, told.http_port, told.rack, told.labels, told.data_path, told.capacity,
            draining, told.device,
        )  # fmt: skip
        member = Member(
            told.server, row, now, incarnation=told.incarnation, capacity=told.capacity, free=told.free, seen_since=now
        )
        if known is not None:
            member.state, member.reserved, member.unsealed = known.state, known.reserved, known.unsealed
            row.was_lost = known.row.was_lost
            # Until it has reported it is not known what it still has.
            if member.state is ServerState.UP:
                self._move(member, ServerState.DOWN)
        else:
            # The chunks being written may outlive a server that was removed, and comes back.
            open_there = (chunk for chunk in self.open_chunks.values() if told.server in chunk.servers)
            member.reserved = sum(chunk.reserved for chunk in open_there)
            row.was_lost = told.highest_chunk > 0
        member.unsaved = known is None or known.unsaved or known.row != row
        self.by_id[told.server] = member
        return member

    def remove(self, server: int) -> None:
        """The server is no member any more."""
        self.by_id.pop(server, None)

    def find(self, text: str) -> Member:
        """By number, or by a name that only one has; raises NOT_FOUND, or INVALID if several have it."""
        named = [member for member in self.by_id.values() if member.row.name == text]
        if len(named) > 1:
            numbers = ", ".join(f"{member.server} ({member.shown_state.name})" for member in named)
            raise DfsError(ErrorCode.INVALID, f"several servers are named {text}, give the number of one: {numbers}")
        if named:
            return named[0]
        if text.isdecimal() and int(text) in self.by_id:
            return self.by_id[int(text)]
        raise DfsError(ErrorCode.NOT_FOUND, f"no server has the name or number {text}")

    def require(self, server: int, incarnation: int) -> Member | None:
        """The member in this life of its process; None: it must register (again)."""
        member = self.by_id.get(server)
        return member if member is not None and member.incarnation == incarnation and incarnation else None

    def heartbeat(self, member: Member, told: Heartbeat, now: float) -> bool:
        """Notes what a heartbeat says about the server itself; whether its changes and results are new."""
        member.heard = now
        member.scrub = told.scrub
        member.capacity, member.free, member.spare, member.chunks = told.capacity, told.free, told.spare, told.chunks
        member.stored, member.disk_state, member.disk_error = told.stored, told.disk_state, told.disk_error
        member.read_bytes, member.written_bytes = told.read_bytes, told.written_bytes
        if member.listed and member.state is not ServerState.UP:
            if member.state is ServerState.LOST:
                member.seen_since = now
            self._move(member, ServerState.UP)
        new = told.number > member.number
        member.number = max(member.number, told.number)
        return new

    def age(self, now: float) -> list[Member]:
        """Moves silent servers on to DOWN and LOST; returns those whose state has changed."""
        changed = []
        for member in self.by_id.values():
            silent = now - member.heard
            if member.state is ServerState.UP and silent > self._down_after:
                self._move(member, ServerState.DOWN)
                changed.append(member)
            if member.state is ServerState.DOWN and silent > self._lost_after:
                self._move(member, ServerState.LOST)
                self._set_lost(member, was_lost=True)
                changed.append(member)
        return changed

    def read_back(self, member: Member, now: float) -> bool:
        """Whether a server that was LOST has just said that it has read back everything since it returned."""
        scrub = member.scrub
        if not member.row.was_lost or not member.up or scrub is None or not scrub.last_pass_seconds:
            return False
        if now - (scrub.since_pass_seconds + scrub.last_pass_seconds) < member.seen_since:
            return False
        self._set_lost(member, was_lost=False)
        return True

    def _set_lost(self, member: Member, *, was_lost: bool) -> None:
        # Another row: whoever writes it compares it with what was written.
        member.row = msgspec.structs.replace(member.row, was_lost=was_lost)
        member.unsaved = True
        member.verified.clear()

    def _move(self, member: Member, state: ServerState) -> None:
        if state not in SERVER_MOVES[member.state]:
            raise DfsError(ErrorCode.INTERNAL, f"a server cannot go from {member.state.name} to {state.name}")
        member.state = state

    # -- for placing and reading ---------------------------------------------------------------------------------

    def rank(self, server: int) -> int:
        member = self.by_id.get(server)
        return _UNKNOWN_RANK if member is None else _RANK[member.state]

    def addresses(self, servers: Iterable[int]) -> tuple[ServerAddress, ...]:
        return tuple(self.by_id[server].address() for server in servers if server in self.by_id)

    def candidates(self, *, makes_room: bool = False) -> list[Candidate]:
        """Servers that take new data; with ``makes_room`` what leads to space being freed, and has the spare for it."""
        rooms = self._rooms(makes_room=makes_room)
        return [
            member.candidate(rooms[member.device] + (member.spare if makes_room else 0))
            for member in self.by_id.values()
            if member.works and (member.usable or makes_room)
        ]

    def place_new(
        self,
        copies: int,
        least: int,
        host: str,
        avoid: Iterable[int],
        never: Iterable[int] = (),
        needed: int = 0,
    ) -> list[int]:
        """Servers for a new chunk that takes at least ``needed`` bytes (0: a whole one); ``avoid`` and ``never`` as in
        ``protocol.Allocate``. UNAVAILABLE if too few are up; NO_SPACE if too many are full: fewer copies are for when
        servers are away or do not answer, not for when they are full."""
        mute, shunned = frozenset(never), frozenset(avoid)
        names = host.split()
        own = next((member.row.host for member in self.by_id.values() if member.row.host in names), "")
        working = [member.server for member in self.by_id.values() if member.works]
        if len(working) < least:
            raise DfsError(ErrorCode.UNAVAILABLE, f"{len(working)} chunkservers are up, {least} are needed")
        candidates, size = self.candidates(), space.footprint(needed) if needed else CHUNK_CAPACITY
        others = [candidate for candidate in candidates if candidate.server not in mute]
        chosen = choose(others, copies, self._random, writer_host=own, avoid=shunned, needed=size)
        if len(chosen) < least and mute:
            chosen = choose(candidates, copies, self._random, writer_host=own, avoid=shunned | mute, needed=size)
        answering = sum(server not in mute for server in working)
        if len(chosen) < max(least, min(copies, answering)):
            raise DfsError(ErrorCode.NO_SPACE, "no chunkserver has room for another chunk")
        return chosen

    def limit(self, servers: Iterable[int], needed: int) -> int:
        """How many bytes a new chunk on these may take, at least ``needed`` (0: a whole chunk's)."""
        rooms = self._rooms()
        devices = [self.by_id[server].device for server in servers if server in self.by_id]
        room = min((rooms[device] // devices.count(device) for device in devices), default=0)
        return space.chunk_limit(room, needed)

    def place_copy(
        self,
        beside: Iterable[int],
        needed: int,
        avoid: Collection[int] = (),
        without: Collection[int] = (),
        *,
        makes_room: bool = False,
    ) -> int:
        """A server for one more replica of a chunk that has some; 0: none. ``avoid`` only if there is no other,
        ``without`` never; ``makes_room`` as in :meth:`candidates`."""
        others = [self.by_id[server].candidate() for server in beside if server in self.by_id]
        candidates = [one for one in self.candidates(makes_room=makes_room) if one.server not in without]
        chosen = choose(candidates, 1, self._random, beside=others, needed=space.footprint(needed), avoid=avoid)
        return chosen[0] if chosen else 0

    # -- space ---------------------------------------------------------------------------------------------------

    def _rooms(self, *, makes_room: bool = False) -> dict[str, int]:
        """Bytes free and not reserved on each filesystem; servers that are down told it some time ago, if. What is kept
        for the cleaner counts only for what makes room."""
        devices: dict[str, list[Member]] = {}
        for member in self.by_id.values():
            devices.setdefault(member.device, []).append(member)
        return {device: _shared_room(sharing, makes_room=makes_room) for device, sharing in devices.items()}

    def space(self, copies: int) -> tuple[int, int]:
        """Total and free bytes that can be stored at so many copies on different servers: in all that is not LOST, and
        now, on what takes data. A filesystem that servers share counts once."""
        rooms = self._rooms()
        total: dict[str, list[int]] = {}
        free: dict[str, list[int]] = {}
        for member in self.by_id.values():
            if member.state is not ServerState.LOST:
                total.setdefault(member.device, []).append(member.capacity)
            if member.works:
                free.setdefault(member.device, []).append(rooms[member.device])
        return (
            space.placeable((space.Volume(max(sizes), len(sizes)) for sizes in total.values()), copies),
            space.placeable((space.Volume(sizes[0], len(sizes)) for sizes in free.values()), copies),
        )

    def working_space(self, copies: int) -> tuple[int, int]:
        """As :meth:`space`, but of the servers alone that take data now: how full the others are is not known."""
        rooms = self._rooms()
        devices: dict[str, list[int]] = {}
        for member in self.by_id.values():
            if member.works:
                devices.setdefault(member.device, []).append(member.capacity)
        return (
            space.placeable((space.Volume(max(sizes), len(sizes)) for sizes in devices.values()), copies),
            space.placeable((space.Volume(rooms[device], len(sizes)) for device, sizes in devices.items()), copies),
        )

    def room_on(self, servers: Iterable[int]) -> int:
        """Bytes free and not reserved on these together."""
        rooms = self._rooms()
        return sum(rooms[device] for device in {self.by_id[server].device for server in servers})

    def is_short(self, copies: int) -> bool:
        """Whether what is not needed should be given back at once."""
        return space.is_short(*self.space(copies))

    def is_pressing(self, server: int, now: float) -> bool:
        """Whether space on this server stands in a writer's way: it is needed now, not in ten minutes."""
        if now - self.refused_at < space.PRESSING_SECONDS:
            return True
        member = self.by_id.get(server)
        return member is not None and member.room < space.PRESSING_CHUNKS * CHUNK_CAPACITY

    # -- reservations --------------------------------------------------------------------------------------------

    def opened(
        self, chunk: int, owner: int, servers: Iterable[int], length: int = 0, limit: int = CHUNK_CAPACITY
    ) -> None:
        """A chunk is being written; may be said again with other servers."""
        self.closed(chunk)
        self.open_chunks[chunk] = found = OpenChunk(owner, tuple(servers), length, limit)
        self.owned.setdefault(owner, set()).add(chunk)
        self._reserve(found.servers, found.reserved)

    def progressed(self, chunk: int, length: int) -> None:
        found = self.open_chunks.get(chunk)
        if found is not None and length > found.length:
            before, grown = found.reserved, length - found.length
            found.length = length
            self._reserve(found.servers, found.reserved - before)
            for server in found.servers:
                member = self.by_id.get(server)
                if member is not None:
                    # What its last heartbeat said does not count these bytes yet.
                    member.free = max(0, member.free - grown)

    def closed(self, chunk: int) -> tuple[int, ...]:
        """The chunk is no longer written; returns the servers it was written on."""
        found = self.open_chunks.pop(chunk, None)
        if found is None:
            return ()
        self._reserve(found.servers, -found.reserved)
        mine = self.owned[found.owner]
        mine.discard(chunk)
        if not mine:
            del self.owned[found.owner]
        return found.servers

    def _reserve(self, servers: Iterable[int], change: int) -> None:
        for server in servers:
            member = self.by_id.get(server)
            if member is not None:
                member.reserved += change


def _shared_room(sharing: list[Member], *, makes_room: bool) -> int:
    """Of the filesystem of these servers."""
    kept = 0 if makes_room else space.cleaning_room(max(member.capacity for member in sharing))
    free = min([member.free for member in sharing if member.up] or [member.free for member in sharing])
    return max(0, free - kept - sum(member.reserved for member in sharing))

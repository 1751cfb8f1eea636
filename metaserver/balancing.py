"""Moving replicas from the fullest servers to the emptiest.

The decisions are pure (:class:`Load`, :func:`pairs`, :func:`improves`): a replica goes from one server to another only
if the first is not emptier than the second afterwards. Each move therefore brings the two closer together, none is ever
undone, and it ends. It begins by itself when servers differ by more than a threshold and goes on until they differ by
much less, so that a cluster that is written to does not begin and end all the time.
"""

from collections.abc import Iterable
from enum import Enum
from itertools import islice
from typing import NamedTuple

import msgspec
import structlog

from metaserver import chunks
from metaserver.clock import LivedClock
from metaserver.commit import Committer
from metaserver.config import Config
from metaserver.members import Member, Members
from metaserver.planning import Hints, plan, plan_shift
from metaserver.protocol import ChunkState, RebalanceStatus
from metaserver.repair import Repair
from metaserver.schema import Chunk, Table, Transaction, by_server_key, chunk_key, parse_by_server_key, read_u64

log = structlog.get_logger(__name__)

# It is even enough when the fullest and the emptiest differ by so much of the mean.
TOLERANCE = 0.05
# Chunks on their way at a time, and looked at in one round to find more.
MOVES_AT_A_TIME = 32
LOOK_CHUNKS = 200
PAGE_CHUNKS = 64
# Added up in one round: about 20 ms.
COUNT_CHUNKS = 1000
# A move that has not come about by then is given up.
PATIENCE_SECONDS = 900.0
# If nothing that fits is found for so long, it has ended; and does not begin by itself again before so long.
FRUITLESS_SECONDS = 60.0
REST_SECONDS = 600.0


class Load(NamedTuple):
    """Bytes that replicas take up on a server when what is under way is done, of those that they could."""

    server: int
    stored: int
    space: int

    @property
    def fullness(self) -> float:
        return self.stored / self.space if self.space > 0 else 1.0


def unevenness(loads: Iterable[Load]) -> float:
    """By how much of its space the fullest is fuller than the emptiest."""
    levels = [load.fullness for load in loads]
    return max(levels, default=0.0) - min(levels, default=0.0)


def is_even(loads: list[Load]) -> bool:
    mean = sum(load.stored for load in loads) / max(1, sum(load.space for load in loads))
    return unevenness(loads) <= TOLERANCE * mean


def pairs(loads: list[Load]) -> list[tuple[Load, Load]]:
    """Who might give to whom, the most uneven first."""
    found = [(giving, taking) for giving in loads for taking in loads if giving.fullness > taking.fullness]
    return sorted(found, key=lambda pair: pair[1].fullness - pair[0].fullness)


def improves(giving: Load, taking: Load, length: int) -> bool:
    """Whether moving so many bytes leaves the giver no emptier than the taker."""
    return (giving.stored - length) * taking.space >= (taking.stored + length) * giving.space


class Mode(Enum):
    IDLE = "IDLE"
    BY_ITSELF = "BY_ITSELF"
    ASKED = "ASKED"
    STOPPED = "STOPPED"


class _Move(NamedTuple):
    giving: int
    taking: int
    length: int
    since: float


class _Pass(msgspec.Struct):
    """How far the giver's chunks have been looked through for one taker. ``again``: some fit, or were busy with other
    orders. ``hopeless``: none of all fits."""

    position: int = 0
    again: bool = False
    hopeless: bool = False


class Balancer:
    """Chooses what :class:`Repair` then shifts. In memory: after a restart it begins anew if there is reason to.

    What servers say of their space is seconds old and changes with every copy and deletion under way; deciding by it
    would move data to and fro. So a run begins with adding up the rows (``_stored``, complete once ``_counted`` is
    None), and from then on reckons with what it does itself.
    """

    def __init__(
        self, committer: Committer, config: Config, clock: LivedClock, members: Members, repair: Repair
    ) -> None:
        self._committer = committer
        self._config = config
        self._clock = clock
        self._members = members
        self._repair = repair
        self._stored: dict[int, int] = {}
        self._counted: int | None = None
        self._under_way: dict[int, _Move] = {}
        self._passes: dict[tuple[int, int], _Pass] = {}
        self._moved_chunks = 0
        self._moved_bytes = 0
        self._busy_at = 0.0
        self._rests_until = 0.0
        self.mode = Mode.IDLE

    # -- from outside --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Goes on until all is even, at the rate of copies."""
        self._begin(Mode.ASKED)

    def stop(self) -> None:
        """What is under way is finished; nothing more begins, not by itself either, until it is asked for."""
        self.mode = Mode.STOPPED
        self._repair.orders.hurried = False

    def status(self) -> RebalanceStatus:
        loads = self.told() if self._counted is not None else self.loads()
        mean = sum(load.stored for load in loads) / max(1, sum(load.space for load in loads))
        excess = sum(max(0.0, load.stored - mean * load.space) for load in loads)
        return RebalanceStatus(
            self.mode.value,
            unevenness(loads),
            len(self._under_way),
            self._moved_chunks,
            self._moved_bytes,
            int(excess),
        )

    # -- rounds --------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """One bounded round; call about once a second."""
        self._see_what_is_done()
        threshold, now = self._config.rebalance_threshold, self._clock.seconds
        uneven = threshold and unevenness(self.told()) > threshold
        if self.mode is Mode.IDLE and uneven and now >= self._rests_until:
            self._begin(Mode.BY_ITSELF)
        if not self.active or self._repair.mending:
            return
        if self._stored.keys() != {load.server for load in self.told()} and not self._under_way:
            self._recount()
        if self._counted is not None:
            self._go_on_counting()
            return
        more = self._choose()
        if not self._under_way and (not more or now - self._busy_at > FRUITLESS_SECONDS):
            self._end()

    @property
    def active(self) -> bool:
        return self.mode in (Mode.BY_ITSELF, Mode.ASKED)

    def _begin(self, mode: Mode) -> None:
        log.info("rebalancing", mode=mode.value, unevenness=round(unevenness(self.told()), 3))
        if not self.active:
            self._recount()
            self._moved_chunks = self._moved_bytes = 0
        self.mode = mode
        self._repair.orders.hurried = mode is Mode.ASKED

    def _end(self) -> None:
        log.info("rebalanced", chunks=self._moved_chunks, unevenness=round(unevenness(self.loads()), 3))
        self.mode = Mode.IDLE
        self._rests_until = self._clock.seconds + REST_SECONDS
        self._repair.orders.hurried = False

    def _recount(self) -> None:
        self._stored = dict.fromkeys((load.server for load in self.told()), 0)
        self._counted = 0
        self._passes.clear()
        self._busy_at = self._clock.seconds

    def _go_on_counting(self) -> None:
        position = self._counted or 0
        found, _ = self._committer.read(0, lambda tx: _copies_page(tx, position))
        for chunk, length, servers in found:
            self._counted = chunk + 1
            self._add(servers, length)
        if len(found) < COUNT_CHUNKS:
            self._counted = None

    def _add(self, servers: Iterable[int], length: int) -> None:
        for server in servers:
            if server in self._stored:
                self._stored[server] += length

    def told(self) -> list[Load]:
        """Of all servers that take part, by their heartbeats."""
        return [_load(member, member.occupied) for member in self._members.by_id.values() if member.works]

    def loads(self) -> list[Load]:
        """The same, as it will be when what is under way is done."""
        if not self.active:
            return self.told()
        members = self._members.by_id
        known = (server for server in self._stored if server in members)
        return [_load(members[server], self._stored[server]) for server in known]

    def _see_what_is_done(self) -> None:
        for chunk, move in list(self._under_way.items()):
            patient = self._clock.seconds - move.since < PATIENCE_SECONDS
            if self._repair.shifting(chunk) and patient:
                continue
            self._repair.leave(chunk)
            del self._under_way[chunk]
            there, _ = self._committer.read(0, lambda tx, chunk=chunk: {s for s, _ in chunks.replicas(tx, chunk)})  # type: ignore[misc]
            if move.taking in there and move.giving not in there:
                self._moved_chunks += 1
                self._moved_bytes += move.length
                self._passes.clear()
            else:
                self._add([move.giving], move.length)
                self._add([move.taking], -move.length)

    def _choose(self) -> bool:
        """Begins moves; whether there may be more to begin."""
        left, loads = LOOK_CHUNKS, self.loads()
        while left > 0 and len(self._under_way) < MOVES_AT_A_TIME and not is_even(loads):
            pair = next((pair for pair in pairs(loads) if not self._pass(*pair).hopeless), None)
            if pair is None:
                return False
            left -= self._move_between(*pair)
            loads = self.loads()
        return not is_even(loads)

    def _pass(self, giving: Load, taking: Load) -> "_Pass":
        return self._passes.setdefault((giving.server, taking.server), _Pass())

    def _move_between(self, giving: Load, taking: Load) -> int:
        """Begins one move if some of the giver's next chunks fits; how many were looked at."""
        through = self._pass(giving, taking)
        found, _ = self._committer.read(0, lambda tx: _page(tx, giving.server, through.position))
        for count, chunk in enumerate(found, 1):
            through.position = chunk + 1
            length = self._fits(chunk, giving, taking)
            through.again |= length is None or length > 0
            if length:
                self._busy_at = self._clock.seconds
                self._under_way[chunk] = _Move(giving.server, taking.server, length, self._clock.seconds)
                self._add([giving.server], -length)
                self._add([taking.server], length)
                self._repair.shift(chunk, giving.server, taking.server)
                return count
        if len(found) < PAGE_CHUNKS:
            through.hopeless = not through.again
            through.position, through.again = 0, False
        return max(1, len(found))

    def _fits(self, chunk: int, giving: Load, taking: Load) -> int | None:
        """The length of a chunk that may go this way now; 0: it may not; None: something else is done with it first."""
        if chunk in self._under_way or chunk in self._repair.orders:
            return None
        (row, replicas), _ = self._committer.read(0, lambda tx: (chunks.find(tx, chunk), chunks.replicas(tx, chunk)))
        if row is None or row.state != ChunkState.SEALED or not improves(giving, taking, row.length):
            return 0
        if plan(chunk, row, replicas, self._members, Hints()) is not None:
            return None
        step = plan_shift(chunk, row, replicas, self._members, giving.server, taking.server)
        return row.length if step is not None else 0


def _page(tx: Transaction, server: int, position: int) -> list[int]:
    rows = tx.scan(Table.BY_SERVER, by_server_key(server, position), by_server_key(server + 1, 0))
    return [parse_by_server_key(key)[1] for key, _ in islice(rows, PAGE_CHUNKS)]


def _copies_page(tx: Transaction, position: int) -> list[tuple[int, int, list[int]]]:
    """Some chunks with their lengths and the servers of their good replicas."""
    page = []
    for key, value in islice(tx.scan(Table.CHUNKS, chunk_key(position), b"\xff" * 9), COUNT_CHUNKS):
        chunk = read_u64(key)
        servers = [server for server, replica in chunks.replicas(tx, chunk) if replica.good]
        page.append((chunk, Chunk.unpack(value).length, servers))
    return page


def _load(member: Member, stored: int) -> Load:
    return Load(member.server, stored, member.occupied + member.free)

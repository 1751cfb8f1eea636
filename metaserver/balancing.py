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
from metaserver.planning import Group, plan_shift
from metaserver.protocol import ChunkState, RebalanceStatus
from metaserver.repair import Repair
from metaserver.schema import Table, Transaction, by_server_key, parse_by_server_key

log = structlog.get_logger(__name__)

# It is even enough when the fullest and the emptiest differ by so much of the mean.
TOLERANCE = 0.05
# Chunks on their way at a time, and looked at in one round to find more.
MOVES_AT_A_TIME = 32
LOOK_CHUNKS = 200
PAGE_CHUNKS = 64
# What a server says of its space is up to so old: until then moves that are done are still reckoned with.
SETTLE_SECONDS = 5.0
# A move that has not come about by then is given up.
PATIENCE_SECONDS = 900.0


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
    """How far the giver's chunks have been looked through for one taker. ``hopeless``: none of them fits."""

    position: int = 0
    fruitful: bool = False
    hopeless: bool = False


class Balancer:
    """Chooses what :class:`Repair` then shifts. In memory: after a restart it begins anew if there is reason to.

    ``_under_way`` are moves begun and not seen to be done, ``_settling`` those done that heartbeats may not show yet.
    """

    def __init__(
        self, committer: Committer, config: Config, clock: LivedClock, members: Members, repair: Repair
    ) -> None:
        self._committer = committer
        self._config = config
        self._clock = clock
        self._members = members
        self._repair = repair
        self._under_way: dict[int, _Move] = {}
        self._settling: list[tuple[float, _Move]] = []
        self._passes: dict[tuple[int, int], _Pass] = {}
        self._moved_chunks = 0
        self._moved_bytes = 0
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
        loads = self.loads()
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
        loads = self.loads()
        threshold = self._config.rebalance_threshold
        if self.mode is Mode.IDLE and threshold and unevenness(loads) > threshold:
            self._begin(Mode.BY_ITSELF)
        if self.mode not in (Mode.BY_ITSELF, Mode.ASKED) or self._repair.waiting(Group.COPIES):
            return
        if not self._choose(loads) and not self._under_way:
            self._end(loads)

    def _begin(self, mode: Mode) -> None:
        log.info("rebalancing", mode=mode.value, unevenness=round(unevenness(self.loads()), 3))
        self.mode = mode
        self._repair.orders.hurried = mode is Mode.ASKED
        self._passes.clear()
        self._moved_chunks = self._moved_bytes = 0

    def _end(self, loads: list[Load]) -> None:
        log.info("rebalanced", chunks=self._moved_chunks, unevenness=round(unevenness(loads), 3))
        self.mode = Mode.IDLE
        self._repair.orders.hurried = False

    def loads(self) -> list[Load]:
        """Of all servers that take part, as they will be when what is under way is done."""
        change: dict[int, int] = {}
        for move in (*self._under_way.values(), *(move for _, move in self._settling)):
            change[move.giving] = change.get(move.giving, 0) - move.length
            change[move.taking] = change.get(move.taking, 0) + move.length
        taking_part = [member for member in self._members.by_id.values() if member.works]
        return [_load(member, change.get(member.server, 0)) for member in taking_part]

    def _see_what_is_done(self) -> None:
        now = self._clock.seconds
        self._settling = [(at, move) for at, move in self._settling if now - at < SETTLE_SECONDS]
        for chunk, move in list(self._under_way.items()):
            state, _ = self._committer.read(0, lambda tx, chunk=chunk, move=move: _state_of(tx, chunk, move))  # type: ignore[misc]
            if state is None and self._repair.shifting(chunk):
                state = False
            if state is False and now - move.since < PATIENCE_SECONDS:
                continue
            del self._under_way[chunk]
            self._settling.append((now, move))
            if state:
                self._moved_chunks += 1
                self._moved_bytes += move.length
                self._passes.clear()

    def _choose(self, loads: list[Load]) -> bool:
        """Begins moves; whether there may be more to begin."""
        left = LOOK_CHUNKS
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
            if length:
                through.fruitful = True
                self._under_way[chunk] = _Move(giving.server, taking.server, length, self._clock.seconds)
                self._repair.shift(chunk, giving.server, taking.server)
                return count
        if len(found) < PAGE_CHUNKS:
            through.hopeless = not through.fruitful
            through.position, through.fruitful = 0, False
        return max(1, len(found))

    def _fits(self, chunk: int, giving: Load, taking: Load) -> int:
        """The length of a chunk that may go this way now; 0: it may not."""
        if chunk in self._under_way or chunk in self._repair.orders:
            return 0
        (row, replicas), _ = self._committer.read(0, lambda tx: (chunks.find(tx, chunk), chunks.replicas(tx, chunk)))
        if row is None or row.state != ChunkState.SEALED or not improves(giving, taking, row.length):
            return 0
        step = plan_shift(chunk, row, replicas, self._members, giving.server, taking.server)
        return row.length if step is not None else 0


def _page(tx: Transaction, server: int, position: int) -> list[int]:
    rows = tx.scan(Table.BY_SERVER, by_server_key(server, position), by_server_key(server + 1, 0))
    return [parse_by_server_key(key)[1] for key, _ in islice(rows, PAGE_CHUNKS)]


def _state_of(tx: Transaction, chunk: int, move: _Move) -> bool | None:
    """Whether the move is done; None if the taker has no replica (yet, or any more)."""
    row, replicas = chunks.find(tx, chunk), chunks.replicas(tx, chunk)
    if row is None or not any(server == move.taking for server, _ in replicas):
        return None
    return len(replicas) <= row.copies


def _load(member: Member, change: int) -> Load:
    return Load(member.server, member.occupied + change, member.occupied + member.free)

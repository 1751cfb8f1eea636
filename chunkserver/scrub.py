"""The scrubber: reads every sealed replica back from the disk, again and again, so that rot is found while there are
still other copies.

A *pass* goes through all replicas in order of their chunks, new ones included. Its rate follows from what is left to
read and from the time that is left for it; while others read or write much, it is a quarter of that. The position is
saved now and then, so that a restart goes on where it was. A pass that somebody asks for starts at once, reads half of
the time, and begins with the first chunk.
"""

import math
from collections import deque
from dataclasses import dataclass

import msgspec
import structlog
import trio

from chunkserver import checked
from chunkserver.chunkfile import ENTRY_BYTES, HEADER_BYTES
from chunkserver.protocol import ScrubReport
from chunkserver.replica import Replica, ReplicaState
from chunkserver.store import Store
from chunkserver.verify import Verification
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import ScrubStatus

log = structlog.get_logger(__name__)

FILE = "scrub.json"
FORMAT = 1
# Of the time for a pass: the rest is for hours in which the server was down or busy.
USED_SHARE = 0.9
# Slower than this is of no use: a disk does a hundred times as much.
LEAST_RATE = 256 << 10
# Others count as busy from here on, and scrubbing then has this share of its rate.
BUSY_BYTES_PER_SECOND = 8 << 20
BUSY_SHARE = 0.25
# With little data a pass would take seconds: the next begins not sooner than this after the last began.
LEAST_PASS_SECONDS = 3600.0
# Without anything to read there is no pass: so soon it is looked again.
EMPTY_SECONDS = 60.0
# A start has better things to do.
FIRST_SECONDS = 10.0
SAVE_SECONDS = 60.0
# What "of late" means for the rate that is shown.
RECENT_SECONDS = 30.0
# Replicas looked up at a time.
PAGE = 64
# Damaged replicas that are named in a report.
NAMED = 100
_NS = 10**9


@dataclass(frozen=True)
class ScrubOptions:
    """``days`` for one pass, 0: only when asked for. Never faster than ``most_bytes_per_second``, even if it takes
    longer."""

    days: float = 7.0
    most_bytes_per_second: float = 32 << 20


class Saved(msgspec.Struct, forbid_unknown_fields=True):
    """What is kept across restarts. ``position``: the last chunk that was read in this pass. Times in ns since 1970,
    0: never; ``last_seconds`` is how long the last complete pass took."""

    format: int
    position: int
    done_bytes: int
    began_ns: int
    last_ended_ns: int = 0
    last_seconds: float = 0.0
    # Replicas of this pass that could not be read for a reason that is not theirs.
    skipped: int = 0


def cost(replica: Replica) -> int:
    """Bytes that reading a replica back takes."""
    written = replica.written
    return HEADER_BYTES + written.entries * ENTRY_BYTES + written.stored_length


def rate(left_bytes: int, left_seconds: float, most: float) -> float:
    """Bytes a second that bring a pass to its end in time, as far as ``most`` allows."""
    wanted = left_bytes / left_seconds if left_seconds > 0 else math.inf
    return min(max(wanted, LEAST_RATE), most)


class Scrubber:
    """Of one store. :meth:`run` must be running.

    Invariant: ``_state.done_bytes`` is the cost of what this pass has read, ``left_bytes`` that of the sealed replicas
    behind its position as of the last page.
    """

    def __init__(self, store: Store, incarnation: int, options: ScrubOptions | None = None) -> None:
        self.options = options or ScrubOptions()
        self.bad = 0
        self._store = store
        self._table = store.table
        self._incarnation = f"{incarnation:016x}"
        self._state = Saved(FORMAT, -1, 0, 0)
        self._left_bytes = 0
        self._running = self._asked = self._completed = 0
        self._wake = trio.Event()
        self._restart = False
        self._damaged: list[tuple[str, str]] = []
        self._recent: deque[tuple[float, int]] = deque()
        self._saved_at = -math.inf
        self._moved = (0.0, 0)
        self._busy = False

    # -- what others see ---------------------------------------------------------------------------------------

    def status(self) -> ScrubStatus:
        state, now_ns = self._state, self._table.now_ns()
        done = state.done_bytes if self._running else 0
        return ScrubStatus(
            done,
            done + self._left_bytes,
            max(0.0, (now_ns - state.began_ns) / _NS) if self._running else 0.0,
            self._recent_rate(),
            self.bad,
            state.last_seconds,
            max(0.0, (now_ns - state.last_ended_ns) / _NS) if state.last_ended_ns else 0.0,
        )

    def report(self) -> ScrubReport:
        return ScrubReport(
            self._incarnation, self._running, self._asked, self._completed, self.status(), self._damaged[:NAMED]
        )

    def ask(self) -> int:
        """Begins a pass over everything that is here now, unless one that was asked for is under way; its number."""
        if not self._running or self._running != self._asked:
            self._restart = True
            self._asked = (self._running or self._completed) + 1
            self._wake.set()
        return self._asked

    # -- passes ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled."""
        await self._load()
        self._count_left()
        await self._rest(FIRST_SECONDS)
        while True:
            await self._rest(self._until_next())
            if not self._restart and not any(map(_to_be_read, self._table.replicas())):
                await self._rest(EMPTY_SECONDS)
            else:
                await self._pass()

    async def _rest(self, seconds: float) -> None:
        """Waits, or until a pass is asked for."""
        with trio.move_on_after(seconds):
            await self._wake.wait()

    def _until_next(self) -> float:
        """Seconds until a pass is to begin, or to go on."""
        if self._restart:
            return 0.0
        if not self.options.days:
            return math.inf
        if self._state.began_ns:  # interrupted by a restart
            return 0.0
        since = (self._table.now_ns() - self._state.last_ended_ns) / _NS + self._state.last_seconds
        if not self._state.last_ended_ns or since < 0:
            return 0.0
        return max(0.0, min(LEAST_PASS_SECONDS, self._pass_seconds) - since)

    @property
    def _pass_seconds(self) -> float:
        return self.options.days * 86400

    async def _pass(self) -> None:
        """One pass, from the beginning or from where a restart interrupted it."""
        state = self._state
        if self._restart or not state.began_ns:
            state.position, state.done_bytes, state.began_ns = -1, 0, self._table.now_ns()
            state.skipped = 0
        number = self._running = self._completed + 1
        asked = self._restart
        self._restart, self._wake, self._damaged = False, trio.Event(), []
        while not self._restart:
            page = self._table.page(state.position, PAGE)
            if not page:
                break
            self._count_left()
            for replica in page:
                await self._scrub(replica, asked=asked)
                if self._restart:
                    break
                state.position = replica.chunk
                await self._save_if_due()
        self._running, self._completed = 0, number
        if not self._restart:
            await self._ended()

    async def _ended(self) -> None:
        """What has read nothing, or not everything, says nothing of what is there: it is not the last pass that is
        shown."""
        state, now_ns = self._state, self._table.now_ns()
        if state.skipped:
            log.warning("not everything could be scrubbed; trying again", replicas=state.skipped)
            state.position, state.done_bytes, state.began_ns, state.skipped = -1, 0, 0, 0
            self._count_left()
            await self._save()
            await self._rest(EMPTY_SECONDS)
            return
        if not state.done_bytes:
            log.info("there was nothing to scrub")
            state.position, state.began_ns = -1, 0
            return
        state.last_seconds, state.last_ended_ns = max(0.0, (now_ns - state.began_ns) / _NS), now_ns
        log.info(
            "scrubbed everything", bytes=state.done_bytes, seconds=round(state.last_seconds), bad=len(self._damaged)
        )
        state.position, state.done_bytes, state.began_ns = -1, 0, 0
        self._count_left()
        await self._save()

    def _count_left(self) -> None:
        self._left_bytes = sum(
            cost(replica)
            for replica in self._table.replicas()
            if replica.chunk > self._state.position and _to_be_read(replica)
        )

    async def _scrub(self, replica: Replica, *, asked: bool) -> None:
        """Reads one replica back, at the pass's pace; what is damaged is reported as a read would report it."""
        if not _to_be_read(replica) or self._table.get(replica.chunk) is not replica:
            return
        reads = self._store.reads
        found = reads.verification(replica)
        try:
            await self._read_back(replica, found, asked=asked)
        except DfsError as error:
            if error.code is ErrorCode.UNAVAILABLE:  # it is this process that is short of something
                log.warning("a replica could not be scrubbed", chunk=f"{replica.chunk:x}", reason=error.text)
                self._state.skipped += 1
            elif error.code is not ErrorCode.NO_SUCH_CHUNK:  # deleted meanwhile
                self._note(replica, error.text)
            return
        if reads.judge(replica, found.problem, found.bad_blocks):
            self._note(replica, found.problem or f"{len(found.bad_blocks)} bad blocks")

    async def _read_back(self, replica: Replica, found: Verification, *, asked: bool) -> None:
        counted, whole = 0, cost(replica)
        while replica.state is ReplicaState.SEALED and not self._restart:
            began = self._table.clock()
            if not await self._store.reads.verify_slice(replica, found):
                break
            seconds = self._table.clock() - began
            length = min(found.bytes_read, whole) - counted
            counted += length
            self._recent.append((self._table.clock(), length))
            pause = self._pause(length, seconds, asked=asked)
            self._state.done_bytes += length
            self._left_bytes = max(0, self._left_bytes - length)
            await self._rest(pause)

    def _pause(self, length: int, seconds: float, *, asked: bool) -> float:
        """How long to wait after a slice of ``length`` bytes, not yet counted, that took ``seconds``."""
        share = BUSY_SHARE if self._is_busy() else 1.0
        if asked:
            return seconds / share
        elapsed = (self._table.now_ns() - self._state.began_ns) / _NS
        pace = rate(self._left_bytes, USED_SHARE * self._pass_seconds - elapsed, self.options.most_bytes_per_second)
        return max(length / (pace * share) - seconds, seconds)

    def _is_busy(self) -> bool:
        """Whether others have moved much since about a second ago."""
        now, moved = self._table.clock(), self._table.bytes_read + self._table.bytes_written
        then, before = self._moved
        if now - then >= 1.0:
            self._busy = (moved - before) / (now - then) > BUSY_BYTES_PER_SECOND
            self._moved = now, moved
        return self._busy

    def _note(self, replica: Replica, text: str) -> None:
        self.bad += 1
        self._damaged.append((f"{replica.chunk:016x}", text))

    def _recent_rate(self) -> float:
        now = self._table.clock()
        while self._recent and self._recent[0][0] < now - RECENT_SECONDS:
            self._recent.popleft()
        if not self._recent:
            return 0.0
        return sum(length for _, length in self._recent) / max(1.0, now - self._recent[0][0])

    # -- across restarts ---------------------------------------------------------------------------------------

    async def _load(self) -> None:
        """What is damaged, or from the future, only means starting again."""
        try:
            data = await self._table.run_sync(self._table.disk.read_small, FILE, limiter=self._table.limits.scrubs)
            state = checked.decode(data, Saved) if data is not None else self._state
        except (OSError, checked.DamagedFile) as error:
            log.warning("scrubbing starts again: its state cannot be read", reason=str(error))
            return
        now_ns = self._table.now_ns()
        if state.format == FORMAT and max(state.began_ns, state.last_ended_ns) <= now_ns and state.position >= -1:
            self._state = state

    async def _save_if_due(self) -> None:
        if self._table.clock() - self._saved_at >= SAVE_SECONDS:
            await self._save()

    async def _save(self) -> None:
        self._saved_at = self._table.clock()
        if self._table.disk_error:
            return
        try:
            await self._table.run_sync(
                self._table.disk.write_atomically,
                FILE,
                checked.encode(self._state),
                limiter=self._table.limits.changes,
                abandon_on_cancel=True,
            )
        except OSError as error:
            log.warning("cannot save how far scrubbing is", reason=error.strerror)


def _to_be_read(replica: Replica) -> bool:
    """Sealed, and not known to be damaged already."""
    return replica.state is ReplicaState.SEALED and not replica.error

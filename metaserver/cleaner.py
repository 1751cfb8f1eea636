"""The cleaner: rewrites chunks that are mostly dead, so that their space comes back (design 5.3, Space).

A job takes some sealed chunks. It has a chunkserver collect their live bytes in a new chunk (FILLING, order COMPACT),
waits until repair has made as many copies of it as the old ones have, and then rewrites the maps: for whatever rows
refer to the old chunks *then*, because bytes never change but files do. An old chunk is DEAD in the change that finds
no row left, and is deleted like any other.

Nothing is lost whatever happens in between: until a row is rewritten it refers to the old chunk, which lives as long as
there is such a row. A job that cannot go on is given up: its new chunk becomes DEAD, or keeps what refers to it
already. Jobs are in memory only; a restart makes FILLING chunks DEAD.
"""

from collections.abc import Callable, Iterable, Iterator
from enum import Enum, auto

import msgspec
import structlog
import trio

from metaserver import chunks, cleaning, rewriting
from metaserver.cleaning import Moves, Usage
from metaserver.clock import LivedClock
from metaserver.commit import Committer
from metaserver.config import Config
from metaserver.errors import DfsError, ErrorCode
from metaserver.members import Members
from metaserver.outcomes import DOUBTS
from metaserver.placement import Candidate
from metaserver.planning import is_lost, sure
from metaserver.protocol import (
    CHUNK_CAPACITY,
    ChunkState,
    CleanerStatus,
    CompactSource,
    Order,
    OrderKind,
    OrderResult,
)
from metaserver.repair import Repair
from metaserver.schema import Chunk, Replica

log = structlog.get_logger(__name__)

# Chunks remembered as worth cleaning, the better half of them at least; the slow walk finds the others again.
MOST_CANDIDATES = 2_000
# Ranges that one order may name, so that it stays far below HTTP_BODY_LIMIT (22 bytes each), as its result does.
MOST_RANGES = 8192
# Rows read between two turns of others: about 5 ms.
SLICE_ROWS = 1000
# Less room than this is no place to collect anything in.
LEAST_ROOM = 256 << 10
# The sources of a job that failed are left alone for so long.
RETRY_SECONDS = 30.0
# And its server, if that was at fault: how full it is its next heartbeats will say.
_SERVERS_FAULT = {
    ErrorCode.DISK_FULL.name: 3.0,
    ErrorCode.NO_SPACE.name: 30.0,
    ErrorCode.UNAVAILABLE.name: 10.0,
    ErrorCode.IO.name: 60.0,
}
# Copies of the new chunk that take longer are not to be had: its space is needed.
COPY_SECONDS = 300.0


class Phase(Enum):
    """What a job waits for: the order's result, or copies of the new chunk."""

    COLLECTING = auto()
    COPYING = auto()


class Job(msgspec.Struct, eq=False):
    """``sources`` go into ``chunk``, which is made on ``server``. ``since``: when the phase began."""

    chunk: int
    server: int
    sources: dict[int, Usage]
    since: float
    phase: Phase = Phase.COLLECTING
    moves: Moves | None = None


class Cleaner:
    """Invariants: a chunk is a source of at most one job; ``_jobs`` has every FILLING chunk that was made in this
    epoch; ``_left_over`` those of earlier ones."""

    def __init__(
        self,
        committer: Committer,
        config: Config,
        members: Members,
        repair: Repair,
        clock: LivedClock,
        now_ns: Callable[[], int],
    ) -> None:
        self._committer = committer
        self._config = config
        self._members = members
        self._repair = repair
        self._clock = clock
        self._now_ns = now_ns
        self._candidates: dict[int, Usage] = {}
        self._jobs: dict[int, Job] = {}
        self._left_over: list[int] = []
        self._not_before: dict[int, float] = {}
        self._server_not_before: dict[int, float] = {}
        self._next_job_at = 0.0
        self._done = CleanerStatus()

    # -- what happens elsewhere ----------------------------------------------------------------------------------

    def load(self) -> None:
        """Finds what earlier epochs left."""
        self._left_over, _ = self._committer.read(0, rewriting.filling)

    def note(self, chunk: int, row: Chunk) -> None:
        """A chunk was looked at."""
        usage = Usage(chunk, row.length, row.entries, row.live, row.copies, row.created_ns)
        wanted = row.state == ChunkState.SEALED and (usage.small or usage.worth(cleaning.WORTH_WHEN_SHORT))
        if not wanted:
            self._candidates.pop(chunk, None)
            return
        self._candidates[chunk] = usage
        if len(self._candidates) > MOST_CANDIDATES:
            best = cleaning.best(self._candidates.values(), MOST_CANDIDATES // 2)
            self._candidates = {usage.chunk: usage for usage in best}

    def result(self, order: Order, server: int, result: OrderResult) -> None:
        """A COMPACT order was carried out, or failed."""
        job = self._jobs.get(order.chunk)
        if job is None or job.phase is not Phase.COLLECTING:
            return
        report = result.replica
        if result.error or report is None or not report.sealed:
            log.warning(
                "chunks could not be cleaned", chunk=f"{order.chunk:x}", server=server, error=result.error,
                source=f"{result.source:x}", text=result.text,
            )  # fmt: skip
            self._doubt(order, result)
            self._give_up(job, result.error)
            return
        try:
            job.moves = Moves(result.moves, report.length)
        except ValueError as error:
            log.error("a chunkserver moved bytes to where they cannot be", server=server, error=str(error))
            self._give_up(job, "")
            return
        change = self._committer.change(
            0, 0, lambda tx, _: rewriting.filled(tx, order.chunk, server, report), frees=True
        )
        if change.message:
            job.phase, job.since = Phase.COPYING, self._clock.seconds
            self._repair.look_at(order.chunk)
        else:
            self._give_up(job, "")

    def _doubt(self, order: Order, result: OrderResult) -> None:
        """The replica that did not give right bytes is verified before it counts again."""
        if result.error not in DOUBTS:
            return
        for source in order.sources:
            if source.chunk == result.source:
                at = source.chunk, source.server
                if self._committer.change(0, 0, lambda tx, _, at=at: chunks.doubt(tx, *at), frees=True).message:  # type: ignore[misc]
                    self._repair.doubt(*at)

    def status(self) -> CleanerStatus:
        worth = self._worth()
        status = msgspec.structs.replace(self._done)
        status.candidates, status.dead_bytes = len(worth), sum(usage.gain for usage in worth)
        status.cleaning = sum(len(job.sources) for job in self._jobs.values())
        return status

    def _worth(self) -> list[Usage]:
        return [usage for usage in self._candidates.values() if usage.worth(cleaning.WORTH)]

    # -- the round -----------------------------------------------------------------------------------------------

    async def tick(self) -> None:
        """One round; call about once a second outside the reconnect window."""
        self._drop_left_over()
        for job in list(self._jobs.values()):
            try:
                await self._go_on(job)
            except DfsError as error:
                if error.code is ErrorCode.NO_SPACE:
                    raise  # the metaserver's own disk: later
                log.error("a cleaning cannot go on", chunk=f"{job.chunk:x}", error=str(error))
                self._give_up(job, "")
        await self._begin()

    def _drop_left_over(self) -> None:
        while self._left_over:
            chunk = self._left_over[-1]
            self._committer.change(0, 0, lambda tx, _, chunk=chunk: rewriting.abandon(tx, chunk), frees=True)  # type: ignore[misc]
            self._left_over.pop()
            self._repair.look_at(chunk)

    async def _go_on(self, job: Job) -> None:
        waited = self._clock.seconds - job.since
        if job.phase is Phase.COLLECTING and job.chunk not in self._repair.orders:
            self._give_up(job, ErrorCode.UNAVAILABLE.name)
        elif job.phase is Phase.COPYING and self._is_over(job):
            self._end(job, 0)
        elif job.phase is Phase.COPYING and self._enough_copies(job):
            await self._rewrite(job)
        elif job.phase is Phase.COPYING and waited > COPY_SECONDS:
            log.warning("a cleaned chunk gets too few copies", chunk=f"{job.chunk:x}")
            self._give_up(job, ErrorCode.NO_SPACE.name)

    def _is_over(self, job: Job) -> bool:
        """Whether all that had come to refer to the new chunk is gone again."""
        row, _ = self._rows(job.chunk)
        return row is None or row.state == ChunkState.DEAD

    def _enough_copies(self, job: Job) -> bool:
        """As many as are wanted, as far as there are servers, and never fewer than an old chunk would lose."""
        have, wanted = self._copies_of(job.chunk)
        up = sum(member.up for member in self._members.by_id.values())
        needed = [1, min(wanted, up)]
        for chunk in job.sources:
            row, replicas = self._rows(chunk)
            if row is not None and row.state == ChunkState.SEALED:
                good = sum(replica.good and not is_lost(self._members, server) for server, replica in replicas)
                needed += [min(good, row.copies), min(row.copies, up)]
        return have >= max(needed)

    def _copies_of(self, chunk: int) -> tuple[int, int]:
        """Confirmed copies there are, and copies wanted."""
        row, replicas = self._rows(chunk)
        return (0, 0) if row is None else (len(sure(row, replicas, self._members)), row.copies)

    async def _rewrite(self, job: Job) -> None:
        left = moved = 0
        for chunk, usage in job.sources.items():
            position: bytes | None = b""
            while position is not None:
                if not self._enough_copies(job):
                    return  # one has gone meanwhile: on with it when there is another
                step = self._rewrite_step(job, chunk, position)
                if step is None:
                    self._end(job, moved)
                    return
                position = step.position
                left += step.left
                moved += step.moved
                if step.died:
                    self._repair.look_at(chunk)
                    self._done.freed_chunks += 1
                    self._done.freed_bytes += usage.disk
                await trio.lowlevel.checkpoint()
        if left:
            log.info("rows of cleaned chunks were left alone", chunk=f"{job.chunk:x}", rows=left)
        self._end(job, moved)

    def _rewrite_step(self, job: Job, chunk: int, position: bytes) -> rewriting.Rewritten | None:
        """None: the new chunk cannot be referred to any more, because all that did is gone."""
        moves = job.moves
        assert moves is not None
        if self._is_over(job):
            return None
        change = self._committer.change(
            0, 0, lambda tx, _: rewriting.rewrite_step(tx, chunk, job.chunk, position, moves)
        )
        return change.message

    def _end(self, job: Job, moved: int) -> None:
        """The job is over; the new chunk is DEAD if nothing refers to it."""
        del self._jobs[job.chunk]
        self._done.moved_bytes += moved
        self._committer.change(0, 0, lambda tx, _: rewriting.abandon(tx, job.chunk), frees=True)
        row, _ = self._rows(job.chunk)
        if row is not None and row.state == ChunkState.SEALED:
            self._done.freed_bytes -= cleaning.disk_bytes(row.length, row.entries)
        if not moved:
            # Whatever the reason is, it will not be gone at once.
            self._not_before.update(dict.fromkeys(job.sources, self._clock.seconds + 10 * RETRY_SECONDS))
        log.info("cleaned chunks", sources=len(job.sources), chunk=f"{job.chunk:x}", moved=moved)
        for chunk in (job.chunk, *job.sources):
            self._repair.look_at(chunk)

    def _give_up(self, job: Job, error: str) -> None:
        now = self._clock.seconds
        del self._jobs[job.chunk]
        self._done.failed += 1
        self._committer.change(0, 0, lambda tx, _: rewriting.abandon(tx, job.chunk), frees=True)
        at_fault = _SERVERS_FAULT.get(error)
        if at_fault is not None:
            self._server_not_before[job.server] = now + at_fault
        self._not_before.update(dict.fromkeys(job.sources, now + min(RETRY_SECONDS, at_fault or RETRY_SECONDS)))
        # Copies of it may have failed; deleting it need not wait for that.
        self._repair.orders.succeeded(job.chunk)
        self._repair.look_at(job.chunk)

    # -- beginning -----------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        """Begins what may be begun now: one order at a server at a time, and not faster than is allowed."""
        members = self._members.by_id.values()
        short = self._members.is_short(self._config.copies)
        dead = sum(usage.gain * usage.copies for usage in self._worth())
        haste = cleaning.HASTE if short else cleaning.haste(dead, sum(member.occupied for member in members))
        rate = haste * self._config.clean_bytes_per_second * sum(member.up for member in members)
        while rate and self._clock.seconds >= self._next_job_at:
            places = self._places()
            group, target = self._choose(places, short)
            if not group or not target:
                return
            sources = await self._sources(group, target)
            left_out = [usage.chunk for usage in group if usage.chunk not in sources]
            self._not_before.update(dict.fromkeys(left_out, self._clock.seconds + RETRY_SECONDS))
            group = [usage for usage in group if usage.chunk in sources]
            if not cleaning.enough(group):
                continue
            cost = sum(usage.live for usage in group) * (1 + group[0].copies)
            self._next_job_at = max(self._next_job_at, self._clock.seconds - 1.0) + cost / rate
            self._order(target, {usage.chunk: usage for usage in group}, list(sources.values()))

    def _places(self) -> list[Candidate]:
        """Servers that could make a chunk now, those with most room first."""
        now = self._clock.seconds
        busy = {job.server for job in self._jobs.values() if job.phase is Phase.COLLECTING}
        found = [one for one in self._members.candidates(makes_room=True) if one.server not in busy]
        found = [one for one in found if self._server_not_before.get(one.server, now) <= now]
        return sorted(found, key=lambda one: one.free, reverse=True)

    def _choose(self, places: list[Candidate], short: bool) -> tuple[list[Usage], int]:
        """What to clean and where: on the server that has most of it, if there is room for the copies too."""
        if not places:
            return [], 0
        everywhere = sorted((one.free for one in self._members.candidates(makes_room=True)), reverse=True)
        room = everywhere[min(self._config.copies, len(everywhere)) - 1] - cleaning.HEADER_BYTES
        if room < LEAST_ROOM:
            return [], 0
        group = cleaning.choose(self._free_candidates(), self._now_ns(), min(room, CHUNK_CAPACITY), short=short)
        needed = sum(usage.needed for usage in group)
        fitting = [one.server for one in places if one.free >= needed]
        if not group or not fitting:
            return [], 0
        here = dict.fromkeys(fitting, 0)
        for usage in group:
            row, replicas = self._rows(usage.chunk)
            for server in sure(row, replicas, self._members) if row is not None else ():
                if server in here:
                    here[server] += usage.live
        return group, max(fitting, key=lambda server: here[server])

    def _free_candidates(self) -> Iterator[Usage]:
        now = self._clock.seconds
        self._not_before = {chunk: until for chunk, until in self._not_before.items() if until > now}
        taken = {chunk for job in self._jobs.values() for chunk in job.sources}
        orders = self._repair.orders
        for chunk, usage in self._candidates.items():
            if chunk not in taken and chunk not in self._not_before and chunk not in orders:
                yield usage

    async def _sources(self, group: Iterable[Usage], target: int) -> dict[int, CompactSource]:
        """What the order has to say of each chunk; those that cannot be read or have changed are left out."""
        found: dict[int, CompactSource] = {}
        ranges_left = MOST_RANGES
        for usage in group:
            row, replicas = self._rows(usage.chunk)
            if row is None or row.state != ChunkState.SEALED or ranges_left <= 0:
                continue
            servers = [
                server
                for server in sure(row, replicas, self._members)
                if usage.chunk not in self._members.by_id[server].unsealed
            ]
            # If the target's own turns out to be damaged, somebody else's is at hand.
            servers.sort(key=lambda server: server == target)
            address = next(iter(self._members.addresses(servers[:1])), None)
            if address is None:
                continue
            ranges = await self._ranges(usage.chunk, ranges_left)
            if ranges:
                ranges_left -= len(ranges)
                found[usage.chunk] = CompactSource(
                    usage.chunk, row.length, row.entries, row.chain, address.server, address.host, address.port, ranges
                )  # fmt: skip
        return found

    async def _ranges(self, chunk: int, most: int) -> list[cleaning.Range]:
        """What is live of a chunk, or the beginning of that. It may change while it is read: then there is less."""
        found: list[cleaning.Range] = []
        position: int | None = 0
        while position is not None and len(found) < most:
            at = position
            (page, position), _ = self._committer.read(
                0, lambda tx, at=at: rewriting.live_ranges(tx, chunk, at, SLICE_ROWS)  # type: ignore[misc]
            )  # fmt: skip
            found = cleaning.joined(found + page)
            await trio.lowlevel.checkpoint()
        return found[:most]

    def _order(self, server: int, sources: dict[int, Usage], told: list[CompactSource]) -> None:
        copies = max(usage.copies for usage in sources.values())
        change = self._committer.change(
            0, 0, lambda tx, now_ns: rewriting.begin(tx, now_ns, server, copies), frees=True
        )
        chunk, now = change.message, self._clock.seconds
        order = self._repair.orders.issue(
            OrderKind.COMPACT, self._committer.epoch, chunk, server, None, self._committer.newest, now, sources=told
        )
        order.makes_room = True
        self._jobs[chunk] = Job(chunk, server, sources, now)
        log.info(
            "cleaning chunks", sources=len(sources), chunk=f"{chunk:x}", server=server,
            live=sum(usage.live for usage in sources.values()), gain=sum(usage.gain for usage in sources.values()),
        )  # fmt: skip

    def _rows(self, chunk: int) -> tuple[Chunk | None, list[tuple[int, Replica]]]:
        found, _ = self._committer.read(0, lambda tx: (chunks.find(tx, chunk), chunks.replicas(tx, chunk)))
        return found

"""Looks after appends that are not answered: who holds them up, and going on without him (docs/design.md 7.5).

While an append takes longer than usual, the servers of its chunk are pinged, and some others to compare them with. A
chunk ends at once if one of its servers does not answer and others do; it is left, in order, if one is slow.
"""

from collections.abc import Iterable
from typing import Protocol

import structlog
import trio

from chunkserver.protocol import Peer
from chunkserver.pulse import Reading
from dfsmount.chunkwriter import Requests
from dfsmount.jobs import Signal
from dfsmount.judge import Verdict, judge
from dfsmount.lane import Lane
from dfsmount.meta import Meta
from dfsmount.supply import ChunkSupply
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import ServerState

log = structlog.get_logger(__name__)

TICK_SECONDS = 0.25
# An append usually takes milliseconds; a full window over a slow network, a second.
LATE_SECONDS = 0.25
# How many servers that have nothing to do with it are pinged for comparison if there are no others, or all are silent,
# and how often they are looked up.
BYSTANDERS = 3
LOOK_UP_SECONDS = 5.0


class Writing(Protocol):
    """What is looked after."""

    meta: Meta
    supply: ChunkSupply
    lanes: list[Lane]

    def room_lost(self) -> None: ...


class Lookout:
    """:meth:`run` must be running. ``sent`` is to be set whenever an append is sent."""

    def __init__(self, writer: Writing, pool: Requests) -> None:
        self.sent = Signal()
        self._writer = writer
        self._pool = pool
        self._bystanders: tuple[Peer, ...] = ()
        self._looked_up = -LOOK_UP_SECONDS

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self.sent.wait()
            while any(lane.waits_since is not None for lane in self._writer.lanes):
                await trio.sleep(TICK_SECONDS)
                await self._look(trio.current_time())

    async def _look(self, now: float) -> None:
        late = [lane for lane in self._writer.lanes if lane.waits_since is not None]
        late = [lane for lane in late if lane.waits_since is not None and lane.waits_since < now - LATE_SECONDS]
        if not late:
            return
        concerned = {peer.server: peer for lane in late for peer in lane.waits_for()}
        known = {peer.server: peer for peer in [*concerned.values(), *self._others()]}
        readings = self._read(known.values())
        if len(known) < 2 or (readings and not any(reading.answers for reading in readings.values())):
            readings |= self._read(await self._find_bystanders(concerned, now))
        verdict = judge(readings)
        if verdict.mute or verdict.slow:
            self._carry_out(verdict, concerned, now)

    def _others(self) -> Iterable[Peer]:
        """The servers of chunks on which nothing is late."""
        for lane in self._writer.lanes:
            if lane.chunk is not None:
                yield from lane.chunk.peers
        for chunk in self._writer.supply.spares:
            yield from chunk.peers

    def _read(self, peers: Iterable[Peer]) -> dict[int, Reading]:
        pulse = self._pool.pulse
        readings = {}
        for peer in peers:
            pulse.watch(peer)
            reading = pulse.reading(peer.server)
            if reading is not None:
                readings[peer.server] = reading
        return readings

    async def _find_bystanders(self, concerned: dict[int, Peer], now: float) -> tuple[Peer, ...]:
        """Servers to compare with: without any it cannot be told who is to blame."""
        if now >= self._looked_up + LOOK_UP_SECONDS:
            self._looked_up = now
            found = []
            with trio.move_on_after(TICK_SECONDS):
                try:
                    found = list((await self._writer.meta.servers()).values())
                except DfsError as error:
                    log.info("cannot ask for other servers", error=str(error))
            self._bystanders = tuple(
                Peer(one.server, one.host, one.port)
                for one in found
                if one.server not in concerned and one.state == ServerState.UP
            )[:BYSTANDERS]
        return self._bystanders

    def _carry_out(self, verdict: Verdict, concerned: dict[int, Peer], now: float) -> None:
        supply = self._writer.supply
        if verdict.mute:
            supply.never(verdict.mute, now)
            error = DfsError(ErrorCode.TIMEOUT, "a server does not answer, others do")
            ended = [lane.do_without(verdict.mute, error) for lane in self._writer.lanes]
            if any(ended):
                for server in verdict.mute & concerned.keys():
                    self._pool.disconnect(concerned[server], "it does not answer")
        if verdict.slow:
            supply.avoid(verdict.slow, now)
            for lane in self._writer.lanes:
                lane.leave(verdict.slow)
        self._writer.room_lost()

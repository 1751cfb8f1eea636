"""Who answers, and how quickly: pings over connections of their own, for as long as somebody cares.

An answer that does not come says nothing about who is to blame: the first replica waits for those behind it, disks may
be slow everywhere, and data that goes out may fill the connection. A ping waits for none of these.
"""

from collections import deque
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import trio

from chunkserver.protocol import Peer, Pong
from metaserver.errors import ConnectionLost, DfsError

# From one answer to the next ping, and how long one ping is waited for: longer than anybody's patience.
PAUSE_SECONDS = 0.25
PING_SECONDS = 10.0
# A server is pinged for so long after the last call of `watch`, and one that is silent so much longer: who asks again
# within that time knows at once.
WATCH_SECONDS = 3.0
REMEMBER_SECONDS = 60.0
# A server is as slow as the quickest of so many answers in a row.
SAMPLES = 4


class Reading(NamedTuple):
    """What is known of a server. ``silent_seconds``: how long it has owed an answer (0: not for longer than a moment).
    ``cost_seconds``: what a request that reaches the disk takes there, the least of the last :data:`SAMPLES` answers;
    None: there were not so many. ``disk_seconds``: the part of the disk in the last answer. ``refuses``: there is no
    connection to be had."""

    silent_seconds: float
    cost_seconds: float | None
    disk_seconds: float
    refuses: bool = False

    @property
    def answers(self) -> bool:
        return self.silent_seconds == 0 and not self.refuses


class _Beat:
    """One server. ``asked`` is when (lived seconds) the oldest ping without an answer was sent."""

    __slots__ = ("asked", "costs", "disk_seconds", "known", "peer", "refused", "until")

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.until = 0.0
        self.known = False
        self.refused = False
        self.asked: float | None = None
        self.disk_seconds = 0.0
        self.costs: deque[float] = deque(maxlen=SAMPLES)


class Pulse:
    """Pings servers while they are watched. ``ping`` asks once and raises :class:`DfsError`; ``start`` starts a task.

    Silence is measured in time that this process lived: after a suspension answers wait in the socket, and nobody is
    silent for that.
    """

    def __init__(self, ping: Callable[[Peer, float], Awaitable[Pong]], start: Callable[..., object]) -> None:
        self._ping = ping
        self._start = start
        self._beats: dict[int, _Beat] = {}
        self._lived = 0.0
        self._ticking = False

    def watch(self, peer: Peer) -> None:
        """Pings the server for :data:`WATCH_SECONDS` from now on."""
        beat = self._beats.get(peer.server)
        if beat is None:
            beat = self._beats[peer.server] = _Beat(peer)
            beat.until = trio.current_time() + WATCH_SECONDS
            self._start(self._follow, beat)
            if not self._ticking:
                self._ticking = True
                self._start(self._tick)
        else:
            beat.peer = peer
            beat.until = trio.current_time() + WATCH_SECONDS

    def reading(self, server: int) -> Reading | None:
        """None: not watched lately, or no ping has come to an end and the first is less than a moment old."""
        beat = self._beats.get(server)
        if beat is None:
            return None
        silent = 0.0 if beat.asked is None else self._lived - beat.asked
        if silent < PAUSE_SECONDS:
            if not beat.known and not beat.refused:
                return None
            silent = 0.0
        cost = min(beat.costs) if len(beat.costs) == SAMPLES else None
        return Reading(silent, cost, beat.disk_seconds, beat.refused)

    def silent_seconds(self, server: int) -> float:
        """How long the server has owed an answer, as far as it is known."""
        reading = self.reading(server)
        return 0.0 if reading is None else reading.silent_seconds

    async def _tick(self) -> None:
        last = trio.current_time()
        while self._beats:
            await trio.sleep(PAUSE_SECONDS / 2)
            now = trio.current_time()
            self._lived += min(now - last, PAUSE_SECONDS)
            last = now
        self._ticking = False

    async def _follow(self, beat: _Beat) -> None:
        while trio.current_time() < beat.until + (REMEMBER_SECONDS if beat.asked is not None else 0.0):
            await self._once(beat)
            await trio.sleep(PAUSE_SECONDS)
        del self._beats[beat.peer.server]

    async def _once(self, beat: _Beat) -> None:
        started = trio.current_time()
        if beat.asked is None:
            beat.asked = self._lived
        try:
            with trio.fail_after(PING_SECONDS):
                pong = await self._ping(beat.peer, PING_SECONDS)
        except (DfsError, trio.TooSlowError) as error:
            beat.costs.clear()
            beat.refused = isinstance(error, ConnectionLost)
            return
        beat.known, beat.refused, beat.asked = True, False, None
        beat.disk_seconds = pong.disk_ms / 1000
        beat.costs.append(trio.current_time() - started + beat.disk_seconds)

"""What the status page shows of the last hour: figures every ten seconds, and what happened, in words.

Only what is cheap to ask for is looked at: no chunk is counted for it. It is lost with the process.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import msgspec
import trio

from metaserver.protocol import ServerStatus, SessionStatus
from metaserver.words import count_text

SAMPLE_SECONDS = 10.0
KEPT_SAMPLES = 360
KEPT_EVENTS = 100


class Seen(msgspec.Struct, frozen=True):
    """What is true at a moment. ``requests``, ``read`` and ``written`` (bytes) count since the metaserver or the
    chunkservers by number started; ``copies_waiting``: chunks whose next copy waits."""

    servers: Sequence[ServerStatus]
    sessions: Sequence[SessionStatus]
    requests: int
    read: dict[int, int]
    written: dict[int, int]
    copies_waiting: int = 0
    read_only: str = ""
    full: bool = False


class Sample(msgspec.Struct, frozen=True):
    """Rates over the seconds before ``at_ns`` (UTC): requests, bytes read and bytes written per second. Each copy that
    is written counts."""

    at_ns: int
    requests: float
    read: float
    written: float


class Event(msgspec.Struct, frozen=True):
    """``bad``: somebody may want to do something about it."""

    at_ns: int
    text: str
    bad: bool = False


def changes(old: Seen, new: Seen) -> list[tuple[str, bool]]:
    """What happened between two moments, in words, and whether it is bad."""
    return [
        *_servers_changed({server.server: server for server in old.servers}, new.servers),
        *_sessions_changed(old.sessions, new.sessions),
        *_cluster_changed(old, new),
    ]


def _servers_changed(old: dict[int, ServerStatus], new: Iterable[ServerStatus]) -> Iterable[tuple[str, bool]]:
    for server in new:
        before = old.pop(server.server, None)
        if before is None:
            yield f"{server.name} joined", False
            continue
        if before.state != server.state:
            bad = server.state in ("DOWN", "LOST")
            yield f"{server.name} is {server.state}, was {before.state}", bad
        if before.disk_state != server.disk_state:
            bad = server.disk_state in ("FULL", "FAILED")
            yield f"the disk of {server.name} is {server.disk_state or 'not known'}", bad
        found = (server.scrub.bad if server.scrub else 0) - (before.scrub.bad if before.scrub else 0)
        if found > 0:
            yield f"scrubbing found {count_text(found, 'damaged replica')} on {server.name}", True
    for gone in old.values():
        yield f"{gone.name} was removed", False


def _sessions_changed(old: Sequence[SessionStatus], new: Sequence[SessionStatus]) -> Iterable[tuple[str, bool]]:
    before = {session.session: session for session in old}
    for session in new:
        known = before.pop(session.session, None)
        name = f"{session.mountpoint} on {session.host}"
        if known is None:
            yield f"{name} was mounted", False
        elif known.connected != session.connected:
            yield f"{name} {'is back' if session.connected else 'went away'}", not session.connected
    for gone in before.values():
        yield f"{gone.mountpoint} on {gone.host} was unmounted", False


def _cluster_changed(old: Seen, new: Seen) -> Iterable[tuple[str, bool]]:
    if new.copies_waiting and not old.copies_waiting:
        yield "repair began: chunks have fewer copies than wanted", True
    if old.copies_waiting and not new.copies_waiting:
        yield "repair has nothing left to do", False
    if new.read_only != old.read_only:
        yield (
            (f"nothing can be changed: {new.read_only}", True) if new.read_only else ("changes are taken again", False)
        )
    if new.full != old.full:
        yield ("the metaserver's disk is full", True) if new.full else ("the metaserver's disk has space again", False)


def grown(old: dict[int, int], new: dict[int, int]) -> int:
    """By how much counters have grown that begin at 0 again when their server restarts."""
    return sum(count - old[key] if count >= old.get(key, count + 1) else count for key, count in new.items())


class History:
    """``look`` tells what is true now. :meth:`run` looks every second for events, and every ten for a sample."""

    def __init__(self, look: Callable[[], Seen], now_ns: Callable[[], int]) -> None:
        self._look = look
        self._now_ns = now_ns
        self.samples: deque[Sample] = deque(maxlen=KEPT_SAMPLES)
        self.events: deque[Event] = deque(maxlen=KEPT_EVENTS)

    async def run(self) -> None:
        """Until cancelled."""
        sampled = before = self._look()
        sampled_at = trio.current_time()
        self.events.append(Event(self._now_ns(), "the metaserver started"))
        while True:
            await trio.sleep(1)
            now, at = self._look(), self._now_ns()
            self.events.extend(Event(at, text, bad) for text, bad in changes(before, now))
            before = now
            passed = trio.current_time() - sampled_at
            if passed >= SAMPLE_SECONDS:
                self.samples.append(_sample(at, sampled, now, passed))
                sampled, sampled_at = now, trio.current_time()


def _sample(at_ns: int, old: Seen, new: Seen, seconds: float) -> Sample:
    # A server that was not there before has all its counts from before.
    known = {server.server for server in old.servers}
    read = {server: count for server, count in new.read.items() if server in known}
    written = {server: count for server, count in new.written.items() if server in known}
    return Sample(
        at_ns,
        (new.requests - old.requests) / seconds,
        grown(old.read, read) / seconds,
        grown(old.written, written) / seconds,
    )

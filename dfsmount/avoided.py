"""Which servers new chunks are not to be placed on, and until when. Synchronous; times are seconds of one clock.

Two degrees, as ``metaserver.protocol.Allocate`` has them: *never* (does not answer: rather fewer copies than wait for
it), and *avoid* (slow, or failed an append: only if there are not enough others for all copies). Whoever offends again
soon after is left out twice as long.
"""

from collections.abc import Iterable

AVOID_SECONDS = 30.0
NEVER_SECONDS = 5.0
LONGEST_SECONDS = 600.0
# Who gave no offence for so many times as long as it was left out begins anew.
FORGIVE = 4


class _Offence:
    """``seconds`` is how long the last one is held against the server, from ``since`` on."""

    __slots__ = ("seconds", "since")

    def __init__(self, since: float, seconds: float) -> None:
        self.since = since
        self.seconds = seconds


class Avoided:
    """The servers that offended lately."""

    def __init__(self) -> None:
        self._never: dict[int, _Offence] = {}
        self._avoid: dict[int, _Offence] = {}

    def avoid(self, servers: Iterable[int], now: float) -> None:
        """These are slow, or failed in a way that another may not."""
        for server in servers:
            _note(self._avoid, server, now, AVOID_SECONDS)

    def never(self, servers: Iterable[int], now: float) -> None:
        """These do not answer."""
        for server in servers:
            _note(self._never, server, now, NEVER_SECONDS)
            _note(self._avoid, server, now, AVOID_SECONDS)

    def to_avoid(self, now: float) -> frozenset[int]:
        return _current(self._avoid, now)

    def to_leave_out(self, now: float) -> frozenset[int]:
        return _current(self._never, now)


def _note(offences: dict[int, _Offence], server: int, now: float, first_seconds: float) -> None:
    known = offences.get(server)
    if known is None or now >= known.since + FORGIVE * known.seconds:
        offences[server] = _Offence(now, first_seconds)
    elif now >= known.since + known.seconds:
        offences[server] = _Offence(now, min(2 * known.seconds, LONGEST_SECONDS))
    else:
        # The same offence, seen again: it is still going on.
        known.since = now


def _current(offences: dict[int, _Offence], now: float) -> frozenset[int]:
    return frozenset(server for server, offence in offences.items() if now < offence.since + offence.seconds)

"""FLUSH: fetching what other sessions have written but not committed, before somebody looks at it (design 7.1)."""

from collections.abc import Mapping, Sequence

import msgspec
import structlog
import trio

from metaserver.protocol import FLUSH, Flush
from metaserver.sessions import Sessions, SessionState

log = structlog.get_logger(__name__)

# A writer that does not commit within this is answered around, and logged.
FLUSH_SECONDS = 10.0
# A writer without a connection has this long to come back (mounts try again within a second): it may have been killed,
# and then only its eviction ends the matter.
RETURN_SECONDS = 3.0
# So many requests of one session may wait for others; beyond, they are answered from what is known. A connection full
# of waiters would not be read any more, and two such sessions would wait for each other.
MAX_WAITS = 256


class _Ticket(msgspec.Struct, eq=False):
    session: int
    inos: tuple[int, ...]
    done: trio.Event
    sent: bool = False


class Flushing:
    """Asks writers and waits for them. A ticket is in ``_tickets`` from its FLUSH until FLUSHED, or until given up."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._tickets: dict[int, _Ticket] = {}
        self._next_ticket = 0
        self.asked = 0
        self.given_up = 0

    async def fetch(self, asking: SessionState | None, writers: Mapping[int, Sequence[int]]) -> None:
        """Returns when every writer (session to its inodes) has committed, or after a bound."""
        if asking is not None and asking.flush_waits >= MAX_WAITS:
            self.given_up += 1
            return
        tickets = {number: self._tickets[number] for number in map(self._ask, writers, writers.values()) if number}
        if asking is not None:
            asking.flush_waits += 1
        start = trio.current_time()
        try:
            for ticket in tickets.values():
                await self._wait(ticket, start)
        finally:
            if asking is not None:
                asking.flush_waits -= 1
            for number in tickets:
                self._tickets.pop(number, None)

    def flushed(self, session: SessionState, number: int) -> None:
        """FLUSHED has arrived."""
        session.mute = False
        ticket = self._tickets.get(number)
        if ticket is not None and ticket.session == session.id:
            ticket.done.set()

    def connected(self, session: SessionState) -> None:
        """The session is there again: it is asked what it could not be asked, or has not answered."""
        session.mute = False
        for number, ticket in self._tickets.items():
            if ticket.session == session.id and not ticket.done.is_set():
                self._push(number, ticket, session)

    def ended(self, session: SessionState) -> None:
        """The session is no more: nobody waits for it any longer."""
        for ticket in self._tickets.values():
            if ticket.session == session.id:
                ticket.done.set()

    def _ask(self, session: int, inos: Sequence[int]) -> int:
        """The number of a ticket, or 0 if this writer is known not to answer: what is known must do."""
        state = self._sessions.by_id.get(session)
        if state is None or state.mute:
            return 0
        self._next_ticket += 1
        ticket = self._tickets[self._next_ticket] = _Ticket(session, tuple(inos), trio.Event())
        self._push(self._next_ticket, ticket, state)
        self.asked += 1
        return self._next_ticket

    def _push(self, number: int, ticket: _Ticket, state: SessionState) -> None:
        if state.connection is not None and not state.resuming:
            ticket.sent = True
            state.connection.push(FLUSH, Flush(number, ticket.inos))

    async def _wait(self, ticket: _Ticket, start: float) -> None:
        with trio.move_on_at(start + RETURN_SECONDS):
            await ticket.done.wait()
        if ticket.sent:
            with trio.move_on_at(start + FLUSH_SECONDS):
                await ticket.done.wait()
        state = self._sessions.by_id.get(ticket.session)
        if not ticket.done.is_set() and state is not None:
            state.mute = True
            self.given_up += 1
            log.warning("a mount does not write back what others wait for", session=state.id, host=state.row.host)

"""How sessions begin, return and end; and the reconnect window after a start (design 5.2.4).

While the window is open returning clients say what they have open and send again what was lost; everything else waits.
It closes when all sessions of earlier epochs have returned, or after a time. Then what was answered once is done again
in its old order, whoever did it; then what was not answered; then the new requests, in the order in which they came.
"""

from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import msgspec
import structlog
import trio

from metaserver import inodes, namespace, protocol, sessions
from metaserver.changes import METHODS, Changes
from metaserver.clock import LivedClock
from metaserver.commit import Committer
from metaserver.config import Config
from metaserver.connection import Connection, Reply, Result
from metaserver.errors import DfsError, ErrorCode
from metaserver.flushing import Flushing
from metaserver.inodes import Effects
from metaserver.protocol import Lost, Resent, Resumed, SessionOpened
from metaserver.schema import Session, TaskKind, Transaction
from metaserver.sessions import Sessions, SessionState
from metaserver.tasks import Tasks
from metaserver.wire import BODY_LIMIT, Empty, Request, Response, encode

log = structlog.get_logger(__name__)

# While somebody is in the middle of returning the window waits for him, but not longer than so many times its length.
PATIENCE = 6
# Nothing was lost if the machine did not restart: then only what others have not yet flushed is worth waiting for, and
# a mount that lives comes back within a second.
NOTHING_LOST_SECONDS = 3.0
# Rows of one change that notes withdrawn operations.
WITHDRAW_STEP = 2000
# Others have their turn after so many changes done again.
YIELD_EVERY = 50
# One page of results stays well below the limit of a frame.
RESULT_BYTES = BODY_LIMIT // 2


class _Turn(msgspec.Struct, eq=False):
    """A request that waits for the window to close. ``outcome``: what its handler returned or raised."""

    handle: Callable[[], Result]
    done: trio.Event
    outcome: Result | Exception | None = None
    cancelled: bool = False


class Window:
    """The reconnect window. Closed for good once it is closed."""

    def __init__(self) -> None:
        self.closed = trio.Event()
        self._turns: list[_Turn] = []

    @property
    def open(self) -> bool:
        return not self.closed.is_set()

    def wait_turn(self, handle: Callable[[], Result]) -> Coroutine[Any, Any, Reply]:
        """Has ``handle`` called when the window closes, in the order of these calls."""
        turn = _Turn(handle, trio.Event())
        self._turns.append(turn)
        return self._wait(turn)

    async def _wait(self, turn: _Turn) -> Reply:
        try:
            await turn.done.wait()
        except trio.Cancelled:
            turn.cancelled = True
            if isinstance(turn.outcome, Coroutine):
                turn.outcome.close()
            raise
        outcome = turn.outcome
        if isinstance(outcome, Exception):
            raise outcome
        if isinstance(outcome, Reply):
            return outcome
        assert outcome is not None
        return await outcome

    async def close(self) -> None:
        """Lets everybody in who has waited; those who come meanwhile wait behind them."""
        while self._turns:
            turns, self._turns = self._turns, []
            for number, turn in enumerate(turns):
                if not turn.cancelled:
                    self._take(turn)
                if number % YIELD_EVERY == YIELD_EVERY - 1:
                    await trio.lowlevel.checkpoint()
        self.closed.set()

    def _take(self, turn: _Turn) -> None:
        try:
            turn.outcome = turn.handle()
        except Exception as error:
            turn.outcome = error
        turn.done.set()


class Resuming:
    """Beginning, return and end of sessions."""

    def __init__(
        self,
        committer: Committer,
        config: Config,
        cluster_id: str,
        table: Sessions,
        changes: Changes,
        flushing: Flushing,
        tasks: Tasks,
        clock: LivedClock,
        now_ns: Callable[[], int],
    ) -> None:
        self._committer = committer
        self._config = config
        self._cluster_id = cluster_id
        self._sessions = table
        self._changes = changes
        self._flushing = flushing
        self._tasks = tasks
        self._clock = clock
        self.now_ns = now_ns
        self._ending: set[int] = set()
        self._returned = trio.Event()
        self.window = Window()

    def load(self, ended: Iterable[int]) -> None:
        """Takes up the sessions of earlier epochs, except those being ended."""
        rows, _ = self._committer.read(0, sessions.load)
        skipped = frozenset(ended)
        for number, row in rows:
            if number not in skipped:
                self._sessions.add(SessionState(number, row, self._clock.seconds, returned=False))

    # -- beginning -----------------------------------------------------------------------------------------------

    async def open(self, connection: Connection, message: protocol.OpenSession) -> tuple[SessionState, Reply]:
        """OPEN_SESSION: a new session, durably; or one that returns and has to resume."""
        if message.session:
            session = self._return(connection, message.session)
        else:
            session = await self._begin(message)
            session.connection = connection
        root, wait_for = self._committer.read(session.id, lambda tx: inodes.require(tx, session.row.root))
        if wait_for:
            await self._committer.wait_durable(wait_for)
        opened = SessionOpened(
            session.id,
            self._committer.epoch,
            self._cluster_id,
            root.attributes(session.row.root),
            self._committer.survived,
            self.now_ns(),
            self._config.keep_alive_seconds,
            self._config.session_deadline_seconds,
            self._config.copies,
            self._changes.steady_ms,
        )
        return session, Reply(opened, (), 0, self._committer.durable)

    async def _begin(self, message: protocol.OpenSession) -> SessionState:
        if self._changes.refusing and not message.read_only:
            raise DfsError(ErrorCode.READ_ONLY, self._changes.refusing)

        def create(tx: Transaction, now_ns: int) -> tuple[int, Session]:
            root = namespace.resolve(tx, message.subdirectory)
            row = Session(message.host, message.mountpoint, message.pid, root, message.read_only, now_ns)
            return sessions.create(tx, row), row

        change = self._committer.change(0, 0, create, frees=True)
        number, row = change.message
        session = SessionState(number, row, self._clock.seconds, returned=True)
        await self._committer.wait_durable(change.number)
        session.heard = self._clock.seconds
        self._sessions.add(session)
        log.info("session opened", session=number, host=row.host, mountpoint=row.mountpoint)
        return session

    def _return(self, connection: Connection, number: int) -> SessionState:
        session = self._sessions.require(number)
        if session.connection is not None and session.connection is not connection:
            session.connection.close("the session has moved to a new connection")
        session.connection = connection
        session.heard = self._clock.seconds
        session.resuming, session.ready = True, False
        session.declared.clear()
        session.lost, session.lost_bytes, session.results = [], 0, []
        return session

    # -- returning -----------------------------------------------------------------------------------------------

    def declare(self, session: SessionState, message: protocol.Declare) -> Reply:
        self._require_resuming(session)
        self._sessions.declare(session, message.opened)
        withdrawn = [operation for operation in message.withdrawn if operation > session.row.acknowledged]
        for start in range(0, len(withdrawn), WITHDRAW_STEP):
            step = withdrawn[start : start + WITHDRAW_STEP]
            self._committer.change(
                session.id,
                0,
                lambda tx, _, step=step: sessions.withdraw(tx, session.id, step),  # type: ignore[misc]
                frees=True,
            )
        return Reply(Empty())

    def resend(self, session: SessionState, message: protocol.Resend) -> Reply:
        self._require_resuming(session)
        session.add_lost(message.changes)
        return Reply(Empty())

    async def resumed(self, session: SessionState) -> Reply:
        """RESUME_DONE: waits for the window, does again what was lost, and tells how that went."""
        if session.resuming:
            session.ready = True
            self._returned.set()
            connection = session.connection
            await self.window.closed.wait()
            if session.connection is not connection:
                raise DfsError(ErrorCode.UNAVAILABLE, "the session has moved to a new connection")
            if session.lost:
                await self._do_again([session])
            await self._release(session)
            session.resuming, session.returned = False, True
            # It had nothing to say while it waited for this answer, for as long as others took to return.
            session.heard = self._clock.seconds
            self._flushing.connected(session)
            log.info("session resumed", session=session.id, host=session.row.host, resent=len(session.results))
        await self._committer.wait_durable(self._committer.newest)
        return Reply(self._page(session), (), 0, self._committer.durable)

    def _page(self, session: SessionState) -> Resumed:
        size = count = 0
        for result in session.results:
            size += len(result.response) + len(result.text) + 32
            if count and size > RESULT_BYTES:
                break
            count += 1
        page, session.results = session.results[:count], session.results[count:]
        return Resumed(tuple(page), bool(session.results))

    async def _release(self, session: SessionState) -> None:
        """What the session no longer has open need not live for it any longer."""
        self._sessions.declared_all(session)
        orphans, _ = self._committer.read(session.id, lambda tx: sessions.orphans_of(tx, session.id))
        for ino in orphans:
            if ino not in session.opened:
                self.release_orphan(session, ino)
                await trio.lowlevel.checkpoint()

    def release_orphan(self, session: SessionState, ino: int) -> None:
        effects = Effects()
        self._committer.change(
            session.id, 0, lambda tx, _: sessions.release_orphan(tx, ino, session.id, effects), frees=True
        )
        self._changes.carry_out(effects)

    def _require_resuming(self, session: SessionState) -> None:
        if not session.resuming or session.ready:
            raise DfsError(ErrorCode.INVALID, "the session is not returning")

    # -- the window ----------------------------------------------------------------------------------------------

    async def keep_window(self) -> None:
        """Runs from the start; returns when the window has closed."""
        start = trio.current_time()
        seconds = self._config.window_seconds
        if not self._committer.boot_lost_tail:
            seconds = min(seconds, NOTHING_LOST_SECONDS)
        while not all(session.ready or session.returned for session in self._sessions.by_id.values()):
            somebody = any(session.resuming and not session.ready for session in self._sessions.by_id.values())
            deadline = start + seconds * (PATIENCE if somebody else 1)
            if trio.current_time() >= deadline:
                break
            self._returned = trio.Event()
            with trio.move_on_at(min(deadline, trio.current_time() + seconds)):
                await self._returned.wait()
        ready = [session for session in self._sessions.by_id.values() if session.ready]
        missing = sum(not session.ready and not session.returned for session in self._sessions.by_id.values())
        await self._do_again(ready)
        try:
            self._committer.window_closed()
        except DfsError as error:
            log.error("the end of the window could not be noted; the next start will wait again", error=str(error))
        await self.window.close()
        log.info("reconnect window closed", returned=len(ready), missing=missing)

    async def _do_again(self, returned: list[SessionState]) -> None:
        """Answered changes of all these sessions first, as they were ordered; then those without an answer."""
        answered: list[tuple[int, int, int, SessionState, Lost, Request[Any]]] = []
        unanswered: list[tuple[int, int, SessionState, Lost, Request[Any]]] = []
        for session in returned:
            lost, session.lost = session.lost, []
            for change in lost:
                request = self._decode(session, change)
                if request is None:
                    continue
                if request.replay is not None:
                    key = request.replay.epoch, request.replay.number, session.id
                    answered.append((*key, session, change, request))
                else:
                    unanswered.append((session.id, change.operation, session, change, request))
        done = 0
        for *_, session, change, request in sorted(answered, key=lambda item: item[:3]):
            self._again(session, change, request)
            done += 1
            if done % YIELD_EVERY == 0:
                await trio.lowlevel.checkpoint()
        for *_, session, change, request in sorted(unanswered, key=lambda item: item[:2]):
            self._again(session, change, request)
            done += 1
            if done % YIELD_EVERY == 0:
                await trio.lowlevel.checkpoint()

    def _decode(self, session: SessionState, change: Lost) -> Request[Any] | None:
        try:
            method = METHODS.get(change.method)
            if method is None:
                raise DfsError(ErrorCode.UNKNOWN_METHOD, f"method {change.method} changes nothing")
            request = method.decode_request(change.request)
            if request.operation != change.operation:
                raise DfsError(ErrorCode.INVALID, "a resent change under another number")
        except DfsError as error:
            session.results.append(Resent(change.operation, b"", error.code, error.text))
            return None
        return request

    def _again(self, session: SessionState, change: Lost, request: Request[Any]) -> None:
        try:
            reply, _ = self._changes.apply(session, change.method, request)
        except DfsError as error:
            if request.replay is not None:
                log.error(
                    "an answered change that was lost cannot be done again", session=session.id,
                    method=METHODS[change.method].name, error=str(error),
                )  # fmt: skip
            session.results.append(Resent(change.operation, b"", error.code, error.text))
        else:
            body = encode(Response(reply.number, reply.durable, reply.message, reply.time_ns, reply.ids))
            session.results.append(Resent(change.operation, body, 0, ""))

    # -- ending --------------------------------------------------------------------------------------------------

    async def end(self, session: SessionState, reason: str) -> None:
        """Ends a session for good; what belongs to it is undone by a task. Returns when that is decided durably."""
        if session.id in self._ending or session.id not in self._sessions.by_id:
            return
        effects = Effects()
        change = self._committer.change(
            0, 0, lambda tx, _: inodes.add_task(tx, TaskKind.EVICT_SESSION, session.id, effects), frees=True
        )
        self._ending.add(session.id)
        # Decided: whoever asked for it may go, but it has to be carried through.
        with trio.CancelScope(shield=True):
            await self._committer.wait_durable(change.number)
        self._sessions.remove(session)
        self._flushing.ended(session)
        self._returned.set()
        for number, task in effects.tasks:
            self._tasks.add(number, task)
        self._ending.discard(session.id)
        log.info("session ended", session=session.id, host=session.row.host, reason=reason)

    def overdue(self) -> list[SessionState]:
        """Sessions that have been silent for longer than their deadline, and do not wait for us to have returned."""
        before = self._clock.seconds - self._config.session_deadline_seconds
        silent = (session for session in self._sessions.by_id.values() if session.heard < before)
        return [session for session in silent if not (session.resuming and session.ready and session.connection)]

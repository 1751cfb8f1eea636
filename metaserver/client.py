"""A mount's side of its session with the metaserver: one connection, kept up; changes that happen exactly once.

Every change is kept from the moment it is sent until it is known to be durable. When the connection breaks, the
session is resumed on a new one: what is open is declared again, changes without an answer are sent again under their
operation number, and so are answered changes that the metaserver lost with the tail of its log (``survived`` tells),
with the ids and times of their first answer. Callers notice a delay and nothing else. See docs/design.md 5.2.4.
"""

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

import msgspec
import structlog
import trio

from metaserver import protocol, transport, wire
from metaserver.clock import steady_ns
from metaserver.connection import Answer, Connection, Incoming, InFlight, Reply, Result, connect_handshake
from metaserver.errors import ConnectionLost, DfsError, ErrorCode
from metaserver.key import ClusterKey
from metaserver.protocol import Opened, ServerAddress
from metaserver.wire import Method

log = structlog.get_logger(__name__)

RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")

DEFAULT_TIMEOUT_SECONDS = 30.0
RECONNECT_FIRST_SECONDS = 0.05
RECONNECT_LAST_SECONDS = 1.0
# The reconnect window is 10 s by default; resuming may take that long and a little more.
RESUME_SECONDS = 60.0
# A page of resent changes stays well below wire.BODY_LIMIT.
RESEND_PAGE_BYTES = 512 << 10
# An opened inode and a withdrawn operation take 20 bytes at most.
DECLARE_PAGE = 10_000
# Above this many changes that are not durable yet, new ones wait for the disk: bounds what is kept for resending.
MAX_UNDURABLE = 20_000
# And so many bytes of them: well below what the metaserver takes from one returning session (256 MiB), with room for
# what is under way. Only commits are large.
MAX_UNDURABLE_BYTES = 64 << 20
# The errors of the handshake that no retry mends.
HOPELESS = frozenset({ErrorCode.WRONG_VERSION, ErrorCode.WRONG_CLUSTER, ErrorCode.BAD_KEY, ErrorCode.WRONG_ROLE})
# Two clocks that NTP keeps drift by less than 50 us in this time.
CLOCK_PERIOD_SECONDS = 10.0
# The metaserver refuses a change so long before the mount gives it up: 20 s of drift at 500 ppm, ten times.
EXPIRY_MARGIN_SECONDS = 0.1
# Changes that make sense only in the session that began them.
SESSION_BOUND = frozenset({protocol.ALLOCATE.number, protocol.COMMIT.number, protocol.SEAL.number})


class SessionIdentity(msgspec.Struct):
    """Who mounts what, for people (``dfs status``) and for the choice of the nearest server."""

    host: str
    mountpoint: str
    pid: int
    subdirectory: bytes = b"/"
    read_only: bool = False


class LostChange(DfsError):
    """A change that had been answered was lost in a crash and could not be done again."""


class Hooks(msgspec.Struct):
    """What the mount does when the metaserver asks. None of them may raise."""

    on_flush: Callable[[Sequence[int]], Awaitable[None]]
    on_changed: Callable[[Sequence[int]], None]
    opened: Callable[[], list[Opened]]
    on_new_session: Callable[[], None]
    dirty_bytes: Callable[[], int] = lambda: 0
    on_retire: Callable[[Sequence[int]], None] = lambda chunks: None
    on_quotas: Callable[[], None] = lambda: None


class RemoteClock:
    """A clock elsewhere, as well as it can be known from what it is said to be in answers: never ahead of it.

    ``clock_ns`` is one here that is never set. Of the answers of a period the one with the shortest way is the closest;
    it is forgotten after two periods, because clocks drift, and because the other one may have been set back.
    """

    def __init__(self, clock_ns: Callable[[], int]) -> None:
        self._clock_ns = clock_ns
        # What it is ahead of ours at least: as found in the last full period, and in the one begun at _period_start.
        self._last_ns: int | None = None
        self._offset_ns: int | None = None
        self._period_start = 0.0

    @property
    def offset_ns(self) -> int | None:
        """How much it is ahead of ours at least; None: nothing is known."""
        if self._last_ns is not None and self._offset_ns is not None and self._last_ns > self._offset_ns:
            return self._last_ns
        return self._offset_ns

    def heard(self, time_ns: int) -> None:
        """An answer that was just received says what time it was there."""
        offset_ns = time_ns - self._clock_ns()
        now = trio.current_time()
        if now - self._period_start > CLOCK_PERIOD_SECONDS:
            self._last_ns, self._offset_ns, self._period_start = self._offset_ns, offset_ns, now
        elif self._offset_ns is None or offset_ns > self._offset_ns:
            self._offset_ns = offset_ns

    def now_ns(self) -> int:
        return self._clock_ns() + (self.offset_ns or 0)

    def forget(self) -> None:
        self._last_ns = self._offset_ns = None


class Change(Generic[ReplyT]):
    """A change that was sent and is not known to be durable; ``answer`` None: not answered yet. Whoever asked for it
    gives it up at ``deadline`` (trio's clock). ``size`` is about what it takes to send it again, in bytes."""

    __slots__ = ("answer", "deadline", "epoch", "error", "message", "method", "operation", "settled", "size")

    def __init__(self, operation: int, method: Method[Any, ReplyT], message: Any, epoch: int, deadline: float) -> None:
        self.operation = operation
        self.method = method
        self.message = message
        self.epoch = epoch
        self.deadline = deadline
        self.size = _size_of(message)
        self.answer: wire.Response[ReplyT] | None = None
        self.error: DfsError | None = None
        self.settled: trio.Event | None = None

    def request(self, expires_ms: int) -> bytes:
        """The encoded request for sending it again."""
        answer = self.answer
        replay = wire.Replay(self.epoch, answer.number, answer.time_ns, answer.ids) if answer else None
        return wire.encode(wire.Request(0, self.epoch, self.operation, self.message, replay, expires_ms))


class MetaClient:
    """A session. Use :func:`open_meta`.

    Invariants: an operation is in ``_changes`` from the moment it is sent until it is durable, failed or withdrawn;
    ``_kept_bytes`` is the sum of their sizes; ``_answered`` holds those of them that have an answer, in the order of
    arrival; ``acknowledged`` is the largest number such that no operation up to it is without an outcome.
    """

    def __init__(
        self,
        host: str,
        port: int,
        key: ClusterKey | None,
        identity: SessionIdentity,
        hooks: Hooks,
        *,
        connect: Callable[[str, int], Awaitable[transport.Transport]] = transport.connect,
        clock_ns: Callable[[], int] = steady_ns,
    ) -> None:
        self.host, self.port = host, port
        self.session = 0
        self.epoch = 0
        self.cluster_id = ""
        # Whether the metaserver said of late that there is little space left.
        self.space_short = False
        self.copies = 0
        self.root: protocol.Attributes
        self.seen = 0
        self.durable = 0
        self.reconnects = 0
        self._key = key
        self._identity = identity
        self._hooks = hooks
        self._connect = connect
        # The newest time the metaserver has told, and its two clocks: that of times of files, which people may set,
        # and the steady one on which changes expire.
        self._latest_ns = 0
        self._wall = RemoteClock(clock_ns)
        self._steady = RemoteClock(_trio_ns)
        self._keep_alive_seconds = 5.0
        self._connection: Connection | None = None
        self._ready = trio.Event()
        self._next_operation = 0
        self._changes: dict[int, Change[Any]] = {}
        self._kept_bytes = 0
        self._unanswered: set[int] = set()
        self._answered: deque[Change[Any]] = deque()
        self._withdrawn: list[int] = []
        # Answered changes that were lost in a crash and could not be done again: how many, of how many somebody has
        # heard, and what is to be said.
        self.lost_changes = 0
        self.lost_told = 0
        self._lost_text = ""
        # Answered changes of a session that has ended, until it is known which of them survived.
        self._left: list[Change[Any]] = []
        self._servers: dict[int, ServerAddress] = {}
        self._closing = False

    # -- asking ------------------------------------------------------------------------------------------------

    async def call(
        self,
        method: Method[RequestT, ReplyT],
        message: RequestT,
        *,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        trace_id: int = 0,
    ) -> ReplyT:
        """Asks; reconnects and asks again as long as ``timeout`` (seconds) allows.

        Raises :class:`DfsError`: what the metaserver answered, or TIMEOUT. A change that times out or is cancelled is
        withdrawn: if it has not happened by then, it never will.
        """
        deadline = trio.current_time() + timeout
        if method.number in protocol.CHANGES:
            if len(self._changes) > MAX_UNDURABLE or self._kept_bytes > MAX_UNDURABLE_BYTES:
                await self._make_durable(deadline)
            return (await self._change(method, message, deadline, trace_id)).message
        while True:
            connection = self._connection
            if connection is None:
                connection = await self._connected(deadline)
            try:
                left = max(0.001, deadline - trio.current_time())
                answer = await connection.start(method, message, timeout=left, trace_id=trace_id).wait()
            except ConnectionLost:
                await self._pause(deadline)
            except DfsError as error:
                if error.code is not ErrorCode.STALE_SESSION:
                    raise
                self._session_lost(connection)
                await self._pause(deadline)
            else:
                self._note(answer.response)
                return answer.message

    async def change(
        self, method: Method[RequestT, ReplyT], message: RequestT, *, timeout: float = DEFAULT_TIMEOUT_SECONDS
    ) -> wire.Response[ReplyT]:
        """:meth:`call` for one of ``protocol.CHANGES``, with the envelope of the answer: ``time_ns`` is the time that
        the metaserver has given the change, which is that of the inodes it touched."""
        deadline = trio.current_time() + timeout
        if len(self._changes) > MAX_UNDURABLE or self._kept_bytes > MAX_UNDURABLE_BYTES:
            await self._make_durable(deadline)
        return await self._change(method, message, deadline, 0)

    async def sync(self, heard: int | None = None, *, timeout: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        """Returns when everything this mount has done or seen is on the metaserver's stable storage.

        Raises :class:`LostChange` if a change that had been answered was lost in a crash and could not be done again,
        to everybody who has not heard of it: ``heard`` of ``lost_changes`` the asker knows; None: as many as anybody.
        """
        await self._make_durable(trio.current_time() + timeout)
        if self.lost_changes > (self.lost_told if heard is None else heard):
            self.lost_told = self.lost_changes
            raise LostChange(ErrorCode.IO, self._lost_text)

    def _note_loss(self, text: str) -> None:
        self.lost_changes += 1
        self._lost_text = text

    async def _make_durable(self, deadline: float) -> None:
        while True:
            if self._connection is None and (self._changes or self._left):
                # In a new epoch nothing is "seen" yet, while what the last one lost is still being sent again.
                await self._connected(deadline)
            epoch, seen = self.epoch, self.seen
            if self.durable < seen:
                await self.call(protocol.SYNC, protocol.Sync(seen), timeout=deadline - trio.current_time())
            if epoch == self.epoch:
                break

    def now_ns(self) -> int:
        """The metaserver's clock: never later than it is there, and later than all it has told this mount.

        So of two things that this mount does one after the other, one stamped here (a write) and one there (a new
        name), the later never looks older: make and rsync depend on it.
        """
        return max(self._wall.now_ns(), self._latest_ns + 1)

    def peer(self, server: int) -> ServerAddress | None:
        """A chunkserver's address if it is known already."""
        return self._servers.get(server)

    @property
    def known_servers(self) -> Sequence[ServerAddress]:
        return [*self._servers.values()]

    async def servers(self) -> dict[int, ServerAddress]:
        """Fetches all addresses anew; :meth:`peer` then knows them."""
        reply = await self.call(protocol.LIST_SERVERS, wire.Empty())
        self.learn(reply.servers)
        return self._servers

    def learn(self, servers: Sequence[ServerAddress]) -> None:
        """Remembers addresses that came along with another answer."""
        self._servers.update({address.server: address for address in servers})

    def in_flight(self) -> Iterator[InFlight]:
        """What the metaserver was asked and has not answered; nothing while there is no connection."""
        return iter(()) if self._connection is None else self._connection.in_flight()

    @property
    def connected(self) -> bool:
        return self._connection is not None

    async def _change(
        self, method: Method[RequestT, ReplyT], message: RequestT, deadline: float, trace_id: int
    ) -> wire.Response[ReplyT]:
        while True:
            connection = self._connection or await self._connected(deadline)
            self._next_operation += 1
            change = Change(self._next_operation, method, message, self.epoch, deadline)
            left = max(0.001, deadline - trio.current_time())
            try:
                pending = connection.start(
                    method, message, timeout=left, epoch=self.epoch, operation=change.operation, trace_id=trace_id,
                    expires_ms=self._expires_ms(deadline),
                )  # fmt: skip
            except ConnectionLost:
                await self._pause(deadline)
                continue
            self._changes[change.operation] = change
            self._kept_bytes += change.size
            self._unanswered.add(change.operation)
            pending.watch(lambda answer, change=change: self._answer(change, answer.response))  # type: ignore[misc]
            try:
                await pending.wait()
            except ConnectionLost:
                await self._settled(change, deadline)
            except trio.Cancelled:
                self._withdraw(change)
                raise
            except DfsError as error:
                if error.code in (ErrorCode.TIMEOUT, ErrorCode.CANCELLED):
                    self._withdraw(change)
                    raise
                self._drop(change)
                if error.code is not ErrorCode.STALE_SESSION or method.number in SESSION_BOUND:
                    if error.code is ErrorCode.STALE_SESSION:
                        self._session_lost(connection)
                    raise
                self._session_lost(connection)
                await self._pause(deadline)
                continue
            assert change.answer is not None
            return change.answer

    async def _settled(self, change: Change[Any], deadline: float) -> None:
        """Waits until a resumed session has brought the outcome of a change whose answer was lost."""
        if change.answer is None and change.error is None:
            change.settled = trio.Event()
            try:
                with trio.fail_after(max(0.0, deadline - trio.current_time())):
                    await change.settled.wait()
            except trio.TooSlowError:
                self._withdraw(change)
                raise DfsError(ErrorCode.TIMEOUT, f"no answer from the metaserver {self._name} in time") from None
            except trio.Cancelled:
                self._withdraw(change)
                raise
        if change.error is not None:
            raise change.error

    # -- bookkeeping: synchronous, so that nothing comes between ---------------------------------------------------

    def _answer(self, change: Change[Any], response: wire.Response[Any]) -> None:
        change.answer = response
        change.epoch = self.epoch
        self._unanswered.discard(change.operation)
        if change.operation in self._changes:
            self._answered.append(change)
        self._note(response)

    def _hear_time(self, server_time_ns: int, steady_ms: int = 0) -> None:
        """An answer that was just received says what time it was there."""
        self._wall.heard(server_time_ns)
        if steady_ms:
            self._steady.heard(steady_ms * 1_000_000)
        if server_time_ns > self._latest_ns:
            self._latest_ns = server_time_ns

    def _expires_ms(self, deadline: float) -> int:
        """When the metaserver must not begin any more with what is given up here at ``deadline``, on its steady clock.

        Our idea of that clock is never ahead of it, so it refuses before we give up, and never carries out afterwards.
        """
        offset_ns = self._steady.offset_ns
        if offset_ns is None:
            return 0
        return max(1, int(1000 * (deadline - EXPIRY_MARGIN_SECONDS)) + offset_ns // 1_000_000)

    def _note(self, response: wire.Response[Any]) -> None:
        if response.time_ns:
            self._hear_time(response.time_ns)
        if response.number > self.seen:
            self.seen = response.number
        if response.durable > self.durable:
            self.durable = response.durable
            answered = self._answered
            while answered and answered[0].answer.number <= self.durable:  # type: ignore[union-attr]
                self._forget(answered.popleft().operation)

    def _forget(self, operation: int) -> None:
        change = self._changes.pop(operation, None)
        if change is not None:
            self._kept_bytes -= change.size

    def _drop(self, change: Change[Any]) -> None:
        self._forget(change.operation)
        self._unanswered.discard(change.operation)

    def _withdraw(self, change: Change[Any]) -> None:
        if change.answer is None:
            self._drop(change)
            self._withdrawn.append(change.operation)

    @property
    def acknowledged(self) -> int:
        return min(self._unanswered) - 1 if self._unanswered else self._next_operation

    # -- the connection ------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return f"{self.host}:{self.port}"

    async def _connected(self, deadline: float) -> Connection:
        with trio.move_on_after(max(0.0, deadline - trio.current_time())):
            while self._connection is None:
                await self._ready.wait()
            return self._connection
        raise DfsError(ErrorCode.TIMEOUT, f"the metaserver {self._name} cannot be reached")

    async def _pause(self, deadline: float) -> None:
        """Between two attempts: lets the other tasks see that the connection is gone, and keeps the deadline."""
        if trio.current_time() >= deadline:
            raise DfsError(ErrorCode.TIMEOUT, f"no answer from the metaserver {self._name} in time")
        await trio.sleep(0.01)

    def _session_lost(self, connection: Connection) -> None:
        if self._connection is connection:
            connection.close("the session has ended")

    async def start(self, nursery: trio.Nursery) -> None:
        """Connects for the first time; any failure is raised. Then keeps the session up in ``nursery``."""
        await nursery.start(self._keep_up)

    async def _keep_up(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        started = False
        delay = RECONNECT_FIRST_SECONDS
        while not self._closing:
            failure: DfsError | None = None
            try:
                async with trio.open_nursery() as nursery:
                    connection = await self._greet()
                    nursery.start_soon(self._run, connection, nursery.cancel_scope)
                    await self._enter(connection)
                    self._connection = connection
                    self._ready.set()
                    delay = RECONNECT_FIRST_SECONDS
                    if started:
                        log.info("reconnected", metaserver=self._name, epoch=self.epoch)
                    else:
                        started = True
                        task_status.started()
                    nursery.start_soon(self._keep_alive, connection)
            except* DfsError as group:
                failure = _first(group)
            if not started:
                raise failure or ConnectionLost(f"{self._name} closed the connection")
            self._disconnected(failure)
            if not self._closing:
                await trio.sleep(delay)
                delay = min(2 * delay, RECONNECT_LAST_SECONDS)

    def _disconnected(self, failure: DfsError | None) -> None:
        if failure is not None and failure.code in HOPELESS:
            log.error("the metaserver refuses this mount", metaserver=self._name, error=str(failure))
        if self._connection is not None and not self._closing:
            self.reconnects += 1
            log.warning("connection to the metaserver lost; reconnecting", metaserver=self._name)
        self._connection = None
        if self._ready.is_set():
            self._ready = trio.Event()

    async def _run(self, connection: Connection, scope: trio.CancelScope) -> None:
        await connection.run()
        scope.cancel()

    async def _greet(self) -> Connection:
        return await connect_handshake(
            await self._connect(self.host, self.port),
            self._pushed,
            key=self._key,
            cluster_id=self.cluster_id,
            role=protocol.CLIENT_ROLE,
            server_role=protocol.ROLE,
            session=self.session,
        )

    async def _enter(self, connection: Connection) -> None:
        """Opens or resumes the session on a fresh connection."""
        try:
            opened = await self._open(connection, self.session)
        except DfsError as error:
            if error.code is not ErrorCode.STALE_SESSION or not self.session:
                raise
            log.error("this mount was evicted: unwritten data is lost, opening a new session", session=self.session)
            self._fail_everything()
            opened = await self._open(connection, 0)
        resuming = opened.session == self.session
        if not resuming:
            self._next_operation = 0
            self._withdrawn = []
        survived = {last.epoch: last.number for last in opened.survived}
        self._note_lost(opened.epoch, survived)
        new_epoch = opened.epoch != self.epoch
        self.session, self.epoch, self.cluster_id = opened.session, opened.epoch, opened.cluster_id
        self.root, self.copies = opened.root, opened.copies
        self._keep_alive_seconds = opened.keep_alive_seconds
        if new_epoch:
            self.seen = self.durable = 0
        if resuming:
            await self._resume(connection, survived)

    async def _open(self, connection: Connection, session: int) -> protocol.SessionOpened:
        who = self._identity
        request = protocol.OpenSession(session, who.host, who.mountpoint, who.pid, who.subdirectory, who.read_only)
        answer = await connection.call(protocol.OPEN_SESSION, request, timeout=RESUME_SECONDS)
        # Perhaps another machine, or another life of it.
        self._steady.forget()
        self._hear_time(answer.message.server_time_ns, answer.message.steady_ms)
        return answer.message

    async def _resume(self, connection: Connection, survived: dict[int, int]) -> None:
        # More may be withdrawn while this goes on: that is told the next time.
        opened, withdrawn = self._hooks.opened(), tuple(self._withdrawn)
        for start in range(0, max(len(opened), len(withdrawn), 1), DECLARE_PAGE):
            stop = start + DECLARE_PAGE
            page = protocol.Declare(tuple(opened[start:stop]), withdrawn[start:stop])
            await connection.call(protocol.DECLARE, page, timeout=RESUME_SECONDS)
        again = self._to_resend(survived)
        for page_of in _pages(again):
            try:
                await connection.call(protocol.RESEND, protocol.Resend(page_of), timeout=RESUME_SECONDS)
            except DfsError as error:
                if error.code is ErrorCode.INVALID:
                    self._cannot_return(error)
                raise
        more = True
        while more:
            answer = await connection.call(protocol.RESUME_DONE, protocol.ResumeDone(), timeout=RESUME_SECONDS)
            for result in answer.message.results:
                self._resent(result)
            more = answer.message.more
        del self._withdrawn[: len(withdrawn)]

    def _cannot_return(self, error: DfsError) -> None:
        """The metaserver does not take what is to be done again, and never will: better a new session than none."""
        log.error(
            "this mount cannot resume its session: unwritten data is lost", session=self.session, error=str(error)
        )
        self._fail_everything()
        self.session = 0

    def _to_resend(self, survived: dict[int, int]) -> list[protocol.Lost]:
        """The changes to send again, in order; forgets those that survived the metaserver's crash."""
        again = []
        for change in sorted(self._changes.values(), key=lambda change: change.operation):
            answer = change.answer
            if answer is not None and change.epoch != self.epoch and answer.number <= survived.get(change.epoch, -1):
                self._forget(change.operation)
            elif answer is None or change.epoch != self.epoch:
                again.append(
                    protocol.Lost(
                        change.operation, change.method.number, change.request(self._expires_ms(change.deadline))
                    )
                )
        self._answered = deque(change for change in self._answered if change.epoch == self.epoch)
        return again

    def _resent(self, result: protocol.Resent) -> None:
        change = self._changes.get(result.operation)
        if change is None:
            return
        if result.response:
            if change.answer is None or change.epoch != self.epoch:
                self._answer(change, change.method.decode_reply(result.response))
        else:
            if change.answer is not None:
                text = f"{change.method.name} was lost in a crash of the metaserver and failed again: {result.text}"
                log.error("lost change", operation=change.operation, error=text)
                self._note_loss(text)
            change.error = DfsError(ErrorCode(result.code), result.text)
            self._drop(change)
        if change.settled is not None:
            change.settled.set()

    def _fail_everything(self) -> None:
        changes, self._changes, self._kept_bytes = self._changes, {}, 0
        self._unanswered.clear()
        self._answered.clear()
        for change in changes.values():
            if change.answer is None:
                change.error = DfsError(ErrorCode.IO, "the session has ended; whether the change happened is unknown")
                if change.settled is not None:
                    change.settled.set()
            else:
                self._left.append(change)
        self._hooks.on_new_session()

    def _note_lost(self, epoch: int, survived: dict[int, int]) -> None:
        """What the ended session was answered and a crash took is an error at the next sync: nobody can send it again.
        What this epoch answered came before the end of the session, which was durable before anybody heard of it."""
        left, self._left = self._left, []
        for change in left:
            assert change.answer is not None
            if change.epoch != epoch and change.answer.number > survived.get(change.epoch, -1):
                text = f"{change.method.name} was lost in a crash of the metaserver, and the session has ended"
                log.error("lost change", operation=change.operation, error=text)
                self._note_loss(text)

    async def _keep_alive(self, connection: Connection) -> None:
        while True:
            await trio.sleep(self._keep_alive_seconds)
            message = protocol.KeepAlive(self.acknowledged, self._hooks.dirty_bytes())
            try:
                answer = await connection.call(protocol.KEEP_ALIVE, message, timeout=2 * self._keep_alive_seconds)
            except DfsError as error:
                connection.close(str(error))
                return
            self._note(answer.response)
            self._hear_time(answer.message.server_time_ns, answer.message.steady_ms)
            self.space_short = answer.message.short

    async def close(self) -> None:
        """Ends the session: nothing of it is left at the metaserver. Bounded; errors are logged only."""
        self._closing = True
        connection = self._connection
        if connection is not None:
            try:
                await connection.call(protocol.CLOSE_SESSION, wire.Empty(), timeout=10)
            except DfsError as error:
                log.warning("could not close the session", error=str(error))
            connection.close()

    # -- pushes --------------------------------------------------------------------------------------------------

    def _pushed(self, connection: Connection, incoming: Incoming) -> Result:
        if incoming.method == protocol.CHANGED.number:
            self._hooks.on_changed(protocol.CHANGED.decode_request(incoming.body).message.inos)
            return Reply(wire.Empty())
        if incoming.method == protocol.RETIRE.number:
            self._hooks.on_retire(protocol.RETIRE.decode_request(incoming.body).message.chunks)
            return Reply(wire.Empty())
        if incoming.method == protocol.QUOTAS_CHANGED.number:
            self._hooks.on_quotas()
            return Reply(wire.Empty())
        if incoming.method == protocol.FLUSH.number:
            return self._flush(connection, protocol.FLUSH.decode_request(incoming.body).message)
        raise DfsError(ErrorCode.UNKNOWN_METHOD, f"method {incoming.method} is not served by a mount")

    async def _flush(self, connection: Connection, request: protocol.Flush) -> Reply:
        await self._hooks.on_flush(request.inos)
        connection.push(protocol.FLUSHED, protocol.Flushed(request.ticket))
        return Reply(wire.Empty())


def _trio_ns() -> int:
    """The clock of deadlines. It stands still while the machine is suspended: what it makes of the metaserver's clock
    is then behind until the next answer, and changes are refused rather early than late."""
    return int(trio.current_time() * 1e9)


def _size_of(message: Any) -> int:
    """About as many bytes as the request has, quickly."""
    if isinstance(message, protocol.Commit):
        return 300 + sum(64 + 40 * len(file.extents) for file in message.files)
    return 300


def _pages(changes: list[protocol.Lost]) -> list[tuple[protocol.Lost, ...]]:
    pages: list[list[protocol.Lost]] = []
    room = 0
    for change in changes:
        size = len(change.request) + 32
        if size > room:
            pages.append([])
            room = RESEND_PAGE_BYTES
        pages[-1].append(change)
        room -= size
    return [tuple(page) for page in pages]


def _first(group: BaseExceptionGroup[DfsError]) -> DfsError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, DfsError)
    return error


@asynccontextmanager
async def open_meta(
    host: str,
    port: int,
    key: ClusterKey | None,
    identity: SessionIdentity,
    hooks: Hooks,
    **options: Any,
) -> AsyncIterator[MetaClient]:
    """A running :class:`MetaClient`; raises :class:`DfsError` if the metaserver cannot be reached or refuses.

    On leaving, the session is closed (shielded from cancellation, bounded by 10 s).
    """
    client = MetaClient(host, port, key, identity, hooks, **options)
    failure: DfsError | None = None
    async with trio.open_nursery() as nursery:
        try:
            await client.start(nursery)
        except DfsError as error:
            failure = error
        else:
            try:
                yield client
            finally:
                with trio.CancelScope(shield=True):
                    await client.close()
                nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


__all__ = ["Answer", "Hooks", "MetaClient", "SessionIdentity", "open_meta"]

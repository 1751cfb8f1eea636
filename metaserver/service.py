"""What a mount can ask for over the data plane: one table from method to handler.

Whatever need not wait is answered at once, without a coroutine. A request waits only for something with a name: the
reconnect window, another session's unwritten data (FLUSH), the durability of what another session changed, a truncate
that is still at work, or a chunkserver to come up.
"""

import struct
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import structlog
import trio

from metaserver import chunks, contents, directories, inodes, namespace, protocol, sessions, xattrs
from metaserver.changes import Applied, Changes
from metaserver.chunks import Rank
from metaserver.clock import LivedClock
from metaserver.commit import Committer
from metaserver.config import Config
from metaserver.connection import Connection, Incoming, Reply, Result
from metaserver.errors import DfsError, ErrorCode
from metaserver.flushing import Flushing
from metaserver.members import Members
from metaserver.outcomes import DOUBTS
from metaserver.protocol import Entry
from metaserver.quotas import Quotas
from metaserver.repair import Repair
from metaserver.resume import Resuming
from metaserver.schema import Session, Transaction
from metaserver.sessions import Sessions, SessionState
from metaserver.tasks import Tasks
from metaserver.timings import Timing
from metaserver.trashing import Trash
from metaserver.wire import Empty, Method, Request

log = structlog.get_logger(__name__)

T = TypeVar("T")

# How long one waits for the space of deleted files, well within what a mount waits for an answer.
FREED_SECONDS = 8.0
# How long an allocation waits for chunkservers, all of which may be registering after a start of everything.
SERVERS_SECONDS = 10.0

Handler = Callable[["Client", Request[Any]], Result]


class Served(NamedTuple):
    """A method and who may ask for it when. ``stranger``: also without a session. ``early``: also while the reconnect
    window is open, or while the session is returning."""

    method: Method[Any, Any]
    handle: Handler
    stranger: bool = False
    early: bool = False


class Client:
    """One connection and the session on it."""

    def __init__(self, service: "Service") -> None:
        self._service = service
        self.session: SessionState | None = None

    @property
    def session_id(self) -> int:
        return 0 if self.session is None else self.session.id

    @property
    def known(self) -> SessionState:
        """The session of a request that needs one."""
        assert self.session is not None
        return self.session

    def dispatch(self, connection: Connection, incoming: Incoming) -> Result:
        """A ``connection.Dispatch``."""
        service = self._service
        served = service.table.get(incoming.method)
        if served is None:
            raise DfsError(ErrorCode.UNKNOWN_METHOD, f"method {incoming.method} is not served by a metaserver")
        service.counts[incoming.method] += 1
        request = served.method.decode_request(incoming.body)
        session = self.session
        if session is not None:
            session.heard = service.clock.seconds
        if not served.early:
            if service.resuming.window.open:
                return service.resuming.window.wait_turn(lambda: self._handle(served, request))
            if session is not None and session.resuming:
                raise DfsError(ErrorCode.INVALID, "the session has to finish returning first")
        elif served.method is protocol.OPEN_SESSION:
            return self._open_session(connection, request.message)
        return self._handle(served, request)

    def _handle(self, served: Served, request: Request[Any]) -> Result:
        session = self.session
        if session is None:
            if not served.stranger:
                raise DfsError(ErrorCode.STALE_SESSION, "open a session first")
        elif session.ended:
            raise DfsError(ErrorCode.STALE_SESSION, f"session {session.id} has ended: start a new one")
        try:
            return served.handle(self, request)
        except struct.error:
            raise DfsError(ErrorCode.INVALID, "a number out of its range") from None
        except DfsError as error:
            # That there is no such name may be news, too.
            wait_for = self._service.committer.wait_for
            if wait_for <= self._service.committer.durable:
                raise
            return self._service.fail_later(error, wait_for)

    async def _open_session(self, connection: Connection, message: protocol.OpenSession) -> Reply:
        if self.session is not None and not self.session.ended:
            raise DfsError(ErrorCode.INVALID, "this connection has a session already")
        self.session, reply = await self._service.resuming.open(connection, message)
        return reply

    def lost(self, connection: Connection) -> None:
        """The connection has ended; the session waits for another one."""
        session = self.session
        if session is not None and session.connection is connection:
            session.connection = None


class Service:
    """The handlers, over the parts that hold the state."""

    def __init__(
        self,
        committer: Committer,
        config: Config,
        clock: LivedClock,
        table: Sessions,
        members: Members,
        changes: Changes,
        flushing: Flushing,
        resuming: Resuming,
        repair: Repair,
        tasks: Tasks,
        trash: Trash,
        quotas: Quotas,
        now_ns: Callable[[], int],
    ) -> None:
        self.committer = committer
        self.config = config
        self.clock = clock
        self.sessions = table
        self.members = members
        self.changes = changes
        self.flushing = flushing
        self.resuming = resuming
        self.repair = repair
        self.tasks = tasks
        self.trash = trash
        self.quotas = quotas
        self._now_ns = now_ns
        self.servers_up = trio.Event()
        # What operators have, for mounts; set by whoever makes all the parts.
        self.status_text: Callable[[], Awaitable[bytes]] = _no_status
        self.set_copies: Callable[[int, int], Awaitable[Any]] = _no_copies
        self._space_told = trio.Event()
        self.table = self._table()
        # Requests by method number, for the metrics.
        self.counts = dict.fromkeys(self.table, 0)
        self.timings = {number: Timing() for number in self.table}
        self.timing_of = self.timings.get

    def _table(self) -> dict[int, Served]:
        change = self._change
        served = [
            Served(protocol.OPEN_SESSION, _never, stranger=True, early=True),
            Served(protocol.DECLARE, lambda c, r: self.resuming.declare(c.known, r.message), early=True),
            Served(protocol.RESEND, lambda c, r: self.resuming.resend(c.known, r.message), early=True),
            Served(protocol.RESUME_DONE, lambda c, r: self.resuming.resumed(c.known), early=True),
            Served(protocol.KEEP_ALIVE, self._keep_alive, early=True),
            Served(protocol.CLOSE_SESSION, lambda c, r: self._close_session(c), early=True),
            Served(protocol.FLUSHED, self._flushed, early=True),
            Served(protocol.SYNC, self._sync, early=True),
            Served(protocol.LOOKUP, self._lookup, stranger=True),
            Served(protocol.GET_ATTRIBUTES, self._get_attributes, stranger=True),
            Served(protocol.READ_DIRECTORY, self._read_directory, stranger=True),
            Served(protocol.GET_XATTR, self._get_xattr, stranger=True),
            Served(protocol.LIST_XATTRS, self._list_xattrs, stranger=True),
            Served(protocol.GET_EXTENTS, self._get_extents, stranger=True),
            Served(protocol.STAT_FS, self._stat_fs, stranger=True),
            Served(protocol.LOCATE, self._locate, stranger=True),
            Served(protocol.LIST_SERVERS, self._list_servers, stranger=True),
            Served(protocol.GET_STATUS, self._get_status, stranger=True),
            Served(protocol.SET_COPIES, self._set_copies),
            Served(protocol.OPEN, self._open),
            Served(protocol.CLOSE, self._close),
            Served(protocol.REPORT_REPLICA, self._report_replica),
            Served(protocol.SET_ATTRIBUTES, self._set_attributes),
            Served(protocol.TOUCH, self._touch),
            Served(protocol.MAKE, self._make),
            Served(protocol.UNLINK, change(protocol.UNLINK)),
            Served(protocol.RENAME, change(protocol.RENAME)),
            Served(protocol.LINK, change(protocol.LINK)),
            Served(protocol.SET_XATTR, change(protocol.SET_XATTR)),
            Served(protocol.REMOVE_XATTR, change(protocol.REMOVE_XATTR)),
            Served(protocol.ALLOCATE, self._allocate),
            Served(protocol.COMMIT, self._commit),
            Served(protocol.SEAL, change(protocol.SEAL)),
            Served(protocol.RESERVE, self._reserve),
        ]
        return {one.method.number: one for one in served}

    # -- answering -----------------------------------------------------------------------------------------------

    def _read(self, client: Client, function: Callable[[Transaction], Any]) -> Result:
        message, wait_for = self.committer.read(client.session_id, function)
        return self._answer(message, wait_for)

    def _answer(self, message: Any, wait_for: int) -> Result:
        reply = Reply(message, (), wait_for, self.committer.durable)
        return self._later(reply, wait_for) if wait_for else reply

    def _finish(self, applied: Applied) -> Result:
        reply, wait_for = applied
        return self._later(reply, wait_for) if wait_for else reply

    async def _later(self, reply: Reply, wait_for: int) -> Reply:
        """A reply that depends on what another session did and could still be lost."""
        await self.committer.wait_durable(wait_for)
        reply.durable = self.committer.durable
        return reply

    async def fail_later(self, error: DfsError, wait_for: int) -> Reply:
        await self.committer.wait_durable(wait_for)
        raise error

    async def _now(self, result: Result) -> Reply:
        return result if isinstance(result, Reply) else await result

    # -- sessions ------------------------------------------------------------------------------------------------

    def _keep_alive(self, client: Client, request: Request[Any]) -> Result:
        session, message = client.known, request.message
        session.dirty_bytes = message.dirty_bytes
        short = self.members.is_short(self.config.copies)
        reply = Reply(
            protocol.KeptAlive(self.resuming.now_ns(), self.changes.steady_ms, short), (), 0, self.committer.durable
        )
        if not session.row.acknowledged < message.acknowledged < 1 << 63 or session.resuming:
            return reply
        return self._acknowledge(session, message.acknowledged, reply)

    async def _acknowledge(self, session: SessionState, up_to: int, reply: Reply) -> Reply:
        def step(tx: Transaction, now_ns: int) -> tuple[Session, bool]:
            return sessions.acknowledge(tx, session.id, session.row, up_to)

        done = False
        while not done and not session.ended:
            session.row, done = self.committer.change(session.id, 0, step, frees=True).message
            await trio.lowlevel.checkpoint()
        return reply

    async def _close_session(self, client: Client) -> Reply:
        session = client.known
        await self.resuming.end(session, "closed")
        client.session = None
        return Reply(Empty(), (), 0, self.committer.durable)

    async def _get_status(self, client: Client, request: Request[Any]) -> Reply:
        return Reply(protocol.StatusText(await self.status_text()), (), 0, self.committer.durable)

    async def _set_copies(self, client: Client, request: Request[Any]) -> Reply:
        if client.known.row.read_only:
            raise DfsError(ErrorCode.READ_ONLY, "this session is read-only")
        await self.set_copies(request.message.ino, request.message.copies)
        return Reply(Empty(), (), 0, self.committer.durable)

    def _flushed(self, client: Client, request: Request[Any]) -> Result:
        self.flushing.flushed(client.known, request.message.ticket)
        return Reply(Empty())

    def _sync(self, client: Client, request: Request[Any]) -> Result:
        # A number of an older epoch has survived or been sent again by now: all of this epoch covers it.
        number = min(request.message.number, self.committer.newest)
        reply = Reply(Empty(), (), number, self.committer.durable)
        return reply if number <= self.committer.durable else self._later(reply, number)

    # -- names and attributes ------------------------------------------------------------------------------------

    def _lookup(self, client: Client, request: Request[Any]) -> Result:
        message, rank = request.message, self.members.rank
        return self._entry(
            client, lambda tx: contents.entry(tx, namespace.lookup(tx, message.parent, message.name), rank)
        )

    def _get_attributes(self, client: Client, request: Request[Any]) -> Result:
        ino, rank = request.message.ino, self.members.rank
        return self._entry(client, lambda tx: contents.entry(tx, ino, rank))

    def _entry(self, client: Client, look: Callable[[Transaction], Entry]) -> Result:
        """Answers with an inode, after fetching what other sessions have written to it and not committed."""
        entry, wait_for = self.committer.read(client.session_id, look)
        ino = entry.attributes.ino
        if ino in self.sessions.writers:
            writers = self.sessions.other_writers((ino,), client.session_id)
            if writers:
                return self._after_flush(client, writers, lambda: self._read(client, look))
        return self._answer(entry, wait_for)

    async def _after_flush(self, client: Client, writers: dict[int, list[int]], answer: Callable[[], Result]) -> Reply:
        await self.flushing.fetch(client.session, writers)
        if client.session is not None and client.session.ended:
            raise DfsError(ErrorCode.STALE_SESSION, "the session has ended meanwhile")
        return await self._now(answer())

    def _read_directory(self, client: Client, request: Request[Any]) -> Result:
        message = request.message
        page, wait_for = self.committer.read(client.session_id, lambda tx: directories.read(tx, message))
        if message.attributes and self.sessions.writers:
            writers = self.sessions.other_writers((entry.ino for entry in page.entries), client.session_id)
            if writers:
                return self._after_flush(
                    client, writers, lambda: self._read(client, lambda tx: directories.read(tx, message))
                )
        return self._answer(page, wait_for)

    def _open(self, client: Client, request: Request[Any]) -> Result:
        session, message, rank = client.known, request.message, self.members.rank
        if message.writing and session.row.read_only:
            raise DfsError(ErrorCode.READ_ONLY, "this session is read-only")
        entry, wait_for = self.committer.read(session.id, lambda tx: contents.entry(tx, message.ino, rank))
        if entry.attributes.nlink == 0 and message.ino not in session.opened:
            self.committer.change(
                session.id, 0, lambda tx, _: sessions.keep_orphan(tx, message.ino, session.id), frees=True
            )
            self.sessions.orphans.add(message.ino)
        self.sessions.open(session, message.ino, writing=message.writing)
        entry.quota = self._quota_for(message)
        writers = self.sessions.other_writers((message.ino,), session.id)
        if writers:
            return self._after_flush(
                client, writers, lambda: self._read(client, lambda tx: self._opened(tx, message, rank))
            )
        return self._answer(entry, wait_for)

    def _opened(self, tx: Transaction, message: protocol.Open, rank: Rank) -> Entry:
        entry = contents.entry(tx, message.ino, rank)
        entry.quota = self._quota_for(message)
        return entry

    def _quota_for(self, message: protocol.Open) -> int:
        return self.quotas.innermost(message.ino) if message.writing and self.quotas.active else 0

    def _reserve(self, client: Client, request: Request[Any]) -> Result:
        message = request.message
        if message.wanted < 0:
            reserved = protocol.Reserved(self.quotas.innermost(message.ino))
        else:
            granted = self.quotas.grant(client.known.id, message.ino, message.wanted, self._now_ns())
            reserved = protocol.Reserved(*granted)
        return Reply(reserved, (), 0, self.committer.durable)

    def _close(self, client: Client, request: Request[Any]) -> Result:
        session = client.known
        for ino in request.message.inos:
            orphan = ino in self.sessions.orphans
            self.sessions.close(session, ino)
            if orphan:
                self.resuming.release_orphan(session, ino)
        return Reply(Empty(), (), 0, self.committer.durable)

    def _get_xattr(self, client: Client, request: Request[Any]) -> Result:
        message = request.message
        return self._read(client, lambda tx: protocol.XattrValue(xattrs.get(tx, message.ino, message.name)))

    def _list_xattrs(self, client: Client, request: Request[Any]) -> Result:
        ino = request.message.ino
        return self._read(client, lambda tx: protocol.XattrNames(tuple(xattrs.names(tx, ino))))

    def _get_extents(self, client: Client, request: Request[Any]) -> Result:
        message, rank = request.message, self.members.rank
        return self._read(client, lambda tx: contents.get_extents(tx, message, rank))

    def _stat_fs(self, client: Client, request: Request[Any]) -> Result:
        ino = request.message.ino
        inode, _ = self.committer.read(client.session_id, lambda tx: inodes.find(tx, ino))
        wanted = 0 if inode is None else inode.storage_class
        total, free = self.members.space(wanted or self.config.copies)
        # What was deleted goes when its space is needed.
        free = min(total, free + self.trash.bytes)
        inodes_in_use = self.changes.inodes - self.trash.files
        stats = protocol.FsStats(total, free, inodes_in_use)
        room = self.quotas.room(ino, self._now_ns())
        return Reply(stats if room is None else _within(stats, *room), (), 0, self.committer.durable)

    # -- changes -------------------------------------------------------------------------------------------------

    def _change(self, method: Method[Any, Any]) -> Handler:
        number, apply, finish = method.number, self.changes.apply, self._finish
        return lambda client, request: finish(apply(client.known, number, request))

    def _set_attributes(self, client: Client, request: Request[Any]) -> Result:
        message = request.message

        def apply() -> Result:
            return self._finish(self.changes.apply(client.known, protocol.SET_ATTRIBUTES.number, request))

        if message.size is None:
            return apply()
        writers = self.sessions.other_writers((message.ino,), client.session_id)
        if writers:
            return self._after_flush(client, writers, lambda: self._grow(client, (message.ino,), apply))
        return self._grow(client, (message.ino,), apply)

    def _touch(self, client: Client, request: Request[Any]) -> Result:
        touched, wait_for = self.changes.touch(client.known, request.message)
        # Nobody waits for these to be durable: number 0.
        return self._finish((Reply(touched, (), 0, self.committer.durable), wait_for))

    def _commit(self, client: Client, request: Request[Any]) -> Result:
        message: protocol.Commit = request.message

        def apply() -> Result:
            reply, wait_for = self.changes.apply(client.known, protocol.COMMIT.number, request)
            return self._finish((reply, max(wait_for, reply.number) if message.durable else wait_for))

        return self._grow(client, (file.ino for file in message.files), apply)

    def _grow(self, client: Client, inos: Iterable[int], apply: Callable[[], Result]) -> Result:
        """Carries out what may make files grow, once nothing is being cut off from them."""
        busy = self.tasks.truncating(inos)
        return self._after_truncate(client, busy, apply) if busy else apply()

    async def _after_truncate(self, client: Client, inos: list[int], apply: Callable[[], Result]) -> Reply:
        await self.tasks.finished(inos)
        if client.known.ended:
            raise DfsError(ErrorCode.STALE_SESSION, "the session has ended meanwhile")
        return await self._now(apply())

    def _make(self, client: Client, request: Request[Any]) -> Result:
        reply, wait_for = self.changes.apply(client.known, protocol.MAKE.number, request)
        made: protocol.Made = reply.message
        ino = made.entry.attributes.ino
        if not made.created:
            writers = self.sessions.other_writers((ino,), client.session_id)
            if writers:
                return self._made_after(client, reply, writers)
        return self._finish((reply, wait_for))

    async def _made_after(self, client: Client, reply: Reply, writers: dict[int, list[int]]) -> Reply:
        """MAKE that has opened a file to which others are writing."""
        ino, rank = reply.message.entry.attributes.ino, self.members.rank
        await self.flushing.fetch(client.session, writers)
        entry, _ = self.committer.read(client.session_id, lambda tx: contents.entry(tx, ino, rank))
        reply.message = protocol.Made(entry, False)
        return await self._later(reply, max(reply.number, self.committer.wait_for))

    def _allocate(self, client: Client, request: Request[Any]) -> Result:
        try:
            return self._allocate_now(client, request)
        except DfsError as error:
            if error.code is ErrorCode.NO_SPACE and self.trash.makes_room:
                return self._allocate_freed(client, request)
            if error.code is not ErrorCode.UNAVAILABLE:
                raise
        return self._allocate_later(client, request)

    def _allocate_now(self, client: Client, request: Request[Any]) -> Result:
        try:
            result = self._finish(self.changes.apply(client.known, protocol.ALLOCATE.number, request))
        except DfsError as error:
            if error.code is ErrorCode.NO_SPACE:
                self.trash.press()
            raise
        self.trash.relieved()
        return result

    async def _allocate_freed(self, client: Client, request: Request[Any]) -> Reply:
        """Waits for the space of deleted files. UNAVAILABLE if it is worth asking again."""
        with trio.move_on_after(FREED_SECONDS):
            while self.trash.makes_room:
                await self._space_told.wait()
                try:
                    return await self._now(self._allocate_now(client, request))
                except DfsError as error:
                    if error.code is not ErrorCode.NO_SPACE:
                        raise
        if self.trash.makes_room:
            raise DfsError(ErrorCode.UNAVAILABLE, "the space of deleted files is being given back")
        return await self._now(self._allocate_now(client, request))

    def space_told(self) -> None:
        """A chunkserver has told how much space it has."""
        self._space_told.set()
        self._space_told = trio.Event()

    async def _allocate_later(self, client: Client, request: Request[Any]) -> Reply:
        """Waits for chunkservers to come up."""
        with trio.move_on_after(SERVERS_SECONDS):
            while True:
                await self.servers_up.wait()
                try:
                    return await self._now(self._allocate_now(client, request))
                except DfsError as error:
                    if error.code is not ErrorCode.UNAVAILABLE:
                        raise
        return await self._now(self._allocate_now(client, request))

    def server_came_up(self) -> None:
        self.servers_up.set()
        self.servers_up = trio.Event()

    # -- chunks --------------------------------------------------------------------------------------------------

    def _locate(self, client: Client, request: Request[Any]) -> Result:
        wanted, rank = request.message.chunks, self.members.rank
        if len(wanted) > protocol.PAGE_ENTRIES:
            raise DfsError(ErrorCode.INVALID, f"more than {protocol.PAGE_ENTRIES} chunks at once")

        def locate(tx: Transaction) -> protocol.Located:
            known = [chunk for chunk in wanted if chunks.find(tx, chunk) is not None]
            return protocol.Located(tuple(chunks.place(tx, chunk, rank) for chunk in known))

        return self._read(client, locate)

    def _list_servers(self, client: Client, request: Request[Any]) -> Result:
        return Reply(protocol.Servers(self.members.addresses(sorted(self.members.by_id))), (), 0)

    def _report_replica(self, client: Client, request: Request[Any]) -> Result:
        message = request.message
        code = ErrorCode(message.code).name if message.code in iter(ErrorCode) else ""
        log.warning(
            "a mount got no good bytes", chunk=f"{message.chunk:x}", server=message.server, error=code,
            text=message.text[:200], host=client.known.row.host,
        )  # fmt: skip
        if code in DOUBTS and not self.changes.refusing:
            changed = self.committer.change(
                client.known.id, 0, lambda tx, _: chunks.doubt(tx, message.chunk, message.server), frees=True
            ).message
            if changed:
                self.repair.doubt(message.chunk, message.server)
        return Reply(Empty(), (), 0, self.committer.durable)


def _within(stats: protocol.FsStats, size: int, used: int, most: int, inodes: int) -> protocol.FsStats:
    """What a filesystem shows in a tree with a quota of ``size`` bytes and ``most`` inodes (0: none)."""
    total, free = stats.total, stats.free
    if size:
        total, free = min(size, used + free), min(free, max(0, size - used))
    return protocol.FsStats(total, free, inodes, max(0, most - inodes) if most else -1)


def _never(client: Client, request: Request[Any]) -> Result:
    raise AssertionError("OPEN_SESSION is dealt with in Client.dispatch")


async def _no_status() -> bytes:
    raise DfsError(ErrorCode.NOT_SUPPORTED, "there is no status here")


async def _no_copies(ino: int, copies: int) -> None:
    raise DfsError(ErrorCode.NOT_SUPPORTED, "copies cannot be set here")

"""Every change a client can ask for: over one transaction, and then in the memory of those whom it concerns.

Synchronous from the first row to the last consequence, so that nothing comes between; also used for what returning
clients have done again.
"""

import stat
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from metaserver import chunks, contents, copies, namespace, protocol, sessions, xattrs
from metaserver.clock import LivedClock
from metaserver.commit import Change, Committer
from metaserver.config import Config
from metaserver.connection import Reply
from metaserver.errors import DfsError, ErrorCode
from metaserver.extents import TooManyRows
from metaserver.inodes import Effects
from metaserver.members import Members
from metaserver.protocol import CHANGED, Allocated, Changed, Commit, Entry, FileCommit, Made, Touched, TouchInodes
from metaserver.quotas import Quotas
from metaserver.repair import Repair
from metaserver.schema import Transaction
from metaserver.sessions import Sessions, SessionState
from metaserver.tasks import Tasks
from metaserver.trashing import Trash
from metaserver.wire import Buffer, Empty, Method, Replay, Request, Response

T = TypeVar("T")
Applied = tuple[Reply, int]

METHODS: dict[int, Method[Any, Any]] = {
    method.number: method
    for method in vars(protocol).values()
    if isinstance(method, Method) and method.number in protocol.CHANGES
}


class Changes:
    """Carries out the methods of ``protocol.CHANGES``. ``refusing``: why no change is taken at present."""

    def __init__(
        self,
        committer: Committer,
        config: Config,
        clock: LivedClock,
        table: Sessions,
        members: Members,
        repair: Repair,
        tasks: Tasks,
        trash: Trash,
        quotas: Quotas,
        steady_ns: Callable[[], int],
    ) -> None:
        self._committer = committer
        self._config = config
        self._clock = clock
        self._sessions = table
        self._members = members
        self._repair = repair
        self._tasks = tasks
        self._trash = trash
        self._quotas = quotas
        self._steady_ns = steady_ns
        self.refusing = ""
        # How many inodes there are.
        self.inodes = 0
        self._table: dict[int, Callable[[SessionState, Request[Any]], Applied]] = {
            protocol.SET_ATTRIBUTES.number: self._set_attributes,
            protocol.MAKE.number: self._make,
            protocol.UNLINK.number: self._unlink,
            protocol.RENAME.number: self._rename,
            protocol.LINK.number: self._link,
            protocol.SET_XATTR.number: self._set_xattr,
            protocol.REMOVE_XATTR.number: self._remove_xattr,
            protocol.ALLOCATE.number: self._allocate,
            protocol.COMMIT.number: self._commit,
            protocol.SEAL.number: self._seal,
        }

    def apply(self, session: SessionState, method: int, request: Request[Any]) -> Applied:
        """Carries out one change: the reply, and the number to wait for before it may leave (0: none)."""
        if session.ended:
            raise DfsError(ErrorCode.STALE_SESSION, f"session {session.id} has ended: start a new one")
        if self.refusing:
            raise DfsError(ErrorCode.READ_ONLY, self.refusing)
        if session.row.read_only:
            raise DfsError(ErrorCode.READ_ONLY, "this session is read-only")
        if request.operation <= 0:
            raise DfsError(ErrorCode.INVALID, "a change needs an operation number")
        if request.operation <= session.row.acknowledged and request.replay is None:
            raise DfsError(ErrorCode.WITHDRAWN, "an operation that its client is done with")
        if request.expires_ms and request.replay is None and self.steady_ms >= request.expires_ms:
            self._refuse_late(session, request.operation)
        return self._table[method](session, request)

    @property
    def steady_ms(self) -> int:
        """The clock on which changes expire."""
        return self._steady_ns() // 1_000_000

    def _refuse_late(self, session: SessionState, operation: int) -> None:
        """A change whose client has given it up, and told so: it must never happen, unless it has already."""

        def withdraw(tx: Transaction, _: int) -> bool:
            return sessions.withdraw(tx, session.id, (operation,)) > 0

        if self._committer.change(session.id, 0, withdraw, frees=True).message:
            raise DfsError(ErrorCode.TIMEOUT, "a change that came after its client had given it up")

    # -- names and attributes ------------------------------------------------------------------------------------

    def _set_attributes(self, session: SessionState, request: Request[Any]) -> Applied:
        message, effects = request.message, Effects()
        if message.size is not None:
            # Also when it is done again: of two tasks that cut one file, the older would cut what came after both.
            self._tasks.finish_truncate(message.ino)
        change = self._change(
            session,
            request,
            protocol.SET_ATTRIBUTES.decode_reply,
            lambda tx, now: contents.set_attributes(tx, now, message, effects),
            frees=True,
        )
        self.carry_out(effects)
        self._tell(session.id, (message.ino,))
        return self._applied(change)

    def _make(self, session: SessionState, request: Request[Any]) -> Applied:
        message = request.message
        rank = self._members.rank

        def make(tx: Transaction, now_ns: int) -> Made:
            ino, inode, created = namespace.make(tx, now_ns, message)
            if created and not message.target:
                empty = protocol.FileMap((), (), 0)
                return Made(Entry(inode.attributes(ino), empty if contents.is_regular(inode) else None), True)
            return Made(contents.entry_of(tx, ino, inode, rank), created)

        change = self._change(session, request, protocol.MAKE.decode_reply, make)
        made = change.message
        if message.open:
            # Of a directory a session wants to hear what others do in it; it never has anything to be fetched.
            ino, writing = made.entry.attributes.ino, not stat.S_ISDIR(made.entry.attributes.mode)
            self._sessions.open(session, ino, writing=writing)
            if writing and self._quotas.active:
                made.entry.quota = self._quotas.innermost(ino)
            if session.resuming and request.replay is None:
                # Its client could not declare what it has no answer about.
                session.declared.add(ino)
        self.inodes += made.created and not change.repeated
        if made.created:
            self._tell(session.id, (message.parent,))
        return self._applied(change)

    def _unlink(self, session: SessionState, request: Request[Any]) -> Applied:
        message, effects = request.message, Effects()
        openers = self._sessions.opened_by
        keep = self._trash.keeper(session.row.host, again=request.replay is not None)
        change = self._change(
            session,
            request,
            protocol.UNLINK.decode_reply,
            lambda tx, now: namespace.unlink(tx, now, message, openers, effects, keep),
            frees=True,
        )
        self.carry_out(effects)
        self._tell(session.id, (message.parent,))
        return self._applied(change)

    def _rename(self, session: SessionState, request: Request[Any]) -> Applied:
        message, effects = request.message, Effects()
        openers = self._sessions.opened_by
        keep = self._trash.keeper(session.row.host, again=request.replay is not None)

        def rename(tx: Transaction, now_ns: int) -> protocol.Renamed:
            renamed = namespace.rename(tx, now_ns, message, openers, effects, keep)
            if request.replay is None:
                self._quotas.require_same(message.parent, message.new_parent)
            return renamed

        change = self._change(
            session,
            request,
            protocol.RENAME.decode_reply,
            rename,
            frees=True,
        )
        self.carry_out(effects)
        self._tell(session.id, (message.parent, message.new_parent))
        return self._applied(change)

    def _link(self, session: SessionState, request: Request[Any]) -> Applied:
        message = request.message

        def link(tx: Transaction, now_ns: int) -> protocol.Attributes:
            linked = namespace.link(tx, now_ns, message)
            if request.replay is None:
                self._quotas.require_link(message.ino, message.new_parent)
            return linked

        change = self._change(session, request, protocol.LINK.decode_reply, link)
        self._tell(session.id, (message.ino, message.new_parent))
        return self._applied(change)

    def _set_xattr(self, session: SessionState, request: Request[Any]) -> Applied:
        message = request.message

        def put(tx: Transaction, now_ns: int) -> Empty:
            xattrs.set_value(tx, now_ns, message)
            return Empty()

        change = self._change(session, request, protocol.SET_XATTR.decode_reply, put)
        self._tell(session.id, (message.ino,))
        return self._applied(change)

    def _remove_xattr(self, session: SessionState, request: Request[Any]) -> Applied:
        message = request.message

        def remove(tx: Transaction, now_ns: int) -> Empty:
            xattrs.remove(tx, now_ns, message.ino, message.name)
            return Empty()

        change = self._change(session, request, protocol.REMOVE_XATTR.decode_reply, remove, frees=True)
        self._tell(session.id, (message.ino,))
        return self._applied(change)

    def touch(self, session: SessionState, message: TouchInodes) -> tuple[Touched, int]:
        """Times of access: what became of them, and the number to wait for. No change of ``protocol.CHANGES``: whatever
        stands against it, they are left as they are."""
        if len(message.touches) > protocol.TOUCH_INODES:
            raise DfsError(ErrorCode.INVALID, f"more than {protocol.TOUCH_INODES} times of access at once")
        if not self.refusing and not session.row.read_only and not session.ended:
            try:
                change = self._committer.change(session.id, 0, lambda tx, _: contents.touch(tx, message.touches))
            except DfsError as error:
                if error.code is not ErrorCode.NO_SPACE:
                    raise
            else:
                return change.message, change.wait_for
        return Touched(tuple(touch.ino for touch in message.touches)), 0

    # -- chunks --------------------------------------------------------------------------------------------------

    def _allocate(self, session: SessionState, request: Request[Any]) -> Applied:
        """The servers follow the chunk in the answer's ids, so that a replay finds the replicas where they are."""
        message, replay = request.message, request.replay
        wanted = message.copies or self._config.copies
        if not 0 < wanted <= copies.MOST_COPIES:
            raise DfsError(ErrorCode.INVALID, f"{wanted} copies: 1 to {copies.MOST_COPIES} are possible")

        def allocate(tx: Transaction, now_ns: int) -> Allocated:
            servers = self._servers_for(message, replay, wanted)
            limit = self._members.limit(servers, message.needed)
            chunk = chunks.allocate(tx, now_ns, session.id, servers, wanted)
            return Allocated(chunk, self._members.addresses(servers), wanted, limit)

        change = self._change(session, request, protocol.ALLOCATE.decode_reply, allocate)
        allocated = change.message
        servers = tuple(address.server for address in allocated.servers)
        if not change.repeated:
            self._members.opened(allocated.chunk, session.id, servers, limit=allocated.limit)
        reply, wait_for = self._applied(change)
        reply.ids = (*change.ids, *servers)
        return reply, wait_for

    def _servers_for(self, message: protocol.Allocate, replay: Replay | None, wanted: int) -> list[int]:
        if replay is not None:
            known = [server for server in replay.ids[1:] if server in self._members.by_id]
            found = known or self._repair.strays.servers(replay.ids[0])
            if found:
                return found
        least = min(wanted, self._config.min_copies)
        needed = self._trash.least(message.needed)
        try:
            return self._members.place_new(wanted, least, message.host, message.avoid, message.never, needed)
        except DfsError as error:
            if error.code is ErrorCode.NO_SPACE:
                self._members.refused_at = self._clock.seconds
            raise

    def _commit(self, session: SessionState, request: Request[Any]) -> Applied:
        message = request.message
        for file in message.files:
            self._tasks.finish_truncate(file.ino)
        effects = Effects()

        def commit(tx: Transaction, now_ns: int) -> protocol.Committed:
            done = contents.commit(tx, now_ns, session.id, message, effects)
            copies.raise_chunks(tx, message.files, done.attributes, self._config.copies)
            return done

        try:
            change = self._change(session, request, protocol.COMMIT.decode_reply, commit, frees=self._takes_commits)
        except TooManyRows:
            self._commit_pieces(session, message)
            effects = Effects()
            change = self._change(session, request, protocol.COMMIT.decode_reply, commit, frees=self._takes_commits)
        self.carry_out(effects)
        for told in message.chunks:
            self._members.progressed(told.chunk, told.length)
        self._tell(session.id, [file.ino for file in message.files])
        return self._applied(change)

    def _commit_pieces(self, session: SessionState, message: Commit) -> None:
        """Puts what replaces very many extents into the maps piece by piece, so that the commit itself finds it done.

        A crash in between leaves a part of each write, as a crash of the writer would have.
        """
        for file in message.files:
            for extent in file.extents:
                position, end = extent.file_offset, extent.file_offset + extent.length
                while position < end:
                    piece = self._first_piece(session, file, extent, position)
                    part = FileCommit(file.ino, file.truncate_generation, 0, None, (piece,))
                    effects = Effects()
                    self._committer.change(
                        session.id,
                        0,
                        lambda tx, now, part=part, effects=effects: contents.commit(  # type: ignore[misc]
                            tx, now, session.id, Commit(message.chunks, (part,)), effects
                        ),
                        frees=self._takes_commits,
                    )
                    self.carry_out(effects)
                    position += piece.length

    def _first_piece(
        self, session: SessionState, file: FileCommit, extent: protocol.Extent, position: int
    ) -> protocol.Extent:
        piece, _ = self._committer.read(session.id, lambda tx: contents.first_piece(tx, file, extent, position))
        return piece

    def _seal(self, session: SessionState, request: Request[Any]) -> Applied:
        message, effects = request.message, Effects()

        def seal(tx: Transaction, now_ns: int) -> Empty:
            row = chunks.require_owned(tx, message.chunk, session.id)
            if chunks.seal(tx, message.chunk, row, message.failed):
                effects.dead.append(message.chunk)
            return Empty()

        change = self._change(session, request, protocol.SEAL.decode_reply, seal, frees=True)
        self._repair.sealed(message.chunk, self._members.closed(message.chunk))
        self.carry_out(effects)
        return self._applied(change)

    @property
    def _takes_commits(self) -> bool:
        """On a full disk, too, as long as the store has space set aside: these bytes are in chunks that were allocated
        before, so that there is an end to it, and whoever wrote them was not told that there is no space."""
        return not self._committer.store_full

    # -- consequences --------------------------------------------------------------------------------------------

    def carry_out(self, effects: Effects) -> None:
        """What follows from a change that has succeeded."""
        self._sessions.orphans.update(effects.orphans)
        self.inodes -= effects.removed
        self._trash.noted(effects.trash)
        for chunk in (*effects.dead, *effects.chunks):
            self._repair.look_at(chunk)
        self._tell(0, effects.changed)
        for number, task in effects.tasks:
            self._tasks.add(number, task)

    def _tell(self, teller: int, inos: Iterable[int]) -> None:
        """Lets sessions other than ``teller`` that have these inodes open drop what they have cached."""
        openers = self._sessions.openers
        for ino in inos:
            others = openers.get(ino)
            if others is None or (len(others) == 1 and teller in others):
                continue
            for other in others:
                state = self._sessions.by_id.get(other)
                if other != teller and state is not None and state.connection is not None:
                    state.connection.push(CHANGED, Changed((ino,)))

    def _change(
        self,
        session: SessionState,
        request: Request[Any],
        decode: Callable[[Buffer], Response[T]],
        function: Callable[[Transaction, int], T],
        *,
        frees: bool = False,
    ) -> Change[T]:
        return self._committer.change(
            session.id, request.operation, function, replay=request.replay, decode=decode, frees=frees
        )

    def _applied(self, change: Change[Any]) -> Applied:
        reply = Reply(change.message, (), change.number, self._committer.durable, change.time_ns, change.ids)
        return reply, change.wait_for

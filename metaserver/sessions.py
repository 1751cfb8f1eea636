"""Who is mounted: sessions, what they have open, and their return after a broken connection or a restart.

What a session has open is kept in memory and declared again by a returning client; only orphans (open without a name)
are rows. The functions over a transaction are the rows' part; :class:`Sessions` is the memory's.
"""

from collections.abc import Callable, Collection, Iterable
from itertools import islice

import msgspec

from metaserver import chunks
from metaserver.connection import Connection
from metaserver.errors import DfsError, ErrorCode
from metaserver.inodes import Effects, release
from metaserver.protocol import QUOTAS_CHANGED, RETIRE, Lost, Opened, Resent, Retire
from metaserver.schema import (
    IdKind,
    Session,
    StoredAnswer,
    Table,
    Transaction,
    answer_key,
    key_u64,
    orphan_key,
    read_u64,
    session_key,
)
from metaserver.wire import Empty

# Rows of one step of trimming answers or of an eviction; a released orphan or a sealed chunk touches several.
STEP_ANSWERS = 2000
STEP_CHUNKS = 200
# Encoded changes a returning session may have waiting: bounds memory, not what a client can have made in seconds.
RESEND_BYTES = 256 << 20

_NOBODY: frozenset[int] = frozenset()


class SessionState:
    """A session as this life of the metaserver knows it. ``heard`` is on the lived clock, in seconds.

    ``resuming``: it has said who it is and must finish declaring and resending first. ``returned``: nothing it did in
    earlier epochs is still unknown here. ``mute``: it left a FLUSH unanswered and has not been heard since.
    """

    def __init__(self, session: int, row: Session, heard: float, *, returned: bool) -> None:
        self.id = session
        self.row = row
        self.heard = heard
        self.connection: Connection | None = None
        self.opened: dict[int, bool] = {}
        self.declared: set[int] = set()
        self.resuming = False
        self.ended = False
        self.returned = returned
        self.ready = False
        self.dirty_bytes = 0
        self.mute = False
        self.flush_waits = 0
        self.lost: list[Lost] = []
        self.lost_bytes = 0
        self.results: list[Resent] = []

    def __repr__(self) -> str:
        return f"<session {self.id} of {self.row.host}>"

    def add_lost(self, changes: Iterable[Lost]) -> None:
        """Keeps changes to be done again; INVALID beyond :data:`RESEND_BYTES`."""
        for change in changes:
            self.lost_bytes += len(change.request) + 64
            if self.lost_bytes > RESEND_BYTES:
                raise DfsError(ErrorCode.INVALID, "too much to do again: start a new session")
            self.lost.append(change)


class Sessions:
    """All sessions and who has what open.

    Invariants: ``session.opened[ino]`` exists if and only if the session is in ``openers[ino]``, and is true if and
    only if it is in ``writers[ino]``; no empty sets are kept, so that "has no writers" is "is not in the dict".
    """

    def __init__(self) -> None:
        self.by_id: dict[int, SessionState] = {}
        self.openers: dict[int, set[int]] = {}
        self.writers: dict[int, set[int]] = {}
        # Told of each session that is over.
        self.removed: Callable[[int], None] = lambda _: None
        # Inodes that may have ORPHANS rows: a close of any other needs no transaction.
        self.orphans: set[int] = set()

    def add(self, session: SessionState) -> None:
        self.by_id[session.id] = session

    def require(self, session: int) -> SessionState:
        found = self.by_id.get(session)
        if found is None:
            raise DfsError(ErrorCode.STALE_SESSION, f"session {session} has ended: start a new one")
        return found

    def opened_by(self, ino: int) -> Collection[int]:
        """Sessions that have ``ino`` open; an ``inodes.Openers``."""
        return self.openers.get(ino, _NOBODY)

    def other_writers(self, inos: Iterable[int], session: int) -> dict[int, list[int]]:
        """Which other sessions may have unwritten data of ``inos``: session to its inodes."""
        found: dict[int, list[int]] = {}
        for ino in inos:
            for writer in self.writers.get(ino, _NOBODY):
                if writer != session:
                    found.setdefault(writer, []).append(ino)
        return found

    def open(self, session: SessionState, ino: int, *, writing: bool) -> None:
        session.opened[ino] = writing or session.opened.get(ino, False)
        self.openers.setdefault(ino, set()).add(session.id)
        if writing:
            self.writers.setdefault(ino, set()).add(session.id)

    def close(self, session: SessionState, ino: int) -> None:
        if session.opened.pop(ino, None) is not None:
            _discard(self.openers, ino, session.id)
            _discard(self.writers, ino, session.id)
            if ino not in self.openers:
                self.orphans.discard(ino)

    def declare(self, session: SessionState, opened: Iterable[Opened]) -> None:
        """What a returning session says it has open; :meth:`declared_all` then forgets the rest."""
        for item in opened:
            orphan = item.ino in self.orphans
            self.close(session, item.ino)
            self.open(session, item.ino, writing=item.writing)
            if orphan:
                self.orphans.add(item.ino)
            session.declared.add(item.ino)

    def declared_all(self, session: SessionState) -> list[int]:
        """Closes what was not declared again; returns it."""
        stale = [ino for ino in session.opened if ino not in session.declared]
        for ino in stale:
            self.close(session, ino)
        session.declared.clear()
        return stale

    def tell_quotas_changed(self) -> None:
        """To every session that is connected."""
        for session in self.by_id.values():
            if session.connection is not None:
                session.connection.push(QUOTAS_CHANGED, Empty())

    def remove(self, session: SessionState) -> None:
        for ino in list(session.opened):
            self.close(session, ino)
        session.ended = True
        self.by_id.pop(session.id, None)
        self.removed(session.id)

    def retire(self, session: int, chunk: int) -> None:
        """Asks a session, if it can be asked now, to end a chunk that it writes."""
        state = self.by_id.get(session)
        if state is not None and state.connection is not None and not state.resuming:
            state.connection.push(RETIRE, Retire((chunk,)))

    def cut_off(self, reason: str) -> None:
        """Ends all connections: clients come back and ask again, here or in the next life."""
        for session in self.by_id.values():
            if session.connection is not None:
                session.connection.close(reason)

    @property
    def missing(self) -> bool:
        """Whether a session of an earlier epoch has not returned: it may still tell of changes unknown here."""
        return any(not session.returned for session in self.by_id.values())


def _discard(index: dict[int, set[int]], ino: int, session: int) -> None:
    members = index.get(ino)
    if members is not None:
        members.discard(session)
        if not members:
            del index[ino]


# -- rows ----------------------------------------------------------------------------------------------------------


def create(tx: Transaction, row: Session) -> int:
    session = tx.allocate(IdKind.SESSION)
    tx.put(Table.SESSIONS, session_key(session), row.pack())
    return session


def load(tx: Transaction) -> list[tuple[int, Session]]:
    return [(read_u64(key), Session.unpack(value)) for key, value in tx.scan(Table.SESSIONS, b"", b"\xff" * 9)]


def acknowledge(tx: Transaction, session: int, row: Session, up_to: int) -> tuple[Session, bool]:
    """Forgets some answers that have arrived: the new row, and whether that were all up to ``up_to``."""
    start, stop = answer_key(session, 0), answer_key(session, up_to + 1)
    keys = [key for key, _ in islice(tx.scan(Table.ANSWERS, start, stop), STEP_ANSWERS)]
    for key in keys:
        tx.delete(Table.ANSWERS, key)
    done = len(keys) < STEP_ANSWERS
    acknowledged = up_to if done else read_u64(keys[-1], 8)
    changed = msgspec.structs.replace(row, acknowledged=acknowledged)
    tx.put(Table.SESSIONS, session_key(session), changed.pack())
    return changed, done


def withdraw(tx: Transaction, session: int, operations: Iterable[int]) -> int:
    """Has operations that have not happened refused for ever; how many of them had not happened."""
    refusal = StoredAnswer(b"", ErrorCode.WITHDRAWN, "withdrawn by its client").pack()
    count = 0
    for operation in operations:
        key = answer_key(session, operation)
        if tx.get(Table.ANSWERS, key) is None:
            tx.put(Table.ANSWERS, key, refusal)
            count += 1
    return count


def orphans_of(tx: Transaction, session: int) -> list[int]:
    """Inodes that live only because of this session (among others)."""
    return [read_u64(key) for key, _ in tx.scan(Table.ORPHANS, b"", b"\xff" * 17) if read_u64(key, 8) == session]


def keep_orphan(tx: Transaction, ino: int, session: int) -> None:
    """An inode that has no name is opened once more."""
    tx.put(Table.ORPHANS, orphan_key(ino, session), b"")


def release_orphan(tx: Transaction, ino: int, session: int, effects: Effects) -> bool:
    """Whether the inode was an orphan of this session."""
    if tx.get(Table.ORPHANS, orphan_key(ino, session)) is None:
        return False
    release(tx, ino, session, effects)
    return True


class EvictionStep(msgspec.Struct):
    """What one step of ending a session did: chunks that were sealed, and whether all is done."""

    sealed: list[int]
    done: bool


def evict_step(tx: Transaction, session: int, open_chunks: Iterable[int], effects: Effects) -> EvictionStep:
    """Seals chunks at their committed lengths, then releases orphans, then forgets answers and the session itself."""
    sealed = []
    for chunk in islice(open_chunks, STEP_CHUNKS):
        row = chunks.find(tx, chunk)
        if row is not None and row.owner == session:
            if chunks.seal(tx, chunk, row, ()):
                effects.dead.append(chunk)
            sealed.append(chunk)
    if sealed:
        return EvictionStep(sealed, False)
    orphans = orphans_of(tx, session)
    if orphans:
        release(tx, orphans[0], session, effects)
        return EvictionStep([], False)
    start, stop = key_u64(session), key_u64(session + 1)
    keys = [key for key, _ in islice(tx.scan(Table.ANSWERS, start, stop), STEP_ANSWERS)]
    for key in keys:
        tx.delete(Table.ANSWERS, key)
    if len(keys) == STEP_ANSWERS:
        return EvictionStep([], False)
    tx.delete(Table.SESSIONS, session_key(session))
    return EvictionStep([], True)

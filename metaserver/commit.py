"""The storage engine as the rest of the metaserver sees it: reads, changes, and waiting until they are durable.

``async with open_committer(directory) as committer`` runs the engine's tasks; see design section 5.2. ``read`` and
``change`` are synchronous: they are atomic, and their effects are visible to the next one when they return. What a
failing disk or a damaged file ends is the whole process: ``read`` and ``change`` raise :class:`EngineFailed` from then
on, no reply leaves any more, and the ``async with`` block is cancelled and raises it.
"""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

import trio

from metaserver import upkeep
from metaserver.engine import Engine, EngineFailed, RunSync, is_cancellation
from metaserver.errors import DfsError, ErrorCode
from metaserver.files import Files
from metaserver.ids import IdsUsedUp
from metaserver.overlay import row_key
from metaserver.protocol import CheckReport
from metaserver.quotas import Charge
from metaserver.schema import BOOT, IdKind, StoredAnswer, Table, Transaction, answer_key
from metaserver.snapshot import Snapshot
from metaserver.start import Options, read_boot_id, start
from metaserver.store import CorruptStore
from metaserver.transaction import ChangeTransaction, ReadTransaction
from metaserver.wire import Buffer, Replay, Response, encode

__all__ = ["Change", "Committer", "EngineFailed", "Options", "RunSync", "open_committer"]

T = TypeVar("T")


class Change(NamedTuple, Generic[T]):
    """What a change did. ``number``, ``time_ns`` and ``ids`` belong into the reply's ``wire.Response``; before it
    leaves, ``wait_for`` has to be durable (0: nothing). ``body`` is the whole encoded response (only with an operation
    number). ``repeated``: it had happened before, and this is the first answer; its number is 0 if that is durable.
    """

    message: T
    number: int
    time_ns: int
    ids: tuple[int, ...]
    wait_for: int
    body: bytes = b""
    repeated: bool = False


class Accounts(Protocol):
    """Keeps account of what changes add to trees (``quotas.py``)."""

    def judge(self, session: int, writes: dict[bytes, bytes | None], now_ns: int, *, enforced: bool) -> Charge | None:
        """Raises ``DfsError`` if the change with these rows, by row key, must not happen; may add rows."""

    def settle(self, charge: Charge) -> None:
        """It has happened."""


class Committer(Engine):
    """One epoch of the metaserver's state. Make it with :func:`open_committer`."""

    # Who looks at each change before it happens, and may refuse it.
    accounts: Accounts | None = None
    # What the reply to the last read() or change() has to wait for, also if that raised.
    wait_for = 0

    def read(self, session: int, function: Callable[[Transaction], T]) -> tuple[T, int]:
        """Runs ``function`` on the current state; returns its result and the number that has to be durable before the
        reply leaves (0: none; also in ``wait_for``, which holds if it raises a ``DfsError`` too)."""
        if self._failure is not None:
            raise self._failed()
        transaction = ReadTransaction(self._layers, session)
        try:
            result = function(transaction)
        except CorruptStore as error:
            raise self.fail(error) from error
        finally:
            self.wait_for = transaction.wait_for
        return result, transaction.wait_for

    def change(
        self,
        session: int,
        operation: int,
        function: Callable[[Transaction, int], T],
        *,
        replay: Replay | None = None,
        decode: Callable[[Buffer], Response[T]] | None = None,
        frees: bool = False,
    ) -> Change[T]:
        """Runs ``function(transaction, now_ns)``: all of it happens, or nothing if it raises.

        With ``operation`` not 0 it happens once: its answer, which must be a ``wire.Message``, is stored with it, and
        returned the next time, decoded by ``decode`` (``Method.decode_reply``). A withdrawn operation raises what was
        stored. ``replay`` makes it happen with the time and ids of its first answer. ``frees`` marks what must work on
        a full disk. Raises ``DfsError`` with no trace, or :class:`EngineFailed`.
        """
        if self._failure is not None:
            raise self._failed()
        while True:
            transaction = ChangeTransaction(self._layers, session, self._source_of_ids(replay))
            try:
                return self._attempt(transaction, operation, function, replay, decode, frees)
            except IdsUsedUp as error:
                self._extend(error.kind)
            except CorruptStore as error:
                raise self.fail(error) from error
            finally:
                self.wait_for = transaction.wait_for

    def _attempt(
        self,
        transaction: ChangeTransaction,
        operation: int,
        function: Callable[[Transaction, int], T],
        replay: Replay | None,
        decode: Callable[[Buffer], Response[T]] | None,
        frees: bool,
    ) -> Change[T]:
        if operation:
            stored = transaction.get(Table.ANSWERS, answer_key(transaction.session, operation))
            if stored is not None:
                return self._repeat(StoredAnswer.unpack(stored), transaction.session, operation, decode)
        # What was answered once and is done again found space then, and is owed now.
        if self.is_full and not frees and replay is None:
            raise DfsError(ErrorCode.NO_SPACE, "the metaserver's disk is full")
        now_ns = self._now()
        if replay is not None:
            # Exactly the first answer's, which lies in the past; what claims otherwise must not move the clock.
            now_ns = min(now_ns, replay.time_ns)
        message = function(transaction, now_ns)
        if self.accounts is None:
            transaction.finish()
            return self._finish(transaction, operation, message, now_ns)
        # What was answered once is owed, whatever it passes.
        charge = self.accounts.judge(transaction.session, transaction.writes, now_ns, enforced=replay is None)
        transaction.finish()
        change = self._finish(transaction, operation, message, now_ns)
        if charge is not None:
            self.accounts.settle(charge)
        return change

    def _finish(self, transaction: ChangeTransaction, operation: int, message: T, now_ns: int) -> Change[T]:
        ids = tuple(transaction.ids)
        if not operation and not transaction.writes:
            return Change(message, 0, now_ns, ids, transaction.wait_for)
        number = self.newest + 1
        body = b""
        if operation:
            body = encode(Response(number, self.durable, message, now_ns, ids))
            transaction.put(Table.ANSWERS, answer_key(transaction.session, operation), StoredAnswer(body).pack())
        self._log_rows(transaction.session, operation, now_ns, transaction.writes)
        if self._ids.wanting:
            self._reserve_ahead()
        return Change(message, number, now_ns, ids, transaction.wait_for, body)

    def _repeat(
        self, stored: StoredAnswer, session: int, operation: int, decode: Callable[[Buffer], Response[T]] | None
    ) -> Change[T]:
        if stored.code:
            raise DfsError(ErrorCode(stored.code), stored.text)
        if decode is None:
            raise DfsError(ErrorCode.INTERNAL, f"operation {operation} of session {session} came twice")
        first = decode(stored.response)
        key = row_key(Table.ANSWERS, answer_key(session, operation))
        number = self._layers.undurable.get(key, (0, 0))[0]
        body = encode(Response(number, self.durable, first.message, first.time_ns, first.ids))
        return Change(first.message, number, first.time_ns, first.ids, 0, body, True)

    # -- ids -----------------------------------------------------------------------------------------------------

    def id_limit(self, kind: IdKind) -> int:
        """Every id of that kind that was ever given out is below it, durably."""
        return self._ids.limit(kind)

    def _source_of_ids(self, replay: Replay | None) -> Callable[[IdKind], int]:
        if replay is None:
            return self._ids.take
        ids = iter(replay.ids)

        def next_id(kind: IdKind) -> int:
            number = next(ids, 0)
            if not 0 < number < self._ids.first(kind):
                raise DfsError(ErrorCode.INVALID, f"a resent change needs another {kind.name.lower()} id than {number}")
            return number

        return next_id

    def _extend(self, kind: IdKind) -> None:
        """Reserves ids while the event loop waits for the disk. Ranges are reserved ahead, so this happens only if a
        sync of the log takes longer than half a range lasts."""
        if not self._ids.is_reserved(kind):
            self._reserve(kind)
        number = self.newest
        try:
            self.log.sync(self.log.unsynced())
        except OSError as error:
            raise self.fail(error) from error
        self._advance(number)

    def _reserve_ahead(self) -> None:
        for kind in tuple(self._ids.wanting):
            # No space: it stays wanted; half a range is left.
            with suppress(DfsError):
                self._reserve(kind)

    def _reserve(self, kind: IdKind) -> None:
        key, value = self._ids.reserve_row(kind)
        self._log_rows(0, 0, self._now(), {key: value})
        self._ids.reserved(kind, self.newest)

    # -- the whole state -----------------------------------------------------------------------------------------

    async def check(self) -> CheckReport:
        """Checks every invariant of a consistent state while requests go on."""
        return await upkeep.check(self)

    async def snapshot(self) -> Snapshot:
        """Makes a snapshot file of everything up to now; the log that it makes superfluous is deleted. Raises
        ``StoreFull``, ``SnapshotFailed`` or :class:`EngineFailed`."""
        return await upkeep.snapshot(self)

    def window_closed(self) -> None:
        """The reconnect window is over: what a lost tail contained has been sent again, or never will be."""
        if self.boot_lost_tail:
            self.boot_lost_tail = False
            self._boot.lost = False
            self.change(
                0, 0, lambda transaction, _: transaction.put(Table.COUNTERS, BOOT, self._boot.pack()), frees=True
            )


async def _run_engine(committer: Committer, scope: trio.CancelScope) -> None:
    with scope:
        chores = (upkeep.keep_snapshots, upkeep.keep_verified, upkeep.keep_recoverable)
        await committer.run(*(partial(chore, committer) for chore in chores))


@asynccontextmanager
async def open_committer(
    directory: Path,
    *,
    clock: Callable[[], int] = time.time_ns,
    run_sync: RunSync = trio.to_thread.run_sync,
    files: Files | None = None,
    options: Options | None = None,
    boot_id: bytes | None = None,
) -> AsyncIterator[Committer]:
    """Starts the engine on a data directory (made ready if it is empty) and runs its tasks for the block.

    Raises ``start.DirectoryBusy``, ``store.CorruptStore``, ``replay.CorruptLog``, ``OSError``; from the block's own
    end :class:`EngineFailed` (in an exception group). Leaving the block normally, or by being cancelled, ends the
    epoch cleanly; any other exception leaves what is in the log to the next start.
    """
    files = files or Files()
    options = options or Options()
    started = await run_sync(start, directory, files, clock, options, boot_id or read_boot_id())
    committer = Committer(directory, started, files, options, run_sync, clock)
    ended = False
    try:
        async with trio.open_nursery() as nursery:
            # Not cancelled before the block has ended: somebody there may have to wait until a change is durable.
            engine_scope = trio.CancelScope(shield=True)
            nursery.start_soon(_run_engine, committer, engine_scope)
            try:
                yield committer
            except BaseException as error:
                ended = is_cancellation(error)
                raise
            finally:
                engine_scope.cancel()
            ended = True
            nursery.cancel_scope.cancel()
    finally:
        try:
            if ended and not committer.failed:
                with trio.CancelScope(shield=True):
                    await committer.end()
        finally:
            committer.close()

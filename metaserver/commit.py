"""The storage engine as the rest of the metaserver sees it: reads, changes, and waiting until they are durable.

``async with open_committer(directory) as committer`` runs the engine's tasks; see design section 5.2. ``read`` and
``change`` are synchronous: they are atomic, and their effects are visible to the next one when they return. What a
failing disk or a damaged file ends is the whole process: ``read`` and ``change`` raise :class:`EngineFailed` from then
on, no reply leaves any more, and the ``async with`` block is cancelled and raises it.
"""

import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import structlog
import trio

from metaserver.changelog import LogFull
from metaserver.errors import DfsError, ErrorCode
from metaserver.files import Files
from metaserver.ids import IdsUsedUp
from metaserver.logrecord import Position
from metaserver.protocol import LastNumber
from metaserver.schema import (
    BOOT,
    Boot,
    IdKind,
    StoredAnswer,
    Table,
    Transaction,
    answer_key,
)
from metaserver.start import Options, Started, position_rows, read_boot_id, start
from metaserver.store import CorruptStore, MapFull, StoreFull, View, row_key
from metaserver.transaction import ChangeTransaction, ReadTransaction
from metaserver.wire import Buffer, Replay, Response, encode

log = structlog.get_logger()

T = TypeVar("T")


# Runs a blocking function elsewhere: ``trio.to_thread.run_sync``, or what a simulation has instead.
RunSync: TypeAlias = Callable[..., Awaitable[Any]]


class EngineFailed(Exception):
    """The disk failed, or a file is damaged: this process must end without another reply."""


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


class Committer:
    """One epoch of the metaserver's state. Make it with :func:`open_committer`."""

    def __init__(self, started: Started, files: Files, options: Options, run_sync: RunSync, clock: Callable[[], int]):
        self.epoch = started.epoch
        self.newest = started.newest
        self.durable = started.newest
        self.survived = tuple(LastNumber(epoch, number) for epoch, number in started.survived.items())
        # A tail of the log may have been lost (also in an earlier start, unless window_closed() was called since).
        self.boot_lost_tail = started.boot.lost
        # New changes are refused with NO_SPACE, those that free something are not.
        self.log_full = False
        self.store_full = False
        # What the reply to the last read() or change() has to wait for, also if that raised.
        self.wait_for = 0
        self.checkpointed = Position(started.epoch, started.newest)
        self.log = started.log
        self.store = started.store
        self._lock = started.lock
        self._boot = started.boot
        self._time_ns = started.replayed.time_ns
        self._layers = started.layers
        self._ids = started.ids
        self._files = files
        self._options = options
        self._run_sync = run_sync
        self._clock = clock
        self._failure: BaseException | None = None
        self._written = trio.Event()
        self._advanced = trio.Event()
        self._rotated = trio.Event()
        self._many_changes = trio.Event()
        self._changes = 0
        self._frozen_at = 0
        self._checkpointing = trio.Lock()
        # Held while the map must stay where it is.
        self.map_lock = trio.Lock()

    # -- reading and changing ------------------------------------------------------------------------------------

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
        if (self.log_full or self.store_full) and not frees:
            raise DfsError(ErrorCode.NO_SPACE, "the metaserver's disk is full")
        now_ns = self._now()
        if replay is not None:
            # Exactly the first answer's, which lies in the past; what claims otherwise must not move the clock.
            now_ns = min(now_ns, replay.time_ns)
        message = function(transaction, now_ns)
        transaction.finish()
        return self._finish(transaction, operation, message, now_ns)

    def _finish(self, transaction: ChangeTransaction, operation: int, message: T, now_ns: int) -> Change[T]:
        ids = tuple(transaction.ids)
        if not operation and not transaction.writes:
            return Change(message, 0, now_ns, ids, transaction.wait_for)
        number = self.newest + 1
        body = b""
        if operation:
            body = encode(Response(number, self.durable, message, now_ns, ids))
            transaction.put(Table.ANSWERS, answer_key(transaction.session, operation), StoredAnswer(body).pack())
        self._log(transaction.session, operation, now_ns, transaction.writes)
        if self._ids.wanting:
            self._reserve_ahead()
        return Change(message, number, now_ns, ids, transaction.wait_for, body)

    def _log(self, session: int, operation: int, now_ns: int, rows: dict[bytes, bytes | None]) -> None:
        """Makes rows the next change: in the page cache, then visible."""
        number = self.newest + 1
        try:
            self.log.append(number, self.durable, session, operation, now_ns, rows)
        except LogFull:
            if self.log_full:
                raise DfsError(ErrorCode.NO_SPACE, "the metaserver's disk is full") from None
            raise DfsError(ErrorCode.UNAVAILABLE, "the next segment of the changelog is not ready") from None
        except OSError as error:
            raise self.fail(error) from error
        self.newest = number
        # A replayed change keeps its old time; the clock does not go back for it.
        self._time_ns = max(self._time_ns, now_ns)
        self._layers.apply(number, session, rows)
        self._written.set()
        if not self.log.prepared:
            self._rotated.set()
        self._changes += 1
        if self._changes >= self._options.checkpoint_changes:
            self._many_changes.set()

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
            if not 0 < number < self._ids.limit(kind):
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
        self._log(0, 0, self._now(), {key: value})
        self._ids.reserved(kind, self.newest)

    # -- durability ----------------------------------------------------------------------------------------------

    async def wait_durable(self, number: int) -> None:
        """Returns once changes up to ``number`` of this epoch are on stable storage. Raises :class:`EngineFailed`, or
        INVALID for a number that does not exist. May be cancelled."""
        if number > self.newest:
            raise DfsError(ErrorCode.INVALID, f"there is no change {number} in epoch {self.epoch}")
        while self.durable < number:
            if self._failure is not None:
                raise self._failed()
            await self._advanced.wait()

    def _now(self) -> int:
        return max(self._clock(), self._time_ns + 1)

    def fail(self, reason: Exception) -> EngineFailed:
        """Stops the engine: no change is accepted any more and the process is made to end. Returns what to raise."""
        if self._failure is None:
            self._failure = reason
            log.critical("metaserver cannot go on", reason=str(reason))
            self._written.set()
            self._advanced.set()
        return self._failed()

    def _failed(self) -> EngineFailed:
        return EngineFailed(str(self._failure))

    def _advance(self, number: int) -> None:
        if number > self.durable:
            self.durable = number
            self._layers.durable(number)
            self._ids.durable(number)
            self._advanced.set()
            self._advanced = trio.Event()

    async def _keep_synced(self) -> None:
        """The log task: group commit, again and again."""
        while True:
            if self._failure is not None:
                raise self._failed()
            if self.newest == self.durable:
                self._written = trio.Event()
                await self._written.wait()
                continue
            await self._sync_once()

    async def _sync_once(self) -> None:
        number, segments = self.newest, self.log.unsynced()
        try:
            await self._run_sync(self.log.sync, segments)
        except OSError as error:
            raise self.fail(error) from error
        self.log.synced(segments)
        self._advance(number)

    async def _keep_prepared(self) -> None:
        """Makes the next segment whenever there is none; notices when the disk is full, and when it no longer is."""
        while True:
            if self.log.prepared:
                self._rotated = trio.Event()
                await self._rotated.wait()
            try:
                await self._run_sync(self.log.prepare)
            except LogFull:
                self._set_full("log_full", True)
                await trio.sleep(self._options.retry_seconds)
            except OSError as error:
                raise self.fail(error) from error
            else:
                self._set_full("log_full", False)

    def _set_full(self, name: str, full: bool) -> None:
        if getattr(self, name) != full:
            setattr(self, name, full)
            log.error("the metaserver's disk is full: only deletions go on" if full else "there is space again")

    # -- checkpoints ---------------------------------------------------------------------------------------------

    async def checkpoint(self) -> None:
        """Writes everything up to now into the store; returns when it is there. Raises :class:`EngineFailed`.

        Cancelled while the disk is full, it goes on with the next checkpoint; nothing is lost.
        """
        async with self._checkpointing:
            if self._layers.frozen is not None:
                await self._write_frozen()
            if len(self._layers.overlay):
                self._freeze()
                await self._write_frozen()

    def _freeze(self) -> None:
        frozen = self._layers.freeze()
        frozen.apply(position_rows(Position(self.epoch, self.newest), self._time_ns))
        self._frozen_at = self.newest
        self._changes = 0
        self._many_changes = trio.Event()

    async def _write_frozen(self) -> None:
        await self.wait_durable(self._frozen_at)
        frozen = self._layers.frozen
        assert frozen is not None
        while True:
            try:
                await self._run_sync(self._write, frozen.rows)
                break
            except MapFull:
                async with self.map_lock:
                    self.store.grow()
                log.info("store grown", **self.store.sizes())
            except StoreFull:
                self._set_full("store_full", True)
                await trio.sleep(self._options.retry_seconds)
            except Exception as error:
                raise self.fail(error) from error
        self.store.renew()
        self._layers.frozen = None
        self.checkpointed = Position(self.epoch, self._frozen_at)
        self._set_full("store_full", False)

    def _write(self, rows: Any) -> None:
        self._files.step("checkpoint:before-commit")
        self.store.write(rows)
        self._files.step("checkpoint:after-commit")

    async def view(self) -> View:
        """A consistent view of everything up to now. Close it soon; it expires when the store's map has to grow."""
        await self.checkpoint()
        return self.store.view()

    async def _keep_checkpointed(self) -> None:
        while True:
            with trio.move_on_after(self._options.checkpoint_seconds):
                await self._many_changes.wait()
            await self.checkpoint()

    # -- start and end -------------------------------------------------------------------------------------------

    def window_closed(self) -> None:
        """The reconnect window is over: what a lost tail contained has been sent again, or never will be."""
        if self.boot_lost_tail:
            self.boot_lost_tail = False
            self._boot.lost = False
            self.change(0, 0, lambda transaction, _: transaction.put(Table.COUNTERS, BOOT, self._boot.pack()))

    async def run(self) -> None:
        """The engine's tasks. Ends by being cancelled, or raises because something has failed."""
        try:
            async with trio.open_nursery() as nursery:
                for task in (self._keep_synced, self._keep_prepared, self._keep_checkpointed):
                    nursery.start_soon(task)
        except trio.Cancelled:
            raise
        except BaseException as error:
            self._failure = self._failure or error
            raise

    @property
    def failed(self) -> bool:
        return self._failure is not None

    async def end(self) -> None:
        """A stop on purpose: everything goes into the store, and the next start need not ask clients what they have."""
        await self._sync_once()
        boot = Boot(self._boot.boot_id, True, self._boot.lost)
        self._layers.overlay.apply({row_key(Table.COUNTERS, BOOT): boot.pack()})
        with trio.move_on_after(self._options.checkpoint_seconds):
            await self.checkpoint()

    def close(self) -> None:
        self.log.close()
        self.store.close()
        os.close(self._lock)


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
    end :class:`EngineFailed` (in an exception group). Leaving the block normally ends the epoch cleanly.
    """
    files = files or Files()
    options = options or Options()
    started = await run_sync(start, directory, files, clock, options, boot_id or read_boot_id())
    committer = Committer(started, files, options, run_sync, clock)
    ended = False
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(committer.run)
            try:
                yield committer
            except trio.Cancelled:
                ended = True
                raise
            ended = True
            nursery.cancel_scope.cancel()
    finally:
        try:
            if ended and not committer.failed:
                with trio.CancelScope(shield=True):
                    await committer.end()
        finally:
            committer.close()

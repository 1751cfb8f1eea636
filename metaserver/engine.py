"""The moving parts under reads and changes: log, overlay and store, and the tasks that make changes durable.

One task syncs the log again and again (group commit), one makes the next segment, one writes checkpoints. All state
belongs to the event loop; worker threads only sync, write what is frozen, and make files.
"""

import os
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import structlog
import trio

from metaserver import trees
from metaserver.changelog import LogFull, NoBlocks
from metaserver.errors import DfsError, ErrorCode, ProcessEnds
from metaserver.files import Files, is_full
from metaserver.logrecord import Position
from metaserver.overlay import Rows, row_key
from metaserver.protocol import LastNumber
from metaserver.schema import BOOT, Boot, Table
from metaserver.start import PROBE_NAME, RESERVE_NAME, Options, Started, make_reserve, position_rows
from metaserver.store import CorruptStore, MapFull, StoreFull, View
from metaserver.transaction import Layers

log = structlog.get_logger()

# On a full disk a checkpoint is made after this part of the usual number of changes.
FULL_PART = 20

# Runs a blocking function elsewhere: ``trio.to_thread.run_sync``, or what a simulation has instead.
RunSync: TypeAlias = Callable[..., Awaitable[Any]]


class EngineFailed(ProcessEnds):
    """The disk failed, or a file is ``damaged``: this process must end without another reply."""

    def __init__(self, text: str, *, damaged: bool = False) -> None:
        super().__init__(text)
        self.damaged = damaged


class Recovery(NamedTuple):
    """What was found when snapshot files and old segments were last read back, and when (trio's clock).
    ``endangered``: the store perhaps cannot be rebuilt."""

    checked_at: float
    problems: Sequence[str]
    endangered: bool


def is_cancellation(error: BaseException) -> bool:
    """Whether this is trio's cancellation and nothing else."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.Cancelled)[1] is None
    return isinstance(error, trio.Cancelled)


class Engine:
    """One epoch of the metaserver's state. ``commit.Committer`` is what others use."""

    def __init__(
        self,
        directory: Path,
        started: Started,
        files: Files,
        options: Options,
        run_sync: RunSync,
        clock: Callable[[], int],
    ) -> None:
        self.directory = directory
        self.epoch = started.epoch
        self.newest = started.newest
        self.durable = started.newest
        self.survived = tuple(LastNumber(epoch, number) for epoch, number in started.survived.items())
        # A tail of the log may have been lost (also in an earlier start, unless window_closed() was called since).
        self.boot_lost_tail = started.boot.lost
        # New changes are refused with NO_SPACE, those that free something are not.
        self.log_full = False
        self.store_full = False
        self.recovery: Recovery | None = None
        # Why the last snapshot file could not be made, other than for want of space; "" if it could.
        self.snapshot_failure = ""
        self.checkpointed = Position(started.epoch, started.newest)
        self.log = started.log
        self.store = started.store
        self._lock = started.lock
        self._boot = started.boot
        self._time_ns = started.replayed.time_ns
        self._layers = started.layers
        self._ids = started.ids
        self.files = files
        self.options = options
        self.run_sync = run_sync
        self._clock = clock
        self._failure: BaseException | None = None
        # Called in the moment of a failure, so that nobody is told that what may be in the log has failed.
        self.on_failure: Callable[[], None] = lambda: None
        self._written = trio.Event()
        # Somebody waits for the log to be synced.
        self._wanted = trio.Event()
        self._advanced = trio.Event()
        self._rotated = trio.Event()
        self._many_changes = trio.Event()
        # The disk is full, and there is little room left in the log.
        self._crowded = trio.Event()
        # A record found no space where there should have been some: the reserve is needed.
        self._no_blocks = False
        self._changes = 0
        self._frozen_at = 0
        self._checkpointing = trio.Lock()
        # Held while the map must stay where it is.
        self.map_lock = trio.Lock()

    def _log_rows(self, session: int, operation: int, now_ns: int, rows: Rows) -> None:
        """Makes rows the next change: in the page cache, then visible."""
        number = self.newest + 1
        try:
            self.log.append(number, self.durable, session, operation, now_ns, rows)
        except LogFull as error:
            if isinstance(error, NoBlocks):
                self._no_blocks = True
                self._set_full("log_full", True)
                self._rotated.set()
                self._crowded.set()
            raise DfsError(ErrorCode.NO_SPACE, "the metaserver's disk is full") from None
        except OSError as error:
            raise self.fail(error) from error
        self.newest = number
        # A replayed change keeps its old time; the clock does not go back for it.
        self._time_ns = max(self._time_ns, now_ns)
        self._layers.apply(number, session, rows)
        self._written.set()
        if not self.log.prepared:
            self._rotated.set()
            if self.log_full and self.log.needs_next:
                self._crowded.set()
        self._changes += 1
        # On a full disk more often: what a checkpoint writes has to fit into what is set aside for it.
        many = self.options.checkpoint_changes // (FULL_PART if self.is_full else 1)
        if self._changes >= many:
            self._many_changes.set()

    # -- durability ----------------------------------------------------------------------------------------------

    async def wait_durable(self, number: int) -> None:
        """Returns once changes up to ``number`` of this epoch are on stable storage. Raises :class:`EngineFailed`, or
        INVALID for a number that does not exist. May be cancelled."""
        if number > self.newest:
            raise DfsError(ErrorCode.INVALID, f"there is no change {number} in epoch {self.epoch}")
        while self.durable < number:
            if self._failure is not None:
                raise self._failed()
            self._wanted.set()
            await self._advanced.wait()

    def _now(self) -> int:
        return max(self._clock(), self._time_ns + 1)

    def fail(self, reason: Exception) -> EngineFailed:
        """Stops the engine: no change is accepted any more and the process is made to end. Returns what to raise."""
        if self._failure is None:
            self._failure = reason
            self._wanted.set()
            log.critical("metaserver cannot go on", reason=str(reason))
            self._written.set()
            self._advanced.set()
            self.on_failure()
        return self._failed()

    def _failed(self) -> EngineFailed:
        return EngineFailed(str(self._failure), damaged=isinstance(self._failure, CorruptStore))

    def _advance(self, number: int) -> None:
        if number > self.durable:
            self.durable = number
            self._layers.durable(number)
            self._ids.durable(number)
            self._advanced.set()
            self._advanced = trio.Event()

    async def _keep_synced(self) -> None:
        """The log task: group commit, again and again; at once if somebody waits for it."""
        while True:
            if self._failure is not None:
                raise self._failed()
            if self.newest == self.durable:
                self._written = trio.Event()
                await self._written.wait()
                continue
            with trio.move_on_after(self.options.unhurried_seconds):
                await self._wanted.wait()
            self._wanted = trio.Event()
            await self._sync_once()

    async def _sync_once(self) -> None:
        number, batch = self.newest, self.log.unsynced()
        try:
            await self.run_sync(self.log.sync, batch)
        except OSError as error:
            raise self.fail(error) from error
        self.log.synced(batch)
        self._advance(number)

    async def _keep_prepared(self) -> None:
        """Makes the next segment whenever there is none; notices when the disk is full, and when it no longer is."""
        while True:
            if self.log.prepared and not self.log_full:
                self._rotated = trio.Event()
                await self._rotated.wait()
            refused, self._no_blocks = self._no_blocks, False
            try:
                await self.run_sync(self._prepare)
            except LogFull:
                self._set_full("log_full", True)
                if refused:
                    await self._spend_reserve()
                if self.log.needs_next:
                    await self._make_next()
                self._crowded = trio.Event()
                with trio.move_on_after(self.options.retry_seconds):
                    await self._crowded.wait()
            except OSError as error:
                raise self.fail(error) from error
            else:
                # Unless a record was refused meanwhile: then there has to be another look.
                if not self._no_blocks:
                    self._set_full("log_full", False)

    def _prepare(self) -> None:
        """Makes everything that is set aside for a full disk. Raises :class:`LogFull` if there is no space for it."""
        try:
            self.log.prepare()
            self.store.reserve(self.options.store_reserve_bytes)
            if self.log_full:
                self._probe()
            make_reserve(self.directory, self.options, self.files)
        except OSError as error:
            if is_full(error):
                raise LogFull from error
            raise

    def _probe(self) -> None:
        """What is there may be all there is; whether more can be had is seen by trying. The reserve counts as well, and
        is not made before: it would take back at once what was spent of it."""
        probe = self.directory / PROBE_NAME
        missing = 0 if (self.directory / RESERVE_NAME).exists() else self.options.reserve_bytes
        self.files.reserve(probe, self.options.segment_bytes + missing)
        self.files.delete(probe)

    async def _make_next(self) -> None:
        """Deletions go on for as long as it takes: an old segment is used again, once the store has what it says."""
        with trio.move_on_after(self.options.checkpoint_seconds):
            await self.checkpoint()
        recycled = self.log.recycled
        try:
            await self.run_sync(partial(self.log.prepare, recycling=True))
        except LogFull:
            await self._spend_reserve()
        except OSError as error:
            raise self.fail(error) from error
        if self.log.recycled > recycled == 0:
            log.error("the changelog is used again: until a snapshot file can be made, the store cannot be rebuilt")

    async def _spend_reserve(self) -> None:
        reserve = self.directory / RESERVE_NAME
        if reserve.exists():
            log.error("the reserve is used up")
            await self.run_sync(self.files.delete, reserve)

    @property
    def layers(self) -> Layers:
        return self._layers

    @property
    def is_full(self) -> bool:
        """Whether changes that take space are refused."""
        return self.log_full or self.store_full

    @property
    def unprotected(self) -> bool:
        """Whether the store perhaps could not be rebuilt now."""
        endangered = self.recovery is not None and self.recovery.endangered
        return bool(self.log.recycled or self.snapshot_failure or endangered)

    def _set_full(self, name: str, full: bool) -> None:
        before = self.is_full
        setattr(self, name, full)
        if self.is_full != before:
            if full:
                log.error("the metaserver's disk is full: only what frees space goes on")
            else:
                log.info("there is space again")

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
                await self.run_sync(self._write, frozen.rows)
                break
            except MapFull:
                if await self._grow():
                    log.info("store grown", **self.store.sizes())
                else:
                    await self._wait_for_space()
            except StoreFull:
                await self._wait_for_space()
            except Exception as error:
                raise self.fail(error) from error
        self.store.renew()
        self._layers.frozen = None
        self.checkpointed = self.log.obsolete = Position(self.epoch, self._frozen_at)
        self._set_full("store_full", False)
        # The store may have grown into what is set aside.
        self._rotated.set()

    async def _wait_for_space(self) -> None:
        """Refuses what takes space, and waits a moment for some."""
        self._set_full("store_full", True)
        await self._spend_reserve()
        await trio.sleep(self.options.retry_seconds)

    async def _grow(self) -> bool:
        """Doubles the store's map; False if the disk is too full for that."""
        async with self.map_lock:
            try:
                self.store.grow()
                return True
            except Exception as error:
                if isinstance(error, OSError) and is_full(error):
                    return False
                text = f"the store's map cannot grow: {error}; is the address space or the size of files limited?"
                raise self.fail(OSError(text)) from error

    def _write(self, rows: Any) -> None:
        self.files.step("checkpoint:before-commit")
        self.store.write(rows, trees.changed)
        self.files.step("checkpoint:after-commit")

    async def view(self) -> View:
        """A consistent view of everything up to now. Close it soon; it expires when the store's map has to grow."""
        await self.checkpoint()
        return self.store.view()

    async def _keep_checkpointed(self) -> None:
        while True:
            with trio.move_on_after(self.options.checkpoint_seconds):
                await self._many_changes.wait()
            await self.checkpoint()

    # -- start and end -------------------------------------------------------------------------------------------

    async def run(self, *others: Callable[[], Awaitable[None]]) -> None:
        """The engine's tasks and some more. Ends by being cancelled, or raises because something has failed."""
        try:
            async with trio.open_nursery() as nursery:
                for task in (self._keep_synced, self._keep_prepared, self._keep_checkpointed, *others):
                    nursery.start_soon(task)
        except BaseException as error:
            if not is_cancellation(error):
                self._failure = self._failure or error
                # Nobody will sync any more: who waits for that, perhaps shielded, must not wait for ever.
                self._advanced.set()
            raise

    @property
    def failed(self) -> bool:
        return self._failure is not None

    async def end(self) -> None:
        """A stop on purpose: everything goes into the store, and the next start need not ask clients what they have."""
        await self._sync_once()
        boot = Boot(self._boot.boot_id, True, self._boot.lost)
        self._layers.overlay.apply({row_key(Table.COUNTERS, BOOT): boot.pack()})
        with trio.move_on_after(self.options.checkpoint_seconds):
            await self.checkpoint()

    def close(self) -> None:
        self.log.close()
        self.store.close()
        os.close(self._lock)

"""The trash as it lives: what is put into it, how much there is, and when it goes (rows: ``trash.py``).

Entries go when they expire, when there are more than ``trash_files``, and at once, those first that expire first, when
the disks need the space: a part of them is kept free of it, and a writer who finds none waits until enough of it has
gone. Nobody meets ``ENOSPC`` because of what was deleted.
"""

from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice

import structlog
import trio

from metaserver import space, trash
from metaserver.clock import LivedClock
from metaserver.commit import Committer
from metaserver.config import Config
from metaserver.inodes import Effects, Keep, Leaving, TrashChange, keep_nothing
from metaserver.members import Members
from metaserver.protocol import TrashStatus
from metaserver.schema import Table, Transaction, Trashed
from metaserver.trash import Purged

log = structlog.get_logger(__name__)

TICK_SECONDS = 1.0
# Between two steps where nothing is waiting for space: what was deleted yesterday must not slow down today's work.
PAUSE_SECONDS = 0.02
# Rows counted between two turns of others, after a start: about 2 ms.
COUNT_ROWS = 500
# A refusal for lack of space is news for so long; then it is pressing no more.
PRESSED_SECONDS = 5.0
# How long it takes until a deleted chunk is told as free space, beside the grace: orders, and then heartbeats.
GIVEN_BACK_SECONDS = 6.0
# What is purged at first when a writer has found no space; twice as much for each further time it takes to come back.
FIRST_BYTES = 8 * space.LEAST_LIMIT
# Writers wait no longer for space to come back.
PATIENCE_SECONDS = 20.0
_NEVER = float("-inf")
_END = b"\xff" * 17
_EVERYTHING = (1 << 64) - 1


class Trash:
    """Invariant: ``files`` and ``bytes`` are what has keys below ``_counted_to`` (None: everything is counted)."""

    def __init__(
        self, committer: Committer, config: Config, members: Members, clock: LivedClock, now_ns: Callable[[], int]
    ) -> None:
        self._committer = committer
        self._config = config
        self._members = members
        self._clock = clock
        self.now_ns = now_ns
        self.carry_out: Callable[[Effects], None]
        self.files = 0
        self.bytes = 0
        self._counted_to: bytes | None = b""
        # When and how many bytes were purged of late.
        self._purged: deque[tuple[float, int]] = deque()
        self._pressed = trio.Event()
        # When somebody last found no space, and since when nobody has found any.
        self._pressed_at = _NEVER
        self._pressed_since: float | None = None

    # -- what is put into it ---------------------------------------------------------------------------------------

    def keeper(self, host: str, *, again: bool) -> Keep:
        """What decides for a change that a mount on ``host`` asks for. ``again``: it was answered once and is done
        again: whatever has changed since, it must not need ids that the first answer has not."""
        if self._committer.is_full and not again:
            return keep_nothing

        def keep(tx: Transaction, now_ns: int, leaving: Leaving, effects: Effects) -> bool:
            if not trash.is_worth_keeping(leaving.inode):
                return False
            seconds = self._config.trash_seconds
            if not seconds and (not again or trash.goes_at_once(tx, leaving.ino, leaving.inode)):
                return False
            trash.put(tx, now_ns, leaving, now_ns + int(seconds * 1e9), host, effects)
            return True

        return keep

    def noted(self, changes: Iterable[TrashChange]) -> None:
        """Changes of rows that have happened."""
        for change in changes:
            if self._counted_to is None or change.key < self._counted_to:
                self.files += change.files
                self.bytes += change.bytes

    def status(self) -> TrashStatus:
        return TrashStatus(self.files, self.bytes, self._config.trash_seconds, self._counted_to is None)

    # -- who needs space -------------------------------------------------------------------------------------------

    @property
    def makes_room(self) -> bool:
        """Whether space may come back for somebody who has found none."""
        since = self._pressed_since
        if since is not None and self._clock.seconds - since > PATIENCE_SECONDS:
            return False
        return self.files > 0 or self._counted_to is not None or self._on_its_way(GIVEN_BACK_SECONDS) > 0

    def least(self, needed: int) -> int:
        """How many bytes a new chunk must take, of which a writer needs so many (0: all that a chunk can): as long as
        there may be more space soon, none is handed out that is too small to be of much use."""
        return max(needed, space.LEAST_LIMIT) if needed and self.makes_room else needed

    def press(self) -> None:
        """Somebody has found no space."""
        now = self._clock.seconds
        if self._pressed_since is None or not self._is_pressed:
            self._pressed_since = now
        self._pressed_at = now
        self._pressed.set()

    def relieved(self) -> None:
        """Somebody has found space."""
        self._pressed_at = _NEVER
        self._pressed_since = None

    @property
    def _is_pressed(self) -> bool:
        return self._clock.seconds - self._pressed_at <= PRESSED_SECONDS

    def _lacking(self) -> int:
        """Bytes that have to be purged now."""
        total, free = self._members.working_space(self._config.copies)
        lacking = space.kept_free(total) - free
        if not self._is_pressed:
            return lacking - self._on_its_way(self._config.delete_grace_seconds + GIVEN_BACK_SECONDS)
        since = self._clock.seconds if self._pressed_since is None else self._pressed_since
        waited = int((self._clock.seconds - since) / GIVEN_BACK_SECONDS)
        return max(lacking, FIRST_BYTES << min(waited, 20)) - self._on_its_way(GIVEN_BACK_SECONDS)

    def _on_its_way(self, seconds: float) -> int:
        """Bytes purged so recently that nobody can have seen them as free."""
        longest = self._config.delete_grace_seconds + GIVEN_BACK_SECONDS
        now = self._clock.seconds
        while self._purged and now - self._purged[0][0] > longest:
            self._purged.popleft()
        return sum(count for at, count in self._purged if now - at <= seconds)

    # -- what goes ---------------------------------------------------------------------------------------------------

    async def tick(self) -> None:
        """Purges what is due; call about once a second, and at once when :meth:`pause` returns."""
        while self._counted_to is not None:
            self._count()
            await trio.lowlevel.checkpoint()
        while self._purge_due():
            if self._is_pressed:
                await trio.lowlevel.checkpoint()
            else:
                await trio.sleep(PAUSE_SECONDS)

    async def pause(self) -> None:
        """Until the next tick is due, or somebody needs space."""
        with trio.move_on_after(TICK_SECONDS):
            await self._pressed.wait()
        self._pressed = trio.Event()

    def _purge_due(self) -> bool:
        """One step of what has to go now; whether there may be more."""
        lacking = self._lacking() if self.files else 0
        if lacking > 0:
            step = self._step(_EVERYTHING, lacking)
        elif self.files > self._config.trash_files:
            step = self._step(_EVERYTHING, _EVERYTHING, self.files - self._config.trash_files)
        else:
            step = self._step(self.now_ns(), _EVERYTHING)
        return step.entries > 0

    def _step(self, until_ns: int, enough: int, most: int = trash.PURGE_ENTRIES) -> Purged:
        return self.carry_through(lambda tx, effects: trash.purge_step(tx, until_ns, enough, effects, most))

    def carry_through(self, purge: Callable[[Transaction, Effects], Purged]) -> Purged:
        """One change that purges something, with all that follows from it."""

        def change(tx: Transaction, _: int) -> tuple[Purged, Effects]:
            # Made here: the change is tried again if ids have to be reserved first.
            effects = Effects()
            return purge(tx, effects), effects

        step, effects = self._committer.change(0, 0, change, frees=True).message
        if step.entries:
            self.carry_out(effects)
            self._purged.append((self._clock.seconds, step.bytes))
        return step

    def _count(self) -> None:
        """Goes on counting what earlier epochs left."""
        start = self._counted_to
        assert start is not None

        def page(tx: Transaction) -> list[tuple[bytes, Trashed]]:
            rows = islice(tx.scan(Table.TRASH, start, _END), COUNT_ROWS)
            return [(key, Trashed.unpack(value)) for key, value in rows]

        found, _ = self._committer.read(0, page)
        self.files += len(found)
        self.bytes += sum(row.allocated for _, row in found)
        self._counted_to = found[-1][0] + b"\0" if len(found) == COUNT_ROWS else None
        if self._counted_to is None and self.files:
            log.info("deleted files are kept", files=self.files, bytes=self.bytes)

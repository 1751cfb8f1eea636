"""What happens by itself: the lived clock, silent servers and sessions, tasks, repair, cleaning. Nothing of it in
the reconnect window, and nothing at all but the clock while this metaserver knows itself to be rolled back."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import structlog
import trio

from metaserver.changes import Changes
from metaserver.cleaner import Cleaner
from metaserver.clock import LivedClock
from metaserver.config import Config
from metaserver.errors import DfsError
from metaserver.members import Members
from metaserver.protocol import ServerState
from metaserver.repair import Repair
from metaserver.resume import Resuming
from metaserver.sessions import Sessions
from metaserver.tasks import Tasks
from metaserver.trashing import Trash

log = structlog.get_logger(__name__)

# Twice in a heartbeat's time, so that DOWN comes in time.
TICKS_PER_HEARTBEAT = 2
REPAIR_SECONDS = 1.0
CLEAN_SECONDS = 1.0


class Aging:
    def __init__(
        self,
        config: Config,
        clock: LivedClock,
        sessions: Sessions,
        members: Members,
        changes: Changes,
        resuming: Resuming,
        tasks: Tasks,
        repair: Repair,
        cleaner: Cleaner,
        trash: Trash,
        chores: Sequence[Callable[[], None]],
    ) -> None:
        self._config = config
        self._clock = clock
        self._sessions = sessions
        self._members = members
        self._changes = changes
        self._resuming = resuming
        self._tasks = tasks
        self._repair = repair
        self._cleaner = cleaner
        self._trash = trash
        # More of what goes on by itself, each bounded.
        self._chores = chores

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tick)
            await self._resuming.keep_window()
            nursery.start_soon(self._tasks.run)
            nursery.start_soon(self._end_overdue)
            nursery.start_soon(self._keep_repairing)
            nursery.start_soon(self._keep_cleaning)
            nursery.start_soon(self._keep_emptying)

    async def _tick(self) -> None:
        while True:
            self.tick(trio.current_time())
            await trio.sleep(self._config.heartbeat_seconds / TICKS_PER_HEARTBEAT)

    def tick(self, now: float) -> None:
        """Time has passed, as far as this process lived through it."""
        self._clock.tick(now)
        for member in self._members.age(self._clock.seconds):
            if member.state is ServerState.LOST:
                self._repair.lost(member.server)
            else:
                self._repair.silent(member.server)
        if not self._changes.refusing:
            self._keep_unsaved()

    def _keep_unsaved(self) -> None:
        """That a server is LOST, and what else there was no space for."""
        for member in self._members.by_id.values():
            if member.unsaved:
                with suppress(DfsError):  # the log has it that the disk is full
                    self._repair.keep(member)

    async def _end_overdue(self) -> None:
        while True:
            await trio.sleep(self._config.heartbeat_seconds)
            if self._changes.refusing:
                continue
            for session in self._resuming.overdue():
                with _tried_again("ending a session"):
                    await self._resuming.end(session, "silent for too long")
                if session.ended and session.connection is not None:
                    session.connection.close("the session was silent for too long and has ended")

    async def _keep_repairing(self) -> None:
        while True:
            await trio.sleep(REPAIR_SECONDS)
            if not self._changes.refusing:
                with _tried_again("repair"):
                    await self._repair.tick(unknown_may_go=not self._sessions.missing)
                for chore in self._chores:
                    with _tried_again("moving data"):
                        chore()

    async def _keep_cleaning(self) -> None:
        while True:
            await trio.sleep(CLEAN_SECONDS)
            if not self._changes.refusing:
                with _tried_again("cleaning"):
                    await self._cleaner.tick()

    async def _keep_emptying(self) -> None:
        while True:
            if not self._changes.refusing:
                with _tried_again("emptying the trash"):
                    await self._trash.tick()
            await self._trash.pause()


@contextmanager
def _tried_again(what: str) -> Iterator[None]:
    """What goes wrong in the background is logged, and tried again at the next turn: it must not end the service."""
    try:
        yield
    except DfsError as error:
        log.error("background work failed", what=what, error=str(error))

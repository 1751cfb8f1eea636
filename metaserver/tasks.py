"""Work that continues in steps (TASKS rows): large removals and truncates, the end of a session or a server, and
another number of copies for a tree; and the counting of what a store from before TREES has.

Each step is one change, so that it survives a crash where it is; between steps others have their turn.
"""

from collections.abc import Callable, Iterable

import structlog
import trio

from metaserver import contents, copies, counted, inodes, removal, sessions
from metaserver.commit import Committer
from metaserver.config import Config
from metaserver.errors import DfsError
from metaserver.inodes import Effects
from metaserver.members import Members
from metaserver.schema import Inode, Table, Task, TaskKind, Transaction, inode_key, key_u64, read_u64

log = structlog.get_logger(__name__)

RETRY_SECONDS = 1.0
# Between two lines in the log about the counting of an older store.
COUNTED_NAMES = 50_000


class Tasks:
    """The tasks under way. ``carry_out`` (effects) and ``sealed`` (chunk, servers) take what steps bring about.

    Invariant: ``_pending`` has every TASKS row; an inode is in ``_truncating`` while a TRUNCATE of it is pending.
    SET_COPIES tasks go one after another: of two for the same file the later one is to have the last word.
    """

    def __init__(self, committer: Committer, config: Config, members: Members) -> None:
        self._committer = committer
        self._config = config
        self._members = members
        self._pending: dict[int, Task] = {}
        self._truncating: dict[int, int] = {}
        self._added = trio.Event()
        self.carry_out: Callable[[Effects], None]
        self.sealed: Callable[[int, tuple[int, ...]], None]
        self.removed: Callable[[int], None]

    def __len__(self) -> int:
        return len(self._pending)

    def load(self) -> list[int]:
        """Takes up the tasks of earlier epochs; returns the sessions that are being ended."""
        rows, _ = self._committer.read(0, lambda tx: list(tx.scan(Table.TASKS, b"", b"\xff" * 9)))
        for key, value in rows:
            self.add(read_u64(key), Task.unpack(value))
        return [task.subject for task in self._pending.values() if task.kind is TaskKind.EVICT_SESSION]

    def add(self, number: int, task: Task) -> None:
        self._pending[number] = task
        if task.kind is TaskKind.TRUNCATE:
            self._truncating[task.subject] = number
        self._added.set()

    def removing(self, server: int) -> bool:
        """Whether this server is being removed."""
        return any(task.kind is TaskKind.REMOVE_SERVER and task.subject == server for task in self._pending.values())

    def count(self, kind: TaskKind) -> int:
        return sum(task.kind is kind for task in self._pending.values())

    def truncating(self, inos: Iterable[int]) -> list[int]:
        """Which of these files still lose a tail that must not come into sight again: they cannot grow now."""
        return [ino for ino in inos if ino in self._truncating] if self._truncating else []

    async def finished(self, inos: Iterable[int]) -> None:
        """Returns when none of these files loses a tail any more."""
        for ino in inos:
            while ino in self._truncating:
                self.step(self._truncating[ino])
                await trio.lowlevel.checkpoint()

    def finish_truncate(self, ino: int) -> None:
        """:meth:`finished` for those who cannot wait."""
        while ino in self._truncating:
            self.step(self._truncating[ino])

    async def run(self) -> None:
        """Goes on with everything until cancelled."""
        while True:
            for number in self._turns():
                try:
                    self.step(number)
                except DfsError as error:
                    # The log may have no segment ready; whatever else it is, others must not wait for it.
                    log.warning("a task cannot go on at present", task=number, error=str(error))
                    await trio.sleep(RETRY_SECONDS)
                await trio.lowlevel.checkpoint()
            if not self._pending:
                self._added = trio.Event()
                await self._added.wait()

    def _turns(self) -> list[int]:
        """The tasks that may take a step now."""
        setting = [number for number, task in self._pending.items() if task.kind is TaskKind.SET_COPIES]
        waiting = set(setting) - {min(setting, default=0)}
        return [number for number in self._pending if number not in waiting]

    def step(self, number: int) -> None:
        """One step of one task; it is forgotten when it is finished."""
        task = self._pending.get(number)
        if task is None:
            return
        effects = Effects()
        sealed: list[int] = []

        def work(tx: Transaction, now_ns: int) -> Task | None:
            sealed.clear()
            going_on = self._work(tx, task, effects, sealed)
            if going_on is None:
                tx.delete(Table.TASKS, key_u64(number))
            elif going_on != task:
                tx.put(Table.TASKS, key_u64(number), going_on.pack())
            return going_on

        going_on = self._committer.change(0, 0, work, frees=True).message
        for chunk in sealed:
            self.sealed(chunk, self._members.closed(chunk))
        self.carry_out(effects)
        if going_on is not None:
            self._pending[number] = going_on
            return
        del self._pending[number]
        if task.kind is TaskKind.TRUNCATE and self._truncating.get(task.subject) == number:
            del self._truncating[task.subject]
        if task.kind is TaskKind.REMOVE_SERVER:
            self.removed(task.subject)

    def _work(self, tx: Transaction, task: Task, effects: Effects, sealed: list[int]) -> Task | None:
        """The task as it goes on, or None if that was its last step."""
        match task.kind:
            case TaskKind.EVICT_SESSION:
                owned = self._members.owned.get(task.subject, ())
                step = sessions.evict_step(tx, task.subject, sorted(owned), effects)
                sealed += step.sealed
                done = step.done
            case TaskKind.SET_COPIES:
                return copies.set_copies_step(tx, task, self._config.copies, effects)
            case TaskKind.COUNT_TREES:
                going_on = counted.count_step(tx, task)
                self._tell_progress(task, going_on)
                return going_on
            case TaskKind.REMOVE_SERVER:
                done = removal.remove_step(tx, task.subject, effects)
            case TaskKind.TRUNCATE:
                done = contents.truncate_step(tx, task.subject, task.position, effects)
            case TaskKind.REMOVE_INODE:
                row = tx.get(Table.INODES, inode_key(task.subject))
                done = row is None or inodes.remove_step(tx, task.subject, Inode.unpack(row), effects)
        return None if done else task

    @staticmethod
    def _tell_progress(task: Task, going_on: Task | None) -> None:
        if going_on is None:
            log.info("all files are counted: sums of trees are exact from now on", names=task.value)
        elif not task.value or going_on.value // COUNTED_NAMES > task.value // COUNTED_NAMES:
            log.info("counting the files of an older store", names=going_on.value)

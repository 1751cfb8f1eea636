"""Every operation in progress has a name and a bound (promise P5).

An operation registers itself while it runs: :meth:`Waiting.begin` and :meth:`Waiting.end` around a cancel scope, some
microseconds together, because thousands of requests a second pass here. One task looks at all of them twice a second:
it logs what waits long, with the line of code it waits at, and ends what is past its deadline. That is cheaper than a
trio deadline for each request (8.5 us against 5).

pyfuse3 serves a limited number of requests at a time (``max_tasks``). So that one kind of request that waits cannot
take them all, no more than ``limit`` of each kind may be in progress; further ones fail at once (BUSY).
"""

from collections import deque
from collections.abc import Callable, Coroutine
from enum import IntEnum
from pathlib import Path
from types import CodeType
from typing import Any

import structlog
import trio

from metaserver.errors import DfsError, ErrorCode

log = structlog.get_logger(__name__)

SWEEP_SECONDS = 0.5
LONG_WAIT_SECONDS = 5.0
# Three kinds leave 200 of pyfuse3's 2,000 tasks for what never waits (release, forget, cached answers).
LIMIT = 600
# The metaserver client ends its own calls at the timeout with a better message; this is for everything else.
GRACE_SECONDS = 2.0


class Kind(IntEnum):
    """What requests may wait for: the metaserver, data of others, room for data, stable storage."""

    NAMES = 0
    READING = 1
    WRITING = 2


class Operation:
    """One request of the kernel in progress. ``scope`` is to be entered around ``work``, the coroutine that does it.

    The task's own coroutine would not do: it is pyfuse3's, which does not tell what it awaits.
    """

    __slots__ = ("kind", "logged", "name", "scope", "serial", "started", "subject", "work")

    def __init__(self, serial: int, kind: Kind, name: str, subject: object, started: float) -> None:
        self.serial = serial
        self.kind = kind
        self.name = name
        self.subject = subject
        self.started = started
        self.logged = False
        self.scope = trio.CancelScope()
        self.work: Coroutine[Any, Any, Any] | None = None

    def where(self) -> str:
        """The innermost lines of code that it waits at, outermost first."""
        places: deque[str] = deque(maxlen=4)
        awaited: Any = self.work
        while awaited is not None:
            code: CodeType | None = getattr(awaited, "cr_code", None)
            frame = getattr(awaited, "cr_frame", None)
            if code is not None and frame is not None and "/trio/" not in code.co_filename:
                places.append(f"{Path(code.co_filename).stem}.{code.co_name}:{frame.f_lineno}")
            awaited = getattr(awaited, "cr_await", None)
        return " > ".join(places)


class Waiting:
    """All operations in progress. ``clock`` gives seconds."""

    def __init__(
        self,
        timeout_seconds: float,
        *,
        long_wait_seconds: float = LONG_WAIT_SECONDS,
        limit: int = LIMIT,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self._deadline_seconds = timeout_seconds + GRACE_SECONDS
        self._long_wait_seconds = long_wait_seconds
        self._limit = limit
        self._clock = clock
        self._counts = [0] * len(Kind)
        self._operations: dict[int, Operation] = {}
        self._serial = 0

    def __len__(self) -> int:
        return len(self._operations)

    def begin(self, kind: Kind, name: str, subject: object) -> Operation:
        """Registers the current task's operation; :meth:`end` must follow. BUSY if too many of its kind wait."""
        if self._counts[kind] >= self._limit:
            raise DfsError(ErrorCode.BUSY, f"{self._limit} operations like {name} are waiting already")
        self._counts[kind] += 1
        self._serial += 1
        operation = Operation(self._serial, kind, name, subject, self._clock())
        self._operations[self._serial] = operation
        return operation

    def end(self, operation: Operation) -> None:
        del self._operations[operation.serial]
        self._counts[operation.kind] -= 1
        if operation.logged:
            seconds = round(self._clock() - operation.started, 1)
            log.info("operation ended", operation=operation.name, subject=operation.subject, seconds=seconds)

    async def watch(self) -> None:
        """Runs until cancelled."""
        while True:
            await trio.sleep(SWEEP_SECONDS)
            self.sweep()

    def sweep(self) -> None:
        """Logs what waits long, once each, and cancels what waits too long. Ids ascend, so the oldest come first."""
        now = self._clock()
        for operation in self._operations.values():
            waited = now - operation.started
            if waited < self._long_wait_seconds:
                break
            if not operation.logged:
                operation.logged = True
                log.warning(
                    "operation waits",
                    operation=operation.name,
                    subject=operation.subject,
                    seconds=round(waited, 1),
                    at=operation.where(),
                )
            if waited >= self._deadline_seconds and not operation.scope.cancel_called:
                log.error("operation given up", operation=operation.name, subject=operation.subject)
                operation.scope.cancel()

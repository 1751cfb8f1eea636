"""Every operation in progress has a name and a bound (promise P5).

An operation registers itself while it runs: :meth:`Waiting.begin` and :meth:`Waiting.end` around a cancel scope, some
microseconds together, because thousands of requests a second pass here. One task looks at all of them twice a second:
it logs what waits long, with the line of code it waits at, and ends what is past its deadline. That is cheaper than a
trio deadline for each request (8.5 us against 5).

**Chains.** The kernel may ask several questions for one system call, and go on after an error: a name that could not
be confirmed is looked up once more, ``security.capability`` comes before each write and truncate whatever the answer
is, a page that read-ahead could not get is asked for again, by a page fault twice. And it serialises much: who changes
a directory or a file, or looks up the same name, waits for whoever does so already, and asks when that has failed. Each
would get the whole time again. So what follows at once upon an operation that was given up, from the same thread or
about the same inode, gets only what that one has left of its time, and a little. A read that was given up concerns
nobody but who asks for the same pages: elsewhere in the file, replicas may be well.

**Killed processes.** A process that has been sent SIGKILL does not end while the kernel waits for us on its behalf, and
pyfuse3 does not pass the kernel's interrupts on. So it is looked at while it waits (:mod:`dfsmount.killed`).

pyfuse3 serves a limited number of requests at a time (``max_tasks``). So that one kind of request that waits cannot
take them all, no more than ``limit`` of each kind may be in progress; further ones fail at once (BUSY).
"""

import errno
import math
import secrets
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import structlog
import trio

from dfsmount import killed
from metaserver import tracing
from metaserver.errors import DfsError, ErrorCode

log = structlog.get_logger(__name__)

SWEEP_SECONDS = 0.5
LONG_WAIT_SECONDS = 5.0
# Three kinds leave 200 of pyfuse3's 2,000 tasks for what never waits (release, forget, cached answers).
LIMIT = 600
# Our own driver has no such number of tasks. So many waiting operations take about 10 KB each.
DIRECT_LIMIT = 10_000
# The metaserver client ends its own calls at the timeout with a better message; this is for everything else.
GRACE_SECONDS = 2.0
# Who asks so soon after an operation was given up has waited behind it, or is the same system call.
CHAIN_SECONDS = 0.5
# The n-th of a chain that has used up its time gets an n-th of this: hundreds of processes end within two seconds, and
# the first still have a chance if the servers are back.
CHAIN_SHARE_SECONDS = 0.5
# So long after its time a chain ends. A program that tries again and again is given the whole time again then.
CHAIN_END_SECONDS = 2.5
# Beyond, who waits is looked at: has it been killed?
KILLED_AFTER_SECONDS = 0.5
LOOK_SECONDS = 1.0
# Looking takes no more than one part in so many of the time.
LOOK_SHARE = 20
# Reads and writes of the same of these pieces of a file may be about the same pages. The longest request is as long.
PIECE_BYTES = 1 << 20


class Kind(IntEnum):
    """What requests may wait for: the metaserver, data of others, room for data, stable storage."""

    NAMES = 0
    READING = 1
    WRITING = 2


# What operations have in common: a kind of thing, its number, and which part of it.
Chain = tuple[str, int, int]


class Operation:
    """One request of the kernel in progress. ``scope`` is to be entered around ``work``, the coroutine that does it.

    The task's own coroutine would not do: it is pyfuse3's, which does not tell what it awaits. ``subject`` is an inode,
    ``also`` another one (0: none); ``thread`` is whose system call it is, 0 where the kernel's request does not tell
    us. ``arguments`` are the handler's. ``errno`` is what it ends with if it is cancelled; ``begun`` when its chain
    began, and ``link`` its place there.
    """

    __slots__ = (
        "also", "arguments", "begun", "errno", "kind", "link", "logged", "name", "scope", "serial", "started",
        "subject", "thread", "trace", "work",
    )  # fmt: skip

    def __init__(
        self,
        serial: int,
        kind: Kind,
        name: str,
        subject: int,
        started: float,
        thread: int,
        also: int,
        arguments: Sequence[Any],
    ) -> None:
        self.serial = serial
        self.kind = kind
        self.name = name
        self.subject = subject
        self.also = also
        self.thread = thread
        self.started = self.begun = started
        self.link = 1
        self.trace = 0
        self.logged = False
        self.errno = errno.EIO
        self.scope = trio.CancelScope()
        self.work: Coroutine[Any, Any, Any] | None = None
        self.arguments = arguments

    def is_part_of(self, inode: int, operations: Sequence[str], start: int, stop: int) -> bool:
        """Whether it may be a request of a system call about the bytes from ``start`` to ``stop`` of an open file."""
        if self.subject != inode or self.name not in operations:
            return False
        first, last = self._span()
        return first < stop and last > start

    def _span(self) -> tuple[int, int]:
        if self.name not in ("read", "write"):
            return 0, killed.ANYWHERE
        _, offset, what = self.arguments
        return offset, offset + (what if self.name == "read" else len(what))

    def follows(self) -> Iterator[Chain]:
        """What it has in common with others that it may have waited for, as far as can be told."""
        yield from self._serialised()
        if self.name in ("read", "write"):
            yield from self._pieces()

    def leads(self) -> Iterator[Chain]:
        """What it has in common with others that may have waited for it."""
        return self._pieces() if self.name == "read" else self._serialised()

    def _serialised(self) -> Iterator[Chain]:
        yield "inode", self.subject, 0
        if self.also:
            yield "inode", self.also, 0
        if self.thread:
            yield "thread", self.thread, 0

    def _pieces(self) -> Iterator[Chain]:
        first, last = self._span()
        for piece in range(first // PIECE_BYTES, -(-last // PIECE_BYTES)):
            yield "piece", self.subject, piece

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


class GivenUp(NamedTuple):
    """The last operation of a chain that failed for want of time."""

    begun: float
    link: int
    failed_at: float


class Waiting:
    """All operations in progress. ``clock`` gives seconds; ``is_killed`` tells of threads, ``victims`` finds more.

    ``_given_up`` has the chains in which something failed of late.
    """

    def __init__(
        self,
        timeout_seconds: float,
        *,
        long_wait_seconds: float = LONG_WAIT_SECONDS,
        limit: int = LIMIT,
        clock: Callable[[], float] = trio.current_time,
        is_killed: Callable[[int], bool] = killed.is_killed,
        victims: Callable[[], list[killed.Victim]] = list,
        first_trace: int | None = None,
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._deadline_seconds = timeout_seconds + GRACE_SECONDS
        self._long_wait_seconds = long_wait_seconds
        self._limit = limit
        self._clock = clock
        self._is_killed = is_killed
        self._victims = victims
        self._look_at = -math.inf
        self._counts = [0] * len(Kind)
        self._operations: dict[int, Operation] = {}
        self._given_up: dict[Chain, GivenUp] = {}
        self._serial = 0
        # Traces of mounts begin somewhere else each time, so that those of two are rarely the same.
        self._first_trace = secrets.randbits(32) if first_trace is None else first_trace

    def __len__(self) -> int:
        return len(self._operations)

    def begin(
        self, kind: Kind, name: str, subject: int, thread: int = 0, also: int = 0, arguments: Sequence[Any] = ()
    ) -> Operation:
        """Registers the current task's operation; :meth:`end` must follow. BUSY if too many of its kind wait."""
        if self._counts[kind] >= self._limit:
            raise DfsError(ErrorCode.BUSY, f"{self._limit} operations like {name} are waiting already")
        self._counts[kind] += 1
        self._serial += 1
        operation = Operation(self._serial, kind, name, subject, self._clock(), thread, also, arguments)
        operation.trace = (self._first_trace + self._serial) & tracing.MASK or 1
        tracing.TRACE.set(operation.trace)
        self._operations[self._serial] = operation
        if self._given_up:
            self._continue(operation)
        return operation

    def _continue(self, operation: Operation) -> None:
        """Gives an operation that belongs to a chain what is left of its time."""
        now = operation.started
        known = [self._given_up.get(key) for key in operation.follows()]
        found = [last for last in known if last is not None and self._goes_on(last, now)]
        if not found:
            return
        last = min(found)
        operation.begun = last.begun
        operation.link = last.link + 1
        left = last.begun + self._deadline_seconds - now
        operation.scope.deadline = trio.current_time() + max(left, CHAIN_SHARE_SECONDS / operation.link)

    def _goes_on(self, last: GivenUp, now: float) -> bool:
        end = last.begun + self._deadline_seconds + CHAIN_END_SECONDS
        return now < min(end, last.failed_at + CHAIN_SECONDS)

    def end(self, operation: Operation) -> None:
        del self._operations[operation.serial]
        self._counts[operation.kind] -= 1
        if operation.logged:
            seconds = round(self._clock() - operation.started, 1)
            log.info("operation ended", operation=operation.name, subject=operation.subject, seconds=seconds)

    def failed(self, operation: Operation) -> None:
        """It ends without an answer."""
        now = self._clock()
        if now >= operation.begun + self._timeout_seconds:
            for key in operation.leads():
                self._given_up[key] = GivenUp(operation.begun, operation.link, now)

    async def watch(self) -> None:
        """Runs until cancelled."""
        while True:
            await trio.sleep(SWEEP_SECONDS)
            self.sweep()

    def sweep(self) -> None:
        """Logs what waits long, once each, and cancels what waits too long. Ids ascend, so the oldest come first."""
        now = self._clock()
        self._given_up = {key: last for key, last in self._given_up.items() if self._goes_on(last, now)}
        for operation in self._older_than(KILLED_AFTER_SECONDS, now):
            waited = now - operation.started
            if waited >= self._long_wait_seconds and not operation.logged:
                operation.logged = True
                log.warning(
                    "operation waits",
                    operation=operation.name,
                    subject=operation.subject,
                    seconds=round(waited, 1),
                    trace=tracing.text(operation.trace),
                    at=operation.where(),
                )
            if waited >= self._deadline_seconds and not operation.scope.cancel_called:
                trace = tracing.text(operation.trace)
                log.error("operation given up", operation=operation.name, subject=operation.subject, trace=trace)
                operation.scope.cancel()
        if now >= self._look_at:
            self._end_killed([*self._older_than(KILLED_AFTER_SECONDS, now)])
            # With very many processes it takes long, and everybody waits meanwhile.
            took = self._clock() - now
            self._look_at = now + max(LOOK_SECONDS, took * LOOK_SHARE)

    def in_progress(self) -> Iterator[Operation]:
        """The oldest first."""
        return iter(self._operations.values())

    def _older_than(self, seconds: float, now: float) -> Iterator[Operation]:
        for operation in self._operations.values():
            if now - operation.started < seconds:
                break
            yield operation

    def _end_killed(self, operations: list[Operation]) -> None:
        """Ends what nobody waits for any more, because the process that asked is to end."""
        for operation in operations:
            if operation.thread and self._is_killed(operation.thread):
                self._interrupt(operation)
        if all(operation.thread for operation in operations):
            return
        # Also those that have just begun: what a killed process waits for may be one, and an older one another's.
        unknown = [operation for operation in self._operations.values() if not operation.thread]
        threads = {operation.thread for operation in self._operations.values()}
        # Who waits for a request that says whose it is waits for no other.
        victims = [victim for victim in self._victims() if victim.thread not in threads]
        for request, count in Counter(victim.request for victim in victims).items():
            concerned = [operation for operation in unknown if operation.is_part_of(*request)]
            # Where it might be another's, nobody's ends.
            if len(concerned) <= count:
                for operation in concerned:
                    self._interrupt(operation)

    def _interrupt(self, operation: Operation) -> None:
        if not operation.scope.cancel_called:
            log.info("its process was killed", operation=operation.name, subject=operation.subject)
            operation.errno = errno.EINTR
            operation.scope.cancel()

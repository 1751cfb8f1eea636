"""What pyfuse3's session loop waits with: a stand-in for the ``trio`` module it uses (``pyfuse3.trio``).

pyfuse3 takes a ``trio.Lock`` and calls ``trio.lowlevel.wait_readable`` for every request, three trips through the
scheduler even when the next request is already there. Here the lock may be taken past those who queue for it, and the
descriptor is polled before it is waited for; a request that can be answered at once then costs no task switch at all.
``pyfuse3.asyncio`` replaces the same names in the same way.
"""

import select
from collections import deque
from types import SimpleNamespace, TracebackType

import trio

# So many requests may be taken without a look at the other tasks (answers from the servers, timers).
REQUESTS_PER_TURN = 8


class BargingLock:
    """A lock that a running task takes at once if it is free, even if others wait; the woken one then waits again.

    Nobody starves for long: who holds it waits for the kernel, and every release wakes one waiter.
    """

    def __init__(self) -> None:
        self._held = False
        self._waiting: deque[trio.lowlevel.Task] = deque()
        self._woken: trio.lowlevel.Task | None = None

    async def __aenter__(self) -> None:
        while self._held:
            await self._park()
        self._held = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._held = False
        self._wake()

    async def _park(self) -> None:
        task = trio.lowlevel.current_task()
        self._waiting.append(task)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._waiting.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        try:
            await trio.lowlevel.wait_task_rescheduled(abort)
        finally:
            if self._woken is task:
                self._woken = None

    def _wake(self) -> None:
        if self._waiting and self._woken is None:
            self._woken = self._waiting.popleft()
            trio.lowlevel.reschedule(self._woken)


class Readiness:
    """``wait_readable`` that looks before it waits."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._registered: int | None = None
        self._taken = 0

    async def wait_readable(self, descriptor: int) -> None:
        if self._registered != descriptor:
            self._poll = select.poll()
            self._poll.register(descriptor, select.POLLIN)
            self._registered = descriptor
        if self._taken < REQUESTS_PER_TURN:
            if self._poll.poll(0):
                self._taken += 1
                return
        else:
            self._taken = 0
            await trio.lowlevel.checkpoint()
            if self._poll.poll(0):
                return
        self._taken = 0
        await trio.lowlevel.wait_readable(descriptor)

    def is_ended(self) -> bool:
        """Whether the kernel has nothing to ask any more: unmounted, or all its requests were given up."""
        return any(events & select.POLLERR for _, events in self._poll.poll(0))


def stand_in(readiness: Readiness) -> SimpleNamespace:
    """The names that pyfuse3 3.5 takes from the module ``trio``; a later one that takes more fails at once."""
    lowlevel = SimpleNamespace(
        wait_readable=readiness.wait_readable,
        current_task=trio.lowlevel.current_task,
        current_trio_token=trio.lowlevel.current_trio_token,
        notify_closing=trio.lowlevel.notify_closing,
    )
    return SimpleNamespace(
        Lock=BargingLock,
        lowlevel=lowlevel,
        open_nursery=trio.open_nursery,
        ClosedResourceError=trio.ClosedResourceError,
    )

"""Tasks that outlive the request that started them, and how to wake one."""

from collections.abc import Awaitable, Callable
from typing import Any

import trio


class Jobs:
    """Starts tasks from synchronous code. What is started before :meth:`run` begins with it; once that has been
    cancelled nothing is: whoever ends at the same time may still ask."""

    def __init__(self) -> None:
        self._nursery: trio.Nursery | None = None
        self._early: list[tuple[Callable[..., Awaitable[object]], tuple[Any, ...]]] = []
        self._ended = False

    def start(self, function: Callable[..., Awaitable[object]], *args: Any) -> None:
        """Runs ``function(*args)`` in a task of its own; an exception from it ends the owner."""
        if self._ended:
            return
        if self._nursery is None:
            self._early.append((function, args))
        else:
            self._nursery.start_soon(function, *args)

    async def run(self) -> None:
        """Until cancelled; ends all tasks."""
        try:
            async with trio.open_nursery() as self._nursery:
                for function, args in self._early:
                    self._nursery.start_soon(function, *args)
                self._early.clear()
                try:
                    await trio.sleep_forever()
                finally:
                    self._ended = True
        finally:
            self._nursery = None


class Signal:
    """Wakes the one task that waits; a signal given before is not lost."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def set(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()
        self._event = trio.Event()

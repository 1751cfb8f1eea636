"""One trio run that is the same each time for the same seed, and nodes of it that can be stopped as by SIGSTOP.

Trio itself leaves three things to chance: the order of tasks that are runnable at once (:func:`deterministic` seeds
the generator it draws from), the order in which tasks of one cancel scope hear of its end (sets of objects, which
iterate by address), and which of two deadlines of the same moment comes first (by address again).
"""

import gc
import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from random import Random
from typing import Any

import trio
import trio.testing
from trio._core import _run as trio_run

# Which node a task belongs to: inherited by all tasks that it starts. "" is the harness itself.
NODE: ContextVar[str] = ContextVar("node", default="")

_counter = itertools.count()


class OrderedSet(dict[Any, None]):
    """The part of ``set`` that trio needs, in order of insertion."""

    def add(self, item: Any) -> None:
        self[item] = None

    def remove(self, item: Any) -> None:
        del self[item]

    def discard(self, item: Any) -> None:
        self.pop(item, None)


def _add_deadline(self: Any, deadline: float, cancel_scope: Any) -> None:
    trio_run.heappush(self._heap, (deadline, next(_counter), cancel_scope))
    self._active += 1


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Takes chance out of trio for the block."""
    names = trio_run.CancelStatus.__init__.__globals__
    factories = [name for name in names if name.startswith("__attr_factory_") and names[name] is set]
    if not factories:
        raise RuntimeError("this version of trio keeps its cancel scopes differently: look at determinism.py")
    kept = trio_run._ALLOW_DETERMINISTIC_SCHEDULING, trio_run._r, trio_run.Deadlines.add
    trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    trio_run._r = Random(seed)
    trio_run.Deadlines.add = _add_deadline  # type: ignore[method-assign]
    for name in factories:
        names[name] = OrderedSet
    # A collection finalizes whatever has become garbage, at a moment that depends on what ran before.
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        trio_run._ALLOW_DETERMINISTIC_SCHEDULING, trio_run._r, trio_run.Deadlines.add = kept  # type: ignore[misc]
        for name in factories:
            names[name] = set
        gc.unfreeze()
        gc.collect()
        if was_enabled:
            gc.enable()


def run(seed: int, main: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
    """``trio.run`` on a clock that jumps to the next deadline when nobody can go on."""
    with deterministic(seed):
        return trio.run(main, *arguments, clock=trio.testing.MockClock(autojump_threshold=0))


class FreezableQueue(deque[Any]):
    """Trio's queue of runnable tasks, which keeps back those of frozen nodes."""

    def __init__(self, tasks: Any = ()) -> None:
        super().__init__(tasks)
        self.frozen: dict[str, list[Any]] = {}

    def append(self, task: Any) -> None:
        if self.frozen:
            kept = self.frozen.get(task.context.get(NODE, ""))
            if kept is not None:
                kept.append(task)
                return
        super().append(task)


class Freezer:
    """Stops and continues the tasks of nodes. Their deadlines pass meanwhile, as those of a stopped process do."""

    def __init__(self) -> None:
        runner = trio_run.GLOBAL_RUN_CONTEXT.runner
        self._queue = runner.runq = FreezableQueue(runner.runq)

    def freeze(self, node: str) -> None:
        self._queue.frozen.setdefault(node, [])
        ours = [task for task in self._queue if task.context.get(NODE, "") == node]
        for task in ours:
            self._queue.remove(task)
            self._queue.frozen[node].append(task)

    def thaw(self, node: str) -> None:
        for task in self._queue.frozen.pop(node, []):
            self._queue.append(task)

    def is_frozen(self, node: str) -> bool:
        return node in self._queue.frozen

"""Operations in progress: names, bounds, limits."""

import errno

import pytest
import structlog
import trio
from structlog.testing import capture_logs

from dfsmount.killed import Victim
from dfsmount.waiting import GRACE_SECONDS, Kind, Waiting
from metaserver.errors import DfsError, ErrorCode


@pytest.fixture
def waiting() -> Waiting:
    structlog.reset_defaults()
    return Waiting(30, long_wait_seconds=5, limit=3)


async def stuck(waiting: Waiting, ended: list[str], seconds: float = float("inf")) -> None:
    operation = waiting.begin(Kind.NAMES, "lookup", 1)
    try:
        with operation.scope:
            operation.work = sleep_here(seconds)
            await operation.work
        ended.append("given up" if operation.scope.cancelled_caught else "done")
    finally:
        waiting.end(operation)


async def sleep_here(seconds: float) -> None:
    await trio.sleep(seconds)


async def test_what_waits_too_long_is_given_up(waiting: Waiting, nursery: trio.Nursery, autojump_clock: object) -> None:
    ended: list[str] = []
    nursery.start_soon(waiting.watch)
    nursery.start_soon(stuck, waiting, ended)
    await trio.sleep(30 + GRACE_SECONDS - 0.1)
    assert not ended
    assert len(waiting) == 1
    await trio.sleep(0.7)
    assert ended == ["given up"]
    assert len(waiting) == 0


async def test_a_long_wait_is_logged_once_with_its_place(
    waiting: Waiting, nursery: trio.Nursery, autojump_clock: object
) -> None:
    with capture_logs() as logs:
        nursery.start_soon(waiting.watch)
        nursery.start_soon(stuck, waiting, [], 12)
        nursery.start_soon(stuck, waiting, [], 2)
        await trio.sleep(20)
    assert [entry["event"] for entry in logs] == ["operation waits", "operation ended"]
    assert logs[0]["operation"] == "lookup"
    assert logs[0]["at"].startswith("test_waiting.sleep_here:")
    assert logs[1]["seconds"] == 12


async def test_one_kind_cannot_take_all_places(waiting: Waiting) -> None:
    operations = [waiting.begin(Kind.READING, "read", number) for number in range(3)]
    with pytest.raises(DfsError) as caught:
        waiting.begin(Kind.READING, "read", 4)
    assert caught.value.code is ErrorCode.BUSY
    waiting.end(waiting.begin(Kind.WRITING, "write", 1))
    waiting.end(operations.pop())
    waiting.end(waiting.begin(Kind.READING, "read", 5))


# -- chains --------------------------------------------------------------------------------------------------------


class Now:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def budget(waiting: Waiting, subject: int, thread: int, *, then: bool) -> float:
    """How long an operation that begins now may take; ``then``: it is not answered either."""
    operation = waiting.begin(Kind.NAMES, "lookup", subject, thread)
    deadline = operation.scope.deadline
    if then:
        waiting.failed(operation)
    waiting.end(operation)
    return deadline - trio.current_time()


def given_up(waiting: Waiting, now: Now, subject: int, thread: int, also: int = 0) -> None:
    operation = waiting.begin(Kind.NAMES, "lookup", subject, thread, also)
    now.seconds += 30
    waiting.failed(operation)
    waiting.end(operation)


async def test_what_follows_upon_what_was_given_up_gets_what_is_left(autojump_clock: object) -> None:
    now = Now()
    waiting = Waiting(30, clock=now)
    given_up(waiting, now, 1, 7)
    # The same thread, whatever it asks; somebody else about the same; and nobody else.
    assert budget(waiting, 2, 7, then=False) == pytest.approx(GRACE_SECONDS)
    assert budget(waiting, 1, 8, then=False) == pytest.approx(GRACE_SECONDS)
    assert budget(waiting, 2, 8, then=False) == float("inf")
    now.seconds += 0.6
    assert budget(waiting, 1, 7, then=False) == float("inf")


async def test_a_rename_concerns_two_directories(autojump_clock: object) -> None:
    now = Now()
    waiting = Waiting(30, clock=now)
    given_up(waiting, now, 1, 7, also=2)
    assert budget(waiting, 2, 8, then=False) == pytest.approx(GRACE_SECONDS)


async def test_all_who_wait_for_one_directory_end_together(autojump_clock: object) -> None:
    """However many there are: each asks when the one before it has failed."""
    now = Now()
    waiting = Waiting(30, clock=now)
    began = now.seconds
    given_up(waiting, now, 1, 7)
    for thread in range(100, 400):
        allowed = budget(waiting, 1, thread, then=False)
        assert allowed <= GRACE_SECONDS
        operation = waiting.begin(Kind.NAMES, "mkdir", 1, thread)
        now.seconds += allowed
        waiting.failed(operation)
        waiting.end(operation)
    assert now.seconds - began < 35


async def test_a_chain_ends_however_often_somebody_asks(autojump_clock: object) -> None:
    """Servers that come back must find somebody with time for their answer."""
    now = Now()
    waiting = Waiting(30, clock=now)
    given_up(waiting, now, 1, 7)
    budgets = []
    for _ in range(60):
        now.seconds += 0.1
        budgets.append(budget(waiting, 1, 7, then=True))
    assert max(budgets[:40]) <= GRACE_SECONDS
    assert float("inf") in budgets


async def test_an_error_that_is_an_answer_begins_no_chain(autojump_clock: object) -> None:
    now = Now()
    waiting = Waiting(30, clock=now)
    operation = waiting.begin(Kind.NAMES, "lookup", 1, 7)
    now.seconds += 29
    waiting.failed(operation)
    waiting.end(operation)
    assert budget(waiting, 1, 7, then=False) == float("inf")


# -- killed processes ----------------------------------------------------------------------------------------------


async def test_what_killed_processes_wait_for_is_ended(nursery: trio.Nursery, autojump_clock: object) -> None:
    dead, victims = {7}, [Victim(5, ("write",)), Victim(6, ("fsync",))]
    waiting = Waiting(3600, is_killed=dead.__contains__, victims=lambda: victims)
    ended: dict[tuple[str, int, int], int] = {}

    async def wait(name: str, subject: int, thread: int) -> None:
        operation = waiting.begin(Kind.WRITING, name, subject, thread)
        try:
            with operation.scope:
                await trio.sleep_forever()
            ended[name, subject, thread] = operation.errno
        finally:
            waiting.end(operation)

    asked = [("lookup", 1, 7), ("lookup", 1, 8), ("write", 5, 0), ("fsync", 5, 0), ("write", 6, 0), ("fsync", 6, 0)]
    for words in asked:
        nursery.start_soon(wait, *words)
    nursery.start_soon(waiting.watch)
    await trio.sleep(5)
    assert ended == dict.fromkeys([("lookup", 1, 7), ("write", 5, 0), ("fsync", 6, 0)], errno.EINTR)

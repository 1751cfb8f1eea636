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


async def test_a_read_that_was_given_up_concerns_who_asks_for_the_same_pages(autojump_clock: object) -> None:
    """Other pages of the file may have replicas that answer, and so may what is written to it."""
    now = Now()
    waiting = Waiting(30, clock=now)
    operation = waiting.begin(Kind.READING, "read", 5, arguments=(1, 1 << 20, 128 << 10))
    now.seconds += 30
    waiting.failed(operation)
    waiting.end(operation)

    def allowed(name: str, *arguments: object) -> float:
        following = waiting.begin(Kind.READING, name, 5, arguments=arguments)
        waiting.end(following)
        return following.scope.deadline - trio.current_time()

    assert allowed("read", 2, (1 << 20) + 4096, 4096) == pytest.approx(GRACE_SECONDS)
    # The kernel locks a page until it is read; an O_SYNC write then waits for the servers.
    assert allowed("write", 2, 1000 << 10, bytes(64 << 10)) == pytest.approx(GRACE_SECONDS)
    assert allowed("read", 2, 8 << 20, 4096) == float("inf")
    assert allowed("write", 2, 8 << 20, bytes(9)) == float("inf")
    assert allowed("fsync", 2, False) == float("inf")
    operation = waiting.begin(Kind.WRITING, "fsync", 5, arguments=(1, False))
    now.seconds += 30
    waiting.failed(operation)
    waiting.end(operation)
    assert allowed("read", 2, 8 << 20, 4096) == pytest.approx(GRACE_SECONDS)


async def test_an_error_that_is_an_answer_begins_no_chain(autojump_clock: object) -> None:
    now = Now()
    waiting = Waiting(30, clock=now)
    operation = waiting.begin(Kind.NAMES, "lookup", 1, 7)
    now.seconds += 29
    waiting.failed(operation)
    waiting.end(operation)
    assert budget(waiting, 1, 7, then=False) == float("inf")


# -- killed processes ----------------------------------------------------------------------------------------------


Asked = tuple[str, int, int, tuple[object, ...]]


async def interrupted(waiting: Waiting, nursery: trio.Nursery, asked: list[Asked]) -> list[int]:
    """Which of ``asked`` (name, inode, thread, arguments) have ended with EINTR after some seconds."""
    ended: dict[int, int] = {}

    async def wait(number: int, name: str, subject: int, thread: int, arguments: tuple[object, ...]) -> None:
        operation = waiting.begin(Kind.WRITING, name, subject, thread)
        operation.arguments = arguments
        try:
            with operation.scope:
                await trio.sleep_forever()
            ended[number] = operation.errno
        finally:
            waiting.end(operation)

    for number, words in enumerate(asked):
        nursery.start_soon(wait, number, *words)
    nursery.start_soon(waiting.watch)
    await trio.sleep(5)
    assert set(ended.values()) <= {errno.EINTR}
    return sorted(ended)


async def test_what_killed_processes_wait_for_is_ended(nursery: trio.Nursery, autojump_clock: object) -> None:
    dead, victims = {7}, [Victim(20, 5, ("write",), 100, 200), Victim(21, 6, ("fsync",))]
    waiting = Waiting(3600, limit=10, is_killed=dead.__contains__, victims=lambda: victims)
    asked: list[Asked] = [
        ("lookup", 1, 7, (1, b"a")), ("lookup", 1, 8, (1, b"a")),
        ("write", 5, 0, (1, 100, bytes(100))), ("fsync", 5, 0, (1, False)),
        ("write", 6, 0, (2, 0, bytes(9))), ("fsync", 6, 0, (2, False)),
    ]  # fmt: skip
    assert await interrupted(waiting, nursery, asked) == [0, 2, 5]


async def test_pages_that_the_kernel_writes_are_nobodys(nursery: trio.Nursery, autojump_clock: object) -> None:
    waiting = Waiting(3600, limit=10, victims=lambda: [Victim(20, 5, ("write",), 5000, 5100)])
    asked: list[Asked] = [("write", 5, 0, (1, 8192, bytes(4096))), ("write", 5, 0, (2, 5000, bytes(100)))]
    assert await interrupted(waiting, nursery, asked) == [1]


async def test_a_write_that_is_followed_by_a_sync_ends_no_pages(nursery: trio.Nursery, autojump_clock: object) -> None:
    waiting = Waiting(3600, limit=10, victims=lambda: [Victim(20, 5, ("write", "fsync"), 5000, 5100)])
    asked: list[Asked] = [("write", 5, 0, (1, 4096, bytes(4096))), ("fsync", 5, 0, (2, False))]
    assert await interrupted(waiting, nursery, asked) == []
    waiting = Waiting(3600, limit=10, victims=lambda: [Victim(20, 5, ("write", "fsync"), 5000, 5100)])
    assert await interrupted(waiting, nursery, asked[1:]) == [0]


async def test_where_it_may_be_anothers_nobodys_ends(nursery: trio.Nursery, autojump_clock: object) -> None:
    """Two read the same bytes past the page cache."""
    victims = [Victim(20, 5, ("read",), 0, 4096)]
    waiting = Waiting(3600, limit=10, victims=lambda: victims)
    asked: list[Asked] = [("read", 5, 0, (1, 0, 4096)), ("read", 5, 0, (2, 0, 4096))]
    assert await interrupted(waiting, nursery, asked) == []
    victims.append(Victim(21, 5, ("read",), 0, 4096))
    await trio.sleep(2)
    assert len(waiting) == 0


async def test_a_request_that_has_just_begun_is_whose_it_may_be(nursery: trio.Nursery, autojump_clock: object) -> None:
    """The older one is another's: of a program that reads past the page cache, or pages that the kernel writes."""
    victims: list[Victim] = []
    waiting = Waiting(3600, limit=10, victims=lambda: victims)
    other = waiting.begin(Kind.READING, "read", 5)
    other.arguments = (1, 0, 4096)
    await trio.sleep(1)
    own = waiting.begin(Kind.READING, "read", 5)
    own.arguments = (2, 0, 4096)
    victims.append(Victim(20, 5, ("read",), 0, 4096))
    waiting.sweep()
    assert not other.scope.cancel_called
    waiting.end(other)
    await trio.sleep(1)
    waiting.sweep()
    assert own.scope.cancel_called
    waiting.end(own)


async def test_who_waits_for_its_own_request_ends_no_other(nursery: trio.Nursery, autojump_clock: object) -> None:
    """The kernel asks for an attribute before it writes; meanwhile it writes pages of the same file."""

    # It ends when it is told.
    def victims() -> list[Victim]:
        return [Victim(20, 5, ("write",), 0, 1 << 64)] if len(waiting) == 2 else []

    waiting = Waiting(3600, limit=10, is_killed={20}.__contains__, victims=victims)
    asked: list[Asked] = [("getxattr", 5, 20, (5, b"security.capability")), ("write", 5, 0, (1, 0, bytes(4096)))]
    assert await interrupted(waiting, nursery, asked) == [0]


async def test_looking_for_killed_processes_takes_a_small_share_of_the_time(
    nursery: trio.Nursery, autojump_clock: object
) -> None:
    now, looks = Now(), 0

    def look() -> list[Victim]:
        nonlocal looks
        looks += 1
        now.seconds += 0.5
        return []

    waiting = Waiting(3600, clock=now, victims=look)
    operation = waiting.begin(Kind.READING, "read", 5)
    for _ in range(100):
        now.seconds += 0.5
        waiting.sweep()
    assert 4 <= looks <= 6
    waiting.end(operation)

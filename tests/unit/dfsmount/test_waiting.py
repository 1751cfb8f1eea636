"""Operations in progress: names, bounds, limits."""

import pytest
import structlog
import trio
from structlog.testing import capture_logs

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

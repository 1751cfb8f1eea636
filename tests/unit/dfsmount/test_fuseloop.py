"""The stand-in for trio under pyfuse3: exclusion, no lost wake-ups, cancellation, fairness."""

import os

import trio
from trio.testing import wait_all_tasks_blocked

from dfsmount import fuseloop


async def test_the_lock_excludes_and_everybody_gets_it() -> None:
    lock = fuseloop.BargingLock()
    inside, done = 0, 0

    async def worker() -> None:
        nonlocal inside, done
        for _ in range(20):
            async with lock:
                inside += 1
                assert inside == 1
                await trio.lowlevel.checkpoint()
                inside -= 1
        done += 1

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(worker)
    assert done == 10


async def test_a_cancelled_waiter_does_not_take_the_wake_up_with_it() -> None:
    lock = fuseloop.BargingLock()
    got = []

    async def waiter(number: int, scope: trio.CancelScope) -> None:
        with scope:
            async with lock:
                got.append(number)

    async with trio.open_nursery() as nursery:
        first = trio.CancelScope()
        async with lock:
            nursery.start_soon(waiter, 1, first)
            await wait_all_tasks_blocked()
            nursery.start_soon(waiter, 2, trio.CancelScope())
            await wait_all_tasks_blocked()
            first.cancel()
        await wait_all_tasks_blocked()
    assert 2 in got


async def test_a_readable_descriptor_is_taken_at_once_but_others_get_their_turn() -> None:
    readiness = fuseloop.Readiness()
    reader, writer = os.pipe()
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    try:
        async with trio.open_nursery() as nursery:
            os.write(writer, b"x")
            nursery.start_soon(other)
            for _ in range(20 * fuseloop.REQUESTS_PER_TURN):
                await readiness.wait_readable(reader)
            assert 10 <= turns <= 30
            os.read(reader, 1)
            with trio.move_on_after(0.01) as scope:
                await readiness.wait_readable(reader)
            assert scope.cancelled_caught
            nursery.cancel_scope.cancel()
    finally:
        os.close(reader)
        os.close(writer)


async def test_an_ended_connection_is_noticed_without_waiting_for_it() -> None:
    readiness = fuseloop.Readiness()
    assert not readiness.is_ended()
    reader, writer = os.pipe()
    with trio.move_on_after(0):
        await readiness.wait_readable(writer)
    assert not readiness.is_ended()
    # What poll(2) says of the writing end of a pipe without a reader, it says of an aborted /dev/fuse.
    os.close(reader)
    assert readiness.is_ended()
    os.close(writer)

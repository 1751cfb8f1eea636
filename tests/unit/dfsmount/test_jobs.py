"""Tasks that outlive the request that started them."""

import trio
import trio.testing

from dfsmount.jobs import Jobs


async def test_what_is_started_before_and_while_it_runs() -> None:
    jobs, done = Jobs(), trio.Event()
    seen: list[str] = []

    async def job(name: str) -> None:
        seen.append(name)
        if len(seen) == 2:
            done.set()

    jobs.start(job, "early")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        await trio.testing.wait_all_tasks_blocked()
        jobs.start(job, "late")
        with trio.fail_after(5):
            await done.wait()
        nursery.cancel_scope.cancel()
    assert seen == ["early", "late"]


async def test_who_is_cancelled_at_the_same_time_may_ask_and_nothing_happens() -> None:
    """A create cancelled by the unmount starts a task, whose nursery is closed by then (simulation, seed 20447)."""
    jobs = Jobs()
    ran = []

    async def job() -> None:
        # One that was asked for before the owner's own end was noticed may begin, but comes no further than this.
        await trio.lowlevel.checkpoint()
        ran.append(1)

    async def asks_at_the_end() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                for _ in range(10):
                    jobs.start(job)
                    await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        nursery.start_soon(asks_at_the_end)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert ran == []

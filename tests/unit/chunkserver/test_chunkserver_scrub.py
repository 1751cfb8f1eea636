"""The scrubber: everything is read back in time, nobody is disturbed, a restart goes on, and no damage is missed."""

import math
import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
import trio
from chunkserver_harness import Started, StartNode, Writer
from trio.testing import MockClock

from chunkserver import checked, chunkfile, node, scrub
from chunkserver.chunkfile import ENTRY_BYTES, INDEX_OFFSET, PAYLOAD_OFFSET
from chunkserver.disk import File, LocalDisk
from chunkserver.scrub import Saved, Scrubber, ScrubOptions, rate
from metaserver.errors import DfsError, ErrorCode

MIB = 1 << 20
EPOCH_NS = 1_700_000_000 * 10**9


class Watched:
    """A disk that remembers which files were read past the page cache, in order."""

    def __init__(self, disk: LocalDisk) -> None:
        self._disk = disk
        self.opened: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._disk, name)

    def open_direct(self, path: str) -> File:
        self.opened.append(int(path.rpartition("/")[2], 16))
        return self._disk.open_direct(path)


async def at_once(function: Callable[..., Any], *arguments: Any, **_: Any) -> Any:
    """Instead of a worker thread, during which a mock clock would jump; takes a little time, as disks do."""
    await trio.sleep(0.01)
    return function(*arguments)


@pytest.fixture
def start(
    start_node: StartNode, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., AbstractAsyncContextManager[Started]]:
    """A server in virtual time, of which there is much."""
    monkeypatch.setattr(node, "TICK_SECONDS", 60.0)

    def begin(days: float = 7.0, most: float = 32 * MIB) -> AbstractAsyncContextManager[Started]:
        return start_node(
            "a",
            wrap=Watched,
            run_sync=at_once,
            clock=trio.current_time,
            now_ns=lambda: EPOCH_NS + int(trio.current_time() * 1e9),
            scrub=ScrubOptions(days, most),
        )

    return begin


Start = Callable[..., AbstractAsyncContextManager[Started]]


async def sealed(started: Started, chunk: int, size: int = 200_000) -> None:
    writer = Writer(chunk)
    write = started.store.appends.admit(writer.append(data := os.urandom(size)), data)
    started.store.appends.carry_out(write)
    await started.store.seal(chunk, writer.offset, writer.index, writer.chain)


def scrubber(started: Started) -> Scrubber:
    assert started.node.running is not None
    return started.node.running.scrubber


def opened(started: Started) -> list[int]:
    disk = started.node.disk
    assert isinstance(disk, Watched)
    return disk.opened


def damage(started: Started, chunk: int, place: int, data: bytes = b"\xff") -> None:
    with (started.path / chunkfile.chunk_path(chunk)).open("r+b") as file:
        file.seek(place)
        file.write(data)


def test_the_rate_follows_what_is_left_within_bounds() -> None:
    tib, week = 1 << 40, 7 * 86400.0
    assert rate(tib, week, math.inf) == tib / week
    assert rate(tib, week / 2, math.inf) == 2 * tib / week
    assert rate(1000, week, math.inf) == scrub.LEAST_RATE
    assert rate(100 * tib, week, 32 * MIB) == 32 * MIB
    assert rate(tib, 0.0, 32 * MIB) == rate(tib, -5.0, 32 * MIB) == 32 * MIB


async def test_a_pass_takes_the_time_it_has_and_starts_again(
    start: Start, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrub, "LEAST_RATE", 1)
    async with start(days=0.01) as started:
        for chunk in range(1, 41):
            await sealed(started, chunk)
        await trio.sleep(scrub.FIRST_SECONDS + 0.9 * 432)
        status = scrubber(started).status()
        assert 0.45 < status.done_bytes / status.total_bytes < 0.55
        assert status.bytes_per_second == pytest.approx(status.total_bytes / (0.9 * 864), rel=0.3)
        assert (status.last_pass_seconds, status.bad) == (0.0, 0)
        await trio.sleep(864)
        assert opened(started)[:40] == list(range(1, 41))
        assert opened(started)[40:50] == list(range(1, 11))
        status = scrubber(started).status()
        assert 700 < status.last_pass_seconds <= 864
        assert 0 < status.since_pass_seconds < 864


async def test_little_data_is_not_read_without_pause(
    start: Start,
    autojump_clock: MockClock,
) -> None:
    async with start() as started:
        await sealed(started, 1)
        await sealed(started, 2)
        await trio.sleep(3000)
        assert opened(started) == [1, 2]
        await trio.sleep(3600)
        assert opened(started) == [1, 2, 1, 2]


async def test_no_pass_by_itself_if_so_configured(
    start: Start,
    autojump_clock: MockClock,
) -> None:
    async with start(days=0) as started:
        await sealed(started, 1)
        await trio.sleep(80_000.0)
        assert opened(started) == []
        number = scrubber(started).ask()
        await trio.sleep(60)
        assert opened(started) == [1]
        report = scrubber(started).report()
        assert (report.completed, report.running, number) == (1, 0, 1)


async def test_an_asked_pass_reads_everything_again_and_is_joined(
    start: Start,
    autojump_clock: MockClock,
) -> None:
    async with start() as started:
        for chunk in range(1, 6):
            await sealed(started, chunk, 3_000_000)
        await trio.sleep(scrub.FIRST_SECONDS + 20)
        before = len(opened(started))
        assert 0 < before < 5
        assert scrubber(started).ask() == 2
        await trio.sleep(0.0001)
        assert scrubber(started).ask() == 2
        await trio.sleep(5)
        assert opened(started)[before:] == [1, 2, 3, 4, 5]
        report = scrubber(started).report()
        assert (report.completed, report.damaged, report.status.done_bytes) == (2, [], 0)
        assert scrubber(started).ask() == 3


async def test_a_restart_goes_on_and_new_data_is_included(
    start: Start, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrub, "LEAST_RATE", 1)
    async with start(days=0.01) as started:
        for chunk in range(1, 41):
            await sealed(started, chunk)
        await trio.sleep(scrub.FIRST_SECONDS + 400)
        seen = opened(started)
        assert 15 <= len(seen) < 40
    async with start(days=0.01) as started:
        await sealed(started, 100)
        await trio.sleep(scrub.FIRST_SECONDS + 560)
        again = opened(started)
        # What was read since the position was saved, less than four chunks at this pace, is read twice.
        assert seen[-1] - 4 <= again[0] <= seen[-1] + 1
        assert again[: again.index(100) + 1] == [*range(again[0], 41), 100]
        assert scrubber(started).status().last_pass_seconds > 770


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 4096,
        b"junk",
        checked.encode(Saved(1, 30, 5, EPOCH_NS))[:-1],
        checked.encode(Saved(1, 30, 5, EPOCH_NS)).replace(b"30", b"38"),
        checked.encode(Saved(9, 30, 5, EPOCH_NS)),
        checked.encode(Saved(1, 30, 5, EPOCH_NS + 10**18)),
        checked.encode(Saved(1, 30, 5, 1, EPOCH_NS + 10**18)),
    ],
)
async def test_a_damaged_state_only_means_starting_again(
    start: Start, autojump_clock: MockClock, content: bytes
) -> None:
    async with start() as started:
        await sealed(started, 1)
        (started.path / scrub.FILE).write_bytes(content)
    async with start() as started:
        await trio.sleep(scrub.FIRST_SECONDS + 30)
        assert opened(started) == [1]
        assert scrubber(started).status().last_pass_seconds > 0


async def test_others_come_first(
    start: Start,
    autojump_clock: MockClock,
) -> None:
    async with start(days=0.0001, most=1.0 * MIB) as started:
        for chunk in range(1, 5):
            await sealed(started, chunk, 4 * MIB)

        async def busy() -> None:
            while True:
                started.store.table.bytes_read += 10 * MIB
                await trio.sleep(0.5)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(busy)
            await trio.sleep(scrub.FIRST_SECONDS + 30)
            done = scrubber(started).status().done_bytes
            assert 5 * MIB < done < 10 * MIB
            nursery.cancel_scope.cancel()
        await trio.sleep(5)
        before = scrubber(started).status().done_bytes
        await trio.sleep(4)
        assert scrubber(started).status().done_bytes - before >= 3 * MIB


DAMAGES = {
    "payload": PAYLOAD_OFFSET + 100_000,
    "entry": INDEX_OFFSET + 2 * ENTRY_BYTES + 5,
    "last chain": INDEX_OFFSET + 4 * ENTRY_BYTES - 1,
    "magic": 0,
    "sealed length": 48,
    "padding of the header": 2000,
    "after the index": INDEX_OFFSET + 1_000_000,
    "behind the end": PAYLOAD_OFFSET + 200_000,
}


@pytest.mark.parametrize("place", DAMAGES)
async def test_damage_anywhere_is_found_and_reported_once(
    start: Start, autojump_clock: MockClock, place: str, damaged: set[str]
) -> None:
    damaged.add("a")
    async with start() as started:
        for chunk in (1, 2, 3):
            await sealed(started, chunk)
        damage(started, 2, DAMAGES[place])
        await trio.sleep(100)
        assert [bool(started.store.table.get(chunk).error) for chunk in (1, 2, 3)] == [False, True, False]
        report = scrubber(started).report()
        assert [chunk for chunk, _ in report.damaged] == ["0000000000000002"]
        assert report.status.bad == 1
        news = [report for report in started.node.outbox.parcel().changes if report.error]
        assert [(report.chunk, report.error) for report in news] == [(2, "BAD_CHECKSUM")]
        await trio.sleep(8000)
        assert opened(started).count(1) == 3
        assert opened(started).count(2) == 1


@pytest.mark.parametrize("how", ["missing", "empty", "short"])
async def test_a_file_that_is_not_there_is_found(
    start: Start, autojump_clock: MockClock, how: str, damaged: set[str]
) -> None:
    damaged.add("a")
    async with start() as started:
        await sealed(started, 1)
        path: Path = started.path / chunkfile.chunk_path(1)
        if how == "missing":
            os.unlink(path)
        else:
            os.truncate(path, 0 if how == "empty" else PAYLOAD_OFFSET + 150_000)
        await trio.sleep(60)
        assert started.store.table.get(1).error == ("IO" if how == "missing" else "BAD_CHECKSUM")
        assert scrubber(started).status().bad == 1


async def test_what_is_deleted_meanwhile_is_no_damage(
    start: Start,
    autojump_clock: MockClock,
) -> None:
    async with start() as started:
        await sealed(started, 1, 20 * MIB)
        await sealed(started, 2)
        await trio.sleep(scrub.FIRST_SECONDS + 10)
        assert opened(started) == [1]
        await started.store.delete(1)
        await trio.sleep(60)
        assert opened(started) == [1, 2]
        assert scrubber(started).report().damaged == []
        assert scrubber(started).status().bad == 0


async def test_a_pass_over_nothing_does_not_count_as_one(start: Start, autojump_clock: MockClock) -> None:
    async with start() as started:
        found = scrubber(started)
        await trio.sleep(scrub.FIRST_SECONDS + 10 * scrub.EMPTY_SECONDS)
        assert (found.status().last_pass_seconds, found.status().since_pass_seconds) == (0.0, 0.0)
        # One that was asked for comes to its end, and says so little, too.
        number = found.ask()
        await trio.sleep(10)
        assert found.report().completed == number
        assert found.status().since_pass_seconds == 0.0
        assert not (started.path / scrub.FILE).exists()
        # What comes is read without waiting for an hour.
        await sealed(started, 1)
        await trio.sleep(2 * scrub.EMPTY_SECONDS + 10)
        assert opened(started) == [1]
        assert found.status().last_pass_seconds > 0


async def test_a_pass_that_could_not_read_everything_does_not_count_as_one(
    start: Start, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too few descriptors, or no memory: nothing is known of the replica, good or bad."""
    async with start() as started:
        await sealed(started, 1)
        await sealed(started, 2)
        reads = started.store.reads
        verify, short = reads.verify_slice, [True]

        async def verify_slice(replica: Any, found: Any) -> bool:
            if replica.chunk == 2 and short[0]:
                raise DfsError(ErrorCode.UNAVAILABLE, "too many open files")
            return await verify(replica, found)

        monkeypatch.setattr(reads, "verify_slice", verify_slice)
        await trio.sleep(scrub.FIRST_SECONDS + 10)
        status = scrubber(started).status()
        assert (status.last_pass_seconds, status.bad) == (0.0, 0)
        short[0] = False
        await trio.sleep(2 * scrub.EMPTY_SECONDS + 600)
        assert scrubber(started).status().last_pass_seconds > 0
        assert scrubber(started).status().bad == 0


async def test_a_pass_that_could_read_nothing_is_not_tried_again_at_once(
    start: Start, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is short of memory is not to be kept busy with that, nor its log filled."""
    async with start() as started:
        await sealed(started, 1)
        attempts = 0

        async def verify_slice(replica: Any, found: Any) -> bool:
            nonlocal attempts
            attempts += 1
            await trio.sleep(0.01)
            raise DfsError(ErrorCode.UNAVAILABLE, "too many open files")

        monkeypatch.setattr(started.store.reads, "verify_slice", verify_slice)
        await trio.sleep(scrub.FIRST_SECONDS + 3 * scrub.EMPTY_SECONDS)
        assert 1 < attempts < 5

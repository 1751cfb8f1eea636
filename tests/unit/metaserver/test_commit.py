"""The committer: atomic changes that happen once, what replies wait for, durability, ids, checkpoints, bad disks."""

import errno
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from engine_rows import create, making, names, prepare

from metaserver.commit import Committer, EngineFailed, open_committer
from metaserver.errors import DfsError, ErrorCode
from metaserver.files import Files
from metaserver.ids import RANGES
from metaserver.logrecord import Position
from metaserver.protocol import MAKE
from metaserver.schema import IdKind, StoredAnswer, Table, answer_key, dentry_key, key_u64
from metaserver.start import DirectoryBusy, Options
from metaserver.store import CorruptStore
from metaserver.wire import Replay

QUIET = Options(checkpoint_seconds=3600, segment_bytes=1 << 20, map_bytes=1 << 20)
# A start that does not look through the store: for damage that comes later.
UNSUSPECTING = Options(checkpoint_seconds=3600, segment_bytes=1 << 20, map_bytes=1 << 20, check_seconds=0)
BOOT_1, BOOT_2 = b"1" * 16, b"2" * 16


class Gate(Files):
    """Syncs of the log wait until they are let through; or fail."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.open.set()
        self.error: OSError | None = None
        self.full = False

    def sync(self, descriptor: int) -> None:
        self.open.wait(30)
        if self.error is not None:
            raise self.error
        super().sync(descriptor)

    def create(self, path: Path, head: bytes, size: int) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().create(path, head, size)


@pytest.fixture
def gate() -> Gate:
    return Gate()


async def until(condition: Callable[[], bool]) -> None:
    """Worker threads have no event to wait for here."""
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.001)


async def durable(committer: Committer) -> None:
    await committer.wait_durable(committer.newest)


# -- changes -------------------------------------------------------------------------------------------------------


async def test_changes_are_there_after_a_restart(tmp_path: Path) -> None:
    async with open_committer(tmp_path, options=QUIET) as committer:
        assert (committer.epoch, committer.newest, committer.durable) == (1, 1, 1)
        prepare(committer)
        change = create(committer, b"a", operation=1)
        assert change.number == committer.newest == 4
        assert names(committer) == {b"a"}
        await durable(committer)
    async with open_committer(tmp_path, options=QUIET) as committer:
        assert (committer.epoch, committer.newest) == (2, 1)
        assert [(last.epoch, last.number) for last in committer.survived] == [(1, 4)]
        assert names(committer) == {b"a"}
        assert create(committer, b"b").message.entry.attributes.ino > change.ids[0]


async def test_a_change_that_raises_leaves_no_trace(tmp_path: Path) -> None:
    async with open_committer(tmp_path, options=QUIET) as committer:
        prepare(committer)
        newest = committer.newest

        def half(tx: Any, now_ns: int) -> None:
            making(b"a")(tx, now_ns)
            raise DfsError(ErrorCode.NO_SPACE)

        with pytest.raises(DfsError):
            committer.change(1, 1, half)
        with pytest.raises(ZeroDivisionError):
            committer.change(1, 1, lambda tx, _: 1 // (tx.put(Table.XATTRS, b"a", b"") or 0))
        assert committer.newest == newest
        assert names(committer) == set()
        assert (await committer.check()).problems == []


async def test_an_operation_happens_once(tmp_path: Path) -> None:
    async with open_committer(tmp_path, options=QUIET) as committer:
        prepare(committer)
        first = create(committer, b"a", operation=7)
        again = create(committer, b"a", operation=7)
        assert again.repeated
        assert (again.message, again.time_ns, again.ids) == (first.message, first.time_ns, first.ids)
        assert again.number == first.number, "still to be waited for by an fsync"
        assert MAKE.decode_reply(again.body).message == first.message
        await durable(committer)
        assert create(committer, b"a", operation=7).number == 0
        with pytest.raises(DfsError, match="exists"):
            create(committer, b"a", operation=8)
    async with open_committer(tmp_path, options=QUIET) as committer:
        late = create(committer, b"a", operation=7)
        assert (late.message, late.number) == (first.message, 0)


async def test_a_withdrawn_operation_is_refused(tmp_path: Path) -> None:
    async with open_committer(tmp_path, options=QUIET) as committer:
        prepare(committer)
        refusal = StoredAnswer(b"", ErrorCode.WITHDRAWN, "withdrawn").pack()
        committer.change(1, 0, lambda tx, _: tx.put(Table.ANSWERS, answer_key(1, 5), refusal))
        with pytest.raises(DfsError) as caught:
            create(committer, b"a", operation=5)
        assert caught.value.code is ErrorCode.WITHDRAWN


async def test_a_resent_change_gets_its_first_ids_and_time(tmp_path: Path) -> None:
    async with open_committer(tmp_path / "", options=QUIET, boot_id=BOOT_1) as committer:
        prepare(committer)
        first = create(committer, b"a", operation=1)
    lost = Replay(1, first.number, first.time_ns, (first.ids[0] + 1,))
    async with open_committer(tmp_path, options=QUIET, boot_id=BOOT_2) as committer:
        newer = create(committer, b"newer", operation=3)
        done = create(committer, b"b", operation=2, replay=lost)
        attributes = done.message.entry.attributes
        assert (attributes.ino, attributes.ctime_ns, done.time_ns) == (first.ids[0] + 1, first.time_ns, first.time_ns)
        assert create(committer, b"later").time_ns > newer.time_ns
        for wrong in ((), (newer.ids[0],), (newer.ids[0] + 10,)):
            with pytest.raises(DfsError) as caught:
                create(committer, b"c", operation=4, replay=Replay(1, 9, 5, wrong))
            assert caught.value.code is ErrorCode.INVALID
        future = Replay(1, 9, 1 << 62, (first.ids[0] + 2,))
        assert create(committer, b"c", operation=4, replay=future).time_ns < 1 << 62


async def test_time_never_stands_still_or_goes_back(tmp_path: Path) -> None:
    now = [1000]
    async with open_committer(tmp_path, options=QUIET, clock=lambda: now[0]) as committer:
        prepare(committer)
        times = [create(committer, b"%d" % number).time_ns for number in range(5)]
        now[0] = 10
        times.append(create(committer, b"back").time_ns)
        assert times == sorted(set(times))
    async with open_committer(tmp_path, options=QUIET, clock=lambda: 1) as committer:
        assert create(committer, b"restarted").time_ns > times[-1]


async def test_a_read_cannot_write_and_a_change_has_a_bound(tmp_path: Path) -> None:
    async with open_committer(tmp_path, options=QUIET) as committer:
        prepare(committer)
        for attempt in (
            lambda tx: tx.put(Table.XATTRS, b"a", b""),
            lambda tx: tx.delete(Table.XATTRS, b"a"),
            lambda tx: tx.allocate(IdKind.INODE),
        ):
            with pytest.raises(DfsError) as caught:
                committer.read(1, attempt)
            assert caught.value.code is ErrorCode.INTERNAL

        def huge(tx: Any, _: int) -> None:
            for number in range(4097):
                tx.put(Table.XATTRS, key_u64(number) + b"a", b"")

        with pytest.raises(DfsError) as caught:
            committer.change(1, 0, huge)
        assert caught.value.code is ErrorCode.INTERNAL
        assert committer.change(1, 0, lambda tx, _: tx.get(Table.XATTRS, b"a")).number == 0, "nothing to log"


# -- what replies wait for -----------------------------------------------------------------------------------------


async def test_only_what_others_did_is_waited_for(tmp_path: Path, gate: Gate) -> None:
    async with open_committer(tmp_path, options=QUIET, files=gate) as committer:
        prepare(committer)
        await durable(committer)
        gate.open.clear()
        mine = create(committer, b"a")
        assert mine.wait_for == 0

        def look(name: bytes) -> Callable[[Any], bytes | None]:
            return lambda tx: tx.get(Table.DENTRIES, dentry_key(1, name))

        assert committer.read(1, look(b"a"))[1] == 0
        assert committer.read(2, look(b"a"))[1] == mine.number
        assert committer.read(2, look(b"b"))[1] == 0
        other = create(committer, b"b", session=2)
        assert other.wait_for == mine.number, "it changed the directory that I changed before"
        with pytest.raises(DfsError, match="exists"):
            create(committer, b"b", session=1)
        assert committer.wait_for == other.number, "an error shows as much as an answer"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(committer.wait_durable, other.number)
            await trio.testing.wait_all_tasks_blocked()
            assert committer.durable < mine.number
            gate.open.set()
        assert committer.durable >= other.number
        assert committer.read(2, look(b"a"))[1] == 0


async def test_a_deletion_is_waited_for_too(tmp_path: Path, gate: Gate) -> None:
    async with open_committer(tmp_path, options=QUIET, files=gate) as committer:
        committer.change(1, 0, lambda tx, _: tx.put(Table.XATTRS, b"a", b""))
        await committer.checkpoint()
        gate.open.clear()
        gone = committer.change(1, 0, lambda tx, _: tx.delete(Table.XATTRS, b"a"))
        assert committer.read(2, lambda tx: tx.get(Table.XATTRS, b"a")) == (None, gone.number)
        assert committer.read(2, lambda tx: list(tx.scan(Table.XATTRS, b"", b"b"))) == ([], gone.number)
        gate.open.set()


async def test_who_must_wait_is_not_left_waiting_by_a_cancellation(tmp_path: Path) -> None:
    """Whoever has decided something waits, shielded, until it is durable: the log is synced as long as anybody does."""
    with trio.fail_after(20), trio.CancelScope() as scope:
        async with open_committer(tmp_path) as committer:
            prepare(committer)
            scope.cancel()
            with trio.CancelScope(shield=True):
                await trio.sleep(0.05)
                create(committer, b"decided")
                await committer.wait_durable(committer.newest)
    async with open_committer(tmp_path) as committer:
        assert b"decided" in names(committer)
        assert not committer.boot_lost_tail


async def test_who_must_wait_is_told_when_the_engine_ends_unexpectedly(tmp_path: Path, gate: Gate) -> None:
    with trio.fail_after(20), pytest.raises(BaseExceptionGroup) as caught:
        async with open_committer(tmp_path, options=QUIET, files=gate) as committer:
            prepare(committer)
            gate.error = ZeroDivisionError()  # type: ignore[assignment]
            create(committer, b"never durable")
            with trio.CancelScope(shield=True):
                await committer.wait_durable(committer.newest)
    assert caught.group_contains(ZeroDivisionError, depth=None)
    assert caught.group_contains(EngineFailed, depth=None)


async def test_waiters_wake_together(tmp_path: Path, gate: Gate) -> None:
    async with open_committer(tmp_path, options=QUIET, files=gate) as committer:
        prepare(committer)
        await durable(committer)
        gate.open.clear()
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(committer.wait_durable, create(committer, b"%d" % number).number)
            gate.open.set()
        await committer.wait_durable(0)
        with pytest.raises(DfsError) as caught:
            await committer.wait_durable(committer.newest + 1)
        assert caught.value.code is ErrorCode.INVALID


# -- ids -----------------------------------------------------------------------------------------------------------


async def test_ids_are_never_given_out_twice(tmp_path: Path) -> None:
    seen: list[int] = []

    def take(tx: Any, _: int) -> int:
        number: int = tx.allocate(IdKind.SESSION)
        tx.put(Table.XATTRS, key_u64(number), b"")
        return number

    for _ in range(3):
        async with open_committer(tmp_path, options=QUIET) as committer:
            for number in range(RANGES[IdKind.SESSION] * 2 + 10):
                seen.append(committer.change(0, 0, take).message)
                assert seen[-1] < committer.id_limit(IdKind.SESSION)
                if number % 50 == 0:
                    await durable(committer)
    assert len(set(seen)) == len(seen)
    assert seen == sorted(seen)


async def test_ids_that_run_out_before_the_disk_answers_are_synced_for(tmp_path: Path) -> None:
    def take(tx: Any, _: int) -> list[int]:
        return [tx.allocate(IdKind.SESSION) for _ in range(RANGES[IdKind.SESSION] - 1)]

    async with open_committer(tmp_path, options=QUIET) as committer:
        # All in one go: the log task never runs.
        first = committer.change(0, 0, take).message
        second = committer.change(0, 0, take).message
        assert not set(first) & set(second)
        assert committer.durable > 1


async def test_a_failed_change_may_use_up_ids_but_nothing_else(tmp_path: Path) -> None:
    async with open_committer(tmp_path, options=QUIET) as committer:
        prepare(committer)
        create(committer, b"a")
        for _ in range(3):
            with pytest.raises(DfsError):
                create(committer, b"a")
        assert create(committer, b"b").ids[0] > 2
        assert (await committer.check()).problems == []


# -- checkpoints ---------------------------------------------------------------------------------------------------


async def test_reads_and_changes_go_on_during_a_checkpoint(tmp_path: Path, gate: Gate) -> None:
    async with open_committer(tmp_path, options=QUIET, files=gate) as committer:
        prepare(committer)
        create(committer, b"frozen")
        gate.open.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(committer.checkpoint)
            await trio.testing.wait_all_tasks_blocked()
            assert committer._layers.frozen is not None
            create(committer, b"newer")
            assert names(committer) == {b"frozen", b"newer"}
            gate.open.set()
        assert committer._layers.frozen is None
        assert committer.checkpointed == Position(1, 4)
        assert names(committer) == {b"frozen", b"newer"}
        assert len(committer._layers.overlay)


async def test_checkpoints_come_by_themselves(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    options = Options(checkpoint_changes=50, segment_bytes=1 << 20)
    async with open_committer(tmp_path, options=options, run_sync=inline) as committer:
        prepare(committer)
        create(committer, b"a")
        await trio.sleep(11)
        assert committer.checkpointed.number == committer.newest
        for number in range(50):
            create(committer, b"%d" % number)
        await trio.sleep(0.1)
        assert committer.checkpointed.number == committer.newest


async def inline(function: Callable[..., Any], *arguments: Any) -> Any:
    """In place of a thread: a simulated clock must not run on meanwhile."""
    await trio.lowlevel.checkpoint()
    return function(*arguments)


async def test_nobody_meets_a_full_map(tmp_path: Path) -> None:
    async with open_committer(tmp_path, options=QUIET) as committer:
        prepare(committer)
        for number in range(6000):
            create(committer, b"%d" % number)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(committer.checkpoint)
            while committer.checkpointed.number < 6000:
                assert len(names(committer)) >= 6000
                await trio.sleep(0.01)
        assert committer.store.sizes()["map_bytes"] > 1 << 20
        assert (await committer.check()).problems == []


async def test_a_check_runs_beside_changes(tmp_path: Path) -> None:
    async with open_committer(tmp_path, options=QUIET) as committer:
        prepare(committer)
        for number in range(500):
            create(committer, b"%d" % number)

        async def change() -> None:
            for number in range(1 << 30):
                create(committer, b"more %d" % number)
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            report = await committer.check()
            assert len(names(committer)) > 500, "changes went on"
            nursery.cancel_scope.cancel()
        assert report.problems == []
        assert report.rows >= 1500


# -- full and failing disks ----------------------------------------------------------------------------------------


async def test_on_a_full_disk_only_deletions_go_on(tmp_path: Path, gate: Gate) -> None:
    options = Options(checkpoint_seconds=3600, segment_bytes=1 << 16, retry_seconds=0.01)
    async with open_committer(tmp_path, options=options, files=gate) as committer:
        prepare(committer)
        await until(lambda: committer.log.prepared)
        gate.full = True
        count = 0
        with pytest.raises(DfsError) as caught:
            while True:
                create(committer, b"%d" % count)
                count += 1
                await trio.sleep(0.0005)
        assert caught.value.code is ErrorCode.NO_SPACE
        assert count > 100

        def remove(tx: Any, _: int) -> None:
            tx.delete(Table.XATTRS, b"a")

        for _ in range(100):
            committer.change(1, 0, remove, frees=True)
        # What was answered before a crash and is done again is owed, too.
        owed = committer.change(1, 0, remove, replay=Replay(committer.epoch - 1, 5, 1, ()))
        assert owed.number == committer.newest
        await durable(committer)
        await committer.checkpoint()
        assert len(names(committer)) == count
        gate.full = False
        await until(lambda: not committer.log_full)
        create(committer, b"space again")


class SmallDisk(Files):
    """A file system in which a segment fits only as long as there is no reserve, or ``space`` is there."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.reserve_path = directory / "reserve"
        self.space = True

    def create(self, path: Path, head: bytes, size: int) -> int:
        if not self.space and self.reserve_path.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().create(path, head, size)

    def reserve(self, path: Path, size: int) -> None:
        if not self.space:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().reserve(path, size)


async def test_a_start_on_a_full_disk_uses_the_reserve(tmp_path: Path) -> None:
    options = Options(checkpoint_seconds=3600, segment_bytes=1 << 16, reserve_bytes=1 << 12, retry_seconds=0.01)
    files = SmallDisk(tmp_path)
    async with open_committer(tmp_path, options=options, files=files) as committer:
        prepare(committer)
        create(committer, b"a")
        await until(files.reserve_path.exists)
    files.space = False
    async with open_committer(tmp_path, options=options, files=files) as committer:
        assert not files.reserve_path.exists()
        await until(lambda: committer.log_full)
        with pytest.raises(DfsError) as caught:
            create(committer, b"b")
        assert caught.value.code is ErrorCode.NO_SPACE
        committer.change(1, 0, lambda tx, _: tx.delete(Table.XATTRS, b"x"), frees=True)
        files.space = True
        await until(lambda: not committer.log_full)
        assert files.reserve_path.stat().st_size == 1 << 12
        create(committer, b"b")


async def test_a_checkpoint_on_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metaserver import store

    options = Options(checkpoint_seconds=3600, segment_bytes=1 << 20, retry_seconds=0.01)
    async with open_committer(tmp_path, options=options) as committer:
        prepare(committer)
        full = True
        real = committer.store.write

        def write(rows: Any, *derive: Any) -> None:
            if full:
                raise store.StoreFull
            real(rows, *derive)

        monkeypatch.setattr(committer.store, "write", write)
        create(committer, b"a")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(committer.checkpoint)
            await until(lambda: committer.store_full)
            with pytest.raises(DfsError) as caught:
                create(committer, b"b")
            assert caught.value.code is ErrorCode.NO_SPACE
            assert names(committer) == {b"a"}
            committer.change(1, 0, lambda tx, _: tx.delete(Table.XATTRS, b"x"), frees=True)
            full = False
        assert not committer.store_full
        create(committer, b"b")
    async with open_committer(tmp_path, options=options) as committer:
        assert names(committer) == {b"a", b"b"}


async def failing(
    tmp_path: Path, body: Callable[[Committer], Any], options: Options = QUIET, **arguments: Any
) -> list[BaseException]:
    """The failures that end the engine while ``body`` runs."""
    with pytest.raises(BaseExceptionGroup) as caught:
        async with open_committer(tmp_path, options=options, **arguments) as committer:
            await body(committer)
            await trio.sleep(10)
            raise AssertionError("the engine goes on")
    leaves: list[BaseException] = []
    pending: list[BaseException] = [caught.value]
    while pending:
        error = pending.pop()
        if isinstance(error, BaseExceptionGroup):
            pending.extend(error.exceptions)
        else:
            leaves.append(error)
    return leaves


async def test_a_failed_sync_ends_the_process(tmp_path: Path, gate: Gate) -> None:
    async def body(committer: Committer) -> None:
        prepare(committer)
        gate.error = OSError(errno.EIO, "Input/output error")
        create(committer, b"a")
        with suppress(trio.Cancelled), pytest.raises(EngineFailed):
            await durable(committer)
        with pytest.raises(EngineFailed):
            create(committer, b"b")
        with pytest.raises(EngineFailed):
            names(committer)

    assert {type(error) for error in await failing(tmp_path, body, files=gate)} == {EngineFailed}


class BrokenWrites(Files):
    broken = False

    def _write(self, descriptor: int, data: bytes, offset: int) -> None:
        if self.broken:
            raise OSError(errno.EIO, "Input/output error")
        super()._write(descriptor, data, offset)


async def test_a_failed_write_ends_the_process(tmp_path: Path) -> None:
    files = BrokenWrites()

    async def body(committer: Committer) -> None:
        prepare(committer)
        await until(lambda: committer.log.prepared)
        files.broken = True
        for _ in range(2):
            with pytest.raises(EngineFailed):
                create(committer, b"a")

    assert {type(error) for error in await failing(tmp_path, body, files=files)} == {EngineFailed}
    async with open_committer(tmp_path, options=QUIET) as committer:
        assert names(committer) == set()


async def test_a_damaged_row_ends_the_process(tmp_path: Path) -> None:
    async with open_committer(tmp_path, options=QUIET) as committer:
        prepare(committer)
        create(committer, b"a-name-that-can-be-found")
    path = tmp_path / "data.mdb"
    path.write_bytes(path.read_bytes().replace(b"a-name-that-can-be-found", b"a-name-that-can-be-fOund"))

    async def body(committer: Committer) -> None:
        for _ in range(2):
            with pytest.raises(EngineFailed, match="metaserver recover"):
                names(committer)

    with pytest.raises(CorruptStore, match="wrong checksum"):
        async with open_committer(tmp_path, options=QUIET):
            pass
    failures = await failing(tmp_path, body, UNSUSPECTING)
    assert {(type(error), getattr(error, "damaged", None)) for error in failures} == {(EngineFailed, True)}


async def test_a_slow_walk_finds_damage_nobody_reads(tmp_path: Path) -> None:
    async with open_committer(tmp_path, options=QUIET) as committer:
        prepare(committer)
        create(committer, b"a-name-that-can-be-found")
    path = tmp_path / "data.mdb"
    path.write_bytes(path.read_bytes().replace(b"a-name-that-can-be-found", b"a-name-that-can-be-fOund"))
    options = Options(verify_seconds=0.01, verify_pause_seconds=0, segment_bytes=1 << 20, check_seconds=0)
    with pytest.raises(BaseExceptionGroup):
        async with open_committer(tmp_path, options=options):
            await trio.sleep(10)
            raise AssertionError("the damage was not found")


# -- starting ------------------------------------------------------------------------------------------------------


async def test_one_process_at_a_time(tmp_path: Path) -> None:
    async with open_committer(tmp_path, options=QUIET):
        with pytest.raises(DirectoryBusy):
            async with open_committer(tmp_path, options=QUIET):
                pass


async def test_a_missing_store_is_not_replaced_by_an_empty_one(tmp_path: Path) -> None:
    async with open_committer(tmp_path, options=QUIET) as committer:
        prepare(committer)
    (tmp_path / "data.mdb").unlink()
    with pytest.raises(CorruptStore, match="missing"):
        async with open_committer(tmp_path, options=QUIET):
            pass
    assert not (tmp_path / "data.mdb").exists()


async def crash(tmp_path: Path, boot_id: bytes, work: Callable[[Committer], Any]) -> None:
    """An epoch that ends like kill -9."""

    class Killed(Exception):
        pass

    with pytest.raises(BaseExceptionGroup):
        async with open_committer(tmp_path, options=QUIET, boot_id=boot_id) as committer:
            work(committer)
            raise Killed


async def test_it_is_known_whether_a_tail_can_have_been_lost(tmp_path: Path) -> None:
    async def lost(boot_id: bytes) -> bool:
        async with open_committer(tmp_path, options=QUIET, boot_id=boot_id) as committer:
            return committer.boot_lost_tail

    await crash(tmp_path, BOOT_1, prepare)
    assert not await lost(BOOT_1), "the page cache kept everything"
    assert not await lost(BOOT_2), "it was stopped on purpose"
    await crash(tmp_path, BOOT_2, lambda committer: create(committer, b"a"))
    await crash(tmp_path, BOOT_1, lambda committer: committer.boot_lost_tail or pytest.fail("power was lost"))
    assert await lost(BOOT_1), "the window of the last start was not closed"
    await crash(tmp_path, BOOT_1, lambda committer: committer.window_closed())
    assert not await lost(BOOT_1)


async def test_many_starts_keep_a_bounded_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaserver.start.SURVIVED_EPOCHS", 3)
    for _ in range(6):
        await crash(tmp_path, BOOT_1, lambda committer: create_once(committer))
    async with open_committer(tmp_path, options=QUIET) as committer:
        assert [last.epoch for last in committer.survived] == [4, 5, 6]
        assert committer.epoch == 7
        sizes = [path.stat().st_blocks * 512 for path in (tmp_path / "changelog").iterdir()]
        assert sum(size >= QUIET.segment_bytes for size in sizes) <= 2
        assert names(committer) == {b"epoch %d" % epoch for epoch in range(1, 7)}


def create_once(committer: Committer) -> None:
    if committer.epoch == 1:
        prepare(committer)
    create(committer, b"epoch %d" % committer.epoch)

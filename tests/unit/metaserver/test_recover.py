"""Snapshot files, and rebuilding the store from them and the log, whatever happened to it."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from engine_rows import create, names, prepare
from msgspec.structs import replace

from metaserver.commit import Committer, EngineFailed, open_committer
from metaserver.files import Files
from metaserver.ids import RANGES
from metaserver.logrecord import FIRST_RECORD
from metaserver.offline import check_directory
from metaserver.recover import ADVANCE_IDS, Minimum, recover
from metaserver.replay import CorruptLog
from metaserver.schema import IdKind
from metaserver.snapshot import SnapshotFailed, kept_from, list_snapshots, verify_snapshot
from metaserver.start import DirectoryBusy, Options
from metaserver.store import CorruptStore, StoreFull

OPTIONS = Options(checkpoint_seconds=3600, segment_bytes=1 << 16, map_bytes=1 << 20)


class Killed(Exception):
    """Stands for kill -9: nothing is put in order."""


async def epoch(
    directory: Path, work: Callable[[Committer], object] | None = None, *, snapshot: bool = False, kill: bool = True
) -> int:
    """One life of the metaserver that creates a file named after it; returns the epoch."""
    number = 0
    try:
        async with open_committer(directory, options=OPTIONS) as committer:
            number = committer.epoch
            if committer.epoch == 1:
                prepare(committer)
            create(committer, b"epoch %d" % committer.epoch)
            if work is not None:
                work(committer)
            if snapshot:
                await committer.snapshot()
                create(committer, b"after %d" % committer.epoch)
            await committer.wait_durable(committer.newest)
            if kill:
                raise Killed
    except BaseExceptionGroup as group:
        if group.split(Killed)[1] is not None:
            raise
    return number


async def state(directory: Path) -> set[bytes]:
    assert check_directory(directory).problems == []
    async with open_committer(directory, options=OPTIONS) as committer:
        assert (await committer.check()).problems == []
        return names(committer)


def many(count: int) -> Callable[[Committer], None]:
    def work(committer: Committer) -> None:
        for number in range(count):
            create(committer, b"%d of %d" % (number, committer.epoch))

    return work


async def test_a_snapshot_is_what_the_store_was(tmp_path: Path) -> None:
    await epoch(tmp_path, snapshot=True)
    (snapshot,) = list_snapshots(tmp_path / "snapshots")
    assert verify_snapshot(snapshot.path) == snapshot.position == (1, 4)
    assert snapshot.path.stat().st_mode & 0o777 == 0o600
    assert kept_from(tmp_path / "snapshots") is None


async def test_two_snapshots_are_kept_and_the_log_they_need(tmp_path: Path) -> None:
    async with open_committer(tmp_path, options=OPTIONS) as committer:
        prepare(committer)
        for round_ in range(4):
            for number in range(300):
                create(committer, b"%d %d" % (round_, number))
            await committer.snapshot()
        snapshots = list_snapshots(tmp_path / "snapshots")
        assert [snapshot.position.number for snapshot in snapshots] == [1203, 903]
        firsts = [segment.first for segment in committer.log.kept]
        assert firsts[0] <= 904 < firsts[1]
    shutil.copytree(tmp_path, tmp_path.with_name(tmp_path.name + "-copy"))
    for path in (tmp_path, tmp_path.with_name(tmp_path.name + "-copy")):
        (path / "data.mdb").unlink()
    list_snapshots(tmp_path / "snapshots")[0].path.unlink()
    assert recover(tmp_path).snapshot == snapshots[1].path.name
    assert recover(tmp_path.with_name(tmp_path.name + "-copy")).snapshot == snapshots[0].path.name
    assert len(await state(tmp_path)) == 1200
    assert len(await state(tmp_path.with_name(tmp_path.name + "-copy"))) == 1200


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for position in range(8192, len(data), 64):
        data[position] ^= 0x10
    path.write_bytes(data)


def cut_off(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(10_000)


DAMAGES: dict[str, Callable[[Path], object]] = {"deleted": Path.unlink, "cut off": cut_off, "flipped": damage}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("snapshot", [False, True])
async def test_any_damage_to_the_store_is_found_and_recovered(tmp_path: Path, name: str, snapshot: bool) -> None:
    await epoch(tmp_path, many(50))
    await epoch(tmp_path, many(50), snapshot=snapshot)
    await epoch(tmp_path, many(50), kill=False)
    expected = await state(tmp_path)
    assert len(expected) == 3 * 51 + snapshot
    DAMAGES[name](tmp_path / "data.mdb")
    with pytest.raises(CorruptStore):
        check_directory(tmp_path)
    report = recover(tmp_path)
    assert bool(report.snapshot) == snapshot
    assert report.changes >= 50
    assert await state(tmp_path) == expected
    assert (tmp_path / "data.mdb.damaged").exists() == (name != "deleted")
    assert await epoch(tmp_path) == 6


async def test_a_recovered_metaserver_asks_clients_what_they_know(tmp_path: Path) -> None:
    await epoch(tmp_path, kill=False)
    recover(tmp_path)
    async with open_committer(tmp_path, options=OPTIONS) as committer:
        assert committer.boot_lost_tail
        assert [(last.epoch, last.number) for last in committer.survived] == [(1, 4)]
        committer.window_closed()


async def test_a_damaged_snapshot_is_passed_over(tmp_path: Path) -> None:
    await epoch(tmp_path, snapshot=True)
    await epoch(tmp_path, snapshot=True)
    newest, older = list_snapshots(tmp_path / "snapshots")
    damage(newest.path)
    (tmp_path / "snapshots" / "notes.mdb").write_text("not a snapshot")
    report = recover(tmp_path)
    assert report.snapshot == older.path.name
    assert any("cannot be used" in line for line in report.lines)
    assert await state(tmp_path) == {b"epoch 1", b"after 1", b"epoch 2", b"after 2"}


async def test_without_a_whole_snapshot_and_a_whole_log_there_is_no_recovery(tmp_path: Path) -> None:
    async with open_committer(tmp_path, options=OPTIONS) as committer:
        prepare(committer)
        for _ in range(3):
            many(300)(committer) if not names(committer) else create(committer, b"%d" % committer.newest)
            await committer.snapshot()
    for snapshot in list_snapshots(tmp_path / "snapshots"):
        damage(snapshot.path)
    before = (tmp_path / "data.mdb").read_bytes()
    with pytest.raises(CorruptStore, match=r"the changelog only starts after 1/.*backup"):
        recover(tmp_path)
    assert (tmp_path / "data.mdb").read_bytes() == before


def break_record(directory: Path, number: int) -> None:
    """Damages the change that created ``number``."""
    for path in sorted((directory / "changelog").glob("*.log")):
        data = bytearray(path.read_bytes())
        position = data.find(b"%d of 1" % number, FIRST_RECORD)
        if position >= 0:
            data[position] ^= 1
            path.write_bytes(data)
            return
    raise AssertionError("not found")


async def test_damage_in_the_middle_of_the_log_is_refused(tmp_path: Path) -> None:
    await epoch(tmp_path, many(50))
    await epoch(tmp_path)
    break_record(tmp_path, 20)
    assert len(await state(tmp_path)) == 52, "the store has it; nobody needs the log yet"
    (tmp_path / "data.mdb").unlink()
    with pytest.raises(CorruptLog, match="change 1/25 is damaged"):
        recover(tmp_path)
    left = ("data.mdb", "data.mdb.recovered", "data.mdb.recovered-lock")
    assert not any((tmp_path / name).exists() for name in left)
    report = recover(tmp_path, accept_loss=True)
    assert any(line.startswith("LOST") for line in report.lines)
    assert await state(tmp_path) == {b"epoch 1"} | {b"%d of 1" % number for number in range(20)}
    async with open_committer(tmp_path, options=OPTIONS) as committer:
        assert committer.epoch > 3
        assert create(committer, b"new").ids[0] > 50 + ADVANCE_IDS, "no id of a lost inode comes again"
        await committer.snapshot()
    (tmp_path / "data.mdb").unlink()
    recover(tmp_path)
    assert b"new" in await state(tmp_path)


async def test_a_log_damaged_below_what_was_promised_stops_the_start(tmp_path: Path) -> None:
    await epoch(tmp_path)
    shutil.copyfile(tmp_path / "data.mdb", tmp_path / "old")
    with pytest.raises(BaseExceptionGroup):
        async with open_committer(tmp_path, options=OPTIONS) as committer:
            for number in range(10):
                create(committer, b"%d of 1" % number)
                await committer.wait_durable(committer.newest)
            raise Killed
    break_record(tmp_path, 5)
    with pytest.raises(CorruptLog, match="metaserver recover"):
        async with open_committer(tmp_path, options=OPTIONS):
            pass


async def test_a_state_that_went_back_can_be_declared_the_newest(tmp_path: Path) -> None:
    await epoch(tmp_path, kill=False)
    report = recover(tmp_path, minimum=Minimum(epoch=40, chunk=1 << 20))
    assert any("epoch 41" in line for line in report.lines)
    async with open_committer(tmp_path, options=OPTIONS) as committer:
        assert committer.epoch == 42
        assert committer.id_limit(IdKind.CHUNK) > 1 << 20
        assert names(committer) == {b"epoch 1"}


async def test_nothing_is_done_to_a_running_metaserver(tmp_path: Path) -> None:
    async with open_committer(tmp_path, options=OPTIONS):
        with pytest.raises(DirectoryBusy):
            recover(tmp_path)
        with pytest.raises(DirectoryBusy):
            check_directory(tmp_path)


async def test_an_older_store_catches_up_with_the_log(tmp_path: Path) -> None:
    await epoch(tmp_path, kill=False)
    shutil.copyfile(tmp_path / "data.mdb", tmp_path / "old")
    await epoch(tmp_path, many(200), kill=False)
    await epoch(tmp_path, kill=False)
    (tmp_path / "old").rename(tmp_path / "data.mdb")
    assert len(await state(tmp_path)) == 203


async def test_ids_of_a_lost_epoch_are_not_used_again(tmp_path: Path) -> None:
    """Every start writes its ranges to the log before it uses them."""
    await epoch(tmp_path, snapshot=True)
    for _ in range(3):
        await epoch(tmp_path)
    (tmp_path / "data.mdb").unlink()
    recover(tmp_path)
    async with open_committer(tmp_path, options=OPTIONS) as committer:
        assert create(committer, b"new").ids[0] >= 4 * RANGES[IdKind.INODE]


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


async def test_the_check_of_a_directory_changes_nothing(tmp_path: Path) -> None:
    await epoch(tmp_path, many(20))
    before = contents(tmp_path)
    report = check_directory(tmp_path)
    assert report.problems == []
    assert contents(tmp_path) == before


async def test_much_log_makes_a_snapshot(tmp_path: Path) -> None:
    options = Options(checkpoint_seconds=0.01, snapshot_log_bytes=20_000, segment_bytes=1 << 16, map_bytes=1 << 20)
    async with open_committer(tmp_path, options=options) as committer:
        prepare(committer)
        many(100)(committer)
        with trio.fail_after(10):
            while committer.log.appended >= 20_000:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert len(list_snapshots(tmp_path / "snapshots")) == 1


async def test_two_snapshots_at_once_do_not_count_twice(tmp_path: Path) -> None:
    """The hourly one and that for what was found damaged: the next would come after twice as much log."""
    async with open_committer(tmp_path, options=OPTIONS) as committer:
        prepare(committer)
        many(20)(committer)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(committer.snapshot)
            nursery.start_soon(committer.snapshot)
        assert committer.log.appended == 0


async def test_no_space_for_a_snapshot_is_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_committer(tmp_path, options=OPTIONS) as committer:
        prepare(committer)

        def full(_: Path) -> None:
            raise StoreFull

        monkeypatch.setattr(committer.store, "copy", full)
        with pytest.raises(StoreFull):
            await committer.snapshot()
        create(committer, b"a")
        assert list((tmp_path / "snapshots").iterdir()) == []


class FailingFiles(Files):
    """Syncs whose path contains ``failing`` fail."""

    failing = ""

    def sync_path(self, path: Path) -> None:
        self._fail(path)
        super().sync_path(path)

    def sync_directory(self, path: Path) -> None:
        self._fail(path)
        super().sync_directory(path)

    def _fail(self, path: Path) -> None:
        if self.failing and self.failing in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


@pytest.mark.parametrize("failing", ["snapshots/new", "snapshots"])
async def test_a_snapshot_that_cannot_be_written_is_tried_again(tmp_path: Path, failing: str) -> None:
    files = FailingFiles()
    options = replace(OPTIONS, checkpoint_seconds=0.01)
    async with open_committer(tmp_path, options=options, files=files) as committer:
        prepare(committer)
        files.failing = f"{tmp_path.name}/{failing}"
        with pytest.raises(SnapshotFailed, match=rf"Input/output error.*{failing}"):
            await committer.snapshot()
        assert failing in committer.snapshot_failure
        assert committer.unprotected
        # A name that may not outlive a power cut counts for nothing.
        assert list((tmp_path / "snapshots").iterdir()) == []
        create(committer, b"a")
        await trio.sleep(0.1)
        assert committer.unprotected
        files.failing = ""
        with trio.fail_after(30):
            while committer.unprotected:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert len(list_snapshots(tmp_path / "snapshots")) == 1


async def test_a_snapshot_that_is_damaged_when_it_is_read_back_is_tried_again(tmp_path: Path) -> None:
    spoiled = []

    def spoil(step: str) -> None:
        if step == "snapshot:before-sync" and not spoiled:
            spoiled.append(step)
            cut_off(tmp_path / "snapshots" / "new")

    async with open_committer(tmp_path, options=OPTIONS, files=Files(spoil)) as committer:
        prepare(committer)
        with pytest.raises(SnapshotFailed) as caught:
            await committer.snapshot()
        assert "snapshots/new" in str(caught.value)
        assert "recover" not in str(caught.value), "the store is whole"
        create(committer, b"a")
        assert list((tmp_path / "snapshots").iterdir()) == []
        await committer.snapshot()
        assert not committer.unprotected


async def test_a_damaged_store_makes_no_snapshot(tmp_path: Path) -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        async with open_committer(tmp_path, options=OPTIONS) as committer:
            prepare(committer)
            many(200)(committer)
            await committer.checkpoint()
            path = tmp_path / "data.mdb"
            data = path.read_bytes()
            at = data.rindex(b"host")
            with path.open("r+b") as file:
                file.seek(at)
                file.write(b"HOST")
            with pytest.raises(EngineFailed):
                await committer.snapshot()
    assert caught.group_contains(EngineFailed)
    assert list_snapshots(tmp_path / "snapshots") == []


@pytest.mark.parametrize("step", ["snapshot:before-copy", "snapshot:before-sync", "snapshot:before-rename"])
async def test_an_interrupted_snapshot_is_none(tmp_path: Path, step: str) -> None:
    def stop(name: str) -> None:
        if name == step:
            raise Killed

    with pytest.raises(BaseExceptionGroup):
        async with open_committer(tmp_path, options=OPTIONS, files=Files(stop)) as committer:
            prepare(committer)
            await committer.snapshot()
    assert list_snapshots(tmp_path / "snapshots") == []
    await state(tmp_path)

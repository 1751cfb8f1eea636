"""The engine on a file system that is really full: a small tmpfs would need root, so its bytes are counted here."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
from engine_rows import create, names, prepare
from msgspec.structs import replace

from metaserver.changelog import Changelog, KeptSegment, LogFull, epoch_logs, find_firsts, list_segments
from metaserver.commit import Committer, open_committer
from metaserver.errors import DfsError, ErrorCode
from metaserver.files import Files
from metaserver.logrecord import FIRST_RECORD, Position
from metaserver.overlay import row_key
from metaserver.replay import replay
from metaserver.schema import Table
from metaserver.snapshot import list_snapshots
from metaserver.start import RESERVE_NAME, SNAPSHOTS_NAME, Options

SEGMENT = 1 << 16
OPTIONS = Options(
    checkpoint_seconds=0.2,
    checkpoint_changes=200,
    segment_bytes=SEGMENT,
    reserve_bytes=1 << 14,
    store_reserve_bytes=1 << 14,
    map_bytes=1 << 22,
    retry_seconds=0.01,
)


class CountedFiles(Files):
    """Once ``full``, no file can be made or grown; what is there can be written, renamed and removed."""

    full = False

    def create(self, path: Path, head: bytes, size: int) -> int:
        self._refuse()
        return super().create(path, head, size)

    def reserve(self, path: Path, size: int) -> None:
        if not path.exists() or path.stat().st_size < size:
            self._refuse()
        super().reserve(path, size)

    def _refuse(self) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.002)


async def fill(committer: Committer) -> None:
    """New files until there is no space for them."""
    with pytest.raises(DfsError) as caught:
        for number in range(100_000):
            create(committer, b"%d" % number)
            if number % 20 == 0:
                await trio.sleep(0.001)
    assert caught.value.code is ErrorCode.NO_SPACE


def touch(tx: Any, now_ns: int) -> None:
    tx.put(Table.XATTRS, b"touched", b"%d" % now_ns * 10)


async def test_what_frees_space_goes_on_without_end(tmp_path: Path) -> None:
    files = CountedFiles()
    async with open_committer(tmp_path, options=OPTIONS, files=files) as committer:
        prepare(committer)
        await until(lambda: committer.log.prepared and (tmp_path / "reserve").exists())
        files.full = True
        await fill(committer)
        before = names(committer)
        # More than ten segments of the log.
        for count in range(5000):
            await insist(committer, touch)
            if count % 10 == 0:
                await trio.sleep(0.001)
        assert committer.log.recycled > 5
        assert committer.is_full
        with pytest.raises(DfsError):
            create(committer, b"new")
        assert names(committer) == before
        assert list_snapshots(tmp_path / SNAPSHOTS_NAME) == []
        files.full = False
        await until(lambda: not committer.is_full)
        create(committer, b"new")
        # As soon as there is space, the store can be rebuilt again.
        await until(lambda: bool(list_snapshots(tmp_path / SNAPSHOTS_NAME)))
        await until(lambda: not committer.log.recycled)
    async with open_committer(tmp_path, options=OPTIONS) as committer:
        assert names(committer) == before | {b"new"}


async def test_a_snapshot_does_not_make_up_for_segments_used_again_while_it_was_made(tmp_path: Path) -> None:
    def recycle(name: str) -> None:
        if name == "snapshot:before-copy":
            committer.log.recycled += 1

    async with open_committer(
        tmp_path, options=replace(OPTIONS, checkpoint_seconds=3600.0), files=Files(recycle)
    ) as committer:
        prepare(committer)
        committer.log.recycled = 2
        await committer.snapshot()
        assert committer.log.recycled == 1


async def insist(committer: Committer, change: Callable[[Any, int], None]) -> None:
    """Segments are so small here that changes come faster than room is made for them."""
    with trio.fail_after(10):
        while True:
            try:
                committer.change(1, 0, change, frees=True)
            except DfsError as error:
                assert error.code is ErrorCode.NO_SPACE
                await trio.sleep(0.01)
            else:
                return


class Killed(Exception):
    """As kill -9 at that point."""


async def test_starts_on_a_full_disk_need_no_reserve(tmp_path: Path) -> None:
    files = CountedFiles()
    async with open_committer(tmp_path, options=OPTIONS, files=files) as committer:
        prepare(committer)
        await until(lambda: committer.log.prepared and (tmp_path / "reserve").exists())
    for life in range(6):
        with pytest.raises(BaseExceptionGroup) as caught:
            # A start may make its segment (the log of the life before gives space back), nothing else.
            files.full = False
            async with open_committer(tmp_path, options=OPTIONS, files=files) as committer:
                files.full = True
                await until(lambda: committer.log_full)
                for _ in range(600):
                    await insist(committer, touch)
                await insist(committer, lambda tx, _, life=life: tx.put(Table.XATTRS, b"life", b"%d" % life))
                raise Killed
        assert caught.value.split(Killed)[1] is None, repr(caught.value)
    async with open_committer(tmp_path, options=OPTIONS) as committer:
        found, _ = committer.read(0, lambda tx: tx.get(Table.XATTRS, b"life"))
        assert found == b"5"


class Journal(Files):
    """A directory whose renames a power cut undoes unless the directory was synced; written bytes may stay."""

    def __init__(self) -> None:
        super().__init__(self._at)
        self.renamed: list[tuple[Path, Path]] = []
        self.cut_at = ""

    def _at(self, name: str) -> None:
        if name == "segment:before-recycle":
            self.renamed.clear()
        if name == self.cut_at:
            raise PowerCut

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        self.renamed.clear()


class PowerCut(BaseException):
    """Nothing is done any more."""


@pytest.mark.parametrize("step", ["segment:before-sync", "segment:before-rename"])
def test_a_power_cut_while_a_segment_is_used_again_leaves_a_log_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    files = Journal()
    log = Changelog(tmp_path, [], 1, Position(0, 0), files, SEGMENT)
    number = 0
    while len(log.kept) < 3:
        number += 1
        log.append(number, number - 1, 0, 0, 0, {row_key(Table.XATTRS, b"key"): bytes(1000)})
    batch = log.unsynced()
    log.sync(batch)
    log.synced(batch)
    log.obsolete = Position(1, number)
    monkeypatch.setattr(files, "create", lambda *_: raise_full())
    rename = os.rename

    def note(old: Path, new: Path) -> None:
        rename(old, new)
        files.renamed.append((old, new))

    monkeypatch.setattr("os.rename", note)
    # What the dying process would tidy up is not done after a power cut.
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    files.cut_at = step
    log._next = None
    with pytest.raises(PowerCut):
        log.prepare(recycling=True)
    for old, new in reversed(files.renamed):
        rename(new, old)
    for leftover in tmp_path.glob("*.new"):
        os.unlink(leftover)
    segments = list_segments(tmp_path)
    find_firsts(segments)
    logs = epoch_logs(segments, Position(1, number))
    assert replay(Position(1, number), logs, lambda _: None).end == (1, number)
    log.close()


def raise_full() -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def test_a_map_that_cannot_grow_ends_the_engine_with_a_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(checkpoint_seconds=0.05, segment_bytes=1 << 20, map_bytes=1 << 17, store_reserve_bytes=0)
    with pytest.raises(BaseExceptionGroup) as caught:
        async with open_committer(tmp_path, options=options) as committer:
            prepare(committer)

            def grow() -> None:
                raise MemoryError("no address space")

            monkeypatch.setattr(committer.store, "grow", grow)
            for number in range(3000):
                create(committer, b"%d" % number)
            await trio.sleep(10)
    assert "map cannot grow" in repr(caught.value.exceptions)


# -- what a power cut leaves of a segment that was used again ----------------------------------------------------------


def append_one(log: Changelog, number: int, size: int = 1000) -> None:
    log.append(number, 0, 0, 0, number, {row_key(Table.XATTRS, b"%d" % number): bytes(size)})


def replayed(directory: Path, start: Position) -> Position:
    segments = list_segments(directory)
    find_firsts(segments)
    return replay(start, epoch_logs(segments, start), lambda _: None).end


@pytest.mark.parametrize("dropping", [False, True], ids=["used again", "deleted"])
def test_a_torn_tail_is_cut_although_the_segment_before_it_was_obsolete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropping: bool
) -> None:
    """The store has exactly what the first segment says; of the second a power cut takes the first record and leaves
    the next. If the first segment were gone by then, these changes would seem to be missing, and the start refuse."""
    files = Files()
    log = Changelog(tmp_path, [], 1, Position(0, 0), files, SEGMENT)
    number = 0
    while len(log.kept) < 2:
        batch = log.unsynced()
        number += 1
        append_one(log, number)
    last = number - 1
    # The sync that began before the second segment did ends, and so does the checkpoint.
    log.sync(batch)
    log.synced(batch)
    log.obsolete = Position(1, last)
    append_one(log, number + 1)
    monkeypatch.setattr(files, "create", lambda *_: raise_full())

    def give_up_the_first() -> bool:
        if dropping:
            return log.drop(Position(1, last)) > 0
        try:
            log.prepare(recycling=True)
        except LogFull:
            return False
        return True

    assert not give_up_the_first()
    second = log.kept[1].path
    whole = second.read_bytes()
    second.write_bytes(whole[:FIRST_RECORD] + bytes(512) + whole[FIRST_RECORD + 512 :])
    assert replayed(tmp_path, Position(1, last)) == (1, last)
    second.write_bytes(whole)
    batch = log.unsynced()
    log.sync(batch)
    log.synced(batch)
    assert give_up_the_first()
    assert replayed(tmp_path, Position(1, last)) == (1, number + 1)
    log.close()


@pytest.mark.parametrize("zeroed", [True, False])
def test_records_of_a_former_life_are_never_taken_for_those_of_a_segment_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zeroed: bool
) -> None:
    """Whatever sectors of the new records a power cut takes, also if the zeroes between had not been written: the old
    records have another segment's id in their checksums."""
    files = Files()
    log = Changelog(tmp_path, [], 1, Position(0, 0), files, SEGMENT)
    number = 0
    while len(log.kept) < 3:
        number += 1
        append_one(log, number)
    batch = log.unsynced()
    log.sync(batch)
    log.synced(batch)
    log.obsolete = Position(1, number)
    monkeypatch.setattr(files, "create", lambda *_: raise_full())
    log._next = None
    if not zeroed:
        monkeypatch.setattr(
            files, "_fill", lambda descriptor, temporary, path, head, *_: fill_head(descriptor, temporary, path, head)
        )
    old = log.kept[0].path.read_bytes()
    log.prepare(recycling=True)
    while len(log.kept) < 3:
        number += 1
        append_one(log, number)
    # More of them, of the size of the old ones, so that these begin where new ones would.
    for _ in range(5):
        number += 1
        append_one(log, number)
    log.close()
    reused = log.kept[-1]
    first = reused.first
    whole = reused.path.read_bytes()
    before = bytes(len(old)) if zeroed else old
    random = Random(1)
    ends = set()
    for _ in range(200):
        data = bytearray(whole)
        for at in range(FIRST_RECORD, FIRST_RECORD + 6 * 1200, 512):
            if random.random() < 0.2:
                data[at : at + 512] = before[at : at + 512]
        reused.path.write_bytes(data)
        end = replayed(tmp_path, Position(1, first - 1))
        assert end.epoch == 1
        ends.add(end.number)
        assert all(record.number >= first for record in KeptSegment(reused.path, reused.header).records())
    assert ends == set(range(first - 1, number + 1))


def fill_head(descriptor: int, temporary: Path, path: Path, head: bytes) -> int:
    os.pwrite(descriptor, head, 0)
    os.rename(temporary, path)
    return descriptor


class CopyingFiles(Files):
    """As where blocks are copied when they are written: space that was set aside is none. Half a write succeeds."""

    full = False

    def append(self, descriptor: int, data: bytes, offset: int) -> None:
        if self.full:
            os.pwrite(descriptor, data[: len(data) // 2], offset)
            raise_full()
        super().append(descriptor, data, offset)


async def test_a_record_that_finds_no_space_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    files = CopyingFiles()
    options = replace(OPTIONS, checkpoint_seconds=3600.0)
    async with open_committer(tmp_path, files=files, options=options) as committer:
        prepare(committer)
        # The directory is copied below: nothing may be written or made in it by then.
        await until(lambda: committer.log.prepared and (tmp_path / "reserve").exists())
        create(committer, b"before")
        for _ in range(3):
            files.full = True
            with pytest.raises(DfsError) as caught:
                create(committer, b"a name that is not taken " * 8)
            assert caught.value.code is ErrorCode.NO_SPACE
            files.full = False
            await until(lambda: not committer.is_full)
            create(committer, b"after %d" % committer.newest)
        expected = names(committer)
        await committer.wait_durable(committer.newest)
        files.full = True
        with pytest.raises(DfsError):
            create(committer, b"the last one, cut off in the middle" * 4)
        # The log alone has to do, half a record at its end.
        copy = tmp_path.with_name(tmp_path.name + "-copy")
        shutil.copytree(tmp_path, copy)
        files.full = False
    async with open_committer(copy, options=OPTIONS) as committer:
        assert names(committer) == expected
        assert len(expected) == 4


async def test_a_map_that_finds_no_space_to_grow_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truncate, tried = os.truncate, []
    full = True

    def refuse(path: Path, length: int) -> None:
        tried.append(length)
        if full:
            raise_full()
        truncate(path, length)

    options = replace(OPTIONS, map_bytes=1 << 17, store_reserve_bytes=0)
    async with open_committer(tmp_path, options=options) as committer:
        prepare(committer)
        monkeypatch.setattr(os, "truncate", refuse)
        made = 0
        with pytest.raises(DfsError) as caught, trio.fail_after(60):
            while True:
                create(committer, b"%d" % made)
                made += 1
                if made % 50 == 0:
                    await trio.sleep(0.002)
        assert caught.value.code is ErrorCode.NO_SPACE
        assert tried
        assert len(names(committer)) == made, "everything can still be read"
        full = False
        await until(lambda: not committer.is_full)
        create(committer, b"after")
    async with open_committer(tmp_path, options=options) as committer:
        assert len(names(committer)) == made + 1


class FullCopyingFiles(CountedFiles):
    """Where blocks are copied when written, on a full disk: what gives space is the reserve."""

    def __init__(self, reserve: Path) -> None:
        super().__init__()
        self._reserve = reserve

    def append(self, descriptor: int, data: bytes, offset: int) -> None:
        if self.full and self._reserve.exists():
            raise_full()
        super().append(descriptor, data, offset)

    def reserve(self, path: Path, size: int) -> None:
        """What it took is free once it is spent; a probe beside it finds nothing."""
        Files.reserve(self, path, size)
        if self.full and size > OPTIONS.reserve_bytes:
            path.unlink()
            raise_full()


async def test_the_reserve_is_for_records_that_find_no_space(tmp_path: Path) -> None:
    """Otherwise nothing could be deleted: no checkpoint comes that would free a segment."""
    files = FullCopyingFiles(tmp_path / RESERVE_NAME)
    async with open_committer(tmp_path, files=files, options=OPTIONS) as committer:
        prepare(committer)
        create(committer, b"before")
        await until(lambda: (tmp_path / RESERVE_NAME).exists())
        files.full = True
        with pytest.raises(DfsError) as caught:
            create(committer, b"too much")
        assert caught.value.code is ErrorCode.NO_SPACE
        await until(lambda: not (tmp_path / RESERVE_NAME).exists())
        # It stays spent, although what it took would suffice for it again.
        for _ in range(5):
            await trio.sleep(5 * OPTIONS.retry_seconds)
            committer.change(0, 0, touch, frees=True)
        assert committer.is_full
        files.full = False
        await until(lambda: not committer.is_full)
        create(committer, b"after")
        await until(lambda: (tmp_path / RESERVE_NAME).exists())


async def test_a_start_whose_first_record_finds_no_space_spends_the_reserve(tmp_path: Path) -> None:
    async with open_committer(tmp_path, options=OPTIONS) as committer:
        prepare(committer)
        create(committer, b"before")
        await until(lambda: (tmp_path / RESERVE_NAME).exists())

    class Starting(FullCopyingFiles):
        """Files can be made; it is their blocks that are not to be had."""

        def reserve(self, path: Path, size: int) -> None:
            Files.reserve(self, path, size)

        def create(self, path: Path, head: bytes, size: int) -> int:
            return Files.create(self, path, head, size)

    files = Starting(tmp_path / RESERVE_NAME)
    files.full = True
    async with open_committer(tmp_path, files=files, options=OPTIONS) as committer:
        assert b"before" in names(committer)
        files.full = False

"""What a recovery would need is read back before it is needed."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import trio.testing
from test_recover import OPTIONS, break_record, cut_off, epoch, many, state

from metaserver import upkeep
from metaserver.changelog import KeptSegment, find_firsts
from metaserver.commit import Committer, open_committer
from metaserver.logrecord import FIRST_RECORD, UNKNOWN, Position, SegmentHeader, checksum_seed, encode_record
from metaserver.recover import recover
from metaserver.rereading import missing_changes, segment_damage
from metaserver.snapshot import list_snapshots
from metaserver.store import StoreFull


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "REREAD_BYTES_PER_SECOND", 1 << 40)


async def found(directory: Path) -> list[str]:
    async with open_committer(directory, options=OPTIONS) as committer:
        return await upkeep.verify_recovery(committer)


async def test_what_is_whole_is_found_whole(tmp_path: Path) -> None:
    """Over several epochs and segments, ended by kills and on purpose, with a snapshot in between."""
    for number in range(6):
        await epoch(tmp_path, many(400), snapshot=number == 3, kill=number % 2 == 0)
        assert await found(tmp_path) == []
    assert len(list((tmp_path / "changelog").glob("*.log"))) > 8


@pytest.mark.parametrize("where", ["first", "middle", "last"])
async def test_a_damaged_change_is_found_and_made_up_for(tmp_path: Path, where: str) -> None:
    await epoch(tmp_path, many(600))
    await epoch(tmp_path)
    before = await state(tmp_path)
    break_record(tmp_path, {"first": 0, "middle": 300, "last": 599}[where])
    async with open_committer(tmp_path, options=OPTIONS) as committer:
        (problem,) = await upkeep.verify_recovery(committer)
        assert "is damaged in" in problem
        assert committer.recovery is not None
        assert not committer.recovery.endangered
        assert len(list_snapshots(tmp_path / "snapshots")) == 1
    (tmp_path / "data.mdb").unlink()
    recover(tmp_path)
    assert await state(tmp_path) == before


async def test_a_damaged_header_is_found(tmp_path: Path) -> None:
    await epoch(tmp_path, many(100))
    await epoch(tmp_path)
    path = min((tmp_path / "changelog").glob("*.log"))

    def damage(committer: Committer) -> None:
        with path.open("r+b") as file:
            file.seek(20)
            file.write(b"\xff")

    async with open_committer(tmp_path, options=OPTIONS) as committer:
        damage(committer)
        (problem,) = await upkeep.verify_recovery(committer)
        assert "header" in problem


async def test_a_segment_cut_off_is_found(tmp_path: Path) -> None:
    await epoch(tmp_path, many(600))
    await epoch(tmp_path)
    path = min((tmp_path / "changelog").glob("*.log"))
    async with open_committer(tmp_path, options=OPTIONS) as committer:
        cut_off(path)
        (problem,) = await upkeep.verify_recovery(committer)
        assert str(path) in problem


async def test_a_damaged_snapshot_does_not_take_the_place_of_a_whole_one(tmp_path: Path) -> None:
    await epoch(tmp_path, many(10), snapshot=True)
    await epoch(tmp_path, many(10), snapshot=True)
    newest, older = list_snapshots(tmp_path / "snapshots")
    data = bytearray(newest.path.read_bytes())
    place = data.rfind(b"5 of 2")
    data[place] ^= 1
    newest.path.write_bytes(data)
    (problem,) = await found(tmp_path)
    assert str(newest.path) in problem
    made, kept = list_snapshots(tmp_path / "snapshots")
    assert kept == older
    assert made.position > newest.position
    assert await found(tmp_path) == []


async def test_a_shortage_of_descriptors_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file would be deleted for it."""
    await epoch(tmp_path, many(10), snapshot=True)
    (snapshot,) = list_snapshots(tmp_path / "snapshots")
    open_it = os.open
    refused = []

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path) == str(snapshot.path):
            refused.append(path)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return open_it(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    assert await found(tmp_path) == []
    assert refused
    assert snapshot.path.exists()


async def test_without_space_it_is_said_that_the_store_is_in_danger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await epoch(tmp_path, many(600))
    await epoch(tmp_path)
    break_record(tmp_path, 7)
    async with open_committer(tmp_path, options=OPTIONS) as committer:

        async def full(engine: object) -> None:
            raise StoreFull

        monkeypatch.setattr(upkeep, "snapshot", full)
        await upkeep.verify_recovery(committer)
        assert committer.recovery is not None
        assert committer.recovery.endangered


async def test_the_first_change_of_an_epoch_is_missed_although_a_start_did_not_need_it(tmp_path: Path) -> None:
    await epoch(tmp_path, many(10), kill=False)
    await epoch(tmp_path, many(10), kill=False)
    second = sorted((tmp_path / "changelog").glob("*.log"))[1]
    with second.open("r+b") as file:
        file.seek(FIRST_RECORD + 20)
        file.write(b"\xff\xff")
    (problem,) = await found(tmp_path)
    assert f"change 2/1 is damaged in {second}" == problem


def segment(directory: Path, number: int, header: Position, previous: Position, numbers: range) -> KeptSegment:
    """With empty changes of these numbers."""
    made = SegmentHeader(number, header.epoch, previous, 1 << 16)
    data = made.pack()
    for change in numbers:
        data += encode_record(checksum_seed(number), header.epoch, change, 0, 0, 0, change, {})
    path = directory / f"{number:016x}.log"
    path.write_bytes(data.ljust(1 << 16, b"\0"))
    kept = KeptSegment(path, made)
    find_firsts([kept])
    return kept


def test_what_a_power_cut_took_in_part_is_no_damage(tmp_path: Path) -> None:
    """Changes 3 and 4 were lost, 5 in the next segment was not: the start cuts all three."""
    start = Position(0, 0)
    torn = segment(tmp_path, 1, Position(1, 0), start, range(1, 3))
    rest = segment(tmp_path, 2, Position(1, 0), start, range(5, 7))
    following = segment(tmp_path, 3, Position(2, 0), Position(1, 2), range(1, 2))
    cut = following.header.previous
    assert segment_damage(torn, rest, None, cut) == ""
    assert segment_damage(rest, following, torn, cut) == ""
    assert "change 1/3 is damaged" in segment_damage(torn, rest, None, Position(1, 4))
    assert "change 1/3 is damaged" in segment_damage(torn, rest, None, UNKNOWN)


def test_a_log_that_does_not_reach_back_far_enough_is_noticed(tmp_path: Path) -> None:
    first = segment(tmp_path, 1, Position(1, 0), Position(0, 0), range(1, 11))
    second = segment(tmp_path, 2, Position(1, 0), Position(0, 0), range(11, 21))
    third = segment(tmp_path, 3, Position(2, 0), Position(1, 20), range(1, 5))
    assert missing_changes([], [first, second, third]) == ""
    assert missing_changes([], [second, third])
    assert missing_changes([], [third])
    assert missing_changes([Position(1, 9)], [second, third])
    assert missing_changes([Position(1, 10)], [second, third]) == ""
    assert missing_changes([Position(1, 15)], [third])
    assert missing_changes([Position(1, 20)], [third]) == ""
    assert missing_changes([Position(2, 2), Position(1, 15)], [third]) == ""


async def test_that_the_store_cannot_be_rebuilt_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both snapshot files are damaged and deleted while there is no space for another: so it is the next day, and
    after a restart."""
    for _ in range(3):
        await epoch(tmp_path, many(600), snapshot=True)
    for snapshot in list_snapshots(tmp_path / "snapshots"):
        snapshot.path.write_bytes(b"junk" * 5000)

    async def full(engine: object) -> None:
        raise StoreFull

    with monkeypatch.context() as patch:
        patch.setattr(upkeep, "snapshot", full)
        for _ in range(2):
            async with open_committer(tmp_path, options=OPTIONS) as committer:
                for _ in range(2):
                    assert await upkeep.verify_recovery(committer)
                    assert committer.recovery is not None
                    assert committer.recovery.endangered
                assert list_snapshots(tmp_path / "snapshots") == []
    async with open_committer(tmp_path, options=OPTIONS) as committer:
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert committer.log.recycled, "it is made as soon as there is space, not in an hour"
        await committer.snapshot()
        assert not committer.log.recycled
    assert await found(tmp_path) == []

"""What a recovery would need is read back before it is needed."""

from pathlib import Path

import pytest
from test_recover import OPTIONS, break_record, cut_off, epoch, many, state

from metaserver import upkeep
from metaserver.commit import Committer, open_committer
from metaserver.logrecord import FIRST_RECORD
from metaserver.recover import recover
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

"""All nodes lose power at random points: nothing acknowledged is lost, and every start goes by itself.

The long version is ``powercut_run.py``, by hand. That a loss would be noticed is shown with disks that lie.
"""

import os
from pathlib import Path
from random import Random

import pytest
from powercut import Lies, Mode, PowerOff, Volume
from powercut_disk import PoweredDisk
from powercut_files import PoweredFiles, StoreInFlight
from powercut_run import PowerCuts

from metaserver.overlay import row_key
from metaserver.schema import Table
from metaserver.store import Store, create_store

PAGE = 4096


@pytest.mark.timeout(200)
@pytest.mark.parametrize("mode", [Mode.RANDOM, Mode.TORN])
async def test_power_cuts_of_all_nodes_lose_nothing(tmp_path: Path, mode: Mode) -> None:
    run = PowerCuts(tmp_path, mode, 1)
    await run.run(3)
    assert run.broken == []
    assert run.points >= 3
    assert run.cluster.lost > 0, "there was nothing to lose"


# -- negative controls ---------------------------------------------------------------------------------------------

LIARS = {
    "fsync of chunk files": {"chunkserver": Lies(files=True, below="chunks/")},
    "fsync of the directory of a new chunk": {"chunkserver": Lies(directories=True, below="chunks/")},
    "fsync of the changelog": {"metaserver": Lies(appends=True)},
}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("liar", LIARS)
async def test_a_sync_that_does_nothing_is_noticed(tmp_path: Path, liar: str) -> None:
    """Otherwise the tests above would prove nothing."""
    run = PowerCuts(tmp_path, Mode.EVERYTHING, 1, LIARS[liar], read_seconds=0.5)
    await run.run(6)
    assert run.broken, f"{liar} does nothing and nobody notices"


# -- the volume itself ---------------------------------------------------------------------------------------------


def volume_of(path: Path, mode: Mode = Mode.EVERYTHING, seed: int = 1) -> Volume:
    path.mkdir(exist_ok=True)
    volume = Volume(path, mode, Random(seed))
    volume.look()
    return volume


def cut(volume: Volume) -> None:
    volume.cut()
    volume.settle()


def test_what_was_not_synced_is_gone(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    volume = volume_of(root)
    disk = PoweredDisk(str(root), volume)
    file = disk.create("file")
    file.write([b"synced"], 0)
    file.sync()
    disk.sync_directory("")
    file.write([b"LOST"], 0)
    file.write([b"and more"], 100)
    cut(volume)
    assert (root / "file").read_bytes() == b"synced"


def test_a_sync_of_a_file_does_not_make_its_name_durable(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    volume = volume_of(root)
    disk = PoweredDisk(str(root), volume)
    file = disk.create("file")
    file.write([b"contents"], 0)
    file.sync()
    cut(volume)
    assert os.listdir(root) == []


def test_a_sync_of_a_directory_does_not_make_contents_durable(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    volume = volume_of(root)
    disk = PoweredDisk(str(root), volume)
    disk.create("file").write([b"contents"], 0)
    disk.sync_directory("")
    cut(volume)
    assert (root / "file").read_bytes() == b""


def test_renames_and_removals_come_back(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    for name in ("old", "replaced", "removed"):
        (root / name).write_bytes(name.encode())
    volume = volume_of(root)
    disk = PoweredDisk(str(root), volume)
    disk.rename("old", "replaced")
    disk.unlink("removed")
    assert sorted(os.listdir(root)) == ["replaced"]
    cut(volume)
    assert {name: (root / name).read_bytes() for name in os.listdir(root)} == {
        "old": b"old",
        "replaced": b"replaced",
        "removed": b"removed",
    }
    again = volume_of(root)
    PoweredDisk(str(root), again).rename("old", "replaced")
    again.sync_directory("")
    cut(again)
    assert (root / "replaced").read_bytes() == b"old"


def test_what_is_cut_off_and_not_synced_comes_back(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    (root / "file").write_bytes(b"x" * 10_000)
    volume = volume_of(root)
    file = PoweredDisk(str(root), volume).open("file")
    file.truncate(100)
    assert file.size() == 100
    cut(volume)
    assert (root / "file").read_bytes() == b"x" * 10_000


@pytest.mark.parametrize("mode", [Mode.RANDOM, Mode.TORN])
def test_every_page_is_one_of_its_contents(tmp_path: Path, mode: Mode) -> None:
    """In any mixture, and something is lost and something kept; in sectors only where that is the mode."""
    seen = set()
    for seed in range(20):
        root = tmp_path / f"disk{seed}"
        root.mkdir()
        (root / "file").write_bytes(b"a" * 8 * PAGE)
        volume = volume_of(root, mode, seed)
        file = PoweredDisk(str(root), volume).open("file")
        for letter in (b"b", b"c"):
            file.write([letter * 4 * PAGE], 2 * PAGE)
        cut(volume)
        data = (root / "file").read_bytes()
        assert data[: 2 * PAGE] == b"a" * 2 * PAGE
        assert data[6 * PAGE :] == b"a" * 2 * PAGE
        seen |= {frozenset(data[at : at + PAGE]) for at in range(2 * PAGE, 6 * PAGE, PAGE)}
    assert frozenset(b"abc") == frozenset.union(*seen)
    assert any(len(page) > 1 for page in seen) == (mode is Mode.TORN)


def test_without_power_nothing_happens(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    volume = volume_of(root)
    disk = PoweredDisk(str(root), volume)
    file = disk.create("file")
    volume.cut()
    for call in (
        lambda: file.write([b"data"], 0),
        file.sync,
        lambda: file.truncate(0),
        lambda: disk.rename("file", "other"),
        lambda: disk.unlink("file"),
        lambda: disk.create("another"),
        lambda: disk.sync_directory(""),
        lambda: disk.write_atomically("small", b"data"),
    ):
        with pytest.raises(PowerOff):
            call()
    assert os.listdir(root) == ["file"]


# -- LMDB ----------------------------------------------------------------------------------------------------------


def rows(count: int, text: bytes) -> dict[bytes, bytes | None]:
    return {row_key(Table.SYMLINKS, number.to_bytes(8, "big")): text * 20 for number in range(count)}


@pytest.mark.parametrize("mode", list(Mode))
def test_a_transaction_that_is_torn_by_a_cut_is_there_or_not(tmp_path: Path, mode: Mode) -> None:
    """Whatever part of its pages is on the disk, the store is whole, and is as before or as after."""
    outcomes = set()
    for seed in range(25):
        path = tmp_path / f"{seed}.mdb"
        create_store(path)
        store = Store.open(path, 1 << 20)
        for text in (b"first", b"second", b"third"):
            store.write(rows(200, text))
            store.renew()
        flight = StoreInFlight(path)
        store.write(rows(300, b"fourth"))
        store.close()
        flight.settle(mode, Random(seed))
        again = Store.open(path, 1 << 20)
        for count in again.verify():
            total = count
        text = again.get(row_key(Table.SYMLINKS, bytes(8)))
        again.close()
        assert text is not None
        outcomes.add((text[:5], total))
    assert len(outcomes) == (1 if mode is Mode.EVERYTHING else 2)
    assert {text for text, _ in outcomes} <= {b"third", b"fourt"}


def test_a_checkpoint_does_not_begin_without_power(tmp_path: Path) -> None:
    files = PoweredFiles(volume_of(tmp_path / "disk"))
    files.volume.cut()
    with pytest.raises(PowerOff):
        files.step("checkpoint:before-commit")

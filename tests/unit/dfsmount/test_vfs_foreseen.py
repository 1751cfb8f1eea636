"""Names fetched ahead, over a real metaserver: fewer questions, and never older than this mount's own changes."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from vfs_harness import ME, Plant, TestMount, code_of, open_plant

from metaserver import protocol
from metaserver.errors import DfsError, ErrorCode

COUNT = 80


@pytest.fixture
async def plant(tmp_path: Path) -> AsyncIterator[Plant]:
    async with open_plant(tmp_path) as plant:
        yield plant


@pytest.fixture
async def b(plant: Plant) -> AsyncIterator[TestMount]:
    """A mount that has not looked at the 80 files yet, which another has made."""
    async with plant.mount() as maker:
        for number in range(COUNT):
            await maker.names.make(maker.root, name(number), 0o100644, ME)
    async with plant.mount() as mount:
        yield mount


def name(number: int) -> bytes:
    return b"%03d" % number


async def foresee(mount: TestMount) -> None:
    """Looks the first names up, and waits until those after them have come."""
    for number in range(3):
        await mount.stat(name(number))
    with trio.fail_after(5):
        while not len(mount.core.foreseen):  # noqa: ASYNC110
            await trio.sleep(0.01)


async def test_a_series_of_lookups_asks_little(plant: Plant, b: TestMount) -> None:
    await foresee(b)
    before = plant.parts.service.counts[protocol.LOOKUP.number]
    shown = [await b.stat(name(number)) for number in range(3, 30)]
    assert plant.parts.service.counts[protocol.LOOKUP.number] == before
    assert [entry.ino for entry in shown] == sorted(entry.ino for entry in shown)
    assert all(0 < entry.attr_seconds <= 1 for entry in shown)
    inode = b.core.inodes.get(shown[0].ino)
    assert inode is not None
    assert inode.lookups == 1


async def test_own_changes_show_at_once(b: TestMount) -> None:
    await foresee(b)
    await b.names.unlink(b.root, name(10), directory=False)
    with pytest.raises(DfsError) as caught:
        await b.stat(name(10))
    assert code_of(caught.value) is ErrorCode.NOT_FOUND
    await b.names.rename(b.root, name(11), b.root, name(12), 0)
    with pytest.raises(DfsError):
        await b.stat(name(11))
    ino = (await b.stat(name(13))).ino
    await b.set(ino, mode=0o100600)
    assert (await b.stat(name(13))).mode == 0o100600


async def test_what_was_changed_and_forgotten_since_is_asked_again(b: TestMount) -> None:
    await foresee(b)
    shown = await b.stat(name(9))
    other = await b.names.link(shown.ino, b.root, b"other")
    assert other.nlink == 2
    b.vfs.forget(shown.ino, 2)
    assert b.core.inodes.get(shown.ino) is None
    assert (await b.stat(name(9))).nlink == 2


async def test_another_name_of_what_was_unlinked_shows_fewer_links(plant: Plant, b: TestMount) -> None:
    async with plant.mount() as maker:
        shown = await maker.stat(name(20))
        await maker.names.link(shown.ino, maker.root, b"twin")
    await foresee(b)
    assert (await b.stat(b"twin")).nlink == 2
    await b.names.unlink(b.root, b"twin", directory=False)
    assert (await b.stat(name(20))).nlink == 1


async def test_what_others_change_is_known_a_second_later(plant: Plant, b: TestMount) -> None:
    await foresee(b)
    async with plant.mount() as other:
        await other.names.unlink(other.root, name(15), directory=False)
    await trio.sleep(1.05)
    with pytest.raises(DfsError):
        await b.stat(name(15))

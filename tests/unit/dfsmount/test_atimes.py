"""Times of access: when reading moves them, what this mount shows, and when the metaserver hears of it."""

import os
import stat
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing
from vfs_harness import ME, Plant, TestMount, open_plant

from dfsmount.atimes import DAY_SECONDS, DELAY_SECONDS, MAX_WAITING, SECOND_NS, AccessTimes, is_due
from dfsmount.inodes import Inode
from dfsmount.vfs_core import VfsOptions
from metaserver import protocol
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import TOUCH_INODES, Attributes, Touch, Touched

NOW = 1_700_000_000 * SECOND_NS
HOUR = 3600 * SECOND_NS


@pytest.fixture
async def plant(tmp_path: Path) -> AsyncIterator[Plant]:
    async with open_plant(tmp_path) as plant:
        yield plant


@pytest.fixture
async def a(plant: Plant) -> AsyncIterator[TestMount]:
    async with plant.mount() as mount:
        yield mount


@pytest.fixture
async def b(plant: Plant) -> AsyncIterator[TestMount]:
    async with plant.mount(VfsOptions(attr_timeout=0.0)) as mount:
        yield mount


@pytest.mark.parametrize(
    ("atime_ns", "mtime_ns", "ctime_ns", "due"),
    [
        (NOW - 2, NOW - 3, NOW - 3, False),
        (NOW - 2, NOW - 2, NOW - 3, True),
        (NOW - 2, NOW - 3, NOW - 2, True),
        (NOW - 2, NOW - 1, NOW - 3, True),
        (NOW - DAY_SECONDS * SECOND_NS + SECOND_NS, 0, 0, False),
        (NOW - DAY_SECONDS * SECOND_NS, 0, 0, True),
        (NOW + HOUR, NOW, NOW, False),
        (NOW + HOUR, NOW + HOUR, NOW, True),
        (NOW, NOW, NOW, False),
    ],
)
def test_when_it_is_due(atime_ns: int, mtime_ns: int, ctime_ns: int, due: bool) -> None:
    assert is_due(atime_ns, mtime_ns, ctime_ns, NOW) is due


# -- what is sent, and when ------------------------------------------------------------------------------------------


def inode(ino: int, atime_ns: int = 0) -> Inode:
    return Inode(Attributes(ino, stat.S_IFREG, 0, 0, 1, 0, 0, atime_ns, 0, 0, 0, 0, 0, 0, 0, 0))


class Sent:
    """A metaserver that takes all but ``left``."""

    def __init__(self) -> None:
        self.batches: list[tuple[float, list[Touch]]] = []
        self.answers: list[tuple[int, bool]] = []
        self.left: tuple[int, ...] = ()
        self.broken = False
        self.now_ns = NOW
        self.times = AccessTimes(self.touch, self.answered, lambda: self.now_ns, files=True, directories=True)

    async def touch(self, touches: Sequence[Touch]) -> Touched:
        self.batches.append((trio.current_time(), list(touches)))
        await trio.sleep(1)
        if self.broken:
            raise DfsError(ErrorCode.UNAVAILABLE)
        return Touched(self.left)

    def answered(self, touch: Touch, done: bool) -> None:
        self.answers.append((touch.ino, done))


def test_the_sample_of_attributes_is_one() -> None:
    assert (inode(7, 5).ino, inode(7, 5).attributes.atime_ns) == (7, 5)


async def test_many_inodes_are_one_message_some_seconds_later(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    sent = Sent()
    nursery.start_soon(sent.times.run)
    began = trio.current_time()
    for ino in range(1, 100):
        assert sent.times.read(inode(ino))
    await trio.sleep(60)
    assert [(at - began, len(batch)) for at, batch in sent.batches] == [(pytest.approx(DELAY_SECONDS), 99)]
    assert sent.batches[0][1][0] == Touch(1, 0, NOW)
    assert sent.answers == [(ino, True) for ino in range(1, 100)]
    assert not sent.times


async def test_a_full_message_leaves_at_once_and_none_is_fuller(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    sent = Sent()
    nursery.start_soon(sent.times.run)
    began = trio.current_time()
    for ino in range(TOUCH_INODES + 3):
        assert sent.times.read(inode(ino + 1))
    await trio.sleep(60)
    assert [len(batch) for _, batch in sent.batches] == [TOUCH_INODES, 3]
    assert sent.batches[0][0] == began
    # And the next ones gather again.
    assert sent.times.read(inode(1))
    await trio.sleep(DELAY_SECONDS / 2)
    assert len(sent.batches) == 2


def test_nothing_is_read_before_it_was_changed() -> None:
    """A mount's idea of the metaserver's clock may be behind by the time that a message travels."""
    sent = Sent()
    changed = inode(1, NOW + 500)
    changed.attributes = msgspec.structs.replace(changed.attributes, ctime_ns=NOW + 500)
    assert sent.times.read(changed)
    assert sent.times.shown(1, NOW + 500) == NOW + 501


def test_what_waits_is_bounded() -> None:
    sent = Sent()
    assert all(sent.times.read(inode(ino)) for ino in range(MAX_WAITING))
    assert not sent.times.read(inode(MAX_WAITING))
    assert len(sent.times) == MAX_WAITING


async def test_failures_are_lost_and_refusals_told(autojump_clock: trio.testing.MockClock) -> None:
    sent = Sent()
    sent.broken = True
    sent.times.read(inode(1))
    await sent.times.send()
    assert not sent.times
    assert sent.answers == []
    sent.broken, sent.left = False, (1,)
    sent.times.read(inode(1))
    sent.times.read(inode(2))
    await sent.times.send()
    assert sent.answers == [(1, False), (2, True)]


async def test_reads_while_one_is_on_its_way_stand_on_top_of_it(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    sent = Sent()
    known = inode(1)
    sent.times.read(known)
    nursery.start_soon(sent.times.send)
    await trio.sleep(0.5)
    assert sent.times.shown(1, 0) == NOW
    assert not sent.times.read(known)
    known.attributes.mtime_ns = sent.now_ns = NOW + 5
    assert sent.times.read(known)
    known.attributes.mtime_ns = sent.now_ns = NOW + 6
    assert sent.times.read(known)
    assert (sent.times.shown(1, 0), sent.times.shown(1, 77)) == (NOW + 6, 77)
    await trio.sleep(1)
    await sent.times.send()
    assert [batch for _, batch in sent.batches] == [[Touch(1, 0, NOW)], [Touch(1, NOW, NOW + 6)]]


async def test_what_is_set_meanwhile_is_not_answered(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    sent = Sent()
    sent.times.read(inode(1))
    nursery.start_soon(sent.times.send)
    await trio.sleep(0.5)
    sent.times.forget(1)
    assert sent.times.shown(1, 0) == 0
    await trio.sleep(1)
    assert sent.answers == []


# -- in the filesystem -----------------------------------------------------------------------------------------------


async def written(mount: TestMount, name: bytes = b"f") -> int:
    ino, number = await mount.create(name, b"data")
    await mount.close(number)
    await mount.core.flush(ino)
    return ino


async def read(mount: TestMount, ino: int, flags: int = os.O_RDONLY) -> None:
    opened = await mount.files.open(ino, flags)
    assert await mount.files.read(opened.number, 0, 10)
    await mount.close(opened.number)


async def atime(mount: TestMount, ino: int) -> int:
    return (await mount.vfs.get_attributes(ino)).atime_ns


async def test_a_read_shows_here_at_once_and_elsewhere_when_sent(a: TestMount, b: TestMount) -> None:
    ino = await written(a)
    before = await a.vfs.get_attributes(ino)
    await read(a, ino)
    moved = await a.vfs.get_attributes(ino)
    assert moved.atime_ns > max(before.atime_ns, before.mtime_ns, before.ctime_ns)
    assert (moved.mtime_ns, moved.ctime_ns) == (before.mtime_ns, before.ctime_ns)
    assert await atime(b, ino) == before.atime_ns
    # What the metaserver says in between does not take it back.
    a.core.inodes.doubt(ino)
    assert await atime(a, ino) == moved.atime_ns
    await a.core.accesses.send()
    assert await atime(b, ino) == await atime(a, ino) == moved.atime_ns
    # Neither due again, nor lost with what is cached.
    await read(a, ino)
    a.core.inodes.doubt(ino)
    assert await atime(a, ino) == moved.atime_ns
    assert not a.core.accesses


async def test_each_read_of_a_handle_counts_once_due(a: TestMount) -> None:
    ino, number = await a.create(b"f", b"data")
    await a.files.read(number, 0, 4)
    first = await atime(a, ino)
    await a.files.read(number, 0, 4)
    assert await atime(a, ino) == first
    await a.files.write(number, 0, b"more")
    await a.files.read(number, 0, 4)
    assert await atime(a, ino) > first
    await a.close(number)


async def test_opening_what_the_kernel_has_in_its_cache_counts_as_reading(a: TestMount) -> None:
    ino = await written(a)
    before = await atime(a, ino)
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_NOATIME):
        await a.close((await a.files.open(ino, flags)).number)
        assert await atime(a, ino) == before
    a.kernel.attributes.clear()
    await a.close((await a.files.open(ino, os.O_RDONLY)).number)
    assert await atime(a, ino) > before
    assert a.kernel.attributes == [ino]


async def test_opening_an_empty_file_counts_as_reading(a: TestMount, b: TestMount) -> None:
    """Of which the kernel knows the end."""
    ino, number = await a.create(b"f")
    await a.close(number)
    await b.stat(b"f")
    before = await atime(b, ino)
    await b.close((await b.files.open(ino, os.O_RDONLY)).number)
    assert await atime(b, ino) > before


async def test_directories_and_symlinks(a: TestMount) -> None:
    directory = await a.mkdir(b"d")
    link = (await a.names.make_link(a.root, b"l", b"target", ME)).ino
    before = [await atime(a, ino) for ino in (directory, link)]
    await a.list(directory)
    assert await a.names.read_link(link) == b"target"
    after = [await atime(a, ino) for ino in (directory, link)]
    assert all(new > old for old, new in zip(before, after, strict=True))
    await a.list(directory)
    assert await a.names.read_link(link) == b"target"
    assert [await atime(a, ino) for ino in (directory, link)] == after


async def test_who_does_not_want_it(plant: Plant, a: TestMount) -> None:
    ino = await written(a)
    directory = await a.mkdir(b"d")
    await read(a, ino, os.O_RDONLY | os.O_NOATIME)
    assert not a.core.accesses
    for options in (VfsOptions(noatime=True), VfsOptions(read_only=True)):
        async with plant.mount(options) as mount:
            await read(mount, ino)
            await mount.list(directory)
            assert not mount.core.accesses
    async with plant.mount(VfsOptions(nodiratime=True)) as mount:
        await mount.list(directory)
        assert not mount.core.accesses
        await read(mount, ino)
        assert len(mount.core.accesses) == 1


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
async def test_what_is_set_stays_set(a: TestMount, b: TestMount, flags: int) -> None:
    """`tar --atime-preserve` reads, and sets what was there; for a file being written that is answered ahead."""
    ino = await written(a)
    before = await atime(a, ino)
    opened = await a.files.open(ino, flags)
    await a.files.read(opened.number, 0, 10)
    assert await atime(a, ino) > before
    await a.set(ino, atime_ns=before)
    assert await atime(a, ino) == before
    await a.core.accesses.send()
    await a.close(opened.number)
    await a.vfs.sync_names()
    assert await atime(a, ino) == await atime(b, ino) == before


async def test_a_read_after_setting_counts(a: TestMount, b: TestMount) -> None:
    ino = await written(a)
    opened = await a.files.open(ino, os.O_RDWR)
    # Answered ahead of the metaserver.
    await a.set(ino, atime_ns=5, mtime_ns=6)
    await a.files.read(opened.number, 0, 10)
    moved = await atime(a, ino)
    assert moved > 6
    await a.vfs.sync_names()
    assert await atime(a, ino) == moved
    await a.core.accesses.send()
    assert await atime(a, ino) == await atime(b, ino) == moved
    assert (await b.vfs.get_attributes(ino)).mtime_ns == 6
    await a.close(opened.number)


async def test_what_is_cached_is_right_once_it_is_told(plant: Plant) -> None:
    """Also in the state of an open file, and when the metaserver has another time of access. Nothing is asked again for
    an hour."""
    async with plant.mount(VfsOptions(attr_timeout=3600.0)) as mount, plant.mount() as other:
        ino, number = await mount.create(b"f", b"data")
        await mount.files.fsync(number)
        await mount.files.read(number, 0, 4)
        moved = await atime(mount, ino)
        await mount.core.accesses.send()
        file = mount.core.files.get(ino)
        assert file is not None
        assert file.state.attributes.atime_ns == await atime(mount, ino) == moved
        # Not open here: nobody tells of the change.
        link = (await mount.names.make_link(mount.root, b"l", b"target", ME)).ino
        await mount.names.read_link(link)
        assert await atime(mount, link) > 5
        await other.set(link, atime_ns=5)
        await mount.core.accesses.send()
        assert await atime(mount, link) == 5
        await mount.close(number)


async def test_what_was_listed_before_is_asked_for_again(plant: Plant) -> None:
    """An inode that nobody refers to any more, on a page that was read before its time of access was told."""
    async with plant.mount(VfsOptions(attr_timeout=3600.0)) as mount:
        directory = await mount.mkdir(b"d")
        link = (await mount.names.make_link(directory, b"l", b"target", ME)).ino
        number = mount.names.open_directory(directory)
        await mount.names.list_directory(number, 0)
        await mount.names.read_link(link)
        mount.vfs.forget(link, 1)
        assert mount.core.inodes.get(link) is None
        # As it would be if it was forgotten at another time than the page was read.
        handle = mount.core.handles.directory(number)
        handle._doubted = set()
        await mount.core.accesses.send()
        assert handle.doubts(link)


async def test_what_another_mount_sets_stays(a: TestMount, b: TestMount) -> None:
    ino = await written(a)
    await read(a, ino)
    await b.set(ino, atime_ns=5)
    await a.core.accesses.send()
    assert await atime(b, ino) == await atime(a, ino) == 5


async def test_unwritten_data_and_its_commit_keep_it(a: TestMount, b: TestMount) -> None:
    ino, number = await a.create(b"f", b"data")
    await a.files.read(number, 0, 4)
    moved = await atime(a, ino)
    await a.files.fsync(number)
    assert await atime(a, ino) == moved
    await a.core.accesses.send()
    assert await atime(a, ino) == moved
    await a.set(ino, mode=0o600)
    await a.close(number)
    await a.vfs.sync_names()
    assert await atime(a, ino) == await atime(b, ino) == moved


async def test_unmounting_sends_what_waits(plant: Plant, a: TestMount) -> None:
    ino = await written(a)
    async with plant.mount() as mount:
        await read(mount, ino)
        moved = await atime(mount, ino)
        await mount.vfs.finish()
    a.core.inodes.doubt(ino)
    assert await atime(a, ino) == moved


async def test_a_read_neither_waits_nor_fails_without_the_metaserver(plant: Plant, a: TestMount) -> None:
    ino = await written(a)
    opened = await a.files.open(ino, os.O_RDWR)
    plant.cut()
    assert await a.files.read(opened.number, 0, 4)
    assert len(a.core.accesses) == 1
    # And once it is back.
    await a.core.accesses.send()
    assert not a.core.accesses
    await a.close(opened.number)


async def test_an_inode_that_is_gone_or_forgotten(a: TestMount) -> None:
    ino, kept = await written(a), await written(a, b"kept")
    for each in (ino, kept):
        await read(a, each)
    moved = await atime(a, kept)
    await a.names.unlink(a.root, b"f", directory=False)
    await a.vfs._close_now()
    a.vfs.forget(kept, 1)
    assert a.core.inodes.get(kept) is None
    await a.core.accesses.send()
    assert not a.core.accesses
    assert (await a.stat(b"kept")).atime_ns == moved


async def test_counted_as_messages(plant: Plant, a: TestMount) -> None:
    """Reading files a second time sends nothing, and the first time a message for hundreds."""
    inos = [await written(a, b"%d" % number) for number in range(TOUCH_INODES + 1)]
    counts = plant.parts.service.counts
    for ino in inos:
        await read(a, ino)
    await a.core.accesses.send()
    assert counts[protocol.TOUCH.number] in (2, 3)
    sent = counts[protocol.TOUCH.number]
    for ino in inos:
        await read(a, ino)
    await a.core.accesses.send()
    assert counts[protocol.TOUCH.number] == sent

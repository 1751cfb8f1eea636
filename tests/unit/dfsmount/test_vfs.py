"""The virtual filesystem over a real metaserver: names, attributes, and what two mounts see of each other."""

import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from vfs_harness import ME, Plant, TestMount, code_of, open_plant

from dfsmount.vfs_core import VfsOptions
from metaserver.acl import GROUP_OBJ, MASK, OTHER, USER, USER_OBJ, Entry, decode, encode
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import InodeFlags, RenameFlags, SetAttributes

RDWR = os.O_RDWR


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
    async with plant.mount() as mount:
        yield mount


async def fails(code: ErrorCode, function: object, *arguments: object, **named: object) -> None:
    with pytest.raises(DfsError) as caught:
        await function(*arguments, **named)  # type: ignore[operator]
    assert code_of(caught.value) is code


# -- names ---------------------------------------------------------------------------------------------------------


async def test_names_come_and_go(a: TestMount) -> None:
    directory = await a.mkdir(b"d")
    await a.create(b"f", parent=directory)
    await fails(ErrorCode.EXISTS, a.mkdir, b"d")
    await fails(ErrorCode.NOT_EMPTY, a.names.unlink, a.root, b"d", directory=True)
    await a.names.unlink(directory, b"f", directory=False)
    await a.names.unlink(a.root, b"d", directory=True)
    await fails(ErrorCode.NOT_FOUND, a.stat, b"d")
    assert await a.list() == [b".", b".."]


async def test_own_changes_of_a_directory_show_at_once(a: TestMount) -> None:
    before = await a.vfs.get_attributes(a.root)
    await a.mkdir(b"d")
    after = await a.vfs.get_attributes(a.root)
    assert after.nlink == before.nlink + 1
    assert after.mtime_ns > before.mtime_ns


async def test_the_kernels_references_are_counted(a: TestMount) -> None:
    ino, handle = await a.create(b"f")
    await a.stat(b"f")
    await a.list()
    inode = a.core.inodes.get(ino)
    assert inode is not None
    assert inode.lookups == 3
    a.vfs.forget(ino, 3)
    assert a.core.inodes.get(ino) is inode, "it is still open"
    await a.close(handle)
    await trio.sleep(0.7)
    assert a.core.inodes.get(ino) is None


async def test_a_long_listing_is_complete_and_in_steps(a: TestMount) -> None:
    names = [b"%04d" % number for number in range(1203)]
    directory = await a.mkdir(b"d")
    for name in names:
        await a.names.make(directory, name, stat.S_IFIFO | 0o600, ME)
    assert await a.list(directory) == [b".", b"..", *names]


async def test_a_listing_can_be_continued_anywhere_and_sees_removals(a: TestMount) -> None:
    for number in range(5):
        await a.mkdir(b"%d" % number)
    handle = a.names.open_directory(a.root)
    listed = list(await a.names.list_directory(handle, 0))
    assert [entry.name for entry in listed[2:]] == [b"0", b"1", b"2", b"3", b"4"]
    again = [entry.name for entry in await a.names.list_directory(handle, listed[3].cookie)]
    assert again == [b"2", b"3", b"4"]
    await a.names.unlink(a.root, b"3", directory=True)
    fresh = [entry.name for entry in await a.names.list_directory(handle, 0)]
    assert fresh == [b".", b"..", b"0", b"1", b"2", b"4"]
    assert list(await a.names.list_directory(handle, listed[-1].cookie)) == []
    assert next(entry.name for entry in await a.names.list_directory(handle, listed[0].cookie)) == b".."


async def test_a_listing_ends_although_all_it_shows_is_renamed(
    a: TestMount, b: TestMount, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is made or moved later belongs to the next listing."""
    monkeypatch.setattr("dfsmount.vfs_names.PAGE_ENTRIES", 2)
    for number in range(4):
        await a.mkdir(b"%d" % number)
    handle = a.names.open_directory(a.root)
    cookie, found = 0, []
    for turn in range(20):
        listed = next(await a.names.list_directory(handle, cookie), None)
        if listed is None:
            break
        cookie = listed.cookie
        if listed.inode is not None:
            found.append(listed.name)
            await (a, b)[turn % 2].names.rename(a.root, listed.name, a.root, b"new-" + listed.name, 0)
            await b.mkdir(b"more-" + listed.name)
    assert found == [b"0", b"1", b"2", b"3"]
    assert (await a.list())[2:] == [prefix + name for name in found for prefix in (b"new-", b"more-")]


async def test_a_page_of_a_listing_brings_no_removed_name_back(a: TestMount) -> None:
    """The kernel has given back the inode, so that nothing but the listing remembers that the page is outdated."""
    for number in range(5):
        await a.mkdir(b"%d" % number)
    handle = a.names.open_directory(a.root)
    first = next(await a.names.list_directory(handle, 0))
    gone = await a.stat(b"3")
    await a.names.unlink(a.root, b"3", directory=True)
    a.vfs.forget(gone.ino, 2)
    assert a.core.inodes.get(gone.ino) is None
    shown = {entry.name: entry.shown for entry in await a.names.list_directory(handle, first.cookie)}
    if b"3" in shown:
        assert (shown[b"3"].entry_seconds, shown[b"3"].attr_seconds) == (0.0, 0.0)
    assert shown[b"4"].entry_seconds > 0


async def test_dots_know_where_they_are(a: TestMount) -> None:
    outer = await a.mkdir(b"outer")
    inner = await a.mkdir(b"inner", outer)
    handle = a.names.open_directory(inner)
    assert [entry.shown.ino for entry in await a.names.list_directory(handle, 0)] == [inner, outer]
    handle = a.names.open_directory(a.root)
    assert [entry.shown.ino for entry in await a.names.list_directory(handle, 0)][:2] == [a.root, a.root]


async def test_a_removed_directory_lists_nothing(a: TestMount, b: TestMount) -> None:
    directory = await a.mkdir(b"d")
    handle = a.names.open_directory(directory)
    await b.names.unlink(b.root, b"d", directory=True)
    assert [entry.name for entry in await a.names.list_directory(handle, 0)] == [b".", b".."]


async def test_symlinks(a: TestMount, b: TestMount) -> None:
    shown = await a.names.make_link(a.root, b"l", b"to/there", ME)
    assert stat.S_ISLNK(shown.mode)
    assert shown.size == 8
    assert await a.names.read_link(shown.ino) == b"to/there"
    seen = await b.stat(b"l")
    assert await b.names.read_link(seen.ino) == b"to/there"
    await fails(ErrorCode.INVALID, b.names.read_link, b.root)


async def test_hard_links(a: TestMount) -> None:
    ino, handle = await a.create(b"f", b"data")
    shown = await a.names.link(ino, a.root, b"g")
    assert (shown.ino, shown.nlink, shown.size) == (ino, 2, 4)
    assert a.writer.flushed == [ino], "data comes before the new name"
    await a.names.unlink(a.root, b"f", directory=False)
    assert (await a.vfs.get_attributes(ino)).nlink == 1
    await a.close(handle)


async def test_devices_keep_their_number(a: TestMount) -> None:
    shown = await a.names.make(a.root, b"null", stat.S_IFCHR | 0o666, ME, rdev=os.makedev(1, 3))
    assert shown.rdev == os.makedev(1, 3)
    assert (shown.uid, shown.gid) == (1000, 1000)


# -- directories made here: what is in them is known ----------------------------------------------------------------


async def asks(mount: TestMount, function: object, *arguments: object) -> int:
    """How many requests a call that fails with NOT_FOUND makes."""
    connection = mount.meta._connection
    assert connection is not None
    before = connection._next_request_id
    await fails(ErrorCode.NOT_FOUND, function, *arguments)
    return connection._next_request_id - before


async def test_a_missing_name_in_a_new_directory_needs_no_asking(a: TestMount) -> None:
    directory = await a.mkdir(b"d")
    assert await asks(a, a.stat, b"f", directory) == 0
    await a.create(b"f", parent=directory)
    assert (await a.stat(b"f", directory)).size == 0
    await a.names.rename(directory, b"f", directory, b"g", 0)
    assert await asks(a, a.stat, b"f", directory) == 0
    await a.names.link((await a.stat(b"g", directory)).ino, directory, b"h")
    await a.stat(b"h", directory)
    await a.names.unlink(directory, b"g", directory=False)
    assert await asks(a, a.stat, b"g", directory) == 0
    assert await asks(a, a.stat, b"x", a.root) == 1, "the root was made by nobody"
    await fails(ErrorCode.NAME_TOO_LONG, a.stat, b"n" * 256, directory)


async def test_exchanged_names_are_both_known(a: TestMount) -> None:
    one, two = await a.mkdir(b"1"), await a.mkdir(b"2")
    await a.create(b"f", parent=one)
    await a.create(b"g", parent=two)
    await a.names.rename(one, b"f", two, b"g", RenameFlags.EXCHANGE)
    await a.stat(b"f", one)
    await a.stat(b"g", two)
    await a.names.rename(one, b"f", two, b"f", 0)
    await a.stat(b"f", two)


async def test_what_is_known_is_confirmed_every_second(a: TestMount) -> None:
    directory = await a.mkdir(b"d")
    await trio.sleep(1.05)
    assert await asks(a, a.stat, b"f", directory) == 1
    assert await asks(a, a.stat, b"f", directory) == 0


async def test_what_others_make_there_is_seen(a: TestMount, b: TestMount) -> None:
    directory = await a.mkdir(b"d")
    assert await asks(a, a.stat, b"f", directory) == 0
    await b.create(b"f", parent=directory)
    with trio.fail_after(5):
        while len(a.core.fresh):  # noqa: ASYNC110
            await trio.sleep(0.001)
    await a.stat(b"f", directory)
    assert await asks(a, a.stat, b"g", directory) == 1


async def test_after_a_lost_connection_nothing_is_known(plant: Plant, a: TestMount) -> None:
    directory = await a.mkdir(b"d")
    plant.cut()
    await a.mkdir(b"e")
    assert await asks(a, a.stat, b"f", directory) == 1


async def test_after_a_failure_nothing_is_known(plant: Plant, a: TestMount) -> None:
    directory = await a.mkdir(b"d")
    plant.parts.changes.refusing = "for a test"
    await fails(ErrorCode.READ_ONLY, a.mkdir, b"x", directory)
    assert await asks(a, a.stat, b"f", directory) == 1


async def test_new_directories_are_deregistered_when_idle_or_removed(
    plant: Plant, a: TestMount, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = await a.mkdir(b"1"), await a.mkdir(b"2")
    opened = plant.parts.sessions.by_id[a.meta.session].opened
    assert opened == {one: False, two: False}
    await a.names.unlink(a.root, b"1", directory=True)
    with trio.fail_after(5):
        while one in opened:  # noqa: ASYNC110
            await trio.sleep(0.01)
    assert two in opened
    monkeypatch.setattr("dfsmount.fresh.IDLE_SECONDS", 0.0)
    with trio.fail_after(5):
        while two in opened:  # noqa: ASYNC110
            await trio.sleep(0.01)


async def test_not_too_many_names_are_kept(a: TestMount, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfsmount.fresh.MAX_NAMES", 2)
    monkeypatch.setattr("dfsmount.fresh.MAX_DIRECTORIES", 1)
    directory, other = await a.mkdir(b"d"), await a.mkdir(b"e")
    assert await asks(a, a.stat, b"x", other) == 1
    for name in (b"1", b"2", b"3"):
        await a.mkdir(name, directory)
    assert await asks(a, a.stat, b"x", directory) == 1


async def test_own_changes_of_entries_need_no_asking_for_the_directory(a: TestMount, b: TestMount) -> None:
    directory = await a.mkdir(b"d")
    await a.mkdir(b"sub", directory)
    await a.create(b"f", parent=directory)
    await a.names.rename(directory, b"f", directory, b"g", 0)
    await a.names.unlink(directory, b"g", directory=False)
    shown = a.vfs.known_attributes(directory)
    assert shown is not None
    seen = await b.vfs.get_attributes(directory)
    assert (shown.nlink, shown.mtime_ns, shown.ctime_ns) == (seen.nlink, seen.mtime_ns, seen.ctime_ns)
    assert shown.nlink == 3
    await a.names.unlink(directory, b"sub", directory=True)
    shown = a.vfs.known_attributes(directory)
    assert shown is not None
    assert shown.nlink == 2


# -- renames -------------------------------------------------------------------------------------------------------


async def test_a_rename_commits_what_it_moves_first(a: TestMount, b: TestMount) -> None:
    ino, handle = await a.create(b"f.new", b"data")
    other, other_handle = await a.create(b"other", b"x")
    await a.names.rename(a.root, b"f.new", a.root, b"f", 0)
    assert a.writer.flushed == [ino]
    assert (await b.stat(b"f")).size == 4
    for number in (handle, other_handle):
        await a.close(number)
    assert other != ino


async def test_a_rename_of_a_name_from_elsewhere_commits_too(a: TestMount, b: TestMount) -> None:
    shown = await b.names.make(b.root, b"f", stat.S_IFREG | 0o600, ME)
    await a.stat(b"f")
    opened = await a.files.open(shown.ino, RDWR)
    await a.files.write(opened.number, 0, b"data")
    await a.names.rename(a.root, b"f", a.root, b"g", 0)
    assert a.writer.flushed == [shown.ino]


async def test_a_clean_rename_asks_nothing(a: TestMount) -> None:
    await a.mkdir(b"d")
    before = a.meta.seen
    await a.names.rename(a.root, b"d", a.root, b"e", 0)
    assert a.meta.seen == before + 1
    assert a.writer.flushed == []


async def test_rename_flags(a: TestMount) -> None:
    one, _ = await a.create(b"1", b"one")
    two, _ = await a.create(b"2", b"two")
    await fails(ErrorCode.EXISTS, a.names.rename, a.root, b"1", a.root, b"2", RenameFlags.NOREPLACE)
    await fails(ErrorCode.NOT_FOUND, a.names.rename, a.root, b"1", a.root, b"3", RenameFlags.EXCHANGE)
    a.writer.flushed.clear()
    await a.names.rename(a.root, b"1", a.root, b"2", RenameFlags.EXCHANGE)
    assert (await a.stat(b"1")).ino == two
    assert (await a.stat(b"2")).ino == one
    await fails(ErrorCode.INVALID, a.names.rename, a.root, b"1", a.root, b"2", 4)


async def test_a_directory_exchanged_for_a_file(a: TestMount, b: TestMount) -> None:
    one, two = await a.mkdir(b"1"), await a.mkdir(b"2")
    inner = await a.mkdir(b"inner", one)
    await a.create(b"f", parent=two)
    await a.names.rename(two, b"f", one, b"inner", RenameFlags.EXCHANGE)
    assert (await a.vfs.get_attributes(one)).nlink == 2
    assert (await a.vfs.get_attributes(two)).nlink == 3
    handle = a.names.open_directory(inner)
    assert [entry.shown.ino for entry in await a.names.list_directory(handle, 0)] == [inner, two]
    assert (await a.vfs.get_attributes(inner)).ctime_ns == (await b.vfs.get_attributes(inner)).ctime_ns


async def test_a_moved_directory_has_another_parent(a: TestMount) -> None:
    old, new = await a.mkdir(b"old"), await a.mkdir(b"new")
    moving = await a.mkdir(b"x", old)
    await a.names.rename(old, b"x", new, b"x", 0)
    handle = a.names.open_directory(moving)
    assert [entry.shown.ino for entry in await a.names.list_directory(handle, 0)] == [moving, new]


async def test_what_a_rename_replaces_is_not_written_any_more(a: TestMount) -> None:
    old, old_handle = await a.create(b"f", b"old data")
    await a.close(old_handle)
    _, handle = await a.create(b"f.new", b"new")
    await a.names.rename(a.root, b"f.new", a.root, b"f", 0)
    assert old not in a.writer.flushed
    assert a.writer.dirty_bytes == 0
    await a.close(handle)


async def test_what_goes_to_the_trash_is_written_nevertheless(tmp_path: Path) -> None:
    async with open_plant(tmp_path, trash_seconds=3600.0) as plant, plant.mount() as mount:
        deleted, handle = await mount.create(b"deleted", b"data")
        await mount.close(handle)
        await mount.names.unlink(mount.root, b"deleted", directory=False)
        replaced, handle = await mount.create(b"f", b"old data")
        await mount.close(handle)
        await mount.create(b"f.new", b"new")
        await mount.names.rename(mount.root, b"f.new", mount.root, b"f", 0)
        assert mount.writer.dirty_bytes, "nothing was thrown away"
        assert plant.parts.trash.files == 2
        await mount.core.flush(deleted)
        await mount.core.flush(replaced)
        assert {deleted, replaced} <= set(mount.writer.flushed)


# -- attributes ----------------------------------------------------------------------------------------------------


async def test_modes_owners_and_times(a: TestMount, b: TestMount) -> None:
    ino, handle = await a.create(b"f")
    await a.set(ino, mode=0o4711, uid=5, gid=6)
    await a.set(ino, atime_ns=-1, mtime_ns=-1_500_000_000)
    shown = await b.stat(b"f")
    assert (stat.S_IMODE(shown.mode), shown.uid, shown.gid) == (0o4711, 5, 6)
    assert (shown.atime_ns, shown.mtime_ns) == (-1, -1_500_000_000)
    await a.close(handle)


async def test_a_time_that_was_set_survives_the_commit_of_earlier_data(a: TestMount, b: TestMount) -> None:
    """What tar, rsync and cp -a do: write, utimens, close."""
    ino, handle = await a.create(b"f", b"data")
    shown = await a.set(ino, mtime_ns=1_000_000_000)
    assert (shown.mtime_ns, shown.size) == (1_000_000_000, 4)
    assert (await a.vfs.get_attributes(ino)).mtime_ns == 1_000_000_000
    assert a.writer.flushed == [], "setting times needs no flush"
    await a.close(handle)
    seen = await b.stat(b"f")
    assert a.writer.flushed == [ino]
    assert (seen.mtime_ns, seen.size) == (1_000_000_000, 4)
    assert (await a.vfs.get_attributes(ino)).mtime_ns == 1_000_000_000


async def test_writing_after_that_sets_the_time_again(a: TestMount, b: TestMount) -> None:
    ino, handle = await a.create(b"f", b"data")
    await a.set(ino, mtime_ns=1_000_000_000)
    await a.files.write(handle, 4, b"more")
    written = (await a.vfs.get_attributes(ino)).mtime_ns
    assert written > 1_000_000_000
    assert (await b.stat(b"f")).mtime_ns == written
    await a.close(handle)


async def test_dirty_data_shows_in_size_times_and_blocks(a: TestMount) -> None:
    ino, handle = await a.create(b"f")
    before = await a.vfs.get_attributes(ino)
    await a.files.write(handle, 1000, b"x" * 1000)
    shown = a.vfs.known_attributes(ino)
    assert shown is not None
    assert (shown.size, shown.blocks) == (2000, 2)
    assert shown.mtime_ns > before.mtime_ns
    assert shown.ctime_ns >= shown.mtime_ns
    await a.close(handle)


async def test_truncating_drops_what_is_dirty_behind(a: TestMount, b: TestMount) -> None:
    ino, handle = await a.create(b"f", b"0123456789")
    assert (await a.set(ino, size=4)).size == 4
    assert await a.files.read(handle, 0, 100) == b"0123"
    await a.files.write(handle, 4, b"xy")
    assert (await b.stat(b"f")).size == 6
    assert (await a.set(ino, size=10)).size == 10
    assert (await a.set(ino, size=0)).size == 0
    assert (await b.stat(b"f")).size == 0
    await a.close(handle)


async def test_a_truncate_that_fails_did_not_happen(a: TestMount) -> None:
    ino, handle = await a.create(b"f", b"0123456789")
    await a.files.fsync(handle)
    await fails(ErrorCode.FILE_TOO_BIG, a.set, ino, size=1 << 63)
    assert (await a.vfs.get_attributes(ino)).size == 10
    assert len(await a.files.read(handle, 0, 100)) == 10
    await a.close(handle)


async def test_truncating_what_is_not_open(a: TestMount, b: TestMount) -> None:
    ino, handle = await a.create(b"f", b"0123456789")
    await b.stat(b"f")
    assert (await b.set(ino, size=3)).size == 3
    assert (await a.vfs.get_attributes(ino)).size == 3
    await a.close(handle)


async def test_statistics_are_a_second_old_at_most(a: TestMount) -> None:
    before = await a.vfs.statistics(1)
    assert await a.vfs.statistics(1) is before
    await trio.sleep(1.05)
    assert await a.vfs.statistics(1) is not before


# -- extended attributes -------------------------------------------------------------------------------------------


async def test_xattrs(a: TestMount, b: TestMount) -> None:
    ino, handle = await a.create(b"f")
    assert a.vfs.knows_no_xattr(ino, b"security.capability")
    await fails(ErrorCode.NO_ATTRIBUTE, a.vfs.get_xattr, ino, b"user.x")
    assert await a.vfs.list_xattrs(ino) == ()
    await a.vfs.set_xattr(ino, b"user.x", b"\0value")
    assert not a.vfs.knows_no_xattr(ino, b"user.x")
    assert await a.vfs.get_xattr(ino, b"user.x") == b"\0value"
    await b.stat(b"f")
    assert await b.vfs.list_xattrs(ino) == (b"user.x",)
    assert not b.vfs.knows_no_xattr(ino, b"user.y")
    await fails(ErrorCode.NO_ATTRIBUTE, b.vfs.get_xattr, ino, b"user.y")
    await b.vfs.remove_xattr(ino, b"user.x")
    assert await b.vfs.list_xattrs(ino) == ()
    inode = b.core.inodes.get(ino)
    assert inode is not None
    assert not inode.attributes.flags & InodeFlags.HAS_XATTRS
    await a.close(handle)


async def test_an_acl_and_a_mode_set_before_it_come_in_this_order(a: TestMount, b: TestMount) -> None:
    ino, handle = await a.create(b"f")
    name = b"system.posix_acl_access"
    assert a.vfs.knows_no_xattr(ino, name)
    await a.vfs.set_attributes(SetAttributes(ino, mode=0o604))  # answered before it is sent
    rights = [Entry(USER_OBJ, 7), Entry(USER, 5, 1234), Entry(GROUP_OBJ, 4), Entry(MASK, 6), Entry(OTHER, 0)]
    await a.vfs.set_xattr(ino, name, encode(rights))
    assert stat.S_IMODE((await b.stat(b"f")).mode) == 0o760
    await a.vfs.set_attributes(SetAttributes(ino, mode=0o610))
    kept = decode(await a.vfs.get_xattr(ino, name))
    assert [entry.permissions for entry in kept] == [6, 5, 4, 1, 0]
    await a.vfs.remove_xattr(ino, name)
    await fails(ErrorCode.NO_ATTRIBUTE, b.vfs.get_xattr, ino, name)
    await a.close(handle)


async def test_an_acl_that_is_a_mode_is_set_as_one(a: TestMount, b: TestMount, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    ask = a.core.remote.set_xattr

    async def counted(ino: int, name: bytes, value: bytes) -> None:
        asked.append(value)
        await ask(ino, name, value)

    monkeypatch.setattr(a.core.remote, "set_xattr", counted)
    ino, handle = await a.create(b"f")
    await a.vfs.set_attributes(SetAttributes(ino, mode=0o2777))
    name = b"system.posix_acl_access"
    plain = encode([Entry(USER_OBJ, 6), Entry(GROUP_OBJ, 4), Entry(OTHER, 1)])
    await a.vfs.set_xattr(ino, name, plain)
    assert not asked
    assert stat.S_IMODE((await a.vfs.get_attributes(ino)).mode) == 0o2641
    assert stat.S_IMODE((await b.stat(b"f")).mode) == 0o2641
    await fails(ErrorCode.NO_ATTRIBUTE, b.vfs.get_xattr, ino, name)
    # Those that say more or make no sense, of a file that has one, and of one that is not being written.
    rights = encode([Entry(USER_OBJ, 7), Entry(USER, 5, 1234), Entry(GROUP_OBJ, 4), Entry(MASK, 6), Entry(OTHER, 0)])
    await fails(ErrorCode.INVALID, a.vfs.set_xattr, ino, name, plain[:4] + plain[12:20] + plain[4:12] + plain[20:])
    await fails(ErrorCode.INVALID, a.vfs.set_xattr, ino, name, plain[:6] + b"\x08" + plain[7:])
    await a.vfs.set_xattr(ino, name, rights)
    await a.vfs.get_attributes(ino)
    await a.vfs.set_xattr(ino, name, plain)
    await fails(ErrorCode.NO_ATTRIBUTE, b.vfs.get_xattr, ino, name)
    await b.vfs.get_attributes(ino)
    await b.vfs.set_xattr(ino, name, rights)
    assert len(asked) == 4
    await a.close(handle)


# -- part of the tree, and read-only -------------------------------------------------------------------------------


async def test_a_subdirectory_can_be_mounted(plant: Plant, a: TestMount) -> None:
    inner = await a.mkdir(b"inner", await a.mkdir(b"outer"))
    async with plant.mount(subdirectory=b"/outer/inner") as part:
        assert part.root == inner
        await part.create(b"f", b"x")
        handle = part.names.open_directory(part.root)
        listed = list(await part.names.list_directory(handle, 0))
        assert [(entry.name, entry.shown.ino) for entry in listed[:2]] == [(b".", inner), (b"..", inner)]
    assert await a.list(inner) == [b".", b"..", b"f"]


async def test_read_only(plant: Plant, a: TestMount) -> None:
    ino, handle = await a.create(b"f", b"data")
    await a.close(handle)
    async with plant.mount(VfsOptions(read_only=True)) as reading:
        await reading.stat(b"f")
        await reading.files.open(ino, os.O_RDONLY)
        await fails(ErrorCode.READ_ONLY, reading.files.open, ino, os.O_RDWR)
        await fails(ErrorCode.READ_ONLY, reading.mkdir, b"d")

"""Contents, handles, and coherence between mounts, over a real metaserver."""

import os
import stat
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import trio
from vfs_harness import ME, Plant, TestMount, code_of, open_plant

from dfsmount import handles
from dfsmount.vfs_core import VfsOptions
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import Entry, Made, Make, SetAttributes
from metaserver.wire import Response

RDONLY, RDWR = os.O_RDONLY, os.O_RDWR


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


def openers(plant: Plant, ino: int) -> dict[int, bool]:
    """Which sessions the metaserver believes to have it open, and whether for writing."""
    return {session.id: session.opened[ino] for session in plant.parts.sessions.by_id.values() if ino in session.opened}


async def eventually(condition: object) -> None:
    with trio.fail_after(5):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110
            await trio.sleep(0.01)


# -- registration --------------------------------------------------------------------------------------------------


async def test_open_registers_and_close_deregisters_lazily(plant: Plant, a: TestMount) -> None:
    ino, handle = await a.create(b"f")
    assert openers(plant, ino) == {a.meta.session: True}
    await a.close(handle)
    assert openers(plant, ino), "not at once"
    await eventually(lambda: not openers(plant, ino))
    assert a.core.files.get(ino) is None
    assert a.core.files.made == {}


async def test_from_reading_to_writing(plant: Plant, a: TestMount) -> None:
    shown = await a.names.make(a.root, b"f", stat.S_IFREG | 0o600, ME)
    reading = await a.files.open(shown.ino, RDONLY)
    assert openers(plant, shown.ino) == {a.meta.session: False}
    writing = await a.files.open(shown.ino, RDWR)
    assert openers(plant, shown.ino) == {a.meta.session: True}
    await a.close(writing.number)
    again = await a.files.open(shown.ino, RDONLY)
    assert openers(plant, shown.ino) == {a.meta.session: True}, "dirty data may still be there"
    for opened in (reading, again):
        await a.close(opened.number)


async def test_nothing_dirty_is_deregistered(plant: Plant, a: TestMount) -> None:
    ino, handle = await a.create(b"f", b"data")
    await a.close(handle)
    await trio.sleep(2 * handles.CLOSE_SECONDS)
    assert openers(plant, ino)
    state = a.core.files.get(ino)
    assert state is not None
    await a.writer.flush(state.state)
    await eventually(lambda: not openers(plant, ino))


async def test_many_closes_go_out_at_once(plant: Plant, a: TestMount, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "CLOSE_SECONDS", 3600.0)
    monkeypatch.setattr(handles, "CLOSE_BATCH", 10)
    await trio.sleep(0.6)
    opened = [await a.create(b"%d" % number) for number in range(10)]
    for _, handle in opened:
        await a.close(handle)
    await eventually(lambda: not any(openers(plant, ino) for ino, _ in opened))


async def test_opening_again_while_the_close_is_on_its_way(plant: Plant, a: TestMount) -> None:
    ino, handle = await a.create(b"f")
    await a.close(handle)
    inos = a.core.files.take_idle()
    assert inos == [ino]
    async with trio.open_nursery() as nursery:
        opened: list[int] = []

        async def reopen() -> None:
            opened.append((await a.files.open(ino, RDWR)).number)

        nursery.start_soon(reopen)
        await trio.sleep(0.05)
        assert not opened, "an OPEN must not overtake the CLOSE"
        await a.core.remote.close(inos)
        a.core.files.closed(inos)
    assert openers(plant, ino)
    await a.close(opened[0])


async def test_closing_while_an_open_is_on_its_way(plant: Plant, a: TestMount) -> None:
    ino, handle = await a.create(b"f")
    async with a.core.files.opening(ino):
        await a.close(handle)
        assert a.core.files.take_idle() == []
    assert a.core.files.take_idle() == [ino]
    a.core.files.closed([ino])


async def test_unknown_handles_are_refused(a: TestMount) -> None:
    for function in (a.files.flush, a.files.fsync):
        with pytest.raises(DfsError) as caught:
            await function(99)
        assert code_of(caught.value) is ErrorCode.INVALID
    a.files.release(99)


# -- open flags ----------------------------------------------------------------------------------------------------


async def test_o_trunc(a: TestMount, b: TestMount) -> None:
    ino, handle = await a.create(b"f", b"0123456789")
    opened = await a.files.open(ino, RDWR | os.O_TRUNC)
    assert (await a.vfs.get_attributes(ino)).size == 0
    assert await a.files.read(handle, 0, 10) == b""
    assert (await b.stat(b"f")).size == 0
    for number in (handle, opened.number):
        await a.close(number)


async def test_a_user_who_opens_with_o_trunc_takes_setuid_away(a: TestMount) -> None:
    ino, handle = await a.create(b"f", b"data")
    await a.close(handle)
    for mode, left in ((0o6777, 0o777), (0o6767, 0o2767), (0o755, 0o755)):
        await a.set(ino, mode=mode)
        await a.close((await a.files.open(ino, RDWR | os.O_TRUNC)).number)
        assert stat.S_IMODE((await a.stat(b"f")).mode) == mode
        await a.close((await a.files.open(ino, RDONLY, privileged=False)).number)
        assert stat.S_IMODE((await a.stat(b"f")).mode) == mode
        told = len(a.kernel.attributes)
        await a.close((await a.files.open(ino, RDWR | os.O_TRUNC, privileged=False)).number)
        assert stat.S_IMODE((await a.stat(b"f")).mode) == left
        assert (ino in a.kernel.attributes[told:]) == (left != mode), "it believes in the old mode"


async def test_o_sync_writes_are_durable_when_they_return(a: TestMount) -> None:
    for flag in (os.O_SYNC, os.O_DSYNC):
        ino, handle = await a.create(b"f%d" % flag, flags=RDWR | flag)
        await a.files.write(handle, 0, b"data")
        assert a.writer.flushed.pop() == ino
        assert a.writer.dirty_bytes == 0
        assert a.meta.durable == a.meta.seen
        await a.close(handle)


async def test_fsync_is_durable_and_close_does_not_wait(a: TestMount) -> None:
    ino, handle = await a.create(b"f", b"data")
    await a.files.fsync(handle)
    assert a.meta.durable == a.meta.seen
    await a.files.write(handle, 4, b"more")
    a.writer.flushed.clear()
    await a.close(handle)
    assert a.writer.soon == [ino]
    assert a.writer.flushed == []
    await a.vfs.sync_names()
    assert a.meta.durable == a.meta.seen


async def test_sync_close_waits(plant: Plant) -> None:
    async with plant.mount(VfsOptions(sync_close=True)) as mount:
        ino, handle = await mount.create(b"f", b"data")
        await mount.files.flush(handle)
        assert mount.writer.flushed == [ino]


async def test_o_direct_and_page_cache(a: TestMount, b: TestMount) -> None:
    ino, handle = await a.create(b"f", b"data")
    await a.files.fsync(handle)
    await a.close(handle)
    assert not (await a.files.open(ino, RDONLY)).keep_cache, "own commits have moved the version"
    assert (await a.files.open(ino, RDONLY)).keep_cache
    assert (await a.files.open(ino, RDONLY | os.O_DIRECT)).direct
    await b.stat(b"f")
    opened = await b.files.open(ino, RDWR)
    await b.files.write(opened.number, 0, b"DATA")
    assert not (await a.files.open(ino, RDONLY)).keep_cache


async def test_creating_what_another_mount_has_just_created(a: TestMount, b: TestMount) -> None:
    ino, _ = await a.create(b"f", b"data")
    _, shown = await b.files.create(b.root, b"f", 0o100600, RDWR, ME)
    assert (shown.ino, shown.size) == (ino, 4)
    _, shown = await b.files.create(b.root, b"f", 0o100600, RDWR | os.O_TRUNC, ME)
    assert shown.size == 0
    with pytest.raises(DfsError) as caught:
        await b.files.create(b.root, b"f", 0o100600, RDWR | os.O_EXCL, ME)
    assert code_of(caught.value) is ErrorCode.EXISTS
    inode = b.core.inodes.get(ino)
    assert inode is not None
    assert inode.lookups == 2


# -- errors of written data ----------------------------------------------------------------------------------------


async def test_each_handle_hears_of_a_loss_once(a: TestMount) -> None:
    ino, one = await a.create(b"f", b"data")
    two = (await a.files.open(ino, RDWR)).number
    a.writer.broken = DfsError(ErrorCode.NO_SPACE)
    await a.core.flush(ino)
    a.writer.broken = None
    for handle in (one, two):
        with pytest.raises(DfsError) as caught:
            await a.files.flush(handle)
        assert code_of(caught.value) is ErrorCode.NO_SPACE
        await a.files.flush(handle)
    three = (await a.files.open(ino, RDWR)).number
    await a.files.fsync(three)


async def test_the_kernel_forgets_what_is_lost(a: TestMount) -> None:
    """Its pages have what was written, and would show it although it will never be stored."""
    ino, handle = await a.create(b"f", b"data")
    a.writer.broken = DfsError(ErrorCode.NO_SPACE)
    await a.core.flush(ino)
    await eventually(lambda: a.kernel.contents == [ino])
    with pytest.raises(DfsError):
        await a.close(handle)
    assert not (await a.files.open(ino, RDWR)).keep_cache


async def test_the_kernel_forgets_what_is_dropped_with_something_older(a: TestMount) -> None:
    ino, handle = await a.create(b"f", b"data")
    state = a.core.handles.file(handle).file.state
    state.dirty.close()
    await a.files.write(handle, 4, b"more")
    state.dirty.close()
    first, second = state.dirty.layers
    first.taken = second.taken = True
    state.dropped(first, DfsError(ErrorCode.NO_SPACE))
    assert state.is_dirty
    assert state.size == 0
    assert await a.files.read(handle, 0, 10) == b""
    await eventually(lambda: a.kernel.contents == [ino])
    state.dropped(second, None)
    assert not state.is_dirty


async def test_fsync_and_write_tell_of_a_loss(a: TestMount) -> None:
    _, handle = await a.create(b"f", b"data")
    a.writer.broken = DfsError(ErrorCode.IO)
    with pytest.raises(DfsError):
        await a.files.fsync(handle)
    await a.files.write(handle, 0, b"x")
    await a.core.writer.flush(a.core.handles.file(handle).file.state)
    with pytest.raises(DfsError):
        await a.files.write(handle, 1, b"y")
    a.writer.broken = None
    await a.files.write(handle, 1, b"y")
    await a.files.fsync(handle)


# -- open but unlinked ---------------------------------------------------------------------------------------------


async def test_an_unlinked_file_lives_until_it_is_closed(plant: Plant, a: TestMount) -> None:
    ino, handle = await a.create(b"f", b"data")
    await a.names.unlink(a.root, b"f", directory=False)
    assert await a.files.read(handle, 0, 10) == b"data"
    await a.files.write(handle, 4, b"more")
    shown = await a.vfs.get_attributes(ino)
    assert (shown.nlink, shown.size) == (0, 8)
    await a.close(handle)
    assert a.writer.soon == []
    assert a.writer.flushed == []
    assert a.writer.dirty_bytes == 0, "nobody will ever read it"
    await eventually(lambda: not openers(plant, ino))
    with pytest.raises(DfsError) as caught:
        await a.core.remote.get_attributes(ino)
    assert code_of(caught.value) is ErrorCode.STALE_INODE


async def test_another_mount_keeps_it_alive(plant: Plant, a: TestMount, b: TestMount) -> None:
    ino, handle = await a.create(b"f", b"data")
    await b.stat(b"f")
    opened = await b.files.open(ino, RDONLY)
    await a.names.unlink(a.root, b"f", directory=False)
    await a.close(handle)
    await eventually(lambda: a.meta.session not in openers(plant, ino))
    assert len(await b.files.read(opened.number, 0, 10)) == 4


async def test_dirty_data_of_a_closed_file_goes_with_its_last_name(a: TestMount) -> None:
    _, handle = await a.create(b"f", b"data")
    await a.close(handle)
    assert a.writer.dirty_bytes
    await a.names.unlink(a.root, b"f", directory=False)
    assert a.writer.dirty_bytes == 0


# -- what two mounts see -------------------------------------------------------------------------------------------


async def test_what_was_closed_is_seen_by_others_at_once(a: TestMount, b: TestMount) -> None:
    ino, handle = await a.create(b"f", b"data")
    await a.close(handle)
    assert (await b.stat(b"f")).size == 4
    await a.files.open(ino, RDWR)
    number = (await a.files.open(ino, RDWR)).number
    await a.files.write(number, 4, b"more")
    opened = await b.files.open(ino, RDONLY)
    assert len(await b.files.read(opened.number, 0, 100)) == 8


async def test_a_flush_that_fails_does_not_stop_the_other_mount(a: TestMount, b: TestMount) -> None:
    _, handle = await a.create(b"f", b"data")
    a.writer.broken = DfsError(ErrorCode.IO)
    assert (await b.stat(b"f")).size == 0
    with pytest.raises(DfsError):
        await a.files.flush(handle)


async def test_others_changes_reach_an_open_file(a: TestMount, b: TestMount) -> None:
    ino, handle = await a.create(b"f")
    await a.stat(b"f")
    await b.stat(b"f")
    opened = await b.files.open(ino, RDWR)
    await b.files.write(opened.number, 0, b"data")
    await b.files.fsync(opened.number)
    await eventually(lambda: a.kernel.contents == [ino])
    assert a.vfs.known_attributes(ino) is None
    assert len(await a.files.read(handle, 0, 100)) == 4


async def test_the_kernel_is_told_of_a_size_it_does_not_expect(a: TestMount, b: TestMount) -> None:
    """An append goes where the kernel believes the end to be."""
    ino, handle = await a.create(b"f", b"data")
    await a.close(handle)
    await b.stat(b"f")
    opened = await b.files.open(ino, RDWR)
    assert b.kernel.attributes == []
    number = (await a.files.open(ino, RDWR)).number
    await a.files.write(number, 4, b"more")
    await b.files.open(ino, RDWR | os.O_APPEND)
    assert b.kernel.attributes == [ino]
    await b.close(opened.number)


# -- lost connections and sessions ---------------------------------------------------------------------------------


async def test_a_lost_connection_is_not_noticed(plant: Plant, a: TestMount, b: TestMount) -> None:
    ino, handle = await a.create(b"f", b"data")
    plant.cut()
    await a.files.fsync(handle)
    assert (await b.stat(b"f")).size == 4
    assert openers(plant, ino) == {a.meta.session: True}
    assert a.core.handles.file(handle).file.stale, "pushes may have been lost"
    await a.files.read(handle, 0, 10)
    assert not a.core.handles.file(handle).file.stale


async def test_an_evicted_mount_goes_on_in_a_new_session(plant: Plant, a: TestMount) -> None:
    ino, handle = await a.create(b"f", b"data")
    await a.files.fsync(handle)
    await a.files.write(handle, 0, b"lost")
    old = a.meta.session
    state = plant.parts.sessions.by_id[old]
    await plant.parts.resuming.end(state, "test")
    plant.cut()
    await a.stat(b"f")
    assert a.meta.session != old
    assert a.writer.abandoned is not None
    await eventually(lambda: openers(plant, ino) == {a.meta.session: True})
    with pytest.raises(DfsError):
        await a.files.fsync(handle)
    await a.files.write(handle, 0, b"kept")
    await a.files.fsync(handle)


async def test_finish_writes_everything_and_closes_everything(plant: Plant, a: TestMount) -> None:
    files = [await a.create(b"%d" % number, b"data") for number in range(5)]
    for _, handle in files[1:]:
        await a.close(handle)
    await a.vfs.finish()
    assert a.writer.dirty_bytes == 0
    assert a.meta.durable == a.meta.seen
    assert [ino for ino, _ in files if openers(plant, ino)] == [files[0][0]]


async def test_a_loss_is_told_although_another_file_with_one_is_deregistered_meanwhile(
    a: TestMount, monkeypatch: pytest.MonkeyPatch
) -> None:
    a.writer.broken = DfsError(ErrorCode.IO, "no server takes it")
    _, old = await a.create(b"old", b"data")
    with pytest.raises(DfsError):
        await a.files.fsync(old)
    await a.close(old)
    await a.create(b"new", b"data")
    flush_all = a.writer.flush_all

    async def flush_and_close() -> None:
        await flush_all()
        a.core.files.closed(a.core.files.take_idle())
        assert len(a.core.files) == 1

    monkeypatch.setattr(a.writer, "flush_all", flush_and_close)
    with pytest.raises(DfsError):
        await a.vfs.write_everything()


# -- attributes that are ahead -------------------------------------------------------------------------------------


async def test_attributes_of_a_file_being_written_are_sent_together(a: TestMount, b: TestMount) -> None:
    ino, handle = await a.create(b"f", b"data")
    before = a.meta.seen
    await a.set(ino, mode=0o600)
    await a.set(ino, uid=5, gid=6)
    await a.set(ino, atime_ns=7)
    shown = await a.set(ino, mtime_ns=8)
    assert a.meta.seen == before, "nothing was asked"
    assert (stat.S_IMODE(shown.mode), shown.uid, shown.gid, shown.atime_ns, shown.mtime_ns) == (0o600, 5, 6, 7, 8)
    assert stat.S_ISREG(shown.mode)
    await eventually(lambda: a.meta.seen == before + 1)
    assert a.core.inodes.get(ino).opened.ahead is None  # type: ignore[union-attr]
    again = a.vfs.known_attributes(ino)
    assert again is not None
    assert (again.mode, again.uid, again.atime_ns, again.mtime_ns) == (shown.mode, 5, 7, 8)
    assert again.ctime_ns == shown.ctime_ns
    await a.close(handle)


async def test_others_see_attributes_that_are_ahead(a: TestMount, b: TestMount) -> None:
    ino, handle = await a.create(b"f")
    await b.stat(b"f")
    await a.set(ino, mode=0o600)
    assert stat.S_IMODE((await b.stat(b"f")).mode) == 0o600
    await a.set(ino, mode=0o640)
    await a.close(handle)
    assert stat.S_IMODE((await b.stat(b"f")).mode) == 0o640


async def test_fsync_waits_for_attributes_that_are_ahead(a: TestMount) -> None:
    ino, handle = await a.create(b"f")
    for durable in (lambda: a.files.fsync(handle), a.vfs.sync_names, a.vfs.finish):
        await a.set(ino, mode=0o600)
        before = a.meta.seen
        await durable()  # type: ignore[no-untyped-call]
        assert a.meta.seen == before + 1
        assert a.meta.durable == a.meta.seen


async def test_a_write_after_a_time_was_set_comes_after_it(a: TestMount, b: TestMount) -> None:
    ino, handle = await a.create(b"f")
    await a.set(ino, mtime_ns=5)
    await a.files.write(handle, 0, b"x")
    await a.core.flush(ino)
    assert (await b.stat(b"f")).mtime_ns > 5
    assert (await a.vfs.get_attributes(ino)).mtime_ns > 5
    await a.close(handle)


async def test_a_truncate_comes_after_what_is_ahead(a: TestMount) -> None:
    ino, handle = await a.create(b"f", b"data")
    await a.set(ino, mtime_ns=5)
    assert (await a.set(ino, size=2)).mtime_ns > 5
    await a.set(ino, mtime_ns=6, mode=0o600)
    await a.set(ino, mtime_ns=7)
    await a.core.flush(ino)
    assert (await a.vfs.get_attributes(ino)).mtime_ns == 7
    await a.close(handle)


async def test_what_a_failed_truncate_has_dropped_is_an_error_at_fsync(plant: Plant, a: TestMount) -> None:
    ino, handle = await a.create(b"f", b"data")
    plant.parts.changes.refusing = "for a test"
    with pytest.raises(DfsError):
        await a.set(ino, size=4)
    assert a.core.files.get(ino).state.error_since(0) is None
    with pytest.raises(DfsError):
        await a.set(ino, size=1)
    plant.parts.changes.refusing = ""
    with pytest.raises(DfsError, match="dropped"):
        await a.files.fsync(handle)
    await a.files.fsync(handle)
    await a.close(handle)


async def test_a_file_is_not_deregistered_while_it_is_ahead(plant: Plant, a: TestMount) -> None:
    ino, handle = await a.create(b"f")
    await a.set(ino, mode=0o600)
    await a.close(handle)
    assert a.core.files.take_idle() == []
    await eventually(lambda: not openers(plant, ino))


async def test_attributes_that_could_not_be_set_are_told(plant: Plant, a: TestMount) -> None:
    ino, handle = await a.create(b"f")
    plant.parts.changes.refusing = "for a test"
    await a.set(ino, mode=0o600)
    await a.core.flush(ino)
    with pytest.raises(DfsError) as caught:
        await a.files.flush(handle)
    assert code_of(caught.value) is ErrorCode.READ_ONLY
    await a.files.flush(handle)
    plant.parts.changes.refusing = ""
    assert stat.S_IMODE((await a.vfs.get_attributes(ino)).mode) == 0o644


async def test_reading_one_xattr_writes_everything(a: TestMount) -> None:
    inos = [(await a.create(b"%d" % number, b"data"))[0] for number in range(3)]
    await a.set(inos[0], mode=0o600)
    assert not a.vfs.knows_no_xattr(a.root, b"user.dfs.flush")
    assert await a.vfs.get_xattr(a.root, b"user.dfs.flush") == b"done"
    assert a.writer.dirty_bytes == 0
    assert a.meta.durable == a.meta.seen
    handles = [(await a.files.open(ino, RDWR)).number for ino in inos]
    for handle, code in zip(handles, (ErrorCode.IO, ErrorCode.NO_SPACE), strict=False):
        a.writer.broken = None
        await a.files.write(handle, 0, b"x")
        a.writer.broken = DfsError(code, "nothing takes it")
        with pytest.raises(DfsError, match="lost: nothing takes it") as raised:
            await a.vfs.get_xattr(a.root, b"user.dfs.flush")
        assert raised.value.code is code
    assert await a.vfs.list_xattrs(a.root) == ()


# -- what is lost must not replace what is not -----------------------------------------------------------------------


async def test_rename_fails_if_what_is_moved_is_lost(a: TestMount) -> None:
    old, kept = await a.create(b"target", b"kept")
    await a.files.fsync(kept)
    new, handle = await a.create(b"new", b"lost")
    a.writer.broken = DfsError(ErrorCode.IO)
    with pytest.raises(DfsError) as caught:
        await a.names.rename(a.root, b"new", a.root, b"target", 0)
    assert code_of(caught.value) is ErrorCode.IO
    assert [(await a.stat(name)).ino for name in (b"target", b"new")] == [old, new]
    a.writer.broken = None
    with pytest.raises(DfsError):
        await a.close(handle)
    # Somebody has been told: who renames now knows what he does.
    await a.names.rename(a.root, b"new", a.root, b"target", 0)
    assert (await a.stat(b"target")).ino == new


async def test_rename_and_link_tell_what_was_lost_when_nobody_had_it_open(a: TestMount) -> None:
    for number, change in enumerate(("rename", "link")):
        name = b"new%d" % number
        ino, handle = await a.create(name, b"lost")
        await a.close(handle)
        a.writer.broken = DfsError(ErrorCode.IO)
        await a.core.flush(ino)
        a.writer.broken = None
        await a.vfs._close_now()
        assert a.core.files.get(ino) is None
        for attempt in range(2):
            try:
                if change == "rename":
                    await a.names.rename(a.root, name, a.root, b"other", 0)
                else:
                    await a.names.link(ino, a.root, b"third")
                assert attempt == 1
            except DfsError as error:
                assert (attempt, error.code) == (0, ErrorCode.IO)


# -- registrations whose answer never came -------------------------------------------------------------------------


async def test_an_open_whose_answer_did_not_come_is_deregistered(
    plant: Plant, a: TestMount, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise everybody who looks at the file asks this mount for its unwritten data, for ever."""
    ino, handle = await a.create(b"f")
    await a.close(handle)
    await eventually(lambda: not openers(plant, ino))
    remote = a.core.remote
    ask_open, ask_make, ask_close = remote.open, remote.make, remote.close
    closes = 0

    async def open_late(ino: int, *, writing: bool) -> Entry:
        await ask_open(ino, writing=writing)
        raise DfsError(ErrorCode.TIMEOUT)

    async def make_late(request: Make) -> Response[Made]:
        await ask_make(request)
        raise DfsError(ErrorCode.TIMEOUT)

    async def close_late(inos: Sequence[int]) -> None:
        nonlocal closes
        closes += 1
        if closes == 1:
            raise DfsError(ErrorCode.TIMEOUT)
        await ask_close(inos)

    monkeypatch.setattr(remote, "open", open_late)
    monkeypatch.setattr(remote, "make", make_late)
    monkeypatch.setattr(remote, "close", close_late)
    with pytest.raises(DfsError):
        await a.files.open(ino, RDWR)
    assert openers(plant, ino) == {a.meta.session: True}
    await eventually(lambda: not openers(plant, ino))
    assert closes == 2
    with pytest.raises(DfsError):
        await a.create(b"g")
    made = (await remote.lookup(a.root, b"g")).attributes.ino
    assert openers(plant, made) == {a.meta.session: True}
    await eventually(lambda: not openers(plant, made))


async def test_a_create_that_was_cancelled_is_deregistered(
    plant: Plant, a: TestMount, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past its deadline a request of the kernel is cancelled."""
    remote = a.core.remote
    ask_make = remote.make

    async def make_slowly(request: Make) -> Response[Made]:
        await ask_make(request)
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(remote, "make", make_slowly)
    with trio.move_on_after(0.2):
        await a.create(b"f")
    ino = (await remote.lookup(a.root, b"f")).attributes.ino
    await eventually(lambda: not openers(plant, ino))


async def test_fsync_tells_what_was_lost_before_the_file_was_opened(a: TestMount) -> None:
    """Written, closed, lost, opened, synced: the fsync must not say that all is well."""
    for deregistered in (False, True):
        name = b"file%d" % deregistered
        ino, handle = await a.create(name, b"lost")
        await a.close(handle)
        a.writer.broken = DfsError(ErrorCode.NO_SPACE)
        await a.core.flush(ino)
        a.writer.broken = None
        if deregistered:
            await a.vfs._close_now()
            assert a.core.files.get(ino) is None
            a.vfs.forget(ino, 1)
        reader = await a.files.open(ino, RDONLY)
        await a.close(reader.number)
        opened = await a.files.open(ino, RDWR)
        with pytest.raises(DfsError) as caught:
            await a.files.fsync(opened.number)
        assert code_of(caught.value) is ErrorCode.NO_SPACE
        await a.files.fsync(opened.number)
        await a.close(opened.number)
        again = await a.files.open(ino, RDWR)
        await a.files.fsync(again.number)
        await a.close(again.number)


async def lose(a: TestMount, ino: int) -> None:
    """What is dirty of a file is lost, and nobody hears of it yet."""
    a.writer.broken = DfsError(ErrorCode.NO_SPACE)
    await a.core.flush(ino)
    a.writer.broken = None


async def test_a_truncate_tells_what_was_lost_before_it(a: TestMount) -> None:
    """Written, lost, truncated: zeroes must not stay where the bytes were, with no error before them."""
    ino, handle = await a.create(b"f", b"kept")
    await a.files.fsync(handle)
    await a.files.write(handle, 4, b"lost")
    await lose(a, ino)
    assert (await a.stat(b"f")).size == 4
    with pytest.raises(DfsError) as caught:
        await a.set(ino, size=6)
    assert code_of(caught.value) is ErrorCode.NO_SPACE
    assert (await a.stat(b"f")).size == 4
    # Somebody has been told; whoever has it open hears of it all the same.
    assert (await a.set(ino, size=6)).size == 6
    with pytest.raises(DfsError):
        await a.files.fsync(handle)
    await a.files.fsync(handle)


async def test_a_truncate_tells_of_a_loss_when_nobody_has_the_file_open(a: TestMount) -> None:
    ino, handle = await a.create(b"f", b"lost")
    await a.close(handle)
    await lose(a, ino)
    await a.vfs._close_now()
    assert a.core.files.get(ino) is None
    with pytest.raises(DfsError):
        await a.set(ino, size=2)
    assert (await a.set(ino, size=2)).size == 2


async def test_each_handle_hears_of_a_loss_before_it_truncates(a: TestMount) -> None:
    ino, handle = await a.create(b"f", b"lost")
    other = (await a.files.open(ino, RDWR)).number
    await lose(a, ino)
    for number in (handle, other):
        with pytest.raises(DfsError):
            await a.vfs.set_attributes(SetAttributes(ino, size=2), number)
        assert (await a.vfs.set_attributes(SetAttributes(ino, size=2), number)).size == 2


async def test_a_file_can_be_emptied_whatever_was_lost(a: TestMount) -> None:
    """That is how space is made; and of an empty file nothing is wrong. The error is told by the next fsync."""
    ino, handle = await a.create(b"f", b"lost")
    await lose(a, ino)
    assert (await a.set(ino, size=0)).size == 0
    with pytest.raises(DfsError):
        await a.files.fsync(handle)

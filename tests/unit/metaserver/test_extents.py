"""The extent map against a file that is an array of (chunk, offset) for every byte."""

import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_rows import MemoryRows

from metaserver import chunks, contents, extents, inodes, namespace
from metaserver.errors import DfsError, ErrorCode
from metaserver.extents import Budget, TooManyRows
from metaserver.inodes import Effects
from metaserver.protocol import ChunkProgress, ChunkState, Commit, Extent, FileCommit, GetExtents, Make, SetAttributes
from metaserver.schema import Chunk, IdKind, Table

INO = 7
SESSION = 3
SIZE = 64
CHUNKS = 3


def fresh(chunk_length: int = 1 << 20, count: int = CHUNKS) -> MemoryRows:
    """An empty file, and chunks that have bytes for it."""
    tx = MemoryRows()
    inodes.make_root(tx, 0)
    tx.next_ids[IdKind.INODE] = INO
    namespace.make(tx, 0, Make(1, b"file", stat.S_IFREG | 0o644, 0, 0))
    for _ in range(count):
        chunk = chunks.allocate(tx, 0, SESSION, [1, 2], 2)
        chunks.progress(tx, SESSION, ChunkProgress(chunk, chunk_length, 1, 1))
    return tx


def commit(tx: MemoryRows, *found: Extent, extends_to: int = 0, mtime_ns: int | None = None) -> Effects:
    effects = Effects()
    file = FileCommit(INO, 0, extends_to, mtime_ns, found)
    contents.commit(tx, 1, SESSION, Commit((), (file,)), effects)
    return effects


def truncate(tx: MemoryRows, size: int) -> Effects:
    effects = Effects()
    contents.set_attributes(tx, 2, SetAttributes(INO, size=size), effects)
    return effects


def as_bytes(tx: MemoryRows) -> list[tuple[int, int] | None]:
    """What every byte of the file is."""
    inode = inodes.require(tx, INO)
    found: list[tuple[int, int] | None] = [None] * inode.size
    for offset, row in extents.in_range(tx, INO, 0, 1 << 62):
        for index in range(row.length):
            found[offset + index] = (row.chunk, row.chunk_offset + index)
    return found


write = st.tuples(
    st.just("write"),
    st.integers(0, SIZE - 1),
    st.integers(1, SIZE // 2),
    st.integers(1, CHUNKS),
    st.integers(0, 8),
)
cut = st.tuples(st.just("truncate"), st.integers(0, SIZE))


@given(st.lists(st.one_of(write, cut), max_size=25))
@settings(max_examples=300, deadline=None)
def test_map_is_what_a_byte_array_is(steps: list[tuple]) -> None:
    tx = fresh()
    model: list[tuple[int, int] | None] = []
    for step in steps:
        if step[0] == "truncate":
            size = step[1]
            model = model[:size] + [None] * (size - len(model))
            truncate(tx, size)
        else:
            _, offset, length, chunk, chunk_offset = step
            model += [None] * (offset + length - len(model))
            model[offset : offset + length] = [(chunk, chunk_offset + index) for index in range(length)]
            commit(tx, Extent(offset, length, chunk, chunk_offset))
        assert as_bytes(tx) == model
        tx.check()


@given(st.lists(write, min_size=1, max_size=12), st.integers(0, SIZE), st.integers(0, SIZE * 2), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_pages_cover_the_range_asked_for(steps: list[tuple], start: int, length: int, count: int) -> None:
    tx = fresh()
    for _, offset, size, chunk, chunk_offset in steps:
        commit(tx, Extent(offset, size, chunk, chunk_offset))
    whole = as_bytes(tx)
    wanted = start + length
    position, found = start, {}
    while position < wanted:
        page, end = extents.page(tx, INO, position, min(wanted, len(whole)), count)
        assert end > position or not page
        for extent in page:
            for index in range(extent.length):
                found[extent.file_offset + index] = (extent.chunk, extent.chunk_offset + index)
        if end >= min(wanted, len(whole)):
            break
        position = end
    expected = {index: whole[index] for index in range(start, min(wanted, len(whole))) if whole[index]}
    assert {index: value for index, value in found.items() if index >= start} == expected


def test_get_extents_is_complete_past_the_end_and_names_places() -> None:
    tx = fresh()
    commit(tx, Extent(10, 5, 1, 0), Extent(20, 5, 2, 0))
    page = contents.get_extents(tx, GetExtents(INO, 0, 1000), lambda server: -server)
    assert page.end == 1000
    assert page.extents == (Extent(10, 5, 1, 0), Extent(20, 5, 2, 0))
    # The rank decides the order of servers.
    assert [(place.chunk, place.servers) for place in page.places] == [(1, (2, 1)), (2, (2, 1))]
    assert contents.get_extents(tx, GetExtents(INO, 500, 10), lambda _: 0).extents == ()


def test_an_extent_across_the_offset_asked_for_is_given_whole() -> None:
    tx = fresh()
    commit(tx, Extent(0, 100, 1, 0))
    assert contents.get_extents(tx, GetExtents(INO, 50, 10), lambda _: 0).extents == (Extent(0, 60, 1, 0),)


def test_neighbours_that_continue_each_other_are_one_row() -> None:
    tx = fresh()
    for offset in (0, 20, 10):
        commit(tx, Extent(offset, 10, 1, 100 + offset))
    assert len(tx.tables[Table.EXTENTS]) == 1
    assert len(tx.tables[Table.BY_CHUNK]) == 1


def test_a_commit_that_is_there_already_changes_no_extent_and_costs_nothing() -> None:
    tx = fresh()
    commit(tx, Extent(0, 100, 1, 0))
    before = tx.copy()
    live: extents.Live = {}
    assert extents.replace(tx, INO, Extent(10, 50, 1, 10), live, Budget(0)) == 0
    assert tx.tables == before.tables
    assert live == {}


def test_more_rows_than_the_budget_are_refused_and_can_be_done_in_pieces() -> None:
    tx = fresh()
    count = 4 * contents.COMMIT_BUDGET
    for start in range(0, count, 500):
        commit(tx, *(Extent(2 * index, 1, 1, 3 * index) for index in range(start, min(start + 500, count))))
    whole = Extent(0, 2 * count, 2, 0)
    with pytest.raises(TooManyRows):
        commit(tx.copy(), whole)
    file = FileCommit(INO, 0, 0, None, (whole,))
    position = pieces = 0
    while position < whole.length:
        piece = contents.first_piece(tx, file, whole, position)
        commit(tx, piece)
        position += piece.length
        pieces += 1
    assert pieces > 1
    commit(tx, whole)
    assert len(tx.tables[Table.EXTENTS]) == 1
    tx.check()


def test_a_long_tail_is_cut_in_steps_and_out_of_sight_from_the_first() -> None:
    tx = fresh()
    count = 2 * inodes.STEP_EXTENTS + 10
    for start in range(0, count, 500):
        commit(tx, *(Extent(2 * index, 1, 1, 3 * index) for index in range(start, min(start + 500, count))))
    effects = truncate(tx, 11)
    ((_, task),) = effects.tasks
    assert contents.get_extents(tx, GetExtents(INO, 0, 1 << 40), lambda _: 0).extents[-1] == Extent(10, 1, 1, 15)
    assert task.position == 11
    steps = 0
    while not contents.truncate_step(tx, INO, task.position, effects):
        steps += 1
    assert steps == 1
    assert len(tx.tables[Table.EXTENTS]) == 6
    tx.check()


def test_a_sealed_chunk_without_live_bytes_is_dead_and_an_open_one_is_not() -> None:
    tx = fresh()
    commit(tx, Extent(0, 10, 1, 0), Extent(10, 10, 2, 0))
    row = chunks.find(tx, 1)
    assert row is not None
    chunks.seal(tx, 1, row, ())
    effects = truncate(tx, 0)
    assert effects.dead == [1]
    assert Chunk.unpack(tx.tables[Table.CHUNKS][(1).to_bytes(8, "big")]).state == ChunkState.DEAD
    assert Chunk.unpack(tx.tables[Table.CHUNKS][(2).to_bytes(8, "big")]).state == ChunkState.OPEN
    tx.check()


def refused(tx: MemoryRows, message: Commit, code: ErrorCode) -> None:
    with pytest.raises(DfsError) as caught:
        contents.commit(tx.copy(), 1, SESSION, message, Effects())
    assert caught.value.code is code


def one(*found: Extent, generation: int = 0, ino: int = INO) -> Commit:
    return Commit((), (FileCommit(ino, generation, 0, None, found),))


def test_commits_that_are_refused() -> None:
    tx = fresh(chunk_length=100)
    refused(tx, one(Extent(0, 101, 1, 0)), ErrorCode.INVALID)
    refused(tx, one(Extent(0, 1, 1, 100)), ErrorCode.INVALID)
    refused(tx, one(Extent(0, 0, 1, 0)), ErrorCode.INVALID)
    refused(tx, one(Extent(-1, 5, 1, 0)), ErrorCode.INVALID)
    refused(tx, one(Extent((1 << 63) - 2, 5, 1, 0)), ErrorCode.INVALID)
    refused(tx, one(Extent(0, 1, 99, 0)), ErrorCode.NOT_OWNER)
    refused(tx, one(Extent(0, 1, 1, 0), generation=1), ErrorCode.INVALID)
    refused(tx, one(Extent(0, 1, 1, 0), ino=1), ErrorCode.INVALID)
    refused(tx, one(*[Extent(0, 1, 1, 0)] * 1000), ErrorCode.INVALID)
    refused(tx, Commit((ChunkProgress(1, -1, 1, 1),), ()), ErrorCode.INVALID)
    refused(tx, Commit((ChunkProgress(1, 100, 2, 1),), ()), ErrorCode.INVALID)
    refused(tx, Commit((ChunkProgress(1, 65 << 20, 2, 1),), ()), ErrorCode.INVALID)
    row = chunks.find(tx, 2)
    assert row is not None
    chunks.seal(tx, 2, row, ())
    refused(tx, one(Extent(0, 1, 2, 0)), ErrorCode.NOT_OWNER)


def test_progress_never_goes_back() -> None:
    tx = fresh(chunk_length=100)
    contents.commit(tx, 1, SESSION, Commit((ChunkProgress(1, 50, 1, 9),), one(Extent(0, 80, 1, 20)).files), Effects())
    row = chunks.find(tx, 1)
    assert row is not None
    assert (row.length, row.chain) == (100, 1)


def test_a_commit_of_another_session_is_refused() -> None:
    tx = fresh()
    with pytest.raises(DfsError) as caught:
        contents.commit(tx, 1, SESSION + 1, one(Extent(0, 1, 1, 0)), Effects())
    assert caught.value.code is ErrorCode.NOT_OWNER


def test_a_file_that_is_gone_is_listed_and_the_others_are_committed() -> None:
    tx = fresh()
    files = (FileCommit(99, 0, 5, 1, ()), FileCommit(INO, 0, 0, 50, (Extent(0, 10, 1, 0),)))
    done = contents.commit(tx, 60, SESSION, Commit((), files), Effects())
    assert done.gone == (99,)
    assert [(each.ino, each.size, each.allocated, each.data_version) for each in done.attributes] == [(INO, 10, 10, 1)]


def test_times_of_a_commit() -> None:
    tx = fresh()
    commit(tx, Extent(0, 10, 1, 0), mtime_ns=None)
    assert inodes.require(tx, INO).mtime_ns == 0
    contents.commit(tx, 100, SESSION, Commit((), (FileCommit(INO, 0, 20, 70, ()),)), Effects())
    inode = inodes.require(tx, INO)
    # As the writer has shown it already, not when the commit happened to come.
    assert (inode.mtime_ns, inode.ctime_ns, inode.size) == (70, 70, 20)
    contents.commit(tx, 100, SESSION, Commit((), (FileCommit(INO, 0, 5, 1 << 60, ()),)), Effects())
    inode = inodes.require(tx, INO)
    assert (inode.mtime_ns, inode.ctime_ns, inode.size) == (1 << 60, 100, 20)


def test_a_commit_from_before_a_truncate_is_not_clipped() -> None:
    tx = fresh()
    commit(tx, Extent(0, 10, 1, 0))
    truncate(tx, 0)
    assert inodes.require(tx, INO).truncate_generation == 1
    commit(tx, Extent(0, 10, 1, 0))
    assert inodes.require(tx, INO).size == 10

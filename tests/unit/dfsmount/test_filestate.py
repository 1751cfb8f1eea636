"""What one inode shows and knows as answers and writes come in every order."""

import pytest

from dfsmount.filestate import FileState
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import FILE_SIZE_MAX, Attributes, ChunkPlace, Entry, Extent, FileMap


def attributes(size: int = 0, version: int = 0, generation: int = 0, mtime_ns: int = 5) -> Attributes:
    return Attributes(9, 0o100644, 0, 0, 1, size, 0, 1, mtime_ns, mtime_ns, 1, 0, 0, generation, version, 0)


def entry(size: int = 0, version: int = 0, generation: int = 0, *extents: Extent) -> Entry:
    return Entry(attributes(size, version, generation), FileMap(extents, (ChunkPlace(1, (2, 3)),), FILE_SIZE_MAX))


def unknown(size: int = 0, version: int = 0, generation: int = 0, mtime_ns: int = 5) -> Entry:
    return Entry(attributes(size, version, generation, mtime_ns))


def test_a_map_that_came_along_needs_no_asking() -> None:
    file = FileState(entry(100, 3, 0, Extent(0, 60, 1, 7)))
    assert file.extents.known_until(0) == FILE_SIZE_MAX
    assert file.places == {1: (2, 3)}
    assert [(p.length, p.chunk) for p in file.extents.pieces(0, 100)] == [(60, 1), (40, 0)]


def test_without_a_map_only_the_end_is_known() -> None:
    file = FileState(unknown(100, 3))
    assert file.extents.known_until(0) == 0
    assert file.extents.known_until(100) == FILE_SIZE_MAX
    assert FileState(unknown()).extents.known_until(0) == FILE_SIZE_MAX


def test_dirty_bytes_are_shown_before_they_are_committed() -> None:
    file = FileState(unknown(10, 1))
    file.write(20, b"abc", 77)
    assert (file.size, file.mtime_ns, file.ctime_ns, file.is_dirty) == (23, 77, 77, True)
    file.refresh(unknown(10, 1))
    assert (file.size, file.mtime_ns) == (23, 77)
    layer = file.dirty.layers[0]
    assert file.committed(layer, attributes(23, 2, mtime_ns=77), (Extent(20, 3, 1, 0),))
    assert (file.size, file.mtime_ns, file.is_dirty) == (23, 77, False)
    assert list(file.extents) == [Extent(20, 3, 1, 0)]
    assert not file.committed(layer, attributes(23, 3), ())


def test_a_commit_that_is_not_the_next_version_forgets_the_map() -> None:
    file = FileState(entry(10, 1, 0, Extent(0, 10, 1, 0)))
    file.write(0, b"abc", 7)
    file.committed(file.dirty.layers[0], attributes(10, 3), (Extent(0, 3, 2, 0),))
    assert file.extents.known_until(0) == 0
    assert len(file.extents) == 0


def test_a_commit_overtaken_by_a_later_answer_leaves_the_map_of_that() -> None:
    file = FileState(entry(10, 1, 0, Extent(0, 10, 1, 0)))
    file.write(0, b"abc", 7)
    file.refresh(entry(10, 3, 0, Extent(0, 10, 5, 0)))
    file.committed(file.dirty.layers[0], attributes(10, 2), (Extent(0, 3, 2, 0),))
    assert list(file.extents) == [Extent(0, 10, 5, 0)]
    assert file.attributes.data_version == 3


def test_an_older_answer_changes_nothing() -> None:
    file = FileState(entry(10, 4, 0, Extent(0, 10, 1, 0)))
    file.refresh(entry(500, 3))
    assert (file.size, file.attributes.data_version) == (10, 4)
    assert len(file.extents) == 1


def test_a_change_elsewhere_forgets_the_map_unless_it_comes_along() -> None:
    file = FileState(entry(10, 1, 0, Extent(0, 10, 1, 0)))
    file.refresh(unknown(10, 2))
    assert file.extents.known_until(0) == 0
    file.refresh(entry(10, 3, 0, Extent(0, 10, 6, 0)))
    assert list(file.extents) == [Extent(0, 10, 6, 0)]


def test_growth_elsewhere_is_not_taken_for_a_hole() -> None:
    """Past the old size nothing was mapped; after the change nothing is known there."""
    file = FileState(entry(100, 3, 0, Extent(0, 100, 1, 0)))
    file.refresh(unknown(150, 5))
    assert file.extents.known_until(100) == 100
    assert file.extents.known_until(150) == FILE_SIZE_MAX
    file.write(0, b"x", 1)
    assert file.committed(file.dirty.layers[0], attributes(200, 9), ())
    assert file.extents.known_until(150) == 150
    assert file.extents.known_until(200) == FILE_SIZE_MAX


def test_a_page_of_another_version_is_not_taken() -> None:
    file = FileState(unknown(100, 1))
    page = FileMap((Extent(0, 50, 1, 0),), (ChunkPlace(1, (4,)),), 50)
    file.refresh(unknown(100, 2))
    assert not file.learn_page(page, 0, 1)
    assert file.extents.known_until(0) == 0
    assert file.learn_page(page, 0, 2)
    assert file.extents.known_until(0) == 50
    assert file.places[1] == (4,)


def test_our_truncate_cuts_the_map_without_asking() -> None:
    file = FileState(entry(100, 1, 0, Extent(0, 100, 1, 0)))
    file.write(30, b"x" * 50, 7)
    file.begin_truncate(40)
    assert (file.size, file.dirty.stop) == (40, 40)
    # What is left dirty must not bring back the older time.
    assert file.dirty.newest_mtime_ns is None
    file.refresh(unknown(40, 2, 1, mtime_ns=9))
    assert (file.size, file.mtime_ns) == (40, 9)
    assert list(file.extents) == [Extent(0, 40, 1, 0)]
    assert file.extents.known_until(0) == FILE_SIZE_MAX


def test_our_truncate_beside_a_change_elsewhere_forgets_the_map() -> None:
    file = FileState(entry(100, 1, 0, Extent(0, 100, 1, 0)))
    file.begin_truncate(40)
    file.refresh(unknown(40, 3, 1))
    assert file.extents.known_until(0) == 0


def test_a_truncate_that_did_not_happen() -> None:
    file = FileState(entry(100, 1, 0, Extent(0, 100, 1, 0)))
    file.begin_truncate(40)
    file.refresh(unknown(100, 1))
    assert file.size == 100
    assert list(file.extents) == [Extent(0, 100, 1, 0)]


def test_a_commit_during_a_truncate_keeps_the_size_that_is_shown() -> None:
    file = FileState(entry(100, 1, 0, Extent(0, 100, 1, 0)))
    file.write(0, b"abc", 7)
    file.begin_truncate(40)
    file.committed(file.dirty.layers[0], attributes(100, 2), (Extent(0, 3, 2, 0),))
    assert file.size == 40
    file.refresh(unknown(40, 3, 1))
    assert [e.length for e in file.extents] == [3, 37]


def test_a_new_truncate_generation_closes_the_open_layer() -> None:
    file = FileState(unknown(0, 0))
    file.write(0, b"old", 7)
    file.refresh(unknown(0, 1, 1))
    file.write(0, b"new", 8)
    assert [layer.truncate_generation for layer in file.dirty.layers] == [0, 1]


def test_each_failure_is_told_once_per_handle() -> None:
    file = FileState(unknown())
    handles = [file.error_count, file.error_count]
    assert file.error_since(handles[0]) is None
    file.write(0, b"abc", 7)
    file.dropped(file.dirty.layers[0], DfsError(ErrorCode.NO_SPACE))
    for _ in handles:
        error = file.error_since(0)
        assert error is not None
        assert error.code is ErrorCode.NO_SPACE
    assert file.error_since(file.error_count) is None
    assert file.size == 0


def test_abandon_and_discard() -> None:
    file = FileState(unknown())
    file.abandon(DfsError(ErrorCode.IO))
    assert file.error_count == 0
    file.write(0, b"abc", 7)
    layer = file.dirty.layers[0]
    file.dirty.close()
    layer.taken = True
    file.write(5, b"later", 8)
    file.discard()
    assert file.dirty.layers == [layer]
    file.abandon(DfsError(ErrorCode.IO))
    assert (file.error_count, file.is_dirty, file.dirty.cost) == (1, False, 0)
    assert not file.dropped(layer, DfsError(ErrorCode.IO))
    assert file.error_count == 1


@pytest.mark.parametrize(
    ("offsets", "expected"), [((0, 10, 20), 30), ((0, 10, 50), 0), ((50, 60), 10), ((0, 30, 40), 10)]
)
def test_streaming_is_writing_in_order(offsets: tuple[int, ...], expected: int) -> None:
    file = FileState(unknown())
    for offset in offsets:
        file.write(offset, b"x" * 10, 1)
    assert file.streamed == expected

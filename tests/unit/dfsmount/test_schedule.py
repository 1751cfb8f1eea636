"""Who is sent when."""

from dfsmount.dirty import LAYER_BYTES
from dfsmount.filestate import FileState
from dfsmount.schedule import BATCH_BYTES, GATHER_BYTES, GATHER_FILES, Delays, Schedule
from metaserver.protocol import COMMIT_EXTENTS, Attributes, Entry

ALL = BATCH_BYTES


class Files:
    def __init__(self) -> None:
        self.schedule = Schedule(Delays(age_seconds=1.0, gather_seconds=0.1))
        self._last = 0

    def new(self) -> FileState:
        self._last += 1
        return FileState(Entry(Attributes(self._last, 0o100644, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)))

    def write(self, file: FileState, length: int, now: float = 0.0, offset: int | None = None) -> bool:
        full = file.write(file.size if offset is None else offset, bytes(length), 0)
        return self.schedule.written(file, now, full=full)

    def picked(self, lane: int = 0, room: int = ALL) -> list[tuple[int, int]]:
        return [(file.ino, layer.size) for file, layer in self.schedule.pick(lane, room)]


def test_age() -> None:
    files = Files()
    first, second = files.new(), files.new()
    assert files.write(first, 10, 0.0)
    assert not files.write(second, 20, 0.5)
    assert files.schedule.waits
    assert not files.schedule.expire(0.9)
    assert files.schedule.expire(1.0)
    assert files.picked() == [(1, 10)]
    assert files.picked() == []
    files.write(first, 5, 1.2)
    assert files.schedule.expire(1.5)
    assert files.picked() == [(2, 20)]
    assert files.schedule.expire(5.0)
    assert files.picked() == [(1, 5)]
    assert not files.schedule.waits


def test_a_full_layer_goes_at_once_and_its_open_successor_waits() -> None:
    files = Files()
    file = files.new()
    assert files.write(file, LAYER_BYTES)
    files.write(file, 100)
    assert files.picked() == [(1, LAYER_BYTES)]
    assert files.picked() == []
    files.schedule.want(file)
    assert files.picked() == [(1, 100)]


def test_closed_files_gather_by_number_by_bytes_and_by_time() -> None:
    files = Files()
    many = [files.new() for _ in range(GATHER_FILES)]
    for file in many:
        files.write(file, 1)
    assert [files.schedule.closed(file, 0.0) for file in many] == [False] * (GATHER_FILES - 1) + [True]
    assert len(files.picked()) == GATHER_FILES
    large = files.new()
    files.write(large, GATHER_BYTES)
    assert files.schedule.closed(large, 0.0)
    assert files.picked() == [(large.ino, GATHER_BYTES)]
    late = files.new()
    files.write(late, 1, 2.0)
    assert not files.schedule.closed(late, 2.0)
    assert not files.schedule.closed(late, 2.0)
    assert not files.schedule.expire(2.05)
    assert files.schedule.expire(2.1)
    assert files.picked() == [(late.ino, 1)]
    assert not files.schedule.closed(late, 3.0)


def test_a_batch_is_bounded_by_bytes_and_by_what_a_commit_takes() -> None:
    files = Files()
    several = [files.new() for _ in range(4)]
    for file in several:
        files.write(file, 3 << 20)
        files.schedule.want(file)
    assert [ino for ino, _ in files.picked()] == [1, 2]
    assert [ino for ino, _ in files.picked(room=4 << 20)] == [3]
    # One layer goes even if it is more than there is room for: another chunk will be found.
    assert [ino for ino, _ in files.picked(room=10)] == [4]
    scattered = [files.new() for _ in range(400)]
    for file in scattered:
        for offset in (0, 10, 20):
            files.write(file, 1, offset=offset)
    files.schedule.want_all()
    assert len(files.picked()) == COMMIT_EXTENTS // 4


def test_lanes_take_their_own_and_held_files_wait() -> None:
    files = Files()
    shared, owner, held = files.new(), files.new(), files.new()
    owner.lane, held.held = 2, 1
    for file in (shared, owner, held):
        files.write(file, 100)
    files.schedule.want_all()
    assert files.schedule.is_much(2, 100)
    assert not files.schedule.is_much(2, 101)
    assert files.picked(1) == []
    assert files.picked(2) == [(owner.ino, 100)]
    assert files.picked(0) == [(shared.ino, 100)]
    held.held = 0
    assert files.picked(0) == [(held.ino, 100)]


def test_forget() -> None:
    files = Files()
    file = files.new()
    files.write(file, 100)
    files.schedule.closed(file, 0.0)
    files.schedule.forget(file)
    files.schedule.want_all()
    assert not files.schedule.waits
    assert files.picked() == []

"""Which chunks are cleaned, where their bytes go, and that no file notices: files against a dict of bytes."""

from itertools import pairwise
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from memory_rows import MemoryRows

from metaserver import chunks, cleaning, extents, inodes, rewriting
from metaserver.cleaning import LEAST_GAIN, SMALL_GROUP, Moves, Usage, choose, disk_bytes, joined
from metaserver.errors import DfsError, ErrorCode
from metaserver.extents import Budget
from metaserver.protocol import CHUNK_CAPACITY, ChunkState, Extent, ReplicaReport, ReplicaState
from metaserver.schema import Inode, Table, after, inode_key, key_u64

MIB = 1 << 20


def usage(chunk: int, length: int, live: int, *, entries: int = 0, copies: int = 2, age: float = 0.0) -> Usage:
    return Usage(chunk, length, entries or -(-length // 65536), live, copies, round(-age * 1e9))


def chosen(*candidates: Usage, room: int = CHUNK_CAPACITY, short: bool = False) -> list[int]:
    return [one.chunk for one in choose(candidates, 0, room, short=short)]


# -- choosing ------------------------------------------------------------------------------------------------------


def test_what_is_mostly_dead_is_chosen_most_gain_first() -> None:
    assert chosen(usage(1, 60 * MIB, 50 * MIB)) == []
    assert chosen(usage(1, 60 * MIB, 30 * MIB), usage(2, 60 * MIB, MIB), usage(3, 60 * MIB, 10 * MIB)) == [2, 3, 1]
    # With little space left more work is worth it.
    assert chosen(usage(1, 60 * MIB, 48 * MIB), short=True) == [1]


def test_what_is_old_goes_before_what_may_yet_die_by_itself() -> None:
    assert chosen(usage(1, 60 * MIB, 20 * MIB, age=90), usage(2, 60 * MIB, 25 * MIB, age=3600)) == [2, 1]


def test_what_is_remembered_is_what_is_most_worth_it() -> None:
    half = [usage(number, 60 * MIB, 45 * MIB) for number in range(1, 20)]
    dead, little = usage(90, 60 * MIB, 10 * MIB), usage(91, 1000, 1000)
    assert not half[0].worth(cleaning.WORTH)
    assert [each.chunk for each in cleaning.best([*half, little, dead], 3)] == [91, 90, 1]


def test_the_cleaner_goes_faster_the_more_it_lags_behind() -> None:
    assert cleaning.haste(0, 0) == 1.0
    assert cleaning.haste(10, 100) == 1.0
    assert cleaning.haste(20, 100) == 1.0
    assert cleaning.haste(30, 100) == pytest.approx(2.5)
    assert cleaning.haste(40, 100) == cleaning.HASTE
    assert cleaning.haste(90, 100) == cleaning.HASTE


def test_a_group_fits_into_the_room_and_wants_the_same_copies() -> None:
    many = [usage(number, 60 * MIB, 20 * MIB) for number in range(1, 9)]
    assert len(chosen(*many)) == 3
    assert len(chosen(*many, room=25 * MIB)) == 1
    assert chosen(*many, room=MIB) == []
    mixed = [usage(1, 60 * MIB, 10 * MIB, copies=3), usage(2, 60 * MIB, 9 * MIB, copies=1)]
    assert chosen(*mixed) == [2]


def test_little_chunks_are_merged_when_there_are_many() -> None:
    few = [usage(number, 9000, 9000) for number in range(1, SMALL_GROUP)]
    assert chosen(*few) == []
    assert len(chosen(*few, usage(99, 9000, 9000))) == SMALL_GROUP
    # A little gain is no reason to write.
    assert chosen(usage(1, 900_000, 10_000)) == []


@given(st.integers(1, 32704), st.integers(1, CHUNK_CAPACITY))
def test_a_new_chunk_is_never_worth_cleaning_by_itself(entries: int, length: int) -> None:
    """Or the cleaner would never come to an end."""
    if disk_bytes(length, entries) - length - entries * 64 < LEAST_GAIN:
        assert chosen(usage(1, length, length, entries=min(entries, length)), short=True) == []


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=20).map(sorted))
def test_joined_ranges_are_the_same_bytes(found: list[tuple[int, int]]) -> None:
    ranges = [(start, start + length) for start, length in found]
    together = joined(ranges)
    assert {at for start, stop in together for at in range(start, stop)} == {
        at for start, stop in ranges for at in range(start, stop)
    }
    assert all(before[1] < later[0] for before, later in pairwise(together))


def test_moves_say_where_all_of_a_range_is_or_nothing() -> None:
    moves = Moves([(7, 100, 50, 0), (7, 150, 10, 80), (7, 160, 40, 90), (8, 0, 30, 50)], 130)
    assert moves.find(7, 100, 50) == [(0, 50)]
    assert moves.find(7, 120, 40) == [(20, 30), (80, 10)]
    assert moves.find(7, 150, 50) == [(80, 50)]
    assert moves.find(8, 29, 1) == [(79, 1)]
    for chunk, start, length in [(7, 99, 2), (7, 199, 2), (8, 30, 1), (9, 0, 1)]:
        assert moves.find(chunk, start, length) is None


@pytest.mark.parametrize(
    "moves",
    [[(1, 0, 0, 0)], [(1, 0, 11, 0)], [(1, 0, 5, 6)], [(1, -1, 5, 0)], [(1, 0, 5, -1)], [(1, 0, 5, 0), (1, 4, 2, 5)]],
)
def test_impossible_moves_are_refused(moves: list[tuple[int, int, int, int]]) -> None:
    with pytest.raises(ValueError, match="cannot have gone"):
        Moves(moves, 10)


# -- files do not notice -------------------------------------------------------------------------------------------


class Bytes:
    """Chunks as bytes, as chunkservers would have them."""

    def __init__(self) -> None:
        self.chunks: dict[int, bytearray] = {}

    def compact(self, sources: dict[int, list[tuple[int, int]]], random: Random) -> tuple[bytes, list]:  # type: ignore[type-arg]
        """What a COMPACT order does, in an order of its own choosing, and perhaps not all of it."""
        pieces = []
        for chunk, ranges in sources.items():
            for start, stop in ranges:
                while start < stop:
                    end = min(stop, start + random.randint(1, 40))
                    pieces.append((chunk, start, end - start))
                    start = end
        random.shuffle(pieces)
        if random.random() < 0.2:
            pieces = pieces[: len(pieces) // 2 + 1]
        payload, moves = bytearray(), []
        for chunk, start, length in pieces:
            moves.append((chunk, start, length, len(payload)))
            payload += self.chunks[chunk][start : start + length]
        return bytes(payload), moves


class CleanedFiles(RuleBasedStateMachine):
    """Files are written, cut and removed while chunks are cleaned step by step, and cleanings die anywhere."""

    @initialize(seed=st.integers(0, 1 << 32))
    def start(self, seed: int) -> None:
        self.random = Random(seed)
        self.tx = MemoryRows()
        self.bytes = Bytes()
        self.files: dict[int, bytearray] = {}
        self.open = 0
        # Of the cleaning under way: the new chunk, its moves, and (old chunk, position) of the steps to come.
        self.new = 0
        self.moves = Moves([], 0)
        self.steps: list[tuple[int, bytes]] = []
        for ino in (2, 3, 4):
            inodes.save(self.tx, ino, inodes.new_inode(0o100644, 0, 0, 0))
            self.files[ino] = bytearray()

    def _chunk(self) -> int:
        if not self.open:
            self.open = chunks.allocate(self.tx, 0, 1, (1,), 1)
            self.bytes.chunks[self.open] = bytearray()
        return self.open

    @rule(ino=st.sampled_from([2, 3, 4]), offset=st.integers(0, 300), length=st.integers(1, 120))
    def write(self, ino: int, offset: int, length: int) -> None:
        chunk, data = self._chunk(), self.random.randbytes(length)
        at = len(self.bytes.chunks[chunk])
        self.bytes.chunks[chunk] += data
        row = chunks.find(self.tx, chunk)
        inode = Inode.unpack(self.tx.get(Table.INODES, inode_key(ino)) or b"")
        assert row is not None
        row.length, row.entries = at + length, row.entries + 1
        chunks.save(self.tx, chunk, row)
        live: dict[int, int] = {}
        inode.allocated += extents.replace(self.tx, ino, Extent(offset, length, chunk, at), live, Budget(1000))
        inode.size = max(inode.size, offset + length)
        chunks.settle(self.tx, live)
        inodes.save(self.tx, ino, inode)
        file = self.files[ino]
        file.extend(bytes(max(0, offset + length - len(file))))
        file[offset : offset + length] = data

    @rule()
    def seal(self) -> None:
        row = chunks.find(self.tx, self.open) if self.open else None
        if row is not None:
            chunks.seal(self.tx, self.open, row, ())
            self.open = 0

    @rule(ino=st.sampled_from([2, 3, 4]), size=st.integers(0, 200))
    def truncate(self, ino: int, size: int) -> None:
        inode = Inode.unpack(self.tx.get(Table.INODES, inode_key(ino)) or b"")
        if size < inode.size:
            cut = extents.cut_step(self.tx, ino, size, 10_000)
            inode.allocated -= cut.freed
            inode.size = size
            chunks.settle(self.tx, cut.live)
            inodes.save(self.tx, ino, inode)
            del self.files[ino][size:]

    def _sealed(self) -> list[int]:
        rows = self.tx.tables[Table.CHUNKS]
        return [int.from_bytes(key, "big") for key, value in rows.items() if value[0] == ChunkState.SEALED]

    @precondition(lambda self: not self.new)
    @rule()
    def begin(self) -> None:
        sources = self.random.sample(self._sealed(), min(3, len(self._sealed())))
        if not sources:
            return
        wanted = {}
        for chunk in sources:
            found: list[tuple[int, int]] = []
            position: int | None = 0
            while position is not None:
                page, position = rewriting.live_ranges(self.tx, chunk, position, 3)
                found = joined(found + page)
            wanted[chunk] = found
        self.new = rewriting.begin(self.tx, 0, 1, 1)
        payload, moves = self.bytes.compact(wanted, self.random)
        self.bytes.chunks[self.new] = bytearray(payload)
        self.moves = Moves(moves, len(payload))
        self.steps = [(chunk, b"") for chunk in sources]

    @precondition(lambda self: self.new)
    @rule()
    def fill(self) -> None:
        report = ReplicaReport(self.new, len(self.bytes.chunks[self.new]), 1, 5, True)
        row = chunks.find(self.tx, self.new)
        if row is not None and not row.length:
            assert rewriting.filled(self.tx, self.new, 1, report)

    @precondition(lambda self: self.new)
    @rule()
    def step(self) -> None:
        row = chunks.find(self.tx, self.new)
        if row is None or row.state == ChunkState.DEAD:
            self.new = 0
            return
        if not row.length:
            return
        if not self.steps:
            self.give_up()
            return
        old, position = self.steps.pop()
        before = dict(self._rows_of(old))
        done = rewriting.rewrite_step(self.tx, old, self.new, position, self.moves)
        assert len(before) - len(self._rows_of(old)) <= rewriting.STEP_ROWS
        if done.died:
            assert not self._rows_of(old)
        if done.position is not None:
            self.steps.append((old, done.position))

    def _rows_of(self, chunk: int) -> list[tuple[bytes, bytes]]:
        return list(self.tx.scan(Table.BY_CHUNK, key_u64(chunk), after(key_u64(chunk))))

    @precondition(lambda self: self.new)
    @rule()
    def give_up(self) -> None:
        """The end of a cleaning, or of the metaserver: nothing is known of it any more."""
        for chunk in rewriting.filling(self.tx):
            rewriting.abandon(self.tx, chunk)
        self.new, self.steps = 0, []

    @invariant()
    def files_are_what_they_were(self) -> None:
        if not hasattr(self, "files"):
            return
        for ino, expected in self.files.items():
            found = bytearray(len(expected))
            for extent in extents.page(self.tx, ino, 0, len(expected), 10_000)[0]:
                stored = self.bytes.chunks[extent.chunk]
                assert extent.chunk_offset + extent.length <= len(stored)
                found[extent.file_offset : extent.file_offset + extent.length] = stored[
                    extent.chunk_offset : extent.chunk_offset + extent.length
                ]
            assert found == expected
        self.tx.check_extents()
        for key, _ in self.tx.tables[Table.EXTENTS].items():
            row = self.tx.tables[Table.EXTENTS][key]
            chunk = chunks.find(self.tx, int.from_bytes(row[8:16], "little"))
            assert chunk is not None
            assert chunk.state in (ChunkState.OPEN, ChunkState.SEALED)


TestCleanedFiles = CleanedFiles.TestCase
TestCleanedFiles.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


# -- rows ----------------------------------------------------------------------------------------------------------


def prepared() -> tuple[MemoryRows, int]:
    """A file of 200 bytes in chunk 1, which is sealed, and a chunk being filled."""
    tx = MemoryRows()
    inodes.save(tx, 2, inodes.new_inode(0o100644, 0, 0, 0, size=200))
    chunk = chunks.allocate(tx, 0, 1, (1, 2), 2)
    row = chunks.find(tx, chunk)
    assert row is not None
    row.length = 200
    chunks.save(tx, chunk, row)
    live: dict[int, int] = {}
    extents.replace(tx, 2, Extent(0, 200, chunk, 0), live, Budget(9))
    chunks.settle(tx, live)
    row = chunks.find(tx, chunk)
    assert row is not None
    chunks.seal(tx, chunk, row, ())
    return tx, rewriting.begin(tx, 5, 3, 2)


def test_a_filling_chunk_becomes_sealed_by_its_first_row_and_the_old_one_dies() -> None:
    tx, new = prepared()
    row = chunks.find(tx, new)
    assert row is not None
    assert (row.status, row.live, row.owner, row.copies) == (ChunkState.FILLING, 0, 0, 2)
    assert [server for server, each in chunks.replicas(tx, new) if each.state == ReplicaState.COPYING] == [3]
    assert rewriting.filled(tx, new, 3, ReplicaReport(new, 200, 4, 9, True))
    step = rewriting.rewrite_step(tx, 1, new, b"", Moves([(1, 0, 200, 0)], 200))
    assert (step.position, step.died, step.left, step.moved) == (None, True, 0, 200)
    row, old = chunks.find(tx, new), chunks.find(tx, 1)
    assert row is not None
    assert old is not None
    assert (row.status, row.live, row.length, old.status, old.live) == (
        ChunkState.SEALED, 200, 200, ChunkState.DEAD, 0,
    )  # fmt: skip


def test_rows_whose_bytes_have_not_moved_are_left_alone() -> None:
    tx, new = prepared()
    rewriting.filled(tx, new, 3, ReplicaReport(new, 100, 1, 9, True))
    step = rewriting.rewrite_step(tx, 1, new, b"", Moves([(1, 0, 100, 0)], 100))
    assert (step.left, step.moved, step.died) == (1, 0, False)
    assert rewriting.filling(tx) == [new]
    rewriting.abandon(tx, new)
    row = chunks.find(tx, new)
    assert row is not None
    assert row.status is ChunkState.DEAD


def test_a_row_that_its_extent_contradicts_is_left_alone() -> None:
    tx, new = prepared()
    rewriting.filled(tx, new, 3, ReplicaReport(new, 200, 1, 9, True))
    tx.tables[Table.EXTENTS].clear()
    step = rewriting.rewrite_step(tx, 1, new, b"", Moves([(1, 0, 200, 0)], 200))
    assert (step.left, step.moved) == (1, 0)


def test_what_is_not_wanted_any_more_is_not_filled() -> None:
    tx, new = prepared()
    report = ReplicaReport(new, 200, 1, 9, True)
    assert not rewriting.filled(tx, new, 2, report)
    chunks.drop_replica(tx, new, 3)
    assert not rewriting.filled(tx, new, 3, report)
    rewriting.abandon(tx, new)
    assert chunks.find(tx, new) is None
    rewriting.abandon(tx, new)
    with pytest.raises(DfsError) as caught:
        rewriting.rewrite_step(tx, 1, new, b"", Moves([], 0))
    assert caught.value.code is ErrorCode.INTERNAL


def test_a_new_chunk_has_as_many_copies_as_any_of_the_old_ones() -> None:
    tx, new = prepared()
    old = chunks.find(tx, 1)
    assert old is not None
    old.copies = 3
    chunks.save(tx, 1, old)
    rewriting.filled(tx, new, 3, ReplicaReport(new, 200, 1, 9, True))
    rewriting.rewrite_step(tx, 1, new, b"", Moves([(1, 0, 200, 0)], 200))
    row = chunks.find(tx, new)
    assert row is not None
    assert row.copies == 3


def test_settling_tells_of_chunks_that_have_just_become_worth_cleaning() -> None:
    tx, _ = prepared()
    assert chunks.settle(tx, {1: -70}) == []
    assert chunks.settle(tx, {1: -20}) == [1]
    assert chunks.settle(tx, {1: -20}) == []
    assert chunks.settle(tx, {1: -90}) == [1]
    assert cleaning.WORTH * 200 == 120

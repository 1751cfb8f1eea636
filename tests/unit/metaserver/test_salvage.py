"""Choosing among replicas, and laying blocks over one another: against a dict of bytes that nobody doubts."""

import random
import struct
from itertools import pairwise
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from metaserver.protocol import ReplicaState
from metaserver.salvage import Block, Choice, Found, Piece, Version, blocks_of, choose, is_prefix, lay_over
from metaserver.sorting import Sorter

GOOD, UNSURE, BAD = ReplicaState.GOOD, ReplicaState.UNSURE, ReplicaState.BAD


def index_of(count: int, salt: int = 0) -> bytes:
    """Entries of which only the chains matter."""
    return b"".join(bytes(60) + (number * 10 + salt + 1).to_bytes(4, "little") for number in range(count))


def version(count: int, salt: int = 0) -> Version:
    return Version(count * 100, count, (count - 1) * 10 + salt + 1 if count else 7)


def replica(server: int, count: int, salt: int = 0, *, sealed: bool = False, error: str = "") -> Found:
    return Found(server, *version(count, salt), sealed, error, 1000 + server)


def chosen(*replicas: Found, unreadable: tuple[Version, ...] = ()) -> tuple[Version, dict[int, ReplicaState]]:
    salts = {one.version: 0 if one.chain % 10 == 1 else 5 for one in replicas}
    indexes = {
        found: index_of(found.entries, salts[found]) for found in salts if found.entries and found not in unreadable
    }
    choice = choose(replicas, indexes)
    assert choice is not None
    return choice.version, choice.states


def test_the_longest_of_those_that_agree() -> None:
    assert chosen(replica(1, 3), replica(2, 3)) == (version(3), {1: GOOD, 2: GOOD})
    assert chosen(replica(1, 2), replica(2, 5), replica(3, 2)) == (version(5), {1: BAD, 2: GOOD, 3: BAD})
    assert chosen(replica(1, 0), replica(2, 1)) == (version(1), {1: BAD, 2: GOOD})


def test_what_was_sealed_is_what_was_committed() -> None:
    assert chosen(replica(1, 3, sealed=True), replica(2, 5), replica(3, 5)) == (
        version(3),
        {1: GOOD, 2: UNSURE, 3: UNSURE},
    )
    assert chosen(replica(1, 3, sealed=True), replica(2, 5, 5))[1] == {1: GOOD, 2: BAD}
    assert chosen(replica(1, 3, sealed=True), replica(2, 2))[1] == {1: GOOD, 2: BAD}
    # The sealed one is damaged, the other only lacks the order to seal it.
    assert chosen(replica(1, 3, sealed=True, error="IO"), replica(2, 5)) == (version(3), {1: BAD, 2: UNSURE})


def test_of_those_that_differ_what_most_servers_have() -> None:
    assert chosen(replica(1, 3, 5), replica(2, 2), replica(3, 3)) == (version(3), {1: BAD, 2: BAD, 3: GOOD})
    assert chosen(replica(1, 9, 5), replica(2, 4), replica(3, 4)) == (version(4), {1: BAD, 2: GOOD, 3: GOOD})
    assert chosen(replica(1, 9, 5), replica(2, 4)) == (version(9, 5), {1: GOOD, 2: BAD})


def test_damaged_replicas_are_better_than_nothing() -> None:
    assert chosen(replica(1, 3, error="BAD_CHECKSUM"), replica(2, 3)) == (version(3), {1: BAD, 2: GOOD})
    assert chosen(replica(1, 3, error="BAD_CHECKSUM")) == (version(3), {1: BAD})
    assert chosen(replica(1, 4), replica(2, 3), unreadable=(version(4),)) == (version(3), {1: BAD, 2: GOOD})
    assert choose([replica(1, 3, error="IO")], {}) is None
    assert choose([replica(1, 0)], {}) is None


def test_a_prefix() -> None:
    index = index_of(4)
    assert [is_prefix(version(count), index) for count in range(6)] == [True] * 5 + [False]
    assert not is_prefix(version(2, 5), index)


# -- blocks --------------------------------------------------------------------------------------------------------

BLOCKS = st.builds(
    Block,
    ino=st.integers(2, 4),
    offset=st.integers(0, 40),
    session=st.integers(1, 3),
    counter=st.integers(0, 1 << 20),
    good=st.booleans(),
    chunk=st.integers(1, 3),
    chunk_offset=st.integers(0, 50),
    length=st.integers(1, 15),
    created_ns=st.integers(0, 99),
)


def expected(blocks: list[Block]) -> dict[tuple[int, int], tuple[int, int]]:
    """(inode, offset) to (chunk, offset there) of each byte, the newest block last."""
    shown = {}
    for block in sorted(blocks, key=lambda block: block.newness):
        for at in range(block.length):
            shown[block.ino, block.offset + at] = block.chunk, block.chunk_offset + at
    return shown


def bytes_of(pieces: list[Piece]) -> dict[tuple[int, int], tuple[int, int]]:
    return {
        (piece.ino, piece.offset + at): (piece.chunk, piece.chunk_offset + at)
        for piece in pieces
        for at in range(piece.length)
    }


@given(st.lists(BLOCKS, max_size=40, unique_by=lambda block: (block.session, block.counter)))
@settings(max_examples=300)
def test_newer_blocks_hide_older_ones(blocks: list[Block]) -> None:
    pieces = list(lay_over(Block.unpack(record) for record in sorted(block.pack() for block in blocks)))
    assert bytes_of(pieces) == expected(blocks)
    for before, piece in pairwise(pieces):
        assert (before.ino, before.offset + before.length) <= (piece.ino, piece.offset)
        follows = before.ino == piece.ino and before.offset + before.length == piece.offset
        joined = before.chunk == piece.chunk and before.chunk_offset + before.length == piece.chunk_offset
        assert not (follows and joined)


def test_copies_of_the_cleaner_are_the_same_bytes_and_the_readable_one_is_taken() -> None:
    old = Block(2, 0, 1, 1, False, 10, 0, 8, 5)
    copy = old._replace(good=True, chunk=3, chunk_offset=100)
    for blocks in ([old, copy], [copy, old]):
        assert list(lay_over(blocks)) == [Piece(2, 0, 8, 3, 100, 5)]


def test_memory_does_not_grow_with_what_is_overwritten_again_and_again() -> None:
    blocks = [Block(2, 0, 1, counter, True, 1, counter, 4096, 0) for counter in range(20_000)]
    assert list(lay_over(blocks)) == [Piece(2, 0, 4096, 1, 19_999, 0)]


def test_entries_that_cannot_be_are_left_out() -> None:

    def entry(logical: int, length: int, ino: int, offset: int) -> bytes:
        return struct.pack("<IIIIHBBIQQQQII", logical, logical, length, length, 0, 0, 0, 0, ino, offset, 1, 2, 0, 0)

    choice = Choice(Version(100, 4, 0), {1: GOOD}, 5)
    index = entry(0, 50, 9, 7) + entry(50, 51, 9, 0) + entry(50, 10, 1, 0) + entry(50, 10, 9, 1 << 63)
    assert list(blocks_of(77, choice, index)) == [Block(9, 7, 1, 2, True, 77, 0, 50, 5)]


def test_sorting_more_than_one_run(tmp_path: Path) -> None:
    records = [number.to_bytes(4, "big") for number in range(10_000)]
    shuffled = records.copy()
    random.Random(1).shuffle(shuffled)
    sorter = Sorter(tmp_path, 4, run_records=700)
    for record in shuffled:
        sorter.add(record)
    assert list(sorter.sorted()) == records
    assert sorter.count == 10_000

"""Blocks, their entries and their extents, read back with the format's own functions."""

from itertools import count

from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from chunkserver.chunkfile import BLOCK_BYTES, check_entries
from dfsmount.blocks import APPEND_BYTES, APPEND_ENTRIES, Block, cut_run, encode_parts, extents_of
from metaserver.protocol import Extent

pieces_of = st.lists(st.integers(1, 3 * BLOCK_BYTES), min_size=1, max_size=6)


def pieces(lengths: list[int]) -> list[bytes]:
    return [bytes([number + 1]) * length for number, length in enumerate(lengths)]


@given(st.integers(0, 5 * BLOCK_BYTES), pieces_of)
def test_blocks_are_the_run_cut(offset: int, lengths: list[int]) -> None:
    run = pieces(lengths)
    blocks = list(cut_run(9, offset, run))
    assert b"".join(bytes(buffer) for block in blocks for buffer in block.buffers) == b"".join(run)
    at = offset
    for block in blocks:
        assert (block.ino, block.offset) == (9, at)
        assert 0 < block.length <= BLOCK_BYTES
        assert block.crc == crc32c(b"".join(bytes(buffer) for buffer in block.buffers))
        at += block.length
    if sum(lengths) <= BLOCK_BYTES:
        assert len(blocks) == 1
    assert all(block.offset % BLOCK_BYTES == 0 for block in blocks[1:])


def test_many_small_pieces_are_joined_and_few_are_not_copied() -> None:
    assert len(next(cut_run(1, 0, [b"x"] * 100)).buffers) == 1
    whole = bytes(BLOCK_BYTES)
    (view,) = next(cut_run(1, 0, [whole])).buffers
    assert isinstance(view, memoryview)
    assert view.obj is whole


@given(st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(1, BLOCK_BYTES)), min_size=1, max_size=60))
def test_parts_continue_the_chunk(sizes: list[tuple[int, int]]) -> None:
    blocks = [Block(3, offset, length, crc32c(bytes(length)), [bytes(length)]) for offset, length in sizes]
    parts = encode_parts(blocks, 1000, 77, 5, count(10))
    stored, chain, entries = 1000, 77, []
    for part in parts:
        assert part.length == sum(map(len, part.payload)) <= APPEND_BYTES
        found = check_entries(part.entries, chain, stored)
        assert len(found) == part.blocks <= APPEND_ENTRIES
        stored, chain = stored + part.length, part.chain
        entries += found
    assert [(e.ino, e.file_offset, e.stored_length, e.crc) for e in entries] == [
        (3, b.offset, b.length, b.crc) for b in blocks
    ]
    assert [(e.stamp_session, e.stamp_counter) for e in entries] == [(5, 10 + index) for index in range(len(blocks))]


def test_a_part_has_a_bounded_number_of_entries() -> None:
    blocks = [Block(1, index, 1, 0, [b"x"]) for index in range(APPEND_ENTRIES + 1)]
    assert [part.blocks for part in encode_parts(blocks, 0, 0, 1, count())] == [APPEND_ENTRIES, 1]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 200_000)), min_size=1, max_size=10), st.integers(0, 9999))
def test_extents_join_what_continues(runs: list[tuple[int, int]], chunk_offset: int) -> None:
    blocks, expected, offset, at = [], [], 0, chunk_offset
    for gap, length in runs:
        offset += gap
        blocks += cut_run(1, offset, [bytes(length)])
        last = expected[-1] if expected else None
        if last is not None and last.file_offset + last.length == offset:
            expected[-1] = Extent(last.file_offset, last.length + length, 8, last.chunk_offset)
        else:
            expected.append(Extent(offset, length, 8, at))
        offset, at = offset + length, at + length
    assert extents_of(blocks, 8, chunk_offset) == expected

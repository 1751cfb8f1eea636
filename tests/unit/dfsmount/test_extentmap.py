"""The map of a file against a list that says for each byte where it is."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from dfsmount.extents import ExtentMap, Ranges
from metaserver.protocol import FILE_SIZE_MAX, Extent

SIZE = 60
HOLE = (0, 0)
offsets = st.integers(0, SIZE)

applied = st.tuples(st.just("apply"), offsets, st.integers(1, 20), st.integers(1, 3), st.integers(0, 50))
learned = st.tuples(st.just("learn"), offsets, offsets, st.integers(1, 3), st.integers(0, 50))
truncated = st.tuples(st.just("truncate"), offsets, st.just(0), st.just(0), st.just(0))


def places(extent_map: ExtentMap, start: int, stop: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for piece in extent_map.pieces(start, stop):
        assert piece.length > 0
        assert piece.offset == start + len(found)
        found += [(piece.chunk, piece.chunk_offset + at) if piece.chunk else HOLE for at in range(piece.length)]
    return found


@given(st.lists(st.one_of(applied, learned, truncated), max_size=25), offsets, offsets)
def test_is_what_a_list_of_bytes_says(steps: list[tuple[str, int, int, int, int]], start: int, stop: int) -> None:
    known = ExtentMap()
    model: list[tuple[int, int]] = [HOLE] * (2 * SIZE)
    seen = [False] * (2 * SIZE)
    for what, first, second, chunk, at in steps:
        if what == "apply":
            known.apply([Extent(first, second, chunk, at)])
            model[first : first + second] = [(chunk, at + index) for index in range(second)]
            seen[first : first + second] = [True] * second
        elif what == "learn":
            # One extent across the whole page and beyond, and another in its middle that the page does not tell of.
            low, high = sorted((first, second))
            known.learn([Extent(max(0, low - 2), high - low + 4, chunk, at)] if high > low else [], low, high)
            base = max(0, low - 2)
            model[low:high] = [(chunk, at + index - base) for index in range(low, high)]
            seen[low:high] = [True] * (high - low)
        else:
            known.truncate(first)
            model[first:] = [HOLE] * len(model[first:])
            seen[first:] = [True] * len(seen[first:])
    if start < stop:
        assert places(known, start, stop) == model[start:stop]
    assert places(known, 0, 2 * SIZE) == model
    unknown = next((index for index in range(start, 2 * SIZE) if not seen[index]), None)
    reached = known.known_until(start)
    assert reached == unknown if unknown is not None else reached >= 2 * SIZE
    check(known)


def check(known: ExtentMap) -> None:
    """Sorted, without overlaps, and neighbours that continue each other are one."""
    extents = list(known)
    assert len(extents) == len(known)
    assert known.chunks() == {extent.chunk for extent in extents}
    for left, right in pairwise(extents):
        end = left.file_offset + left.length
        assert end <= right.file_offset
        continues = left.chunk == right.chunk and left.chunk_offset + left.length == right.chunk_offset
        assert not (end == right.file_offset and continues)


def test_forget() -> None:
    known = ExtentMap()
    known.apply([Extent(0, 10, 1, 0)])
    known.forget()
    assert (len(known), known.known_until(0)) == (0, 0)


def test_the_largest_offsets() -> None:
    known = ExtentMap()
    known.learn([], 0, FILE_SIZE_MAX)
    known.apply([Extent(FILE_SIZE_MAX - 5, 5, (1 << 64) - 1, 0)])
    assert known.known_until(3) == FILE_SIZE_MAX
    assert [piece.chunk for piece in known.pieces(FILE_SIZE_MAX - 10, FILE_SIZE_MAX)] == [0, (1 << 64) - 1]


@given(st.lists(st.tuples(offsets, offsets), max_size=20), offsets)
def test_ranges(added: list[tuple[int, int]], offset: int) -> None:
    ranges = Ranges()
    model = set()
    for start, stop in added:
        ranges.add(start, stop)
        model |= set(range(start, stop))
    assert {index for start, stop in ranges for index in range(start, stop)} == model
    flat = [edge for pair in ranges for edge in pair]
    assert flat == sorted(set(flat))
    end = offset
    while end in model:
        end += 1
    assert ranges.end_of(offset) == end

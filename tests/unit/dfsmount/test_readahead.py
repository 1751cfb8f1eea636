"""What the policies fetch for typical ways of reading."""

from hypothesis import given
from hypothesis import strategies as st

from dfsmount.readahead import FIRST_WINDOW, LARGEST_WINDOW, Neighbours, ReadAhead

KIB = 1024


def test_reading_in_order_doubles_the_window_up_to_its_limit() -> None:
    ahead = ReadAhead()
    fetched_to, windows = 0, []
    for offset in range(0, 100 << 20, 128 * KIB):
        start, stop = ahead.advance(offset, 128 * KIB)
        if start < stop:
            assert start == max(fetched_to, offset + 128 * KIB)
            fetched_to = stop
            windows.append(ahead.window)
        assert fetched_to > offset + 128 * KIB
    assert windows[:4] == [FIRST_WINDOW, 2 * FIRST_WINDOW, 4 * FIRST_WINDOW, 8 * FIRST_WINDOW]
    assert windows[-1] == LARGEST_WINDOW
    # Later it asks in halves of the window, not for every read.
    assert len(windows) < 30


def test_random_reads_fetch_nothing() -> None:
    ahead = ReadAhead()
    assert all(ahead.advance(offset << 20, 4096) == (0, 0) for offset in (50, 7, 90, 13, 70, 2))


def test_a_jump_closes_the_window() -> None:
    ahead = ReadAhead()
    for offset in range(0, 1 << 20, 4096):
        ahead.advance(offset, 4096)
    assert ahead.advance(500 << 20, 4096) == (0, 0)
    assert ahead.window == 0
    start, stop = ahead.advance((500 << 20) + 4096, 4096)
    assert (start, stop - start) == ((500 << 20) + 8192, FIRST_WINDOW)


def test_requests_of_the_kernel_that_overtake_each_other_are_in_order() -> None:
    ahead = ReadAhead()
    total = 0
    for offset in (0, 256, 128, 512, 384, 640, 896, 768):
        start, stop = ahead.advance(offset * KIB, 128 * KIB)
        total += stop - start
    assert ahead.window > FIRST_WINDOW
    assert total >= 1 << 20


@given(st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(1, 1 << 20)), max_size=30), st.integers(1, 1 << 22))
def test_never_more_than_the_limit(reads: list[tuple[int, int]], limit: int) -> None:
    ahead = ReadAhead(limit)
    for offset, length in reads:
        start, stop = ahead.advance(offset, length)
        assert 0 <= stop - start <= limit
        assert ahead.window <= limit


def test_small_files_in_order_bring_those_that_follow() -> None:
    neighbours = Neighbours()
    assert neighbours.advance(1, 1000, 500) == (0, 0)
    start, stop = neighbours.advance(1, 1500, 700)
    assert (start, stop) == (2200, 2200 + FIRST_WINDOW)
    # A gap is allowed, another chunk is another walk.
    assert neighbours.advance(2, 5_000_000, 10) == (0, 0)
    assert neighbours.advance(1, 20_000, 700) == (0, 0)
    assert neighbours.advance(1, 100_000, 700)[1] > stop


def test_walks_are_bounded() -> None:
    neighbours = Neighbours()
    for chunk in range(100):
        neighbours.advance(chunk, 0, 10)
    assert len(neighbours._walks) <= 16

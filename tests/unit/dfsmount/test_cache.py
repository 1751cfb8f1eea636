"""The cache against the chunks it was filled from."""

from hypothesis import given
from hypothesis import strategies as st

from dfsmount.cache import ENTRY_COST, BlockCache, Run

CHUNKS = {chunk: bytes((index * chunk) & 0xFF for index in range(2000)) for chunk in (1, 2, 3)}

puts = st.tuples(st.just("put"), st.sampled_from([1, 2, 3]), st.integers(0, 1999), st.integers(1, 400))
finds = st.tuples(st.just("find"), st.sampled_from([1, 2, 3]), st.integers(0, 1999), st.just(0))
forgets = st.tuples(st.just("forget"), st.sampled_from([1, 2, 3]), st.just(0), st.just(0))


@given(st.lists(st.one_of(puts, puts, finds, forgets), max_size=60), st.integers(ENTRY_COST, 8000))
def test_gives_what_was_put(steps: list[tuple[str, int, int, int]], limit: int) -> None:
    cache = BlockCache(limit)
    for what, chunk, offset, length in steps:
        if what == "put":
            cache.put(chunk, Run(offset, CHUNKS[chunk][offset : offset + length]))
        elif what == "find":
            run = cache.find(chunk, offset)
            if run is not None:
                assert run.start <= offset < run.stop
                assert run.data == CHUNKS[chunk][run.start : run.stop]
                assert offset < cache.has(chunk, offset, 2000) <= 2000
            else:
                assert cache.has(chunk, offset, 2000) == offset
        else:
            cache.forget(chunk)
            assert cache.find(chunk, offset) is None
        assert cache.size <= limit
        assert cache.size == sum(len(run.data) + ENTRY_COST for run in cache._runs.values())
        starts = sorted((chunk, start) for chunk, found in cache._starts.items() for start in found)
        assert starts == sorted(cache._runs)


def test_the_least_recently_used_goes_first() -> None:
    cache = BlockCache(3 * (100 + ENTRY_COST))
    for start in (0, 100, 200):
        cache.put(1, Run(start, bytes(100)))
    assert cache.find(1, 50) is not None
    cache.put(1, Run(300, bytes(100)))
    assert [cache.find(1, start) is not None for start in (0, 100, 200, 300)] == [True, False, True, True]
    assert (cache.hits, cache.misses) == (4, 1)
    cache.clear()
    assert (cache.size, len(cache)) == (0, 0)


def test_has_spans_runs() -> None:
    cache = BlockCache()
    cache.put(1, Run(0, bytes(100)))
    cache.put(1, Run(100, bytes(50)))
    assert cache.has(1, 20, 1000) == 150
    assert cache.has(1, 20, 120) == 120
    assert cache.has(1, 150, 160) == 150

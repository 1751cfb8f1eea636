"""Dirty layers against a plain array of bytes."""

from hypothesis import given
from hypothesis import strategies as st

from dfsmount import dirty
from dfsmount.dirty import LAYER_BYTES, RUN_COST, DirtyRuns, Layer, Span

SIZE = 200

writes = st.tuples(st.just("write"), st.integers(0, SIZE), st.integers(1, 60))
cuts = st.tuples(st.just("cut"), st.integers(0, SIZE), st.just(0))
closes = st.tuples(st.just("close"), st.just(0), st.just(0))
takes = st.tuples(st.just("take"), st.just(0), st.just(0))
finishes = st.tuples(st.just("done"), st.just(0), st.just(0))


def check(layer: Layer) -> None:
    ends = [start + len(piece) for start, piece in zip(layer.starts, layer.pieces, strict=True)]
    assert all(len(piece) for piece in layer.pieces)
    assert all(end <= start for end, start in zip(ends, layer.starts[1:], strict=False))
    assert layer.size == sum(map(len, layer.pieces))
    assert layer.stop == (ends[-1] if ends else 0)
    assert layer.runs == len(list(layer.each_run()))
    assert sum(len(piece) for _, run in layer.each_run() for piece in run) == layer.size


def paint(target: dict[int, int], spans: list[Span]) -> None:
    for span in spans:
        for index, byte in enumerate(bytes(span.data)):
            assert span.offset + index not in target
            target[span.offset + index] = byte


@given(st.lists(st.one_of(writes, writes, writes, cuts, closes, takes, finishes), max_size=40))
def test_is_what_an_array_of_bytes_says(steps: list[tuple[str, int, int]]) -> None:
    runs = DirtyRuns()
    model: list[tuple[Layer, dict[int, int]]] = []
    for number, (what, offset, length) in enumerate(steps):
        if what == "write":
            data = bytes((number * 7 + index) & 0xFF for index in range(length))
            runs.write(offset, data, 0, number)
            if not model or model[-1][0] is not runs.layers[-1]:
                model.append((runs.layers[-1], {}))
            model[-1][1].update({offset + index: byte for index, byte in enumerate(data)})
        elif what == "cut" and not runs.in_flight:
            runs.cut(offset)
            for _, bytes_ in model:
                for index in [index for index in bytes_ if index >= offset]:
                    del bytes_[index]
            model = [each for each in model if each[1]]
        elif what == "close":
            runs.close()
        elif what == "take" and (layer := runs.waiting()) is not None:
            layer.taken = True
        elif what == "done" and runs.in_flight:
            assert runs.done(model.pop(0)[0])
        for layer in runs.layers:
            check(layer)
        assert runs.cost == sum(layer.size + RUN_COST * layer.runs for layer in runs.layers)
        assert [layer for layer, _ in model] == runs.layers
    merged = {index: byte for _, bytes_ in model for index, byte in bytes_.items()}
    found: dict[int, int] = {}
    spans = runs.overlay(0, 2 * SIZE)
    assert spans == sorted(spans, key=lambda span: span.offset)
    paint(found, spans)
    assert found == merged
    assert runs.stop == max(merged, default=-1) + 1
    part: dict[int, int] = {}
    paint(part, runs.overlay(50, 120))
    assert part == {index: byte for index, byte in merged.items() if 50 <= index < 120}


def test_pieces_are_kept_as_they_came() -> None:
    layer = Layer(1, 0)
    large = bytes(8192)
    layer.write(0, large)
    assert layer.pieces[0] is large
    assert next(layer.spans(0, 8192)).data is large


def test_small_writes_in_order_are_gathered_and_what_was_read_before_stays() -> None:
    layer = Layer(1, 0)
    layer.write(0, b"a" * 100)
    before = next(layer.spans(0, 1000)).data
    for number in range(1, 1000):
        layer.write(number * 100, b"b" * 100)
    assert len(layer.pieces) == 2
    assert before == b"a" * 100
    check(layer)


def test_a_layer_closes_when_it_is_full() -> None:
    runs = DirtyRuns()
    assert not runs.write(0, bytes(LAYER_BYTES - 1), 0, 1)
    assert runs.waiting() is None
    assert runs.write(LAYER_BYTES, b"x", 0, 2)
    assert runs.waiting() is runs.layers[0]
    assert not runs.write(0, b"y", 0, 3)
    assert len(runs.layers) == 2
    # Many runs fill it, too.
    runs = DirtyRuns()
    results = [runs.write(number * 2, b"z", 0, 1) for number in range(dirty.LAYER_RUNS)]
    assert results == [False] * (dirty.LAYER_RUNS - 1) + [True]


def test_a_new_truncate_generation_begins_a_layer() -> None:
    runs = DirtyRuns()
    runs.write(0, b"a", 0, 1)
    runs.write(1, b"b", 1, 1)
    assert [layer.truncate_generation for layer in runs.layers] == [0, 1]


def test_an_overwrite_does_not_pin_what_it_replaces() -> None:
    layer = Layer(1, 0)
    for number in range(10):
        layer.write(number, bytes(100_000))
    pinned = sum(len(piece.obj) if isinstance(piece, memoryview) else len(piece) for piece in layer.pieces)
    assert pinned <= 2 * layer.size


def test_times_and_serials() -> None:
    runs = DirtyRuns()
    assert runs.oldest == 1
    runs.write(0, b"a", 0, 11)
    assert runs.close() == 1
    runs.write(0, b"b", 0, 12)
    assert runs.newest_mtime_ns == 12
    runs.leave_times()
    assert runs.newest_mtime_ns is None
    runs.write(0, b"c", 0, 13)
    assert (runs.newest_mtime_ns, runs.oldest, runs.unsent) == (13, 1, 2)
    runs.clear()
    assert (runs.oldest, runs.cost, bool(runs)) == (3, 0, False)

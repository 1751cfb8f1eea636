"""Bytes written to one file that are not yet part of it: what the mount still owes. Pure.

Written bytes gather in *layers*. The newest layer is open and takes writes; a layer is closed when it is full or when
its bytes are wanted at the metaserver, and from then on it does not change (but for a truncate). Layers are appended to
chunks in order, and each becomes part of the file in one commit: so what a crash leaves of a file is what had been
written up to some moment (promise P3), although inside a layer bytes are sorted by their offset.

Within a layer, later writes replace earlier ones. Bytes are kept as they were handed over, without copying; only what
is smaller than 4 KiB and follows what came just before is gathered.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from metaserver.wire import Buffer

# A layer is appended and committed as a whole, so it bounds a batch: 4 MiB keep a gigabit link busy for 32 ms.
LAYER_BYTES = 4 << 20
# Each run becomes an extent, and a commit takes 1,000 (protocol.COMMIT_EXTENTS), several small files among them.
LAYER_RUNS = 480
# Smaller writes that follow each other are copied together: a piece costs about 100 bytes of memory.
SMALL_BYTES = 4096
GATHERED_BYTES = 64 << 10
# What a run costs in memory beside its bytes; counted, so that scattered single bytes cannot pass the bound.
RUN_COST = 256


class Span(NamedTuple):
    """``data`` belongs at file ``offset``."""

    offset: int
    data: Buffer


class Layer:
    """Non-overlapping pieces sorted by offset. ``mtime_ns`` None: the commit leaves the times alone.

    Invariants: ``size`` is the sum of the pieces' lengths; ``runs`` is the number of pieces that do not continue
    the one before them; ``stop`` is the end of the last piece, 0 without pieces. No piece is empty.
    """

    __slots__ = (
        "charge", "doomed", "mtime_ns", "pieces", "runs", "serial", "size", "starts", "stop", "taken",
        "truncate_generation",
    )  # fmt: skip

    def __init__(self, serial: int, truncate_generation: int) -> None:
        self.serial = serial
        self.truncate_generation = truncate_generation
        self.mtime_ns: int | None = None
        self.starts: list[int] = []
        self.pieces: list[Buffer] = []
        self.size = 0
        self.runs = 0
        self.stop = 0
        self.taken = False
        # Bytes that are held for it under a quota (``allowances.py``).
        self.charge = 0
        # An older layer was lost: it must not become part of the file, and is not shown any more.
        self.doomed = False

    @property
    def cost(self) -> int:
        """Bytes of memory it takes, near enough."""
        return self.size + self.runs * RUN_COST

    @property
    def full(self) -> bool:
        return self.size >= LAYER_BYTES or self.runs >= LAYER_RUNS

    def write(self, offset: int, data: bytes) -> None:
        """Takes ``data`` over the bytes from ``offset`` on; ``data`` must never change."""
        if offset < self.stop:
            self._overwrite(offset, data)
            return
        length = len(data)
        if offset != self.stop or not self.starts:
            self.runs += 1
        elif length < SMALL_BYTES:
            last = self.pieces[-1]
            if type(last) is bytearray and len(last) < GATHERED_BYTES:
                last += data
                self.size += length
                self.stop += length
                return
        self.starts.append(offset)
        self.pieces.append(bytearray(data) if length < SMALL_BYTES else data)
        self.size += length
        self.stop = offset + length

    def cut(self, size: int) -> None:
        """Drops what is past ``size``."""
        if self.stop > size:
            self._replace(size, self.stop, [])

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        """What it has of [start, stop), in order."""
        for at in range(max(0, bisect_right(self.starts, start) - 1), len(self.starts)):
            first = self.starts[at]
            if first >= stop:
                return
            piece = self.pieces[at]
            end = first + len(piece)
            if end > start:
                yield Span(max(first, start), _part(piece, max(start - first, 0), min(end, stop) - first))

    def each_run(self) -> Iterator[tuple[int, list[Buffer]]]:
        """Runs: the file offset, and the pieces that follow each other from there."""
        first = expected = -1
        run: list[Buffer] = []
        for start, piece in zip(self.starts, self.pieces, strict=True):
            if start != expected:
                if run:
                    yield first, run
                first, run = start, []
            run.append(piece)
            expected = start + len(piece)
        if run:
            yield first, run

    def _overwrite(self, offset: int, data: bytes) -> None:
        self._replace(offset, offset + len(data), [bytearray(data) if len(data) < SMALL_BYTES else data])

    def _replace(self, start: int, stop: int, new: list[Buffer]) -> None:
        """Puts ``new`` (one piece or none) in place of [start, stop)."""
        first = bisect_right(self.starts, start) - 1
        if first < 0 or self.starts[first] + len(self.pieces[first]) <= start:
            first += 1
        last = bisect_left(self.starts, stop)
        starts, pieces = ([start], new) if new else ([], [])
        if first < last:
            head, tail = self.starts[first], self.starts[last - 1]
            if head < start:
                starts = [head, *starts]
                pieces = [_kept(self.pieces[first], 0, start - head), *pieces]
            if tail + len(self.pieces[last - 1]) > stop:
                starts = [*starts, stop]
                pieces = [*pieces, _kept(self.pieces[last - 1], stop - tail, len(self.pieces[last - 1]))]
        self.size += sum(map(len, pieces)) - sum(map(len, self.pieces[first:last]))
        self.runs -= self._breaks(first, last)
        self.starts[first:last] = starts
        self.pieces[first:last] = pieces
        self.runs += self._breaks(first, first + len(starts))
        self.stop = self.starts[-1] + len(self.pieces[-1]) if self.starts else 0

    def _breaks(self, first: int, last: int) -> int:
        """How many of the pieces first..last (inclusive) begin a run."""
        count = 0
        for at in range(first, min(last + 1, len(self.starts))):
            if at == 0 or self.starts[at - 1] + len(self.pieces[at - 1]) != self.starts[at]:
                count += 1
        return count


class DirtyRuns:
    """The layers of one file, oldest first; those that are taken come before those that are not.

    Invariants: at most the last layer is open, and it is not taken; ``cost`` is the sum of the layers' costs.
    """

    __slots__ = ("_open", "_serial", "cost", "layers")

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.cost = 0
        self._open: Layer | None = None
        self._serial = 0

    def __bool__(self) -> bool:
        return bool(self.layers)

    @property
    def stop(self) -> int:
        """The end of the last dirty byte that may become part of the file; 0 if there is none."""
        return max((layer.stop for layer in self.layers if not layer.doomed), default=0)

    @property
    def oldest(self) -> int:
        """Serial of the oldest layer; those of all future layers are larger."""
        return self.layers[0].serial if self.layers else self._serial + 1

    @property
    def newest_mtime_ns(self) -> int | None:
        """The modification time that the newest layer with one brings."""
        return next((layer.mtime_ns for layer in reversed(self.layers) if layer.mtime_ns is not None), None)

    @property
    def start(self) -> int:
        """The offset of the first dirty byte; past every file if there is none."""
        return min((layer.starts[0] for layer in self.layers), default=1 << 63)

    def write(self, offset: int, data: bytes, truncate_generation: int, mtime_ns: int) -> bool:
        """Takes a write; whether its layer is full by that and now closed."""
        layer = self._open
        if layer is None or layer.truncate_generation != truncate_generation:
            self._serial += 1
            layer = self._open = Layer(self._serial, truncate_generation)
            self.layers.append(layer)
        before = layer.size + layer.runs * RUN_COST
        layer.write(offset, data)
        layer.mtime_ns = mtime_ns
        self.cost += layer.size + layer.runs * RUN_COST - before
        if layer.size < LAYER_BYTES and layer.runs < LAYER_RUNS:
            return False
        self._open = None
        return True

    def charge(self, count: int) -> None:
        """After a write: so many bytes are held for it under a quota."""
        if self.layers:
            self.layers[-1].charge += count

    def close(self) -> int:
        """Closes the open layer; the serial of the newest layer there is (or was)."""
        self._open = None
        return self._serial

    def waiting(self) -> Layer | None:
        """The oldest closed layer that is not taken."""
        for layer in self.layers:
            if not layer.taken:
                return layer if layer is not self._open else None
        return None

    @property
    def in_flight(self) -> bool:
        return bool(self.layers) and self.layers[0].taken

    def done(self, layer: Layer) -> bool:
        """Forgets a layer: it is part of the file now, or given up. False if it was forgotten already."""
        if layer not in self.layers:
            return False
        self.layers.remove(layer)
        self.cost -= layer.cost
        if layer is self._open:
            self._open = None
        return True

    def cut(self, size: int) -> None:
        """Drops what is past ``size``; nothing may be in flight."""
        for layer in self.layers:
            layer.cut(size)
        self.layers = [layer for layer in self.layers if layer.size]
        self.cost = sum(layer.cost for layer in self.layers)
        if self._open is not None and not self._open.size:
            self._open = None

    def drop_untaken(self) -> None:
        """Drops all layers that are not in flight."""
        self.layers = [layer for layer in self.layers if layer.taken]
        self.cost = sum(layer.cost for layer in self.layers)
        self._open = None

    def doom(self, lost: Layer) -> None:
        """A layer is lost: none of those after it may become part of the file, which would then have a hole where that
        was (promise P3). Those that are not in flight are dropped, the others marked."""
        self.drop_untaken()
        for layer in self.layers:
            layer.doomed = layer.doomed or layer.serial > lost.serial

    def clear(self) -> None:
        """Drops everything; serials go on."""
        self.layers.clear()
        self.cost = 0
        self._open = None

    @property
    def unsent(self) -> int:
        """Bytes that are not in flight."""
        return sum(layer.size for layer in self.layers if not layer.taken)

    def leave_times(self) -> None:
        """Times were set explicitly after all these writes: their commits must not set them again."""
        for layer in self.layers:
            layer.mtime_ns = None

    def overlay(self, start: int, stop: int) -> list[Span]:
        """What is dirty of [start, stop), in order, not overlapping, the newest bytes of each."""
        found: list[Span] = []
        for layer in self.layers:
            spans = list(layer.spans(start, stop)) if layer.stop > start and not layer.doomed else []
            if spans:
                found = _over(found, spans) if found else spans
        return found


def _over(lower: list[Span], upper: list[Span]) -> list[Span]:
    """``upper`` over ``lower``."""
    merged = list(upper)
    gaps = zip([span.offset + len(span.data) for span in upper], [span.offset for span in upper[1:]], strict=False)
    free = [(0, upper[0].offset), *gaps, (upper[-1].offset + len(upper[-1].data), 1 << 63)]
    at = 0
    for span in lower:
        end = span.offset + len(span.data)
        while free[at][1] <= span.offset:
            at += 1
        for start, stop in free[at:]:
            if start >= end:
                break
            first, last = max(start, span.offset), min(stop, end)
            if first < last:
                merged.append(Span(first, memoryview(span.data)[first - span.offset : last - span.offset]))
    merged.sort()
    return merged


def _part(piece: Buffer, start: int, stop: int) -> Buffer:
    """A view of a piece, for reading; a copy of what may still grow (a view would forbid that)."""
    if type(piece) is bytearray:
        return bytes(memoryview(piece)[start:stop])
    if start == 0 and stop == len(piece):
        return piece
    return memoryview(piece)[start:stop]


def _kept(piece: Buffer, start: int, stop: int) -> Buffer:
    """What an overwrite leaves of a piece: a copy if it is the smaller part, so that no piece pins twice its size."""
    if stop - start < len(piece) // 2 or type(piece) is bytearray:
        return bytes(memoryview(piece)[start:stop])
    return memoryview(piece)[start:stop]

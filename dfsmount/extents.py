"""What a mount knows of one file's map: where which bytes are. Pure.

Offsets and lengths are in bytes. Extents are kept in four parallel arrays of machine integers (32 bytes an extent:
a 1 GiB file written in random 4 KiB pieces has 262,144 of them).
"""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from metaserver.protocol import FILE_SIZE_MAX, Extent


class Piece(NamedTuple):
    """``length`` bytes of a file from ``offset`` on, at ``chunk_offset`` of ``chunk``; chunk 0: a hole."""

    offset: int
    length: int
    chunk: int
    chunk_offset: int


class Ranges:
    """A set of file offsets as sorted, disjoint, not adjoining half-open ranges."""

    __slots__ = ("_starts", "_stops")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._stops, strict=True)

    def add(self, start: int, stop: int) -> None:
        if start >= stop:
            return
        first = bisect_left(self._stops, start)
        last = bisect_right(self._starts, stop)
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def clear(self) -> None:
        self._starts.clear()
        self._stops.clear()

    def end_of(self, offset: int) -> int:
        """Up to where everything from ``offset`` on is in the set; ``offset`` itself if it is not."""
        at = bisect_right(self._starts, offset) - 1
        return max(offset, self._stops[at]) if at >= 0 else offset


class ExtentMap:
    """Extents of one file, sorted, without overlaps, neighbours joined, and the ranges in which the map is known.

    Outside of the known ranges nothing can be said; inside, what no extent covers is a hole.
    """

    __slots__ = ("_chunk_offsets", "_chunks", "_known", "_starts", "_stops")

    def __init__(self) -> None:
        self._starts = array("q")
        self._stops = array("q")
        self._chunks = array("Q")
        self._chunk_offsets = array("q")
        self._known = Ranges()

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Extent]:
        for at in range(len(self._starts)):
            start = self._starts[at]
            yield Extent(start, self._stops[at] - start, self._chunks[at], self._chunk_offsets[at])

    def known_until(self, offset: int) -> int:
        """Up to where the map is known without a gap from ``offset`` on."""
        return self._known.end_of(offset)

    def forget(self) -> None:
        """Nothing is known any more."""
        self._set(0, len(self._starts), ())
        self._known.clear()

    def learn(self, extents: Iterable[Extent], start: int, stop: int) -> None:
        """Takes over what the metaserver says about [start, stop): its extents there, and holes between them.

        Parts of the extents outside of the range are ignored.
        """
        found = [piece for piece in map(_whole, extents) if piece.length > 0]
        self._replace(start, stop, [cut for piece in found if (cut := _cut(piece, start, stop)).length > 0])
        self._known.add(start, stop)

    def apply(self, extents: Iterable[Extent]) -> None:
        """Puts committed extents over what was there, in the order given."""
        for extent in extents:
            stop = extent.file_offset + extent.length
            self._replace(extent.file_offset, stop, [_whole(extent)])
            self._known.add(extent.file_offset, stop)

    def truncate(self, size: int) -> None:
        """Nothing is past ``size`` any more: all of it is a hole."""
        self._replace(size, FILE_SIZE_MAX, [])
        self._known.add(size, FILE_SIZE_MAX)

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """All of [start, stop), extents and holes, in order. What is not known looks like a hole: ask before."""
        found: list[Piece] = []
        at = bisect_right(self._stops, start)
        while start < stop:
            if at >= len(self._starts) or self._starts[at] >= stop:
                found.append(Piece(start, stop - start, 0, 0))
                break
            first = self._starts[at]
            if first > start:
                found.append(Piece(start, first - start, 0, 0))
                start = first
            end = min(self._stops[at], stop)
            found.append(Piece(start, end - start, self._chunks[at], self._chunk_offsets[at] + start - first))
            start = end
            at += 1
        return found

    def chunks(self) -> set[int]:
        return set(self._chunks)

    def _replace(self, start: int, stop: int, new: list[Piece]) -> None:
        """Cuts [start, stop) out, puts ``new`` there, and joins neighbours."""
        if start >= stop:
            return
        first = bisect_left(self._stops, start)
        last = bisect_right(self._starts, stop)
        pieces: list[Piece] = []
        for at in range(first, last):
            old = self._at(at)
            _join(pieces, _cut(old, 0, start))
        for piece in new:
            _join(pieces, piece)
        for at in range(first, last):
            _join(pieces, _cut(self._at(at), stop, FILE_SIZE_MAX))
        self._set(first, last, pieces)

    def _at(self, at: int) -> Piece:
        start = self._starts[at]
        return Piece(start, self._stops[at] - start, self._chunks[at], self._chunk_offsets[at])

    def _set(self, first: int, last: int, pieces: Iterable[Piece]) -> None:
        pieces = list(pieces)
        self._starts[first:last] = array("q", [piece.offset for piece in pieces])
        self._stops[first:last] = array("q", [piece.offset + piece.length for piece in pieces])
        self._chunks[first:last] = array("Q", [piece.chunk for piece in pieces])
        self._chunk_offsets[first:last] = array("q", [piece.chunk_offset for piece in pieces])


def _whole(extent: Extent) -> Piece:
    return Piece(extent.file_offset, extent.length, extent.chunk, extent.chunk_offset)


def _cut(piece: Piece, start: int, stop: int) -> Piece:
    """The part of ``piece`` within [start, stop); its length is not positive if there is none."""
    first = max(piece.offset, start)
    length = min(piece.offset + piece.length, stop) - first
    return Piece(first, length, piece.chunk, piece.chunk_offset + first - piece.offset)


def _join(pieces: list[Piece], piece: Piece) -> None:
    """Appends ``piece`` unless it is empty; makes it one with the last if it continues it in file and chunk."""
    if piece.length <= 0:
        return
    if pieces:
        last = pieces[-1]
        follows = last.offset + last.length == piece.offset and last.chunk == piece.chunk
        if follows and last.chunk_offset + last.length == piece.chunk_offset:
            pieces[-1] = last._replace(length=last.length + piece.length)
            return
    pieces.append(piece)

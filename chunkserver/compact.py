"""Making one new sealed chunk of what is still wanted of several (the cleaner's COMPACT order).

Sources are read here if this server has them, else from the peer that the order names; every block is checked against
its entry. The file gets its name when it is complete and synced, as with a copy; sources are not touched.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from chunkserver import chunkfile, selection
from chunkserver.chunkfile import ENTRY_BYTES, PAYLOAD_OFFSET, Entry, Header, decode_entries
from chunkserver.client import Pool
from chunkserver.copy import READ_BYTES, READ_SECONDS, Copier
from chunkserver.disk import File
from chunkserver.index import Index
from chunkserver.protocol import Peer
from chunkserver.replica import Replica, ReplicaState
from chunkserver.selection import Piece
from chunkserver.store import Store
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import CompactSource, Order
from metaserver.wire import Buffer

Moves = list[tuple[int, int, int, int]]
# What says that a replica is not what it should be, so that the metaserver should have it looked at.
_WRONG = frozenset({
    ErrorCode.BAD_CHECKSUM, ErrorCode.CHAIN_MISMATCH, ErrorCode.WRONG_OFFSET, ErrorCode.NO_SUCH_CHUNK,
    ErrorCode.REPLICA_FAILED, ErrorCode.IO,
})  # fmt: skip


class SourceFailed(DfsError):
    """Right bytes of ``chunk`` could not be had."""

    def __init__(self, error: DfsError, chunk: int) -> None:
        super().__init__(error.code, error.text)
        self.chunk = chunk


class _Span(NamedTuple):
    """Blocks of one source that follow each other, read at once, with the numbers of the pieces cut from each."""

    blocks: list[tuple[Entry, list[int]]]

    @property
    def start(self) -> int:
        return self.blocks[0][0].logical_offset

    @property
    def length(self) -> int:
        last = self.blocks[-1][0]
        return last.logical_offset + last.logical_length - self.start


class Compactor:
    """Makes chunks in one store; ``server`` is its own number."""

    def __init__(self, store: Store, pool: Pool, copier: Copier, server: int) -> None:
        self._store = store
        self._table = store.table
        self._pool = pool
        self._copier = copier
        self._server = server

    async def compact(self, order: Order) -> tuple[Replica, Moves]:
        """Carries a COMPACT order out; what was made by an earlier attempt is made again, with the same bytes.

        Raises :class:`SourceFailed` if a source is not what it should be, DISK_FULL, IO, NO_SUCH_CHUNK if the new
        chunk was deleted already, and what reaching a peer raises.
        """
        if self._table.was_deleted(order.chunk):
            raise DfsError(ErrorCode.NO_SUCH_CHUNK, f"chunk {order.chunk:x} was deleted meanwhile")
        sources = order.sources
        pieces: list[Piece] = []
        for number, source in enumerate(sources):
            with _blaming(source):
                index = await self._index(source)
            pieces += await self._in_thread(_selected, number, index, source)
        arranged = await self._in_thread(selection.arrange, pieces)
        if not arranged:
            raise DfsError(ErrorCode.INVALID, "nothing is wanted of the sources")
        length = arranged[-1].stored + arranged[-1].length
        needed = length + chunkfile.HEADER_BYTES + len(arranged) * ENTRY_BYTES
        self._table.require_space(needed, makes_room=order.makes_room)
        checksums = [0] * len(arranged)

        async def fill(file: File) -> tuple[Index, Header]:
            for number, source in enumerate(sources):
                with _blaming(source):
                    await self._move(file, number, source, arranged, checksums)
            first = self._table.first_chain(order.chunk)
            entries, chain = await self._in_thread(selection.index_entries, arranged, checksums, first)
            header = Header(
                self._table.cluster,
                order.chunk,
                self._table.now_ns(),
                chunkfile.FLAG_SEALED,
                length,
                len(arranged),
                chain,
            )
            return Index(entries), header

        replica = await self._copier.make(order.chunk, fill)
        return replica, selection.moves(arranged, [source.chunk for source in sources])

    # -- sources -------------------------------------------------------------------------------------------------

    async def _index(self, source: CompactSource) -> Index:
        if self._local(source) is not None:
            try:
                opened = await self._store.reads.load(self._table.readable(source.chunk))
                return opened.blocks
            except DfsError:
                if self._is_here(source):
                    raise
        return await self._copier.fetch_index(_peer(source), source.chunk, source.length, source.entries, source.chain)

    def _is_here(self, source: CompactSource) -> bool:
        """Whether nobody else is known to have it."""
        return source.server == self._server

    def _local(self, source: CompactSource) -> Replica | None:
        """The replica here, if it is the chunk that is meant and not known to be damaged."""
        replica = self._table.get(source.chunk)
        if replica is None or replica.state is not ReplicaState.SEALED or replica.error:
            return None
        there = replica.written
        same = (there.stored_length, there.entries, there.chain) == (source.length, source.entries, source.chain)
        return replica if same else None

    async def _move(
        self, file: File, number: int, source: CompactSource, arranged: list[Piece], checksums: list[int]
    ) -> None:
        """Reads one source in its own order, and writes its pieces to where they belong."""
        for span in _spans(number, arranged):
            blocks = await self._blocks(source, span, arranged)
            writes: list[tuple[int, Buffer]] = []
            for (_, numbers), (block, found) in zip(span.blocks, blocks, strict=True):
                for at, checksum in zip(numbers, found, strict=True):
                    piece = arranged[at]
                    checksums[at] = checksum
                    writes.append((piece.stored, memoryview(block)[piece.skip : piece.skip + piece.length]))
            await self._in_thread(_write, file, writes)

    async def _blocks(
        self, source: CompactSource, span: _Span, arranged: list[Piece]
    ) -> list[tuple[Buffer, list[int]]]:
        """The bytes of each block of a span, with the checksums of its pieces: from here, or else from the peer."""
        replica = self._local(source)
        if replica is not None:
            try:
                reads = self._store.reads
                found_now = reads.read_now(source.chunk, span.start, span.length)
                entries, payload = found_now or await reads.read(source.chunk, span.start, span.length)
                return _checked(span, decode_entries(entries), payload, arranged)
            except DfsError as error:
                if error.code is ErrorCode.BAD_CHECKSUM:
                    self._table.report_bad(replica, ErrorCode.BAD_CHECKSUM)
                if self._is_here(source):
                    raise
        if self._is_here(source):
            raise DfsError(ErrorCode.NO_SUCH_CHUNK, f"no good replica of chunk {source.chunk:x} here")
        found = await self._pool.read(_peer(source), source.chunk, span.start, span.length, timeout=READ_SECONDS)
        return _checked(span, found.entries, found.payload, arranged)

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await self._table.run_sync(
            function, *arguments, limiter=self._table.limits.changes, abandon_on_cancel=True
        )


class _blaming:
    """Names the source whose fault an error in the block is."""

    def __init__(self, source: CompactSource) -> None:
        self._source = source

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, DfsError) and error.code in _WRONG:
            raise SourceFailed(error, self._source.chunk) from error


def _peer(source: CompactSource) -> Peer:
    return Peer(source.server, source.host, source.port)


def _selected(number: int, index: Index, source: CompactSource) -> list[Piece]:
    return list(selection.select(number, index, source.ranges))


def _spans(number: int, arranged: Sequence[Piece]) -> Iterator[_Span]:
    """What to read of one source, in order: each block once, neighbours together, at most ``READ_BYTES`` at a time."""
    wanted = [at for at, piece in enumerate(arranged) if piece.source == number]
    wanted.sort(key=lambda at: (arranged[at].entry.logical_offset, arranged[at].skip))
    blocks: list[tuple[Entry, list[int]]] = []
    size = 0
    for _, group in groupby(wanted, key=lambda at: arranged[at].entry.logical_offset):
        numbers = list(group)
        entry = arranged[numbers[0]].entry
        follows = blocks and blocks[-1][0].logical_offset + blocks[-1][0].logical_length == entry.logical_offset
        if blocks and (not follows or size + entry.stored_length > READ_BYTES or len(blocks) == _SPAN_BLOCKS):
            yield _Span(blocks)
            blocks, size = [], 0
        blocks.append((entry, numbers))
        size += entry.stored_length
    if blocks:
        yield _Span(blocks)


def _checked(
    span: _Span, entries: Sequence[Entry], payload: Buffer, arranged: Sequence[Piece]
) -> list[tuple[Buffer, list[int]]]:
    """BAD_CHECKSUM unless these are the blocks of the span, each with its checksum."""
    view, at = memoryview(payload), 0
    found: list[tuple[Buffer, list[int]]] = []
    if len(entries) < len(span.blocks):
        raise DfsError(ErrorCode.WRONG_OFFSET, "the source's replica is shorter than its index says")
    for (wanted, numbers), entry in zip(span.blocks, entries, strict=False):
        block = view[at : at + entry.stored_length]
        at += entry.stored_length
        sums = [selection.piece_checksum(arranged[number], block) for number in numbers]
        if entry != wanted or None in sums:
            raise DfsError(ErrorCode.BAD_CHECKSUM, f"the block at {wanted.logical_offset} is damaged")
        found.append((block, [checksum for checksum in sums if checksum is not None]))
    return found


def _write(file: File, writes: Iterable[tuple[int, Buffer]]) -> None:
    """Writes to places of the payload, neighbours in one call."""
    run: list[Buffer] = []
    start = stop = 0
    for at, data in sorted(writes, key=lambda write: write[0]):
        if run and (at != stop or len(run) == _MOST_BUFFERS):
            file.write(run, PAYLOAD_OFFSET + start)
            run = []
        if not run:
            start = at
        run.append(data)
        stop = at + len(data)
    if run:
        file.write(run, PAYLOAD_OFFSET + start)


# Well below what one answer of a peer can hold.
_SPAN_BLOCKS = 4096
# The system takes 1,024 at a time.
_MOST_BUFFERS = 512

"""Which replica of a chunk counts, and what files its index entries make up, when nothing else is left. Pure.

Entries are laid over one another by stamp, (session, counter): what has a newer one hides what is older, byte by byte.
Session ids grow with time, and a session counts its entries, so this is the order of writing as far as one session
after another wrote to a file. Two sessions that wrote to the same bytes *at the same time* are put into the order in
which they began, and a batch that was sent a second time (because a server failed) counts as written then. Nothing in
an index tells of truncating, deleting and renaming, nor of bytes that were overwritten by something that is gone.
Identical stamps are identical bytes: the cleaner copies blocks with their stamps.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from metaserver.protocol import ReplicaState

# Where an entry's chain is in the index (``chunkserver/chunkfile.py``), and of how many bytes each is.
ENTRY_BYTES = 64
_ENTRY = struct.Struct("<IIIIHBBIQQQQII")
assert _ENTRY.size == ENTRY_BYTES
_CHAIN = struct.Struct("<60xI")
_BLOCK = struct.Struct(">QQQQ?QIIQ")
BLOCK_RECORD_BYTES = _BLOCK.size
# Signed 64-bit arithmetic everywhere else.
_LARGEST = 1 << 62


class Found(NamedTuple):
    """One replica, as its server lists it. ``error``: an ``ErrorCode`` name, something about it is known to be bad."""

    server: int
    length: int
    entries: int
    chain: int
    sealed: bool
    error: str
    created_ns: int

    @property
    def version(self) -> "Version":
        return Version(self.length, self.entries, self.chain)


class Version(NamedTuple):
    """What a replica consists of: equal versions are equal bytes."""

    length: int
    entries: int
    chain: int


class Choice(NamedTuple):
    """The version that is taken, and what that makes of each server's replica. ``good``: some replica has all of it."""

    version: Version
    states: dict[int, ReplicaState]
    created_ns: int

    @property
    def good(self) -> bool:
        return any(state is not ReplicaState.BAD for state in self.states.values())


def is_prefix(version: Version, index: bytes) -> bool:
    """Whether a replica of this version is the beginning of one that has these entries."""
    if version.entries == 0:
        return True
    at = (version.entries - 1) * ENTRY_BYTES
    chain: int = _CHAIN.unpack_from(index, at)[0] if at < len(index) else -1
    return chain == version.chain


def choose(found: Iterable[Found], indexes: Mapping[Version, bytes]) -> Choice | None:
    """What to go by, of the versions whose index could be read; None if there is none with an entry.

    A sealed one first: its end was committed. Else the one that most servers agree with (a shorter replica agrees with
    a longer one of which it is the beginning), then the longest: what is too long was never promised, but what is too
    short may lack what was.
    """
    replicas = list(found)
    candidates = [version for version in indexes if version.entries]
    if not candidates:
        return None

    def preference(version: Version) -> tuple[bool, bool, int, Version]:
        whole = [one for one in replicas if not one.error and _has(one, version, indexes)]
        agreeing = sum(not one.error and is_prefix(one.version, indexes[version]) for one in replicas)
        sealed = any(one.sealed and one.version == version for one in replicas)
        return sealed, bool(whole), agreeing, version

    chosen = max(candidates, key=preference)
    states = {one.server: _state(one, chosen, indexes) for one in replicas}
    return Choice(chosen, states, max(one.created_ns for one in replicas))


def _has(one: Found, version: Version, indexes: Mapping[Version, bytes]) -> bool:
    """Whether all of a version is in a replica, perhaps with more after it."""
    index = indexes.get(one.version)
    return one.version == version or (not one.sealed and index is not None and is_prefix(version, index))


def _state(one: Found, chosen: Version, indexes: Mapping[Version, bytes]) -> ReplicaState:
    if one.error or not _has(one, chosen, indexes):
        return ReplicaState.BAD
    # Too long: the order to seal it, which the next start gives, cuts it.
    return ReplicaState.GOOD if one.version == chosen else ReplicaState.UNSURE


# -- entries -------------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """One entry of a chunk. ``good``: its chunk has a replica that is believed to be whole."""

    ino: int
    offset: int
    session: int
    counter: int
    good: bool
    chunk: int
    chunk_offset: int
    length: int
    created_ns: int

    def pack(self) -> bytes:
        """Bytes that sort like blocks."""
        return _BLOCK.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> "Block":
        return cls._make(_BLOCK.unpack(data))

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def newness(self) -> tuple[int, int, bool, int]:
        """Of two blocks with one stamp, which are the same bytes, the one that can be read."""
        return self.session, self.counter, self.good, self.chunk


def blocks_of(chunk: int, choice: Choice, index: bytes) -> Iterator[Block]:
    """The entries of a chunk; those that cannot be part of a file are left out."""
    good, created_ns = choice.good, max(0, choice.created_ns)
    for fields in _ENTRY.iter_unpack(index):
        _, logical, _, length, _, _, _, _, ino, offset, session, counter, _, _ = fields
        possible = 1 < ino < _LARGEST and offset < _LARGEST and length > 0 and logical + length <= choice.version.length
        if possible and session < _LARGEST:
            yield Block(ino, offset, session, counter, good, chunk, logical, length, created_ns)


class Piece(NamedTuple):
    """An extent of a file, and when its chunk was made."""

    ino: int
    offset: int
    length: int
    chunk: int
    chunk_offset: int
    created_ns: int


def lay_over(blocks: Iterable[Block]) -> Iterator[Piece]:
    """The extents of all files, in order, of blocks that are sorted by inode and offset. Neighbours are joined.

    Needs memory for the blocks that overlap at one place only, and of these only those that will show somewhere.
    """
    before: Piece | None = None
    for piece in _newest(blocks):
        if before is None:
            before = piece
        elif _continues(before, piece):
            created_ns = max(before.created_ns, piece.created_ns)
            before = before._replace(length=before.length + piece.length, created_ns=created_ns)
        else:
            yield before
            before = piece
    if before is not None:
        yield before


def _continues(before: Piece, piece: Piece) -> bool:
    return (
        before.ino == piece.ino
        and before.offset + before.length == piece.offset
        and before.chunk == piece.chunk
        and before.chunk_offset + before.length == piece.chunk_offset
    )


def _newest(blocks: Iterable[Block]) -> Iterator[Piece]:
    sweep = _Sweep()
    for block in blocks:
        yield from sweep.advance(block.ino, block.offset)
        sweep.take(block)
    yield from sweep.finish()


class _Sweep:
    """Goes over one inode after another from left to right. Invariant: ``_blocks`` are newest first, and each ends
    after the one before it; whatever would never show is not among them."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        self._ino = 0
        self._position = 0

    def advance(self, ino: int, offset: int) -> Iterator[Piece]:
        """What shows before ``offset`` of inode ``ino``: nothing further left is still to come."""
        if ino != self._ino:
            yield from self.finish()
            self._ino, self._position = ino, offset
        yield from self._show(offset)
        self._position = max(self._position, offset)

    def finish(self) -> Iterator[Piece]:
        yield from self._show(1 << 64)

    def take(self, block: Block) -> None:
        newness = block.newness
        at = 0
        while at < len(self._blocks) and self._blocks[at].newness > newness:
            at += 1
        if at and self._blocks[at - 1].end >= block.end:
            return
        hidden = at
        while hidden < len(self._blocks) and self._blocks[hidden].end <= block.end:
            hidden += 1
        self._blocks[at:hidden] = [block]

    def _show(self, stop: int) -> Iterator[Piece]:
        while self._blocks and self._position < stop:
            newest = self._blocks[0]
            end = min(newest.end, stop)
            if end > self._position:
                skipped = self._position - newest.offset
                yield Piece(
                    self._ino, self._position, end - self._position,
                    newest.chunk, newest.chunk_offset + skipped, newest.created_ns,
                )  # fmt: skip
                self._position = end
            if newest.end <= self._position:
                self._blocks.pop(0)

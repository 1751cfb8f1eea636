"""What garbage there is: chunks that nothing refers to any more, files without a name, replicas that nobody knows.

Counted when it is asked for, in slices; nothing here deletes anything: that is repair's (``repair.py``), which can be
told not to wait out the grace.
"""

from itertools import islice

import trio

from metaserver import chunks, inodes
from metaserver.cleaner import Cleaner
from metaserver.commit import Committer
from metaserver.protocol import ChunkState, Garbage
from metaserver.repair import Repair
from metaserver.schema import Chunk, Table, Transaction, chunk_key, read_u64

SLICE_CHUNKS = 500
SLICE_ORPHANS = 500


class GarbageReader:
    def __init__(self, committer: Committer, repair: Repair, cleaner: Cleaner) -> None:
        self._committer = committer
        self._repair = repair
        self._cleaner = cleaner

    async def read(self, *, hurry: bool = False) -> Garbage:
        """``hurry``: has what is DEAD deleted as soon as it may be. Unknown replicas have their grace always: who made
        them may be about to say so."""
        found = Garbage(unknown_replicas=len(self._repair.strays))
        await self._chunks(found, hurry)
        await self._orphans(found)
        cleaner = self._cleaner.status()
        found.cleanable_chunks, found.cleanable_bytes = cleaner.candidates, cleaner.dead_bytes
        return found

    async def _chunks(self, found: Garbage, hurry: bool) -> None:
        position: int | None = 0
        while position is not None:
            position, _ = self._committer.read(0, lambda tx, at=position: self._add_chunks(tx, at, found, hurry))  # type: ignore[misc]
            await trio.lowlevel.checkpoint()

    def _add_chunks(self, tx: Transaction, position: int, found: Garbage, hurry: bool) -> int | None:
        """Where to go on; None at the end."""
        rows = list(islice(tx.scan(Table.CHUNKS, chunk_key(position), b"\xff" * 9), SLICE_CHUNKS))
        for key, value in rows:
            chunk, row = read_u64(key), Chunk.unpack(value)
            if row.state == ChunkState.DEAD:
                if hurry:
                    self._repair.let_go(chunk)
                left = self._repair.grace_left(chunk)
                found.dead_chunks += 1
                found.dead_bytes += sum(replica.length for _, replica in chunks.replicas(tx, chunk))
                found.waiting_chunks += left > 0
                found.longest_wait_seconds = max(found.longest_wait_seconds, left)
        return read_u64(rows[-1][0]) + 1 if len(rows) == SLICE_CHUNKS else None

    async def _orphans(self, found: Garbage) -> None:
        position = b""
        last = 0
        while True:
            rows, _ = self._committer.read(
                0,
                lambda tx, at=position: list(islice(tx.scan(Table.ORPHANS, at, b"\xff" * 17), SLICE_ORPHANS)),  # type: ignore[misc]
            )
            for ino in dict.fromkeys(read_u64(key) for key, _ in rows):
                inode, _ = self._committer.read(0, lambda tx, ino=ino: inodes.find(tx, ino))  # type: ignore[misc]
                if inode is not None and ino != last:
                    found.orphans += 1
                    found.orphan_bytes += inode.allocated
                last = ino
            if len(rows) < SLICE_ORPHANS:
                return
            position = rows[-1][0] + b"\0"
            await trio.lowlevel.checkpoint()

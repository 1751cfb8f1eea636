"""Reading the chunks of one disk, and reading them back from the disk itself."""

import errno
from collections.abc import Callable
from typing import Any

import structlog
import trio

from chunkserver import recovery
from chunkserver.chunkfile import ENTRY_BYTES, INDEX_OFFSET, PAYLOAD_OFFSET
from chunkserver.disk import File
from chunkserver.index import PAGE_ENTRIES, Index, Opened
from chunkserver.replica import Replica, ReplicaState
from chunkserver.table import Table
from chunkserver.verify import Verification
from metaserver.errors import DfsError, ErrorCode
from metaserver.wire import PAYLOAD_LIMIT, Buffer

log = structlog.get_logger(__name__)

# Shortages of this process or machine, which say nothing about a replica.
OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR})
# What a restart has frozen is read back again after so long, if one of these was in the way.
SHORTAGE_SECONDS = 1.0


class Reads:
    """Sees only what is written; works on OPEN, FROZEN and SEALED replicas alike, and on what FAILED ones hold."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def read_now(self, chunk: int, offset: int, length: int) -> tuple[bytes, Buffer] | None:
        """As :meth:`read` if it needs no disk, otherwise None."""
        replica = self._find(chunk)
        try:
            opened = self._opened(replica)
        except OSError:
            opened = None  # met again, and dealt with, where waiting is possible
        if opened is None:
            return None
        blocks = opened.blocks.covering(offset, length, PAYLOAD_LIMIT)
        if blocks is None:
            return b"", b""
        data = bytearray(blocks.length)
        try:
            if opened.file.read_cached(memoryview(data), blocks.position) < blocks.length:
                return None
        except OSError:
            return None  # met again, and dealt with, where waiting is possible
        self._table.bytes_read += blocks.length
        return blocks.entries, data

    async def read(self, chunk: int, offset: int, length: int) -> tuple[bytes, Buffer]:
        """Entries and stored bytes of whole blocks that cover a logical range, as far as it is written.

        Raises NO_SUCH_CHUNK, REPLICA_FAILED, IO. Cancelling is safe.
        """
        replica = self._find(chunk)
        opened = await self.load(replica)
        blocks = opened.blocks.covering(offset, length, PAYLOAD_LIMIT)
        if blocks is None:
            return b"", b""
        data = bytearray(blocks.length)
        count = await self._from_disk(
            replica, self._table.limits.reads, opened.file.read_into, memoryview(data), blocks.position
        )
        if count < blocks.length:
            if blocks.position + blocks.length > PAYLOAD_OFFSET + replica.written.stored_length:
                return await self.read(chunk, offset, length)  # cut meanwhile
            self._table.report_bad(replica, ErrorCode.IO)
            raise DfsError(ErrorCode.IO, f"the file of chunk {chunk:x} is too short")
        self._table.bytes_read += blocks.length
        return blocks.entries, data

    async def entries(self, chunk: int, index: int, count: int) -> bytes:
        """Index entries from number ``index`` on, at most ``count`` and a page."""
        opened = await self.load(self._find(chunk))
        return opened.blocks.slice(max(0, index), max(0, min(count, PAGE_ENTRIES)))

    def _find(self, chunk: int) -> Replica:
        """Raises NO_SUCH_CHUNK, or REPLICA_FAILED if nothing is known to be left of it."""
        replica = self._table.find(chunk)
        return replica if replica.written.entries else self._table.readable(chunk)

    def _opened(self, replica: Replica) -> Opened | None:
        """Descriptor and up-to-date index, if they are at hand."""
        opened = self._table.open_chunks.get(replica.chunk)
        if opened is None:
            return None
        known, there = len(opened.blocks), replica.written.entries
        if known < there:  # written since: certainly in memory
            data = opened.file.read((there - known) * ENTRY_BYTES, INDEX_OFFSET + known * ENTRY_BYTES)
            self._table.open_chunks.grow(replica.chunk, data)
        return opened

    async def load(self, replica: Replica) -> Opened:
        """Descriptor and index of a replica, from the disk if need be; kept for the next time."""
        try:
            opened = self._opened(replica)
        except OSError:
            self._table.open_chunks.drop(replica.chunk)
            opened = None
        if opened is None:
            file = replica.writing.file if replica.writing else None
            count = replica.written.entries
            opened = await self._from_disk(replica, self._table.limits.reads, self._open_file, replica, file, count)
            if len(opened.blocks) < count:
                self._table.report_bad(replica, ErrorCode.BAD_CHECKSUM)
                raise DfsError(ErrorCode.BAD_CHECKSUM, f"the index of chunk {replica.chunk:x} is damaged")
            if replica.state is ReplicaState.DELETED:
                raise DfsError(ErrorCode.NO_SUCH_CHUNK, "deleted meanwhile")
            if count <= replica.written.entries and self._table.get(replica.chunk) is replica:  # not cut meanwhile
                self._table.open_chunks.put(replica.chunk, opened)
                opened = self._opened(replica) or opened
        return opened

    def _open_file(self, replica: Replica, file: File | None, count: int) -> Opened:
        if file is None:
            file = self._table.disk.open(replica.path)
        return Opened(file, recovery.read_index(file, self._table.cluster, replica.chunk, count))

    async def _from_disk(
        self, replica: Replica, limiter: trio.CapacityLimiter, function: Callable[..., Any], *arguments: Any
    ) -> Any:
        """Runs a read in a worker thread; a failing block is reported at once."""
        try:
            return await self._table.run_sync(function, *arguments, limiter=limiter, abandon_on_cancel=True)
        except FileNotFoundError:
            if replica.state is ReplicaState.DELETED:
                raise DfsError(ErrorCode.NO_SUCH_CHUNK, "deleted meanwhile") from None
            self._table.report_bad(replica, ErrorCode.IO)
            raise DfsError(ErrorCode.IO, "the file is missing") from None
        except OSError as error:
            if error.errno in OURS:
                raise DfsError(ErrorCode.UNAVAILABLE, f"cannot read now: {error.strerror}") from None
            self._table.report_bad(replica, ErrorCode.IO)
            raise DfsError(ErrorCode.IO, f"cannot read: {error.strerror}") from None

    async def raw(self, chunk: int, position: int, length: int) -> bytes:
        """Bytes of the file as they are, even of a replica that was given up. Raises NO_SUCH_CHUNK, INVALID, IO or
        UNAVAILABLE."""
        replica = self._table.find(chunk)
        if position < 0 or not 0 <= length <= PAYLOAD_LIMIT:
            raise DfsError(ErrorCode.INVALID, "no chunk has such a range")

        def read() -> bytes:
            return self._table.disk.open(replica.path).read(length, position)

        data: bytes = await self._from_disk(replica, self._table.limits.scrubs, read)
        return data

    # -- verifying ---------------------------------------------------------------------------------------------

    async def verify(self, chunk: int) -> list[int]:
        """Re-reads a replica from the disk itself; returns the bad blocks, which also makes it known as damaged.

        BAD_CHECKSUM if its header, index or size is wrong.
        """
        replica = self._table.readable(chunk)
        if replica.state is not ReplicaState.SEALED:
            bad, _ = await self._bad_blocks(replica)
            self.judge(replica, "", bad)
            return bad
        found = self.verification(replica)
        await self._from_disk(replica, self._table.limits.scrubs, found.run)
        self.judge(replica, found.problem, found.bad_blocks)
        if found.problem:
            raise DfsError(ErrorCode.BAD_CHECKSUM, found.problem)
        return found.bad_blocks

    def verification(self, replica: Replica) -> Verification:
        """Of a sealed replica; nothing is read yet."""
        return Verification(self._table.disk, self._table.cluster, replica.chunk, replica.path, replica.written)

    def judge(self, replica: Replica, problem: str, bad: list[int]) -> bool:
        """Makes a replica known as damaged if that was found; whether it was."""
        if not problem and not bad:
            return False
        log.error("a replica does not read back", chunk=f"{replica.chunk:x}", problem=problem, bad_blocks=bad[:5])
        self._table.report_bad(replica, ErrorCode.BAD_CHECKSUM)
        return True

    async def verify_slice(self, replica: Replica, found: Verification) -> bool:
        """The next slice of a verification; False at its end. What cannot be read makes the replica known as damaged,
        and raises as :meth:`read`."""
        more: bool = await self._from_disk(replica, self._table.limits.scrubs, found.step)
        return more

    async def _bad_blocks(self, replica: Replica) -> tuple[list[int], Index]:
        """And what the numbers refer to."""
        opened = await self.load(replica)
        index = Index(opened.blocks.slice(0, replica.written.entries))
        bad: list[int] = await self._from_disk(
            replica, self._table.limits.scrubs, recovery.bad_blocks, self._table.disk, replica.path, index
        )
        return bad, index

    async def verify_frozen(self) -> None:
        """After a restart: reads back what was not sealed; each counts from then on."""
        async with trio.open_nursery() as nursery:
            for replica in self._table.frozen():
                nursery.start_soon(self._verify_quietly, replica)

    async def _verify_quietly(self, replica: Replica) -> None:
        try:
            await self.ensure_verified(replica)
        except DfsError as error:
            log.warning("cannot verify a replica", chunk=f"{replica.chunk:x}", reason=str(error))

    async def ensure_verified(self, replica: Replica) -> None:
        """Cuts a frozen replica to the prefix whose bytes are really on the disk, once; then it is reported.

        If it cannot be read it is reported as damaged, and IO is raised. Waits while this process is short of
        something: that says nothing of the replica. May be cancelled.
        """
        while replica.verifying is not None:
            await replica.verifying.wait()
        if replica.verified or replica.state is not ReplicaState.FROZEN:
            return
        finished = replica.verifying = trio.Event()
        try:
            bad, index = await self._bad_blocks_at_last(replica)
        except DfsError as error:
            replica.error = replica.error or error.code.name
            self._verified(replica)
            raise
        else:
            if bad and replica.state is ReplicaState.FROZEN:
                self._cut(replica, index, bad[0])
            self._verified(replica)
        finally:
            replica.verifying = None
            finished.set()

    async def _bad_blocks_at_last(self, replica: Replica) -> tuple[list[int], Index]:
        told = False
        while True:
            try:
                return await self._bad_blocks(replica)
            except DfsError as error:
                if error.code is not ErrorCode.UNAVAILABLE:
                    raise
                if not told:
                    log.warning("cannot verify a replica yet", chunk=f"{replica.chunk:x}", reason=error.text)
            told = True
            await trio.sleep(SHORTAGE_SECONDS)

    def _verified(self, replica: Replica) -> None:
        replica.verified = True
        if replica.state is ReplicaState.FROZEN:
            self._table.on_change(replica)

    def _cut(self, replica: Replica, index: Index, entries: int) -> None:
        """Forgets what follows; on disk it stays until the chunk is sealed."""
        log.warning("cut a replica before its first bad block", chunk=f"{replica.chunk:x}", entry=entries)
        replica.written = index.progress(entries, self._table.first_chain(replica.chunk))
        self._table.open_chunks.drop(replica.chunk)

"""Taking a sealed chunk from another chunkserver: everything is checked before the file gets its name."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias

from chunkserver import chunkfile
from chunkserver.chunkfile import ENTRY_BYTES, INDEX_OFFSET, MAX_ENTRIES, PAYLOAD_OFFSET, FormatError, Header
from chunkserver.client import Pool
from chunkserver.disk import File
from chunkserver.index import PAGE_ENTRIES, Index
from chunkserver.protocol import Peer, Progress
from chunkserver.recovery import COPYING_SUFFIX
from chunkserver.replica import Replica, ReplicaState
from chunkserver.salvage import Salvage
from chunkserver.store import Store
from chunkserver.table import FULL_ERRNOS, parent
from metaserver.errors import DfsError, ErrorCode

Data: TypeAlias = bytes | bytearray | memoryview
# Blocks of (chunk, index) from a logical offset on, before the end: their bytes, stored and logical lengths.
Fetch: TypeAlias = Callable[[int, Index, int, Progress], Awaitable[tuple[Data, int, int]]]

# One read from the peer; two such buffers at a time stay far below the memory bound.
READ_BYTES = 2 << 20
# A peer's disk may be busy with everybody's reads.
READ_SECONDS = 30.0


def _refusal(error: OSError) -> DfsError:
    code = ErrorCode.DISK_FULL if error.errno in FULL_ERRNOS else ErrorCode.DISK_FAILED
    return DfsError(code, f"cannot write the copy: {error.strerror}")


class _NotDurable(Exception):
    """The file is complete and synced, its name is not."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class Copier:
    """Copies into one store, from peers through ``pool``."""

    def __init__(self, store: Store, pool: Pool) -> None:
        self._store = store
        self._table = store.table
        self._pool = pool

    async def copy(
        self,
        source: Peer,
        chunk: int,
        length: int,
        entries: int,
        chain: int,
        *,
        others: Sequence[Peer] = (),
        replace: bool = False,
        makes_room: bool = False,
    ) -> Replica:
        """Brings chunk ``chunk``, sealed at exactly this point, here. A replica that was given up is replaced, with
        ``replace`` any but the right one, once the new one is complete; nothing happens if that is here already. With
        ``others``, no source is known to be whole: each block comes from whichever has it. ``makes_room`` as in
        :meth:`Table.require_space`.

        EXISTS if a different one is here, DISK_FULL, DISK_FAILED, and what reading raises: BAD_CHECKSUM,
        CHAIN_MISMATCH or WRONG_OFFSET for damage.
        """
        present = self._table.get(chunk)
        if present is not None and present.state is not ReplicaState.FAILED:
            same = (present.written.stored_length, present.written.chain) == (length, chain)
            if same and present.state is ReplicaState.SEALED and not present.error:
                return present
            if not replace:
                raise DfsError(ErrorCode.EXISTS, f"another replica of chunk {chunk:x} is here: delete it first")
        self._table.require_space(length + chunkfile.HEADER_BYTES + entries * ENTRY_BYTES, makes_room=makes_room)
        if others:
            salvage = Salvage(self._pool, [source, *others], chunk, self._in_thread)
            index = await salvage.index(length, entries, chain, self._table.first_chain(chunk))
            fetch: Fetch = salvage.fetch
        else:
            index = await self.fetch_index(source, chunk, length, entries, chain)
            fetch = partial(self._fetch, source)
        header = Header(
            self._table.cluster,
            chunk,
            self._table.now_ns(),
            chunkfile.FLAG_SEALED,
            length,
            entries,
            self._table.first_chain(chunk) if entries == 0 else chain,
        )

        async def fill(file: File) -> tuple[Index, Header]:
            await self._fill(fetch, file, index, chunk)
            return index, header

        return await self.make(chunk, fill)

    async def make(self, chunk: int, fill: Callable[[File], Awaitable[tuple[Index, Header]]]) -> Replica:
        """A new sealed replica: ``fill`` writes the payload of a file that gets its name only when it is complete and
        synced, and returns its index and header. Takes the place of the one that is there.

        DISK_FULL or DISK_FAILED if it cannot be written; nothing is left of it then, nor if ``fill`` raises. If only
        its name could not be synced, it has taken the place and is given up.
        """
        if self._table.disk_error:
            raise DfsError(ErrorCode.DISK_FAILED, self._table.disk_error)
        path = chunkfile.chunk_path(chunk)
        try:
            file: File = await self._in_thread(self._create, path + COPYING_SUFFIX)
            try:
                index, header = await fill(file)
                await self._in_thread(self._complete, file, index, header)
                present = self._table.get(chunk)
                await self._in_thread(self._finish, path, present.path if present else "")
            except BaseException:
                self._discard(path + COPYING_SUFFIX)
                raise
        except _NotDurable as error:
            self._give_up(self._made(chunk, index, header, ReplicaState.FROZEN), error.reason)
            raise _refusal(error.reason) from None
        except OSError as error:
            raise _refusal(error) from None
        self._table.open_chunks.drop(chunk)
        replica = self._made(chunk, index, header, ReplicaState.SEALED)
        self._store.adopt(replica)
        return replica

    def _made(self, chunk: int, index: Index, header: Header, state: ReplicaState) -> Replica:
        return Replica(chunk, state, header.created_ns, index.progress(len(index), header.sealed_chain))

    def _give_up(self, replica: Replica, reason: OSError) -> None:
        """Its name may be gone after a power cut. As with what was written here, nothing relies on it and nothing is
        thrown away: it may be the only one that is whole."""
        self._store.adopt(replica)
        self._table.give_up(replica, reason)

    async def fetch_index(self, source: Peer, chunk: int, length: int, entries: int, chain: int) -> Index:
        """The source's entries, as far as the chunk goes; CHAIN_MISMATCH if they are not this chunk's."""
        if entries > MAX_ENTRIES or length > chunkfile.PAYLOAD_CAPACITY:
            raise DfsError(ErrorCode.INVALID, "no chunk is that large")
        data = bytearray()
        while len(data) < entries * ENTRY_BYTES:
            have = len(data) // ENTRY_BYTES
            reply = await self._pool.read_index(source, chunk, have, min(PAGE_ENTRIES, entries - have))
            if not reply.entries or len(reply.entries) % ENTRY_BYTES:
                raise DfsError(ErrorCode.WRONG_OFFSET, "the source's replica is shorter")
            data += reply.entries
        try:
            chunkfile.check_entries(data, self._table.first_chain(chunk), 0)
        except FormatError as error:
            raise DfsError(ErrorCode.CHAIN_MISMATCH, f"the source's index is damaged: {error}") from None
        index = Index(data)
        end = index.progress(entries, self._table.first_chain(chunk))
        if end.stored_length != length or (entries and end.chain != chain):
            raise DfsError(ErrorCode.CHAIN_MISMATCH, "the source's replica is a different one")
        return index

    async def _fill(self, fetch: Fetch, file: File, index: Index, chunk: int) -> None:
        end = index.progress(len(index), 0)
        stored = logical = 0
        while logical < end.logical_length:
            data, stored_bytes, logical_bytes = await fetch(chunk, index, logical, end)
            await self._in_thread(file.write, [data], PAYLOAD_OFFSET + stored)
            stored += stored_bytes
            logical += logical_bytes

    async def _fetch(
        self, source: Peer, chunk: int, index: Index, logical: int, end: Progress
    ) -> tuple[bytes | bytearray | memoryview, int, int]:
        """Blocks from ``logical`` on: their bytes, and how many stored and logical bytes they are."""
        wanted = min(READ_BYTES, end.logical_length - logical)
        blocks = await self._pool.read(source, chunk, logical, wanted, timeout=READ_SECONDS)
        if not blocks.entries:
            raise DfsError(ErrorCode.WRONG_OFFSET, "the source's replica is shorter")
        expected = index.covering(logical, wanted, READ_BYTES + chunkfile.BLOCK_BYTES)
        sent = [entry.chain for entry in blocks.entries]
        ours = [entry.chain for entry in chunkfile.decode_entries(expected.entries)] if expected else []
        if sent != ours[: len(sent)] or blocks.entries[0].logical_offset != logical:
            raise DfsError(ErrorCode.CHAIN_MISMATCH, "the source sent other blocks than its index says")
        logical_bytes = sum(entry.logical_length for entry in blocks.entries)
        return blocks.payload, len(blocks.payload), logical_bytes

    def _create(self, path: str) -> File:
        with suppress(FileNotFoundError):
            self._table.disk.unlink(path)  # of an attempt before
        return self._table.disk.create(path)

    def _complete(self, file: File, index: Index, header: Header) -> None:
        file.truncate(PAYLOAD_OFFSET + header.sealed_length)
        file.write([index.slice(0, len(index))], INDEX_OFFSET)
        file.write([chunkfile.encode_header(header)], 0)
        self._table.disk.step("copy:before-sync")
        file.sync()

    def _finish(self, path: str, replaced: str) -> None:
        """``replaced``: the file of the replica that is there, perhaps under the same name."""
        disk = self._table.disk
        disk.step("copy:before-rename")
        disk.rename(path + COPYING_SUFFIX, path)
        disk.step("copy:before-directory-sync")
        try:
            disk.sync_directory(parent(path))
        except OSError as error:
            raise _NotDurable(error) from error
        if replaced and replaced != path:
            with suppress(OSError):  # with the chunk, or by the next start
                disk.unlink(replaced)

    def _discard(self, path: str) -> None:
        with suppress(OSError):  # then the next start removes it
            self._table.disk.unlink(path)

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await self._table.run_sync(
            function, *arguments, limiter=self._table.limits.changes, abandon_on_cancel=True
        )

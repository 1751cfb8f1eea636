"""`dfs ls`: the entries of a directory with what is stored of them, which `ls` cannot show. Gathered in slices."""

import stat
from itertools import islice

import trio

from metaserver import chunks, inodes
from metaserver.commit import Committer
from metaserver.errors import DfsError, ErrorCode
from metaserver.members import Members
from metaserver.protocol import ChunkState, EntryPage, StoredEntry
from metaserver.schema import ExtentRow, Listed, Table, Transaction, extent_key, inode_key, listing_key, read_u64

# Of one answer; and rows of a file's map between two turns of others.
PAGE_ENTRIES = 500
SLICE_EXTENTS = 500


class Listing:
    def __init__(self, committer: Committer, members: Members, default_copies: int) -> None:
        self._committer = committer
        self._members = members
        self._default_copies = default_copies

    async def page(self, ino: int, after: int, *, itself: bool) -> EntryPage:
        """Entries of a directory behind a cookie, in order of creation; an inode that is none, and with ``itself`` any,
        by itself. NOT_FOUND if it is gone."""
        inode, _ = self._committer.read(0, lambda tx: inodes.find(tx, ino))
        if inode is None:
            raise DfsError(ErrorCode.NOT_FOUND, f"there is no inode {ino}")
        if itself or not stat.S_ISDIR(inode.mode):
            return EntryPage([await self._entry(b"", ino)], 0)
        found, _ = self._committer.read(0, lambda tx: _listed(tx, ino, after))
        entries = [await self._entry(listed.name, listed.ino) for _, listed in found]
        return EntryPage([entry for entry in entries if entry.ino], found[-1][0] if len(found) == PAGE_ENTRIES else 0)

    async def _entry(self, name: bytes, ino: int) -> StoredEntry:
        """``ino`` 0 if it is gone meanwhile."""
        inode, _ = self._committer.read(0, lambda tx: inodes.find(tx, ino))
        if inode is None:
            return StoredEntry(name, 0, 0, 0, 0, 0, 0)
        wanted = inode.storage_class or self._default_copies
        entry = StoredEntry(name, ino, inode.mode, inode.size, inode.allocated, wanted, inode.mtime_ns)
        entry.own_copies = inode.storage_class
        if stat.S_ISREG(inode.mode):
            await self._add_chunks(entry)
        return entry

    async def _add_chunks(self, entry: StoredEntry) -> None:
        seen: set[int] = set()
        position: int | None = 0
        while position is not None:
            position, _ = self._committer.read(0, lambda tx, at=position: self._slice(tx, entry, seen, at))  # type: ignore[misc]
            await trio.lowlevel.checkpoint()
        entry.chunks = len(seen)

    def _slice(self, tx: Transaction, entry: StoredEntry, seen: set[int], position: int) -> int | None:
        rows = list(
            islice(tx.scan(Table.EXTENTS, extent_key(entry.ino, position), inode_key(entry.ino + 1)), SLICE_EXTENTS)
        )
        for _, value in rows:
            chunk = ExtentRow.unpack(value).chunk
            if chunk not in seen:
                entry.least_copies = (
                    min(entry.least_copies, self._good(tx, entry, chunk)) if seen else self._good(tx, entry, chunk)
                )
                seen.add(chunk)
        return read_u64(rows[-1][0], 8) + 1 if len(rows) == SLICE_EXTENTS else None

    def _good(self, tx: Transaction, entry: StoredEntry, chunk: int) -> int:
        """Good copies of a chunk on servers that are up; notes what else there is to say of it."""
        row = chunks.find(tx, chunk)
        members = self._members.by_id
        replicas = chunks.replicas(tx, chunk)
        good = sum(replica.good and server in members and members[server].up for server, replica in replicas)
        entry.missing += good == 0
        entry.too_few += row is not None and 0 < good < min(row.copies, entry.copies)
        entry.open += row is not None and row.state == ChunkState.OPEN
        return good


def _listed(tx: Transaction, ino: int, after: int) -> list[tuple[int, Listed]]:
    rows = islice(tx.scan(Table.LISTING, listing_key(ino, after + 1), inode_key(ino + 1)), PAGE_ENTRIES)
    return [(read_u64(key, 8), Listed.unpack(value)) for key, value in rows]

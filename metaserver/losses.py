"""Which files have lost data: asked for only when chunks are missing, and gathered in slices."""

from itertools import islice

import trio

from metaserver import chunks, removal
from metaserver.commit import Committer
from metaserver.members import Members
from metaserver.protocol import ROOT_INO, ChunkState, MissingFile
from metaserver.schema import (
    Chunk,
    Dentry,
    Inode,
    Listed,
    Table,
    Transaction,
    after,
    chunk_key,
    inode_key,
    key_u64,
    listing_key,
    read_u64,
)

# Files that are named; there is no need to read more to know that backups are needed.
MOST_FILES = 100
SLICE_ROWS = 500


class Losses:
    def __init__(self, committer: Committer, members: Members) -> None:
        self._committer = committer
        self._members = members

    async def find(self) -> list[MissingFile]:
        """At most :data:`MOST_FILES` files, with one of their paths each."""
        found: dict[int, int] = {}
        position = 0
        while len(found) < MOST_FILES:
            page, _ = self._committer.read(0, lambda tx, at=position: self._page(tx, at))  # type: ignore[misc]
            for chunk, inos in page:
                position = chunk + 1
                for ino in inos:
                    found[ino] = found.get(ino, 0) + 1
            if len(page) < SLICE_ROWS:
                break
            await trio.lowlevel.checkpoint()
        chosen = sorted(found)[:MOST_FILES]
        names = await self._names(set(chosen))
        return [MissingFile(ino, self._path(names, ino), found[ino]) for ino in chosen]

    def _page(self, tx: Transaction, position: int) -> list[tuple[int, list[int]]]:
        rows = islice(tx.scan(Table.CHUNKS, chunk_key(position), b"\xff" * 9), SLICE_ROWS)
        page = [(read_u64(key), Chunk.unpack(value)) for key, value in rows]
        return [
            (chunk, sorted(removal.files_in(tx, chunk)) if self._lost(tx, chunk, row) else []) for chunk, row in page
        ]

    def _lost(self, tx: Transaction, chunk: int, row: Chunk) -> bool:
        if row.state == ChunkState.DEAD or not row.live:
            return False
        members = self._members.by_id
        return not any(
            replica.good and server in members and members[server].up for server, replica in chunks.replicas(tx, chunk)
        )

    async def _names(self, wanted: set[int]) -> dict[int, tuple[int, bytes]]:
        """One parent and name for each of these inodes."""
        names: dict[int, tuple[int, bytes]] = {}
        position = b""
        while wanted - names.keys():
            rows, _ = self._committer.read(
                0,
                lambda tx, at=position: list(islice(tx.scan(Table.DENTRIES, at, b"\xff" * 300), SLICE_ROWS)),  # type: ignore[misc]
            )
            for key, value in rows:
                ino = Dentry.unpack(value).ino
                if ino in wanted:
                    names.setdefault(ino, (read_u64(key), key[8:]))
            if len(rows) < SLICE_ROWS:
                break
            position = rows[-1][0] + b"\0"
            await trio.lowlevel.checkpoint()
        return names

    def _path(self, names: dict[int, tuple[int, bytes]], ino: int) -> str:
        if ino not in names:
            return ""
        parent, name = names[ino]
        parts = [name]
        while parent != ROOT_INO:
            above, _ = self._committer.read(0, lambda tx, directory=parent: _name_of(tx, directory))  # type: ignore[misc]
            if above is None:
                return ""
            parent, name = above
            parts.append(name)
        return "/" + b"/".join(reversed(parts)).decode(errors="backslashreplace")


def _name_of(tx: Transaction, directory: int) -> tuple[int, bytes] | None:
    """Parent and name of a directory, which has one name only."""
    row = tx.get(Table.INODES, inode_key(directory))
    if row is None:
        return None
    parent = Inode.unpack(row).parent
    for _, value in tx.scan(Table.LISTING, listing_key(parent, 0), after(key_u64(parent))):
        entry = Listed.unpack(value)
        if entry.ino == directory:
            return parent, entry.name
    return None

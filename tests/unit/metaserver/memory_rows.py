"""A ``schema.Transaction`` over a sorted dict, for the pure parts; and a check of what must always hold of its rows."""

from collections import Counter, defaultdict
from collections.abc import Iterator

from sortedcontainers import SortedDict

from metaserver import trees
from metaserver.overlay import row_key
from metaserver.protocol import ChunkState
from metaserver.schema import (
    Chunk,
    Dentry,
    ExtentRow,
    IdKind,
    Inode,
    Listed,
    Table,
    listing_key,
    parse_by_chunk_key,
    read_u64,
)


class MemoryRows:
    """All rows of all tables; no atomicity: a test that provokes an error copies first."""

    def __init__(self) -> None:
        self.tables: dict[Table, SortedDict] = defaultdict(SortedDict)
        self.next_ids: dict[IdKind, int] = {IdKind.INODE: 2, IdKind.CHUNK: 1, IdKind.SESSION: 1, IdKind.TASK: 1}

    def get(self, table: Table, key: bytes) -> bytes | None:
        return self.tables[table].get(key)

    def put(self, table: Table, key: bytes, value: bytes) -> None:
        self.tables[table][key] = value

    def delete(self, table: Table, key: bytes) -> None:
        self.tables[table].pop(key, None)

    def scan(self, table: Table, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
        rows = self.tables[table]
        return ((key, rows[key]) for key in rows.irange(start, stop, (True, False)))

    def scan_back(self, table: Table, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
        rows = self.tables[table]
        return ((key, rows[key]) for key in rows.irange(start, stop, (True, False), reverse=True))

    def allocate(self, kind: IdKind) -> int:
        number = self.next_ids[kind]
        self.next_ids[kind] += 1
        return number

    def copy(self) -> "MemoryRows":
        other = MemoryRows()
        for table, rows in self.tables.items():
            other.tables[table] = SortedDict(rows)
        other.next_ids = dict(self.next_ids)
        return other

    def sum_trees(self) -> None:
        """TREES as a checkpoint would have written it."""
        self.tables[Table.TREES].clear()
        rows = {row_key(Table.INODES, key): value for key, value in self.tables[Table.INODES].items()}
        sums = trees.changed(rows, lambda _: None)
        self.tables[Table.TREES].update({key[1:]: value for key, value in sums.items() if value is not None})

    # -- invariants ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        self._check_names()
        self.check_extents()

    def _check_names(self) -> None:
        inodes = {read_u64(key): Inode.unpack(value) for key, value in self.tables[Table.INODES].items()}
        links: Counter[int] = Counter()
        subdirectories: Counter[int] = Counter()
        for key, value in self.tables[Table.DENTRIES].items():
            dentry, parent = Dentry.unpack(value), read_u64(key)
            links[dentry.ino] += 1
            assert inodes[dentry.ino].mode >> 12 == dentry.type
            listed = Listed.unpack(self.tables[Table.LISTING][listing_key(parent, dentry.cookie)])
            assert (listed.ino, listed.type, listed.name) == (dentry.ino, dentry.type, key[8:])
            assert 0 < dentry.cookie < inodes[parent].next_cookie
            if dentry.type == 4:
                subdirectories[parent] += 1
                assert inodes[dentry.ino].parent == parent
        assert len(self.tables[Table.LISTING]) == len(self.tables[Table.DENTRIES])
        orphans = {read_u64(key) for key in self.tables[Table.ORPHANS]}
        for ino, inode in inodes.items():
            if inode.mode >> 12 == 4:
                expected = 2 + subdirectories[ino] if links[ino] or ino == 1 else 0
            else:
                expected = links[ino]
            assert inode.nlink == expected, (ino, inode)
            assert inode.nlink or ino in orphans or self.tables[Table.TASKS]

    def check_extents(self) -> None:
        live: Counter[int] = Counter()
        allocated: Counter[int] = Counter()
        mirrored = {}
        previous = None
        for key, value in self.tables[Table.EXTENTS].items():
            ino, offset, row = read_u64(key), read_u64(key, 8), ExtentRow.unpack(value)
            assert row.length > 0
            if previous is not None and previous[0] == ino:
                _, end, chunk, chunk_end = previous
                assert end <= offset
                assert (end, chunk, chunk_end) != (offset, row.chunk, row.chunk_offset), "neighbours not merged"
            previous = (ino, offset + row.length, row.chunk, row.chunk_offset + row.length)
            mirrored[(row.chunk, row.chunk_offset, ino, offset)] = row.length
            live[row.chunk] += row.length
            allocated[ino] += row.length
        by_chunk = {parse_by_chunk_key(k): read_u64(v) for k, v in self.tables[Table.BY_CHUNK].items()}
        assert by_chunk == mirrored
        for key, value in self.tables[Table.CHUNKS].items():
            chunk = Chunk.unpack(value)
            assert chunk.live == live[read_u64(key)]
            if chunk.state == ChunkState.SEALED:
                assert chunk.live
            if chunk.state == ChunkState.DEAD:
                assert not chunk.live
        for key, value in self.tables[Table.INODES].items():
            assert Inode.unpack(value).allocated == allocated[read_u64(key)]

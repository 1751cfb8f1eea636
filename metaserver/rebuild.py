"""The last resort: a new metaserver from what chunkservers have, when store, log, snapshots and backups are all gone.

Names, owners, times, links and empty files are lost with the metaserver. What comes back is the contents: each inode
that some index entry names becomes a regular file ``/recovered/NUMBER``. How entries are put in order, and what that
cannot know, is said in ``salvage.py``.

The new data directory is complete only with its ``identity.json``, which is written last: interrupted before, a rebuild
is run again and starts from nothing. Steps announced to crash tests: ``rebuild:before-collecting``,
``rebuild:before-files``, ``rebuild:before-chunks``, ``rebuild:before-log``, ``rebuild:before-identity``,
``rebuild:after-identity``.
"""

import os
import shutil
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path

import msgspec
import trio

from metaserver import identity
from metaserver.changelog import segment_name
from metaserver.check import check
from metaserver.files import Files, sync_file
from metaserver.identity import DataDirectoryError
from metaserver.ids import limit_key
from metaserver.inodes import new_inode
from metaserver.key import ClusterKey, save_key
from metaserver.logrecord import FIRST_RECORD, Position, SegmentHeader
from metaserver.overlay import row_key
from metaserver.protocol import ROOT_INO, ChunkState, ReplicaState
from metaserver.salvage import BLOCK_RECORD_BYTES, Block, Choice, Found, Piece, blocks_of, lay_over
from metaserver.schema import (
    BOOT,
    KEPT_CHUNKS,
    Boot,
    Chunk,
    Dentry,
    ExtentRow,
    IdKind,
    Inode,
    Listed,
    Replica,
    Server,
    Table,
    after,
    by_chunk_key,
    by_server_key,
    chunk_key,
    dentry_key,
    extent_key,
    inode_key,
    key_u64,
    listing_key,
    read_u64,
    replica_key,
    server_key,
)
from metaserver.snapshot import make_snapshot
from metaserver.sorting import Sorter
from metaserver.start import (
    CHANGELOG_NAME,
    LOCK_NAME,
    SNAPSHOTS_NAME,
    STORE_NAME,
    lock_directory,
    position_rows,
    survived_rows,
    write_growing,
)
from metaserver.store import CorruptStore, Store, create_store
from metaserver.survey import ChunkFound, Survey, open_survey
from metaserver.transaction import ViewTransaction

WORK_NAME = "rebuild.new"
DIRECTORY = b"recovered"
# Rows written at a time: bounds memory.
BATCH_ROWS = 100_000
# Ids skipped past the highest seen: what nobody has seen may have been given out as well.
SKIPPED_IDS = 1 << 24
# So many chunks are named in the report.
NAMED_CHUNKS = 20
# What may lie in a directory that is to be rebuilt into.
_HARMLESS = frozenset({"lost+found", LOCK_NAME, "cluster.key", "cluster.key.new", "identity.json.new"})
_OURS = frozenset({STORE_NAME, f"{STORE_NAME}-lock", CHANGELOG_NAME, SNAPSHOTS_NAME})

# Told now and then how far it is: chunks, entries.
Progress = Callable[[str], None]


class Owner(msgspec.Struct, frozen=True):
    """What recovered files get, since nobody knows what they had."""

    uid: int = 0
    gid: int = 0
    mode: int = 0o600


class RebuildReport(msgspec.Struct):
    """What was found. ``doubtful`` chunks have no replica without fault; ``unreadable`` ones not even an index.
    ``unused``: everything in them was overwritten, so that they are not in the new store. Chunks are given by id."""

    servers: list[str] = []
    files: int = 0
    bytes: int = 0
    extents: int = 0
    chunks: int = 0
    entries: int = 0
    empty: int = 0
    unused: int = 0
    doubtful: list[int] = []
    unreadable: list[int] = []
    bad_replicas: int = 0
    single: int = 0
    seconds: float = 0.0
    directory: str = ""


async def rebuild(
    directory: Path,
    key: ClusterKey,
    addresses: Iterable[tuple[str, int]],
    *,
    copies: int = 2,
    owner: Owner | None = None,
    progress: Progress = lambda text: None,
    files: Files | None = None,
) -> RebuildReport:
    """Makes ``directory`` the data directory of a new metaserver of the same cluster.

    Raises ``DataDirectoryError`` if there is something in it, ``DirectoryBusy``, ``SurveyError``, or ``OSError``; then
    it can be run again. Cancelling is safe.
    """
    files = files or Files()
    _prepare(directory)
    lock = lock_directory(directory)
    try:
        work = directory / WORK_NAME
        _clear(directory)
        work.mkdir(mode=0o700)
        files.step("rebuild:before-collecting")
        async with open_survey(key, addresses) as survey:
            builder = _Builder(directory, survey, copies, owner or Owner(), progress, files)
            await builder.collect()
            await trio.to_thread.run_sync(builder.finish, key)
        return builder.report
    finally:
        os.close(lock)


async def dry_run(
    scratch: Path, key: ClusterKey, addresses: Iterable[tuple[str, int]], progress: Progress = lambda text: None
) -> RebuildReport:
    """What :func:`rebuild` would find; ``scratch`` is an empty directory for sorting."""
    async with open_survey(key, addresses) as survey:
        collection = _Collection(survey, scratch, progress)
        async for _ in collection.chunks():
            pass
        live = set[int]()
        for _, pieces in groupby(collection.pieces(), key=lambda piece: piece.ino):
            live.update(collection.count(pieces))
        collection.report.unused = collection.report.chunks - len(live)
        return collection.report


def describe(report: RebuildReport) -> list[str]:
    """For people: what was found, what is missing, and what to do next."""
    made = bool(report.directory)
    lines = [
        f"asked {len(report.servers)} chunkservers: {', '.join(report.servers)}",
        f"{'recovered' if made else 'would recover'} {report.files} files with {report.bytes} bytes"
        f" in {report.extents} extents, from {report.entries} blocks in {report.chunks} chunks",
    ]
    if report.empty:
        lines.append(f"{report.empty} chunks are empty")
    if report.unused:
        lines.append(f"{report.unused} chunks contain only what was overwritten; they stay where they are")
    if report.bad_replicas:
        lines.append(f"{report.bad_replicas} replicas are damaged or too short")
    if report.single:
        lines.append(f"{report.single} chunks have one replica only; they are copied once the metaserver runs")
    if report.doubtful:
        lines.append(f"DAMAGED: {len(report.doubtful)} chunks have no replica without fault: {_named(report.doubtful)}")
    if report.unreadable:
        lines.append(f"LOST: {len(report.unreadable)} chunks have no readable index: {_named(report.unreadable)}")
    if made:
        lines += [
            f"the files are in {report.directory}, named by inode number; start the metaserver, then `dfs check`",
            "a chunkserver that was not asked may have more: nothing on it is deleted, so rebuild again with it",
        ]
    return lines


def _named(chunks: list[int]) -> str:
    names = ", ".join(f"{chunk:x}" for chunk in chunks[:NAMED_CHUNKS])
    return names + (", ..." if len(chunks) > NAMED_CHUNKS else "")


def _prepare(directory: Path) -> None:
    """Refuses a directory that has anything in it but what an interrupted rebuild left."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    present = {entry.name for entry in directory.iterdir()}
    if identity.FILE in present:
        raise DataDirectoryError(f"{directory} is a metaserver's data directory already: give an empty one")
    harmless = _HARMLESS | {WORK_NAME} | (_OURS if WORK_NAME in present else set())
    if others := sorted(present - harmless):
        raise DataDirectoryError(f"{directory} is not empty ({others[0]}): give an empty directory")


def _clear(directory: Path) -> None:
    """Removes what an interrupted rebuild left; its working directory, which says whose that is, last."""
    if (directory / WORK_NAME).exists():
        for name in _OURS:
            path = directory / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        shutil.rmtree(directory / WORK_NAME)


class _Collection:
    """Chunks as they are found, and their blocks, sorted as files need them."""

    def __init__(self, survey: Survey, scratch: Path, progress: Progress) -> None:
        self._survey = survey
        self._progress = progress
        self._blocks = Sorter(scratch, BLOCK_RECORD_BYTES)
        self._told = 0.0
        self.report = RebuildReport(servers=[server.name for server in survey.servers])
        self.highest_ino = ROOT_INO
        self.highest_session = 0
        self.highest_chunk = survey.highest_chunk

    async def chunks(self) -> AsyncIterator[tuple[int, dict[int, Found], Choice]]:
        """Those that files can be made of."""
        async for batch in self._survey.chunks():
            for found in batch:
                self.highest_chunk = max(self.highest_chunk, found.chunk)
                if found.choice is None:
                    self._pass_over(found)
                else:
                    self._take(found, found.choice)
                    yield found.chunk, found.found, found.choice
            self._tell(f"{self.report.chunks} chunks, {self.report.entries} blocks read")

    def _pass_over(self, found: ChunkFound) -> None:
        if found.empty:
            self.report.empty += 1
        else:
            self.report.unreadable.append(found.chunk)

    def _take(self, found: ChunkFound, choice: Choice) -> None:
        report = self.report
        report.chunks += 1
        if not choice.good:
            report.doubtful.append(found.chunk)
        bad = sum(state is ReplicaState.BAD for state in choice.states.values())
        report.bad_replicas += bad
        report.single += len(choice.states) - bad == 1
        for block in blocks_of(found.chunk, choice, found.entries):
            report.entries += 1
            self.highest_ino = max(self.highest_ino, block.ino)
            self.highest_session = max(self.highest_session, block.session)
            self._blocks.add(block.pack())

    def pieces(self) -> Iterator[Piece]:
        """The extents of all files, in order."""
        return lay_over(Block.unpack(record) for record in self._blocks.sorted())

    def count(self, pieces: Iterable[Piece]) -> Iterator[int]:
        """Counts a file; yields the chunks of its extents."""
        self.report.files += 1
        for piece in pieces:
            self.report.extents += 1
            self.report.bytes += piece.length
            yield piece.chunk
        self._tell(f"{self.report.files} files, {self.report.extents} extents")

    def _tell(self, text: str) -> None:
        now = time.monotonic()
        if now - self._told > 0.2:
            self._told = now
            self._progress(text)


class _Builder:
    """Fills the working directory, and puts its contents in place."""

    def __init__(
        self, directory: Path, survey: Survey, copies: int, owner: Owner, progress: Progress, files: Files
    ) -> None:
        self._began = time.monotonic()
        self._directory = directory
        self._work = directory / WORK_NAME
        self._survey = survey
        self._copies = copies
        self._owner = owner
        self._files = files
        self._rows: dict[bytes, bytes | None] = {}
        self._live: dict[int, int] = {}
        self._collection = _Collection(survey, self._work, progress)
        create_store(self._work / STORE_NAME)
        self._store = Store.open(self._work / STORE_NAME)
        self._now_ns = time.time_ns()

    @property
    def report(self) -> RebuildReport:
        return self._collection.report

    async def collect(self) -> None:
        """Servers, chunks and replicas as rows; the blocks in runs to be sorted."""
        for server in self._survey.servers:
            # The rest is said when it registers.
            row = Server(server.name, server.peer.host, server.peer.port, 0, "", [], server.data_path, 0)
            self._put(Table.SERVERS, server_key(server.server), row.pack())
        async for chunk, found, choice in self._collection.chunks():
            self._put(Table.CHUNKS, chunk_key(chunk), self._chunk_row(choice).pack())
            for server_number, one in found.items():
                replica = Replica(choice.states[server_number], 0, one.length, one.entries, one.chain)
                self._put(Table.REPLICAS, replica_key(chunk, server_number), replica.pack())
                self._put(Table.BY_SERVER, by_server_key(server_number, chunk), b"")

    def _chunk_row(self, choice: Choice) -> Chunk:
        version = choice.version
        return Chunk(
            state=ChunkState.SEALED,
            kind=0,
            layout=0,
            copies=self._copies,
            length=version.length,
            entries=version.entries,
            chain=version.chain,
            live=0,
            owner=0,
            created_ns=choice.created_ns,
            storage_class=0,
        )

    def finish(self, key: ClusterKey) -> None:
        """The rest; blocking."""
        try:
            self._files.step("rebuild:before-files")
            self._make_files()
            self._files.step("rebuild:before-chunks")
            self._settle_chunks()
            position = Position(self._survey.highest_epoch + 2, 0)
            self._make_counters(position)
            self._verify()
            snapshots = self._work / SNAPSHOTS_NAME
            snapshots.mkdir(mode=0o700)
            make_snapshot(self._store, snapshots, self._files)
        finally:
            self._store.close()
        self._files.step("rebuild:before-log")
        self._make_log(position)
        self._put_in_place(key)
        self.report.seconds = time.monotonic() - self._began

    # -- rows --------------------------------------------------------------------------------------------------------

    def _put(self, table: Table, key: bytes, value: bytes | None) -> None:
        self._rows[row_key(table, key)] = value
        if len(self._rows) >= BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        write_growing(self._store, self._rows)
        self._rows = {}

    def _make_files(self) -> None:
        """Everything below the root. The directory gets the first number that no file can have."""
        directory = self._collection.highest_ino + SKIPPED_IDS
        cookie = 0
        for ino, pieces in groupby(self._collection.pieces(), key=lambda piece: piece.ino):
            cookie += 1
            self._make_file(ino, pieces)
            self._name(directory, b"%d" % ino, cookie, ino, stat.S_IFREG)
        root = self._new_inode(stat.S_IFDIR | 0o755, nlink=3, parent=ROOT_INO)
        root.next_cookie = 2
        recovered = self._new_inode(stat.S_IFDIR | 0o700, nlink=2, parent=ROOT_INO)
        recovered.next_cookie = cookie + 1
        recovered.uid, recovered.gid = self._owner.uid, self._owner.gid
        self._put(Table.INODES, inode_key(ROOT_INO), root.pack())
        self._put(Table.INODES, inode_key(directory), recovered.pack())
        self._name(ROOT_INO, DIRECTORY, 1, directory, stat.S_IFDIR)
        self._flush()
        self.report.directory = f"/{DIRECTORY.decode()}"

    def _new_inode(self, mode: int, *, nlink: int = 1, parent: int = 0) -> Inode:
        return new_inode(mode, 0, 0, self._now_ns, nlink=nlink, parent=parent)

    def _name(self, parent: int, name: bytes, cookie: int, ino: int, kind: int) -> None:
        self._put(Table.DENTRIES, dentry_key(parent, name), Dentry(ino, cookie, kind >> 12).pack())
        self._put(Table.LISTING, listing_key(parent, cookie), Listed(ino, kind >> 12, name).pack())

    def _make_file(self, ino: int, pieces: Iterable[Piece]) -> None:
        """One inode and its extents; nothing is known of its end but where its last block ends."""
        inode = self._new_inode(stat.S_IFREG | self._owner.mode)
        inode.uid, inode.gid, inode.data_version = self._owner.uid, self._owner.gid, 1
        newest = 0

        def noted() -> Iterator[Piece]:
            nonlocal newest
            for piece in pieces:
                inode.allocated += piece.length
                inode.size = piece.offset + piece.length
                newest = max(newest, piece.created_ns)
                self._live[piece.chunk] = self._live.get(piece.chunk, 0) + piece.length
                row = ExtentRow(piece.length, piece.chunk, piece.chunk_offset)
                self._put(Table.EXTENTS, extent_key(ino, piece.offset), row.pack())
                key = by_chunk_key(piece.chunk, piece.chunk_offset, ino, piece.offset)
                self._put(Table.BY_CHUNK, key, key_u64(piece.length))
                yield piece

        for _ in self._collection.count(noted()):
            pass
        if newest:
            inode.mtime_ns = newest
        self._put(Table.INODES, inode_key(ino), inode.pack())

    def _settle_chunks(self) -> None:
        """Notes what is live in each chunk; one in which nothing is stays out of the store, and on its servers."""
        position = 0
        while True:
            rows = self._store.scan(row_key(Table.CHUNKS, chunk_key(position)), row_key(Table.CHUNKS, b"\xff" * 9))
            page = [(read_u64(key, 1), Chunk.unpack(value)) for key, value in islice(rows, BATCH_ROWS // 4)]
            if not page:
                return
            for number, row in page:
                row.live = self._live.get(number, 0)
                if row.live:
                    self._put(Table.CHUNKS, chunk_key(number), row.pack())
                else:
                    self._leave_out(number)
            self._flush()
            position = page[-1][0] + 1

    def _leave_out(self, chunk: int) -> None:
        self.report.unused += 1
        start = row_key(Table.REPLICAS, key_u64(chunk))
        for key, _ in list(self._store.scan(start, after(start))):
            server = int.from_bytes(key[-4:], "big")
            self._put(Table.BY_SERVER, by_server_key(server, chunk), None)
            self._put(Table.REPLICAS, replica_key(chunk, server), None)
        self._put(Table.CHUNKS, chunk_key(chunk), None)

    def _make_counters(self, position: Position) -> None:
        """Epoch and ids past everything that anybody may have seen. Nothing is waited for: no session is known."""
        collection = self._collection
        highest = {
            IdKind.INODE: collection.highest_ino + SKIPPED_IDS,
            IdKind.CHUNK: collection.highest_chunk,
            IdKind.SESSION: collection.highest_session,
            IdKind.TASK: 0,
        }
        limits = {kind: number + SKIPPED_IDS for kind, number in highest.items()}
        self._rows.update({limit_key(kind): key_u64(limit) for kind, limit in limits.items()})
        self._put(Table.COUNTERS, KEPT_CHUNKS, key_u64(limits[IdKind.CHUNK]))
        self._put(Table.COUNTERS, BOOT, Boot(b"\xff" * 16, True, False).pack())
        self._rows.update(position_rows(position, self._now_ns))
        self._rows.update(survived_rows({}, {position.epoch: 0})[1])
        self._flush()

    def _verify(self) -> None:
        for _ in self._store.verify():
            pass
        problems = check(ViewTransaction(self._store))
        if problems:
            worst = problems[0]
            raise CorruptStore(f"the rebuilt store is wrong: {worst.table} {worst.key}: {worst.text}")

    # -- files -------------------------------------------------------------------------------------------------------

    def _make_log(self, position: Position) -> None:
        """A log that goes on from the store. It names an epoch before it, so that it never counts as complete."""
        log = self._work / CHANGELOG_NAME
        log.mkdir(mode=0o700)
        header = SegmentHeader(1, position.epoch, Position(position.epoch - 1, 0), FIRST_RECORD)
        self._files.close(self._files.create(log / segment_name(1), header.pack(), FIRST_RECORD))

    def _put_in_place(self, key: ClusterKey) -> None:
        sync_file(self._work / STORE_NAME)
        for name in (STORE_NAME, CHANGELOG_NAME, SNAPSHOTS_NAME):
            os.rename(self._work / name, self._directory / name)
        if not (self._directory / "cluster.key").exists():
            save_key(self._directory / "cluster.key", key)
        self._files.sync_directory(self._directory)
        self._files.step("rebuild:before-identity")
        identity.create(self._directory, self._survey.cluster_id)
        self._files.step("rebuild:after-identity")
        shutil.rmtree(self._work)

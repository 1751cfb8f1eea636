"""A new metaserver from what chunkservers have: real nodes and sockets, everything else gone."""

import os
from pathlib import Path

import pytest
from chunkserver_harness import CLUSTER, KEY, Started, StartNode, Writer

from chunkserver.chunkfile import PAYLOAD_OFFSET
from chunkserver.client import Pool
from chunkserver.protocol import Peer
from metaserver import identity, rebuild
from metaserver.commit import open_committer
from metaserver.files import Files
from metaserver.identity import DataDirectoryError
from metaserver.key import ClusterKey, load_key
from metaserver.offline import check_directory
from metaserver.protocol import ReplicaState
from metaserver.rebuild import RebuildReport, describe
from metaserver.recover import recover
from metaserver.schema import (
    Dentry,
    ExtentRow,
    IdKind,
    Inode,
    Replica,
    Table,
    Transaction,
    after,
    inode_key,
    parse_replica_key,
    read_u64,
)
from metaserver.store import CorruptStore
from metaserver.survey import SurveyError

INO = 1000
GOOD, UNSURE, BAD = ReplicaState.GOOD, ReplicaState.UNSURE, ReplicaState.BAD
STEPS = ("before-collecting", "before-files", "before-chunks", "before-log", "before-identity", "after-identity")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where the new metaserver is to be."""
    return tmp_path / "metaserver" / "data"


async def write(
    pool: Pool, servers: list[Started], chunk: int, ino: int, data: bytes, *, session: int = 3, seal: bool = True
) -> Writer:
    """A synced chunk with one file's data, perhaps sealed."""
    writer = Writer(chunk, ino=ino, session=session)
    first, *others = [started.peer for started in servers]
    reply = await writer.send(pool, first, data, forward_to=tuple(others), sync=True)
    assert reply.failures == ()
    for started in servers if seal else ():
        await started.store.seal(chunk, writer.offset, writer.index, writer.chain)
    return writer


async def build(directory: Path, servers: list[Started], files: Files | None = None) -> RebuildReport:
    addresses = [(started.peer.host, started.peer.port) for started in servers]
    return await rebuild.rebuild(directory, KEY, addresses, files=files, owner=rebuild.Owner(7, 8, 0o640))


class Rebuilt:
    """What the rebuilt metaserver says, and what its chunks then contain."""

    def __init__(self, tx: Transaction) -> None:
        rows = tx.scan(Table.INODES, b"", b"\xff" * 9)
        self.inodes = {read_u64(key): Inode.unpack(value) for key, value in rows}
        self.extents = {ino: self._extents(tx, ino) for ino in self.inodes}
        rows = tx.scan(Table.DENTRIES, b"", b"\xff" * 300)
        self.names = {key[8:]: Dentry.unpack(value).ino for key, value in rows}
        rows = tx.scan(Table.REPLICAS, b"", b"\xff" * 13)
        self.replicas = {parse_replica_key(key): ReplicaState(Replica.unpack(value).state) for key, value in rows}

    def _extents(self, tx: Transaction, ino: int) -> list[tuple[int, ExtentRow]]:
        rows = tx.scan(Table.EXTENTS, inode_key(ino), after(inode_key(ino)))
        return [(read_u64(key, 8), ExtentRow.unpack(value)) for key, value in rows]

    async def content(self, ino: int, servers: list[Started], pool: Pool) -> bytes:
        peers = {started.peer.server: started.peer for started in servers}
        content = bytearray(self.inodes[ino].size)
        for offset, row in self.extents[ino]:
            have = [server for chunk, server in self.replicas if chunk == row.chunk]
            server = min(have, key=lambda server: self.replicas[row.chunk, server] is BAD)
            content[offset : offset + row.length] = await read_range(pool, peers[server], row)
        return bytes(content)


async def read_range(pool: Pool, peer: Peer, row: ExtentRow) -> bytes:
    data = bytearray()
    while len(data) < row.length:
        at = row.chunk_offset + len(data)
        blocks = await pool.read(peer, row.chunk, at, row.length - len(data))
        skip = at - blocks.entries[0].logical_offset
        data += bytes(blocks.payload)[skip : skip + row.length - len(data)]
    return bytes(data)


async def look(directory: Path, *, recovered: bool = False) -> Rebuilt:
    """Starts a storage engine on the directory, and checks it."""
    assert check_directory(directory).problems == []
    async with open_committer(directory) as committer:
        assert (await committer.check()).problems == []
        # Nobody has anything to send again: there is no session.
        assert committer.boot_lost_tail == recovered
        assert committer.id_limit(IdKind.INODE) > INO + rebuild.SKIPPED_IDS
        assert committer.id_limit(IdKind.SESSION) > rebuild.SKIPPED_IDS
        return committer.read(0, Rebuilt)[0]


async def test_files_come_back(start_node: StartNode, pool: Pool, directory: Path) -> None:
    """One file in several chunks, one that was overwritten by a later session, one that is not sealed anywhere."""
    async with start_node("a") as a, start_node("b") as b:
        both = [a, b]
        old, new, small = os.urandom(300_000), os.urandom(100_000), os.urandom(5_000)
        await write(pool, both, 10, INO, old)
        await write(pool, both, 11, INO, new, session=4)
        await write(pool, [b], 12, INO + 1, small, seal=False)
        for started in both:
            started.node.identity.highest_epoch = 40
        report = await build(directory, both)
        assert (report.files, report.bytes, report.chunks) == (2, 305_000, 3)
        assert (report.doubtful, report.unreadable, report.single) == ([], [], 1)
        assert load_key(directory / "cluster.key").http_token == KEY.http_token
        assert identity.open_directory(directory).cluster_id == str(CLUSTER)
        found = await look(directory)
        assert await found.content(INO, both, pool) == new + old[100_000:]
        assert await found.content(INO + 1, both, pool) == small
    assert set(found.names) == {b"recovered", b"%d" % INO, b"%d" % (INO + 1)}
    inode = found.inodes[INO]
    assert (inode.mode, inode.uid, inode.gid, inode.nlink) == (0o100640, 7, 8, 1)
    assert inode.mtime_ns < inode.ctime_ns
    assert set(found.replicas.values()) == {GOOD}
    async with open_committer(directory) as committer:
        assert committer.epoch > 40
    text = "\n".join(describe(report))
    assert "recovered 2 files with 305000 bytes" in text
    assert "DAMAGED" not in text
    with pytest.raises(DataDirectoryError, match="already"):
        await build(directory, [])


async def test_it_can_be_recovered_like_any_other(start_node: StartNode, pool: Pool, directory: Path) -> None:
    async with start_node("a") as a:
        await write(pool, [a], 10, INO, b"x" * 1000)
        await build(directory, [a])
        (directory / "data.mdb").unlink()
        recover(directory)
        assert (await (await look(directory, recovered=True)).content(INO, [a], pool)) == b"x" * 1000
    (directory / "data.mdb").unlink()
    for snapshot in (directory / "snapshots").iterdir():
        snapshot.unlink()
    with pytest.raises(CorruptStore, match="no snapshot file is whole"):
        recover(directory)


async def test_a_replica_that_is_short_or_damaged(
    start_node: StartNode, pool: Pool, directory: Path, damaged: set[str]
) -> None:
    damaged.add("a")
    async with start_node("a") as a, start_node("b") as b:
        data = os.urandom(200_000)
        # Ahead of the other: appended to one only.
        writer = await write(pool, [a, b], 10, INO, data[:150_000], seal=False)
        await writer.send(pool, b.peer, data[150_000:])
        # Bad on one disk, which is noticed when what a restart froze is read back.
        await write(pool, [a, b], 11, INO + 1, data, seal=False)
        with (a.path / "chunks/0b/000000000000000b").open("r+b") as file:
            file.seek(PAYLOAD_OFFSET + 70_000)
            file.write(b"wrong")
    async with start_node("a") as a, start_node("b") as b:
        report = await build(directory, [a, b])
        assert report.bad_replicas == 2
        found = await look(directory)
        a_server, b_server = a.peer.server, b.peer.server
        assert found.replicas == {
            (10, a_server): BAD, (10, b_server): GOOD, (11, a_server): BAD, (11, b_server): GOOD,
        }  # fmt: skip
        for ino in (INO, INO + 1):
            assert await found.content(ino, [a, b], pool) == data


async def test_an_index_that_cannot_be_read_is_reported(
    start_node: StartNode, pool: Pool, directory: Path, damaged: set[str]
) -> None:
    damaged.update("ab")
    async with start_node("a") as a, start_node("b") as b:
        await write(pool, [a, b], 10, INO, b"a" * 200_000)
        await write(pool, [a], 11, INO + 1, b"b" * 200_000)
        await write(pool, [a, b], 12, INO + 2, b"c" * 200_000)
    for path in (a.path / "chunks/0a/000000000000000a", a.path / "chunks/0b/000000000000000b"):
        with path.open("r+b") as file:
            file.seek(4096 + 70)
            file.write(b"wrong")
    async with start_node("a") as a, start_node("b") as b:
        report = await build(directory, [a, b])
        found = await look(directory)
        assert await found.content(INO, [a, b], pool) == b"a" * 200_000
    assert report.unreadable == [11]
    assert "LOST: 1 chunks have no readable index: b" in "\n".join(describe(report))
    assert found.replicas[10, a.peer.server] is BAD
    assert set(found.inodes) & {INO, INO + 1, INO + 2} == {INO, INO + 2}


async def test_chunks_without_live_bytes_are_left_alone(start_node: StartNode, pool: Pool, directory: Path) -> None:
    async with start_node("a") as a:
        await write(pool, [a], 10, INO, b"a" * 1000)
        await write(pool, [a], 11, INO, b"b" * 2000, session=4)
        report = await build(directory, [a])
        found = await look(directory)
        assert (report.chunks, report.unused) == (2, 1)
        assert set(found.replicas) == {(11, a.peer.server)}
        dry = await rebuild.dry_run(directory.parent, KEY, [(a.peer.host, a.peer.port)])
        assert (dry.files, dry.bytes, dry.unused) == (report.files, report.bytes, report.unused)
        assert describe(dry)[1].startswith("would recover 1 files with 2000 bytes")


@pytest.mark.parametrize("step", STEPS)
async def test_interrupted_it_can_be_run_again(start_node: StartNode, pool: Pool, directory: Path, step: str) -> None:
    class Crash(BaseException):
        pass

    def stop(name: str) -> None:
        if name == f"rebuild:{step}":
            raise Crash

    async with start_node("a") as a:
        await write(pool, [a], 10, INO, b"a" * 1000)
        with pytest.RaisesGroup(Crash, allow_unwrapped=True, flatten_subgroups=True):
            await build(directory, [a], Files(stop))
        if step != "after-identity":
            with pytest.raises(DataDirectoryError, match="is not empty"):
                identity.open_directory(directory)
            await build(directory, [a])
        assert await (await look(directory)).content(INO, [a], pool) == b"a" * 1000


async def test_who_is_asked_has_to_fit(start_node: StartNode, directory: Path) -> None:
    async with start_node("a") as a:
        ours = (a.peer.host, a.peer.port)

        async def refused(text: str, *addresses: tuple[str, int], key: ClusterKey = KEY) -> None:
            with pytest.RaisesGroup(
                pytest.RaisesExc(SurveyError, match=text), allow_unwrapped=True, flatten_subgroups=True
            ):
                await rebuild.rebuild(directory, key, addresses)

        await refused("are the same chunkserver", ours, ours)
        await refused("cannot ask the chunkserver at 127.0.0.1:1: .*leave it out", ours, ("127.0.0.1", 1))
        await refused("does not have this cluster's key", ours, key=ClusterKey(b"x" * 32))
        await refused("no chunkserver is given")
        a.node.identity.cluster_id = "5a1f0c3e-7d52-4f1c-9be4-3c7a5d20e9b2"
        async with start_node("b") as b:
            await refused("different clusters", ours, (b.peer.host, b.peer.port))
        a.node.identity.cluster_id = str(CLUSTER)
    (directory / "holiday.jpg").touch()
    with pytest.raises(DataDirectoryError, match=r"not empty \(holiday.jpg\)"):
        await rebuild.rebuild(directory, KEY, [ours])


async def test_a_listing_has_pages(start_node: StartNode, pool: Pool) -> None:
    async with start_node("a") as a:
        for chunk in (5, 3, 9):
            await write(pool, [a], chunk, INO, b"x", seal=chunk == 3)
        first = await pool.list_chunks(a.peer, 0, 2)
        assert ([one.chunk for one in first.replicas], first.end) == ([3, 5], False)
        assert [one.sealed for one in first.replicas] == [True, False]
        rest = await pool.list_chunks(a.peer, 5, 1 << 60)
        assert ([one.chunk for one in rest.replicas], rest.end) == ([9], True)
        assert (rest.server, rest.name, rest.data_path, rest.highest_chunk) == (a.peer.server, "a", str(a.path), 9)
        with (a.path / "identity.json").open() as file:
            assert str(a.peer.server) in file.read()

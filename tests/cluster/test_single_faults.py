"""Single faults on everything a chunkserver keeps: noticed, and masked or a clean error; never a wrong byte, never a
start that fails without one clear line.

Two servers have a sealed chunk; one of them meets the fault. What a client gets must be right, wherever it asks.
"""

import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "unit" / "chunkserver"))
sys.path.insert(0, str(HERE))

from chunkserver_harness import CLUSTER, KEY, Started, Writer, serving  # noqa: E402
from faultydisk import Fault, FaultyDisk  # noqa: E402

from chunkserver import chunkfile, identity, scrub  # noqa: E402
from chunkserver.chunkfile import ENTRY_BYTES, HEADER_BYTES, INDEX_OFFSET, PAYLOAD_OFFSET  # noqa: E402
from chunkserver.client import Pool, open_pool  # noqa: E402
from chunkserver.disk import LocalDisk  # noqa: E402
from chunkserver.identity import DataDirectoryError  # noqa: E402
from chunkserver.replica import ReplicaState  # noqa: E402
from metaserver.errors import DfsError, ErrorCode  # noqa: E402
from metaserver.protocol import Order, OrderKind, OrderResult  # noqa: E402

CHUNK, SIZE, BLOCK = 0x1C1, 400_000, 8000
BLOCKS = SIZE // BLOCK
ROOT = HERE.parent.parent


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    async with open_pool(KEY, str(CLUSTER)) as opened:
        yield opened


@pytest.fixture
def content() -> bytes:
    return random.Random(7).randbytes(SIZE)


def at(started: Started) -> Path:
    return started.path / chunkfile.chunk_path(CHUNK)


def disk_of(started: Started) -> FaultyDisk:
    disk = started.node.disk
    assert isinstance(disk, FaultyDisk)
    return disk


@asynccontextmanager
async def server(tmp_path: Path, name: str) -> AsyncIterator[Started]:
    async with serving(tmp_path / name, name, FaultyDisk) as started:  # type: ignore[arg-type]
        yield started


async def write(pool: Pool, started: Started, content: bytes, chunk: int = CHUNK) -> Writer:
    writer = Writer(chunk)
    await writer.send(pool, started.peer, content, block=BLOCK, sync=True)
    return writer


async def seal(started: Started, writer: Writer) -> None:
    await started.store.seal(writer.chunk, writer.offset, writer.index, writer.chain)


async def read_one(pool: Pool, started: Started, content: bytes) -> int:
    """Every block of one replica: it is right, or an error; how many were right."""
    right = 0
    for offset in range(0, SIZE, BLOCK):
        try:
            blocks = await pool.read(started.peer, CHUNK, offset, BLOCK)
        except DfsError:
            continue
        if not blocks.entries:
            continue  # past the end of this replica
        assert bytes(blocks.payload) == content[offset : offset + BLOCK]
        right += 1
    return right


async def order(started: Started, kind: OrderKind, writer: Writer, source: Started | None = None) -> OrderResult:
    made = Order(1, 1, kind, writer.chunk, writer.offset, writer.index, writer.chain, replace=True)
    if source is not None:
        made.source_server, made.source_host, made.source_port = source.peer.server, "127.0.0.1", source.peer.port
    assert started.node.running is not None
    return await started.node.running.orders._result(made)


async def assert_repaired(pool: Pool, bad: Started, good: Started, writer: Writer, content: bytes) -> None:
    """What the metaserver orders then: the replica is replaced by the other one's, and is whole."""
    assert (await order(bad, OrderKind.COPY, writer, good)).error == ""
    assert await bad.store.reads.verify(CHUNK) == []
    assert await read_one(pool, bad, content) == BLOCKS
    replica = bad.store.table.get(CHUNK)
    assert (replica.state, replica.error) == (ReplicaState.SEALED, "")


# -- damage at rest --------------------------------------------------------------------------------------------------


def flip(data: bytearray, place: int) -> None:
    data[place] ^= 0x10


def zero(data: bytearray, place: int) -> None:
    start = place - place % 4096
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))


def junk(data: bytearray, place: int) -> None:
    start = place - place % 4096
    data[start : start + 4096] = random.Random(place).randbytes(len(data[start : start + 4096]))


DAMAGES: dict[str, Callable[[bytearray, int], None]] = {"flip": flip, "zero": zero, "junk": junk}
PLACES = {
    "header": 50,
    "header's padding": 3000,
    "first entry": INDEX_OFFSET + 9,
    "entry": INDEX_OFFSET + 20 * ENTRY_BYTES + 22,
    "last entry": INDEX_OFFSET + (BLOCKS - 1) * ENTRY_BYTES + 60,
    "payload": PAYLOAD_OFFSET + 123_456,
    "last byte": PAYLOAD_OFFSET + SIZE - 1,
}


def damage(path: Path, how: str, place: int) -> None:
    data = bytearray(path.read_bytes())
    before = bytes(data)
    DAMAGES[how](data, place)
    assert data != before
    with path.open("r+b") as file:
        file.write(data)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("place", PLACES)
async def test_damage_in_a_chunk_while_it_is_served(
    tmp_path: Path, pool: Pool, content: bytes, place: str, how: str
) -> None:
    async with server(tmp_path, "a") as a, server(tmp_path, "b") as b:
        for started in (a, b):
            writer = await write(pool, started, content)
            await seal(started, writer)
        a.store.table.open_chunks.drop(CHUNK)  # as after a while
        damage(at(a), how, PLACES[place])
        await read_one(pool, a, content)
        assert await read_one(pool, b, content) == BLOCKS
        result = await order(a, OrderKind.VERIFY, writer)
        assert result.error == ErrorCode.BAD_CHECKSUM.name
        assert result.replica is not None
        assert result.replica.error
        await assert_repaired(pool, a, b, writer, content)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("place", PLACES)
async def test_a_start_with_a_damaged_chunk(tmp_path: Path, pool: Pool, content: bytes, place: str, how: str) -> None:
    """It starts, serves what is good, and finds out about the rest when it is read back at the latest. A chunk without
    a header is taken for one that was not sealed, and sealed again by order if all of it is there."""
    async with server(tmp_path, "b") as b:
        async with server(tmp_path, "a") as a:
            for started in (a, b):
                writer = await write(pool, started, content)
                await seal(started, writer)
            other = await write(pool, a, b"another", CHUNK + 1)
            await seal(a, other)
        damage(at(a), how, PLACES[place])
        async with server(tmp_path, "a") as a:
            assert bytes((await pool.read(a.peer, CHUNK + 1, 0, 7)).payload) == b"another"
            await read_one(pool, a, content)
            kind = OrderKind.SEAL if "header" in place else OrderKind.VERIFY
            result = await order(a, kind, writer)
            if kind is OrderKind.SEAL:
                assert result.error == ""
                assert await a.store.reads.verify(CHUNK) == []
            else:
                assert result.error in (ErrorCode.BAD_CHECKSUM.name, ErrorCode.REPLICA_FAILED.name)
                await assert_repaired(pool, a, b, writer, content)
            assert await read_one(pool, a, content) == BLOCKS


@pytest.mark.parametrize("how", DAMAGES)
async def test_damage_in_the_identity(tmp_path: Path, pool: Pool, content: bytes, how: str) -> None:
    async with server(tmp_path, "a") as a:
        await seal(a, await write(pool, a, content))
        known = a.node.identity
    rng = random.Random(5)
    copies = [tmp_path / "a" / name for name in (identity.FILE, identity.COPY)]
    length = copies[0].stat().st_size
    for place in [rng.randrange(length) for _ in range(40)]:
        whole = copies[0].read_bytes()
        damage(copies[place % 2], how, place)
        disk, found = identity.open_directory(str(tmp_path / "a"), "")
        disk.unlock()
        assert found == known
        assert [copy.read_bytes() for copy in copies] == [whole, whole], "both are whole again"
        for copy in copies:
            damage(copy, how, place)
        with pytest.raises(DataDirectoryError, match=r"damaged.*restore it from a backup"):
            identity.open_directory(str(tmp_path / "a"), "")
        for copy in copies:
            copy.write_bytes(whole)


@pytest.mark.parametrize("how", DAMAGES)
async def test_damage_in_the_scrubbers_state(tmp_path: Path, pool: Pool, content: bytes, how: str) -> None:
    async with server(tmp_path, "a") as a:
        await seal(a, await write(pool, a, content))
        assert a.node.running is not None
        a.node.running.scrubber._state.position = 1 << 40
        await a.node.running.scrubber._save()
    for place in (3, 20, 60):
        damage(tmp_path / "a" / scrub.FILE, how, place)
        async with server(tmp_path, "a") as a:
            assert a.node.running is not None
            await trio.testing.wait_all_tasks_blocked()
            assert a.node.running.scrubber._state.position == -1
            assert await read_one(pool, a, content) == BLOCKS
            a.node.running.scrubber._state.position = 1 << 40
            await a.node.running.scrubber._save()


# -- the directory ---------------------------------------------------------------------------------------------------


def wrong_place(path: Path) -> None:
    path.rename(path.parent.parent / "07" / path.name)


ENTRIES: dict[str, Callable[[Path], object]] = {
    "missing": os.unlink,
    "renamed": lambda path: path.rename(path.with_name("0000000000aac1")),
    "in another directory": wrong_place,
    "given up": lambda path: path.rename(path.with_name(path.name + ".failed")),
    "a directory instead": lambda path: (os.unlink(path), path.mkdir()),
    "empty": lambda path: os.truncate(path, 0),
}


@pytest.mark.parametrize("what", ENTRIES)
@pytest.mark.parametrize("running", [True, False])
async def test_entries_of_the_directory(tmp_path: Path, pool: Pool, content: bytes, what: str, running: bool) -> None:
    async with server(tmp_path, "b") as b:
        async with server(tmp_path, "a") as a:
            for started in (a, b):
                writer = await write(pool, started, content)
                await seal(started, writer)
            if running:
                a.store.table.open_chunks.drop(CHUNK)
                ENTRIES[what](at(a))
                assert await read_one(pool, a, content) == 0
                assert a.store.table.get(CHUNK).error in ("IO", "BAD_CHECKSUM")
                if what != "a directory instead":
                    await assert_repaired(pool, a, b, writer, content)
                return
        ENTRIES[what](at(a))
        async with server(tmp_path, "a") as a:
            # What was given up still holds what it held.
            assert await read_one(pool, a, content) == (BLOCKS if what == "given up" else 0)
            found = a.store.table.get(CHUNK)
            assert found is None or found.error
            if what != "a directory instead":
                await assert_repaired(pool, a, b, writer, content)


async def test_a_replica_beside_one_that_was_given_up(tmp_path: Path, pool: Pool, content: bytes) -> None:
    async with server(tmp_path, "a") as a:
        await seal(a, await write(pool, a, content))
    at(a).with_name(at(a).name + ".failed").write_bytes(b"junk")
    async with server(tmp_path, "a") as a:
        assert a.store.table.get(CHUNK).state is ReplicaState.SEALED
        assert await read_one(pool, a, content) == BLOCKS


# -- errors of the disk ----------------------------------------------------------------------------------------------

READS = {
    "header": (0, HEADER_BYTES),
    "entry": (INDEX_OFFSET + 64, INDEX_OFFSET + 128),
    "payload": (PAYLOAD_OFFSET + 100_000, PAYLOAD_OFFSET + 100_001),
}


@pytest.mark.parametrize("where", READS)
@pytest.mark.parametrize("at_start", [True, False])
async def test_what_cannot_be_read(tmp_path: Path, pool: Pool, content: bytes, where: str, at_start: bool) -> None:
    start, stop = READS[where]
    fault = Fault("read", "chunks/*", "EIO", start=start, stop=stop)
    async with server(tmp_path, "b") as b:
        async with server(tmp_path, "a") as a:
            for started in (a, b):
                writer = await write(pool, started, content)
                await seal(started, writer)
            if not at_start:
                a.store.table.open_chunks.drop(CHUNK)
                disk_of(a).faults = [fault]
                right = await read_one(pool, a, content)
                assert right == {"header": BLOCKS, "entry": 0, "payload": BLOCKS - 1}[where]
                assert (await order(a, OrderKind.VERIFY, writer)).error in ("IO", "BAD_CHECKSUM")
                assert a.store.table.get(CHUNK).error in ("IO", "BAD_CHECKSUM")
                disk_of(a).faults = []
                await assert_repaired(pool, a, b, writer, content)
                return

        def broken(disk: object) -> FaultyDisk:
            made = FaultyDisk(disk)  # type: ignore[arg-type]
            made.faults = [fault]
            return made

        async with serving(tmp_path / "a", "a", broken) as a:  # type: ignore[arg-type]
            await read_one(pool, a, content)
            result = await order(a, OrderKind.VERIFY, writer)
            assert result.error in ("IO", "BAD_CHECKSUM", "REPLICA_FAILED")
            assert a.store.table.get(CHUNK).error
            disk_of(a).faults = []
            await assert_repaired(pool, a, b, writer, content)


@pytest.mark.parametrize("call", ["names", "open"])
async def test_a_start_on_a_disk_with_unreadable_parts(tmp_path: Path, pool: Pool, content: bytes, call: str) -> None:
    """What cannot be listed is missing, what cannot be opened is bad; everything else is served."""
    async with server(tmp_path, "a") as a:
        await seal(a, await write(pool, a, content))
        await seal(a, await write(pool, a, b"bad", 0x102))

    def broken(disk: object) -> FaultyDisk:
        made = FaultyDisk(disk)  # type: ignore[arg-type]
        made.faults = [Fault(call, "chunks/02*")]
        return made

    async with serving(tmp_path / "a", "a", broken) as a:  # type: ignore[arg-type]
        assert await read_one(pool, a, content) == BLOCKS
        lost = a.store.table.get(0x102)
        assert (lost is None) == (call == "names")
        assert lost is None or lost.error == "IO"


WRITES = {
    "payload": Fault("write", "chunks/*", start=PAYLOAD_OFFSET, times=1),
    "payload, short": Fault("write", "chunks/*", start=PAYLOAD_OFFSET, times=1, half=True),
    "entries": Fault("write", "chunks/*", start=HEADER_BYTES, stop=PAYLOAD_OFFSET, times=1),
    "entries, short": Fault("write", "chunks/*", start=HEADER_BYTES, stop=PAYLOAD_OFFSET, times=1, half=True),
    "sync": Fault("sync", "chunks/*", times=1),
    "directory": Fault("sync_directory", "chunks/*", times=1),
}


@pytest.mark.parametrize("what", WRITES)
async def test_an_append_that_cannot_be_made_durable(tmp_path: Path, pool: Pool, content: bytes, what: str) -> None:
    """The replica is given up at once, and nothing tries again until it seems to work."""
    async with server(tmp_path, "a") as a:
        writer = Writer(CHUNK)
        if what != "directory":
            await writer.send(pool, a.peer, content[:BLOCK], sync=True)
        disk_of(a).faults = [msgspec_copy(WRITES[what])]
        with pytest.raises(DfsError) as caught:
            await writer.send(pool, a.peer, content[BLOCK : 3 * BLOCK], block=BLOCK, sync=True)
        assert caught.value.code is ErrorCode.REPLICA_FAILED
        calls = disk_of(a).calls.copy()
        again = Writer(CHUNK)
        again.index, again.offset, again.chain = writer.index, writer.offset, writer.chain
        for attempt in (again.append(b"more", sync=True), again.append(b"other")):
            with pytest.raises(DfsError) as caught:
                await pool.append(a.peer, attempt, [b"more"])
            assert caught.value.code is ErrorCode.REPLICA_FAILED
        assert disk_of(a).calls["sync", chunkfile.chunk_path(CHUNK)] == calls["sync", chunkfile.chunk_path(CHUNK)]
        assert [path.name for path in at(a).parent.iterdir()] == [at(a).name + ".failed"]
        other = await write(pool, a, content, CHUNK + 1)
        await seal(a, other)
    async with server(tmp_path, "a") as a:
        assert a.store.table.get(CHUNK).report().error == ErrorCode.REPLICA_FAILED.name
        assert a.store.table.get(CHUNK + 1).state is ReplicaState.SEALED


def msgspec_copy(fault: Fault) -> Fault:
    return Fault(*(getattr(fault, name) for name in Fault.__struct_fields__))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("where", ["payload", "entries"])
async def test_an_append_to_a_full_disk(tmp_path: Path, pool: Pool, content: bytes, where: str, half: bool) -> None:
    """Refused as DISK_FULL; what was there stays, and can be sealed."""
    async with server(tmp_path, "a") as a:
        writer = Writer(CHUNK)
        await writer.send(pool, a.peer, content[: SIZE // 2], block=BLOCK, sync=True)
        index, offset, chain = writer.index, writer.offset, writer.chain
        fault = msgspec_copy(WRITES["payload" if where == "payload" else "entries"])
        fault.error, fault.half = "ENOSPC", half
        disk_of(a).faults = [fault]
        with pytest.raises(DfsError) as caught:
            await writer.send(pool, a.peer, content[SIZE // 2 :], block=BLOCK, sync=True)
        assert caught.value.code is ErrorCode.DISK_FULL
        await a.store.seal(CHUNK, offset, index, chain)
        assert await a.store.reads.verify(CHUNK) == []
        assert await read_one(pool, a, content) == BLOCKS // 2


@pytest.mark.parametrize("call", ["write", "sync", "truncate", "sync_directory"])
async def test_a_seal_that_fails(tmp_path: Path, pool: Pool, content: bytes, call: str) -> None:
    async with server(tmp_path, "b") as b:
        writer = await write(pool, b, content)
        await seal(b, writer)
        async with server(tmp_path, "a") as a:
            await write(pool, a, content)
            disk_of(a).faults = [Fault(call, "chunks/*", times=1)]
            with pytest.raises(DfsError) as caught:
                await seal(a, writer)
            assert caught.value.code is ErrorCode.REPLICA_FAILED
            assert a.store.table.get(CHUNK).state is ReplicaState.FAILED
            assert (await order(a, OrderKind.SEAL, writer)).error == ErrorCode.REPLICA_FAILED.name
        async with server(tmp_path, "a") as a:
            assert a.store.table.get(CHUNK).report().error == ErrorCode.REPLICA_FAILED.name
            await assert_repaired(pool, a, b, writer, content)
            assert [path.name for path in at(a).parent.iterdir()] == [at(a).name]


@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("call", ["create", "write", "truncate", "sync", "rename", "sync_directory"])
async def test_a_repair_that_fails(tmp_path: Path, pool: Pool, content: bytes, call: str, error: str) -> None:
    """What there was of the damaged replica is still there, and the next attempt does it."""
    async with server(tmp_path, "a") as a, server(tmp_path, "b") as b:
        for started in (a, b):
            writer = await write(pool, started, content)
            await seal(started, writer)
        damage(at(a), "flip", PLACES["payload"])
        assert await a.store.reads.verify(CHUNK) == [15]
        disk_of(a).faults = [Fault(call, "chunks/*", error, times=1)]
        wanted = "DISK_FULL" if error == "ENOSPC" else "DISK_FAILED"
        assert (await order(a, OrderKind.COPY, writer, b)).error == wanted
        assert await read_one(pool, a, content) >= BLOCKS - 1
        await assert_repaired(pool, a, b, writer, content)
        assert [path.name for path in at(a).parent.iterdir()] == [at(a).name]


@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("call", ["create", "write", "sync", "rename"])
async def test_an_identity_that_cannot_be_written(
    tmp_path: Path, pool: Pool, content: bytes, call: str, error: str
) -> None:
    """An epoch that is not remembered is not obeyed; data is served meanwhile."""
    async with server(tmp_path, "a") as a:
        writer = await write(pool, a, content)
        disk_of(a).faults = [Fault(call, identity.FILE + "*", error, half=True)]
        with pytest.raises(DfsError):
            await a.node.raise_epoch(7)
        assert a.node.identity.highest_epoch == 0
        assert await read_one(pool, a, content) == BLOCKS
        disk_of(a).faults = []
        await a.node.raise_epoch(7)
        await seal(a, writer)
    async with server(tmp_path, "a") as a:
        assert a.node.identity.highest_epoch == 7


@pytest.mark.parametrize("call", ["read", "write", "sync"])
async def test_a_scrubber_that_cannot_keep_its_state(tmp_path: Path, pool: Pool, content: bytes, call: str) -> None:
    async with server(tmp_path, "a") as a:
        await seal(a, await write(pool, a, content))
        disk_of(a).faults = [Fault(call, scrub.FILE + "*")]
        assert a.node.running is not None
        number = a.node.running.scrubber.ask()
        with trio.fail_after(30):
            while a.node.running.scrubber.report().completed < number:  # noqa: ASYNC110 - as whoever asked does
                await trio.sleep(0.05)
        assert a.node.running.scrubber.report().damaged == []
        await a.node.running.scrubber._load()
        assert await read_one(pool, a, content) == BLOCKS


# -- what a start reads besides ----------------------------------------------------------------------------------------


def chunkserver(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "chunkserver", *map(str, words)],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


CONTENTS = {
    "zeros": bytes(4096),
    "junk": random.Random(1).randbytes(4096),
    "no text": b'data = "\xff"\n',
    "cut": b'data = "/nowhere\n',
}


@pytest.mark.parametrize("what", CONTENTS)
@pytest.mark.parametrize("which", ["configuration", "key"])
def test_a_damaged_configuration_or_key_is_one_line(tmp_path: Path, which: str, what: str) -> None:
    config, key = tmp_path / "c.toml", tmp_path / "cluster.key"
    config.write_text(f'data = "{tmp_path}/data"\nmetaserver = "127.0.0.1:1"\nkey_file = "{key}"\n')
    key.write_text("0" * 64)
    key.chmod(0o600)
    (config if which == "configuration" else key).write_bytes(CONTENTS[what])
    done = chunkserver("--config", config)
    # systemd does not start it again and again.
    assert done.returncode == (78 if which == "configuration" else 65)
    (line,) = done.stderr.splitlines()
    assert line.startswith("chunkserver: ")
    assert (str(config) if which == "configuration" else str(key)) in line
    assert not (tmp_path / "data").exists()


def test_a_configuration_that_cannot_be_read_is_one_line() -> None:
    done = chunkserver("--config", "/proc/self/mem")  # EIO
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "Input/output error" in done.stderr


@pytest.mark.parametrize("steps", [[1, 7, 4096], [0]])
def test_writes_that_the_system_cuts_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]) -> None:
    """They are gone on with; a disk that takes nothing at all is an error, not an endless loop."""
    disk, real = LocalDisk(str(tmp_path)), os.pwrite
    lengths = iter(steps * 10_000)
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, at: real(fd, bytes(buffers[0])[:3], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, bytes(data)[: next(lengths)], at))
    file, content = disk.create("f"), random.Random(3).randbytes(50_000)
    if steps == [0]:
        with pytest.raises(OSError, match="Input/output"):
            file.write([content[:10], content[10:]], 5)
    else:
        file.write([content[:10], content[10:]], 5)
        assert (tmp_path / "f").read_bytes() == bytes(5) + content


async def test_an_index_that_cannot_be_read_while_it_grows(tmp_path: Path, pool: Pool, content: bytes) -> None:
    async with server(tmp_path, "a") as a:
        writer = Writer(CHUNK)
        await writer.send(pool, a.peer, content[:BLOCK])
        assert len((await pool.read(a.peer, CHUNK, 0, BLOCK)).entries) == 1
        repeated = Writer(CHUNK).append(content[:BLOCK])
        await writer.send(pool, a.peer, content[BLOCK : 2 * BLOCK])
        disk_of(a).faults = [Fault("read", "chunks/*", start=INDEX_OFFSET, stop=PAYLOAD_OFFSET)]
        with pytest.raises(DfsError) as caught:
            await pool.append(a.peer, repeated, [content[:BLOCK]])
        assert caught.value.code is ErrorCode.IO
        with pytest.raises(DfsError) as caught:
            await pool.read(a.peer, CHUNK, BLOCK, BLOCK)
        assert caught.value.code is ErrorCode.IO
        assert a.store.table.get(CHUNK).error == "IO"

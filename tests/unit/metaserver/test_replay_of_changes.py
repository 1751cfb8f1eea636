"""A power cut takes the tail of the log; what the mounts then send again must give exactly the rows there were.

Random changes of two mounts, an image of the data directory somewhere in between, and the rows of both lives compared.
"""

import shutil
import stat
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
from running_metaserver import FILE, Mount, Running, running
from test_sessions import come_back

from metaserver import protocol
from metaserver.errors import DfsError
from metaserver.protocol import ChunkProgress, Commit, Extent, FileCommit, Opened, SetAttributes
from metaserver.schema import Table
from metaserver.wire import Method, Response

COMPARED = (
    Table.INODES, Table.DENTRIES, Table.LISTING, Table.SYMLINKS, Table.XATTRS, Table.EXTENTS, Table.BY_CHUNK,
    Table.CHUNKS, Table.REPLICAS, Table.BY_SERVER, Table.ORPHANS, Table.TASKS, Table.TRASH,
)  # fmt: skip

# An image is a copy of everything: better in memory.
TMPFS = "/dev/shm" if Path("/dev/shm").is_dir() else None


class Journal:
    """A mount that remembers what it asked for and what it was answered, as ``client.MetaClient`` does."""

    def __init__(self, mount: Mount, random: Random) -> None:
        self.mount = mount
        self.random = random
        self.sent: list[tuple[int, Method[Any, Any], Any, Response[Any]]] = []
        self.files: dict[int, int] = {}
        self.opened: set[int] = set()
        self.chunk: list[int] = []

    async def change(self, method: Method[Any, Any], message: Any) -> Any:
        """The answer, or None if it was refused (which leaves no trace, and is not sent again)."""
        try:
            answer = await self.mount.ask(method, message)
        except DfsError:
            return None
        self.sent.append((self.mount.operation, method, message, answer))
        return answer.message

    def lost_after(self, number: int) -> tuple[protocol.Lost, ...]:
        return tuple(
            self.mount.lost(method, message, operation, self.mount.replay(answer))
            for operation, method, message, answer in self.sent
            if answer.number > number
        )

    async def step(self, directories: list[int]) -> None:
        """One random change. Names are few, so that the two mounts get into each other's way."""
        random = self.random
        parent, name = random.choice(directories), random.choice([b"a", b"b", b"c", b"d"])
        kind = random.choice(
            ["make", "make", "mkdir", "write", "write", "rename", "unlink", "cut", "link", "attributes"]
        )
        if kind == "make":
            made = await self.change(protocol.MAKE, protocol.Make(parent, name, FILE, 1, 2, open=True))
            if made is not None:
                self.files[made.entry.attributes.ino] = 0
                self.opened.add(made.entry.attributes.ino)
        elif kind == "mkdir":
            made = await self.change(protocol.MAKE, protocol.Make(parent, name, stat.S_IFDIR | 0o755, 1, 2))
            if made is not None:
                directories.append(made.entry.attributes.ino)
        elif kind == "unlink":
            await self.change(protocol.UNLINK, protocol.Unlink(parent, name, random.random() < 0.3))
        elif kind == "rename":
            to = random.choice(directories), random.choice([b"a", b"b", b"c", b"d"])
            await self.change(protocol.RENAME, protocol.Rename(parent, name, *to, random.choice([0, 0, 1, 2])))
        elif self.files:
            await self._file_step(kind, random.choice(list(self.files)), parent, name)

    async def _file_step(self, kind: str, ino: int, parent: int, name: bytes) -> None:
        random = self.random
        if kind == "link":
            await self.change(protocol.LINK, protocol.Link(ino, parent, name))
        elif kind == "cut":
            await self.change(protocol.SET_ATTRIBUTES, SetAttributes(ino, size=random.randrange(300)))
        elif kind == "attributes":
            await self.change(protocol.SET_XATTR, protocol.SetXattr(ino, b"user.x", name, 0))
            await self.change(
                protocol.SET_ATTRIBUTES, SetAttributes(ino, mode=random.randrange(0o1000), mtime_now=True)
            )
        else:
            await self._write(ino)

    async def _write(self, ino: int) -> None:
        random = self.random
        if not self.chunk or self.chunk[1] > 1000:
            if self.chunk:
                await self.change(protocol.SEAL, protocol.Seal(self.chunk[0], ()))
            allocated = await self.change(protocol.ALLOCATE, protocol.Allocate("", ()))
            self.chunk = [allocated.chunk, 0]
        chunk, offset = self.chunk
        length = random.randrange(1, 200)
        self.chunk[1] += length
        extent = Extent(random.randrange(300), length, chunk, offset)
        progress = ChunkProgress(chunk, offset + length, offset + length, offset + length)
        file = FileCommit(ino, 0, 0, random.randrange(1 << 60), (extent,))
        await self.change(protocol.COMMIT, Commit((progress,), (file,)))


def rows_of(metaserver: Running) -> dict[Table, list[tuple[bytes, bytes]]]:
    found, _ = metaserver.committer.read(
        0, lambda tx: {table: list(tx.scan(table, b"", b"\xff" * 9)) for table in COMPARED}
    )
    return found


@pytest.mark.parametrize("seed", range(12))
async def test_what_is_sent_again_gives_the_same_rows(seed: int, autojump_clock: object) -> None:
    random = Random(seed)
    settings = {"session_deadline_seconds": 1e6, "trash_seconds": 86400.0 if seed % 2 else 0.0}
    with tempfile.TemporaryDirectory(dir=TMPFS) as place:
        directory = Path(place)
        async with running(directory / "data", boot_id=b"a" * 16, **settings) as metaserver:
            for number in (1, 2, 3):
                await metaserver.server(number)
            journals = [Journal(await metaserver.mount(), random) for _ in range(2)]
            directories = [1]
            for _ in range(random.randrange(40)):
                await random.choice(journals).step(directories)
            await journals[0].mount.sync()
            metaserver.image(directory / "image")
            durable = metaserver.committer.durable
            for _ in range(60):
                await random.choice(journals).step(directories)
            expected = rows_of(metaserver)
        shutil.rmtree(directory / "data")
        async with running(directory / "image", boot_id=b"b" * 16, **settings) as metaserver:
            assert metaserver.committer.boot_lost_tail
            results: list[protocol.Resent] = []

            async def back(journal: Journal) -> None:
                opened = tuple(Opened(ino, True) for ino in sorted(journal.opened))
                resumed = await come_back(metaserver, journal.mount, opened=opened, again=journal.lost_after(durable))
                results.extend(resumed.results)

            async with trio.open_nursery() as nursery:
                for journal in journals:
                    nursery.start_soon(back, journal)
            assert [result for result in results if result.code] == []
            assert sum(len(journal.lost_after(durable)) for journal in journals) == len(results) > 0
            assert rows_of(metaserver) == expected

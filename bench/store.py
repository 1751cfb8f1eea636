"""What a start costs with very many files, and how much memory it takes: CPU seconds and RssAnon, without network.

``PYTHONPATH=. python bench/store.py fill DIRECTORY FILES`` makes the data directory of a metaserver with so many small
files, a thousand to a directory, through the storage engine. ``... start DIRECTORY`` starts it as after a crash and
says what that took; run it again for a start whose pages are known. ``... profile DIRECTORY``: the same under cProfile.
"""

import cProfile
import os
import pstats
import resource
import stat
import sys
import time
from functools import partial
from pathlib import Path

import trio

from metaserver import chunks, identity, inodes
from metaserver.commit import Committer, open_committer
from metaserver.config import Config
from metaserver.extents import insert_first
from metaserver.key import load_or_create_key
from metaserver.namespace import make
from metaserver.parts import Parts
from metaserver.protocol import ROOT_INO, ChunkState, Extent, Make
from metaserver.schema import Replica, Server, Table, Transaction, inode_key, server_key

FILES_PER_DIRECTORY = 1000
FILE_BYTES = 6000
FILES_PER_CHANGE = 250
CHUNK_BYTES = 64 << 20
SERVERS = (1, 2)


def add_servers(tx: Transaction, now_ns: int) -> None:
    for server in SERVERS:
        row = Server(f"cs{server}", "127.0.0.1", 9400 + server, 9500 + server, "", [], f"/data/cs{server}", 1 << 40)
        tx.put(Table.SERVERS, server_key(server), row.pack())


def add_directory(tx: Transaction, now_ns: int, number: int) -> int:
    return make(tx, now_ns, Make(ROOT_INO, b"directory-%05d" % number, stat.S_IFDIR | 0o755, 0, 0))[0]


def add_chunk(tx: Transaction, now_ns: int) -> int:
    chunk = chunks.allocate(tx, now_ns, 0, SERVERS, len(SERVERS))
    row = chunks.find(tx, chunk)
    assert row is not None
    chunks.move(row, ChunkState.SEALED)
    row.length, row.entries = CHUNK_BYTES, CHUNK_BYTES // FILE_BYTES
    chunks.save(tx, chunk, row)
    for server, replica in chunks.replicas(tx, chunk):
        chunks.save_replica(tx, chunk, server, Replica(replica.state, 0, row.length, row.entries, 0))
    return chunk


def add_files(tx: Transaction, now_ns: int, parent: int, first: int, count: int, chunk: int, offset: int) -> None:
    """Names as programs choose them: not in the order of creation."""
    live: dict[int, int] = {}
    for number in range(first, first + count):
        name = b"%08x-file.txt" % (number * 2654435761 & 0xFFFFFFFF)
        ino, inode, _ = make(tx, now_ns, Make(parent, name, stat.S_IFREG | 0o644, 1000, 1000))
        inode.size = inode.allocated = FILE_BYTES
        inodes.save(tx, ino, inode)
        insert_first(tx, ino, Extent(0, FILE_BYTES, chunk, offset), live)
        offset += FILE_BYTES
    chunks.settle(tx, live)


async def fill(directory: Path, files: int) -> None:
    async with open_committer(directory) as committer:
        config = Config(data=str(directory))
        Parts(committer, config, "").load()
        committer.change(0, 0, add_servers)
        await _fill(committer, files)


async def _fill(committer: Committer, files: int) -> None:
    parent = chunk = 0
    offset = CHUNK_BYTES
    for first in range(0, files, FILES_PER_CHANGE):
        count = min(FILES_PER_CHANGE, files - first)
        if first % FILES_PER_DIRECTORY == 0:
            number = first // FILES_PER_DIRECTORY
            parent = committer.change(0, 0, lambda tx, now, number=number: add_directory(tx, now, number)).message
        if offset + count * FILE_BYTES > CHUNK_BYTES:
            chunk, offset = committer.change(0, 0, add_chunk).message, 0
        files_of = partial(add_files, parent=parent, first=first, count=count, chunk=chunk, offset=offset)
        committer.change(0, 0, files_of)
        offset += count * FILE_BYTES
        if first % 20_000 == 0:
            # As often as in life: one change here is hundreds.
            await committer.checkpoint()
            print(f"\r{first:,} files", end="", flush=True, file=sys.stderr)


def rss_anon() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1])


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def start(directory: Path) -> None:
    """Up to where requests are served; then the process ends as in a crash."""
    before, began, cpu = rss_anon(), time.monotonic(), cpu_seconds()
    async with open_committer(directory) as committer:
        opened = cpu_seconds() - cpu
        parts = Parts(committer, Config(data=str(directory)), "")
        parts.load()
        await committer.checkpoint()
        served, seconds = cpu_seconds() - cpu, time.monotonic() - began
        files, _ = committer.read(0, lambda tx: tx.get(Table.INODES, inode_key(ROOT_INO)))
        assert files is not None
        print(
            f"{parts.changes.inodes:,} inodes: open {opened:.2f}, until served {served:.2f} s of CPU ({seconds:.2f} s "
            f"on the clock); RssAnon {before / 1024:.1f} -> {rss_anon() / 1024:.1f} MiB, most {most_rss()}, store "
            f"{committer.store.sizes()['used_bytes'] / 2**20:.0f} MiB, {committer.store.sizes()['rows']:,} rows",
            flush=True,
        )
        if "profile" not in sys.argv:
            os._exit(0)


def most_rss() -> str:
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB resident"


def main() -> None:
    what, directory = sys.argv[1], Path(sys.argv[2])
    if what == "fill":
        directory.mkdir(parents=True)
        identity.open_directory(directory)
        load_or_create_key(directory / "cluster.key")
        trio.run(fill, directory, int(sys.argv[3]))
    elif what == "start":
        trio.run(start, directory)
    else:
        profile = cProfile.Profile()
        profile.runcall(trio.run, start, directory)
        pstats.Stats(profile).sort_stats("cumulative").print_stats(40)


if __name__ == "__main__":
    main()

"""Flips single bits of one replica, one at a time and anywhere in its file: each must be noticed.

``python flip_chunk_bits.py DIRECTORY COUNT SEED`` prints for each region how many flips were made, how many were
noticed by reading the replica back (as the scrubber and VERIFY do), and what a client got that read it meanwhile and
after a restart: right bytes or an error. Wrong bytes, and flips that nobody notices, end the run with exit code 1.
"""

import random
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import trio
from crc32c import crc32c

from chunkserver import chunkfile, recovery
from chunkserver.chunkfile import ENTRY_BYTES, HEADER_BYTES, INDEX_OFFSET, PAYLOAD_OFFSET, Header
from chunkserver.client import verify_blocks
from chunkserver.disk import LocalDisk
from chunkserver.replica import Replica, ReplicaState
from chunkserver.store import Store
from chunkserver.table import Table
from metaserver.errors import DfsError

CLUSTER, CHUNK = UUID("5a1f0c3e-7d52-4f1c-9be4-3c7a5d20e9b1"), 0x7E57
LENGTHS = [65536, 1, 4096, 30_000, 65536, 777, 12_345, 65536] * 5
CONTENT = random.Random(11).randbytes(sum(LENGTHS))
USED_INDEX = len(LENGTHS) * ENTRY_BYTES
# Region: where it lies, and its share of the flips.
REGIONS: dict[str, tuple[int, int, int]] = {
    "header": (0, 64, 15),
    "header's padding": (64, HEADER_BYTES, 10),
    "index": (INDEX_OFFSET, INDEX_OFFSET + USED_INDEX, 25),
    "unused index": (INDEX_OFFSET + USED_INDEX, PAYLOAD_OFFSET, 10),
    "payload": (PAYLOAD_OFFSET, PAYLOAD_OFFSET + len(CONTENT), 40),
}


class Outcome(NamedTuple):
    region: str
    noticed: bool
    # What a reading client got of the blocks it asked for, while the server ran and after a restart.
    right: int
    refused: int
    wrong: int


def make_chunk(disk: LocalDisk) -> None:
    path = chunkfile.chunk_path(CHUNK)
    disk.make_directory(path.rpartition("/")[0])
    chain, entries, at = chunkfile.first_chain(CLUSTER, CHUNK), b"", 0
    for number, length in enumerate(LENGTHS):
        entry, chain = chunkfile.encode_entry(chain, at, length, crc32c(CONTENT[at : at + length]), 7, at, 3, number)
        entries += entry
        at += length
    header = Header(CLUSTER, CHUNK, 5, chunkfile.FLAG_SEALED, at, len(LENGTHS), chain)
    file = disk.create(path)
    file.write([chunkfile.encode_header(header), entries], 0)
    file.write([CONTENT], PAYLOAD_OFFSET)
    file.sync()


class Bench:
    """One replica on disk, and a server's view of it."""

    def __init__(self, disk: LocalDisk, nursery: trio.Nursery) -> None:
        self.disk = disk
        self.path = Path(disk.root, chunkfile.chunk_path(CHUNK))
        self.nursery = nursery
        self.replica = self.recovered()
        self.store = self.serving(self.replica)
        self.truth = self.replica.written
        self.chains = [
            entry.chain for entry in chunkfile.decode_entries(self.path.read_bytes()[4096 : 4096 + USED_INDEX])
        ]

    def recovered(self) -> Replica:
        return recovery.recover(self.disk, CLUSTER, CHUNK, chunkfile.chunk_path(CHUNK))

    def serving(self, replica: Replica) -> Store:
        def nothing(_: object) -> None: ...

        table = Table(
            self.disk, CLUSTER, [replica], self.nursery, reserve_bytes=0, on_change=nothing, on_gone=nothing,
            run_sync=inline,
        )  # fmt: skip
        return Store(table)

    def flip(self, place: int, bit: int) -> None:
        with self.path.open("r+b") as file:
            file.seek(place)
            old = file.read(1)[0]
            file.seek(place)
            file.write(bytes([old ^ 1 << bit]))

    async def try_one(self, region: str, place: int, bit: int) -> Outcome:
        self.flip(place, bit)
        try:
            noticed = self.store.reads.verification(self.replica).run().bad
            asked = offsets(place)
            counts = Counter([await self.read(self.store, offset) for offset in asked])
            again = self.recovered()
            self.check_recovered(again)
            if again.state is not ReplicaState.FAILED:
                store = self.serving(again)
                counts.update([await self.read(store, offset) for offset in asked])
        finally:
            self.flip(place, bit)
            self.replica.error = ""
            self.store.table.open_chunks.drop(CHUNK)
        return Outcome(region, noticed, counts["right"], counts["refused"], counts["wrong"])

    def check_recovered(self, found: Replica) -> None:
        """After a start it is as it was, or a beginning of that, or given up: never anything else."""
        if found.state is ReplicaState.SEALED:
            assert found.written == self.truth
        elif found.state is ReplicaState.FROZEN and found.written.entries:
            assert found.written.chain == self.chains[found.written.entries - 1]

    async def read(self, store: Store, offset: int) -> str:
        """What a client gets that asks for the block at ``offset``, as ``client.Pool.read`` judges it."""
        store.table.open_chunks.drop(CHUNK)
        try:
            index, data = await store.reads.read(CHUNK, offset, 1)
            entries = verify_blocks(index, data)
        except DfsError:
            return "refused"
        if not entries:
            return "refused"
        start = entries[0].logical_offset
        right = start <= offset < start + len(data) and bytes(data) == CONTENT[start : start + len(data)]
        return "right" if right else "wrong"


def offsets(place: int) -> list[int]:
    """Where a client looks: at the flipped byte, or at the block whose entry it is in, and at both ends."""
    if place >= PAYLOAD_OFFSET:
        return [place - PAYLOAD_OFFSET]
    number = (place - INDEX_OFFSET) // ENTRY_BYTES
    hit = [sum(LENGTHS[:number])] if 0 <= number < len(LENGTHS) else []
    return [0, *hit, len(CONTENT) - 1]


async def inline(function, *arguments, **_):  # type: ignore[no-untyped-def]
    """Instead of a worker thread."""
    await trio.lowlevel.checkpoint()
    return function(*arguments)


async def flips(directory: Path, count: int, seed: int) -> list[Outcome]:
    """``count`` flips, each undone before the next; where they fall follows from ``seed``."""
    disk = LocalDisk(str(directory))
    make_chunk(disk)
    choose = random.Random(seed)
    regions = choose.choices(list(REGIONS), [share for _, _, share in REGIONS.values()], k=count)
    outcomes = []
    async with trio.open_nursery() as nursery:
        bench = Bench(disk, nursery)
        assert not bench.store.reads.verification(bench.replica).run().bad
        for region in regions:
            start, stop, _ = REGIONS[region]
            outcomes.append(await bench.try_one(region, choose.randrange(start, stop), choose.randrange(8)))
        assert not bench.store.reads.verification(bench.replica).run().bad
    return outcomes


def table(outcomes: list[Outcome]) -> list[str]:
    lines = [f"{'region':18} {'flips':>7} {'noticed':>8} {'right':>8} {'refused':>8} {'wrong':>6}"]
    for region in [*REGIONS, "all"]:
        found = [each for each in outcomes if region in (each.region, "all")]
        noticed = sum(each.noticed for each in found)
        right, refused, wrong = (
            (sum(counts) for counts in zip(*(each[2:] for each in found), strict=True)) if found else (0, 0, 0)
        )
        lines.append(f"{region:18} {len(found):7} {noticed:8} {right:8} {refused:8} {wrong:6}")
    return lines


def failed(outcomes: list[Outcome]) -> bool:
    return any(each.wrong or not each.noticed for each in outcomes)


if __name__ == "__main__":
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    found = trio.run(flips, Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    print("\n".join(table(found)))
    sys.exit(failed(found))

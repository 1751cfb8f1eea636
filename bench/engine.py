"""What the metaserver's storage engine costs, without network: CPU per change and read, gaps of the event loop beside a
checkpoint, replay and start. ``PYTHONPATH=. python bench/engine.py [DIRECTORY]``; run it on a quiet machine.
"""

import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from metaserver.changelog import epoch_logs, find_firsts, list_segments
from metaserver.commit import Committer, open_committer
from metaserver.logrecord import Position, Record
from metaserver.overlay import Overlay
from metaserver.protocol import MAKE, Entry, Made
from metaserver.replay import replay
from metaserver.schema import Inode, Table, Transaction, dentry_key, key_u64, listing_key
from metaserver.start import Options

CHANGES = 20_000
NEVER = Options(checkpoint_seconds=3600, checkpoint_changes=1 << 30)
ROW = Inode(*[0] * 18).pack()
REPLY = Made(Entry(Inode(*[0] * 18).attributes(5)), True)


def create(committer: Committer, number: int) -> None:
    """The rows of a creation: three read, four written, and the stored answer."""

    def function(tx: Transaction, _: int) -> Made:
        name = dentry_key(1, b"file-%d" % number)
        tx.get(Table.INODES, key_u64(1))
        tx.get(Table.DENTRIES, name)
        tx.get(Table.INODES, key_u64(number))
        tx.put(Table.INODES, key_u64((1 << 40) + number), ROW)
        tx.put(Table.DENTRIES, name, bytes(17))
        tx.put(Table.LISTING, listing_key(1, number), bytes(20))
        tx.put(Table.INODES, key_u64(1), ROW)
        return REPLY

    committer.change(1, number, function, decode=MAKE.decode_reply)


async def measure(what: str, count: int, function: Callable[[int], object]) -> None:
    began = time.thread_time()
    for number in range(count):
        function(number)
        if number % 20 == 0:
            await trio.lowlevel.checkpoint()
    print(f"{what}: {(time.thread_time() - began) / count * 1e6:.1f} us of CPU")


async def gaps(what: str, committer: Committer, first: int | None, during: Callable[[], Awaitable[None]]) -> None:
    """Longest times between two turns of the loop while ``during`` runs, doing changes from ``first`` or nothing."""
    found: list[float] = []

    async def turn() -> None:
        last = time.perf_counter()
        number = first or 0
        while True:
            await trio.lowlevel.checkpoint()
            if first is not None:
                number += 1
                create(committer, number)
            now = time.perf_counter()
            found.append(now - last)
            last = now

    async with trio.open_nursery() as nursery:
        nursery.start_soon(turn)
        began = time.perf_counter()
        await during()
        seconds = time.perf_counter() - began
        nursery.cancel_scope.cancel()
    found.sort()
    p50, p99, p999 = (found[int(len(found) * share)] * 1e3 for share in (0.5, 0.99, 0.999))
    print(f"{what}: {seconds:.2f} s, gaps p50 {p50:.3f} p99 {p99:.3f} p99.9 {p999:.3f} max {found[-1] * 1e3:.1f} ms")


def replay_all(directory: Path) -> None:
    segments = list_segments(directory / "changelog")
    find_firsts(segments)
    overlay = Overlay()

    def apply(record: Record) -> None:
        overlay.apply(record.rows)

    began = time.perf_counter()
    done = replay(Position(0, 0), epoch_logs(segments, Position(0, 0)), apply)
    print(f"replay: {done.changes / (time.perf_counter() - began):,.0f} changes/s")


async def one_second() -> None:
    await trio.sleep(1)


async def main(directory: Path) -> None:
    async with open_committer(directory, options=NEVER) as committer:
        await measure("change", CHANGES, lambda number: create(committer, number + 1))
        found = key_u64((1 << 40) + 5), dentry_key(1, b"file-5")

        def lookup(_: int) -> object:
            return committer.read(1, lambda tx: (tx.get(Table.INODES, found[0]), tx.get(Table.DENTRIES, found[1])))

        await measure("read of two rows in the overlay", CHANGES, lookup)
        await gaps("nothing else", committer, None, one_second)
        await gaps(f"checkpoint of {CHANGES} changes", committer, None, committer.checkpoint)
        await measure("read of two rows in the store", CHANGES, lookup)
        await measure("change", CHANGES, lambda number: create(committer, CHANGES + number))
        await gaps("changes, nothing else", committer, 10 * CHANGES, one_second)
        await gaps("checkpoint beside changes", committer, 100 * CHANGES, committer.checkpoint)
    replay_all(directory)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as temporary:
        trio.run(main, Path(temporary))

"""Flips single bits of a store and reads everything, each time in a process of its own: LMDB may crash on damage.

``python flip_bits.py DIRECTORY COUNT SEED`` prints how often each outcome was seen. "unnoticed" is the one that must
not be: rows are different from what they were, and nothing says so.
"""

import os
import random
import sys
from collections import Counter
from pathlib import Path

from metaserver.overlay import row_key
from metaserver.schema import Table
from metaserver.store import CorruptStore, Store, create_store

MAP_BYTES = 1 << 20


def make_store(path: Path) -> tuple[dict[bytes, bytes], int]:
    """A store written in three checkpoints, its rows, and how much of the file is in use."""
    create_store(path)
    store = Store.open(path, MAP_BYTES)
    for batch in range(3):
        numbers = [(number * 7919) % 1500 for number in range(batch * 500, batch * 500 + 500)]
        tables = (Table.INODES, Table.DENTRIES)
        store.write({row_key(table, b"%06d" % number): b"value %d" % number for table in tables for number in numbers})
    store.renew()
    rows, used = dict(store.scan(b"\0", b"\xff")), store.sizes()["used_bytes"]
    store.close()
    return rows, used


def read_all(path: Path, rows: dict[bytes, bytes]) -> str:
    try:
        # Not looked through first: what a running metaserver would notice.
        store = Store.open(path, MAP_BYTES, check_seconds=0)
        same = dict(store.scan(b"\0", b"\xff")) == rows
        for _ in store.verify():
            pass
    except CorruptStore:
        return "noticed"
    return "harmless" if same else "unnoticed"


def in_child(path: Path, rows: dict[bytes, bytes]) -> str:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(2)
        os.write(writer, read_all(path, rows).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        outcome = pipe.read()
    os.waitpid(child, 0)
    return outcome or "crashed"


def main(directory: Path, count: int, seed: int) -> None:
    rows, used = make_store(directory / "data.mdb")
    whole = (directory / "data.mdb").read_bytes()
    choose = random.Random(seed)
    seen: Counter[str] = Counter()
    for _ in range(count):
        damaged = bytearray(whole)
        damaged[choose.randrange(used)] ^= 1 << choose.randrange(8)
        (directory / "damaged.mdb").write_bytes(damaged)
        seen[in_child(directory / "damaged.mdb", rows)] += 1
    for outcome, times in sorted(seen.items()):
        print(outcome, times)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

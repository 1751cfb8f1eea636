"""Work for a metaserver's storage engine that is going to die; run as a program it works until it is killed.

``python metaserver_load.py DIRECTORY`` prints the name of each file once its creation has been answered.
"""

import random
import sys
from collections.abc import Callable
from pathlib import Path

import trio

from metaserver import namespace
from metaserver.commit import Change, Committer, open_committer
from metaserver.inodes import Effects, make_root
from metaserver.protocol import MAKE, Entry, Made, Make, Unlink
from metaserver.schema import Session, Table, Transaction, dentry_key, inode_key, session_key
from metaserver.start import Options
from metaserver.wire import Replay

SESSION = 1
OPTIONS = Options(checkpoint_seconds=0.05, checkpoint_changes=40, segment_bytes=1 << 15, map_bytes=1 << 18)


def prepare(committer: Committer) -> None:
    """A root directory and a session, if they are not there."""
    if committer.read(0, lambda tx: tx.get(Table.INODES, inode_key(1)))[0] is None:
        committer.change(0, 0, make_root)
    row = Session("host", "/mnt", 1, 1, False, 0).pack()
    if committer.read(0, lambda tx: tx.get(Table.SESSIONS, session_key(SESSION)))[0] is None:
        committer.change(0, 0, lambda tx, _: tx.put(Table.SESSIONS, session_key(SESSION), row))


def making(name: bytes) -> Callable[[Transaction, int], Made]:
    def function(tx: Transaction, now_ns: int) -> Made:
        ino, inode, created = namespace.make(tx, now_ns, Make(1, name, 0o100644, 0, 0))
        return Made(Entry(inode.attributes(ino)), created)

    return function


def create(committer: Committer, name: bytes, operation: int, replay: Replay | None = None) -> Change[Made]:
    return committer.change(SESSION, operation, making(name), replay=replay, decode=MAKE.decode_reply)


def remove(committer: Committer, name: bytes) -> None:
    message = Unlink(1, name, False)
    committer.change(
        0, 0, lambda tx, now_ns: namespace.unlink(tx, now_ns, message, lambda _: (), Effects()), frees=True
    )


def names(committer: Committer) -> set[bytes]:
    return committer.read(0, lambda tx: {key[8:] for key, _ in tx.scan(Table.DENTRIES, b"", b"\xff" * 300)})[0]


def inode_of(committer: Committer, name: bytes) -> bytes | None:
    return committer.read(0, lambda tx: tx.get(Table.DENTRIES, dentry_key(1, name)))[0]


async def work(directory: Path) -> None:
    choose = random.Random()
    async with open_committer(directory, options=OPTIONS) as committer:
        prepare(committer)
        for number in range(1, 1 << 30):
            name = b"%d-%d" % (committer.epoch, number)
            create(committer, name, committer.epoch << 32 | number)
            print(name.decode(), flush=True)
            if choose.random() < 0.01:
                await committer.snapshot()
            await trio.sleep(0.001 if choose.random() < 0.2 else 0)


if __name__ == "__main__":
    trio.run(work, Path(sys.argv[1]))

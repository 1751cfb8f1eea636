"""Rows and changes for tests of the storage engine."""

from collections.abc import Callable
from pathlib import Path

from metaserver import namespace
from metaserver.commit import Change, Committer
from metaserver.inodes import make_root
from metaserver.protocol import MAKE, Entry, Made, Make
from metaserver.schema import Session, Table, Transaction, session_key
from metaserver.wire import Replay

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


def golden(name: str) -> bytes:
    """Bytes that must never change: what is on disk today must be readable tomorrow."""
    return (GOLDEN / name).read_bytes()


def prepare(committer: Committer) -> None:
    """A root directory and session 1."""
    committer.change(0, 0, make_root)
    row = Session("host", "/mnt", 1, 1, False, 0).pack()
    committer.change(0, 0, lambda tx, _: tx.put(Table.SESSIONS, session_key(1), row))


def making(name: bytes) -> Callable[[Transaction, int], Made]:
    def function(tx: Transaction, now_ns: int) -> Made:
        ino, inode, created = namespace.make(tx, now_ns, Make(1, name, 0o100644, 0, 0))
        return Made(Entry(inode.attributes(ino)), created)

    return function


def create(
    committer: Committer, name: bytes, *, session: int = 1, operation: int = 0, replay: Replay | None = None
) -> Change[Made]:
    return committer.change(session, operation, making(name), replay=replay, decode=MAKE.decode_reply)


def names(committer: Committer) -> set[bytes]:
    found, _ = committer.read(0, lambda tx: {key[8:] for key, _ in tx.scan(Table.DENTRIES, b"", b"\xff" * 300)})
    return found

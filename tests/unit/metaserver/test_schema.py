"""Rows and keys as bytes: what is on disk today must be readable tomorrow."""

import msgspec
import pytest
from engine_rows import golden

from metaserver import schema
from metaserver.schema import (
    Boot,
    Chunk,
    Dentry,
    ExtentRow,
    Inode,
    Listed,
    PackedMessage,
    PackedRow,
    Quota,
    Replica,
    Server,
    Session,
    StoredAnswer,
    Task,
    TaskKind,
    Total,
    Trashed,
    Tree,
)

ROWS: dict[str, PackedRow | Listed | PackedMessage] = {
    "rows_inode.bin": Inode(
        0o100644, 1000, 1001, 2, 1 << 40, 4096, -1, 10**18, 10**18 + 1, 10**18 + 2, 0x103, 1, 4, 5, 6, 7, 8, 9
    ),
    "rows_dentry.bin": Dentry(1 << 40, 17, 8),
    "rows_listed.bin": Listed(1 << 40, 8, b"na\xffme"),
    "rows_extent.bin": ExtentRow(1 << 33, 1 << 41, 1 << 25),
    "rows_chunk.bin": Chunk(2, 1, 3, 2, 1 << 26, 1000, 0xDEADBEEF, 1 << 25, 5, 10**18, 6),
    "rows_replica.bin": Replica(1, 0, 1 << 26, 1000, 0xDEADBEEF),
    "rows_quota.bin": Quota(1 << 40, 1 << 41, 1 << 20, 0, 7 * 86400 * 10**9, 10**18, 0),
    "rows_tree.bin": Tree(1 << 33, 1 << 34, 1 << 50, 1 << 51),
    "rows_total.bin": Total(1 << 33, 0xDEADBEEF),
    "rows_boot.bin": Boot(bytes(range(16)), True, False),
    "rows_server.bin": Server("disk1", "host", 7000, 7001, "rack", ["ssd"], "/data", 1 << 40, True, "host:2049", True),
    "rows_session.bin": Session("host", "/mnt", 123, 1, False, 10**18, 9),
    "rows_answer.bin": StoredAnswer(b"\x95", 111, "withdrawn"),
    "rows_trashed.bin": Trashed(1 << 40, b"na\xffme", 10**18, 1 << 33, False, "host"),
    "rows_task.bin": Task(TaskKind.SET_COPIES, 77, 4096, 3, [(77, 5), (1 << 40, 0)]),
}

KEYS = {
    "inode": schema.inode_key(0x0102030405060708),
    "dentry": schema.dentry_key(1, b"name"),
    "listing": schema.listing_key(1, 2),
    "xattr": schema.xattr_key(1, b"user.a"),
    "extent": schema.extent_key(1, 2),
    "by_chunk": schema.by_chunk_key(1, 2, 3, 4),
    "chunk": schema.chunk_key(1),
    "replica": schema.replica_key(1, 2),
    "by_server": schema.by_server_key(2, 1),
    "server": schema.server_key(2),
    "session": schema.session_key(1),
    "answer": schema.answer_key(1, 2),
    "orphan": schema.orphan_key(1, 2),
    "trash": schema.trash_key(10**18, 5),
    "quota": schema.quota_key(1 << 40),
    "link": schema.link_key(1, 2, 3),
    "survived": schema.survived_key(3),
    "totals": schema.totals_key(4),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_as_they_always_were(name: str) -> None:
    row = ROWS[name]
    assert row.pack() == golden(name)
    assert type(row).unpack(golden(name)) == row


def test_tasks_of_the_first_version_are_understood() -> None:
    assert Task.unpack(bytes.fromhex("9302 4d cd1000")) == Task(TaskKind.TRUNCATE, 77, 4096)


def test_every_kind_of_row_has_its_golden_bytes() -> None:
    kinds = {kind for base in (PackedRow, PackedMessage) for kind in base.__subclasses__()} | {Listed}
    assert {type(row) for row in ROWS.values()} == kinds


def test_keys_are_as_they_always_were() -> None:
    lines = "".join(f"{name} {key.hex()}\n" for name, key in KEYS.items())
    assert lines == golden("rows_keys.txt").decode()


def test_the_spelled_out_row_has_its_fields_in_order() -> None:
    row = Inode(*range(1, 19))
    assert row.pack() == Inode.LAYOUT.pack(*msgspec.structs.astuple(row))


def test_the_end_of_a_prefix() -> None:
    assert schema.after(b"a") == b"b"
    assert schema.after(b"a\xff\xff") == b"b"
    prefix = schema.key_u64((1 << 64) - 2)
    assert prefix + b"\xff" * 9 < schema.after(prefix) <= schema.key_u64((1 << 64) - 1)


def test_a_server_written_before_there_were_more_fields_can_be_read() -> None:
    old = msgspec.msgpack.encode(["disk1", "host", 7000, 7001, "", [], "/data", 1 << 40])
    assert Server.unpack(old) == Server("disk1", "host", 7000, 7001, "", [], "/data", 1 << 40)

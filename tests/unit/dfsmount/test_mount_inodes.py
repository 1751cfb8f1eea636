"""How long attributes are believed, and when an inode is forgotten."""

from typing import Any

import msgspec
import pytest

from dfsmount.inodes import InodeTable
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import Attributes

ATTRIBUTES = Attributes(7, 0o100644, 0, 0, 1, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> InodeTable:
    return InodeTable(1.0, clock=clock)


def with_(**changes: Any) -> Attributes:
    return msgspec.structs.replace(ATTRIBUTES, **changes)


def test_belief_counts_from_the_question_not_the_answer(table: InodeTable, clock: Clock) -> None:
    clock.now = 100.6
    inode = table.learn(ATTRIBUTES, asked_at=100.0)
    assert table.believed(7) is inode
    assert table.seconds_left(inode) == pytest.approx(0.4)
    clock.now = 101.0
    assert table.believed(7) is None
    assert table.seconds_left(inode) == 0


def test_an_answer_from_before_our_change_is_not_taken(table: InodeTable, clock: Clock) -> None:
    table.learn(ATTRIBUTES, asked_at=100.0)
    clock.now = 100.2
    table.changed(with_(size=20), asked_at=100.1)
    inode = table.learn(with_(size=10), asked_at=100.15)
    assert inode.attributes.size == 20
    clock.now = 100.4
    assert table.learn(with_(size=30), asked_at=100.3).attributes.size == 30


def test_doubt_lasts_until_the_next_question(table: InodeTable, clock: Clock) -> None:
    table.learn(ATTRIBUTES, asked_at=100.0)
    clock.now = 100.2
    table.doubt(7)
    assert table.believed(7) is None
    assert table.learn(with_(size=1), asked_at=100.1).attributes.size == 1
    assert table.believed(7) is None, "that was asked before the doubt"
    table.learn(with_(size=2), asked_at=100.2)
    assert table.believed(7) is not None


def test_doubt_all(table: InodeTable) -> None:
    table.learn(ATTRIBUTES, asked_at=100.0)
    table.doubt_all()
    assert table.believed(7) is None


def test_an_inode_lives_until_the_kernel_forgets_it(table: InodeTable) -> None:
    table.learn(ATTRIBUTES, asked_at=100.0).lookups = 3
    table.forget(7, 2)
    assert table.get(7) is not None
    table.forget(7, 1)
    assert table.get(7) is None
    table.forget(7, 1)


def test_an_open_inode_outlives_the_kernels_references(table: InodeTable) -> None:
    inode = table.learn(ATTRIBUTES, asked_at=100.0)
    inode.lookups = 1
    inode.opened = object()  # type: ignore[assignment]
    table.forget(7, 1)
    assert table.get(7) is inode
    inode.opened = None
    table.drop_unused(inode)
    assert table.get(7) is None


def test_what_is_peeked_at_stays_out_until_adopted(table: InodeTable) -> None:
    seen = table.peek(ATTRIBUTES, asked_at=100.0)
    assert table.get(7) is None
    table.adopt(seen)
    assert table.get(7) is seen
    assert seen.lookups == 1
    again = table.peek(with_(size=11), asked_at=100.0)
    assert again is seen
    assert seen.attributes.size == 11
    table.adopt(again)
    assert seen.lookups == 2


def test_very_many_inodes_are_trimmed(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfsmount.inodes.MAX_INODES", 100)
    left: list[int] = []
    table = InodeTable(1.0, clock=clock, left=left.append)
    for ino in range(100):
        table.learn(with_(ino=ino), asked_at=100.0).lookups = 1
    clock.now = 102.0
    table.trim()
    assert len(table) == 100
    opened = table.get(3)
    assert opened is not None
    opened.opened = object()  # type: ignore[assignment]
    untold = table.get(5)
    assert untold is not None
    untold.lost = DfsError(ErrorCode.IO, "written bytes were lost")
    for ino in range(100, 140):
        table.learn(with_(ino=ino), asked_at=102.0).lookups = 1
    table.doubt(2)
    table.trim()
    assert len(table) == 90
    assert table.get(3) is opened
    assert table.get(5) is untold, "the next open or rename tells of it"
    assert table.get(4) is None
    assert table.get(2) is None
    assert left == [2], "answers from before the doubt are still believed elsewhere"
    assert all(table.get(ino) is not None for ino in range(100, 140)), "these are believed"
    table.forget(4, 1)

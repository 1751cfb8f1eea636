"""Membership with a fake clock: states, room, reservations, and who is let in."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaserver.clock import LivedClock
from metaserver.errors import DfsError, ErrorCode
from metaserver.members import SERVER_MOVES, Member, Members
from metaserver.protocol import CHUNK_CAPACITY, Heartbeat, Register, ServerState
from metaserver.wire import PROTOCOL_VERSION

GIB = 1 << 30


def register(server: int, *, incarnation: int = 1, host: str = "h", path: str = "/d", version: int = PROTOCOL_VERSION,
             cluster: str = "", port: int = 9000) -> Register:  # fmt: skip
    return Register(
        server, f"s{server}", cluster, incarnation, host, port, 9001, "", [], path, GIB, GIB, 0, 0, version
    )  # fmt: skip


def heartbeat(member: Member, number: int, free: int = GIB, disk: str = "OK") -> Heartbeat:
    return Heartbeat(member.incarnation, number, 2 * GIB, free, 5, disk, [], [], [], 1, 2)


def members_of(*servers: int, free: int = GIB) -> Members:
    """All up at time 0."""
    members = Members(1.0, 60.0, Random(1))
    for server in servers:
        members.register(register(server, host=f"h{server}"), 0.0)
        member = members.by_id[server]
        member.listed = True
        members.heartbeat(member, heartbeat(member, 1, free), 0.0)
    return members


def test_three_missed_heartbeats_are_down_and_a_minute_is_lost() -> None:
    members = members_of(1)
    member = members.by_id[1]
    assert members.age(3.0) == []
    assert members.age(3.1) == [member]
    assert member.state is ServerState.DOWN
    assert members.age(60.0) == []
    assert members.age(60.1) == [member]
    assert member.state is ServerState.LOST
    assert members.age(1000.0) == []
    members.heartbeat(member, heartbeat(member, 2), 1000.0)
    assert member.state is ServerState.UP


def test_a_server_is_up_only_after_its_listing() -> None:
    members = Members(1.0, 60.0, Random(1))
    members.register(register(1), 0.0)
    member = members.by_id[1]
    members.heartbeat(member, heartbeat(member, 1), 0.0)
    assert not member.up
    member.listed = True
    members.heartbeat(member, heartbeat(member, 2), 0.0)
    assert member.up
    # A new life of the process has to report anew, and is not UP meanwhile.
    members.register(register(1, incarnation=2), 1.0)
    assert not members.by_id[1].up
    assert members.require(1, 1) is None
    assert members.require(1, 2) is not None
    assert members.require(9, 1) is None


def test_heartbeats_that_come_twice_bring_no_news() -> None:
    members = members_of(1)
    member = members.by_id[1]
    assert members.heartbeat(member, heartbeat(member, 2), 1.0)
    assert not members.heartbeat(member, heartbeat(member, 2), 2.0)
    assert member.heard == 2.0


@pytest.mark.parametrize(
    ("told", "code"),
    [
        (register(1, version=99), ErrorCode.WRONG_VERSION),
        (register(1, cluster="other"), ErrorCode.WRONG_CLUSTER),
        (register(0), ErrorCode.INVALID),
        (register(1 << 32), ErrorCode.INVALID),
        (register(1, port=0), ErrorCode.INVALID),
        (register(1, host=""), ErrorCode.INVALID),
        (register(7, incarnation=2, path="/elsewhere"), ErrorCode.BUSY),
    ],
)
def test_who_is_not_let_in(told: Register, code: ErrorCode) -> None:
    members = members_of(7)
    with pytest.raises(DfsError) as caught:
        members.check_register(told, "ours")
    assert caught.value.code is code


def test_who_is_let_in() -> None:
    members = members_of(7)
    members.check_register(register(8, cluster="ours"), "ours")
    # The same server again, and one that took over the disk of a server that is down.
    members.check_register(register(7, incarnation=2, host="h7"), "ours")
    members.age(10.0)
    members.check_register(register(7, incarnation=2, path="/elsewhere"), "ours")


def test_every_legal_move_is_in_the_table_and_no_other_is_made() -> None:
    members = members_of(1)
    member = members.by_id[1]
    for old in ServerState:
        for new in ServerState:
            member.state = old
            if new in SERVER_MOVES[old]:
                members._move(member, new)
                assert member.state is new
            else:
                with pytest.raises(DfsError):
                    members._move(member, new)


def test_placing_says_what_is_missing() -> None:
    members = members_of(1, 2, free=CHUNK_CAPACITY)
    assert len(members.place_new(2, 1, "", ())) == 2
    members.opened(1, 5, [1])
    # Fewer copies are for when servers are away: a full one is there.
    with pytest.raises(DfsError) as caught:
        members.place_new(2, 1, "", ())
    assert caught.value.code is ErrorCode.NO_SPACE
    assert members.place_new(1, 1, "", ()) == [2]
    members.age(5.0)
    with pytest.raises(DfsError) as caught:
        members.place_new(2, 1, "", ())
    assert caught.value.code is ErrorCode.UNAVAILABLE


def test_a_failed_or_full_disk_and_a_draining_server_take_nothing() -> None:
    members = members_of(1, 2, 3)
    members.heartbeat(members.by_id[1], heartbeat(members.by_id[1], 2, disk="FULL"), 0.0)
    assert sorted(members.place_new(2, 1, "", ())) == [2, 3]
    with pytest.raises(DfsError) as caught:
        members.place_new(3, 1, "", ())
    assert caught.value.code is ErrorCode.NO_SPACE
    members.heartbeat(members.by_id[1], heartbeat(members.by_id[1], 3, disk="FAILED"), 0.0)
    assert sorted(members.place_new(3, 1, "", ())) == [2, 3]
    members = members_of(1, 2)
    members.by_id[1].row.draining = True
    assert members.by_id[1].shown_state is ServerState.DRAINING
    assert members.place_new(2, 1, "", ()) == [2]


def test_ranks_for_reading() -> None:
    members = members_of(1, 2, 3)
    members.by_id[2].state = ServerState.DOWN
    members.by_id[3].state = ServerState.LOST
    assert [members.rank(server) for server in (1, 2, 3, 4)] == [0, 1, 2, 3]
    assert [each.server for each in members.addresses([3, 4, 1])] == [3, 1]


steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("open"),
            st.integers(1, 5),
            st.integers(1, 2),
            st.sets(st.integers(1, 3), min_size=1),
            st.sampled_from([1, 8 << 20, CHUNK_CAPACITY]),
        ),
        st.tuples(st.just("progress"), st.integers(1, 5), st.integers(0, CHUNK_CAPACITY)),
        st.tuples(st.just("close"), st.integers(1, 5)),
        st.tuples(st.just("register"), st.integers(1, 3)),
    )
)


@given(steps)
def test_reservations_are_the_sum_over_open_chunks(history: list[tuple]) -> None:
    members = members_of(1, 2, 3)
    for step in history:
        if step[0] == "open":
            members.opened(step[1], step[2], sorted(step[3]), limit=step[4])
        elif step[0] == "progress":
            members.progressed(step[1], step[2])
        elif step[0] == "close":
            members.closed(step[1])
        else:
            members.register(register(step[1], incarnation=2), 0.0)
        for server, member in members.by_id.items():
            expected = sum(
                max(0, chunk.limit - chunk.length) for chunk in members.open_chunks.values() if server in chunk.servers
            )
            assert member.reserved == expected
        owned = {chunk for chunks in members.owned.values() for chunk in chunks}
        assert owned == set(members.open_chunks)


def test_the_clock_counts_only_time_lived_through() -> None:
    clock = LivedClock()
    for now in (100.0, 101.0, 101.5, 5000.0, 4000.0, 4001.0):
        clock.tick(now)
    assert clock.seconds == 1.0 + 0.5 + 2.0 + 0.0 + 1.0


def test_a_filesystem_that_servers_share_counts_once() -> None:
    members = members_of(1, 2, 3)
    assert members.space(2) == (sum(member.capacity for member in members.by_id.values()) // 2, 3 * GIB // 2)
    for server in (1, 2):
        members.by_id[server].row.device = "host:1"
    members.by_id[2].free = GIB // 4
    members.by_id[1].reserved = members.by_id[2].reserved = 64 << 20
    assert members.space(1)[1] == GIB + GIB // 4 - (128 << 20)
    members.by_id[2].reserved = GIB
    assert members.space(1)[1] == GIB


def test_who_does_not_answer_a_writer_gets_no_chunk_of_it_if_there_are_enough_others() -> None:
    members = members_of(1, 2, 3)
    for _ in range(20):
        # Slow servers only if there are not enough others for all copies; mute ones rather not even then.
        assert set(members.place_new(2, 1, "", avoid=(1,))) == {2, 3}
        assert sorted(members.place_new(3, 1, "", avoid=(1,))) == [1, 2, 3]
        assert members.place_new(3, 1, "", avoid=(), never=(1, 3)) == [2]
        assert set(members.place_new(3, 2, "", avoid=(3,), never=(1,))) == {2, 3}
        # The last resort: it may be the writer's network.
        assert sorted(members.place_new(3, 3, "", avoid=(), never=(1,))) == [1, 2, 3]
        assert len(members.place_new(2, 1, "", avoid=(), never=(1, 2, 3))) == 2


def test_two_servers_on_one_disk_need_its_space_twice() -> None:
    members = members_of(1, 2)
    for member in members.by_id.values():
        member.row.device, member.free = "host:1", 100 << 20
    with pytest.raises(DfsError) as caught:
        members.place_new(2, 1, "", ())
    assert caught.value.code is ErrorCode.NO_SPACE
    servers = members.place_new(2, 1, "", (), needed=4 << 20)
    assert len(servers) == 2
    assert members.limit(servers, 4 << 20) == 8 << 20
    # What is reserved for one is not there for the other.
    members.opened(1, 5, servers, limit=48 << 20)
    assert [candidate.free for candidate in members.candidates()] == [4 << 20] * 2


def test_space_is_what_can_be_placed_now() -> None:
    members = members_of(1, 2, 3)
    members.by_id[1].free = 10 * GIB
    assert members.space(2)[1] == 2 * GIB
    members.heartbeat(members.by_id[2], heartbeat(members.by_id[2], 2, free=0, disk="FULL"), 0.0)
    assert members.space(2) == (3 * GIB, GIB)
    # A server that is away takes nothing, and one that is full does not become a reason to make fewer copies.
    members.by_id[3].state = ServerState.DOWN
    assert members.space(2) == (3 * GIB, 0)
    assert members.is_short(2)
    members.by_id[2].state = ServerState.DOWN
    assert members.space(2)[1] == 10 * GIB


def test_what_is_committed_is_no_longer_free_before_the_next_heartbeat_says_so() -> None:
    members = members_of(1, 2)
    members.opened(7, 5, [1, 2], limit=40 << 20)
    room = members.by_id[1].room
    members.progressed(7, 30 << 20)
    assert members.by_id[1].room == room
    members.closed(7)
    assert members.by_id[1].room == GIB - (30 << 20)


def test_space_is_pressing_where_it_is_needed() -> None:
    members = members_of(1, 2)
    assert not members.is_pressing(1, 0.0)
    members.by_id[1].free = CHUNK_CAPACITY
    assert members.is_pressing(1, 0.0)
    assert not members.is_pressing(2, 0.0)
    members.refused_at = 10.0
    assert members.is_pressing(2, 69.0)
    assert not members.is_pressing(2, 71.0)

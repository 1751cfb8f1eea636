"""States of chunks and replicas, what reports do to them, and what is planned for them."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_rows import MemoryRows

from metaserver import chunks, planning, reports
from metaserver.errors import DfsError, ErrorCode
from metaserver.members import Members
from metaserver.planning import Kind, Step
from metaserver.protocol import ChunkProgress, ChunkState, Register, ReplicaReport, ReplicaState, ServerState
from metaserver.reports import Finding
from metaserver.schema import Chunk, Replica, Server, Table
from metaserver.wire import PROTOCOL_VERSION

SESSION = 3


def sealed(tx: MemoryRows, servers: tuple[int, ...] = (1, 2), *, live: int = 10, length: int = 100) -> int:
    chunk = chunks.allocate(tx, 0, SESSION, servers, 2)
    chunks.progress(tx, SESSION, ChunkProgress(chunk, length, 4, 77))
    row = find(tx, chunk)
    row.live = live
    chunks.seal(tx, chunk, row, ())
    return chunk


def find(tx: MemoryRows, chunk: int) -> Chunk:
    row = chunks.find(tx, chunk)
    assert row is not None
    return row


def states(tx: MemoryRows, chunk: int) -> dict[int, ReplicaState]:
    return {server: ReplicaState(replica.state) for server, replica in chunks.replicas(tx, chunk)}


def set_state(tx: MemoryRows, chunk: int, server: int, state: ReplicaState) -> None:
    replica = dict(chunks.replicas(tx, chunk))[server]
    replica.state = state
    chunks.save_replica(tx, chunk, server, replica)


def report(chunk: int, length: int = 100, entries: int = 4, chain: int = 77, *, sealed: bool = True, error: str = ""):
    return ReplicaReport(chunk, length, entries, chain, sealed, error)


def test_moves_of_chunks_and_replicas_are_tables() -> None:
    for old in ChunkState:
        for new in ChunkState:
            row = Chunk(old, 0, 0, 2, 0, 0, 0, 0, 5, 0, 0)
            if new in chunks.CHUNK_MOVES[old]:
                chunks.move(row, new)
                assert (row.state, row.owner) == (new, 0)
            else:
                with pytest.raises(DfsError):
                    chunks.move(row, new)
    for before in ReplicaState:
        for after in ReplicaState:
            replica = Replica(before, 0, 0, 0, 0)
            if after is before or after in chunks.REPLICA_MOVES[before]:
                chunks.move_replica(replica, after)
                assert replica.state == after
            else:
                with pytest.raises(DfsError):
                    chunks.move_replica(replica, after)


def test_a_failed_replica_is_unsure_after_the_seal() -> None:
    tx = MemoryRows()
    chunk = chunks.allocate(tx, 0, SESSION, (1, 2), 2)
    chunks.progress(tx, SESSION, ChunkProgress(chunk, 100, 4, 77))
    row = find(tx, chunk)
    row.live = 10
    assert not chunks.seal(tx, chunk, row, [2, 9])
    assert states(tx, chunk) == {1: ReplicaState.GOOD, 2: ReplicaState.UNSURE}
    assert dict(chunks.replicas(tx, chunk))[1] == Replica(ReplicaState.GOOD, 0, 100, 4, 77)
    with pytest.raises(DfsError) as caught:
        chunks.require_owned(tx, chunk, SESSION)
    assert caught.value.code is ErrorCode.NOT_OWNER


@pytest.mark.parametrize("state", [ReplicaState.UNSURE, ReplicaState.BAD, ReplicaState.DELETING])
def test_a_chunk_can_be_sealed_whatever_is_known_of_its_failed_replica(state: ReplicaState) -> None:
    tx = MemoryRows()
    chunk = chunks.allocate(tx, 0, SESSION, (1, 2), 2)
    chunks.progress(tx, SESSION, ChunkProgress(chunk, 100, 4, 77))
    row = find(tx, chunk)
    row.live = 10
    set_state(tx, chunk, 2, state)
    assert not chunks.seal(tx, chunk, row, [2])
    assert find(tx, chunk).state == ChunkState.SEALED
    assert states(tx, chunk) == {1: ReplicaState.GOOD, 2: state}


def test_a_chunk_without_anything_in_it_is_dead_at_once() -> None:
    tx = MemoryRows()
    chunk = chunks.allocate(tx, 0, SESSION, (1, 2), 2)
    assert chunks.seal(tx, chunk, find(tx, chunk), ())
    assert find(tx, chunk).state == ChunkState.DEAD
    chunks.drop_replica(tx, chunk, 1)
    assert find(tx, chunk).state == ChunkState.DEAD
    chunks.drop_replica(tx, chunk, 2)
    assert not any(tx.tables[table] for table in (Table.CHUNKS, Table.REPLICAS, Table.BY_SERVER))


def test_places_are_good_replicas_first_and_useless_ones_last() -> None:
    tx = MemoryRows()
    chunk = sealed(tx, (1, 2, 3, 4, 5))
    set_state(tx, chunk, 1, ReplicaState.UNSURE)
    set_state(tx, chunk, 2, ReplicaState.BAD)
    set_state(tx, chunk, 3, ReplicaState.DELETING)
    assert chunks.place(tx, chunk, lambda _: 0).servers == (4, 5, 1, 2)
    assert chunks.place(tx, chunk, lambda server: server == 4).servers == (5, 1, 4, 2)


def test_bad_replicas_are_read_if_there_are_no_others() -> None:
    tx = MemoryRows()
    chunk = sealed(tx, (1, 2, 3))
    for server, state in ((1, ReplicaState.BAD), (2, ReplicaState.DELETING), (3, ReplicaState.BAD)):
        set_state(tx, chunk, server, state)
    assert chunks.place(tx, chunk, lambda server: server == 1).servers == (3, 1)


# -- reports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "state", "finding"),
    [
        (report(1), ReplicaState.GOOD, Finding.FINE),
        (report(1, sealed=False), ReplicaState.GOOD, Finding.UNSEALED),
        (report(1, length=150, entries=6, chain=8, sealed=False), ReplicaState.GOOD, Finding.UNSEALED),
        (report(1, length=99, sealed=False), ReplicaState.GOOD, Finding.UNSEALED),
        (report(1, length=99), ReplicaState.BAD, Finding.LOOK),
        (report(1, chain=78), ReplicaState.BAD, Finding.LOOK),
        (report(1, length=150, sealed=True), ReplicaState.BAD, Finding.LOOK),
        (report(1, error="BAD_CHECKSUM"), ReplicaState.BAD, Finding.LOOK),
    ],
)
def test_what_a_report_says_of_a_sealed_chunk(told: ReplicaReport, state: ReplicaState, finding: Finding) -> None:
    tx = MemoryRows()
    sealed(tx)
    assert reports.apply_report(tx, 1, told) is finding
    assert states(tx, 1)[1] is state


def test_what_reports_say_of_an_open_chunk() -> None:
    tx = MemoryRows()
    chunk = chunks.allocate(tx, 0, SESSION, (1, 2), 2)
    chunks.progress(tx, SESSION, ChunkProgress(chunk, 100, 4, 77))
    # What is longer may have been committed to a metaserver that has lost it.
    assert reports.apply_report(tx, 1, report(chunk, length=200, sealed=False)) is Finding.FINE
    # What is shorter may have been listed before the last commit.
    assert reports.apply_report(tx, 2, report(chunk, length=50, sealed=False)) is Finding.FINE
    assert reports.apply_missing(tx, 2, chunk) is Finding.FINE
    assert states(tx, chunk) == {1: ReplicaState.GOOD, 2: ReplicaState.GOOD}
    assert reports.apply_report(tx, 2, report(chunk, length=50, sealed=False, error="IO")) is Finding.LOOK
    assert states(tx, chunk) == {1: ReplicaState.GOOD, 2: ReplicaState.BAD}


def test_reports_of_replicas_that_nobody_asked_for() -> None:
    tx = MemoryRows()
    chunk = sealed(tx)
    assert reports.apply_report(tx, 9, report(1234)) is Finding.UNKNOWN
    reports.apply_report(tx, 7, report(chunk))
    reports.apply_report(tx, 8, report(chunk, length=5))
    assert states(tx, chunk)[7] is ReplicaState.GOOD
    assert states(tx, chunk)[8] is ReplicaState.BAD
    row = find(tx, chunk)
    row.live = 0
    chunks.move(row, ChunkState.DEAD)
    chunks.save(tx, chunk, row)
    assert reports.apply_report(tx, 6, report(chunk)) is Finding.LOOK
    assert states(tx, chunk)[6] is ReplicaState.DELETING


def test_replicas_that_are_missing() -> None:
    tx = MemoryRows()
    first, second, third = sealed(tx), chunks.allocate(tx, 0, SESSION, (1, 2), 2), sealed(tx)
    assert reports.missing_between(tx, 1, 0, 1 << 63, [first]) == [second, third]
    assert reports.missing_between(tx, 1, first, second, []) == [second]
    # The second is being written: its first append may still come, or have come meanwhile.
    assert reports.apply_missing(tx, 1, second) is Finding.FINE
    assert reports.apply_missing(tx, 1, third) is Finding.LOST
    assert states(tx, third)[1] is ReplicaState.BAD
    assert reports.apply_missing(tx, 1, third) is Finding.FINE
    set_state(tx, first, 1, ReplicaState.DELETING)
    assert reports.apply_missing(tx, 1, first) is Finding.LOOK
    assert 1 not in states(tx, first)
    assert reports.apply_missing(tx, 5, first) is Finding.FINE


# -- plans -----------------------------------------------------------------------------------------------------------


def servers(*up: int, down: tuple[int, ...] = (), lost: tuple[int, ...] = ()) -> Members:
    members = Members(1.0, 60.0, Random(1))
    for server in (*up, *down, *lost):
        members.load(server, Server(f"s{server}", f"h{server}", 1, 1, "", [], "/d", 1 << 40), 0.0)
        member = members.by_id[server]
        member.free, member.listed = 1 << 40, True
        member.state = ServerState.UP if server in up else ServerState.DOWN if server in down else ServerState.LOST
    return members


def plan(tx: MemoryRows, chunk: int, members: Members, suspects: set[int] | None = None) -> Step | None:
    return planning.plan(chunk, find(tx, chunk), chunks.replicas(tx, chunk), members, planning.Hints(suspects or set()))


def test_a_healthy_chunk_and_an_open_one_need_nothing() -> None:
    tx = MemoryRows()
    assert plan(tx, sealed(tx), servers(1, 2, 3)) is None
    assert plan(tx, chunks.allocate(tx, 0, SESSION, (1, 9), 2), servers(1, lost=(9,))) is None


def test_a_lost_copy_is_made_again_from_a_good_one() -> None:
    tx = MemoryRows()
    chunk = sealed(tx)
    assert plan(tx, chunk, servers(1, 3, down=(2,))) is None
    assert plan(tx, chunk, servers(1, 3, lost=(2,))) == Step(Kind.COPY, 3, 1)
    # Nowhere to go, or nothing to copy from.
    assert plan(tx, chunk, servers(1, lost=(2,))) is None
    assert plan(tx, chunk, servers(3, down=(1,), lost=(2,))) is None


def test_a_source_must_have_reported_in_this_epoch() -> None:
    tx = MemoryRows()
    chunk = sealed(tx)
    members = servers(1, 3, lost=(2,))
    members.by_id[1].listed = False
    assert plan(tx, chunk, members) is None


def test_replicas_are_sealed_and_doubts_settled_before_they_are_copied() -> None:
    tx = MemoryRows()
    chunk = sealed(tx)
    members = servers(1, 2, 3)
    members.by_id[2].unsealed.add(chunk)
    assert plan(tx, chunk, members) == Step(Kind.SEAL, 2)
    set_state(tx, chunk, 2, ReplicaState.UNSURE)
    assert plan(tx, chunk, members) == Step(Kind.SEAL, 2)
    assert plan(tx, chunk, members, {2}) == Step(Kind.VERIFY, 2)
    members.by_id[2].unsealed.clear()
    assert plan(tx, chunk, members) == Step(Kind.VERIFY, 2)


def test_copies_that_are_missing_do_not_wait_for_a_server_that_cannot_settle_a_doubt() -> None:
    tx = MemoryRows()
    chunk = sealed(tx, (1, 2, 5))
    set_state(tx, chunk, 2, ReplicaState.UNSURE)
    members = servers(1, 2, 3, 4, lost=(5,))

    def after_failures_of(*failed: int) -> Step | None:
        hints = planning.Hints(avoid=failed)
        return planning.plan(chunk, find(tx, chunk), chunks.replicas(tx, chunk), members, hints)

    assert after_failures_of() == Step(Kind.VERIFY, 2)
    # Its disk hangs: nobody knows for how long. Only one copy is known to be right.
    assert after_failures_of(2) in (Step(Kind.COPY, 3, 1), Step(Kind.COPY, 4, 1))
    # As many as are wanted: it is tried again, and nothing goes meanwhile.
    for target in (3, 4):
        chunks.add_replica(tx, chunk, target, chunks.replicas(tx, chunk)[0][1])
    assert after_failures_of(2) == Step(Kind.VERIFY, 2)
    chunks.drop_replica(tx, chunk, 4)
    set_state(tx, chunk, 1, ReplicaState.UNSURE)
    # One that has not failed is asked first; and without a right one there is nothing to copy.
    assert after_failures_of(1) == Step(Kind.VERIFY, 2)
    set_state(tx, chunk, 3, ReplicaState.BAD)
    assert after_failures_of(1, 2) == Step(Kind.VERIFY, 1)


def test_a_useless_replica_goes_when_there_are_enough_others() -> None:
    tx = MemoryRows()
    chunk = sealed(tx, (1, 2, 3))
    set_state(tx, chunk, 3, ReplicaState.BAD)
    assert plan(tx, chunk, servers(1, 2, 3)) == Step(Kind.DELETE, 3)
    assert plan(tx, chunk, servers(1, 3, down=(2,))) is None
    set_state(tx, chunk, 2, ReplicaState.BAD)
    # A fourth server takes a copy first; without one, a useless replica is replaced, or makes room.
    assert plan(tx, chunk, servers(1, 2, 3, 4)) == Step(Kind.COPY, 4, 1)
    assert plan(tx, chunk, servers(1, 2, 3)) == Step(Kind.COPY, 2, 1, replace=True)
    members = servers(1, 2, 3)
    members.by_id[2].free = members.by_id[3].free = 99
    assert plan(tx, chunk, members) == Step(Kind.DELETE, 2)


def test_what_is_left_of_useless_replicas_is_put_together() -> None:
    tx = MemoryRows()
    chunk = sealed(tx, (1, 2))
    for server in (1, 2):
        set_state(tx, chunk, server, ReplicaState.BAD)
    assert plan(tx, chunk, servers(1, 2, 3)) == Step(Kind.COPY, 3, 1, (2,))
    assert plan(tx, chunk, servers(1, 2)) == Step(Kind.COPY, 1, 1, (2,), replace=True)
    # One alone may be wrong only where its payload is not.
    assert plan(tx, chunk, servers(1, lost=(2,))) == Step(Kind.COPY, 1, 1, (1,), replace=True)
    members = servers(1, 2)
    members.by_id[1].disk_state = "FAILED"
    members.by_id[2].free = 99
    assert plan(tx, chunk, members) is None
    # A good one may come back.
    set_state(tx, chunk, 2, ReplicaState.GOOD)
    assert plan(tx, chunk, servers(1, 3, down=(2,))) is None
    assert plan(tx, chunk, servers(1, 3, lost=(2,))) == Step(Kind.COPY, 3, 1, (1,))


def test_what_a_lost_server_kept_is_read_back_before_it_counts() -> None:
    tx = MemoryRows()
    chunk = sealed(tx, (1, 2, 3))
    members = servers(1, 2, 3)
    members.by_id[3].free = 5
    members.by_id[1].row.was_lost = True
    assert plan(tx, chunk, members) == Step(Kind.VERIFY, 1)
    members.by_id[1].verified.add(chunk)
    assert plan(tx, chunk, members) == Step(Kind.DELETE, 3)
    # What goes need not be verified.
    members.by_id[3].row.was_lost = True
    assert plan(tx, chunk, members) == Step(Kind.DELETE, 3)
    # What is left of a damaged replica is needed if that is damaged as well.
    set_state(tx, chunk, 3, ReplicaState.BAD)
    members.by_id[1].verified.clear()
    assert plan(tx, chunk, members) == Step(Kind.VERIFY, 1)


def test_what_a_forgotten_server_brings_back_is_read_back_before_it_counts() -> None:
    members = servers(1)
    told = Register(
        2, "s2", "", 5, "h2", 9001, 9002, "", [], "/d2", 1 << 40, 1 << 40, 1, 0, PROTOCOL_VERSION
    )  # fmt: skip
    members.register(told, 0.0)
    assert not members.by_id[2].was_lost
    # It has had chunks before, and was removed then; or its disk has lain about for a year.
    members.remove(2)
    told.highest_chunk = 7
    members.register(told, 0.0)
    assert members.by_id[2].was_lost


def test_a_surplus_replica_goes_only_if_enough_others_are_known_to_be_right() -> None:
    tx = MemoryRows()
    chunk = sealed(tx, (1, 2, 3))
    members = servers(1, 2, 3)
    members.by_id[2].free = 5
    assert plan(tx, chunk, members) == Step(Kind.DELETE, 2)
    members.by_id[1].listed = False
    assert plan(tx, chunk, members) is None
    assert plan(tx, chunk, servers(1, 2, down=(3,))) is None


def test_nothing_is_deleted_because_there_is_one_on_a_failed_disk() -> None:
    tx = MemoryRows()
    chunk = sealed(tx, (1, 2, 3))
    members = servers(1, 2, 3)
    members.by_id[2].free = 5
    members.by_id[1].disk_state = "FAILED"
    assert plan(tx, chunk, members) is None
    members.by_id[1].disk_state = "FULL"
    assert plan(tx, chunk, members) == Step(Kind.DELETE, 2)


def test_a_bad_replica_is_kept_while_the_good_one_is_on_a_failed_disk() -> None:
    tx = MemoryRows()
    chunk = sealed(tx, (1, 2))
    set_state(tx, chunk, 2, ReplicaState.BAD)
    members = servers(1, 2)
    members.by_id[2].free = 99
    assert plan(tx, chunk, members) == Step(Kind.DELETE, 2)
    members.by_id[1].disk_state = "FAILED"
    assert plan(tx, chunk, members) is None


def test_what_is_on_a_failed_disk_is_copied_elsewhere() -> None:
    tx = MemoryRows()
    chunk = sealed(tx, (1, 2))
    members = servers(1, 2, 3)
    assert plan(tx, chunk, members) is None
    members.by_id[1].disk_state = "FAILED"
    step = plan(tx, chunk, members)
    assert step is not None
    assert (step.kind, step.server) == (Kind.MOVE, 3)
    chunks.add_replica(tx, chunk, 3, Replica(ReplicaState.GOOD, 0, 100, 4, 77))
    # Nothing can be deleted there; it is left as it is.
    assert plan(tx, chunk, members) is None
    # Repaired, it is one too many.
    members.by_id[1].disk_state = "OK"
    members.by_id[1].free = 5
    assert plan(tx, chunk, members) == Step(Kind.DELETE, 1)


def test_orders_that_were_forgotten_are_given_again() -> None:
    tx = MemoryRows()
    chunk = sealed(tx, (1, 2))
    chunks.add_replica(tx, chunk, 3, Replica(ReplicaState.COPYING, 0, 100, 4, 77))
    set_state(tx, chunk, 2, ReplicaState.BAD)
    assert plan(tx, chunk, servers(1, 2, 3)) == Step(Kind.COPY, 3, 1)
    # A server that is silent may not bring it to an end.
    assert (
        plan(tx, chunk, servers(1, 2, lost=(3,))) == plan(tx, chunk, servers(1, 2, down=(3,))) == Step(Kind.FORGET, 3)
    )
    set_state(tx, chunk, 3, ReplicaState.GOOD)
    set_state(tx, chunk, 2, ReplicaState.DELETING)
    assert plan(tx, chunk, servers(1, 2, 3)) == Step(Kind.DELETE, 2)
    # Where the others are not there any more, it is not superfluous.
    assert plan(tx, chunk, servers(1, 2, down=(3,))) == Step(Kind.KEEP, 2)


def test_a_dead_chunk_is_deleted_wherever_it_can_be() -> None:
    tx = MemoryRows()
    chunk = sealed(tx)
    row = find(tx, chunk)
    row.live = 0
    chunks.move(row, ChunkState.DEAD)
    chunks.save(tx, chunk, row)
    assert plan(tx, chunk, servers(2, down=(1,))) == Step(Kind.DELETE, 2)
    assert plan(tx, chunk, servers(3, down=(1,), lost=(2,))) is None


replica_states = st.dictionaries(st.integers(1, 5), st.sampled_from(list(ReplicaState)), min_size=1)
server_states = st.lists(st.sampled_from([ServerState.UP, ServerState.DOWN, ServerState.LOST]), min_size=5, max_size=5)


@given(replica_states, server_states, st.sets(st.integers(1, 5)))
@settings(max_examples=400)
def test_no_plan_ever_endangers_a_chunk(
    replicas: dict[int, ReplicaState], states: list[ServerState], listed: set[int]
) -> None:
    """Whatever is ordered: right copies on servers that are up never become fewer than wanted, nor none."""
    tx = MemoryRows()
    chunk = sealed(tx, tuple(replicas))
    for server, state in replicas.items():
        set_state(tx, chunk, server, state)
    members = servers(1, 2, 3, 4, 5)
    for server, state in enumerate(states, 1):
        members.by_id[server].state = state
        members.by_id[server].listed = server in listed
    step = plan(tx, chunk, members)
    if step is None:
        return
    right = {
        server
        for server, state in replicas.items()
        if state is ReplicaState.GOOD and members.by_id[server].up and server in listed
    }
    if step.kind is Kind.FORGET:
        assert replicas[step.server] is ReplicaState.COPYING
        return
    assert members.by_id[step.server].up
    if step.kind is Kind.KEEP:
        assert replicas[step.server] is ReplicaState.DELETING
        return
    if step.kind is Kind.COPY:
        assert step.source in right or (step.others and not right)
        assert {replicas[server] for server in step.others} <= {ReplicaState.BAD}
        in_place = ReplicaState.BAD if step.replace else ReplicaState.COPYING
        assert replicas.get(step.server, in_place) is in_place
    if step.kind is Kind.DELETE:
        assert right - {step.server}
        if replicas[step.server] in (ReplicaState.GOOD, ReplicaState.DELETING):
            assert len(right - {step.server}) >= 2

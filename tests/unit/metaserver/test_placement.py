"""Placement is pure: what must hold for any set of servers."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from metaserver.placement import Candidate, choose
from metaserver.protocol import CHUNK_CAPACITY

GIB = 1 << 30

candidates = st.lists(
    st.builds(
        Candidate,
        server=st.integers(1, 12),
        host=st.sampled_from(["a", "b", "c"]),
        rack=st.sampled_from(["", "r1", "r2"]),
        free=st.sampled_from([0, 1 << 20, CHUNK_CAPACITY - 1, CHUNK_CAPACITY, GIB, 100 * GIB]),
    ),
    unique_by=lambda one: one.server,
    max_size=12,
)


@given(candidates, st.integers(1, 5), st.sampled_from(["", "a", "b", "z"]), st.sets(st.integers(1, 12)), st.integers())
def test_what_holds_for_any_servers(
    servers: list[Candidate], count: int, host: str, avoid: set[int], seed: int
) -> None:
    chosen = choose(servers, count, Random(seed), writer_host=host, avoid=avoid)
    by_id = {one.server: one for one in servers}
    roomy = [one for one in servers if one.free >= CHUNK_CAPACITY]
    assert len(set(chosen)) == len(chosen) == min(count, len(roomy))
    assert all(by_id[server].free >= CHUNK_CAPACITY for server in chosen)
    welcome = [one for one in roomy if one.server not in avoid]
    # Servers to avoid only if there are not enough others.
    assert sum(server in avoid for server in chosen) == max(0, min(count, len(roomy)) - len(welcome))
    # As many hosts as there can be among those that are not to be avoided.
    if len(welcome) >= count:
        hosts = {one.host for one in welcome}
        assert len({by_id[server].host for server in chosen}) == min(count, len(hosts))
        if host in hosts:
            assert by_id[chosen[0]].host == host


@given(candidates, candidates, st.integers())
def test_another_replica_goes_where_there_is_none(servers: list[Candidate], beside: list[Candidate], seed: int) -> None:
    chosen = choose(servers, 1, Random(seed), beside=beside, needed=1)
    taken = {one.server for one in beside}
    assert all(server not in taken for server in chosen)
    free_hosts = {one.host for one in servers if one.free and one.server not in taken} - {one.host for one in beside}
    if free_hosts:
        (server,) = chosen
        assert next(one.host for one in servers if one.server == server) in free_hosts


def test_one_host_has_to_do_if_there_is_no_other() -> None:
    servers = [Candidate(number, "here", "", GIB) for number in (1, 2, 3)]
    assert len(choose(servers, 2, Random(1), writer_host="here")) == 2


def test_racks_differ_if_hosts_do_anyway() -> None:
    servers = [
        Candidate(1, "a", "r1", GIB),
        Candidate(2, "b", "r1", GIB),
        Candidate(3, "c", "r2", GIB),
    ]
    for seed in range(20):
        chosen = choose(servers, 2, Random(seed))
        assert 3 in chosen


def test_more_room_attracts_more() -> None:
    servers = [Candidate(1, "a", "", GIB), Candidate(2, "b", "", 9 * GIB)]
    random = Random(5)
    counts = [choose(servers, 1, random)[0] for _ in range(1000)]
    assert 850 < counts.count(2) < 950

"""What can be placed, against trying it out; and the limits of new chunks."""

from hypothesis import given
from hypothesis import strategies as st

from metaserver.protocol import CHUNK_CAPACITY
from metaserver.space import LEAST_LIMIT, Volume, chunk_limit, cleaning_room, footprint, is_short, payload, placeable

MIB = 1 << 20
volumes = st.lists(st.builds(Volume, st.integers(0, 40), st.integers(1, 3)), max_size=5)


def fits(found: list[Volume], copies: int, amount: int) -> bool:
    """Whether ``amount`` can be placed: no server takes more than one copy of any of it."""
    return sum(min(volume.room, volume.servers * amount) for volume in found) >= copies * amount


@given(volumes, st.integers(1, 4))
def test_placeable_is_the_most_that_fits(found: list[Volume], copies: int) -> None:
    possible = min(copies, sum(volume.servers for volume in found))
    most = max(amount for amount in range(201) if possible and fits(found, possible, amount)) if possible else 0
    assert placeable(found, copies) == most


@given(st.lists(st.integers(0, 40), max_size=6), st.integers(1, 3))
def test_placing_one_after_another_on_the_emptiest_reaches_it(rooms: list[int], copies: int) -> None:
    """What is promised can really be written: block by block, each on the servers with the most room."""
    if len(rooms) < copies:
        return
    promised = placeable([Volume(room, 1) for room in rooms], copies)
    placed = 0
    while sorted(rooms)[-copies]:
        rooms.sort()
        for position in range(1, copies + 1):
            rooms[-position] -= 1
        placed += 1
    assert placed == promised


def test_unequal_and_nearly_full_servers() -> None:
    assert placeable([Volume(1000, 1), Volume(10, 1), Volume(10, 1)], 2) == 20
    assert placeable([Volume(1000, 1), Volume(0, 1), Volume(10, 1)], 2) == 10
    assert placeable([Volume(1000, 1)], 2) == 1000
    assert placeable([Volume(1000, 3)], 2) == 500
    assert placeable([], 2) == 0


@given(st.integers(1, CHUNK_CAPACITY), st.integers(0, 100 * CHUNK_CAPACITY))
def test_a_limit_is_enough_and_fits(least: int, more: int) -> None:
    room = footprint(least) + more
    limit = chunk_limit(room, least)
    assert least <= limit <= CHUNK_CAPACITY
    assert footprint(limit) <= room or limit == least
    if payload(room) >= LEAST_LIMIT:
        assert limit >= LEAST_LIMIT


def test_limits_shrink_with_the_room() -> None:
    assert chunk_limit(10 << 30, 4 * MIB) == CHUNK_CAPACITY
    assert chunk_limit(512 * MIB, 4 * MIB) == 32 * MIB
    assert chunk_limit(64 * MIB, 4 * MIB) == LEAST_LIMIT
    assert 4 * MIB < chunk_limit(6 * MIB, 4 * MIB) < 6 * MIB
    assert chunk_limit(0, 0) == CHUNK_CAPACITY
    assert is_short(100, 4)
    assert not is_short(100, 5)


def test_small_disks_keep_something_for_the_cleaner_where_the_spare_is_little() -> None:
    assert cleaning_room(220 << 20) == (8 << 20) - (220 << 20) // 200
    assert cleaning_room(16 << 20) == 1 << 20
    assert cleaning_room(2 << 30) == cleaning_room(1 << 40) == 0

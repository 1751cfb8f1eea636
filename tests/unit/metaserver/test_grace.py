"""How long dead chunks are kept."""

from metaserver.grace import Graces
from metaserver.space import MOST_KEPT_BYTES, MOST_KEPT_PART

MIB = 1 << 20


def kept(seconds: float = 600.0) -> Graces:
    """Ten chunks of 100 MiB that died one after the other in the first nine seconds."""
    graces = Graces(seconds)
    for number in range(10):
        graces.died(number, 100 * MIB, float(number))
    return graces


def test_the_grace_is_short_where_space_is_pressing() -> None:
    graces = kept()
    graces.died(3, 100 * MIB, 50.0)
    assert graces.due(3, pressing=False) == 603.0
    assert graces.due(3, pressing=True) == 5.0
    assert kept(1.0).due(3, pressing=True) == 4.0
    assert Graces(600.0).due(3, pressing=False) == 0.0, "of what is not known to be dead nothing is said"


def test_what_is_kept_is_a_part_of_what_is_stored() -> None:
    graces = kept()
    assert graces.release(1000 * MIB * MOST_KEPT_PART, 20.0) == []
    assert graces.release(720 * MIB * MOST_KEPT_PART, 20.0) == [0, 1, 2]
    assert graces.due(2, pressing=False) == 0.0
    assert graces.kept_bytes == 700 * MIB
    # Known still: looked at again, they do not begin anew.
    graces.died(2, 100 * MIB, 21.0)
    assert graces.due(2, pressing=False) == 0.0
    assert graces.release(720 * MIB * MOST_KEPT_PART, 22.0) == []


def test_little_is_kept_however_little_is_stored() -> None:
    graces = kept()
    assert graces.release(0, 20.0) == list(range(10 - MOST_KEPT_BYTES // (100 * MIB)))


def test_nothing_is_released_at_once() -> None:
    assert kept().release(0, 4.0) == [0, 1, 2]


def test_what_is_gone_is_forgotten() -> None:
    graces = kept()
    graces.release(0, 4.0)
    assert sorted(graces) == list(range(10))
    for number in range(10):
        graces.forget(number)
        graces.forget(number)
    assert (list(graces), graces.kept_bytes) == ([], 0)

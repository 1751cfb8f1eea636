"""Names fetched ahead: when, how many, and what must never be believed."""

import pytest

from dfsmount.foreseen import FIRST_PAGE, LAST_PAGE, REST_SECONDS, SERIES, Foreseen, Wanted
from metaserver.protocol import Attributes, DirectoryEntry, DirectoryPage

DIRECTORY = 7


class World:
    """A directory of ``count`` entries, named by number, inode 1000 + number, looked up in order."""

    def __init__(self, count: int = 2000) -> None:
        self.now = 100.0
        self.count = count
        self.foreseen = Foreseen(1.0, lambda: self.now)
        self.asked = 0
        self.pages: list[int] = []

    def page(self, wanted: Wanted) -> DirectoryPage:
        start = int(wanted.after) + 1
        stop = min(self.count, start + wanted.count)
        entries = tuple(DirectoryEntry(name(n), 1000 + n, 8, n + 1, attributes(1000 + n)) for n in range(start, stop))
        return DirectoryPage(entries, stop == self.count)

    def fill(self, wanted: Wanted | None) -> None:
        if wanted is not None:
            self.pages.append(wanted.count)
            self.foreseen.fill(wanted, self.page(wanted), self.now)

    def miss(self, number: int) -> Wanted | None:
        self.asked += 1
        return self.foreseen.after_miss(DIRECTORY, name(number))

    def lookup(self, number: int) -> None:
        if self.foreseen.take(DIRECTORY, name(number)) is not None:
            self.fill(self.foreseen.after_hit(DIRECTORY, name(number)))
        else:
            self.fill(self.miss(number))


def name(number: int) -> bytes:
    return b"%d" % number


def attributes(ino: int) -> Attributes:
    return Attributes(ino, 0o100644, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def a_fetch(world: World) -> Wanted:
    for number in range(SERIES - 1):
        assert world.miss(number) is None
    wanted = world.miss(SERIES - 1)
    assert wanted is not None
    return wanted


def test_a_series_of_lookups_is_answered_from_pages_that_grow() -> None:
    world = World()
    for number in range(2000):
        world.lookup(number)
    assert world.asked == SERIES
    assert world.pages[0] == FIRST_PAGE
    assert max(world.pages) == LAST_PAGE
    assert len(world.foreseen) == 0


def test_each_entry_is_given_once_and_only_while_it_is_believed() -> None:
    world = World()
    world.fill(a_fetch(world))
    assert world.foreseen.take(DIRECTORY, name(5)) == (attributes(1005), 100.0)
    assert world.foreseen.take(DIRECTORY, name(5)) is None
    world.now += 1.0
    assert world.foreseen.take(DIRECTORY, name(6)) is None


def test_lookups_here_and_there_soon_fetch_nothing() -> None:
    world = World()
    numbers = [(n * 733) % 2000 for n in range(300)]
    for number in numbers:
        world.lookup(number)
    assert len(world.pages) <= 4
    world.now += REST_SECONDS + 1
    for number in range(50):
        world.lookup(number)
    assert world.asked < len(numbers) + 25


def test_slow_lookups_are_no_series() -> None:
    world = World()
    for number in range(20):
        world.now += 1.5
        assert world.miss(number) is None


@pytest.mark.parametrize("when", ["before the page came", "after it came"])
def test_what_this_mount_changed_is_not_believed(when: str) -> None:
    world = World()
    wanted = a_fetch(world)
    foreseen = world.foreseen
    if when == "after it came":
        world.fill(wanted)
    foreseen.forget_name(DIRECTORY, name(4))
    foreseen.forget_inode(1005)
    if when == "before the page came":
        world.fill(wanted)
    assert foreseen.take(DIRECTORY, name(4)) is None
    assert foreseen.take(DIRECTORY, name(5)) is None
    assert foreseen.take(DIRECTORY, name(7)) is not None


@pytest.mark.parametrize("how", ["directory", "all"])
def test_a_page_asked_for_before_somebody_elses_change_is_not_taken(how: str) -> None:
    world = World()
    wanted = a_fetch(world)
    if how == "directory":
        world.foreseen.forget_directory(DIRECTORY)
    else:
        world.foreseen.forget_all()
    world.fill(wanted)
    assert len(world.foreseen) == 0


def test_a_failed_fetch_is_tried_again_later() -> None:
    world = World()
    wanted = a_fetch(world)
    assert world.miss(3) is None, "one is under way"
    world.foreseen.fill(wanted, None, world.now)
    assert world.miss(4) is not None


def test_both_names_of_an_inode_are_forgotten() -> None:
    world = World()
    wanted = a_fetch(world)
    twins = tuple(DirectoryEntry(each, 42, 8, at, attributes(42)) for at, each in enumerate((b"x", b"y"), 9))
    world.foreseen.fill(wanted, DirectoryPage(twins, True), world.now)
    assert len(world.foreseen) == 2
    world.foreseen.forget_inode(42)
    assert len(world.foreseen) == 0


def test_memory_is_bounded() -> None:
    world = World(100_000)
    for directory in range(100):
        for number in range(SERIES):
            world.fill(world.foreseen.after_miss(directory, name(number)))
        # Using what came makes the next pages come.
        for number in range(SERIES, 200):
            if world.foreseen.take(directory, name(number)) is not None and number % 2:
                world.fill(world.foreseen.after_hit(directory, name(number)))
    assert len(world.pages) >= 100
    assert len(world.foreseen) <= 8192

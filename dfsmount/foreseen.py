"""Names that are likely to be looked up next, with their attributes: fetched by the page.

Programs look the entries of a directory up one after another (stat, rsync, rm, make). A page of a listing costs the
metaserver about 3 us for each entry, a lookup 100 us for it and its way: so after a few lookups in one directory the
entries that follow are fetched, and more of them as long as they are used. Directories are listed in the order in which
their entries were made, which is mostly also the order in which they are looked up.

What was fetched is believed for as long as any other answer. Whether this mount has changed an inode since, the table
of inodes knows; what leaves that table is forgotten here too (:meth:`Foreseen.forget_inode`). Synchronous.
"""

from collections import OrderedDict
from collections.abc import Callable

import msgspec

from metaserver.protocol import Attributes, DirectoryPage

# So many lookups within a second make a series.
SERIES = 3
SERIES_SECONDS = 1.0
# A page is at most half a millisecond of the metaserver's time.
FIRST_PAGE, LAST_PAGE = 32, 256
# If less than a quarter of what was fetched was used, this directory is left alone for a while.
WORTHWHILE = 4
REST_SECONDS = 5.0
MAX_DIRECTORIES = 64
MAX_ENTRIES = 8192

Key = tuple[int, bytes]


class _Series(msgspec.Struct, eq=False):
    """Lookups in one directory. The next page, after ``last``, is fetched when ``trigger`` is used."""

    count: int = 0
    at: float = 0.0
    size: int = FIRST_PAGE // 2
    fetched: int = 0
    used: int = 0
    fetching: bool = False
    trigger: bytes = b""
    last: bytes = b""
    resting_until: float = 0.0


class Wanted(msgspec.Struct, eq=False):
    """A page to fetch: ``count`` entries after the one called ``after``. :meth:`Foreseen.fill` must follow."""

    parent: int
    after: bytes
    count: int
    series: _Series


class Foreseen:
    """Entries that were fetched ahead. ``seconds`` is how long an answer is believed.

    Invariants: ``_names`` has exactly the keys of ``_entries``, by inode; both are bounded. While pages are on their
    way (``_in_flight`` of them), ``_changed`` collects names and inodes of which they may tell something outdated.
    """

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._series: OrderedDict[int, _Series] = OrderedDict()
        self._entries: OrderedDict[Key, tuple[Attributes, float]] = OrderedDict()
        self._names: dict[int, list[Key]] = {}
        self._in_flight = 0
        self._changed: set[Key | int] = set()

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, parent: int, name: bytes) -> tuple[Attributes, float] | None:
        """The attributes of the entry's inode and when they were asked for, once."""
        found = self._entries.get((parent, name))
        if found is None:
            return None
        self._drop((parent, name))
        if found[1] + self._seconds <= self._clock():
            return None
        series = self._series.get(parent)
        if series is not None:
            series.used += 1
            series.at = self._clock()
        return found

    def after_hit(self, parent: int, name: bytes) -> Wanted | None:
        """What to fetch after an entry was taken."""
        series = self._series.get(parent)
        if series is None or series.fetching or series.trigger != name:
            return None
        return self._want(series, parent, series.last)

    def after_miss(self, parent: int, name: bytes) -> Wanted | None:
        """What to fetch after a lookup that had to be asked, and found something."""
        now = self._clock()
        series = self._series.get(parent)
        if series is None:
            series = self._series[parent] = _Series()
            if len(self._series) > MAX_DIRECTORIES:
                self._series.popitem(last=False)
        self._series.move_to_end(parent)
        if now - series.at > SERIES_SECONDS:
            series.count = 0
        series.count += 1
        series.at = now
        if series.fetching or series.count < SERIES or now < series.resting_until:
            return None
        if series.used * WORTHWHILE < series.fetched:
            series.fetched = series.used = series.count = 0
            series.size = FIRST_PAGE // 2
            series.resting_until = now + REST_SECONDS
            return None
        return self._want(series, parent, name)

    def _want(self, series: _Series, parent: int, after: bytes) -> Wanted:
        series.fetching = True
        series.size = min(2 * series.size, LAST_PAGE)
        self._in_flight += 1
        return Wanted(parent, after, series.size, series)

    def fill(self, wanted: Wanted, page: DirectoryPage | None, asked_at: float) -> None:
        """The answer to ``wanted`` (None: it failed), which was asked for at ``asked_at``."""
        series = wanted.series
        series.fetching = False
        series.trigger = b""
        if page is not None and page.entries and self._series.get(wanted.parent) is series:
            # Old pages count less and less, so that a change of habit shows.
            series.fetched = series.fetched // 2 + len(page.entries)
            series.used //= 2
            if not page.end:
                series.trigger, series.last = page.entries[len(page.entries) // 2].name, page.entries[-1].name
            for entry in page.entries:
                key = wanted.parent, entry.name
                outdated = entry.ino in self._changed or key in self._changed
                if entry.attributes is not None and not outdated:
                    self._add(key, entry.attributes, asked_at)
        self._in_flight -= 1
        if not self._in_flight:
            self._changed.clear()

    def _add(self, key: Key, attributes: Attributes, asked_at: float) -> None:
        self._drop(key)
        self._entries[key] = attributes, asked_at
        self._names.setdefault(attributes.ino, []).append(key)
        if len(self._entries) > MAX_ENTRIES:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: Key) -> None:
        found = self._entries.pop(key, None)
        if found is not None:
            keys = self._names[found[0].ino]
            keys.remove(key)
            if not keys:
                del self._names[found[0].ino]

    def forget_inode(self, ino: int) -> None:
        """The inode has left the table of inodes, which knew whether it had been changed; or somebody changed it."""
        self._note(ino)
        for key in list(self._names.get(ino, ())):
            self._drop(key)

    def forget_name(self, parent: int, name: bytes) -> None:
        """This mount has changed what the name leads to."""
        self._note((parent, name))
        self._drop((parent, name))

    def _note(self, changed: Key | int) -> None:
        if self._in_flight:
            self._changed.add(changed)
            if len(self._changed) > MAX_ENTRIES:
                self.forget_all()

    def forget_directory(self, parent: int) -> None:
        """Somebody else changed its entries. What is being fetched is not to be believed either."""
        self._series.pop(parent, None)
        for key in [key for key in self._entries if key[0] == parent]:
            self._drop(key)

    def forget_all(self) -> None:
        """Nothing that was asked for until now is believed."""
        self._series.clear()
        self._entries.clear()
        self._names.clear()
        self._changed.clear()

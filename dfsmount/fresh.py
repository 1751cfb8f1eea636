"""Directories this mount has made a moment ago: what is in them is known, so a missing name needs no asking.

Whoever unpacks, copies or clones a tree looks each name up before making it. A directory is registered as open with
the request that makes it, so that the metaserver tells (CHANGED) when somebody else changes what is in it; then, and
when anything goes wrong, nothing is known any more. Beside that push, what is known must have been confirmed within
``attr_timeout``: see ``Names.lookup``.
"""

from collections.abc import Callable

import trio

from metaserver.protocol import NAME_MAX

# Directories that nobody has asked about for so long are given up.
IDLE_SECONDS = 5.0
# Bounds memory; the names of all directories together.
MAX_DIRECTORIES = 1000
MAX_NAMES = 200_000


class FreshDirectory:
    """``names`` are all that are in it."""

    __slots__ = ("names", "used_at")

    def __init__(self, used_at: float) -> None:
        self.names: set[bytes] = set()
        self.used_at = used_at


class FreshDirectories:
    """All fresh directories by ino. Those that were given up stay registered until :meth:`take_over` names them.

    Invariant: there are no more names than ``_added``.
    """

    def __init__(self, clock: Callable[[], float] = trio.current_time) -> None:
        self._clock = clock
        self._directories: dict[int, FreshDirectory] = {}
        self._over: list[int] = []
        self._added = 0

    def __len__(self) -> int:
        return len(self._directories)

    @property
    def room(self) -> bool:
        """Whether another one may be registered."""
        return len(self._directories) < MAX_DIRECTORIES

    def add(self, ino: int) -> None:
        self._directories[ino] = FreshDirectory(self._clock())

    def lacks(self, ino: int, name: bytes) -> bool:
        """Whether ``name`` is known not to be in the directory."""
        directory = self._directories.get(ino)
        if directory is None or len(name) > NAME_MAX or name in (b".", b".."):
            return False
        directory.used_at = self._clock()
        return name not in directory.names

    def added(self, ino: int, name: bytes) -> None:
        directory = self._directories.get(ino)
        if directory is not None:
            directory.names.add(name)
            self._added += 1
            if self._added > MAX_NAMES:
                self._added = sum(len(each.names) for each in self._directories.values())
                if self._added > MAX_NAMES:
                    self.give_up_all()

    def removed(self, ino: int, name: bytes) -> None:
        directory = self._directories.get(ino)
        if directory is not None:
            directory.names.discard(name)

    def give_up(self, ino: int) -> None:
        """Nothing is known about the directory any more."""
        if self._directories.pop(ino, None) is not None:
            self._over.append(ino)

    def give_up_all(self) -> None:
        for ino in list(self._directories):
            self.give_up(ino)

    def take_over(self) -> list[int]:
        """The inos to deregister now: given up since the last call, or idle."""
        before = self._clock() - IDLE_SECONDS
        for ino in [ino for ino, directory in self._directories.items() if directory.used_at < before]:
            self.give_up(ino)
        over, self._over = self._over, []
        return over

"""The inodes the kernel knows, and their attributes for as long as they may be believed.

The kernel counts how often an inode was handed to it (lookup, mkdir, ..., each entry of a readdirplus) and takes all
of that back with ``forget``; until then it may name the inode at any time. Nothing here awaits.

What is known of an inode that is neither open nor believed is a convenience, and given up when there are very many
(:meth:`InodeTable.trim`): the kernel keeps references to whatever a ``find`` has passed.

**Belief.** Attributes read from the metaserver are believed for ``attr_timeout`` from the moment they were *asked
for*; what remains of that is the time-out the kernel gets, so that both caches together never show anything older.
An answer to a question asked before a change of our own came back may be older than the change: it is not taken. An
answer to a question asked before we heard of somebody else's change may be older or newer than that: it is shown, since
it was true while the question was open, but not believed any longer.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import msgspec
import trio

from metaserver.errors import DfsError
from metaserver.protocol import Attributes

if TYPE_CHECKING:
    from dfsmount.handles import OpenFile

NEVER = float("-inf")
# At 650 bytes each: 65 MB.
MAX_INODES = 100_000


class Inode:
    """One inode. Times in seconds of the table's clock.

    ``kernel_version``: the data version whose contents the kernel's page cache may hold; -1: none.
    ``shown_size``: the size the kernel was told last; -1: none. ``parent`` is known (not 0) for most directories.
    ``gone``: its last name was removed here.
    ``lost``: written bytes of it are lost, and no handle was left to tell of that.
    ``opened`` is there while this mount has the inode open or dirty, or has not deregistered it yet.
    """

    __slots__ = (
        "attributes",
        "believed_until",
        "changed_at",
        "doubted_at",
        "gone",
        "ino",
        "kernel_version",
        "lookups",
        "lost",
        "opened",
        "parent",
        "shown_size",
        "target",
    )

    def __init__(self, attributes: Attributes) -> None:
        self.ino = attributes.ino
        self.attributes = attributes
        self.believed_until = NEVER
        self.changed_at = NEVER
        self.doubted_at = NEVER
        self.kernel_version = -1
        self.lookups = 0
        self.gone = False
        self.lost: DfsError | None = None
        self.opened: OpenFile | None = None
        self.parent = 0
        self.shown_size = -1
        self.target = b""


class InodeTable:
    """All inodes that the kernel refers to or that are open here, by ino."""

    def __init__(
        self,
        attr_timeout_seconds: float,
        *,
        clock: Callable[[], float] = trio.current_time,
        left: Callable[[int], None] = lambda ino: None,
    ) -> None:
        """``left`` is told of every inode that is not in the table any more."""
        self._timeout = attr_timeout_seconds
        self._clock = clock
        self._left = left
        self._inodes: dict[int, Inode] = {}

    def __len__(self) -> int:
        return len(self._inodes)

    def __iter__(self) -> Iterator[Inode]:
        return iter(self._inodes.values())

    def get(self, ino: int) -> Inode | None:
        return self._inodes.get(ino)

    def now(self) -> float:
        return self._clock()

    def learn(self, attributes: Attributes, asked_at: float, *, parent: int = 0, target: bytes = b"") -> Inode:
        """Takes what an answer to a question asked at ``asked_at`` says."""
        inode = self._inodes.get(attributes.ino)
        if inode is None:
            inode = self._inodes[attributes.ino] = Inode(attributes)
            inode.believed_until = asked_at + self._timeout
        elif self.is_news(inode, attributes, asked_at):
            inode.attributes = attributes
            if asked_at >= inode.doubted_at:
                inode.believed_until = asked_at + self._timeout
        if parent:
            inode.parent = parent
        if target:
            inode.target = target
        return inode

    @staticmethod
    def is_news(inode: Inode, attributes: Attributes, asked_at: float) -> bool:
        """Whether an answer is not older than what is known."""
        return asked_at >= inode.changed_at or attributes.data_version > inode.attributes.data_version

    def outdates(self, ino: int, asked_at: float) -> bool:
        """Whether what is known of an inode may be newer than an answer to a question asked at ``asked_at``."""
        inode = self._inodes.get(ino)
        return inode is not None and asked_at < max(inode.changed_at, inode.doubted_at)

    def peek(self, attributes: Attributes, asked_at: float) -> Inode:
        """Like :meth:`learn`, but an inode that is not in the table stays out of it until :meth:`adopt`."""
        if attributes.ino in self._inodes:
            return self.learn(attributes, asked_at)
        inode = Inode(attributes)
        inode.believed_until = asked_at + self._timeout
        return inode

    def adopt(self, inode: Inode) -> None:
        """Counts a reference that the kernel took to what :meth:`peek` gave."""
        self._inodes.setdefault(inode.ino, inode).lookups += 1

    def changed(self, attributes: Attributes, asked_at: float, *, parent: int = 0, target: bytes = b"") -> Inode:
        """Takes the answer to a change of our own, which is newer than every answer to an earlier question."""
        inode = self.learn(attributes, asked_at, parent=parent, target=target)
        inode.attributes = attributes
        inode.believed_until = asked_at + self._timeout
        inode.changed_at = self._clock()
        return inode

    def touched(self, ino: int, time_ns: int, links: int = 0) -> None:
        """A change of our own to the entries of a directory gave it these times and ``links`` more subdirectories."""
        inode = self.believed(ino)
        if inode is None or not time_ns:
            self.doubt(ino)
            return
        known = inode.attributes
        newest_ns = max(known.mtime_ns, time_ns)
        inode.attributes = msgspec.structs.replace(
            known, mtime_ns=newest_ns, ctime_ns=max(known.ctime_ns, newest_ns), nlink=known.nlink + links
        )
        inode.changed_at = self._clock()

    def moved_atime(self, ino: int, seen_ns: int, atime_ns: int) -> None:
        """The metaserver has moved a time of access for us; answers to earlier questions may bring the older one."""
        inode = self._inodes.get(ino)
        if inode is None:
            self._left(ino)
            return
        if inode.attributes.atime_ns == seen_ns:
            inode.attributes = msgspec.structs.replace(inode.attributes, atime_ns=atime_ns)
        if inode.opened is not None:
            inode.opened.state.move_atime(seen_ns, atime_ns)
        inode.doubted_at = self._clock()

    def believed(self, ino: int) -> Inode | None:
        """The inode if its attributes may be shown without asking."""
        inode = self._inodes.get(ino)
        return inode if inode is not None and inode.believed_until > self._clock() else None

    def doubt(self, ino: int) -> None:
        """A change, here or elsewhere: ask before showing attributes again."""
        inode = self._inodes.get(ino)
        if inode is not None:
            inode.believed_until = NEVER
            inode.doubted_at = self._clock()

    def doubt_all(self) -> None:
        for ino in self._inodes:
            self.doubt(ino)

    def seconds_left(self, inode: Inode) -> float:
        """How long the kernel may believe what it is told now."""
        return max(0.0, inode.believed_until - self._clock())

    def forget(self, ino: int, count: int) -> None:
        """The kernel gives back ``count`` references."""
        inode = self._inodes.get(ino)
        if inode is not None:
            inode.lookups = max(0, inode.lookups - count)
            self.drop_unused(inode)

    def trim(self) -> None:
        """Gives up what is not needed of too many inodes, those first that have been known the longest. What nobody has
        been told yet of lost bytes stays."""
        excess = len(self._inodes) - MAX_INODES
        if excess <= 0:
            return
        now = self._clock()
        # A tenth more, so that this is not done again at once.
        wanted = excess + MAX_INODES // 10
        unneeded = (
            ino
            for ino, inode in self._inodes.items()
            if inode.opened is None and inode.lost is None and inode.believed_until < now
        )
        for ino in list(islice(unneeded, wanted)):
            inode = self._inodes.pop(ino)
            if max(inode.changed_at, inode.doubted_at) + self._timeout > now:
                # Answers from before that are still believed, and nothing else tells that they are outdated.
                self._left(ino)

    def drop_unused(self, inode: Inode) -> None:
        """Forgets an inode that neither the kernel nor an open file refers to, and of which nothing is left to tell."""
        if (
            inode.lookups == 0
            and inode.opened is None
            and inode.lost is None
            and self._inodes.pop(inode.ino, None) is not None
        ):
            self._left(inode.ino)

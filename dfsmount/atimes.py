"""Times of access, as relatime has them: when they move, and how the metaserver hears of it.

The kernel leaves them to FUSE filesystems (their inodes are S_NOATIME). A read that comes here compares three times; if
the time of access is due, the mount shows the new one at once and tells the metaserver moments later, many inodes in
one message. As with ``lazytime``, a crash loses what was not sent, and a failure is not tried again: the next read
finds the update due once more.

What is sent, and shown until then, stands only on top of the time of access it was found due against: if that is
another by then, because somebody set it or another mount's read came first, it stays.
"""

from collections.abc import Awaitable, Callable, Sequence
from itertools import islice

import structlog
import trio

from dfsmount.inodes import Inode
from metaserver.errors import DfsError
from metaserver.protocol import TOUCH_INODES, Touch, Touched

log = structlog.get_logger(__name__)

# Unpacking, building and searching a tree read thousands of files within that time: a few messages for all of them.
DELAY_SECONDS = 5.0
# Of inodes that wait to be sent, about 2 MB; beyond, reads leave the time of access alone.
MAX_WAITING = 10_000
SECOND_NS = 1_000_000_000
DAY_SECONDS = 24 * 60 * 60


def is_due(atime_ns: int, mtime_ns: int, ctime_ns: int, now_ns: int) -> bool:
    """Whether a read at ``now_ns`` moves the time of access: relatime_need_update of Linux (fs/inode.c)."""
    return (
        atime_ns <= mtime_ns or atime_ns <= ctime_ns or now_ns // SECOND_NS - atime_ns // SECOND_NS >= DAY_SECONDS
    ) and atime_ns != now_ns


class AccessTimes:
    """``touch`` tells the metaserver, ``answered`` gets what it has taken and what not, ``now_ns`` is its clock.

    ``_waiting`` are to be sent, ``_sending`` on their way; what waits may stand on top of what is on its way.
    """

    def __init__(
        self,
        touch: Callable[[Sequence[Touch]], Awaitable[Touched]],
        answered: Callable[[Touch, bool], None],
        now_ns: Callable[[], int],
        *,
        files: bool,
        directories: bool,
    ) -> None:
        """``files`` (symlinks among them), ``directories``: whether reading these moves their time of access."""
        self._touch = touch
        self._answered = answered
        self._now_ns = now_ns
        self.files = files
        self.directories = directories
        self._waiting: dict[int, Touch] = {}
        self._sending: dict[int, Touch] = {}
        self._lock = trio.Lock()
        self._some = trio.Event()
        self._many = trio.Event()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._sending)

    def shown(self, ino: int, atime_ns: int) -> int:
        """The time of access to show for an inode that has ``atime_ns`` without what is not answered yet."""
        for touches in (self._sending, self._waiting):
            touch = touches.get(ino)
            if touch is not None and touch.seen_ns == atime_ns:
                atime_ns = touch.atime_ns
        return atime_ns

    def read(self, inode: Inode) -> bool:
        """Contents were read; never waits, never fails. Whether the time of access has moved."""
        atime_ns, mtime_ns, ctime_ns = known_times(inode)
        # Only the metaserver's clock sets ctime: with ours behind, a file would be read before it was made.
        ino, now_ns = inode.ino, max(self._now_ns(), ctime_ns + 1)
        if self._waiting or self._sending:
            atime_ns = self.shown(ino, atime_ns)
        if not is_due(atime_ns, mtime_ns, ctime_ns, now_ns) or len(self._waiting) >= MAX_WAITING:
            return False
        older = self._waiting.get(ino)
        seen_ns = older.seen_ns if older is not None and older.atime_ns == atime_ns else atime_ns
        self._waiting[ino] = Touch(ino, seen_ns, now_ns)
        self._some.set()
        if len(self._waiting) >= TOUCH_INODES:
            self._many.set()
        return True

    def forget(self, ino: int) -> None:
        """Somebody here sets the time of access, perhaps to the very one that it had before the last read."""
        self._waiting.pop(ino, None)
        self._sending.pop(ino, None)

    async def run(self) -> None:
        """Sends what gathers, for ever."""
        while True:
            await self._some.wait()
            with trio.move_on_after(DELAY_SECONDS):
                await self._many.wait()
            self._some, self._many = trio.Event(), trio.Event()
            await self.send()

    async def send(self) -> None:
        """Sends all that waits now; what fails is lost."""
        async with self._lock:
            for _ in range(0, len(self._waiting), TOUCH_INODES):
                self._sending = dict(islice(self._waiting.items(), TOUCH_INODES))
                for ino in self._sending:
                    del self._waiting[ino]
                await self._send(list(self._sending.values()))

    async def _send(self, touches: list[Touch]) -> None:
        try:
            left = set((await self._touch(touches)).left)
        except DfsError as error:
            log.debug("times of access are lost", inodes=len(touches), error=str(error))
        else:
            for touch in touches:
                # Others have been set to something else here meanwhile.
                if touch.ino in self._sending:
                    self._answered(touch, touch.ino not in left)
        finally:
            self._sending = {}


def known_times(inode: Inode) -> tuple[int, int, int]:
    """atime, mtime and ctime with unwritten data and attributes just set, in nanoseconds."""
    attributes, file = inode.attributes, inode.opened
    if file is None:
        return attributes.atime_ns, attributes.mtime_ns, attributes.ctime_ns
    state = file.state
    if state.attributes.data_version > attributes.data_version:
        attributes = state.attributes
    atime_ns, mtime_ns, ctime_ns = attributes.atime_ns, attributes.mtime_ns, attributes.ctime_ns
    if state.is_dirty:
        mtime_ns, ctime_ns = state.mtime_ns, max(ctime_ns, state.ctime_ns)
    if file.ahead is not None:
        changes = file.ahead.changes
        atime_ns = atime_ns if changes.atime_ns is None else changes.atime_ns
        mtime_ns = mtime_ns if changes.mtime_ns is None else changes.mtime_ns
        ctime_ns = max(ctime_ns, changes.ctime_ns or ctime_ns)
    return atime_ns, mtime_ns, ctime_ns

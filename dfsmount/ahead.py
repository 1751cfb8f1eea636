"""chmod, chown and utimens of files that this mount is writing: answered at once, sent in one request moments later.

Unpacking an archive does all three to each file. Nobody can tell the difference: as long as a file is registered for
writing here, whoever looks at it from elsewhere makes the metaserver push FLUSH, and what is ahead is sent and
answered before that is; so is it before fsync. A failure (the metaserver cannot be reached for ``timeout``) is
reported like that of written data, once per handle.
"""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import structlog
import trio

from dfsmount.jobs import Jobs
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import Attributes, SetAttributes

if TYPE_CHECKING:
    from dfsmount.handles import OpenFile

log = structlog.get_logger(__name__)

# Long enough for the next call of the same program, too short for anybody to count on.
DELAY_SECONDS = 0.005
# More unanswered requests than this, and the next caller waits for its own.
LIMIT = 500


class Ahead:
    """What one file is ahead of the metaserver. ``changes`` are all that are not answered, ``unsent`` those of them
    that are not sent. At most one request is in flight, so that none overtakes another."""

    __slots__ = ("changes", "idle", "in_flight", "unsent")

    def __init__(self, ino: int) -> None:
        self.changes = SetAttributes(ino)
        self.unsent: SetAttributes | None = None
        self.in_flight = False
        self.idle = trio.Event()

    def take(self, changes: SetAttributes) -> None:
        self.changes = merge(self.changes, changes)
        self.unsent = changes if self.unsent is None else merge(self.unsent, changes)


class Deferred:
    """All files that are ahead. ``answered`` gets attributes that the metaserver returned, and when it was asked."""

    def __init__(
        self,
        set_attributes: Callable[[SetAttributes], Awaitable[Attributes]],
        jobs: Jobs,
        answered: Callable[[Attributes, float], object],
    ) -> None:
        self._set_attributes = set_attributes
        self._jobs = jobs
        self._answered = answered
        self._files: dict[int, OpenFile] = {}

    def can_take(self, file: "OpenFile", changes: SetAttributes) -> bool:
        return changes.size is None and file.writing and not file.unlinked and len(self._files) < LIMIT

    def take(self, file: "OpenFile", changes: SetAttributes) -> None:
        """Makes the file show ``changes``, which say their ctime, and sends them soon."""
        ahead = file.ahead
        if ahead is None:
            ahead = file.ahead = Ahead(file.ino)
            self._files[file.ino] = file
            self._jobs.start(self._send_later, file, ahead)
        ahead.take(changes)

    async def settle(self, file: "OpenFile") -> None:
        """Returns when the metaserver knows everything, or it has failed."""
        ahead = file.ahead
        if ahead is not None:
            self.send(file)
            await ahead.idle.wait()

    async def settle_all(self) -> None:
        for file in list(self._files.values()):
            self.send(file)
        for file in list(self._files.values()):
            await self.settle(file)

    def send(self, file: "OpenFile") -> None:
        """Sends now what is unsent, without waiting."""
        ahead = file.ahead
        if ahead is not None and not ahead.in_flight:
            ahead.in_flight = True
            self._jobs.start(self._send, file, ahead)

    async def _send_later(self, file: "OpenFile", ahead: Ahead) -> None:
        with trio.move_on_after(DELAY_SECONDS):
            await ahead.idle.wait()
        if file.ahead is ahead:
            self.send(file)

    async def _send(self, file: "OpenFile", ahead: Ahead) -> None:
        while ahead.unsent is not None:
            changes, ahead.unsent = ahead.unsent, None
            asked_at = trio.current_time()
            try:
                self._answered(await self._set_attributes(changes), asked_at)
            except DfsError as error:
                self._failed(file, error)
        file.ahead = None
        del self._files[file.ino]
        ahead.idle.set()

    def _failed(self, file: "OpenFile", error: DfsError) -> None:
        if error.code is not ErrorCode.STALE_INODE:
            log.error("attributes of a file could not be set", ino=file.ino, error=str(error))
            file.state.fail(error)


def merge(older: SetAttributes, newer: SetAttributes) -> SetAttributes:
    """Both in one; what both set is as ``newer`` says. Neither sets a size."""

    def newest(old: int | None, new: int | None) -> int | None:
        return old if new is None else new

    return SetAttributes(
        newer.ino,
        mode=newest(older.mode, newer.mode),
        uid=newest(older.uid, newer.uid),
        gid=newest(older.gid, newer.gid),
        atime_ns=newest(older.atime_ns, newer.atime_ns),
        mtime_ns=newest(older.mtime_ns, newer.mtime_ns),
        ctime_ns=newest(older.ctime_ns, newer.ctime_ns),
    )

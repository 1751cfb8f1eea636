"""Room under quotas for what is written here, asked for before bytes are taken into memory: EDQUOT comes at write().

What a session holds of a quota is for the bytes that are dirty; each layer knows how many it was charged
(``Layer.charge``). While nobody has set a quota nothing is asked and nothing is charged (``FileState.quota`` is 0).
"""

from collections.abc import Awaitable, Callable, Iterable

import trio

from dfsmount.filestate import FileState
from dfsmount.jobs import Jobs
from dfsmount.meta import Meta
from metaserver import protocol
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import GetExtents, Reserve, Reserved

# Not known which quota a file is under: ask.
UNKNOWN = -1
CALL_SECONDS = 10.0
# How long a program waits for what other mounts hold and do not use, and how often it is asked for.
WAIT_SECONDS, RETRY_SECONDS = 2.5, 0.1
# What was not used for so long is given back.
IDLE_SECONDS = 1.0


class Held:
    """What is held under one quota. Invariant: ``credit`` is at most ``granted`` less what dirty layers are charged."""

    __slots__ = ("credit", "granted", "used_at")

    def __init__(self) -> None:
        self.granted = self.credit = 0
        self.used_at = 0.0


class Allowances:
    """``dirty`` are the files with unwritten bytes; ``flush`` makes one's part of it at the metaserver."""

    def __init__(
        self,
        meta: Meta,
        dirty: Callable[[], Iterable[FileState]],
        flush: Callable[[FileState], Awaitable[None]],
        jobs: Jobs,
    ) -> None:
        self._meta = meta
        self._dirty = dirty
        self._flush = flush
        self._jobs = jobs
        self._held: dict[int, Held] = {}
        self._asking = trio.Lock()

    async def admit(self, file: FileState, offset: int, length: int) -> int:
        """Returns how many bytes to charge for a write once there is room for it; raises QUOTA_EXCEEDED if there is
        none. The caller takes the bytes without waiting. Cancelling is safe: what was granted is given back later."""
        if file.quota == UNKNOWN:
            file.quota = (await self._ask(file, UNKNOWN)).quota
        if not file.quota:
            return 0
        self._of(file).used_at = trio.current_time()
        if self._of(file).credit < length:
            async with self._asking:
                length = await self._make_room(file, offset, length)
        self._of(file).credit -= length
        return length

    def take(self, file: FileState, length: int) -> bool:
        """:meth:`admit` if there is nothing to ask: all of it is to be charged."""
        held = self._held.get(file.quota)
        if held is None or file.quota == UNKNOWN or held.credit < length:
            return False
        held.used_at = trio.current_time()
        held.credit -= length
        return True

    def _of(self, file: FileState) -> Held:
        return self._held.setdefault(file.quota, Held())

    async def _make_room(self, file: FileState, offset: int, length: int) -> int:
        """How much of the write needs room, which is there now: all of it, or only what is not in place of other bytes,
        if there is less."""
        deadline = trio.current_time() + WAIT_SECONDS
        flushed = False
        while True:
            reserved = await self._reserve(file, length)
            if not file.quota:
                return 0
            if self._of(file).credit >= length:
                return length
            if not flushed:
                # What is dirty may be in place of other bytes, and need no room after all.
                flushed = True
                for each in [each for each in self._dirty() if each.quota == file.quota]:
                    await self._flush(each)
                continue
            growth = await self._growth(file, offset, length)
            if self._of(file).credit >= growth:
                return growth
            if not reserved.wait or trio.current_time() >= deadline:
                raise DfsError(ErrorCode.QUOTA_EXCEEDED, "the quota of this directory tree is used up")
            await trio.sleep(RETRY_SECONDS)

    async def _reserve(self, file: FileState, length: int) -> Reserved:
        reserved = await self._ask(file, self._charged(file.quota) + length)
        file.quota = reserved.quota
        held = self._of(file)
        held.granted = reserved.granted
        held.credit = held.granted - self._charged(file.quota)
        return reserved

    async def _ask(self, file: FileState, wanted: int) -> Reserved:
        return await self._meta.call(protocol.RESERVE, Reserve(file.ino, wanted), timeout=CALL_SECONDS)

    def _charged(self, quota: int) -> int:
        return sum(layer.charge for file in self._dirty() if file.quota == quota for layer in file.dirty.layers)

    async def _growth(self, file: FileState, offset: int, length: int) -> int:
        """How many of these bytes are not in place of others."""
        page = await self._meta.call(protocol.GET_EXTENTS, GetExtents(file.ino, offset, length), timeout=CALL_SECONDS)
        stop = offset + length
        covered = [(extent.file_offset, extent.file_offset + extent.length) for extent in page.extents]
        covered += [(span.offset, span.offset + len(span.data)) for span in file.dirty.overlay(offset, stop)]
        position, free = offset, 0
        for start, end in sorted(covered):
            free += max(0, min(start, stop) - position)
            position = max(position, end)
        return free + max(0, stop - position)

    def spent(self, quota: int, charge: int) -> None:
        """A layer with this charge is part of its file: the metaserver has taken it from what is held."""
        held = self._held.get(quota)
        if held is not None:
            held.granted = max(0, held.granted - charge)

    def forget(self) -> None:
        """Quotas have changed, or the metaserver has: what is held is not known any more, and asked for again."""
        for held in self._held.values():
            held.credit = 0

    def give_back(self, now: float) -> None:
        """What nothing was written under for a while is offered to others."""
        for quota, held in [*self._held.items()]:
            if quota and now >= held.used_at + IDLE_SECONDS and held.granted > self._charged(quota):
                held.granted, held.credit = self._charged(quota), 0
                self._jobs.start(self._return, quota)

    async def _return(self, quota: int) -> None:
        """What is dirty stays held."""
        request = Reserve(quota, self._charged(quota))
        try:
            await self._meta.call(protocol.RESERVE, request, timeout=CALL_SECONDS)
        except DfsError:
            # Then it ends with the session, or is set right by the next write.
            return

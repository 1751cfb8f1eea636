"""Which dirty bytes are sent next. Synchronous; times are seconds of the caller's clock.

A dirty file waits until a layer is full, someone wants its bytes (fsync, FLUSH), or they are a second old. Closed small
files wait a moment for each other, so that unpacking an archive makes one append and one commit of hundreds of files.
"""

from dataclasses import dataclass

from dfsmount.dirty import LAYER_BYTES, Layer
from dfsmount.filestate import FileState
from metaserver.protocol import COMMIT_EXTENTS

# Bytes of one batch: what one sync and one commit cover.
BATCH_BYTES = 2 * LAYER_BYTES
# Closed files are sent when so much of them has gathered; at 4 KiB a file that is 256 of them.
GATHER_BYTES = 1 << 20
GATHER_FILES = 400

Chosen = list[tuple[FileState, Layer]]


@dataclass(frozen=True)
class Delays:
    """How long bytes may stay here although nobody waits: of open files (promise P3), and of closed ones."""

    age_seconds: float = 1.0
    gather_seconds: float = 0.1


class Schedule:
    """Files with bytes to send.

    Invariants: a file with bytes that are not taken is in ``_ready`` (some closed layer is not taken), or ``_aging``
    (with the time at which it is due). ``_closed`` has some of the files of ``_aging``. The values of ``_aging``
    and ``_closed`` ascend, because files enter at the end.
    """

    def __init__(self, delays: Delays) -> None:
        self._delays = delays
        self._ready: dict[FileState, None] = {}
        self._closed: dict[FileState, float] = {}
        self._closed_cost = 0
        self._aging: dict[FileState, float] = {}

    def written(self, file: FileState, now: float, *, full: bool) -> bool:
        """Notes a write; whether there is something new to do: a layer to send, or a first file that waits."""
        if full:
            self._ready[file] = None
            return True
        if file in self._aging:
            return False
        self._aging[file] = now + self._delays.age_seconds
        return len(self._aging) == 1

    def want(self, file: FileState) -> None:
        """All bytes of ``file`` are to be sent now."""
        self._aging.pop(file, None)
        self._leave_closed(file)
        file.dirty.close()
        if file.dirty.waiting() is not None:
            self._ready[file] = None

    def want_all(self) -> None:
        for file in [*self._closed, *self._aging]:
            self.want(file)

    def closed(self, file: FileState, now: float) -> bool:
        """A handle of the file was closed; whether enough has gathered by that to be sent."""
        if file not in self._aging:
            return False
        if file not in self._closed:
            self._closed[file] = now + self._delays.gather_seconds
            self._closed_cost += file.dirty.cost
        if self._closed_cost < GATHER_BYTES and len(self._closed) < GATHER_FILES:
            return False
        for each in [*self._closed]:
            self.want(each)
        return True

    @property
    def waits(self) -> bool:
        """Whether something becomes ready by the passing of time."""
        return bool(self._aging)

    def expire(self, now: float) -> bool:
        """Makes ready what has waited long enough; whether there was any."""
        found = False
        if self._closed and next(iter(self._closed.values())) <= now:
            # All of them: one after another, each would get a batch of its own.
            for file in [*self._closed]:
                self.want(file)
            found = True
        while self._aging and (file := next(iter(self._aging))) and self._aging[file] <= now:
            self.want(file)
            found = True
        return found

    def pick(self, lane: int, room: int) -> Chosen:
        """Takes layers for a batch of ``lane``, in the order in which they became ready: at most ``room`` bytes unless
        the first layer alone is more, and no more than fit into a commit."""
        chosen: Chosen = []
        length = rows = 0
        limit = min(room, BATCH_BYTES)
        for file in self._of_lane(lane):
            while (layer := file.dirty.waiting()) is not None:
                length += layer.size
                rows += layer.runs + 1
                if chosen and (length > limit or rows > COMMIT_EXTENTS):
                    return chosen
                layer.taken = True
                chosen.append((file, layer))
            del self._ready[file]
        return chosen

    def _of_lane(self, lane: int) -> list[FileState]:
        return [file for file in self._ready if file.lane == lane and not file.held]

    def is_much(self, lane: int, enough: int) -> bool:
        """Whether at least ``enough`` bytes are ready for ``lane``."""
        total = 0
        for file in self._ready:
            if file.lane == lane and not file.held:
                total += file.dirty.unsent
                if total >= enough:
                    return True
        return False

    def forget(self, file: FileState) -> None:
        """Nothing of this file is to be sent any more, or all of it is taken."""
        self._ready.pop(file, None)
        self._aging.pop(file, None)
        self._leave_closed(file)

    def _leave_closed(self, file: FileState) -> None:
        """The cost of what remains is not known exactly (files grow after their close); it is 0 when none remains."""
        if self._closed.pop(file, None) is not None:
            self._closed_cost = max(0, self._closed_cost - file.dirty.cost) if self._closed else 0

"""What a mount knows and owes of one inode that is open or dirty: attributes, map, dirty bytes, failure.

One task at a time changes a piece of it, and every method is synchronous, so nothing comes between the lines. ``vfs``
creates one per inode; the writer changes what concerns dirty bytes, the reader fills in the map.
"""

from collections.abc import Callable

import msgspec
import trio

from dfsmount.dirty import DirtyRuns, Layer
from dfsmount.extents import ExtentMap
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import FILE_SIZE_MAX, Attributes, Entry, Extent, FileMap


def _nobody(_: DfsError) -> None:
    """Nobody wants to know."""


class FileState:
    """The state of one inode.

    ``attributes`` are the newest the metaserver has told; ``size``, ``mtime_ns`` and ``ctime_ns`` are what this mount
    shows: ahead of the attributes while something is dirty. ``places`` says for chunks of the map which servers have
    them. ``error`` is why bytes were lost and ``error_count`` how often that happened: a handle remembers the count it
    has reported (:meth:`error_since`), so that each handle reports each failure once. ``on_loss`` is called each time:
    what is lost is not shown any more, but others may have kept what they were shown.

    Invariant: ``extents`` describes the contents at ``data_version`` of ``attributes``, where it is known at all.
    """

    def __init__(self, entry: Entry, on_loss: Callable[[DfsError], None] = _nobody) -> None:
        self.attributes: Attributes = entry.attributes
        self.ino = entry.attributes.ino
        self.size = self.mtime_ns = self.ctime_ns = 0
        self.extents = ExtentMap()
        self.places: dict[int, tuple[int, ...]] = {}
        self.dirty = DirtyRuns()
        self.error: DfsError | None = None
        self.error_count = 0
        self._on_loss = on_loss
        # The writer's. Unparked whenever a layer is done; how many truncates hold it back; how many wait for it to be
        # on stable storage; how many bytes were written in order, and up to where; the lane it streams into (0: the one
        # for all).
        self.settled = trio.lowlevel.ParkingLot()
        self.held = 0
        self.fsyncs = 0
        self.streamed = 0
        self.stream_stop = 0
        self.lane = 0
        # The trace of whoever waits for what is dirty.
        self.trace = 0
        # The directory with the quota that its bytes count under, 0: none, -1: not known (``allowances.py``).
        self.quota = entry.quota
        self._truncating: int | None = None
        # Whether the newest truncate has dropped bytes that were nowhere else.
        self._dropped = False
        self._know_end()
        self._show()
        self._learn(entry)

    def __repr__(self) -> str:
        return f"<inode {self.ino}, {self.size} bytes, {len(self.dirty.layers)} dirty layers>"

    @property
    def is_dirty(self) -> bool:
        """Whether there are bytes that are not yet part of the file at the metaserver, on their way or not."""
        return bool(self.dirty.layers)

    # -- what the metaserver says ------------------------------------------------------------------------------

    def refresh(self, entry: Entry) -> None:
        """Attributes and perhaps the map, from any answer of the metaserver but a commit's.

        An answer older than what is known is ignored. If the contents changed elsewhere the map is forgotten, and
        fetched again when it is needed. Ends a truncate of our own: if the answer does not show it, it did not happen.
        """
        new, known = entry.attributes, self.attributes
        truncating, self._truncating = self._truncating, None
        if new.data_version < known.data_version:
            self._show()
            return
        if new.data_version != known.data_version:
            cut_here = truncating == new.size and new.truncate_generation == known.truncate_generation + 1
            if cut_here and new.data_version == known.data_version + 1:
                self.extents.truncate(new.size)
            else:
                self._forget_map()
        self._adopt(new)
        self._learn(entry)

    def forget_map(self) -> None:
        """The map is not right any more: a chunk has moved."""
        self._forget_map()
        self._know_end()

    def _forget_map(self) -> None:
        """Before new attributes are adopted: of what lies past the old size nothing is known any more either."""
        self.extents.forget()
        self.places.clear()

    def learn_page(self, page: FileMap, start: int, data_version: int) -> bool:
        """Takes a page of the map that was asked for from ``start`` on while ``data_version`` was known. False if the
        contents have changed since, so that it may be of either version: ask again."""
        if data_version != self.attributes.data_version:
            return False
        self.extents.learn(page.extents, start, page.end)
        self._know_places(page)
        return True

    def _adopt(self, attributes: Attributes) -> None:
        if attributes.truncate_generation != self.attributes.truncate_generation:
            self.dirty.close()
        self.attributes = attributes
        self._know_end()
        self._show()

    def _learn(self, entry: Entry) -> None:
        if entry.map is not None:
            if self.extents.known_until(0) < entry.map.end:
                self.extents.learn(entry.map.extents, 0, entry.map.end)
            self._know_places(entry.map)

    def _know_places(self, page: FileMap) -> None:
        for place in page.places:
            self.places[place.chunk] = place.servers

    def _know_end(self) -> None:
        """Nothing is mapped past the size at the metaserver: that needs no asking."""
        size = self.attributes.size
        if self.extents.known_until(size) < FILE_SIZE_MAX:
            self.extents.learn((), size, FILE_SIZE_MAX)

    def _show(self) -> None:
        """Sets what this mount shows from the attributes and what is dirty."""
        size = self.attributes.size if self._truncating is None else self._truncating
        self.size = max(size, self.dirty.stop)
        self.mtime_ns, self.ctime_ns = self.attributes.mtime_ns, self.attributes.ctime_ns
        written_ns = self.dirty.newest_mtime_ns
        if written_ns is not None:
            self.mtime_ns = written_ns
            self.ctime_ns = max(self.ctime_ns, written_ns)

    # -- what this mount does ------------------------------------------------------------------------------------

    def write(self, offset: int, data: bytes, now_ns: int) -> bool:
        """Takes bytes into the dirty layers; whether a layer is full by that."""
        full = self.dirty.write(offset, data, self.attributes.truncate_generation, now_ns)
        stop = offset + len(data)
        if stop > self.size:
            self.size = stop
        self.mtime_ns = now_ns
        if now_ns > self.ctime_ns:
            self.ctime_ns = now_ns
        self.streamed = self.streamed + len(data) if offset == self.stream_stop else 0
        self.stream_stop = stop
        return full

    def begin_truncate(self, size: int) -> None:
        """Drops dirty bytes past ``size`` and shows that size, until the next :meth:`refresh` tells what came of it.
        Nothing may be in flight. The truncate's time is newer than that of what remains dirty."""
        before = self.dirty.cost
        self.dirty.cut(size)
        self.dirty.leave_times()
        self._dropped = self.dirty.cost < before
        self._truncating = size
        self._show()
        self.settled.unpark_all()

    def truncate_failed(self) -> None:
        """Ends a truncate as one that did not happen. What it has dropped is lost then."""
        if self._dropped:
            self.fail(DfsError(ErrorCode.IO, "written data was dropped by a truncate that failed"))
        self.refresh(Entry(self.attributes))

    def leave_times(self) -> None:
        """Times are being set explicitly (utimens): commits of what was written before must not set them again. To be
        called when that request is sent, not when it is answered; a later write counts again."""
        self.dirty.leave_times()
        self._show()

    def committed(self, layer: Layer, attributes: Attributes, extents: tuple[Extent, ...]) -> bool:
        """A layer is part of the file, as ``attributes`` show it; ``extents`` are where its bytes are now. False if it
        had been given up before."""
        if not self.dirty.done(layer):
            return False
        version = self.attributes.data_version
        if attributes.data_version == version + 1:
            self.extents.apply(extents)
            self._adopt(attributes)
        elif attributes.data_version > version:
            self._forget_map()
            self._adopt(attributes)
        else:
            # A later answer has overtaken this one: what is known of the map then contains these extents.
            self._show()
        self.settled.unpark_all()
        return True

    def dropped(self, layer: Layer, error: DfsError | None) -> bool:
        """A layer will never be part of the file: because of ``error``, or (None) because the file is gone or an older
        layer is lost. False if that was known before. With ``error``, nothing written since is kept either."""
        if not self.dirty.done(layer):
            return False
        if error is not None:
            self.dirty.doom(layer)
            self.fail(error)
        self._show()
        self.settled.unpark_all()
        return True

    def discard(self) -> None:
        """Drops what is not yet on its way to a chunk: nobody can read it any more."""
        self.dirty.drop_untaken()
        self._show()
        self.settled.unpark_all()

    def abandon(self, error: DfsError) -> None:
        """Everything dirty is lost."""
        if self.dirty:
            self.fail(error)
        self.dirty.clear()
        self._show()
        self.settled.unpark_all()

    def move_atime(self, seen_ns: int, atime_ns: int) -> None:
        """The metaserver has moved the time of access from ``seen_ns``."""
        if self.attributes.atime_ns == seen_ns:
            self.attributes = msgspec.structs.replace(self.attributes, atime_ns=atime_ns)

    def fail(self, error: DfsError) -> None:
        """Written bytes are lost because of ``error``."""
        self.error = error
        self.error_count += 1
        self._on_loss(error)

    def error_since(self, count: int) -> DfsError | None:
        """The error of a handle that has reported ``count`` failures; the handle then remembers ``error_count``."""
        return self.error if self.error_count > count else None

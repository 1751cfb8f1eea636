"""What is appended together, under one sync: layers of files, cut into blocks. Synchronous."""

from collections.abc import Iterator

from dfsmount.blocks import Block, cut_run, extents_of
from dfsmount.chunkwriter import OpenChunk, Sent
from dfsmount.dirty import Layer
from dfsmount.filestate import FileState
from dfsmount.schedule import Chosen
from metaserver.protocol import Extent


class Item:
    """One layer of one file in a batch."""

    __slots__ = ("blocks", "file", "layer")

    def __init__(self, file: FileState, layer: Layer) -> None:
        self.file = file
        self.layer = layer
        self.blocks: list[Block] = [
            block for offset, pieces in layer.each_run() for block in cut_run(file.ino, offset, pieces)
        ]


class Batch:
    """Layers that are appended to one chunk together, under one sync. ``chunk`` and ``at`` (where it begins there) are
    set while it is sent."""

    def __init__(self, chosen: Chosen) -> None:
        self._take([Item(file, layer) for file, layer in chosen])

    def _take(self, items: list[Item]) -> None:
        self.items = items
        self.length = sum(item.layer.size for item in self.items)
        self.blocks = sum(len(item.blocks) for item in self.items)
        self.rows = sum(item.layer.runs + 1 for item in self.items)
        self.chunk: OpenChunk | None = None
        self.sent: Sent | None = None
        self.at = 0

    def halve(self) -> "Batch":
        """Gives the second half of its layers (at least one stays) to a batch that comes after it. Not while it is
        sent."""
        rest = Batch([])
        middle = (len(self.items) + 1) // 2
        rest._take(self.items[middle:])
        self._take(self.items[:middle])
        return rest

    def placed(self) -> "Iterator[Placed]":
        """Where its layers are in the chunk."""
        assert self.chunk is not None
        at = self.at
        for item in self.items:
            yield self, item, tuple(extents_of(item.blocks, self.chunk.chunk, at))
            at += item.layer.size


Placed = tuple[Batch, Item, tuple[Extent, ...]]


def blocker_of(group: list[Batch]) -> FileState | None:
    """A file of which an older layer, in another lane, is not committed yet: these batches must wait for it."""
    mine = {item.layer for batch in group for item in batch.items}
    for batch in group:
        for item in batch.items:
            layers = item.file.dirty.layers
            if layers and layers[0] is not item.layer:
                older = layers[: layers.index(item.layer)] if item.layer in layers else []
                if any(layer not in mine for layer in older):
                    return item.file
    return None

"""A chunkserver's disk on a :class:`powercut.Volume`."""

import os
from collections.abc import Sequence

from powercut import Inode, Volume

from chunkserver.disk import LocalDisk, LocalFile
from metaserver.wire import Buffer


class PoweredFile(LocalFile):
    """Reads as every file; what changes it goes through the volume."""

    __slots__ = ("_inode", "_volume")

    def __init__(self, descriptor: int, volume: Volume, direct: bool = False) -> None:
        super().__init__(descriptor, direct)
        self._volume = volume
        self._inode: Inode = volume.inode_of(descriptor)

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        self._volume.write(self._inode, self._descriptor, b"".join(buffers), offset)

    def truncate(self, length: int) -> None:
        self._volume.resize(self._inode, self._descriptor, length)

    def sync(self) -> None:
        self._volume.sync(self._inode)


class PoweredDisk(LocalDisk):
    """A :class:`chunkserver.disk.Disk`; ``lock`` and what only reads are those of the real one."""

    def __init__(self, root: str, volume: Volume) -> None:
        super().__init__(root)
        self._volume = volume

    def create(self, path: str) -> PoweredFile:
        return PoweredFile(self._volume.create(path), self._volume)

    def open(self, path: str) -> PoweredFile:
        return PoweredFile(os.open(self._full(path), os.O_RDWR | os.O_CLOEXEC), self._volume)

    def open_direct(self, path: str) -> PoweredFile:
        # Not O_DIRECT: it would write the pages that the volume counts as unwritten, and read no others.
        return self.open(path)

    def rename(self, old: str, new: str) -> None:
        self._volume.rename(old, new)

    def unlink(self, path: str) -> None:
        self._volume.unlink(path)

    def sync_directory(self, path: str) -> None:
        self._volume.sync_directory(path)

    def write_atomically(self, path: str, data: bytes) -> None:
        temporary = path + ".new"
        file = PoweredFile(self._volume.create(temporary, os.O_TRUNC), self._volume)
        file.write([data], 0)
        file.sync()
        self.rename(temporary, path)
        self.sync_directory(os.path.dirname(path))

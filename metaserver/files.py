"""Every file call of the changelog, each step with a name: crash tests stop at a name, simulations replace the class.

Names announced: ``changelog:before-write``, ``changelog:after-write``, ``changelog:before-sync``,
``changelog:after-sync``, ``segment:before-create``,
``segment:before-recycle``, ``segment:before-sync``, ``segment:before-rename``,
``segment:before-directory-sync``, ``segment:before-delete``, and by the modules that work with the store
``start:before-epoch``, ``checkpoint:before-write``, ``checkpoint:before-commit``, ``checkpoint:after-commit``,
``snapshot:before-copy``, ``snapshot:before-sync``, ``snapshot:before-rename``, ``snapshot:after-rename``.
"""

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# What the disk says when it is full, or the user's share of it.
FULL = (errno.ENOSPC, errno.EDQUOT)
# What says nothing of the file: it is this process, or the machine, that is short of something.
SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR})
_ZEROES = bytes(1 << 20)
# fallocate(2), which Python does not have.
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_fallocate = ctypes.CDLL(None).fallocate


def no_step(_: str) -> None:
    """Nobody listens."""


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Has an ``OSError`` say which file it is about: a call on a descriptor does not tell."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


class Files:
    """The real file system. Every method raises ``OSError``; a write that returns has written everything."""

    def __init__(self, step: Callable[[str], None] = no_step) -> None:
        self.step = step

    def append(self, descriptor: int, data: bytes, offset: int) -> None:
        """Puts a record into the page cache: it outlives this process, not the machine."""
        self.step("changelog:before-write")
        self._write(descriptor, data, offset)
        self.step("changelog:after-write")

    def sync(self, descriptor: int) -> None:
        """Puts what was appended on stable storage."""
        self.step("changelog:before-sync")
        self._fdatasync(descriptor)
        self.step("changelog:after-sync")

    def create(self, path: Path, head: bytes, size: int) -> int:
        """Makes a file of ``size`` bytes that starts with ``head`` and goes on with zeroes: there whole and durably,
        or not at all. Its blocks are allocated and written, so that appends change no metadata. Returns a descriptor.
        """
        self.step("segment:before-create")
        temporary = path.with_name(path.name + ".new")
        descriptor = self._make(temporary)
        return self._fill(descriptor, temporary, path, head, size, lambda: self._allocate(descriptor, size))

    def recycle(self, old: Path, path: Path, head: bytes, size: int) -> int:
        """As :meth:`create`, in the blocks of an old file of at least that size: needs no space. A crash or power
        cut in between leaves the old file, the new one, or neither."""
        self.step("segment:before-recycle")
        temporary = path.with_name(path.name + ".new")
        self.rename(old, temporary)
        # First: otherwise a power cut could leave the new contents under the old name.
        self.sync_directory(path.parent)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CLOEXEC)
        # It may be longer than what it becomes.
        return self._fill(descriptor, temporary, path, head, size, lambda: self._resize(descriptor, size))

    def _fill(
        self, descriptor: int, temporary: Path, path: Path, head: bytes, size: int, allocate: Callable[[], None]
    ) -> int:
        """Writes all of a new file, syncs it and gives it its name; closes and removes it if that fails."""
        try:
            allocate()
            self._write(descriptor, head, 0)
            for offset in range(len(head), size, len(_ZEROES)):
                self._write(descriptor, _ZEROES[: size - offset], offset)
            self.step("segment:before-sync")
            self._fsync(descriptor)
            self.step("segment:before-rename")
            self.rename(temporary, path)
            self.step("segment:before-directory-sync")
            self.sync_directory(path.parent)
        except BaseException as error:
            os.close(descriptor)
            with suppress(OSError):  # it has failed already, and the next start removes what is left
                self._remove(temporary)
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise
        return descriptor

    def reserve(self, path: Path, size: int) -> None:
        """Makes a file that only takes up space; if there is not enough, there is no such file afterwards."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with naming(path):
                self._allocate(descriptor, size)
        except BaseException:
            self._remove(path)
            raise
        finally:
            os.close(descriptor)

    def free(self, path: Path) -> int:
        """Bytes that may still be written below ``path``."""
        stats = os.statvfs(path)
        return stats.f_bavail * stats.f_frsize

    def delete(self, path: Path) -> None:
        self.step("segment:before-delete")
        self._remove(path)

    def give_back(self, path: Path, offset: int) -> None:
        """Gives the space of the zeroes from ``offset`` to the end of a file back; its size and contents stay. Does
        nothing where the filesystem cannot do that."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            length = os.fstat(descriptor).st_size - offset
            if length > 0:
                self._punch(descriptor, offset, length)
        finally:
            os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        os.rename(old, new)

    def sync_path(self, path: Path) -> None:
        """Puts a whole file on stable storage."""
        sync_file(path)

    def write_again(self, path: Path) -> None:
        """Writes a file over itself, as far as it is not zeroes, and puts it on stable storage.

        After a sync has failed the kernel takes what it could not write for written: it is still read, from memory, and
        the next sync succeeds although the disk does not have it. Only what is written again is tried again.
        """
        with naming(path):
            data = path.read_bytes().rstrip(b"\0")
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                self._write(descriptor, data, 0)
            finally:
                os.close(descriptor)
            self.sync_path(path)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def sync_directory(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with naming(path):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _write(self, descriptor: int, data: bytes, offset: int) -> None:
        written = os.pwrite(descriptor, data, offset)
        while written < len(data):
            count = os.pwrite(descriptor, memoryview(data)[written:], offset + written)
            if count == 0:
                raise OSError(errno.EIO, "a write wrote nothing")
            written += count

    def _fdatasync(self, descriptor: int) -> None:
        os.fdatasync(descriptor)

    # What simulated disks replace beside what is above.

    def _make(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def _allocate(self, descriptor: int, size: int) -> None:
        os.posix_fallocate(descriptor, 0, size)

    def _resize(self, descriptor: int, size: int) -> None:
        os.ftruncate(descriptor, size)

    def _punch(self, descriptor: int, offset: int, length: int) -> None:
        _fallocate(descriptor, _KEEP_SIZE | _PUNCH_HOLE, ctypes.c_int64(offset), ctypes.c_int64(length))

    def _fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def _remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)


def is_full(error: OSError) -> bool:
    """Whether this means that there is no space, rather than that the disk has failed."""
    return error.errno in FULL


def sync_file(path: Path) -> None:
    """Puts a whole file on stable storage."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)

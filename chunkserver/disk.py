"""Every file call of a chunkserver. The rest of the package sees :class:`Disk` and :class:`File` only.

All calls block and raise ``OSError``; callers decide which run in worker threads. Paths are relative to the data
directory. A layer that simulates power cuts implements the same two protocols.

Steps announced (see :meth:`Disk.step`), where crash tests stop: ``append:before-write``, ``append:before-entries``,
``append:before-sync``, ``append:before-directory-sync``, ``append:after-sync``, ``seal:before-cut``,
``seal:before-sync``, ``seal:before-header``, ``seal:before-header-sync``, ``seal:after-sync``, ``copy:before-sync``,
``copy:before-rename``, ``copy:before-directory-sync``, ``fail:before-rename``, ``delete:before-unlink``,
``atomic:before-sync``, ``atomic:before-rename``, ``atomic:before-directory-sync``.
"""

import errno
import fcntl
import mmap
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple, Protocol

from metaserver.wire import Buffer

# What O_DIRECT wants of offsets, lengths and memory on every disk we know of.
ALIGNMENT = 4096
# Read from disk at a time when verifying: large enough for a spinning disk, small enough for many servers on a host.
DIRECT_BYTES = 1 << 20


class Space(NamedTuple):
    """Bytes of the filesystem below a data directory. ``device`` is the same for all directories on one filesystem;
    ``files``: how many more files it can have, where it says so; ``read_only``: it takes nothing at all."""

    capacity: int
    free: int
    device: str = ""
    files: int = 1 << 32
    read_only: bool = False


class File(Protocol):
    """An open file; closed when the last reference goes, so that a thread that still uses it never meets another's."""

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        """Writes all of ``buffers``, one after another, or raises; part of them may be there then."""

    def read(self, length: int, offset: int) -> bytes:
        """Shorter than ``length`` only at the end of the file."""

    def read_into(self, view: memoryview, offset: int) -> int:
        """As :meth:`read`; returns the number of bytes."""

    def read_cached(self, view: memoryview, offset: int) -> int:
        """The start of what :meth:`read_into` would give, as far as it is in memory: never waits for the disk."""

    def read_from_disk(self, length: int, offset: int) -> memoryview:
        """As :meth:`read`, but past the page cache. At most ``DIRECT_BYTES``; valid until the next call."""

    def size(self) -> int: ...

    def truncate(self, length: int) -> None: ...

    def sync(self) -> None:
        """Makes contents and size durable (fdatasync). After an error nothing may be assumed about either."""


class Disk(Protocol):
    """One data directory."""

    root: str

    def step(self, name: str) -> None:
        """Announces that the named step of an operation comes next."""

    def create(self, path: str) -> File:
        """A new empty file for reading and writing; ``FileExistsError`` if there is one."""

    def open(self, path: str) -> File: ...

    def open_direct(self, path: str) -> File:
        """For :meth:`File.read_from_disk`."""

    def rename(self, old: str, new: str) -> None: ...

    def unlink(self, path: str) -> None: ...

    def names(self, path: str) -> list[str]:
        """What is in a directory."""

    def make_directory(self, path: str) -> None:
        """With parents; nothing happens if it exists."""

    def sync_directory(self, path: str) -> None: ...

    def space(self) -> Space: ...

    def read_small(self, path: str) -> bytes | None:
        """A whole small file; None if there is none."""

    def write_atomically(self, path: str, data: bytes) -> None:
        """Replaces a small file durably: after a crash it is the old one or the new one."""

    def lock(self) -> bool:
        """Takes the directory for this process until it ends; False if another process has it."""


class DataDisk(Disk, Protocol):
    """A disk as a process takes it and gives it back."""

    def unlock(self) -> None: ...


class LocalFile:
    """A :class:`File` of the local filesystem."""

    __slots__ = ("_buffer", "_descriptor", "_direct")

    def __init__(self, descriptor: int, direct: bool = False) -> None:
        self._descriptor = descriptor
        self._direct = direct
        self._buffer: mmap.mmap | None = None

    def __del__(self) -> None:
        os.close(self._descriptor)

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        total = sum(map(len, buffers))
        done = os.pwritev(self._descriptor, buffers, offset)
        if done < total:
            rest = b"".join(buffers)
            while done < total:
                written = os.pwrite(self._descriptor, memoryview(rest)[done:], offset + done)
                if written == 0:  # a disk that neither writes nor says why
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                done += written

    def read(self, length: int, offset: int) -> bytes:
        data = os.pread(self._descriptor, length, offset)
        while len(data) < length:
            more = os.pread(self._descriptor, length - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def read_into(self, view: memoryview, offset: int) -> int:
        done = 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def read_cached(self, view: memoryview, offset: int) -> int:
        try:
            return os.preadv(self._descriptor, [view], offset, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                return 0
            raise

    def read_from_disk(self, length: int, offset: int) -> memoryview:
        if not self._direct:
            # A filesystem without O_DIRECT (tmpfs): drop what is cached as far as that means anything there.
            os.posix_fadvise(self._descriptor, offset, length, os.POSIX_FADV_DONTNEED)
            return memoryview(self.read(length, offset))
        start = offset - offset % ALIGNMENT
        wanted = -(-(offset + length - start) // ALIGNMENT) * ALIGNMENT
        if self._buffer is None:
            self._buffer = mmap.mmap(-1, DIRECT_BYTES + 2 * ALIGNMENT)
        view = memoryview(self._buffer)[:wanted]
        done = 0
        while done < wanted:
            count = os.preadv(self._descriptor, [view[done:]], start + done)
            done += count
            if count % ALIGNMENT or count == 0:
                break  # the end of the file
        return view[offset - start : min(done, offset - start + length)]

    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def truncate(self, length: int) -> None:
        os.ftruncate(self._descriptor, length)

    def sync(self) -> None:
        os.fdatasync(self._descriptor)


def _no_step(_: str) -> None:
    pass


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Has an ``OSError`` say which file it is about: a call on a descriptor does not tell."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, path) from error


class LocalDisk:
    """A :class:`Disk` below a directory of the local filesystem, which must exist."""

    def __init__(self, root: str, on_step: Callable[[str], None] = _no_step) -> None:
        self.root = root
        self.step = on_step
        self._lock: int | None = None

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    def create(self, path: str) -> LocalFile:
        return LocalFile(os.open(self._full(path), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))

    def open(self, path: str) -> LocalFile:
        return LocalFile(os.open(self._full(path), os.O_RDWR | os.O_CLOEXEC))

    def open_direct(self, path: str) -> LocalFile:
        try:
            return LocalFile(os.open(self._full(path), os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT), direct=True)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        file = self.open(path)
        file.sync()  # dirty pages cannot be dropped
        return file

    def rename(self, old: str, new: str) -> None:
        os.rename(self._full(old), self._full(new))

    def unlink(self, path: str) -> None:
        os.unlink(self._full(path))

    def names(self, path: str) -> list[str]:
        return os.listdir(self._full(path))

    def make_directory(self, path: str) -> None:
        os.makedirs(self._full(path), 0o700, exist_ok=True)

    def sync_directory(self, path: str) -> None:
        descriptor = os.open(self._full(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with _naming(self._full(path)):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def space(self) -> Space:
        stats = os.statvfs(self.root)
        device = f"{socket.gethostname()}:{os.stat(self.root).st_dev}"
        files = stats.f_favail if stats.f_files else 1 << 32
        read_only = bool(stats.f_flag & os.ST_RDONLY)
        return Space(stats.f_blocks * stats.f_frsize, stats.f_bavail * stats.f_frsize, device, files, read_only)

    def read_small(self, path: str) -> bytes | None:
        try:
            with _naming(self._full(path)), open(self._full(path), "rb") as file:
                return file.read(1 << 20)
        except FileNotFoundError:
            return None

    def write_atomically(self, path: str, data: bytes) -> None:
        # The file that is replaced is kept as the next temporary one: on a full disk its block is all there is.
        temporary, old = path + ".new", path + ".old"
        descriptor = os.open(self._full(temporary), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with _naming(self._full(temporary)), os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            file.truncate()
            self.step("atomic:before-sync")
            os.fsync(file.fileno())
        with suppress(OSError):  # it was there already, or there is nothing to be kept
            os.link(self._full(path), self._full(old))
        self.step("atomic:before-rename")
        self.rename(temporary, path)
        with suppress(OSError):
            self._keep_temporary(old, temporary)
        self.step("atomic:before-directory-sync")
        self.sync_directory(os.path.dirname(path))

    def _keep_temporary(self, old: str, temporary: str) -> None:
        """What is needed to replace the file once more, with its block."""
        try:
            self.rename(old, temporary)
        except FileNotFoundError:
            descriptor = os.open(self._full(temporary), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(bytes(ALIGNMENT))

    def lock(self) -> bool:
        descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._lock = descriptor
        return True

    def unlock(self) -> None:
        """For tests that open a directory twice in one process; otherwise the process's end does it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def prepare_directory(path: str) -> None:
    """Makes the data directory itself if there is none, for its owner only."""
    if not os.path.exists(path):
        os.makedirs(path, 0o700)


def raise_descriptor_limit() -> None:
    """As many open files as the system allows without asking: chunks, peers and clients each take one."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def chunk_directories() -> Iterator[str]:
    """All directories that hold chunk files."""
    return (f"chunks/{number:02x}" for number in range(256))

"""`dfs bench`: a small, honest benchmark of a mount, or of any directory to compare with.

Each figure is of what a program sees: writes include their fsync, and before data is read back the kernel is told to
forget it (the mount's own cache is not asked: it has only what was read). What was made is removed, whatever happens.
"""

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from dfsmount import dfs_mounts
from dfsmount.dfs_layout import Problem
from metaserver.words import bytes_text

BLOCK_BYTES = 1 << 20
SMALL_BYTES = 4096
SYNCS = 200
# So many times what is written must be free: the copies count in what `df` says, chunks being written do not.
ROOM_TIMES = 2


class Figure(msgspec.Struct):
    """One result: so many operations, of so many bytes in all, in so many seconds; latencies where one is measured."""

    name: str
    operations: int
    bytes: int
    seconds: float
    median_ms: float = 0.0
    p99_ms: float = 0.0

    @property
    def text(self) -> str:
        if self.median_ms:
            return f"{self.operations / self.seconds:,.0f}/s, median {self.median_ms:.2f} ms, p99 {self.p99_ms:.2f} ms"
        rate = f"{self.operations / self.seconds:,.0f}/s"
        return f"{bytes_text(int(self.bytes / self.seconds))}/s" if self.bytes >= BLOCK_BYTES * 8 else rate


class Bench(msgspec.Struct):
    """``source``: what is mounted there; ``began_ns`` since 1970."""

    path: str
    source: str
    began_ns: int
    figures: list[Figure]


# Called with what is measured now, and how far that is (0 to 1).
Show = Callable[[str, float], None]


def run(path: Path, size: int, files: int, show: Show) -> Bench:
    """Measures in a directory of its own below ``path``; :class:`Problem` if there is not enough room, or it fails."""
    mount = dfs_mounts.mount_of(str(path), dfs_mounts.mounts())
    check_room(path, size + files * SMALL_BYTES)
    bench = Bench(str(path), mount.source if mount else "", time.time_ns(), [])
    try:
        with workplace(path) as place:
            bench.figures += large(place, size, show)
            bench.figures += small(place, files, show)
            bench.figures.append(syncs(place, show))
            bench.figures += metadata(place, files, show)
    except OSError as error:
        raise Problem(f"{error.filename or path}: {error.strerror}") from None
    return bench


def check_room(path: Path, needed: int) -> None:
    try:
        if not path.is_dir():
            raise Problem(f"{path} is not a directory")
        found = os.statvfs(path)
    except OSError as error:
        raise Problem(f"cannot use {path}: {error.strerror}") from None
    free = found.f_bavail * found.f_frsize
    if free < ROOM_TIMES * needed:
        text = f"this would write {bytes_text(needed)}, and only {bytes_text(free)} are free on {path}"
        raise Problem(f"{text}: free more than twice as much, or give a smaller --size")


@contextmanager
def workplace(path: Path) -> Iterator[Path]:
    """A directory that is gone afterwards; also when SIGTERM or SIGHUP ends this."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    place = path / f".dfs-bench-{socket.gethostname()}-{os.getpid()}"
    try:
        place.mkdir(mode=0o700)
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
            if place.exists():
                raise Problem(f"{place} could not be removed: do that by hand")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def large(place: Path, size: int, show: Show) -> list[Figure]:
    """One file, written and synced, then read back."""
    # Random, so that nothing can be left out or compressed; made before the clock starts.
    blocks = [os.urandom(BLOCK_BYTES) for _ in range(8)]
    count = max(1, size // BLOCK_BYTES)
    path = place / "large"
    began = time.perf_counter()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        for number in range(count):
            write_all(descriptor, blocks[number % len(blocks)])
            show("sequential write + fsync", number / count)
        os.fsync(descriptor)
        written = time.perf_counter() - began
        forget(descriptor)
        os.lseek(descriptor, 0, os.SEEK_SET)
        began, left = time.perf_counter(), count * BLOCK_BYTES
        while left:
            data = os.read(descriptor, BLOCK_BYTES)
            if not data:
                raise Problem(f"{path} is shorter than what was written: {left:,} bytes are missing")
            left -= len(data)
            show("sequential read", 1 - left / (count * BLOCK_BYTES))
        read = time.perf_counter() - began
    finally:
        os.close(descriptor)
    path.unlink()
    total = count * BLOCK_BYTES
    return [
        Figure("sequential write + fsync", count, total, written),
        Figure("sequential read", count, total, read),
    ]


def write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def forget(descriptor: int) -> None:
    """Has the kernel drop what it has of a file; what is dirty was synced before."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def small(place: Path, files: int, show: Show) -> list[Figure]:
    """Files of 4 KiB: written, all of them synced at the end, and read back in the same order."""
    folder = place / "small"
    folder.mkdir()
    data = os.urandom(SMALL_BYTES)
    began = time.perf_counter()
    for number in range(files):
        with (folder / f"{number:06}").open("xb", buffering=0) as file:
            file.write(data)
        show("small files, written", number / files)
    for number in range(files):
        with (folder / f"{number:06}").open("rb", buffering=0) as file:
            os.fsync(file.fileno())
            forget(file.fileno())
        show("small files, synced", number / files)
    written = time.perf_counter() - began
    began = time.perf_counter()
    for number in range(files):
        if (folder / f"{number:06}").read_bytes() != data:
            raise Problem(f"{folder}/{number:06} does not read as it was written")
        show("small files, read", number / files)
    read = time.perf_counter() - began
    return [
        Figure("small files (4 KiB), written and synced", files, files * SMALL_BYTES, written),
        Figure("small files (4 KiB), read", files, files * SMALL_BYTES, read),
    ]


def syncs(place: Path, show: Show) -> Figure:
    """How long one append of 4 KiB takes until it is on stable storage."""
    took = []
    data = os.urandom(SMALL_BYTES)
    descriptor = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        for number in range(SYNCS):
            began = time.perf_counter()
            write_all(descriptor, data)
            os.fsync(descriptor)
            took.append(time.perf_counter() - began)
            show("append + fsync", number / SYNCS)
    finally:
        os.close(descriptor)
    took.sort()
    return Figure(
        "append 4 KiB + fsync", SYNCS, SYNCS * SMALL_BYTES, sum(took), 1e3 * took[SYNCS // 2],
        1e3 * took[SYNCS * 99 // 100],
    )  # fmt: skip


def metadata(place: Path, files: int, show: Show) -> list[Figure]:
    """Empty files: made, looked at, renamed, listed and removed."""
    folder = place / "names"
    folder.mkdir()
    paths = [folder / f"{number:06}" for number in range(files)]
    figures = []

    def each(name: str, work: Callable[[Path], object]) -> None:
        began = time.perf_counter()
        for number, path in enumerate(paths):
            work(path)
            show(name, number / files)
        figures.append(Figure(name, files, 0, time.perf_counter() - began))

    each("create", lambda path: path.touch(exist_ok=False))
    each("stat (the kernel knows it)", os.stat)
    each("rename", lambda path: path.rename(f"{path}.new"))
    paths = [Path(f"{path}.new") for path in paths]
    began = time.perf_counter()
    found = sum(1 for _ in os.scandir(folder))
    figures.append(Figure("list", found, 0, time.perf_counter() - began))
    each("unlink", os.unlink)
    return figures


def lines(bench: Bench) -> list[str]:
    """A line for each figure."""
    width = max(len(figure.name) for figure in bench.figures)
    return [f"{figure.name:<{width}}  {figure.text}" for figure in bench.figures]

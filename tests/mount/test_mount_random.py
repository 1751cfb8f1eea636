"""Random operations on a mount, compared with what nobody doubts: an array of bytes, and a directory of the local disk.

The first kind found appended bytes read as a hole through another mount; seeds are fixed, so that a failure repeats.
"""

import ctypes
import errno
import mmap
import os
import random
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mount_cluster import RealCluster, run, wait_until

pytestmark = pytest.mark.timeout(240)

LARGEST = 3 << 20
# Attributes are cached for a second elsewhere.
CACHE_SECONDS = 1.1


@pytest.fixture(scope="module")
def other_mount(cluster: RealCluster) -> Iterator[Path]:
    point = cluster.root / "second"
    cluster.up(point)
    yield point
    run("umount", point)


@pytest.fixture
def other(other_mount: Path, place: Path) -> Path:
    path = other_mount / place.name
    wait_until(path.is_dir, "the other mount sees the directory")
    return path


# -- contents ------------------------------------------------------------------------------------------------------


class RandomFile:
    """One file through two mounts, and what it must hold."""

    def __init__(self, here: Path, there: Path, seed: int) -> None:
        self.here, self.there = here, there
        self.random = random.Random(seed)
        self.model = bytearray()
        self.done: list[tuple[object, ...]] = []
        self.descriptor = os.open(here, os.O_RDWR | os.O_CREAT, 0o644)

    def step(self) -> None:
        steps: list[Callable[[], object]] = [
            self.write, self.write, self.write, self.read, self.read, self.shrink, self.grow, self.sync, self.reopen,
            self.map, self.append, self.look_there, self.write_there, self.look, self.touch, self.rename,
        ]  # fmt: skip
        step = self.random.choice(steps)
        self.done.append((step.__name__, step()))

    def close(self) -> None:
        os.close(self.descriptor)

    def _piece(self) -> tuple[int, bytes]:
        offset = self.random.randrange(LARGEST)
        length = self.random.choice([1, 10, 511, 4096, 5000, 65536, 200_000])
        return offset, self.random.randbytes(min(length, LARGEST - offset))

    def _put(self, offset: int, data: bytes) -> None:
        self.model.extend(bytes(max(0, offset - len(self.model))))
        self.model[offset : offset + len(data)] = data

    def write(self) -> object:
        offset, data = self._piece()
        assert os.pwrite(self.descriptor, data, offset) == len(data)
        self._put(offset, data)
        return offset, len(data)

    def read(self) -> object:
        offset, length = self.random.randrange(LARGEST), self.random.choice([1, 100, 4096, 100_000, 1 << 20])
        assert os.pread(self.descriptor, length, offset) == self.model[offset : offset + length], (offset, length)
        return offset, length

    def shrink(self) -> object:
        size = self.random.randrange(len(self.model) + 1)
        os.ftruncate(self.descriptor, size)
        del self.model[size:]
        return size

    def grow(self) -> object:
        size = self.random.randrange(len(self.model), max(len(self.model), LARGEST) + 1)
        os.ftruncate(self.descriptor, size)
        self.model.extend(bytes(size - len(self.model)))
        return size

    def sync(self) -> object:
        return os.fsync(self.descriptor)

    def reopen(self) -> object:
        os.close(self.descriptor)
        self.descriptor = os.open(self.here, os.O_RDWR)
        return None

    def map(self) -> object:
        if not self.model:
            return None
        offset = self.random.randrange(len(self.model))
        data = self.random.randbytes(min(self.random.choice([1, 100, 5000]), len(self.model) - offset))
        with mmap.mmap(self.descriptor, len(self.model)) as memory:
            assert memory[:] == self.model
            memory[offset : offset + len(data)] = data
            memory.flush()
        self._put(offset, data)
        return offset, len(data)

    def append(self) -> object:
        data = self.random.randbytes(self.random.randrange(1, 9000))
        os.close(self.descriptor)
        with self.here.open("ab") as file:
            file.write(data)
        self.model += data
        self.descriptor = os.open(self.here, os.O_RDWR)
        return len(data)

    def look_there(self) -> object:
        found = self.there.read_bytes()
        assert len(found) == len(self.model)
        assert found == self.model, next(at for at in range(len(found)) if found[at] != self.model[at])
        return None

    def write_there(self) -> object:
        offset, data = self._piece()
        os.close(self.descriptor)
        with self.there.open("r+b") as file:
            file.seek(offset)
            file.write(data)
        self._put(offset, data)
        self.descriptor = os.open(self.here, os.O_RDWR)
        return offset, len(data)

    def look(self) -> object:
        assert os.fstat(self.descriptor).st_size == len(self.model)
        return len(self.model)

    def touch(self) -> object:
        time_ns = self.random.randrange(1 << 61)
        os.utime(self.here, ns=(time_ns, time_ns))
        assert self.here.stat().st_mtime_ns == time_ns
        return time_ns

    def rename(self) -> object:
        aside = self.here.with_suffix(".aside")
        self.here.rename(aside)
        aside.rename(self.here)
        return None


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_contents(place: Path, other: Path, seed: int) -> None:
    file = RandomFile(place / "f", other / "f", seed)
    try:
        for _ in range(300):
            file.step()
        assert (place / "f").read_bytes() == file.model
    except AssertionError:
        print("\n".join(map(str, file.done[-30:])))
        raise
    finally:
        file.close()
    assert (other / "f").read_bytes() == file.model


# -- names ---------------------------------------------------------------------------------------------------------


def renameat2(old: Path, new: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags):
        raise OSError(ctypes.get_errno(), "renameat2")


def create(path: Path, flags: int, length: int) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_NONBLOCK | flags, 0o640)
    try:
        os.write(descriptor, b"x" * length)
    finally:
        os.close(descriptor)


def read(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.read(descriptor, 1 << 20)
    finally:
        os.close(descriptor)


def look(path: Path) -> tuple[int, ...]:
    found = path.lstat()
    size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
    return found.st_mode, found.st_nlink, found.st_uid, found.st_gid, size, found.st_rdev


class RandomNames:
    """Draws operations; each is a function and its arguments, paths being relative."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def path(self) -> str:
        return "/".join(self.random.choice("abcdef") for _ in range(self.random.choice([1, 1, 2, 2, 3])))

    def operation(self) -> tuple[Callable[..., Any], list[Any]]:
        pick, path, second = self.random.choice, self.path(), self.path()
        owner = pick([0, 1000, -1])
        attribute = f"user.{pick('xy')}"
        table: list[tuple[Callable[..., Any], list[Any]]] = [
            (Path.mkdir, [path, pick([0o755, 0o2755, 0o700])]),
            (Path.mkdir, [path, 0o755]),
            (Path.rmdir, [path]),
            (Path.unlink, [path]),
            (create, [path, pick([0, os.O_EXCL, os.O_TRUNC, os.O_APPEND, os.O_NOFOLLOW]), pick([0, 1, 100, 5000])]),
            (create, [path, 0, 10]),
            (os.link, [path, second]),
            (lambda at, target: os.symlink(target, at), [path, pick([b"a", b"b/c", b"../a", b"nowhere"])]),
            (os.rename, [path, second]),
            (os.rename, [path, second]),
            (renameat2, [path, second, pick([1, 2])]),
            (os.chmod, [path, pick([0o600, 0o4755, 0o7777, 0o1777])]),
            (os.truncate, [path, pick([0, 10, 6000])]),
            (os.lchown, [path, owner, pick([0, 1000, -1])]),
            (os.readlink, [path]),
            (read, [path]),
            (os.mkfifo, [path, 0o600]),
            (os.mknod, [path, stat.S_IFSOCK | 0o600]),
            (lambda at: sorted(os.listdir(at)), [path]),
            (look, [path]),
            (os.setxattr, [path, attribute, self.random.randbytes(pick([0, 3, 300])), pick([0, 1, 2])]),
            (os.getxattr, [path, attribute]),
            (os.listxattr, [path]),
            (os.removexattr, [path, attribute]),
        ]
        return pick(table)


def carry_out(root: Path, function: Callable[..., Any], arguments: list[Any]) -> object:
    """What came of it: a result, or the name of an errno."""
    try:
        return function(*(root / word if isinstance(word, str) and "." not in word else word for word in arguments))
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for path in root.rglob("*"):
        content: object = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = path.read_bytes()
        found[str(path.relative_to(root))] = (*look(path), content)
    return found


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_names(place: Path, other: Path, tmp_path: Path, seed: int) -> None:
    names = RandomNames(seed)
    for number in range(600):
        function, arguments = names.operation()
        expected = carry_out(tmp_path, function, arguments)
        assert carry_out(place, function, arguments) == expected, (number, function, arguments)
    expected_tree = tree(tmp_path)
    assert tree(place) == expected_tree
    time.sleep(CACHE_SECONDS)
    assert tree(other) == expected_tree

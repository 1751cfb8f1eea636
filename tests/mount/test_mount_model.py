"""A state machine that does the same to the mount and to a directory of the local disk, under several users, and
compares errno, data, attributes and listings. Hypothesis finds the sequences and makes failing ones short.

In every run a short profile; the long one is ``pytest -m soak tests/mount/test_mount_model.py``.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

pytestmark = pytest.mark.timeout(3600)

libc = ctypes.CDLL(None, use_errno=True)
AT_FDCWD, AT_EMPTY_PATH, AT_SYMLINK_FOLLOW = -100, 0x1000, 0x400
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
# Device nodes can be made, but the mount is `nodev`.
KINDS = (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFREG)

# uid, gid, supplementary groups: root, two of one group, one with rights by a supplementary group only.
USERS = ((0, 0, ()), (1001, 2000, ()), (1002, 2000, (3000,)), (1003, 4000, (2000, 3000)))
LETTERS = "abcd"
NAMES = st.sampled_from([*LETTERS, *LETTERS, "é\xff", "x" * 255, "x" * 256, ".", ".."])
PATHS = st.one_of(
    st.sampled_from(LETTERS),
    st.tuples(st.sampled_from(LETTERS), NAMES).map("/".join),
    st.tuples(st.sampled_from(LETTERS), st.sampled_from(LETTERS), st.sampled_from(LETTERS)).map("/".join),
)
MODES = st.sampled_from([0o644, 0o600, 0o755, 0o700, 0o777, 0o000, 0o4755, 0o2755, 0o1777, 0o2070, 0o6777, 0o444])
OWNERS = st.sampled_from([-1, 0, 1001, 1002, 1003])
GROUPS = st.sampled_from([-1, 0, 2000, 3000, 4000])
SIZES = st.sampled_from([0, 1, 100, 4095, 4096, 4097, 70_000, 300_000])
OFFSETS = st.sampled_from([0, 1, 10, 4000, 4096, 65_536, 100_000, 262_144])
FLAGS = st.sampled_from(
    [
        os.O_RDONLY,
        os.O_WRONLY,
        os.O_RDWR,
        os.O_RDWR | os.O_CREAT,
        os.O_RDWR | os.O_CREAT | os.O_EXCL,
        os.O_RDWR | os.O_CREAT | os.O_TRUNC,
        os.O_RDWR | os.O_APPEND | os.O_CREAT,
        os.O_WRONLY | os.O_TRUNC,
        os.O_RDWR | os.O_SYNC,
        os.O_RDWR | os.O_DSYNC,
        os.O_RDONLY | os.O_NOFOLLOW,
        os.O_RDONLY | os.O_DIRECTORY,
        os.O_PATH,
        os.O_PATH | os.O_NOFOLLOW,
        os.O_RDONLY | os.O_CREAT | os.O_DIRECTORY,
        os.O_RDONLY | os.O_TRUNC,
    ]
)
XATTRS = st.sampled_from(
    [
        "user.a",
        "user.b",
        "trusted.t",
        "security.s",
        "system.x",
        "nothing",
        "user.",
        "user." + "n" * 250,
        "user." + "n" * 251,
    ]
)
VALUES = st.sampled_from([b"", b"v", b"\0" * 100, b"x" * 200])
# Nanoseconds: now, before 1970, the edges of 2038 and 2106, odd ones.
TIMES = st.sampled_from([0, 1, -1, -(10**9), 1_700_000_000_123_456_789, (1 << 31) * 10**9, 4_294_967_296_000_000_001])
ENTRIES = st.sampled_from(
    [
        ((1, 7), (4, 5), (32, 5)),
        ((1, 6), (2, 7, 1001), (4, 4), (16, 6), (32, 0)),
        ((1, 7), (4, 0), (8, 7, 3000), (16, 7), (32, 0)),
        ((1, 7), (2, 0, 1002), (4, 7), (16, 7), (32, 7)),
        ((1, 7), (2, 7, 1002), (32, 7)),  # not valid
    ]
)


def call(function: str, *arguments: Any) -> int:
    result: int = getattr(libc, function)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def acl(entries: tuple[tuple[int, ...], ...]) -> bytes:
    rows = (struct.pack("<HHI", row[0], row[1], row[2] if len(row) > 2 else 0xFFFFFFFF) for row in entries)
    return struct.pack("<I", 2) + b"".join(rows)


@contextmanager
def acting_as(user: tuple[int, int, tuple[int, ...]]) -> Iterator[None]:
    uid, gid, groups = user
    os.setgroups(groups)
    os.setegid(gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(())


def _write(path: str, data: bytes, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | flags)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def _lengthen(path: str, name: str) -> None:
    """Setting what is set already leaves ctime alone on ext4, not on XFS."""
    before = os.getxattr(path, name) if name in os.listxattr(path) else b""
    os.setxattr(path, name, before + b"v")


# Of which the model asks whose mtime and ctime they move: of the first path, of its directory, of the second's.
ACTS: dict[str, Callable[[str, str], object]] = {
    "chmod": lambda path, _: os.chmod(path, 0o750),
    "chmod to the same": lambda path, _: os.chmod(path, stat.S_IMODE(os.stat(path).st_mode)),
    "chown": lambda path, _: os.chown(path, -1, 2000),
    "chown to nobody": lambda path, _: os.chown(path, -1, -1),
    "truncate": lambda path, _: os.truncate(path, 77),
    "truncate to the same": lambda path, _: os.truncate(path, os.stat(path).st_size),
    "write": lambda path, _: _write(path, b"moved"),
    "write nothing": lambda path, _: _write(path, b""),
    "open with O_TRUNC": lambda path, _: _write(path, b"", os.O_TRUNC),
    "append": lambda path, _: _write(path, b"more", os.O_APPEND),
    "read": lambda path, _: Path(path).read_bytes(),
    "list": lambda path, _: os.listdir(path),
    "create": lambda _, second: os.close(os.open(second, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)),
    "mkdir": lambda _, second: os.mkdir(second),
    "rmdir": lambda _, second: os.rmdir(second),
    "symlink": lambda _, second: os.symlink("there", second),
    "mkfifo": lambda _, second: os.mkfifo(second),
    "link": os.link,
    "unlink": lambda _, second: os.unlink(second),
    "rename": os.rename,
    "setxattr": lambda path, _: _lengthen(path, "user.m"),
    "removexattr": lambda path, _: os.removexattr(path, "user.m"),
    "utime": lambda path, _: os.utime(path),
    "mtime": lambda path, _: os.utime(path, ns=(5, 7)),
}


class Side:
    """One of the two directories, and the descriptors open there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.descriptors: list[int] = []


def shown(found: os.stat_result) -> tuple[object, ...]:
    size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
    return found.st_mode, found.st_nlink, found.st_uid, found.st_gid, size, found.st_rdev


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything below a directory."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        content: object = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = path.read_bytes()
        names = () if path.is_symlink() else sorted(set(os.listxattr(path)) - {"security.selinux"})
        xattrs = [(name, os.getxattr(path, name)) for name in names]
        found[os.fsdecode(path.relative_to(root))] = (*shown(path.lstat()), content, xattrs)
    return found


def furnish(root: Path) -> None:
    """Something under most of the names: in an empty directory, nearly every step would end with ENOENT."""
    for folder, mode, owner in (("a", 0o777, 0), ("a/b", 0o777, 1001), ("b", 0o1777, 0), ("b/d", 0o2775, 1002)):
        (root / folder).mkdir()
        os.chown(root / folder, owner, 2000)
        (root / folder).chmod(mode)
    for name, size, mode, owner in (("a/a", 5, 0o666, 1001), ("a/b/c", 5000, 0o644, 1002), ("c", 100_000, 0o666, 0)):
        (root / name).write_bytes(bytes(number % 251 for number in range(size)))
        os.chown(root / name, owner, 2000)
        (root / name).chmod(mode)
    (root / "b/b").hardlink_to(root / "a/a")
    (root / "d").symlink_to("a")


class Twins(RuleBasedStateMachine):
    """``home``: where on the mount, and where on the local disk, examples get directories of their own."""

    home: tuple[Path, Path]
    numbers = count()

    def __init__(self) -> None:
        super().__init__()
        number = next(self.numbers)
        self.ours, self.theirs = (Side(root / f"example{number}") for root in self.home)
        self.user = USERS[0]
        self.open = 0
        # Steps since the trees were compared, which costs as much as a few dozen of them.
        self.steps = 0

    @initialize(furnished=st.sampled_from([True, True, True, False]))
    def make_places(self, furnished: bool) -> None:
        for side in (self.ours, self.theirs):
            side.root.mkdir()
            side.root.chmod(0o777)
            if furnished:
                furnish(side.root)

    def both(self, function: Callable[[Side], object]) -> object:
        """Does it there and here, each being the working directory (those above are closed to others): the same must
        come of it."""
        results = []
        self.steps += 1
        for side in (self.theirs, self.ours):
            try:
                os.chdir(side.root)
                with acting_as(self.user):
                    results.append(function(side))
            except OSError as error:
                results.append(errno.errorcode[error.errno or 0])
        assert results[1] == results[0]
        return results[0]

    def on(self, which: int, function: Callable[[int], object]) -> object:
        """The same with one of the open descriptors."""
        return self.both(lambda side: function(side.descriptors[which % self.open]))

    def teardown(self) -> None:
        for side in (self.ours, self.theirs):
            for descriptor in side.descriptors:
                os.close(descriptor)
        os.chdir("/")
        if self.ours.root.exists():
            assert tree(self.ours.root) == tree(self.theirs.root)
            for side in (self.ours, self.theirs):
                shutil.rmtree(side.root)

    # -- who ---------------------------------------------------------------------------------------------------

    @rule(user=st.sampled_from(USERS))
    def become(self, user: tuple[int, int, tuple[int, ...]]) -> None:
        self.user = user

    # -- names -------------------------------------------------------------------------------------------------

    @rule(path=PATHS, mode=MODES)
    def mkdir(self, path: str, mode: int) -> None:
        self.both(lambda _: os.mkdir(path, mode))

    @rule(path=PATHS)
    def mkdir_plain(self, path: str) -> None:
        self.both(lambda _: os.mkdir(path, 0o777))

    @rule(path=PATHS)
    def rmdir(self, path: str) -> None:
        self.both(lambda _: os.rmdir(path))

    @rule(path=PATHS)
    def unlink(self, path: str) -> None:
        self.both(lambda _: os.unlink(path))

    @rule(path=PATHS, second=PATHS)
    def rename(self, path: str, second: str) -> None:
        self.both(lambda _: os.rename(path, second))

    @rule(path=PATHS, second=PATHS, flags=st.sampled_from([1, 2, 3, 8]))
    def rename_with_flags(self, path: str, second: str, flags: int) -> None:
        def renameat2(side: Side) -> int:
            old, new = os.fsencode(path), os.fsencode(second)
            return call("renameat2", AT_FDCWD, old, AT_FDCWD, new, flags)

        self.both(renameat2)

    @rule(path=PATHS)
    def rename_into_itself(self, path: str) -> None:
        self.both(lambda _: os.rename(path, f"{path}/inside"))

    @rule(path=PATHS, second=PATHS, follow=st.booleans())
    def link(self, path: str, second: str, follow: bool) -> None:
        flags = AT_SYMLINK_FOLLOW if follow else 0

        def linkat(side: Side) -> int:
            old, new = os.fsencode(path), os.fsencode(second)
            return call("linkat", AT_FDCWD, old, AT_FDCWD, new, flags)

        self.both(linkat)

    @rule(path=PATHS, points_to=st.sampled_from(["a", "b/c", "../a", "nowhere", "t" * 4095, "d"]))
    def symlink(self, path: str, points_to: str) -> None:
        self.both(lambda _: os.symlink(points_to, path))

    @rule(path=PATHS)
    def readlink(self, path: str) -> None:
        self.both(lambda _: os.readlink(path))

    @rule(path=PATHS, kind=st.sampled_from(KINDS), mode=MODES)
    def mknod(self, path: str, kind: int, mode: int) -> None:
        self.both(lambda _: os.mknod(path, kind | mode, os.makedev(1, 3)))

    @rule(path=PATHS)
    def listing(self, path: str) -> None:
        self.both(lambda _: sorted(os.listdir(path)))

    @rule(path=PATHS)
    def listing_with_types(self, path: str) -> None:
        def scan(side: Side) -> list[tuple[str, bool, bool]]:
            with os.scandir(path) as entries:
                return sorted(
                    (entry.name, entry.is_dir(follow_symlinks=False), entry.is_symlink()) for entry in entries
                )

        self.both(scan)

    @rule(path=PATHS)
    def many_entries(self, path: str) -> None:
        def fill(side: Side) -> None:
            for number in range(12):
                os.close(os.open(f"{path}/many{number}", os.O_CREAT | os.O_WRONLY, 0o644))

        self.both(fill)

    @rule(path=PATHS)
    def remove_while_listing(self, path: str) -> None:
        def remove(side: Side) -> list[str]:
            gone = []
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith("many"):
                        os.unlink(entry.path)
                        gone.append(entry.name)
            return sorted(gone)

        self.both(remove)

    # -- attributes --------------------------------------------------------------------------------------------

    @rule(path=PATHS)
    def lstat(self, path: str) -> None:
        self.both(lambda _: shown(os.lstat(path)))

    @rule(path=PATHS)
    def stat(self, path: str) -> None:
        self.both(lambda _: shown(os.stat(path)))

    @rule(path=PATHS, mode=MODES)
    def chmod(self, path: str, mode: int) -> None:
        self.both(lambda _: os.chmod(path, mode))

    @rule(path=PATHS, uid=OWNERS, gid=GROUPS)
    def chown(self, path: str, uid: int, gid: int) -> None:
        self.both(lambda _: os.chown(path, uid, gid))

    @rule(path=PATHS, uid=OWNERS, gid=GROUPS)
    def lchown(self, path: str, uid: int, gid: int) -> None:
        self.both(lambda _: os.lchown(path, uid, gid))

    @rule(path=PATHS, wanted=st.sampled_from([os.R_OK, os.W_OK, os.X_OK, os.R_OK | os.W_OK]))
    def access(self, path: str, wanted: int) -> None:
        self.both(lambda _: os.access(path, wanted, effective_ids=True))

    @rule(path=PATHS, atime=TIMES, mtime=TIMES)
    def utimens(self, path: str, atime: int, mtime: int) -> None:
        def touch(side: Side) -> object:
            os.utime(path, ns=(atime, mtime))
            found = os.stat(path)
            return found.st_mtime_ns

        # A local disk may know fewer years (ext4: to 2446) than ours (to 2262); these both know.
        self.both(touch)

    @rule(
        path=PATHS, atime=st.sampled_from([UTIME_NOW, UTIME_OMIT, 5]), mtime=st.sampled_from([UTIME_NOW, UTIME_OMIT, 7])
    )
    def utimens_by_the_clock(self, path: str, atime: int, mtime: int) -> None:
        times = struct.pack("<qqqq", 1000, atime, 2000, mtime)

        def touch(side: Side) -> object:
            before = os.stat(path)
            call("utimensat", AT_FDCWD, os.fsencode(path), times, 0)
            found = os.stat(path)
            kept = mtime == UTIME_OMIT and found.st_mtime_ns == before.st_mtime_ns
            is_now = mtime == UTIME_NOW and abs(found.st_mtime_ns - time.time_ns()) < 60 * 10**9
            return kept, is_now, found.st_mtime_ns == 2000 * 10**9 + 7

        self.both(touch)

    @rule(path=PATHS, second=PATHS, act=st.sampled_from(sorted(ACTS)))
    def times_that_move(self, path: str, second: str, act: str) -> None:
        def watch(side: Side) -> object:
            seen = [path, os.path.dirname(path) or ".", os.path.dirname(second) or "."]
            before = [os.stat(name) for name in seen]
            try:
                ACTS[act](path, second)
            except OSError as error:
                done = errno.errorcode[error.errno or 0]
            else:
                done = "done"
            after = [os.stat(name) if os.path.exists(name) else old for name, old in zip(seen, before, strict=True)]
            pairs = [
                (new.st_mtime_ns != old.st_mtime_ns, new.st_ctime_ns != old.st_ctime_ns)
                for old, new in zip(before, after, strict=True)
            ]
            return done, pairs

        self.both(watch)

    # -- extended attributes and ACLs --------------------------------------------------------------------------

    @rule(path=PATHS, name=XATTRS, value=VALUES, flags=st.sampled_from([0, 0, 1, 2]))
    def setxattr(self, path: str, name: str, value: bytes, flags: int) -> None:
        self.both(lambda _: os.setxattr(path, name, value, flags))

    @rule(path=PATHS, name=XATTRS)
    def getxattr(self, path: str, name: str) -> None:
        self.both(lambda _: os.getxattr(path, name))

    @rule(path=PATHS)
    def listxattr(self, path: str) -> None:
        self.both(lambda _: sorted(os.listxattr(path)))

    @rule(path=PATHS, name=XATTRS)
    def removexattr(self, path: str, name: str) -> None:
        self.both(lambda _: os.removexattr(path, name))

    @rule(path=PATHS, entries=ENTRIES, kind=st.sampled_from(["access", "default"]))
    def set_acl(self, path: str, entries: tuple[tuple[int, ...], ...], kind: str) -> None:
        self.both(lambda _: os.setxattr(path, f"system.posix_acl_{kind}", acl(entries)))

    @rule(path=PATHS, kind=st.sampled_from(["access", "default"]))
    def remove_acl(self, path: str, kind: str) -> None:
        self.both(lambda _: os.removexattr(path, f"system.posix_acl_{kind}"))

    @rule(path=PATHS, kind=st.sampled_from(["access", "default"]))
    def get_acl(self, path: str, kind: str) -> None:
        self.both(lambda _: os.getxattr(path, f"system.posix_acl_{kind}"))

    # -- contents by path --------------------------------------------------------------------------------------

    @rule(path=PATHS, size=SIZES)
    def write_file(self, path: str, size: int) -> None:
        def write(side: Side) -> int:
            descriptor = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_NONBLOCK, 0o666)
            try:
                return os.write(descriptor, b"w" * size)
            finally:
                os.close(descriptor)

        self.both(write)

    @rule(path=PATHS)
    def read_file(self, path: str) -> None:
        def read(side: Side) -> bytes:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                return os.read(descriptor, 1 << 20)
            finally:
                os.close(descriptor)

        self.both(read)

    @rule(path=PATHS, size=st.one_of(SIZES, st.just(-1)))
    def truncate(self, path: str, size: int) -> None:
        self.both(lambda _: os.truncate(path, size))

    # -- descriptors -------------------------------------------------------------------------------------------

    @precondition(lambda self: self.open < 8)
    @rule(path=PATHS, flags=FLAGS, mode=MODES)
    def open_file(self, path: str, flags: int, mode: int) -> None:
        opened: list[tuple[Side, int]] = []

        def open_(side: Side) -> None:
            opened.append((side, os.open(path, flags | os.O_NONBLOCK, mode)))

        try:
            self.both(open_)
        finally:
            for side, descriptor in opened:
                side.descriptors.append(descriptor)
        self.open += len(opened) // 2

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 7))
    def close_file(self, which: int) -> None:
        self.both(lambda side: os.close(side.descriptors.pop(which % self.open)))
        self.open -= 1

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 7), offset=OFFSETS, size=SIZES, byte=st.integers(0, 255))
    def pwrite(self, which: int, offset: int, size: int, byte: int) -> None:
        self.on(which, lambda descriptor: os.pwrite(descriptor, bytes([byte]) * size, offset))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 7), offset=OFFSETS, size=SIZES)
    def pread(self, which: int, offset: int, size: int) -> None:
        self.on(which, lambda descriptor: os.pread(descriptor, size, offset))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 7), size=SIZES)
    def write(self, which: int, size: int) -> None:
        self.on(which, lambda descriptor: os.write(descriptor, b"s" * size))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 7), size=SIZES)
    def read(self, which: int, size: int) -> None:
        self.on(which, lambda descriptor: os.read(descriptor, size))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 7), offset=st.one_of(OFFSETS, st.just(-5)), whence=st.sampled_from([0, 1, 2]))
    def lseek(self, which: int, offset: int, whence: int) -> None:
        def seek(descriptor: int) -> int | None:
            # What a position in a directory means is each filesystem's own.
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                return None
            return os.lseek(descriptor, offset, whence)

        self.on(which, seek)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 7), size=st.one_of(SIZES, st.just(-1)))
    def ftruncate(self, which: int, size: int) -> None:
        self.on(which, lambda descriptor: os.ftruncate(descriptor, size))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 7))
    def fsync(self, which: int) -> None:
        self.on(which, os.fsync)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 7))
    def fdatasync(self, which: int) -> None:
        self.on(which, os.fdatasync)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 7))
    def fstat(self, which: int) -> None:
        self.on(which, lambda descriptor: shown(os.fstat(descriptor)))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 7), mode=MODES)
    def fchmod(self, which: int, mode: int) -> None:
        self.on(which, lambda descriptor: os.fchmod(descriptor, mode))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 7), uid=OWNERS, gid=GROUPS)
    def fchown(self, which: int, uid: int, gid: int) -> None:
        self.on(which, lambda descriptor: os.fchown(descriptor, uid, gid))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 7), path=PATHS)
    def link_what_is_open(self, which: int, path: str) -> None:
        def linkat(side: Side) -> int:
            old = f"/proc/self/fd/{side.descriptors[which % self.open]}".encode()
            return call("linkat", AT_FDCWD, old, AT_FDCWD, os.fsencode(path), AT_SYMLINK_FOLLOW)

        self.both(linkat)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 7))
    def list_what_is_open(self, which: int) -> None:
        self.on(which, lambda descriptor: sorted(os.listdir(descriptor)))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 7), name=st.sampled_from(LETTERS))
    def make_in_what_is_open(self, which: int, name: str) -> None:
        self.on(which, lambda descriptor: os.mkdir(name, 0o755, dir_fd=descriptor))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 7), name=XATTRS, value=VALUES)
    def fsetxattr(self, which: int, name: str, value: bytes) -> None:
        self.on(which, lambda descriptor: os.setxattr(descriptor, name, value))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 7), offset=OFFSETS, shared=st.booleans())
    def map(self, which: int, offset: int, shared: bool) -> None:
        flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE

        def write_mapped(descriptor: int) -> object:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_size <= offset:
                return None
            with mmap.mmap(descriptor, found.st_size, flags) as memory:
                before = memory[offset : offset + 10]
                memory[offset] = 0x6D
                return before

        self.on(which, write_mapped)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 7), offset=OFFSETS, size=SIZES)
    def vectors(self, which: int, offset: int, size: int) -> None:
        self.on(which, lambda descriptor: os.pwritev(descriptor, [b"v" * size, b"w" * 10], offset))

    @precondition(lambda self: self.open > 1)
    @rule(which=st.integers(0, 7), second=st.integers(0, 7), size=SIZES)
    def sendfile(self, which: int, second: int, size: int) -> None:
        def send(side: Side) -> object:
            source, target = (side.descriptors[number % self.open] for number in (which, second))
            return None if source == target else os.sendfile(target, source, 0, size)

        self.both(send)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 7), operation=st.sampled_from([fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN]))
    def flock(self, which: int, operation: int) -> None:
        self.on(which, lambda descriptor: fcntl.flock(descriptor, operation | fcntl.LOCK_NB))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 7))
    def position_and_flags(self, which: int) -> None:
        self.on(which, lambda descriptor: fcntl.fcntl(descriptor, fcntl.F_GETFL))

    # -- everything --------------------------------------------------------------------------------------------

    @precondition(lambda self: self.steps >= 20)
    @rule()
    def compare_trees(self) -> None:
        self.steps = 0
        assert tree(self.ours.root) == tree(self.theirs.root)


@pytest.fixture
def twins(place: Path, tmp_path: Path) -> Iterator[type[Twins]]:
    # The umask is taken off before a default ACL is inherited (see the limits in README.md).
    umask = os.umask(0)
    for path in (place, tmp_path):
        path.chmod(0o777)
    yield type("Twins", (Twins,), {"home": (place, tmp_path), "numbers": count()})
    os.umask(umask)


def run(machine: type[Twins], examples: int, steps: int) -> None:
    relaxed = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    profile = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=relaxed,
        database=None,
        report_multiple_bugs=False,
    )
    run_state_machine_as_test(machine, settings=profile)


def test_the_machine_has_enough_rules() -> None:
    assert len([value for value in vars(Twins).values() if hasattr(value, "hypothesis_stateful_rule")]) >= 40


def test_a_mount_does_what_a_local_directory_does(twins: type[Twins]) -> None:
    run(twins, examples=25, steps=60)


@pytest.mark.soak
def test_a_mount_does_what_a_local_directory_does_at_length(twins: type[Twins]) -> None:
    run(twins, examples=1000, steps=200)

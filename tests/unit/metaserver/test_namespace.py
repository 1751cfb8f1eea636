"""Names against a real directory (on tmpfs), and the details that no real directory shows."""

import ctypes
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_rows import MemoryRows

from metaserver import directories, inodes, namespace, xattrs
from metaserver.errors import DfsError, ErrorCode
from metaserver.inodes import Effects
from metaserver.protocol import (
    LINK_MAX,
    DirectoryPage,
    InodeFlags,
    Link,
    Make,
    ReadDirectory,
    Rename,
    RenameFlags,
    SetXattr,
    Unlink,
    XattrFlags,
)
from metaserver.schema import Inode, Table, TaskKind

ERRNO = {
    ErrorCode.NOT_FOUND: errno.ENOENT,
    ErrorCode.EXISTS: errno.EEXIST,
    ErrorCode.NOT_DIRECTORY: errno.ENOTDIR,
    ErrorCode.IS_DIRECTORY: errno.EISDIR,
    ErrorCode.NOT_EMPTY: errno.ENOTEMPTY,
    ErrorCode.INVALID: errno.EINVAL,
    ErrorCode.NOT_PERMITTED: errno.EPERM,
    ErrorCode.NAME_TOO_LONG: errno.ENAMETOOLONG,
    ErrorCode.BUSY: errno.EBUSY,
}

libc = ctypes.CDLL(None, use_errno=True)
AT_FDCWD = -100


def nobody(_: int) -> tuple[int, ...]:
    return ()


# -- a real directory beside ours ------------------------------------------------------------------------------------


class Both:
    """The same operations on a real directory and on ours; ``paths`` are lists of names below the root."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.rows = MemoryRows()
        self.now = 1000
        inodes.make_root(self.rows, self.now)

    def directory(self, path: list[str]) -> int:
        ino = 1
        for name in path:
            ino = namespace.lookup(self.rows, ino, name.encode())
        return ino

    def parent(self, path: list[str]) -> int:
        """Of the last component; a directory, as the kernel makes sure before it goes on."""
        ino = self.directory(path[:-1])
        inodes.require_directory(self.rows, ino)
        return ino

    def real(self, path: list[str]) -> str:
        return "/".join([self.root, *path])

    def do(self, step: tuple) -> None:
        kind, first, second = step
        if any(os.path.islink(self.real(path[:depth])) for path in (first, second) for depth in range(1, len(path))):
            # The kernel follows symlinks before it asks a filesystem; ours never sees such a path.
            return
        self.now += 1
        expected = self._real(kind, first, second)
        rows = self.rows.copy() if expected else self.rows
        try:
            self._ours(kind, first, second)
            got = 0
        except DfsError as error:
            # As the committer does: what fails leaves no trace.
            self.rows = rows
            got = ERRNO[error.code]
        assert got == expected, (step, errno.errorcode.get(got), errno.errorcode.get(expected))

    def _real(self, kind: str, first: list[str], second: list[str]) -> int:
        a, b = self.real(first), self.real(second)
        try:
            if kind == "mkdir":
                os.mkdir(a)
            elif kind == "create":
                os.close(os.open(a, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            elif kind == "symlink":
                os.symlink("target", a)
            elif kind == "unlink":
                os.unlink(a)
            elif kind == "rmdir":
                os.rmdir(a)
            elif kind == "link":
                os.link(a, b, follow_symlinks=False)
            else:
                flags = {"rename": 0, "noreplace": 1, "exchange": 2}[kind]
                if libc.renameat2(AT_FDCWD, a.encode(), AT_FDCWD, b.encode(), flags):
                    raise OSError(ctypes.get_errno(), "renameat2")
        except OSError as error:
            return error.errno or 0
        return 0

    def _ours(self, kind: str, first: list[str], second: list[str]) -> None:
        tx, effects = self.rows, Effects()
        if kind == "link":
            ino = self.directory(first)
            namespace.link(tx, self.now, Link(ino, self.parent(second), second[-1].encode()))
            return
        parent, name = self.parent(first), first[-1].encode()
        if kind in ("mkdir", "create", "symlink"):
            mode = {"mkdir": stat.S_IFDIR, "create": stat.S_IFREG, "symlink": stat.S_IFLNK}[kind] | 0o755
            target = b"target" if kind == "symlink" else b""
            namespace.make(tx, self.now, Make(parent, name, mode, 0, 0, target=target))
        elif kind in ("unlink", "rmdir"):
            namespace.unlink(tx, self.now, Unlink(parent, name, kind == "rmdir"), nobody, effects)
        else:
            flags = {"rename": 0, "noreplace": 1, "exchange": 2}[kind]
            message = Rename(parent, name, self.parent(second), second[-1].encode(), flags)
            namespace.rename(tx, self.now, message, nobody, effects)

    def compare(self) -> None:
        """Same names, types, link counts, and the same names for the same file."""
        self.rows.check()
        same: dict[int, int] = {}
        self._compare(1, self.root, same)
        assert len(set(same.values())) == len(same)

    def _compare(self, ino: int, path: str, same: dict[int, int]) -> None:
        real = {entry.name.encode(): entry for entry in os.scandir(path)}
        ours = {entry.name: entry for entry in list_all(self.rows, ino)}
        assert ours.keys() == real.keys()
        for name, entry in ours.items():
            there = real[name].stat(follow_symlinks=False)
            inode = inodes.require(self.rows, entry.ino)
            assert stat.S_IFMT(inode.mode) == stat.S_IFMT(there.st_mode) == entry.type << 12
            assert inode.nlink == there.st_nlink
            assert same.setdefault(there.st_ino, entry.ino) == entry.ino
            if stat.S_ISDIR(inode.mode):
                assert inode.parent == ino
                self._compare(entry.ino, f"{path}/{name.decode()}", same)


def list_all(tx: MemoryRows, ino: int, page: int = 3) -> list:
    entries, cookie = [], 0
    while True:
        found: DirectoryPage = directories.read(tx, ReadDirectory(ino, cookie, page, False))
        entries.extend(found.entries)
        if found.end:
            return entries
        cookie = found.entries[-1].cookie


@pytest.fixture(scope="module")
def tmpfs() -> Iterator[str]:
    if not os.path.isdir("/dev/shm"):
        pytest.skip("no tmpfs")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield path


names = st.sampled_from(["a", "b", "c"])
paths = st.lists(names, min_size=1, max_size=3)
kinds = st.sampled_from(
    ["mkdir", "mkdir", "create", "symlink", "unlink", "rmdir", "link", "rename", "rename", "noreplace", "exchange"]
)


@given(st.lists(st.tuples(kinds, paths, paths), max_size=30))
@settings(max_examples=200, deadline=None)
def test_names_do_what_a_real_directory_does(tmpfs: str, steps: list[tuple]) -> None:
    root = f"{tmpfs}/tree"
    os.mkdir(root)
    try:
        both = Both(root)
        for step in steps:
            both.do(step)
        both.compare()
    finally:
        shutil.rmtree(root)


# -- what a real directory does not show ------------------------------------------------------------------------------


@pytest.fixture
def tx() -> MemoryRows:
    rows = MemoryRows()
    inodes.make_root(rows, 0)
    return rows


def make(
    tx: MemoryRows, name: bytes, mode: int = stat.S_IFREG | 0o644, *, parent: int = 1, now: int = 1, **more
) -> int:
    return namespace.make(tx, now, Make(parent, name, mode, 10, 20, **more))[0]


def directory(tx: MemoryRows, name: bytes, *, parent: int = 1, now: int = 1, mode: int = 0o755) -> int:
    return make(tx, name, stat.S_IFDIR | mode, parent=parent, now=now)


def code_of(function, *arguments) -> ErrorCode:
    with pytest.raises(DfsError) as caught:
        function(*arguments)
    return caught.value.code


def get(tx: MemoryRows, ino: int) -> Inode:
    return inodes.require(tx, ino)


def times(tx: MemoryRows, ino: int) -> tuple[int, int, int]:
    inode = get(tx, ino)
    return inode.atime_ns, inode.mtime_ns, inode.ctime_ns


def test_dots_are_found_and_never_changed(tx: MemoryRows) -> None:
    child = directory(tx, b"d")
    assert namespace.lookup(tx, child, b".") == child
    assert namespace.lookup(tx, child, b"..") == 1
    assert namespace.lookup(tx, 1, b"..") == 1
    for dots in (b".", b".."):
        assert code_of(make, tx, dots) is ErrorCode.EXISTS
        assert code_of(namespace.link, tx, 1, Link(make(tx, b"f" + dots), 1, dots)) is ErrorCode.EXISTS
        assert code_of(namespace.rename, tx, 1, Rename(1, dots, 1, b"x", 0), nobody, Effects()) is ErrorCode.BUSY
        assert code_of(namespace.unlink, tx, 1, Unlink(1, dots, False), nobody, Effects()) is ErrorCode.IS_DIRECTORY
    assert code_of(namespace.unlink, tx, 1, Unlink(1, b".", True), nobody, Effects()) is ErrorCode.INVALID
    assert code_of(namespace.unlink, tx, 1, Unlink(1, b"..", True), nobody, Effects()) is ErrorCode.NOT_EMPTY


@pytest.mark.parametrize("bad", [b"", b"a/b", b"/", b"a\0b"])
def test_what_is_no_name(tx: MemoryRows, bad: bytes) -> None:
    assert code_of(make, tx, bad) is ErrorCode.INVALID
    assert code_of(namespace.lookup, tx, 1, bad) is ErrorCode.INVALID


def test_names_have_255_bytes_at_most(tx: MemoryRows) -> None:
    make(tx, b"n" * 255)
    assert namespace.lookup(tx, 1, b"n" * 255) == 2
    assert code_of(make, tx, b"n" * 256) is ErrorCode.NAME_TOO_LONG
    assert code_of(namespace.lookup, tx, 1, b"n" * 100_000) is ErrorCode.NAME_TOO_LONG
    assert code_of(namespace.rename, tx, 1, Rename(1, b"n" * 255, 1, b"n" * 256, 0), nobody, Effects()) is (
        ErrorCode.NAME_TOO_LONG
    )


def test_setgid_directories_hand_their_group_down(tx: MemoryRows) -> None:
    shared = directory(tx, b"shared", mode=0o2775)
    assert get(tx, shared).gid == 20
    tx_shared = get(tx, shared)
    tx_shared.gid = 77
    inodes.save(tx, shared, tx_shared)
    inside, file = directory(tx, b"d", parent=shared), make(tx, b"f", parent=shared)
    assert (get(tx, inside).gid, get(tx, inside).mode & stat.S_ISGID) == (77, stat.S_ISGID)
    assert (get(tx, file).gid, get(tx, file).mode & stat.S_ISGID) == (77, 0)


def test_every_type_can_be_made(tx: MemoryRows) -> None:
    device = make(tx, b"dev", stat.S_IFCHR | 0o600, rdev=0x103)
    assert get(tx, device).rdev == 0x103
    for number, kind in enumerate((stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFBLK)):
        assert stat.S_IFMT(get(tx, make(tx, b"n%d" % number, kind | 0o600)).mode) == kind
    # mknod without a type is a regular file; a device number means nothing to it.
    plain = make(tx, b"plain", 0o600, rdev=5)
    assert (get(tx, plain).mode, get(tx, plain).rdev) == (stat.S_IFREG | 0o600, 0)
    assert code_of(make, tx, b"odd", 0o030644) is ErrorCode.INVALID


def test_symlinks(tx: MemoryRows) -> None:
    link = make(tx, b"l", stat.S_IFLNK | 0o777, target=b"t" * 4095)
    assert get(tx, link).size == 4095
    assert tx.get(Table.SYMLINKS, link.to_bytes(8, "big")) == b"t" * 4095
    assert code_of(lambda: make(tx, b"m", stat.S_IFLNK | 0o777, target=b"t" * 4096)) is ErrorCode.NAME_TOO_LONG
    assert code_of(lambda: make(tx, b"m", stat.S_IFLNK | 0o777)) is ErrorCode.NOT_FOUND
    assert code_of(lambda: make(tx, b"m", stat.S_IFREG, target=b"t")) is ErrorCode.INVALID
    namespace.unlink(tx, 2, Unlink(1, b"l", False), nobody, Effects())
    assert not tx.tables[Table.SYMLINKS]


def test_an_existing_file_is_opened_by_a_make_that_is_not_exclusive(tx: MemoryRows) -> None:
    file = make(tx, b"f")
    again = namespace.make(tx, 9, Make(1, b"f", stat.S_IFREG, 0, 0, exclusive=False))
    assert (again[0], again[2]) == (file, False)
    assert times(tx, 1) == (0, 1, 1)
    directory(tx, b"d")
    make(tx, b"p", stat.S_IFIFO)
    assert code_of(lambda: make(tx, b"d", exclusive=False)) is ErrorCode.IS_DIRECTORY
    assert code_of(lambda: make(tx, b"p", exclusive=False)) is ErrorCode.EXISTS
    assert code_of(make, tx, b"f") is ErrorCode.EXISTS


def test_times_change_as_on_ext4(tx: MemoryRows) -> None:
    a, b = directory(tx, b"a", now=10), directory(tx, b"b", now=11)
    file = make(tx, b"f", parent=a, now=20)
    assert times(tx, file) == (20, 20, 20)
    assert times(tx, a) == (10, 20, 20)
    namespace.link(tx, 30, Link(file, b, b"g"))
    assert (times(tx, file), times(tx, b), times(tx, a)) == ((20, 20, 30), (11, 30, 30), (10, 20, 20))
    namespace.rename(tx, 40, Rename(a, b"f", b, b"h", 0), nobody, Effects())
    assert (times(tx, file), times(tx, a), times(tx, b)) == ((20, 20, 40), (10, 40, 40), (11, 40, 40))
    namespace.unlink(tx, 50, Unlink(b, b"g", False), nobody, Effects())
    assert (times(tx, file), times(tx, b), times(tx, a)) == ((20, 20, 50), (11, 50, 50), (10, 40, 40))
    other = make(tx, b"o", parent=b, now=60)
    namespace.rename(tx, 70, Rename(b, b"o", b, b"h", RenameFlags.EXCHANGE), nobody, Effects())
    assert (times(tx, file), times(tx, other), times(tx, b)) == ((20, 20, 70), (60, 60, 70), (11, 70, 70))
    # rename to another name of the same file does nothing at all.
    namespace.link(tx, 80, Link(file, b, b"same"))
    namespace.rename(tx, 90, Rename(b, b"same", b, b"o", 0), nobody, Effects())
    assert times(tx, file) == (20, 20, 80)


def test_link_counts_have_a_limit(tx: MemoryRows) -> None:
    file, top = make(tx, b"f"), directory(tx, b"d")
    for ino in (file, top):
        inode = get(tx, ino)
        inode.nlink = LINK_MAX
        inodes.save(tx, ino, inode)
    assert code_of(namespace.link, tx, 1, Link(file, 1, b"g")) is ErrorCode.TOO_MANY_LINKS
    assert code_of(lambda: directory(tx, b"x", parent=top)) is ErrorCode.TOO_MANY_LINKS
    directory(tx, b"y")
    move = Rename(1, b"y", top, b"y", 0)
    assert code_of(namespace.rename, tx, 1, move, nobody, Effects()) is ErrorCode.TOO_MANY_LINKS


def test_unknown_rename_flags_and_both_at_once(tx: MemoryRows) -> None:
    make(tx, b"f")
    for flags in (3, 4, -1):
        assert code_of(namespace.rename, tx, 1, Rename(1, b"f", 1, b"g", flags), nobody, Effects()) is ErrorCode.INVALID


def test_an_open_file_outlives_its_last_name(tx: MemoryRows) -> None:
    file, effects = make(tx, b"f"), Effects()
    done = namespace.unlink(tx, 5, Unlink(1, b"f", False), lambda ino: (8, 9), effects)
    assert (done.nlink, done.orphan, effects.orphans) == (0, True, [file])
    assert get(tx, file).ctime_ns == 5
    assert code_of(namespace.link, tx, 6, Link(file, 1, b"g")) is ErrorCode.NOT_FOUND
    inodes.release(tx, file, 8, effects)
    assert inodes.find(tx, file) is not None
    inodes.release(tx, file, 8, effects)
    inodes.release(tx, file, 9, effects)
    assert inodes.find(tx, file) is None
    assert not tx.tables[Table.ORPHANS]


def test_a_removed_directory_that_is_open_takes_nothing_in(tx: MemoryRows) -> None:
    gone = directory(tx, b"d")
    namespace.unlink(tx, 5, Unlink(1, b"d", True), lambda ino: (8,), Effects())
    assert code_of(lambda: make(tx, b"f", parent=gone)) is ErrorCode.NOT_FOUND
    assert code_of(namespace.link, tx, 6, Link(make(tx, b"f"), gone, b"g")) is ErrorCode.NOT_FOUND
    assert code_of(namespace.rename, tx, 6, Rename(1, b"f", gone, b"g", 0), nobody, Effects()) is ErrorCode.NOT_FOUND
    assert list_all(tx, gone) == []
    assert get(tx, 1).nlink == 2


def test_replaced_by_rename_while_open(tx: MemoryRows) -> None:
    make(tx, b"new")
    old, effects = make(tx, b"old"), Effects()
    done = namespace.rename(tx, 5, Rename(1, b"new", 1, b"old", 0), lambda ino: (4,), effects)
    assert (done.replaced, done.replaced_nlink, effects.orphans) == (old, 0, [old])
    tx.check()


def test_a_stale_inode_is_told_from_a_missing_name(tx: MemoryRows) -> None:
    assert code_of(namespace.lookup, tx, 99, b"x") is ErrorCode.STALE_INODE
    assert code_of(namespace.lookup, tx, 1, b"x") is ErrorCode.NOT_FOUND
    assert code_of(namespace.lookup, tx, make(tx, b"f"), b"x") is ErrorCode.NOT_DIRECTORY
    assert code_of(lambda: make(tx, b"g", parent=99)) is ErrorCode.STALE_INODE


def test_resolve_finds_directories_only(tx: MemoryRows) -> None:
    inner = directory(tx, b"b", parent=directory(tx, b"a"))
    make(tx, b"f")
    assert namespace.resolve(tx, b"/") == namespace.resolve(tx, b"") == 1
    assert namespace.resolve(tx, b"/a//./b/") == inner
    assert code_of(namespace.resolve, tx, b"/a/c") is ErrorCode.NOT_FOUND
    assert code_of(namespace.resolve, tx, b"/f") is ErrorCode.NOT_DIRECTORY


# -- listings ---------------------------------------------------------------------------------------------------------


def test_a_listing_survives_changes_around_it(tx: MemoryRows) -> None:
    for number in range(10):
        make(tx, b"%d" % number)
    page = directories.read(tx, ReadDirectory(1, 0, 4, True))
    assert [entry.name for entry in page.entries] == [b"0", b"1", b"2", b"3"]
    assert page.entries[0].attributes == get(tx, 2).attributes(2)
    assert not page.end
    for number in (0, 3, 4, 9):
        namespace.unlink(tx, 5, Unlink(1, b"%d" % number, False), nobody, Effects())
    make(tx, b"new")
    # Replacing 8 by 7: the name 8 was there all the time and keeps its place.
    namespace.rename(tx, 5, Rename(1, b"7", 1, b"8", 0), nobody, Effects())
    rest = directories.read(tx, ReadDirectory(1, page.entries[-1].cookie, 100, False))
    assert [entry.name for entry in rest.entries] == [b"5", b"6", b"8", b"new"]
    assert rest.end
    assert rest.entries[0].attributes is None


def test_pages_are_bounded_and_odd_cookies_harmless(tx: MemoryRows) -> None:
    for number in range(1005):
        make(tx, b"%d" % number)
    page = directories.read(tx, ReadDirectory(1, 0, 1 << 40, False))
    assert (len(page.entries), page.end) == (1000, False)
    assert len(directories.read(tx, ReadDirectory(1, 0, 0, False)).entries) == 1
    for cookie in (-1, 1 << 64, 1 << 70, 1 << 63):
        assert directories.read(tx, ReadDirectory(1, cookie, 10, False)).end
    assert code_of(directories.read, tx, ReadDirectory(make(tx, b"f"), 0, 1, False)) is ErrorCode.NOT_DIRECTORY


# -- extended attributes ----------------------------------------------------------------------------------------------


def test_xattrs(tx: MemoryRows) -> None:
    file = make(tx, b"f", now=1)
    xattrs.set_value(tx, 5, SetXattr(file, b"user.a", b"1", XattrFlags.CREATE))
    assert (get(tx, file).flags, get(tx, file).ctime_ns) == (InodeFlags.HAS_XATTRS | InodeFlags.COUNTED, 5)
    assert code_of(xattrs.set_value, tx, 6, SetXattr(file, b"user.a", b"2", XattrFlags.CREATE)) is ErrorCode.EXISTS
    xattrs.set_value(tx, 6, SetXattr(file, b"user.a", b"", XattrFlags.REPLACE))
    assert xattrs.get(tx, file, b"user.a") == b""
    replace = SetXattr(file, b"user.b", b"2", XattrFlags.REPLACE)
    assert code_of(xattrs.set_value, tx, 6, replace) is ErrorCode.NO_ATTRIBUTE
    xattrs.set_value(tx, 6, SetXattr(file, b"user.b", b"2" * 65536, 0))
    assert xattrs.names(tx, file) == [b"user.a", b"user.b"]
    xattrs.remove(tx, 7, file, b"user.a")
    assert code_of(xattrs.remove, tx, 7, file, b"user.a") is ErrorCode.NO_ATTRIBUTE
    assert code_of(xattrs.get, tx, file, b"user.a") is ErrorCode.NO_ATTRIBUTE
    assert get(tx, file).flags == InodeFlags.HAS_XATTRS | InodeFlags.COUNTED
    xattrs.remove(tx, 8, file, b"user.b")
    assert (get(tx, file).flags, get(tx, file).ctime_ns) == (InodeFlags.COUNTED, 8)


def test_limits_of_xattrs(tx: MemoryRows) -> None:
    file = make(tx, b"f")
    too_big = SetXattr(file, b"user.a", b"1" * 65537, 0)
    assert code_of(xattrs.set_value, tx, 5, too_big) is ErrorCode.ARGUMENT_TOO_BIG
    for name in (b"", b"n" * 256, b"a\0b"):
        assert code_of(xattrs.set_value, tx, 5, SetXattr(file, name, b"", 0)) is ErrorCode.RANGE
        assert code_of(xattrs.get, tx, file, name) is ErrorCode.RANGE
    assert code_of(xattrs.set_value, tx, 5, SetXattr(file, b"user.a", b"", 4)) is ErrorCode.INVALID
    for number in range(xattrs.MAX_XATTRS):
        xattrs.set_value(tx, 5, SetXattr(file, b"%d" % number, b"", 0))
    assert code_of(xattrs.set_value, tx, 5, SetXattr(file, b"more", b"", 0)) is ErrorCode.NO_SPACE
    xattrs.set_value(tx, 5, SetXattr(file, b"1", b"changed", 0))
    namespace.unlink(tx, 5, Unlink(1, b"f", False), nobody, Effects())
    assert not tx.tables[Table.XATTRS]


def test_a_list_of_names_fits_into_64_kib(tx: MemoryRows) -> None:
    file = make(tx, b"f")
    for number in range(256):
        xattrs.set_value(tx, 5, SetXattr(file, b"%0255d" % number, b"", 0))
    assert code_of(xattrs.set_value, tx, 5, SetXattr(file, b"x", b"", 0)) is ErrorCode.NO_SPACE


# -- removal in steps -------------------------------------------------------------------------------------------------


def test_a_file_of_many_extents_is_gone_at_once_and_removed_in_steps(tx: MemoryRows) -> None:
    from test_extents import commit, fresh

    from metaserver.protocol import Extent

    tx = fresh()
    count = inodes.STEP_EXTENTS + 5
    for start in range(0, count, 500):
        commit(tx, *(Extent(2 * index, 1, 1, 3 * index) for index in range(start, min(start + 500, count))))
    effects = Effects()
    namespace.unlink(tx, 5, Unlink(1, b"file", False), nobody, effects)
    assert [task.kind for _, task in effects.tasks] == [TaskKind.REMOVE_INODE]
    assert inodes.find(tx, 7) is None
    assert len(tx.tables[Table.EXTENTS]) == 5
    row = tx.get(Table.INODES, (7).to_bytes(8, "big"))
    assert row is not None
    assert inodes.remove_step(tx, 7, Inode.unpack(row), effects)
    assert not tx.tables[Table.EXTENTS]
    assert tx.get(Table.INODES, (7).to_bytes(8, "big")) is None

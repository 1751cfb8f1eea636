"""ACLs against what the kernel makes of them on tmpfs, which follows the same rules as every local filesystem."""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_rows import MemoryRows

from metaserver import acl, contents, inodes, namespace, xattrs
from metaserver.acl import GROUP, GROUP_OBJ, MASK, OTHER, USER, USER_OBJ, Entry
from metaserver.errors import DfsError, ErrorCode
from metaserver.inodes import Effects
from metaserver.protocol import ROOT_INO, InodeFlags, Make, SetAttributes, SetXattr

ACCESS, DEFAULT = acl.ACCESS.decode(), acl.DEFAULT.decode()
PERMISSIONS = st.integers(0, 7)


@st.composite
def acls(draw: st.DrawFn) -> list[Entry]:
    """Valid ones, with and without names and mask."""
    named = [
        Entry(tag, draw(PERMISSIONS), number)
        for tag in (USER, GROUP)
        for number in sorted(draw(st.sets(st.integers(1, 5000), max_size=3)))
    ]
    users = [entry for entry in named if entry.tag == USER]
    groups = [entry for entry in named if entry.tag == GROUP]
    masks = [Entry(MASK, draw(PERMISSIONS))] if named or draw(st.booleans()) else []
    first, group, other = (Entry(tag, draw(PERMISSIONS)) for tag in (USER_OBJ, GROUP_OBJ, OTHER))
    return [first, *users, group, *groups, *masks, other]


@pytest.fixture(scope="module")
def local() -> Iterator[Path]:
    umask = os.umask(0)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)
    os.umask(umask)


def read(path: Path, name: str) -> bytes | None:
    try:
        return os.getxattr(path, name)
    except OSError:
        return None


def stored(tx: MemoryRows, ino: int, name: bytes) -> bytes | None:
    try:
        return xattrs.get(tx, ino, name)
    except DfsError as error:
        assert error.code is ErrorCode.NO_ATTRIBUTE
        return None


def plant() -> MemoryRows:
    tx = MemoryRows()
    inodes.make_root(tx, 1)
    return tx


def add(tx: MemoryRows, parent: int, name: bytes, mode: int) -> int:
    return namespace.make(tx, 2, Make(parent, name, mode, 0, 0))[0]


def put(tx: MemoryRows, ino: int, name: bytes, value: bytes) -> None:
    xattrs.set_value(tx, 3, SetXattr(ino, name, value, 0))


def mode(tx: MemoryRows, ino: int) -> int:
    return stat.S_IMODE(inodes.require(tx, ino).mode)


@settings(max_examples=150, deadline=None)
@given(acls(), st.integers(0, 0o7777), st.integers(0, 0o7777))
def test_an_access_acl_and_the_mode_follow_each_other(
    local: Path, rights: list[Entry], before: int, after: int
) -> None:
    path = local / "f"
    path.touch()
    path.chmod(before)
    tx = plant()
    ino = add(tx, ROOT_INO, b"f", stat.S_IFREG | before)

    os.setxattr(path, ACCESS, acl.encode(rights))
    put(tx, ino, acl.ACCESS, acl.encode(rights))
    assert (stored(tx, ino, acl.ACCESS), mode(tx, ino)) == (read(path, ACCESS), stat.S_IMODE(path.stat().st_mode))

    path.chmod(after)
    contents.set_attributes(tx, 4, SetAttributes(ino, mode=after), Effects())
    assert (stored(tx, ino, acl.ACCESS), mode(tx, ino)) == (read(path, ACCESS), stat.S_IMODE(path.stat().st_mode))
    path.unlink()


@settings(max_examples=150, deadline=None)
@given(acls(), st.integers(0, 0o777))
def test_a_default_acl_is_handed_down(local: Path, rights: list[Entry], wanted: int) -> None:
    above = local / "d"
    above.mkdir()
    tx = plant()
    parent = add(tx, ROOT_INO, b"d", stat.S_IFDIR | 0o755)
    os.setxattr(above, DEFAULT, acl.encode(rights))
    put(tx, parent, acl.DEFAULT, acl.encode(rights))

    os.close(os.open(above / "f", os.O_CREAT | os.O_WRONLY, wanted))
    (above / "sub").mkdir(mode=wanted)
    os.symlink("x", above / "l")
    made = {"f": stat.S_IFREG | wanted, "sub": stat.S_IFDIR | wanted}
    for name, asked in made.items():
        ino, path = add(tx, parent, name.encode(), asked), above / name
        found = stored(tx, ino, acl.ACCESS), stored(tx, ino, acl.DEFAULT), mode(tx, ino)
        assert found == (read(path, ACCESS), read(path, DEFAULT), stat.S_IMODE(path.stat().st_mode))
        assert bool(inodes.require(tx, ino).flags & InodeFlags.HAS_XATTRS) == bool(xattrs.names(tx, ino))
    link = namespace.make(tx, 2, Make(parent, b"l", stat.S_IFLNK | 0o777, 0, 0, target=b"x"))[0]
    assert xattrs.names(tx, link) == []
    for name in ("f", "l"):
        (above / name).unlink()
    (above / "sub").rmdir()
    above.rmdir()


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.builds(
            Entry,
            st.sampled_from([USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER, 0, 0x40]),
            st.integers(0, 9),
            st.sampled_from([0, 1, 2, 0xFFFFFFFF]),
        ),
        max_size=6,
    ),
    st.sampled_from([ACCESS, DEFAULT]),
    st.booleans(),
)
def test_what_the_kernel_refuses_is_refused(local: Path, entries: list[Entry], name: str, directory: bool) -> None:
    path = local / ("xd" if directory else "xf")
    path.mkdir(exist_ok=True) if directory else path.touch()
    for left in (ACCESS, DEFAULT):
        with contextlib.suppress(OSError):
            os.removexattr(path, left)
    path.chmod(0o644)
    tx = plant()
    ino = add(tx, ROOT_INO, b"x", (stat.S_IFDIR if directory else stat.S_IFREG) | 0o644)
    expected = got = 0
    value = acl.encode(entries)
    try:
        os.setxattr(path, name, value)
    except OSError as error:
        expected = error.errno
    try:
        put(tx, ino, name.encode(), value)
    except DfsError as error:
        got = {ErrorCode.INVALID: 22, ErrorCode.ACCESS_DENIED: 13}[error.code]
    assert got == expected
    if not expected:
        assert stored(tx, ino, name.encode()) == read(path, name)


@pytest.mark.parametrize("value", [b"", b"\2", b"\2\0\0\0\1", b"\2\0\0\0" + bytes(5000)])
def test_junk_is_refused(value: bytes) -> None:
    with pytest.raises(DfsError) as caught:
        acl.decode(value)
    assert caught.value.code in (ErrorCode.INVALID, ErrorCode.NO_SPACE)


def test_another_version_and_a_symlink_are_not_supported() -> None:
    tx = plant()
    link = namespace.make(tx, 2, Make(ROOT_INO, b"l", stat.S_IFLNK | 0o777, 0, 0, target=b"x"))[0]
    for ino, value in ((ROOT_INO, b"\3\0\0\0"), (link, acl.encode([]))):
        with pytest.raises(DfsError) as caught:
            put(tx, ino, acl.ACCESS, value)
        assert caught.value.code is ErrorCode.NOT_SUPPORTED


def test_removing_what_is_not_there_is_no_error_for_acls_only() -> None:
    tx = plant()
    xattrs.remove(tx, 3, ROOT_INO, acl.ACCESS)
    xattrs.remove(tx, 3, ROOT_INO, acl.DEFAULT)
    with pytest.raises(DfsError):
        xattrs.remove(tx, 3, ROOT_INO, b"user.x")

"""The corners of POSIX one by one: each act is done on the mount and in a directory of the local disk, by root or by
users without rights, and what it answers is compared. What a local disk cannot do comes after that.

An act runs in a process of its own, in the directory; it yields what it saw. docs/posix.md says which test proves
what.
"""

import ctypes
import errno
import mmap
import os
import pickle
import stat
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mount_cluster import RealCluster, run
from test_mount_directories import Meter

from dfsmount.vfs_core import SECTOR_BYTES

libc = ctypes.CDLL(None, use_errno=True)
AT_FDCWD, AT_EMPTY_PATH = -100, 0x1000
NOREPLACE, EXCHANGE = 1, 2
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
LAST = (1 << 63) - 1
GIB = 1 << 30

# uid, gid, supplementary groups.
ROOT = (0, 0, ())
MEMBER = (1002, 2000, (3000,))
STRANGER = (1003, 4000, ())


def said(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What a call returns, or the name of its errno; a descriptor it opens is closed."""
    try:
        result = function(*arguments, **named)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    if function is os.open:
        os.close(result)
        return "opened"
    return result


def call(function: str, *arguments: Any) -> int:
    result: int = getattr(libc, function)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def renameat2(old: str, new: str, flags: int) -> int:
    return call("renameat2", AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags)


def utimens(path: str, *numbers: int) -> int:
    """utimensat(2) with the seconds and nanoseconds of atime and mtime."""
    return call("utimensat", AT_FDCWD, os.fsencode(path), (ctypes.c_long * 4)(*numbers), 0)


def put(path: str, content: bytes = b"x", mode: int = 0o644, owner: tuple[int, int] = (0, 0)) -> None:
    with open(path, "wb") as file:
        file.write(content)
    os.chown(path, *owner)
    os.chmod(path, mode)


def mode_of(path: str) -> str:
    return f"{os.lstat(path).st_mode:o}"


def tree() -> list[tuple[str, list[str], list[str]]]:
    return sorted((folder, sorted(folders), sorted(files)) for folder, folders, files in os.walk("."))


def in_child(place: Path, user: tuple[int, int, tuple[int, ...]], act: Callable[[], Iterator[Any]]) -> Any:
    """All that ``act`` yields in ``place`` in a process of ``user``."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.chdir(place)
            os.umask(0o022)
            if user[0]:
                os.setgroups(user[2])
                os.setgid(user[1])
                os.setuid(user[0])
            told = pickle.dumps(list(act()))
        except BaseException:
            told = pickle.dumps(traceback.format_exc())
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(told)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pickle.loads(pipe.read())
    os.waitpid(child, 0)
    assert not (isinstance(answer, str) and answer.startswith("Traceback")), answer
    return answer


# -- acts of root ----------------------------------------------------------------------------------------------------


def past_the_end() -> Iterator[Any]:
    """pread and pwrite past the end, truncate up and down with reads in between."""
    descriptor = os.open("f", os.O_RDWR | os.O_CREAT)
    yield os.pread(descriptor, 10, 0), os.pread(descriptor, 10, 1 << 40)
    yield os.pwrite(descriptor, b"abc", 100_000), os.fstat(descriptor).st_size
    yield os.pread(descriptor, 200_000, 0), os.pread(descriptor, 10, 100_003), os.pread(descriptor, 10, 100_002)
    for size in (50_000, 200_000, 3, 100_001, 0, 7):
        os.ftruncate(descriptor, size)
        yield os.fstat(descriptor).st_size, os.pread(descriptor, 300_000, 0)
        yield os.pwrite(descriptor, b"xyz", size + 5), os.pread(descriptor, 300_000, 0)
        os.truncate("f", size + 2)
        yield os.stat("f").st_size, os.pread(descriptor, 300_000, 0), os.lseek(descriptor, 0, os.SEEK_END)
    yield said(os.ftruncate, descriptor, -1), said(os.pwrite, descriptor, b"x", LAST)


def holes() -> Iterator[Any]:
    """st_blocks of sparse files, to within a block of the local disk's."""
    descriptor = os.open("f", os.O_RDWR | os.O_CREAT)
    for size, at in ((1 << 40, 0), (0, 1 << 32), (0, 1 << 35)):
        if size:
            os.ftruncate(descriptor, size)
        else:
            os.pwrite(descriptor, b"x" * 65536, at)
        os.fsync(descriptor)
        yield os.fstat(descriptor).st_size, os.fstat(descriptor).st_blocks // 64
    os.ftruncate(descriptor, (1 << 32) + 65536)
    os.fsync(descriptor)
    yield os.fstat(descriptor).st_size, os.fstat(descriptor).st_blocks // 64
    os.ftruncate(descriptor, 0)
    yield os.fstat(descriptor).st_blocks


def descriptors() -> Iterator[Any]:
    """O_PATH, O_NOFOLLOW, O_EXCL, O_TRUNC, O_APPEND."""
    put("f", b"0123456789")
    os.symlink("f", "link")
    os.symlink("nothing", "dangling")
    os.mkdir("d")
    only = os.open("f", os.O_PATH)
    for function, arguments in (
        (os.read, (1,)), (os.write, (b"x",)), (os.fchmod, (0o600,)), (os.fchown, (0, 0)), (os.ftruncate, (0,)),
        (os.fsync, ()), (os.getxattr, ("user.a",)), (os.fstatvfs, ()),
    ):  # fmt: skip
        answer = said(function, only, *arguments)  # type: ignore[operator]
        yield answer if isinstance(answer, str) else "done"
    yield os.fstat(only).st_size, said(os.open, f"/proc/self/fd/{only}", os.O_RDONLY)
    yield call("linkat", only, b"", AT_FDCWD, b"hard", AT_EMPTY_PATH), os.fstat(only).st_nlink
    link = os.open("link", os.O_PATH | os.O_NOFOLLOW)
    yield stat.S_ISLNK(os.fstat(link).st_mode), os.readlink("", dir_fd=link)
    folder = os.open("d", os.O_PATH)
    yield said(os.open, "x", os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder), os.listdir("d")
    for name in ("f", "link", "dangling", "d", "fresh", "d/..", "f/x", "f/"):
        for flags in (
            os.O_RDONLY, os.O_WRONLY, os.O_NOFOLLOW, os.O_CREAT | os.O_EXCL, os.O_DIRECTORY, os.O_TRUNC,
            os.O_PATH | os.O_NOFOLLOW, os.O_DIRECTORY | os.O_NOFOLLOW, os.O_CREAT | os.O_NOFOLLOW,
        ):  # fmt: skip
            yield name, flags, said(os.open, name, flags, 0o600)
    put("a", b"0123456789")
    appending = os.open("a", os.O_RDWR | os.O_APPEND)
    yield os.write(appending, b"ab"), os.lseek(appending, 0, os.SEEK_CUR), os.pwrite(appending, b"cd", 0)
    yield os.pread(appending, 100, 0)
    yield said(os.open, "a", os.O_WRONLY | os.O_TRUNC), os.fstat(appending).st_size
    yield os.write(appending, b"ef"), os.pread(appending, 100, 0)


def many_handles() -> Iterator[Any]:
    """Unlink and rename over files that are open, on any number of handles."""
    put("f", b"old")
    os.link("f", "second")
    opened = [os.open("f", flags) for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY, os.O_PATH) * 25]
    os.unlink("f")
    yield {os.fstat(descriptor).st_nlink for descriptor in opened}
    put("g", b"new")
    os.rename("g", "second")
    yield {os.fstat(descriptor).st_nlink for descriptor in opened}, os.stat("second").st_nlink
    for number, descriptor in enumerate(opened[1::4]):
        os.pwrite(descriptor, b"%02d" % number, 10 + 2 * number)
    yield {os.pread(descriptor, 1000, 0) for descriptor in opened[::4]}
    os.ftruncate(opened[2], 20)
    yield {os.pread(descriptor, 1000, 0) for descriptor in opened[1::4]}, Path("second").read_bytes()
    for descriptor in opened[4:]:
        os.close(descriptor)
    yield os.pread(opened[0], 1000, 0), os.fstat(opened[1]).st_size
    yield said(call, "linkat", opened[3], b"", AT_FDCWD, b"back", AT_EMPTY_PATH)
    os.mkdir("d")
    held = os.open("d", os.O_RDONLY)
    os.rmdir("d")
    yield os.fstat(held).st_nlink, os.listdir(held), said(os.open, "x", os.O_CREAT, 0o600, dir_fd=held)
    yield said(os.mkdir, "x", dir_fd=held), sorted(os.listdir("."))


def renames() -> Iterator[Any]:
    """NOREPLACE, EXCHANGE, into itself, over directories; hard links."""
    for name in ("d", "d/sub", "empty", "full", "full/x"):
        os.mkdir(name)
    put("f", b"f")
    put("g", b"g")
    os.link("f", "f2")
    os.symlink("f", "link")
    names = ("d", "d/sub", "d/sub/deep", "empty", "full", "f", "g", "f2", "link", "nothing", ".", "d/..", "f/x")
    for flags in (NOREPLACE, EXCHANGE, NOREPLACE | EXCHANGE, 0):
        for old in names:
            for new in names:
                yield flags, old, new, said(renameat2, old, new, flags)
        yield tree(), [(name, said(lambda n: os.lstat(n).st_nlink, name)) for name in names]


def times() -> Iterator[Any]:
    """Nanoseconds before 1970 and after 2106, UTIME_NOW and UTIME_OMIT."""
    put("f")
    for seconds in (-1, 1 - (1 << 31), 0, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 6_000_000_000, 9_000_000_000):
        for nanoseconds in (0, 1, 999_999_999):
            utimens("f", seconds, nanoseconds, seconds + 1, 999_999_999 - nanoseconds)
            yield os.stat("f").st_atime_ns, os.stat("f").st_mtime_ns
    began = time.time_ns() - 10**9
    utimens("f", 1, 2, 3, 4)
    utimens("f", 77, UTIME_OMIT, 5, 6)
    yield os.stat("f").st_atime_ns, os.stat("f").st_mtime_ns
    utimens("f", 0, UTIME_NOW, 77, UTIME_OMIT)
    yield os.stat("f").st_atime_ns > began, os.stat("f").st_mtime_ns
    changed = os.stat("f").st_ctime_ns
    utimens("f", 0, UTIME_OMIT, 0, UTIME_OMIT)
    yield os.stat("f").st_ctime_ns == changed
    utimens("f", 9, 9, 0, UTIME_NOW)
    yield os.stat("f").st_atime_ns, os.stat("f").st_mtime_ns > began, said(utimens, "f", 1, 1 << 30, 1, 1)


def attributes_of_users() -> Iterator[Any]:
    """Flags and limits of xattrs in all namespaces."""
    put("f")
    for space in ("user.", "trusted.", "security.", "system.", "other.", ""):
        for flags in (0, os.XATTR_REPLACE, os.XATTR_CREATE, os.XATTR_CREATE, os.XATTR_REPLACE):
            yield (
                space,
                flags,
                said(os.setxattr, "f", f"{space}a", b"%d" % flags, flags),
                said(os.getxattr, "f", f"{space}a"),
            )
        yield said(os.setxattr, "f", space, b"x"), said(os.setxattr, "f", space + "n" * (255 - len(space)), b"x")
        yield said(os.setxattr, "f", space + "n" * (256 - len(space)), b"x"), said(os.removexattr, "f", f"{space}none")
    yield sorted(os.listxattr("f")), said(os.setxattr, "f", "user.big", b"x" * 65537)
    yield said(os.setxattr, "f", "user.empty", b""), os.getxattr("f", "user.empty")
    yield said(os.setxattr, "f", b"user.\xff\xfe\n", b"x"), os.fsencode(sorted(os.listxattr("f"))[-1])
    os.symlink("f", "link")
    for space in ("user.", "trusted.", "security."):
        yield said(os.setxattr, "link", f"{space}l", b"x", follow_symlinks=False)


def odd_names() -> Iterator[Any]:
    """NAME_MAX, PATH_MAX, any bytes."""
    for byte in range(1, 256):
        name = bytes([byte, byte])
        yield byte, said(os.mkdir, name)
    yield sorted(os.listdir(b"."))
    for length in (254, 255, 256):
        for letter in (b"n", "ü".encode()):
            yield length, said(os.mkdir, (letter * length)[:length]), said(os.stat, (letter * length)[:length] + b"z")
    for length in (4094, 4095, 4096):
        path = b"./" * 2048 + b"f"
        yield length, said(os.open, path[-length:].lstrip(b"/"), os.O_CREAT, 0o600)
    # Deeper than any path can say.
    for _ in range(24):
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    put("deep", b"deep")
    yield Path("deep").read_bytes(), len(os.getcwd()) > 4096
    for length in (4095, 4096):
        yield said(os.symlink, b"t" * length, b"l%d" % length)


def mapped() -> Iterator[Any]:
    """mmap shared between two processes, and private."""
    put("f", b"a" * 10_000)
    descriptor = os.open("f", os.O_RDWR)
    shared, private = mmap.mmap(descriptor, 10_000), mmap.mmap(descriptor, 10_000, mmap.MAP_PRIVATE)
    private[5:8] = b"PPP"
    child = os.fork()
    if child == 0:
        again = mmap.mmap(os.open("f", os.O_RDWR), 10_000)
        again[100:105] = b"child"
        private[200:203] = b"lost"[:3]
        os._exit(0)
    os.waitpid(child, 0)
    shared[9_990:] = b"the end   "
    yield shared[95:110], private[0:10], private[95:110], private[200:203]
    yield os.pread(descriptor, 20, 0), os.pread(descriptor, 20, 95), os.pread(descriptor, 20, 9_985)
    os.pwrite(descriptor, b"written", 300)
    yield shared[295:310], private[295:310]
    shared.flush()
    os.ftruncate(descriptor, 20_000)
    yield os.pread(descriptor, 10_000, 9_995), Path("f").read_bytes()[:400]


# -- acts of others --------------------------------------------------------------------------------------------------


def furnish() -> Iterator[Any]:
    """What :func:`without_rights` is about."""
    os.chmod(".", 0o755)
    for name, mode, owner in (
        ("private", 0o600, (0, 0)), ("readable", 0o644, (0, 0)), ("groups", 0o640, (0, 3000)),
        ("writable", 0o666, (0, 0)), ("suid", 0o6777, (0, 0)), ("sgid", 0o2676, (0, 0)), ("mine", 0o644, (1002, 2000)),
        ("mine-suid", 0o6755, (1002, 2000)), ("mine-in-group", 0o2755, (1002, 3000)),
        ("mine-elsewhere", 0o2755, (1002, 5000)),
        ("none", 0o000, (1002, 2000)),
    ):  # fmt: skip
        put(name, b"0123456789", mode, owner)
    for name, mode, owner in (
        ("closed", 0o700, (0, 0)), ("open", 0o777, (0, 0)), ("sticky", 0o1777, (0, 0)),
        ("my-sticky", 0o1777, (1002, 2000)),
        ("setgid", 0o2777, (0, 3000)), ("setgid-else", 0o2777, (0, 5000)), ("unlisted", 0o711, (0, 0)),
    ):  # fmt: skip
        os.mkdir(name)
        os.chown(name, *owner)
        put(f"{name}/roots", b"x")
        put(f"{name}/mine", b"x", 0o644, (1002, 2000))
        put(f"{name}/theirs", b"x", 0o644, (1003, 4000))
        os.chmod(name, mode)
    yield "ready"


def without_rights() -> Iterator[Any]:
    """The errno of everything a user may or may not do; supplementary groups, sticky and setgid directories, and which
    bits are gone afterwards."""
    files = ["private", "readable", "groups", "writable", "suid", "sgid"]
    files += ["mine", "mine-suid", "mine-in-group", "mine-elsewhere", "none", "closed/roots", "unlisted/roots"]
    for name in files:
        for flags in (
            os.O_RDONLY,
            os.O_WRONLY,
            os.O_RDWR,
            os.O_WRONLY | os.O_TRUNC,
            os.O_PATH,
            os.O_RDONLY | os.O_NOATIME,
        ):
            yield name, flags, said(os.open, name, flags)
        yield name, [said(os.access, name, wanted, effective_ids=True) for wanted in range(8)]
        yield name, said(os.utime, name), said(os.utime, name, (1, 2)), said(os.setxattr, name, "user.x", b"x")
        for space in ("trusted.x", "security.x"):
            yield name, said(os.setxattr, name, space, b"x"), said(os.getxattr, name, space)
        yield name, said(os.link, name, f"open/linked-{name.replace('/', '-')}")
        yield name, said(os.truncate, name, 5), said(mode_of, name)
        for mode in (0o4755, 0o2755, 0o6777, 0o644):
            yield name, mode, said(os.chmod, name, mode), said(mode_of, name)
        # Not (-1, -1): the kernel does not tell a filesystem that takes the bits away itself (docs/posix.md).
        for owner in ((-1, 3000), (-1, 2000), (-1, 5000), (0, -1), (1002, -1)):
            yield name, owner, said(os.chmod, name, 0o6755), said(os.chown, name, *owner), said(mode_of, name)
    for folder in ("closed", "open", "sticky", "my-sticky", "setgid", "setgid-else", "unlisted", "."):
        yield folder, said(os.listdir, folder) if folder == "closed" else sorted(said(os.listdir, folder))
        yield folder, said(os.mkdir, f"{folder}/new"), said(mode_of, f"{folder}/new")
        yield folder, said(os.open, f"{folder}/made", os.O_CREAT | os.O_EXCL, 0o2775), said(mode_of, f"{folder}/made")
        yield folder, said(lambda f: (os.stat(f"{f}/new").st_gid, os.stat(f"{f}/made").st_gid), folder)
        for name in ("roots", "mine", "theirs"):
            yield (
                folder,
                name,
                said(os.rename, f"{folder}/{name}", f"{folder}/{name}-moved"),
                said(os.unlink, f"{folder}/{name}"),
            )
        yield folder, said(os.mknod, f"{folder}/device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        yield folder, said(os.rmdir, f"{folder}/new"), said(os.rmdir, folder), said(os.chmod, folder, 0o1777)


CHANGES = ("write", "pwrite", "ftruncate", "truncate", "open", "mmap", "chown")


def writes_that_clear_bits() -> Iterator[Any]:
    """S_ISUID and S_ISGID go with a write by a user. S_ISGID where the group may not execute: see the next test."""
    for number, mode in enumerate((0o6777, 0o6676, 0o4777, 0o2777, 0o4666)):
        for act in CHANGES:
            name = f"bits/{act}-{number}"
            descriptor = os.open(name, os.O_RDWR)
            if act == "write":
                os.write(descriptor, b"x")
            elif act == "pwrite":
                os.pwrite(descriptor, b"x", 100)
            elif act == "ftruncate":
                os.ftruncate(descriptor, 3)
            elif act == "truncate":
                os.truncate(name, 3)
            elif act == "open":
                os.close(os.open(name, os.O_WRONLY | os.O_TRUNC))
            elif act == "mmap":
                with mmap.mmap(descriptor, 10) as memory:
                    memory[0:1] = b"m"
            else:
                yield name, said(os.chown, name, -1, os.stat(name).st_gid)
            os.close(descriptor)
            yield name, f"{mode:o}", mode_of(name)


def prepare_bits() -> Iterator[Any]:
    os.chmod(".", 0o755)
    os.mkdir("bits")
    for number, mode in enumerate((0o6777, 0o6676, 0o4777, 0o2777, 0o4666)):
        for act in CHANGES:
            put(f"bits/{act}-{number}", b"0123456789", mode)
    yield "ready"


ACTS: dict[str, tuple[tuple[tuple[int, int, tuple[int, ...]], Callable[[], Iterator[Any]]], ...]] = {
    "past the end": ((ROOT, past_the_end),),
    "holes": ((ROOT, holes),),
    "descriptors": ((ROOT, descriptors),),
    "many handles": ((ROOT, many_handles),),
    "renames": ((ROOT, renames),),
    "times": ((ROOT, times),),
    "xattrs": ((ROOT, attributes_of_users),),
    "names": ((ROOT, odd_names),),
    "mapped": ((ROOT, mapped),),
    "a member": ((ROOT, furnish), (MEMBER, without_rights)),
    "a stranger": ((ROOT, furnish), (STRANGER, without_rights)),
    "bits": ((ROOT, prepare_bits), (STRANGER, writes_that_clear_bits)),
    "bits for root": ((ROOT, prepare_bits), (ROOT, writes_that_clear_bits)),
}


@pytest.mark.parametrize("name", ACTS)
def test_a_corner_is_as_on_a_local_disk(place: Path, tmp_path: Path, name: str) -> None:
    local = tmp_path / "local"
    local.mkdir()
    for user, act in ACTS[name]:
        ours, theirs = (in_child(root, user, act) for root in (place, local))
        assert len(ours) == len(theirs)
        different = [(mine, other) for mine, other in zip(ours, theirs, strict=True) if mine != other]
        for mine, other in different:
            print(f"ours  {str(mine)[:300]}\nlocal {str(other)[:300]}")
        assert not different


def test_setgid_where_the_group_may_not_execute_stays(place: Path) -> None:
    """A difference: the kernel leaves S_ISGID alone for FUSE filesystems if S_IXGRP is not set, as Linux did for all
    before 6.2, and does not tell us who writes."""

    def act() -> Iterator[Any]:
        with open("f", "r+b", buffering=0) as file:
            file.write(b"y")
        yield mode_of("f")

    place.chmod(0o755)
    put(str(place / "f"), b"x", 0o6766)
    assert in_child(place, STRANGER, act) == ["102766"]


# -- beyond a local disk ---------------------------------------------------------------------------------------------


def test_files_over_four_gibibytes(place: Path) -> None:
    """Written across 2^32 and beyond 5 GiB, read back from the servers, cut down to one byte more than 2^32."""
    data = os.urandom(3 << 20)
    path = place / "big"
    with path.open("w+b", buffering=0) as file:
        os.pwrite(file.fileno(), data, 4 * GIB - (1 << 20))
        os.pwrite(file.fileno(), data, 5 * GIB)
        os.fsync(file.fileno())
    descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
    assert os.fstat(descriptor).st_size == 5 * GIB + len(data)
    assert os.fstat(descriptor).st_blocks * SECTOR_BYTES == 2 * len(data)
    assert b"".join(os.pread(descriptor, 1 << 20, 4 * GIB + (at << 20)) for at in (-1, 0, 1)) == data
    assert b"".join(os.pread(descriptor, 1 << 20, 5 * GIB + (at << 20)) for at in range(3)) == data
    os.ftruncate(descriptor, 4 * GIB + 1)
    assert os.pread(descriptor, 100, 4 * GIB) == data[1 << 20 : (1 << 20) + 1]
    os.ftruncate(descriptor, 6 * GIB)
    assert os.pread(descriptor, 100, 5 * GIB) == bytes(100)
    os.close(descriptor)
    with path.open("ab") as file:
        assert file.tell() == 6 * GIB
        file.write(b"end")
    assert path.stat().st_size == 6 * GIB + 3


def test_sparse_up_to_eight_exbibytes_less_one(place: Path) -> None:
    descriptor = os.open(place / "f", os.O_RDWR | os.O_CREAT)
    os.ftruncate(descriptor, LAST)
    assert (os.fstat(descriptor).st_size, os.fstat(descriptor).st_blocks) == (LAST, 0)
    assert os.pread(descriptor, 5, LAST - 5) == bytes(5)
    assert os.pwrite(descriptor, b"ab", LAST - 2) == 2
    # The kernel's answer on every filesystem (rw_verify_area).
    assert said(os.pread, descriptor, 10, LAST - 5) == said(os.pwrite, descriptor, b"abc", LAST - 1) == "EINVAL"
    os.fsync(descriptor)
    assert os.pread(descriptor, 4, LAST - 4) == b"\0\0ab"
    assert 0 < os.fstat(descriptor).st_blocks < 1000
    os.ftruncate(descriptor, LAST - 1)
    assert os.pread(descriptor, 4, LAST - 4) == b"\0\0a"
    os.close(descriptor)
    assert (place / "f").stat().st_size == LAST - 1


def handle_of(path: Path) -> bytes:
    """Inode number and generation, as NFS would be told (name_to_handle_at(2))."""
    buffer = ctypes.create_string_buffer(b"\x80\0\0\0", 136)
    call("name_to_handle_at", AT_FDCWD, os.fsencode(path), buffer, ctypes.byref(ctypes.c_int()), 0)
    return buffer.raw[4 : 8 + buffer.raw[0]]


def test_inode_numbers_and_generations_stay_and_are_not_used_again(cluster: RealCluster, place: Path) -> None:
    def identity(name: str) -> tuple[object, ...]:
        found = (place / name).lstat()
        return found.st_ino, handle_of(place / name), found.st_mtime_ns, found.st_ctime_ns

    (place / "f").write_text("x")
    (place / "d").mkdir()
    (place / "link").symlink_to("f")
    os.link(place / "f", place / "hard")
    before = {name: identity(name) for name in ("f", "d", "link", "hard")}
    assert before["f"] == before["hard"]
    cluster.restart("metaserver")
    assert {name: identity(name) for name in before} == before
    cluster.remount()
    assert {name: identity(name) for name in before} == before
    (place / "d" / "g").touch()
    gone = (place / "d" / "g").stat().st_ino, handle_of(place / "d" / "g")
    (place / "d" / "g").unlink()
    for number in range(50):
        (place / "d" / f"g{number}").touch()
        assert (place / "d" / f"g{number}").stat().st_ino != gone[0]
        assert handle_of(place / "d" / f"g{number}") != gone[1]


@pytest.mark.parametrize("flag", [0, os.O_DSYNC, os.O_SYNC])
def test_each_write_is_on_stable_storage_if_asked(cluster: RealCluster, place: Path, flag: int) -> None:
    """Counted at the metaserver: each such write is followed by a commit before it is answered."""
    meter = Meter(cluster)
    descriptor = os.open(place / "f", os.O_WRONLY | os.O_CREAT | flag, 0o600)
    before = meter.requests()
    for number in range(20):
        os.pwrite(descriptor, b"x" * 1000, 1000 * number)
    after = meter.requests()
    written = after.get("commit", 0) - before.get("commit", 0)
    assert (written >= 20) == bool(flag), written
    # And `sync FILE` of what nobody has asked it of: one commit, which is answered once it is durable.
    run("sync", place / "f")
    os.close(descriptor)
    assert flag or meter.requests()["commit"] > after.get("commit", 0)


def test_statfs_tells_the_space_at_two_copies(cluster: RealCluster, place: Path) -> None:
    """What can be written is at most half of what the servers have free; here all three share one disk."""
    told = os.statvfs(place)
    disk = os.statvfs(cluster.data)
    bytes_told, bytes_there = told.f_bavail * told.f_frsize, disk.f_bavail * disk.f_frsize
    assert 0 < bytes_told <= bytes_there / 2
    assert bytes_told > bytes_there / 4
    assert (told.f_namemax, told.f_bfree) == (255, told.f_bavail)


def moves(path: str, function: Callable[..., Any], *arguments: Any) -> tuple[int, bool]:
    """Whether a call moves the time of access of ``path`` (1: forward, -1: back), and no other time of it."""
    # A tick of the clock that tmpfs takes times from.
    time.sleep(0.02)
    before = os.lstat(path)
    function(*arguments)
    after = os.lstat(path)
    way = (after.st_atime_ns > before.st_atime_ns) - (after.st_atime_ns < before.st_atime_ns)
    return way, (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)


def read_all(path: str, flags: int = 0) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | flags)
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def read_mapped(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as memory:
        os.close(descriptor)
        return memory[:1]


def reads() -> Iterator[Any]:
    """What moves a time of access, and when it does not."""
    hour, now = 3600 * 10**9, time.time_ns()
    Path("f").write_bytes(b"data")
    yield moves("f", os.stat, "f"), moves("f", read_all, "f"), moves("f", read_all, "f")
    os.chmod("f", 0o600)
    yield moves("f", read_all, "f", os.O_NOATIME), moves("f", read_all, "f"), moves("f", read_all, "f")
    with open("f", "ab") as file:
        file.write(b"more")
    yield moves("f", read_all, "f"), moves("f", read_all, "f")
    os.truncate("f", 3)
    yield moves("f", read_mapped, "f"), moves("f", read_mapped, "f")
    for atime, mtime in ((10**18, 2 * 10**18), (2 * 10**18, 10**18), (now + hour, 5), (now + hour, now + 2 * hour)):
        os.utime("f", ns=(atime, mtime))
        yield moves("f", read_all, "f"), os.stat("f").st_mtime_ns == mtime
    os.utime("f", ns=(10**18, 10**18))
    read_all("f")
    os.utime("f", ns=(10**18, 10**18))
    yield os.stat("f").st_atime_ns
    Path("empty").touch()
    yield moves("empty", read_all, "empty"), moves("empty", read_all, "empty")
    os.mkdir("d")
    yield moves("d", os.listdir, "d"), moves("d", os.listdir, "d")
    Path("d/f").touch()
    yield moves("d", os.stat, "d/f"), moves("d", os.listdir, "d"), moves("d", os.listdir, "d")
    os.symlink("f", "l")
    yield moves("l", os.lstat, "l"), moves("l", os.readlink, "l"), moves("l", os.readlink, "l")
    os.symlink("f", "followed")
    yield moves("followed", os.stat, "followed"), moves("followed", os.stat, "followed")


@pytest.fixture
def local_relatime(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "local"
    path.mkdir()
    run("mount", "-t", "tmpfs", "-o", "relatime,size=1m", "none", path)
    yield path
    run("umount", path)


def test_reading_moves_the_time_of_access_as_relatime_does(place: Path, local_relatime: Path) -> None:
    ours, theirs = (in_child(root, ROOT, reads) for root in (place, local_relatime))
    assert ours == theirs
    assert any(way for (way, _), *_ in (case for case in ours if isinstance(case, tuple) and len(case) > 1))


def test_noatime(cluster: RealCluster, place: Path, tmp_path: Path) -> None:
    """And what a mount without it has read is known everywhere once it has ended."""
    (place / "f").write_text("x")
    (place / "d").mkdir()

    def read(point: Path) -> tuple[int, int]:
        seen = point / place.name
        before = [(seen / name).stat().st_atime_ns for name in ("f", "d")]
        assert ((seen / "f").read_text(), os.listdir(seen / "d")) == ("x", [])
        after = [(seen / name).stat().st_atime_ns for name in ("f", "d")]
        file, directory = (new - old for new, old in zip(after, before, strict=True))
        return file, directory

    def through(*options: str) -> tuple[bool, bool]:
        point = tmp_path / "-".join(["mnt", *options])
        cluster.mount_again(point, *options)
        try:
            file, directory = read(point)
        finally:
            run("umount", point)
        return file > 0, directory > 0

    assert through("noatime") == (False, False)
    assert through("ro") == (False, False)
    assert through("nodiratime") == (True, False)
    assert through("noatime", "relatime") == (False, True)
    # All of it was told at the ends of these mounts.
    time.sleep(1.1)
    for name in ("f", "d"):
        found = (place / name).stat()
        assert found.st_atime_ns > found.st_ctime_ns
    assert read(place.parent) == (0, 0)

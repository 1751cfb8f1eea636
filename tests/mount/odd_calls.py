"""System calls with arguments nobody should pass: what they answer in a directory, by name.

Each case is one call through libc, without what Python would check or mend before. :func:`answers` makes the same few
files in a directory and runs all cases there; whoever calls it compares directories.
"""

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)
for _name in ("pread64", "pwrite64", "lseek64", "read", "write", "readv", "writev", "preadv64", "pwritev64"):
    getattr(libc, _name).restype = ctypes.c_ssize_t
for _name in ("getxattr", "fgetxattr", "listxattr", "flistxattr", "readlink", "preadv64v2", "pwritev64v2"):
    getattr(libc, _name).restype = ctypes.c_ssize_t
libc.sendfile64.restype = libc.copy_file_range.restype = libc.splice.restype = ctypes.c_ssize_t
libc.lseek64.restype = ctypes.c_int64
libc.mmap64.restype = ctypes.c_void_p

LAST = (1 << 63) - 1
FAR = (LAST - 1, LAST, -1, -(1 << 63))
AT_FDCWD = -100
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
NOWHERE = ctypes.c_void_p(8)
NAMES = {
    "empty": b"",
    "255 bytes": b"n" * 255,
    "256 bytes": b"n" * 256,
    "255 of umlauts": "ü".encode() * 127 + b"x",
    "newline": b"a\nb",
    "control": b"\x01\x1f\x7f",
    "no UTF-8": b"\xff\xfe\xc3(",
    "spaces": b"  ",
    "backslash": b"a\\b",
    "star": b"*?[",
    "minus": b"-rf",
    "three dots": b"...",
    "slash at the end": b"x/",
    "below a file": b"file/x",
    "dot": b".",
    "dot dot": b"..",
    "path of 4095": b"./" * 2047 + b"x",
    "path of 4096": b"./" * 2047 + b"xx",
    "loop": b"loop/x",
    "dangling": b"dangling",
}

Case = Callable[["Place"], object]


class Wrong(Exception):
    """What a call answered with an errno."""


def call(function: Any, *arguments: Any) -> int:
    """Raises :class:`Wrong` with the errno's name."""
    wide = [ctypes.c_int64(word) if isinstance(word, int) and abs(word) >= 1 << 31 else word for word in arguments]
    ctypes.set_errno(0)
    result = function(*wide)
    if result is None or result == -1 or result == (1 << 64) - 1:
        number = ctypes.get_errno()
        raise Wrong(errno.errorcode.get(number, str(number)))
    return int(result)


class Place:
    """A directory with something of each kind, and descriptors of it."""

    def __init__(self, root: Path) -> None:
        self.root = os.fsencode(root)
        self.file = self.path(b"file")
        (root / "file").write_bytes(b"0123456789" * 1000)
        (root / "directory").mkdir()
        (root / "full").mkdir()
        (root / "full" / "x").touch()
        (root / "loop").symlink_to("loop")
        (root / "dangling").symlink_to("nothing")
        os.mkfifo(root / "fifo")
        (root / "target").write_bytes(b"")
        os.setxattr(root / "target", "user.known", b"value")
        self.opened: list[int] = []
        self.fd = self.open(b"file", os.O_RDWR)
        self.reading = self.open(b"file", os.O_RDONLY)
        self.writing = self.open(b"file", os.O_WRONLY)
        self.appending = self.open(b"file", os.O_WRONLY | os.O_APPEND)
        self.directory = self.open(b"directory", os.O_RDONLY)
        self.path_only = self.open(b"file", os.O_PATH)
        self.direct = self.open(b"file", os.O_RDWR | os.O_DIRECT) if _takes_direct(root) else -1

    def path(self, name: bytes) -> bytes:
        return self.root + b"/" + name

    def open(self, name: bytes, flags: int) -> int:
        self.opened.append(os.open(self.path(name), flags))
        return self.opened[-1]

    def fresh(self) -> bytes:
        """The path of a file that may be renamed."""
        path = self.path(b"fresh")
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        return path

    def close(self) -> None:
        for descriptor in self.opened:
            os.close(descriptor)


def _takes_direct(root: Path) -> bool:
    try:
        os.close(os.open(root / "file", os.O_RDWR | os.O_DIRECT))
    except OSError:
        return False
    return True


def opened(descriptor: int) -> str:
    os.close(descriptor)
    return "opened"


def iovecs(*lengths: int, base: Any = None) -> Any:
    buffer = ctypes.create_string_buffer(1 << 16)
    address = ctypes.addressof(buffer) if base is None else base
    words = b"".join(struct.pack("@QQ", address, length & ((1 << 64) - 1)) for length in lengths)
    made = ctypes.create_string_buffer(words, len(words) or 1)
    made.kept = buffer  # type: ignore[attr-defined]
    return made


# -- contents ------------------------------------------------------------------------------------------------------


def contents() -> Iterator[tuple[str, Case]]:
    buffer = ctypes.create_string_buffer(1 << 16)
    for offset in (0, 9_999, 10_000, 10_001, *FAR):
        yield f"pread at {offset}", lambda p, o=offset: call(libc.pread64, p.fd, buffer, 10, o)
        yield f"pread of nothing at {offset}", lambda p, o=offset: call(libc.pread64, p.fd, buffer, 0, o)
        yield f"pwrite of nothing at {offset}", lambda p, o=offset: call(libc.pwrite64, p.fd, buffer, 0, o)
        yield f"preadv at {offset}", lambda p, o=offset: call(libc.preadv64, p.fd, iovecs(5, 5), 2, o)
    for offset in FAR[1:]:
        yield f"pwrite at {offset}", lambda p, o=offset: call(libc.pwrite64, p.fd, buffer, 1, o)
        yield f"pwritev at {offset}", lambda p, o=offset: call(libc.pwritev64, p.fd, iovecs(1), 1, o)
    yield "pwrite over the end", lambda p: call(libc.pwrite64, p.fd, buffer, 10, LAST - 5)
    for length in (-1, 1 << 63, (1 << 63) - 1, 1 << 32):
        yield f"read of {length}", lambda p, n=length: call(libc.read, p.reading, ctypes.c_void_p(0), n)
        yield f"write of {length} from nowhere", lambda p, n=length: call(libc.write, p.fd, NOWHERE, n)
    yield "read to nowhere", lambda p: call(libc.pread64, p.fd, NOWHERE, 10, 0)
    yield "write from nowhere", lambda p: call(libc.pwrite64, p.fd, NOWHERE, 10, 0)
    yield "read from a writer", lambda p: call(libc.read, p.writing, buffer, 1)
    yield "write to a reader", lambda p: call(libc.write, p.reading, buffer, 1)
    yield "read of a directory", lambda p: call(libc.read, p.directory, buffer, 1)
    yield "read of O_PATH", lambda p: call(libc.read, p.path_only, buffer, 1)
    yield "write of O_PATH", lambda p: call(libc.write, p.path_only, buffer, 1)
    yield "pwrite of an appender", lambda p: call(libc.pwrite64, p.appending, b"xyz", 3, 5)
    for count in (0, 1, 1024, 1025, -1):
        many = iovecs(*[1] * max(count, 0))
        yield f"readv of {count}", lambda p, c=count, m=many: call(libc.preadv64, p.fd, m, c, 0)
        yield f"writev of {count}", lambda p, c=count, m=many: call(libc.pwritev64, p.fd, m, c, 0)
    yield "readv of too much", lambda p: call(libc.preadv64, p.fd, iovecs(LAST, LAST), 2, 0)
    yield "readv of a negative length", lambda p: call(libc.preadv64, p.fd, iovecs(5, -1), 2, 0)
    yield "writev partly from nowhere", lambda p: call(libc.pwritev64, p.fd, iovecs(10, base=8), 1, 0)
    for flags in (0x1, 0x2, 0x4, 0x8, 0x80, 0x1000, 1 << 30):
        yield f"preadv2 with {flags:#x}", lambda p, f=flags: call(libc.preadv64v2, p.fd, iovecs(1), 1, 0, f) and 0
    for flags in (0x1, 0x2, 0x4, 0x1000, 1 << 30):
        yield f"pwritev2 with {flags:#x}", lambda p, f=flags: call(libc.pwritev64v2, p.fd, iovecs(1), 1, 0, f)
    for whence in (0, 1, 2, 5, 99, -1):
        for offset in (0, 10, *FAR):
            yield f"lseek to {offset} from {whence}", lambda p, o=offset, w=whence: call(libc.lseek64, p.reading, o, w)
    yield "lseek of a pipe's name", lambda p: call(libc.lseek64, p.path_only, 0, 0)
    for length in (*FAR, 1 << 40, 0, 5):
        yield f"ftruncate to {length}", lambda p, n=length: call(libc.ftruncate64, p.fd, n)
        yield f"truncate to {length}", lambda p, n=length: call(libc.truncate64, p.path(b"target"), n)
    yield "ftruncate of a reader", lambda p: call(libc.ftruncate64, p.reading, 5)
    yield "ftruncate of a directory", lambda p: call(libc.ftruncate64, p.directory, 5)
    yield "truncate of a directory", lambda p: call(libc.truncate64, p.path(b"directory"), 5)
    yield "truncate of a pipe", lambda p: call(libc.truncate64, p.path(b"fifo"), 5)
    yield "sendfile from far", lambda p: call(libc.sendfile64, p.fd, p.reading, ctypes.byref(ctypes.c_int64(-1)), 5)
    yield "sendfile to a reader", lambda p: call(libc.sendfile64, p.reading, p.fd, None, 5)
    yield "copy_file_range with a flag", lambda p: call(libc.copy_file_range, p.fd, None, p.fd, None, 5, 1)
    yield "copy_file_range over itself", lambda p: call(libc.copy_file_range, p.fd, _at(0), p.fd, _at(5), 100, 0)
    yield "copy_file_range to an appender", lambda p: call(libc.copy_file_range, p.fd, _at(0), p.appending, None, 5, 0)
    yield "copy_file_range past the end", lambda p: call(libc.copy_file_range, p.fd, _at(1 << 40), p.fd, _at(0), 5, 0)
    yield "copy_file_range to far", lambda p: call(libc.copy_file_range, p.fd, _at(0), p.fd, _at(LAST - 1), 5, 0)
    yield "fsync of O_PATH", lambda p: call(libc.fsync, p.path_only)
    yield "fsync of a reader", lambda p: call(libc.fsync, p.reading)
    yield "fdatasync of a directory", lambda p: call(libc.fdatasync, p.directory)
    yield "sync_file_range wrong", lambda p: call(libc.sync_file_range, p.fd, -1, 10, 2)
    yield "fadvise wrong", lambda p: libc.posix_fadvise64(p.fd, 0, 0, 99)
    yield "readahead of a directory", lambda p: call(libc.readahead, p.directory, 0, 10)


def _at(offset: int) -> Any:
    return ctypes.byref(ctypes.c_int64(offset))


def mappings() -> Iterator[tuple[str, Case]]:
    def mapped(descriptor: int, length: int, protection: int, flags: int, offset: int) -> str:
        address = call(
            libc.mmap64, None, ctypes.c_size_t(length), protection, flags, descriptor, ctypes.c_int64(offset)
        )
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(length))
        return "mapped"

    for offset in (0, 1, 4096, 1 << 40, LAST - 4095, -4096):
        yield f"mmap at {offset}", lambda p, o=offset: mapped(p.fd, 4096, 1, 1, o)
    yield "mmap of nothing", lambda p: mapped(p.fd, 0, 1, 1, 0)
    yield "mmap of too much", lambda p: mapped(p.fd, 1 << 62, 1, 1, 0)
    yield "mmap without a kind", lambda p: mapped(p.fd, 4096, 1, 0, 0)
    yield "mmap to write of a reader", lambda p: mapped(p.reading, 4096, 3, 1, 0)
    yield "private mmap to write of a reader", lambda p: mapped(p.reading, 4096, 3, 2, 0)
    yield "mmap of a writer", lambda p: mapped(p.writing, 4096, 1, 1, 0)
    yield "mmap of a directory", lambda p: mapped(p.directory, 4096, 1, 1, 0)
    yield "mmap of O_PATH", lambda p: mapped(p.path_only, 4096, 1, 1, 0)
    yield "mmap validated with an unknown flag", lambda p: mapped(p.fd, 4096, 1, 3 | 1 << 29, 0)
    yield "mmap with MAP_SYNC", lambda p: mapped(p.fd, 4096, 1, 3 | 0x80000, 0)


def direct() -> Iterator[tuple[str, Case]]:
    memory = ctypes.create_string_buffer(3 * 4096)
    start = -ctypes.addressof(memory) % 4096 + ctypes.addressof(memory)
    for shift, length, offset in ((0, 4096, 0), (1, 4096, 0), (0, 100, 0), (0, 4096, 1), (512, 512, 512)):
        yield (
            f"O_DIRECT read of {length} at {offset}, {shift} off",
            lambda p, s=shift, n=length, o=offset: call(libc.pread64, p.direct, ctypes.c_void_p(start + s), n, o),
        )


# -- names ---------------------------------------------------------------------------------------------------------


def names() -> Iterator[tuple[str, Case]]:
    by_path: dict[str, Callable[[Place, bytes], object]] = {
        "open": lambda p, n: opened(call(libc.open64, n, os.O_RDONLY | os.O_NONBLOCK)),
        "create": lambda p, n: opened(call(libc.open64, n, os.O_CREAT | os.O_RDWR, 0o644)),
        "create exclusively": lambda p, n: opened(call(libc.open64, n, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)),
        "access": lambda p, n: call(libc.access, n, 0),
        "chmod": lambda p, n: call(libc.chmod, n, 0o600),
        "rename from": lambda p, n: call(libc.rename, n, p.path(b"renamed")),
        "rename to": lambda p, n: call(libc.rename, p.fresh(), n),
        "link to": lambda p, n: call(libc.link, p.file, n),
        "link from": lambda p, n: call(libc.link, n, p.path(b"linked")),
        "symlink": lambda p, n: call(libc.symlink, b"x", n),
        "mknod": lambda p, n: call(libc.mknod, n, stat.S_IFIFO | 0o600, 0),
        "mkdir": lambda p, n: call(libc.mkdir, n, 0o755),
        "rmdir": lambda p, n: call(libc.rmdir, n),
        "unlink": lambda p, n: call(libc.unlink, n),
        "readlink": lambda p, n: call(libc.readlink, n, ctypes.create_string_buffer(100), 100),
        "setxattr": lambda p, n: call(libc.setxattr, n, b"user.x", b"1", 1, 0),
        "truncate": lambda p, n: call(libc.truncate64, n, 3),
    }
    for said, name in NAMES.items():
        for verb, function in by_path.items():
            yield f"{verb}: {said}", lambda p, n=name, f=function: f(p, _absolute(p, n))


def _absolute(place: Place, name: bytes) -> bytes:
    """Below the working directory, which is the place: the limit of a path is the same wherever it lies."""
    return name


def targets() -> Iterator[tuple[str, Case]]:
    for length in (0, 1, 4094, 4095, 4096, 70_000):
        yield f"symlink to {length}", lambda p, n=length: call(libc.symlink, b"t" * n, p.path(b"link%d" % n))
        yield (
            f"readlink of {length}",
            lambda p, n=length: call(libc.readlink, p.path(b"link%d" % n), ctypes.create_string_buffer(5000), 5000),
        )
    for size in (0, 1, -1):
        yield (
            f"readlink into {size}",
            lambda p, n=size: call(libc.readlink, p.path(b"loop"), ctypes.create_string_buffer(5000), n),
        )


def flags() -> Iterator[tuple[str, Case]]:
    for bit in range(32):
        yield (
            f"open with bit {bit}",
            lambda p, f=1 << bit: opened(call(libc.open64, p.file, f | os.O_NONBLOCK & ~os.O_CREAT, 0o600)),
        )
        yield (
            f"open a directory with bit {bit}",
            lambda p, f=1 << bit: opened(call(libc.open64, p.path(b"directory"), f, 0o600)),
        )
    yield "open with access mode 3", lambda p: opened(call(libc.open64, p.file, 3))
    yield "open a link with O_NOFOLLOW", lambda p: opened(call(libc.open64, p.path(b"dangling"), os.O_NOFOLLOW))
    yield (
        "create over a link",
        lambda p: opened(call(libc.open64, p.path(b"dangling"), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)),
    )
    yield "open a file as a directory", lambda p: opened(call(libc.open64, p.file, os.O_DIRECTORY))
    yield (
        "create a directory by open",
        lambda p: opened(call(libc.open64, p.path(b"new1"), os.O_CREAT | os.O_DIRECTORY, 0o700)),
    )
    yield "truncate a directory by open", lambda p: opened(call(libc.open64, p.path(b"directory"), os.O_TRUNC))
    yield "O_PATH with O_CREAT", lambda p: opened(call(libc.open64, p.path(b"new2"), os.O_PATH | os.O_CREAT, 0o600))
    for how in ((1 << 40, 0, 0), (0, 0o600, 0), (os.O_CREAT, 1 << 20, 0), (0, 0, 1 << 30), (0, 0, 0x8), (0, 0, 0x20)):
        made = struct.pack("@QQQ", *how)
        yield f"openat2 {how}", lambda p, m=made: opened(call(libc.syscall, 437, AT_FDCWD, p.file, m, len(m)))
    for size in (0, 8, 23, 32, 5000):
        yield (
            f"openat2 of {size} bytes",
            lambda p, n=size: opened(call(libc.syscall, 437, AT_FDCWD, p.file, ctypes.create_string_buffer(6000), n)),
        )
    # 4 is tried last: it leaves a device behind.
    for bits in (1, 2, 3, 5, 6, 8, 1 << 30, 0xFFFFFFF):
        for old, new in ((b"target", b"file"), (b"target", b"nothing"), (b"nothing", b"file"), (b"full", b"directory")):
            yield (
                f"renameat2 {old!r} {new!r} {bits:#x}",
                lambda p, o=old, n=new, f=bits: call(libc.renameat2, AT_FDCWD, p.path(o), AT_FDCWD, p.path(n), f),
            )
    for bits in (0, 0x100, 0x200, 0x400, 0x1000, 0x2000, 0x4000, 0x6000, 1 << 30):
        for mask in (0, 0x7FF, 0xFFF, 1 << 31):
            yield (
                f"statx {bits:#x} {mask:#x}",
                lambda p, f=bits, m=mask: call(
                    libc.statx, AT_FDCWD, p.file, f, ctypes.c_uint(m), ctypes.create_string_buffer(256)
                ),
            )
        yield f"unlinkat {bits:#x}", lambda p, f=bits: call(libc.unlinkat, AT_FDCWD, p.path(b"nothing"), f)
        yield (
            f"linkat {bits:#x}",
            lambda p, f=bits: call(libc.linkat, AT_FDCWD, p.path(b"dangling"), AT_FDCWD, p.path(b"file"), f),
        )
        yield f"fchownat {bits:#x}", lambda p, f=bits: call(libc.fchownat, AT_FDCWD, p.file, -1, -1, f)
        yield f"utimensat {bits:#x}", lambda p, f=bits: call(libc.utimensat, AT_FDCWD, p.path(b"dangling"), None, f)
        yield f"faccessat {bits:#x}", lambda p, f=bits: call(libc.faccessat, AT_FDCWD, p.path(b"dangling"), 4, f)
    for mode in (8, 255, -1):
        yield f"access {mode}", lambda p, m=mode: call(libc.access, p.file, m)


def whiteouts() -> Iterator[tuple[str, Case]]:
    for new in (b"unseen", b"directory"):
        yield (
            f"renameat2 {new!r} with a whiteout",
            lambda p, n=new: call(libc.renameat2, AT_FDCWD, p.fresh(), AT_FDCWD, p.path(n), 4),
        )
    for name in (b"fresh", b"unseen"):
        yield f"unlink {name!r} after a whiteout", lambda p, n=name: call(libc.unlink, p.path(n))


def attributes() -> Iterator[tuple[str, Case]]:
    def times(*words: int) -> Any:
        return struct.pack("@qqqq", *words)

    odd = (0, 999_999_999, 1_000_000_000, -1, UTIME_NOW, UTIME_OMIT, UTIME_NOW + 1, LAST)
    for nanoseconds in odd:
        yield (
            f"utimensat {nanoseconds} ns",
            lambda p, n=nanoseconds: call(libc.utimensat, AT_FDCWD, p.file, times(1, n, 1, 0), 0),
        )
        yield f"futimens {nanoseconds} ns", lambda p, n=nanoseconds: call(libc.futimens, p.fd, times(1, 0, 1, n))
    yield "utimensat from nowhere", lambda p: call(libc.utimensat, AT_FDCWD, p.file, NOWHERE, 0)
    yield "futimens of O_PATH", lambda p: call(libc.futimens, p.path_only, None)
    for mode in (0o10000, 0o170777, 0o7777, -1, 1 << 20):
        yield f"chmod {mode:o}", lambda p, m=mode: _mode_after(p, lambda: call(libc.chmod, p.path(b"target"), m))
        yield f"fchmod {mode:o}", lambda p, m=mode: _mode_after(p, lambda: call(libc.fchmod, p.directory, m))
        yield f"mkdir {mode:o}", lambda p, m=mode: _made(p, lambda n: call(libc.mkdir, n, m))
        yield (
            f"create {mode:o}",
            lambda p, m=mode: _made(p, lambda n: opened(call(libc.open64, n, os.O_CREAT | os.O_WRONLY, m))),
        )
    yield "fchmod of O_PATH", lambda p: call(libc.fchmod, p.path_only, 0o600)
    yield "fchown of O_PATH", lambda p: call(libc.fchown, p.path_only, 0, 0)
    for kind in (0, stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFSOCK, 0o30000, 0o170000, 0o50000):
        yield f"mknod of kind {kind:o}", lambda p, k=kind: _made(p, lambda n: call(libc.mknod, n, k | 0o600, 0))
    for device in (
        0,
        os.makedev(255, 255),
        os.makedev(4095, (1 << 20) - 1),
        os.makedev(4096, 0),
        os.makedev(1, 1 << 20),
    ):
        for kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO):
            yield (
                f"mknod {kind:o} of device {device:#x}",
                lambda p, k=kind, d=device: _made(p, lambda n: call(libc.mknod, n, k | 0o600, ctypes.c_uint64(d))),
            )
    for uid in (-1, 65534, 0xFFFFFFFE, 1 << 31):
        yield (
            f"chown to {uid}",
            lambda p, u=uid: call(libc.chown, p.path(b"target"), *2 * [ctypes.c_uint(u)]),
        )
    yield "statfs of O_PATH", lambda p: call(libc.fstatfs64, p.path_only, ctypes.create_string_buffer(200))
    yield "statfs to nowhere", lambda p: call(libc.fstatfs64, p.fd, NOWHERE)


def _mode_after(place: Place, change: Callable[[], int]) -> str:
    change()
    return oct(os.stat(place.path(b"target")).st_mode) + oct(os.fstat(place.directory).st_mode)


def _made(place: Place, make: Callable[[bytes], object]) -> str:
    path = place.path(b"made")
    make(path)
    found = os.lstat(path)
    (os.rmdir if stat.S_ISDIR(found.st_mode) else os.unlink)(path)
    return f"{found.st_mode:o} {found.st_rdev:#x}"


def xattrs() -> Iterator[tuple[str, Case]]:
    target = os.fsencode("target")
    keys = {
        "empty": b"", "no namespace": b"x", "only a namespace": b"user.", "255": b"user." + b"k" * 250,
        "256": b"user." + b"k" * 251, "unknown namespace": b"other.x", "system": b"system.x", "no dot": b"user",
        "newline": b"user.a\nb", "bytes": b"user.\xff\xfe", "trusted": b"trusted.t", "only trusted": b"trusted.",
        "security": b"security.s", "capital": b"USER.x",
    }  # fmt: skip
    buffer = ctypes.create_string_buffer(1 << 17)
    for said, key in keys.items():
        yield f"setxattr {said}", lambda p, k=key: call(libc.setxattr, p.path(target), k, b"v", 1, 0)
        yield f"getxattr {said}", lambda p, k=key: call(libc.getxattr, p.path(target), k, buffer, 1 << 16)
        yield f"removexattr {said}", lambda p, k=key: call(libc.removexattr, p.path(target), k)
        yield f"removexattr {said} again", lambda p, k=key: call(libc.removexattr, p.path(target), k)
    for length in (0, 1, 1024, 65_537, 1 << 30, -1):
        yield (
            f"setxattr of {length} bytes",
            lambda p, n=length: call(libc.setxattr, p.path(target), b"user.v", buffer, ctypes.c_size_t(n), 0),
        )
        yield (
            f"getxattr after {length} bytes",
            lambda p: call(libc.getxattr, p.path(target), b"user.v", buffer, 65_536),
        )
    for size in (0, 1, 5, 65_536, 65_537):
        yield (
            f"getxattr into {size}",
            lambda p, n=size: call(libc.getxattr, p.path(target), b"user.known", buffer, n),
        )
        yield f"listxattr into {size}", lambda p, n=size: call(libc.listxattr, p.path(target), buffer, n) and "some"
    for bits in (1, 2, 3, 4, 1 << 30):
        for key in (b"user.known", b"user.unknown"):
            yield (
                f"setxattr {key!r} {bits:#x}",
                lambda p, k=key, f=bits: call(libc.setxattr, p.path(target), k, b"value", 5, f),
            )
            yield (
                f"removexattr {key!r} after {bits:#x}",
                lambda p: call(libc.removexattr, p.path(target), b"user.unknown"),
            )
    yield "setxattr from nowhere", lambda p: call(libc.setxattr, p.path(target), b"user.n", NOWHERE, 5, 0)
    yield "getxattr to nowhere", lambda p: call(libc.getxattr, p.path(target), b"user.known", NOWHERE, 5)
    yield "user xattr of a link", lambda p: call(libc.lsetxattr, p.path(b"loop"), b"user.x", b"1", 1, 0)
    yield "user xattr of a pipe", lambda p: call(libc.setxattr, p.path(b"fifo"), b"user.x", b"1", 1, 0)
    yield "trusted xattr of a link", lambda p: call(libc.lsetxattr, p.path(b"loop"), b"trusted.x", b"1", 1, 0)
    yield "xattr of O_PATH", lambda p: call(libc.fgetxattr, p.path_only, b"user.known", buffer, 10)
    for value in (b"", b"\2", b"\2\0\0\0", b"\1\0\0\0" + bytes(8), b"\2\0\0\0" + bytes(8), b"\2\0\0\0" + bytes(7)):
        for key in (b"system.posix_acl_access", b"system.posix_acl_default"):
            yield f"{key!r} {value!r}", lambda p, k=key, v=value: call(libc.setxattr, p.path(b"full"), k, v, len(v), 0)


def directories() -> Iterator[tuple[str, Case]]:
    buffer = ctypes.create_string_buffer(1 << 16)
    for size in (0, 1, 23, -1):
        yield (
            f"getdents into {size}",
            lambda p, n=size: _entries(call(libc.getdents64, p.directory, buffer, ctypes.c_size_t(n))),
        )
    yield "getdents of a file", lambda p: call(libc.getdents64, p.fd, buffer, 1000)
    yield "getdents to nowhere", lambda p: call(libc.getdents64, p.directory, NOWHERE, 1000)
    for offset in (5, -1, -(1 << 63)):
        yield f"lseek of a directory to {offset}", lambda p, o=offset: call(libc.lseek64, p.directory, o, 0) and "there"
    yield "lseek of a directory back", lambda p: call(libc.lseek64, p.directory, 0, 0)
    yield "rmdir of what is full", lambda p: call(libc.rmdir, p.path(b"full"))
    yield "rmdir of a file", lambda p: call(libc.rmdir, p.file)
    yield "unlink of a directory", lambda p: call(libc.unlink, p.path(b"directory"))
    yield "rename into itself", lambda p: call(libc.rename, p.path(b"full"), p.path(b"full/y"))
    yield "rename over what is full", lambda p: call(libc.rename, p.path(b"directory"), p.path(b"full"))
    yield "rename of a file over a directory", lambda p: call(libc.rename, p.file, p.path(b"directory"))
    yield "rename of a directory over a file", lambda p: call(libc.rename, p.path(b"directory"), p.file)
    yield "rename of dot", lambda p: call(libc.rename, p.path(b"full/."), p.path(b"z"))
    yield "link of a directory", lambda p: call(libc.link, p.path(b"full"), p.path(b"hard"))
    yield "fchdir of a file", lambda p: call(libc.fchdir, p.fd)
    for mode in range(0, 256, 1):
        if mode & (mode - 1) == 0:
            yield f"fallocate {mode:#x}", lambda p, m=mode: call(libc.fallocate64, p.reading, m, 0, 100)
    for request in (0x5401, 0xFFFFFFFF):
        yield f"ioctl {request:#x}", lambda p, r=request: call(libc.ioctl, p.fd, ctypes.c_ulong(r), buffer)


def _entries(count: int) -> str:
    return "entries" if count else "end"


def cases() -> Iterator[tuple[str, Case]]:
    for part in (contents, mappings, names, targets, flags, attributes, xattrs, directories, whiteouts):
        yield from part()


def answers(root: Path) -> dict[str, str]:
    """What each case answers in ``root``, which is empty."""
    place = Place(root)
    before = os.getcwd()
    os.chdir(root)
    try:
        wanted = [*cases(), *(direct() if place.direct >= 0 else ())]
        return {name: _answer(place, case) for name, case in wanted}
    finally:
        os.chdir(before)
        place.close()


def _answer(place: Place, case: Case) -> str:
    try:
        return str(case(place))
    except Wrong as wrong:
        return str(wrong)
    except OSError as error:
        return f"afterwards {errno.errorcode[error.errno or 0]}"


# What pyfuse3 or FUSE itself cannot carry, and docs/posix.md tells.
DIFFERENT: dict[str, tuple[str, ...]] = {
    "renameat2 b'unseen' with a whiteout": ("EINVAL",),
    "renameat2 b'directory' with a whiteout": ("EINVAL",),
    # pyfuse3 looks at the first flag only.
    "setxattr b'user.unknown' 0x3": ("0",),
    "removexattr b'user.unknown' after 0x3": ("0",),
    "unlink b'unseen' after a whiteout": ("ENOENT",),
}

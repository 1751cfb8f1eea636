"""Every system call on a mount, each in a process of its own and all at once: what each returned, and after how long.

    every_call.py DIRECTORY [NAME]...

DIRECTORY is one that :func:`prepare` has filled, by way of another mount, so that no contents are cached here. The
program opens what it needs, prints "ready", and starts the calls when it reads a line. Then it prints a line for each
call as it ends: its name, the seconds it took, and 0, an errno's name or a signal's. Calls whose NAMEs are given are
left out.
"""

import errno
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

FILE_BYTES = 256 << 10
PAGE_BYTES = 4096
# How long after the opens attributes, and entries, are not believed any more.
STALE_SECONDS = 1.3

Call = Callable[[], object]
# Those that need a file of their own.
ON_PATHS = (
    "stat", "access", "open_reading", "open_writing", "open_truncating", "truncate", "chmod", "chown",
    "utimens", "setxattr", "getxattr", "listxattr", "removexattr", "link", "unlink", "rename", "rename_over", "exec",
)  # fmt: skip
ON_DESCRIPTORS = (
    "read", "read_direct", "pread_far", "write", "write_append", "write_sync", "fsync", "fdatasync", "ftruncate",
    "fstat", "fchmod", "futimens", "lseek", "mmap_read", "msync", "close", "close_dirty", "sendfile", "fstatfs",
    "fgetxattr",
)  # fmt: skip
DIRTY = ("fsync", "fdatasync", "close_dirty")
# What these do needs no server, or only memory, or (statfs) what anybody was told a second ago: they may succeed.
MAY_SUCCEED = frozenset(
    {
        "write", "write_append", "close", "close_dirty", "lseek", "fchmod", "futimens", "fstat", "fsync_directory",
        "statvfs", "fstatfs",
    }
)  # fmt: skip


def prepare(place: Path) -> None:
    content = os.urandom(FILE_BYTES)
    for name in ON_PATHS + ON_DESCRIPTORS:
        (place / name).write_bytes(content)
    (place / "exec").write_bytes(b"#!/bin/true\n")
    (place / "exec").chmod(0o755)
    for name in ("rmdir", "readdir", "opendir", "many"):
        (place / name).mkdir()
    (place / "readlink").symlink_to("somewhere")
    for number in range(300):
        (place / "many" / f"entry{number:03}").touch()


def on_paths(place: Path) -> dict[str, Call]:
    def at(name: str) -> str:
        return str(place / name)

    return {
        "stat": lambda: os.stat(at("stat")),
        "stat_missing": lambda: os.stat(at("never-seen")),
        "access": lambda: os.access(at("access"), os.R_OK) or _failed(at("access")),
        "open_reading": lambda: os.open(at("open_reading"), os.O_RDONLY),
        "open_writing": lambda: os.open(at("open_writing"), os.O_WRONLY),
        "open_truncating": lambda: os.open(at("open_truncating"), os.O_WRONLY | os.O_TRUNC),
        "create": lambda: os.open(at("created"), os.O_CREAT | os.O_EXCL | os.O_WRONLY),
        "mkdir": lambda: os.mkdir(at("made")),
        "mknod": lambda: os.mknod(at("node")),
        "mkfifo": lambda: os.mkfifo(at("fifo")),
        "symlink": lambda: os.symlink("x", at("symlink")),
        "link": lambda: os.link(at("link"), at("linked")),
        "readlink": lambda: os.readlink(at("readlink")),
        "unlink": lambda: os.unlink(at("unlink")),
        "rmdir": lambda: os.rmdir(at("rmdir")),
        "rename": lambda: os.rename(at("rename"), at("renamed")),
        "rename_over": lambda: os.rename(at("rename_over"), at("stat")),
        "truncate": lambda: os.truncate(at("truncate"), 5),
        "chmod": lambda: os.chmod(at("chmod"), 0o600),
        "chown": lambda: os.chown(at("chown"), 1, 1),
        "utimens": lambda: os.utime(at("utimens"), (1, 1)),
        "setxattr": lambda: os.setxattr(at("setxattr"), "user.a", b"1"),
        "getxattr": lambda: os.getxattr(at("getxattr"), "user.a"),
        "listxattr": lambda: os.listxattr(at("listxattr")),
        "removexattr": lambda: os.removexattr(at("removexattr"), "user.a"),
        "statvfs": lambda: os.statvfs(place),
        "opendir": lambda: os.listdir(at("opendir")),
        "exec": lambda: os.execv(at("exec"), ["exec"]),
    }


def on_descriptors(place: Path, make_dirty: list[Call]) -> dict[str, Call]:
    opened = {name: os.open(place / name, os.O_RDWR) for name in ON_DESCRIPTORS if name != "read_direct"}
    opened["read_direct"] = os.open(place / "read_direct", os.O_RDWR | os.O_DIRECT)
    opened["write_append"] = os.open(place / "write_append", os.O_WRONLY | os.O_APPEND)
    opened["write_sync"] = os.open(place / "write_sync", os.O_RDWR | os.O_SYNC)
    directory = os.open(place, os.O_RDONLY)
    listing = os.open(place / "many", os.O_RDONLY)
    mapped = {name: mmap.mmap(opened[name], FILE_BYTES) for name in ("mmap_read", "msync")}
    buffer = mmap.mmap(-1, PAGE_BYTES)
    make_dirty += [lambda name=name: os.pwrite(opened[name], b"dirty", 10) for name in DIRTY]  # type: ignore[misc]
    make_dirty.append(lambda: mapped["msync"].__setitem__(0, 1))
    return {
        "read": lambda: os.read(opened["read"], PAGE_BYTES),
        "read_direct": lambda: os.preadv(opened["read_direct"], [buffer], 0),
        "pread_far": lambda: os.pread(opened["pread_far"], 100, FILE_BYTES - 200),
        "write": lambda: os.write(opened["write"], b"x" * 10),
        "write_append": lambda: os.write(opened["write_append"], b"x" * 10),
        "write_sync": lambda: os.write(opened["write_sync"], b"x" * 10),
        "fsync": lambda: os.fsync(opened["fsync"]),
        "fdatasync": lambda: os.fdatasync(opened["fdatasync"]),
        "ftruncate": lambda: os.ftruncate(opened["ftruncate"], 7),
        "fstat": lambda: os.fstat(opened["fstat"]),
        "fchmod": lambda: os.fchmod(opened["fchmod"], 0o600),
        "futimens": lambda: os.utime(opened["futimens"], (1, 1)),
        "lseek": lambda: os.lseek(opened["lseek"], 0, os.SEEK_END),
        "mmap_read": lambda: mapped["mmap_read"][5 * PAGE_BYTES],
        "msync": lambda: mapped["msync"].flush(),
        "close": lambda: os.close(opened["close"]),
        "close_dirty": lambda: os.close(opened["close_dirty"]),
        "sendfile": lambda: os.sendfile(opened["write"], opened["sendfile"], 0, 100),
        "fstatfs": lambda: os.statvfs(opened["fstatfs"]),
        "fgetxattr": lambda: os.getxattr(opened["fgetxattr"], "user.a"),
        "fsync_directory": lambda: os.fsync(directory),
        "readdir": lambda: os.listdir(listing),
    }


def _failed(path: str) -> object:
    """access(2) tells its errno to nobody who asks through Python; the same path, asked differently, has it."""
    raise OSError(errno.EIO, path)


def start(call: Call) -> int:
    """The id of a process that makes the call and tells its errno as its exit code."""
    pid = os.fork()
    if pid:
        return pid
    code = 0
    try:
        call()
    except OSError as error:
        code = error.errno or 255
    finally:
        os._exit(code)


def told(status: int) -> str:
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    code = os.WEXITSTATUS(status)
    return errno.errorcode.get(code, str(code)) if code else "0"


def main() -> None:
    place, without = Path(sys.argv[1]), sys.argv[2:]
    make_dirty: list[Call] = []
    calls = {**on_descriptors(place, make_dirty), **on_paths(place)}
    calls = {name: call for name, call in calls.items() if name not in without}
    # The names are known then, but have to be confirmed.
    for name in calls:
        if os.path.lexists(place / name):
            os.lstat(place / name)
    time.sleep(STALE_SECONDS)
    # As late as possible: it is written within a second.
    for act in make_dirty if "msync" not in without else make_dirty[:-1]:
        act()
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.monotonic()
    running = {start(call): name for name, call in calls.items()}
    while running:
        pid, status = os.wait()
        print(running.pop(pid), round(time.monotonic() - started, 2), told(status), flush=True)


if __name__ == "__main__":
    main()

"""Which of those who wait for the mount have been killed: their system calls end only when we answer.

The kernel tells a FUSE server about such a process with FUSE_INTERRUPT, which pyfuse3 3.5 does not hand on; /proc knows
as well. Nothing here touches what may wait for the mount itself: no stat of other processes' files, no maps.

Requests about open files do not say whose they are. That a killed thread is in fsync(2) of a file does not make every
fsync of it its own: it may be waiting for another process's in the kernel, which must not hear of it. So only threads
count that wait for an answer to a request, and a read or write must be of the bytes that they asked for (the kernel
also writes mapped pages, for nobody in particular).
"""

import os
import platform
import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
_KILL_BIT = 1 << (signal.SIGKILL - 1)
# The kernel's function, and those that a compiler may put it into, in which a thread waits for the answer to a request.
_WAITS = ("request_wait_answer", "__fuse_request_send", "__fuse_simple_request", "fuse_simple_request")
_PENDING = re.compile(rb"^(?:SigPnd|ShdPnd):\s*(\w+)", re.MULTILINE)
_STATE = re.compile(rb"^State:\s*(\w)", re.MULTILINE)
_THREADS = re.compile(rb"^Threads:\s*(\d+)", re.MULTILINE)
ANYWHERE = 1 << 64
_READ, _WRITE, _SYNC, _LIST = ("read",), ("write",), ("fsync", "fsyncdir"), ("readdir",)
# What a thread that is in the kernel may be asking for, by the number of its system call; then: whether the third
# argument is a length and the fourth a position. On machines that are not here it may be anything.
_CALLS = {
    "x86_64": {
        0: (_READ, True, False), 17: (_READ, True, True), 19: (_READ, False, False), 295: (_READ, False, True),
        327: (_READ, False, True),
        1: (_WRITE, True, False), 18: (_WRITE, True, True), 20: (_WRITE, False, False), 296: (_WRITE, False, True),
        328: (_WRITE, False, True),
        74: (_SYNC, False, False), 75: (_SYNC, False, False),
        78: (_LIST, False, False), 217: (_LIST, False, False),
    },
    "aarch64": {
        63: (_READ, True, False), 67: (_READ, True, True), 65: (_READ, False, False), 69: (_READ, False, True),
        286: (_READ, False, True),
        64: (_WRITE, True, False), 68: (_WRITE, True, True), 66: (_WRITE, False, False), 70: (_WRITE, False, True),
        287: (_WRITE, False, True),
        82: (_SYNC, False, False), 83: (_SYNC, False, False),
        61: (_LIST, False, False),
    },
}  # fmt: skip
_ANY = (_READ + _WRITE + _SYNC + _LIST, False, False)
# Asks preadv2(2) and pwritev2(2) to use the descriptor's own position.
_CURRENT = (1 << 64) - 1


class Victim(NamedTuple):
    """A killed thread that waits for an answer about an open file: of this ``inode``, to one of ``operations``, for
    bytes from ``start`` to before ``stop``."""

    thread: int
    inode: int
    operations: tuple[str, ...]
    start: int = 0
    stop: int = ANYWHERE

    @property
    def request(self) -> tuple[int, tuple[str, ...], int, int]:
        """What it may be waiting for."""
        return self[1:]


def is_killed(thread: int, proc: Path = PROC) -> bool:
    """Whether SIGKILL is pending for a thread. One that is gone, or not to be seen from here, is not killed."""
    return _has_kill(_status(f"{proc}/{thread}"))


def find_victims(device: int, proc: Path = PROC) -> list[Victim]:
    """All threads that are to end and wait for the filesystem ``device``, as far as this process may see them."""
    found: list[Victim] = []
    for name in os.listdir(proc):
        if name.isdigit() and _may_be_ending(_status(f"{proc}/{name}")):
            found.extend(_victims_of(proc / name, device))
    return found


def _victims_of(process: Path, device: int) -> Iterator[Victim]:
    with suppress(OSError):
        for thread in (process / "task").iterdir():
            status = _status(str(thread))
            if _has_kill(status) and _first(_STATE, status) == b"D":
                # Gone meanwhile, or not ours to look at.
                with suppress(OSError, ValueError, LookupError):
                    yield _victim(thread, device)


def _victim(thread: Path, device: int) -> Victim:
    words = [int(word, 0) for word in (thread / "syscall").read_text().split()]
    told = _fields((thread / "fdinfo" / str(words[1])).read_text())
    _check_device(thread, told["mnt_id"], device)
    known = _CALLS.get(platform.machine())
    operations, has_length, has_position = _ANY if known is None else known[words[0]]
    start, stop = 0, ANYWHERE
    # An append is made wherever the end is.
    if not int(told["flags"], 8) & os.O_APPEND:
        start = words[4] if has_position and words[4] != _CURRENT else int(told["pos"])
        stop = start + words[3] if has_length else ANYWHERE
    if operations == _WRITE and int(told["flags"], 8) & os.O_DSYNC:
        # The kernel has each write of O_SYNC followed by a request like that of fsync(2), with the call still going on.
        operations += _SYNC
    elif operations not in (_READ, _WRITE):
        start, stop = 0, ANYWHERE
    # Last, because it moves on: what is read above is then about the call that it is still in.
    if (thread / "wchan").read_text() not in _WAITS:
        raise LookupError("waits for somebody else")
    return Victim(int(thread.name), int(told["ino"]), operations, start, stop)


def _check_device(thread: Path, mount: str, device: int) -> None:
    """LookupError if ``mount`` is of another filesystem. The other mounts of a cluster have the same inode numbers."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in (thread / "mountinfo").read_text().splitlines():
        number, _, found = line.split(" ", 3)[:3]
        if number == mount and found == wanted:
            return
    raise LookupError(mount)


def _may_be_ending(status: bytes) -> bool:
    """A process whose first thread has ended before the others looks like a zombie with threads."""
    return _has_kill(status) or (_first(_STATE, status) == b"Z" and _first(_THREADS, status) != b"1")


def _has_kill(status: bytes) -> bool:
    return any(int(pending, 16) & _KILL_BIT for pending in _PENDING.findall(status))


def _first(pattern: re.Pattern[bytes], text: bytes) -> bytes:
    found = pattern.search(text)
    return found[1] if found else b""


def _status(process: str) -> bytes:
    """Hundreds are read at a time, so no more is made of it than must be."""
    try:
        with open(f"{process}/status", "rb", buffering=0) as file:
            return file.read()
    except OSError:
        return b""


def _fields(text: str) -> dict[str, str]:
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}

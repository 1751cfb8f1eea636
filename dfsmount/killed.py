"""Which of those who wait for the mount have been killed: their system calls end only when we answer.

The kernel tells a FUSE server about such a process with FUSE_INTERRUPT, which pyfuse3 3.5 does not hand on; /proc knows
as well. Nothing here touches what may wait for the mount itself: no stat of other processes' files, no maps.
"""

import os
import platform
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
_KILL_BIT = 1 << (signal.SIGKILL - 1)
_READ, _WRITE, _SYNC, _LIST = ("read",), ("write",), ("fsync", "fsyncdir"), ("readdir",)
# What a thread that is in the kernel may be asking for, by the number of its system call. On machines that are not
# here it may be anything.
_OPERATIONS = {
    "x86_64": {
        **dict.fromkeys((0, 17, 19, 295, 327), _READ),
        **dict.fromkeys((1, 18, 20, 296, 328), _WRITE),
        **dict.fromkeys((74, 75), _SYNC),
        **dict.fromkeys((78, 217), _LIST),
    },
    "aarch64": {
        **dict.fromkeys((63, 65, 67, 69, 286), _READ),
        **dict.fromkeys((64, 66, 68, 70, 287), _WRITE),
        **dict.fromkeys((82, 83), _SYNC),
        61: _LIST,
    },
}
_ANY = _READ + _WRITE + _SYNC + _LIST


class Victim(NamedTuple):
    """A killed thread that is still in a system call about an open file: of this ``inode``, one of ``operations``."""

    inode: int
    operations: tuple[str, ...]


def is_killed(thread: int, proc: Path = PROC) -> bool:
    """Whether SIGKILL is pending for a thread. One that is gone, or not to be seen from here, is not killed."""
    return _has_kill(_status(proc / str(thread)))


def find_victims(device: int, proc: Path = PROC) -> list[Victim]:
    """All threads that are to end and wait for the filesystem ``device``, as far as this process may see them."""
    found: list[Victim] = []
    for name in os.listdir(proc):
        if name.isdigit() and _may_be_ending(_status(proc / name)):
            found.extend(_victims_of(proc / name, device))
    return found


def _victims_of(process: Path, device: int) -> Iterator[Victim]:
    with suppress(OSError):
        for thread in (process / "task").iterdir():
            status = _status(thread)
            if _has_kill(status) and status.get("State", "").startswith("D"):
                # Gone meanwhile, or not ours to look at.
                with suppress(OSError, ValueError, LookupError):
                    yield _victim(thread, device)


def _victim(thread: Path, device: int) -> Victim:
    number, descriptor = (thread / "syscall").read_text().split()[:2]
    told = _fields((thread / "fdinfo" / str(int(descriptor, 16))).read_text())
    _check_device(thread, told["mnt_id"], device)
    known = _OPERATIONS.get(platform.machine())
    return Victim(int(told["ino"]), _ANY if known is None else known.get(int(number), ()))


def _check_device(thread: Path, mount: str, device: int) -> None:
    """LookupError if ``mount`` is of another filesystem. The other mounts of a cluster have the same inode numbers."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in (thread / "mountinfo").read_text().splitlines():
        number, _, found = line.split(" ", 3)[:3]
        if number == mount and found == wanted:
            return
    raise LookupError(mount)


def _may_be_ending(status: dict[str, str]) -> bool:
    """A process whose first thread has ended before the others looks like a zombie with threads."""
    return _has_kill(status) or (status.get("State", "").startswith("Z") and status.get("Threads") != "1")


def _has_kill(status: dict[str, str]) -> bool:
    return any(int(status.get(name, "0"), 16) & _KILL_BIT for name in ("SigPnd", "ShdPnd"))


def _status(process: Path) -> dict[str, str]:
    try:
        return _fields((process / "status").read_text())
    except OSError:
        return {}


def _fields(text: str) -> dict[str, str]:
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}

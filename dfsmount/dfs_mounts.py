"""The mount table, and what of it is ours. Nothing here calls into a mounted filesystem unless it says so."""

import errno
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

from dfsmount.dfs_layout import Problem

TYPE = "fuse.dfs"


class Mount(NamedTuple):
    """One line of /proc/mounts; ``source`` is HOST:PORT, with /SUBDIRECTORY for a part, if the type is ours."""

    source: str
    point: str
    type: str

    @property
    def ours(self) -> bool:
        return self.type == TYPE

    @property
    def address(self) -> str:
        """HOST:PORT of the metaserver."""
        return self.source.partition("/")[0]


def unescape(field: str) -> str:
    """Undoes the octal escapes of blanks and backslashes (proc_pid_mounts(5))."""
    for code in ("040", "011", "012", "043", "134"):
        field = field.replace(f"\\{code}", chr(int(code, 8)))
    return field


def parse_mounts(text: str) -> list[Mount]:
    """Mounts in the order in which they were made."""
    found = []
    for line in text.splitlines():
        source, point, type_ = line.split(" ")[:3]
        found.append(Mount(unescape(source), unescape(point), type_))
    return found


def mounts() -> list[Mount]:
    return parse_mounts(Path("/proc/self/mounts").read_text(errors="surrogateescape"))


def mount_at(point: str) -> Mount | None:
    """What is mounted exactly there: the newest, which hides the others."""
    return next((mount for mount in reversed(mounts()) if mount.point == point), None)


def mount_of(path: str, table: list[Mount]) -> Mount | None:
    """The mount that an absolute path without links lies in: the newest of those with the longest mountpoint."""
    inside = [mount for mount in table if mount.point == "/" or f"{path}/".startswith(f"{mount.point}/")]
    longest = max((len(mount.point) for mount in inside), default=0)
    return next((mount for mount in reversed(inside) if len(mount.point) == longest), None)


def our_mount_of(path: Path, table: list[Mount]) -> Mount:
    """As :func:`mount_of`; raises ``Problem`` unless it is one of ours."""
    mount = mount_of(str(path), table)
    if mount is None or not mount.ours:
        raise Problem(f"{path} is not on a dfs mount")
    return mount


def inode_below(path: Path, table: list[Mount]) -> int:
    """The inode number that the cluster knows this path by; raises ``Problem`` if it is not on one of our mounts, and
    ``OSError`` if it cannot be looked at. ``path`` is absolute and without links."""
    mount = our_mount_of(path, table)
    ino = os.stat(path).st_ino
    if mount.point == str(path) and "/" in mount.source:
        # The kernel calls every mounted directory inode 1.
        raise Problem(f"{path} is a part mounted by itself: name it on a mount of the whole filesystem")
    return ino


def is_dead(point: str) -> bool:
    """Whether the process behind a FUSE mount is gone. Asks the filesystem, but only about itself.

    Not with stat(2): the kernel may still know the answer.
    """
    try:
        os.statvfs(point)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def unmount(point: str, *, lazy: bool = False) -> str:
    """Unmounts; returns "" or why it did not work. Waits until what was written is flushed, unless ``lazy``."""
    as_root = ["umount", *(["--lazy"] if lazy else []), point]
    as_user = ["fusermount3", "-u", *(["-z"] if lazy else []), point]
    command = as_root if os.geteuid() == 0 else as_user
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except FileNotFoundError:
        raise Problem(f"{command[0]} is not installed") from None
    return "" if done.returncode == 0 else (done.stderr.strip() or f"{command[0]} failed").splitlines()[-1]


def prepare_mountpoint(point: Path) -> None:
    """Makes sure that ``point`` is an empty directory and not a mount; makes it if it is missing.

    A mount of ours whose process was killed is taken away first.
    """
    mount = mount_at(str(point))
    if mount is not None and mount.ours and is_dead(str(point)):
        unmount(str(point), lazy=True)
        mount = mount_at(str(point))
    if mount is not None:
        raise Problem(f"{point} is in use already: {mount.source} ({mount.type}) is mounted there")
    try:
        point.mkdir(parents=True, exist_ok=True)
        occupied = next(point.iterdir(), None)
    except FileExistsError:
        raise Problem(f"{point} is not a directory") from None
    except OSError as error:
        raise Problem(f"cannot use {point} as a mountpoint: {error.strerror}") from None
    if occupied is not None:
        raise Problem(f"{point} is not empty (it holds {occupied.name}): choose another directory")

"""``umount.fuse.dfs``, what umount(8) calls for our mounts: writes everything first, then unmounts.

Without it, ``umount`` returns while the mount's process still writes what was closed a moment ago; on any other
filesystem what was written is on the disk by then. The kernel cannot be made to ask (libfuse 3.14 knows no syncfs), so
this asks for an extended attribute that only means "write everything now".
"""

import errno
import os
import shutil
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from dfsmount.config import FLUSH_XATTR, UsageError

USAGE = "usage: umount.fuse.dfs DIRECTORY [-flnrv]"
WRONG_USAGE, FAILED = 2, 32


class Request(NamedTuple):
    """``flags`` are those to pass on, ``at_once`` whether unwritten data does not matter (``-f``, ``-l``)."""

    directory: str
    flags: tuple[str, ...]
    at_once: bool


def parse(arguments: Sequence[str]) -> Request:
    """Reads what umount(8) passes; raises :class:`UsageError`."""
    directories: list[str] = []
    letters: list[str] = []
    rest = iter(arguments)
    for word in rest:
        if word in ("-N", "-t"):
            next(rest, None)
        elif word.startswith("-") and len(word) > 1 and set(word[1:]) <= set("flnrv"):
            letters.extend(word[1:])
        elif word.startswith("-"):
            raise UsageError(f"unknown option {word}")
        else:
            directories.append(word)
    if len(directories) != 1:
        raise UsageError("one directory is needed")
    return Request(directories[0], tuple(f"-{letter}" for letter in letters), bool({"f", "l"} & set(letters)))


# What a mount answers that could not write everything: servers that are away or damaged, full disks, quotas.
LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT)


def flush(directory: str) -> str:
    """Makes the mount write everything; "", or why that did not work. A dead mount has nothing left to write."""
    try:
        os.getxattr(directory, FLUSH_XATTR)
    except OSError as error:
        return f"{error.strerror}; its log tells more" if error.errno in LOST else ""
    return ""


def command(request: Request) -> list[str]:
    """What unmounts, without asking this helper again."""
    if os.geteuid() == 0:
        return [shutil.which("umount") or "/bin/umount", "-i", *request.flags, request.directory]
    lazy = ["-z"] if "-l" in request.flags else []
    return [shutil.which("fusermount3") or "/bin/fusermount3", "-u", *lazy, request.directory]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    try:
        request = parse(sys.argv[1:] if arguments is None else arguments)
    except UsageError as error:
        print(f"umount.fuse.dfs: {error} ({USAGE})", file=sys.stderr)
        sys.exit(WRONG_USAGE)
    problem = "" if request.at_once else flush(request.directory)
    if problem:
        text = f"not everything could be written to {request.directory}: {problem} (umount -f gives it up)"
        print(f"umount.fuse.dfs: {text}", file=sys.stderr)
        sys.exit(FAILED)
    words = command(request)
    os.execv(words[0], words)


if __name__ == "__main__":
    main()

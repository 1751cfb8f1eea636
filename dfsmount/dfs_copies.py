"""`dfs set-copies` and `dfs get-copies`: paths on a mount to inodes, and the numbers to words."""

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from dfsmount.dfs_api import Api
from dfsmount.dfs_chunks import resolve
from dfsmount.dfs_find import Access
from dfsmount.dfs_layout import Problem
from dfsmount.dfs_mounts import inode_below, mounts


class PathCopies(msgspec.Struct):
    """``own`` 0: as the cluster's ``default``; ``setting``: some tree is still being given another number."""

    path: str
    own: int
    default: int
    setting: bool


def parse(text: str) -> int:
    """0 for the cluster's default."""
    if text == "default":
        return 0
    if not text.isdecimal() or not 0 <= int(text) < 1 << 16:
        raise Problem(f"{text} is no number of copies: give a number, or `default`")
    return int(text)


def each(paths: Sequence[Path], find: Callable[[Path], Access], copies: int | None) -> list[PathCopies]:
    """Asks, or with ``copies`` sets; all paths are looked up before the first is changed."""
    found = []
    for given in paths:
        path = resolve(given)
        try:
            ino = inode_below(path, mounts())
            found.append((path, find(path), ino))
        except OSError as error:
            raise Problem(f"cannot find {given}: {error.strerror}") from None
    shown = []
    for path, access, ino in found:
        with Api(access) as api:
            answer = api.copies(ino) if copies is None else api.set_copies(ino, copies)
        shown.append(PathCopies(str(path), answer.own, answer.default, answer.setting))
    return shown


def wanted(path: PathCopies) -> str:
    count = path.own or path.default
    return f"{count} {'copy' if count == 1 else 'copies'}" + ("" if path.own else " (the default)")

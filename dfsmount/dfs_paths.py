"""Paths on a mount as the cluster knows them, also of what does not exist (any more)."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dfsmount.dfs_find import Access
from dfsmount.dfs_layout import Problem
from dfsmount.dfs_mounts import inode_below, mounts, our_mount_of

# The cluster that the options mean, or else that of a path (None: the only one).
Find = Callable[[Path | None], Access]


class ClusterPath(NamedTuple):
    """``path`` from the root of the cluster, "" for the root, as the metaserver shows paths; ``address`` of its data
    plane, ``local`` where it is on this machine."""

    access: Access
    address: str
    path: str
    local: Path


class NewName(NamedTuple):
    """A name that something is to get: in the directory with this inode number."""

    access: Access
    address: str
    parent: int
    name: bytes
    local: Path


def text(name: str) -> str:
    """A name of this machine's files as the metaserver shows it."""
    return os.fsencode(name).decode(errors="backslashreplace")


def is_below(path: str, above: str) -> bool:
    """Whether a path of the cluster is ``above``, or in it."""
    return path == above or path.startswith(f"{above}/")


def absolute(given: Path) -> Path:
    """Without symbolic links as far as it exists; the last name stays what it is."""
    try:
        return given.parent.resolve() / given.name if given.name and given.name != ".." else given.resolve()
    except (OSError, RuntimeError) as error:
        raise Problem(f"cannot find {given}: {getattr(error, 'strerror', None) or error}") from None


def on_cluster(given: Path, find: Find) -> ClusterPath:
    """Where a path, which need not exist, is in the cluster; :class:`Problem` if it is not on a mount of ours."""
    local = absolute(given)
    mount = our_mount_of(local, mounts())
    below = os.path.relpath(local, mount.point)
    part = mount.source.partition("/")[2]
    names = [name for name in (*part.split("/"), *below.split("/")) if name not in ("", ".")]
    return ClusterPath(find(local), mount.address, "".join(f"/{text(name)}" for name in names), local)


def new_name(given: Path, usual: str, find: Find) -> NewName:
    """What a file called ``usual`` becomes when it goes to ``given``, as mv(1) understands it: into a directory that
    exists, else to that name. :class:`Problem` if something has it."""
    local = absolute(given)
    if local.is_dir():
        local = local / usual
    elif str(given).endswith("/"):
        raise Problem(f"{given} is not a directory")
    try:
        os.lstat(local)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise Problem(f"cannot look at {local}: {error.strerror}") from None
    else:
        raise Problem(f"{local} exists: nothing is overwritten")
    mount = our_mount_of(local, mounts())
    try:
        parent = inode_below(local.parent, mounts())
        if not stat.S_ISDIR(os.stat(local.parent).st_mode):
            raise Problem(f"{local.parent} is not a directory")
    except OSError as error:
        raise Problem(f"cannot find {local.parent}: {error.strerror}") from None
    return NewName(find(local), mount.address, parent, os.fsencode(local.name), local)

"""Gives the root directory of a new cluster to whoever started it: otherwise only root could write there."""

import os
import socket
from collections.abc import Mapping, Sequence

import trio

from dfsmount.dfs_layout import HOST, Cluster, Problem
from metaserver.client import Hooks, SessionIdentity, open_meta
from metaserver.errors import DfsError
from metaserver.key import ClusterKey
from metaserver.protocol import ROOT_INO, SET_ATTRIBUTES, SetAttributes


def starter(environment: Mapping[str, str]) -> tuple[int, int]:
    """User and group id of the person: behind sudo, if root was reached that way."""
    if (
        os.geteuid() == 0
        and environment.get("SUDO_UID", "").isdecimal()
        and environment.get("SUDO_GID", "").isdecimal()
    ):
        return int(environment["SUDO_UID"]), int(environment["SUDO_GID"])
    return os.geteuid(), os.getegid()


def give_root(cluster: Cluster, key: ClusterKey, uid: int, gid: int) -> None:
    """Changes the owner of the root directory, past the kernel: without root, nobody may give files away."""
    try:
        trio.run(_give_root, cluster, key, uid, gid)
    except* DfsError as group:
        raise Problem(f"cannot give the root directory to user {uid}: {group.exceptions[0]}") from None


async def _give_root(cluster: Cluster, key: ClusterKey, uid: int, gid: int) -> None:
    async def on_flush(inos: Sequence[int]) -> None:
        """Nothing is ever dirty here."""

    def ignore(_: object = None) -> None:
        """Nothing is cached here."""

    hooks = Hooks(on_flush=on_flush, on_changed=ignore, opened=list, on_new_session=ignore)
    identity = SessionIdentity(socket.gethostname(), "(dfs up)", os.getpid())
    async with open_meta(HOST, cluster.port, key, identity, hooks) as meta:
        await meta.call(SET_ATTRIBUTES, SetAttributes(ROOT_INO, uid=uid, gid=gid))
        await meta.sync()

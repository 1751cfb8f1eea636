"""The processes of a cluster on this machine, and what was chosen for it."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import quote

from dfsmount import dfs_processes
from dfsmount.dfs_layout import HOST, MAX_SERVERS, Cluster, Layout, Problem, write_toml
from dfsmount.dfs_processes import Service

# Where to look for free ports, each attempt so far above the one before.
PORT_STEP, PORT_ATTEMPTS = 100, 20
LAST_PORT = 65535 - Cluster(0, MAX_SERVERS).ports()[-1]

# How progress is told: one line each.
Say = Callable[[str], None]


class Wanted(NamedTuple):
    """What the options of `dfs up` say; None where they say nothing: as before, or the default."""

    copies: int | None = None
    servers: int | None = None
    port: int | None = None


# -- what there is to run ------------------------------------------------------------------------------------------


def metaserver(layout: Layout) -> Service:
    config = str(layout.config("metaserver"))
    return Service(
        "metaserver",
        "metaserver",
        ("--config", config),
        config,
        layout.pid_file("metaserver"),
        layout.log("metaserver"),
    )


def chunkserver(layout: Layout, number: int) -> Service:
    name = f"chunkserver{number}"
    config = str(layout.config(name))
    return Service(name, "chunkserver", ("--config", config), config, layout.pid_file(name), layout.log(name))


def mount(layout: Layout, cluster: Cluster, point: str) -> Service:
    name = f"mount-{quote(point.strip('/'), safe='')}"
    options = [f"key_file={layout.key_file}"]
    if os.geteuid() == 0:
        options.append("allow_other")
    arguments = (cluster.address, point, "-f", "-o", ",".join(options))
    return Service(name, "dfsmount.cli", arguments, point, layout.pid_file(name), layout.log(name))


def write_configs(layout: Layout, cluster: Cluster) -> None:
    """The servers' configuration files, from cluster.toml."""
    comment = f"Written by every `dfs up` from {layout.cluster_file.name}."
    layout.server_data("metaserver").mkdir(mode=0o700, exist_ok=True)
    write_toml(
        layout.config("metaserver"),
        comment,
        {
            "data": str(layout.server_data("metaserver")),
            "listen_host": HOST,
            "listen_port": cluster.port,
            "http_host": HOST,
            "http_port": cluster.http_port,
            "key_file": str(layout.key_file),
            "copies": cluster.copies,
            "trash_seconds": cluster.trash_seconds,
        },
    )
    for number in range(1, cluster.servers + 1):
        name = f"chunkserver{number}"
        port = cluster.chunkserver_port(number)
        layout.server_data(name).mkdir(mode=0o700, exist_ok=True)
        write_toml(
            layout.config(name),
            comment,
            {
                "data": str(layout.server_data(name)),
                "name": name,
                "listen": f"{HOST}:{port}",
                "http": f"{HOST}:{port + 1}",
                "metaserver": f"{HOST}:{cluster.http_port}",
                "key_file": str(layout.key_file),
            },
        )


# -- choosing ------------------------------------------------------------------------------------------------------


@contextmanager
def locked(layout: Layout) -> Iterator[None]:
    """One `up` or `down` at a time."""
    with (layout.data / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem(f"another `dfs up` or `dfs down` is at work on {layout.data}") from None
        yield


def choose(layout: Layout, wanted: Wanted, say: Say) -> Cluster:
    """The cluster of this data directory: as recorded, or new with what is wanted. Recorded before anything starts."""
    found = layout.read_cluster()
    chosen = merged(found or Cluster(), wanted)
    if chosen == found:
        return found
    check_counts(chosen)
    if found is None:
        if wanted.port is None:
            chosen.port = free_port(chosen, say)
    else:
        check_change(layout, found, chosen)
    layout.write_cluster(chosen)
    return chosen


def merged(found: Cluster, wanted: Wanted) -> Cluster:
    return Cluster(
        found.port if wanted.port is None else wanted.port,
        found.servers if wanted.servers is None else wanted.servers,
        found.copies if wanted.copies is None else wanted.copies,
        found.trash_seconds,
    )


def check_change(layout: Layout, found: Cluster, chosen: Cluster) -> None:
    if any(dfs_processes.find(service) for service in services(layout, found)):
        raise Problem("the cluster runs with other settings: `dfs down` first, then `dfs up` with the new ones")
    if chosen.servers < found.servers:
        raise Problem(f"this cluster has {found.servers} chunkservers with data on them: there cannot be fewer")


def check_counts(cluster: Cluster) -> None:
    if not 1 <= cluster.servers <= MAX_SERVERS:
        raise Problem(f"--servers {cluster.servers}: from 1 to {MAX_SERVERS}")
    if not 1 <= cluster.copies <= cluster.servers:
        raise Problem(f"--copies {cluster.copies}: from 1 to the number of chunkservers ({cluster.servers})")
    if not 1024 <= cluster.port <= LAST_PORT:
        raise Problem(f"--port {cluster.port}: from 1024 to {LAST_PORT}")


def free_port(cluster: Cluster, say: Say) -> int:
    """The first of a range of free ports, the default one if possible."""
    first = cluster.port
    for attempt in range(PORT_ATTEMPTS):
        candidate = Cluster(first + attempt * PORT_STEP, cluster.servers, cluster.copies)
        taken = [port for port in candidate.ports() if not dfs_processes.is_free(HOST, port)]
        if not taken:
            if attempt:
                say(f"Ports from {candidate.port} on are used instead of {first} (recorded in cluster.toml)")
            return candidate.port
        say(f"Port {taken[0]} is in use by {dfs_processes.who_listens(taken[0])}")
    raise Problem("no free ports found: choose some with --port")


def services(layout: Layout, cluster: Cluster) -> list[Service]:
    """The servers, in the order in which they start."""
    return [metaserver(layout), *(chunkserver(layout, number) for number in range(1, cluster.servers + 1))]

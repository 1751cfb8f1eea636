"""`dfs up`: starts what does not run, mounts, and proves that it works. Does nothing twice."""

import errno
import os
import shlex
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from dfsmount import dfs_api, dfs_find, dfs_mounts, dfs_processes
from dfsmount.dfs_layout import HOST, Cluster, Layout, Problem, default_data
from dfsmount.dfs_processes import Service, Started
from dfsmount.dfs_services import Say, Wanted, choose, locked, mount, services, write_configs
from metaserver.protocol import TrashEmpty

# A start replays the changelog and lists every chunk; on a slow disk with much data that takes a while.
START_SECONDS = 120.0
PROBE_SECONDS = 60.0
POLL_SECONDS = 0.1


def up(data: Path, mountpoint: Path, wanted: Wanted, say: Say) -> bool:
    """Starts what does not run yet, mounts, and proves that it works; returns False if all of it was up already."""
    layout = Layout(data)
    layout.prepare()
    with locked(layout):
        new = layout.read_cluster() is None
        cluster = choose(layout, wanted, say)
        started = start_servers(layout, cluster, say)
        if new:
            give_to_starter(layout, cluster)
        mounted = start_mount(layout, cluster, mountpoint, say)
        dfs_find.register(cluster.address, data)
        if started or mounted:
            say(probe(mountpoint))
            give_up_probe(data)
        return started or mounted


def give_to_starter(layout: Layout, cluster: Cluster) -> None:
    """Makes the person who starts a cluster the owner of its root directory; root is anyway."""
    # Imported here: it brings along the whole client, which only the first start needs.
    from dfsmount import dfs_owner

    uid, gid = dfs_owner.starter(os.environ)
    if uid:
        dfs_owner.give_root(cluster, dfs_find.access_to_data(layout.data).key(), uid, gid)


def hints(data: Path, mountpoint: Path) -> list[str]:
    """What to try next, where the logs are, how to stop."""
    here = "" if data == default_data() else f" --data {shlex.quote(str(data))}"
    point = shlex.quote(str(mountpoint))
    command = own_command()
    return [
        "",
        f"  Try     cp -a /usr/share/doc {point}/ ; ls {point}/doc",
        f"          {command} status{here} ; {command} chunks {point}/doc/bash/copyright",
        f"  Logs    {Layout(data).logs}",
        f"  Stop    {command} down{here}   (and `{command} up {point}{here}` brings it back)",
    ]


def own_command() -> str:
    """How this command can be called again: by its name if that finds it."""
    called = Path(sys.argv[0]).resolve()
    found = shutil.which("dfs")
    if called.name != "dfs" or (found is not None and Path(found).resolve() == called):
        return "dfs"
    return shlex.quote(str(called))


def start_servers(layout: Layout, cluster: Cluster, say: Say) -> bool:
    """Returns whether any had to be started; on return all have registered with the metaserver."""
    write_configs(layout, cluster)
    missing = [service for service in services(layout, cluster) if dfs_processes.find(service) is None]
    check_ports(cluster, missing)
    # The metaserver alone first: it makes the key that the others need.
    for batch in ([s for s in missing if s.name == "metaserver"], [s for s in missing if s.name != "metaserver"]):
        running = [dfs_processes.start(service) for service in batch]
        for server in running:
            wait_for(server, partial(dfs_api.health, http_of(cluster, server.service)), "answers")
            say(f"{server.service.name:<13} started   pid {server.pid}, {HOST}:{port_of(cluster, server.service)}")
    if missing:
        wait_registered(layout, cluster)
    return bool(missing)


def port_of(cluster: Cluster, service: Service) -> int:
    if service.name == "metaserver":
        return cluster.port
    return cluster.chunkserver_port(int(service.name.removeprefix("chunkserver")))


def http_of(cluster: Cluster, service: Service) -> str:
    return f"{HOST}:{port_of(cluster, service) + 1}"


def check_ports(cluster: Cluster, missing: list[Service]) -> None:
    """Recorded ports may have been taken by others while the cluster was down."""
    for service in missing:
        port = port_of(cluster, service)
        for candidate in (port, port + 1):
            if not dfs_processes.is_free(HOST, candidate):
                who = dfs_processes.who_listens(candidate)
                raise Problem(
                    f"port {candidate} of {service.name} is in use by {who}: stop it, or choose others: --port"
                )


def wait_for(started: Started, ready: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
    """Waits until ``ready``; :class:`Problem` with the process's last words if it ends, or takes too long."""
    deadline = time.monotonic() + seconds
    log = started.service.log
    while not ready():
        if started.ended():
            started.service.pid_file.unlink(missing_ok=True)
            reason = dfs_processes.last_words(log) or "without a word"
            raise Problem(f"{started.service.name} ended: {reason} (log: {log})")
        if time.monotonic() > deadline:
            raise Problem(f"{started.service.name} runs, but not so that it {what} within {seconds:.0f} s (log: {log})")
        time.sleep(POLL_SECONDS)


def wait_until(ready: Callable[[], bool], why_ended: Callable[[], str], late: str, seconds: float) -> None:
    """Waits until ``ready``; :class:`Problem` if ``why_ended`` says anything, or with ``late`` if it takes too long."""
    deadline = time.monotonic() + seconds
    while not ready():
        reason = why_ended()
        if reason:
            raise Problem(reason)
        if time.monotonic() > deadline:
            raise Problem(late)
        time.sleep(POLL_SECONDS)


def wait_registered(layout: Layout, cluster: Cluster) -> None:
    """Waits until every chunkserver is up in the metaserver's eyes."""
    deadline = time.monotonic() + START_SECONDS
    with dfs_api.Api(dfs_find.access_to_data(layout.data)) as api:
        while True:
            status = api.status()
            up = sum(server.state == "UP" for server in status.servers)
            if up >= cluster.servers and not status.window_open:
                return
            if time.monotonic() > deadline:
                raise Problem(f"only {up} of {cluster.servers} chunkservers registered (logs: {layout.logs})")
            time.sleep(POLL_SECONDS)


def start_mount(layout: Layout, cluster: Cluster, mountpoint: Path, say: Say) -> bool:
    """Returns whether it had to be mounted."""
    point = str(mountpoint)
    service = mount(layout, cluster, point)
    there = dfs_mounts.mount_at(point)
    if there is not None and there.ours and there.source == cluster.address and not dfs_mounts.is_dead(point):
        return False
    dfs_mounts.prepare_mountpoint(mountpoint)
    started = dfs_processes.start(service)
    wait_for(started, lambda: dfs_mounts.mount_at(point) is not None, "mounts")
    say(f"{'mount':<13} mounted   pid {started.pid}, {point}")
    return True


def probe(mountpoint: Path) -> str:
    """Writes, syncs, reads and removes a file, and says that it worked; :class:`Problem` if it did not, or not in time.

    A full cluster is not a failure of the mount, but something to say.
    """
    name = probe_name()
    outcome: list[OSError | None] = []

    def run() -> None:
        try:
            try_file(mountpoint / name)
            outcome.append(None)
        except OSError as error:
            outcome.append(error)

    # In a thread: a mount that hangs must not take this command with it.
    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    worker.join(PROBE_SECONDS)
    if not outcome:
        raise Problem(
            f"{mountpoint} is mounted, but a write did not end within {PROBE_SECONDS:.0f} s: see `dfs status`"
        )
    error = outcome[0]
    if error is None:
        return "A probe file was written, synced, read and removed: it works"
    if error.errno == errno.ENOSPC:
        return "It works, but the cluster is full: what is there can be read and removed"
    raise Problem(
        f"{mountpoint} is mounted, but writing a file there fails: {error.strerror or error} (see `dfs status`)"
    )


def probe_name() -> str:
    return f".dfs-up-probe-{socket.gethostname()}-{os.getpid()}"


def give_up_probe(data: Path) -> None:
    """Nobody wants to see the probe file in the trash; it does no harm there either."""
    with suppress(Problem), dfs_api.Api(dfs_find.access_to_data(data)) as api:
        api.trash_empty(TrashEmpty(f"/{probe_name()}"))


def try_file(path: Path) -> None:
    """Raises OSError unless a small file can be written durably, read back and removed."""
    content = os.urandom(5000)
    try:
        with path.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.read_bytes() != content:
            raise OSError("what was read back is not what was written")
    finally:
        path.unlink(missing_ok=True)

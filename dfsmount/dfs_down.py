"""`dfs down`: unmounts, which writes back what is dirty, and stops the servers."""

import signal
from pathlib import Path

from dfsmount import dfs_find, dfs_homes, dfs_mounts, dfs_processes
from dfsmount.dfs_layout import Cluster, Layout, Problem
from dfsmount.dfs_services import Say, locked, mount, services

# An unmount writes back what is dirty.
UNMOUNT_SECONDS = 300.0
SERVER_STOP_SECONDS = 60.0


def joined(top: Path, say: Say) -> bool:
    """Stops the server of `dfs join` in that directory; whether it is one of those."""
    home = dfs_homes.Background(top)
    if Layout(top).cluster_file.exists() or not home.config.exists():
        return False
    if home.stop(say):
        say(f"Stopped. The data is kept; `dfs join --data {top}` starts it again.")
    else:
        say(f"The server in {top} was not running.")
    return True


def down(data: Path, say: Say, *, force: bool = False) -> bool:
    """Unmounts, flushing; then stops the servers. Returns False if nothing ran. ``force``: does not mind users."""
    layout = Layout(data)
    cluster = layout.read_cluster()
    if cluster is None:
        raise Problem(f"no cluster in {data}")
    with locked(layout):
        ours = our_mounts(layout, cluster)
        for point in ours:
            take_down_mount(layout, cluster, point, say, force=force)
        stopped = stop_servers(layout, cluster, say)
        dfs_find.forget(cluster.address)
    return bool(ours) or stopped


def our_mounts(layout: Layout, cluster: Cluster) -> list[str]:
    """Mountpoints of this cluster. The address alone does not tell: while this cluster is down, another may have it."""
    alive = any(dfs_processes.find(service) for service in services(layout, cluster) if service.name == "metaserver")
    points = [m.point for m in dfs_mounts.mounts() if m.ours and m.address == cluster.address]
    return [point for point in points if alive or mount(layout, cluster, point).pid_file.exists()]


def take_down_mount(layout: Layout, cluster: Cluster, point: str, say: Say, *, force: bool) -> None:
    process = dfs_processes.find(mount(layout, cluster, point))
    reason = dfs_mounts.unmount(point)
    if reason and (force or dfs_mounts.is_dead(point)):
        reason = dfs_mounts.unmount(point, lazy=True)
    if reason:
        users = dfs_processes.users_of(point, ignore=[process.pid] if process else [])
        raise Problem(f"cannot unmount {point}: {'; '.join(users[:5]) or reason}")
    if process is not None:
        if not dfs_processes.wait_ended(process, UNMOUNT_SECONDS):
            raise Problem(f"{point} is unmounted, but pid {process.pid} still writes back (log: {process.service.log})")
        process.service.pid_file.unlink(missing_ok=True)
    say(f"{'mount':<13} unmounted {point}")


def stop_servers(layout: Layout, cluster: Cluster, say: Say) -> bool:
    """Stops chunkservers together, then the metaserver; returns whether any ran."""
    order = list(reversed(services(layout, cluster)))
    running = [found for found in map(dfs_processes.find, order) if found is not None]
    for server in running:
        if server.service.name != "metaserver":
            dfs_processes.send_signal(server.pid, signal.SIGTERM)
    for server in running:
        clean = dfs_processes.stop(server, SERVER_STOP_SECONDS)
        outcome = "stopped" if clean else f"killed: it did not end in {SERVER_STOP_SECONDS:.0f} s"
        say(f"{server.service.name:<13} {outcome}")
    return bool(running)

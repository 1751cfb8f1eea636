"""`dfs recover` and `dfs rebuild`: front doors to what `metaserver recover` and `metaserver rebuild` do.

The work is the metaserver's, in a process of its own: here only its directory, key and chunkservers are found. What it
says on standard error (progress on a terminal, and why not) goes through.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from dfsmount import dfs_processes, dfs_services
from dfsmount.dfs_layout import HOST, Layout, Problem, default_data

# Where a host that is run by systemd has the metaserver's configuration (systemd/ and README.md).
CONFIG = Path("/etc/dfs/metaserver.toml")


class Done(msgspec.Struct):
    """What the metaserver's command said, line by line."""

    command: list[str]
    lines: list[str]


class Target(msgspec.Struct):
    """Whose metaserver: options that say where it is, and of a cluster of `dfs up` what else is known."""

    options: list[str]
    chunkservers: list[str]
    copies: int = 0


def find_target(data: str, config: str) -> Target:
    """By --data or DFS_DATA a cluster of `dfs up`; by --config, or if there is one in /etc/dfs, that of a service."""
    if data and config:
        raise Problem("give --data or --config, not both")
    if not data and not config:
        data = os.environ.get("DFS_DATA", "")
    if not data and not config:
        if Layout(default_data()).cluster_file.exists():
            data = str(default_data())
        elif CONFIG.exists():
            config = str(CONFIG)
        else:
            raise Problem("which metaserver? Give --data DIR (a cluster of `dfs up`) or --config FILE")
    if config:
        return Target(["--config", config], [])
    return _of_up(Path(data).absolute())


def _of_up(data: Path) -> Target:
    layout = Layout(data)
    cluster = layout.read_cluster()
    if cluster is None:
        raise Problem(f"no cluster of `dfs up` in {data}")
    if dfs_processes.find(dfs_services.metaserver(layout)) is not None:
        raise Problem("its metaserver runs: `dfs down` first")
    addresses = [f"{HOST}:{cluster.chunkserver_port(number)}" for number in range(1, cluster.servers + 1)]
    return Target(["--data", str(layout.server_data("metaserver"))], addresses, cluster.copies)


def key_option(target: Target, key_file: str, data: str) -> list[str]:
    if key_file:
        return ["--key-file", key_file]
    if target.chunkservers:
        top = Path(data or os.environ.get("DFS_DATA", "") or default_data())
        return ["--key-file", str(Layout(top.absolute()).key_file)]
    return []


def run(verb: str, options: Sequence[str], *, quiet: bool) -> Done:
    """One of the metaserver's commands; its lines are printed as they come unless ``quiet``. ``SystemExit`` with its
    exit code if it fails: it has said why."""
    command = [sys.executable, "-m", "metaserver", verb, *options]
    # Works from a checkout that is not installed, too.
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace", env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if not quiet:
                print(lines[-1], flush=True)
    if process.returncode != 0:
        raise SystemExit(process.returncode)
    return Done(["metaserver", verb, *options], lines)

"""Finding the cluster that a command is about.

In this order: the options; DFS_DATA, or DFS_METASERVER and DFS_KEY_FILE, in the environment; the mount that a file lies
in; the default data directory; a cluster started by `dfs up` on this machine, if there is one only; the only mount.
A cluster that `dfs up` started leaves a link named after its metaserver's address in :func:`registry`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from dfsmount.dfs_layout import HOST, Layout, Problem, default_data
from dfsmount.dfs_mounts import Mount, mounts, our_mount_of
from metaserver.key import ClusterKey, KeyFileError, load_key

# Where the key is on a host that is run by systemd (systemd/ and README.md).
HOST_KEY_FILE = Path("/etc/dfs/cluster.key")


class Choice(NamedTuple):
    """What the options say, before or after looking at the environment; empty where they say nothing."""

    data: str = ""
    metaserver: str = ""
    key_file: str = ""


class Access(NamedTuple):
    """A metaserver's control plane, and the key to it. ``data`` is set if the cluster is run by `dfs up`."""

    http: str
    key_file: Path
    data: Path | None = None

    def key(self) -> ClusterKey:
        try:
            return load_key(self.key_file)
        except KeyFileError as error:
            raise Problem(str(error)) from None


def registry() -> Path:
    """Directory of links to the data directories of running clusters; gone after a reboot, as they are."""
    if os.geteuid() == 0:
        return Path("/run/dfs/clusters")
    return Path(os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/dfs-{os.geteuid()}") / "dfs/clusters"


def register(address: str, data: Path) -> None:
    """Notes that the cluster in ``data`` listens on ``address``. Only a convenience: failing to is not an error."""
    try:
        registry().mkdir(mode=0o700, parents=True, exist_ok=True)
        forget(address)
        (registry() / address).symlink_to(data)
    except OSError:
        return


def forget(address: str) -> None:
    (registry() / address).unlink(missing_ok=True)


def registered() -> dict[str, Path]:
    """Metaserver address -> data directory, of clusters whose data is still there."""
    try:
        entries = list(registry().iterdir())
    except OSError:
        return {}
    found = {entry.name: Path(os.readlink(entry)) for entry in entries if entry.is_symlink()}
    return {address: data for address, data in found.items() if Layout(data).cluster_file.exists()}


def from_environment(choice: Choice, environment: Mapping[str, str]) -> Choice:
    """Options win, all together: a directory given on the command line is not mixed with an address from outside."""
    if choice.data or choice.metaserver:
        return choice
    return Choice(
        environment.get("DFS_DATA", ""),
        environment.get("DFS_METASERVER", ""),
        choice.key_file or environment.get("DFS_KEY_FILE", ""),
    )


def http_address(address: str) -> str:
    """The control plane next to a data plane's HOST:PORT: by convention the following port."""
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + 1}"


def access_to_data(data: Path) -> Access:
    cluster = Layout(data).read_cluster()
    if cluster is None:
        raise Problem(f"no cluster in {data}: start one with `dfs up MOUNTPOINT --data {data}`")
    return Access(f"{HOST}:{cluster.http_port}", Layout(data).key_file, data)


def access_to_mount(mount: Mount, key_file: str) -> Access:
    data = registered().get(mount.address)
    if data is not None:
        return access_to_data(data)
    return Access(http_address(mount.address), Path(key_file) if key_file else HOST_KEY_FILE)


def find(choice: Choice, file: Path | None = None) -> Access:
    """The cluster that the options, the environment or the mount of ``file`` mean; :class:`Problem` if none is."""
    choice = from_environment(choice, os.environ)
    if choice.data and choice.metaserver:
        text = f"--data {choice.data} and --metaserver {choice.metaserver} name a cluster each: give one of them"
        raise Problem(f"{text} (DFS_DATA and DFS_METASERVER in the environment count as well)")
    if choice.data:
        return access_to_data(Path(choice.data).absolute())
    if choice.metaserver:
        if ":" not in choice.metaserver:
            raise Problem(f"{choice.metaserver}: give the metaserver as HOST:HTTPPORT")
        return Access(choice.metaserver, Path(choice.key_file) if choice.key_file else HOST_KEY_FILE)
    table = mounts()
    if file is not None:
        return access_to_mount(our_mount_of(file, table), choice.key_file)
    return find_any([mount for mount in table if mount.ours], choice.key_file)


def find_any(ours: list[Mount], key_file: str) -> Access:
    """The cluster that is meant when nothing was said."""
    if Layout(default_data()).cluster_file.exists():
        return access_to_data(default_data())
    clusters = registered()
    if len(clusters) == 1:
        return access_to_data(next(iter(clusters.values())))
    if clusters:
        raise Problem(f"several clusters run here, say which: {', '.join(f'--data {d}' for d in clusters.values())}")
    if len({mount.address for mount in ours}) == 1:
        return access_to_mount(ours[0], key_file)
    raise Problem(
        "no cluster found: `dfs up MOUNTPOINT` starts one, or name it by --data or --metaserver and --key-file"
    )

"""What `dfs up` keeps in its data directory, and how it is written down.

::

    DATA/cluster.toml          what was chosen at the first start (ports, copies, servers)
    DATA/cluster.key           the cluster key, made by the metaserver's first start
    DATA/metaserver.toml       configuration of each server, written anew by every `dfs up`
    DATA/chunkserver1.toml ...
    DATA/metaserver/  DATA/chunkserver1/ ...   the data of each server
    DATA/logs/  DATA/run/      a log and a pid file for each process
"""

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

import msgspec

HOST = "127.0.0.1"
DEFAULT_PORT = 9400
# Metaserver: port and port + 1; chunkserver number n: from here on two for each.
FIRST_CHUNKSERVER_PORT = 10
MAX_SERVERS = 32
# What may be there before the first start: a disk mounted for a server, what an interrupted start has left.
OWN_NAME = re.compile(r"((metaserver|chunkserver\d+)(\.toml)?|logs|run|lock|lost\+found|cluster\.(key|toml)(\.new)?)")


class Problem(Exception):
    """Something the user has to know or do; the text is one line, and the command ends with exit code 1."""


class Cluster(msgspec.Struct, forbid_unknown_fields=True):
    """The contents of cluster.toml. ``port`` is the first of the ports that the cluster uses."""

    port: int = DEFAULT_PORT
    servers: int = 3
    copies: int = 2
    # How long deleted files are kept; 0: they are gone when they are deleted.
    trash_seconds: float = 86400.0

    @property
    def address(self) -> str:
        """What mounts connect to, and what the mount table shows."""
        return f"{HOST}:{self.port}"

    @property
    def http_port(self) -> int:
        return self.port + 1

    def chunkserver_port(self, number: int) -> int:
        """Port of the data plane of chunkserver ``number`` (from 1); its HTTP port is the next one."""
        return self.port + FIRST_CHUNKSERVER_PORT + 2 * (number - 1)

    def ports(self) -> list[int]:
        """Every port the cluster listens on."""
        first = [self.port, *(self.chunkserver_port(number) for number in range(1, self.servers + 1))]
        return [port for pair in first for port in (pair, pair + 1)]


class Layout:
    """Paths below one data directory."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.cluster_file = data / "cluster.toml"
        self.key_file = data / "cluster.key"
        self.logs = data / "logs"
        self.run = data / "run"

    def config(self, name: str) -> Path:
        return self.data / f"{name}.toml"

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def pid_file(self, name: str) -> Path:
        return self.run / f"{name}.pid"

    def server_data(self, name: str) -> Path:
        return self.data / name

    def prepare(self) -> None:
        """Makes the directories; :class:`Problem` says why it cannot. Takes only a new or empty one, or a cluster's."""
        self._refuse_foreign()
        try:
            for directory in (self.data, self.logs, self.run):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise Problem(f"cannot make {error.filename}: {error.strerror}") from None

    def _refuse_foreign(self) -> None:
        try:
            if self.cluster_file.exists() or not self.data.exists():
                return
            foreign = next((entry.name for entry in self.data.iterdir() if not OWN_NAME.fullmatch(entry.name)), None)
        except OSError as error:
            raise Problem(f"cannot use {self.data} for data: {error.strerror}") from None
        if foreign is not None:
            text = f"{self.data} is not empty and not the data directory of a cluster (it holds {foreign})"
            raise Problem(f"{text}: choose another one with --data")

    def read_cluster(self) -> Cluster | None:
        """What cluster.toml says; None if there is no cluster here."""
        try:
            text = self.cluster_file.read_text()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise Problem(f"cannot read {self.cluster_file}: {error.strerror}") from None
        try:
            return msgspec.convert(tomllib.loads(text), Cluster)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
            raise Problem(f"{self.cluster_file}: {error}") from None

    def write_cluster(self, cluster: Cluster) -> None:
        write_toml(self.cluster_file, "Written by the first `dfs up`.", msgspec.to_builtins(cluster))


def write_toml(path: Path, comment: str, values: Mapping[str, str | float | list[str]]) -> None:
    """Replaces ``path`` at once; strings, lists of them and numbers are enough here."""
    lines = [f"# {comment}", *(f"{key} = {toml_value(value)}" for key, value in values.items())]
    temporary = path.with_name(path.name + ".new")
    try:
        temporary.write_text("\n".join(lines) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise Problem(f"cannot write {path}: {error.strerror}") from None


def toml_value(value: str | float | list[str]) -> str:
    """A TOML literal. A JSON string is a TOML basic string: both escape in the same way; and lists look the same."""
    return msgspec.json.encode(value).decode()


def default_data() -> Path:
    """Where `dfs up` keeps data unless told."""
    if os.geteuid() == 0:
        return Path("/var/lib/dfs-quickstart")
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "dfs-quickstart"

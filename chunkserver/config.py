"""Configuration: a TOML file, or the same by flags."""

import socket
import tomllib
from pathlib import Path

import msgspec

from metaserver import settings
from metaserver.httpserver import is_loopback
from metaserver.logs import LEVELS

# Kept free unless configured: enough for logs and for the filesystem's own metadata, little on a small disk.
RESERVE_BYTES = 1 << 30


class ConfigError(Exception):
    """The configuration cannot be used; the text is one line."""


class UnreadableConfig(ConfigError):
    """The file cannot be read now; perhaps the next time."""


class Config(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What an operator may say. Addresses are ``HOST:PORT``; port 0 lets the system choose.

    ``data``: the directory, on a disk of its own. ``listen``: data plane. ``http``: health and metrics.
    ``advertise``: the host others reach this one under (default: the host of ``listen``, or this machine's name if
    that is a wildcard). ``metaserver``: where the metaserver's HTTP listens; more than one for a standby.
    ``scrub_days``: in which everything is read back once, 0: only when asked for (`dfs scrub`);
    ``scrub_bytes_per_second``: never faster than this, even if it takes longer.
    ``reserve_bytes``: kept free (default: 1 GiB, or a hundredth of the disk if that is less).
    """

    data: str
    metaserver: str | list[str]
    listen: str = "127.0.0.1:9422"
    http: str = "127.0.0.1:9423"
    advertise: str = ""
    key_file: str = ""
    name: str = ""
    rack: str = ""
    labels: list[str] = []
    reserve_bytes: int | None = None
    scrub_days: float = 7.0
    scrub_bytes_per_second: int = 32 << 20
    log_level: str = "info"
    log_json: bool = False

    @property
    def metaservers(self) -> list[str]:
        return [self.metaserver] if isinstance(self.metaserver, str) else self.metaserver

    @property
    def advertised_host(self) -> str:
        host = self.advertise or split_address(self.listen, "listen")[0]
        return socket.gethostname() if host in ("0.0.0.0", "::", "") else host

    def reserve(self, capacity: int) -> int:
        return min(RESERVE_BYTES, capacity // 100) if self.reserve_bytes is None else self.reserve_bytes


def split_address(address: str, what: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT`` or ``[IPV6]:PORT``."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535 or not host:
        raise ConfigError(f"{what} {address!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def read_file(path: Path) -> dict[str, object]:
    """The keys of a TOML file, unchecked."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UnreadableConfig(f"cannot read the configuration {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration {path} is not TOML: {error}") from None


def make(values: dict[str, object], where: str) -> Config:
    """A checked configuration of these keys; ``where`` they come from is for the error's text."""
    problem = settings.unknown_key(values, Config)
    if problem:
        raise ConfigError(f"{where}: {problem}")
    try:
        config = msgspec.convert(values, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {settings.invalid_value(error)}") from None
    _check(config, where)
    return config


def _check(config: Config, where: str) -> None:
    if config.log_level not in LEVELS:
        raise ConfigError(f"{where}: log level {config.log_level!r} is not one of {', '.join(LEVELS)}")
    if config.reserve_bytes is not None and config.reserve_bytes < 0:
        raise ConfigError(f"{where}: reserve_bytes must not be negative")
    if not 0 <= config.scrub_days <= 3650:
        raise ConfigError(f"{where}: scrub_days must be between 0 and 3650")
    if config.scrub_bytes_per_second < 1 << 20:
        raise ConfigError(f"{where}: scrub_bytes_per_second must be at least {1 << 20}")
    if not config.metaservers:
        raise ConfigError(f"{where}: no metaserver is given")
    for address in config.metaservers:
        split_address(address, f"{where}: metaserver")
    for what, address in (("listen", config.listen), ("http", config.http)):
        host, _ = split_address(address, f"{where}: {what}")
        if not config.key_file and not is_loopback(host):
            raise ConfigError(f"{where}: {what} {address} can be reached by others: give the cluster's key_file")

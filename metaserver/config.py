"""The metaserver's configuration: a TOML file, every key with a default, unknown keys refused."""

import tomllib
from pathlib import Path
from typing import Annotated, Any

import msgspec

from metaserver import settings

Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Level = Annotated[str, msgspec.Meta(pattern="^(debug|info|warning|error)$")]


# Ten years.
MOST_TRASH_SECONDS = 10 * 366 * 86400


class ConfigError(Exception):
    """The configuration cannot be used; the text is one line that says where and why."""


class Log(msgspec.Struct, forbid_unknown_fields=True):
    level: Level = "info"
    json: bool = False


class Config(msgspec.Struct, forbid_unknown_fields=True):
    """See systemd/metaserver.toml for what each key means."""

    data: str = ""
    listen_host: str = "127.0.0.1"
    listen_port: Port = 9400
    http_host: str = "127.0.0.1"
    http_port: Port = 9401
    key_file: str = ""
    copies: Annotated[int, msgspec.Meta(ge=1, le=16)] = 2
    min_copies: Annotated[int, msgspec.Meta(ge=1, le=16)] = 1
    heartbeat_seconds: Seconds = 1.0
    lost_after_seconds: Seconds = 60.0
    keep_alive_seconds: Seconds = 5.0
    session_deadline_seconds: Seconds = 60.0
    window_seconds: Seconds = 10.0
    delete_grace_seconds: Annotated[float, msgspec.Meta(ge=0)] = 600.0
    copies_per_server: Positive = 16
    copy_bytes_per_second: Positive = 64 << 20
    rebalance_bytes_per_second: Positive = 16 << 20
    # 0: never by itself.
    rebalance_threshold: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.1
    # 0: what is deleted is gone at once.
    trash_seconds: Annotated[float, msgspec.Meta(ge=0, le=MOST_TRASH_SECONDS)] = 86400.0
    trash_files: Positive = 1_000_000
    # 0: never.
    clean_bytes_per_second: Annotated[int, msgspec.Meta(ge=0)] = 16 << 20
    log: Log = msgspec.field(default_factory=Log)

    @property
    def data_path(self) -> Path:
        return Path(self.data)

    @property
    def key_path(self) -> Path:
        return Path(self.key_file) if self.key_file else self.data_path / "cluster.key"

    def check(self) -> None:
        """Raises :class:`ConfigError` if values do not fit together."""
        if not self.data:
            raise ConfigError("no data directory: give --data or `data` in the configuration file")
        if self.min_copies > self.copies:
            raise ConfigError(f"min_copies ({self.min_copies}) is more than copies ({self.copies})")
        if self.keep_alive_seconds * 2 > self.session_deadline_seconds:
            raise ConfigError("session_deadline_seconds must be at least twice keep_alive_seconds")


def load(path: Path) -> Config:
    """Reads a file; raises :class:`ConfigError`."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not text") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    return _converted(values, str(path))


def _converted(values: dict[str, Any], where: str) -> Config:
    problem = settings.unknown_key(values, Config)
    if problem:
        raise ConfigError(f"{where}: {problem}")
    try:
        return msgspec.convert(values, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {settings.invalid_value(error)}") from None


def with_flags(config: Config, flags: dict[str, object]) -> Config:
    """The same with other values; raises :class:`ConfigError` if one is not possible."""
    return _converted({**msgspec.to_builtins(config), **flags}, "command line")


def parse_address(text: str, what: str) -> tuple[str, int]:
    """``HOST:PORT``, the host perhaps in brackets; raises :class:`ConfigError`."""
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{what} must be HOST:PORT, not {text!r}")
    return host.strip("[]"), int(port)

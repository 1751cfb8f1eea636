"""What a mount is told on its command line, in the manner of mount(8): a source, a directory and ``-o`` lists."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

DEFAULT_PORT = 9400
DEFAULT_KEY_FILE = Path("/etc/dfs/cluster.key")
# Instead of an answer for ever, "hard" waits so long: a week-end without the servers, and some.
DRIVERS = ("direct", "libfuse")
HARD_SECONDS = 7 * 24 * 3600.0
LONGEST_SECONDS = 3600.0
# Reading this extended attribute of a mounted directory returns when everything is written; see umountcli.
FLUSH_XATTR = b"user.dfs.flush"


class UsageError(Exception):
    """The command line makes no sense; the text is one line that says what to change."""


class Source(msgspec.Struct, frozen=True):
    """HOST[:PORT][/SUBDIRECTORY]. ``subdirectory`` begins with a slash."""

    host: str
    port: int
    subdirectory: str = "/"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}{self.subdirectory if self.subdirectory != '/' else ''}"


class Options(msgspec.Struct):
    """What ``-o`` lists say. ``kernel`` are the flags that are the kernel's business (ro, nosuid, ...).

    Time-outs in seconds; ``timeout`` is how long an operation waits for servers before it fails with EIO. ``driver``
    says who talks with the kernel.
    """

    allow_other: bool | None = None
    read_only: bool = False
    sync_close: bool = False
    key_file: Path | None = None
    attr_timeout: float = 1.0
    entry_timeout: float = 1.0
    cache_mib: int | None = None
    dirty_mib: int | None = None
    log_file: Path | None = None
    timeout: float = 30.0
    debug: bool = False
    nodiratime: bool = False
    driver: str = "direct"
    kernel: tuple[str, ...] = ()


class MountPlan(msgspec.Struct):
    """Everything that a mount is told."""

    source: Source
    mountpoint: Path
    options: Options
    foreground: bool = False


def parse_source(text: str) -> Source:
    """``HOST``, ``HOST:PORT``, ``[IPv6]:PORT``, each with ``/SUBDIRECTORY``; also ``HOST:/SUBDIRECTORY`` as NFS has."""
    address, slash, rest = text.partition("/")
    subdirectory = "/" + "/".join(part for part in rest.split("/") if part not in ("", "."))
    if ".." in subdirectory.split("/"):
        raise UsageError(f"{text}: a subdirectory without .. is needed")
    host, port = _split_address(address)
    if not host or not all(part.isprintable() and part != " " for part in host):
        raise UsageError(f"{text}: the source is HOST:PORT or HOST:PORT/SUBDIRECTORY")
    if port and not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise UsageError(f"{text}: {port} is not a port number")
    return Source(host, int(port) if port else DEFAULT_PORT, subdirectory if slash else "/")


def _split_address(address: str) -> tuple[str, str]:
    if address.startswith("["):
        host, bracket, port = address[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            raise UsageError(f"{address}: an IPv6 address is written [ADDRESS]:PORT")
        return host, port[1:]
    if address.count(":") > 1:
        raise UsageError(f"{address}: an IPv6 address is written [ADDRESS]:PORT")
    host, _, port = address.partition(":")
    return host, port


# -- the -o lists --------------------------------------------------------------------------------------------------


def _flag(name: str, value: Any = True) -> Callable[[Options], None]:
    return lambda options: setattr(options, name, value)


def _for_kernel(options: Options, word: str) -> None:
    options.kernel = (*options.kernel, word)


def _not_for_kernel(word: str) -> Callable[[Options], None]:
    """Takes back ``word``, which an earlier list may have said."""
    return lambda options: setattr(options, "kernel", tuple(each for each in options.kernel if each != word))


def _hard(options: Options) -> None:
    options.timeout = HARD_SECONDS


def _read_only(options: Options) -> None:
    options.read_only = True


_FLAGS: dict[str, Callable[[Options], None]] = {
    "allow_other": _flag("allow_other"),
    # Always on: the kernel checks permissions, FIFOs included.
    "default_permissions": lambda options: None,
    "ro": _read_only,
    "rw": _flag("read_only", False),
    "sync_close": _flag("sync_close"),
    "hard": _hard,
    "debug": _flag("debug"),
    # Without noatime it is relatime, strictatime or not: see atimes.
    "atime": _not_for_kernel("noatime"),
    "relatime": _not_for_kernel("noatime"),
    "strictatime": _not_for_kernel("noatime"),
    # libfuse does not know this one.
    "nodiratime": _flag("nodiratime"),
    "diratime": _flag("nodiratime", False),
}
_KERNEL_FLAGS = frozenset({"exec", "noexec", "suid", "nosuid", "dev", "nodev", "sync", "async", "dirsync", "noatime"})
# What mount(8), fstab(5) and systemd.mount(5) pass along or keep for themselves. Times of access are those of relatime
# with lazytime whatever else is wished for, if noatime is not.
_IGNORED = frozenset(
    {
        "defaults", "auto", "noauto", "_netdev", "nofail", "user", "nouser", "users", "owner", "group",
        "norelatime", "nostrictatime", "lazytime", "nolazytime",
        "silent", "loud", "nosymfollow",
    }
)  # fmt: skip
_IGNORED_PREFIXES = ("x-", "X-", "comment=")


def _seconds(text: str, lowest: float) -> float:
    number = float(text)
    if not lowest <= number <= LONGEST_SECONDS:
        raise ValueError(f"from {lowest:g} to {LONGEST_SECONDS:g} seconds")
    return number


def _mebibytes(text: str) -> int:
    number = int(text)
    if not 8 <= number <= 1 << 20:
        raise ValueError("from 8 to 1048576 MiB")
    return number


def _path(text: str) -> Path:
    if not text:
        raise ValueError("a path")
    # Absolute, because a background mount works from /.
    return Path(text).absolute()


def _driver(text: str) -> str:
    if text not in DRIVERS:
        raise ValueError(f"a word: {' or '.join(DRIVERS)}")
    return text


_VALUES: dict[str, Callable[[str], Any]] = {
    "key_file": _path,
    "log_file": _path,
    "attr_timeout": lambda text: _seconds(text, 0),
    "entry_timeout": lambda text: _seconds(text, 0),
    "timeout": lambda text: _seconds(text, 1),
    "cache_mib": _mebibytes,
    "dirty_mib": _mebibytes,
    "driver": _driver,
}


def parse_options(lists: Iterable[str], *, sloppy: bool = False) -> Options:
    """Reads ``-o`` lists; later words win. ``sloppy`` passes over what is unknown, as ``mount -s`` asks for."""
    options = Options()
    for word in (word for text in lists for word in text.split(",") if word):
        _apply(options, word, sloppy)
    return options


def _apply(options: Options, word: str, sloppy: bool) -> None:
    name, equals, value = word.partition("=")
    if word.startswith(_IGNORED_PREFIXES) or word in _IGNORED:
        return
    if name in _VALUES:
        _set_value(options, name, value, bool(equals))
    elif equals and (name in _FLAGS or name in _KERNEL_FLAGS):
        raise UsageError(f"option {name} takes no value")
    elif word in _FLAGS:
        _FLAGS[word](options)
    elif word in _KERNEL_FLAGS:
        _for_kernel(options, word)
    elif not sloppy:
        raise UsageError(f"unknown option {name}")


def _set_value(options: Options, name: str, value: str, given: bool) -> None:
    if not given:
        raise UsageError(f"option {name} needs a value: {name}=...")
    try:
        setattr(options, name, _VALUES[name](value))
    except ValueError as error:
        hint = str(error) if str(error)[:4] in ("from", "a pa", "a wo") else "a number"
        raise UsageError(f"option {name}={value}: it must be {hint}") from None

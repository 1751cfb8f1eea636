"""Where a joined chunkserver lives on its host: below one directory in the background, or as a unit of systemd."""

import contextlib
import os
import pwd
import re
import shutil
import subprocess
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from dfsmount import dfs_api, dfs_processes
from dfsmount.dfs_layout import Layout, Problem, write_toml
from dfsmount.dfs_processes import Service, Started

COMMENT = "Written by `dfs join`; docs/operations.md and systemd/chunkserver.toml say what else can be set."
STOP_SECONDS = 60.0
SYSTEMCTL_SECONDS = 150.0
INSTANCES = "abcdefghijklmnopqrstuvwxyz"


def default_directory() -> Path:
    """Where a server in the background keeps everything unless told."""
    if os.geteuid() == 0:
        return Path("/var/lib/dfs-chunkserver")
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "dfs-chunkserver"


class Home(ABC):
    """Paths of one server, and how it is started. What :meth:`prepare`, :meth:`configure` and :meth:`start` do is
    undone by what they put on ``undo``."""

    data: Path
    config: Path
    key_file: Path

    @abstractmethod
    def check(self) -> None:
        """:class:`Problem` if nothing can be made here; changes nothing."""

    @abstractmethod
    def prepare(self, undo: ExitStack) -> None:
        """Makes the directories."""

    @abstractmethod
    def give(self, path: Path) -> None:
        """Has a file belong to whom the server runs as."""

    @abstractmethod
    def start(self, undo: ExitStack) -> None: ...

    @abstractmethod
    def why_ended(self) -> str:
        """Why the server does not run (any more); "" if it does."""

    @abstractmethod
    def runs(self) -> str: ...

    def taken_ports(self) -> set[int]:
        """Ports of other servers of this host, which may be down now."""
        return set()

    def configure(self, undo: ExitStack, values: Mapping[str, str | int | list[str]]) -> None:
        undo.callback(self.config.unlink, missing_ok=True)
        write_toml(self.config, COMMENT, values)


def make_directory(undo: ExitStack, path: Path, mode: int = 0o700) -> None:
    """With its parents; what was made is taken away again, if it is empty by then."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    try:
        for directory in reversed(missing):
            directory.mkdir(mode=mode)
            undo.callback(_remove_directory, directory)
    except OSError as error:
        raise Problem(f"cannot make {path}: {error.strerror}") from None


def _remove_directory(path: Path) -> None:
    with contextlib.suppress(OSError):  # what others have put there stays
        path.rmdir()


def clear_data(path: Path) -> None:
    """Takes away what a chunkserver that never held a chunk has made; one with a chunk keeps everything."""
    if any(entry.is_file() for entry in path.glob("chunks/**/*")):
        return
    for entry in path.glob("*"):
        if re.fullmatch(r"identity(\.copy)?\.json(\.new)?|lock", entry.name):
            entry.unlink(missing_ok=True)
    shutil.rmtree(path / "chunks", ignore_errors=True)


class Background(Home):
    """As `dfs up` has it: everything below one directory."""

    def __init__(self, top: Path) -> None:
        layout = Layout(top)
        self.top = top
        self.data, self.config = layout.server_data("chunkserver"), layout.config("chunkserver")
        self.key_file = layout.key_file
        self._directories = (layout.run, layout.logs, self.data)
        config = str(self.config)
        self._service = Service(
            "chunkserver",
            "chunkserver",
            ("--config", config),
            config,
            layout.pid_file("chunkserver"),
            layout.log("chunkserver"),
        )
        self._started: Started | None = None

    def check(self) -> None:
        if self.config.exists():
            raise Problem(f"a server has joined from {self.top} already: `dfs join --data {self.top}` starts it")
        try:
            names = sorted(entry.name for entry in self.top.iterdir()) if self.top.exists() else []
        except OSError as error:
            raise Problem(f"cannot use {self.top} for data: {error.strerror}") from None
        foreign = [name for name in names if name not in ("lost+found", "chunkserver")]
        if foreign:
            raise Problem(f"{self.top} is not empty (it holds {foreign[0]}): choose another directory with --data")

    def prepare(self, undo: ExitStack) -> None:
        fresh = not self.data.exists() or not any(self.data.iterdir())
        for directory in self._directories:
            make_directory(undo, directory)
        if fresh:
            undo.callback(clear_data, self.data)

    def give(self, path: Path) -> None:
        """It runs as who joins."""

    def start(self, undo: ExitStack) -> None:
        undo.callback(self._service.log.unlink, missing_ok=True)
        self._started = dfs_processes.start(self._service)
        undo.callback(dfs_processes.stop, self._started, STOP_SECONDS)

    def running(self) -> Started | None:
        return dfs_processes.find(self._service)

    def why_ended(self) -> str:
        if self._started is None or not self._started.ended():
            return ""
        return dfs_processes.last_words(self._service.log) or "it ended without a word"

    def answers(self) -> bool:
        values = tomllib.loads(self.config.read_text())
        return dfs_api.health(str(values["http"]))

    def runs(self) -> str:
        started = self._started or self.running()
        return "does not run" if started is None else f"pid {started.pid}"

    def stop(self, say: Callable[[str], None]) -> bool:
        """Returns whether it ran."""
        started = self.running()
        if started is None:
            return False
        clean = dfs_processes.stop(started, STOP_SECONDS)
        say(f"chunkserver   {'stopped' if clean else f'killed: it did not end in {STOP_SECONDS:.0f} s'}")
        return True


class Unit(Home):
    """`chunkserver@INSTANCE`, with the paths that its unit says. ``install`` puts units in place."""

    def __init__(self, instance: str, install: Callable[[], None], root: Path = Path("/")) -> None:
        self._etc = root / "etc/dfs"
        self.instance = instance or self._free_instance()
        self.unit = f"chunkserver@{self.instance}"
        self.data = root / "srv/dfs" / self.instance
        self.config = self._etc / f"chunkserver-{self.instance}.toml"
        self.key_file = self._etc / "cluster.key"
        self._template = root / "etc/systemd/system/chunkserver@.service"
        self._booted = root / "run/systemd/system"
        self._install = install

    def _free_instance(self) -> str:
        return next(name for name in INSTANCES if not (self._etc / f"chunkserver-{name}.toml").exists())

    def check(self) -> None:
        if not re.fullmatch("[a-z0-9]{1,32}", self.instance):
            raise Problem(f"--instance {self.instance}: small letters and digits")
        if os.geteuid() != 0:
            raise Problem("--systemd needs root")
        if not self._booted.is_dir():
            raise Problem("systemd does not run here: without --systemd the server runs in the background")
        if self.config.exists():
            raise Problem(f"{self.config} is there already: `systemctl start {self.unit}` starts that server")

    def taken_ports(self) -> set[int]:
        ports = set()
        for path in self._etc.glob("chunkserver-*.toml"):
            with contextlib.suppress(OSError, ValueError, KeyError):  # whoever made it will hear of it elsewhere
                ports.add(int(tomllib.loads(path.read_text())["listen"].rpartition(":")[2]))
        return ports

    def prepare(self, undo: ExitStack) -> None:
        if not self._template.exists():
            self._install()
        fresh = not self.data.exists() or not any(self.data.iterdir())
        make_directory(undo, self.data, 0o755)
        if fresh:
            undo.callback(clear_data, self.data)
        self.give(self.data)

    def give(self, path: Path) -> None:
        try:
            user = pwd.getpwnam("dfs")
        except KeyError:
            raise Problem("there is no user dfs: `dfs install-units` makes it") from None
        os.chown(path, user.pw_uid, user.pw_gid)

    def start(self, undo: ExitStack) -> None:
        undo.callback(self._systemctl, "reset-failed", self.unit)
        undo.callback(self._systemctl, "disable", "--now", self.unit)
        problem = self._systemctl("enable", "--now", self.unit)
        if problem:
            raise Problem(f"{self.unit} does not start: {self._last_words() or problem}")

    def why_ended(self) -> str:
        if self._systemctl("is-active", "--quiet", self.unit) == "":
            return ""
        return self._last_words() or f"{self.unit} does not run"

    def runs(self) -> str:
        return self.unit

    def _systemctl(self, *arguments: str) -> str:
        """ "" or why it failed."""
        return _output(["systemctl", *arguments])[0]

    def _last_words(self) -> str:
        command = ["journalctl", "--no-pager", "-u", self.unit, "-t", "chunkserver", "-n", "1", "-o", "cat"]
        return _output([*command, "-p", "err"])[1] or _output(command)[1]


def _output(command: list[str]) -> tuple[str, str]:
    """Why a command failed ("" if it did not), and the last line of what it printed."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=SYSTEMCTL_SECONDS
        )
    except FileNotFoundError:
        return f"{command[0]} is not installed", ""
    except subprocess.TimeoutExpired:
        return f"{command[0]} does not end", ""
    failure = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    printed = done.stdout.strip().splitlines() or [""]
    return ("" if done.returncode == 0 else failure), printed[-1]

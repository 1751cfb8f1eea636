"""The command line: ``metaserver [run] --config FILE`` or flags; ``check``, ``recover``, ``rebuild``, ``snapshot``.

Every failure an operator can meet is one line on standard error. Exit code 1: it may go better the next time. 65: the
data is damaged, and 78: the configuration is wrong; both stay so until somebody does something about it, and the
systemd unit does not start the server again.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import trio
import typer
import typer.core
from rich.console import Console

from metaserver import config as configs
from metaserver import identity, logs, offline
from metaserver import rebuild as rebuilding
from metaserver import recover as recovery
from metaserver.commit import open_committer
from metaserver.config import Config, ConfigError
from metaserver.engine import EngineFailed
from metaserver.errors import DfsError
from metaserver.identity import DamagedIdentity, DataDirectoryError
from metaserver.key import DamagedKey, KeyFileError, load_key
from metaserver.rebuild import RebuildReport
from metaserver.replay import CorruptLog
from metaserver.serve import StartError, serve_until_signal
from metaserver.snapshot import SnapshotFailed
from metaserver.start import DirectoryBusy
from metaserver.store import CorruptStore, StoreFull
from metaserver.survey import SurveyError
from metaserver.version import VERSION

# What ends the program with one line; anything else is a mistake in it and shows a traceback.
EXPECTED = (
    ConfigError,
    DataDirectoryError,
    StartError,
    KeyFileError,
    DirectoryBusy,
    CorruptStore,
    CorruptLog,
    StoreFull,
    SnapshotFailed,
    EngineFailed,
    SurveyError,
    DfsError,
    OSError,
)
# sysexits.h: EX_DATAERR and EX_CONFIG.
EXIT_DAMAGED, EXIT_CONFIG = 65, 78
DAMAGED = (CorruptStore, CorruptLog, DamagedIdentity, DamagedKey)

# A snapshot copies and verifies everything: minutes for very many files.
SNAPSHOT_SECONDS = 3600.0


class _RunByDefault(typer.core.TyperGroup):
    """``metaserver --config FILE`` is ``metaserver run --config FILE``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ("--help", "--version")):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_RunByDefault, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file; flags given besides win.")]
Data = Annotated[str | None, typer.Option(help="Data directory.")]
Listen = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where mounts connect to.")]
Http = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where chunkservers and `dfs` connect to.")]
KeyFile = Annotated[str | None, typer.Option(help="The cluster key; made if it does not exist.")]
Copies = Annotated[int | None, typer.Option(help="Copies of every chunk.")]
LogLevel = Annotated[str | None, typer.Option(help="debug, info, warning or error.")]


def fail(error: BaseException) -> typer.Exit:
    logs.complain(f"metaserver: {_text(error)}")
    damaged = isinstance(error, DAMAGED) or (isinstance(error, EngineFailed) and error.damaged)
    return typer.Exit(EXIT_DAMAGED if damaged else EXIT_CONFIG if isinstance(error, ConfigError) else 1)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"metaserver {VERSION}")
        raise typer.Exit


@app.callback()
def main_command(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Shows the version.")
    ] = False,
) -> None:
    """The metaserver of a cluster. Without a command it runs: see `metaserver run --help`."""


@app.command()
def run(
    config: ConfigFile = None,
    data: Data = None,
    listen: Listen = None,
    http: Http = None,
    key_file: KeyFile = None,
    copies: Copies = None,
    log_level: LogLevel = None,
) -> None:
    """Runs a metaserver until SIGTERM. The default: `metaserver --config FILE` is enough."""
    with _explained():
        settings = configs.load(config) if config is not None else Config()
        flags: dict[str, object] = {"data": data, "key_file": key_file, "copies": copies}
        if listen is not None:
            flags["listen_host"], flags["listen_port"] = configs.parse_address(listen, "--listen")
        if http is not None:
            flags["http_host"], flags["http_port"] = configs.parse_address(http, "--http")
        settings = configs.with_flags(settings, {name: value for name, value in flags.items() if value is not None})
        settings.check()
        level = log_level if log_level is not None else settings.log.level
        if level not in logs.LEVELS:
            raise ConfigError(f"log level {level!r} is not one of {', '.join(logs.LEVELS)}")
        logs.configure(level, settings.log.json)
        with _saying_where(settings.data):
            trio.run(serve_until_signal, settings)


@app.command()
def check(data: Data = None, config: ConfigFile = None) -> None:
    """Checks every invariant of a data directory; its metaserver must not be running (`dfs check` asks a running one).
    Exit code 1 if something is wrong."""
    with _explained():
        report = offline.check_directory(_directory(config, data))
    for problem in report.problems:
        print(f"{problem.table} {problem.key}: {problem.text}")
    print(f"{report.rows} rows checked in {report.seconds:.1f} s, {len(report.problems)} problems")
    if report.problems:
        raise typer.Exit(1)


@app.command()
def recover(
    data: Data = None,
    config: ConfigFile = None,
    accept_loss: Annotated[bool, typer.Option(help="Take what comes before the first damaged change.")] = False,
    advance: Annotated[bool, typer.Option(help="Make this state count as newer than what chunkservers saw.")] = False,
    seen_epoch: Annotated[int, typer.Option(min=0, help="With --advance: the highest epoch seen.")] = 0,
    seen_chunk: Annotated[int, typer.Option(min=0, help="With --advance: the highest chunk id seen.")] = 0,
) -> None:
    """Rebuilds a lost or damaged store from a snapshot file and the changelog; the metaserver must not be running."""
    with _explained():
        minimum = recovery.Minimum(seen_epoch, seen_chunk) if advance else None
        report = recovery.recover(_directory(config, data), accept_loss=accept_loss, minimum=minimum)
    for line in report.lines:
        print(line)
    print(f"recovered {report.position} with {report.changes} changes of the log in {report.seconds:.1f} s")


@app.command()
def rebuild(
    chunkserver: Annotated[
        list[str], typer.Option(metavar="HOST:PORT", help="A chunkserver; give every one there is.")
    ],
    data: Annotated[str | None, typer.Option(help="The new data directory: empty.")] = None,
    config: ConfigFile = None,
    key_file: Annotated[str | None, typer.Option(help="The cluster key, as the chunkservers have it.")] = None,
    copies: Copies = None,
    uid: Annotated[int, typer.Option(min=0, help="Owner of what is recovered.")] = 0,
    gid: Annotated[int, typer.Option(min=0, help="Its group.")] = 0,
    mode: Annotated[str, typer.Option(metavar="OCTAL", help="Its permissions.")] = "0600",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only says what would be found.")] = False,
) -> None:
    """The last resort, when store, changelog, snapshots and backups are all lost: makes a new metaserver from what the
    chunkservers have. Contents come back as /recovered/INODE; names, directories and owners do not. The chunkservers
    must be running."""
    with _explained():
        settings = configs.load(config) if config is not None else Config()
        flags = {"data": data, "key_file": key_file, "copies": copies}
        settings = configs.with_flags(settings, {name: value for name, value in flags.items() if value is not None})
        settings.check()
        key = load_key(settings.key_path)
        addresses = [configs.parse_address(address, "--chunkserver") for address in chunkserver]
        owner = rebuilding.Owner(uid, gid, _octal(mode))
        with _progress() as progress:
            if dry_run:
                with tempfile.TemporaryDirectory(prefix="dfs-rebuild-") as scratch:
                    report = trio.run(rebuilding.dry_run, Path(scratch), key, addresses, progress)
            else:

                async def build() -> RebuildReport:
                    return await rebuilding.rebuild(
                        settings.data_path, key, addresses, copies=settings.copies, owner=owner, progress=progress
                    )

                report = trio.run(build)
    for line in rebuilding.describe(report):
        print(line)


def _octal(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise ConfigError(f"--mode must be octal permissions such as 0600, not {text!r}")
    return mode


@contextmanager
def _progress() -> Iterator[rebuilding.Progress]:
    """What is being done, on a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("connecting") as status:
        yield status.update


@app.command()
def snapshot(data: Data = None, config: ConfigFile = None, http: Http = None, key_file: KeyFile = None) -> None:
    """Makes a snapshot file, by the running metaserver if there is one."""
    with _explained():
        directory = _directory(config, data)
        try:
            path = trio.run(_make_snapshot, directory)
        except DirectoryBusy:
            settings = configs.load(config) if config is not None else Config(data=str(directory))
            address = http or f"{settings.http_host}:{settings.http_port}"
            path = _ask_snapshot(address, Path(key_file) if key_file else settings.key_path)
    print(path)


def _directory(file: Path | None, data: str | None) -> Path:
    """The data directory to work on; it must be a metaserver's already."""
    config = configs.load(file) if file is not None else Config()
    config = configs.with_flags(config, {} if data is None else {"data": data})
    config.check()
    if identity.load(config.data_path) is None:
        raise DataDirectoryError(f"{config.data_path} is not a metaserver's data directory: check the path")
    return config.data_path


async def _make_snapshot(directory: Path) -> str:
    async with open_committer(directory) as committer:
        return str((await committer.snapshot()).path)


def _ask_snapshot(address: str, key_file: Path) -> str:
    headers = {"authorization": f"Bearer {load_key(key_file).http_token}"}
    try:
        answer = httpx.post(f"http://{address}/v1/snapshot", headers=headers, timeout=SNAPSHOT_SECONDS)
    except httpx.HTTPError as error:
        raise StartError(f"the running metaserver does not answer at {address} ({error}): give --http") from None
    body = answer.json()
    if answer.status_code != 200:
        raise StartError(f"the metaserver at {address} refuses: {body['text']}")
    return str(body["path"])


@contextmanager
def _saying_where(data: str) -> Iterator[None]:
    """Damage is explained with the command that mends it: this adds on what."""
    try:
        yield
    except* (CorruptStore, CorruptLog) as group:
        error = _first(group)
        error.args = (f"{error} --data {data}",)
        raise error from None


@contextmanager
def _explained() -> Iterator[None]:
    """Turns what an operator can mend into one line, also out of the exception groups of nurseries."""
    try:
        yield
    except EXPECTED as error:
        raise fail(error) from None
    except BaseExceptionGroup as group:
        found = _only_expected(group)
        if found is None:
            raise
        raise fail(found) from None


def _text(error: BaseException) -> str:
    return error.text if isinstance(error, DfsError) else str(error)


def _only_expected(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    """The expected failure that a nursery wrapped up, if nothing else is in there."""
    expected, rest = group.split(EXPECTED)
    return None if rest is not None or expected is None else _first(expected)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="metaserver")


if __name__ == "__main__":
    main()

"""The command line: `chunkserver --config FILE` or flags, and `chunkserver check --data DIR`."""

from pathlib import Path
from typing import Annotated

import trio
import typer

from chunkserver import check as checks
from chunkserver import config as configs
from chunkserver.config import Config, ConfigError, UnreadableConfig
from chunkserver.identity import DamagedIdentity, DataDirectoryError
from chunkserver.serve import StartError, serve_until_signal
from metaserver import logs
from metaserver.errors import DfsError, ErrorCode
from metaserver.key import ClusterKey, DamagedKey, KeyFileError, load_key
from metaserver.version import VERSION

# What ends the program with one line; anything else is a mistake in it and shows a traceback.
EXPECTED = (ConfigError, DataDirectoryError, StartError, KeyFileError, DfsError)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


# As the metaserver's: what stays so until somebody does something about it. systemd does not start it again then.
EXIT_DAMAGED, EXIT_CONFIG = 65, 78


def fail(error: Exception, key_file: str = "") -> typer.Exit:
    """One line on standard error, and how to end: 1 if it may go better the next time."""
    text = error.text if isinstance(error, DfsError) else str(error)
    if isinstance(error, DfsError) and error.code is ErrorCode.BAD_KEY:
        text = f"the metaserver does not accept the cluster key {key_file}: copy the one it has here"
    logs.complain(f"chunkserver: {text}")
    if isinstance(error, DamagedIdentity | DamagedKey):
        return typer.Exit(EXIT_DAMAGED)
    wrong = isinstance(error, ConfigError) and not isinstance(error, UnreadableConfig)
    return typer.Exit(EXIT_CONFIG if wrong else 1)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"chunkserver {VERSION}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Shows the version.")
    ] = False,
    config: Annotated[Path | None, typer.Option(help="TOML file; flags given besides win.")] = None,
    data: Annotated[str | None, typer.Option(help="Data directory, on a disk of its own.")] = None,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT of the data plane.")] = None,
    http: Annotated[str | None, typer.Option(help="HOST:PORT of health and metrics.")] = None,
    advertise: Annotated[str | None, typer.Option(help="Host under which others reach this one.")] = None,
    metaserver: Annotated[
        list[str] | None, typer.Option(help="HOST:PORT of the metaserver's HTTP; repeatable.")
    ] = None,
    key_file: Annotated[str | None, typer.Option(help="The cluster key, copied from the metaserver.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of this server.")] = None,
    rack: Annotated[str | None, typer.Option(help="Label of what fails together.")] = None,
    reserve_bytes: Annotated[int | None, typer.Option(help="Space kept free.")] = None,
    scrub_days: Annotated[
        float | None, typer.Option(help="Everything is read back once in so many days; 0: only by `dfs scrub`.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Runs a chunkserver until SIGTERM."""
    if context.invoked_subcommand is not None:
        return
    flags = {
        "data": data,
        "listen": listen,
        "http": http,
        "advertise": advertise,
        "metaserver": metaserver or None,
        "key_file": key_file,
        "name": name,
        "rack": rack,
        "reserve_bytes": reserve_bytes,
        "scrub_days": scrub_days,
        "log_level": log_level,
    }
    configuration: Config | None = None
    try:
        configuration = _configuration(config, {flag: value for flag, value in flags.items() if value is not None})
        _serve(configuration)
    except EXPECTED as error:
        raise fail(error, _key_file(configuration)) from None
    except BaseExceptionGroup as group:
        expected = _only_expected(group)
        if expected is None:
            raise
        raise fail(expected, _key_file(configuration)) from None


def _key_file(config: Config | None) -> str:
    return "" if config is None else config.key_file


def _configuration(file: Path | None, flags: dict[str, object]) -> Config:
    values = configs.read_file(file) if file is not None else {}
    return configs.make({**values, **flags}, str(file) if file is not None else "command line")


def _serve(config: Config) -> None:
    logs.configure(config.log_level, config.log_json)
    key: ClusterKey | None = load_key(Path(config.key_file)) if config.key_file else None
    trio.run(serve_until_signal, config, key)


def _only_expected(group: BaseExceptionGroup[BaseException]) -> Exception | None:
    """The expected failure that a nursery wrapped up, if nothing else is in there."""
    expected, rest = group.split(EXPECTED)
    if rest is not None or expected is None:
        return None
    found: BaseException = expected
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, Exception)
    return found


@app.command()
def check(
    data: Annotated[str, typer.Option(help="Data directory; its chunkserver must not be running.")],
    power_cut: Annotated[bool, typer.Option(help="Unsealed chunks may lack what was never synced.")] = False,
) -> None:
    """Verifies every chunk of a data directory; exit code 1 if something is wrong."""
    try:
        report = checks.check_directory(data, power_cut=power_cut)
    except DataDirectoryError as error:
        raise fail(error) from None
    for problem in report.problems:
        print(f"{problem.key}: {problem.text}")
    print(f"{report.rows} chunks checked in {report.seconds:.1f} s, {len(report.problems)} problems")
    if report.problems:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="chunkserver")

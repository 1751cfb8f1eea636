"""The command line: ``metaserver [run] --config FILE`` or flags; ``metaserver recover``, ``check``, ``snapshot``.

Every failure an operator can meet is one line on standard error and exit code 1.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import trio
import typer

from metaserver import config as configs
from metaserver import logs
from metaserver.commit import EngineFailed
from metaserver.config import Config, ConfigError
from metaserver.errors import DfsError
from metaserver.identity import DataDirectoryError
from metaserver.key import KeyFileError
from metaserver.replay import CorruptLog
from metaserver.serve import StartError, serve_until_signal
from metaserver.start import DirectoryBusy
from metaserver.store import CorruptStore

# What ends the program with one line; anything else is a mistake in it and shows a traceback.
EXPECTED = (
    ConfigError,
    DataDirectoryError,
    StartError,
    KeyFileError,
    DirectoryBusy,
    CorruptStore,
    CorruptLog,
    EngineFailed,
    DfsError,
    OSError,
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file; flags given besides win.")]
Data = Annotated[str | None, typer.Option(help="Data directory.")]
Listen = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where mounts connect to.")]
Http = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where chunkservers and `dfs` connect to.")]
KeyFile = Annotated[str | None, typer.Option(help="The cluster key; made if it does not exist.")]
Copies = Annotated[int | None, typer.Option(help="Copies of every chunk.")]
LogLevel = Annotated[str | None, typer.Option(help="debug, info, warning or error.")]


def fail(text: str) -> typer.Exit:
    print(f"metaserver: {text}", file=sys.stderr)
    return typer.Exit(1)


@app.callback(invoke_without_command=True)
def main_command(
    context: typer.Context,
    config: ConfigFile = None,
    data: Data = None,
    listen: Listen = None,
    http: Http = None,
    key_file: KeyFile = None,
    copies: Copies = None,
    log_level: LogLevel = None,
) -> None:
    """Runs a metaserver until SIGTERM."""
    if context.invoked_subcommand is None:
        _run(config, data, listen, http, key_file, copies, log_level)


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
    """Runs a metaserver until SIGTERM."""
    _run(config, data, listen, http, key_file, copies, log_level)


def _run(
    file: Path | None,
    data: str | None,
    listen: str | None,
    http: str | None,
    key_file: str | None,
    copies: int | None,
    log_level: str | None,
) -> None:
    with _explained():
        config = configs.load(file) if file is not None else Config()
        flags: dict[str, object] = {"data": data, "key_file": key_file, "copies": copies}
        if listen is not None:
            flags["listen_host"], flags["listen_port"] = configs.parse_address(listen, "--listen")
        if http is not None:
            flags["http_host"], flags["http_port"] = configs.parse_address(http, "--http")
        config = configs.with_flags(config, {name: value for name, value in flags.items() if value is not None})
        config.check()
        level = log_level if log_level is not None else config.log.level
        if level not in logs.LEVELS:
            raise ConfigError(f"log level {level!r} is not one of {', '.join(logs.LEVELS)}")
        logs.configure(level, config.log.json)
        trio.run(serve_until_signal, config)


@contextmanager
def _explained() -> Iterator[None]:
    """Turns what an operator can mend into one line, also out of the exception groups of nurseries."""
    try:
        yield
    except EXPECTED as error:
        raise fail(_text(error)) from None
    except BaseExceptionGroup as group:
        found = _only_expected(group)
        if found is None:
            raise
        raise fail(_text(found)) from None


def _text(error: BaseException) -> str:
    return error.text if isinstance(error, DfsError) else str(error)


def _only_expected(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    """The expected failure that a nursery wrapped up, if nothing else is in there."""
    expected, rest = group.split(EXPECTED)
    if rest is not None:
        return None
    found: BaseException | None = expected
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="metaserver")


if __name__ == "__main__":
    main()

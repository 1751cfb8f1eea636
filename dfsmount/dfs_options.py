"""What the commands of `dfs` have in common: options, finding the cluster, and saying things."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dfsmount.dfs_find import Access

Data = Annotated[str, typer.Option("--data", metavar="DIR", help="Data directory of a cluster that `dfs up` started.")]
Metaserver = Annotated[
    str, typer.Option("--metaserver", metavar="HOST:HTTPPORT", help="The metaserver's HTTP address, instead of --data.")
]
KeyFile = Annotated[
    str, typer.Option("--key-file", metavar="FILE", help="The cluster key for --metaserver (/etc/dfs/cluster.key).")
]


def _server_names(incomplete: str) -> list[str]:
    from dfsmount import dfs_completion

    return dfs_completion.server_names(incomplete)


Server = Annotated[
    str,
    typer.Argument(
        metavar="SERVER", help="Name or number of a chunkserver, see `dfs status`.", autocompletion=_server_names
    ),
]
Servers = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SERVER]...", help="Names; default: all.", autocompletion=_server_names),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def find(data: str, metaserver: str, key_file: str, file: Path | None = None) -> "Access":
    from dfsmount import dfs_find

    return dfs_find.find(dfs_find.Choice(data, metaserver, key_file), file)


def say(line: str) -> None:
    """Progress and results, at once: a person or a script may be watching.

    Whoever read them may have left (`dfs up ... | head -1`): that is no reason to stop half-way.
    """
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def end(found: object, lines: Iterable[str], *, clean: bool, as_json: bool) -> None:
    """Says what a command that looks for damage has found; exit code 1 unless it is ``clean``."""
    if as_json:
        print_json(found)
    else:
        for line in lines:
            say(line)
    if not clean:
        raise typer.Exit(1)


def print_json(value: object) -> None:
    import msgspec

    say(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())

"""`dfs man`: shows or writes the manual pages that ``dfs_man`` makes."""

import subprocess
import sys
import time
from pathlib import Path

from typer._click import Context
from typer.core import TyperGroup

from dfsmount import dfs_man
from dfsmount.dfs_layout import Problem
from metaserver.version import VERSION

DESCRIPTION = "a replicated distributed filesystem: the command for those who run it"


def pages(root: Context) -> dict[str, str]:
    """Every page by the name of its file; ``root`` is the context of `dfs` itself."""
    group = root.command
    assert isinstance(group, TyperGroup)
    date = time.strftime("%Y-%m-%d")
    made = {"dfs.1": dfs_man.overview(group, DESCRIPTION, date, VERSION)}
    for name, command in dfs_man.commands(group).items():
        own = Context(command, info_name=name, parent=root)
        made[f"{dfs_man.page_name(name)}.1"] = dfs_man.page(name, command, own, date, VERSION)
    return made


def write(root: Context, directory: Path) -> list[Path]:
    """Writes all pages into a directory, which is made if it is missing."""
    written = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in pages(root).items():
            (directory / name).write_text(text, encoding="utf-8")
            written.append(directory / name)
    except OSError as error:
        raise Problem(f"cannot write {error.filename}: {error.strerror}") from None
    return written


def show(root: Context, verb: str) -> None:
    """One page: through man(1) on a terminal, else its source."""
    text = pages(root).get(f"{dfs_man.page_name(verb)}.1")
    if text is None:
        raise Problem(f"there is no command {verb!r}: `dfs --help` lists them")
    if sys.stdout.isatty():
        try:
            subprocess.run(["man", "-l", "-"], input=text.encode(), check=False)
        except FileNotFoundError:
            pass
        else:
            return
    print(text, end="", flush=True)

"""The commands of `dfs` about the host it runs on: what a shell and `man` know of it, and units of systemd.

Everything but Typer is imported when a command runs.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dfsmount.dfs_options import say


class Shell(StrEnum):
    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(shell: Annotated[Shell, typer.Argument(help="For which shell.")]) -> None:
    """Print what a shell needs to complete `dfs` commands.

    Options are completed, and where a running cluster answers at once also the names of its servers. `dfs
    install-units` puts it where the shells of all users find it.

    \b
    Example:
      dfs completion bash > ~/.local/share/bash-completion/completions/dfs
      dfs completion zsh > ~/.zfunc/_dfs          # with fpath+=~/.zfunc before compinit in ~/.zshrc
      dfs completion fish > ~/.config/fish/completions/dfs.fish
    """
    from dfsmount import dfs_completion

    say(dfs_completion.script(shell.value))


def man(
    context: typer.Context,
    verb: Annotated[str, typer.Argument(metavar="[COMMAND]", help="Of which command; default: of all of them.")] = "",
    output: Annotated[
        str, typer.Option("--output", metavar="DIR", help="Write all pages there instead (dfs.1, dfs-up.1, ...).")
    ] = "",
) -> None:
    """Show the manual page of a command.

    It is made from the same text as --help. Not on a terminal, the page is printed as man(7) source. `dfs
    install-units` installs all pages, so that `man dfs-drain` finds them.

    \b
    Example:
      dfs man drain
      dfs man --output ~/.local/share/man/man1
    """
    from dfsmount import dfs_pages

    if output:
        written = dfs_pages.write(context.find_root(), Path(output))
        say(f"{len(written)} pages are in {output}.")
    else:
        dfs_pages.show(context.find_root(), verb)


def add_to(app: typer.Typer) -> None:
    """Makes these commands part of `dfs`."""
    for command in (completion, man):
        app.command()(command)

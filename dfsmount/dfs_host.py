"""The commands of `dfs` about the host it runs on: what a shell and `man` know of it, and units of systemd.

Everything but Typer is imported when a command runs.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dfsmount.dfs_options import AsJson, print_json, say


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


def install_units(
    context: typer.Context,
    root: Annotated[
        str, typer.Option("--root", metavar="DIR", help="Install below this directory: the root of another system.")
    ] = "/",
    programs: Annotated[
        str, typer.Option("--programs", metavar="DIR", help="Where the programs are there (default: beside this one).")
    ] = "",
    remove: Annotated[
        bool, typer.Option("--remove", help="Take away what was installed; configuration stays.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Install units for systemd, and what belongs to them.

    Units in /etc/systemd/system; the user dfs and the directories of the servers (sysusers.d, tmpfiles.d); examples of
    configuration files in /etc/dfs/examples; links to the programs in /usr/local/bin, and in /sbin what mount(8) calls
    for lines of type dfs in /etc/fstab; manual pages, and completion for bash, zsh and fish. Nothing is started. Run it
    again after an update: it changes what differs. Changes of your own belong into drop-ins (systemctl edit).

    \b
    Example:
      dfs install-units
      dfs install-units --root /srv/image --programs /opt/dfs/.venv/bin
      systemctl enable --now metaserver
    """
    from dfsmount import dfs_pages, dfs_units

    dfs_units.require_units(dfs_units.CHECKOUT)
    target = Path(root).absolute()
    there = programs or str(dfs_units.own_programs())
    dfs_units.check_visible(there)
    items = dfs_units.plan(dfs_units.CHECKOUT, there, dfs_pages.pages(context.find_root()))
    if remove:
        removed = dfs_units.remove(items, target)
        print_json({"removed": removed}) if as_json else say(f"{len(removed)} files were removed.")
        return
    installed = dfs_units.install(items, target)
    troubles = dfs_units.settle(target)
    if as_json:
        print_json({"files": installed.files, "changed": installed.changed, "troubles": troubles})
    else:
        for line in dfs_units.lines(installed, target, troubles):
            say(line)
    if troubles:
        raise typer.Exit(1)


def add_to(app: typer.Typer) -> None:
    """Makes these commands part of `dfs`."""
    for command in (completion, man):
        app.command()(command)
    app.command("install-units")(install_units)

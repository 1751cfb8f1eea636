"""The commands of `dfs` that change a running cluster: servers, where data is, and how many copies there are of it.

Everything but Typer is imported when a command runs.
"""

from pathlib import Path
from typing import Annotated

import typer

from dfsmount.dfs_options import AsJson, Data, KeyFile, Metaserver, Server, find, print_json, say

Paths = Annotated[list[Path], typer.Argument(metavar="PATH...", help="Files or directories on a mount.")]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Begin, and do not wait for the end.")]


def drain(
    server: Server,
    force: Annotated[bool, typer.Option("--force", help="Begin although not everything can go elsewhere.")] = False,
    no_wait: NoWait = False,
    data: Data = "",
    metaserver: Metaserver = "",
    key_file: KeyFile = "",
    as_json: AsJson = False,
) -> None:
    """Empty a chunkserver, so that it can be switched off.

    Everything on it is copied to others first; files stay readable and writable. Ends when nothing is left there.
    Interrupting it leaves the server being emptied: `dfs undrain` takes that back.

    \b
    Example:
      dfs drain storage2
      dfs drain storage2 --no-wait ; dfs status
    """
    from dfsmount import dfs_servers
    from dfsmount.dfs_api import Api

    with Api(find(data, metaserver, key_file)) as api:
        planned = api.drain(server, force=force)
        if not as_json:
            say(f"{planned.text}.")
        done = planned if no_wait else dfs_servers.wait_empty(api, planned, quiet=as_json)
    if as_json:
        print_json(done)
    elif not no_wait:
        say(f"{done.text}.")


def undrain(
    server: Server, data: Data = "", metaserver: Metaserver = "", key_file: KeyFile = "", as_json: AsJson = False
) -> None:
    """Stop emptying a chunkserver: it takes data again.

    \b
    Example:
      dfs undrain storage2
    """
    from dfsmount.dfs_api import Api

    with Api(find(data, metaserver, key_file)) as api:
        planned = api.undrain(server)
    print_json(planned) if as_json else say(f"{planned.text}.")


def remove(
    server: Server,
    lose: Annotated[
        bool, typer.Option("--lose-data", help="Although it has the only copy of something, which is lost by this.")
    ] = False,
    data: Data = "",
    metaserver: Metaserver = "",
    key_file: KeyFile = "",
    as_json: AsJson = False,
) -> None:
    """Forget a chunkserver that is switched off for good.

    It must be empty (`dfs drain`), or LOST. If it comes back it is taken in as a new one.

    \b
    Example:
      dfs drain storage2 && dfs remove storage2
    """
    from dfsmount.dfs_api import Api

    with Api(find(data, metaserver, key_file)) as api:
        planned = api.remove(server, lose=lose)
    print_json(planned) if as_json else say(f"{planned.text}.")


def rebalance(
    status: Annotated[bool, typer.Option("--status", help="Show how even it is, and whether something moves.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Begin no more moves, not by itself either.")] = False,
    no_wait: NoWait = False,
    data: Data = "",
    metaserver: Metaserver = "",
    key_file: KeyFile = "",
    as_json: AsJson = False,
) -> None:
    """Move data from the fullest chunkservers to the emptiest.

    Ends when they differ by a few percent. It happens by itself, slowly, when they differ much (rebalance_threshold in
    metaserver.toml). Interrupting it lets it go on in the background.

    \b
    Example:
      dfs rebalance
      dfs rebalance --status --json
    """
    from dfsmount import dfs_servers
    from dfsmount.dfs_api import Api
    from dfsmount.dfs_layout import Problem

    if status and stop:
        raise Problem("give --status or --stop, not both")
    with Api(find(data, metaserver, key_file)) as api:
        shown = api.rebalance_status() if status else api.rebalance(stop=stop)
        if not (status or stop or no_wait):
            shown = dfs_servers.wait_even(api, quiet=as_json)
    print_json(shown) if as_json else say(dfs_servers.rebalance_text(shown))


def set_copies(
    number: Annotated[str, typer.Argument(metavar="N", help="A number, or `default` for the cluster's.")],
    paths: Paths,
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Directories with all below them; this is what is done anyway.")
    ] = True,
    data: Data = "",
    metaserver: Metaserver = "",
    key_file: KeyFile = "",
    as_json: AsJson = False,
) -> None:
    """Set how many copies there are to be of files, and of all below directories.

    What is stored already is copied, or copies are deleted, in the background (`dfs status`). What is made in a
    directory later takes over its number; what is moved there keeps its own.

    \b
    Example:
      dfs set-copies 3 /mnt/dfs/contracts
      dfs set-copies default /mnt/dfs/contracts
    """
    from dfsmount import dfs_copies

    copies = dfs_copies.parse(number)
    shown = dfs_copies.each(paths, lambda path: find(data, metaserver, key_file, path), copies)
    if as_json:
        print_json(shown)
        return
    for path in shown:
        say(f"{path.path}: {dfs_copies.wanted(path)} from now on; the data it has now follows in the background.")


def get_copies(
    paths: Paths, data: Data = "", metaserver: Metaserver = "", key_file: KeyFile = "", as_json: AsJson = False
) -> None:
    """Show how many copies there are to be of files and directories.

    \b
    Example:
      dfs get-copies /mnt/dfs/contracts /mnt/dfs/scratch
    """
    from dfsmount import dfs_copies

    shown = dfs_copies.each(paths, lambda path: find(data, metaserver, key_file, path), None)
    if as_json:
        print_json(shown)
        return
    for path in shown:
        say(f"{path.path}: {dfs_copies.wanted(path)}")
    if any(path.setting for path in shown):
        say("Some tree is still being given another number of copies.")


def add_to(app: typer.Typer) -> None:
    """Makes these commands part of `dfs`."""
    for command in (drain, undrain, remove, rebalance):
        app.command()(command)
    app.command("set-copies")(set_copies)
    app.command("get-copies")(get_copies)

"""The commands of `dfs` about space: what trees take up, and quotas.

Everything but Typer is imported when a command runs.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfsmount.dfs_options import AsJson, Data, KeyFile, Metaserver, find, print_json, say

if TYPE_CHECKING:
    from dfsmount.dfs_trees import PathQuota

Paths = Annotated[list[Path], typer.Argument(metavar="PATH...", help="Files or directories on a mount.")]
Trees = Annotated[list[Path], typer.Argument(metavar="DIR...", help="Directories on a mount.")]

quota_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Limit what directory trees take up.")


def du(
    paths: Paths,
    exact: Annotated[bool, typer.Option("--bytes", "-b", help="Exact numbers of bytes.")] = False,
    data: Data = "",
    metaserver: Metaserver = "",
    key_file: KeyFile = "",
    as_json: AsJson = False,
) -> None:
    """Show what directory trees take up, at once, however large they are.

    Bytes that have data (as du -s), apparent size, files and directories, the tree's own included. A file with several
    names counts once, in the directory of the first. The metaserver keeps these sums; nothing is walked through.

    \b
    Example:
      dfs du /mnt/dfs/projects
      dfs du --json /mnt/dfs/*
    """
    from dfsmount import dfs_trees

    shown = dfs_trees.trees(paths, lambda path: find(data, metaserver, key_file, path))
    if as_json:
        print_json(shown)
        return
    columns = ("Bytes", "Apparent size", "Files", "Directories", "Path")
    _print(columns, [dfs_trees.tree_cells(each, exact=exact) for each in shown], columns[:-1])


def df(
    path: Annotated[
        Path | None, typer.Argument(metavar="[PATH]", help="Of which cluster: a path on its mount.")
    ] = None,
    data: Data = "",
    metaserver: Metaserver = "",
    key_file: KeyFile = "",
    as_json: AsJson = False,
) -> None:
    """Show the space of the cluster, and of each tree with a quota of bytes.

    What is free is what can be stored at the cluster's number of copies.

    \b
    Example:
      dfs df
      dfs df /mnt/dfs --json
    """
    from dfsmount import dfs_trees
    from dfsmount.dfs_api import Api
    from dfsmount.dfs_chunks import resolve

    with Api(find(data, metaserver, key_file, None if path is None else resolve(path))) as api:
        status, quotas = api.status(), api.quotas()
    if as_json:
        print_json({"total": status.total, "free": status.free, "inodes": status.inodes, "quotas": quotas})
        return
    columns = ("Size", "Used", "Free", "Use", "Tree")
    _print(columns, dfs_trees.df_cells(status, quotas), columns[:-1])


@quota_app.command("set")
def quota_set(
    paths: Trees,
    size: Annotated[str, typer.Option("--bytes", metavar="SIZE", help="Hard limit: 500M, 2T, `none`.")] = "",
    count: Annotated[str, typer.Option("--inodes", metavar="N", help="Of files and directories: 10000, `none`.")] = "",
    soft_size: Annotated[str, typer.Option("--soft-bytes", metavar="SIZE", help="May be passed for a while.")] = "",
    soft_count: Annotated[str, typer.Option("--soft-inodes", metavar="N", help="May be passed for a while.")] = "",
    grace: Annotated[str, typer.Option(metavar="TIME", help="For so long: 12h, 7d (what it is at first).")] = "",
    data: Data = "",
    metaserver: Metaserver = "",
    key_file: KeyFile = "",
    as_json: AsJson = False,
) -> None:
    """Limit the bytes, or the number of files and directories, in directories and all below them.

    Who would pass a hard limit gets EDQUOT ("Disk quota exceeded") when writing or creating; root as well. A soft limit
    may be passed for the grace time. Bytes are those of files, whatever the number of copies; what was deleted and is
    in the trash does not count. What is not given stays as it is. Files cannot be renamed or linked from one tree into
    another with another quota (mv copies them).

    \b
    Example:
      dfs quota set --bytes 500G --soft-bytes 450G /mnt/dfs/projects
      dfs quota set --inodes 1M --grace 3d /mnt/dfs/mail
    """
    from dfsmount import dfs_trees

    told = dfs_trees.limits(size, soft_size, count, soft_count, grace)
    shown = dfs_trees.quotas(
        paths, lambda path: find(data, metaserver, key_file, path), lambda api, ino: api.set_quota(ino, told)
    )
    if as_json:
        print_json(shown)
        return
    for each in shown:
        for line in dfs_trees.set_text(each.path, each.quota):
            say(line)


@quota_app.command("get")
def quota_get(
    paths: Trees, data: Data = "", metaserver: Metaserver = "", key_file: KeyFile = "", as_json: AsJson = False
) -> None:
    """Show the quotas of directories, and what is used of them.

    \b
    Example:
      dfs quota get /mnt/dfs/projects
    """
    from dfsmount import dfs_trees

    shown = dfs_trees.quotas(
        paths, lambda path: find(data, metaserver, key_file, path), lambda api, ino: api.quota(ino)
    )
    _show(shown, as_json=as_json)


@quota_app.command("list")
def quota_list(data: Data = "", metaserver: Metaserver = "", key_file: KeyFile = "", as_json: AsJson = False) -> None:
    """Show all quotas, and what is used of them.

    \b
    Example:
      dfs quota list
      dfs quota list --json
    """
    from dfsmount.dfs_api import Api
    from dfsmount.dfs_trees import PathQuota

    with Api(find(data, metaserver, key_file)) as api:
        quotas = api.quotas()
    if as_json:
        print_json(quotas)
    elif not quotas:
        say("There are no quotas: `dfs quota set --help` says how to set one.")
    else:
        _show([PathQuota(quota.path, quota) for quota in quotas], as_json=False)


@quota_app.command("remove")
def quota_remove(
    paths: Trees, data: Data = "", metaserver: Metaserver = "", key_file: KeyFile = "", as_json: AsJson = False
) -> None:
    """Remove the quotas of directories; nothing else happens to them.

    \b
    Example:
      dfs quota remove /mnt/dfs/projects
    """
    from dfsmount import dfs_trees

    shown = dfs_trees.quotas(
        paths, lambda path: find(data, metaserver, key_file, path), lambda api, ino: api.remove_quota(ino)
    )
    if as_json:
        print_json(shown)
        return
    for each in shown:
        say(f"{each.path}: no quota any more.")


def _show(shown: "list[PathQuota]", *, as_json: bool) -> None:
    from dfsmount import dfs_trees

    if as_json:
        print_json(shown)
        return
    columns = ("Tree", "Used", "Limit", "Inodes", "Limit", "State")
    _print(columns, [dfs_trees.quota_cells(each.path, each.quota) for each in shown], ("Used", "Inodes"))


def _print(columns: tuple[str, ...], rows: list[tuple[str, ...]], right: tuple[str, ...]) -> None:
    from dfsmount import dfs_show

    dfs_show.print_table(dfs_show.table(columns, rows, right))


def add_to(app: typer.Typer) -> None:
    """Makes these commands part of `dfs`."""
    app.command()(du)
    app.command()(df)
    app.add_typer(quota_app, name="quota")

"""`dfs trash`: what was deleted is kept for a while, and can be listed, restored, and given up.

Everything but Typer is imported when a command runs.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfsmount.dfs_options import AsJson, Data, KeyFile, Metaserver, find, print_json, say

if TYPE_CHECKING:
    from dfsmount.dfs_find import Access

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, restore and give up what was deleted.")

Below = Annotated[
    str, typer.Argument(metavar="[PATH]", help="On a mount: only what was deleted from there; default: everything.")
]


@app.command("list")
def list_(
    path: Below = "", data: Data = "", metaserver: Metaserver = "", key_file: KeyFile = "", as_json: AsJson = False
) -> None:
    """List what was deleted and is still kept.

    What goes first comes first. Each deletion is an entry of its own: a file that was deleted or replaced several times
    has several. Directories are listed if something that was in them is kept.

    \b
    Example:
      dfs trash list
      dfs trash list /mnt/dfs/project --json
    """
    from dfsmount import dfs_deleted
    from dfsmount.dfs_api import Api
    from dfsmount.dfs_show import console

    access, below = _where(path, data, metaserver, key_file)
    with Api(access) as api:
        found = list(dfs_deleted.entries(api, below))
    if as_json:
        print_json(found)
    elif found:
        console().print(dfs_deleted.shown(found))
        say(dfs_deleted.summary(found))
    else:
        say("Nothing that was deleted is kept here.")


@app.command()
def restore(
    what: Annotated[
        list[str], typer.Argument(metavar="PATH|ID...", help="Where it was, or its number in `dfs trash list`.")
    ],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DST", help="Another name, or a directory to put it into.")
    ] = None,
    data: Data = "",
    metaserver: Metaserver = "",
    key_file: KeyFile = "",
    as_json: AsJson = False,
) -> None:
    """Restore what was deleted.

    By its path: the newest of what was deleted there, or all that was deleted from that directory. By its number: that
    one. Directories that are gone are made again with their modes and owners. Nothing is overwritten: where something
    has the name now, it is not restored, and the exit code is 1.

    \b
    Example:
      dfs trash restore /mnt/dfs/report.odt
      dfs trash restore /mnt/dfs/project
      dfs trash restore 1234 --to /mnt/dfs/report-of-yesterday.odt
    """
    from dfsmount import dfs_deleted
    from dfsmount.dfs_layout import Problem

    if to is not None and len(what) > 1:
        raise Problem("--to gives one thing another name: restore the others without it")

    def cluster(path: Path | None) -> "Access":
        return find(data, metaserver, key_file, path)

    results = [dfs_deleted.restore(one, to, cluster, quiet=as_json) for one in what]
    failed = [one for result in results for one in result.failed]
    if as_json:
        print_json(results)
    else:
        for line in (line for result in results for line in dfs_deleted.result_lines(result)):
            say(line)
        for one in failed:
            print(f"dfs: {dfs_deleted.failure_text(one)}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


@app.command()
def empty(
    path: Below = "",
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="TIME", help="Only what was deleted so long ago: 90s, 15m, 24h, 7d.")
    ] = "0",
    data: Data = "",
    metaserver: Metaserver = "",
    key_file: KeyFile = "",
    as_json: AsJson = False,
) -> None:
    """Give up what was deleted, for good.

    There is no need to: it goes by itself when its time is over, and at once when the disks need the space. Ctrl-C ends
    it in between.

    \b
    Example:
      dfs trash empty /mnt/dfs/scratch
      dfs trash empty --older-than 2h
    """
    from dfsmount import dfs_deleted
    from dfsmount.dfs_api import Api
    from metaserver.words import bytes_text, count_text

    seconds = dfs_deleted.duration(older_than)
    access, below = _where(path, data, metaserver, key_file)
    with Api(access) as api:
        done = dfs_deleted.empty(api, below, seconds, quiet=as_json)
    if as_json:
        print_json({"files": done.files, "bytes": done.bytes})
    else:
        say(f"{count_text(done.files, 'deleted file')} with {bytes_text(done.bytes)} given up.")


def _where(path: str, data: str, metaserver: str, key_file: str) -> "tuple[Access, str]":
    """The cluster, and the path in it ("": all)."""
    from dfsmount import dfs_deleted, dfs_paths

    if not path:
        return find(data, metaserver, key_file, dfs_deleted.here()), ""
    place = dfs_paths.on_cluster(Path(path), lambda local: find(data, metaserver, key_file, local))
    return place.access, place.path

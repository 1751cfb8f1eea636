"""The commands of `dfs` that look closer, measure, and put a metaserver back: ls, gc, bench, snapshot-metadata,
recover, rebuild.

Everything but Typer is imported when a command runs.
"""

import re
from pathlib import Path
from typing import Annotated

import typer

from dfsmount.dfs_options import AsJson, Data, KeyFile, Metaserver, find, print_json, say

Config = Annotated[
    str, typer.Option("--config", metavar="FILE", help="The metaserver's configuration (/etc/dfs/metaserver.toml).")
]
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30}


def ls(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Files or directories on a mount.")],
    itself: Annotated[
        bool, typer.Option("--directory", "-d", help="Show directories themselves, not what is in them.")
    ] = False,
    data: Data = "",
    metaserver: Metaserver = "",
    key_file: KeyFile = "",
    as_json: AsJson = False,
) -> None:
    """List files with what `ls` cannot show: their copies, and the state of their chunks.

    COPIES is the number of good copies on servers that are up, of the chunk that has the fewest; WANTED how many there
    are to be (with ! if that was set for this file or directory, not taken from the cluster's default); STORED what the
    file takes up at one copy. Exit code 1 if a file has chunks without any good copy.

    \b
    Example:
      dfs ls /mnt/dfs/contracts
      dfs ls -d /mnt/dfs/contracts /mnt/dfs/scratch
      dfs ls /mnt/dfs --json > listing.json
    """
    from dfsmount import dfs_ls

    found = dfs_ls.look(paths, lambda path: find(data, metaserver, key_file, path), itself=itself)
    print_json(found) if as_json else dfs_ls.show(found)
    if dfs_ls.bad(found):
        raise typer.Exit(1)


def gc(
    now: Annotated[
        bool, typer.Option("--now", help="Delete what may be deleted, without waiting for its grace.")
    ] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="With --now: begin, and do not wait for the end.")] = False,
    data: Data = "",
    metaserver: Metaserver = "",
    key_file: KeyFile = "",
    as_json: AsJson = False,
) -> None:
    """Show what garbage there is, and collect it.

    Garbage goes by itself: chunks that nothing refers to after a grace (delete_grace_seconds, ten minutes), which is
    there for a metaserver put back to an earlier state; files without a name when the last program closes them;
    replicas that nobody knows after the same grace; chunks that are mostly dead are rewritten. With --now, the first
    kind goes at once.

    \b
    Example:
      dfs gc
      dfs gc --now
    """
    from dfsmount import dfs_gc
    from dfsmount.dfs_api import Api
    from dfsmount.dfs_layout import Problem

    if no_wait and not now:
        raise Problem("--no-wait belongs to --now")
    with Api(find(data, metaserver, key_file)) as api:
        began = api.garbage(collect=now)
        left = dfs_gc.wait_gone(api, began, quiet=as_json) if now and not no_wait else began
    if as_json:
        print_json({"found": began, "left": left} if now else began)
        return
    if now and not no_wait:
        say(dfs_gc.freed(began, left))
    for line in dfs_gc.lines(left):
        say(line)


def bench(
    mount: Annotated[Path, typer.Argument(metavar="MOUNT", help="A mount, or a directory on one (or elsewhere).")],
    size: Annotated[str, typer.Option("--size", metavar="SIZE", help="Of the large file: 64M, 1G, ...")] = "256M",
    files: Annotated[int, typer.Option("--files", min=10, max=1_000_000, help="How many small files.")] = 500,
    as_json: AsJson = False,
) -> None:
    """Measure a mount: writing, reading, small files, fsync, names.

    Writes include their fsync; before data is read, the kernel is told to forget it. One process, one thing after
    another, in a directory of its own that is removed at the end. Compare with a local directory on the same machine:
    figures of a moment say little by themselves.

    \b
    Example:
      dfs bench /mnt/dfs
      dfs bench /mnt/dfs --size 1G --files 3000 --json > today.json
      dfs bench /var/tmp
    """
    from dfsmount import dfs_bench
    from dfsmount.dfs_servers import progress_bar

    match = re.fullmatch("([0-9]{1,9})([KMG]?)", size.upper())
    size_bytes = int(match[1]) << _UNITS[match[2]] if match else 0
    if not dfs_bench.BLOCK_BYTES <= size_bytes <= 1 << 40:
        from dfsmount.dfs_layout import Problem

        raise Problem(f"--size {size}: a size such as 64M or 1G, from 1M to 1024G")
    with progress_bar(quiet=as_json) as show:
        result = dfs_bench.run(mount.absolute(), size_bytes, files, show)
    if as_json:
        print_json(result)
        return
    say(f"{result.path} ({result.source or 'not a mount'}):")
    for line in dfs_bench.lines(result):
        say(line)


def snapshot_metadata(
    data: Data = "", metaserver: Metaserver = "", key_file: KeyFile = "", as_json: AsJson = False
) -> None:
    """Have the metaserver write a snapshot file of all metadata now.

    It does so by itself now and then, and keeps the two newest; they are on the metaserver's host, in snapshots/ of its
    data directory. With the changelog beside it, such a file brings everything back (`dfs recover`): copy both
    elsewhere as a backup.

    \b
    Example:
      dfs snapshot-metadata
      rsync -a $(dirname $(dfs snapshot-metadata --json | jq -r .path))/ backup:dfs-metadata/
    """
    from dfsmount.dfs_api import Api
    from dfsmount.dfs_servers import busy

    access = find(data, metaserver, key_file)
    with Api(access) as api, busy("the metaserver writes a snapshot file", quiet=as_json):
        made = api.snapshot()
    if as_json:
        print_json(made)
    else:
        say(f"{made.path} on the metaserver's host ({access.http}) has every change up to {made.position}.")


def recover(
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Take what comes before the first damaged change.")
    ] = False,
    advance: Annotated[
        bool, typer.Option("--advance", help="Make this state count as newer than what chunkservers have seen.")
    ] = False,
    seen_epoch: Annotated[int, typer.Option(min=0, help="With --advance: the highest epoch seen.")] = 0,
    seen_chunk: Annotated[int, typer.Option(min=0, help="With --advance: the highest chunk id seen.")] = 0,
    data: Data = "",
    config: Config = "",
    as_json: AsJson = False,
) -> None:
    """Make a damaged or lost metadata store anew, from a snapshot file and the changelog.

    Runs on the metaserver's host, as the user that the metaserver runs as, while it does not run. Every change is there
    again unless the changelog is damaged, too. The old store stays beside it. docs/operations.md says what to try in
    which order.

    \b
    Example:
      dfs recover --data /var/lib/dfs-quickstart
      sudo -u dfs dfs recover --config /etc/dfs/metaserver.toml --accept-loss
    """
    from dfsmount import dfs_recover

    options = dfs_recover.find_target(data, config).options
    options += ["--accept-loss"] if accept_loss else []
    options += ["--advance", f"--seen-epoch={seen_epoch}", f"--seen-chunk={seen_chunk}"] if advance else []
    done = dfs_recover.run("recover", options, quiet=as_json)
    if as_json:
        print_json(done)


def rebuild(
    chunkserver: Annotated[
        list[str] | None,
        typer.Option("--chunkserver", metavar="HOST:PORT", help="A chunkserver; give every one there is."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be found.")] = False,
    uid: Annotated[int, typer.Option(min=0, help="Owner of what is recovered.")] = 0,
    gid: Annotated[int, typer.Option(min=0, help="Its group.")] = 0,
    mode: Annotated[str, typer.Option(metavar="OCTAL", help="Its permissions.")] = "0600",
    data: Data = "",
    config: Config = "",
    key_file: Annotated[str, typer.Option("--key-file", metavar="FILE", help="The cluster key.")] = "",
    as_json: AsJson = False,
) -> None:
    """The last resort: make the metadata anew from what the chunkservers have.

    For when store, changelog, snapshots and backups are all lost. Contents come back as /recovered/INODE; names,
    directories and owners do not. The chunkservers must be running, and the metaserver's data directory empty. For a
    cluster of `dfs up` the chunkservers are known, elsewhere give each of them.

    \b
    Example:
      dfs rebuild --data /var/lib/dfs-quickstart --dry-run
      dfs rebuild --config /etc/dfs/metaserver.toml --chunkserver 192.0.2.2:9422 --chunkserver 192.0.2.3:9422
    """
    from dfsmount import dfs_recover
    from dfsmount.dfs_layout import Problem

    target = dfs_recover.find_target(data, config)
    addresses = chunkserver or target.chunkservers
    if not addresses:
        raise Problem(
            "which chunkservers? Give each as --chunkserver HOST:PORT: what only one has is missing otherwise"
        )
    options = [*target.options, *dfs_recover.key_option(target, key_file, data), f"--uid={uid}", f"--gid={gid}"]
    options += [f"--mode={mode}", *(f"--chunkserver={address}" for address in addresses)]
    options += [f"--copies={target.copies}"] if target.copies else []
    done = dfs_recover.run("rebuild", [*options, *(["--dry-run"] if dry_run else [])], quiet=as_json)
    if as_json:
        print_json(done)


def add_to(app: typer.Typer) -> None:
    """Makes these commands part of `dfs`."""
    for command in (ls, gc, bench, recover, rebuild):
        app.command()(command)
    app.command("snapshot-metadata")(snapshot_metadata)

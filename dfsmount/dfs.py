"""The `dfs` command: starts, stops and looks into a cluster; ``dfs_manage`` has what changes a running one.

Everything but Typer is imported when a command runs: `dfs --help` and completion stay fast.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from dfsmount import (
    dfs_completion,
    dfs_gateway,
    dfs_host,
    dfs_manage,
    dfs_member,
    dfs_observe,
    dfs_trash,
    dfs_usage,
    dfs_verbs,
)
from dfsmount.dfs_options import AsJson, Data, KeyFile, Metaserver, Servers, end, find, print_json, say

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def up(
    # Not a Path: the command line's parser would stat it, which waits while the metaserver is down.
    mountpoint: Annotated[str, typer.Argument(metavar="MOUNTPOINT", help="An empty directory; made if missing.")],
    data: Annotated[str, typer.Option("--data", metavar="DIR", help="Where everything is kept.")] = "",
    copies: Annotated[int | None, typer.Option(help="Copies of every chunk (new cluster: 2).")] = None,
    servers: Annotated[int | None, typer.Option(help="Number of chunkservers (new cluster: 3).")] = None,
    port: Annotated[int | None, typer.Option(help="First of the ports to use (new cluster: 9400).")] = None,
) -> None:
    """Start a cluster on this machine and mount it.

    One metaserver and three chunkservers run in the background on loopback. Run it again at any time: it starts what
    does not run. After `dfs down`, a crash or a reboot it brings the same data back.

    \b
    Example:
      dfs up /mnt/dfs
      dfs up /mnt/scratch --data /srv/scratch --servers 5 --copies 3 --port 9600
    """
    from dfsmount import dfs_layout, dfs_services, dfs_up

    directory = Path(data).absolute() if data else dfs_layout.default_data()
    point = Path(mountpoint).absolute()
    changed = dfs_up.up(directory, point, dfs_services.Wanted(copies, servers, port), say)
    if not changed:
        say(f"The cluster in {directory} is up already, mounted on {point}.")
    for line in dfs_up.hints(directory, point):
        say(line)


@app.command()
def down(
    data: Data = "",
    force: Annotated[bool, typer.Option("--force", help="Unmount even if programs still use the mount.")] = False,
) -> None:
    """Unmount, and stop a cluster of `dfs up`.

    What is dirty is written back first. The data stays: `dfs up` brings it back. With the directory of a server that
    `dfs join` started, that server is stopped.

    \b
    Example:
      dfs down
      dfs down --data /srv/scratch --force
    """
    from dfsmount import dfs_down, dfs_find
    from dfsmount.dfs_layout import Problem

    if data and dfs_down.joined(Path(data).absolute(), say):
        return
    access = dfs_find.find(dfs_find.Choice(data))
    if access.data is None:
        raise Problem("this cluster was not started by `dfs up`: stop its services with systemctl")
    if dfs_down.down(access.data, say, force=force):
        say(f"Stopped. The data is kept in {access.data}.")
    else:
        say(f"Nothing of the cluster in {access.data} was running.")


@app.command()
def status(data: Data = "", metaserver: Metaserver = "", key_file: KeyFile = "", as_json: AsJson = False) -> None:
    """Show servers, space, chunks and sessions.

    The first line says in one sentence whether all is well.

    \b
    Example:
      dfs status
      dfs status --metaserver 192.0.2.1:9401 --json | jq .verdict
    """
    from dfsmount.dfs_api import Api

    access = find(data, metaserver, key_file)
    with Api(access) as api:
        answer = api.status()
        missing = api.missing() if answer.chunks.missing else []
    from dfsmount import dfs_show
    from metaserver import words

    if as_json:
        verdict, healthy = words.verdict(answer), not words.troubles(answer)
        print_json({"verdict": verdict, "healthy": healthy, "status": answer, "missing": missing})
    else:
        dfs_show.show_status(answer, access.http, missing)


@app.command()
def token(data: Data = "", metaserver: Metaserver = "", key_file: KeyFile = "") -> None:
    """Print the token of the cluster key.

    It is the password of the status page (any user name), and what the HTTP interfaces want as "Authorization: Bearer
    TOKEN". Whoever has it can read and change everything: treat it like the key itself.

    \b
    Example:
      dfs token
      curl -H "Authorization: Bearer $(dfs token)" http://192.0.2.1:9401/v1/status
    """
    access = find(data, metaserver, key_file)
    say(access.key().http_token)


@app.command()
def chunks(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A regular file on a mount.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read the blocks on every server and check them.")] = False,
    data: Data = "",
    metaserver: Metaserver = "",
    key_file: KeyFile = "",
    as_json: AsJson = False,
) -> None:
    """Show where the bytes of a file are.

    One line for each replica of each piece: offset, length, chunk, server, path there, state of its checksums, time.
    Exit code 1 if a replica is not as it should be.

    \b
    Example:
      dfs chunks /mnt/dfs/video.mp4
      dfs chunks --verify /mnt/dfs/video.mp4
    """
    from dfsmount import dfs_chunks, dfs_show

    view = dfs_chunks.look(file, lambda path: find(data, metaserver, key_file, path), verify=verify)
    if as_json:
        print_json(view)
    else:
        dfs_show.show_file(view)
    if dfs_chunks.bad(view.pieces):
        raise typer.Exit(1)


@app.command()
def check(
    deep: Annotated[bool, typer.Option("--deep", help="Also read every replica of every chunk from disk.")] = False,
    data: Data = "",
    metaserver: Metaserver = "",
    key_file: KeyFile = "",
    as_json: AsJson = False,
) -> None:
    """Verify the metadata, and with --deep all data.

    Every invariant of the metadata is checked; with --deep, also every block of every replica. Exit code 1 on findings.

    \b
    Example:
      dfs check
      dfs check --deep --json > findings.json
    """
    from dfsmount import dfs_check

    findings = dfs_check.run(find(data, metaserver, key_file), deep=deep, quiet=as_json)
    end(findings, dfs_check.lines(findings), clean=dfs_check.clean(findings), as_json=as_json)


@app.command()
def scrub(
    servers: Servers = None,
    data: Data = "",
    metaserver: Metaserver = "",
    key_file: KeyFile = "",
    as_json: AsJson = False,
) -> None:
    """Read all replicas back from disk now.

    Chunkservers do so by themselves, slowly (`dfs status` shows how far they are). This begins a faster pass and waits
    for it. Exit code 1 if something is damaged, or a server could not do it; what is damaged is repaired from the other
    replicas.

    \b
    Example:
      dfs scrub
      dfs scrub storage1 storage2
    """
    from dfsmount import dfs_scrub

    results = dfs_scrub.run(find(data, metaserver, key_file), servers or [], quiet=as_json)
    end(results, dfs_scrub.lines(results), clean=dfs_scrub.clean(results), as_json=as_json)


dfs_manage.add_to(app)
dfs_observe.add_to(app)
dfs_gateway.add_to(app)
dfs_verbs.add_to(app)
dfs_member.add_to(app)
dfs_usage.add_to(app)
dfs_host.add_to(app)
app.add_typer(dfs_trash.app, name="trash")


def main() -> None:
    """Runs the command line; what is wrong is one line on standard error, and exit code 1."""
    from dfsmount.dfs_layout import Problem

    dfs_completion.begin()
    try:
        app(prog_name="dfs")
    except Problem as problem:
        print(f"dfs: {problem}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("dfs: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # Whoever read our output has left: not an error, and nothing more can be said.
        sys.stderr.close()
        raise SystemExit(0) from None


if __name__ == "__main__":
    main()

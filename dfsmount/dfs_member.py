"""The commands of `dfs` by which a host becomes a chunkserver: `join-token` where the key is, `join` on the new host.

Everything but Typer is imported when a command runs.
"""

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfsmount.dfs_options import AsJson, Data, KeyFile, Metaserver, find, print_json, say

if TYPE_CHECKING:
    from metaserver.protocol import JoinTokenStatus

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def join_token(
    expires: Annotated[
        str, typer.Option("--expires", metavar="TIME", help="How long it is valid: 30m, 1h, 2d; 7 days at most.")
    ] = "1h",
    once: Annotated[bool, typer.Option("--once", help="For one host only.")] = False,
    show: Annotated[bool, typer.Option("--list", help="Show those that can still be used.")] = False,
    revoke: Annotated[str, typer.Option("--revoke", metavar="ID", help="Make one useless; ID as --list shows.")] = "",
    data: Data = "",
    metaserver: Metaserver = "",
    key_file: KeyFile = "",
    as_json: AsJson = False,
) -> None:
    """Make a token by which a new host may join the cluster.

    `dfs join` on the new host needs it. Whoever has it can get the cluster key while it is valid, and with the key read
    and change everything: hand it on as you would a password. Who only listens to the network learns nothing from the
    exchange. The token is printed on standard output, what to do with it on standard error.

    \b
    Example:
      dfs join-token --expires 30m --once
      dfs join-token --list
      dfs join-token --revoke 4b1d0c6f2a3e5d71
    """
    from dfsmount.dfs_api import Api
    from dfsmount.dfs_layout import Problem

    if show and revoke:
        raise Problem("give --list or --revoke, not both")
    access = find(data, metaserver, key_file)
    with Api(access) as api:
        if show:
            shown = api.join_tokens()
            print_json(shown) if as_json else _show(shown)
            return
        if revoke:
            gone = api.revoke_join_token(revoke)
            print_json(gone) if as_json else say(f"The join token {gone.id} cannot be used any more.")
            return
        made = api.make_join_token(_seconds(expires), once=once)
    from metaserver import joining

    token = joining.make(access.key(), bytes.fromhex(made.id), made.cluster_id).text
    if as_json:
        print_json({"token": token, "id": made.id, "expires_ns": made.expires_ns, "once": made.once})
        return
    say(token)
    valid = f"Valid for {'one host' if once else 'any number of hosts'} until {_time(made.expires_ns)}."
    print(f"{valid} On a new host: dfs join {access.http} TOKEN", file=sys.stderr, flush=True)


def _show(tokens: "list[JoinTokenStatus]") -> None:
    from dfsmount import dfs_show

    if not tokens:
        say("There is no join token that can be used.")
        return
    rows = [(t.id, _time(t.expires_ns), "one" if t.once else "any", ", ".join(t.hosts)) for t in tokens]
    dfs_show.console().print(dfs_show.table(("ID", "VALID UNTIL", "HOSTS", "USED BY"), rows))


def _time(time_ns: int) -> str:
    from metaserver.words import time_text

    return f"{time_text(time_ns)} UTC"


def _seconds(text: str) -> float:
    from dfsmount.dfs_layout import Problem
    from metaserver.protocol import LONGEST_JOIN_SECONDS

    match = re.fullmatch("([0-9]{1,6})([smhd])", text)
    seconds = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 0 < seconds <= LONGEST_JOIN_SECONDS:
        raise Problem(f"--expires {text}: a time such as 30m, 1h or 2d, up to 7d")
    return float(seconds)


def join(
    context: typer.Context,
    metaserver: Annotated[
        str, typer.Argument(metavar="[METASERVER]", help="The metaserver's HTTP address, HOST[:HTTPPORT] (9401).")
    ] = "",
    token: Annotated[
        str, typer.Argument(metavar="[TOKEN]", help="What `dfs join-token` printed.", envvar="DFS_JOIN_TOKEN")
    ] = "",
    token_file: Annotated[
        str, typer.Option("--token-file", metavar="FILE", help="Read the token there; - is standard input.")
    ] = "",
    data: Annotated[
        str, typer.Option("--data", metavar="DIR", help="Where everything is kept: new or empty, on the disk to use.")
    ] = "",
    name: Annotated[str, typer.Option(help="Name of this server (default: the host's).")] = "",
    rack: Annotated[str, typer.Option(help="What fails together: copies are kept in different racks.")] = "",
    label: Annotated[list[str] | None, typer.Option(help="A label of this server; repeatable.")] = None,
    address: Annotated[
        str, typer.Option(metavar="HOST", help="How others reach this host (default: its address towards METASERVER).")
    ] = "",
    port: Annotated[int | None, typer.Option(help="First of two ports (default: free ones from 9422 on).")] = None,
    systemd: Annotated[
        bool, typer.Option("--systemd", help="As the unit chunkserver@INSTANCE, data in /srv/dfs/INSTANCE.")
    ] = False,
    instance: Annotated[
        str, typer.Option("--instance", metavar="NAME", help="With --systemd: a name for this disk (a, b, ...).")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Make this host a chunkserver of a cluster.

    Gets the cluster key by a join token, writes the configuration, starts the server, and ends when the cluster has it.
    If anything is wrong nothing is left behind. Without --systemd the server runs in the background; after a reboot
    `dfs join --data DIR` starts it again, and `dfs down --data DIR` stops it. With --systemd the units are installed if
    they are not (`dfs install-units`), and it starts with the host; mount the disk on /srv/dfs/INSTANCE first.

    \b
    Example:
      dfs join 192.0.2.1:9401 dfsjoin1-... --data /srv/disk1 --rack rack1
      dfs join 192.0.2.1 --token-file /root/token --systemd --instance a --rack rack1 --label ssd
      dfs join --data /srv/disk1
    """
    from dfsmount import dfs_homes, dfs_join
    from dfsmount.dfs_layout import Problem

    home: dfs_homes.Home
    if systemd:
        if data:
            raise Problem("with --systemd the data is in /srv/dfs/INSTANCE: mount the disk there, and leave --data out")
        home = dfs_homes.Unit(instance, lambda: _install_units(context))
    else:
        if instance:
            raise Problem("--instance belongs to --systemd")
        home = dfs_homes.Background(Path(data).absolute() if data else dfs_homes.default_directory())
        if not metaserver and not token_file:
            dfs_join.start_again(home, say)
            return
    if not metaserver:
        raise Problem("give the metaserver's HTTP address, and a join token")
    wanted = dfs_join.Wanted(metaserver, _token(token, token_file), address, port, name, rack, label or ())
    joined = dfs_join.join(wanted, home)
    print_json(joined) if as_json else say(dfs_join.line(joined))


def _token(token: str, token_file: str) -> str:
    from dfsmount.dfs_layout import Problem

    if token and token_file and "DFS_JOIN_TOKEN" not in os.environ:
        raise Problem("give the join token or --token-file, not both")
    if token_file == "-":
        return sys.stdin.readline(4096)
    if token_file:
        try:
            with open(token_file, encoding="ascii", errors="replace") as file:
                return file.readline(4096)
        except OSError as error:
            raise Problem(f"cannot read {token_file}: {error.strerror}") from None
    if not token:
        raise Problem("give a join token: `dfs join-token` makes one, on a host that has the cluster key")
    return token


def _install_units(context: typer.Context) -> None:
    from dfsmount import dfs_pages, dfs_units
    from dfsmount.dfs_layout import Problem

    _, troubles = dfs_units.install_here(dfs_pages.pages(context.find_root()))
    if troubles:
        raise Problem(troubles[0])


def add_to(app: typer.Typer) -> None:
    """Makes these commands part of `dfs`."""
    app.command("join-token")(join_token)
    app.command()(join)

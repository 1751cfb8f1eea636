"""`dfs gateway`: files over HTTP, for people without a mount. Reads the options; ``gateway`` does the work."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfsmount.dfs_options import Data, say

if TYPE_CHECKING:
    from dfsmount.config import Source
    from metaserver.key import ClusterKey

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def add_to(app: typer.Typer) -> None:
    app.command()(gateway)


def gateway(
    source: Annotated[
        str, typer.Argument(metavar="[HOST[:PORT]]", help="The metaserver, as for dfsmount; default: see --data.")
    ] = "",
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where to serve HTTP.")] = "127.0.0.1:8080",
    export: Annotated[str, typer.Option(metavar="PATH", help="Directory of the cluster to serve.")] = "/",
    read_only: Annotated[bool, typer.Option("--read-only", help="Nothing can be changed.")] = False,
    token_file: Annotated[
        str, typer.Option(metavar="FILE", help="Tokens, one a line; made with a new one if it does not exist.")
    ] = "",
    anonymous: Annotated[
        bool, typer.Option("--anonymous", help="No token is needed; on loopback, or with --read-only.")
    ] = False,
    owner: Annotated[str, typer.Option(metavar="UID:GID", help="Who owns new files (default: this user).")] = "",
    mode: Annotated[str, typer.Option(metavar="OCTAL", help="Permissions of new files.")] = "0644",
    max_upload: Annotated[str, typer.Option(metavar="SIZE", help="Largest upload, such as 500M or 10G.")] = "",
    cert: Annotated[str, typer.Option(metavar="FILE", help="Certificate chain (PEM), for HTTPS.")] = "",
    private_key: Annotated[str, typer.Option(metavar="FILE", help="Its private key (PEM).")] = "",
    name: Annotated[
        str, typer.Option(metavar="NAME", help="Keeps apart what several gateways upload (default: host and port).")
    ] = "",
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="How long a request waits for servers.")] = 30.0,
    dirty_mib: Annotated[int, typer.Option(min=8, help="Memory for what the servers do not have yet.")] = 64,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    data: Data = "",
    key_file: Annotated[str, typer.Option(metavar="FILE", help="The cluster key (/etc/dfs/cluster.key).")] = "",
) -> None:
    """Serve files over HTTP, for people without a mount.

    Runs in the foreground until SIGTERM. Uploads become visible when they are complete and durable. The token is asked
    for as `Authorization: Bearer TOKEN`, or as a password (`curl -u :TOKEN`, browsers). It is one of --token-file; for
    a cluster of `dfs up` by default of gateway.token in its data directory; elsewhere the one of the cluster key.

    \b
    Example:
      dfs gateway 192.0.2.1:9400 --listen 0.0.0.0:8080 --export /public --token-file /etc/dfs/gateway.token
      curl -u :$TOKEN -T video.mp4 http://HOST:8080/files/video.mp4        # upload; --progress-bar works
      curl -u :$TOKEN -F file=@a.txt -F file=@b.txt http://HOST:8080/upload
      curl -u :$TOKEN 'http://HOST:8080/files?prefix=vid'                  # list
      curl -u :$TOKEN -O -C - http://HOST:8080/download/video.mp4          # download, or go on with it
      curl -u :$TOKEN -X DELETE http://HOST:8080/files/video.mp4
    """
    from dfsmount import gateway as gateways
    from dfsmount.dfs_layout import Problem
    from dfsmount.gateway_http import Access
    from metaserver import logs
    from metaserver.httpserver import Tls

    where, key, tokens_beside = _cluster(source, export, data, key_file)
    host, port = _address(listen)
    if log_level not in logs.LEVELS:
        raise Problem(f"--log-level {log_level}: one of {', '.join(logs.LEVELS)}")
    if bool(cert) != bool(private_key):
        raise Problem("--cert and --private-key belong together")
    uid, gid = _owner(owner)
    logs.configure(log_level)
    try:
        tokens = () if anonymous else _tokens(token_file, tokens_beside, key)
        plan = gateways.GatewayPlan(
            where,
            host,
            port,
            Access(tokens, read_only),
            uid,
            gid,
            _mode(mode),
            _size(max_upload),
            name,
            timeout,
            dirty_mib,
            Tls(cert, private_key) if cert else None,
        )
        gateways.run(plan, key, lambda address: say(f"Serving {where} on {address}"))
    except gateways.GatewayError as error:
        raise Problem(str(error)) from None


def _cluster(source: str, export: str, data: str, key_file: str) -> "tuple[Source, ClusterKey | None, Path | None]":
    """Where the metaserver is, the key, and where the tokens of a cluster of `dfs up` are."""
    from dfsmount import dfs_find
    from dfsmount.config import UsageError, parse_source
    from dfsmount.dfs_layout import Layout, Problem
    from metaserver.key import KeyFileError, load_key

    tokens = None
    if source and data:
        raise Problem("give a metaserver or --data, not both")
    if not source:
        access = dfs_find.find(dfs_find.Choice(data))
        if access.data is None:
            raise Problem("say which metaserver, as HOST:PORT (the port that mounts use), or --data DIR")
        cluster = Layout(access.data).read_cluster()
        assert cluster is not None, "its HTTP address was read from there"
        source, tokens = cluster.address, access.data / "gateway.token"
        key_file = key_file or str(access.key_file)
    elif not key_file and dfs_find.HOST_KEY_FILE.exists():
        key_file = str(dfs_find.HOST_KEY_FILE)
    try:
        where = parse_source(source)
        if export.strip("/"):
            where = parse_source(f"{source.rstrip('/')}/{export.strip('/')}")
        return where, load_key(Path(key_file)) if key_file else None, tokens
    except (UsageError, KeyFileError) as error:
        raise Problem(str(error)) from None


def _tokens(token_file: str, beside: Path | None, key: "ClusterKey | None") -> tuple[str, ...]:
    from dfsmount import gateway as gateways

    if token_file:
        return gateways.read_tokens(Path(token_file))
    if beside is not None:
        return gateways.read_tokens(beside)
    return (key.http_token,) if key is not None else ()


def _address(text: str) -> tuple[str, int]:
    from dfsmount.dfs_layout import Problem

    host, colon, port = text.rpartition(":")
    if not colon or not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise Problem(f"--listen {text}: give HOST:PORT")
    return host.strip("[]"), int(port)


def _owner(text: str) -> tuple[int, int]:
    from dfsmount.dfs_layout import Problem

    if not text:
        return os.geteuid(), os.getegid()
    match = re.fullmatch("([0-9]{1,10}):([0-9]{1,10})", text)
    if match is None or max(int(match[1]), int(match[2])) >= (1 << 32) - 1:
        raise Problem(f"--owner {text}: give the numbers UID:GID")
    return int(match[1]), int(match[2])


def _mode(text: str) -> int:
    from dfsmount.dfs_layout import Problem

    if not re.fullmatch("0?[0-7]{3}", text):
        raise Problem(f"--mode {text}: give three octal digits, such as 0644")
    return int(text, 8)


def _size(text: str) -> int:
    from dfsmount.dfs_layout import Problem

    if not text:
        return 0
    match = re.fullmatch("([0-9]{1,15})([KMGT]?)", text.upper())
    if match is None or int(match[1]) == 0:
        raise Problem(f"--max-upload {text}: a number of bytes, perhaps with K, M, G or T")
    return int(match[1]) << _UNITS[match[2]]

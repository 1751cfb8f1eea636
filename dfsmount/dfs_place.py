"""Where a new chunkserver is to be: its address, ports and directory, found or checked before anything is changed."""

import errno
import json
import os
import socket
from collections.abc import Collection
from pathlib import Path

from dfsmount import dfs_processes
from dfsmount.dfs_layout import Problem

FIRST_PORT = 9422
# Two for each disk of a host; nobody has so many.
PORT_PAIRS = 64
DEFAULT_HTTP_PORT = 9401
# What a disk that was just formatted has, and what an interrupted start of a chunkserver leaves.
HARMLESS = frozenset({"lost+found", "chunks"})


def split_host(text: str, default_port: int) -> tuple[str, int]:
    """``HOST``, ``HOST:PORT`` or ``[IPV6]:PORT``."""
    host, colon, port = text.rpartition(":")
    if not colon or (text.startswith("[") and text.endswith("]")):
        host, port = text, str(default_port)
    elif ":" in host and not host.startswith("["):
        raise Problem(f"{text}: give an IPv6 address in brackets, as [{text}]")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise Problem(f"{text}: give the metaserver as HOST:HTTPPORT, such as 192.0.2.1:{default_port}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_host(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def route_address(host: str, port: int) -> str:
    """This host's address on the way to a server: the one by which others of that network reach it. Sends nothing."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as sock:
            sock.connect(address)
            return str(sock.getsockname()[0])
    except socket.gaierror as error:
        raise Problem(f"cannot find {host}: {error.strerror}") from None
    except OSError as error:
        raise Problem(f"there is no way to {join_host(host, port)}: {error.strerror}") from None


def own_address(text: str) -> str:
    """The address that a name of this host stands for; :class:`Problem` if no interface here has it."""
    try:
        address = str(socket.getaddrinfo(text, 0, type=socket.SOCK_STREAM)[0][4][0])
    except socket.gaierror as error:
        raise Problem(f"--address {text}: {error.strerror}") from None
    if why_not(address, 0) is not None:
        raise Problem(f"--address {text}: no interface of this host has the address {address}")
    return address


def why_not(address: str, port: int) -> OSError | None:
    """Why a server could not listen there; None if it could."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((address, port))
            sock.listen(1)
        except OSError as error:
            return error
    return None


def choose_port(address: str, wanted: int | None, taken: Collection[int] = ()) -> int:
    """The first of two ports that are free at ``address``; ``taken`` belong to other configurations of this host."""
    if wanted is not None:
        if not 1024 <= wanted <= 65534:
            raise Problem(f"--port {wanted}: from 1024 to 65534")
        for port in (wanted, wanted + 1):
            error = why_not(address, port)
            if error is not None:
                raise Problem(_unusable(address, port, error))
        return wanted
    for port in range(FIRST_PORT, FIRST_PORT + 2 * PORT_PAIRS, 2):
        if port not in taken and why_not(address, port) is None and why_not(address, port + 1) is None:
            return port
    raise Problem(f"no free ports found from {FIRST_PORT} on at {address}: choose some with --port")


def _unusable(address: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use by {dfs_processes.who_listens(port)}: choose others with --port"
    return f"cannot listen on {join_host(address, port)}: {error.strerror}"


def check_data(path: Path, cluster_id: str) -> int:
    """Makes sure that a chunkserver of that cluster can have this directory, which may be missing, empty, or its own
    from before; returns the number it had then, or 0."""
    try:
        if not path.exists():
            return 0
        names = {entry.name for entry in path.iterdir()}
        found = _identity(path) if "identity.json" in names else None
    except OSError as error:
        raise Problem(f"cannot use {path} for data: {error.strerror}") from None
    if found is not None:
        whose, server = found
        if whose not in ("", cluster_id):
            raise Problem(f"{path} has chunks of another cluster ({whose}): choose an empty directory")
        return server
    foreign = sorted(names - HARMLESS)
    if foreign:
        raise Problem(f"{path} is not empty (it holds {foreign[0]}): choose an empty directory")
    if not os.access(path, os.W_OK | os.X_OK):
        raise Problem(f"cannot use {path} for data: {os.strerror(errno.EACCES)}")
    return 0


def _identity(path: Path) -> tuple[str, int] | None:
    """Cluster and server that a chunkserver has noted in its directory."""
    try:
        told = json.loads((path / "identity.json").read_bytes()[:65536])
        return str(told["cluster_id"]), int(told["server"])
    except (ValueError, KeyError, TypeError):
        raise Problem(f"{path}/identity.json is damaged or not a chunkserver's: choose an empty directory") from None

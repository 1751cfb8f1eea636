"""`dfs join`: makes a running chunkserver of this host, from a metaserver's address and a join token.

What can be known beforehand is checked before the token is used; what was made is taken away again if it fails later.
"""

import contextlib
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec

from dfsmount import dfs_homes, dfs_place
from dfsmount.dfs_api import Api
from dfsmount.dfs_find import Access
from dfsmount.dfs_homes import Home
from dfsmount.dfs_layout import Problem
from dfsmount.dfs_up import wait_until
from metaserver import joining
from metaserver.joining import JoinError, JoinToken
from metaserver.key import ClusterKey, KeyFileError, load_key, save_key
from metaserver.protocol import JoinReply, JoinRequest, ServerStatus
from metaserver.words import bytes_text, count_text

ASK_SECONDS = 15.0
# A chunkserver with nothing on its disk registers within a second or two; one that returns lists its chunks first.
REGISTER_SECONDS = 120.0


class Wanted(NamedTuple):
    """What the options say; "" or None where they say nothing."""

    metaserver: str
    token: str
    address: str = ""
    port: int | None = None
    name: str = ""
    rack: str = ""
    labels: Sequence[str] = ()


class Joined(msgspec.Struct):
    """A chunkserver that is UP in the metaserver's eyes. ``runs``: how it runs, as "pid 123" or a unit."""

    name: str
    server: int
    address: str
    http: str
    data: str
    config: str
    cluster_id: str
    runs: str
    free: int
    servers: int


class Place(NamedTuple):
    """Where the new server listens, and by which name others reach it."""

    listen: str
    advertise: str
    port: int


class _Failure(msgspec.Struct):
    code: str
    text: str


def join(wanted: Wanted, home: Home) -> Joined:
    """Does it all, or nothing and raises :class:`Problem`."""
    token = parse_token(wanted.token)
    host, port = dfs_place.split_host(wanted.metaserver, dfs_place.DEFAULT_HTTP_PORT)
    http = dfs_place.join_host(host, port)
    home.check()
    before = dfs_place.check_data(home.data, token.cluster_id)
    place = choose_place(wanted, host, port, home)
    key = key_beside(home.key_file, token) or ask_key(http, token, wanted.name or socket.gethostname())
    with ExitStack() as undo:
        home.prepare(undo)
        if not home.key_file.exists():
            undo.callback(home.key_file.unlink, missing_ok=True)
            save_key(home.key_file, key)
            home.give(home.key_file)
        with Api(Access(http, home.key_file)) as api:
            name = choose_name(wanted.name, before, api.status().servers)
            home.configure(undo, settings(wanted, name, place, http, home))
            home.start(undo)
            found = wait_registered(api, home, name, place)
            joined = _joined(found, home, token, len(api.status().servers))
        undo.pop_all()
    return joined


def parse_token(text: str) -> JoinToken:
    try:
        return joining.parse(text)
    except JoinError as error:
        raise Problem(str(error)) from None


def choose_place(wanted: Wanted, host: str, port: int, home: Home) -> Place:
    """The address of the route to the metaserver, unless another one is wanted."""
    listen = dfs_place.own_address(wanted.address) if wanted.address else dfs_place.route_address(host, port)
    first = dfs_place.choose_port(listen, wanted.port, home.taken_ports())
    return Place(listen, wanted.address or listen, first)


def key_beside(path: Path, token: JoinToken) -> ClusterKey | None:
    """The cluster key, if this host has it already: then nothing need be asked for."""
    if not path.exists():
        return None
    try:
        key = load_key(path)
    except KeyFileError as error:
        raise Problem(str(error)) from None
    if joining.make(key, token.id, token.cluster_id).secret != token.secret:
        raise Problem(f"{path} is the key of another cluster than the join token is for: move it away first")
    return key


def ask_key(http: str, token: JoinToken, name: str) -> ClusterKey:
    """One exchange (``joining.py``)."""
    asking = joining.Asking(token, name)
    body = msgspec.json.encode(JoinRequest(token.id, asking.public, name, asking.proof))
    try:
        answer = httpx.post(f"http://{http}/v1/join", content=body, timeout=ASK_SECONDS, trust_env=False)
    except httpx.TimeoutException:
        raise Problem(f"the server at {http} does not answer in time") from None
    except (httpx.RemoteProtocolError, httpx.ReadError):
        raise Problem(f"{http} does not speak HTTP: give the metaserver's HTTP port") from None
    except httpx.HTTPError:
        raise Problem(f"no metaserver at {http}") from None
    if answer.status_code >= 400:
        raise Problem(_refusal(http, answer))
    try:
        reply = msgspec.json.decode(answer.content, type=JoinReply)
        return asking.open(reply.public, reply.sealed)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise Problem(f"{http} does not answer as expected: is it the metaserver's HTTP port?") from None
    except JoinError as error:
        raise Problem(f"{http}: {error}") from None


def _refusal(http: str, answer: httpx.Response) -> str:
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
        failure = msgspec.json.decode(answer.content, type=_Failure)
        if failure.code not in ("NOT_FOUND", "BAD_KEY"):
            return f"the metaserver at {http} refuses: {failure.text}"
    return f"{http} knows nothing of join tokens: is it the metaserver's HTTP port?"


def choose_name(wanted: str, before: int, servers: Sequence[ServerStatus]) -> str:
    """The host's name, with a number if a server has it that is not this one from before; ``wanted`` as it is."""
    taken = {server.name for server in servers if server.server != before and server.state != "LOST"}
    if wanted:
        if wanted in taken:
            raise Problem(f"the cluster has a server called {wanted} already: choose another --name")
        return wanted
    own = socket.gethostname().partition(".")[0]
    return next(name for name in _names(own, len(taken)) if name not in taken)


def _names(first: str, count: int) -> list[str]:
    return [first, *(f"{first}-{number}" for number in range(2, count + 3))]


def settings(wanted: Wanted, name: str, place: Place, http: str, home: Home) -> dict[str, str | int | list[str]]:
    """What the chunkserver's configuration file says."""
    values: dict[str, str | int | list[str]] = {
        "data": str(home.data),
        "name": name,
        "listen": dfs_place.join_host(place.listen, place.port),
        "http": dfs_place.join_host(place.listen, place.port + 1),
        "metaserver": http,
        "key_file": str(home.key_file),
    }
    if place.advertise != place.listen:
        values["advertise"] = place.advertise
    if wanted.rack:
        values["rack"] = wanted.rack
    if wanted.labels:
        values["labels"] = list(wanted.labels)
    return values


def wait_registered(api: Api, home: Home, name: str, place: Place) -> ServerStatus:
    """Waits until the new server is UP; :class:`Problem` with its last words if it ends before."""
    found: list[ServerStatus] = []

    def ready() -> bool:
        found[:] = [server for server in api.status().servers if server.name == name and server.port == place.port]
        return any(server.state in ("UP", "DRAINING") for server in found)

    wait_until(ready, home.why_ended, f"{name} does not register within {REGISTER_SECONDS:.0f} s", REGISTER_SECONDS)
    return found[0]


def _joined(server: ServerStatus, home: Home, token: JoinToken, servers: int) -> Joined:
    return Joined(
        server.name,
        server.server,
        dfs_place.join_host(server.host, server.port),
        dfs_place.join_host(server.host, server.http_port),
        str(home.data),
        str(home.config),
        token.cluster_id,
        home.runs(),
        server.free,
        servers,
    )


def line(joined: Joined) -> str:
    """All of it for a person."""
    return (
        f"{joined.name} has joined: {joined.runs} on {joined.address}, data in {joined.data}"
        f" ({bytes_text(joined.free)} free); the cluster has {count_text(joined.servers, 'server')} now."
    )


def start_again(home: "dfs_homes.Background", say: Callable[[str], None]) -> None:
    """Starts a server that joined before and does not run (after a reboot, for example)."""
    if not home.config.exists():
        raise Problem(f"no server has joined from {home.top}: give the metaserver's address and a join token")
    if home.running() is not None:
        say(f"The server in {home.top} runs already.")
        return
    with ExitStack() as undo:
        home.start(undo)
        wait_until(home.answers, home.why_ended, f"the server in {home.top} does not answer", REGISTER_SECONDS)
        undo.pop_all()
    say(f"The server in {home.top} runs: {home.runs()}.")

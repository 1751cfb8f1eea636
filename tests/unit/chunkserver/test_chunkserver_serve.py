"""A whole chunkserver against a metaserver played by a small HTTP application; and its command line."""

import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import structlog
import trio
from chunkserver_harness import CLUSTER, KEY, Writer
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from typer.testing import CliRunner

from chunkserver import cli, identity
from chunkserver.chunkfile import chunk_path
from chunkserver.client import Pool
from chunkserver.config import Config, ConfigError, make, split_address
from chunkserver.disk import LocalDisk
from chunkserver.identity import DataDirectoryError
from chunkserver.protocol import Peer
from chunkserver.serve import Ports, StartError, serve
from metaserver import transport
from metaserver.errors import DfsError, ErrorCode
from metaserver.httpserver import json_reply, protected, read_json, run_http
from metaserver.protocol import Heartbeat, HeartbeatReply, Json, Order, OrderKind, Register, Registered, ReportPage

CHUNK = 0x31


class Metaserver:
    """What a chunkserver sees of one. ``orders`` go out with the next heartbeat."""

    def __init__(self) -> None:
        self.cluster_id = str(CLUSTER)
        self.epoch = 1
        self.registrations: list[Register] = []
        self.pages: list[ReportPage] = []
        self.heartbeats: list[Heartbeat] = []
        self.orders: list[Order] = []
        self.known = False
        self.port = 0
        self._heard = trio.Event()

    async def register(self, request: Request) -> Response:
        self.registrations.append(await read_json(request, Register))
        if self.registrations[-1].cluster_id not in ("", self.cluster_id):
            raise DfsError(ErrorCode.WRONG_CLUSTER, "this is another cluster")
        self.known = True
        return json_reply(Registered(self.cluster_id, self.epoch, 0.05))

    async def report(self, request: Request) -> Response:
        self.pages.append(await read_json(request, ReportPage))
        return json_reply(Json())

    async def heartbeat(self, request: Request) -> Response:
        heartbeat = await read_json(request, Heartbeat)
        self.heartbeats.append(heartbeat)
        orders, self.orders = (self.orders, []) if self.known else ([], self.orders)
        self._heard.set()
        return json_reply(HeartbeatReply(self.epoch, heartbeat.number, not self.known, orders))

    async def until(self, true: Callable[[Heartbeat], bool]) -> Heartbeat:
        """The first heartbeat from now on that is as wanted."""
        seen = len(self.heartbeats)
        with trio.fail_after(20):
            while True:
                for heartbeat in self.heartbeats[seen:]:
                    if true(heartbeat):
                        return heartbeat
                seen = len(self.heartbeats)
                self._heard = trio.Event()
                await self._heard.wait()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        routes = [
            Route("/v1/servers/register", self.register, methods=["POST"]),
            Route("/v1/servers/{server}/report", self.report, methods=["POST"]),
            Route("/v1/servers/{server}/heartbeat", self.heartbeat, methods=["POST"]),
        ]
        async with trio.open_nursery() as nursery:
            self.port = await nursery.start(run_http, protected(routes, KEY), "127.0.0.1", self.port)
            task_status.started()


@pytest.fixture
async def metaserver() -> AsyncIterator[Metaserver]:
    async with trio.open_nursery() as nursery:
        played = Metaserver()
        await nursery.start(played.run)
        yield played
        nursery.cancel_scope.cancel()


def config(path: Path, port: int, **options: object) -> Config:
    values = {"data": str(path / "a"), "metaserver": f"127.0.0.1:{port}", "listen": "127.0.0.1:0", "reserve_bytes": 0}
    return make({**values, "http": "127.0.0.1:0", **options}, "test")


@asynccontextmanager
async def running(settings: Config) -> AsyncIterator[Ports]:
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        ports = await nursery.start(serve, settings, KEY, stop)
        yield ports
        stop.set()


def only(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        assert len(error.exceptions) == 1
        error = error.exceptions[0]
    return error


async def test_joins_reports_and_obeys(tmp_path: Path, metaserver: Metaserver, pool: Pool) -> None:
    async with running(config(tmp_path, metaserver.port, name="first", rack="r1", labels=["ssd"])) as ports:
        first = await metaserver.until(lambda heartbeat: heartbeat.disk_state == "OK")
        register = metaserver.registrations[0]
        assert (register.cluster_id, register.name, register.rack, register.labels) == ("", "first", "r1", ["ssd"])
        assert (register.host, register.port, register.http_port) == ("127.0.0.1", *ports)
        assert register.server
        assert metaserver.pages == [ReportPage(register.incarnation, 0, True, [])]
        assert (first.chunks, first.changes) == (0, [])

        writer = Writer(CHUNK)
        peer = Peer(register.server, "127.0.0.1", ports.data)
        await writer.send(pool, peer, b"data", sync=True)
        metaserver.orders = [Order(1, 1, OrderKind.SEAL, CHUNK, writer.offset, writer.index, writer.chain)]
        done = await metaserver.until(lambda heartbeat: bool(heartbeat.results))
        assert [(result.order, result.error) for result in done.results] == [(1, "")]
        assert [change.sealed for change in done.changes] == [True]
        await metaserver.until(lambda heartbeat: not heartbeat.results and not heartbeat.changes)

        metaserver.known, metaserver.epoch = False, 2  # it restarted
        await metaserver.until(lambda heartbeat: len(metaserver.registrations) == 2)
        again = metaserver.registrations[1]
        assert (again.cluster_id, again.highest_chunk) == (metaserver.cluster_id, CHUNK)
        assert [replica.chunk for replica in metaserver.pages[1].replicas] == [CHUNK]
    stored = identity.load(LocalDisk(str(tmp_path / "a")))
    assert stored is not None
    assert (stored.cluster_id, stored.highest_epoch) == (metaserver.cluster_id, 2)


async def test_serves_without_its_metaserver_once_it_has_joined(
    tmp_path: Path, metaserver: Metaserver, pool: Pool
) -> None:
    async with running(config(tmp_path, metaserver.port)):
        await metaserver.until(lambda heartbeat: True)
    nobody = transport.listen("127.0.0.1", 0)
    port = nobody.getsockname()[1]
    nobody.close()
    async with running(config(tmp_path, port)) as ports:
        await Writer(CHUNK).send(pool, Peer(1, "127.0.0.1", ports.data), b"data", sync=True)


async def test_before_it_has_joined_it_says_so(tmp_path: Path, pool: Pool) -> None:
    nobody = transport.listen("127.0.0.1", 0)
    port = nobody.getsockname()[1]
    nobody.close()
    async with running(config(tmp_path, port)) as ports:
        async with httpx.AsyncClient() as client:
            health = (await client.get(f"http://127.0.0.1:{ports.http}/health")).json()
        assert health == {"ok": True, "joined": False, "disk": "OK"}
        async with trio.open_nursery() as nursery:
            anybody = Pool(nursery, KEY, "")
            with pytest.raises(DfsError) as error:
                await Writer(CHUNK).send(anybody, Peer(1, "127.0.0.1", ports.data), b"data")
            assert error.value.code is ErrorCode.UNAVAILABLE
            nursery.cancel_scope.cancel()


async def test_metaserver_of_another_cluster_ends_it(tmp_path: Path, metaserver: Metaserver) -> None:
    async with running(config(tmp_path, metaserver.port)):
        await metaserver.until(lambda heartbeat: True)
    metaserver.cluster_id = "00000000-0000-0000-0000-000000000005"
    with trio.fail_after(20), pytest.raises(BaseExceptionGroup) as group:
        await serve(config(tmp_path, metaserver.port), KEY, trio.Event())
    error = only(group.value)
    assert isinstance(error, DfsError)
    assert error.code is ErrorCode.WRONG_CLUSTER


async def test_http_tells_about_chunks(tmp_path: Path, metaserver: Metaserver, pool: Pool) -> None:
    async with running(config(tmp_path, metaserver.port)) as ports:
        await metaserver.until(lambda heartbeat: True)
        for chunk in (1, 2, 0xABC):
            await Writer(chunk).send(pool, Peer(1, "127.0.0.1", ports.data), b"data")
        url = f"http://127.0.0.1:{ports.http}"
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.get("/health")).json() == {"ok": True, "joined": True, "disk": "OK"}
            for path in ("/chunks", "/metrics", "/chunks/1/info", "/nothing"):
                refused = await client.get(path)
                assert (refused.status_code, refused.json()["code"]) == (401, "BAD_KEY")
            client.headers["Authorization"] = f"Bearer {KEY.http_token}"
            page = (await client.get("/chunks", params={"count": 2})).json()
            assert [chunk["chunk"] for chunk in page["chunks"]] == ["0000000000000001", "0000000000000002"]
            page = (await client.get("/chunks", params={"count": 2, "after": page["next"]})).json()
            assert ([chunk["chunk"] for chunk in page["chunks"]], page["next"]) == (["0000000000000abc"], "")
            info = (await client.get("/chunks/abc/info")).json()
            assert (info["state"], info["stored_length"], info["entries"]) == ("OPEN", 4, 1)
            assert info["path"] == f"{tmp_path}/a/{chunk_path(0xABC)}"
            assert (await client.get("/chunks/77/info")).json()["code"] == "NO_SUCH_CHUNK"
            assert (await client.get("/chunks/xyz/info")).status_code == 400
            assert (await client.get("/chunks", params={"after": "?"})).status_code == 400
            assert (await client.post("/chunks", content=b"x" * 5000)).status_code == 405
            metrics = (await client.get("/metrics")).text
            assert 'chunkserver_chunks{state="OPEN"} 3.0' in metrics
            assert "chunkserver_written_bytes_total 12.0" in metrics


async def test_tells_systemd(tmp_path: Path, metaserver: Metaserver, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "10000000")
        async with running(config(tmp_path, metaserver.port)):
            await metaserver.until(lambda heartbeat: True)
        heard = {notified.recv(100) for _ in range(3)}
    assert heard == {b"READY=1", b"WATCHDOG=1", b"STOPPING=1"}


async def test_ports_in_use_are_told(tmp_path: Path) -> None:
    taken = transport.listen("127.0.0.1", 0)
    address = f"127.0.0.1:{taken.getsockname()[1]}"
    for option in ("listen", "http"):
        with pytest.raises((StartError, BaseExceptionGroup)) as error:
            await serve(config(tmp_path, 1, **{option: address}, data=str(tmp_path / option)), KEY, trio.Event())
        assert "is in use" in str(only(error.value))
    taken.close()


def test_directory_of_another_server_or_of_nobody(tmp_path: Path, damaged: set[str]) -> None:
    damaged.add("a")
    disk, who = identity.open_directory(str(tmp_path / "a"), "alice")
    assert who.server
    with pytest.raises(DataDirectoryError, match="in use by another process"):
        identity.open_directory(str(tmp_path / "a"), "alice")
    disk.unlock()
    with pytest.raises(DataDirectoryError, match="belongs to the server 'alice', not 'bob'"):
        identity.open_directory(str(tmp_path / "a"), "bob")
    disk, again = identity.open_directory(str(tmp_path / "a"), "")
    disk.unlock()
    assert again == who
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(DataDirectoryError, match=r"not empty \('cat.jpg'\)"):
        identity.open_directory(str(tmp_path / "photos"), "")
    with pytest.raises(DataDirectoryError, match="Not a directory"):
        identity.open_directory(str(tmp_path / "photos" / "cat.jpg"), "")
    (tmp_path / "a" / identity.FILE).write_text("{")
    disk, again = identity.open_directory(str(tmp_path / "a"), "")
    disk.unlock()
    assert again == who, "there is a second copy"
    (tmp_path / "a" / identity.FILE).unlink()
    disk, again = identity.open_directory(str(tmp_path / "a"), "")
    disk.unlock()
    assert again == who
    for copy in (identity.FILE, identity.COPY):
        (tmp_path / "a" / copy).write_text("{")
    with pytest.raises(identity.DamagedIdentity, match="damaged"):
        identity.open_directory(str(tmp_path / "a"), "")
    (tmp_path / "a" / identity.FILE).write_text('{"format":1,"cluster_id":"x","role":"metaserver"}')
    with pytest.raises(DataDirectoryError, match="of a metaserver"):
        identity.open_directory(str(tmp_path / "a"), "")
    (tmp_path / "a" / identity.FILE).write_text('{"format":2,"server":1,"name":"","cluster_id":""}')
    with pytest.raises(DataDirectoryError, match="has format 2"):
        identity.open_directory(str(tmp_path / "a"), "")
    for copy in (identity.FILE, identity.COPY):
        (tmp_path / "a" / copy).unlink()
    (tmp_path / "a" / "chunks" / "00" / "0000000000000100").touch()
    with pytest.raises(DataDirectoryError, match="has chunks but no identity"):
        identity.open_directory(str(tmp_path / "a"), "")


GOOD = {"data": "/d", "metaserver": "m:1"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"data": 5}, "'data': expected str, got int"),
        ({"metaserver": []}, "no metaserver"),
        ({"metaserver": "nowhere"}, "is not HOST:PORT"),
        ({"listen": "127.0.0.1:99999"}, "is not HOST:PORT"),
        ({"http": ":80"}, "is not HOST:PORT"),
        ({"listen": "0.0.0.0:1"}, "can be reached by others"),
        ({"http": "192.0.2.1:1"}, "can be reached by others"),
        ({"log_level": "loud"}, "log level 'loud'"),
        ({"reserve_bytes": -1}, "must not be negative"),
    ],
)
def test_configuration_that_cannot_be(change: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        make({**GOOD, **change}, "file")
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_configuration_defaults() -> None:
    made = make({**GOOD, "listen": "0.0.0.0:1", "http": "0.0.0.0:2", "key_file": "k"}, "file")
    assert made.metaservers == ["m:1"]
    assert made.advertised_host == socket.gethostname()
    assert made.reserve(10 << 40) == 1 << 30
    assert made.reserve(1000) == 10
    assert split_address("[::1]:5", "x") == ("::1", 5)


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    """The command line configures logging for the whole process, to a standard error that ends with the test."""
    handlers = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = handlers
    structlog.reset_defaults()


def run_cli(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, list(arguments))
    return result.exit_code, result.stderr


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text("ab" * 32)
    path.chmod(0o600)
    return path


def test_command_line_says_what_is_wrong(tmp_path: Path, key_file: Path) -> None:
    good = ["--data", str(tmp_path / "a"), "--metaserver", "127.0.0.1:1", "--http", "127.0.0.1:0"]
    unknown = tmp_path / "unknown.toml"
    unknown.write_text('data = "/d"\nmetaserver = "m:1"\ncolour = "red"\n')
    broken = tmp_path / "broken.toml"
    broken.write_text("data = ")
    key_file.chmod(0o644)
    for arguments, expected, text in [
        ([], 78, "the key 'data' is missing"),
        (["--config", str(unknown)], 78, f"{unknown}: unknown key 'colour'"),
        (["--config", str(broken)], 78, "is not TOML"),
        (["--config", str(tmp_path / "none")], 1, "No such file"),
        ([*good, "--key-file", str(key_file)], 1, "is readable by others"),
        ([*good, "--key-file", str(tmp_path / "none")], 1, "no cluster key at"),
        ([*good, "--listen", "192.0.2.1:5"], 78, "can be reached by others"),
        (["check", "--data", str(tmp_path)], 1, "is not a chunkserver's data directory"),
    ]:
        code, stderr = run_cli(*arguments)
        assert code == expected, text
        assert text in stderr
        assert stderr.startswith("chunkserver: ")
        assert stderr.count("\n") == 1
    assert run_cli("--colour", "red")[0] == 2


def test_command_line_names_the_port_in_use(tmp_path: Path, key_file: Path) -> None:
    taken = transport.listen("127.0.0.1", 0)
    address = f"127.0.0.1:{taken.getsockname()[1]}"
    good = ["--data", str(tmp_path / "a"), "--metaserver", "127.0.0.1:1", "--key-file", str(key_file)]
    for option, other in (("--http", "--listen"), ("--listen", "--http")):
        code, stderr = run_cli(*good, option, address, other, "127.0.0.1:0")
        assert code == 1
        assert stderr.splitlines()[-1].startswith(f"chunkserver: port {address.rpartition(':')[2]} on 127.0.0.1 is in")
    taken.close()


def test_check_command_finds_damage(tmp_path: Path, damaged: set[str]) -> None:
    damaged.add("a")
    disk, who = identity.open_directory(str(tmp_path / "a"), "")
    who.cluster_id = str(CLUSTER)
    identity.save(disk, who)
    disk.unlock()
    result = CliRunner().invoke(cli.app, ["check", "--data", str(tmp_path / "a")])
    assert (result.exit_code, result.stdout.splitlines()[-1][:16]) == (0, "0 chunks checked")
    (tmp_path / "a" / "chunks" / "05" / "0000000000000006").write_bytes(os.urandom(10))
    result = CliRunner().invoke(cli.app, ["check", "--data", str(tmp_path / "a")])
    assert result.exit_code == 1
    assert "chunks/05/0000000000000006: not where this chunk belongs" in result.stdout

"""The HTTP interface, through httpx against the ASGI application itself."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio
import trio.testing
from running_metaserver import FakeServer, Running, running

from metaserver import protocol
from metaserver.http import make_app
from metaserver.key import ClusterKey
from metaserver.protocol import Heartbeat, HeartbeatReply, Registered, ReplicaReport, ReportPage, ServerStatus
from metaserver.schema import IdKind

KEY = ClusterKey(b"k" * 32)


@asynccontextmanager
async def serving(directory: Path, token: str = KEY.http_token) -> AsyncIterator[tuple[Running, httpx.AsyncClient]]:
    async with running(directory) as metaserver:
        parts = metaserver.parts
        app = make_app(parts.service, parts.control, parts.status, parts.admin, parts.history, KEY)
        headers = {"authorization": f"Bearer {token}"}
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://metaserver", headers=headers) as client:
            yield metaserver, client


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


async def post(client: httpx.AsyncClient, path: str, message: Any) -> httpx.Response:
    return await client.post(path, content=msgspec.json.encode(message))


async def test_only_health_answers_without_the_token(data: Path) -> None:
    async with serving(data, token="wrong") as (_, client):
        health = await client.get("/health")
        assert (health.status_code, health.json()["role"]) == (200, "metaserver")
        for path in ("/v1/status", "/metrics", "/v1/check", "/servers", "/v1/chunks/1", "/nothing", "/v1/copies/1"):
            answer = await client.get(path)
            assert (answer.status_code, answer.json()["code"]) == (401, "BAD_KEY")


async def test_a_chunkserver_registers_reports_and_sends_heartbeats(data: Path) -> None:
    async with serving(data) as (metaserver, client):
        server = FakeServer(metaserver, 7, "host7", 1 << 40)
        server.incarnation = 5
        answer = await post(client, "/v1/servers/register", server.register_message())
        registered = msgspec.json.decode(answer.content, type=Registered)
        assert (registered.epoch, registered.heartbeat_seconds) == (metaserver.committer.epoch, 1.0)
        page = ReportPage(5, 0, True, [ReplicaReport(3, 10, 1, 9, True)])
        assert (await post(client, "/v1/servers/7/report", page)).json() == {}
        beat = Heartbeat(5, 1, 1 << 40, 1 << 39, 1, "OK", [], [], [], 0, 0)
        answer = await post(client, "/v1/servers/7/heartbeat", beat)
        assert msgspec.json.decode(answer.content, type=HeartbeatReply) == HeartbeatReply(
            registered.epoch, 1, False, [], metaserver.committer.id_limit(IdKind.CHUNK)
        )
        (shown,) = msgspec.json.decode((await client.get("/servers")).content, type=list[ServerStatus])
        assert (shown.server, shown.state, shown.free) == (7, "UP", 1 << 39)


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/servers/register", b"{", 400, "INVALID"),
        ("/v1/servers/register", b"[]", 400, "INVALID"),
        ("/v1/servers/register", b'{"server": 1}', 400, "INVALID"),
        ("/v1/servers/x/heartbeat", b"{}", 400, "INVALID"),
        ("/v1/servers/1/heartbeat", b"", 400, "INVALID"),
        ("/v1/servers/1/heartbeat", b"[" * 5000, 400, "INVALID"),
        ("/v1/servers/1/report", b'{"incarnation":1,"page":0,"last":true,"replicas":[]}', 409, "STALE_SESSION"),
        ("/v1/servers/1/nothing", b"{}", 404, "NOT_FOUND"),
        ("/v1/status", b"{}", 405, "NOT_SUPPORTED"),
        ("/v1/servers/1/drain", b"{", 400, "INVALID"),
        ("/v1/servers/nobody/drain", b"{}", 404, "NOT_FOUND"),
        ("/v1/servers/nobody/undrain", b"{}", 404, "NOT_FOUND"),
        ("/v1/servers/nobody/remove", b'{"lose": true}', 404, "NOT_FOUND"),
        ("/v1/servers/1/remove", b'{"lose": 5}', 400, "INVALID"),
        ("/v1/copies/1", b"[]", 400, "INVALID"),
        ("/v1/copies/1", b'{"copies": 99}', 400, "INVALID"),
        ("/v1/copies/99", b'{"copies": 2}', 404, "NOT_FOUND"),
        ("/v1/copies/x", b'{"copies": 2}', 400, "INVALID"),
        ("/v1/rebalance", b"[]", 400, "INVALID"),
        ("/v1/servers/register", b" " * (protocol.HTTP_BODY_LIMIT + 1), 413, "ARGUMENT_TOO_BIG"),
    ],
)
async def test_bad_bodies_get_one_line(data: Path, path: str, body: bytes, status: int, code: str) -> None:
    async with serving(data) as (metaserver, client):
        await metaserver.parts.resuming.window.closed.wait()
        answer = await client.post(path, content=body)
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert "\n" not in answer.json()["text"]


async def test_numbers_that_fit_into_no_row_are_refused(data: Path) -> None:
    async with serving(data) as (metaserver, client):
        server = await metaserver.server(1)
        beat = Heartbeat(server.incarnation, 9, 1, 1, 1, "OK", [ReplicaReport(-5, 1, 1, 1, True)], [], [], 0, 0)
        answer = await post(client, "/v1/servers/1/heartbeat", beat)
        assert (answer.status_code, answer.json()["code"]) == (400, "INVALID")
        assert (await client.get("/v1/chunks/99999999999999999999999")).status_code == 400
        assert (await client.get("/v1/chunks/99999999999999999999")).status_code == 400
        assert (await client.get("/v1/chunks/-1")).status_code == 400
        assert (await client.get("/v1/chunks/99")).json()["code"] == "NOT_FOUND"


async def test_status_shows_servers_sessions_and_health(data: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with serving(data) as (metaserver, client):
        await metaserver.server(1)
        second = await metaserver.server(2)
        mount = await metaserver.mount(host="laptop")
        ino = await mount.make(b"f", open=True)
        chunk = (await mount.allocate()).chunk
        await mount.write(ino, chunk, 100)
        await mount.call(protocol.KEEP_ALIVE, protocol.KeepAlive(0, 4096))
        status = msgspec.json.decode((await client.get("/v1/status")).content, type=protocol.Status)
        assert (status.copies, status.window_open, status.read_only) == (2, False, "")
        assert [(each.server, each.state, each.reserved) for each in status.servers] == [
            (1, "UP", protocol.CHUNK_CAPACITY - 100),
            (2, "UP", protocol.CHUNK_CAPACITY - 100),
        ]
        (session,) = status.sessions
        assert (session.host, session.connected, session.opened, session.dirty_bytes) == ("laptop", True, 1, 4096)
        assert status.chunks == protocol.ChunkHealth(1, 1, 0, 0, 1, 0)
        # The file as `dfs chunks` shows it.
        shown = msgspec.json.decode((await client.get(f"/v1/chunks/{ino}")).content, type=protocol.FileStatus)
        (extent,) = shown.extents
        assert (extent.chunk, extent.length, extent.chunk_state) == (f"{chunk:016x}", 100, "OPEN")
        assert extent.replicas[0].path == f"/data1/chunks/{chunk & 0xFF:02x}/{chunk:016x}"
        # One server falls silent: its chunks have too few copies at once.
        for _ in range(8):
            await trio.sleep(1)
            await second.beat()
        status = msgspec.json.decode((await client.get("/v1/status")).content, type=protocol.Status)
        assert status.chunks == protocol.ChunkHealth(1, 0, 1, 0, 1, 0)
        assert [each.state for each in status.servers] == ["DOWN", "UP"]


async def test_health_counts_every_chunk_once_over_slices(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaserver.status.SLICE", 3)
    async with serving(data) as (metaserver, client):
        await metaserver.server(1)
        await metaserver.server(2)
        mount = await metaserver.mount()
        for _ in range(10):
            await mount.allocate()
        counts = (await client.get("/v1/status")).json()["chunks"]
        assert (counts["total"], counts["healthy"], counts["open"]) == (10, 10, 10)


async def test_check_snapshot_and_metrics(data: Path) -> None:
    async with serving(data) as (metaserver, client):
        await metaserver.server(1)
        mount = await metaserver.mount()
        await mount.make(b"f")
        await mount.lookup(b"f")
        report = msgspec.json.decode((await client.get("/v1/check")).content, type=protocol.CheckReport)
        assert report.problems == []
        made = (await client.post("/v1/snapshot")).json()
        assert await trio.Path(made["path"]).is_file()
        text = (await client.get("/metrics")).text
        assert 'metaserver_requests_total{method="lookup"} 1.0' in text
        assert "metaserver_sessions 1.0" in text
        assert "metaserver_dead_bytes 0.0" in text
        assert "metaserver_cleaned_chunks_total 0.0" in text
        assert 'metaserver_chunkserver_up{name="server1",server="1"} 1.0' in text


async def test_an_operator_drains_balances_and_sets_copies(data: Path) -> None:
    async with serving(data) as (metaserver, client):
        for number in (1, 2, 3):
            await metaserver.server(number)
        await metaserver.mount()
        assert "is being emptied" in (await client.post("/v1/servers/server1/drain", content=b"{}")).json()["text"]
        shown = (await client.get("/v1/status")).json()
        assert [server["state"] for server in shown["servers"]] == ["DRAINING", "UP", "UP"]
        assert "takes data again" in (await client.post("/v1/servers/1/undrain")).json()["text"]
        assert (await client.post("/v1/rebalance", content=b"{}")).json()["mode"] == "ASKED"
        assert (await client.post("/v1/rebalance", content=b'{"stop": true}')).json()["mode"] == "STOPPED"
        assert (await client.get("/v1/rebalance")).json()["mode"] == "STOPPED"
        assert (await client.post("/v1/copies/1", content=b'{"copies": 3}')).json()["default"] == 2
        await trio.sleep(0.1)
        assert (await client.get("/v1/copies/1")).json()["own"] == 3
        assert (await client.get("/v1/missing")).json() == []
        assert "metaserver_copies_waiting 0.0" in (await client.get("/metrics")).text

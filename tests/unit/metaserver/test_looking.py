"""What `dfs gc` and `dfs ls` ask for, against the ASGI application itself; tests/mount has them on real clusters."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import msgspec
import pytest
from running_metaserver import running

from metaserver import looking
from metaserver.grace import Graces
from metaserver.http import make_app
from metaserver.key import ClusterKey
from metaserver.protocol import EntryPage, Garbage

KEY = ClusterKey(b"k" * 32)


@asynccontextmanager
async def serving(directory: Path, token: str = KEY.http_token) -> AsyncIterator[httpx.AsyncClient]:
    async with running(directory) as metaserver:
        parts = metaserver.parts
        more = looking.routes(parts.garbage, parts.listing, parts.admin)
        app = make_app(parts.service, parts.control, parts.status, parts.admin, parts.history, KEY, more)
        transport = httpx.ASGITransport(app=app)
        headers = {"authorization": f"Bearer {token}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://metaserver", headers=headers) as client:
            yield client


async def test_an_empty_cluster_has_no_garbage(tmp_path: Path) -> None:
    async with serving(tmp_path / "data") as client:
        for method in ("GET", "POST"):
            answer = await client.request(method, "/v1/garbage")
            assert msgspec.json.decode(answer.content, type=Garbage) == Garbage()
        page = msgspec.json.decode((await client.get("/v1/entries/1")).content, type=EntryPage)
        assert page == EntryPage([], 0)
        itself = msgspec.json.decode((await client.get("/v1/entries/1?itself=1")).content, type=EntryPage)
        assert [entry.ino for entry in itself.entries] == [1]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/entries/0", 400),
        ("/v1/entries/x", 400),
        ("/v1/entries/99999999999999999999", 400),
        ("/v1/entries/12345", 404),
        ("/v1/entries/1?after=-1", 400),
        ("/v1/entries/1?after=18446744073709551615", 400),
    ],
)
async def test_bad_questions_are_refused(tmp_path: Path, path: str, status: int) -> None:
    async with serving(tmp_path / "data") as client:
        assert (await client.get(path)).status_code == status


async def test_strangers_are_refused(tmp_path: Path) -> None:
    async with serving(tmp_path / "data", token="wrong") as client:
        for method, path in (("GET", "/v1/garbage"), ("POST", "/v1/garbage"), ("GET", "/v1/entries/1")):
            assert (await client.request(method, path)).status_code == 401


def test_what_is_let_go_is_due_and_counts_no_more() -> None:
    graces = Graces(600.0)
    graces.died(1, 1000, 50.0)
    graces.let_go(1)
    graces.let_go(2)
    assert (graces.due(1, pressing=False), graces.due(2, pressing=False), graces.kept_bytes) == (0.0, 0.0, 0)
    graces.died(1, 1000, 60.0)
    assert graces.due(1, pressing=False) == 0.0
    graces.forget(1)
    graces.died(1, 1000, 70.0)
    assert graces.due(1, pressing=False) == 670.0

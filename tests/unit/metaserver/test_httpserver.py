"""What both servers share over HTTP: the token, bounds, errors as code and text; and the word to systemd."""

import contextlib
import json
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

import httpx
import pytest
import structlog
import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from metaserver import httpserver, logs, transport
from metaserver.errors import DfsError, ErrorCode
from metaserver.key import ClusterKey

KEY = ClusterKey(bytes(range(32)))
TOKEN = {"Authorization": f"Bearer {KEY.http_token}"}


async def ok(_: Request) -> Response:
    return httpserver.json_reply({"ok": True})


async def refuse(request: Request) -> Response:
    raise DfsError(ErrorCode[request.query_params["code"]], "in words")


async def stumble(_: Request) -> Response:
    raise KeyError("a mistake of ours")


async def double(request: Request) -> Response:
    numbers = await httpserver.read_json(request, list[int])
    return httpserver.json_reply([2 * number for number in numbers])


ROUTES = [
    Route("/health", ok),
    Route("/ok", ok),
    Route("/refuse", refuse),
    Route("/stumble", stumble),
    Route("/double", double, methods=["POST"]),
]


@contextlib.asynccontextmanager
async def serving(key: ClusterKey | None = KEY) -> AsyncIterator[httpx.AsyncClient]:
    app = httpserver.protected(ROUTES, key, body_limit=1000)
    async with trio.open_nursery() as nursery:
        port = await nursery.start(httpserver.run_http, app, "127.0.0.1", 0)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            yield client
        nursery.cancel_scope.cancel()


async def test_only_open_paths_answer_without_the_token() -> None:
    async with serving() as client:
        assert (await client.get("/health")).json() == {"ok": True}
        for headers in ({}, {"Authorization": "Bearer"}, {"Authorization": KEY.http_token}, {"Authorization": "é"}):
            for path in ("/ok", "/nothing", "/health/", "//health"):
                answer = await client.get(path, headers={k: v.encode("latin-1") for k, v in headers.items()})
                assert (answer.status_code, answer.json()["code"]) == (401, "BAD_KEY")
        assert (await client.get("/ok", headers=TOKEN)).status_code == 200


async def test_without_a_key_no_token_is_asked_for() -> None:
    async with serving(None) as client:
        assert (await client.get("/ok")).status_code == 200


async def test_errors_are_code_and_text() -> None:
    async with serving() as client:
        client.headers.update(TOKEN)
        for code, status in [("NOT_FOUND", 404), ("INVALID", 400), ("WRONG_CLUSTER", 409), ("UNAVAILABLE", 503)]:
            answer = await client.get("/refuse", params={"code": code})
            assert (answer.status_code, answer.json()) == (status, {"code": code, "text": "in words"})
        answer = await client.get("/stumble")
        assert (answer.status_code, answer.json()["code"]) == (500, "INTERNAL")
        assert "mistake" not in answer.text
        assert (await client.get("/nothing")).json()["code"] == "NOT_FOUND"
        assert (await client.post("/ok")).json()["code"] == "NOT_SUPPORTED"
        assert (await client.get("/ok")).status_code == 200


async def test_bodies_are_checked_and_bounded() -> None:
    async with serving() as client:
        client.headers.update(TOKEN)
        assert (await client.post("/double", content=b"[1, 2]")).json() == [2, 4]
        for body in (b"", b"{", b'["1"]', b"[" * 900):
            answer = await client.post("/double", content=body)
            assert (answer.status_code, answer.json()["code"]) == (400, "INVALID")
        long = b"[" + b" " * 1000 + b"1]"
        answer = await client.post("/double", content=long)
        assert (answer.status_code, answer.json()["code"]) == (413, "ARGUMENT_TOO_BIG")
        # Without a length given in advance (chunked), as far as it comes.
        url = client.base_url.join("/double")
        answer = await trio.to_thread.run_sync(lambda: httpx.post(url, headers=TOKEN, content=iter([long[:600]] * 9)))
        assert (answer.status_code, answer.json()["code"]) == (413, "ARGUMENT_TOO_BIG")


@pytest.mark.parametrize("token", ["wrong", KEY.http_token], ids=["refused", "answered"])
@pytest.mark.parametrize("path", ["/health", "/nothing"])
async def test_an_answer_before_the_end_of_a_body_ends_the_connection(token: str, path: str) -> None:
    """Hypercorn waits for ever for an application that does not take what it has received."""
    received = bytearray()

    async def send(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            for _ in range(200):
                await stream.send_all(bytes(1 << 20))

    async def receive(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            async for data in stream:
                received.extend(data)

    async with trio.open_nursery() as nursery:
        port = await nursery.start(httpserver.run_http, httpserver.protected(ROUTES, KEY), "127.0.0.1", 0)
        head = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: 1000000000\r\n\r\n"
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            await stream.send_all(head.encode())
            with trio.fail_after(60):
                async with trio.open_nursery() as both:
                    both.start_soon(send, stream)
                    both.start_soon(receive, stream)
        nursery.cancel_scope.cancel()
    assert received.startswith(b"HTTP/1.1 ")
    # Whoever does not send another megabyte has to know, too.
    assert b"\r\nconnection: close\r\n" in received.partition(b"\r\n\r\n")[0].lower() + b"\r\n"


async def test_an_answer_to_a_request_without_a_body_keeps_the_connection() -> None:
    async with trio.open_nursery() as nursery:
        port = await nursery.start(httpserver.run_http, httpserver.protected(ROUTES, KEY), "127.0.0.1", 0)
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            for _ in range(3):
                await stream.send_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                received = b""
                with trio.fail_after(30):
                    while not received.endswith(b"}"):
                        received += await stream.receive_some(65536)
                assert received.startswith(b"HTTP/1.1 200")
                assert b"connection: close" not in received.lower()
        nursery.cancel_scope.cancel()


async def test_port_in_use() -> None:
    with transport.listen("127.0.0.1", 0) as taken, pytest.raises(OSError, match="in use"):
        await httpserver.run_http(httpserver.protected(ROUTES, KEY), "127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.1", False),
        ("", False),
    ],
)
def test_is_loopback(host: str, loopback: bool) -> None:
    assert httpserver.is_loopback(host) is loopback


@pytest.fixture
def _restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before
    structlog.reset_defaults()


@pytest.mark.usefixtures("_restored_logging")
def test_logs_are_lines_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", json=True)
    structlog.get_logger("x").info("happened", count=3)
    structlog.get_logger("x").debug("too much detail")
    logging.getLogger("elsewhere").warning("also %s", "happened")
    logging.getLogger("httpx").info("every request")
    ours, theirs = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert (ours["event"], ours["count"], ours["level"]) == ("happened", 3, "info")
    assert (theirs["event"], theirs["level"]) == ("also happened", "warning")


@pytest.mark.usefixtures("_restored_logging")
def test_tracebacks_do_not_show_variables(capsys: pytest.CaptureFixture[str]) -> None:
    for as_json in (False, True):
        logs.configure("info", json=as_json)
        secret = "the key itself"
        try:
            raise ValueError(len(secret))
        except ValueError:
            structlog.get_logger("x").exception("failed")
        text = capsys.readouterr().err
        assert "ValueError: 14" in text
        assert "the key itself" not in text.replace('secret = "the key itself"', "")


def test_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="log level 'loud'"):
        logs.configure("loud")

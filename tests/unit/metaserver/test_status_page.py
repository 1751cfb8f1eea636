"""The status page: what it says, that it stays readable whatever it is told, and who may see it."""

import base64
from pathlib import Path

import httpx
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from running_metaserver import FakeServer, running
from starlette.applications import Starlette

from metaserver import history, page
from metaserver.history import Event, History, Sample, Seen, changes, grown
from metaserver.http import make_app
from metaserver.key import ClusterKey
from metaserver.protocol import ChunkHealth, ScrubStatus, ServerStatus, SessionStatus, Status

KEY = ClusterKey(b"k" * 32)
NOW = 1_800_000_000 * 10**9


def server(number: int = 1, state: str = "UP", name: str = "host1", **more: object) -> ServerStatus:
    made = ServerStatus(number, name, state, "10.0.0.1", 9500, 9501, "", "/data", 1 << 40, 1 << 39, 0, 12, 0.4)
    for field, value in more.items():
        setattr(made, field, value)
    return made


def status(*servers: ServerStatus, **more: object) -> Status:
    health = ChunkHealth(12, 12, 0, 0, 0, 0)
    made = Status("cluster", 3, 9, 9, "1", 1, 77.0, False, list(servers), [], health, 5, 1 << 41, 1 << 40, 0, 0)
    for field, value in more.items():
        setattr(made, field, value)
    return made


def render(shown: Status, samples: list[Sample] | None = None, events: list[Event] | None = None) -> str:
    return page.Page().render(shown, samples or [], events or [], NOW)


def test_a_healthy_cluster_in_one_sentence() -> None:
    html = render(status(server()), [Sample(NOW, 120.0, 3 << 20, 5 << 20)], [Event(NOW - 65 * 10**9, "host1 joined")])
    assert "All is well" in html
    assert "Healthy: the chunkserver is up and every chunk has its 1 copy." in html
    assert "5.0 MiB/s" in html
    assert "65 s ago" in html


def test_what_is_wrong_comes_first() -> None:
    shown = status(server(), server(2, "LOST", "host2"), chunks=ChunkHealth(12, 9, 2, 1, 0, 0))
    html = render(shown, events=[Event(NOW, "host2 is LOST, was DOWN", True)])
    assert html.index("DATA IS MISSING: 1 chunk") < html.index("Host2 is LOST") < html.index("<h2>Space</h2>")
    assert '<li class="bad">' in html
    assert "All is well" not in html


@given(st.text(), st.text())
def test_names_are_text_and_nothing_else(name: str, mountpoint: str) -> None:
    evil = name + "<script>alert(1)</script>\"'"
    shown = status(server(name=evil), sessions=[SessionStatus(1, evil, mountpoint + "<img>", True, 1.0, 2, 3)])
    html = render(shown, events=[Event(NOW, evil)])
    assert html.count("<script") == 1
    assert "<img" not in html


def test_the_only_script_is_the_one_that_the_policy_names() -> None:
    html = render(status(server()))
    script = html.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(page.hashlib.sha256(script.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in page.Page().headers["Content-Security-Policy"]


@given(st.lists(st.floats(0, 1e15), max_size=history.KEPT_SAMPLES))
def test_a_plot_stays_in_its_frame(values: list[float]) -> None:
    points = [tuple(map(float, point.split(","))) for point in page.plot("x", values, "B").points.split()]
    assert len(points) == len(values)
    assert all(-0.1 <= x <= page.PLOT_WIDTH + 0.1 and 0 <= y <= page.PLOT_HEIGHT for x, y in points)
    assert points == sorted(points, key=lambda point: point[0])
    assert not points or points[-1][0] == page.PLOT_WIDTH


# -- what happened ---------------------------------------------------------------------------------------------------


def seen(*servers: ServerStatus, sessions: tuple[SessionStatus, ...] = (), **more: object) -> Seen:
    return Seen(servers, sessions, 0, {}, {}, **more)  # type: ignore[arg-type]


MOUNT = SessionStatus(1, "desk", "/mnt", True, 0.0, 0, 0)
AWAY = SessionStatus(1, "desk", "/mnt", False, 9.0, 0, 0)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (seen(), seen(server()), [("host1 joined", False)]),
        (seen(server()), seen(server(state="DOWN")), [("host1 is DOWN, was UP", True)]),
        (seen(server(state="LOST")), seen(server()), [("host1 is UP, was LOST", False)]),
        (seen(server()), seen(), [("host1 was removed", False)]),
        (seen(server(disk_state="OK")), seen(server(disk_state="FULL")), [("the disk of host1 is FULL", True)]),
        (
            seen(server()),
            seen(server(scrub=ScrubStatus(1, 1, 1.0, 1.0, 2))),
            [("scrubbing found 2 damaged replicas on host1", True)],
        ),
        (seen(), seen(sessions=(MOUNT,)), [("/mnt on desk was mounted", False)]),
        (seen(sessions=(MOUNT,)), seen(sessions=(AWAY,)), [("/mnt on desk went away", True)]),
        (seen(sessions=(AWAY,)), seen(sessions=(MOUNT,)), [("/mnt on desk is back", False)]),
        (seen(sessions=(MOUNT,)), seen(), [("/mnt on desk was unmounted", False)]),
        (seen(), seen(copies_waiting=3), [("repair began: chunks have fewer copies than wanted", True)]),
        (seen(copies_waiting=3), seen(), [("repair has nothing left to do", False)]),
        (seen(), seen(full=True), [("the metaserver's disk is full", True)]),
        (seen(read_only="old"), seen(), [("changes are taken again", False)]),
        (seen(server(), sessions=(MOUNT,)), seen(server(), sessions=(MOUNT,)), []),
    ],
)
def test_what_happened_in_words(old: Seen, new: Seen, said: list[tuple[str, bool]]) -> None:
    assert changes(old, new) == said


def test_counters_that_began_again() -> None:
    assert grown({1: 100, 2: 50}, {1: 130, 2: 7}) == 37


async def test_samples_and_events_come_with_time(autojump_clock: trio.testing.MockClock) -> None:
    now = [Seen([server()], [], 0, {1: 0}, {1: 0})]
    kept = History(lambda: now[0], lambda: round(trio.current_time() * 1e9))
    with trio.move_on_after(3650):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kept.run)
            await trio.sleep(5)
            now[0] = Seen([server(state="DOWN")], [], 1000, {1: 500}, {1: 2000})
            await trio.sleep_forever()
    assert len(kept.samples) == history.KEPT_SAMPLES
    assert [event.text for event in kept.events] == ["the metaserver started", "host1 is DOWN, was UP"]


# -- who sees it -----------------------------------------------------------------------------------------------------


def basic(password: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"me:{password}".encode()).decode()}


async def ask(app: Starlette, method: str, path: str, headers: dict[str, str]) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://metaserver") as client:
        return await client.request(method, path, headers=headers)


async def test_a_browser_may_look_and_only_look(tmp_path: Path) -> None:
    async with running(tmp_path / "data") as metaserver:
        parts = metaserver.parts
        FakeServer(metaserver, 7, "host7", 1 << 40)
        app = make_app(parts.service, parts.control, parts.status, parts.admin, parts.history, KEY)
        stranger = await ask(app, "GET", "/", {})
        assert stranger.status_code == 401
        assert stranger.headers["www-authenticate"].startswith("Basic ")
        assert (await ask(app, "GET", "/", basic("wrong"))).status_code == 401
        assert (await ask(app, "GET", "/", {"authorization": "Basic ???"})).status_code == 401
        shown = await ask(app, "GET", "/", basic(KEY.http_token))
        assert (shown.status_code, shown.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert "default-src 'none'" in shown.headers["content-security-policy"]
        # What another site could have a browser do.
        assert (await ask(app, "POST", "/v1/snapshot", basic(KEY.http_token))).status_code == 401

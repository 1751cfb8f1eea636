"""What `dfs drain`, `rebalance` and `set-copies` say; the answers are made up, no servers here."""

import stat
from pathlib import Path

import httpx
import msgspec
import pytest

from dfsmount import dfs_copies, dfs_servers
from dfsmount.dfs_api import Api
from dfsmount.dfs_find import Access
from dfsmount.dfs_layout import Problem
from dfsmount.dfs_mounts import Mount
from dfsmount.dfs_servers import Rate
from dfsmount.dfs_show import missing_lines
from metaserver.protocol import (
    ChunkHealth,
    CopiesStatus,
    MissingFile,
    Planned,
    RebalanceStatus,
    RepairStatus,
    ServerStatus,
    Status,
)
from metaserver.words import repair_text, stuck_text


def server(**changes: object) -> ServerStatus:
    shown = ServerStatus(7, "disk7", "DRAINING", "h", 1, 2, "", "/d", 1 << 40, 1 << 39, 0, 9, 0.5)
    return msgspec.structs.replace(shown, **changes)


def status(*servers: ServerStatus) -> Status:
    return Status(
        "c", 1, 2, 2, "0", 2, 5.0, False, list(servers), [], ChunkHealth(0, 0, 0, 0, 0, 0), 1, 10, 10, 0, 0
    )  # fmt: skip


@pytest.fixture
def access(tmp_path: Path) -> Access:
    key = tmp_path / "key"
    key.write_text("6b" * 32)
    key.chmod(stat.S_IRUSR | stat.S_IWUSR)
    return Access("metaserver:9401", key)


def answering(access: Access, *answers: object) -> tuple[Api, list[httpx.Request]]:
    """An Api whose requests get these answers one after another; the last one for ever."""
    asked: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, content=msgspec.json.encode(answers[min(len(asked), len(answers)) - 1]))

    return Api(access, httpx.MockTransport(handle)), asked


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dfs_servers.time, "sleep", lambda seconds: None)


def test_a_drain_is_watched_to_its_end(access: Access, capsys: pytest.CaptureFixture[str]) -> None:
    planned = Planned(7, "disk7", "begun")
    api, asked = answering(access, status(server(to_move=5, to_move_bytes=1 << 20, to_move_open=1)), status(server()))
    done = dfs_servers.wait_empty(api, planned, quiet=False)
    assert done.text == "Nothing is left on disk7: it can be switched off"
    assert "disk7: 5 replicas (1.0 MiB) left; 1 of them still written to" in capsys.readouterr().out
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("servers", "text"),
    [
        ((), "was removed meanwhile"),
        ((server(state="UP"),), "is not being emptied any more"),
        ((server(state="LOST", to_move=5),), "`dfs remove disk7` forgets it"),
    ],
)
def test_what_ends_a_drain_otherwise(access: Access, servers: tuple[ServerStatus, ...], text: str) -> None:
    api, _ = answering(access, status(*servers))
    with pytest.raises(Problem, match=text):
        dfs_servers.wait_empty(api, Planned(7, "disk7", ""), quiet=True)


def test_an_interrupted_drain_goes_on_and_says_so(access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dfs_servers.time, "sleep", interrupt)
    api, _ = answering(access, status(server(to_move=5)))
    with pytest.raises(Problem, match=r"disk7 goes on being emptied; .* `dfs undrain disk7` stops it"):
        dfs_servers.wait_empty(api, Planned(7, "disk7", ""), quiet=True)
    api, _ = answering(access, RebalanceStatus("ASKED", 0.5, 1, 0, 0, 100))
    with pytest.raises(Problem, match="goes on in the background"):
        dfs_servers.wait_even(api, quiet=True)


def test_a_rebalance_is_watched_to_its_end(access: Access, capsys: pytest.CaptureFixture[str]) -> None:
    going, done = RebalanceStatus("ASKED", 0.5, 2, 3, 3 << 20, 1 << 30), RebalanceStatus("IDLE", 0.012, 0, 4, 4096, 0)
    api, _ = answering(access, going, going, done)
    assert dfs_servers.wait_even(api, quiet=False) == done
    assert "1.0 GiB to move, 3 chunks moved" in capsys.readouterr().out
    assert dfs_servers.rebalance_text(done).startswith("Nothing is being moved. The fullest server is 1.2% fuller")
    assert "2 on their way" in dfs_servers.rebalance_text(going)


def test_rates_and_what_is_left() -> None:
    rate = Rate()
    assert [rate.left(1000, 0.0), rate.left(900, 1.0)] == ["", ""]
    assert rate.left(500, 5.0) == ", 100 B/s, about 5 s left"
    assert rate.left(1000, 6.0) == ""
    assert stuck_text(server(to_move_stuck=1)) == "1 chunk cannot leave disk7: too few other servers"
    assert dfs_servers.drain_text(server(state="DOWN", to_move_stuck=2), Rate()).endswith("; the server is DOWN")


def test_repair_and_missing_files_are_told() -> None:
    assert repair_text(RepairStatus()) == ""
    text = repair_text(RepairStatus(3, 300 << 20, 2, float(30 << 20), 10.0, 5))
    assert text == "3 chunks (300 MiB) to copy, 5 to move, 2 under way, 30.0 MiB/s of late, about 10 s left"
    lines = missing_lines([MissingFile(number, f"/f{number}" if number else "", 1) for number in range(12)])
    assert (lines[0], lines[1]) == ("missing     inode 0", "missing     /f1")
    assert len(lines) == 11
    assert "2 or more others" in lines[-1]


def test_copies_of_paths(access: Access, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    sent: list[tuple[str, str, bytes]] = []

    def handle(request: httpx.Request) -> httpx.Response:
        sent.append((request.method, request.url.path, request.content))
        own = 3 if request.method == "POST" else 0
        return httpx.Response(200, content=msgspec.json.encode(CopiesStatus(1, own, 2, False, own == 3)))

    monkeypatch.setattr(dfs_copies, "Api", lambda access: Api(access, httpx.MockTransport(handle)))
    # A local file has an inode number, too.
    with pytest.raises(Problem, match="is not on a dfs mount"):
        dfs_copies.each([path], lambda _: access, 3)
    monkeypatch.setattr(dfs_copies, "mounts", lambda: [Mount("h:1", str(tmp_path), "fuse.dfs")])
    (shown,) = dfs_copies.each([path], lambda _: access, None)
    assert dfs_copies.wanted(shown) == "2 copies (the default)"
    (shown,) = dfs_copies.each([path], lambda _: access, 3)
    assert dfs_copies.wanted(shown) == "3 copies"
    ino = path.stat().st_ino
    assert sent == [("GET", f"/v1/copies/{ino}", b""), ("POST", f"/v1/copies/{ino}", b'{"copies":3}')]
    # Nothing is changed if one of the paths does not exist.
    with pytest.raises(Problem, match="cannot find"):
        dfs_copies.each([path, tmp_path / "none"], lambda _: access, 3)
    assert len(sent) == 2
    assert (dfs_copies.parse("default"), dfs_copies.parse("4")) == (0, 4)
    for text in ("many", "-1", "99999999"):
        with pytest.raises(Problem, match="no number of copies"):
            dfs_copies.parse(text)

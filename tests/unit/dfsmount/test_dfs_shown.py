"""What the `dfs` command says: verdicts, tables, findings, and one line for each failure. No servers here."""

import json
from pathlib import Path
from typing import Any, cast

import httpx
import msgspec
import pytest

from chunkserver import client
from chunkserver.protocol import Progress, StatReply
from dfsmount import dfs_api, dfs_check, dfs_chunks, dfs_show
from dfsmount.dfs_api import Api, ReplicaListing
from dfsmount.dfs_find import Access
from dfsmount.dfs_layout import Problem
from metaserver import words
from metaserver.key import ClusterKey
from metaserver.protocol import (
    ChunkHealth,
    CleanerStatus,
    ExtentStatus,
    FileStatus,
    ReplicaStatus,
    ServerStatus,
    SessionStatus,
    Status,
)


def server(number: int, state: str = "UP") -> ServerStatus:
    return ServerStatus(number, f"cs{number}", state, "host", 9420 + number, 9520, "", "/srv", 1000, 500, 0, 7, 1.2)


def status(**changes: Any) -> Status:
    made = Status(
        cluster_id="c",
        epoch=3,
        number=10,
        durable=10,
        version="0.1.0",
        copies=2,
        up_seconds=500.0,
        window_open=False,
        servers=[server(1), server(2), server(3)],
        sessions=[SessionStatus(5, "client", "/mnt/dfs", True, 0.5, 2, 4096)],
        chunks=ChunkHealth(8, 7, 0, 0, 1, 0),
        inodes=100,
        total=1000,
        free=500,
        tasks=0,
        orders=0,
    )
    return msgspec.structs.replace(made, **changes)


# -- verdicts ------------------------------------------------------------------------------------------------------


def test_all_is_well() -> None:
    assert words.verdict(status()) == "Healthy: all 3 chunkservers are up and every chunk has its 2 copies."
    assert words.troubles(status()) == []
    one = status(servers=[server(1)], copies=1)
    assert words.verdict(one) == "Healthy: the chunkserver is up and every chunk has its 1 copy."


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"servers": [server(1), server(2), server(3, "DOWN")]}, "cs3 is DOWN"),
        ({"servers": []}, "no chunkserver has registered"),
        ({"servers": [server(1, "DOWN")]}, "no chunkserver is up"),
        ({"servers": [server(1)]}, "2 copies are wanted but only 1 chunkserver can take them"),
        ({"chunks": ChunkHealth(8, 7, 1, 0, 0, 0)}, "1 chunk with fewer copies than wanted"),
        ({"chunks": ChunkHealth(8, 7, 0, 1, 0, 0)}, "DATA IS MISSING: 1 chunk without a good copy"),
        ({"free": 49}, "nearly full: 49 B of 1000 B free; delete files or add chunkservers"),
        ({"free": 1}, "full: nothing can be written; delete files or add chunkservers"),
        ({"metaserver_full": True}, "the metaserver's disk is full: files can only be deleted until something on it"),
        ({"unprotected": True}, "the metadata could not be rebuilt now"),
        ({"window_open": True}, "waits for its mounts to return"),
    ],
)
def test_what_is_not_well(changes: dict[str, Any], text: str) -> None:
    said = words.verdict(status(**changes))
    assert said.startswith("Not healthy: ")
    assert text in said


def test_missing_data_comes_first() -> None:
    worst = status(servers=[server(1), server(2, "LOST")], chunks=ChunkHealth(8, 0, 5, 3, 0, 0))
    assert words.verdict(worst).startswith("Not healthy: DATA IS MISSING: 3 chunks")


def test_a_cluster_that_can_only_be_read_is_not_healthy() -> None:
    refusing = "this metaserver's data directory is older than its chunkservers'"
    assert words.verdict(status(read_only=refusing)).startswith("Not healthy: READ-ONLY")
    assert refusing in words.verdict(status(read_only=refusing))


def test_the_cleaner_is_shown_while_it_has_work() -> None:
    assert not any(line.startswith("cleaner") for line in words.summary_lines(status(), "host:1"))
    cleaner = CleanerStatus(candidates=3, dead_bytes=100 << 20, cleaning=1, freed_chunks=7)
    (line,) = (line for line in words.summary_lines(status(cleaner=cleaner), "h") if line.startswith("cleaner"))
    assert line == "cleaner     rewriting 1 chunk, 3 chunks with 100 MiB dead; 7 chunks freed so far"


def test_status_is_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    dfs_show.show_status(status(tasks=1), "host:9401")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Healthy")
    text = "\n".join(lines)
    for wanted in ("host:9401", "500 B free of 1000 B", "8 (7 healthy, 1 being written)", "1 background task", "cs2"):
        assert wanted in text
    assert "/mnt/dfs" in text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (150 << 20, "150 MiB"),
        (5 << 50, "5.0 PiB"),
        (1 << 62, "4096 PiB"),
    ],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert words.bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (600, "10 min"), (7200, "2 h"), (500_000, "6 d")]
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert words.seconds_text(seconds) == text


# -- chunks --------------------------------------------------------------------------------------------------------


def extent(length: int = 100) -> ExtentStatus:
    replica = ReplicaStatus(1, "cs1", "host", 9520, "GOOD", "/srv/chunks/2a/2a")
    return ExtentStatus(0, 0, length, "2a", 50, "SEALED", [replica])


def test_a_replica_that_is_too_short_is_told() -> None:
    reply = StatReply(Progress(149, 149, 3, 7), "SEALED", "/srv/x", 1)
    assert dfs_chunks.index_state(extent(), reply) == "too short: 149 bytes"
    reply = StatReply(Progress(150, 150, 3, 7), "SEALED", "/srv/x", 1)
    assert dfs_chunks.index_state(extent(), reply) == "index ok"


def test_a_chunk_map_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    piece = dfs_chunks.empty_piece(extent())
    piece.replicas[0].checksums, piece.replicas[0].created_ns = "ok", 1_700_000_000_000_000_000
    dfs_show.show_file(dfs_chunks.FileView("/mnt/f", 7, 100, 10**18, [piece]))
    said = capsys.readouterr().out
    assert "/mnt/f: 100 bytes in 1 piece, modified 2001-09-09 01:46:40 UTC" in said
    assert "2023-11-14 22:13:20" in said
    assert "/srv/chunks/2a/2a" in said
    assert dfs_chunks.bad([piece]) == 0
    piece.replicas[0].checksums = "cannot connect"
    assert dfs_chunks.bad([piece]) == 1


@pytest.mark.parametrize(("state", "text"), [("DELETING", "being deleted"), ("COPYING", "being copied")])
async def test_what_an_order_is_under_way_for_is_no_copy(state: str, text: str) -> None:
    shown = msgspec.structs.replace(extent().replicas[0], state=state)
    # Whoever is asked here would answer that the bytes are there.
    nobody = cast(client.Pool, None)
    asking = dfs_chunks.Asking(ClusterKey(bytes(32)), status(), verify=True)
    answer = await dfs_chunks.ask_replica(nobody, asking, extent(), shown)
    assert (answer.state, answer.checksums) == (state, text)
    piece = dfs_chunks.empty_piece(extent())
    piece.replicas = [answer]
    assert dfs_chunks.bad([piece]) == 0


def test_a_piece_without_replicas_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    piece = dfs_chunks.empty_piece(extent())
    piece.replicas.clear()
    dfs_show.show_file(dfs_chunks.FileView("/mnt/f", 7, 100, 0, [piece]))
    assert "no replica" in capsys.readouterr().out


# -- check ---------------------------------------------------------------------------------------------------------


def listed(chunk: str, length: int = 10, chain: str = "aa", state: str = "SEALED") -> ReplicaListing:
    return ReplicaListing(chunk, state, length, chain, "", "/srv/x")


def test_replicas_that_differ_are_found() -> None:
    servers = [server(1), server(2)]
    listings = {
        1: [listed("01"), listed("02"), listed("03")],
        2: [listed("01", 11), listed("02"), listed("03", 9, "bb", "OPEN")],
    }
    found = dfs_check.differing(servers, listings)
    assert [finding.where for finding in found] == ["chunk 01"]
    assert found[0].text == "replicas differ: 10 bytes, chain aa on cs1; 11 bytes, chain aa on cs2"


def test_findings_are_told_and_counted() -> None:
    findings = dfs_check.Findings(False, 1234, 0, 0, [], [])
    assert dfs_check.lines(findings) == ["Checked 1,234 rows of metadata: nothing wrong."]
    assert dfs_check.clean(findings)
    findings.metadata += [dfs_check.Finding(f"INODES {number}", "nlink is 2, not 1") for number in range(25)]
    lines = dfs_check.lines(findings)
    assert lines[0] == "INODES 0: nlink is 2, not 1"
    assert lines[-2:] == ["... and 5 more (--json shows all)", "Checked 1,234 rows of metadata: 25 findings."]
    assert not dfs_check.clean(findings)


# -- the control plane ---------------------------------------------------------------------------------------------


@pytest.fixture
def access(tmp_path: Path) -> Access:
    key = tmp_path / "key"
    key.write_text("ab" * 32)
    key.chmod(0o600)
    return Access("host:9401", key)


def api(access: Access, answer: httpx.Response | Exception) -> Api:
    def handle(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == f"Bearer {access.key().http_token}"
        if isinstance(answer, Exception):
            raise answer
        return answer

    return Api(access, httpx.MockTransport(handle))


def test_answers_are_decoded(access: Access) -> None:
    with api(access, httpx.Response(200, content=msgspec.json.encode(status()))) as client:
        assert client.status() == status()
    file = FileStatus(7, 100, 5, [extent()])
    with api(access, httpx.Response(200, content=msgspec.json.encode(file))) as client:
        assert client.file(7) == file


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (httpx.ConnectError("x"), "no metaserver at host:9401"),
        (httpx.ReadTimeout("x"), "the server at host:9401 does not answer in time"),
        (httpx.RemoteProtocolError("x"), "host:9401 does not speak HTTP"),
        (httpx.Response(404, content=b"<html>"), "host:9401 answered HTTP status 404"),
        (httpx.Response(200, content=b"<html>"), "host:9401 does not answer as expected"),
        (httpx.Response(200, content=b"{}"), "host:9401 does not answer as expected"),
        (httpx.Response(401, json={"code": "BAD_KEY", "text": "x"}), "has another cluster key than"),
        (httpx.Response(404, json={"code": "NOT_FOUND", "text": "no such file"}), "no such file"),
    ],
)
def test_failures_of_the_control_plane_are_one_line(
    access: Access, answer: httpx.Response | Exception, text: str
) -> None:
    with api(access, answer) as client, pytest.raises(Problem) as caught:
        client.status()
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_listings_of_a_server_are_paged(access: Access) -> None:
    pages = {
        None: {"chunks": [msgspec.to_builtins(listed("01"))], "next": "01"},
        "01": {"chunks": [msgspec.to_builtins(listed("02"))], "next": ""},
    }

    def handle(request: httpx.Request) -> httpx.Response:
        assert request.url.host == "host"
        return httpx.Response(200, content=json.dumps(pages[request.url.params.get("after")]))

    with Api(access, httpx.MockTransport(handle)) as client:
        assert [replica.chunk for replica in client.replicas(server(1))] == ["01", "02"]


def test_health_of_nobody_is_false() -> None:
    assert not dfs_api.health("127.0.0.1:1", 1.0)

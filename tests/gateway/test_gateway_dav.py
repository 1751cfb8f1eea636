"""WebDAV, with curl and with litmus, the test suite of neon, against real processes."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from gateway_cluster import Gateway, MountlessCluster

LOCK = '<lockinfo xmlns="DAV:"><lockscope><exclusive/></lockscope><locktype><write/></locktype></lockinfo>'
ENTITY = "<!DOCTYPE a [<!ENTITY b 'b'>]>"


@pytest.mark.skipif(shutil.which("litmus") is None, reason="needs litmus")
def test_litmus(gateway: Gateway, folder: str, tmp_path: Path) -> None:
    url = f"{gateway.url}{folder.replace('/files/', '/dav/')}/"
    # It leaves a debug.log where it runs.
    command = ["litmus", "-k", url, "token", gateway.token]
    done = subprocess.run(command, capture_output=True, timeout=100, check=False, cwd=tmp_path)
    said = done.stdout.decode(errors="replace")
    summaries = re.findall(r"summary for `(\w+)': of (\d+) tests run: (\d+) passed", said)
    assert [name for name, _, _ in summaries] == ["basic", "copymove", "props", "locks", "http"], said
    assert all(run == passed for _, run, passed in summaries), said
    assert done.returncode == 0


def test_a_file_is_the_same_everywhere(gateway: Gateway, folder: str) -> None:
    dav = folder.replace("/files/", "/dav/")
    assert gateway.put(f"{dav}/%C3%A4%20b", b"one").status == 201
    assert gateway.put(f"{dav}/%C3%A4%20b", b"two").status == 204
    assert gateway.curl(f"{folder}/%C3%A4%20b").body == b"two"
    assert gateway.curl(f"{dav}/%C3%A4%20b", "-H", "Range: bytes=1-").body == b"wo"
    listed = gateway.curl(f"{dav}/", "-X", "PROPFIND", "-H", "Depth: 1")
    assert listed.status == 207
    assert b"%C3%A4%20b" in listed.body
    moved = gateway.curl(f"{dav}/%C3%A4%20b", "-X", "MOVE", "-H", f"Destination: {gateway.url}{dav}/c")
    assert moved.status == 201
    assert gateway.names(f"{folder}/") == ["c"]


@pytest.mark.parametrize("path", ["..%2fx", "../x", "a%00b", "a%2fb", ".dfs-gateway-x", "%ff", "a%0ab", "%zz", "//x"])
def test_paths_that_are_none(gateway: Gateway, folder: str, path: str) -> None:
    dav = folder.replace("/files/", "/dav/")
    for method in ("PUT", "PROPFIND", "MKCOL", "DELETE", "LOCK"):
        assert gateway.curl(f"{dav}/{path}", "-X", method, "-H", "Content-Length: 0").status in (400, 403)
    gateway.put(f"{folder}/file", b"x")
    to = f"Destination: {gateway.url}{dav}/{path}"
    for method in ("COPY", "MOVE"):
        assert gateway.curl(f"{dav}/file", "-X", method, "-H", to).status in (400, 403)
    assert gateway.names(f"{folder}/") == ["file"]


def test_requests_without_a_bound_are_refused(gateway: Gateway, folder: str, tmp_path: Path) -> None:
    dav = folder.replace("/files/", "/dav/")
    assert gateway.curl(f"{dav}/", "-X", "PROPFIND").status == 403
    for body, answers in (("x" * 300_000, (413,)), ("<a>" * 80_000, (400,)), (f"{ENTITY}<a>&b;</a>", (400,))):
        (tmp_path / "body").write_text(body)
        asked = gateway.curl(f"{dav}/", "-X", "PROPFIND", "-H", "Depth: 0", "--data-binary", f"@{tmp_path}/body")
        assert asked.status in answers
        assert "\n" not in asked.json["text"]
    assert gateway.curl(f"{dav}/", "-X", "PATCH").status == 405


def test_what_is_locked(gateway: Gateway, folder: str) -> None:
    dav = folder.replace("/files/", "/dav/")
    locked = gateway.curl(f"{dav}/new", "-X", "LOCK", "-d", LOCK)
    assert locked.status == 201
    assert gateway.put(f"{dav}/new", b"other").status == 423
    token = locked.headers["lock-token"]
    assert gateway.put(f"{dav}/new", b"mine", "-H", f"If: ({token})").status == 204
    assert gateway.curl(f"{dav}/new", "-X", "UNLOCK", "-H", f"Lock-Token: {token}").status == 204
    assert gateway.put(f"{dav}/new", b"other").status == 204


def test_a_read_only_gateway(servers: MountlessCluster) -> None:
    with servers.gateway("--read-only", name="dav-read-only") as gateway:
        assert gateway.curl("/dav/", "-X", "PROPFIND", "-H", "Depth: 0").status == 207
        assert gateway.curl("/dav/x/", "-X", "MKCOL").status == 403
        assert gateway.curl("/dav/", "-X", "PROPFIND", "-H", "Depth: 0", token="wrong").status == 401

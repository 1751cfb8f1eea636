"""Uploads that come to nothing leave nothing; what a killed gateway leaves goes when it is back."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from gateway_cluster import Gateway, MountlessCluster
from mount_cluster import wait_until


@contextmanager
def uploading(gateway: Gateway, path: str, length: int = 50_000_000) -> Iterator[socket.socket]:
    """An upload of ``length`` bytes of which 4 MiB have been sent and none follow by themselves."""
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as sock:
        head = (
            f"PUT {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.token}\r\nContent-Length: {length}\r\n"
        )
        sock.sendall(f"{head}\r\n".encode())
        sock.sendall(os.urandom(4 << 20))
        yield sock


def leftovers(servers: MountlessCluster) -> list[str]:
    """Hidden uploads anywhere; notes of them do not count."""
    return [name for name in servers.raw_names() if "/.dfs-gateway-" in name and "uploads" not in name]


def nothing_left(servers: MountlessCluster) -> Callable[[], bool]:
    return lambda: leftovers(servers) == []


@pytest.mark.parametrize("where", ["/files/", "/dav/"])
def test_nobody_sees_an_upload_before_it_is_complete(
    gateway: Gateway, servers: MountlessCluster, folder: str, where: str
) -> None:
    length = (4 << 20) + 10
    with uploading(gateway, f"{folder.replace('/files/', where)}/file", length) as sock:
        wait_until(lambda: len(leftovers(servers)) == 1, "the upload has begun")
        assert gateway.names(f"{folder}/") == []
        assert gateway.curl(f"{folder}/file").status == 404
        sock.sendall(b"0123456789")
        assert b" 201 " in sock.recv(4096)
        assert gateway.curl(f"{folder}/file", "-r", "-10").body == b"0123456789"
    assert leftovers(servers) == []


@pytest.mark.parametrize("where", ["/files/", "/dav/"])
def test_a_client_that_leaves_leaves_nothing(
    gateway: Gateway, servers: MountlessCluster, folder: str, where: str
) -> None:
    before = gateway.put(f"{folder}/file", b"as it was").headers["etag"]
    with uploading(gateway, f"{folder.replace('/files/', where)}/file"):
        wait_until(lambda: len(leftovers(servers)) == 1, "the upload has begun")
    wait_until(nothing_left(servers), "the upload is gone")
    found = gateway.curl(f"{folder}/file")
    assert (found.body, found.headers["etag"]) == (b"as it was", before)


def test_a_form_that_ends_too_early_leaves_nothing(gateway: Gateway, servers: MountlessCluster) -> None:
    body = '--XX\r\ncontent-disposition: form-data; name="f"; filename="half"\r\n\r\nsome data'
    kind = "Content-Type: multipart/form-data; boundary=XX"
    found = gateway.curl("/upload", "--data-binary", body, "-H", kind)
    assert (found.status, found.code) == (400, "INVALID")
    assert gateway.curl("/files/half").status == 404
    assert leftovers(servers) == []


def test_an_upload_that_is_too_large_leaves_nothing(servers: MountlessCluster) -> None:
    with servers.gateway("--max-upload", "1M", name="small") as small:
        assert small.put("/files/fits", bytes(1 << 20)).status == 201
        for options in ([], ["-H", "Transfer-Encoding: chunked"]):
            found = small.put("/files/large", bytes((1 << 20) + 1), *options)
            assert (found.status, found.code) == (413, "FILE_TOO_BIG")
        assert "large" not in small.names()
        assert leftovers(servers) == []


def test_a_gateway_that_is_stopped_leaves_nothing(servers: MountlessCluster) -> None:
    with servers.gateway(name="stopped") as gateway, uploading(gateway, "/files/half"):
        wait_until(lambda: len(leftovers(servers)) == 1, "the upload has begun")
        assert gateway.stop() == 0
        names = servers.raw_names()
        assert not [name for name in names if ".dfs-gateway-stopped" in name or "uploads/stopped" in name]


def test_what_a_killed_gateway_left_goes_when_it_is_back(servers: MountlessCluster) -> None:
    with servers.gateway(name="killed") as gateway:
        assert gateway.curl("/files/deep/", "-X", "PUT").status == 201
        with uploading(gateway, "/files/deep/half"), uploading(gateway, "/files/whole"):
            wait_until(lambda: len(leftovers(servers)) == 2, "the uploads have begun")
            # Another gateway lets them be: they may be in progress.
            with servers.gateway(name="other"):
                time.sleep(1)
                assert len(leftovers(servers)) == 2
            gateway.stop(signal.SIGKILL)
        assert len(leftovers(servers)) == 2
        gateway.start()
        wait_until(nothing_left(servers), "what was left is gone")
        wait_until(lambda: not [name for name in servers.raw_names() if "uploads/killed" in name], "so are the notes")
        assert {"half", "whole"} & {*gateway.names(), *gateway.names("/files/deep/")} == set()
        assert gateway.put("/files/deep/half", b"now").status == 201


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_was_answered_is_kept(servers: MountlessCluster, number: signal.Signals) -> None:
    data = os.urandom(300_000)
    with servers.gateway(name="kept") as gateway:
        assert gateway.put(f"/files/kept-{number}", data).status == 201
        gateway.stop(number)
        gateway.start()
        assert gateway.curl(f"/files/kept-{number}").body == data


def test_of_many_who_want_to_be_first_one_is(gateway: Gateway, folder: str) -> None:
    clients = [
        subprocess.Popen(
            [*gateway.command(f"{folder}/one", "-o", os.devnull, "-w", "%{http_code}"),
             "-T", __file__, "-H", "If-None-Match: *"],
            stdout=subprocess.PIPE, text=True,
        )
        for _ in range(6)
    ]  # fmt: skip
    statuses = sorted(client.communicate(timeout=60)[0] for client in clients)
    assert statuses == ["201", "412", "412", "412", "412", "412"]


def test_memory_is_bounded(servers: MountlessCluster) -> None:
    """Faster in than out, and far more than the gateway may keep: 100 MB through 8 MiB."""
    with servers.gateway("--dirty-mib", "8", name="bounded") as gateway:
        gateway.put("/files/first", os.urandom(12 << 20))
        before = gateway.rss_bytes()
        with subprocess.Popen(["head", "-c", "100000000", "/dev/zero"], stdout=subprocess.PIPE) as source:
            command = gateway.command("/files/large", "-T", "-", "-o", os.devnull, "-w", "%{http_code}")
            done = subprocess.run(command, stdin=source.stdout, capture_output=True, check=False, timeout=110)
        assert done.stdout == b"201", done.stderr
        assert gateway.rss_bytes() - before < 40 << 20
        found = gateway.curl("/files/large", "-o", os.devnull)
        assert (found.status, found.headers["content-length"]) == (200, "100000000")
        # What was read may be kept up to the size of the cache (64 MiB).
        assert gateway.rss_bytes() - before < 120 << 20
        assert gateway.curl("/files/large", "-X", "DELETE").status == 204


def test_a_download_that_is_left_ends(gateway: Gateway, folder: str) -> None:
    gateway.put(f"{folder}/file", bytes(16 << 20))
    gateway.curl(f"{folder}/file", "-o", os.devnull, "--max-time", "0.05", check=False)
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as sock:
        request = f"GET {folder}/file HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.token}\r\n\r\n"
        sock.sendall(request.encode())
        sock.recv(1000)
    wait_until(lambda: b"gateway_downloads_in_progress 0.0" in gateway.curl("/metrics").body, "no download goes on")

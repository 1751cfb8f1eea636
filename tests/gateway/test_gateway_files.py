"""Files over HTTP, with curl against real processes."""

import hashlib
import os
import socket
from pathlib import Path

import pytest
from gateway_cluster import Gateway, MountlessCluster

ONE = b"0123456789" * 10


# -- storing and reading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 65536, 3 * 1024 * 1024 + 17])
def test_what_was_uploaded_is_downloaded(gateway: Gateway, folder: str, size: int) -> None:
    data = os.urandom(size)
    stored = gateway.put(f"{folder}/file", data)
    assert stored.status == 201
    assert stored.json["files"][0]["size"] == size
    found = gateway.curl(f"{folder}/file")
    assert (found.status, found.body) == (200, data)
    assert found.headers["etag"] == stored.headers["etag"]
    assert found.headers["content-length"] == str(size)


def test_a_body_without_a_length(gateway: Gateway, folder: str) -> None:
    """As from a pipe: Transfer-Encoding: chunked."""
    stored = gateway.put(f"{folder}/piped", ONE * 1000, "-H", "Transfer-Encoding: chunked")
    assert stored.status == 201
    assert gateway.curl(f"{folder}/piped").body == ONE * 1000


def test_putting_again_replaces(gateway: Gateway, folder: str) -> None:
    first = gateway.put(f"{folder}/file", b"first")
    second = gateway.put(f"{folder}/file", b"second")
    assert (first.status, second.status) == (201, 200)
    assert first.headers["etag"] != second.headers["etag"]
    assert gateway.curl(f"{folder}/file").body == b"second"
    assert gateway.names(f"{folder}/") == ["file"]


def test_upload_by_name(gateway: Gateway, folder: str) -> None:
    target = f"/upload?filename={folder.removeprefix('/files/')}/up.txt"
    assert gateway.curl(target, "--data-binary", "hello").status == 201
    again = gateway.curl(target, "--data-binary", "other")
    assert (again.status, again.code) == (409, "EXISTS")
    found = gateway.curl(f"/download/{folder.removeprefix('/files/')}/up.txt")
    assert (found.body, found.headers["content-type"]) == (b"hello", "text/plain")
    assert found.headers["content-disposition"] == 'attachment; filename="up.txt"'
    assert gateway.curl(f"{target}&replace=1", "--data-binary", "other").status == 201
    deleted = gateway.curl(target.replace("/upload", "/delete"), "-X", "DELETE")
    assert (deleted.status, deleted.body) == (204, b"")
    assert gateway.curl(target.replace("/upload", "/delete"), "-X", "DELETE").status == 404


def test_upload_of_a_form(gateway: Gateway, tmp_path: Path) -> None:
    (tmp_path / "form one.bin").write_bytes(ONE * 5000)
    (tmp_path / "form-two.txt").write_text("two")
    files = ["-F", f"file=@{tmp_path}/form one.bin", "-F", "comment=hello", "-F", f"file=@{tmp_path}/form-two.txt"]
    stored = gateway.curl("/upload", *files)
    assert stored.status == 201
    assert [file["path"] for file in stored.json["files"]] == ["/form one.bin", "/form-two.txt"]
    assert gateway.curl("/files/form%20one.bin").body == ONE * 5000
    assert gateway.curl("/upload", *files).status == 409
    assert gateway.curl("/upload?replace", *files).status == 201


def test_of_a_form_all_or_nothing_is_stored(gateway: Gateway, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    gateway.put("/files/form-taken", b"mine")
    files = ["-F", f"a=@{tmp_path}/x;filename=form-new", "-F", f"b=@{tmp_path}/x;filename=form-taken"]
    assert gateway.curl("/upload", *files).status == 409
    assert gateway.curl("/files/form-new").status == 404
    assert gateway.curl("/files/form-taken").body == b"mine"


def test_names_of_all_kinds(gateway: Gateway, folder: str) -> None:
    """Bytes that are no UTF-8, and everything that means something in URLs and headers."""
    for number, name in enumerate(["%ff%fe", "a%20b", "%0a%0d", "%3f%23%25", "%22%27%5c", "f%C3%BCr", "a+b&c=d;e"]):
        assert gateway.put(f"{folder}/{name}", str(number).encode()).status == 201
        download = gateway.curl(f"/download/{folder.removeprefix('/files/')}/{name}")
        assert (download.status, download.body) == (200, str(number).encode())
    entries = gateway.curl(f"{folder}/").json["entries"]
    assert [gateway.curl(entry["href"]).body.decode() for entry in entries] == [str(n) for n in range(7)]


def test_names_in_queries_are_bytes_too(gateway: Gateway, folder: str) -> None:
    flat = folder.removeprefix("/files/")
    for name in ("%ff", "%fe"):
        assert gateway.curl(f"/upload?filename={flat}/{name}", "--data-binary", name).status == 201
    assert gateway.curl(f"{folder}/%ff").body == b"%ff"
    page = gateway.curl(f"/files?prefix={flat}/%fe&limit=1").json
    assert [entry["href"].lower() for entry in page["entries"]] == [f"{folder}/%fe".lower()]
    assert gateway.curl(f"/delete?filename={flat}/%ff", "-X", "DELETE").status == 204
    assert len(gateway.names(f"{folder}/?prefix=%fe&limit=1")) == 1


# -- ranges and conditions -----------------------------------------------------------------------------------------


def test_ranges(gateway: Gateway, folder: str) -> None:
    gateway.put(f"{folder}/file", ONE)
    found = gateway.curl(f"{folder}/file", "-r", "10-19")
    assert (found.status, found.body, found.headers["content-range"]) == (206, ONE[10:20], "bytes 10-19/100")
    assert gateway.curl(f"{folder}/file", "-r", "-5").body == ONE[-5:]
    beyond = gateway.curl(f"{folder}/file", "-r", "100-")
    assert (beyond.status, beyond.headers["content-range"]) == (416, "bytes */100")
    assert gateway.curl(f"{folder}/file", "-r", "9-1").status == 200


def test_several_ranges(gateway: Gateway, folder: str) -> None:
    gateway.put(f"{folder}/file.txt", ONE)
    found = gateway.curl(f"{folder}/file.txt", "-r", "0-1,50-51,-1")
    kind, _, boundary = found.headers["content-type"].partition("; boundary=")
    assert (found.status, kind) == (206, "multipart/byteranges")
    assert int(found.headers["content-length"]) == len(found.body)
    parts = found.body.split(b"--" + boundary.encode())[1:-1]
    assert [part.partition(b"\r\n\r\n")[2] for part in parts] == [b"01\r\n", b"01\r\n", b"9\r\n"]
    assert b"content-range: bytes 50-51/100" in parts[1]


def test_a_download_goes_on(gateway: Gateway, folder: str, tmp_path: Path) -> None:
    data = os.urandom(2_000_000)
    gateway.put(f"{folder}/file", data)
    part = tmp_path / "part"
    part.write_bytes(data[:700_000])
    assert gateway.curl(f"{folder}/file", "-C", "-", "-o", part).status == 206
    assert part.read_bytes() == data


def test_conditions_when_reading(gateway: Gateway, folder: str) -> None:
    tag = gateway.put(f"{folder}/file", ONE).headers["etag"]
    same = gateway.curl(f"{folder}/file", "-H", f"If-None-Match: {tag}")
    assert (same.status, same.body, same.headers["etag"]) == (304, b"", tag)
    date = gateway.curl(f"{folder}/file").headers["last-modified"]
    assert gateway.curl(f"{folder}/file", "-H", f"If-Modified-Since: {date}").status == 304
    assert gateway.curl(f"{folder}/file", "-H", 'If-Match: "other"').status == 412
    gateway.put(f"{folder}/file", b"new")
    assert gateway.curl(f"{folder}/file", "-H", f"If-None-Match: {tag}").body == b"new"
    # What was begun of one version does not go on with another.
    assert gateway.curl(f"{folder}/file", "-r", "1-", "-H", f"If-Range: {tag}").body == b"new"


def test_conditions_when_writing(gateway: Gateway, folder: str) -> None:
    tag = gateway.put(f"{folder}/file", b"1", "-H", "If-None-Match: *").headers["etag"]
    taken = gateway.put(f"{folder}/file", b"2", "-H", "If-None-Match: *")
    assert (taken.status, taken.code, taken.headers["etag"]) == (412, "PRECONDITION_FAILED", tag)
    assert gateway.put(f"{folder}/file", b"3", "-H", f"If-Match: {tag}").status == 200
    assert gateway.put(f"{folder}/file", b"4", "-H", f"If-Match: {tag}").status == 412
    assert gateway.put(f"{folder}/other", b"5", "-H", "If-Match: *").status == 412
    assert gateway.curl(f"{folder}/file", "-X", "DELETE", "-H", f"If-Match: {tag}").status == 412
    assert gateway.curl(f"{folder}/file").body == b"3"
    assert gateway.names(f"{folder}/") == ["file"]


def test_head(gateway: Gateway, folder: str) -> None:
    gateway.put(f"{folder}/film.mp4", ONE)
    got = gateway.curl(f"{folder}/film.mp4", "-I")
    assert (got.status, got.headers["content-length"], got.headers["content-type"]) == (200, "100", "video/mp4")
    assert got.headers["accept-ranges"] == "bytes"
    assert gateway.curl(f"{folder}/nothing", "-I").status == 404


# -- directories ---------------------------------------------------------------------------------------------------


def test_listing_goes_page_by_page(gateway: Gateway, folder: str) -> None:
    names = [f"{'even' if number % 2 == 0 else 'odd'}-{number}" for number in range(7)]
    for name in names:
        gateway.put(f"{folder}/{name}", name.encode())
    assert gateway.names(f"{folder}/?limit=2") == names
    assert gateway.names(f"{folder}/?limit=1&prefix=even") == [name for name in names if name.startswith("even")]
    flat = folder.removeprefix("/files/")
    assert gateway.names(f"/files?prefix={flat}/odd&limit=2") == [name for name in names if name.startswith("odd")]
    assert gateway.names("/files?prefix=no/such/place") == []
    entry = gateway.curl(f"{folder}/?limit=1").json["entries"][0]
    assert (entry["type"], entry["size"], entry["mode"]) == ("file", 6, "0644")
    assert gateway.curl(entry["href"]).headers["etag"] == entry["etag"]


def test_directories(gateway: Gateway, folder: str) -> None:
    assert gateway.curl(f"{folder}/sub/", "-X", "PUT").status == 201
    assert gateway.curl(f"{folder}/sub/", "-X", "PUT").status == 409
    moved = gateway.curl(f"{folder}/sub")
    assert (moved.status, moved.headers["location"]) == (308, f"{folder}/sub/")
    assert gateway.put(f"{folder}/sub", b"x").status == 409
    assert gateway.put(f"{folder}/no/file", b"x").status == 409
    assert gateway.put(f"{folder}/sub/file", b"x").status == 201
    assert gateway.curl(f"{folder}/sub/file/").status == 404
    assert gateway.curl(f"{folder}/sub/file/below").status == 404
    assert gateway.put(f"{folder}/sub/file/below", b"x").status == 409
    assert gateway.curl(f"/delete?filename={folder.removeprefix('/files/')}/sub", "-X", "DELETE").status == 409
    assert gateway.curl(f"{folder}/sub/", "-X", "DELETE").code == "NOT_EMPTY"
    assert gateway.curl(f"{folder}/sub/file", "-X", "DELETE").status == 204
    assert gateway.curl(f"{folder}/sub/", "-X", "DELETE").status == 204
    assert gateway.curl(f"{folder}/sub/").status == 404
    assert gateway.curl("/files/", "-X", "DELETE").status == 403


def test_the_chunk_map(gateway: Gateway, folder: str) -> None:
    gateway.put(f"{folder}/file", os.urandom(200_000))
    found = gateway.curl(f"{folder}/file?chunks").json
    assert found["size"] == sum(piece["length"] for piece in found["pieces"]) == 200_000
    assert all(len(piece["replicas"]) == 2 for piece in found["pieces"])
    assert found["next"] == ""
    assert gateway.curl(f"{folder}/?chunks").status == 400


# -- what must not be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/files/../etc/passwd", "/files/%2e%2e/x", "/files/a/..%2f..%2fx", "/files/a%2fb", "/files/a%00b",
        "/files/%2f", "/files//x", "/files/.", "/files/%", "/download/../x", "/download/%2e%2e%2fx", "/files/.%2e/",
        "/files?prefix=../", "/files?limit=0", "/files?limit=x", "/files?after=-1", "/files?limit=1001",
    ],
)  # fmt: skip
def test_paths_do_not_lead_out(gateway: Gateway, path: str) -> None:
    found = gateway.curl(path)
    assert found.status == 400, found
    assert found.code in ("INVALID", "NAME_TOO_LONG")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "..", "", "/x", "a%00", "x/", ".dfs-gateway-x"])
def test_names_in_queries_do_not_lead_out(gateway: Gateway, name: str) -> None:
    assert gateway.curl(f"/upload?filename={name}", "--data-binary", "x").status in (400, 403)
    assert gateway.curl(f"/delete?filename={name}", "-X", "DELETE").status in (400, 403)


def test_what_is_the_gateways_own_is_nobodys(gateway: Gateway, servers: MountlessCluster) -> None:
    gateway.put("/files/makes-a-note", b"x")
    assert "/.dfs-gateway-uploads" in servers.raw_names()
    assert not [name for name in gateway.names() if name.startswith(".dfs-gateway")]
    assert gateway.curl("/files/.dfs-gateway-uploads/").status == 403
    assert gateway.put("/files/.dfs-gateway-x", b"x").status == 403


@pytest.mark.parametrize(
    ("options", "status"),
    [
        (["-X", "PUT"], 411),
        (["-X", "PATCH"], 405),
        (["-X", "POST", "-d", "x"], 405),
        (["-X", "PUT", "-d", "x", "-H", "Content-Encoding: gzip"], 415),
        (["-X", "PUT", "-d", "x", "-H", "Content-Range: bytes 0-0/5"], 400),
        (["-X", "PUT", "-d", "x", "-H", "Expect: miracles"], 417),
        (["-X", "PUT", "-d", "x", "-H", "Origin: http://evil.example"], 403),
        (["-X", "DELETE", "-d", "x"], 400),
    ],
)
def test_what_makes_no_sense_is_refused(gateway: Gateway, folder: str, options: list[str], status: int) -> None:
    found = gateway.curl(f"{folder}/file", *options)
    assert found.status == status
    assert found.json.keys() == {"code", "text"}
    if status == 405:
        assert set(found.headers["allow"].split(", ")) == {"GET", "HEAD", "PUT", "DELETE"}
    assert gateway.names(f"{folder}/") == []


def test_uploads_that_make_no_sense(gateway: Gateway) -> None:
    assert gateway.curl("/upload", "-d", "x").status == 415
    assert gateway.curl("/upload", "-F", "a=b").status == 400
    assert gateway.curl("/upload", "-d", "x", "-H", "Content-Type: multipart/form-data; boundary=q").status == 400
    assert gateway.curl("/upload?filename=x&replace=maybe", "-d", "x").status == 400
    assert gateway.curl("/nothing").status == 404


def test_names_that_are_too_long(gateway: Gateway) -> None:
    assert gateway.put(f"/files/{'x' * 255}", b"long").status == 201
    assert gateway.put(f"/files/{'x' * 256}", b"long").status == 400


# -- who may -------------------------------------------------------------------------------------------------------


def test_without_a_token_nothing_opens(gateway: Gateway, folder: str) -> None:
    gateway.put(f"{folder}/file", b"secret")
    for token in ("", "wrong", gateway.token[:-1]):
        for path in (f"{folder}/file", "/files", "/metrics", "/", "/nothing"):
            found = gateway.curl(path, token=token)
            assert (found.status, found.code) == (401, "BAD_KEY")
            assert "Bearer" in found.headers["www-authenticate"]
    assert gateway.curl("/health", token="").json["status"] == "ok"
    assert gateway.curl(f"{folder}/file", "-u", f"anybody:{gateway.token}", token="").body == b"secret"
    assert gateway.curl(f"{folder}/file", "-u", "anybody:wrong", token="").status == 401


def test_a_refused_upload_is_told_before_it_is_sent(gateway: Gateway) -> None:
    """A client that sends on and on gets its answer all the same, and the connection goes away."""
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as sock:
        sock.sendall(b"PUT /files/x HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        sent = 0
        try:
            while sent < 200_000_000:
                sent += sock.send(b"x" * 65536)
        except OSError:
            assert sent < 100_000_000
        else:
            pytest.fail("200 MB were taken after a refusal")


def test_a_read_only_gateway_of_a_part(servers: MountlessCluster, gateway: Gateway, folder: str) -> None:
    gateway.put(f"{folder}/inside", b"inside")
    with servers.gateway("--export", folder.removeprefix("/files"), "--read-only", "--anonymous", name="part") as part:
        assert part.names() == ["inside"]
        assert part.curl("/files/inside", token="").body == b"inside"
        for found in (
            part.put("/files/new", b"x"),
            part.curl("/files/inside", "-X", "DELETE"),
            part.curl("/upload?filename=x", "-d", "x"),
        ):
            assert (found.status, found.code) == (403, "READ_ONLY")
    assert gateway.names(f"{folder}/") == ["inside"]


def test_the_description_is_what_is_served(gateway: Gateway) -> None:
    described = gateway.curl("/openapi.json", token="").json
    assert described["openapi"].startswith("3.1")
    for path, methods in described["paths"].items():
        url = path.replace("{path}", "nothing-there")
        for method in ("get", "put", "post", "delete", "patch"):
            options = ["-X", method.upper(), *(["-d", ""] if method in ("put", "post") else [])]
            status = gateway.curl(url, *options).status
            if method in methods:
                assert str(status) in methods[method]["responses"], (method, path, status)
            else:
                assert status == 405, (method, path, status)


def test_metrics(gateway: Gateway, folder: str) -> None:
    gateway.put(f"{folder}/file", ONE)
    text = gateway.curl("/metrics").body.decode()
    assert 'gateway_requests_total{method="PUT",status="201"}' in text
    assert "gateway_uploads_in_progress 0.0" in text


def test_a_larger_file_keeps_its_bytes(gateway: Gateway, folder: str, tmp_path: Path) -> None:
    """Over several chunks, both ways as a stream."""
    source, copy = tmp_path / "source", tmp_path / "copy"
    with source.open("wb") as file:
        for _ in range(80):
            file.write(os.urandom(1 << 20))
    assert gateway.curl(f"{folder}/large", "-T", source).status == 201
    assert gateway.curl(f"{folder}/large", "-o", copy).status == 200
    assert _digest(source) == _digest(copy)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Bad input: one clear line saying what to do, an exit code that is not 0, nothing lost, and the servers serve on."""

import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from mount_cluster import ROOT, RealCluster, free_base, module, run, running

from dfsmount import dfs_find
from metaserver.key import load_or_create_key
from metaserver.wire import HEADER_BYTES

pytestmark = pytest.mark.timeout(120)


def one_line(done: subprocess.CompletedProcess[str], program: str, *texts: str) -> None:
    """A failure told in one line that begins with the program's name and holds these texts."""
    assert done.returncode != 0, done.stdout
    lines = [line for line in done.stderr.splitlines() if not line.startswith("20")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"{program}: ")
    for text in texts:
        assert text in lines[0]


def mount(
    cluster: RealCluster, *words: str | Path, key: str | Path = "", options: str = ""
) -> subprocess.CompletedProcess[str]:
    listed = f"key_file={key or cluster.layout.key_file}" + (f",{options}" if options else "")
    return module("dfsmount.cli", *words, "-o", listed, check=False, timeout=90)


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    path = tmp_path / "mountpoint"
    path.mkdir()
    return path


@pytest.fixture
def still_works(cluster: RealCluster, place: Path) -> Iterator[None]:
    """Whatever the test does to the shared cluster, its mount works on, with the same processes."""
    names = ("metaserver", "chunkserver1", "chunkserver2", "chunkserver3", "mount")
    before = [cluster.pid(name) for name in names]
    (place / "before").write_bytes(b"b" * 70_000)
    yield
    (place / "after").write_bytes(b"a" * 70_000)
    run("sync", place / "after")
    assert (place / "before").read_bytes() == b"b" * 70_000
    assert [cluster.pid(name) for name in names] == before


# -- mounting ------------------------------------------------------------------------------------------------------


def test_an_address_where_nobody_listens(cluster: RealCluster, empty: Path) -> None:
    one_line(mount(cluster, f"127.0.0.1:{free_base(1)}", empty), "dfsmount", "127.0.0.1")


def test_a_host_that_does_not_exist(cluster: RealCluster, empty: Path) -> None:
    one_line(mount(cluster, "no-such-host.invalid:9400", empty), "dfsmount", "no-such-host.invalid")


@pytest.mark.usefixtures("still_works")
def test_the_http_port_instead_of_the_data_plane(cluster: RealCluster, empty: Path) -> None:
    one_line(mount(cluster, f"127.0.0.1:{cluster.wanted.http_port}", empty), "dfsmount")


def test_a_chunkserver_instead_of_the_metaserver(cluster: RealCluster, empty: Path) -> None:
    one_line(mount(cluster, f"127.0.0.1:{cluster.wanted.chunkserver_port(1)}", empty), "dfsmount", "chunkserver")


@pytest.mark.usefixtures("still_works")
def test_another_key(cluster: RealCluster, empty: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("cd" * 32)
    key.chmod(0o600)
    one_line(mount(cluster, cluster.wanted.address, empty, key=key), "dfsmount", "key")


def test_a_key_that_others_can_read(cluster: RealCluster, empty: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    shutil.copy(cluster.layout.key_file, key)
    key.chmod(0o644)
    one_line(mount(cluster, cluster.wanted.address, empty, key=key), "dfsmount", "readable by others", "chmod 600")


def test_no_key(cluster: RealCluster, empty: Path, tmp_path: Path) -> None:
    one_line(mount(cluster, cluster.wanted.address, empty, key=tmp_path / "none"), "dfsmount", "no cluster key at")


def test_a_mountpoint_that_is_missing_or_a_file(cluster: RealCluster, tmp_path: Path) -> None:
    one_line(mount(cluster, cluster.wanted.address, tmp_path / "none"), "dfsmount", "does not exist")
    (tmp_path / "file").touch()
    one_line(mount(cluster, cluster.wanted.address, tmp_path / "file"), "dfsmount", "not a directory")


@pytest.mark.usefixtures("still_works")
def test_a_mountpoint_that_is_mounted_already(cluster: RealCluster) -> None:
    one_line(mount(cluster, cluster.wanted.address, cluster.mnt), "dfsmount", "already mounted")


@pytest.mark.parametrize("options", ["nonsense", "attr_timeout=x", "timeout=", "dirty_mib=-1"])
def test_options_that_are_unknown_or_wrong(cluster: RealCluster, empty: Path, options: str) -> None:
    done = mount(cluster, cluster.wanted.address, empty, options=options)
    one_line(done, "dfsmount", options.split("=")[0])
    assert not os.path.ismount(empty)


def test_a_subdirectory_that_does_not_exist(cluster: RealCluster, empty: Path) -> None:
    one_line(mount(cluster, f"{cluster.wanted.address}/no/such/dir", empty), "dfsmount", "no/such/dir")


def test_too_few_words(cluster: RealCluster) -> None:
    one_line(mount(cluster, cluster.wanted.address), "dfsmount", "mountpoint")


# -- servers -------------------------------------------------------------------------------------------------------


def metaserver(*words: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return module("metaserver", *words, check=False, timeout=60, **options)


def chunkserver(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return module("chunkserver", *words, check=False, timeout=60)


@pytest.mark.usefixtures("still_works")
def test_a_port_in_use(cluster: RealCluster, tmp_path: Path) -> None:
    ports = ("--listen", cluster.wanted.address, "--http", "127.0.0.1:0")
    one_line(metaserver("--data", tmp_path / "m", *ports), "metaserver", str(cluster.wanted.port), "in use")
    words = ("--metaserver", f"127.0.0.1:{cluster.wanted.http_port}", "--key-file", cluster.layout.key_file)
    taken = f"127.0.0.1:{cluster.wanted.chunkserver_port(1)}"
    done = chunkserver("--data", tmp_path / "c", "--listen", taken, "--http", "127.0.0.1:0", *words)
    one_line(done, "chunkserver", taken.rpartition(":")[2])


@pytest.mark.usefixtures("still_works")
def test_a_data_directory_that_is_in_use(cluster: RealCluster) -> None:
    ports = ("--listen", "127.0.0.1:0", "--http", "127.0.0.1:0")
    one_line(metaserver("--data", cluster.layout.server_data("metaserver"), *ports), "metaserver")
    words = ("--metaserver", f"127.0.0.1:{cluster.wanted.http_port}", "--key-file", cluster.layout.key_file)
    one_line(chunkserver("--data", cluster.layout.server_data("chunkserver1"), *ports, *words), "chunkserver")


def test_a_data_directory_of_the_other_kind_of_server(own_cluster: RealCluster) -> None:
    own_cluster.down()
    ports = ("--listen", "127.0.0.1:0", "--http", "127.0.0.1:0")
    data = own_cluster.layout.server_data("chunkserver1")
    one_line(metaserver("--data", data, *ports), "metaserver", str(data))
    words = ("--metaserver", "127.0.0.1:1", "--key-file", own_cluster.layout.key_file)
    data = own_cluster.layout.server_data("metaserver")
    one_line(chunkserver("--data", data, *ports, *words), "chunkserver", str(data))
    own_cluster.up()


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A directory on a filesystem that nobody can write to."""
    path = tmp_path / "read-only"
    path.mkdir()
    run("mount", "-t", "tmpfs", "-o", "ro,size=1m", "none", path)
    yield path
    run("umount", "--lazy", path)


def test_a_data_directory_that_cannot_be_written(read_only: Path, cluster: RealCluster, tmp_path: Path) -> None:
    ports = ("--listen", "127.0.0.1:0", "--http", "127.0.0.1:0")
    one_line(metaserver("--data", read_only / "m", *ports), "metaserver", str(read_only))
    words = ("--metaserver", f"127.0.0.1:{cluster.wanted.http_port}", "--key-file", cluster.layout.key_file)
    one_line(chunkserver("--data", read_only / "c", *ports, *words), "chunkserver", str(read_only))
    done = module("dfsmount.dfs", "up", tmp_path / "mnt", "--data", read_only / "d", check=False)
    one_line(done, "dfs", f"cannot make {read_only}/d", "Read-only")


def test_a_data_directory_without_permission(tmp_path: Path) -> None:
    """Root may do everything, unless it gave that up."""
    data = tmp_path / "m"
    data.mkdir(mode=0o700)
    os.chown(data, 65534, 65534)
    words = (sys.executable, "-m", "metaserver", "--data", data, "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0")
    bounded = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all")
    done = run(*bounded, *words, check=False, cwd=ROOT)
    one_line(done, "metaserver", str(data), "Permission denied")


@pytest.mark.parametrize("name", ["metaserver", "chunkserver"])
def test_unknown_keys_in_a_configuration(name: str, tmp_path: Path) -> None:
    config = tmp_path / "x.toml"
    config.write_text(f'data = "{tmp_path}/data"\nmetaserver = "h:1"\nunknown_key = 1\n')
    if name == "metaserver":
        config.write_text(f'data = "{tmp_path}/data"\nunknown_key = 1\n')
    one_line(module(name, "--config", config, check=False), name, str(config), "unknown_key")


@pytest.mark.parametrize("name", ["metaserver", "chunkserver"])
@pytest.mark.parametrize("text", ["data = ", "data = 5", "\0\0", "copies = 'two'"])
def test_a_configuration_that_is_garbage(name: str, text: str, tmp_path: Path) -> None:
    config = tmp_path / "x.toml"
    config.write_text(text)
    one_line(module(name, "--config", config, check=False), name, str(config))
    one_line(module(name, "--config", tmp_path / "none.toml", check=False), name, "none.toml")


def test_nothing_listens_beyond_loopback_without_a_key(tmp_path: Path) -> None:
    words = ("--data", tmp_path / "c", "--listen", "0.0.0.0:0", "--http", "127.0.0.1:0", "--metaserver", "127.0.0.1:1")
    one_line(chunkserver(*words), "chunkserver", "key")


def test_a_wrong_key_is_named(cluster: RealCluster, tmp_path: Path) -> None:
    key_file = tmp_path / "other.key"
    load_or_create_key(key_file)
    ports = ("--listen", "127.0.0.1:0", "--http", "127.0.0.1:0")
    words = ("--metaserver", f"127.0.0.1:{cluster.wanted.http_port}", "--key-file", key_file)
    one_line(chunkserver("--data", tmp_path / "c", *ports, *words), "chunkserver", str(key_file))
    key_file.write_text("no key")
    one_line(chunkserver("--data", tmp_path / "c", *ports, *words), "chunkserver", str(key_file))


def test_a_server_of_another_cluster(own_cluster: RealCluster, tmp_path: Path) -> None:
    """A chunkserver with the data of one cluster is pointed at another: it says so, and loses nothing."""
    with running(tmp_path / "other", servers=1, copies=1) as other:
        (own_cluster.mnt / "file").write_bytes(b"x" * 100_000)
        own_cluster.down()
        data = own_cluster.layout.server_data("chunkserver1")
        before = sorted(path.name for path in data.rglob("*") if path.is_file())
        ports = ("--listen", "127.0.0.1:0", "--http", "127.0.0.1:0")
        words = ("--metaserver", f"127.0.0.1:{other.wanted.http_port}", "--key-file", other.layout.key_file)
        one_line(chunkserver("--data", data, *ports, *words), "chunkserver", "cluster")
        assert sorted(path.name for path in data.rglob("*") if path.is_file()) == before
        assert [server.name for server in other.status().servers] == ["chunkserver1"]
    own_cluster.up()
    assert (own_cluster.mnt / "file").read_bytes() == b"x" * 100_000


def test_a_truncated_metadata_file(own_cluster: RealCluster) -> None:
    """Refused with what to do; and what it says to do brings everything back."""
    (own_cluster.mnt / "file").write_bytes(b"x" * 100_000)
    own_cluster.down()
    file = next(own_cluster.layout.server_data("metaserver").rglob("data.mdb"))
    # Long enough for its two meta pages only: the file is sparse, and most of it empty.
    os.truncate(file, 3 * 4096)
    done = own_cluster.up(check=False)
    assert done.returncode == 1
    assert "recover" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    config = own_cluster.layout.config("metaserver")
    run_recover(config)
    own_cluster.up()
    assert (own_cluster.mnt / "file").read_bytes() == b"x" * 100_000


def run_recover(config: Path) -> None:
    module("metaserver", "recover", "--config", config)


# -- what arrives at the ports -------------------------------------------------------------------------------------


GARBAGE = [
    b"",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\0" * 4096,
    b"\xff" * 4096,
    struct.pack("<IIIBBHII", 0xFFFFFFFF, 0, 1, 1, 0, 0, 0, 0),
    struct.pack("<IIIBBHII", 16, 0xFFFFFFFF, 1, 1, 0, 0, 0, 0),
    struct.pack("<IIIBBHII", 1 << 20, 4 << 20, 1, 1, 0, 0, 0, 0),
    os.urandom(100_000),
]


@pytest.mark.usefixtures("still_works")
@pytest.mark.parametrize("number", range(len(GARBAGE)))
def test_garbage_and_over_long_frames(cluster: RealCluster, number: int) -> None:
    assert struct.calcsize("<IIIBBHII") == HEADER_BYTES
    for port in (cluster.wanted.port, cluster.wanted.chunkserver_port(1)):
        send_garbage(port, GARBAGE[number])


def send_garbage(port: int, data: bytes) -> None:
    """Sends it, and waits until the server ends the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        # The server may have closed it before all was sent. A time-out is a failure.
        with suppress(ConnectionResetError, BrokenPipeError):
            sock.sendall(data)
        with suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            while sock.recv(65536):
                pass


@pytest.mark.usefixtures("still_works")
def test_many_silent_connections(cluster: RealCluster, place: Path) -> None:
    silent = [socket.create_connection(("127.0.0.1", cluster.wanted.port)) for _ in range(100)]
    try:
        (place / "beside").write_bytes(b"x")
        assert (place / "beside").read_bytes() == b"x"
    finally:
        for sock in silent:
            sock.close()


@pytest.mark.usefixtures("still_works")
def test_bad_http(cluster: RealCluster) -> None:
    token = dfs_find.access_to_data(cluster.data).key().http_token
    headers = {"Authorization": f"Bearer {token}"}
    for port in (cluster.wanted.http_port, cluster.wanted.chunkserver_port(1) + 1):
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
            assert client.get("/health").status_code == 200
            assert client.get("/metrics").status_code == 401
            assert client.get("/metrics", headers={"Authorization": "Bearer x"}).status_code == 401
            assert "# HELP" in client.get("/metrics", headers=headers).text
            assert client.get("/no/such/thing", headers=headers).status_code == 404
            assert set(client.get("/no/such/thing", headers=headers).json()) == {"code", "text"}
    with httpx.Client(base_url=f"http://127.0.0.1:{cluster.wanted.http_port}", trust_env=False, timeout=30) as client:
        path = "/v1/servers/register"
        assert client.post(path, headers=headers, content=b"{").status_code == 400
        assert client.post(path, headers=headers, content=b"\xff\0").status_code == 400
        assert client.post(path, headers=headers, content=b'{"server": "x"}').status_code == 400
        assert client.post(path, headers=headers, content=b"[" * 100_000).status_code == 400
        assert client.post(path, headers=headers, content=b" " * (5 << 20)).status_code == 413
        assert client.get("/v1/chunks/999999999", headers=headers).status_code == 404
        assert client.get("/v1/chunks/x", headers=headers).status_code in (400, 404)
    for port in (cluster.wanted.http_port, cluster.wanted.chunkserver_port(1) + 1):
        send_garbage(port, os.urandom(100_000))


# -- names and values ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("still_works")
def test_names_that_are_too_long(place: Path) -> None:
    (place / ("n" * 255)).write_text("fits")
    for call in (
        lambda name: (place / name).touch(),
        lambda name: (place / name).mkdir(),
        lambda name: (place / name).symlink_to("x"),
        lambda name: (place / ("n" * 255)).rename(place / name),
        lambda name: os.link(place / ("n" * 255), place / name),
        lambda name: os.mknod(place / name, stat.S_IFIFO | 0o600),
        lambda name: os.stat(place / name),
    ):
        with pytest.raises(OSError, match="File name too long"):
            call("n" * 256)
    assert sorted(os.listdir(place)) == ["before", "n" * 255]


@pytest.mark.usefixtures("still_works")
def test_values_that_are_too_big(place: Path) -> None:
    (place / "file").touch()
    with pytest.raises(OSError, match=r"File name too long|File too large|Invalid argument"):
        os.symlink("x" * 5000, place / "link")
    with pytest.raises(OSError, match=r"Argument list too long|No space left|Numerical result|too large"):
        os.setxattr(place / "file", "user.big", b"x" * (65 << 10))
    with pytest.raises(OSError, match=r"Numerical result out of range"):
        os.setxattr(place / "file", "user." + "x" * 256, b"x")
    with (place / "file").open("ab") as file, pytest.raises(OSError, match=r"File too large|Invalid argument"):
        os.pwrite(file.fileno(), b"xx", (1 << 63) - 2)


def test_the_processes_never_show_the_key(cluster: RealCluster) -> None:
    key = cluster.layout.key_file.read_text().strip()
    token = dfs_find.access_to_data(cluster.data).key().http_token
    assert stat.S_IMODE(cluster.layout.key_file.stat().st_mode) == 0o600
    for name in ("metaserver", "chunkserver1", "mount"):
        line = Path(f"/proc/{cluster.pid(name)}/cmdline").read_bytes().decode()
        environment = Path(f"/proc/{cluster.pid(name)}/environ").read_bytes().decode()
        for secret in (key, token):
            assert secret not in line + environment
    for log in cluster.layout.logs.iterdir():
        assert key not in log.read_text()
        assert token not in log.read_text()
    assert len(list(cluster.layout.logs.iterdir())) >= 5

"""What one can see of a running cluster: ``.dfs``, virtual attributes, traces, and the commands that look."""

import errno
import json
import os
import pstats
import re
import signal
import subprocess
from pathlib import Path

import httpx
import pytest
from crc32c import crc32c
from mount_cluster import RealCluster, wait_until

pytestmark = pytest.mark.timeout(180)


def of(path: Path, name: str) -> str:
    return os.getxattr(path, f"user.dfs.{name}").decode()


def checksum(data: bytes) -> str:
    return f"crc32c:{crc32c(data):08x}"


# -- .dfs ----------------------------------------------------------------------------------------------------------


def test_the_directory_is_reached_by_name_and_never_listed(cluster: RealCluster) -> None:
    hidden = cluster.mnt / ".dfs"
    assert ".dfs" not in os.listdir(cluster.mnt)
    assert sorted(os.listdir(hidden)) == ["metrics", "stats", "status", "waiting"]
    assert (hidden.stat().st_uid, hidden.stat().st_mode & 0o777) == (0, 0o555)
    assert cluster.mnt.name in (hidden / "status").read_text()
    assert "chunkserver1" in (hidden / "status").read_text()


def test_nothing_can_be_changed_there_and_nothing_else_be_called_so(cluster: RealCluster, place: Path) -> None:
    hidden = cluster.mnt / ".dfs"
    file = place / "file"
    file.touch()
    attempts = [
        lambda: (hidden / "new").touch(),
        lambda: (hidden / "new").mkdir(),
        lambda: (hidden / "status").write_text("x"),
        lambda: (hidden / "status").unlink(),
        lambda: hidden.rmdir(),
        lambda: hidden.rename(cluster.mnt / "visible"),
        lambda: file.rename(hidden / "status"),
        lambda: os.link(file, hidden / "link"),
        lambda: os.chmod(hidden, 0o777),
    ]
    for attempt in attempts:
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == errno.EROFS
    with pytest.raises(FileExistsError):
        hidden.mkdir()
    (place / ".dfs").mkdir()  # elsewhere it is a name like any other


def test_operations_are_counted(cluster: RealCluster, place: Path) -> None:
    def creates() -> int:
        found = json.loads(cluster.dfs("stats", cluster.mnt, "--json").stdout)
        return sum(each["count"] for each in found["operations"] if each["operation"] == "create")

    before = creates()
    for number in range(7):
        (place / str(number)).touch()
    assert creates() == before + 7
    text = (cluster.mnt / ".dfs/metrics").read_text()
    assert f'dfsmount_operation_duration_seconds_count{{operation="create"}} {before + 7}.0' in text
    assert 'le="+Inf"' in text
    assert re.search(r"^create +[0-9]", (cluster.mnt / ".dfs/stats").read_text(), re.MULTILINE)


def test_what_waits_says_on_whom_while_the_metaserver_is_frozen(own_cluster: RealCluster) -> None:
    cluster = own_cluster
    pid = cluster.pid("metaserver")
    os.kill(pid, signal.SIGSTOP)
    child = subprocess.Popen(["touch", cluster.mnt / "slow"])
    try:
        waiting = cluster.mnt / ".dfs/waiting"
        wait_until(lambda: f"127.0.0.1:{cluster.wanted.port} for" in waiting.read_text(), "it says on whom")
        line = waiting.read_text().splitlines()[0]
        assert re.search(r"lookup of inode 1.* trace [0-9a-f]{8}: waits for lookup at ", line), line
        shown = cluster.dfs("top", "--once", "--data", cluster.data).stdout
        assert "lookup at 127.0.0.1" in shown
        assert (cluster.mnt / ".dfs/status").read_text().startswith("The metaserver 127.0.0.1")
    finally:
        os.kill(pid, signal.SIGCONT)
        assert child.wait(60) == 0


# -- virtual attributes --------------------------------------------------------------------------------------------


def test_the_checksum_of_a_file_follows_from_its_blocks(place: Path) -> None:
    file = place / "file"
    data = bytearray(os.urandom(3 << 20))
    with file.open("wb") as opened:
        opened.write(data)
        assert of(file, "checksum") == checksum(data)  # although it was not even flushed
        for offset in (0, 100_001, 65_536, (3 << 20) - 1):
            data[offset : offset + 5] = b"other"
            opened.seek(offset)
            opened.write(b"other")
    assert of(file, "checksum") == checksum(data)
    os.truncate(file, 9_000_000)
    data += bytes(9_000_000 - len(data))
    assert of(file, "checksum") == checksum(data)
    os.truncate(file, 1_234_567)
    assert of(file, "checksum") == checksum(data[:1_234_567])
    os.truncate(file, 0)
    assert of(file, "checksum") == "crc32c:00000000"
    os.truncate(file, 1 << 40)
    assert len(of(file, "checksum")) == len("crc32c:00000000")


def test_chunks_and_copies_are_told_and_copies_can_be_set(cluster: RealCluster, place: Path) -> None:
    file = place / "file"
    file.write_bytes(os.urandom(200_000))
    offset, length, chunk, _, servers = of(file, "chunks").splitlines()[0].split()
    assert (offset, length, len(chunk), len(servers.split(","))) == ("0", "200000", 16, 2)
    assert of(file, "copies") == "2"
    os.setxattr(file, "user.dfs.copies", b"3")
    wait_until(lambda: of(file, "copies") == "3", "three copies are wanted")
    assert "3 copies" in cluster.dfs("get-copies", file, "--data", cluster.data).stdout
    os.setxattr(file, "user.dfs.copies", b"default")
    wait_until(lambda: of(file, "copies") == "2", "as all others")
    assert os.listxattr(file) == []
    for name, value, code in (
        ("copies", b"0", errno.EINVAL),
        ("copies", b"many", errno.EINVAL),
        ("copies", b"99", errno.EINVAL),
        ("checksum", b"1", errno.EPERM),
    ):
        with pytest.raises(OSError) as caught:
            os.setxattr(file, f"user.dfs.{name}", value)
        assert caught.value.errno == code, name
    with pytest.raises(OSError) as caught:
        of(place, "checksum")
    assert caught.value.errno == errno.ENODATA


# -- commands ------------------------------------------------------------------------------------------------------


def test_explain_follows_the_last_read_to_the_server(own_cluster: RealCluster) -> None:
    cluster = own_cluster
    file = cluster.mnt / "file"
    file.write_bytes(os.urandom(300_000))
    cluster.remount()
    file.read_bytes()
    found = json.loads(cluster.dfs("explain", file, "--data", cluster.data, "--json").stdout)
    read = found["read"]
    won = [step for step in read["steps"] if not step["outcome"]]
    assert won
    assert all(0 <= step["begun"] <= step["ended"] <= read["seconds"] + 0.001 for step in won)
    parts = {part["method"]: part["seconds"] for server in found["servers"] for part in server["parts"]}
    assert 0 < parts["disk"] <= parts["read"] <= read["seconds"]
    text = cluster.dfs("explain", file, "--data", cluster.data).stdout
    assert f"trace {read['trace']}" in text
    with_metaserver = httpx.get(
        f"http://127.0.0.1:{cluster.wanted.http_port}/metrics", headers=authorized(cluster), trust_env=False
    ).text
    assert 'metaserver_request_duration_seconds_bucket{le="+Inf",method="lookup"}' in with_metaserver


def authorized(cluster: RealCluster) -> dict[str, str]:
    token = cluster.dfs("token", "--data", cluster.data).stdout.strip()
    return {"Authorization": f"Bearer {token}"}


def test_a_profile_names_operations_and_files(cluster: RealCluster, place: Path) -> None:
    load = subprocess.Popen(["sh", "-c", "while :; do touch busy; rm busy; done"], cwd=place)
    try:
        found = json.loads(cluster.dfs("profile", cluster.mnt, "--seconds", "1.5", "--json").stdout)
    finally:
        load.kill()
        load.wait()
    operations = {each["operation"] for each in found}
    assert {"create", "unlink"} <= operations
    assert any(each["name"].endswith("busy") for each in found)


def test_the_python_of_each_program_can_be_profiled(cluster: RealCluster, tmp_path: Path) -> None:
    output = tmp_path / "out.pstats"
    for name in ("mount", "metaserver", "chunkserver1"):
        pid = str(cluster.pid(name))
        done = cluster.dfs("profile", "--cpu", pid, "--seconds", "0.5", "--json", "--output", output)
        assert any("trio" in each["file"] for each in json.loads(done.stdout)), name
        assert pstats.Stats(str(output)).total_tt > 0
    refused = cluster.dfs("profile", "--cpu", "1", check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)


@pytest.mark.parametrize("verb", ["stats", "top", "profile", "explain"])
def test_help_has_an_example(cluster: RealCluster, verb: str) -> None:
    assert f"dfs {verb}" in cluster.dfs(verb, "--help").stdout.partition("Example")[2]


def test_what_is_no_mount_is_one_clear_line(cluster: RealCluster, tmp_path: Path) -> None:
    for words in (("stats", tmp_path), ("profile", tmp_path), ("explain", tmp_path / "none"), ("profile",)):
        done = cluster.dfs(*words, check=False)
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (1, 1, ""), words

"""The `dfs` command from outside, as people and scripts use it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mount_cluster import ROOT, RealCluster, module, run, running, wait_until

pytestmark = pytest.mark.timeout(120)


def test_up_again_finds_the_cluster(cluster: RealCluster) -> None:
    before = {
        name: cluster.pid(name) for name in ("metaserver", "chunkserver1", "chunkserver2", "chunkserver3", "mount")
    }
    said = cluster.up().stdout
    assert "is up already" in said
    assert "dfs down" in said
    assert str(cluster.layout.logs) in said
    assert {name: cluster.pid(name) for name in before} == before


def test_help_is_fast_and_complete() -> None:
    started = time.monotonic()
    said = module("dfsmount.dfs", "--help").stdout
    assert time.monotonic() - started < 5
    assert all(f"  {verb} " in said for verb in ("up", "down", "status", "chunks", "check"))


def test_status_begins_with_a_verdict(cluster: RealCluster) -> None:
    wait_until(lambda: "Healthy" in cluster.dfs("status", "--data", cluster.data).stdout.splitlines()[0], "healthy")
    said = cluster.dfs("status", "--data", cluster.data).stdout
    assert said.splitlines()[0] == "Healthy: all 3 chunkservers are up and every chunk has its 2 copies."
    assert all(f"chunkserver{number}" in said for number in (1, 2, 3))
    assert str(cluster.mnt) in said


def test_status_as_json(cluster: RealCluster) -> None:
    found = json.loads(cluster.dfs("status", "--json", "--data", cluster.data).stdout)
    assert len(found["status"]["servers"]) == 3
    assert found["status"]["copies"] == 2
    assert {session["mountpoint"] for session in found["status"]["sessions"]} >= {str(cluster.mnt)}


def test_the_environment_names_the_cluster(cluster: RealCluster) -> None:
    said = module("dfsmount.dfs", "status", env={"DFS_DATA": str(cluster.data)}).stdout
    assert f"127.0.0.1:{cluster.wanted.http_port}" in said
    address = f"127.0.0.1:{cluster.wanted.http_port}"
    said = module("dfsmount.dfs", "status", "--metaserver", address, "--key-file", cluster.layout.key_file).stdout
    assert address in said


def test_chunks_shows_where_a_file_is(cluster: RealCluster, place: Path) -> None:
    content = os.urandom(300_000)
    (place / "file").write_bytes(content)
    found = json.loads(cluster.dfs("chunks", place / "file", "--verify", "--json").stdout)
    assert found["size"] == len(content)
    assert sum(piece["length"] for piece in found["pieces"]) == len(content)
    for piece in found["pieces"]:
        assert len(piece["replicas"]) == 2
        assert len({replica["server"] for replica in piece["replicas"]}) == 2
        for replica in piece["replicas"]:
            assert replica["checksums"] == "ok"
            assert Path(replica["path"]).is_file()
            assert abs(replica["created_ns"] / 1e9 - time.time()) < 3600
    said = cluster.dfs("chunks", place / "file").stdout
    assert "300,000 bytes" in said
    assert found["pieces"][0]["replicas"][0]["path"] in said


def test_the_paths_that_chunks_shows_hold_the_bytes(cluster: RealCluster, place: Path) -> None:
    """The payload begins at 2 MiB in the chunk's file: a file can be read without any of our programs."""
    content = os.urandom(200_000)
    (place / "file").write_bytes(content)
    found = json.loads(cluster.dfs("chunks", place / "file", "--json").stdout)
    for number in (0, 1):
        rebuilt = bytearray(len(content))
        for piece in found["pieces"]:
            with open(piece["replicas"][number]["path"], "rb") as file:
                file.seek((2 << 20) + piece["chunk_offset"])
                rebuilt[piece["offset"] : piece["offset"] + piece["length"]] = file.read(piece["length"])
        assert rebuilt == content


def test_chunks_of_an_empty_file_and_through_a_link(cluster: RealCluster, place: Path) -> None:
    (place / "empty").touch()
    assert "No bytes are stored" in cluster.dfs("chunks", place / "empty").stdout
    (place / "file").write_bytes(b"x")
    (place / "link").symlink_to("file")
    assert "1 bytes in 1 piece" in cluster.dfs("chunks", place / "link").stdout


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("chunks", "/etc/passwd"), "/etc/passwd is not on a dfs mount"),
        (("chunks", "/nonexistent"), "cannot find /nonexistent"),
        (("status", "--data", "/nonexistent"), "no cluster in /nonexistent"),
        (("down", "--data", "/nonexistent"), "no cluster in /nonexistent"),
        (("status", "--metaserver", "127.0.0.1:1", "--key-file", "/nonexistent"), "no cluster key at /nonexistent"),
        (("up", "/proc", "--data", "DATA"), "/proc is in use already"),
    ],
)
def test_what_is_wrong_is_one_line(words: tuple[str, ...], text: str, tmp_path: Path) -> None:
    done = module("dfsmount.dfs", *(word.replace("DATA", str(tmp_path / "x")) for word in words), check=False)
    if words[0] == "up":
        module("dfsmount.dfs", "down", "--data", tmp_path / "x", check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert done.stderr.startswith("dfs: ")
    assert text in done.stderr


def test_a_directory_has_no_chunks(cluster: RealCluster, place: Path) -> None:
    done = cluster.dfs("chunks", place, check=False)
    assert done.returncode == 1
    assert "is not a regular file" in done.stderr


def test_a_wrong_key_and_a_wrong_port(cluster: RealCluster, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("ab" * 32)
    key.chmod(0o600)
    http = f"127.0.0.1:{cluster.wanted.http_port}"
    done = module("dfsmount.dfs", "status", "--metaserver", http, "--key-file", key, check=False)
    assert (done.returncode, "another cluster key" in done.stderr) == (1, True), done.stderr
    frames = f"127.0.0.1:{cluster.wanted.port}"
    done = module("dfsmount.dfs", "status", "--metaserver", frames, "--key-file", key, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr


def test_check_finds_nothing(cluster: RealCluster, place: Path) -> None:
    (place / "file").write_bytes(os.urandom(100_000))
    said = cluster.dfs("check", "--deep", "--data", cluster.data).stdout
    assert "nothing wrong" in said
    found = json.loads(cluster.dfs("check", "--deep", "--json", "--data", cluster.data).stdout)
    assert found["metadata"] == found["data"] == []
    assert found["replicas"] >= 2


def test_down_says_who_keeps_the_mount_busy(own_cluster: RealCluster) -> None:
    (own_cluster.mnt / "dir").mkdir()
    with subprocess.Popen(["sleep", "60"], cwd=own_cluster.mnt / "dir") as sleeper:
        done = own_cluster.down(check=False)
        assert done.returncode == 1
        assert f"sleep (pid {sleeper.pid}) works in {own_cluster.mnt}/dir" in done.stderr
        assert own_cluster.pid("metaserver")
        sleeper.kill()
    said = own_cluster.down().stdout
    assert f"unmounted {own_cluster.mnt}" in said
    assert "The data is kept in" in said
    assert "was running" in own_cluster.down().stdout


def test_down_and_up_bring_the_same_data_back(own_cluster: RealCluster) -> None:
    content = os.urandom(1_000_000)
    (own_cluster.mnt / "file").write_bytes(content)
    own_cluster.down()
    assert not (own_cluster.mnt / "file").exists()
    own_cluster.up()
    assert (own_cluster.mnt / "file").read_bytes() == content
    own_cluster.kill_everything()
    own_cluster.up()
    assert (own_cluster.mnt / "file").read_bytes() == content


def test_a_new_cluster_belongs_to_the_person_behind_sudo(tmp_path: Path) -> None:
    cluster = RealCluster(tmp_path / "c")
    try:
        words = ("up", cluster.mnt, "--data", cluster.data, "--port", str(cluster.wanted.port))
        module("dfsmount.dfs", *words, env={"SUDO_UID": "1234", "SUDO_GID": "1235"})
        found = cluster.mnt.stat()
        assert (found.st_uid, found.st_gid) == (1234, 1235)
        cluster.down()
        cluster.up()
        assert cluster.mnt.stat().st_uid == 1234
        cluster.check()
    finally:
        cluster.destroy()


def test_a_reader_that_leaves_does_not_stop_the_work(own_cluster: RealCluster) -> None:
    own_cluster.down()
    command = f"{sys.executable} -m dfsmount.dfs up {own_cluster.mnt} --data {own_cluster.data} | head -n 1"
    said = run("bash", "-o", "pipefail", "-c", command, cwd=ROOT).stdout
    assert said.startswith("metaserver ")
    assert own_cluster.mnt.is_mount()
    assert own_cluster.pid("mount")


def test_up_starts_only_what_does_not_run(own_cluster: RealCluster) -> None:
    own_cluster.kill("chunkserver2")
    before = own_cluster.pid("metaserver")
    said = own_cluster.up().stdout
    assert "chunkserver2  started" in said
    assert "chunkserver1" not in said
    assert own_cluster.pid("metaserver") == before


def test_up_after_the_mount_was_killed(own_cluster: RealCluster) -> None:
    (own_cluster.mnt / "file").write_bytes(b"x" * 1000)
    run("sync", own_cluster.mnt / "file")
    own_cluster.kill("mount")
    own_cluster.up()
    assert (own_cluster.mnt / "file").read_bytes() == b"x" * 1000


def test_status_tells_of_a_lost_server(own_cluster: RealCluster) -> None:
    (own_cluster.mnt / "file").write_bytes(b"x" * 1000)
    own_cluster.kill("chunkserver3")

    def told() -> bool:
        return "chunkserver3 is DOWN" in own_cluster.dfs("status", "--data", own_cluster.data).stdout.splitlines()[0]

    wait_until(told, "the verdict names the lost server")
    own_cluster.kill("metaserver", signal.SIGTERM)
    done = own_cluster.dfs("status", "--data", own_cluster.data, check=False)
    assert done.returncode == 1
    assert "no metaserver at" in done.stderr
    own_cluster.up()


def test_deep_check_finds_a_flipped_bit_that_readers_never_see(own_cluster: RealCluster) -> None:
    content = os.urandom(500_000)
    (own_cluster.mnt / "file").write_bytes(content)
    run("sync", own_cluster.mnt / "file")
    found = json.loads(own_cluster.dfs("chunks", own_cluster.mnt / "file", "--json").stdout)
    piece = found["pieces"][0]
    with open(piece["replicas"][0]["path"], "r+b", buffering=0) as file:
        file.seek((2 << 20) + piece["chunk_offset"] + 1000)
        old = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([old ^ 4]))
        os.fsync(file.fileno())
    done = own_cluster.dfs("check", "--deep", "--data", own_cluster.data, check=False)
    assert done.returncode == 1
    assert f"chunk {piece['chunk']} on {piece['replicas'][0]['server']}: 1 bad block" in done.stdout
    done = own_cluster.dfs("chunks", own_cluster.mnt / "file", "--verify", check=False)
    assert done.returncode == 1
    own_cluster.remount()
    assert (own_cluster.mnt / "file").read_bytes() == content


def test_ports_in_use_are_named(tmp_path: Path) -> None:
    import socket

    with running(tmp_path / "one") as cluster:
        cluster.down()
        with socket.create_server(("127.0.0.1", cluster.wanted.port + 1)):
            done = cluster.up(check=False)
            assert done.returncode == 1
            assert f"port {cluster.wanted.port + 1} of metaserver is in use by" in done.stderr
            assert f"(pid {os.getpid()})" in done.stderr
        cluster.up()


def test_down_leaves_the_mounts_of_others_alone(own_cluster: RealCluster, tmp_path: Path) -> None:
    """A cluster that is down may have had the ports that another one has now."""
    other = RealCluster(tmp_path / "other")
    other.wanted.port = own_cluster.wanted.port
    own_cluster.down()
    try:
        other.up()
        (other.mnt / "file").write_text("x")
        assert "was running" in own_cluster.down().stdout
        assert other.mnt.is_mount()
        assert (other.mnt / "file").read_text() == "x"
        other.check()
    finally:
        other.destroy()


def test_two_clusters_side_by_side(cluster: RealCluster, own_cluster: RealCluster) -> None:
    (own_cluster.mnt / "mine").write_text("here")
    assert not (cluster.mnt / "mine").exists()
    found = json.loads(cluster.dfs("chunks", own_cluster.mnt / "mine", "--json").stdout)
    assert str(own_cluster.data) in found["pieces"][0]["replicas"][0]["path"]

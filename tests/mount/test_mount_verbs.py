"""dfs ls, gc, bench, snapshot-metadata, recover and rebuild, from outside, on a real mount."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mount_cluster import ROOT, RealCluster, run, wait_until


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def listed(cluster: RealCluster, *words: str | Path) -> dict[str, dict[str, Any]]:
    done = cluster.dfs("ls", *words, "--json", "--data", cluster.data)
    return {entry["name"]: entry for shown in json.loads(done.stdout) for entry in shown["entries"]}


def garbage(cluster: RealCluster) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cluster.dfs("gc", "--json", "--data", cluster.data).stdout)
    return found


# -- ls ------------------------------------------------------------------------------------------------------------


def test_ls_shows_what_is_stored(cluster: RealCluster, place: Path) -> None:
    (place / "big").write_bytes(os.urandom(3 << 20))
    (place / "sub").mkdir()
    (place / "link").symlink_to("big")
    (place / "empty").touch()
    os.mkfifo(place / "pipe")
    with (place / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    (place / os.fsdecode(b"odd\xff")).touch()
    sync(place / "big")
    entries = listed(cluster, place)
    assert set(entries) == {"big", "sub", "link", "empty", "pipe", "sparse", "odd\\xff"}
    big = entries["big"]
    assert (big["type"], big["size"], big["allocated"], big["copies"]) == ("file", 3 << 20, 3 << 20, 2)
    assert (big["least_copies"], big["copies_are_default"], big["ino"]) == (2, True, (place / "big").stat().st_ino)
    assert big["state"] in ("ok", "being written")
    assert (entries["sparse"]["size"], entries["sparse"]["allocated"], entries["sparse"]["state"]) == (
        1 << 30,
        0,
        "no data",
    )
    assert [entries[name]["type"] for name in ("sub", "link", "pipe")] == ["directory", "link", "fifo"]


def test_ls_tells_wanted_from_default_copies(cluster: RealCluster, place: Path) -> None:
    (place / "precious").write_bytes(b"x")
    cluster.dfs("set-copies", "3", place / "precious", "--data", cluster.data)
    wait_until(lambda: listed(cluster, place)["precious"]["copies"] == 3, "the file wants three copies")
    assert re.search(r"^file +\d +3! .*precious$", cluster.dfs("ls", place).stdout, re.MULTILINE)
    assert listed(cluster, "-d", place)[place.name]["type"] == "directory"
    # The root has no parent on the mount.
    assert len(listed(cluster, "-d", cluster.mnt)) == 1


def test_ls_of_many_entries_pages(cluster: RealCluster, place: Path) -> None:
    for number in range(1203):
        (place / f"{number:04}").touch()
    assert sorted(listed(cluster, place)) == [f"{number:04}" for number in range(1203)]


def test_ls_sees_missing_copies(own_cluster: RealCluster) -> None:
    path = own_cluster.mnt / "file"
    path.write_bytes(os.urandom(100_000))
    sync(path)
    names = {server.server: server.name for server in own_cluster.status().servers}
    holders = [names[replica.server] for replica in own_cluster.file(path).extents[0].replicas]
    own_cluster.kill(holders[0])
    wait_until(lambda: listed(own_cluster, own_cluster.mnt)["file"]["least_copies"] == 1, "one copy is missed")
    own_cluster.kill(holders[1])
    wait_until(lambda: listed_missing(own_cluster), "both are missed")
    own_cluster.up()


def listed_missing(cluster: RealCluster) -> bool:
    done = cluster.dfs("ls", cluster.mnt, "--data", cluster.data, check=False)
    assert done.returncode == (1 if "MISSING" in done.stdout else 0)
    return "1 of 1 chunks MISSING" in done.stdout


@pytest.mark.parametrize("path", ["/", "/nonexistent"])
def test_ls_elsewhere_is_refused(cluster: RealCluster, path: str) -> None:
    done = cluster.dfs("ls", path, "--data", cluster.data, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


# -- gc ------------------------------------------------------------------------------------------------------------


# By hand: of 140 MiB of dead replicas what is over 128 MiB does not wait, and may be gone before the test looks.
@pytest.mark.soak
def test_gc_collects_now_what_would_wait(own_cluster: RealCluster) -> None:
    """Ten minutes of grace by default; the chunk's file is on two disks until then."""
    path = own_cluster.mnt / "large"
    path.write_bytes(os.urandom(70 << 20))
    sync(path)
    with path.open("rb") as held:
        path.unlink()
        wait_until(lambda: garbage(own_cluster)["orphans"] == 1, "the file has no name")
        assert "1 file without a name" in own_cluster.dfs("gc", "--data", own_cluster.data).stdout
        assert held.read(10)
    own_cluster.dfs("trash", "empty", "--data", own_cluster.data)
    wait_until(lambda: garbage(own_cluster)["waiting_chunks"] >= 1, "a whole chunk is dead")
    before = garbage(own_cluster)
    assert before["orphans"] == 0
    assert before["dead_bytes"] >= 2 * (60 << 20)
    assert 500 < before["longest_wait_seconds"] <= 600
    shown = own_cluster.dfs("gc", "--data", own_cluster.data).stdout
    assert re.search(r"^deleted +\d+ chunks? that nothing refers to .* kept for their grace: \d", shown, re.MULTILINE)
    done = own_cluster.dfs("gc", "--now", "--data", own_cluster.data)
    assert re.search(r"^\d+ chunks? deleted: (6\d\.\d|1\d\d) MiB are free again\.", done.stdout, re.MULTILINE)
    assert garbage(own_cluster)["dead_bytes"] < 1 << 20
    own_cluster.check("--deep")


def test_gc_says_when_it_cannot(own_cluster: RealCluster) -> None:
    """A server that is away keeps what it has."""
    path = own_cluster.mnt / "large"
    path.write_bytes(os.urandom(70 << 20))
    sync(path)
    names = {server.server: server.name for server in own_cluster.status().servers}
    # Of the large chunk: a beginning or an end may lie among small files.
    longest = max(own_cluster.file(path).extents, key=lambda extent: extent.length)
    own_cluster.kill(names[longest.replicas[0].server])
    path.unlink()
    own_cluster.dfs("trash", "empty", "--data", own_cluster.data)
    wait_until(lambda: garbage(own_cluster)["waiting_chunks"] >= 1, "a whole chunk is dead")
    done = own_cluster.dfs("gc", "--now", "--data", own_cluster.data, check=False)
    assert done.returncode == 1
    assert "cannot be deleted now: `dfs status` shows which servers are away" in done.stderr
    own_cluster.up()


# -- bench ---------------------------------------------------------------------------------------------------------


def test_bench_measures_and_leaves_nothing(cluster: RealCluster, place: Path) -> None:
    done = cluster.dfs("bench", place, "--size", "8M", "--files", "20", "--json")
    result = json.loads(done.stdout)
    assert result["source"] == cluster.wanted.address
    figures = {figure["name"]: figure for figure in result["figures"]}
    assert figures["sequential write + fsync"]["bytes"] == 8 << 20
    assert figures["append 4 KiB + fsync"]["p99_ms"] >= figures["append 4 KiB + fsync"]["median_ms"] > 0
    assert all(figure["seconds"] > 0 and figure["operations"] > 0 for figure in figures.values())
    assert list(place.iterdir()) == []
    assert "MiB/s" in cluster.dfs("bench", place, "--size", "8M", "--files", "20").stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_bench_that_is_ended_leaves_nothing(cluster: RealCluster, place: Path, number: int) -> None:
    command = [sys.executable, "-m", "dfsmount.dfs", "bench", str(place), "--size", "1G"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: any(place.glob(".dfs-bench-*/large")), "it has begun")
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode not in (0, -number)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--size", "1023G"], "this would write 1023"),
        (["--size", "1"], "--size 1: a size such as 64M"),
        (["--size", "x"], "--size x: a size such as 64M"),
    ],
)
def test_bench_refuses_what_cannot_be(cluster: RealCluster, place: Path, words: list[str], text: str) -> None:
    done = cluster.dfs("bench", place, *words, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert text in done.stderr
    assert list(place.iterdir()) == []


def test_bench_of_a_file_is_refused(cluster: RealCluster, place: Path) -> None:
    (place / "file").touch()
    assert "is not a directory" in cluster.dfs("bench", place / "file", check=False).stderr


# -- the metaserver's data -----------------------------------------------------------------------------------------


def test_a_snapshot_file_brings_a_lost_store_back(own_cluster: RealCluster) -> None:
    (own_cluster.mnt / "before").write_bytes(b"one")
    sync(own_cluster.mnt / "before")
    made = json.loads(own_cluster.dfs("snapshot-metadata", "--json", "--data", own_cluster.data).stdout)
    assert Path(made["path"]).parent == own_cluster.layout.server_data("metaserver") / "snapshots"
    assert Path(made["path"]).stat().st_size > 0
    (own_cluster.mnt / "after").write_bytes(b"two")
    sync(own_cluster.mnt / "after")
    runs = own_cluster.dfs("recover", "--data", own_cluster.data, check=False)
    assert (runs.returncode, runs.stderr) == (1, "dfs: its metaserver runs: `dfs down` first\n")
    own_cluster.down()
    (own_cluster.layout.server_data("metaserver") / "data.mdb").unlink()
    done = json.loads(own_cluster.dfs("recover", "--data", own_cluster.data, "--json").stdout)
    assert any(line.startswith("recovered ") for line in done["lines"])
    own_cluster.up()
    assert (own_cluster.mnt / "before").read_bytes() + (own_cluster.mnt / "after").read_bytes() == b"onetwo"
    own_cluster.check("--deep")


def test_recover_passes_on_why_it_cannot(own_cluster: RealCluster) -> None:
    own_cluster.down()
    shutil.rmtree(own_cluster.layout.server_data("metaserver"))
    done = own_cluster.dfs("recover", "--data", own_cluster.data, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("metaserver: ")
    assert done.stderr.count("\n") == 1


def test_which_metaserver_has_to_be_said(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "DFS_DATA": str(tmp_path)}
    for words in (["recover"], ["rebuild"], ["recover", "--data", str(tmp_path), "--config", "x"]):
        done = run(sys.executable, "-m", "dfsmount.dfs", *words, check=False, env=environment)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


def test_rebuild_finds_the_chunkservers_itself(own_cluster: RealCluster) -> None:
    content = os.urandom(100_000)
    (own_cluster.mnt / "file").write_bytes(content)
    sync(own_cluster.mnt / "file")
    number = (own_cluster.mnt / "file").stat().st_ino
    own_cluster.kill("mount")
    own_cluster.kill("metaserver")
    shutil.rmtree(own_cluster.layout.server_data("metaserver"))
    dry = own_cluster.dfs("rebuild", "--dry-run", "--data", own_cluster.data)
    assert re.search("^would recover [0-9]+ files", dry.stdout, re.MULTILINE)
    assert not own_cluster.layout.server_data("metaserver").exists()
    own_cluster.dfs("rebuild", "--data", own_cluster.data)
    own_cluster.up()
    assert (own_cluster.mnt / "recovered" / str(number)).read_bytes() == content

"""What was deleted can be had back, from outside: `rm`, `mv`, editors, and `dfs trash`."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from mount_cluster import RealCluster, differences, facts, run, running, wait_until
from test_mount_full_disks import NAMES, SmallDisks, assert_kept, put

pytestmark = pytest.mark.timeout(240)

MIB = 1 << 20


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RealCluster]:
    with running(tmp_path) as made:
        yield made


def listed(cluster: RealCluster, *words: str | Path) -> list[dict[str, object]]:
    shown: list[dict[str, object]] = json.loads(
        cluster.dfs("trash", "list", *words, "--data", cluster.data, "--json").stdout
    )
    return shown


def test_a_file_is_deleted_listed_and_restored(cluster: RealCluster) -> None:
    assert listed(cluster) == [], "the probe of `dfs up` is not of interest"
    file = cluster.mnt / "file \xff"
    file.write_text("at once deleted, and not yet written back")
    file.chmod(0o640)
    os.chown(file, 1000, 1001)
    os.setxattr(file, "user.a", b"b")
    before = facts(file)
    file.unlink()
    shown = cluster.dfs("trash", "list", "--data", cluster.data).stdout
    assert "/file" in shown
    assert "1 deleted file" in shown
    assert "trash       1 deleted file" in cluster.dfs("status", "--data", cluster.data).stdout
    assert cluster.dfs("trash", "restore", file).stdout == f"restored {file}\n"
    assert facts(file) == before
    assert os.getxattr(file, "user.a") == b"b"
    assert file.read_text() == "at once deleted, and not yet written back"
    assert listed(cluster) == []


def test_nothing_is_overwritten_and_versions_are_told_apart(cluster: RealCluster) -> None:
    file = cluster.mnt / "file"
    for version in ("one", "two", "three"):
        new = cluster.mnt / "new"
        new.write_text(version)
        new.replace(file)
    refused = cluster.dfs("trash", "restore", file, check=False)
    assert refused.returncode == 1
    assert refused.stderr == f"dfs: {file} was not restored: something has that name now; --to gives it another\n"
    assert file.read_text() == "three"
    entries = listed(cluster, file)
    assert [entry["path"] for entry in entries] == ["/file", "/file"]
    assert "1 older version" in cluster.dfs("trash", "restore", file, "--to", cluster.mnt / "newest").stdout
    cluster.dfs("trash", "restore", str(entries[0]["id"]), "--to", cluster.mnt / "oldest")
    assert (cluster.mnt / "newest").read_text() == "two"
    assert (cluster.mnt / "oldest").read_text() == "one"
    for words in (
        (str(entries[0]["id"]),),  # restored already
        ("999999",),
        (cluster.mnt / "never was",),
        ("/etc/passwd",),
        (file, "--to", "/tmp"),
        (file, "--to", cluster.mnt / "no" / "such" / "directory"),
    ):
        refused = cluster.dfs("trash", "restore", *words, "--data", cluster.data, check=False)
        assert (refused.returncode, refused.stderr.count("\n"), refused.stdout) == (1, 1, ""), words


def test_a_tree_comes_back_after_kills_and_a_restart(cluster: RealCluster, tmp_path: Path) -> None:
    tree, copy = cluster.mnt / "tree", tmp_path / "copy"
    for number in range(150):
        folder = tree / f"{number % 7}" / f"{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"file{number}").write_bytes(os.urandom(number * 100))
    (tree / "3" / "link").symlink_to("../nowhere")
    (tree / "3").chmod(0o2711)
    shutil.copytree(tree, copy, symlinks=True)
    run("rm", "-r", tree)
    cluster.kill("metaserver", signal.SIGKILL)
    cluster.up()
    wait_until(lambda: cluster.status().trash.counted, "counted")  # type: ignore[union-attr]
    said = cluster.dfs("trash", "restore", tree, "--to", cluster.mnt / "back").stdout
    assert said.count("restored /") == 152
    run("find", cluster.mnt / "back", copy, "-exec", "touch", "-h", "-d", "2020-01-01", "{}", "+")
    assert differences(cluster.mnt / "back", copy) == []
    assert listed(cluster) == []


def test_the_trash_is_emptied(cluster: RealCluster) -> None:
    for number in range(30):
        (cluster.mnt / f"{number}").write_bytes(bytes(10_000))
        (cluster.mnt / f"{number}").unlink()
    (cluster.mnt / "a").mkdir()
    (cluster.mnt / "a" / "b").touch()
    (cluster.mnt / "a" / "b").unlink()
    assert "0 deleted files" in cluster.dfs("trash", "empty", "--older-than", "1h", "--data", cluster.data).stdout
    assert "1 deleted file " in cluster.dfs("trash", "empty", cluster.mnt / "a").stdout
    emptied = json.loads(cluster.dfs("trash", "empty", "--data", cluster.data, "--json").stdout)
    assert emptied["files"] == 30
    assert listed(cluster) == []
    assert cluster.status().inodes == 2


def test_what_is_open_goes_on(cluster: RealCluster) -> None:
    file = cluster.mnt / "file"
    with file.open("w+b", buffering=0) as descriptor:
        descriptor.write(b"before")
        file.unlink()
        descriptor.write(b" and after")
        assert os.pread(descriptor.fileno(), 100, 0) == b"before and after"
        cluster.dfs("trash", "restore", file)
        assert os.fstat(descriptor.fileno()).st_nlink <= 1
        descriptor.write(b" and restored")
    assert file.read_bytes() == b"before and after and restored"


def test_deleted_files_make_room_for_new_ones(tmp_path: Path) -> None:
    """Promise P6: no write fails because of what was deleted, and df counts it as free."""
    disks = SmallDisks(tmp_path)
    try:
        for name in NAMES:
            disks.make(name, 160)
        disks.up()
        mnt = disks.cluster.mnt
        free = os.statvfs(mnt).f_bavail * os.statvfs(mnt).f_frsize
        for round_ in range(3):
            # Most of it each time.
            safe = {mnt / f"{number}": os.urandom(MIB) * 4 for number in range(int(0.7 * free) // (4 * MIB))}
            for path, content in safe.items():
                put(path, content)
            assert_kept(safe)
            for path in safe:
                path.unlink()
            wait_until(
                lambda: os.statvfs(mnt).f_bavail * os.statvfs(mnt).f_frsize > 0.9 * free, f"it is free ({round_})"
            )
        kept = disks.cluster.status().trash
        assert kept is not None
        assert kept.files > 0, "there was no need to give up all of it"
        disks.cluster.check()
    finally:
        disks.destroy()

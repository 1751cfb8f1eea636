"""Both ways to talk with the kernel: each shows what was done through the other, and ends as it should."""

import os
import signal
from pathlib import Path

import pytest
from mount_cluster import RealCluster, facts, run, wait_until

from dfsmount.dfs_processes import is_alive
from dfsmount.fusewire import MAX_WRITE_BYTES


def fill(directory: Path) -> None:
    """A bit of everything."""
    directory.mkdir()
    (directory / "large").write_bytes(bytes(range(256)) * (3 * MAX_WRITE_BYTES // 256) + b"end")
    (directory / "old").write_text("text")
    os.rename(directory / "old", directory / "new")
    os.link(directory / "new", directory / "hard")
    os.symlink("new", directory / "link")
    os.mkfifo(directory / "fifo", 0o600)
    os.setxattr(directory / "new", b"user.x", b"1", os.XATTR_CREATE)
    os.utime(directory / "new", ns=(-5, 1_500_000_000_000_000_001))
    os.truncate(directory / "new", 2)
    for number in range(300):
        (directory / f"file-{number}").touch()


@pytest.mark.parametrize("ending", ["umount", "SIGTERM"])
def test_libfuse_and_our_own(cluster: RealCluster, tmp_path: Path, ending: str) -> None:
    point = tmp_path / "libfuse"
    pid = cluster.mount_again(point, "driver=libfuse")
    for through, seen, name in ((point, cluster.mnt, f"{ending}-a"), (cluster.mnt, point, f"{ending}-b")):
        fill(through / name)
        wait_until(lambda seen=seen, name=name: (seen / name).exists(), "the directory is seen")  # type: ignore[misc]
        assert sorted(os.listdir(seen / name)) == sorted(os.listdir(through / name))
        for entry in os.listdir(through / name):
            assert facts(seen / name / entry) == facts(through / name / entry)
        assert os.getxattr(seen / name / "new", b"user.x") == b"1"
        with pytest.raises(FileExistsError):
            os.setxattr(seen / name / "new", b"user.x", b"2", os.XATTR_CREATE)
    if ending == "umount":
        run("umount", point)
    else:
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not is_alive(pid) and not os.path.ismount(point), "the mount has ended")

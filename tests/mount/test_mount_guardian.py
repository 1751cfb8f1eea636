"""A mount that is killed while the kernel drops pages for it ends nevertheless, and nothing on it hangs."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mount_cluster import RealCluster, running, wait_until

from dfsmount import guardian
from dfsmount.dfs_mounts import mount_at

pytestmark = pytest.mark.mount


def stuck(pid: int) -> bool:
    """Whether a thread of the process waits, uninterruptibly, for pages."""
    states = [(task / "stat").read_text().rpartition(") ")[2][:1] for task in Path(f"/proc/{pid}/task").iterdir()]
    return "D" in states


def test_a_mount_killed_while_it_drops_pages_ends(tmp_path: Path) -> None:
    with running(tmp_path / "c", 1, 1) as cluster:
        other = cluster.root / "other"
        pid = cluster.mount_again(other, "timeout=300")
        file = cluster.mnt / "f"
        file.write_bytes(os.urandom(8 << 20))
        with file.open("r+b") as opened:
            os.fsync(opened.fileno())
            server = cluster.pid("chunkserver1")
            os.kill(server, signal.SIGSTOP)
            try:
                reader = start_reading(other / "f")
                # It reads, and its pages are locked; then another mount says that they are to be dropped.
                wait_until(lambda: waits_for_pages(reader.pid), "the reader waits")
                os.ftruncate(opened.fileno(), 4 << 20)
                wait_until(lambda: stuck(pid), "the kernel waits for the read on behalf of the mount")
                os.kill(pid, signal.SIGKILL)
                wait_until(lambda: not Path(f"/proc/{pid}/task").exists(), "the mount is gone, threads and all")
                assert reader.wait(timeout=10) != 0
            finally:
                os.kill(server, signal.SIGCONT)
        found = mount_at(str(other))
        assert found is not None, "an empty directory in its place would be written to"
        assert found.ours
        subprocess.run(["umount", other], check=True)


def start_reading(path: Path) -> "subprocess.Popen[bytes]":
    program = f"import os; os.read(os.open({str(path)!r}, os.O_RDONLY), 1 << 20)"
    return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)


def waits_for_pages(pid: int) -> bool:
    wchan = Path(f"/proc/{pid}/wchan").read_text()
    return "folio" in wchan or "page" in wchan


def test_an_ended_mount_leaves_no_guardian(tmp_path: Path) -> None:
    cluster = RealCluster(tmp_path / "c", 1, 1)
    try:
        cluster.up()
        pid = cluster.pid("mount")
        children = Path(f"/proc/{pid}/task/{pid}/children")
        wait_until(lambda: len(children.read_text().split()) == 1, "it has a guardian")
        (child,) = children.read_text().split()
        cluster.down()
        assert not Path(f"/proc/{child}").exists()
    finally:
        cluster.destroy()


def test_another_filesystem_in_its_place_is_left_alone(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path], check=True)
    try:
        device = tmp_path.stat().st_dev
        (tmp_path / "file").write_bytes(b"x")
        assert not guardian.abort(device + 1, os.fsencode(tmp_path))
        # Of the right one it is asked, and what is there stays.
        assert guardian.abort(device, os.fsencode(tmp_path))
        assert (tmp_path / "file").read_bytes() == b"x"
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert not guardian.abort(device, os.fsencode(tmp_path / "nothing"))

"""`mount -t dfs` and /etc/fstab, through the helper that mount(8) calls."""

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mount_cluster import ROOT, RealCluster, run

pytestmark = pytest.mark.timeout(60)

HELPER = Path("/sbin/mount.dfs")


@pytest.fixture(scope="module")
def helper() -> Iterator[None]:
    """mount(8) looks only there. What an installation has put there is used as it is."""
    if HELPER.exists():
        yield
        return
    HELPER.unlink(missing_ok=True)
    HELPER.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from dfsmount.cli import mount_helper\nmount_helper()\n"
    )
    HELPER.chmod(0o755)
    yield
    HELPER.unlink()


@pytest.fixture
def point(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "mnt"
    path.mkdir()
    yield path
    if os.path.ismount(path):
        run("umount", "--lazy", path)


@pytest.mark.usefixtures("helper")
def test_mount_t_dfs(cluster: RealCluster, place: Path, point: Path) -> None:
    (place / "file").write_text("x")
    run("mount", "-t", "dfs", "-o", f"key_file={cluster.layout.key_file},noatime,nodev", cluster.wanted.address, point)
    assert (point / place.name / "file").read_text() == "x"
    run("umount", point)
    assert not os.path.ismount(point)


@pytest.mark.usefixtures("helper")
def test_a_line_of_fstab(cluster: RealCluster, place: Path, point: Path, tmp_path: Path) -> None:
    table = tmp_path / "fstab"
    options = f"key_file={cluster.layout.key_file},_netdev,nofail,allow_other,x-systemd.automount"
    table.write_text(f"{cluster.wanted.address}/{place.name} {point} dfs {options} 0 0\n")
    run("mount", "--fstab", table, point)
    (point / "file").write_text("through fstab")
    assert (place / "file").read_text() == "through fstab"
    run("umount", point)


@pytest.mark.usefixtures("helper")
def test_read_only(cluster: RealCluster, point: Path) -> None:
    run("mount", "-t", "dfs", "-r", "-o", f"key_file={cluster.layout.key_file}", cluster.wanted.address, point)
    with pytest.raises(OSError, match="Read-only"):
        (point / "x").touch()
    run("umount", point)


@pytest.mark.usefixtures("helper")
def test_failures_are_mounts_own(cluster: RealCluster, point: Path) -> None:
    done = run("mount", "-t", "dfs", "-o", "key_file=/nonexistent", cluster.wanted.address, point, check=False)
    assert done.returncode == 32
    assert "mount.dfs: no cluster key at /nonexistent" in done.stderr
    done = run("mount", "-t", "dfs", "-o", "nonsense", cluster.wanted.address, point, check=False)
    assert done.returncode != 0
    assert "nonsense" in done.stderr


@pytest.mark.usefixtures("helper")
def test_others_may_use_a_mount_of_root(cluster: RealCluster, place: Path, point: Path) -> None:
    """allow_other is the default for root, and the kernel checks permissions."""
    (place / "public").write_text("x")
    (place / "public").chmod(0o644)
    (place / "private").write_text("x")
    (place / "private").chmod(0o600)
    place.chmod(0o777)
    options = f"key_file={cluster.layout.key_file}"
    run("mount", "-t", "dfs", "-o", options, f"{cluster.wanted.address}/{place.name}", point)
    # Above the mountpoint: directories of pytest that are for root only.
    parents = [parent for parent in point.parents if str(parent) not in ("/", "/tmp")]
    modes = {parent: stat.S_IMODE(parent.stat().st_mode) for parent in parents}
    for parent in parents:
        parent.chmod(modes[parent] | 0o055)
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    try:
        assert run(*nobody, "cat", point / "public").stdout == "x"
        assert "Permission denied" in run(*nobody, "cat", point / "private", check=False).stderr
        run(*nobody, "touch", point / "made by nobody")
        assert (place / "made by nobody").stat().st_uid == 65534
    finally:
        for parent, mode in modes.items():
            parent.chmod(mode)
        run("umount", point)

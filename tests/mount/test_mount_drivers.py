"""Both ways to talk with the kernel: each shows what was done through the other, and ends as it should."""

import os
import signal
import stat
import subprocess
import sys
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


SPECIAL, PLAIN = 0o6755, 0o755


def as_user(action: str, path: Path, descriptor: int) -> None:
    """Does something with a file, by its path or by a descriptor that root has opened, as user 65534."""
    text = (
        f"import mmap, os, sys; path, fd = sys.argv[1], {descriptor};"
        f"os.setgroups([]); os.setgid(65534); os.setuid(65534); {action}"
    )
    # From there, because directories above are closed to that user.
    command = [sys.executable, "-I", "-S", "-c", text, path.name]
    subprocess.run(command, check=True, pass_fds=[descriptor], cwd=path.parent)


@pytest.mark.parametrize(
    "action",
    [
        "os.write(os.open(path, os.O_WRONLY), b'x')",
        "os.write(os.open(path, os.O_WRONLY | os.O_DIRECT), mmap.mmap(-1, 4096))",
        "os.write(fd, b'x')",
        "os.truncate(path, 1)",
        "os.ftruncate(fd, 1)",
        "os.open(path, os.O_WRONLY | os.O_TRUNC)",
    ],
)
def test_who_writes_to_a_program_takes_its_special_bits_away(cluster: RealCluster, place: Path, action: str) -> None:
    """The kernel says who writes, and leaves the rest to us; root keeps them."""
    path = place / "program"
    path.write_bytes(bytes(8192))
    os.chmod(place, 0o777)
    os.chown(path, 65534, 65534)
    os.chmod(path, SPECIAL)
    with path.open("r+b", buffering=0) as file:
        file.write(b"root")
        assert stat.S_IMODE(path.stat().st_mode) == SPECIAL
        as_user(action, path, file.fileno())
    assert stat.S_IMODE(path.stat().st_mode) == PLAIN


def test_an_owner_takes_special_bits_and_capabilities_along(place: Path) -> None:
    path = place / "program"
    path.touch()
    os.chmod(path, SPECIAL)
    os.chown(path, 65534, 65534)
    assert stat.S_IMODE(path.stat().st_mode) == PLAIN
    rights = bytes.fromhex("01000002 00200000 00000000 00000000 00000000")
    os.setxattr(path, "security.capability", rights)
    path.write_bytes(b"another program")
    with pytest.raises(OSError, match="No data"):
        os.getxattr(path, "security.capability")


@pytest.mark.parametrize(
    "who",
    [
        "--bounding-set -fsetid --inh-caps -fsetid",
        "--reuid 1000 --regid 1000 --clear-groups --inh-caps +fsetid --ambient-caps +fsetid",
        "--reuid 1000 --regid 1000 --clear-groups",
        "",
    ],
    ids=["root without CAP_FSETID", "a user with it", "a user", "root"],
)
def test_emptying_a_file_asks_for_the_capability_not_the_user(cluster: RealCluster, tmp_path: Path, who: str) -> None:
    """As on the local disk: setuid and setgid go unless the opener has CAP_FSETID."""
    modes = []
    for place in (cluster.mnt, tmp_path):
        directory = place / "special"
        directory.mkdir()
        directory.chmod(0o755)
        file = directory / "file"
        file.write_text("12345678")
        os.chown(file, 1000, 1000)
        file.chmod(0o6777)
        # From inside: the user may not pass through the directories above.
        subprocess.run(["setpriv", *who.split(), "sh", "-c", ": > file"], cwd=directory, check=True)
        assert file.stat().st_size == 0
        modes.append(oct(file.stat().st_mode))
        file.unlink()
        directory.rmdir()
    assert modes[0] == modes[1]

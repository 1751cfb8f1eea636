"""What POSIX and Linux promise, through a real kernel: the details that the trees of other tests do not touch."""

import errno
import fcntl
import mmap
import os
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path

import pytest
from mount_cluster import RealCluster, module

from dfsmount import dfs_processes, dfs_services


def fails(number: int, function: object, *arguments: object, **named: object) -> None:
    with pytest.raises(OSError) as caught:
        function(*arguments, **named)  # type: ignore[operator]
    assert caught.value.errno == number, caught.value


def test_holes_read_as_zeros(place: Path) -> None:
    with (place / "f").open("w+b") as file:
        file.seek(10_000_000)
        file.write(b"end")
        file.flush()
        assert os.fstat(file.fileno()).st_blocks < 100
        assert os.pread(file.fileno(), 100, 5_000_000) == bytes(100)
        os.fsync(file.fileno())
    assert (place / "f").read_bytes() == bytes(10_000_000) + b"end"
    os.truncate(place / "f", 20_000_000)
    assert (place / "f").stat().st_size == 20_000_000
    os.truncate(place / "f", 4)
    os.truncate(place / "f", 8)
    assert (place / "f").read_bytes() == bytes(8)


def test_appends_of_two_descriptors_follow_each_other(place: Path) -> None:
    with (place / "f").open("ab", buffering=0) as one, (place / "f").open("ab", buffering=0) as two:
        for number in range(50):
            (one, two)[number % 2].write(b"%02d\n" % number)
    assert (place / "f").read_bytes() == b"".join(b"%02d\n" % number for number in range(50))


def test_mapped_memory(place: Path) -> None:
    path = place / "f"
    path.write_bytes(b"a" * 100_000)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        assert memory[99_999:] == b"a"
        memory[50_000:50_005] = b"hello"
        memory.flush()
        assert os.pread(file.fileno(), 7, 49_999) == b"ahelloa"
    assert path.read_bytes()[50_000:50_005] == b"hello"


def test_an_unlinked_file_can_still_be_used(place: Path) -> None:
    with (place / "f").open("w+b", buffering=0) as file:
        file.write(b"one")
        (place / "f").unlink()
        assert os.fstat(file.fileno()).st_nlink == 0
        file.write(b"two")
        os.fsync(file.fileno())
        os.ftruncate(file.fileno(), 5)
        assert os.pread(file.fileno(), 100, 0) == b"onetw"
        os.fchmod(file.fileno(), 0o600)
        time.sleep(1.2)
        assert os.fstat(file.fileno()).st_size == 5
    assert os.listdir(place) == []


def test_a_file_renamed_over_is_still_there_for_who_has_it_open(place: Path) -> None:
    (place / "f").write_text("old")
    with (place / "f").open() as file:
        (place / "g").write_text("new")
        (place / "g").rename(place / "f")
        assert file.read() == "old"
    assert (place / "f").read_text() == "new"


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC, os.O_DIRECT])
def test_special_ways_to_write(place: Path, flag: int) -> None:
    descriptor = os.open(place / "f", os.O_RDWR | os.O_CREAT | flag, 0o600)
    memory = mmap.mmap(-1, 8192)
    memory.write(b"x" * 8192)
    try:
        assert os.pwrite(descriptor, memory, 4096) == 8192
        assert os.preadv(descriptor, [memory], 0) == 8192
        assert memory[:] == bytes(4096) + b"x" * 4096
    finally:
        os.close(descriptor)


def test_times(place: Path) -> None:
    path = place / "f"
    path.write_text("x")
    os.utime(path, ns=(-1_000_000_001, 1_234_567_890_123_456_789))
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (-1_000_000_001, 1_234_567_890_123_456_789)
    before = path.stat().st_ctime_ns
    time.sleep(0.02)
    path.chmod(0o600)
    assert path.stat().st_ctime_ns > before
    assert path.stat().st_mtime_ns == 1_234_567_890_123_456_789
    before_ns = place.stat().st_mtime_ns
    time.sleep(0.02)
    (place / "g").touch()
    assert place.stat().st_mtime_ns > before_ns
    with path.open("r+") as file:
        file.write("y")
        file.flush()
        assert os.fstat(file.fileno()).st_mtime_ns > before_ns


def test_pipes_sockets_and_devices(place: Path) -> None:
    os.mkfifo(place / "pipe")
    reader = subprocess.Popen(["cat", place / "pipe"], stdout=subprocess.PIPE)
    (place / "pipe").write_text("through the pipe")
    assert reader.communicate(timeout=20)[0] == b"through the pipe"
    os.mknod(place / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    assert (place / "null").stat().st_rdev == os.makedev(1, 3)
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        # A socket's address has 108 bytes at most.
        descriptor = os.open(place, os.O_PATH)
        server.bind(f"/proc/self/fd/{descriptor}/socket")
        server.listen()
        client.connect(f"/proc/self/fd/{descriptor}/socket")
        os.close(descriptor)
    assert stat.S_ISSOCK((place / "socket").stat().st_mode)


def test_locks_of_one_host(place: Path) -> None:
    with (place / "f").open("w") as one, (place / "f").open("w") as two:
        fcntl.flock(one, fcntl.LOCK_EX)
        fails(errno.EAGAIN, fcntl.flock, two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(one, fcntl.LOCK_EX)
        fcntl.lockf(one, fcntl.LOCK_UN)


def test_permissions_are_checked(place: Path) -> None:
    (place / "private").mkdir(0o700)
    (place / "private" / "f").write_text("secret")
    (place / "sticky").mkdir()
    (place / "sticky").chmod(0o1777)
    (place / "sticky" / "mine").write_text("root's")
    (place / "group").mkdir()
    os.chown(place / "group", 0, 1234)
    (place / "group").chmod(0o2777)
    as_nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    for words in (("cat", "private/f"), ("rm", "-f", "sticky/mine"), ("touch", "new"), ("chmod", "777", "private")):
        assert subprocess.run([*as_nobody, *words], cwd=place, capture_output=True, check=False).returncode != 0, words
    for words in (("touch", "sticky/theirs"), ("mkdir", "group/d"), ("touch", "group/f"), ("rm", "sticky/theirs")):
        subprocess.run([*as_nobody, *words], cwd=place, capture_output=True, check=True)
    for name in ("d", "f"):
        found = (place / "group" / name).stat()
        assert (found.st_uid, found.st_gid) == (65534, 1234)
    assert (place / "group" / "d").stat().st_mode & stat.S_ISGID


def test_writing_takes_setuid_away(place: Path) -> None:
    path = place / "f"
    path.write_text("x")
    path.chmod(0o6777)
    subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", "echo y >> f"],
        cwd=place, check=True,
    )  # fmt: skip
    assert stat.S_IMODE(path.stat().st_mode) & (stat.S_ISUID | stat.S_ISGID) == 0


def test_a_large_directory(place: Path) -> None:
    names = {f"file-{number:05}" for number in range(3000)}
    for name in names:
        (place / name).touch()
    assert set(os.listdir(place)) == names
    found = []
    with os.scandir(place) as entries:
        for number, entry in enumerate(entries):
            found.append(entry.name)
            if number % 2:
                os.unlink(place / entry.name)
    assert sorted(found) == sorted(names)
    assert len(os.listdir(place)) == 1500


def test_what_was_never_opened_but_held_outlives_its_name(place: Path) -> None:
    os.mkfifo(place / "fifo")
    (place / "link").symlink_to("x")
    (place / "f").write_text("x")
    held = [os.open(place / "fifo", os.O_RDONLY | os.O_NONBLOCK), os.open(place / "link", os.O_PATH | os.O_NOFOLLOW)]
    held.append(os.open(place / "f", os.O_PATH))
    for name in ("fifo", "link", "f"):
        (place / name).unlink()
        fails(errno.ENOENT, os.lstat, place / name)
    assert [os.fstat(descriptor).st_nlink for descriptor in held] == [0, 0, 0]
    assert [stat.S_IFMT(os.fstat(descriptor).st_mode) for descriptor in held] == [
        stat.S_IFIFO,
        stat.S_IFLNK,
        stat.S_IFREG,
    ]
    for descriptor in held:
        os.close(descriptor)


def test_a_file_opened_for_reading_is_truncated_if_asked(place: Path) -> None:
    (place / "f").write_text("something")
    os.close(os.open(place / "f", os.O_RDONLY | os.O_TRUNC))
    assert (place / "f").read_text() == ""


@pytest.mark.parametrize("seconds", [-(1 << 33), -1, 4_294_967_296, 9_000_000_000, 10_000_000_000, 1 << 40, -(1 << 40)])
def test_times_far_away_are_kept_or_brought_into_range(place: Path, seconds: int) -> None:
    """As local filesystems do, whether the file is open for writing (then it is told later) or not."""
    with (place / "f").open("w") as file:
        os.utime(file.fileno(), ns=(seconds * 10**9 + 1, seconds * 10**9 + 1))
        os.fsync(file.fileno())
    (place / "g").touch()
    os.utime(place / "g", ns=(seconds * 10**9 + 1, seconds * 10**9 + 1))
    expected = min(max(seconds * 10**9 + 1, -(1 << 63)), (1 << 63) - 1)
    assert ((place / "f").stat().st_mtime_ns, (place / "g").stat().st_mtime_ns) == (expected, expected)


def test_what_is_not_supported_says_so(place: Path) -> None:
    (place / "f").write_text("x")
    fails(errno.EOPNOTSUPP, os.setxattr, place / "f", "system.posix_acl_else", b"\2\0\0\0")
    fails(errno.EPERM, os.link, place, place / "hard")
    fails(errno.EINVAL, os.rename, place, place / "inside")


def test_when_umount_returns_everything_is_written(cluster: RealCluster, place: Path) -> None:
    """With the helper that umount(8) calls, the mount's process is not needed any more."""
    point = cluster.root / "third"
    cluster.up(point)
    service = dfs_services.mount(cluster.layout, cluster.wanted, str(point))
    process = dfs_processes.find(service)
    assert process is not None
    for number in range(20):
        (point / place.name / f"f{number}").write_bytes(b"x" * 3_000_000)
    (point / place.name / "f0").chmod(0o600)
    module("dfsmount.umountcli", point)
    dfs_processes.send_signal(process.pid, signal.SIGKILL)
    assert not point.is_mount()
    assert [(place / f"f{number}").read_bytes() for number in range(20)] == [b"x" * 3_000_000] * 20
    assert stat.S_IMODE((place / "f0").stat().st_mode) == 0o600


def test_statfs(place: Path) -> None:
    stats = os.statvfs(place)
    assert stats.f_namemax == 255
    assert 0 < stats.f_bavail <= stats.f_blocks

"""Two mounts of one cluster: what one has closed, the other reads; what one removes while the other uses it stays."""

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mount_cluster import RealCluster, module, run, wait_until

pytestmark = pytest.mark.timeout(120)

# Attributes and names are cached for one second; a little more for a busy machine.
CACHE_SECONDS = 1.3


@pytest.fixture(scope="module")
def other_mount(cluster: RealCluster) -> Iterator[Path]:
    point = cluster.root / "other"
    cluster.up(point)
    yield point
    run("umount", point)


@pytest.fixture
def other(other_mount: Path, place: Path) -> Path:
    """The same directory through the other mount."""
    path = other_mount / place.name
    wait_until(path.is_dir, "the other mount sees the directory")
    return path


def test_written_and_closed_here_read_there(place: Path, other: Path) -> None:
    for number, size in enumerate((0, 1, 4096, 100_000, 3_000_000)):
        content = os.urandom(size)
        (place / f"file{number}").write_bytes(content)
        assert (other / f"file{number}").read_bytes() == content
        assert (other / f"file{number}").stat().st_size == size


def test_overwritten_here_read_there(place: Path, other: Path) -> None:
    (place / "file").write_bytes(b"one" * 1000)
    assert (other / "file").read_bytes() == b"one" * 1000
    (place / "file").write_bytes(b"two" * 500)
    assert (other / "file").read_bytes() == b"two" * 500
    (other / "file").write_bytes(b"three" * 2000)
    assert (place / "file").read_bytes() == b"three" * 2000


def test_many_turns(place: Path, other: Path) -> None:
    """Each turn appends through the other mount; nothing may get lost between them."""
    for turn in range(20):
        with ((place, other)[turn % 2] / "log").open("ab") as file:
            file.write(f"turn {turn}\n".encode())
    expected = "".join(f"turn {turn}\n" for turn in range(20))
    assert (place / "log").read_text() == expected
    assert (other / "log").read_text() == expected


def test_renamed_and_removed_here_gone_there(place: Path, other: Path) -> None:
    (place / "old").write_text("x")
    assert (other / "old").read_text() == "x"
    (place / "old").rename(place / "new")
    time.sleep(CACHE_SECONDS)
    assert not (other / "old").exists()
    assert (other / "new").read_text() == "x"
    (place / "new").unlink()
    time.sleep(CACHE_SECONDS)
    assert os.listdir(other) == []


def test_a_replaced_file_is_seen_whole(place: Path, other: Path) -> None:
    """The way editors and package managers write: a new file renamed over the old one."""
    (place / "config").write_text("version 0")
    newest = 0
    for version in range(1, 10):
        (place / "config.new").write_text(f"version {version}")
        (place / "config.new").rename(place / "config")
        # The name may be cached for a second, but what it leads to is whole, and never older than what was seen before.
        seen = int((other / "config").read_text().removeprefix("version "))
        assert newest <= seen <= version
        newest = seen
    time.sleep(CACHE_SECONDS)
    assert (other / "config").read_text() == "version 9"


def test_removed_here_while_open_there(cluster: RealCluster, place: Path, other: Path) -> None:
    content = os.urandom(200_000)
    (place / "file").write_bytes(content)
    with (other / "file").open("r+b", buffering=0) as file:
        assert file.read(10) == content[:10]
        (place / "file").unlink()
        assert not (place / "file").exists()
        file.seek(0)
        assert file.read() == content
        file.seek(0)
        file.write(b"still writable")
        file.seek(0)
        assert file.read(14) == b"still writable"
    cluster.check()


def test_attributes_follow_within_a_second(place: Path, other: Path) -> None:
    (place / "file").write_text("x")
    assert (other / "file").stat().st_mode & 0o777 == (place / "file").stat().st_mode & 0o777
    (place / "file").chmod(0o600)
    os.utime(place / "file", ns=(1_000_000_001, 2_000_000_002))
    time.sleep(CACHE_SECONDS)
    assert (other / "file").stat().st_mode & 0o777 == 0o600
    assert (other / "file").stat().st_mtime_ns == 2_000_000_002


def test_size_and_time_of_a_file_that_is_being_written(place: Path, other: Path) -> None:
    """Not closed, not synced: a stat from elsewhere makes the writer commit."""
    with (place / "file").open("wb", buffering=0) as file:
        file.write(b"x" * 50_000)
        wait_until(lambda: (other / "file").exists() and (other / "file").stat().st_size == 50_000, "the size", 10)


def test_two_writers_of_different_parts(place: Path, other: Path) -> None:
    (place / "file").write_bytes(bytes(2_000_000))
    errors: list[BaseException] = []

    def fill(path: Path, start: int, letter: bytes) -> None:
        try:
            with path.open("r+b", buffering=0) as file:
                for offset in range(start, start + 1_000_000, 10_000):
                    file.seek(offset)
                    file.write(letter * 10_000)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=fill, args=(place / "file", 0, b"a")),
        threading.Thread(target=fill, args=(other / "file", 1_000_000, b"b")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for path in (place, other):
        assert (path / "file").read_bytes() == b"a" * 1_000_000 + b"b" * 1_000_000


def test_exclusive_creation_has_one_winner(place: Path, other: Path) -> None:
    for number in range(10):
        wins = 0
        for path in (place, other):
            try:
                os.close(os.open(path / f"lock{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                wins += 1
            except FileExistsError:
                pass
        assert wins == 1


def test_a_subdirectory_mounted_on_its_own(cluster: RealCluster, place: Path, tmp_path: Path) -> None:
    (place / "sub").mkdir()
    (place / "sub" / "file").write_text("inside")
    point = tmp_path / "part"
    point.mkdir()
    source = f"{cluster.wanted.address}/{place.name}/sub"
    module("dfsmount.cli", source, point, "-o", f"key_file={cluster.layout.key_file},ro")
    try:
        assert os.listdir(point) == ["file"]
        assert (point / "file").read_text() == "inside"
        assert os.listdir(point / "..") == os.listdir(point.parent)
        with pytest.raises(OSError, match="Read-only"):
            (point / "new").touch()
        assert f"{source} {point} fuse.dfs ro" in Path("/proc/self/mounts").read_text()
    finally:
        run("umount", point)


def test_sigterm_unmounts_and_flushes(cluster: RealCluster, place: Path, tmp_path: Path) -> None:
    point = tmp_path / "third"
    point.mkdir()
    module("dfsmount.cli", cluster.wanted.address, point, "-o", f"key_file={cluster.layout.key_file}")
    content = os.urandom(2_000_000)
    (point / place.name / "file").write_bytes(content)
    pids = subprocess.run(
        ["pgrep", "-f", f"dfsmount.*{point}"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(pids) == 1
    os.kill(int(pids[0]), 15)
    wait_until(lambda: not os.path.ismount(point), "SIGTERM unmounts")
    wait_until(lambda: not Path(f"/proc/{pids[0]}").exists(), "the process ends")
    assert (place / "file").read_bytes() == content

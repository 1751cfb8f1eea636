"""What programs on a mount notice when processes die or disks fill up: little, and never wrong bytes."""

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from mount_cluster import RealCluster, run, wait_until

pytestmark = pytest.mark.timeout(180)

MIB = 1 << 20


class Writer(threading.Thread):
    """Writes files, each synced, one after another until told to stop; remembers what it wrote and any error."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.written: dict[Path, bytes] = {}
        self.error: OSError | None = None
        self.stopping = threading.Event()

    def run(self) -> None:
        number = 0
        try:
            while not self.stopping.is_set():
                path, content = self.folder / f"file{number}", os.urandom(150_000)
                with path.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                self.written[path] = content
                number += 1
        except OSError as error:
            self.error = error

    def wait_for(self, more: int) -> None:
        """Until so many more files are safe."""
        goal = len(self.written) + more
        wait_until(lambda: len(self.written) >= goal or self.error is not None, f"{goal} files", 90)
        assert self.error is None


@contextmanager
def writing(folder: Path) -> Iterator[Writer]:
    writer = Writer(folder)
    writer.start()
    try:
        writer.wait_for(5)
        yield writer
        writer.wait_for(5)
    finally:
        writer.stopping.set()
        writer.join(100)
    assert writer.error is None


def assert_all_there(cluster: RealCluster, writer: Writer) -> None:
    cluster.remount()
    for path, content in writer.written.items():
        assert path.read_bytes() == content, path


def test_a_chunkserver_dies_while_files_are_written(own_cluster: RealCluster) -> None:
    with writing(own_cluster.mnt) as writer:
        own_cluster.kill("chunkserver2")
        writer.wait_for(20)
    assert_all_there(own_cluster, writer)


def test_a_chunkserver_dies_within_a_big_write(own_cluster: RealCluster) -> None:
    block = os.urandom(MIB)
    with (own_cluster.mnt / "big").open("wb", buffering=0) as file:
        for number in range(96):
            assert file.write(block) == MIB
            if number == 40:
                own_cluster.kill("chunkserver1")
        os.fsync(file.fileno())
    own_cluster.remount()
    with (own_cluster.mnt / "big").open("rb", buffering=0) as file:
        for _ in range(96):
            assert file.read(MIB) == block
        assert file.read(1) == b""


def test_a_chunkserver_hangs(own_cluster: RealCluster) -> None:
    """Not dead, but silent: neither reading nor writing may wait for it for ever."""
    (own_cluster.mnt / "before").write_bytes(b"b" * 500_000)
    run("sync", own_cluster.mnt / "before")
    own_cluster.remount()
    pid = own_cluster.pid("chunkserver3")
    os.kill(pid, signal.SIGSTOP)
    try:
        assert (own_cluster.mnt / "before").read_bytes() == b"b" * 500_000
        (own_cluster.mnt / "beside").write_bytes(b"w" * 500_000)
        run("sync", own_cluster.mnt / "beside")
    finally:
        os.kill(pid, signal.SIGCONT)
    own_cluster.remount()
    assert (own_cluster.mnt / "beside").read_bytes() == b"w" * 500_000


def test_the_metaserver_dies_while_files_are_written(own_cluster: RealCluster) -> None:
    with writing(own_cluster.mnt) as writer:
        for _ in range(2):
            own_cluster.kill("metaserver")
            own_cluster.up()
            writer.wait_for(5)
    assert_all_there(own_cluster, writer)


def test_the_mount_dies(own_cluster: RealCluster) -> None:
    """What was synced is there; what was not is there as a prefix, or not at all."""
    synced, loose = os.urandom(300_000), os.urandom(3 * MIB)
    with (own_cluster.mnt / "synced").open("wb") as file:
        file.write(synced)
        file.flush()
        os.fsync(file.fileno())
    descriptor = os.open(own_cluster.mnt / "loose", os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, loose)
    own_cluster.kill("mount")
    own_cluster.unmount_lazily()
    with suppress(OSError):
        os.close(descriptor)
    own_cluster.up()
    assert (own_cluster.mnt / "synced").read_bytes() == synced
    if (own_cluster.mnt / "loose").exists():
        found = (own_cluster.mnt / "loose").read_bytes()
        assert found == loose[: len(found)]


def test_a_frozen_metaserver_holds_nobody_for_ever(own_cluster: RealCluster) -> None:
    """Operations wait for it, and end when the process is killed, or when it goes on."""
    pid = own_cluster.pid("metaserver")
    os.kill(pid, signal.SIGSTOP)
    try:
        child = os.fork()
        if child == 0:
            try:
                (own_cluster.mnt / "while frozen").touch()
            finally:
                os._exit(0)
        os.kill(child, signal.SIGKILL)
        # The kernel lets the process go when the mount gives up, 30 seconds by default, or earlier.
        wait_until(lambda: os.waitpid(child, os.WNOHANG)[0] == child, "the killed process is gone", 60)
    finally:
        os.kill(pid, signal.SIGCONT)
    (own_cluster.mnt / "after").write_bytes(b"x")
    assert (own_cluster.mnt / "after").read_bytes() == b"x"


# -- full disks ----------------------------------------------------------------------------------------------------

DISK_MIB = 220


@pytest.fixture
def small_cluster(tmp_path: Path) -> Iterator[RealCluster]:
    """Each chunkserver on a disk of its own that is soon full."""
    cluster = RealCluster(tmp_path)
    disks = [cluster.layout.server_data(f"chunkserver{number}") for number in (1, 2, 3)]
    try:
        for disk in disks:
            disk.mkdir(parents=True)
            run("mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m,mode=700", "none", disk)
        # Without it, a directory that holds something is not taken for a cluster's.
        cluster.layout.write_cluster(cluster.wanted)
        cluster.up()
        yield cluster
        cluster.check()
    finally:
        if cluster.layout.run.exists():
            cluster.kill_everything()
        for disk in disks:
            run("umount", "--lazy", disk, check=False)
        cluster.destroy()


def fill(folder: Path, block: bytes) -> tuple[dict[Path, int], int]:
    """Writes and syncs files of 8 MiB until it fails; what is safe, and the error number."""
    safe: dict[Path, int] = {}
    for number in range(1000):
        path = folder / f"fill{number}"
        try:
            with path.open("wb", buffering=0) as file:
                for _ in range(8):
                    file.write(block)
                os.fsync(file.fileno())
        except OSError as error:
            return safe, error.errno or 0
        safe[path] = 8
    raise AssertionError("it never got full")


def test_a_full_cluster_says_so_and_loses_nothing(small_cluster: RealCluster) -> None:
    block = os.urandom(MIB)
    folder = small_cluster.mnt / "full"
    folder.mkdir()
    safe, number = fill(folder, block)
    assert number == errno.ENOSPC
    assert len(safe) >= 4
    attempts: list[Callable[[], object]] = [
        lambda: (folder / "new directory").mkdir(),
        lambda: (folder / "empty").touch(),
        lambda: next(iter(safe)).rename(folder / "renamed"),
        lambda: (folder / "renamed").rename(next(iter(safe))),
    ]
    for attempt in attempts:
        attempt()
    small_cluster.remount()
    for path, count in safe.items():
        assert path.read_bytes() == block * count
    for path in safe:
        path.unlink()
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith("fill")) == [
        "empty",
        "new directory",
    ]

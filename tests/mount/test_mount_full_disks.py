"""Promise P6 on real mounts: disks that are full, of our data or of others', are an ordinary day."""

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from mount_cluster import RealCluster, run, wait_until

pytestmark = pytest.mark.timeout(240)

MIB = 1 << 20
NAMES = ("chunkserver1", "chunkserver2", "chunkserver3")
# What a program may wait until it is told (promise P6).
TOLD_SECONDS = 5.0


class SmallDisks:
    """A cluster whose servers have small file systems of their own: ext4 in image files, as real disks are."""

    def __init__(self, root: Path) -> None:
        self.cluster = RealCluster(root)
        self.images = root / "images"
        self.mounted: list[Path] = []

    def disk(self, name: str) -> Path:
        return self.cluster.layout.server_data(name)

    def make(self, name: str, mebibytes: int) -> None:
        self.images.mkdir(parents=True, exist_ok=True)
        image, disk = self.images / name, self.disk(name)
        disk.mkdir(parents=True)
        with image.open("wb") as file:
            file.truncate(mebibytes * MIB)
        run("mkfs.ext4", "-q", "-F", "-m", "0", "-E", "root_owner=0:0", image)
        run("mount", "-o", "loop", image, disk)
        self.mounted.append(disk)
        (disk / "lost+found").rmdir()
        disk.chmod(0o700)

    def stuff(self, name: str) -> Path:
        """Somebody else fills the disk to the last byte."""
        path = self.disk(name) / "foreign"
        with path.open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(MIB))
        with path.open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(512))
        return path

    def up(self) -> None:
        self.cluster.layout.write_cluster(self.cluster.wanted)
        self.cluster.up()

    def destroy(self) -> None:
        if self.cluster.layout.run.exists():
            self.cluster.kill_everything()
        for disk in self.mounted:
            run("umount", "--lazy", disk, check=False)
        self.cluster.destroy()


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[SmallDisks]:
    made = SmallDisks(tmp_path)
    try:
        yield made
        made.cluster.check()
    finally:
        made.destroy()


def put(path: Path, content: bytes) -> None:
    """Writes a file and syncs it; returns only if it is safe."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view[:MIB]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_until_full(folder: Path, size: int) -> dict[Path, bytes]:
    """Files until one fails, which must be for lack of space and in time; those that are safe."""
    safe: dict[Path, bytes] = {}
    for number in range(100_000):
        path, content = folder / f"{number:05}", os.urandom(1024) * (size // 1024)
        started = time.monotonic()
        try:
            put(path, content)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            # A write may wait, and then the fsync; neither longer than that.
            assert time.monotonic() - started < 2 * TOLD_SECONDS
            assert path.read_bytes() == content[: path.stat().st_size]
            return safe
        safe[path] = content
    raise AssertionError("it never got full")


def assert_kept(safe: dict[Path, bytes]) -> None:
    for path, content in safe.items():
        assert path.read_bytes() == content, path


def soon(path: Path, content: bytes, seconds: float = 20.0) -> None:
    """Writing succeeds again, without anybody restarting anything."""

    def works() -> bool:
        try:
            put(path, content)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            return False
        return True

    wait_until(works, "there is space again", seconds)


def test_all_chunkservers_are_full_and_rm_makes_space(disks: SmallDisks) -> None:
    for name in NAMES:
        disks.make(name, 160)
    disks.up()
    mnt = disks.cluster.mnt
    wait_until(lambda: disks.cluster.status().chunks.open == 0, "nothing is reserved for the probe's chunk any more")
    promised = os.statvfs(mnt).f_bavail * os.statvfs(mnt).f_frsize
    (mnt / "d").mkdir()
    safe = put_until_full(mnt / "d", 4 * MIB)
    # What df says can really be written, nearly all of it, and hardly more.
    assert 0.75 * promised < len(safe) * 4 * MIB <= 1.02 * promised
    assert "full" in disks.cluster.dfs("status", "--data", disks.cluster.data, check=False).stdout
    # Overwriting needs space as well; what was there stays.
    victim = next(iter(safe))
    with pytest.raises(OSError, match="space") as caught, victim.open("r+b", buffering=0) as file:
        for _ in range(100):
            file.write(b"x" * MIB)
        os.fsync(file.fileno())
    assert caught.value.errno == errno.ENOSPC
    del safe[victim]
    # Names take no space there.
    victim.rename(mnt / "d" / "renamed")
    os.truncate(mnt / "d" / "renamed", 1000)
    os.setxattr(mnt / "d" / "renamed", "user.a", b"b")
    disks.cluster.remount()
    assert_kept(safe)
    for path in list(safe)[: len(safe) // 2]:
        path.unlink()
        del safe[path]
    (mnt / "d" / "renamed").unlink()
    soon(mnt / "again", os.urandom(MIB) * 8)
    assert_kept(safe)


def test_one_of_three_is_full_of_other_data(disks: SmallDisks) -> None:
    disks.make("chunkserver1", 160)
    disks.make("chunkserver2", 300)
    disks.make("chunkserver3", 300)
    disks.up()
    mnt = disks.cluster.mnt
    safe = {mnt / f"before{number}": os.urandom(MIB) * 2 for number in range(8)}
    for path, content in safe.items():
        put(path, content)
    foreign = disks.stuff("chunkserver1")
    for number in range(20):
        path = mnt / f"while{number}"
        safe[path] = os.urandom(MIB) * 2
        put(path, safe[path])
    disks.cluster.remount()
    assert_kept(safe)
    status = disks.cluster.status()
    assert sorted(server.disk_state for server in status.servers) == ["FULL", "OK", "OK"]
    assert all(server.state == "UP" for server in status.servers)
    foreign.unlink()
    wait_until(lambda: all(server.disk_state == "OK" for server in disks.cluster.status().servers), "it has space")


def test_all_are_full_of_other_data_while_a_file_is_written(disks: SmallDisks) -> None:
    for name in NAMES:
        disks.make(name, 200)
    disks.up()
    mnt = disks.cluster.mnt
    kept = os.urandom(MIB) * 4
    put(mnt / "kept", kept)
    descriptor = os.open(mnt / "growing", os.O_WRONLY | os.O_CREAT)
    written = synced = 0
    block = os.urandom(64 << 10)
    foreign: list[Path] = []
    number = None
    try:
        for count in range(1500):
            written += os.write(descriptor, block)
            if count == 100:
                foreign = [disks.stuff(name) for name in NAMES]
            if count % 20 == 0:
                os.fsync(descriptor)
                synced = written
    except OSError as error:
        number = error.errno
    assert number == errno.ENOSPC
    # Told once, and then the descriptor is as good as any.
    os.fsync(descriptor)
    os.close(descriptor)
    content = (mnt / "growing").read_bytes()
    assert len(content) >= synced
    assert content == (block * 1500)[: len(content)]
    # Nothing is left on the servers' disks to write an identity with, and yet deletions are carried out.
    (mnt / "growing").unlink()
    for path in foreign:
        path.unlink()
    soon(mnt / "again", kept)
    disks.cluster.kill("chunkserver1")
    disks.cluster.remount()
    assert (mnt / "kept").read_bytes() == kept


def test_the_metaserver_is_full(disks: SmallDisks) -> None:
    disks.make("metaserver", 200)
    disks.up()
    mnt = disks.cluster.mnt
    folder = mnt / "d"
    folder.mkdir()
    for number in range(3000):
        (folder / f"{number}").touch()
    open_file = (folder / "written before").open("wb", buffering=0)
    open_file.write(b"accepted before the disk was full")
    foreign = disks.stuff("metaserver")

    def refused() -> bool:
        try:
            (folder / f"new {time.monotonic()}").touch()
        except OSError as error:
            assert error.errno == errno.ENOSPC
            return True
        disks.stuff("metaserver")
        return False

    wait_until(refused, "it says that it is full")
    os.fsync(open_file.fileno())
    open_file.close()
    assert (folder / "written before").read_bytes() == b"accepted before the disk was full"
    assert len(os.listdir(folder)) > 3000
    # kill -9 and a start on a disk without a free byte, twice, and deletions in between.
    for start in (0, 1000):
        for number in range(start, start + 1000):
            (folder / f"{number}").unlink()
        disks.cluster.kill("metaserver")
        disks.stuff("metaserver")
        disks.cluster.up()
        assert not (folder / f"{start}").exists()
        assert (folder / "2500").exists()
    subprocess.run(["rm", "-r", folder], check=True)
    foreign.unlink()
    soon(mnt / "again", b"space")

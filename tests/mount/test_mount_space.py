"""Space comes back: what was overwritten or deleted is freed, while everything that is left stays readable."""

import mmap
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from churn import Churn, disk_bytes
from mount_cluster import ROOT, RealCluster, module, run, wait_until

from dfsmount import dfs_processes, dfs_services
from dfsmount.dfs_layout import HOST

pytestmark = pytest.mark.timeout(240)

KIB, MIB = 1 << 10, 1 << 20
# In a process of its own, whose child it does not stay.
START = """
import sys
from pathlib import Path
from dfsmount import dfs_processes, dfs_services
from dfsmount.dfs_layout import Layout
layout, name = Layout(Path(sys.argv[1])), sys.argv[2]
number = name.removeprefix("chunkserver")
service = dfs_services.chunkserver(layout, int(number)) if number.isdigit() else dfs_services.metaserver(layout)
dfs_processes.start(service)
"""


@pytest.fixture
def hasty_cluster(tmp_path: Path) -> Iterator[RealCluster]:
    """A cluster that deletes at once what nothing refers to any more."""
    cluster = RealCluster(tmp_path)
    try:
        cluster.layout.prepare()
        cluster.wanted.trash_seconds = 0
        cluster.layout.write_cluster(cluster.wanted)
        dfs_services.write_configs(cluster.layout, cluster.wanted)
        with cluster.layout.config("metaserver").open("a") as config:
            config.write("delete_grace_seconds = 0\n")
        start(cluster, "metaserver")
        # It has read its configuration, which `dfs up` writes anew.
        wait_until(lambda: not dfs_processes.is_free(HOST, cluster.wanted.http_port), "the metaserver serves")
        cluster.up()
        # For its restarts.
        with cluster.layout.config("metaserver").open("a") as config:
            config.write("delete_grace_seconds = 0\n")
        yield cluster
        cluster.check()
    finally:
        cluster.destroy()


def start(cluster: RealCluster, name: str) -> None:
    """Starts a server with the configuration that is there."""
    run(sys.executable, "-c", START, cluster.data, name, env={**os.environ, "PYTHONPATH": str(ROOT)})


def taken(cluster: RealCluster) -> int:
    """Bytes of all chunk files."""
    return disk_bytes([cluster.layout.server_data(f"chunkserver{number}") for number in (1, 2, 3)])


def chunks_of(cluster: RealCluster, path: Path) -> set[str]:
    return {extent.chunk for extent in cluster.file(path).extents}


def seal_everything(cluster: RealCluster) -> None:
    """A mount that ends seals what it was writing to; otherwise that takes a minute."""
    cluster.remount()


def test_random_overwriting_and_deleting_settles(hasty_cluster: RealCluster) -> None:
    folder = hasty_cluster.mnt / "work"
    folder.mkdir()
    churn = Churn(folder, 7)
    for _ in range(250):
        churn.step()
    seal_everything(hasty_cluster)
    assert churn.written > 3 * churn.live
    assert churn.wrong() == []
    wait_until(lambda: taken(hasty_cluster) < 2 * 2 * churn.live, "space has come back", 90)
    status = hasty_cluster.status()
    assert status.cleaner.freed_chunks
    assert status.cleaner.moved_bytes
    hasty_cluster.remount()
    assert churn.wrong() == []
    hasty_cluster.check("--deep")
    for path in folder.iterdir():
        path.unlink()
    wait_until(lambda: taken(hasty_cluster) < 2 * MIB, "nothing is left", 60)


class Reader(threading.Thread):
    """Reads a file at random through one descriptor, past the kernel's cache, until told to stop; and compares."""

    def __init__(self, path: Path, content: bytes) -> None:
        super().__init__()
        self.path, self.content = path, content
        self.stopping = threading.Event()
        self.reads = 0
        self.wrong: list[str] = []

    def run(self) -> None:
        chance = random.Random(1)
        with self.path.open("rb", buffering=0) as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            while not self.stopping.is_set() and not self.wrong:
                at = chance.randrange(len(self.content) // 4096) * 4096
                length = chance.choice([1, 5000, 64 * KIB, 700 * KIB])
                expected = self.content[at : at + length]
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                try:
                    found = mapped[at : at + length] if self.reads % 4 == 0 else os.pread(file.fileno(), length, at)
                except OSError as error:
                    self.wrong.append(str(error))
                    break
                if found != expected:
                    self.wrong.append(f"{length} bytes at {at} are others")
                self.reads += 1


def test_files_stay_readable_while_their_chunks_are_cleaned(hasty_cluster: RealCluster) -> None:
    """Through handles and maps from before, of which some are longer than one page, and from which chunks vanish."""
    keeps, dies = hasty_cluster.mnt / "keeps", hasty_cluster.mnt / "dies"
    content = bytearray(16 * MIB)
    chance = random.Random(3)
    with keeps.open("wb", buffering=0) as kept, dies.open("wb", buffering=0) as dead:
        # In a random order, so that neighbours in the file are not neighbours in a chunk: far over 1,000 extents.
        places = list(range(0, len(content), 8 * KIB))
        chance.shuffle(places)
        for number, at in enumerate(places):
            content[at : at + 8 * KIB] = chance.randbytes(8 * KIB)
            os.pwrite(kept.fileno(), content[at : at + 8 * KIB], at)
            os.pwrite(dead.fileno(), bytes(16 * KIB), number * 16 * KIB)
            if number % 50 == 49:
                os.fsync(kept.fileno())
                os.fsync(dead.fileno())
    seal_everything(hasty_cluster)
    before = chunks_of(hasty_cluster, keeps)
    shattered = len(hasty_cluster.file(keeps).extents)
    assert shattered > 1500
    # A mount with little cache of its own: mostly it has to ask the chunkservers.
    point = hasty_cluster.root / "reader"
    point.mkdir()
    options = f"key_file={hasty_cluster.layout.key_file},cache_mib=8,allow_other"
    module("dfsmount.cli", hasty_cluster.wanted.address, point, "-o", options)
    reader = Reader(point / "keeps", bytes(content))
    try:
        reader.start()
        wait_until(lambda: reader.reads > 50 or bool(reader.wrong), "the reader has the map")
        dies.unlink()

        def done() -> bool:
            return bool(reader.wrong) or not before & chunks_of(hasty_cluster, keeps)

        wait_until(done, "all chunks are cleaned", 90)
        wait_until(lambda: taken(hasty_cluster) < 2 * 2 * len(content), "the old ones are gone", 30)
        reads = reader.reads
        wait_until(lambda: reader.reads > reads + 50 or bool(reader.wrong), "reading goes on")
    finally:
        reader.stopping.set()
        reader.join(60)
        run("umount", point)
    assert reader.wrong == []
    # What lay scattered was put in order by the way.
    assert len(hasty_cluster.file(keeps).extents) < shattered // 10
    hasty_cluster.remount()
    assert keeps.read_bytes() == content
    hasty_cluster.check("--deep")


# -- for long ------------------------------------------------------------------------------------------------------


class Killer(threading.Thread):
    """Kills a random server every few seconds, and starts it again, until told to stop."""

    def __init__(self, cluster: RealCluster) -> None:
        super().__init__()
        self.cluster = cluster
        self.stopping = threading.Event()
        self.kills = 0
        self.error: Exception | None = None

    def run(self) -> None:
        chance = random.Random(5)
        try:
            while not self.stopping.wait(chance.uniform(2, 6)):
                name = chance.choice(["metaserver", "chunkserver1", "chunkserver2", "chunkserver3"])
                self.cluster.kill(name)
                self.kills += 1
                self.stopping.wait(chance.choice([0, 0.3, 1.5]))
                start(self.cluster, name)
        except Exception as error:
            self.error = error


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_ten_minutes_of_churn_with_kills(hasty_cluster: RealCluster) -> None:
    folder = hasty_cluster.mnt / "work"
    folder.mkdir()
    churn, killer, end = Churn(folder, 77), Killer(hasty_cluster), time.monotonic() + 600
    killer.start()
    try:
        while time.monotonic() < end:
            churn.step()
            assert churn.wrong([min(churn.contents)]) == []
    finally:
        killer.stopping.set()
        killer.join(60)
    assert killer.error is None
    assert killer.kills > 60
    seal_everything(hasty_cluster)
    wait_until(lambda: taken(hasty_cluster) < 2 * 2 * churn.live, "space has come back", 120)
    hasty_cluster.remount()
    assert churn.wrong() == []
    hasty_cluster.check("--deep")

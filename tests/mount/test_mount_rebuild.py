"""The metaserver's disk is gone, and there is no backup: contents come back from the chunkservers alone."""

import hashlib
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
from mount_cluster import ROOT, RealCluster, module, run, wait_until

from chunkserver.chunkfile import PAYLOAD_OFFSET, chunk_path
from dfsmount import dfs_processes

MIB = 1 << 20


def save(path: Path, data: bytes, offset: int = 0) -> None:
    """Written and synced."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.pwrite(descriptor, data, offset)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def pattern(length: int) -> bytes:
    """Of which every prefix can be told."""
    return b"".join(number.to_bytes(8, "big") for number in range(length // 8))


class Appender(threading.Thread):
    """Appends and never syncs, until the mount dies."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.count = 0
        self.inode = 0

    def run(self) -> None:
        data = pattern(64 * MIB)
        try:
            with self.path.open("ab", buffering=0) as file:
                self.inode = os.fstat(file.fileno()).st_ino
                while self.count < len(data):
                    self.count += file.write(data[self.count : self.count + 32768]) or 0
                    time.sleep(0.002)
        except OSError:
            pass


def write_tree(root: Path) -> dict[int, str]:
    """Everything is synced; inode to what it contains."""
    (root / "deep" / "er").mkdir(parents=True)
    for number in range(200):
        save(root / "deep" / f"small{number}", os.urandom(100 + 37 * number))
    save(root / "large", os.urandom(70 * MIB))
    save(root / "overwritten", os.urandom(3 * MIB))
    for number in range(30):
        save(root / "overwritten", os.urandom(10_000), offset=number * 97_003)
    save(root / "deep" / "er" / "sparse", b"end", offset=5 * MIB)
    save(root / "renamed", b"before")
    os.rename(root / "renamed", root / "deep" / "after")
    files = [path for path in root.rglob("*") if path.is_file()]
    return {path.stat().st_ino: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def where(cluster: RealCluster, path: Path) -> tuple[int, list[str]]:
    """The first chunk of a file, and the servers that have it."""
    names = {server.server: server.name for server in cluster.status().servers}
    extent = cluster.file(path).extents[0]
    return int(extent.chunk, 16), [names[replica.server] for replica in extent.replicas]


def start_chunkserver(cluster: RealCluster, number: int) -> None:
    """As `dfs up` does; by a process that ends at once, so that nobody waits for the chunkserver."""
    code = (
        "import sys; from pathlib import Path; from dfsmount import dfs_processes, dfs_services, dfs_layout\n"
        "layout = dfs_layout.Layout(Path(sys.argv[1]))\n"
        "dfs_processes.start(dfs_services.chunkserver(layout, int(sys.argv[2])))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    run(sys.executable, "-c", code, cluster.data, str(number), env=environment)


def is_healthy(cluster: RealCluster) -> bool:
    said = cluster.dfs("status", "--data", cluster.data, "--json").stdout
    healthy: bool = json.loads(said)["healthy"]
    return healthy


@pytest.mark.timeout(240)
def test_a_lost_metaserver_is_rebuilt(own_cluster: RealCluster) -> None:
    """With one of three chunkservers not there, one replica damaged, and a mount that was writing when all died."""
    cluster = own_cluster
    expected = write_tree(cluster.mnt)
    damaged, asked = where(cluster, cluster.mnt / "large")
    appender = Appender(cluster.mnt / "appended")
    appender.start()
    wait_until(lambda: appender.count > 8 * MIB, "some data is appended")
    cluster.kill_everything()
    appender.join()
    metaserver = cluster.layout.server_data("metaserver")
    shutil.rmtree(metaserver)
    with (cluster.layout.server_data(asked[0]) / chunk_path(damaged)).open("r+b") as file:
        file.seek(PAYLOAD_OFFSET + 10)
        file.write(b"damage")
    numbers = [int(name.removeprefix("chunkserver")) for name in asked]
    for number in numbers:
        start_chunkserver(cluster, number)
    addresses = [f"127.0.0.1:{cluster.wanted.chunkserver_port(number)}" for number in numbers]
    wait_until(
        lambda: not any(dfs_processes.is_free("127.0.0.1", int(address.rpartition(":")[2])) for address in addresses),
        "the chunkservers listen",
    )
    words = ["rebuild", "--config", cluster.layout.config("metaserver")]
    for address in addresses:
        words += ["--chunkserver", address]
    would = module("metaserver", *words, "--dry-run").stdout
    said = module("metaserver", *words).stdout
    assert would.splitlines()[1].replace("would recover", "recovered") == said.splitlines()[1]
    assert "LOST" not in said
    cluster.up()
    recovered = cluster.mnt / "recovered"
    found = {int(path.name): hashlib.sha256(path.read_bytes()).hexdigest() for path in recovered.iterdir()}
    ours = found.pop(appender.inode)
    # What was deleted may come back, nothing else: `dfs up` tries a file out on the mount.
    assert expected.items() <= found.items()
    assert len(found) <= len(expected) + 2
    appended = (recovered / str(appender.inode)).read_bytes()
    assert len(appended) >= 4 * MIB
    assert appended == pattern(len(appended)), ours
    assert (recovered / str(appender.inode)).stat().st_mode & 0o7777 == 0o600
    save(cluster.mnt / "new", b"life goes on")
    wait_until(lambda: is_healthy(cluster), "all is well again", 120)

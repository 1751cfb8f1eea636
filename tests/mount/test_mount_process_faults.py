"""Disk faults under real processes (``tests/crash/process_faults.py``): a sample, and (soak) the whole matrix."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import process_faults
import pytest
from faulty_cluster import FaultyCluster
from mount_cluster import RealCluster, run, wait_until
from process_faults import RUNNING, Cell, Matrix, put

# One of each of the two ways of a metaserver; together well under a minute.
SAMPLE = [Cell("LMDB file", "ENOSPC", RUNNING), Cell("changelog", "EIO on fsync", RUNNING)]
# More than the 256 directories of chunks, less than a load wants.
INODES = 320


@pytest.mark.timeout(240)
def test_a_sample_of_the_matrix(tmp_path: Path) -> None:
    """With a map that is full again and again."""
    matrix = Matrix(tmp_path, hold_seconds=2.0, options={"map_bytes": str(1 << 16)})
    assert matrix.run(SAMPLE) == []
    assert [str(matrix.outcomes[cell]) for cell in SAMPLE] == ["ENOSPC", "restarted"]
    assert all(outcome.hits for outcome in matrix.outcomes.values())


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_the_whole_matrix(tmp_path: Path) -> None:
    matrix = Matrix(tmp_path)
    assert matrix.run(list(process_faults.cells())) == []


@contextmanager
def few_inodes(cluster: RealCluster, name: str) -> Iterator[None]:
    """A server's directory on a file system that can have few files."""
    place = cluster.layout.server_data(name)
    place.mkdir(parents=True)
    run("mount", "-t", "tmpfs", "-o", f"size=500m,nr_inodes={INODES},mode=700", "none", place)
    try:
        yield
    finally:
        if cluster.layout.run.exists():
            cluster.kill_everything()
        run("umount", "--lazy", place, check=False)
        cluster.destroy()


def use_up_inodes(place: Path) -> list[Path]:
    made: list[Path] = []
    try:
        while True:
            made.append(place / f"foreign{len(made)}")
            made[-1].touch()
    except OSError as error:
        assert error.errno == errno.ENOSPC
        return made[:-1]


@pytest.mark.soak
@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", ["metaserver", "chunkserver1"])
def test_a_server_has_no_inodes_left(tmp_path: Path, name: str) -> None:
    cluster = RealCluster(tmp_path)
    with few_inodes(cluster, name):
        cluster.layout.write_cluster(cluster.wanted)
        cluster.up()
        put(cluster.mnt / "before", b"before")
        foreign = use_up_inodes(cluster.layout.server_data(name))
        pid = cluster.pid(name)
        written = []
        for number in range(40):
            path = cluster.mnt / f"while{number}"
            try:
                put(path, os.urandom(100_000))
            except OSError as error:
                assert error.errno == errno.ENOSPC
            else:
                written.append(path)
        (cluster.mnt / "before").unlink()
        for path in foreign:
            path.unlink()

        def works() -> bool:
            try:
                put(cluster.mnt / "after", b"after")
            except OSError as error:
                assert error.errno == errno.ENOSPC
                return False
            return True

        wait_until(works, "there is space again", 20)
        assert cluster.pid(name) == pid, "without a restart"
        cluster.remount()
        assert all(path.stat().st_size == 100_000 and len(path.read_bytes()) == 100_000 for path in written)
        assert (cluster.mnt / "after").read_bytes() == b"after"
        cluster.check()


@pytest.mark.soak
@pytest.mark.timeout(180)
def test_a_tiny_map_grows_under_a_real_metaserver(tmp_path: Path) -> None:
    cluster = FaultyCluster(tmp_path, options={"map_bytes": str(1 << 16)})
    try:
        cluster.begin()
        for number in range(3000):
            (cluster.real.mnt / f"name {number}").touch()
        descriptor = os.open(cluster.real.mnt, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        wait_until(lambda: "store grown" in cluster.real.layout.log("metaserver").read_text(), "the store has grown")
        cluster.kill("metaserver")
        cluster.start("metaserver")
        cluster.wait_ready()
        with cluster.cold_mount() as point:
            assert len(list(point.iterdir())) == 3000
        assert cluster.ended == []
    finally:
        cluster.destroy()

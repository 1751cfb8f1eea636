"""Rot on a real cluster: damaged replicas are found by scrubbing or reading, and repaired; programs notice nothing."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from mount_cluster import RealCluster, run, running, wait_until

from chunkserver.chunkfile import ENTRY_BYTES, FLAG_SEALED, HEADER_BYTES, INDEX_OFFSET, PAYLOAD_OFFSET, decode_header
from metaserver.protocol import ReplicaStatus

pytestmark = pytest.mark.timeout(240)

SIZE = 5_000_000
# What the issue demands.
REPAIR_SECONDS = 30.0

Damage = Callable[[Path], None]


def overwrite(*places: int, length: int = 4096) -> Damage:
    def damage(path: Path) -> None:
        with path.open("r+b") as file:
            for place in places:
                file.seek(place)
                file.write(os.urandom(length))

    return damage


DAMAGES: dict[str, Damage] = {
    "payload": overwrite(PAYLOAD_OFFSET + 1_000_000),
    "index": overwrite(INDEX_OFFSET + 20 * ENTRY_BYTES, length=ENTRY_BYTES),
    "header": overwrite(0, length=200),
    "short": lambda path: os.truncate(path, PAYLOAD_OFFSET + SIZE // 2),
    "gone": os.unlink,
}


def some(*kinds: str, soak: Sequence[str]) -> list[object]:
    """Parameters of which some are for long runs only."""
    return [*kinds, *(pytest.param(kind, marks=pytest.mark.soak) for kind in soak)]


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.soak)])
def rotting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCluster]:
    """Two copies; with two servers a damaged replica can only be replaced where it is."""
    with running(tmp_path_factory.mktemp("rot"), servers=request.param) as made:
        yield made


def written(cluster: RealCluster, name: str) -> tuple[Path, bytes]:
    """A file in a sealed chunk of its own, in no cache."""
    path, content = cluster.mnt / name, os.urandom(SIZE)
    path.write_bytes(content)
    cluster.remount()
    wait_until(lambda: replicas(cluster, path, "GOOD") == 2, "both replicas are good")
    wait_until(lambda: all(sealed(replica.path) for replica in replica_status(cluster, path)), "both are sealed")
    return path, content


def sealed(replica: str) -> bool:
    """Whether the chunkserver has sealed it, too: the scrubber looks at nothing else."""
    with open(replica, "rb") as file:
        return bool(decode_header(file.read(HEADER_BYTES)).flags & FLAG_SEALED)


def replica_status(cluster: RealCluster, path: Path) -> list[ReplicaStatus]:
    (extent,) = cluster.file(path).extents
    return extent.replicas


def replicas(cluster: RealCluster, path: Path, state: str) -> int:
    return sum(replica.state == state for replica in replica_status(cluster, path))


class Victim:
    """A replica's file that is damaged; :attr:`replaced` once it is another, or gone."""

    def __init__(self, path: Path, damage: Damage) -> None:
        self.path = path
        self.inode = path.stat().st_ino
        damage(path)

    @property
    def replaced(self) -> bool:
        return not self.path.exists() or self.path.stat().st_ino != self.inode


def await_repair(cluster: RealCluster, path: Path, content: bytes, since: float, victims: list[Victim]) -> float:
    """Seconds until all replicas are good again, and right: each is read back from its disk."""

    def repaired() -> bool:
        found = replica_status(cluster, path)
        whole = len(found) == 2 and all(replica.state == "GOOD" for replica in found)
        return whole and all(victim.replaced for victim in victims)

    wait_until(repaired, "the replica is repaired", REPAIR_SECONDS)
    seconds = time.monotonic() - since
    cluster.check("--deep")
    for _, versions in cluster.contents_by_replica([path]):
        assert versions == [content, content]
    print(f"repaired after {seconds:.1f} s")
    return seconds


# A reading mount cannot notice a header, which is not needed for reading.
@pytest.mark.parametrize("kind", some("payload", soak=["index", "short", "gone"]))
def test_damage_met_by_a_read_is_repaired(rotting: RealCluster, kind: str) -> None:
    path, content = written(rotting, f"read-{kind}")
    # The first in order is asked first.
    victim = Victim(Path(replica_status(rotting, path)[0].path), DAMAGES[kind])
    began = time.monotonic()
    assert path.read_bytes() == content
    await_repair(rotting, path, content, began, [victim])


@pytest.mark.parametrize("kind", some("header", soak=["payload", "index", "short", "gone"]))
def test_damage_found_by_scrubbing_is_repaired(rotting: RealCluster, kind: str) -> None:
    path, content = written(rotting, f"scrub-{kind}")
    replica = replica_status(rotting, path)[0]
    victim = Victim(Path(replica.path), DAMAGES[kind])
    began = time.monotonic()
    done = rotting.dfs("scrub", "--data", rotting.data, check=False)
    assert done.returncode == 1, done.stdout
    assert f"on {replica.name}: " in done.stdout
    assert path.read_bytes() == content
    await_repair(rotting, path, content, began, [victim])
    rotting.dfs("scrub", "--data", rotting.data)


@pytest.mark.parametrize("kind", some("payload", soak=["index"]))
def test_replicas_damaged_in_different_places_become_whole(rotting: RealCluster, kind: str) -> None:
    path, content = written(rotting, f"both-{kind}")
    if kind == "payload":
        # Within one request of the mount, and far away from each other.
        one = overwrite(PAYLOAD_OFFSET + 200_000, PAYLOAD_OFFSET + 3_000_000)
        other = overwrite(PAYLOAD_OFFSET + 400_000, PAYLOAD_OFFSET + 4_000_000)
    else:
        one = overwrite(INDEX_OFFSET + 5 * ENTRY_BYTES, length=ENTRY_BYTES)
        other = overwrite(INDEX_OFFSET + 50 * ENTRY_BYTES, length=ENTRY_BYTES)
    found = [Path(replica.path) for replica in replica_status(rotting, path)]
    victims = [Victim(file, damage) for file, damage in zip(found, (one, other), strict=True)]
    began = time.monotonic()
    if kind == "payload":
        assert path.read_bytes() == content
    else:
        rotting.dfs("scrub", "--data", rotting.data, check=False)
    await_repair(rotting, path, content, began, victims)
    rotting.remount()
    assert path.read_bytes() == content


def test_a_chunk_that_is_being_written_is_ended_and_repaired(rotting: RealCluster) -> None:
    """Its writer notices nothing and goes on elsewhere; waiting for it to end the chunk by itself would take long."""
    path, content = rotting.mnt / "written", bytearray(os.urandom(300_000))
    other = rotting.root / "other"
    rotting.up(other)
    with path.open("wb", buffering=0) as file:
        file.write(content)
        os.fsync(file.fileno())
        (extent,) = rotting.file(path).extents
        assert extent.chunk_state == "OPEN"
        victim = Victim(Path(extent.replicas[0].path), overwrite(PAYLOAD_OFFSET + extent.chunk_offset + 150_000))
        began = time.monotonic()
        assert (other / "written").read_bytes() == content
        while not victim.replaced:
            assert time.monotonic() < began + REPAIR_SECONDS
            more = os.urandom(1000)
            assert file.write(more) == 1000
            os.fsync(file.fileno())
            content += more
            time.sleep(0.2)
    print(f"replaced after {time.monotonic() - began:.1f} s")
    assert (other / "written").read_bytes() == content
    run("umount", other)
    rotting.remount()
    assert path.read_bytes() == content
    wait_until(lambda: all(r.state == "GOOD" for e in rotting.file(path).extents for r in e.replicas), "all is good")
    rotting.check("--deep")

"""Random processes are killed under a verifying load (``tests/crash``): nothing acknowledged may be lost."""

from pathlib import Path

import pytest
from kill_loop import kill_and_verify
from mount_cluster import RealCluster


def kills(root: Path, seconds: float, seed: int) -> list[str]:
    cluster = RealCluster(root)
    cluster.mnt.mkdir()
    try:
        return kill_and_verify(cluster, seconds, seed)
    finally:
        cluster.destroy()


@pytest.mark.timeout(300)
def test_nothing_acknowledged_is_lost_when_processes_are_killed(tmp_path: Path) -> None:
    assert kills(tmp_path, 12, 11) == []


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_minutes_of_kills(tmp_path: Path) -> None:
    assert kills(tmp_path, 600, 12) == []

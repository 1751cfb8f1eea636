"""Random processes are killed under a verifying load (``tests/crash``): nothing acknowledged may be lost."""

import subprocess
import sys
from pathlib import Path

import pytest
from mount_cluster import RealCluster

CRASH = Path(__file__).resolve().parent.parent / "crash"


def kill_loop(cluster: RealCluster, seconds: int, seed: int) -> str:
    """Runs it; the test fails with all it printed if a promise was broken."""
    done = subprocess.run(
        [sys.executable, CRASH / "kill_loop.py", cluster.mnt, cluster.data, str(seconds), str(seed)],
        capture_output=True,
        text=True,
        timeout=seconds + 300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(300)
def test_nothing_acknowledged_is_lost_when_processes_are_killed(own_cluster: RealCluster) -> None:
    said = kill_loop(own_cluster, 30, 11)
    assert " 0 broken" in said
    assert "kills" in said


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_minutes_of_kills(own_cluster: RealCluster) -> None:
    assert " 0 broken" in kill_loop(own_cluster, 600, 12)


def test_the_load_notices_what_is_lost(tmp_path: Path) -> None:
    """A verifier that cannot find anything would prove nothing."""
    directory, manifest = tmp_path / "work", tmp_path / "manifest"
    directory.mkdir()

    def load(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, CRASH / "verifying_load.py", words[0], directory, manifest, *words[1:]]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert load("run", "1", "1").returncode == 0
    assert load("verify").returncode == 0
    journal, table, document = directory / "journal0", directory / "table", directory / "document1"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-256])
    assert "records" in load("verify").stdout
    journal.write_bytes(whole[:300] + bytes([whole[300] ^ 1]) + whole[301:])
    assert "record 1 of" in load("verify").stdout
    journal.write_bytes(whole)
    with table.open("r+b") as file:
        file.seek(next(at for at in range(0, 512 * 4096, 4096) if any(table.read_bytes()[at : at + 4096])) + 2000)
        file.write(b"\xff\xff")
    assert "no whole version" in load("verify").stdout
    document.unlink()
    assert "document1: gone" in load("verify").stdout

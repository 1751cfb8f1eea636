"""Bad input to system calls: the errno that a local filesystem gives, and the mount lives."""

import os
from collections.abc import Iterator
from pathlib import Path

import odd_calls
import pytest
from mount_cluster import RealCluster, run

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs: what ext4 refuses only because its files end at 16 TiB is right there."""
    path = tmp_path / "memory"
    path.mkdir()
    run("mount", "-t", "tmpfs", "none", path)
    yield path
    run("umount", "--lazy", path)


def test_every_odd_call_is_answered_as_by_a_local_filesystem(
    cluster: RealCluster, place: Path, tmp_path: Path, memory: Path
) -> None:
    before = cluster.pid("mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    ours, on_disk, in_memory = (odd_calls.answers(root) for root in (place, disk, memory))
    assert list(ours) == list(on_disk)
    different = {
        name: (answer, on_disk[name], in_memory.get(name, ""))
        for name, answer in ours.items()
        if answer not in (on_disk[name], in_memory.get(name)) and answer not in odd_calls.DIFFERENT.get(name, ())
    }
    for name, told in different.items():
        print(f"{name:50} ours {told[0]:20} ext4 {told[1]:20} tmpfs {told[2]}")
    assert not different
    # Told apart on purpose, each with its reason: none of them is out of date.
    for name, answers in odd_calls.DIFFERENT.items():
        assert ours[name] in answers, name
    assert cluster.pid("mount") == before
    assert sorted(os.listdir(os.fsencode(place))) == sorted(os.listdir(os.fsencode(disk)))
    (place / "after").write_bytes(b"x" * 70_000)
    run("sync", place / "after")


def test_there_are_many_cases(tmp_path: Path) -> None:
    assert len(dict(odd_calls.cases())) == len([*odd_calls.cases()]) > 900
    assert os.path.isdir(tmp_path)

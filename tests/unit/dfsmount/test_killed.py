"""Who has been killed and waits all the same, as /proc tells."""

import os
import platform
import signal
import subprocess
from pathlib import Path

import pytest

from dfsmount import killed

PENDING, NONE = "0000000000000100", "0000000000000000"
FSYNC = {"x86_64": 74, "aarch64": 82}.get(platform.machine(), 0)
DEVICE = os.makedev(0, 51)
MOUNTS = "30 29 0:50 / /a rw - fuse.dfs a rw\n31 29 0:51 / /b rw - fuse.dfs b rw\n"


def thread(proc: Path, process: int, number: int, state: str, shared: str = NONE, own: str = NONE) -> Path:
    for place in {proc / str(process), proc / str(process) / "task" / str(number)}:
        place.mkdir(parents=True, exist_ok=True)
        if place.name == str(number):
            text = f"Name:\tx\nState:\t{state}\nThreads:\t2\nSigPnd:\t{own}\nShdPnd:\t{shared}\n"
            (place / "status").write_text(text)
    return proc / str(process) / "task" / str(number)


def in_call(place: Path, number: int, descriptor: int, inode: int, mount: int = 31) -> None:
    (place / "syscall").write_text(f"{number} 0x{descriptor:x} 0x0 0x0 0x0 0x0 0x0 0x7ffe 0x7f11\n")
    (place / "fdinfo").mkdir()
    (place / "fdinfo" / str(descriptor)).write_text(f"pos:\t0\nflags:\t02\nmnt_id:\t{mount}\nino:\t{inode}\n")
    (place / "mountinfo").write_text(MOUNTS)


def test_a_killed_process_that_waits_in_fsync(tmp_path: Path) -> None:
    place = thread(tmp_path, 10, 10, "D (disk sleep)", shared=PENDING)
    in_call(place, FSYNC, 3, 77)
    in_call(thread(tmp_path, 11, 11, "D (disk sleep)"), FSYNC, 3, 78)
    (tmp_path / "meminfo").write_text("no process")
    found = killed.find_victims(DEVICE, tmp_path)
    assert [victim.inode for victim in found] == [77]
    assert "fsync" in found[0].operations
    if FSYNC:
        assert "write" not in found[0].operations
    # Another filesystem has the same inode numbers.
    assert killed.find_victims(os.makedev(0, 50), tmp_path) == []


def test_the_last_thread_of_a_process_whose_first_has_ended(tmp_path: Path) -> None:
    thread(tmp_path, 10, 10, "Z (zombie)")
    in_call(thread(tmp_path, 10, 12, "D (disk sleep)", own=PENDING), FSYNC, 5, 80)
    assert [victim.inode for victim in killed.find_victims(DEVICE, tmp_path)] == [80]


def test_what_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    place = thread(tmp_path, 10, 10, "D (disk sleep)", shared=PENDING)
    assert killed.find_victims(DEVICE, tmp_path) == []
    (place / "syscall").write_text("running\n")
    assert killed.find_victims(DEVICE, tmp_path) == []
    assert not killed.is_killed(999, tmp_path)


def test_a_real_process_that_is_stopped_is_killed_only_once_it_is() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert not killed.is_killed(child.pid)
        assert killed.find_victims(DEVICE) == []
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not killed.is_killed(child.pid)


@pytest.mark.skipif(not FSYNC, reason="the numbers of this machine's system calls are not known")
def test_numbers_of_system_calls_do_not_meet() -> None:
    known = killed._OPERATIONS[platform.machine()]
    assert set(known.values()) == {("read",), ("write",), ("fsync", "fsyncdir"), ("readdir",)}

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
PWRITE, WRITE = {"x86_64": (18, 1), "aarch64": (68, 64)}.get(platform.machine(), (0, 0))
KNOWN = pytest.mark.skipif(not FSYNC, reason="the numbers of this machine's system calls are not known")
DEVICE = os.makedev(0, 51)
MOUNTS = "30 29 0:50 / /a rw - fuse.dfs a rw\n31 29 0:51 / /b rw - fuse.dfs b rw\n"


def thread(proc: Path, process: int, number: int, state: str, shared: str = NONE, own: str = NONE) -> Path:
    for place in {proc / str(process), proc / str(process) / "task" / str(number)}:
        place.mkdir(parents=True, exist_ok=True)
        if place.name == str(number):
            text = f"Name:\tx\nState:\t{state}\nThreads:\t2\nSigPnd:\t{own}\nShdPnd:\t{shared}\n"
            (place / "status").write_text(text)
    return proc / str(process) / "task" / str(number)


def in_call(
    place: Path, number: int, descriptor: int, inode: int, *arguments: int, position: int = 0, flags: int = os.O_RDWR
) -> None:
    words = " ".join(
        hex(word) for word in [descriptor, 0x7F00, *arguments, *[0] * (4 - len(arguments)), 0x7FFE, 0x7F11]
    )
    (place / "syscall").write_text(f"{number} {words}\n")
    (place / "fdinfo").mkdir()
    told = f"pos:\t{position}\nflags:\t0{flags:o}\nmnt_id:\t31\nino:\t{inode}\n"
    (place / "fdinfo" / str(descriptor)).write_text(told)
    (place / "wchan").write_text("request_wait_answer")
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


@KNOWN
def test_who_waits_in_the_kernel_for_somebody_else_is_no_victim(tmp_path: Path) -> None:
    """fsync(2) is one at a time: the request belongs to the one before, who is alive."""
    place = thread(tmp_path, 10, 10, "D (disk sleep)", shared=PENDING)
    in_call(place, FSYNC, 3, 77)
    (place / "wchan").write_text("fuse_fsync")
    assert killed.find_victims(DEVICE, tmp_path) == []


@KNOWN
def test_of_reads_and_writes_it_is_told_which_bytes(tmp_path: Path) -> None:
    in_call(thread(tmp_path, 10, 10, "D (disk sleep)", shared=PENDING), PWRITE, 3, 77, 100, 5000, position=7)
    in_call(thread(tmp_path, 11, 11, "D (disk sleep)", shared=PENDING), WRITE, 3, 78, 100, position=7)
    in_call(thread(tmp_path, 12, 12, "D (disk sleep)", shared=PENDING), WRITE, 3, 79, 100, flags=os.O_APPEND)
    found = {
        victim.inode: (victim.thread, victim.start, victim.stop) for victim in killed.find_victims(DEVICE, tmp_path)
    }
    assert found == {77: (10, 5000, 5100), 78: (11, 7, 107), 79: (12, 0, 1 << 64)}


@KNOWN
def test_a_write_of_o_sync_may_wait_for_its_sync(tmp_path: Path) -> None:
    flags = os.O_RDWR | os.O_SYNC
    in_call(thread(tmp_path, 10, 10, "D (disk sleep)", shared=PENDING), PWRITE, 3, 77, 100, 5000, flags=flags)
    (found,) = killed.find_victims(DEVICE, tmp_path)
    assert found == killed.Victim(10, 77, ("write", "fsync", "fsyncdir"), 5000, 5100)


@KNOWN
def test_numbers_of_system_calls_do_not_meet() -> None:
    known = killed._CALLS[platform.machine()]
    assert {operations for operations, _, _ in known.values()} == {
        ("read",), ("write",), ("fsync", "fsyncdir"), ("readdir",)
    }  # fmt: skip

"""Ends the kernel's side of a mount whose process was killed; a program of its own, of the standard library only.

A thread of the mount that has the kernel drop pages waits there, uninterruptibly, for reads that only the mount could
answer. Killed in that moment the mount does not end: the thread keeps /dev/fuse open, so the kernel goes on waiting,
and everything on the mount hangs for ever with a process that nothing ends. This process is told when the mount's main
thread dies, and has the kernel give its requests up. The mount itself stays, without a process, as after any kill.

Run as ``python -I -S guardian.py``, by the mount's main thread; on standard input: the mount's device number, its
parent's process id and the mountpoint.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_MNT_FORCE = 1
_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Waits for the parent's end. Asked to end it does nothing, so that a shutdown does not take it away first."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1)
    device, parent, mountpoint = sys.stdin.buffer.read().split(b" ", 2)
    if os.getppid() == int(parent):
        signal.sigwait({signal.SIGUSR1})
    abort(int(device), mountpoint)


def abort(device: int, mountpoint: bytes) -> bool:
    """Has the kernel give up all requests to this filesystem, if it is still what is mounted there."""
    try:
        place = os.open(mountpoint, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if mounted_at(place) != device:
            return False
        # It begins by giving the requests up, and then cannot unmount what this very descriptor keeps busy: an empty
        # directory in the place of the mount would be written to.
        _libc.umount2(b"/proc/self/fd/%d" % place, _MNT_FORCE)
        return True
    finally:
        os.close(place)


def mounted_at(place: int) -> int:
    """The device number of the filesystem of an open path, without asking that filesystem; 0 if it is not known."""
    with open(f"/proc/self/fdinfo/{place}") as file:
        facts = dict(line.split(":", 1) for line in file)
    wanted = facts["mnt_id"].strip()
    with open("/proc/self/mountinfo") as file:
        for line in file:
            number, _, device = line.split(" ", 3)[:3]
            if number == wanted:
                major, minor = device.split(":")
                return os.makedev(int(major), int(minor))
    return 0


if __name__ == "__main__":
    main()

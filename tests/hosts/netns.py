"""Several hosts on one machine: network namespaces with an address each, in racks that can be cut off.

::

      192.0.2.11-13              192.0.2.1    192.0.2.31-32              192.0.2.21-22
      storage1 to 3              metaserver   clients                    storage4 and 5
           |                          |           |                           |
      --- rack1 --- cable --- --------+-- core ---+-------- --- cable --- --- rack2 ---

Each host has a network and a name of its own; disks and mounts are the machine's, so that what is mounted on a client
can be looked at from everywhere.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAMS = Path(sys.executable).parent
SWITCHES = ("core", "rack1", "rack2")
# Host, its switch, its address.
HOSTS = {
    "meta": ("core", "192.0.2.1"),
    "client1": ("core", "192.0.2.31"),
    "client2": ("core", "192.0.2.32"),
    "storage1": ("rack1", "192.0.2.11"),
    "storage2": ("rack1", "192.0.2.12"),
    "storage3": ("rack1", "192.0.2.13"),
    "storage4": ("rack2", "192.0.2.21"),
    "storage5": ("rack2", "192.0.2.22"),
}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=30)


class Network:
    """The namespaces; their names begin with ``prefix``, so that several can be there at once."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self._switch = f"{prefix}-switch"

    def build(self) -> None:
        ip("netns", "add", self._switch)
        for switch in SWITCHES:
            ip("-n", self._switch, "link", "add", switch, "type", "bridge")
            ip("-n", self._switch, "link", "set", switch, "up")
        for rack in ("rack1", "rack2"):
            # The cable from the core to a rack: its end at the core is what is pulled.
            ip("-n", self._switch, "link", "add", f"to-{rack}", "type", "veth", "peer", "name", f"up-{rack}")
            ip("-n", self._switch, "link", "set", f"to-{rack}", "master", "core", "up")
            ip("-n", self._switch, "link", "set", f"up-{rack}", "master", rack, "up")
        for host, (switch, address) in HOSTS.items():
            self._add(host, switch, address)

    def _add(self, host: str, switch: str, address: str) -> None:
        space = self.space(host)
        ip("netns", "add", space)
        ip("-n", space, "link", "add", "eth0", "type", "veth", "peer", "name", host, "netns", self._switch)
        ip("-n", self._switch, "link", "set", host, "master", switch, "up")
        ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", space, "link", "set", device, "up")

    def space(self, host: str) -> str:
        return f"{self.prefix}-{host}"

    def plug(self, rack: str, *, connected: bool) -> None:
        ip("-n", self._switch, "link", "set", f"to-{rack}", "up" if connected else "down")

    def command(self, host: str, *words: str | Path) -> list[str]:
        """A command line that runs these words on a host, with its name, and the mounts that everybody sees."""
        inside = f"hostname {host}; exec {shlex.join(map(str, words))}"
        return ["nsenter", f"--net=/run/netns/{self.space(host)}", "unshare", "--uts", "sh", "-c", inside]

    def run(self, host: str, *words: str | Path, check: bool = True, seconds: float = 180.0) -> str:
        """What a command prints there."""
        done = subprocess.run(
            self.command(host, *words),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        if check and done.returncode != 0:
            raise AssertionError(f"on {host}: {shlex.join(map(str, words))}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def dfs(self, host: str, *words: str | Path, check: bool = True) -> str:
        return self.run(host, sys.executable, "-m", "dfsmount.dfs", *words, check=check)

    def destroy(self) -> None:
        """Ends what still runs there, and takes the namespaces away."""
        spaces = [self.space(host) for host in HOSTS]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for space in spaces:
                for pid in _pids(space):
                    _kill(pid, number)
            deadline = time.monotonic() + 15
            while any(map(_pids, spaces)) and time.monotonic() < deadline:
                time.sleep(0.1)
        for space in (*spaces, self._switch):
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False, timeout=30)


def _pids(space: str) -> list[int]:
    found = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False, timeout=30)
    return [int(word) for word in found.stdout.split()]


def _kill(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)

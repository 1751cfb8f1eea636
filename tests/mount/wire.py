"""A mount at the other end of a network cable, which can be cut: unlike a dead server's, an unreachable one's machine
refuses nothing."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mount_cluster import ROOT, RealCluster, run


class Wire:
    """A network of one cable between the servers' machine and a mount's, which is a network namespace."""

    def __init__(self, port: int, holder: int) -> None:
        self._inside = ("nsenter", f"--net=/proc/{holder}/ns/net")
        self._ends = {"ip": f"dfs{port}s", "nsenter": f"dfs{port}m"}
        self.server, self._mount = (f"10.{port >> 8}.{port & 255}.{number}" for number in (1, 2))
        run(
            "ip",
            "link",
            "add",
            self._ends["ip"],
            "type",
            "veth",
            "peer",
            "name",
            self._ends["nsenter"],
            "netns",
            str(holder),
        )
        for prefix, address in (((), self.server), (self._inside, self._mount)):
            end = self._ends["nsenter" if prefix else "ip"]
            run(*prefix, "ip", "address", "add", f"{address}/30", "dev", end)
            run(*prefix, "ip", "link", "set", end, "up")

    def mount(self, cluster: RealCluster, point: Path, *options: str) -> None:
        point.mkdir()
        words = ",".join([f"key_file={cluster.layout.key_file}", f"log_file={point}.log", *options])
        command = [sys.executable, "-m", "dfsmount.cli", f"{self.server}:{cluster.wanted.port}", point, "-o", words]
        run(*self._inside, *command, env={**os.environ, "PYTHONPATH": str(ROOT)})

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Packets vanish: each side sends them to a machine that is not there."""
        hosts = ((*self._inside, "ip"), self.server, self._ends["nsenter"]), (("ip",), self._mount, self._ends["ip"])
        for command, address, device in hosts:
            run(*command, "neigh", "replace", address, "lladdr", "02:00:00:00:00:99", "dev", device, "nud", "permanent")
        yield
        for command, address, device in hosts:
            run(*command, "neigh", "del", address, "dev", device)


@contextmanager
def wired(port: int) -> Iterator[Wire]:
    # The namespace, and the cable with it, lasts as long as somebody is in it.
    holder = subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; exec sleep 600"], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        yield Wire(port, holder.pid)
    finally:
        holder.kill()
        holder.communicate()

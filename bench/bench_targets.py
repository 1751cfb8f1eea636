"""The filesystems that are compared, each with two copies on three storage servers on this machine.

A target is started once, used in turns with the others, and removed with all its data at the end. Everything is below
one work directory, so that all of them use the same disk; "local" is a directory there, without copies and servers.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from dfsmount.dfs_layout import Cluster
from dfsmount.dfs_services import free_port

SERVERS, COPIES = 3, 2
START_SECONDS = 60.0
# MooseFS and GlusterFS refuse to work on 127.0.0.0/8: an address of this machine that nobody else uses.
PRIVATE_IP = "10.253.7.1"
ROOT = Path(__file__).resolve().parent.parent


class TargetError(Exception):
    """A filesystem could not be started or stopped; one line."""


def run(*command: str | Path, check: bool = True, **options: object) -> str:
    """Runs a command to its end and returns what it printed; :class:`TargetError` with its last line if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=600, **options)  # type: ignore[call-overload]
    if check and done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise TargetError(f"{' '.join(words[:3])} ...: exit code {done.returncode}: {said}")
    return str(done.stdout)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TargetError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.1)


def is_mounted(point: Path) -> bool:
    return any(line.split(" ")[1] == str(point) for line in Path("/proc/self/mounts").read_text().splitlines())


def unmount(point: Path) -> None:
    if is_mounted(point):
        wait_until(lambda: not run("umount", point, check=False) and not is_mounted(point), f"unmounting {point}")


def works(point: Path) -> bool:
    """Whether a file can be written, synced and read back there."""
    probe = point / ".probe"
    try:
        with probe.open("wb") as file:
            file.write(b"x" * 5000)
            file.flush()
            os.fsync(file.fileno())
        right = probe.read_bytes() == b"x" * 5000
        probe.unlink()
    except OSError:
        return False
    return right


def processes_below(work: Path, names: Sequence[str]) -> dict[str, list[int]]:
    """Program name -> processes with a path below ``work`` in their command line: there may be others of that name."""
    found: dict[str, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                name, words = (entry / "comm").read_text().strip(), (entry / "cmdline").read_text(errors="replace")
            except OSError:
                continue
            if name in names and f"{work}/" in words:
                found.setdefault(name, []).append(int(entry.name))
    return found


class Target:
    """One filesystem. ``root`` is where the workloads work; valid between :meth:`start` and :meth:`stop`."""

    name = ""
    programs: tuple[str, ...] = ()

    def __init__(self, work: Path) -> None:
        self.work = work / self.name
        self.root = self.work / "mnt"

    def missing(self) -> str:
        """A program that is needed and not installed, or ""."""
        return next((program for program in self.programs if shutil.which(program) is None), "")

    def start(self) -> None:
        self.root.mkdir(parents=True)
        self.begin()
        wait_until(lambda: works(self.root), f"{self.name} works")

    def begin(self) -> None:
        """Starts the servers and mounts."""

    def stop(self) -> None:
        """Ends it, whatever state it is in, and removes its data."""
        self.end()
        if is_mounted(self.root):
            run("umount", "--lazy", self.root, check=False)
        shutil.rmtree(self.work, ignore_errors=True)

    def end(self) -> None:
        """Unmounts and stops the servers."""

    def chill(self) -> None:
        """Forgets everything that is cached for this filesystem."""
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3\n")

    def processes(self) -> dict[str, list[int]]:
        """Role -> processes that serve it."""
        return processes_below(self.work, self.programs)


class Local(Target):
    """A directory on the same disk: what there would be without any of this."""

    name = "local"


class Ours(Target):
    name = "ours"

    def dfs(self, *words: str | Path, check: bool = True) -> str:
        return run(sys.executable, "-m", "dfsmount.dfs", *words, check=check, cwd=ROOT)

    def begin(self) -> None:
        # Away from the default, which somebody's own cluster may have.
        self.port = free_port(Cluster(28400, SERVERS, COPIES), lambda _: None)
        self.up()

    def up(self) -> None:
        data = self.work / "data"
        counts = ("--copies", str(COPIES), "--servers", str(SERVERS))
        self.dfs("up", self.root, "--data", data, "--port", str(self.port), *counts)

    def end(self) -> None:
        if (self.work / "data").exists():
            self.dfs("down", "--data", self.work / "data", "--force", check=False)

    def chill(self) -> None:
        unmount(self.root)
        super().chill()
        self.up()

    def processes(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for path in sorted((self.work / "data/run").glob("*.pid")):
            role = path.stem.split("-")[0].rstrip("0123456789")
            found.setdefault(role, []).append(int(path.read_text()))
        return found


class Private(Target):
    """Base of those that need an address beyond loopback."""

    added = False

    def start(self) -> None:
        if PRIVATE_IP not in run("ip", "-o", "address", "show", "dev", "lo"):
            run("ip", "address", "add", f"{PRIVATE_IP}/32", "dev", "lo")
            self.added = True
        super().start()

    def stop(self) -> None:
        super().stop()
        # Targets are stopped in reverse order: whoever added the address is the last to need it.
        if self.added:
            run("ip", "address", "delete", f"{PRIVATE_IP}/32", "dev", "lo", check=False)

    def remount(self) -> None:
        """Mounts again after an unmount."""

    def chill(self) -> None:
        unmount(self.root)
        super().chill()
        self.remount()
        wait_until(lambda: works(self.root), f"{self.name} works again")


class MooseFS(Private):
    """Debian's packages with configurations of our own: the defaults, but for normal priority and no trash."""

    name = "moosefs"
    programs = ("mfsmaster", "mfschunkserver", "mfsmount", "mfscli", "mfssetgoal", "mfssettrashtime")
    ports: ClassVar = {"MATOML": 29419, "MATOCS": 29420, "MATOCL": 29421}
    first_data_port = 29430
    master_options: ClassVar[dict[str, int]] = {}
    chunkserver_options: ClassVar[dict[str, int]] = {}

    def write(self, path: Path, values: dict[str, object]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        common = {"WORKING_USER": "root", "WORKING_GROUP": "root", "NICE_LEVEL": 0, "DATA_PATH": path.parent}
        path.write_text("".join(f"{key} = {value}\n" for key, value in {**common, **values}.items()))
        return path

    def master_config(self) -> Path:
        directory = self.work / "master"
        directory.mkdir(exist_ok=True)
        exports, topology = directory / "exports", directory / "topology"
        exports.write_text("* / rw,alldirs,admin,maproot=0:0\n")
        topology.write_text("")
        values: dict[str, object] = {"EXPORTS_FILENAME": exports, "TOPOLOGY_FILENAME": topology, **self.master_options}
        for name, port in self.ports.items():
            values |= {f"{name}_LISTEN_HOST": PRIVATE_IP, f"{name}_LISTEN_PORT": port}
        return self.write(directory / "mfsmaster.cfg", values)

    def chunkserver_config(self, number: int) -> Path:
        directory = self.work / f"server{number}"
        (directory / "disk").mkdir(parents=True, exist_ok=True)
        (directory / "disks").write_text(f"{directory}/disk\n")
        values: dict[str, object] = {
            "HDD_CONF_FILENAME": directory / "disks",
            "HDD_LEAVE_SPACE_DEFAULT": "256MiB",
            "MASTER_HOST": PRIVATE_IP,
            "MASTER_PORT": self.ports["MATOCS"],
            "MASTER_RECONNECTION_DELAY": 1,
            "CSSERV_LISTEN_HOST": PRIVATE_IP,
            "CSSERV_LISTEN_PORT": self.first_data_port + number,
            **self.chunkserver_options,
        }
        return self.write(directory / "mfschunkserver.cfg", values)

    def begin(self) -> None:
        config = self.master_config()
        shutil.copy("/var/lib/mfs/metadata.mfs.empty", config.parent / "metadata.mfs")
        run("mfsmaster", "-c", config, "start")
        for number in range(SERVERS):
            run("mfschunkserver", "-c", self.chunkserver_config(number), "start")
        wait_until(lambda: self.registered() >= SERVERS, "MooseFS chunkservers register")
        self.remount()
        run("mfssetgoal", "-r", str(COPIES), self.root)
        run("mfssettrashtime", "-r", "0", self.root)

    def registered(self) -> int:
        listing = run("mfscli", "-H", PRIVATE_IP, "-P", str(self.ports["MATOCL"]), "-ns|", "-SCS", check=False)
        return listing.count(f"|{PRIVATE_IP}|")

    def remount(self) -> None:
        run("mfsmount", self.root, "-H", PRIVATE_IP, "-P", str(self.ports["MATOCL"]))
        wait_until(lambda: is_mounted(self.root), "mfsmount mounts")

    def end(self) -> None:
        run("umount", self.root, check=False)
        for path in [*self.work.glob("server*/mfschunkserver.cfg"), *self.work.glob("master/mfsmaster.cfg")]:
            run(path.stem, "-c", path, "stop", check=False)


class GlusterFS(Private):
    """Three servers in a ring, each with one brick of two pairs; a management daemon of its own."""

    name = "glusterfs"
    programs = ("glusterd", "glusterfsd", "glusterfs", "gluster")

    def gluster(self, *words: str, check: bool = True) -> str:
        return run("gluster", f"--glusterd-sock={self.work}/glusterd.socket", "--mode=script", *words, check=check)

    def volume_file(self) -> Path:
        options = {
            "working-directory": self.work / "state",
            "run-directory": self.work / "run",
            "transport-type": "socket",
            "transport.socket.bind-address": PRIVATE_IP,
            "transport.socket.listen-port": 24007,
            "max-port": 60999,
            "glusterd-sockfile": self.work / "glusterd.socket",
        }
        lines = [
            "volume management",
            "type mgmt/glusterd",
            *(f"option {k} {v}" for k, v in options.items()),
            "end-volume",
        ]
        path = self.work / "glusterd.vol"
        path.write_text("\n".join(lines) + "\n")
        return path

    def begin(self) -> None:
        for directory in ("state", "run"):
            (self.work / directory).mkdir()
        for directory in ("/var/run/gluster", "/var/log/glusterfs"):
            Path(directory).mkdir(parents=True, exist_ok=True)
        run("glusterd", "-f", self.volume_file(), "-p", self.work / "glusterd.pid", "-l", self.work / "glusterd.log")
        wait_until(lambda: "UUID" in self.gluster("pool", "list", check=False), "glusterd answers")
        bricks = []
        for pair in range(SERVERS):
            for copy in range(COPIES):
                brick = self.work / f"server{(pair + copy) % SERVERS}" / f"pair{pair}"
                brick.mkdir(parents=True)
                bricks.append(f"{PRIVATE_IP}:{brick}")
        self.gluster("volume", "create", "bench", "replica", str(COPIES), *bricks, "force")
        self.gluster("volume", "start", "bench")
        self.remount()

    def remount(self) -> None:
        run("mount", "-t", "glusterfs", "-o", f"log-file={self.work}/mount.log", f"{PRIVATE_IP}:/bench", self.root)

    def end(self) -> None:
        run("umount", self.root, check=False)
        if (self.work / "glusterd.pid").exists():
            self.gluster("volume", "stop", "bench", "force", check=False)
            run("kill", (self.work / "glusterd.pid").read_text().strip(), check=False)
        # Bricks and the self-heal daemon outlive the daemon that started them.
        for pids in self.processes().values():
            run("kill", *map(str, pids), check=False)


class SafeMooseFS(MooseFS):
    """With the settings that make it sync what ours always does: chunks when they are closed, and its changelog."""

    name = "moosefs-safe"
    ports: ClassVar = {"MATOML": 29449, "MATOCS": 29450, "MATOCL": 29451}
    first_data_port = 29460
    master_options: ClassVar = {"CHANGELOG_SAVE_MODE": 2}
    chunkserver_options: ClassVar = {"HDD_FSYNC_BEFORE_CLOSE": 1}


TARGETS: dict[str, type[Target]] = {cls.name: cls for cls in (Ours, Local, MooseFS, SafeMooseFS, GlusterFS)}

"""A real cluster for tests: real processes, a real FUSE mount, driven through the `dfs` command as a user would."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from chunkserver.client import Pool, open_pool
from chunkserver.protocol import Peer
from dfsmount import dfs_find, dfs_mounts, dfs_processes, dfs_services
from dfsmount.dfs_api import Api
from dfsmount.dfs_layout import HOST, Cluster, Layout, Problem, toml_value
from metaserver.protocol import FileStatus, Status

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND_SECONDS = 180


def run(*words: str | Path, check: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
    """A command to its end. With ``check``, a failure shows what it printed."""
    options.setdefault("timeout", COMMAND_SECONDS)
    text = [str(word) for word in words]
    done = subprocess.run(text, capture_output=True, text=True, errors="replace", check=False, **options)  # type: ignore[call-overload]
    if check:
        assert done.returncode == 0, f"{' '.join(text)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done  # type: ignore[no-any-return]


def module(name: str, *words: str | Path, check: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
    """One of our commands, whether it is installed or not."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}  # type: ignore[dict-item]
    return run(sys.executable, "-m", name, *words, check=check, env=environment, **options)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)


def free_base(servers: int) -> int:
    """A first port from which all that a cluster needs are free; far from the ports the system gives to others."""
    chance = random.Random()
    while True:
        cluster = Cluster(chance.randrange(10000, 30000, 100), servers)
        if all(dfs_processes.is_free(HOST, port) for port in cluster.ports()):
            return cluster.port


class RealCluster:
    """A cluster below ``root`` and its first mount. Nothing runs before :meth:`up`."""

    def __init__(self, root: Path, servers: int = 3, copies: int = 2) -> None:
        self.root = root
        self.data = root / "data"
        self.mnt = root / "mnt"
        self.layout = Layout(self.data)
        # Started by this process itself.
        self._children: list[subprocess.Popen[bytes]] = []
        self.wanted = Cluster(free_base(servers), servers, copies)

    # -- as a user ---------------------------------------------------------------------------------------------

    def dfs(self, *words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        return module("dfsmount.dfs", *words, check=check)

    def up(self, mountpoint: Path | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        counts = ("--servers", str(self.wanted.servers), "--copies", str(self.wanted.copies))
        place = ("--data", self.data, "--port", str(self.wanted.port))
        return self.dfs("up", mountpoint or self.mnt, *place, *counts, check=check)

    def down(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.dfs("down", "--data", self.data, *words, check=check)

    def check(self, *words: str) -> None:
        """`dfs check` finds nothing."""
        self.dfs("check", "--data", self.data, *words)

    # -- as fate -----------------------------------------------------------------------------------------------

    def service(self, name: str) -> dfs_services.Service:
        found = [s for s in dfs_services.services(self.layout, self.wanted) if s.name == name]
        return found[0] if found else dfs_services.mount(self.layout, self.wanted, str(self.mnt))

    def pid(self, name: str) -> int:
        """Of "metaserver", "chunkserver1" ... or "mount"."""
        started = dfs_processes.find(self.service(name))
        assert started is not None, f"{name} does not run"
        return started.pid

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        pid = self.pid(name)
        os.kill(pid, number)
        wait_until(lambda: not dfs_processes.is_alive(pid), f"{name} is gone")

    def restart(self, name: str, **settings: str | int) -> None:
        """Kills a server and starts it again with other settings; the next `dfs up` undoes them."""
        service = self.service(name)
        if dfs_processes.find(service) is not None:
            self.kill(name)
        config = self.layout.config(name)
        kept = [line for line in config.read_text().splitlines() if line.partition(" = ")[0] not in settings]
        added = [f"{key} = {toml_value(value)}" for key, value in settings.items()]
        config.write_text("\n".join([*kept, *added]) + "\n")
        child = dfs_processes.start(service).child
        assert child is not None
        self._children.append(child)
        wait_until(self._all_up, f"{name} is back")

    def _all_up(self) -> bool:
        try:
            servers = self.status().servers
        except (Problem, OSError):
            return False
        return len(servers) == self.wanted.servers and all(server.state == "UP" for server in servers)

    def mount_again(self, point: Path, *options: str) -> int:
        """One more mount, with options of its own; the id of its process."""
        point.mkdir(exist_ok=True)
        words = ",".join([f"key_file={self.layout.key_file}", f"log_file={point}.log", *options])
        module("dfsmount.cli", self.wanted.address, point, "-o", words)
        found = [pid for pid in dfs_processes.processes() if str(point) in dfs_processes.command_line(pid)]
        assert len(found) == 1, found
        return found[0]

    def kill_everything(self) -> None:
        """kill -9 of every process at once; the mounts, now without a process, are taken away."""
        pids = [int(path.read_text()) for path in self.layout.run.glob("*.pid")]
        pids = [pid for pid in pids if any(str(self.root) in word for word in dfs_processes.command_line(pid))]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(map(dfs_processes.is_alive, pids)), "everything is gone")
        self.unmount_lazily()

    def unmount_lazily(self) -> None:
        for mount in dfs_mounts.mounts():
            if mount.point.startswith(f"{self.root}/"):
                run("umount", "--lazy", mount.point, check=False)

    def remount(self) -> None:
        """Unmounts, drops every cache of this machine, and mounts again: what is read next comes from the servers."""
        run("umount", self.mnt)
        run("sync")
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        self.up()

    def destroy(self) -> None:
        """Ends everything without asking, and removes the data."""
        if self.layout.run.exists():
            self.kill_everything()
        for child in self._children:
            child.wait()
        dfs_find.forget(self.wanted.address)
        shutil.rmtree(self.root, ignore_errors=True)

    # -- as one who looks closely ------------------------------------------------------------------------------

    def api(self) -> Api:
        return Api(dfs_find.access_to_data(self.data))

    def status(self) -> Status:
        with self.api() as api:
            return api.status()

    def file(self, path: Path) -> FileStatus:
        with self.api() as api:
            return api.file(path.stat().st_ino)

    def contents_by_replica(self, paths: list[Path]) -> Iterator[tuple[Path, list[bytes]]]:
        """Each file's bytes as every one of its sets of replicas has them: first replicas, second replicas, ..."""
        with self.api() as api:
            status = api.status()
            files = [api.file(path.stat().st_ino) for path in paths]
        key = dfs_find.access_to_data(self.data).key()
        peers = {server.server: Peer(server.server, server.host, server.port) for server in status.servers}

        async def read_all() -> list[list[bytes]]:
            async with open_pool(key, status.cluster_id) as pool:
                return [
                    [await read_replica(pool, peers, file, number) for number in range(self.wanted.copies)]
                    for file in files
                ]

        yield from zip(paths, trio.run(read_all), strict=True)


async def read_replica(pool: Pool, peers: dict[int, Peer], file: FileStatus, number: int) -> bytes:
    """A file from replica ``number`` of each of its extents; checksums are verified, and nothing else is tried."""
    content = bytearray(file.size)
    for extent in file.extents:
        assert len(extent.replicas) > number, f"chunk {extent.chunk} has {len(extent.replicas)} replicas"
        peer = peers[extent.replicas[number].server]
        at, end = extent.chunk_offset, extent.chunk_offset + extent.length
        while at < end:
            blocks = await pool.read(peer, int(extent.chunk, 16), at, end - at)
            assert blocks.entries, f"chunk {extent.chunk} ends at {at} on server {peer.server}"
            position = 0
            for entry in blocks.entries:
                data = memoryview(blocks.payload)[position : position + entry.stored_length]
                position += entry.stored_length
                first, last = max(at, entry.logical_offset), min(end, entry.logical_offset + entry.logical_length)
                into = extent.file_offset + first - extent.chunk_offset
                content[into : into + last - first] = data[first - entry.logical_offset : last - entry.logical_offset]
                at = last
    return bytes(content)


@contextmanager
def running(root: Path, servers: int = 3, copies: int = 2) -> Iterator[RealCluster]:
    """A cluster that is up; at the end it is checked, and nothing of it is left whatever happened."""
    cluster = RealCluster(root, servers, copies)
    try:
        cluster.up()
        yield cluster
        if dfs_processes.find(cluster.service("metaserver")) is not None:
            cluster.check()
    finally:
        cluster.destroy()


# -- comparing trees -----------------------------------------------------------------------------------------------


def facts(path: Path) -> tuple[object, ...]:
    """What must be the same on both sides, contents excepted."""
    found = path.lstat()
    size = 0 if path.is_dir() and not path.is_symlink() else found.st_size
    target = os.readlink(path) if path.is_symlink() else ""
    return oct(found.st_mode), found.st_uid, found.st_gid, size, found.st_mtime_ns, target


def tree(root: Path) -> list[str]:
    """Relative paths of everything below, sorted."""
    found = []
    for folder, folders, files in os.walk(root):
        found += [os.path.relpath(os.path.join(folder, name), root) for name in folders + files]
    return sorted(found)


def differences(left: Path, right: Path) -> list[str]:
    """One line for each difference of two trees: names, modes, owners, sizes, times, links, contents."""
    names, others = tree(left), tree(right)
    found = [f"only in one: {name}" for name in sorted(set(names) ^ set(others))]
    for name in sorted(set(names) & set(others)):
        one, other = left / name, right / name
        if facts(one) != facts(other):
            found.append(f"{name}: {facts(one)} is not {facts(other)}")
        elif one.is_file() and not one.is_symlink() and one.read_bytes() != other.read_bytes():
            found.append(f"{name}: other contents")
    return found

"""A cluster of real processes whose data directory lies on a :class:`faulty_mount.FaultyMount`, watched over as systemd
watches over it: what ends is started again after a second, unless it says that starting again would not help."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

CRASH = Path(__file__).resolve().parent
sys.path += [str(CRASH.parent / "mount"), str(CRASH.parent.parent)]

from faulty_mount import FaultyMount  # noqa: E402
from load_manifest import LocalFilesystem, Manifest  # noqa: E402
from mount_cluster import RealCluster, run, wait_until  # noqa: E402
from verifying_load import Load  # noqa: E402

from dfsmount import dfs_processes, dfs_services  # noqa: E402
from dfsmount.dfs_layout import Problem  # noqa: E402
from dfsmount.dfs_processes import Service  # noqa: E402

# Everything happens soon: checkpoints, snapshots, new segments, and little space is set aside.
HASTY = {
    "checkpoint_seconds": "0.5",
    "snapshot_seconds": "2",
    "segment_bytes": str(1 << 18),
    "reserve_bytes": str(1 << 20),
    "store_reserve_bytes": str(1 << 20),
}
RESTART_SECONDS = 1.0
# `RestartPreventExitStatus` of the units.
STAYS_DOWN = (65, 78)
READY_SECONDS = 60.0


class Ended(NamedTuple):
    """A process that ended although nobody ended it: with which code (negative: signal), and its last line."""

    name: str
    code: int
    words: str


class FaultyCluster:
    """See the module. ``options`` are the metaserver's. ``ended`` grows; ``tracebacks`` are in no log hopefully."""

    def __init__(self, root: Path, servers: int = 3, options: dict[str, str] | None = None) -> None:
        self.real = RealCluster(root, servers)
        self.disk = FaultyMount(root / "backing", self.real.data)
        self.options = HASTY | (options or {})
        self.servers = ["metaserver", *(f"chunkserver{number}" for number in range(1, servers + 1))]
        self.ended: list[Ended] = []
        # What its supervisor has given up, until an operator starts it.
        self.down: dict[str, Ended] = {}
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._due: dict[str, float] = {}

    # -- processes ---------------------------------------------------------------------------------------------

    def begin(self, prepare: Callable[[], None] = lambda: None) -> None:
        """``prepare`` is called before anything runs, when the faulty directory is there."""
        self.disk.start()
        path = [str(CRASH), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(path)
        prepare()
        layout = self.real.layout
        layout.prepare()
        layout.write_cluster(self.real.wanted)
        dfs_services.write_configs(layout, self.real.wanted)
        self.start("metaserver")
        wait_until(layout.key_file.exists, "the metaserver has made the key")
        for name in self.servers[1:]:
            self.start(name)
        # What is missing is the mount.
        self.real.up()
        self.wait_ready()

    def service(self, name: str) -> Service:
        service = self.real.service(name)
        if name != "metaserver":
            return service
        options = [f"{key}={value}" for key, value in self.options.items()]
        return service._replace(module="tuned_metaserver", arguments=(*options, "metaserver", *service.arguments))

    def start(self, name: str) -> None:
        self._due.pop(name, None)
        self.down.pop(name, None)
        child = dfs_processes.start(self.service(name)).child
        assert child is not None
        self._children[name] = child

    def kill(self, name: str) -> None:
        child = self._children[name]
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            child.wait()

    def supervise(self) -> None:
        """One look at every process; what has ended is noted, and started again when it is time."""
        for name, child in self._children.items():
            code = child.poll()
            if code is None or name in self.down:
                continue
            if name not in self._due:
                self._due[name] = time.monotonic() + RESTART_SECONDS
                words = dfs_processes.last_words(self.real.layout.log(name))
                self.ended.append(Ended(name, code, words))
                if code in STAYS_DOWN:
                    self.down[name] = self.ended[-1]
            elif time.monotonic() >= self._due[name]:
                self.start(name)

    def watch(self, seconds: float) -> None:
        """Supervises for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.supervise()
            time.sleep(0.1)

    def operator(self) -> None:
        """Starts what its supervisor has given up."""
        for name in tuple(self.down):
            self.start(name)

    def is_ready(self) -> bool:
        self.supervise()
        try:
            status = self.real.status()
        except (Problem, OSError):
            return False
        up = [server for server in status.servers if server.state == "UP"]
        return not status.window_open and len(up) == len(self.servers) - 1 and not self.down

    def wait_ready(self, seconds: float = READY_SECONDS, *, operator: bool = False) -> None:
        """With an ``operator``, what its supervisor has given up is started again."""

        def ready() -> bool:
            if operator:
                self.operator()
            return self.is_ready()

        wait_until(ready, "the cluster is ready", seconds)

    def failed_disks(self) -> list[str]:
        return [server.name for server in self.real.status().servers if server.disk_state == "FAILED"]

    def log_since(self, marks: dict[str, int]) -> dict[str, str]:
        """What each server has logged since :meth:`marks`."""
        found = {}
        for name, mark in marks.items():
            with self.real.layout.log(name).open("rb") as file:
                file.seek(mark)
                found[name] = file.read().decode(errors="replace")
        return found

    def marks(self) -> dict[str, int]:
        return {name: self.real.layout.log(name).stat().st_size for name in self.servers}

    # -- from outside ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def cold_mount(self) -> Iterator[Path]:
        """One more mount, which knows nothing yet; the servers' caches are dropped as well."""
        self.disk.drop_caches()
        point = self.real.root / "cold"
        pid = self.real.mount_again(point)
        try:
            yield point
        finally:
            run("umount", point, check=False)
            with contextlib.suppress(AssertionError):
                wait_until(lambda: not dfs_processes.is_alive(pid), "the cold mount has ended", 20)
            if dfs_processes.is_alive(pid):
                os.kill(pid, signal.SIGKILL)

    def destroy(self) -> None:
        for child in self._children.values():
            if child.poll() is None:
                child.kill()
            child.wait()
        try:
            self.real.kill_everything()
        except (OSError, ValueError):
            self.real.unmount_lazily()
        self.disk.stop()
        self.real.destroy()


class TimedFilesystem(LocalFilesystem):
    """Remembers how long each failing call took, by errno, and the longest that succeeded."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.slowest: dict[int, float] = {}

    def __getattribute__(self, name: str) -> object:
        found = super().__getattribute__(name)
        if name.startswith("_") or not callable(found):
            return found

        def timed(*arguments: object) -> object:
            started, number = time.monotonic(), 0
            try:
                return found(*arguments)
            except OSError as error:
                number = error.errno or -1
                raise
            finally:
                took = time.monotonic() - started
                self.slowest[number] = max(took, self.slowest.get(number, 0.0))

        return timed


class BackgroundLoad:
    """A verifying load in a thread, in a new directory of a mount."""

    def __init__(self, directory: Path, manifest: Path, seed: int) -> None:
        directory.mkdir()
        self.directory = directory
        self.fs = TimedFilesystem(directory)
        self.load = Load(self.fs, Manifest(manifest), seed)
        self.load.prepare()
        self.failure: BaseException | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.load.run(lambda: not self._stopping.is_set())
        except BaseException as error:
            self.failure = error

    def has_gone_on(self, steps: int) -> bool:
        assert self.failure is None, self.failure
        return self.load.steps >= steps

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(120)
        assert not self._thread.is_alive(), "the load hangs"
        assert self.failure is None, self.failure

"""A real mount that outlives power cuts of the servers: a process of its own, and a load on it in a thread."""

import subprocess
import sys
import threading
import time
from pathlib import Path

from load_manifest import Directory, LocalFilesystem, Manifest
from powercut_cluster import METASERVER, PowerCluster
from verifying_load import Load

TOP = Path(__file__).resolve().parent.parent.parent
SECONDS = 60


class RealMount:
    """Blocking; for a worker thread. The power of its host is never cut: no call on it may fail."""

    def __init__(self, root: Path, cluster: PowerCluster) -> None:
        self.point = root / "mnt"
        self._cluster = cluster
        self._log = root / "mount.log"
        self._directory = self.point / "mounted"
        self.load = Load(LocalFilesystem(self._directory), Manifest(root / "manifest-mounted"), 5)
        self._process: subprocess.Popen[bytes] | None = None
        self._go_on = True
        self._thread = threading.Thread(target=self._work)

    def begin(self) -> None:
        self.point.mkdir()
        self._mount()
        self._directory.mkdir()
        self._thread.start()

    def _work(self) -> None:
        self.load.prepare()
        while self._go_on:
            try:
                self.load.step()
            except OSError as error:
                self.load.errors[str(error)] += 1
                time.sleep(0.5)

    def verify(self) -> list[str]:
        """What is broken: calls that failed, and what a second mount, which has nothing cached, does not find."""
        self._go_on = False
        self._thread.join()
        self._unmount()
        self._mount()
        broken = [f"met an error: {error}" for error in self.load.errors]
        broken += self.load.broken + self.load.verify(Directory(self._directory))
        self._unmount()
        return [f"real mount: {line}" for line in broken]

    def _mount(self) -> None:
        source, key = f"127.0.0.1:{self._cluster.port}", self._cluster.root / METASERVER / "cluster.key"
        options = f"key_file={key},timeout={SECONDS}"
        command = [sys.executable, "-m", "dfsmount.cli", source, str(self.point), "-f", "-o", options]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=TOP)
        deadline = time.monotonic() + SECONDS
        while not self.point.is_mount():
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.05)

    def _unmount(self) -> None:
        subprocess.run(["umount", str(self.point)], check=True, timeout=SECONDS)
        assert self._process is not None
        self._process.wait(SECONDS)

    def end(self) -> None:
        """Whatever has happened."""
        self._go_on = False
        if self.point.is_mount():
            subprocess.run(["umount", "--lazy", str(self.point)], check=False)
        if self._process is not None:
            self._process.kill()
            self._process.wait()

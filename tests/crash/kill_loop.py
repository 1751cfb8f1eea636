"""Kills a random process of a cluster again and again while a verifying load runs on its mount.

``python kill_loop.py MOUNTPOINT DATA SECONDS SEED`` on a cluster of ``dfs up MOUNTPOINT --data DATA``: every 2 to 5
seconds one of metaserver, chunkservers and mount gets SIGKILL and is started again by ``dfs up``. At the end everything
is killed at once, started again, and verified with cold caches. Exit code 1 if a promise was broken.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

LOAD = Path(__file__).with_name("verifying_load.py")
START_SECONDS = 90


def dfs(*arguments: str) -> str:
    """Runs ``dfs``; its output goes to the error message if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "dfsmount.dfs", *arguments], capture_output=True, text=True, timeout=START_SECONDS
    )
    if done.returncode:
        raise SystemExit(f"dfs {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


class KillLoop:
    def __init__(self, mountpoint: Path, data: Path, seed: int) -> None:
        self.mountpoint = mountpoint
        self.data = data
        self.random = random.Random(seed)
        self.kills: dict[str, int] = {}

    def processes(self) -> dict[str, int]:
        found = {}
        for path in sorted((self.data / "run").glob("*.pid")):
            name = path.stem.split("-")[0]
            try:
                found[name] = int(path.read_text().split()[0])
            except (OSError, ValueError, IndexError):
                continue
        return found

    def kill(self, name: str, pid: int) -> None:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.kills[name] = self.kills.get(name, 0) + 1

    def start(self) -> None:
        dfs("up", str(self.mountpoint), "--data", str(self.data))

    def run(self, load: subprocess.Popen[bytes], seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(self.random.uniform(2, 5))
            name, pid = self.random.choice(sorted(self.processes().items()))
            self.kill(name, pid)
            time.sleep(self.random.choice([0.0, 0.2, 1.0]))
            self.start()
            if load.poll() is not None:
                break

    def kill_all(self) -> None:
        for name, pid in self.processes().items():
            self.kill(name, pid)
        time.sleep(0.5)


def main(arguments: list[str]) -> int:
    mountpoint, data = Path(arguments[0]), Path(arguments[1])
    seconds, seed = float(arguments[2]), int(arguments[3])
    loop = KillLoop(mountpoint, data, seed)
    loop.start()
    directory = mountpoint / f"kill{seed}"
    directory.mkdir(exist_ok=True)
    manifest = data / f"manifest{seed}"
    run = [sys.executable, str(LOAD), "run", str(directory), str(manifest), str(seconds), str(seed)]
    with subprocess.Popen(run) as load:
        loop.run(load, seconds)
        load.wait(timeout=seconds + 120)
    loop.kill_all()
    loop.start()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    verified = subprocess.run([sys.executable, str(LOAD), "verify", str(directory), str(manifest)])
    print(f"{sum(loop.kills.values())} kills: {loop.kills}")
    return verified.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

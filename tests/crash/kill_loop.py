"""Kills random processes of a cluster again and again while a verifying load runs on its mount.

``python kill_loop.py ROOT SECONDS SEED [KEY=VALUE ...]`` makes a cluster below ROOT (three chunkservers, two copies;
KEY=VALUE goes into metaserver.toml) and works on it for SECONDS. Every 2 to 5 seconds it strikes: mostly one of
metaserver, chunkservers and mount gets SIGKILL, sometimes the metaserver together with a chunkserver or several at
once, and sometimes a process is stopped for a while by SIGSTOP. What was killed is started again at once or a little
later, as a service manager would, without waiting for anything.

At the end everything is killed at once and started again, and what the manifest says is verified three times: through
the mount with cold caches, and from each of the two sets of replicas alone. Exit code 1 if a promise was broken.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import trio

CRASH = Path(__file__).resolve().parent
sys.path += [str(CRASH.parent / "mount"), str(CRASH.parent.parent)]

from load_manifest import Directory, LocalFilesystem, Manifest, Recorded  # noqa: E402
from mount_cluster import RealCluster, run, wait_until  # noqa: E402
from replica_sets import ReplicaSets, read_sets  # noqa: E402
from verifying_load import Load  # noqa: E402

from chunkserver.client import open_pool  # noqa: E402
from dfsmount import dfs_find, dfs_mounts, dfs_processes  # noqa: E402
from dfsmount.dfs_layout import Problem  # noqa: E402
from metaserver.protocol import FileStatus, ServerStatus, Status  # noqa: E402

LOAD = CRASH / "verifying_load.py"
START_SECONDS = 90
# Repair of what the kills have left too few copies of.
REPAIR_SECONDS = 180
MOUNT = "mount"
PAUSE_SECONDS = (2.0, 5.0)
# Dead chunks go soon, and a pass of the scrubber takes a minute.
HASTY = {"delete_grace_seconds": "3.0", "clean_bytes_per_second": "67108864", "session_deadline_seconds": "12.0"}
SCRUB_DAYS = "0.0007"


class KillLoop:
    """One cluster under fire. ``kills`` and ``stops`` are counted by name; ``ended`` lists processes that ended
    although nobody killed them."""

    def __init__(self, cluster: RealCluster, seed: int, settings: dict[str, str] | None = None) -> None:
        self.cluster = cluster
        self.random = random.Random(seed)
        self.settings = settings or {}
        self.kills: Counter[str] = Counter()
        self.stops: Counter[str] = Counter()
        self.strikes: Counter[str] = Counter()
        self.ended: list[str] = []
        self.servers = ["metaserver", *(f"chunkserver{n}" for n in range(1, cluster.wanted.servers + 1))]
        self._children: dict[str, dfs_processes.Started] = {}

    # -- processes ---------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Starts the cluster as a user does, and then everything again as our own children with our settings."""
        self.cluster.up()
        self.configure()
        for name in [*self.servers, MOUNT]:
            self.cluster.kill(name)
            self.start(name)
        self.wait_ready()
        self.kills.clear()

    def configure(self) -> None:
        """What cleans, deletes and reads back shall be at work, too."""
        self._add("metaserver", {**HASTY, **self.settings})
        for name in self.servers[1:]:
            self._add(name, {"scrub_days": SCRUB_DAYS})

    def _add(self, name: str, settings: dict[str, str]) -> None:
        with self.cluster.layout.config(name).open("a") as file:
            file.writelines(f"{key} = {value}\n" for key, value in settings.items())

    def start(self, name: str) -> None:
        if name == MOUNT:
            run("umount", "--lazy", self.cluster.mnt, check=False)
        self._children[name] = dfs_processes.start(self.cluster.service(name))

    def end(self, names: list[str]) -> None:
        """SIGKILL to all of them at once; returns when they are gone."""
        for name in names:
            started = self._children[name]
            if not started.ended():
                os.kill(started.pid, signal.SIGKILL)
                self.kills[name] += 1
        for name in names:
            child = self._children[name].child
            assert child is not None
            child.wait()

    def revive(self) -> None:
        """Starts what has ended by itself: a mount gives up if there is no metaserver when it begins."""
        for name, started in list(self._children.items()):
            if started.ended():
                if name != MOUNT:
                    self.ended.append(f"{name} ended: {dfs_processes.last_words(started.service.log)}")
                self.start(name)

    def wait_ready(self) -> None:
        wait_until(self.is_ready, "the cluster is ready", START_SECONDS)

    def is_ready(self) -> bool:
        self.revive()
        there = dfs_mounts.mount_at(str(self.cluster.mnt))
        if there is None or dfs_mounts.is_dead(str(self.cluster.mnt)):
            return False
        try:
            status = self.cluster.status()
        except Problem:
            return False
        return not status.window_open and sum(s.state == "UP" for s in status.servers) == len(self.servers) - 1

    # -- strikes -----------------------------------------------------------------------------------------------

    def strike(self) -> None:
        """Does something bad to some processes, and has all of them running again when it returns."""
        kind = self.random.choices(("one", "metaserver and one", "several", "stopped"), (12, 2, 2, 3))[0]
        self.strikes[kind] += 1
        everybody = [*self.servers, MOUNT]
        if kind == "stopped":
            self.stop_for_a_while(self.random.choice(everybody))
            return
        if kind == "one":
            names = [self.random.choice(everybody)]
        elif kind == "metaserver and one":
            names = ["metaserver", self.random.choice(self.servers[1:])]
        else:
            names = self.random.sample(everybody, self.random.randrange(2, len(everybody) + 1))
        self.end(names)
        time.sleep(self.random.choice([0.0, 0.0, 0.3, 1.5]))
        for name in names:
            self.start(name)

    def stop_for_a_while(self, name: str) -> None:
        started = self._children[name]
        if started.ended():
            return
        self.stops[name] += 1
        os.kill(started.pid, signal.SIGSTOP)
        try:
            time.sleep(self.random.choice([0.5, 2.0, 6.0]))
        finally:
            os.kill(started.pid, signal.SIGCONT)

    def run(self, load: "subprocess.Popen[bytes]", seconds: float) -> None:
        next_strike = time.monotonic()
        end = next_strike + seconds
        while load.poll() is None:
            next_strike += self.random.uniform(*PAUSE_SECONDS)
            if next_strike > end:
                return
            time.sleep(max(0.0, next_strike - time.monotonic()))
            self.revive()
            self.strike()

    def restart_everything(self) -> None:
        self.end([*self.servers, MOUNT])
        for name in [*self.servers, MOUNT]:
            self.start(name)
        self.wait_ready()
        run("sync")
        Path("/proc/sys/vm/drop_caches").write_text("3\n")

    def close(self) -> None:
        """Nothing of ours runs afterwards."""
        for started in self._children.values():
            if not started.ended():
                os.kill(started.pid, signal.SIGKILL)
            if started.child is not None:
                started.child.wait()

    # -- looking -----------------------------------------------------------------------------------------------

    def wait_repaired(self) -> None:
        wait_until(lambda: self._is_repaired(self.cluster.status()), "everything has its copies", REPAIR_SECONDS)

    @staticmethod
    def _is_repaired(status: Status) -> bool:
        return status.chunks.too_few == 0 and status.chunks.missing == 0

    def verify(self, directory: Path, manifest: Manifest) -> list[str]:
        """Every broken promise: as read through the mount, and from each set of replicas alone."""
        load = Load(LocalFilesystem(directory), manifest, 0)
        broken = [f"through the mount: {line}" for line in load.verify(Directory(directory))]
        self.wait_repaired()
        paths = {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()}
        inos = {name: path.stat().st_ino for name, path in paths.items()}
        sets, trees = read_replica_sets(self.cluster, inos)
        broken += sets.broken
        for number, tree in enumerate(trees):
            broken += [f"replicas {'AB'[number]}: {line}" for line in load.verify(Recorded(tree))]
        print(f"{len(inos)} files, {sets.bytes_read / 1e6:.1f} MB of replicas read, {len(broken)} broken")
        return broken


def read_replica_sets(cluster: RealCluster, inos: dict[str, int]) -> tuple[ReplicaSets, list[dict[str, bytes]]]:
    """Files, by name and inode number, as each set of replicas has them."""

    async def ask() -> tuple[Sequence[ServerStatus], dict[str, FileStatus]]:
        with cluster.api() as api:
            return api.status().servers, {name: api.file(ino) for name, ino in inos.items()}

    async def read() -> tuple[ReplicaSets, list[dict[str, bytes]]]:
        key = dfs_find.access_to_data(cluster.data).key()
        async with open_pool(key, cluster.status().cluster_id) as pool:
            return await read_sets(pool, ask, cluster.wanted.copies)

    return trio.run(read)


def kill_and_verify(
    cluster: RealCluster, seconds: float, seed: int, settings: dict[str, str] | None = None
) -> list[str]:
    """The whole test on a cluster that does not run yet; every broken promise. Prints what was done."""
    loop = KillLoop(cluster, seed, settings)
    try:
        loop.begin()
        directory, manifest = cluster.mnt / f"kill{seed}", cluster.root / f"manifest{seed}"
        directory.mkdir(exist_ok=True)
        command = [sys.executable, str(LOAD), "run", str(directory), str(manifest), str(seconds), str(seed)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as load:
            loop.run(load, seconds)
            loop.wait_ready()
            said = load.communicate(timeout=seconds + 120)[0].decode()
        print(said, end="")
        broken = [line for line in said.splitlines() if line.startswith("BROKEN")]
        print(f"{loop.kills.total()} kills {dict(loop.kills)}, {loop.stops.total()} stops {dict(loop.stops)}")
        loop.restart_everything()
        broken += loop.verify(directory, Manifest(manifest)) + loop.ended
        checked = cluster.dfs("check", "--data", cluster.data, "--deep", check=False)
        if checked.returncode:
            broken.append(f"dfs check --deep: {checked.stdout}{checked.stderr}")
        return broken
    finally:
        loop.close()


def main(arguments: list[str]) -> int:
    root, seconds, seed = Path(arguments[0]).resolve(), float(arguments[1]), int(arguments[2])
    settings = dict(setting.split("=", 1) for setting in arguments[3:])
    cluster = RealCluster(root)
    cluster.mnt.mkdir(parents=True, exist_ok=True)
    broken = kill_and_verify(cluster, seconds, seed, settings)
    for line in broken:
        print("BROKEN", line)
    if not broken:
        cluster.destroy()
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

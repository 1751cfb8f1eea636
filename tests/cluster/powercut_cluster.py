"""A cluster that loses power: real servers in this process, over sockets, on volumes that forget what was not synced.

:meth:`PowerCluster.live` is one life of all servers, :meth:`PowerCluster.cut` ends it in the middle of everything, and
:meth:`PowerCluster.settle` makes the disks what is left of them; the next life has another boot id, so that the
metaserver knows what may be gone. After :meth:`PowerCluster.survive` instead it was only the processes that died.
"""

import os
import threading
import time
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random

import trio
from powercut import HONEST, Lies, Mode, Volume
from powercut_disk import PoweredDisk
from powercut_files import DiskSpace, PoweredFiles

from chunkserver import check as chunkserver_check
from chunkserver import serve as chunkserver
from chunkserver.config import Config as ChunkserverConfig
from dfsmount.dfs_api import Api
from dfsmount.dfs_find import Access
from dfsmount.dfs_layout import Problem
from metaserver import serve as metaserver
from metaserver.commit import Committer, Options, open_committer
from metaserver.config import Config
from metaserver.key import ClusterKey, load_key
from metaserver.protocol import Status

HOST = "127.0.0.1"
READY_SECONDS = 60.0
REPORTER_SECONDS = 20.0
# What was cancelled ends at once but for threads that are at work.
END_SECONDS = 60.0
# Small, so that a second of work fills segments, writes checkpoints, makes snapshots and grows the map.
OPTIONS = Options(
    checkpoint_seconds=0.15,
    checkpoint_changes=60,
    snapshot_log_bytes=1 << 19,
    segment_bytes=1 << 16,
    map_bytes=1 << 20,
    reserve_bytes=1 << 15,
    store_reserve_bytes=1 << 17,
    retry_seconds=0.1,
)
# Everything is read back within seconds.
SCRUB_DAYS = 0.0002
METASERVER = "metaserver"


class PowerCluster:
    """See the module. ``lies`` says whose syncs are none: "metaserver" or "chunkservers"."""

    def __init__(
        self, root: Path, mode: Mode, random: Random, *, servers: int = 3, lies: dict[str, Lies] | None = None
    ) -> None:
        self.root = root
        self.mode = mode
        self.random = random
        self.names = [METASERVER, *(f"chunkserver{number}" for number in range(1, servers + 1))]
        self.lives = 0
        self.boots = 0
        self.lost = 0  # pages, sizes and names that cuts took
        self.store_losses = 0  # LMDB transactions that were in flight
        self.space = DiskSpace()  # of the metaserver's disk
        self.failure = ""  # why a server ended by itself
        self._lies = lies or {}
        self._ports: dict[str, metaserver.Ports | chunkserver.Ports] = {}
        self._volumes: dict[str, Volume] = {}
        self._files: PoweredFiles | None = None
        self._scope = trio.CancelScope()
        self._over = trio.Event()
        self._on = False

    # -- what clients need -------------------------------------------------------------------------------------

    @property
    def port(self) -> int:
        return self._ports[METASERVER].data

    @property
    def key(self) -> ClusterKey:
        return load_key(self._path(METASERVER) / "cluster.key")

    def api(self) -> Api:
        return Api(Access(f"{HOST}:{self._ports[METASERVER].http}", self._path(METASERVER) / "cluster.key"))

    def _path(self, name: str) -> Path:
        return self.root / name

    # -- a life ------------------------------------------------------------------------------------------------

    def begin(self, nursery: trio.Nursery) -> None:
        """One more life: starts everything in ``nursery``, where it runs until the cut. See :meth:`wait_ready`."""
        self.lives += 1
        self._on, self._over, self._scope = True, trio.Event(), trio.CancelScope()
        for name in self.names:
            if name not in self._volumes:
                self._path(name).mkdir(parents=True, exist_ok=True)
                lies = self._lies.get(name.rstrip("123"), HONEST)
                self._volumes[name] = Volume(self._path(name), self.mode, Random(self.random.random()), lies)
                if self.lives > 1:
                    self._volumes[name].look()
        nursery.start_soon(self._live)

    async def _live(self) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    await self._start_metaserver(nursery)
                    for name in self.names[1:]:
                        await self._start_chunkserver(nursery, name)
        except Exception as error:
            if self._on:
                self.failure = "".join(traceback.format_exception(error))
        finally:
            self._over.set()

    async def _start_metaserver(self, nursery: trio.Nursery) -> None:
        before = self._ports.get(METASERVER, metaserver.Ports(0, 0))
        config = Config(
            data=str(self._path(METASERVER)),
            listen_port=before.data,
            http_port=before.http,
            heartbeat_seconds=0.2,
            keep_alive_seconds=0.5,
            session_deadline_seconds=3.0,
            window_seconds=1.5,
            delete_grace_seconds=1.0,
        )
        self._ports[METASERVER] = await nursery.start(
            partial(metaserver.serve, config, trio.Event(), open_engine=self._open_engine)
        )

    @asynccontextmanager
    async def _open_engine(self, directory: Path) -> AsyncIterator[Committer]:
        self._files = PoweredFiles(self._volumes[METASERVER], self.space)
        boot_id = b"%16d" % self.boots
        async with open_committer(directory, files=self._files, options=OPTIONS, boot_id=boot_id) as committer:
            yield committer

    async def _start_chunkserver(self, nursery: trio.Nursery, name: str) -> None:
        before = self._ports.get(name, chunkserver.Ports(0, 0))
        config = ChunkserverConfig(
            data=str(self._path(name)),
            metaserver=f"{HOST}:{self._ports[METASERVER].http}",
            listen=f"{HOST}:{before.data}",
            http=f"{HOST}:{before.http}",
            name=name,
            reserve_bytes=0,
            scrub_days=SCRUB_DAYS,
        )
        volume = self._volumes[name]
        self._ports[name] = await nursery.start(
            partial(
                chunkserver.serve,
                config,
                self.key,
                trio.Event(),
                make_disk=lambda root: PoweredDisk(root, volume),
            )
        )

    async def wait_ready(self) -> Status:
        """Until all chunkservers are up and the reconnect window has closed."""
        with trio.fail_after(READY_SECONDS):
            while True:
                assert not self.failure, self.failure
                status = await trio.to_thread.run_sync(self._status)
                if status is not None and not status.window_open and self._all_up(status):
                    return status
                await trio.sleep(0.05)

    def _all_up(self, status: Status) -> bool:
        return sum(server.state == "UP" for server in status.servers) == len(self.names) - 1

    def _status(self) -> Status | None:
        if not (self._path(METASERVER) / "cluster.key").exists() or METASERVER not in self._ports:
            return None
        with self.api() as api:
            try:
                return api.status()
            except Problem:
                return None

    # -- the end of it -----------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Everything stops at this instant."""
        self._on = False
        for volume in self._volumes.values():
            volume.cut()
        self._scope.cancel()

    async def settle(self) -> list[str]:
        """After a cut: waits until nothing runs any more and makes the disks what they are; what is broken there."""
        await self._ended()
        self.boots += 1
        return await trio.to_thread.run_sync(self._settle)

    async def survive(self) -> None:
        """After a cut that was none: all servers were killed at once, and the page caches are as they were."""
        await self._ended()
        for volume in self._volumes.values():
            volume.resume()

    async def _ended(self) -> None:
        with trio.move_on_after(END_SECONDS) as scope:
            await self._over.wait()
        assert not scope.cancelled_caught, "a server does not end:\n" + "\n".join(waiting_tasks())
        await trio.to_thread.run_sync(wait_for_reporters)

    def _settle(self) -> list[str]:
        broken = []
        for name, volume in self._volumes.items():
            volume.settle()
            self.lost += volume.lost
            if name != METASERVER:
                report = chunkserver_check.check_directory(str(self._path(name)), power_cut=True)
                broken += [f"{name}: {problem.key}: {problem.text}" for problem in report.problems]
        if self._files is not None:
            self.store_losses += self._files.store_losses
        self._volumes.clear()
        return broken


def waiting_tasks() -> list[str]:
    """Every task there is, and where it waits."""
    lines: list[str] = []

    def walk(task: trio.lowlevel.Task, depth: int) -> None:
        places = [f"{os.path.basename(frame.f_code.co_filename)}:{line}" for frame, line in task.iter_await_frames()]
        lines.append("  " * depth + f"{task.name}: {' > '.join(places)}")
        for nursery in task.child_nurseries:
            for child in nursery.child_tasks:
                walk(child, depth + 1)

    root = trio.lowlevel.current_root_task()
    assert root is not None
    walk(root, 0)
    return lines


def wait_for_reporters() -> None:
    """The threads that report to a metaserver see the end of their server only when an exchange has failed."""
    deadline = time.monotonic() + REPORTER_SECONDS
    while any("_report.<locals>.run" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "a reporting thread outlives its server"
        time.sleep(0.01)

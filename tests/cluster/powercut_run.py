"""Power cuts at random points under a verifying load, by hand and from ``test_powercut.py``.

``python powercut_run.py DIRECTORY MODE POINTS SEED [--mount]`` cuts the power of all nodes POINTS times, MODE being
"everything", "random" or "torn" (see ``powercut``). Two clients work all the time. One dies with each cut: after it a
new one verifies all that the old one was promised, before it goes on. The other outlives the servers, meets no error,
and in the end everything it has done is there, fsynced or not. A part of the cuts comes during the start after the one
before. Before some of them all servers are killed at once and started again: what they find then is in page caches, and
the cut may still take it. Before others the metaserver's disk becomes full while files are deleted, so that segments
of the log are used again, and stays full during the start or not (see ``powercut_full``). With ``--mount`` a real
mount outlives the servers, too. Prints one line for each broken promise; exit code 1 if there is one.
"""

import logging
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random

import structlog
import trio

TESTS = Path(__file__).resolve().parent.parent
sys.path += [str(TESTS / "cluster"), str(TESTS / "crash"), str(TESTS.parent)]

from load_manifest import Manifest, Recorded, Tree  # noqa: E402
from powercut import Lies, Mode  # noqa: E402
from powercut_client import READ_SECONDS, ClientFilesystem, ClientTree, PowerClient, open_client  # noqa: E402
from powercut_cluster import PowerCluster  # noqa: E402
from powercut_full import Deletions, insist, is_full  # noqa: E402
from powercut_mount import RealMount  # noqa: E402
from replica_sets import read_sets  # noqa: E402
from verifying_load import Load  # noqa: E402

from chunkserver.client import open_pool  # noqa: E402
from metaserver.protocol import FileStatus, ServerStatus, Status  # noqa: E402

# How long a client works before the cut, and how long a start goes on before the next.
WORK_SECONDS = (0.02, 0.9)
START_SECONDS = (0.0, 0.8)
CUTS_DURING_START = 0.2
KILLS = 0.25
AFTER_KILL_SECONDS = (0.0, 4.0)
# How often the metaserver's disk is full when the power goes, and how long a program waits that met that.
FULL = 0.35
FULL_SECONDS = (0.0, 1.5)
PAUSE_SECONDS = 0.05
# A new cluster after so many points, so that what nobody collects does not fill the disk.
POINTS_PER_CLUSTER = 25
COPIES = 2
REPAIR_SECONDS = 30.0


class Worker:
    """A load on a client, in a thread of its own."""

    def __init__(
        self, client: PowerClient, top: str, manifest: Path, seed: int, full: Callable[[], bool] = lambda: False
    ) -> None:
        """``full``: whether there may have been no space a moment ago."""
        self.full = full
        self.fs = ClientFilesystem(client, top)
        self.load = Load(self.fs, Manifest(manifest), seed)
        self.client = client
        self._go_on = True
        self._ended = trio.Event()

    async def verify(self, tree: Tree | None = None) -> list[str]:
        return await trio.to_thread.run_sync(self.load.verify, tree or ClientTree(self.fs))

    async def work(self) -> None:
        """Until :meth:`end`, or until the client dies."""
        try:
            await trio.to_thread.run_sync(self._work)
        finally:
            self._ended.set()

    def _work(self) -> None:
        while self._go_on and not self.client.dead:
            try:
                self.load.prepare()
                while self._go_on and not self.client.dead:
                    self.load.step()
            except OSError as error:
                if self.client.dead:
                    return
                if not (self.full() and is_full(error)):
                    self.load.errors[str(error)] += 1
                    return
                time.sleep(PAUSE_SECONDS)

    async def end(self) -> None:
        self._go_on = False
        await self._ended.wait()


class PowerCuts:
    """One cluster, and what was found broken on it."""

    def __init__(
        self,
        root: Path,
        mode: Mode,
        seed: int,
        lies: dict[str, Lies] | None = None,
        read_seconds: float = READ_SECONDS,
        mounted: bool = False,
        fulls: float = FULL,
    ) -> None:
        self.root = root
        self.mounted = mounted
        self.read_seconds = read_seconds
        self.random = Random(seed)
        self.cluster = PowerCluster(root / "cluster", mode, self.random, lies=lies)
        self.broken: list[str] = []
        self.points = 0
        self.kills = 0
        self.steps = 0
        self.replica_bytes = 0
        self.deletions: Deletions | None = None
        self.deleted = 0
        self._fulls = fulls
        self._filled = False

    async def run(self, points: int) -> None:
        """So many cuts; what is broken is in ``broken``, and ends it."""
        (self.root / "cluster").mkdir(parents=True)
        try:
            async with trio.open_nursery() as nursery:
                await self._run(nursery, points)
                nursery.cancel_scope.cancel()
        except Exception as error:
            self.broken.append(f"after {self.points} cuts: {_leaf(error)!r}")

    async def _run(self, nursery: trio.Nursery, points: int) -> None:
        self.cluster.begin(nursery)
        await self.cluster.wait_ready()
        async with self._survivor(nursery) as survivor, self._mount():
            while self.points < points and not self.broken:
                await self._one_point(nursery)
            if self.broken:
                survivor.client.die()  # it would wait for servers that do not come
            else:
                await survivor.end()
                self.broken += [f"survivor met an error: {error}" for error in survivor.load.errors]
        if not self.broken:
            await self._verify_everything()

    @asynccontextmanager
    async def _survivor(self, nursery: trio.Nursery) -> AsyncIterator[Worker]:
        """A client that lives through all cuts; its unmount writes what it has not yet written."""
        async with self._client() as client:
            worker = await self._worker(client, "survivor")
            nursery.start_soon(worker.work)
            try:
                yield worker
            except BaseException:
                client.die()  # it would wait for servers that do not come
                raise
            self.steps += worker.load.steps

    @asynccontextmanager
    async def _mount(self) -> AsyncIterator[None]:
        """A real mount that lives through all cuts."""
        if not self.mounted:
            yield
            return
        mount = RealMount(self.root, self.cluster)
        try:
            await trio.to_thread.run_sync(mount.begin)
            yield
            self.broken += await trio.to_thread.run_sync(mount.verify)
            self.steps += mount.load.steps
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(mount.end)

    def _client(self) -> AbstractAsyncContextManager[PowerClient]:
        return open_client(self.cluster.port, self.cluster.key, read_seconds=self.read_seconds)

    async def _worker(self, client: PowerClient, name: str) -> Worker:
        await insist(client, name)
        manifest, seed = self.root / f"manifest-{name}", self.random.randrange(1 << 30)
        return Worker(client, name, manifest, seed, lambda: self._filled)

    async def _one_point(self, nursery: trio.Nursery) -> None:
        """A client that dies at the cut; whoever comes after it verifies what it was promised."""
        async with self._client() as client:
            worker = await self._worker(client, "mortal")
            self.broken += await worker.verify()
            nursery.start_soon(worker.work)
            await trio.sleep(self.random.uniform(*WORK_SECONDS))
            if self.random.random() < self._fulls:
                await self._fill(nursery, client)
            if self.random.random() < KILLS:
                await self._kill(nursery)
                await trio.sleep(self.random.uniform(*AFTER_KILL_SECONDS))
            self._cut()
            client.die()  # which leaves this block
        await worker.end()
        self.broken += worker.load.broken
        self.steps += worker.load.steps
        await self._restart(nursery)

    async def _fill(self, nursery: trio.Nursery, client: PowerClient) -> None:
        """The metaserver's disk becomes full while files are deleted."""
        self.deletions = Deletions(f"deleted{self.points}")
        await self.deletions.prepare(client)
        self._filled = True
        self.cluster.space.fill()
        nursery.start_soon(self.deletions.run, client)
        await trio.sleep(self.random.uniform(*FULL_SECONDS))

    async def _empty(self) -> None:
        """There is space again, and what was deleted is looked at."""
        self.cluster.space.full = False
        if self.deletions is not None:
            async with self._client() as client:
                await self.deletions.verify(client)
            self.broken += self.deletions.broken
            self.deleted += self.deletions.deleted
            self.deletions = None

    def _cut(self) -> None:
        self.cluster.cut()
        self.points += 1

    async def _kill(self, nursery: trio.Nursery) -> None:
        """All servers at once, by kill -9; they are on their way up again when this returns."""
        self.cluster.cut()
        self.kills += 1
        await self.cluster.survive()
        self.cluster.begin(nursery)

    async def _strike_during_start(self) -> None:
        await trio.sleep(self.random.uniform(*START_SECONDS))
        assert not self.cluster.failure, self.cluster.failure

    async def _restart(self, nursery: trio.Nursery) -> None:
        self.broken += await self.cluster.settle()
        self.cluster.begin(nursery)
        while self.random.random() < CUTS_DURING_START:
            await self._strike_during_start()
            self._cut()
            self.broken += await self.cluster.settle()
            self.cluster.begin(nursery)
        if self.random.random() < 0.5:
            # Otherwise the start is on a full disk, too.
            self.cluster.space.full = False
        await self.cluster.wait_ready()
        await self._empty()
        self.broken += await trio.to_thread.run_sync(self._check)

    def _check(self) -> list[str]:
        with self.cluster.api() as api:
            return [f"metadata: {p.table} {p.key}: {p.text}" for p in api.check().problems]

    # -- at the end --------------------------------------------------------------------------------------------

    async def _verify_everything(self) -> None:
        """With a new client, and then from each set of replicas alone."""
        async with self._client() as client:
            for name in ("mortal", "survivor"):
                worker = await self._worker(client, name)
                self.broken += [f"{name}: {line}" for line in await worker.verify()]
                inos = await trio.to_thread.run_sync(worker.fs.files)
                self.broken += await self._verify_replicas(worker, inos)

    async def _verify_replicas(self, worker: Worker, inos: dict[str, int]) -> list[str]:
        async def ask() -> tuple[Sequence[ServerStatus], dict[str, FileStatus]]:
            status, files = await trio.to_thread.run_sync(self._wait_for_copies, inos)
            return status.servers, files

        async with open_pool(self.cluster.key, (await self.cluster.wait_ready()).cluster_id) as pool:
            sets, trees = await read_sets(pool, ask, COPIES)
        self.replica_bytes += sets.bytes_read
        broken = sets.broken
        for number, tree in enumerate(trees):
            broken += [f"replicas {'AB'[number]}: {line}" for line in await worker.verify(Recorded(tree))]
        return broken

    def _wait_for_copies(self, inos: dict[str, int]) -> tuple[Status, dict[str, FileStatus]]:
        """Where everything is; chunks that somebody was writing at a cut are sealed and repaired after a while."""
        deadline = time.monotonic() + REPAIR_SECONDS
        with self.cluster.api() as api:
            while True:
                files = {path: api.file(ino) for path, ino in inos.items()}
                if all(map(_has_copies, files.values())) or time.monotonic() > deadline:
                    return api.status(), files
                time.sleep(0.2)


def _leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _has_copies(file: FileStatus) -> bool:
    good = (sum(replica.state == "GOOD" for replica in extent.replicas) for extent in file.extents)
    return all(count >= COPIES for count in good)


def quiet(path: Path) -> None:
    """What the servers say goes into a file."""
    logger_factory = structlog.PrintLoggerFactory(path.open("a"))
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO), logger_factory=logger_factory
    )


def main(arguments: list[str]) -> int:
    root, mode, points, seed = Path(arguments[0]), Mode(arguments[1]), int(arguments[2]), int(arguments[3])
    mounted = "--mount" in arguments
    done = failed = 0
    while done < points:
        run = PowerCuts(root / f"{mode.value}-{seed}", mode, seed, mounted=mounted)
        run.root.mkdir(parents=True)
        quiet(run.root / "log")
        began = time.monotonic()
        trio.run(partial(run.run, min(POINTS_PER_CLUSTER, points - done)))
        done += max(1, run.points)
        cluster = run.cluster
        print(
            f"{mode.value} seed {seed}: {run.points} cuts, {run.kills} kills, {run.steps} steps, {cluster.lost} pages, "
            f"sizes and names in doubt, {cluster.store_losses} store transactions lost, "
            f"{cluster.space.recycled} segments used again, {run.deleted} files deleted on a full disk, "
            f"{run.replica_bytes / 1e6:.0f} MB of replicas verified, {len(run.broken)} broken, "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
        for line in run.broken[:20]:
            print("BROKEN", line, flush=True)
        failed += bool(run.broken)
        seed += 1
    print(f"{mode.value}: {done} cuts, {failed} clusters with losses")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

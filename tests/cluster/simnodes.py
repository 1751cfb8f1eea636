"""The programs of a cluster as nodes of a simulation: started, killed, cut off from power, frozen, started again."""

import os
import shutil
import stat
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import msgspec
import trio
from determinism import NODE
from simdisk import Detached, SimDisk, SimStorage
from simfiles import CRASH_STEPS, CRASHES, SimFiles, Unsynced
from simnet import End, SimNet, over_the_wire
from simtrace import Trace

from chunkserver import identity as identities
from chunkserver.client import Pool
from chunkserver.disk import chunk_directories
from chunkserver.identity import FORMAT, Identity
from chunkserver.node import Node, Running
from chunkserver.report import Mailbox, Outbox, Reporter
from dfsmount.cache import BlockCache
from dfsmount.reader import Reader
from dfsmount.remote import Remote
from dfsmount.vfs import Vfs
from dfsmount.vfs_core import Core, VfsOptions
from dfsmount.waiting import Kind, Waiting
from dfsmount.writer import Writer, WriterOptions
from metaserver import protocol as meta_protocol
from metaserver.client import Hooks, MetaClient, SessionIdentity
from metaserver.commit import EngineFailed, open_committer
from metaserver.config import Config
from metaserver.connection import accept_handshake
from metaserver.errors import DfsError
from metaserver.parts import Parts
from metaserver.protocol import Heartbeat, Register, Registered, ReportPage
from metaserver.start import Options

ReplyT = TypeVar("ReplyT")

CLUSTER = "11111111-2222-3333-4444-555555555555"
META = "meta"
META_PORT, CHUNK_PORT = 9400, 9422
EPOCH_NS = 1_700_000_000_000_000_000


class Killed(BaseException):
    """kill -9."""


class Gone(Exception):
    """The client that was to do something was killed."""


class World(msgspec.Struct):
    """What all nodes share."""

    random: Random
    net: SimNet
    trace: Trace
    nursery: trio.Nursery
    directory: Path
    config: Config
    # The mount's options.timeout.
    timeout: float
    copies: int = 2
    slow_disk: dict[str, float] = {}
    on_unlink: Callable[[int, str], None] = lambda number, path: None
    # Broken on purpose, for the negative controls.
    sabotage: frozenset[str] = frozenset()


class SimNode:
    """A host with one program. ``lives`` counts its starts."""

    @property
    def deadly(self) -> tuple[type[BaseException], ...]:
        """What may end the program at present."""
        return (EngineFailed,)

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.running = False
        self.lives = 0
        self.drift = 1.0 + world.random.uniform(-1e-3, 1e-3)
        self.offset_ns = 0
        self.frozen_seconds = 0.0
        self.booted = 0.0
        self._killed = trio.Event()
        self._stopped = trio.Event()
        self._jobs: trio.Nursery | None = None
        self._serial = 0

    def wall_ns(self) -> int:
        return EPOCH_NS + self.offset_ns + int(trio.current_time() * self.drift * 1e9)

    def steady_ns(self) -> int:
        """Nanoseconds since the host's start."""
        return int((trio.current_time() - self.booted) * self.drift * 1e9) + 1_000_000_000

    async def run_sync(
        self, function: Callable[..., Any], *arguments: Any, limiter: Any = None, abandon_on_cancel: bool = False
    ) -> Any:
        """``trio.to_thread.run_sync`` in virtual time: ``function`` runs at one moment of it, also if nobody waits for
        it any more."""
        jobs = self._jobs
        if jobs is None:
            raise Killed
        outcome: list[Any] = []
        done = trio.Event()
        before, after = self._disk_delays()

        async def job() -> None:
            await trio.sleep(before)
            try:
                outcome.append((True, function(*arguments)))
            except Exception as error:
                outcome.append((False, error))
            if after:
                await trio.sleep(after)

        async def limited() -> None:
            try:
                if limiter is None:
                    await job()
                else:
                    async with limiter:
                        await job()
            finally:
                # Also if it was killed while it waited for its turn.
                done.set()

        context = trio.lowlevel.current_task().context.copy()
        context.run(jobs.start_soon, limited)
        with trio.CancelScope(shield=not abandon_on_cancel):
            await done.wait()
        if not outcome:
            raise Killed
        good, value = outcome[0]
        if not good:
            raise value
        return value

    def _disk_delays(self) -> tuple[float, float]:
        random = self.world.random
        seconds = random.random() * 0.002 + self.world.slow_disk.get(self.name, 0.0)
        return seconds, random.random() * 0.0005

    async def start(self) -> None:
        """Returns at once; the program starts as fast as it can."""
        self.launch()

    def launch(self) -> None:
        assert not self.running
        self.running = True
        self.lives += 1
        self._killed, self._stopped = trio.Event(), trio.Event()
        self.world.trace.add(f"START {self.name}")
        self.world.net.up(self.name)
        self.world.net.start_on(self.name, self.world.nursery, self._live)

    async def _live(self) -> None:
        try:
            async with trio.open_nursery() as self._jobs:
                await self.main()
                self._jobs.cancel_scope.cancel()
        except BaseException as error:
            self._died(error)
        finally:
            self._jobs = None
            self.running = False
            self.world.net.down(self.name)
            self._stopped.set()
            if not self._killed.is_set():
                # systemd starts it again.
                self.world.net.clockwork.after(1.0, self._start_again)

    def _start_again(self) -> None:
        if not self.running and not self._killed.is_set():
            self.launch()

    def _died(self, error: BaseException) -> None:
        rest: BaseException | None = error
        if isinstance(error, BaseExceptionGroup):
            rest = error.split((Killed, Detached, trio.Cancelled, *self.deadly))[1]
        elif isinstance(error, (Killed, Detached, *self.deadly)):
            rest = None
        if isinstance(error, trio.Cancelled):
            raise error
        if rest is not None:
            import traceback

            self.world.trace.violation(f"{self.name} died: {''.join(traceback.format_exception(error))}")
        elif not self._killed.is_set():
            self.world.trace.add(f"ENDED {self.name} by itself")
            self.world.trace.counts[f"ended by itself: {self.name[:2]}"] += 1

    async def main(self) -> None:
        """The program; ends by raising :class:`Killed` when ``_killed`` is set."""
        raise NotImplementedError

    async def until_killed(self) -> None:
        await self._killed.wait()
        raise Killed

    async def kill(self, *, power: bool = False) -> None:
        """kill -9, or the end of the host's power; returns when nothing of it runs any more."""
        if not self.running:
            self._killed.set()
            return
        self.world.trace.add(f"{'POWER' if power else 'KILL'} {self.name}")
        self.world.net.down(self.name, power=power)
        self.detach()
        self._killed.set()
        if self._jobs is not None:
            self._jobs.cancel_scope.cancel()
        await self._stopped.wait()
        if power:
            self.booted = trio.current_time()

    def detach(self) -> None:
        """From now on the process has no effect on its disk."""

    async def cut_power(self, keep: float) -> None:
        await self.kill(power=True)


class MetaNode(SimNode):
    """The metaserver. ``parts`` while it runs."""

    @property
    def deadly(self) -> tuple[type[BaseException], ...]:
        # A start on a disk that fails.
        return (EngineFailed, OSError) if self.failing else (EngineFailed,)

    def __init__(self, world: World) -> None:
        super().__init__(world, META)
        self.parts: Parts | None = None
        self.boot = 1
        self._unsynced = Unsynced(world.directory)
        self.failing: dict[str, int] = {}
        self.files = SimFiles(self._unsynced)
        # The process ends at the so many-th step from now on; with the power of its host if there is a share of
        # unsynced sectors to keep. Drawn from numbers of its own.
        self.steps_left: int | None = None
        self.crash_keep: float | None = None
        self.cuts = 0
        self._crashing = False
        self._crashes = Random(f"{world.directory.name} metaserver")
        random = world.random
        self.options = Options(
            map_bytes=4 << 20,
            segment_bytes=random.choice((32 << 10, 256 << 10)),
            reserve_bytes=64 << 10,
            checkpoint_seconds=random.choice((0.5, 3.0, 10.0)),
            checkpoint_changes=random.choice((20, 20_000)),
            snapshot_seconds=random.choice((8.0, 3600.0)),
        )
        world.directory.mkdir(parents=True, exist_ok=True)

    def crash_soon(self) -> bool:
        """Perhaps: in the middle of what a full disk makes it do."""
        self._crashing = self._crashes.random() < CRASHES
        if self._crashing:
            self.steps_left = self._crashes.randint(1, CRASH_STEPS)
            self.crash_keep = self._crashes.choice((None, 0.0, 0.5))
        return self._crashing

    def end_crash(self) -> bool:
        """Whether there was one to come; it comes no more."""
        crashing, self._crashing, self.steps_left = self._crashing, False, None
        return crashing

    def _step(self, name: str) -> None:
        if self.steps_left is None or name.startswith("changelog:"):
            return
        self.steps_left -= 1
        if self.steps_left > 0:
            return
        self.steps_left = None
        self.world.trace.add(f"CRASH {self.name} at {name}, keeping {self.crash_keep}")
        self.world.trace.counts[f"metaserver crashes at {name}"] += 1
        self.detach()
        if self.crash_keep is not None:
            self.cuts += 1
        self.world.net.down(self.name, power=self.crash_keep is not None)
        raise Detached(name)

    def detach(self) -> None:
        self.files.alive = False

    def _lose_power(self, keep: float) -> None:
        lost = self._unsynced.cut_power(self.world.random, keep)
        self.boot += 1
        self.world.trace.add(f"POWER {self.name} lost {lost} sectors of its log and names")

    def _disk_delays(self) -> tuple[float, float]:
        before, after = super()._disk_delays()
        # What a start opens must reach its owner, who closes it.
        return (before, after) if self.parts is not None else (before, 0.0)

    async def main(self) -> None:
        world = self.world
        self.files = files = SimFiles(self._unsynced, self._step)
        self.files.failing = self.failing
        self.files.ignore_syncs = "meta-sync" in world.sabotage
        try:
            async with open_committer(
                world.directory,
                clock=self.wall_ns,
                run_sync=self.run_sync,
                files=self.files,
                options=self.options,
                boot_id=self.boot.to_bytes(16, "big"),
            ) as committer:
                parts = Parts(
                    committer,
                    world.config,
                    CLUSTER,
                    now_ns=self.wall_ns,
                    steady_ns=self.steady_ns,
                    random=Random(world.random.random()),
                )
                parts.load()
                self.parts = parts
                await committer.checkpoint()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(parts.aging.run)
                    world.net.listen(self.name, META_PORT, nursery, self._handle)
                    world.net.serve_requests(self.name, nursery)
                    await self.until_killed()
        finally:
            self.parts = None
            self.world.trace.counts["segments of the log used again"] += files.recycled
            if self.crash_keep is not None and not files.alive and not self._killed.is_set():
                self._lose_power(self.crash_keep)
                self.booted = trio.current_time()
                self.crash_keep = None

    async def _handle(self, end: End) -> None:
        parts = self.parts
        assert parts is not None
        client = parts.client()
        try:
            connection = await accept_handshake(
                end, client.dispatch, key=None, cluster_id=CLUSTER, role=meta_protocol.ROLE
            )
        except DfsError:
            return
        try:
            await connection.run()
        finally:
            client.lost(connection)

    async def cut_power(self, keep: float) -> None:
        self.cuts += 1
        await self.kill(power=True)
        self._lose_power(keep)

    def remove(self) -> None:
        self._unsynced.remove()
        shutil.rmtree(self.world.directory, ignore_errors=True)
        with suppress(OSError):  # others of this process are not done
            self.world.directory.parent.rmdir()


class SimMailbox(Mailbox):
    """Wakes a task instead of a thread."""

    def __init__(self) -> None:
        super().__init__()
        self.bell = trio.Event()

    def ring(self) -> None:
        super().ring()
        self.bell.set()


class SimReporter(Reporter):
    """The reporter in virtual time, over the simulated network."""

    def __init__(self, chunk: "ChunkNode", node: Node, mailbox: SimMailbox, meta: MetaNode) -> None:
        super().__init__(None, chunk.callbacks(node), node.outbox, mailbox, trio.current_time)  # type: ignore[arg-type]
        self._node = node
        self._box = mailbox
        self._chunk = chunk
        self._meta = meta

    async def ask(self, path: str, message: msgspec.Struct, reply: type[ReplyT]) -> ReplyT:
        message = over_the_wire(message)
        server = self._node.identity.server

        async def handle() -> Any:
            parts = self._meta.parts
            if parts is None:
                raise trio.ClosedResourceError
            if isinstance(message, Register):
                return over_the_wire(await parts.control.register(message))
            if isinstance(message, ReportPage):
                await parts.control.report(server, message)
                return meta_protocol.Json()
            assert isinstance(message, Heartbeat)
            answer = over_the_wire(await parts.control.heartbeat(server, message))
            self._chunk.world.trace.counts["orders"] += len(answer.orders)
            return answer

        answer: ReplyT = await self._chunk.world.net.request(self._chunk.name, META, handle)
        return answer

    async def join(self, reply: Registered) -> None:
        await self._node.registered(reply)

    async def pause(self, seconds: float) -> None:
        await trio.sleep(seconds)

    async def wait(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self._box.bell.wait()
        self._box.bell = trio.Event()


class Callbacks:
    """What a reporter asks of its node."""

    def __init__(self, node: Node, host: str) -> None:
        self._node = node
        self._host = host

    def registration(self) -> Register:
        return self._node.registration(host=self._host, port=CHUNK_PORT, http_port=1, rack="", labels=[])

    def registered(self, reply: Registered) -> None:
        raise NotImplementedError

    def listing(self) -> list[meta_protocol.ReplicaReport]:
        return self._node.listing()

    def orders(self, orders: list[meta_protocol.Order]) -> None:
        self._node.submit(orders)


class ChunkNode(SimNode):
    """A chunkserver; ``node`` while it runs."""

    @property
    def deadly(self) -> tuple[type[BaseException], ...]:
        # A start that cannot read its identity: with luck the next one can.
        return (EngineFailed, identities.DataDirectoryError) if self.storage.faults else (EngineFailed,)

    def __init__(self, world: World, number: int, meta: MetaNode, capacity: int = 4 << 30) -> None:
        super().__init__(world, f"cs{number}")
        self.number = number
        self.capacity = capacity
        self.storage = SimStorage(self.name, Random(world.random.random()), capacity)
        self.storage.ignore_syncs = "chunk-sync" in world.sabotage
        self.storage.on_unlink = lambda path: world.on_unlink(number, path)
        self.node: Node | None = None
        self._meta = meta
        self._disk: SimDisk | None = None
        # The process ends at the so many-th step from now on; with the power of its host if there is a share of
        # unsynced sectors to keep.
        self.steps_left: int | None = None
        self.crash_keep: float | None = None

    @property
    def serving(self) -> Running | None:
        """What runs once it has joined."""
        return None if self.node is None else self.node.running

    def detach(self) -> None:
        if self._disk is not None:
            self._disk.alive = False

    def _step(self, name: str) -> None:
        if self.steps_left is None:
            return
        self.steps_left -= 1
        if self.steps_left > 0:
            return
        self.steps_left = None
        self.world.trace.add(f"CRASH {self.name} at {name}, keeping {self.crash_keep}")
        self.detach()
        self.world.net.down(self.name)
        raise Detached(name)

    def callbacks(self, node: Node) -> Callbacks:
        return Callbacks(node, self.name)

    async def main(self) -> None:
        world = self.world
        self._disk = disk = SimDisk(self.storage, self._step)
        identity = identities.load(disk)
        if identity is None:
            identity = Identity(FORMAT, self.number, self.name, "")
            for path in chunk_directories():
                disk.make_directory(path)
            identities.save(disk, identity)
        try:
            async with trio.open_nursery() as nursery:
                self.node = node = Node(
                    disk,
                    identity,
                    None,
                    nursery,
                    reserve=lambda capacity: capacity // 100,
                    run_sync=self.run_sync,
                    clock=trio.current_time,
                    now_ns=self.wall_ns,
                    connect=world.net.connector(self.name),
                )
                node.incarnation = world.random.getrandbits(62) + 1
                node.mailbox = mailbox = SimMailbox()
                node.outbox = Outbox(mailbox.ring)
                if identity.cluster_id:
                    await node.begin()
                world.net.listen(self.name, CHUNK_PORT, nursery, node.accept)
                nursery.start_soon(SimReporter(self, node, mailbox, self._meta).work)
                await self.until_killed()
        finally:
            self.node = None
            if self.crash_keep is not None and not disk.alive and not self._killed.is_set():
                self.storage.cut_power(self.crash_keep)
                self.crash_keep = None

    async def cut_power(self, keep: float) -> None:
        await self.kill(power=True)
        self.storage.cut_power(keep)


class NoKernel:
    """Caches nothing, so that every question reaches the mount."""

    def forget_attributes(self, ino: int) -> None:
        pass

    def forget_contents(self, inos: Any) -> None:
        pass


class ClientNode(SimNode):
    """A host with a mount; ``vfs`` while it is mounted."""

    def __init__(self, world: World, number: int) -> None:
        super().__init__(world, f"c{number}")
        self.number = number
        self.vfs: Vfs | None = None
        self.meta: MetaClient | None = None
        self.mounted = trio.Event()
        self._waiting: Waiting | None = None
        self._operations: trio.Nursery | None = None

    async def main(self) -> None:
        try:
            while True:
                try:
                    await self._mount()
                except* DfsError as group:
                    self.world.trace.add(f"cannot mount: {group.exceptions[0]}")
                await trio.sleep(0.5)
        finally:
            self.vfs = self.meta = self._operations = None
            if self.mounted.is_set():
                self.mounted = trio.Event()

    async def _mount(self) -> None:
        world = self.world
        vfs: list[Vfs] = []
        hooks = Hooks(
            on_flush=lambda inos: vfs[0].flush_pushed(inos),
            on_changed=lambda inos: vfs[0].changed_pushed(inos),
            opened=lambda: vfs[0].opened() if vfs else [],
            on_new_session=lambda: vfs[0].new_session(),
            dirty_bytes=lambda: vfs[0].core.writer.dirty_bytes if vfs else 0,
        )
        identity = SessionIdentity(self.name, "/mnt", 1)
        async with trio.open_nursery() as nursery:
            meta = MetaClient(
                META, META_PORT, None, identity, hooks,
                connect=world.net.connector(self.name), clock_ns=self.steady_ns,
            )  # fmt: skip
            await meta.start(nursery)
            pool = Pool(nursery, None, meta.cluster_id, session=meta.session, connect=world.net.connector(self.name))
            writer = Writer(meta, pool, WriterOptions(self.name, 16 << 20, give_up_seconds=300.0, idle_seconds=10.0))
            reader = Reader(meta, pool, BlockCache(1 << 20))
            core = Core(Remote(meta, world.timeout), writer, reader, NoKernel(), VfsOptions(), self.run_sync)
            core.inodes.learn(meta.root, core.inodes.now()).lookups = 1
            vfs.append(Vfs(core, meta.root.ino))
            self._waiting = Waiting(world.timeout, first_trace=0)
            for task in (writer.run, reader.run, vfs[0].run, self._waiting.watch):
                nursery.start_soon(task)
            self.vfs, self.meta, self._operations = vfs[0], meta, nursery
            self.mounted.set()
            world.trace.add(f"MOUNTED session {meta.session}")
            await self.until_killed()

    async def do(self, kind: Kind, name: str, function: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        """One request of the kernel, in a task of this node. :class:`Gone` if the mount is killed meanwhile."""
        nursery, waiting = self._operations, self._waiting
        if nursery is None or waiting is None:
            raise Gone
        outcome: list[Any] = []
        done = trio.Event()

        async def carry_out() -> None:
            operation = waiting.begin(kind, name, next((word for word in arguments if isinstance(word, int)), 0))
            try:
                with operation.scope:
                    operation.work = function(*arguments)  # type: ignore[assignment]
                    outcome.append((True, await operation.work))
                    return
                outcome.append((False, TimeoutError(f"{name} was given up")))
            except DfsError as error:
                outcome.append((False, error))
            finally:
                waiting.end(operation)
                done.set()

        self.world.net.start_on(self.name, nursery, carry_out)
        await done.wait()
        if not outcome:
            raise Gone
        good, value = outcome[0]
        if not good:
            raise value
        return value


FILE_MODE = stat.S_IFREG | 0o644
DIRECTORY_MODE = stat.S_IFDIR | 0o755


def scratch() -> Path:
    """Where metaservers keep their files: in memory if there is such a place."""
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(os.environ.get("TMPDIR", "/tmp"))
    return base / f"dfs-simulation-{os.getpid()}"


__all__ = ["NODE", "ChunkNode", "ClientNode", "Gone", "MetaNode", "SimNode", "World", "partial", "scratch"]

"""One chunkserver, put together; how it is reached (sockets, HTTP, signals) is ``serve``'s matter.

Until the cluster is known (first start, before the first registration) there is no store, and every request is
answered with UNAVAILABLE.
"""

import itertools
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from uuid import UUID

import msgspec
import structlog
import trio

from chunkserver import identity as identities
from chunkserver import protocol, recovery
from chunkserver.client import Connect, Pool, connect
from chunkserver.compact import Compactor
from chunkserver.copy import Copier
from chunkserver.disk import Disk
from chunkserver.forward import Forwarder
from chunkserver.identity import Identity
from chunkserver.orders import Orders
from chunkserver.report import Mailbox, Outbox, Snapshot
from chunkserver.scrub import Scrubber, ScrubOptions
from chunkserver.service import Service
from chunkserver.store import Store
from chunkserver.table import RunSync, Table
from metaserver import wire
from metaserver.connection import Connection, Incoming, Result, accept_handshake
from metaserver.errors import DfsError, ErrorCode
from metaserver.key import ClusterKey
from metaserver.protocol import Order, Register, Registered, ReplicaReport
from metaserver.timings import Timing
from metaserver.transport import Transport

log = structlog.get_logger(__name__)

# How often free space is measured and deletions are made durable.
TICK_SECONDS = 0.5
# Adding up what is stored looks at every replica: 0.2 us each.
STORED_TICKS = 4
# How often it is looked whether the directory is still this server's.
DIRECTORY_SECONDS = 10.0
# Replicas that were not sealed are read back before the first report, if that takes no longer; the rest follows.
VERIFY_FIRST_SECONDS = 15.0
# What is passed on to a server that leaves pings unanswered for so long has failed. Longer than a mount's patience (it
# knows more servers and blames none unfairly), short enough that nothing piles up here.
PATIENCE_SECONDS = 3.0


class Running:
    """What exists once the cluster is known."""

    def __init__(self, node: "Node", cluster: UUID, table: Table, nursery: trio.Nursery) -> None:
        self.store = Store(table)
        self.pool = Pool(
            nursery,
            node.key,
            str(cluster),
            role=protocol.ROLE,
            session=node.identity.server,
            connect=node.connect,
            patience_seconds=PATIENCE_SECONDS,
        )
        self.service = Service(self.store, Forwarder(self.pool), lambda: node.identity)
        self.scrubber = Scrubber(self.store, node.incarnation, node.scrub_options)
        copier = Copier(self.store, self.pool)
        self.orders = Orders(
            self.store,
            copier,
            Compactor(self.store, self.pool, copier, node.identity.server),
            nursery,
            highest_epoch=lambda: node.identity.highest_epoch,
            raise_epoch=node.raise_epoch,
            on_result=node.outbox.result,
        )


class Node:
    """See the module. Everything runs in ``nursery``; :meth:`begin` at once if the directory knows its cluster."""

    def __init__(
        self,
        disk: Disk,
        identity: Identity,
        key: ClusterKey | None,
        nursery: trio.Nursery,
        *,
        reserve: Callable[[int], int],
        run_sync: RunSync = trio.to_thread.run_sync,
        clock: Callable[[], float] = time.monotonic,
        now_ns: Callable[[], int] = time.time_ns,
        connect: Connect = connect,
        scrub: ScrubOptions | None = None,
    ) -> None:
        self.scrub_options = scrub
        self.disk = disk
        self.identity = identity
        self.key = key
        self.connect = connect
        self.mailbox = Mailbox()
        self.outbox = Outbox(self.mailbox.ring)
        self.incarnation = secrets.randbits(63)
        self.running: Running | None = None
        self._nursery = nursery
        self._reserve = reserve
        self._run_sync = run_sync
        self._clock = clock
        self._now_ns = now_ns
        self._identity_lock = trio.Lock()
        self._verified = trio.Event()
        self._stored = 0

    # -- starting ----------------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Looks at what is on the disk and starts to serve it. The cluster must be known."""
        cluster = UUID(self.identity.cluster_id)
        found = await self._run_sync(lambda: list(recovery.scan(self.disk, cluster)))
        table = Table(
            self.disk,
            cluster,
            found,
            self._nursery,
            reserve_bytes=self._reserve(self.disk.space().capacity),
            on_change=lambda replica: self.outbox.changed(replica.report()),
            on_gone=self.outbox.gone,
            run_sync=self._run_sync,
            clock=self._clock,
            now_ns=self._now_ns,
        )
        self.running = Running(self, cluster, table, self._nursery)
        self._stored = table.stored_bytes()
        self._nursery.start_soon(self._verify, self.running.store)
        self._nursery.start_soon(self._tick)
        self._nursery.start_soon(self._watch_directory, self.disk.space().device)
        self._nursery.start_soon(self.running.scrubber.run)
        self._post_snapshot()
        log.info("found chunks", count=len(found), directory=self.disk.root)

    async def _verify(self, store: Store) -> None:
        await store.reads.verify_frozen()
        self._verified.set()

    async def verified_first(self) -> None:
        """Waits, not for ever, until what was not sealed before the restart has been read back."""
        with trio.move_on_after(VERIFY_FIRST_SECONDS):
            await self._verified.wait()

    async def _tick(self) -> None:
        assert self.running is not None
        table = self.running.store.table
        for tick in itertools.count(1):
            await trio.sleep(TICK_SECONDS)
            if tick % STORED_TICKS == 0:
                self._stored = table.stored_bytes()
            with suppress(OSError):  # a disk that cannot even say its size fails elsewhere, and more clearly
                table.measure_space()
            self._post_snapshot()
            await table.sync_directories()

    async def _watch_directory(self, device: str) -> None:
        """Says so when the directory is not this server's any more: what is in memory describes files that are gone.

        For good: what comes back may be an older state of it, or lack files, and only a start looks at all of it. The
        lock is on the directory that was there, too; on the new one a second process may be at work.
        """
        assert self.running is not None
        table, gone = self.running.store.table, False
        while True:
            await trio.sleep(DIRECTORY_SECONDS)
            text = await self._run_sync(self._find_loss, device)
            if text:
                gone = True
                table.disk_gone(text)
            elif gone:
                table.disk_gone(f"{self.disk.root} was gone for a while: restart this server, which looks at all of it")

    def _find_loss(self, device: str) -> str:
        with suppress(OSError):
            # Not the host's name before it, which may change while everything stays where it is.
            if self.disk.space().device.rpartition(":")[2] != device.rpartition(":")[2]:
                return f"{self.disk.root} was unmounted, or another file system was mounted there"
        return identities.lost(self.disk, self.identity)

    def _post_snapshot(self) -> None:
        assert self.running is not None
        table = self.running.store.table
        self.mailbox.post(
            Snapshot(
                self._clock(),
                table.capacity,
                table.free,
                len(table),
                table.disk_state,
                table.bytes_read,
                table.bytes_written,
                self._stored,
                table.spare,
                self.running.scrubber.status(),
                table.disk_error,
            )
        )

    # -- data plane --------------------------------------------------------------------------------------------

    async def accept(self, transport: Transport) -> None:
        """Serves one connection until it ends; what goes wrong with it is logged, never raised."""
        try:
            connection = await accept_handshake(
                transport, self._dispatch, key=self.key, cluster_id=self.identity.cluster_id, role=protocol.ROLE,
                timing_of=self._timing_of,
            )  # fmt: skip
        except DfsError as error:
            log.info("refused a connection", peer=transport.name, reason=str(error))
            return
        await connection.run()

    def _timing_of(self, method: int) -> Timing | None:
        return None if self.running is None else self.running.service.timings.get(method)

    def _dispatch(self, connection: Connection, incoming: Incoming) -> Result:
        if self.running is None:
            raise DfsError(ErrorCode.UNAVAILABLE, "this server has not joined its cluster yet")
        return self.running.service.dispatch(connection, incoming)

    # -- control plane -----------------------------------------------------------------------------------------

    def registration(self, *, host: str, port: int, http_port: int, rack: str, labels: list[str]) -> Register:
        table = self.running.store.table if self.running else None
        try:
            space = self.disk.space()
        except OSError as error:
            raise DfsError(ErrorCode.DISK_FAILED, f"cannot look at {self.disk.root}: {error.strerror}") from None
        highest_chunk = max(self.identity.highest_chunk, table.highest_chunk if table else 0)
        return Register(
            server=self.identity.server,
            name=self.identity.name,
            cluster_id=self.identity.cluster_id,
            incarnation=self.incarnation,
            host=host,
            port=port,
            http_port=http_port,
            rack=rack,
            labels=labels,
            data_path=self.disk.root,
            capacity=space.capacity,
            free=table.free if table else max(0, space.free - self._reserve(space.capacity)),
            highest_epoch=self.identity.highest_epoch,
            highest_chunk=highest_chunk,
            version=wire.PROTOCOL_VERSION,
            device=space.device,
        )

    async def registered(self, reply: Registered) -> None:
        """Joins the cluster on the first start; afterwards makes sure that it is still the same one."""
        known = self.identity.cluster_id
        if known and known != reply.cluster_id:
            text = f"the data in {self.disk.root} belongs to cluster {known}, the metaserver to {reply.cluster_id}"
            raise DfsError(ErrorCode.WRONG_CLUSTER, text)
        if not known:
            try:
                cluster = str(UUID(reply.cluster_id))
            except ValueError:
                raise DfsError(ErrorCode.PROTOCOL, f"{reply.cluster_id!r} is not a cluster id") from None
            async with self._identity_lock:
                await self._save(msgspec.structs.replace(self.identity, cluster_id=cluster))
            await self.begin()
        await self.raise_epoch(reply.epoch)
        await self.verified_first()

    async def raise_epoch(self, epoch: int) -> None:
        """Returns when it is remembered durably that the metaserver has lived so far."""
        async with self._identity_lock:
            if epoch > self.identity.highest_epoch:
                await self._save(msgspec.structs.replace(self.identity, highest_epoch=epoch))

    async def _save(self, identity: Identity) -> None:
        """Makes ``identity`` the server's, durably first."""
        if self.running is not None:
            identity.highest_chunk = max(identity.highest_chunk, self.running.store.table.highest_chunk)
        try:
            await self._run_sync(self._save_file, identity)
        except OSError as error:
            raise DfsError(ErrorCode.DISK_FAILED, f"cannot write {identities.FILE}: {error.strerror}") from None
        self.identity = identity

    def _save_file(self, identity: Identity) -> None:
        """Not into a directory that has come to be where this server's was: it would pass for it at the next start."""
        text = identities.lost(self.disk, identity)
        if text:
            raise DfsError(ErrorCode.DISK_FAILED, text)
        identities.save(self.disk, identity)

    def listing(self) -> list[ReplicaReport]:
        """All replicas that count; what is in the outbox about chunks is said by this and forgotten."""
        if self.running is None:
            return []
        self.outbox.forget_chunks()
        return [replica.report() for replica in self.running.store.table.replicas()]

    def submit(self, orders: list[Order]) -> None:
        if self.running is not None:
            self.running.orders.submit(orders)

    # -- ending ------------------------------------------------------------------------------------------------

    async def drain(self, seconds: float) -> None:
        """Refuses new appends and waits until what is under way is answered, at most so long."""
        if self.running is not None:
            with trio.move_on_after(seconds):
                await self.running.service.drain()

"""The parts of a running metaserver, put together over a storage engine. No sockets here: tests use it as it is."""

import time
from collections.abc import Callable
from random import Random

from metaserver import chunks, inodes
from metaserver.admin import Admin
from metaserver.aging import Aging
from metaserver.balancing import Balancer
from metaserver.changes import Changes
from metaserver.cleaner import Cleaner
from metaserver.clock import LivedClock
from metaserver.commit import Committer
from metaserver.config import Config
from metaserver.control import Control
from metaserver.draining import Draining
from metaserver.flushing import Flushing
from metaserver.garbage import GarbageReader
from metaserver.history import History, Seen
from metaserver.listing import Listing
from metaserver.losses import Losses
from metaserver.members import Members
from metaserver.planning import Group
from metaserver.protocol import ROOT_INO
from metaserver.quotas import Quotas
from metaserver.repair import Repair
from metaserver.resume import Resuming
from metaserver.schema import (
    ALL_COUNTED,
    KEPT_CHUNKS,
    Server,
    Table,
    Task,
    TaskKind,
    Total,
    Transaction,
    inode_key,
    read_u64,
    totals_key,
)
from metaserver.service import Client, Service
from metaserver.sessions import Sessions
from metaserver.space import LEAST_LIMIT
from metaserver.status import StatusReader
from metaserver.tasks import Tasks
from metaserver.trashing import Trash
from metaserver.treecontrol import TreeControl


class Parts:
    """Made once per epoch; :meth:`load` then takes up what earlier epochs left. ``steady_ns``: see ``clock.steady_ns``;
    ``now_ns`` if that clock is never set."""

    def __init__(
        self,
        committer: Committer,
        config: Config,
        cluster_id: str,
        *,
        now_ns: Callable[[], int] = time.time_ns,
        steady_ns: Callable[[], int] | None = None,
        random: Random | None = None,
    ) -> None:
        self.committer = committer
        self.cluster_id = cluster_id
        self.clock = clock = LivedClock()
        self.sessions = sessions = Sessions()
        committer.on_failure = lambda: sessions.cut_off("the metaserver cannot go on")
        self.members = members = Members(config.heartbeat_seconds, config.lost_after_seconds, random or Random())
        self.repair = repair = Repair(committer, config, members, clock, sessions.retire)
        self.cleaner = cleaner = Cleaner(committer, config, members, repair, clock, now_ns)
        repair.noted, repair.compacted = cleaner.note, cleaner.result
        self.tasks = tasks = Tasks(committer, config, members)
        self.trash = trash = Trash(committer, config, members, clock, now_ns)
        self.quotas = quotas = Quotas(committer.layers.get)
        committer.accounts = quotas
        sessions.removed = quotas.ended
        self.trees = TreeControl(committer, quotas, now_ns, sessions.tell_quotas_changed)
        self.changes = changes = Changes(
            committer, config, clock, sessions, members, repair, tasks, trash, quotas, steady_ns or now_ns
        )
        trash.carry_out = changes.carry_out
        tasks.carry_out, tasks.sealed, tasks.removed = changes.carry_out, repair.sealed, repair.removed
        self.flushing = flushing = Flushing(sessions)
        self.resuming = resuming = Resuming(
            committer, config, cluster_id, sessions, changes, flushing, tasks, clock, now_ns
        )
        self.service = service = Service(
            committer,
            config,
            clock,
            sessions,
            members,
            changes,
            flushing,
            resuming,
            repair,
            tasks,
            trash,
            quotas,
            now_ns,
        )
        self.control = Control(committer, config, cluster_id, clock, members, repair, changes, resuming.window, service)
        balancer = Balancer(committer, config, clock, members, repair)
        self.status = StatusReader(
            committer, config, cluster_id, clock, sessions, members, repair, tasks, changes, service, cleaner, balancer,
            trash,
        )  # fmt: skip
        drains = Draining(committer, clock, members, repair, changes, sessions)
        losses = Losses(committer, members)
        self.admin = Admin(committer, config, changes, tasks, drains, balancer, losses, resuming.window, self.trees)
        self.garbage = GarbageReader(committer, repair, cleaner)
        self.listing = Listing(committer, members, config.copies)
        service.set_copies, service.status_text = self.admin.set_copies, self.status.text
        self.history = History(self.seen, now_ns)
        chores = (balancer.tick, drains.ask_writers, self.trees.recount)
        self.aging = Aging(config, clock, sessions, members, changes, resuming, tasks, repair, cleaner, trash, chores)

    def load(self) -> None:
        """Makes the root of a new cluster; takes up servers, open chunks, tasks, sessions and orphans."""
        # The engine has just written a checkpoint: the totals are exact.
        totals, _ = self.committer.read(0, lambda tx: tx.get(Table.TOTALS, totals_key(Table.INODES)))
        known = 0 if totals is None else Total.unpack(totals).count
        self.changes.inodes = known + self.committer.change(0, 0, _ensure_root).message
        rows, _ = self.committer.read(0, lambda tx: list(tx.scan(Table.SERVERS, b"", b"\xff" * 5)))
        for key, value in rows:
            self.members.load(int.from_bytes(key, "big"), Server.unpack(value), self.clock.seconds)
        (open_chunks, orphans), _ = self.committer.read(0, _open_chunks_and_orphans)
        for chunk, owner, servers, length in open_chunks:
            # Its limit is not known any more; reserving a whole chunk's would leave nothing to others on small disks.
            self.members.opened(chunk, owner, servers, length, length + LEAST_LIMIT)
        self.sessions.orphans.update(orphans)
        self.trees.load()
        kept, _ = self.committer.read(0, lambda tx: tx.get(Table.COUNTERS, KEPT_CHUNKS))
        self.repair.kept_below = 0 if kept is None else read_u64(kept)
        self.cleaner.load()
        self.resuming.load(self.tasks.load())

    def seen(self) -> Seen:
        """What the status page remembers the last hour of."""
        members = self.members.by_id
        return Seen(
            self.status.servers(),
            self.status.sessions(),
            sum(self.service.counts.values()),
            {server: member.read_bytes for server, member in members.items()},
            {server: member.written_bytes for server, member in members.items()},
            self.repair.waiting(Group.COPIES),
            self.changes.refusing,
            self.committer.is_full,
        )

    def client(self) -> Client:
        """For one more connection."""
        return Client(self.service)


def _ensure_root(tx: Transaction, now_ns: int) -> bool:
    """Whether there was none. What an older store has is to be counted."""
    missing = tx.get(Table.INODES, inode_key(ROOT_INO)) is None
    if missing:
        inodes.make_root(tx, now_ns)
    elif tx.get(Table.COUNTERS, ALL_COUNTED) is None and not _counting(tx):
        inodes.add_task(tx, TaskKind.COUNT_TREES, ROOT_INO, inodes.Effects())
    return missing


def _counting(tx: Transaction) -> bool:
    return any(Task.unpack(row).kind is TaskKind.COUNT_TREES for _, row in tx.scan(Table.TASKS, b"", b"\xff" * 9))


def _open_chunks_and_orphans(tx: Transaction) -> tuple[list[tuple[int, int, list[int], int]], list[int]]:
    found = []
    for chunk, owner in chunks.owned(tx):
        row = chunks.find(tx, chunk)
        length = 0 if row is None else row.length
        found.append((chunk, owner, [server for server, _ in chunks.replicas(tx, chunk)], length))
    orphans = [int.from_bytes(key[:8], "big") for key, _ in tx.scan(Table.ORPHANS, b"", b"\xff" * 17)]
    return found, orphans

"""What befalls a cluster, by chance: one trouble after another, some of them at the same time."""

import errno
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio
from simcluster import FULL, HARD, Cluster
from siminspect import is_whole, may_lose
from simnodes import META, SimNode

from chunkserver.chunkfile import chunk_path
from metaserver.commit import EngineFailed
from metaserver.errors import DfsError
from metaserver.overlay import row_key
from metaserver.protocol import ChunkState
from metaserver.schema import TIME, Table
from metaserver.store import StoreFull

# What fills a segment of 32 KiB in half a second.
LOG_CHANGES, LOG_SECONDS = 20, 0.05

Fault = Callable[[Cluster], Awaitable[None]]


async def kill_something(cluster: Cluster) -> None:
    """kill -9 of one program, and its restart."""
    node = cluster.pick_any()
    await _while(cluster, f"{node.name} killed", cluster.kill(node), cluster.restart(node))


async def cut_one(cluster: Cluster) -> None:
    """A host loses its power."""
    node = cluster.pick_any()
    keep = cluster.random.choice((0.0, 0.5, 0.9))
    await _while(cluster, f"{node.name} without power", cluster.cut_power(node, keep), cluster.restart(node))


async def cut_all(cluster: Cluster) -> None:
    """All hosts lose their power."""
    keep = cluster.random.choice((0.0, 0.5, 0.9))
    clients = cluster.random.random() < 0.5
    nodes: list[SimNode] = [cluster.meta, *cluster.chunks, *(cluster.clients if clients else ())]

    async def cut() -> None:
        for node in nodes:
            await cluster.cut_power(node, keep)

    async def restart() -> None:
        cluster.random.shuffle(nodes)
        for node in nodes:
            await cluster.restart(node)
            await trio.sleep(cluster.random.random())

    await _while(cluster, "all without power", cut(), restart())


async def freeze_one(cluster: Cluster) -> None:
    """SIGSTOP, SIGCONT."""
    node = cluster.pick_any()
    await _while(cluster, f"{node.name} frozen", _now(lambda: cluster.freeze(node)), _now(lambda: cluster.thaw(node)))


async def partition(cluster: Cluster) -> None:
    """Some nodes cannot reach others, one way or both."""
    random = cluster.random
    names = [node.name for node in cluster.nodes]
    group = [cluster.victim.name] if cluster.plan.minor else random.sample(names, random.randint(1, len(names) // 2))
    others = [name for name in names if name not in group]
    pairs = [(a, b) for a in group for b in others]
    way = random.choice((1, 2, 3))
    pairs = [*(pairs if way & 1 else ()), *([(b, a) for a, b in pairs] if way & 2 else ())]

    def cut() -> None:
        cluster.trace.add(f"PARTITION {group} {'?><='[way]}")
        for source, to in pairs:
            cluster.net.partition(source, to)

    def heal() -> None:
        cluster.trace.add("PARTITION healed")
        for source, to in pairs:
            cluster.net.heal(source, to)

    await _while(cluster, f"partition {group}", _now(cut), _now(heal))


async def delay(cluster: Cluster) -> None:
    """A node is far away for a while."""
    node = cluster.pick_any()
    seconds = cluster.random.choice((0.05, 0.5))

    def begin() -> None:
        cluster.trace.add(f"DELAY {node.name} {seconds}")
        for other in cluster.nodes:
            cluster.net.delays[node.name, other.name] = cluster.net.delays[other.name, node.name] = seconds

    await _while(cluster, f"{node.name} far", _now(begin), _now(cluster.net.delays.clear))


async def slow_disk(cluster: Cluster) -> None:
    node: SimNode = cluster.pick() if cluster.plan.minor else cluster.random.choice([cluster.meta, *cluster.chunks])
    seconds = cluster.random.choice((0.05, 0.5))

    def begin() -> None:
        cluster.trace.add(f"SLOW DISK {node.name} {seconds}")
        cluster.world.slow_disk[node.name] = seconds

    await _while(cluster, f"{node.name} slow", _now(begin), _now(lambda: cluster.world.slow_disk.pop(node.name, None)))


async def resets(cluster: Cluster) -> None:
    """Connections break."""
    for end in list(cluster.net.ends):
        if cluster.random.random() < 0.3 and not end.closed:
            cluster.trace.add(f"RESET {end.node} {end.other.node}")
            cluster.net.reset(end)
    await _while(cluster, "resets", _now(lambda: None), _now(lambda: None))


async def lost_requests(cluster: Cluster) -> None:
    """Heartbeats and their answers get lost."""

    def begin() -> None:
        cluster.net.lost_requests = 0.3

    def end() -> None:
        cluster.net.lost_requests = 0.0

    await _while(cluster, "lost requests", _now(begin), _now(end))


async def disk_errors(cluster: Cluster) -> None:
    """One chunkserver's disk fails now and then."""
    node = cluster.pick()
    call = cluster.random.choice(("write", "sync", "read", "truncate"))

    def begin() -> None:
        cluster.trace.add(f"EIO {node.name} {call}")
        node.storage.faults[call] = 0.3

    await _while(cluster, f"{node.name} EIO", _now(begin), _now(node.storage.faults.clear))


async def disk_full(cluster: Cluster) -> None:
    """The disk of one chunkserver, or of all, has no room any more."""
    nodes = list(cluster.chunks) if cluster.random.random() < 0.5 else [cluster.pick()]
    room = cluster.random.choice((0, 10_000, 200_000))

    def begin() -> None:
        cluster.trace.add(f"FULL {[node.name for node in nodes]} but for {room}")
        for node in nodes:
            node.storage.capacity = node.storage.used() + room

    def end() -> None:
        for node in nodes:
            node.storage.capacity = node.capacity

    await _while(cluster, "disks full", _now(begin), _now(end), FULL)


async def meta_full(cluster: Cluster) -> None:
    """The disk of the metaserver has no room any more."""

    def begin() -> None:
        cluster.trace.add("FULL meta")
        cluster.meta.failing["create"] = errno.ENOSPC
        if cluster.meta.crash_soon():
            cluster.note_trouble(crash)

    def end() -> None:
        cluster.meta.failing.clear()
        if cluster.meta.end_crash():
            cluster.end_trouble(crash)

    crash = "metaserver ends at a step"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_fill_log, cluster)
        await _while(cluster, "metaserver's disk full", _now(begin), _now(end), FULL)
        nursery.cancel_scope.cancel()


async def _fill_log(cluster: Cluster) -> None:
    """Changes that go on while the disk is full, so many that segments of the log are used again."""

    async def change() -> None:
        parts = cluster.meta.parts
        assert parts is not None
        committer = parts.committer
        key, row = row_key(Table.COUNTERS, TIME)[1:], committer.read(0, lambda tx: tx.get(Table.COUNTERS, TIME))[0]
        if row is not None:
            with suppress(DfsError, EngineFailed):
                for _ in range(LOG_CHANGES):
                    committer.change(0, 0, lambda tx, _: tx.put(Table.COUNTERS, key, row), frees=True)

    while True:
        await trio.sleep(LOG_SECONDS)
        nursery = cluster.net.nursery_of(META)
        if nursery is not None and cluster.meta.parts is not None:
            cluster.net.start_on(META, nursery, change)


async def meta_errors(cluster: Cluster) -> None:
    """The disk of the metaserver fails once: the process ends, and is started again."""
    call = cluster.random.choice(("append", "sync", "create"))

    def begin() -> None:
        cluster.trace.add(f"EIO meta {call}")
        cluster.meta.failing[call] = errno.EIO

    await _while(cluster, "metaserver's disk failing", _now(begin), _now(cluster.meta.failing.clear))


async def bit_rot(cluster: Cluster) -> None:
    """A bit of one replica flips, of which there is another."""
    node = cluster.pick()
    candidates = [
        chunk
        for chunk, (row, replicas) in cluster.chunk_rows().items()
        if row.state == ChunkState.SEALED and row.length and node.number in replicas and is_whole(node, chunk, row)
    ]
    if not candidates:
        return
    chunk = cluster.random.choice(candidates)
    if may_lose(cluster, node, only=chunk):
        at = node.storage.rot(chunk_path(chunk), cluster.random)
        cluster.trace.add(f"ROT of chunk {chunk:x} on {node.name} at {at}")
        cluster.trace.counts["bits flipped"] += 1


async def lose_server(cluster: Cluster) -> None:
    """A chunkserver is gone with its disk; a new one comes."""
    # Others may have been lost a moment ago, and nobody has come for them yet.
    if cluster.plan.minor or len(cluster.chunks) < 2:
        return
    node = cluster.pick()
    if not node.running or not may_lose(cluster, node):
        return
    what = f"{node.name} lost"
    cluster.note_trouble(what)
    cluster.trace.counts["servers lost"] += 1
    await cluster.lose(node)
    await trio.sleep(cluster.random.random() * 5.0)
    await cluster.join()
    cluster.end_trouble(what)


async def crash_at_step(cluster: Cluster) -> None:
    """A chunkserver's process ends in the middle of something, perhaps with its host's power."""
    node = cluster.pick()
    node.crash_keep = cluster.random.choice((None, 0.0, 0.5))
    node.steps_left = cluster.random.randint(1, 12)
    what = f"{node.name} ends at a step"
    cluster.note_trouble(what)
    await trio.sleep(cluster.random.random() * 4.0)
    node.steps_left = None
    cluster.end_trouble(what)


async def clock_jump(cluster: Cluster) -> None:
    """Somebody sets the time of a host."""
    node = cluster.random.choice(cluster.nodes)
    seconds = cluster.random.choice((-3600, -5, 5, 3600))
    cluster.trace.add(f"TIME of {node.name} {seconds:+}")
    node.offset_ns += seconds * 10**9


async def administer(cluster: Cluster) -> None:
    """What an operator does: drain, rebalance, set-copies, scrub, snapshot, check."""
    parts = cluster.meta.parts
    if parts is None:
        return
    random = cluster.random
    admin, server = parts.admin, random.choice(cluster.chunks)
    files = list(cluster.model.by_ino)
    do: Callable[[], Awaitable[object]] = random.choice(
        (
            lambda: admin.drains.drain(str(server.number), force=False),
            lambda: admin.drains.undrain(str(server.number)),
            lambda: admin.set_copies(random.choice([1, *files]), random.choice((0, 1, 2, 3))),
            lambda: _now(lambda: admin.rebalance(stop=False)),
            lambda: _now(lambda: server.node and server.node.running and server.node.running.scrubber.ask()),
            parts.committer.snapshot,
            parts.committer.check,
        )
    )
    done = trio.Event()

    async def carry_out() -> None:
        try:
            await do()
        except (DfsError, EngineFailed, StoreFull) as error:
            cluster.trace.add(f"ADMIN {error}")
        finally:
            done.set()

    nursery = cluster.net.nursery_of(META)
    if nursery is not None:
        cluster.net.start_on(META, nursery, carry_out)
        with trio.move_on_after(5.0):
            await done.wait()


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        kill_something, cut_one, cut_all, freeze_one, partition, delay, slow_disk, resets, lost_requests, disk_errors,
        disk_full, meta_full, meta_errors, bit_rot, lose_server, crash_at_step, clock_jump, administer,
    )
}  # fmt: skip
# What can befall one chunkserver.
MINOR_FAULTS = (
    "kill_something", "cut_one", "freeze_one", "partition", "delay", "slow_disk", "disk_errors", "bit_rot",
    "crash_at_step", "clock_jump",
)  # fmt: skip


async def _now(function: Callable[[], object]) -> None:
    function()


async def _while(
    cluster: Cluster, what: str, begin: Awaitable[None], end: Awaitable[None], severity: int = HARD
) -> None:
    """Trouble for some time."""
    cluster.note_trouble(what, severity)
    await begin
    await trio.sleep(cluster.random.choice((0.1, 1.0, 5.0, 20.0)) * cluster.random.random())
    await end
    cluster.end_trouble(what)


async def befall(cluster: Cluster, names: list[str], seconds: float) -> None:
    """Troubles of these kinds until the time is over; returns when the last has ended."""
    until = trio.current_time() + seconds
    async with trio.open_nursery() as nursery:
        while names and trio.current_time() < until:
            await trio.sleep(cluster.random.choice((0.2, 1.0, 4.0)) * cluster.random.random())
            fault = FAULTS[cluster.random.choice(names)]
            if cluster.random.random() < 0.3 and not cluster.plan.minor:
                nursery.start_soon(fault, cluster)
            else:
                await fault(cluster)
        await trio.sleep(max(0.0, until - trio.current_time()))

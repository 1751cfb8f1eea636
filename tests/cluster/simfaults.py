"""What befalls a cluster, by chance: one trouble after another, some of them at the same time."""

from collections.abc import Awaitable, Callable

import trio
from simcluster import Cluster
from simnodes import SimNode

Fault = Callable[[Cluster], Awaitable[None]]


async def kill_something(cluster: Cluster) -> None:
    """kill -9 of one program, and its restart."""
    node = cluster.random.choice(cluster.nodes)
    await _while(cluster, f"{node.name} killed", cluster.kill(node), cluster.restart(node))


async def cut_one(cluster: Cluster) -> None:
    """A host loses its power."""
    node = cluster.random.choice(cluster.nodes)
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
    node = cluster.random.choice(cluster.nodes)
    await _while(cluster, f"{node.name} frozen", _now(lambda: cluster.freeze(node)), _now(lambda: cluster.thaw(node)))


async def partition(cluster: Cluster) -> None:
    """Some nodes cannot reach others, one way or both."""
    random = cluster.random
    names = [node.name for node in cluster.nodes]
    group = random.sample(names, random.randint(1, len(names) // 2))
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
    node = cluster.random.choice(cluster.nodes)
    seconds = cluster.random.choice((0.05, 0.5))

    def begin() -> None:
        cluster.trace.add(f"DELAY {node.name} {seconds}")
        for other in cluster.nodes:
            cluster.net.delays[node.name, other.name] = cluster.net.delays[other.name, node.name] = seconds

    await _while(cluster, f"{node.name} far", _now(begin), _now(cluster.net.delays.clear))


async def slow_disk(cluster: Cluster) -> None:
    node = cluster.random.choice([cluster.meta, *cluster.chunks])
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
    node = cluster.random.choice(cluster.chunks)
    call = cluster.random.choice(("write", "sync", "read", "truncate"))

    def begin() -> None:
        cluster.trace.add(f"EIO {node.name} {call}")
        node.storage.faults[call] = 0.3

    await _while(cluster, f"{node.name} EIO", _now(begin), _now(node.storage.faults.clear))


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        kill_something, cut_one, cut_all, freeze_one, partition, delay, slow_disk, resets, lost_requests, disk_errors,
    )
}  # fmt: skip


async def _now(function: Callable[[], object]) -> None:
    function()


async def _while(cluster: Cluster, what: str, begin: Awaitable[None], end: Awaitable[None]) -> None:
    """Trouble for some time."""
    cluster.note_trouble(what)
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
            if cluster.random.random() < 0.3:
                nursery.start_soon(fault, cluster)
            else:
                await fault(cluster)
        await trio.sleep(max(0.0, until - trio.current_time()))

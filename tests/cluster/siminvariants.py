"""What must hold when everything is healed and has come to rest."""

from uuid import UUID

import trio
from simcluster import STALL_SECONDS, Cluster
from simdisk import SimDisk
from siminspect import disk_of
from simmodel import FileModel
from simnodes import CLUSTER, ChunkNode
from simtrace import Violation

from chunkserver import check as chunk_check
from chunkserver import recovery
from chunkserver.chunkfile import PAYLOAD_OFFSET, chunk_path
from metaserver.protocol import ChunkState, ReplicaState
from metaserver.schema import Chunk, ExtentRow, Replica, Table, read_u64

# Until everything is copied, deleted and sealed again once all is healed.
REST_SECONDS = 120.0

Rows = dict[int, tuple[Chunk, dict[int, Replica]]]


async def check_at_rest(cluster: Cluster) -> None:
    """Everything that a healthy cluster promises; what does not hold goes into the trace."""
    trace = cluster.trace
    if cluster.plan.minor:
        for program in cluster.programs:
            if program.longest > STALL_SECONDS:
                trace.violation(f"{program.name} had to wait for {program.longest:.1f} s")
    await _guarded(cluster, _finish_programs)
    if trace.violations:
        return
    await cluster.until(lambda: not unrest(cluster), REST_SECONDS, "everything is at rest")
    # What was sealed since the last look may have rotted before that.
    await cluster.scrub()
    await cluster.until(lambda: not unrest(cluster), REST_SECONDS, "everything is at rest after scrubbing")
    if trace.violations:
        trace.add("unrest: " + "; ".join(unrest(cluster)))
        return
    await _guarded(cluster, _check_metaserver)
    await _guarded(cluster, _check_disks)
    await _guarded(cluster, _check_replicas)
    await _guarded(cluster, _check_from_elsewhere)


async def _guarded(cluster: Cluster, check: object) -> None:
    try:
        await check(cluster)  # type: ignore[operator]
    except Violation as error:
        cluster.trace.violation(str(error))


async def _finish_programs(cluster: Cluster) -> None:
    async with trio.open_nursery() as nursery:

        async def finish(program: object) -> None:
            try:
                await program.stop()  # type: ignore[attr-defined]
                await program.finish()  # type: ignore[attr-defined]
            except Exception as error:
                cluster.trace.violation(f"{program.name} cannot finish: {error!r}")  # type: ignore[attr-defined]

        for program in cluster.programs:
            nursery.start_soon(finish, program)


def unrest(cluster: Cluster) -> list[str]:
    """What still has to happen."""
    parts = cluster.meta.parts
    if parts is None:
        return ["no metaserver"]
    found = []
    up = [server for server, member in parts.members.by_id.items() if member.up]
    for each in cluster.chunks:
        running = each.node.running if each.node is not None else None
        scrub = running.scrubber.report() if running is not None else None
        if scrub is None or scrub.running or scrub.asked > scrub.completed:
            found.append(f"{each.name} scrubs")
    if len(up) < len(cluster.chunks):
        found.append(f"up: {up}")
    if len(parts.repair):
        found.append(f"{len(parts.repair)} orders")
    if len(parts.tasks):
        found.append(f"{len(parts.tasks)} tasks")
    live = {client.meta.session for client in cluster.clients if client.meta is not None}
    gone = set(parts.sessions.by_id) - live
    if gone:
        found.append(f"sessions {sorted(gone)}")
    taking = {server for server in up if parts.members.by_id[server].works}
    rows = cluster.chunk_rows()
    for chunk, (row, replicas) in rows.items():
        states = {
            server: ReplicaState(replica.state).name
            for server, replica in replicas.items()
            if server not in cluster.lost_servers
        }
        if row.state == ChunkState.DEAD and states:
            found.append(f"chunk {chunk:x} is dead: {states}")
        elif row.state == ChunkState.SEALED and (missed := _unsettled(states, row.copies, taking)):
            found.append(f"chunk {chunk:x} {missed}")
        found += [f"chunk {chunk:x} is not sealed on cs{at}" for at in states if _unsealed(cluster, chunk, at)]
    return found or unwanted(cluster, rows)


def _unsealed(cluster: Cluster, chunk: int, server: int) -> bool:
    """Whether a replica that may still hold anything is to be sealed, which reads it back."""
    assert cluster.meta.parts is not None
    member = cluster.meta.parts.members.by_id.get(server)
    return member is not None and chunk in member.unsealed


def _unsettled(states: dict[int, str], copies: int, taking: set[int]) -> str:
    """What is not right with the replicas of a sealed chunk, if copies can be made on the servers ``taking`` only: what
    is on others, which are being drained, stays as long as there are not enough of them, and goes then."""
    wanted = min(copies, len(taking))
    good = {server for server, state in states.items() if state == "GOOD"}
    left = set(states) - taking
    if len(good & taking) == wanted == len(states) - len(left) and (not left or (wanted < copies and left <= good)):
        return ""
    return f"has {states}, {wanted} wanted on {sorted(taking)}"


def unwanted(cluster: Cluster, rows: Rows) -> list[str]:
    """Files on disks without a row."""
    found = []
    for chunk in cluster.chunks:
        for path, directory in chunk.storage.directories.items():
            for name in directory.names if path.startswith("chunks/") else ():
                number = int(name.split(".")[0], 16)
                if chunk.number not in rows.get(number, (None, {}))[1]:
                    found.append(f"{chunk.name} keeps {path}/{name}")
    return found


async def _check_metaserver(cluster: Cluster) -> None:
    parts = cluster.meta.parts
    assert parts is not None
    report = await parts.committer.check()
    for problem in report.problems:
        cluster.trace.violation(f"metaserver check: {problem.table} {problem.key}: {problem.text}")


async def _check_disks(cluster: Cluster) -> None:
    """Each file on a disk is whole."""
    for chunk in cluster.chunks:
        report = chunk_check.check_disk(disk_of(chunk), power_cut=True)
        for problem in report.problems:
            cluster.trace.violation(f"{chunk.name} check: {problem.key}: {problem.text}")


async def _check_replicas(cluster: Cluster) -> None:
    """Each good replica has the right bytes of each file."""
    rows = cluster.chunk_rows()
    extents = _extents(cluster)
    by_number = {chunk.number: chunk for chunk in cluster.chunks}
    for program in cluster.programs:
        for path, place in program.tree.now.items():
            if place.file is None:
                continue
            where = f"{program.name}/{path}"
            mine = extents.get(place.file.ino, [])
            _check_cover(cluster, where, place.file, mine)
            for offset, extent in mine:
                for server, replica in rows[extent.chunk][1].items():
                    if replica.state == ReplicaState.GOOD and server not in cluster.lost_servers:
                        _check_extent(cluster, where, place.file, offset, extent, by_number[server])


def _extents(cluster: Cluster) -> dict[int, list[tuple[int, ExtentRow]]]:
    parts = cluster.meta.parts
    assert parts is not None
    found: dict[int, list[tuple[int, ExtentRow]]] = {}
    rows, _ = parts.committer.read(0, lambda tx: list(tx.scan(Table.EXTENTS, b"", b"\xff" * 17)))
    for key, value in rows:
        found.setdefault(read_u64(key), []).append((read_u64(key, 8), ExtentRow.unpack(value)))
    return found


def _check_cover(cluster: Cluster, where: str, file: FileModel, extents: list[tuple[int, ExtentRow]]) -> None:
    """What has no extent must be zeros."""
    at = 0
    for offset, extent in [*extents, (len(file.newest), None)]:
        if file.newest[at:offset].strip(b"\0"):
            cluster.trace.violation(f"{where}: bytes {at} to {offset} have no extent")
        at = offset + (extent.length if extent is not None else 0)


def _check_extent(
    cluster: Cluster, where: str, file: FileModel, offset: int, extent: ExtentRow, server: ChunkNode
) -> None:
    wanted = file.newest[offset : offset + extent.length]
    try:
        data = read_extent(disk_of(server), extent)
    except OSError as error:
        cluster.trace.violation(f"{where}: chunk {extent.chunk:x} on {server.name}: {error}")
        return
    if data[: len(wanted)] != wanted:
        cluster.trace.violation(f"{where}: wrong bytes at {offset} of chunk {extent.chunk:x} on {server.name}")


def read_extent(disk: SimDisk, extent: ExtentRow) -> bytes:
    """An extent's bytes from one replica."""
    file = disk.open(chunk_path(extent.chunk))
    index = recovery.read_index(file, UUID(CLUSTER), extent.chunk)
    blocks = index.covering(extent.chunk_offset, extent.length, 1 << 30)
    if blocks is None:
        return b""
    data = file.read(blocks.length, blocks.position)
    # Stored as they are: logical and stored offsets are the same.
    start = extent.chunk_offset - (blocks.position - PAYLOAD_OFFSET)
    return data[start : start + extent.length]


async def _check_from_elsewhere(cluster: Cluster) -> None:
    for program in cluster.programs:
        try:
            await program.check_others()
        except Violation:
            raise
        except Exception as error:
            raise Violation(f"{program.name} cannot read what others wrote: {error!r}") from error

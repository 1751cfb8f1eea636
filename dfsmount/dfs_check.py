"""`dfs check`: the metaserver's own check, and with --deep every block of every replica, read from disk."""

from collections import defaultdict
from collections.abc import Callable, Iterable

import msgspec
import trio
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from chunkserver import client
from chunkserver.protocol import Peer
from dfsmount.dfs_api import Api, ReplicaListing
from dfsmount.dfs_find import Access
from dfsmount.dfs_layout import Problem
from dfsmount.dfs_show import console
from metaserver.errors import DfsError, ErrorCode
from metaserver.key import ClusterKey
from metaserver.protocol import ServerStatus, Status
from metaserver.words import count_text

# Findings of one kind that are printed; all are in the JSON.
SHOWN = 20

Tick = Callable[[], None]


class Finding(msgspec.Struct):
    """One thing that is not as it should be: where, and what."""

    where: str
    text: str


class Findings(msgspec.Struct):
    """``rows`` of metadata and ``replicas`` (0 unless deep) were checked; ``bytes`` of them were read from disk."""

    deep: bool
    rows: int
    replicas: int
    bytes: int
    metadata: list[Finding]
    data: list[Finding]


def run(access: Access, *, deep: bool, quiet: bool) -> Findings:
    """Checks it all; ``quiet``: without progress. Raises :class:`Problem` only if the metaserver cannot be asked."""
    out = console()
    with Api(access) as api:
        if quiet:
            report = api.check()
        else:
            with out.status("checking the metadata"):
                report = api.check()
        metadata = [Finding(f"{problem.table} {problem.key}", problem.text) for problem in report.problems]
        findings = Findings(deep, report.rows, 0, 0, metadata, [])
        if deep:
            check_data(api, api.status(), access.key(), findings, quiet=quiet)
    return findings


def check_data(api: Api, status: Status, key: ClusterKey, findings: Findings, *, quiet: bool) -> None:
    """Lists what every server has, and has every replica verified there."""
    listings: dict[int, list[ReplicaListing]] = {}
    for server in status.servers:
        try:
            listings[server.server] = api.replicas(server)
        except Problem as problem:
            findings.data.append(Finding(server.name, f"not checked: {problem}"))
    findings.data += differing(status.servers, listings)
    total = sum(map(len, listings.values()))
    out = console()
    columns = (TextColumn("verifying replicas"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out, disable=quiet or not out.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=total)
        trio.run(verify_all, status, key, listings, findings, lambda: progress.advance(task))


def differing(servers: Iterable[ServerStatus], listings: dict[int, list[ReplicaListing]]) -> list[Finding]:
    """Chunks whose sealed replicas are not the same; each replica on its own may well be flawless."""
    names = {server.server: server.name for server in servers}
    places: defaultdict[str, dict[tuple[int, str], list[str]]] = defaultdict(lambda: defaultdict(list))
    for server, replicas in listings.items():
        for replica in replicas:
            if replica.state == "SEALED":
                places[replica.chunk][(replica.stored_length, replica.chain)].append(names[server])
    return [
        Finding(f"chunk {chunk}", "replicas differ: " + "; ".join(map(describe_version, versions.items())))
        for chunk, versions in sorted(places.items())
        if len(versions) > 1
    ]


def describe_version(version: tuple[tuple[int, str], list[str]]) -> str:
    (length, chain), servers = version
    return f"{length} bytes, chain {chain} on {', '.join(servers)}"


async def verify_all(
    status: Status, key: ClusterKey, listings: dict[int, list[ReplicaListing]], findings: Findings, tick: Tick
) -> None:
    """All servers at a time, the replicas of each one after another."""
    async with client.open_pool(key, status.cluster_id) as pool, trio.open_nursery() as nursery:
        for server in status.servers:
            replicas = listings.get(server.server, [])
            nursery.start_soon(verify_server, pool, server, replicas, findings, tick)


async def verify_server(
    pool: client.Pool, server: ServerStatus, replicas: list[ReplicaListing], findings: Findings, tick: Tick
) -> None:
    peer = Peer(server.server, server.host, server.port)
    for replica in replicas:
        text = replica.error or await verify_one(pool, peer, int(replica.chunk, 16), findings)
        if text:
            findings.data.append(Finding(f"chunk {replica.chunk} on {server.name}", f"{text} ({replica.path})"))
        tick()


async def verify_one(pool: client.Pool, peer: Peer, chunk: int, findings: Findings) -> str:
    """Has one replica read back from disk; "" or what is wrong."""
    try:
        reply = await pool.verify(peer, chunk)
    except DfsError as error:
        # Deleted since the server listed it: the cleaner and repair go on meanwhile.
        return "" if error.code is ErrorCode.NO_SUCH_CHUNK else error.text
    findings.replicas += 1
    findings.bytes += reply.progress.stored_length
    if reply.bad_blocks:
        first = ", ".join(map(str, reply.bad_blocks[:5]))
        more = ", ..." if reply.bad_blocks[5:] else ""
        return f"{count_text(len(reply.bad_blocks), 'bad block')} (entries {first}{more})"
    return ""


def clean(findings: Findings) -> bool:
    return not findings.metadata and not findings.data


def lines(findings: Findings) -> list[str]:
    """The report for people: findings, then one sentence."""
    shown = []
    for kind in (findings.metadata, findings.data):
        shown += [f"{finding.where}: {finding.text}" for finding in kind[:SHOWN]]
        if kind[SHOWN:]:
            shown.append(f"... and {len(kind) - SHOWN} more (--json shows all)")
    looked = count_text(findings.rows, "row") + " of metadata"
    if findings.deep:
        looked += f" and {count_text(findings.replicas, 'replica')} ({findings.bytes:,} bytes read from disk)"
    found = len(findings.metadata) + len(findings.data)
    verdict = "nothing wrong" if not found else count_text(found, "finding")
    return [*shown, f"Checked {looked}: {verdict}."]

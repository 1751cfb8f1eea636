"""`dfs scrub`: has chunkservers read all they have back from disk now, and waits for the result."""

import time
from collections.abc import Callable, Sequence

import msgspec
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from chunkserver.protocol import ScrubReport
from dfsmount.dfs_api import Api
from dfsmount.dfs_find import Access
from dfsmount.dfs_layout import Problem
from dfsmount.dfs_show import console
from metaserver.protocol import ServerStatus
from metaserver.words import bytes_text, count_text

POLL_SECONDS = 0.5
# A server that is out of reach for longer is given up.
PATIENCE_SECONDS = 30.0

Show = Callable[[str, int, int], None]


class Scrubbed(msgspec.Struct):
    """What came of one server: ``damaged`` replicas as (chunk, what is wrong); ``problem`` if it could not be done."""

    server: str
    bytes: int
    seconds: float
    damaged: list[tuple[str, str]]
    problem: str = ""


def run(access: Access, names: Sequence[str], *, quiet: bool) -> list[Scrubbed]:
    """All servers or those named, at a time. :class:`Problem`: one is not known, or the metaserver does not answer."""
    with Api(access) as api:
        servers = chosen(api.status().servers, names)
        out = console()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[done]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=out, disable=quiet or not out.is_terminal, transient=True) as progress:
            tasks = {server.name: progress.add_task(server.name, total=None, done="") for server in servers}

            def show(name: str, done: int, total: int) -> None:
                progress.update(tasks[name], completed=done, total=total, done=bytes_text(done))

            return watch(api, servers, show)


def chosen(servers: Sequence[ServerStatus], names: Sequence[str]) -> list[ServerStatus]:
    """Those of these names or numbers; all that are not LOST if there are none."""
    if not names:
        found = [server for server in servers if server.state != "LOST"]
        if not found:
            raise Problem("there is no chunkserver to scrub")
        return found
    found = []
    for name in dict.fromkeys(names):
        match = [server for server in servers if name in (server.name, str(server.server))]
        if not match:
            known = ", ".join(sorted(server.name for server in servers)) or "none"
            raise Problem(f"there is no chunkserver {name!r}: known are {known}")
        found += match
    return found


def watch(api: Api, servers: Sequence[ServerStatus], show: Show) -> list[Scrubbed]:
    """Begins a pass on each server and waits until all have ended."""
    began = time.monotonic()
    results: dict[int, Scrubbed] = {}
    passes: dict[int, ScrubReport] = {}
    heard: dict[int, float] = {}
    for server in servers:
        try:
            passes[server.server] = api.scrub(server, begin=True)
            heard[server.server] = time.monotonic()
        except Problem as problem:
            results[server.server] = Scrubbed(server.name, 0, 0.0, [], str(problem))
    while len(results) < len(servers):
        time.sleep(POLL_SECONDS)
        for server in servers:
            if server.server not in results:
                result = _look(api, server, passes[server.server], heard, show)
                if result is not None:
                    result.seconds = time.monotonic() - began
                    results[server.server] = result
    return [results[server.server] for server in servers]


def _look(api: Api, server: ServerStatus, begun: ScrubReport, heard: dict[int, float], show: Show) -> Scrubbed | None:
    """The result of a server's pass, if it has ended."""
    try:
        now = api.scrub(server, begin=False)
    except Problem as problem:
        if time.monotonic() - heard[server.server] < PATIENCE_SECONDS:
            return None
        return Scrubbed(server.name, 0, 0.0, [], str(problem))
    heard[server.server] = time.monotonic()
    if now.incarnation != begun.incarnation:
        return Scrubbed(server.name, 0, 0.0, now.damaged, "the server was restarted; run this again")
    if now.completed >= begun.asked:
        return Scrubbed(server.name, now.status.total_bytes, 0.0, now.damaged)
    show(server.name, now.status.done_bytes, now.status.total_bytes)
    return None


def clean(results: Sequence[Scrubbed]) -> bool:
    return not any(result.problem or result.damaged for result in results)


def lines(results: Sequence[Scrubbed]) -> list[str]:
    """The result for people: what is damaged, and a line for each server."""
    shown = []
    for result in results:
        shown += [f"chunk {chunk} on {result.server}: {text}" for chunk, text in result.damaged]
    for result in results:
        if result.problem:
            shown.append(f"{result.server}: not scrubbed: {result.problem}")
        else:
            wrong = count_text(len(result.damaged), "damaged replica") if result.damaged else "nothing wrong"
            shown.append(f"{result.server}: {bytes_text(result.bytes)} read back in {result.seconds:.0f} s: {wrong}.")
    if any(result.damaged for result in results):
        shown.append(
            "Damaged replicas are repaired from the others: `dfs status` shows when every chunk has its copies."
        )
    return shown

"""`dfs top`: servers, mounts, operations and what waits, looked at again and again."""

import time

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dfsmount.dfs_api import Api
from dfsmount.dfs_asking import ask
from dfsmount.dfs_find import Access
from dfsmount.dfs_layout import Problem
from dfsmount.telling import Stats, Waits, duration_text
from metaserver import controlsocket, words
from metaserver.protocol import Status

# Lines of each table: a terminal has 24 at least, and who has more wants the rest of a table in a file.
ROWS = 8
# A metaserver that does not answer must not hide what waits for it.
STATUS_SECONDS = 3.0


class Local(msgspec.Struct):
    """A mount on this host."""

    stats: Stats
    waiting: list[Waits]


class Look(msgspec.Struct):
    """``problem``: why the metaserver could not be asked; ``status`` is None then."""

    problem: str
    status: Status | None
    mounts: list[Local]


def look(access: Access) -> Look:
    """Never raises for what is away: that is what one wants to see."""
    status, problem = None, ""
    try:
        with Api(access) as api:
            status = api.status(STATUS_SECONDS)
    except Problem as error:
        problem = str(error)
    return Look(problem, status, _local())


def _local() -> list[Local]:
    found = []
    for process in controlsocket.processes():
        if process.program == "dfsmount":
            try:
                found.append(Local(ask(process, "stats", Stats), ask(process, "waiting", list[Waits])))
            except Problem:
                continue
    return found


def watch(access: Access, seconds: float, *, once: bool) -> None:
    """Until interrupted."""
    console = Console()
    before = look(access)
    if once or not console.is_terminal:
        console.print(screen(None, before, 0.0))
        return
    with Live(screen(None, before, 0.0), console=console, screen=True, auto_refresh=False) as live:
        at = time.monotonic()
        while True:
            time.sleep(seconds)
            now = look(access)
            passed, at = time.monotonic() - at, time.monotonic()
            live.update(screen(before, now, passed), refresh=True)
            before = now


def screen(before: Look | None, now: Look, seconds: float) -> Group:
    """``seconds`` passed between the two; without the first, sums since the mounts began."""
    status = now.status
    headline = words.verdict(status) if status else f"The metaserver cannot be asked: {now.problem}"
    healthy = status is not None and not words.troubles(status)
    parts = [Text(headline, style="bold green" if healthy else "bold red")]
    tables = [_servers(status), _sessions(status)] if status else []
    return Group(*parts, *tables, _operations(before, now, seconds), _waiting(now))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, expand=False)
    for at, column in enumerate(columns):
        table.add_column(column, justify="left" if at == 0 else "right", no_wrap=True)
    return table


def _servers(status: Status) -> Table:
    table = _table("Servers", "name", "state", "free", "of", "chunks", "heartbeat")
    for each in status.servers[:ROWS]:
        free, size = words.bytes_text(each.free), words.bytes_text(each.capacity)
        heard = f"{words.seconds_text(each.last_heartbeat_seconds)} ago"
        table.add_row(each.name, words.state_text(each), free, size, f"{each.chunks:,}", heard)
    return table


def _sessions(status: Status) -> Table:
    table = _table("Mounts", "where", "host", "state", "open", "not stored")
    for each in status.sessions[:ROWS]:
        state = "connected" if each.connected else "away"
        table.add_row(each.mountpoint, each.host, state, f"{each.opened:,}", words.bytes_text(each.dirty_bytes))
    return table


def _operations(before: Look | None, now: Look, seconds: float) -> Table:
    rate = before is not None and seconds > 0
    table = _table("Operations on this host's mounts", "operation", "per second" if rate else "count", "each", "share")
    counted: dict[str, tuple[float, float]] = {}
    for look, sign in ((now, 1), (before, -1)):
        for mount in look.mounts if look is not None else ():
            for each in mount.stats.operations:
                count, total = counted.get(each.operation, (0.0, 0.0))
                counted[each.operation] = count + sign * each.count, total + sign * each.total_seconds
    busy = sum(total for _, total in counted.values()) or 1.0
    for name, (count, total) in sorted(counted.items(), key=lambda item: -item[1][1])[:ROWS]:
        if count > 0:
            shown = f"{count / seconds:,.0f}" if rate else f"{count:,.0f}"
            table.add_row(name, shown, duration_text(total / count), f"{100 * total / busy:.0f} %")
    return table


def _waiting(now: Look) -> Table:
    table = _table("Waits for more than a second", "operation", "for", "mount", "on")
    for mount in now.mounts:
        for each in mount.waiting[:ROWS]:
            on = "; ".join(f"{behind.method} at {behind.server}" for behind in each.behind[:2]) or each.at
            where = f"{mount.stats.mountpoint}, inode {each.inode}"
            table.add_row(each.operation, duration_text(each.seconds), where, on)
    if not table.rows:
        table.add_row("nothing")
    return table

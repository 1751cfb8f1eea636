"""How the `dfs` command shows things: pure functions from answers to text and tables."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dfsmount.dfs_chunks import FileView, PieceView
from metaserver.protocol import MissingFile, ServerStatus, SessionStatus, Status
from metaserver.words import (
    bytes_text,
    count_text,
    scrub_text,
    state_text,
    summary_lines,
    time_text,
    troubles,
    verdict,
)

# Files without data that are named.
SHOWN_FILES = 10


def table(columns: Iterable[str], rows: Iterable[Sequence[str]], right: Iterable[str] = ()) -> Table:
    """A table without lines: easy to read, and to cut with awk. ``right`` names the columns of figures."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", no_wrap=True, overflow="ignore")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def servers_table(servers: Sequence[ServerStatus]) -> Table:
    """Racks and labels only where there are any."""
    marked = any(server.rack or server.labels for server in servers)
    rows = [
        (
            server.name,
            state_text(server),
            f"{server.host}:{server.port}",
            f"{server.chunks:,}",
            bytes_text(server.stored) if server.stored >= 0 else "?",
            bytes_text(server.capacity - server.free),
            bytes_text(server.free),
            f"{server.last_heartbeat_seconds:.0f} s ago",
            scrub_text(server.scrub),
            *((server.rack or "-", ",".join(server.labels) or "-") if marked else ()),
            server.data_path,
        )
        for server in sorted(servers, key=lambda server: server.name)
    ]
    shown = ("SERVER", "STATE", "ADDRESS", "CHUNKS", "STORED", "USED", "FREE", "HEARTBEAT", "SCRUB")
    columns = (*shown, *(("RACK", "LABELS") if marked else ()), "DATA")
    return table(columns, rows, ("CHUNKS", "STORED", "USED", "FREE"))


def sessions_table(sessions: Iterable[SessionStatus]) -> Table:
    rows = [
        (
            str(session.session),
            session.host,
            session.mountpoint,
            "connected" if session.connected else "away",
            f"{session.idle_seconds:.0f} s",
            f"{session.opened:,}",
            bytes_text(session.dirty_bytes),
        )
        for session in sessions
    ]
    columns = ("SESSION", "HOST", "MOUNTPOINT", "STATE", "IDLE", "OPEN", "DIRTY")
    return table(columns, rows, ("IDLE", "OPEN", "DIRTY"))


def print_table(shown: Table) -> None:
    console().print(shown)


def console() -> Console:
    """Standard output. Not on a terminal: as wide as it takes, so that no line is cut or wrapped."""
    made = Console(highlight=False, soft_wrap=False)
    return made if made.is_terminal else Console(highlight=False, width=1000)


def missing_lines(missing: Sequence[MissingFile]) -> list[str]:
    """The first of the files that have lost data, and how many more there are."""
    lines = [f"missing     {file.path or f'inode {file.ino}'}" for file in missing[:SHOWN_FILES]]
    more = len(missing) - SHOWN_FILES
    return [*lines, f"missing     ... and {more} or more others (--json names more)"] if more > 0 else lines


def show_status(status: Status, http: str, missing: Sequence[MissingFile] = ()) -> None:
    """Prints it all, the verdict first."""
    out = console()
    out.print(verdict(status), style="bold red" if troubles(status) else "bold green", markup=False)
    for line in (*summary_lines(status, http), *missing_lines(missing)):
        out.print(line, markup=False)
    if status.servers:
        out.print("", servers_table(status.servers), sep="\n")
    if status.sessions:
        out.print("", sessions_table(status.sessions), sep="\n")


def show_file(view: FileView) -> None:
    """Prints a chunk map: one line for each replica of each piece."""
    out = console()
    pieces = count_text(len(view.pieces), "piece")
    out.print(f"{view.path}: {view.size:,} bytes in {pieces}, modified {time_text(view.mtime_ns)} UTC", markup=False)
    if not view.pieces:
        out.print("No bytes are stored: the file is empty or one hole.", markup=False)
        return
    rows = [row for piece in view.pieces for row in piece_rows(piece)]
    columns = (
        "INDEX",
        "OFFSET",
        "LENGTH",
        "CHUNK",
        "AT",
        "STATE",
        "SERVER",
        "REPLICA",
        "CHECKSUMS",
        "CREATED (UTC)",
        "PATH",
    )
    out.print(table(columns, rows, ("INDEX", "OFFSET", "LENGTH", "AT")))


def piece_rows(piece: PieceView) -> list[Sequence[str]]:
    """The piece's own columns are shown once, beside its first replica."""
    own: tuple[str, ...] = (
        str(piece.index),
        str(piece.offset),
        str(piece.length),
        piece.chunk,
        str(piece.chunk_offset),
        piece.chunk_state,
    )
    rows: list[Sequence[str]] = []
    for replica in piece.replicas:
        created = time_text(replica.created_ns) if replica.created_ns else "unknown"
        rows.append((*own, replica.server, replica.state, replica.checksums, created, replica.path))
        own = ("",) * len(own)
    return rows or [(*own, "none", "", "no replica", "", "")]

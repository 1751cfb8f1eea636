"""The status page: HTML made here from what ``dfs status`` shows, with a template; no script is needed to read it."""

import hashlib
from base64 import b64encode
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from metaserver.history import KEPT_SAMPLES, Event, Sample
from metaserver.protocol import ServerStatus, Status
from metaserver.words import (
    bytes_text,
    chunks_text,
    cleaner_text,
    count_text,
    moves,
    moving_text,
    repair_text,
    scrub_text,
    seconds_text,
    troubles,
    verdict,
)

SHOWN_EVENTS = 20
PLOT_WIDTH, PLOT_HEIGHT = 360, 64


class Plot(NamedTuple):
    """A line over the last hour: ``points`` of an SVG polyline, and in words the newest and the highest value."""

    title: str
    points: str
    now: str
    peak: str


class Row(NamedTuple):
    """A chunkserver. ``used``: how full, in percent; ``mood``: "good", "busy" or "bad"."""

    status: ServerStatus
    mood: str
    used: float
    space: str
    heartbeat: str
    scrub: str
    note: str


class Page:
    """Reads its template once."""

    def __init__(self) -> None:
        made = Environment(
            loader=PackageLoader("metaserver"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        made.filters |= {"bytes": bytes_text, "seconds": seconds_text}
        self._template = made.get_template("status.html")
        self._script = made.get_template("refresh.js").render()

    @property
    def headers(self) -> dict[str, str]:
        """No script, style or picture from anywhere else: what a name could smuggle in does not run."""
        digest = b64encode(hashlib.sha256(self._script.encode()).digest()).decode()
        policy = (
            f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return {"Content-Security-Policy": policy, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

    def render(self, status: Status, samples: Sequence[Sample], events: Sequence[Event], now_ns: int) -> str:
        """The whole page."""
        found = troubles(status)
        newest = list(events)[: -SHOWN_EVENTS - 1 : -1]
        return self._template.render(
            status=status,
            verdict=verdict(status),
            headline="Something needs a look" if found else "All is well",
            mood="bad" if found else "good",
            troubles=found,
            used=percent_used(status.free, status.total),
            rows=[row(server) for server in sorted(status.servers, key=lambda server: server.name)],
            facts=facts(status),
            plots=plots(samples),
            plot_size=(PLOT_WIDTH, PLOT_HEIGHT),
            events=[(when(event.at_ns, now_ns), event.text, event.bad) for event in newest],
            now=datetime.fromtimestamp(now_ns // 10**9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            script=self._script,
        )


def plot(title: str, values: Sequence[float], unit: str) -> Plot:
    """The newest value is at the right edge, whatever the number of values; the highest touches the top."""
    top = max(values, default=0.0) or 1.0
    step = PLOT_WIDTH / (KEPT_SAMPLES - 1)
    first = PLOT_WIDTH - step * (len(values) - 1)
    points = " ".join(
        f"{first + step * index:.1f},{PLOT_HEIGHT - 2 - (PLOT_HEIGHT - 4) * value / top:.1f}"
        for index, value in enumerate(values)
    )
    return Plot(title, points, _rate(values[-1] if values else 0.0, unit), _rate(max(values, default=0.0), unit))


def _rate(value: float, unit: str) -> str:
    return f"{bytes_text(round(value))}/s" if unit == "B" else f"{value:,.0f}/s"


def percent_used(free: int, total: int) -> float:
    return 100 * (1 - free / total) if total else 0.0


def plots(samples: Sequence[Sample]) -> list[Plot]:
    return [
        plot("Read", [sample.read for sample in samples], "B"),
        plot("Written, all copies", [sample.written for sample in samples], "B"),
        plot("Metadata requests", [sample.requests for sample in samples], "1"),
    ]


def row(server: ServerStatus) -> Row:
    mood = "good" if server.state == "UP" else "busy" if server.state == "DRAINING" else "bad"
    note = ""
    if server.disk_state not in ("", "OK"):
        note = f"disk {server.disk_state}"
        mood = "busy" if mood == "good" and server.disk_state == "FULL" else "bad"
    if server.state == "DRAINING":
        note = f"{count_text(server.to_move, 'chunk')}, {bytes_text(server.to_move_bytes)} left to move"
    return Row(
        server,
        mood,
        percent_used(server.free, server.capacity),
        f"{bytes_text(server.free)} free of {bytes_text(server.capacity)}",
        f"{seconds_text(server.last_heartbeat_seconds)} ago",
        scrub_text(server.scrub),
        note,
    )


def facts(status: Status) -> list[tuple[str, str]]:
    """What goes on, and what there is: a word and a line each."""
    repair = repair_text(status.repair) if status.repair else ""
    shown = [
        ("Chunks", chunks_text(status.chunks)),
        ("Repair", repair or "nothing to copy"),
        ("Rebalancing", moving_text(status.rebalance) if status.rebalance and moves(status.rebalance) else ""),
        ("Cleaner", cleaner_text(status.cleaner)),
        ("Files and directories", f"{status.inodes:,}"),
    ]
    return [(name, text) for name, text in shown if text]


def when(at_ns: int, now_ns: int) -> str:
    """The time of day (UTC), and how long ago."""
    time = datetime.fromtimestamp(at_ns // 10**9, UTC).strftime("%H:%M:%S")
    return f"{time} · {seconds_text(max(0, now_ns - at_ns) / 1e9)} ago"

"""`dfs drain` and `dfs rebalance`: watching what the metaserver does until it is done."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dfsmount.dfs_api import Api
from dfsmount.dfs_layout import Problem
from dfsmount.dfs_show import console
from metaserver.protocol import Planned, RebalanceStatus, ServerStatus
from metaserver.words import bytes_text, count_text, seconds_text

# Between two looks; and, where nobody watches a terminal, between two lines of progress.
LOOK_SECONDS = 1.0
LINE_SECONDS = 10.0
# The rate is measured over so long.
RATE_SECONDS = 30.0


class Rate:
    """How fast a number of bytes shrinks."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def left(self, count: int, now: float) -> str:
        """Rate and time left, in words; "" while they are not known."""
        self._seen = [(at, was) for at, was in self._seen if now - at <= RATE_SECONDS] + [(now, count)]
        at, was = self._seen[0]
        if now - at < 2 or was <= count:
            return ""
        rate = (was - count) / (now - at)
        return f", {bytes_text(int(rate))}/s, about {seconds_text(count / rate)} left"


@contextmanager
def watching(quiet: bool) -> Iterator[Callable[[str], None]]:
    """How to show progress: one line that changes on a terminal, else a line now and then."""
    out = console()
    if quiet:
        yield lambda text: None
    elif out.is_terminal:
        with out.status("") as shown:
            yield lambda text: shown.update(text)
    else:
        last_at, last = float("-inf"), ""

        def line(text: str) -> None:
            nonlocal last_at, last
            if text != last and time.monotonic() - last_at >= LINE_SECONDS:
                last_at, last = time.monotonic(), text
                print(text, flush=True)

        yield line


@contextmanager
def busy(text: str, *, quiet: bool) -> Iterator[None]:
    """Shows on a terminal that something takes a while."""
    out = console()
    if quiet or not out.is_terminal:
        yield
    else:
        with out.status(text):
            yield


@contextmanager
def progress_bar(*, quiet: bool) -> Iterator[Callable[[str, float], None]]:
    """How to show what is done now and how far it is (0 to 1): a bar on a terminal, nothing elsewhere."""
    out = console()
    if quiet or not out.is_terminal:
        yield lambda text, part: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True) as progress:
        task = progress.add_task("", total=1.0)
        # Many thousand calls a second would be measured with what they are to show.
        next_at = 0.0

        def show(text: str, part: float) -> None:
            nonlocal next_at
            if time.monotonic() >= next_at:
                next_at = time.monotonic() + 0.1
                progress.update(task, description=text, completed=part)

        yield show


def drain_text(server: ServerStatus, rate: Rate) -> str:
    parts = [f"{server.name}: {count_text(server.to_move, 'replica')} ({bytes_text(server.to_move_bytes)}) left"]
    parts.append(rate.left(server.to_move_bytes, time.monotonic()))
    if server.to_move_open:
        parts.append(f"; {server.to_move_open:,} of them still written to")
    if server.to_move_stuck:
        parts.append(f"; {server.to_move_stuck:,} cannot leave: they want more copies than there are other servers")
    if server.state != "DRAINING":
        parts.append(f"; the server is {server.state}")
    return "".join(parts)


def wait_empty(api: Api, planned: Planned, *, quiet: bool) -> Planned:
    """Returns when nothing is left on a server that is being emptied."""
    rate = Rate()
    try:
        with watching(quiet) as show:
            while True:
                server = _find(api, planned)
                if not server.to_move:
                    text = f"Nothing is left on {server.name}: it can be switched off"
                    return Planned(server.server, server.name, text)
                show(drain_text(server, rate))
                time.sleep(LOOK_SECONDS)
    except KeyboardInterrupt:
        text = f"{planned.name} goes on being emptied; `dfs status` shows it, `dfs undrain {planned.name}` stops it"
        raise Problem(text) from None


def _find(api: Api, planned: Planned) -> ServerStatus:
    server = next((each for each in api.status().servers if each.server == planned.server), None)
    if server is None:
        raise Problem(f"{planned.name} was removed meanwhile")
    if server.state == "UP":
        raise Problem(f"{server.name} is not being emptied any more")
    if server.state == "LOST":
        raise Problem(f"{server.name} is LOST: its data is copied from others; `dfs remove {server.name}` forgets it")
    return server


def rebalance_text(status: RebalanceStatus) -> str:
    state = {
        "IDLE": "Nothing is being moved",
        "BY_ITSELF": "Data is being moved, slowly",
        "ASKED": "Data is being moved",
        "STOPPED": "Stopped: nothing moves until `dfs rebalance`, or a restart of the metaserver",
    }[status.mode]
    moved = f"; {count_text(status.moved_chunks, 'chunk')} ({bytes_text(status.moved_bytes)}) moved"
    way = f", {status.under_way:,} on their way" if status.under_way else ""
    return f"{state}. The fullest server is {status.unevenness:.1%} fuller than the emptiest{moved}{way}."


def wait_even(api: Api, *, quiet: bool) -> RebalanceStatus:
    """Returns when rebalancing has ended."""
    rate = Rate()
    try:
        with watching(quiet) as show:
            while True:
                status = api.rebalance_status()
                if status.mode not in ("ASKED", "BY_ITSELF"):
                    return status
                left = f"{bytes_text(status.excess_bytes)} to move"
                show(f"{left}{rate.left(status.excess_bytes, time.monotonic())}, {status.moved_chunks:,} chunks moved")
                time.sleep(LOOK_SECONDS)
    except KeyboardInterrupt:
        raise Problem("it goes on in the background; `dfs rebalance --stop` ends it") from None

"""Status in words: what `dfs status` prints and the status page shows. Pure functions."""

from datetime import UTC, datetime

from metaserver.protocol import (
    ChunkHealth,
    CleanerStatus,
    RebalanceStatus,
    RepairStatus,
    ScrubStatus,
    ServerStatus,
    Status,
    TrashStatus,
)

UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def bytes_text(count: int) -> str:
    """A size for people, with three digits or so."""
    value = float(count)
    for unit in UNITS:
        if abs(value) < 1024 or unit == UNITS[-1]:
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def seconds_text(seconds: float) -> str:
    """A duration for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 172800 else f"{seconds / 86400:.0f} d"


def time_text(ns: int) -> str:
    """A point in time, in UTC, to the second."""
    return datetime.fromtimestamp(ns // 10**9, UTC).strftime("%Y-%m-%d %H:%M:%S")


def count_text(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def troubles(status: Status) -> list[str]:
    """What is not as it should be, the worst first; empty when all is well."""
    up = [server for server in status.servers if server.state == "UP"]
    found = []
    if status.chunks.missing:
        found.append(f"DATA IS MISSING: {count_text(status.chunks.missing, 'chunk')} without a good copy")
    if status.read_only:
        found.append(f"READ-ONLY, and what is counted here may be old: {status.read_only}")
    if not status.servers:
        found.append("no chunkserver has registered, so nothing can be written")
    elif not up:
        found.append("no chunkserver is up, so nothing can be read or written")
    else:
        away = [server for server in status.servers if server.state not in ("UP", "DRAINING")]
        found += [f"{server.name} is {server.state}" for server in away]
    found += [stuck_text(server) for server in status.servers if server.to_move_stuck]
    if status.chunks.too_few:
        found.append(f"{count_text(status.chunks.too_few, 'chunk')} with fewer copies than wanted")
    if up and len(up) < status.copies:
        found.append(f"{status.copies} copies are wanted but only {count_text(len(up), 'chunkserver')} can take them")
    found += space_troubles(status)
    if status.window_open:
        found.append("the metaserver has just started and waits for its mounts to return")
    return found


def space_troubles(status: Status) -> list[str]:
    """What is full, and what helps."""
    found = []
    if status.metaserver_full:
        found.append("the metaserver's disk is full: files can only be deleted until something on it is removed")
    if status.snapshot_failure:
        found.append(f"no snapshot of the metadata can be made, so it perhaps is not safe: {status.snapshot_failure}")
    elif status.unprotected:
        found.append("the metadata could not be rebuilt now: make space for a snapshot on the metaserver's disk")
    broken = [server for server in status.servers if server.disk_state == "FAILED"]
    found += [f"the disk of {one.name} has failed: {one.disk_error or 'look at its log'}" for one in broken]
    full = [server.name for server in status.servers if server.disk_state == "FULL" and server.state == "UP"]
    if status.total and status.free * 500 < status.total:
        found.append("full: nothing can be written; delete files or add chunkservers")
    elif status.total and status.free * 20 < status.total:
        free = f"{bytes_text(status.free)} of {bytes_text(status.total)} free"
        found.append(f"nearly full: {free}; delete files or add chunkservers")
    elif full:
        found.append(f"{', '.join(full)} full: new data goes elsewhere; `dfs rebalance` evens it out")
    return found


def stuck_text(server: ServerStatus) -> str:
    return f"{count_text(server.to_move_stuck, 'chunk')} cannot leave {server.name}: too few other servers"


def verdict(status: Status) -> str:
    """One sentence: what a person who is woken at night has to know."""
    found = troubles(status)
    if found:
        return f"Not healthy: {'; '.join(found)}."
    count = len(status.servers)
    servers = "the chunkserver is" if count == 1 else f"all {count} chunkservers are"
    copies = "1 copy" if status.copies == 1 else f"{status.copies} copies"
    return f"Healthy: {servers} up and every chunk has its {copies}."


def summary_lines(status: Status, http: str) -> list[str]:
    """What is under the verdict."""
    return [
        f"metaserver  {http}, cluster {status.cluster_id}, up {seconds_text(status.up_seconds)}, epoch {status.epoch}",
        f"space       {bytes_text(status.free)} free of {bytes_text(status.total)} at {status.copies} copies, "
        + count_text(status.inodes, "inode"),
        f"chunks      {chunks_text(status.chunks)}",
        *([f"repair      {repair_text(status.repair)}"] if status.repair and repair_text(status.repair) else []),
        *([f"rebalance   {moving_text(status.rebalance)}"] if status.rebalance and moves(status.rebalance) else []),
        *([f"at work     {work_text(status)}"] if status.tasks or status.orders else []),
        *([f"trash       {trash_text(status.trash)}"] if status.trash and status.trash.files else []),
        *([f"cleaner     {cleaner_text(status.cleaner)}"] if cleaner_text(status.cleaner) else []),
        *([f"changelog   {recovery_text(status)}"] if status.recovery_checked_seconds >= 0 else []),
    ]


def trash_text(trash: TrashStatus) -> str:
    """What was deleted and is still there."""
    more = "" if trash.counted else " or more"
    kept = f"kept for {seconds_text(trash.seconds)} or until the space is needed"
    return f"{count_text(trash.files, 'deleted file')}{more}, {bytes_text(trash.bytes)}, {kept}"


def recovery_text(status: Status) -> str:
    """What the last reading of old segments and snapshot files has found."""
    when = f"read back {seconds_text(status.recovery_checked_seconds)} ago"
    if not status.recovery_damage:
        return f"{when}, with the snapshot files: nothing wrong"
    made_up = "and is needed" if status.unprotected else "a new snapshot file has made up for it"
    return f"{when}: {'; '.join(status.recovery_damage)}; {made_up}"


def repair_text(repair: RepairStatus) -> str:
    """What is being copied; "" if nothing is."""
    parts = []
    if repair.chunks:
        parts.append(f"{count_text(repair.chunks, 'chunk')} ({bytes_text(repair.bytes)}) to copy")
    if repair.to_move:
        parts.append(f"{repair.to_move:,} to move")
    if repair.under_way:
        parts.append(f"{repair.under_way:,} under way")
    if repair.bytes_per_second:
        parts.append(f"{bytes_text(int(repair.bytes_per_second))}/s of late")
    if repair.seconds_left:
        parts.append(f"about {seconds_text(repair.seconds_left)} left")
    return ", ".join(parts)


def moves(rebalance: RebalanceStatus) -> bool:
    """Whether there is anything to say of rebalancing."""
    return rebalance.mode != "IDLE" or rebalance.under_way > 0


def moving_text(rebalance: RebalanceStatus) -> str:
    if rebalance.mode == "STOPPED":
        return "stopped (`dfs rebalance` starts it)"
    left = f"{bytes_text(rebalance.excess_bytes)} to move until all servers are equally full"
    return f"{left}, {count_text(rebalance.moved_chunks, 'chunk')} moved"


def work_text(status: Status) -> str:
    text = f"{count_text(status.tasks, 'background task')}, {count_text(status.orders, 'order')} to chunkservers"
    trees = f", {count_text(status.setting_copies, 'tree')} getting another number of copies"
    return text + (trees if status.setting_copies else "")


def cleaner_text(cleaner: CleanerStatus) -> str:
    """What the cleaner does and has done; "" if there is nothing to tell."""
    if not (cleaner.cleaning or cleaner.candidates):
        return ""
    return (
        f"rewriting {count_text(cleaner.cleaning, 'chunk')}, {count_text(cleaner.candidates, 'chunk')} with "
        f"{bytes_text(cleaner.dead_bytes)} dead; {count_text(cleaner.freed_chunks, 'chunk')} freed so far"
    )


def chunks_text(chunks: ChunkHealth) -> str:
    parts = [
        (chunks.healthy, "healthy"),
        (chunks.too_few, "with too few copies"),
        (chunks.missing, "MISSING"),
        (chunks.open, "being written"),
        (chunks.dead, "waiting to be deleted"),
    ]
    shown = [f"{count:,} {what}" for count, what in parts if count]
    return f"{chunks.total:,}" + (f" ({', '.join(shown)})" if shown else "")


def scrub_text(scrub: ScrubStatus | None) -> str:
    """How far reading everything back is, how fast, when that was last done, and what it found."""
    if scrub is None:
        return "not known"
    parts = []
    if scrub.pass_seconds:
        percent = 100 * scrub.done_bytes // max(1, scrub.total_bytes)
        parts += [f"{percent} % of pass", f"{bytes_text(round(scrub.bytes_per_second))}/s"]
    last = f"last pass {seconds_text(scrub.since_pass_seconds)} ago" if scrub.last_pass_seconds else "no pass yet"
    return ", ".join([*parts, last, f"{scrub.bad:,} bad"])


def state_text(server: ServerStatus) -> str:
    return f"{server.state} ({server.to_move:,} left)" if server.state == "DRAINING" else server.state

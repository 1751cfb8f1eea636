"""What the commands of `dfs trash` do: entries page by page, which of them are meant, and what is said of them."""

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from rich.table import Table

from dfsmount.dfs_api import Api
from dfsmount.dfs_layout import Problem
from dfsmount.dfs_mounts import mounts, our_mount_of
from dfsmount.dfs_paths import ClusterPath, Find, NewName, is_below, new_name, on_cluster
from dfsmount.dfs_servers import watching
from dfsmount.dfs_show import table
from metaserver.protocol import TrashEmptied, TrashEmpty, TrashEntry, TrashRestore, TrashRestored
from metaserver.words import bytes_text, count_text, seconds_text, time_text

# Restored by one request: about 30 ms of the metaserver's time.
BATCH = 100
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class Result(msgspec.Struct):
    """Paths are this machine's where they are known. ``older``: versions of the same files, deleted before, that stay
    in the trash."""

    restored: list[TrashRestored]
    failed: list[TrashRestored]
    older: int = 0


def entries(api: Api, path: str) -> Iterator[TrashEntry]:
    """All at or below a path of the cluster, those first that expire first."""
    position = ""
    while True:
        page = api.trash(path, position)
        yield from page.entries
        position = page.next
        if not position:
            return


def shown(found: Sequence[TrashEntry]) -> Table:
    now = time.time()
    rows = [
        (
            time_text(entry.deleted_ns),
            seconds_text(max(0.0, entry.expires_ns / 1e9 - now)),
            bytes_text(entry.size) if entry.kind == "file" else entry.kind,
            str(entry.uid),
            entry.host,
            str(entry.id),
            entry.path,
        )
        for entry in found
    ]
    columns = ("DELETED (UTC)", "KEPT FOR", "SIZE", "OWNER", "BY HOST", "ID", "PATH")
    return table(columns, rows, ("KEPT FOR", "SIZE", "OWNER", "ID"))


def summary(found: Sequence[TrashEntry]) -> str:
    size = sum(entry.size for entry in found if entry.kind == "file")
    return f"{count_text(len(found), 'deleted file')}, {bytes_text(size)}. Times are UTC."


def duration(text: str) -> float:
    """Seconds of ``90``, ``15m``, ``24h``, ``7d``, ``2w``."""
    found = re.fullmatch(r"(\d{1,9})([smhdw]?)", text)
    if found is None:
        raise Problem(f"{text} is no duration: a number with s, m, h, d or w behind it, such as 24h or 7d")
    return float(int(found[1]) * _UNITS[found[2] or "s"])


# -- restoring -------------------------------------------------------------------------------------------------------


def restore(what: str, to: Path | None, find: Find, *, quiet: bool) -> Result:
    """Restores an entry by its number, or what was deleted at or below a path."""
    if what.isdecimal():
        return _restore_number(int(what), to, find)
    place = on_cluster(Path(what), find)
    with Api(place.access) as api:
        chosen, older = choose(entries(api, place.path))
        if not chosen:
            raise Problem(
                f"nothing that was deleted from {place.local} is in the trash: `dfs trash list` shows what is"
            )
        if to is None:
            result = _restore_all(api, chosen, quiet=quiet)
        else:
            result = _restore_elsewhere(api, place, chosen, new_name(to, place.local.name, find), quiet=quiet)
    for one in (*result.restored, *result.failed):
        # As who asked for it names it.
        if is_below(one.path, place.path):
            one.path = f"{place.local}{one.path[len(place.path) :]}"
    result.older = older
    return result


def here() -> Path | None:
    """Where we are, if that is on a mount."""
    try:
        our_mount_of(Path.cwd(), mounts())
    except (Problem, OSError):
        return None
    return Path.cwd()


def choose(found: Iterator[TrashEntry]) -> tuple[list[TrashEntry], int]:
    """The newest entry of each path, files before directories (which come back with them); and how many older ones
    there are of the same files."""
    newest: dict[str, TrashEntry] = {}
    older = 0
    for entry in found:
        other = newest.get(entry.path)
        if other is not None:
            older += entry.kind != "directory"
        if other is None or entry.deleted_ns >= other.deleted_ns:
            newest[entry.path] = entry
    return sorted(newest.values(), key=lambda entry: (entry.kind == "directory", entry.path)), older


def _restore_number(number: int, to: Path | None, find: Find) -> Result:
    if to is None:
        with Api(find(here())) as api:
            return _result(api.trash_restore(TrashRestore([number])))
    target = new_name(to, str(number), find)
    with Api(target.access) as api:
        return _result(api.trash_restore(TrashRestore([number], target.parent, target.name)))


def _restore_elsewhere(
    api: Api, place: ClusterPath, chosen: list[TrashEntry], target: NewName, *, quiet: bool
) -> Result:
    """What was deleted at a path goes to another name; what was in it follows by itself."""
    if target.address != place.address:
        raise Problem(f"{target.local} is on another cluster")
    top = [entry for entry in chosen if entry.path == place.path]
    if not top:
        raise Problem(f"{place.local} is not what was deleted, only things in it: --to takes one of them at a time")
    first = _result(api.trash_restore(TrashRestore([top[0].id], target.parent, target.name)))
    if first.failed:
        return first
    rest = _restore_all(api, [entry for entry in chosen if entry is not top[0]], quiet=quiet)
    return Result(first.restored + rest.restored, rest.failed)


def _restore_all(api: Api, chosen: list[TrashEntry], *, quiet: bool) -> Result:
    result = Result([], [])
    directories = {entry.id for entry in chosen if entry.kind == "directory"}
    paths = {entry.id: entry.path for entry in chosen}
    with watching(quiet or len(chosen) <= BATCH) as show:
        for start in range(0, len(chosen), BATCH):
            show(f"{start:,} of {len(chosen):,} restored")
            batch = _result(api.trash_restore(TrashRestore([entry.id for entry in chosen[start : start + BATCH]])))
            for one in batch.failed:
                one.path = paths[one.id]
            result.restored += batch.restored
            # A directory has come back with what was in it, or has been made again since.
            result.failed += [one for one in batch.failed if one.id not in directories]
    return result


def _result(answers: Sequence[TrashRestored]) -> Result:
    return Result([one for one in answers if not one.error], [one for one in answers if one.error])


def result_lines(result: Result) -> list[str]:
    lines = [f"restored {one.path}" for one in result.restored]
    if result.older:
        lines.append(f"{count_text(result.older, 'older version')} of them stay in the trash, see `dfs trash list`")
    return lines


def failure_text(one: TrashRestored) -> str:
    what = one.path or f"number {one.id}"
    if one.error == "EXISTS" and one.text == "exists":
        return f"{what} was not restored: something has that name now; --to gives it another"
    return f"{what} was not restored: {one.text or one.error}"


# -- emptying --------------------------------------------------------------------------------------------------------


def empty(api: Api, path: str, older_than_seconds: float, *, quiet: bool) -> TrashEmptied:
    done = TrashEmptied(0, 0, "")
    with watching(quiet) as show:
        while True:
            step = api.trash_empty(TrashEmpty(path, older_than_seconds, done.next))
            done = TrashEmptied(done.files + step.files, done.bytes + step.bytes, step.next)
            if not done.next:
                return done
            show(f"{done.files:,} gone, {bytes_text(done.bytes)}")

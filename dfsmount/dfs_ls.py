"""`dfs ls`: what is stored of files and directories, in a table."""

import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from dfsmount.dfs_api import Api
from dfsmount.dfs_chunks import resolve
from dfsmount.dfs_find import Access
from dfsmount.dfs_layout import Problem
from dfsmount.dfs_mounts import inode_below, mounts
from dfsmount.dfs_show import console, table
from metaserver.protocol import StoredEntry
from metaserver.words import bytes_text, time_text


class Shown(msgspec.Struct):
    """One entry; ``state`` in words. Names that are not UTF-8 have their odd bytes as ``\\xNN``."""

    name: str
    type: str
    ino: int
    size: int
    allocated: int
    copies: int
    copies_are_default: bool
    chunks: int
    least_copies: int
    state: str
    mtime_ns: int


class Listed(msgspec.Struct):
    path: str
    entries: list[Shown]


_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFBLK: "device",
    stat.S_IFCHR: "device",
}


def look(paths: Sequence[Path], find: Callable[[Path], Access], *, itself: bool) -> list[Listed]:
    """Directories with what is in them, in the order of their names, unless ``itself``; files by themselves."""
    found = []
    for given in paths:
        path = resolve(given)
        try:
            ino = inode_below(path, mounts())
        except OSError as error:
            raise Problem(f"cannot look at {given}: {error.strerror}") from None
        with Api(find(path)) as api:
            entries = list(_entries(api, ino, path, itself=itself))
        found.append(Listed(str(path), sorted(map(shown, entries), key=lambda entry: entry.name)))
    return found


def _entries(api: Api, ino: int, path: Path, *, itself: bool) -> Iterator[StoredEntry]:
    after = 0
    while True:
        page = api.entries(ino, after, itself=itself)
        for entry in page.entries:
            entry.name = entry.name or bytes(path.name, "utf-8", "surrogateescape")
            yield entry
        after = page.next
        if not after:
            return


def shown(entry: StoredEntry) -> Shown:
    return Shown(
        entry.name.decode(errors="backslashreplace"),
        _TYPES.get(stat.S_IFMT(entry.mode), "?"),
        entry.ino,
        entry.size,
        entry.allocated,
        entry.copies,
        entry.own_copies == 0,
        entry.chunks,
        entry.least_copies,
        state(entry),
        entry.mtime_ns,
    )


def state(entry: StoredEntry) -> str:
    """The worst that there is to say of a file's data."""
    if not stat.S_ISREG(entry.mode):
        return ""
    if entry.missing:
        return f"{entry.missing} of {entry.chunks} chunks MISSING"
    if entry.too_few:
        return f"{entry.too_few} of {entry.chunks} chunks with too few copies"
    if entry.open:
        return "being written"
    return "ok" if entry.chunks else "no data"


def bad(found: Sequence[Listed]) -> bool:
    return any("MISSING" in entry.state for listed in found for entry in listed.entries)


def show(found: Sequence[Listed]) -> None:
    out = console()
    for number, listed in enumerate(found):
        if len(found) > 1:
            out.print(f"{'' if number == 0 else chr(10)}{listed.path}:", markup=False)
        rows = [_row(entry) for entry in listed.entries]
        columns = ("TYPE", "COPIES", "WANTED", "CHUNKS", "SIZE", "STORED", "MODIFIED (UTC)", "STATE", "NAME")
        out.print(table(columns, rows, ("COPIES", "WANTED", "CHUNKS", "SIZE", "STORED")))


def _row(entry: Shown) -> tuple[str, ...]:
    is_file, has_copies = entry.type == "file", entry.type in ("file", "directory")
    return (
        entry.type,
        str(entry.least_copies) if is_file and entry.chunks else "-",
        f"{entry.copies}{'' if entry.copies_are_default else '!'}" if has_copies else "-",
        str(entry.chunks) if is_file else "-",
        f"{entry.size:,}" if is_file else "-",
        bytes_text(entry.allocated) if is_file else "-",
        time_text(entry.mtime_ns),
        entry.state,
        entry.name + ("/" if entry.type == "directory" else ""),
    )

"""`dfs explain`: a file's replicas, and its last read from the kernel's request to the disks."""

from collections.abc import Callable
from pathlib import Path

import msgspec

from dfsmount import dfs_chunks, dfs_show
from dfsmount.dfs_api import Api
from dfsmount.dfs_asking import ask, process_of
from dfsmount.dfs_chunks import FileView
from dfsmount.dfs_find import Access
from dfsmount.dfs_layout import Problem
from dfsmount.dfs_options import say
from dfsmount.readlog import Read, Step
from dfsmount.telling import duration_text
from metaserver.protocol import ServerStatus
from metaserver.words import time_text


class Part(msgspec.Struct):
    """What a server did for one trace: a method, or ``disk`` for what it waited for its disk."""

    method: str
    seconds: float


class ServerPart(msgspec.Struct):
    """``known`` False: it could not be asked, or has forgotten."""

    server: int
    name: str
    known: bool
    parts: list[Part]


class Explained(msgspec.Struct):
    """``read`` None: no read of late through this mount needed a server."""

    file: FileView
    read: Read | None
    servers: list[ServerPart]


def look(file: Path, find: Callable[[Path], Access]) -> Explained:
    path = dfs_chunks.resolve(file)
    process = process_of(path)
    view = dfs_chunks.look(path, find, verify=False)
    read = ask(process, "last_read", Read | None, ino=view.ino)  # type: ignore[arg-type]
    if read is None:
        return Explained(view, None, [])
    with Api(find(path)) as api:
        known = {server.server: server for server in api.status().servers}
        asked = dict.fromkeys(step.server for step in read.steps)
        parts = [_part(api, number, known.get(number), read) for number in asked]
    return Explained(view, read, parts)


def _part(api: Api, number: int, server: ServerStatus | None, read: Read) -> ServerPart:
    if server is None:
        return ServerPart(number, f"server {number}", False, [])
    try:
        parts = api.trace(server, read.trace)
    except Problem:
        return ServerPart(number, server.name, False, [])
    return ServerPart(number, server.name, bool(parts), [Part(name, seconds) for name, seconds in parts])


def show(found: Explained) -> None:
    dfs_show.show_file(found.file)
    read = found.read
    if read is None:
        say("No read of it through this mount needed a server of late: its bytes were in memory, or nobody read it.")
        return
    names = {part.server: part.name for part in found.servers}
    say(f"Last read: {read.length:,} bytes at {read.offset:,}, {time_text(read.at_ns)} UTC, trace {read.trace}")
    say(f"  kernel's request {duration_text(read.seconds)}" + (f", failed: {read.error}" if read.error else ""))
    for step in read.steps:
        say(f"    {_step_text(step, names)}")
    for part in found.servers:
        for each in part.parts:
            say(f"      {part.name}: {each.method} {duration_text(each.seconds)}")
        if not part.known:
            say(f"      {part.name}: does not know this trace any more")
    if not read.steps:
        say("    no server was asked for data: another read had asked already, or only the map was missing")


def _step_text(step: Step, names: dict[int, str]) -> str:
    name = names.get(step.server, f"server {step.server}")
    why = ", because another was slow" if step.hedge else ""
    end = "" if not step.outcome else f", {step.outcome}"
    when = f"after {duration_text(step.begun)}" if step.begun > 0 else "asked before this read"
    took = duration_text(step.ended - step.begun)
    return f"{when}: {name}, {step.length:,} bytes of chunk {step.chunk} in {took}{why}{end}"

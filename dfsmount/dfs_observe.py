"""`dfs stats`, `dfs top`, `dfs profile` and `dfs explain`: what mounts and servers are doing, asked of themselves."""

import marshal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from dfsmount.dfs_options import AsJson, Data, KeyFile, Metaserver, find, print_json, say

if TYPE_CHECKING:
    from metaserver.controlsocket import Function, Process

AnswerT = TypeVar("AnswerT")
MountPoint = Annotated[Path, typer.Argument(metavar="MOUNT", help="A mounted directory, or anything in it.")]
Seconds = Annotated[float, typer.Option("--seconds", "-s", min=0.1, max=60, help="For how long to look.")]
Rows = Annotated[int, typer.Option("--rows", min=1, max=500, help="How many lines to show.")]


def add_to(app: typer.Typer) -> None:
    app.command()(stats)
    app.command()(top)
    app.command()(profile)
    app.command()(explain)


def stats(mount: MountPoint, as_json: AsJson = False) -> None:
    """Show what a mount has done since it began: operations, how long they took, bytes, caches.

    \b
    Example:
      dfs stats /mnt/dfs
    """
    from dfsmount.telling import Stats, stats_lines

    found = _ask_mount(mount, "stats", Stats)
    if as_json:
        print_json(found)
    else:
        say("".join(stats_lines(found)).rstrip())


def top(
    data: Data = "",
    metaserver: Metaserver = "",
    key_file: KeyFile = "",
    seconds: Annotated[float, typer.Option("--seconds", "-s", min=0.2, help="Between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Watch servers, mounts, operations and what waits, until Ctrl-C.

    Operations and what waits are those of mounts on this host.

    \b
    Example:
      dfs top --once
    """
    from dfsmount import dfs_top

    access = find(data, metaserver, key_file)
    if as_json:
        print_json(dfs_top.look(access))
    else:
        dfs_top.watch(access, seconds, once=once)


def profile(
    mount: Annotated[Path | None, typer.Argument(metavar="[MOUNT]", help="A mounted directory.")] = None,
    cpu: Annotated[str, typer.Option("--cpu", metavar="PROCESS", help="Instead: the Python of a process.")] = "",
    seconds: Seconds = 10.0,
    rows: Rows = 20,
    output: Annotated[Path | None, typer.Option("--output", help="With --cpu: also a file for pstats.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show which operations on which files took how long in a mount, for some seconds.

    With --cpu, which functions a process of ours spent its time in: its pid, or `metaserver`, `chunkserver`,
    `dfsmount` if there is one only on this host. It runs at about half its speed meanwhile. Only for root and the user
    that it runs as.

    \b
    Example:
      dfs profile /mnt/dfs --seconds 5
      dfs profile --cpu metaserver
    """
    from dfsmount.dfs_layout import Problem

    if (mount is None) == (not cpu):
        raise Problem("name a mount, or a process with --cpu")
    if mount is not None:
        _profile_mount(mount, seconds, rows, as_json)
    else:
        _profile_process(cpu, seconds, rows, output, as_json)


def explain(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A regular file on a mount.")],
    data: Data = "",
    metaserver: Metaserver = "",
    key_file: KeyFile = "",
    as_json: AsJson = False,
) -> None:
    """Show where a file's bytes are, which replicas are good, and how its last read went.

    The read is the last through this mount that needed servers: whom it asked, how long each took, and how much of
    that was spent in the server and on its disk. Exit code 1 if a replica is not as it should be.

    \b
    Example:
      dfs explain /mnt/dfs/video.mp4
    """
    from dfsmount import dfs_chunks, dfs_explain

    found = dfs_explain.look(file, lambda path: find(data, metaserver, key_file, path))
    if as_json:
        print_json(found)
    else:
        dfs_explain.show(found)
    if dfs_chunks.bad(found.file.pieces):
        raise typer.Exit(1)


# -- asking mounts and processes -----------------------------------------------------------------------------------


def _ask_mount(mount: Path, command: str, type_: type[AnswerT], timeout: float = 5.0, **arguments: Any) -> AnswerT:
    from dfsmount.dfs_asking import ask, process_of

    return ask(process_of(mount), command, type_, timeout, **arguments)


def _profile_mount(mount: Path, seconds: float, rows: int, as_json: bool) -> None:
    from dfsmount.opstats import Used
    from dfsmount.telling import duration_text

    used = _ask_mount(mount, "profile", list[Used], seconds + 5, seconds=seconds)[:rows]
    if as_json:
        print_json(used)
        return
    say(f"{'operation':<12}{'count':>9}{'total':>11}{'each':>11}  file")
    for each in used:
        name = each.name or _inode_text(each.ino)
        mean = duration_text(each.seconds / each.count)
        say(f"{each.operation:<12}{each.count:>9,}{duration_text(each.seconds):>11}{mean:>11}  {name}")
    if not used:
        say("nothing was asked of this mount meanwhile")


def _inode_text(ino: int) -> str:
    """Where nobody has looked the name up meanwhile. The root of a filesystem is inode 1."""
    return "closed files, and others" if ino == 0 else "the root directory" if ino == 1 else f"inode {ino}"


def _profile_process(name: str, seconds: float, rows: int, output: Path | None, as_json: bool) -> None:
    from dfsmount.dfs_asking import ask
    from metaserver.controlsocket import Function

    functions = ask(_process(name), "cpu", list[Function], seconds + 10, seconds=seconds)
    if output is not None:
        _write(output, functions)
    if as_json:
        print_json(functions[:rows])
        return
    say(f"{'own':>9}{'with calls':>12}{'calls':>11}  function")
    for each in functions[:rows]:
        place = f"{'/'.join(Path(each.file).parts[-2:])}:{each.line}" if each.line else each.file
        say(f"{each.own:>8.3f}s{each.cumulative:>11.3f}s{each.calls:>11,}  {each.function} ({place})")


def _process(name: str) -> "Process":
    from dfsmount.dfs_layout import Problem
    from metaserver import controlsocket

    known = controlsocket.processes()
    found = [each for each in known if name in (each.program, str(each.pid))]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(f"{each.program} {each.pid}" for each in known) or "none"
    which = "several processes are" if found else "no process is"
    raise Problem(f"{which} {name}: give a pid (on this host: {shown})")


def _write(path: Path, functions: "list[Function]") -> None:
    """As pstats.Stats(FILE) reads it; who called whom is not in it."""
    from dfsmount.dfs_layout import Problem

    rows: dict[Any, Any] = {
        (f.file, f.line, f.function): (f.calls, f.calls, f.own, f.cumulative, {}) for f in functions
    }
    try:
        path.write_bytes(marshal.dumps(rows))
    except OSError as error:
        raise Problem(f"cannot write {path}: {error.strerror}") from None

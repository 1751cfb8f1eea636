"""The commands ``dfsmount`` and ``mount.dfs``: reading the command line, going to the background, one line on errors.

    dfsmount HOST[:PORT][/SUBDIRECTORY] MOUNTPOINT [-f] [-d] [-o OPTION[,OPTION...]]...

Exit codes: 0 mounted (in the background) or unmounted cleanly (in the foreground), 1 failure, 2 wrong usage;
``mount.dfs``: 32 for a failure, as mount(8) has it.
"""

import os
import re
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from dfsmount.config import MountPlan, Options, UsageError, parse_options, parse_source
from metaserver.version import VERSION

USAGE = "usage: dfsmount HOST[:PORT][/SUBDIRECTORY] MOUNTPOINT [-f] [-d] [-o OPTION[,OPTION...]]"
HELPER_USAGE = "usage: mount.dfs HOST[:PORT][/SUBDIRECTORY] MOUNTPOINT [-sfnvw] [-o OPTION[,OPTION...]]"
HELP = f"""{USAGE}

Mounts a directory of a cluster. In the background unless -f is given: the command returns when the mount works.

  -f, --foreground   stay in the foreground and log to standard error
  -d, --debug        log more; implies -f
  -o OPTIONS         a comma-separated list, may be given more than once:
       ro                 no changes
       allow_other        other users may use the mount too (default for root)
       key_file=PATH      the cluster key (default: /etc/dfs/cluster.key, if it exists)
       sync_close         close(2) waits until the data is part of the file
       timeout=SECONDS    how long an operation waits for servers before it fails (default 30)
       hard               wait a week instead
       noatime            reading moves no time of access (default: as relatime, sent late as with lazytime)
       nodiratime         listing a directory moves none
       attr_timeout=SECONDS, entry_timeout=SECONDS
                          how long attributes and names are cached (default 1)
       cache_mib=N        memory for blocks that were read
       dirty_mib=N        memory for data that is not written yet
       driver=libfuse     have pyfuse3 and libfuse take the kernel's requests (default: direct, which costs less)
       log_file=PATH      where it logs (default: syslog; with -f standard error)
     and what mount(8) passes along: rw, noexec, nosuid, dev, suid, noauto, nofail, _netdev, x-...
  -h, --help         this text;  -V, --version

Unmount with umount or fusermount3 -u; SIGTERM unmounts as well.
"""
FAILED, WRONG_USAGE, HELPER_FAILED = 1, 2, 32
_PRIORITY = re.compile("<([0-7])>")
# LOG_INFO of syslog(3).
_INFO = 6
# Longer than any wait of the child before it knows.
READY_SECONDS = 120.0


def parse_command(arguments: Sequence[str]) -> MountPlan:
    """Reads the arguments of ``dfsmount``; raises :class:`UsageError`."""
    return _parse(arguments, {"-f": "foreground", "--foreground": "foreground", "-d": "debug", "--debug": "debug"})


def parse_helper(arguments: Sequence[str]) -> tuple[MountPlan, bool]:
    """Reads what mount(8) passes to a helper: the plan, and whether it is only pretending (``-f``)."""
    words = {"s": "sloppy", "f": "fake", "n": "", "v": "", "w": "", "r": "ro"}
    flat: list[str] = []
    seen: set[str] = set()
    position = 0
    while position < len(arguments):
        word = arguments[position]
        if word in ("-t", "-N"):
            position += 1
        elif word.startswith("-") and not word.startswith("-o") and word[1:] and set(word[1:]) <= set(words):
            seen.update(words[letter] for letter in word[1:])
        elif word == "-o" and position + 1 < len(arguments):
            flat += arguments[position : position + 2]
            position += 1
        else:
            flat.append(word)
        position += 1
    if "ro" in seen:
        flat += ["-o", "ro"]
    return _parse(flat, {}, sloppy="sloppy" in seen), "fake" in seen


def _parse(arguments: Sequence[str], flags: dict[str, str], *, sloppy: bool = False) -> MountPlan:
    plain: list[str] = []
    lists: list[str] = []
    seen: set[str] = set()
    rest = iter(arguments)
    for word in rest:
        if word == "-o":
            value = next(rest, None)
            if value is None:
                raise UsageError("-o needs a list of options")
            lists.append(value)
        elif word.startswith("-o") and len(word) > 2:
            lists.append(word[2:])
        elif word in flags:
            seen.add(flags[word])
        elif word == "--":
            plain.extend(rest)
        elif word.startswith("-") and word != "-":
            raise UsageError(f"unknown option {word}")
        else:
            plain.append(word)
    options = parse_options(lists, sloppy=sloppy)
    if len(plain) != 2:
        raise UsageError("a source and a mountpoint are needed" if len(plain) < 2 else f"what is {plain[2]}?")
    options.debug = options.debug or "debug" in seen
    foreground = "foreground" in seen or options.debug
    return MountPlan(parse_source(plain[0]), Path(plain[1]), options, foreground)


# -- running -------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """``dfsmount``."""
    words = sys.argv[1:] if arguments is None else arguments
    if "-h" in words or "--help" in words:
        print(HELP, end="")
        sys.exit(0)
    if "-V" in words or "--version" in words:
        print(f"dfsmount {VERSION}")
        sys.exit(0)
    try:
        plan = parse_command(words)
    except UsageError as error:
        _fail("dfsmount", f"{error} (try --help)", WRONG_USAGE)
    sys.exit(_run("dfsmount", plan, FAILED))


def mount_helper(arguments: Sequence[str] | None = None) -> NoReturn:
    """``mount.dfs``, what mount(8) calls for file systems of type dfs."""
    try:
        plan, fake = parse_helper(sys.argv[1:] if arguments is None else arguments)
    except UsageError as error:
        _fail("mount.dfs", f"{error} ({HELPER_USAGE})", WRONG_USAGE)
    sys.exit(0 if fake else _run("mount.dfs", plan, HELPER_FAILED))


def _fail(program: str, text: str, code: int) -> NoReturn:
    print(f"{program}: {text}", file=sys.stderr)
    sys.exit(code)


def _run(program: str, plan: MountPlan, failed: int) -> int:
    """Mounts. In the foreground it returns after the unmount, in the background when the mount works."""
    # Imported here so that --help and wrong usage do not need libfuse.
    from dfsmount import mount

    try:
        plan = mount.prepare(plan)
        if plan.foreground:
            _log(plan.options, _open_log(plan.options))
            return mount.run(plan, lambda: None)
        return _in_background(program, plan, failed)
    except mount.MountError as error:
        from metaserver import logs

        logs.complain(f"{program}: {error}")
        return failed


def _log(options: Options, descriptor: int | None = None) -> None:
    """To standard error, or to an open file (what is printed still goes to the terminal)."""
    from metaserver import logs

    # Open until the end of the process.
    stream = None if descriptor is None else os.fdopen(descriptor, "a", buffering=1)
    to_syslog = isinstance(sys.stderr, SyslogStream)
    logs.configure("debug" if options.debug else "info", stream=stream, prefixed=to_syslog or None)


def _open_log(options: Options) -> int | None:
    if options.log_file is None:
        return None
    try:
        return os.open(options.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
    except OSError as error:
        from dfsmount import mount

        raise mount.MountError(f"cannot write the log {options.log_file}: {error.strerror}") from None


def _in_background(program: str, plan: MountPlan, failed: int) -> int:
    """Forks twice; the first process waits for one line of the last: empty if the mount works, else why not."""
    told, tell = os.pipe()
    child = os.fork()
    if child:
        os.close(tell)
        return _wait_for_mount(program, told, child, failed)
    os.close(told)
    os.setsid()
    if os.fork() == 0:
        _serve_in_background(plan, tell)
    os._exit(0)


def _wait_for_mount(program: str, told: int, child: int, failed: int) -> int:
    os.waitpid(child, 0)
    ready, _, _ = select.select([told], [], [], READY_SECONDS)
    line = os.read(told, 4096) if ready else b"the mount does not answer"
    if line == b"\n":
        return 0
    text = line.decode(errors="replace").strip() or "the mount process ended unexpectedly; see its log"
    print(f"{program}: {text}", file=sys.stderr)
    return failed


def _serve_in_background(plan: MountPlan, tell: int) -> NoReturn:
    from dfsmount import mount

    code = FAILED
    try:
        os.chdir("/")
        _redirect(plan.options)
        _log(plan.options)
        code = mount.run(plan, lambda: _tell(tell, "\n"))
    except mount.MountError as error:
        _tell(tell, f"{error}\n")
    except BaseException as error:
        import structlog

        structlog.get_logger(__name__).exception("the mount ended")
        _tell(tell, f"{type(error).__name__}: {error}\n")
    os._exit(code)


def _tell(descriptor: int, line: str) -> None:
    """To the waiting parent; once it is gone, nobody listens."""
    try:
        os.write(descriptor, line.encode()[:4096])
        os.close(descriptor)
    except OSError:
        pass


def _redirect(options: Options) -> None:
    """Standard input and output to nowhere; standard error to the log file, or to syslog."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    opened = _open_log(options)
    log = nowhere if opened is None else opened
    for descriptor, target in ((0, nowhere), (1, nowhere), (2, log)):
        os.dup2(target, descriptor)
    if options.log_file is None:
        sys.stderr = SyslogStream()


class SyslogStream:
    """A text stream that syslog(3) gets, line by line; a line may begin with its priority, such as ``<4>``."""

    encoding = "utf-8"

    def __init__(self, send: Callable[[int, str], None] | None = None) -> None:
        self._rest = ""
        if send is None:
            import syslog

            syslog.openlog("dfsmount", syslog.LOG_PID, syslog.LOG_DAEMON)
            send = syslog.syslog
        self._send = send

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line:
                found = _PRIORITY.match(line)
                self._send(int(found[1]) if found else _INFO, line[found.end() :] if found else line)
        return len(text)

    def flush(self) -> None:
        """Lines are sent when they end."""

    def isatty(self) -> bool:
        return False


if __name__ == "__main__":
    main()

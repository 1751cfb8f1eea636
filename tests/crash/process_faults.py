"""Every disk fault on everything a real cluster keeps on its disks, while a verifying load runs on a real mount.

``python process_faults.py ROOT [PATTERN ...]`` goes through all cells ``structure / fault / when`` or those that match,
prints one line for each and a table at the end; exit code 1 if one was bad. ROOT is made and removed. A cell: the load
runs; the fault is switched on (under a running server, or while one is killed and started again); seconds later it
is switched off; the load must go on, and everything that was acknowledged must be read back from a cold mount.

Outcomes: ``masked`` (programs saw nothing, no process ended), ``ENOSPC`` or ``EIO`` (programs were told, nothing else
happened), ``restarted`` (a server ended with one clear line, was started again by its supervisor, and went on),
``stopped`` (it said that starting again would not help; it did go on when an operator started it after the fault was
gone), ``disk given up`` (a chunkserver writes nothing more to that disk until it is restarted). Bad: a wrong or lost
byte (through a mount, or in one of two sets of replicas), EIO for a full disk, ESTALE, a full disk that needs a restart
or on which nothing can be removed, a call that takes longer than it may, an exception that is not explained, anything
that does not go on afterwards; and a fault that nothing has met.
"""

import errno
import fnmatch
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from faulty_cluster import BackgroundLoad, Ended, FaultyCluster
from faulty_mount import CHANGES, SHORT, TAKES_SPACE, Fault
from kill_loop import read_replica_sets
from load_manifest import Directory, Recorded
from mount_cluster import wait_until

from chunkserver.chunkfile import PAYLOAD_OFFSET

HOLD_SECONDS = 4.0
GO_ON_SECONDS = 60.0
# A killed server is lost after some seconds, and a copy is made in some more.
REPAIR_SECONDS = 90.0
# With two of three servers each, chance leaves one out of so many with one in 700.
NEW_MOUNTS = 6
# A write may wait for space, and then the fsync; each 5 s (promise P6), and some more on a loaded machine.
TOLD_SECONDS = 10.0
RUNNING, START = "running", "start"


def flip(data: bytearray, chance: random.Random) -> None:
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def zero(data: bytearray, chance: random.Random) -> None:
    data[:4096] = bytes(len(data[:4096]))


def junk(data: bytearray, chance: random.Random) -> None:
    data[:4096] = chance.randbytes(len(data[:4096]))


class Kind(NamedTuple):
    """A fault: which calls end how, and whether programs may be told of it as a full disk only. Or what a file holds
    instead of what was written to it."""

    calls: tuple[str, ...]
    error: str
    full: bool = False
    damage: Callable[[bytearray, random.Random], None] | None = None


KINDS = {
    "EIO on read": Kind(("read",), "EIO"),
    "EIO on write": Kind(("write",), "EIO"),
    "EIO on fsync": Kind(("fsync",), "EIO"),
    "ENOSPC": Kind(TAKES_SPACE, "ENOSPC", full=True),
    "EDQUOT": Kind(TAKES_SPACE, "EDQUOT", full=True),
    "no new files": Kind(("create", "link", "mkdir"), "ENOSPC", full=True),
    "short write": Kind(("write",), SHORT),
    "read-only": Kind(CHANGES, "EROFS"),
    "bit flip": Kind((), "", damage=flip),
    "zeroed": Kind((), "", damage=zero),
    "junk": Kind((), "", damage=junk),
}
# As a full disk is for files whose blocks are there already.
NO_NEW_FILES = "no new files"
DAMAGES = tuple(name for name, kind in KINDS.items() if kind.damage is not None)
WRITTEN = tuple(name for name in KINDS if name not in (NO_NEW_FILES, *DAMAGES))
# What is small and read by a start only. (Damage of everything else: fault_matrix, test_single_faults.)
READ = ("EIO on read", *DAMAGES)


class Structure(NamedTuple):
    """Where it lies, whose it is (the server that is restarted), which faults can meet it, and when. ``everywhere``:
    all servers that could mask it have it as well."""

    path: str
    owner: str
    kinds: tuple[str, ...] = WRITTEN
    when: tuple[str, ...] = (RUNNING, START)
    start: int = 0
    stop: int = 1 << 62
    everywhere: bool = False


# The server that the load's chunk lies on first.
WRITER = "{server}"
_CHUNKS = f"{WRITER}/chunks/*"
_ALL = "|".join(f"chunkserver{number}/chunks/*" for number in (1, 2, 3))
STRUCTURES = {
    "LMDB file": Structure("metaserver/data.mdb|metaserver/data.mdb.new", "metaserver"),
    "changelog": Structure("metaserver/changelog|metaserver/changelog/*", "metaserver", (*WRITTEN, NO_NEW_FILES)),
    "snapshot file": Structure("metaserver/snapshots|metaserver/snapshots/*", "metaserver"),
    "metaserver's configuration": Structure("metaserver.toml", "metaserver", READ, (START,)),
    "metaserver's identity": Structure("metaserver/identity.json*", "metaserver", READ, (START,)),
    "key file (metaserver)": Structure("cluster.key*", "metaserver", READ, (START,)),
    "key file (chunkserver)": Structure("cluster.key*", "chunkserver1", READ, (START,)),
    "chunk data": Structure(_CHUNKS, WRITER, start=PAYLOAD_OFFSET),
    "chunk index": Structure(_CHUNKS, WRITER, stop=PAYLOAD_OFFSET),
    "chunk data, all servers": Structure(_ALL, "", when=(RUNNING,), start=PAYLOAD_OFFSET, everywhere=True),
    "chunk index, all servers": Structure(_ALL, "", when=(RUNNING,), stop=PAYLOAD_OFFSET, everywhere=True),
    "chunkserver's configuration": Structure("chunkserver1.toml", "chunkserver1", READ, (START,)),
    "chunkserver's identity": Structure("chunkserver1/identity*", "chunkserver1"),
    "chunkserver's identity, one of two": Structure("chunkserver1/identity.json", "chunkserver1", DAMAGES, (START,)),
    "chunkserver's identity, both": Structure("chunkserver1/identity*", "chunkserver1", DAMAGES, (START,)),
}


class Cell(NamedTuple):
    structure: str
    kind: str
    when: str

    def __str__(self) -> str:
        return " / ".join(self)

    def faults(self, server: str) -> list[Fault]:
        """Reads and writes within the structure, everything else of its file."""
        place, kind = STRUCTURES[self.structure], KINDS[self.kind]
        path = place.path.format(server=server)
        placed = tuple(call for call in kind.calls if call in ("read", "write"))
        others = tuple(call for call in kind.calls if call not in placed)
        return [
            Fault(placed, path, kind.error, start=place.start, stop=place.stop),
            Fault(others, path, kind.error),
        ]


# No cell, and why.
UNTOUCHED = {
    Cell("changelog", "EIO on read", RUNNING): "read by a start, and half an hour after it (verify_recovery)",
}


def cells(*patterns: str) -> Iterator[Cell]:
    """All, or those that match one of the patterns."""
    for name, structure in STRUCTURES.items():
        for when in structure.when:
            for kind in structure.kinds:
                cell = Cell(name, kind, when)
                wanted = not patterns or any(fnmatch.fnmatch(str(cell), pattern) for pattern in patterns)
                if wanted and cell not in UNTOUCHED:
                    yield cell


class Outcome(NamedTuple):
    """``bad``: what must not be, in words. ``kinds``: see the module."""

    kinds: tuple[str, ...]
    bad: tuple[str, ...]
    hits: int
    said: tuple[str, ...]

    def __str__(self) -> str:
        return ", ".join(self.kinds)


class Trial:
    """One cell on a cluster that is whole before and afterwards."""

    def __init__(self, cluster: FaultyCluster, cell: Cell, number: int) -> None:
        self.cluster = cluster
        self.cell = cell
        self.structure = STRUCTURES[cell.structure]
        self.kind = KINDS[cell.kind]
        self.number = number
        self.server = ""
        self.given_up: list[str] = []
        self.bad: list[str] = []
        self.marks: dict[str, int] = {}
        # What the damaged files held.
        self.damaged: dict[Path, bytes] = {}
        self.victim = cluster.real.mnt / f"victim{number}"

    def run(self, hold_seconds: float = HOLD_SECONDS) -> Outcome:
        cluster = self.cluster
        cluster.ended.clear()
        marks = cluster.marks()
        load = BackgroundLoad(
            cluster.real.mnt / f"cell{self.number}", cluster.real.root / f"manifest{self.number}", self.number
        )
        try:
            self._wait_for(load, 15)
            put(self.victim, b"victim" * 100)
            self._begin_fault(load)
            self._hold(hold_seconds)
            hits = sum(cluster.disk.set()) + len(self.damaged)
            self._undo_damage()
            self._recover(load)
        finally:
            cluster.disk.set()
            load.stop()
        self._verify(load)
        self._look_at_logs(cluster.log_since(marks))
        return self._outcome(load, hits)

    def _begin_fault(self, load: BackgroundLoad) -> None:
        """Everything that is read from now on comes from the disk."""
        self.server = self._server_of(load)
        owner = self.structure.owner.format(server=self.server)
        if self.cell.when == START:
            self.cluster.kill(owner)
        self.cluster.disk.set(*self.cell.faults(self.server))
        self._damage()
        self.cluster.disk.drop_caches()
        if self.cell.when == START:
            self.marks = self.cluster.marks()
            self.cluster.start(owner)

    def _damage(self) -> None:
        if self.kind.damage is None:
            return
        chance = random.Random(f"{self.number} {self.cell}")
        for path in sorted(self.cluster.disk.backing.glob(self.structure.path)):
            self.damaged[path] = path.read_bytes()
            data = bytearray(self.damaged[path])
            self.kind.damage(data, chance)
            path.write_bytes(data)
        assert self.damaged, "there is nothing to be damaged"

    def _undo_damage(self) -> None:
        """An operator puts the files back from a backup, and starts the server again, whatever it does."""
        for path, content in self.damaged.items():
            path.write_bytes(content)
        if self.damaged:
            self.cluster.disk.drop_caches()
            self.cluster.kill(self.structure.owner)
            self.cluster.start(self.structure.owner)

    def _server_of(self, load: BackgroundLoad) -> str:
        """Where the newest bytes of the load are: this mount writes one chunk at a time.

        What was written while only one server was up is copied first: nobody masks faults of a single copy."""
        probe = load.directory / "probe"
        names: list[str] = []

        def has_copies() -> bool:
            self.cluster.supervise()
            put(probe, b"probe")
            names[:] = [replica.name for replica in self.cluster.real.file(probe).extents[-1].replicas]
            return len(names) >= self.cluster.real.wanted.copies

        wait_until(has_copies, "what is written has its copies", REPAIR_SECONDS)
        self._wait_copied()
        return names[0]

    def _wait_copied(self) -> None:
        def copied() -> bool:
            self.cluster.supervise()
            chunks = self.cluster.real.status().chunks
            return chunks.too_few == 0 and chunks.missing == 0

        wait_until(copied, "everything has its copies", REPAIR_SECONDS)

    def _hold(self, seconds: float) -> None:
        """Programs read old files meanwhile: what they get is right, or an error that may be."""
        end = time.monotonic() + seconds
        if "identity" in self.cell.structure and self.cell.when == RUNNING:
            # It is written when the metaserver has begun a new life.
            self.cluster.kill("metaserver")
            self.cluster.start("metaserver")
        if self.kind.calls == ("read",) and self.is_chunk and self.cell.when == RUNNING:
            with self.cluster.cold_mount() as point:
                self._read_old(point, may_fail=self.structure.everywhere)
        if self.cell.when == START:
            # However long a start takes on this machine: until the fault was met, or there is nothing to meet it.
            wait_until(lambda: self._is_met() or self._has_started(), "it starts", 30)
            if self.is_chunk:
                self._use_chunks()
            elif "snapshot" in self.cell.structure:
                self._watch_until_met(4 * float(self.cluster.options["snapshot_seconds"]))
            end = time.monotonic() + seconds / 2
        elif self.cell.kind == NO_NEW_FILES:
            # What was made ahead has to be filled first.
            self._watch_until_met(60.0)
            end = time.monotonic() + seconds
        self._remove_something()
        self.cluster.watch(max(0.0, end - time.monotonic()))

    @property
    def is_chunk(self) -> bool:
        return self.cell.structure.startswith(("chunk data", "chunk index"))

    def _is_met(self) -> bool:
        self.cluster.supervise()
        return sum(self.cluster.disk.hits()) > 0 or (bool(self.damaged) and bool(self.cluster.ended))

    def _has_started(self) -> bool:
        owner = self.structure.owner.format(server=self.server)
        return "serving" in self.cluster.log_since({owner: self.marks[owner]})[owner]

    def _watch_until_met(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._is_met() and time.monotonic() < end:
            self.cluster.watch(0.2)

    def _use_chunks(self) -> None:
        """The load has gone to other servers when this one was killed. Each mount writes to a chunk of its own, on two
        of the three servers: until one of them has met the fault."""
        for number in range(NEW_MOUNTS):
            if self._is_met() and self._has_started():
                return
            self._watch_until_up()
            with self.cluster.cold_mount() as point:
                self._read_old(point)
                with suppress(OSError):
                    put(point / f"other{self.number}.{number}", b"other" * 1000)

    def _watch_until_up(self) -> None:
        def up() -> bool:
            self.cluster.supervise()
            return self._has_started() and self.cluster.is_ready()

        with suppress(AssertionError):  # it does not start with the fault
            wait_until(up, "the server is up with the fault", 10)

    def _remove_something(self) -> None:
        """What frees space works on a full disk; not where nothing at all can be logged."""
        logged = self.cell.structure != "changelog" or self.cell.kind == NO_NEW_FILES
        if not self.kind.full or self.cell.when == START or not logged:
            return
        try:
            self.victim.unlink()
        except OSError as error:
            self.bad.append(f"rm fails on a full disk: {error.strerror}")

    def _read_old(self, point: Path, *, may_fail: bool = False) -> None:
        for path, content in sorted(old_files().items()):
            try:
                if (point / path).read_bytes() != content:
                    self.bad.append(f"wrong bytes in {path}")
            except OSError as error:
                if not may_fail:
                    self.bad.append(f"{path} cannot be read: {error.strerror}")

    def _wait_for(self, load: BackgroundLoad, steps: int) -> None:
        goal = load.load.steps + steps

        def gone_on() -> bool:
            self.cluster.supervise()
            return load.has_gone_on(goal)

        wait_until(gone_on, f"the load goes on ({load.load.errors}, {self.cluster.ended[-3:]})", GO_ON_SECONDS)

    def _recover(self, load: BackgroundLoad) -> None:
        """The fault is gone. A full disk needs nobody; otherwise an operator restarts what says that it needs it."""
        self.cluster.wait_ready(operator=not self.kind.full or self.cell.when == START)
        self.given_up = self.cluster.failed_disks()
        for name in self.given_up:
            self.cluster.kill(name)
            self.cluster.start(name)
        self.cluster.wait_ready()
        self._wait_for(load, 10)

    def _verify(self, load: BackgroundLoad) -> None:
        with self.cluster.cold_mount() as point:
            self._read_old(point)
            self.bad += load.load.broken + load.load.verify(Directory(point / load.directory.name))
        self._verify_replicas(load)

    def _verify_replicas(self, load: BackgroundLoad) -> None:
        """The same from each set of replicas alone."""
        self._wait_copied()
        paths = {str(path.relative_to(load.directory)): path for path in load.directory.rglob("*") if path.is_file()}
        sets, trees = read_replica_sets(self.cluster.real, {name: path.stat().st_ino for name, path in paths.items()})
        self.bad += sets.broken
        for name, tree in zip("AB", trees, strict=True):
            self.bad += [f"replicas {name}: {line}" for line in load.load.verify(Recorded(tree))]

    def _look_at_logs(self, logs: dict[str, str]) -> None:
        for name, text in logs.items():
            if "Traceback" in text:
                self.bad.append(f"{name} has logged a traceback")
        for ended in self.cluster.ended:
            if not ended.words:
                self.bad.append(f"{ended.name} ended without a word")

    def _outcome(self, load: BackgroundLoad, hits: int) -> Outcome:
        ended, errors = self.cluster.ended, load.load.errors
        if self.kind.full:
            self._check_full(ended, load)
        kinds = sorted(name for name in errors if name != "ENOENT")
        # A fatal signal is the only way a page that cannot be read is heard of.
        kinds += ["stopped"] if any(one.code in (65, 78) for one in ended) else []
        kinds += ["restarted"] if any(one.code not in (65, 78) for one in ended) else []
        kinds += ["disk given up"] if self.given_up else []
        if not hits:
            self.bad.append("nothing has met the fault")
        if "ESTALE" in errors:
            self.bad.append("a program was told ESTALE")
        said = tuple(dict.fromkeys(f"{one.name} ({one.code}): {one.words}" for one in ended))
        return Outcome(tuple(kinds) or ("masked",), tuple(self.bad), hits, said)

    def _check_full(self, ended: list[Ended], load: BackgroundLoad) -> None:
        if self.cell.when == RUNNING and ended:
            self.bad.append("a full disk has ended a process")
        if self.given_up:
            self.bad.append("a full disk was given up")
        wrong = set(load.load.errors) - {"ENOSPC", "ENOENT"}
        if wrong:
            self.bad.append(f"a full disk was told as {sorted(wrong)}")
        if load.fs.slowest.get(errno.ENOSPC, 0.0) > TOLD_SECONDS:
            self.bad.append(f"told of a full disk after {load.fs.slowest[errno.ENOSPC]:.1f} s")


def old_files() -> dict[str, bytes]:
    """What is there before every cell: some small files, and one of several blocks."""
    chance = random.Random(99)
    return {f"old{number}": chance.randbytes(3000 if number else 600_000) for number in range(12)}


def put(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def begin(root: Path, options: dict[str, str] | None = None) -> FaultyCluster:
    cluster = FaultyCluster(root, options=options)
    try:
        cluster.begin()
        for name, content in old_files().items():
            put(cluster.real.mnt / name, content)
    except BaseException:
        cluster.destroy()
        raise
    return cluster


class Matrix:
    """Cells one after another; a cluster that a cell has broken is replaced."""

    def __init__(
        self,
        root: Path,
        say: Callable[[str], None] = print,
        hold_seconds: float = HOLD_SECONDS,
        options: dict[str, str] | None = None,
    ) -> None:
        self.root = root
        self.options = options
        self.hold_seconds = hold_seconds
        self.say = say
        self.outcomes: dict[Cell, Outcome] = {}
        self._cluster: FaultyCluster | None = None

    def run(self, wanted: list[Cell]) -> list[str]:
        """Every bad outcome, in words."""
        try:
            for number, cell in enumerate(wanted):
                self._run_one(cell, number)
        finally:
            self._drop()
        return [f"{cell}: {text}" for cell, outcome in self.outcomes.items() for text in outcome.bad]

    def _run_one(self, cell: Cell, number: int) -> None:
        if self._cluster is None:
            self._cluster = begin(self.root / f"cluster{number}", self.options)
        started = time.monotonic()
        try:
            outcome = Trial(self._cluster, cell, number).run(self.hold_seconds)
        except (AssertionError, OSError) as error:
            outcome = Outcome(("broken",), (str(error),), 0, tuple(map(str, self._cluster.ended)))
        self.outcomes[cell] = outcome
        seconds = time.monotonic() - started
        self.say(f"{cell!s:60} {outcome!s:30} {outcome.hits:6} hits {seconds:5.1f} s")
        for line in (*outcome.said, *(f"BAD: {text}" for text in outcome.bad)):
            self.say(f"    {line}")
        if outcome.bad:
            shutil.copytree(self._cluster.disk.backing / "logs", self.root / f"bad{number}")
            self._drop()

    def _drop(self) -> None:
        if self._cluster is not None:
            self._cluster.destroy()
            self._cluster = None

    def table(self) -> Iterator[str]:
        """Outcomes by structure and fault, as Markdown."""
        yield "| structure | when | " + " | ".join(KINDS) + " |"
        yield "|---" * (2 + len(KINDS)) + "|"
        rows = dict.fromkeys((cell.structure, cell.when) for cell in self.outcomes)
        for structure, when in rows:
            found = [self.outcomes.get(Cell(structure, kind, when)) for kind in KINDS]
            yield f"| {structure} | {when} | " + " | ".join(str(one) if one else "-" for one in found) + " |"


def main(arguments: list[str]) -> int:
    root = Path(arguments[0]).resolve()
    root.mkdir(parents=True)
    matrix = Matrix(root, lambda line: print(line, flush=True))
    bad = matrix.run(list(cells(*arguments[1:])))
    for line in matrix.table():
        print(line)
    classes = Counter(str(outcome) for outcome in matrix.outcomes.values())
    print(f"{len(matrix.outcomes)} cells, {len(bad)} bad: {dict(classes)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

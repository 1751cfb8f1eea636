"""What is measured: each workload is a function of a :class:`Place`, returns how much it did, and is timed as a whole.

Everything is done as a user would: by the usual programs, or by plain system calls. Preparation that must not be timed
is in a function of its own.
"""

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

MIB = 1 << 20
SMALL = b"0123456789abcdef" * 64


class Sizes(NamedTuple):
    """How much of everything; bytes and counts."""

    big: int = 1024 * MIB
    files: int = 3000
    random_file: int = 256 * MIB
    random_operations: int = 2000
    synced_appends: int = 300
    commits: int = 200
    small_writes: int = 256 * MIB
    spread: int = 64 * MIB
    tree_files: int = 2500
    clone_files: int = 1500


QUICK = Sizes(128 * MIB, 500, 64 * MIB, 500, 50, 40, 32 * MIB, 16 * MIB, 500, 300)


class Sources:
    """What is copied from: on the local disk, in the page cache, made once."""

    def __init__(self, work: Path, sizes: Sizes) -> None:
        self.sizes = sizes
        self.tree = work / "tree"
        self.archive = work / "tree.tar"
        self.repository = work / "repository"
        # Written once here: the first touch of fresh memory is slow, and not what is measured.
        self.buffer = bytearray(os.urandom(MIB))

    def make(self) -> None:
        """A real tree: the Python standard library, and packages beside it where that is small, as far as wanted."""
        copied = copy_some(Path(sysconfig.get_path("stdlib")), self.tree, self.sizes.tree_files)
        copy_some(Path(sysconfig.get_path("purelib")), self.tree / "packages", self.sizes.tree_files - copied)
        subprocess.run(["tar", "-cf", self.archive, "-C", self.tree.parent, "tree"], check=True)
        copy_some(self.tree, self.repository, self.sizes.clone_files)
        git = ["git", "-c", "user.name=bench", "-c", "user.email=bench@localhost", "-C", str(self.repository)]
        for words in (["init", "-q"], ["add", "-f", "-A"], ["commit", "-q", "-m", "everything"]):
            subprocess.run([*git, *words], check=True)
        self.warm()

    def warm(self) -> None:
        """Reads everything, so that no run pays for the source's disk."""
        for path in (self.tree, self.repository, self.archive):
            subprocess.run(["tar", "-cf", "-", path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)


def copy_some(source: Path, target: Path, count: int) -> int:
    """Copies the first ``count`` files of a tree (in sorted order, without caches), with modes and times.

    Returns how many there were.
    """
    copied = 0
    names = ("__pycache__", "site-packages", ".git")
    for folder, folders, files in os.walk(source):
        folders[:] = sorted(name for name in folders if name not in names)
        for name in sorted(files):
            if copied == count:
                return copied
            place = target / Path(folder).relative_to(source)
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy2(Path(folder) / name, place / name, follow_symlinks=False)
            copied += 1
    return copied


class Place(NamedTuple):
    """Where a workload works: an empty directory that stays from one workload of a round to the next."""

    root: Path
    sources: Sources

    @property
    def sizes(self) -> Sizes:
        return self.sources.sizes


class Workload(NamedTuple):
    """``run`` returns the amount done; ``unit`` says of what, per second; "s" means that the time itself is shown.

    ``cold``: caches are dropped before. ``needs``: a workload of the same round whose result this one works on.
    ``bar``: how many times as fast as the better of the others ours is to be; 0: nothing is promised.
    """

    name: str
    unit: str
    run: Callable[[Place], float]
    cold: bool = False
    prepare: Callable[[Place], None] | None = None
    needs: str = ""
    bar: float = 0.0


def command(*words: str | Path) -> None:
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL)


def write_big(place: Place) -> float:
    with (place.root / "big").open("wb", buffering=0) as file:
        for _ in range(place.sizes.big // MIB):
            file.write(place.sources.buffer)
        os.fsync(file.fileno())
    return place.sizes.big / MIB


def read_big(place: Place) -> float:
    with (place.root / "big").open("rb", buffering=0) as file:
        while file.readinto(place.sources.buffer):
            pass
    return place.sizes.big / MIB


def write_small(place: Place) -> float:
    """4 KiB at a time through one descriptor, as a program without buffers of its own does; on stable storage at the
    end, as with the others: what is only in memory is not written."""
    block = bytes(place.sources.buffer[:4096])
    with (place.root / "small").open("wb", buffering=0) as file:
        for _ in range(place.sizes.small_writes // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    return place.sizes.small_writes / MIB


def spread_writes(count: int) -> Callable[[Place], float]:
    """Writes 64 KiB to each of ``count`` open files in turn, until all of them together have the same size."""

    def run(place: Place) -> float:
        block = bytes(place.sources.buffer[: 64 << 10])
        paths = [place.root / f"spread-{count}-{number}" for number in range(count)]
        descriptors = [os.open(path, os.O_WRONLY | os.O_CREAT, 0o644) for path in paths]
        for number in range(place.sizes.spread // len(block)):
            os.write(descriptors[number % count], block)
        for descriptor in descriptors:
            os.fsync(descriptor)
            os.close(descriptor)
        return place.sizes.spread / MIB

    return run


def create_from(count: int) -> Callable[[Place], float]:
    """As many files as :func:`create_files`, by ``count`` processes, each in a directory of its own."""

    def run(place: Place) -> float:
        share = place.sizes.files // count
        script = (
            "import sys\nfor n in range(int(sys.argv[2])):\n"
            " with open(f'{sys.argv[1]}/{n:06}', 'xb', buffering=0) as f: f.write(bytes(1024))"
        )
        running = []
        for number in range(count):
            folder = place.root / f"made-{count}-{number}"
            folder.mkdir()
            running.append(subprocess.Popen([sys.executable, "-IS", "-c", script, str(folder), str(share)]))
        failed = [process.args for process in running if process.wait()]
        if failed:
            raise OSError(f"{len(failed)} of {count} processes could not create their files")
        return share * count

    return run


def find_tree(place: Place) -> float:
    command("find", place.root / "copied", "-printf", "%s %T@\\n")
    return 1


def untar(place: Place) -> float:
    command("tar", "-xf", place.sources.archive, "-C", place.root)
    return 1


def copy_tree(place: Place) -> float:
    command("cp", "-a", place.sources.tree, place.root / "copied")
    return 1


def rsync_tree(place: Place) -> float:
    command("rsync", "-a", f"{place.sources.tree}/", place.root / "synced/")
    return 1


def read_tree(place: Place) -> float:
    for folder, _, files in os.walk(place.root / "copied"):
        for name in files:
            with open(os.path.join(folder, name), "rb", buffering=0) as file:
                while file.readinto(place.sources.buffer):
                    pass
    return 1


def warm_tree(place: Place) -> None:
    read_tree(place)


def clone(place: Place) -> float:
    command("git", "clone", "-q", f"file://{place.sources.repository}", place.root / "cloned")
    return 1


def remove_tree(place: Place) -> float:
    command("rm", "-r", place.root / "copied")
    return 1


def create_files(place: Place) -> float:
    many = place.root / "many"
    many.mkdir()
    for number in range(place.sizes.files):
        with open(many / f"file-{number:06}", "xb", buffering=0) as file:
            file.write(SMALL)
    return place.sizes.files


def stat_files(place: Place) -> float:
    for number in range(place.sizes.files):
        os.stat(place.root / "many" / f"file-{number:06}")
    return place.sizes.files


def unlink_files(place: Place) -> float:
    for number in range(place.sizes.files):
        os.unlink(place.root / "many" / f"file-{number:06}")
    return place.sizes.files


def make_random_file(place: Place) -> None:
    with (place.root / "random").open("wb", buffering=0) as file:
        for _ in range(place.sizes.random_file // MIB):
            file.write(place.sources.buffer)
        os.fsync(file.fileno())


def offsets(place: Place) -> list[int]:
    """The same for everybody."""
    chance = random.Random(1)
    return [chance.randrange(place.sizes.random_file // 4096) * 4096 for _ in range(place.sizes.random_operations)]


def random_reads(place: Place) -> float:
    descriptor = os.open(place.root / "random", os.O_RDONLY)
    for offset in offsets(place):
        os.pread(descriptor, 4096, offset)
    os.close(descriptor)
    return place.sizes.random_operations


def random_writes(place: Place) -> float:
    """With one fsync at the end: the time until all of it is safe."""
    descriptor = os.open(place.root / "random", os.O_WRONLY)
    block = bytes(place.sources.buffer[:4096])
    for offset in offsets(place):
        os.pwrite(descriptor, block, offset)
    os.fsync(descriptor)
    os.close(descriptor)
    return place.sizes.random_operations


def synced_appends(place: Place) -> float:
    block = bytes(place.sources.buffer[:200])
    with (place.root / "log").open("wb", buffering=0) as file:
        for _ in range(place.sizes.synced_appends):
            file.write(block)
            os.fsync(file.fileno())
    return place.sizes.synced_appends


def sqlite_commits(place: Place) -> float:
    connection = sqlite3.connect(place.root / "database", isolation_level=None)
    connection.execute("create table if not exists t (id integer primary key, text)")
    for number in range(place.sizes.commits):
        connection.execute("insert into t (text) values (?)", (f"row {number}",))
    connection.close()
    return place.sizes.commits


WORKLOADS = (
    Workload("sequential write + fsync", "MiB/s", write_big, bar=1.0),
    Workload("sequential read, cold", "MiB/s", read_big, cold=True, needs="sequential write + fsync", bar=1.0),
    Workload("4 KiB sequential writes", "MiB/s", write_small, bar=1.0),
    Workload("4 KiB random reads, cold", "/s", random_reads, cold=True, prepare=make_random_file, bar=0.8),
    Workload("4 KiB random writes + fsync", "/s", random_writes, prepare=make_random_file, bar=1.0),
    Workload("200-byte append + fsync", "/s", synced_appends, bar=0.6),
    Workload("sqlite commits", "/s", sqlite_commits, bar=1.0),
    Workload("untar", "s", untar, bar=1.5),
    Workload("cp -a", "s", copy_tree, bar=1.5),
    Workload("rsync -a", "s", rsync_tree, bar=1.2),
    Workload("rsync -a, nothing to do", "s", rsync_tree, needs="rsync -a", bar=0.5),
    Workload("find with stat", "s", find_tree, needs="cp -a", bar=0.5),
    Workload("read the tree, cold", "s", read_tree, cold=True, needs="cp -a", bar=1.5),
    Workload("read the tree, warm", "s", read_tree, prepare=warm_tree, needs="cp -a", bar=1.0),
    Workload("git clone", "s", clone, bar=1.5),
    Workload("create files of 1 KiB", "/s", create_files, bar=0.5),
    Workload("stat files", "/s", stat_files, needs="create files of 1 KiB", bar=0.5),
    Workload("unlink files", "/s", unlink_files, needs="create files of 1 KiB", bar=0.5),
    Workload("rm -r", "s", remove_tree, needs="cp -a", bar=0.5),
    Workload("write 1 file at once", "MiB/s", spread_writes(1)),
    Workload("write 10 files at once", "MiB/s", spread_writes(10)),
    Workload("write 100 files at once", "MiB/s", spread_writes(100)),
    Workload("create, 1 process", "/s", create_from(1)),
    Workload("create, 8 processes", "/s", create_from(8)),
)

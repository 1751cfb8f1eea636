"""What is measured: each workload is a function of a :class:`Place`, returns how much it did, and is timed as a whole.

Everything is done as a user would: by the usual programs, or by plain system calls. Preparation that must not be timed
is in a function of its own.
"""

import os
import random
import shutil
import sqlite3
import subprocess
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
    tree_files: int = 2500
    clone_files: int = 1500


QUICK = Sizes(128 * MIB, 500, 64 * MIB, 500, 50, 40, 500, 300)


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
    """

    name: str
    unit: str
    run: Callable[[Place], float]
    cold: bool = False
    prepare: Callable[[Place], None] | None = None
    needs: str = ""


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
    block = bytes(place.sources.buffer[:4096])
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
    Workload("sequential write + fsync", "MiB/s", write_big),
    Workload("sequential read, cold", "MiB/s", read_big, cold=True, needs="sequential write + fsync"),
    Workload("untar", "s", untar),
    Workload("cp -a", "s", copy_tree),
    Workload("rsync -a", "s", rsync_tree),
    Workload("rsync -a, nothing to do", "s", rsync_tree, needs="rsync -a"),
    Workload("read the tree, cold", "s", read_tree, cold=True, needs="cp -a"),
    Workload("create files of 1 KiB", "/s", create_files),
    Workload("stat files", "/s", stat_files, needs="create files of 1 KiB"),
    Workload("unlink files", "/s", unlink_files, needs="create files of 1 KiB"),
    Workload("4 KiB random reads, cold", "/s", random_reads, cold=True, prepare=make_random_file),
    Workload("4 KiB random writes + fsync", "/s", random_writes, prepare=make_random_file),
    Workload("4 KiB append + fsync", "/s", synced_appends),
    Workload("sqlite commits", "/s", sqlite_commits),
    Workload("git clone", "s", clone),
    Workload("rm -r", "s", remove_tree, needs="cp -a"),
)

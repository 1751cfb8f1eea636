"""On real input: trees put there by the usual programs, compared again and again, through kill -9 and lost servers.

The tests of this file work on one cluster, in order: each finds what the one before it left.
"""

import os
import shutil
import sqlite3
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from mount_cluster import RealCluster, differences, module, run, running, tree, wait_until

pytestmark = pytest.mark.timeout(300)

STDLIB = Path(sysconfig.get_path("stdlib"))
PACKAGES = Path(sysconfig.get_path("purelib"))
FILES = 2000
# By hand also with 1,024: DFS_TEST_BIG_MIB=1024 ./test.sh tests/mount/test_mount_real_trees.py
BIG_MIB = int(os.environ.get("DFS_TEST_BIG_MIB", "256"))
ROWS = 300


class Filled:
    """A cluster with real data on it, and the same data beside it on the local disk."""

    def __init__(self, cluster: RealCluster, local: Path) -> None:
        self.cluster = cluster
        self.mnt = cluster.mnt
        self.source = local / "source"
        self.archive = local / "source.tar"
        self.repository = local / "repository"
        self.big = local / "big"

    def compare(self) -> list[str]:
        """Everything that is not as it was put there."""
        found = []
        for name in ("untarred/source", "copied", "synced"):
            found += [f"{name}: {line}" for line in differences(self.source, self.mnt / name)]
        found += [f"repository: {line}" for line in different_contents(self.repository, self.mnt / "cloned")]
        if run("cmp", self.big, self.mnt / "big", check=False).returncode:
            found.append("big: other contents")
        return found + database_problems(self.mnt / "database")


def different_contents(repository: Path, clone: Path) -> list[str]:
    """A clone has its own times, and its own idea of .git; the working trees must be the same."""
    found = []
    for name in tree(repository):
        path = repository / name
        if not name.startswith(".git") and path.is_file() and not path.is_symlink():
            if not (clone / name).is_file():
                found.append(f"{name} is missing")
            elif path.read_bytes() != (clone / name).read_bytes():
                found.append(f"{name}: other contents")
    return found


def database_problems(path: Path) -> list[str]:
    connection = sqlite3.connect(path)
    try:
        sound = connection.execute("pragma integrity_check").fetchone()[0]
        rows = connection.execute("select count(*), min(length(text)) from t").fetchone()
    finally:
        connection.close()
    return [] if (sound, rows) == ("ok", (ROWS, 1000)) else [f"database: {sound}, {rows}"]


def make_sources(filled: Filled) -> None:
    """The standard library, with links of both kinds, odd names, odd modes and times beside it."""
    unwanted = shutil.ignore_patterns("site-packages", "__pycache__")
    shutil.copytree(STDLIB, filled.source, symlinks=True, ignore=unwanted)
    # Debian leaves the tests out of its standard library: what is installed beside it makes up for them.
    if len(tree(filled.source)) < FILES:
        shutil.copytree(PACKAGES, filled.source / "packages", symlinks=True, ignore=unwanted)
    extra = filled.source / "extra"
    extra.mkdir()
    (extra / "empty").touch()
    (extra / "sparse").touch()
    os.truncate(extra / "sparse", 10_000_000)
    (extra / "n\u00e4me with blanks, and \\ and \n newline").write_text("x")
    (extra / ("n" * 255)).write_text("long")
    (extra / "script").write_text("#!/bin/sh\n")
    (extra / "script").chmod(0o4755)
    os.link(extra / "script", extra / "hard link")
    (extra / "symlink").symlink_to("../os.py")
    (extra / "dangling").symlink_to("/nowhere/at/all")
    (extra / "secret").write_text("x")
    (extra / "secret").chmod(0o000)
    os.chown(extra / "secret", 1234, 5678)
    os.mkfifo(extra / "fifo", 0o640)
    os.utime(extra / "empty", ns=(1, 1_234_567_890_123_456_789))
    os.utime(extra / "symlink", ns=(5, 7), follow_symlinks=False)
    os.utime(extra, ns=(10**18, 10**18 + 1))
    run("tar", "--format=posix", "-cf", filled.archive, "-C", filled.source.parent, "source")
    shutil.copytree(STDLIB, filled.repository, ignore=unwanted)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", "-C", str(filled.repository)]
    for words in (["init", "-q"], ["add", "-f", "-A"], ["commit", "-q", "-m", "everything"]):
        run(*git, *words)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    with running(tmp_path_factory.mktemp("trees")) as cluster:
        made = Filled(cluster, tmp_path_factory.mktemp("local"))
        make_sources(made)
        yield made
        shutil.rmtree(made.source.parent)


def test_tar_x(filled: Filled) -> None:
    (filled.mnt / "untarred").mkdir()
    run("tar", "-xpf", filled.archive, "-C", filled.mnt / "untarred")
    assert len(tree(filled.source)) > FILES
    assert differences(filled.source, filled.mnt / "untarred/source") == []


def test_cp_a(filled: Filled) -> None:
    run("cp", "-a", filled.source, filled.mnt / "copied")
    assert differences(filled.source, filled.mnt / "copied") == []
    links = [filled.mnt / "copied/extra" / name for name in ("script", "hard link")]
    assert links[0].stat().st_ino == links[1].stat().st_ino
    assert links[0].stat().st_nlink == 2


def test_rsync_transfers_nothing_the_second_time(filled: Filled) -> None:
    words = ("rsync", "-aH", "--itemize-changes", f"{filled.source}/", f"{filled.mnt}/synced/")
    assert len(run(*words).stdout.splitlines()) > FILES
    assert run(*words).stdout == ""
    assert differences(filled.source, filled.mnt / "synced") == []


def test_git_clone_and_status(filled: Filled) -> None:
    run("git", "clone", "-q", f"file://{filled.repository}", filled.mnt / "cloned")
    git = ("git", "-C", filled.mnt / "cloned")
    assert run(*git, "status", "--porcelain").stdout == ""
    assert run(*git, "fsck", "--full").returncode == 0
    assert different_contents(filled.repository, filled.mnt / "cloned") == []


def test_a_big_file_by_dd(filled: Filled) -> None:
    run("dd", "if=/dev/urandom", f"of={filled.big}", "bs=1M", f"count={BIG_MIB}", "status=none")
    run("dd", f"if={filled.big}", f"of={filled.mnt}/big", "bs=1M", "conv=fsync", "status=none")
    assert (filled.mnt / "big").stat().st_size == BIG_MIB << 20
    run("cmp", filled.big, filled.mnt / "big")


def test_sqlite_inserts(filled: Filled) -> None:
    connection = sqlite3.connect(filled.mnt / "database", isolation_level=None)
    connection.execute("create table t (id integer primary key, text)")
    for number in range(ROWS):
        connection.execute("insert into t (text) values (?)", (f"{number:1000}",))
    connection.close()
    assert database_problems(filled.mnt / "database") == []


def test_everything_is_the_same_from_the_servers(filled: Filled) -> None:
    filled.cluster.remount()
    assert filled.compare() == []


def test_everything_survives_kill_9_of_every_process(filled: Filled) -> None:
    """What was flushed by an unmount, and what fsync of a file and a directory promised with the mount still up."""
    run("umount", filled.mnt)
    filled.cluster.up()
    late = filled.mnt / "late"
    late.mkdir()
    with (late / "file").open("wb") as file:
        file.write(b"promised" * 1000)
        file.flush()
        os.fsync(file.fileno())
    for path in (late, filled.mnt):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(descriptor)
        os.close(descriptor)
    filled.cluster.kill_everything()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")
    filled.cluster.up()
    assert (late / "file").read_bytes() == b"promised" * 1000
    assert filled.compare() == []
    filled.cluster.check("--deep")


def test_every_replica_on_its_own(filled: Filled) -> None:
    """So that one good copy does not hide a bad one."""
    root = filled.mnt / "untarred/source"
    names = [name for name in tree(root) if (root / name).is_file() and not (root / name).is_symlink()]
    for path, contents in filled.cluster.contents_by_replica([root / name for name in names]):
        expected = (filled.source / path.relative_to(root)).read_bytes()
        assert len(contents) == 2
        for number, content in enumerate(contents):
            assert content == expected, f"replica {number} of {path}"
    for _, contents in filled.cluster.contents_by_replica([filled.mnt / "big"]):
        expected = filled.big.read_bytes()
        assert [content == expected for content in contents] == [True, True]


def test_one_chunkserver_less_for_good(filled: Filled) -> None:
    filled.cluster.kill("chunkserver2")
    wait_until(lambda: sum(s.state == "UP" for s in filled.cluster.status().servers) == 2, "the loss is noticed")
    run("umount", filled.mnt)
    Path("/proc/sys/vm/drop_caches").write_text("3\n")
    run_mount_alone(filled.cluster)
    try:
        assert filled.compare() == []
        (filled.mnt / "written with two").write_bytes(b"y" * 100_000)
        assert (filled.mnt / "written with two").read_bytes() == b"y" * 100_000
    finally:
        run("umount", filled.mnt)


def run_mount_alone(cluster: RealCluster) -> None:
    """Mounts without `dfs up`, which would start the lost server again; in the background, as fstab does."""
    module("dfsmount.cli", cluster.wanted.address, cluster.mnt, "-o", f"key_file={cluster.layout.key_file}")

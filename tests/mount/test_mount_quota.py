"""`dfs du`, `dfs df` and `dfs quota` from outside: numbers against a walk, limits against several mounts and kills."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mount_cluster import RealCluster, wait_until

pytestmark = pytest.mark.timeout(240)

KIB, MIB = 1 << 10, 1 << 20


def told(cluster: RealCluster, *words: str | Path) -> Any:
    return json.loads(cluster.dfs(*words, "--json").stdout)


def du(cluster: RealCluster, path: Path) -> dict[str, int]:
    found: dict[str, int] = told(cluster, "du", path)[0]["tree"]
    return found


def walked(path: Path) -> tuple[int, int, int, int]:
    """Files, directories, bytes and size, each inode once, as du(1) would find them."""
    seen: dict[int, os.stat_result] = {}
    directories = 0
    for folder, _, names in os.walk(path):
        directories += 1
        for name in (*names, *(entry.name for entry in os.scandir(folder) if entry.is_symlink())):
            status = os.lstat(Path(folder, name))
            seen[status.st_ino] = status
    allocated = sum(status.st_blocks * 512 for status in seen.values())
    return len(seen), directories, allocated, sum(status.st_size for status in seen.values())


@pytest.fixture
def limited(cluster: RealCluster, place: Path) -> Iterator[Path]:
    """A directory whose quota is gone afterwards."""
    yield place
    cluster.dfs("quota", "remove", place, check=False)


def test_du_is_what_a_walk_finds(cluster: RealCluster, place: Path) -> None:
    for number in range(30):
        folder = place / f"d{number % 5}" / f"e{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"f{number}").write_bytes(bytes(512 * number))
    with (place / "sparse").open("wb") as sparse:
        sparse.truncate(MIB)
        sparse.seek(100 * KIB)
        sparse.write(bytes(4 * KIB))
    os.link(place / "sparse", place / "d0/again")
    os.symlink("nowhere", place / "d1/link")
    (place / "d2").rename(place / "d3/moved")
    for path in (place, place / "d3"):
        tree = du(cluster, path)
        assert (tree["files"], tree["directories"], tree["allocated"], tree["size"]) == walked(path)
    shown = subprocess.run(["du", "-s", "-B1", place], capture_output=True, text=True, check=True)
    assert du(cluster, place)["allocated"] == int(shown.stdout.split()[0])
    # The name that counted goes: what is left counts where its other name is.
    (place / "sparse").unlink()
    assert du(cluster, place / "d0")["allocated"] >= 4 * KIB
    assert du(cluster, place)["files"] == walked(place)[0]
    assert du(cluster, place / "d0/again") == {**du(cluster, place / "d0/again"), "files": 1, "directories": 0}


def test_a_writer_is_told_at_write(cluster: RealCluster, limited: Path) -> None:
    cluster.dfs("quota", "set", "--bytes", "1M", limited)
    taken = 0
    with (limited / "big").open("wb", buffering=0) as file, pytest.raises(OSError) as caught:
        while taken < 4 * MIB:
            taken += file.write(os.urandom(32 * KIB))
    assert caught.value.errno == errno.EDQUOT
    assert MIB - 64 * KIB <= taken <= MIB
    assert (limited / "big").read_bytes()[:taken].__len__() == taken
    assert du(cluster, limited)["allocated"] == taken
    # Root or not, in other files as well; what is small and closed at once is not lost without a word.
    (limited / "rest").write_bytes(bytes(MIB - taken))
    with pytest.raises(OSError) as caught, (limited / "small").open("wb", buffering=0) as file:
        file.write(b"x")
    assert caught.value.errno == errno.EDQUOT
    # In place of what is there, and again once there is room.
    with (limited / "big").open("r+b", buffering=0) as file:
        file.write(os.urandom(100 * KIB))
        os.fsync(file.fileno())
    os.truncate(limited / "big", 1000)
    (limited / "small").write_bytes(bytes(1000))
    assert du(cluster, limited)["allocated"] == 2000 + MIB - taken
    quota = told(cluster, "quota", "get", limited)[0]["quota"]
    assert (quota["used_bytes"], quota["bytes_hard"]) == (2000 + MIB - taken, MIB)


def test_files_and_directories_are_limited(cluster: RealCluster, limited: Path) -> None:
    cluster.dfs("quota", "set", "--inodes", "3", limited)
    (limited / "a").mkdir()
    (limited / "a/b").touch()
    os.symlink("x", limited / "c")
    for make in (lambda: (limited / "d").touch(), lambda: (limited / "a/d").mkdir(), lambda: os.mkfifo(limited / "f")):
        with pytest.raises(OSError) as caught:
            make()
        assert caught.value.errno == errno.EDQUOT
    (limited / "c").unlink()
    (limited / "d").touch()


def test_several_mounts_together_never_pass_a_limit(cluster: RealCluster, limited: Path, tmp_path: Path) -> None:
    points = [tmp_path / f"mnt{number}" for number in range(2)]
    for point in points:
        cluster.mount_again(point)
    cluster.dfs("quota", "set", "--bytes", "4M", limited)
    inside = limited.relative_to(cluster.mnt)
    code = (
        "import errno, os, sys\n"
        "done = 0\n"
        "try:\n"
        "    for number in range(200):\n"
        "        with open(f'{sys.argv[1]}-{number}', 'wb', buffering=0) as file:\n"
        "            done += file.write(os.urandom(50_000))\n"
        "except OSError as error:\n"
        "    assert error.errno == errno.EDQUOT, error\n"
        "else:\n"
        "    raise SystemExit('no limit was met')\n"
        "print(done)\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, point / inside / f"w{number}"], stdout=subprocess.PIPE, text=True)
        for number, point in enumerate((cluster.mnt, *points))
    ]
    written = [int(writer.communicate(timeout=120)[0]) for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    for point in points:
        subprocess.run(["umount", point], check=True)
    # Every byte that was taken is there, and no more than may be.
    sizes = sum(path.stat().st_size for path in limited.iterdir())
    assert sizes == sum(written) == du(cluster, limited)["allocated"]
    assert 4 * MIB - 3 * 50_000 <= sizes <= 4 * MIB


def test_a_restarted_metaserver_knows_usage(own_cluster: RealCluster) -> None:
    tree = own_cluster.mnt / "tree"
    (tree / "below").mkdir(parents=True)
    own_cluster.dfs("quota", "set", "--bytes", "2M", "--inodes", "100", tree)
    with (tree / "below/kept").open("wb") as file:
        file.write(os.urandom(MIB))
        file.flush()
        os.fsync(file.fileno())
    own_cluster.restart("metaserver")
    quota = told(own_cluster, "quota", "get", tree)[0]["quota"]
    assert (quota["used_bytes"], quota["used_inodes"]) == (MIB, 2)
    with pytest.raises(OSError) as caught, (tree / "more").open("wb", buffering=0) as file:
        for _ in range(40):
            file.write(os.urandom(64 * KIB))
    assert caught.value.errno == errno.EDQUOT
    assert du(own_cluster, tree)["allocated"] <= 2 * MIB
    (tree / "more").unlink()
    own_cluster.dfs("quota", "remove", tree)
    (tree / "more").write_bytes(bytes(3 * MIB))
    wait_until(lambda: du(own_cluster, tree)["allocated"] == 4 * MIB, "all is counted")
    own_cluster.check()


def test_df_shows_the_quota_inside_of_its_tree(cluster: RealCluster, limited: Path) -> None:
    (limited / "below").mkdir()
    (limited / "below/file").write_bytes(bytes(MIB))
    cluster.dfs("quota", "set", "--bytes", "8M", "--inodes", "10", limited)
    for path in (limited, limited / "below", limited / "below/file"):
        # What was asked for a moment ago is believed for a second.
        wait_until(lambda path=path: os.statvfs(path).f_blocks * os.statvfs(path).f_frsize == 8 * MIB, "df shows it")  # type: ignore[misc]
        space = os.statvfs(path)
        assert (space.f_bavail * space.f_frsize, space.f_files, space.f_favail) == (7 * MIB, 10, 8)
    assert os.statvfs(cluster.mnt).f_blocks * space.f_frsize > 8 * MIB
    shown = subprocess.run(["df", "--output=size,avail,iavail", limited], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[1].split() == ["8192", "7168", "8"]


def test_nothing_moves_between_quotas_but_as_a_copy(cluster: RealCluster, limited: Path) -> None:
    inside, outside = limited / "in", limited.with_name(limited.name + "-out")
    inside.mkdir()
    outside.mkdir()
    (outside / "file").write_bytes(bytes(5000))
    cluster.dfs("quota", "set", "--bytes", "1M", limited)
    for call in (os.rename, os.link):
        with pytest.raises(OSError) as caught:
            call(outside / "file", inside / "file")
        assert caught.value.errno == errno.EXDEV
    subprocess.run(["mv", outside / "file", inside / "file"], check=True)
    os.rename(inside / "file", limited / "file")
    assert du(cluster, limited)["allocated"] == 5000


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("set", "--bytes", "lots"), "'lots' is no size"),
        (("set",), "nothing to set"),
        (("set", "--bytes", "1M", "--soft-bytes", "2M"), "is above the hard limit"),
        (("set", "--bytes", "1M", "--grace", "soon"), "'soon' is no time"),
        (("get",), "there is no quota on this directory"),
        (("remove",), "there is no quota on this directory"),
    ],
)
def test_bad_input_is_one_line(cluster: RealCluster, place: Path, words: tuple[str, ...], text: str) -> None:
    done = cluster.dfs("quota", *words, place, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert text in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_a_person_sees(cluster: RealCluster, limited: Path) -> None:
    (limited / "f").write_bytes(bytes(MIB))
    shown = cluster.dfs("quota", "set", "--bytes", "512K", limited).stdout
    assert "More is used than that: nothing is deleted" in shown
    assert "FULL" in cluster.dfs("quota", "list", "--data", cluster.data).stdout
    assert f"/{limited.name}" in cluster.dfs("df", "--data", cluster.data).stdout
    assert "(the cluster)" in cluster.dfs("df", cluster.mnt).stdout
    assert "1.0 MiB" in cluster.dfs("du", limited).stdout
    file = cluster.dfs("quota", "set", "--bytes", "1M", limited / "f", check=False)
    assert (file.returncode, "a quota is for a directory" in file.stderr) == (1, True)

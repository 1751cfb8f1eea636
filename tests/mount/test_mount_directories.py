"""Directories through a real kernel: what a listing shows while others change it, positions in it, and what very many
entries cost, counted in requests and CPU time."""

import ctypes
import os
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from mount_cluster import RealCluster, run

from dfsmount import dfs_find

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
GETDENTS64 = 217
DOTS = (b".", b"..")


class Listed(NamedTuple):
    name: bytes
    ino: int
    offset: int


class Stream:
    """What opendir(3) gives, with buffers of our size: getdents64(2) on a descriptor, and lseek(2) for its position."""

    def __init__(self, path: Path, size: int = 1024) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        self._buffer = ctypes.create_string_buffer(size)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.descriptor)

    def some(self) -> list[Listed]:
        """The next few entries; none at the end."""
        length = libc.syscall(GETDENTS64, self.descriptor, self._buffer, len(self._buffer))
        assert length >= 0, os.strerror(ctypes.get_errno())
        found, at = [], 0
        while at < length:
            ino, offset, size = struct.unpack_from("<QqH", self._buffer, at)
            found.append(Listed(self._buffer.raw[at + 19 : at + size].split(b"\0", 1)[0], ino, offset))
            at += size
        return found

    def rest(self) -> list[Listed]:
        found: list[Listed] = []
        while more := self.some():
            found += more
        return found

    def seek(self, offset: int) -> None:
        os.lseek(self.descriptor, offset, os.SEEK_SET)


def names(entries: list[Listed]) -> list[bytes]:
    return [entry.name for entry in entries if entry.name not in DOTS]


def fill(path: Path, count: int, prefix: str = "f") -> list[bytes]:
    made = [f"{prefix}{number:06}" for number in range(count)]
    for name in made:
        os.close(os.open(path / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    return [name.encode() for name in made]


@pytest.fixture(scope="module")
def other_mount(cluster: RealCluster) -> Iterator[Path]:
    """A second mount of the shared cluster."""
    point = cluster.root / "listing"
    cluster.up(point)
    yield point
    run("umount", point)


# -- while others change it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["here", "there"])
def test_what_stays_is_listed_once_whatever_comes_and_goes(
    cluster: RealCluster, place: Path, other_mount: Path, where: str
) -> None:
    """More than a page of the metaserver's, and hundreds of buffers, between which entries come, go and move."""
    kept, going = fill(place, 1100, "kept"), fill(place, 400, "going")
    changed = place if where == "here" else other_mount / place.name
    found: list[bytes] = []
    with Stream(place) as stream:
        for turn in range(10_000):
            more = stream.some()
            if not more:
                break
            found += names(more)
            if turn < len(going):
                (changed / os.fsdecode(going[-1 - turn])).unlink()
                (changed / f"new{turn:06}").touch()
                (changed / f"new{turn:06}").rename(changed / f"moved{turn:06}")
    counted = Counter(found)
    assert max(counted.values()) == 1
    assert set(kept) <= set(counted)
    assert set(counted) <= {*kept, *going}, "the listing ends with what was there at its begin"
    assert len(os.listdir(place)) == 1500


def test_a_program_that_renames_all_it_is_shown_comes_to_an_end(place: Path) -> None:
    """It was shown the new names for ever; as once on btrfs and tmpfs (xfstests generic/736)."""
    made = fill(place, 1050)
    shown = 0
    with os.scandir(place) as entries:
        for entry in entries:
            os.rename(entry.path, place / f"renamed{shown:06}")
            shown += 1
            assert shown <= len(made)
    assert shown == len(made)
    assert len(os.listdir(place)) == len(made)


def test_a_listing_brings_no_removed_name_back(place: Path) -> None:
    """The mount has the rest of the page already when the name is removed."""
    fill(place, 400)
    with Stream(place) as stream:
        assert len(stream.some()) < 100
        (place / "f000300").unlink()
        (place / "f000301").rename(place / "elsewhere")
        stream.rest()
        for name in ("f000300", "f000301"):
            assert not (place / name).exists()
            os.close(os.open(place / name, os.O_CREAT | os.O_EXCL, 0o600))


def test_a_listing_goes_on_over_a_restart_of_the_metaserver(cluster: RealCluster, place: Path) -> None:
    made = fill(place, 1500)
    with Stream(place) as stream:
        begun = stream.some()
        cluster.restart("metaserver")
        (place / "f001300").unlink()
        (place / "new").touch()
        found = names(begun + stream.rest())
        assert set(made) - {b"f001300"} <= set(found) <= set(made)
        assert len(set(found)) == len(found)
        stream.seek(begun[-1].offset)
        assert begun[-1].name not in names(again := stream.rest())
        assert names(begun + again) == [name for name in made if name != b"f001300"]


# -- positions -----------------------------------------------------------------------------------------------------


def test_positions_are_where_they_were(place: Path) -> None:
    """seekdir(3), telldir(3), rewinddir(3)."""
    made = fill(place, 1200)
    with Stream(place) as stream:
        listed = stream.rest()
        assert names(listed) == made
        assert [entry.name for entry in listed[:2]] == list(DOTS)
        assert len({entry.offset for entry in listed}) == len(listed)
        for index in (0, 1, 2, 700, 1000, 1001, 1100, len(listed) - 1):
            stream.seek(listed[index].offset)
            assert stream.rest() == listed[index + 1 :]
        (place / "new").touch()
        assert stream.rest() == [], "it belongs to the next listing"
        stream.seek(0)
        assert names(stream.rest()) == [*made, b"new"]
    assert {entry.name: entry.ino for entry in listed if entry.name not in DOTS} == {
        name: (place / os.fsdecode(name)).stat().st_ino for name in made
    }


def test_a_position_whose_entry_is_gone(place: Path) -> None:
    made = fill(place, 100)
    with Stream(place, 256) as stream:
        listed = stream.rest()
        at = listed[50]
        for name in (listed[50].name, listed[51].name):
            (place / os.fsdecode(name)).unlink()
        stream.seek(0)
        stream.some()
        stream.seek(at.offset)
        assert names(stream.rest())[-48:] == made[-48:]
        assert stream.rest() == []
    two, three = Stream(place), Stream(place)
    with two, three:
        assert two.some() == three.some(), "each has its own position"
        assert two.some() == three.some()


# -- what it costs -------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Requests to the metaserver, and seconds of CPU time of mount and metaserver."""

    requests: float
    cpu: float


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process (clock_getcpuclockid(3))."""
    return time.clock_gettime((~pid << 3) | 2)


class Meter:
    def __init__(self, cluster: RealCluster) -> None:
        token = dfs_find.access_to_data(cluster.data).key().http_token
        self._url = f"http://127.0.0.1:{cluster.wanted.http_port}/metrics"
        self._headers = {"Authorization": f"Bearer {token}"}
        self._pids = [cluster.pid("mount"), cluster.pid("metaserver")]

    def requests(self) -> dict[str, float]:
        text = httpx.get(self._url, headers=self._headers, trust_env=False, timeout=60).text
        lines = [line.partition("} ") for line in text.splitlines() if line.startswith("metaserver_requests_total{")]
        return {name.partition('"')[2].rstrip('"'): float(count) for name, _, count in lines}

    def cost(self, function: Callable[[], object]) -> Cost:
        requests, cpu = sum(self.requests().values()), sum(map(cpu_seconds, self._pids))
        function()
        return Cost(sum(self.requests().values()) - requests, sum(map(cpu_seconds, self._pids)) - cpu)


def stat_all(path: Path, made: list[bytes]) -> None:
    for name in made:
        os.stat(path / os.fsdecode(name))


def remove_all(path: Path, made: list[bytes]) -> None:
    for name in made:
        os.unlink(path / os.fsdecode(name))


def costs(cluster: RealCluster, path: Path, count: int) -> dict[str, Cost]:
    """Of making, listing, looking at and removing ``count`` entries, each from the servers."""
    meter = Meter(cluster)
    made: list[bytes] = []
    found = {"create": meter.cost(lambda: made.extend(fill(path, count)))}
    time.sleep(1.1)
    found["list"] = meter.cost(lambda: os.listdir(path))
    assert len(os.listdir(path)) == count
    time.sleep(1.1)
    found["stat"] = meter.cost(lambda: stat_all(path, made))
    found["unlink"] = meter.cost(lambda: remove_all(path, made))
    found["rmdir"] = meter.cost(path.rmdir)
    return found


def check_linear(cluster: RealCluster, place: Path, small: int) -> None:
    """Ten times as much costs ten times as much: requests nearly exactly, CPU time with room for what else is done.

    How many of the entries that are looked at were fetched ahead depends on how fast that goes, since nothing is
    believed for longer than a second: at worst each is asked for, which costs less than to make it.
    """
    found = []
    for count in (small, 10 * small):
        path = place / str(count)
        path.mkdir()
        found.append(costs(cluster, path, count))
    little, much = found
    for name in much:
        print(f"{name:8} {small}: {little[name]}  {10 * small}: {much[name]}")
    # One for each, and what goes on beside; before a removal the kernel may ask whether the name is still there.
    assert much["create"].requests <= 12 * small + 50
    assert much["unlink"].requests <= 22 * small + 50
    for name in ("create", "list", "unlink"):
        assert much[name].cpu <= 20 * little[name].cpu + 0.3, name
    assert much["stat"].requests <= 11 * small + 50
    assert much["stat"].cpu <= much["create"].cpu
    assert much["list"].requests <= 10 * small / 1000 + 50, "a page has a thousand entries"
    assert much["rmdir"].cpu < 0.5


@pytest.mark.timeout(300)
def test_a_large_directory_costs_linear_time(cluster: RealCluster, place: Path) -> None:
    check_linear(cluster, place, 300)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_entries_cost_linear_time(cluster: RealCluster, place: Path) -> None:
    check_linear(cluster, place, 10_000)

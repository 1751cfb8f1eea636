"""Data moves while it is used: emptying and adding chunkservers, and other numbers of copies. No byte changes by it."""

import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from mount_cluster import RealCluster, running, wait_until

pytestmark = pytest.mark.timeout(240)

MIB = 1 << 20


class Load(threading.Thread):
    """Writes files, now and then synced, overwrites and appends, and reads at random what it wrote, all verified."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.contents: dict[Path, bytearray] = {}
        self.error: BaseException | None = None
        self.stopping = threading.Event()

    def run(self) -> None:
        try:
            number = 0
            while not self.stopping.is_set():
                self.step(number)
                number += 1
        except BaseException as error:
            self.error = error

    def step(self, number: int) -> None:
        path, data = self.folder / f"file{number % 40}", os.urandom(30_000 + 4096 * (number % 50))
        content = self.contents.setdefault(path, bytearray())
        with path.open("r+b" if content else "w+b", buffering=0) as file:
            at = min(len(content), 7000 * (number % 13))
            assert os.pwrite(file.fileno(), data, at) == len(data)
            content[at : at + len(data)] = data
            if number % 3 == 0:
                os.fsync(file.fileno())
        other = self.folder / f"file{(number * 7) % 40}"
        if other in self.contents:
            assert other.read_bytes() == self.contents[other], other
        self.stopping.wait(0.02)

    def end(self) -> None:
        self.stopping.set()
        self.join(60)
        if self.error is not None:
            raise self.error


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RealCluster]:
    with running(tmp_path) as made:
        yield made


def verify(cluster: RealCluster, contents: dict[Path, bytes]) -> None:
    """Every byte, with cold caches, and again from each replica."""
    cluster.remount()
    for path, content in contents.items():
        assert path.read_bytes() == content, path
    for path, replicas in cluster.contents_by_replica(list(contents)):
        assert replicas == [contents[path]] * cluster.wanted.copies, path


def held(cluster: RealCluster, name: str) -> int:
    return next(server.chunks for server in cluster.status().servers if server.name == name)


def test_a_server_is_emptied_under_load_and_taken_out(cluster: RealCluster) -> None:
    load = Load(cluster.mnt)
    load.start()
    try:
        wait_until(lambda: len(load.contents) >= 20 or load.error is not None, "some files")
        said = cluster.dfs("drain", "chunkserver2", "--data", cluster.data)
        assert "chunkserver2 is being emptied" in said.stdout
        assert "Nothing is left on chunkserver2: it can be switched off." in said.stdout
        wait_until(lambda: held(cluster, "chunkserver2") == 0, "no chunk there")
        refused = cluster.dfs("remove", "chunkserver2", "--data", cluster.data, check=False)
        assert (refused.returncode, "DRAINING: stop its service first" in refused.stderr) == (1, True)
        cluster.kill("chunkserver2")
        wait_until(lambda: "chunkserver2 is DOWN" in cluster.dfs("status", "--data", cluster.data).stdout, "it is DOWN")
        cluster.dfs("remove", "chunkserver2", "--data", cluster.data)
        wait_until(lambda: len(cluster.status().servers) == 2, "it is forgotten")
    finally:
        load.end()
    status = cluster.status()
    assert (status.chunks.too_few, status.chunks.missing) == (0, 0)
    refused = cluster.dfs("drain", "chunkserver1", "--data", cluster.data, check=False)
    assert (refused.returncode, "want up to 2 copies, and only 1 other servers" in refused.stderr) == (1, True)
    verify(cluster, {path: bytes(content) for path, content in load.contents.items()})


def test_a_new_server_gets_its_share(tmp_path: Path) -> None:
    with running(tmp_path, servers=2) as cluster:
        contents = {cluster.mnt / f"file{number}": os.urandom(3 * MIB) for number in range(6)}
        for path, content in contents.items():
            path.write_bytes(content)
            # Ends its chunk.
            cluster.remount()
        cluster.down()
        cluster.wanted.servers = 3
        cluster.up()
        wait_until(lambda: all(server.state == "UP" for server in cluster.status().servers), "all are up")
        wait_until(lambda: held(cluster, "chunkserver1") >= 6, "everything is reported")
        said = cluster.dfs("rebalance", "--data", cluster.data).stdout
        assert "Nothing is being moved" in said
        held_by = Counter(
            replica.name
            for path in contents
            for extent in cluster.file(path).extents
            for replica in extent.replicas
            if replica.state == "GOOD"
        )
        # As even as it is worth moving for.
        assert held_by.total() == 12
        assert min(held_by[f"chunkserver{number}"] for number in (1, 2, 3)) >= 3
        shown = json.loads(cluster.dfs("rebalance", "--status", "--json", "--data", cluster.data).stdout)
        assert (shown["mode"], shown["under_way"]) == ("IDLE", 0)
        verify(cluster, contents)


def test_copies_of_a_tree_are_raised_and_lowered(cluster: RealCluster) -> None:
    tree = cluster.mnt / "tree"
    (tree / "below").mkdir(parents=True)
    files = {tree / "one": os.urandom(MIB), tree / "below" / "two": os.urandom(100_000)}
    for path, content in files.items():
        path.write_bytes(content)
    cluster.remount()

    def good(path: Path) -> set[int]:
        return {sum(each.state == "GOOD" for each in extent.replicas) for extent in cluster.file(path).extents}

    def verified(path: Path) -> set[int]:
        view = json.loads(cluster.dfs("chunks", path, "--verify", "--json").stdout)
        return {sum(each["checksums"] == "ok" for each in piece["replicas"]) for piece in view["pieces"]}

    assert cluster.dfs("get-copies", tree).stdout == f"{tree}: 2 copies (the default)\n"
    for number, expected in (("3", 3), ("1", 1), ("default", 2)):
        assert f"{tree}: {expected} cop" in cluster.dfs("set-copies", number, tree).stdout
        for path in files:
            wait_until(lambda path=path, expected=expected: good(path) == {expected}, f"{expected} copies", 60)
        assert verified(tree / "one") == {expected}
    # What is made there takes its directory's number over, and is written to so many servers at once.
    cluster.dfs("set-copies", "-r", "3", tree / "below")
    late = tree / "below" / "late"
    wait_until(lambda: not cluster.status().setting_copies, "it is set")
    late.write_bytes(b"late" * 50_000)
    assert json.loads(cluster.dfs("get-copies", "--json", late).stdout)[0]["own"] == 3
    assert verified(late) == {3}
    for word in ("17", "-1", "many"):
        refused = cluster.dfs("set-copies", word, tree, check=False)
        assert refused.returncode != 0
        assert refused.stderr.count("\n") == 1 or "No such option" in refused.stderr
    for path, content in files.items():
        assert path.read_bytes() == content

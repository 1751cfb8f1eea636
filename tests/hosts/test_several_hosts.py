"""A metaserver, five chunkservers in two racks, and two clients, each with an address of its own.

Everything is set up as an operator would: `dfs join-token`, `dfs join`, `dfsmount`.
"""

import json
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import netns
import pytest
from netns import HOSTS, Network, wait_until

STORAGE = [host for host in HOSTS if host.startswith("storage")]
CLIENTS = ("client1", "client2")
METASERVER = "192.0.2.1:9401"
MIB = 1 << 20
LOST_SECONDS = 8.0


class Hosts:
    """The cluster on its hosts. Paths below ``root`` are the same on all of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.network = Network(f"dfs{os.getpid()}")
        self.key_file = root / "meta/cluster.key"
        self._children: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self.network.build()
        (self.root / "meta").mkdir()
        config = self.root / "meta/metaserver.toml"
        config.write_text(
            f'data = "{self.root}/meta/data"\nkey_file = "{self.key_file}"\n'
            'listen_host = "192.0.2.1"\nhttp_host = "192.0.2.1"\n'
            f"copies = 2\nlost_after_seconds = {LOST_SECONDS}\n"
        )
        self.spawn("meta", "metaserver", "--config", config)
        wait_until(lambda: self.asked("meta", "status", "--json") is not None, "the metaserver answers")
        token = self.dfs("meta", "join-token").strip()
        for host in STORAGE:
            words = ("--data", self.root / host, "--rack", HOSTS[host][0], "--label", "ssd", "--label", host)
            self.network.dfs(host, "join", "192.0.2.1", token, *words)
        for host in CLIENTS:
            self.mount(host)

    def spawn(self, host: str, module: str, *words: str | Path) -> None:
        with (self.root / f"{host}.log").open("ab") as log:
            self._children.append(
                subprocess.Popen(
                    self.network.command(host, sys.executable, "-m", module, *words),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env={**os.environ, "PYTHONPATH": str(netns.ROOT)},
                )
            )

    def mount(self, host: str, *options: str) -> Path:
        point = self.root / f"mnt-{host}"
        point.mkdir(exist_ok=True)
        words = ",".join([f"key_file={self.key_file}", f"log_file={point}.log", *options])
        self.network.run(host, sys.executable, "-m", "dfsmount.cli", "192.0.2.1", point, "-o", words)
        return point

    def dfs(self, host: str, *words: str | Path, check: bool = True) -> str:
        return self.network.dfs(host, *words, "--metaserver", METASERVER, "--key-file", self.key_file, check=check)

    def asked(self, host: str, *words: str | Path) -> Any:
        """The JSON that a command prints; None if it prints none."""
        text = self.dfs(host, *words, check=False)
        return json.loads(text) if text else None

    def servers(self) -> dict[str, dict[str, Any]]:
        return {server["name"]: server for server in self.asked("meta", "status", "--json")["status"]["servers"]}

    def states(self) -> dict[str, str]:
        return {name: server["state"] for name, server in self.servers().items()}

    def replicas(self, path: Path) -> list[set[str]]:
        """For each piece of a file, the servers that have it."""
        pieces = self.asked("client1", "chunks", path, "--json")["pieces"]
        return [{replica["server"] for replica in piece["replicas"]} for piece in pieces]

    def read_bytes(self) -> dict[str, int]:
        """What others have read from each server since its start."""
        found = {}
        key = self.dfs("meta", "token").strip()
        for host in STORAGE:
            url = f"http://{HOSTS[host][1]}:9423/metrics"
            text = self.network.run("meta", "curl", "-sf", "-H", f"Authorization: Bearer {key}", url)
            match = re.search(r"^chunkserver_read_bytes_total ([0-9.e+]+)$", text, re.MULTILINE)
            assert match, text
            found[host] = int(float(match[1]))
        return found

    def stop(self) -> None:
        for point in self.root.glob("mnt-*"):
            subprocess.run(["umount", "-f", "-l", str(point)], capture_output=True, check=False, timeout=60)
        self.network.destroy()
        for child in self._children:
            child.wait(30)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    made = Hosts(tmp_path_factory.mktemp("hosts"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


def write(path: Path, size: int) -> bytes:
    content = os.urandom(size)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return content


def in_both_racks(servers: set[str]) -> bool:
    return {HOSTS[name][0] for name in servers} == {"rack1", "rack2"}


def test_joined_servers_advertise_the_address_of_their_network(hosts: Hosts) -> None:
    servers = hosts.servers()
    assert {name: (server["host"], server["rack"]) for name, server in servers.items()} == {
        host: (HOSTS[host][1], HOSTS[host][0]) for host in STORAGE
    }
    assert {name: server["labels"] for name, server in servers.items()} == {host: ["ssd", host] for host in STORAGE}


@pytest.mark.timeout(300)
def test_copies_are_in_different_racks(hosts: Hosts) -> None:
    for number in range(8):
        write(hosts.root / "mnt-client1" / f"apart{number}", 9 * MIB)
    for number in range(8):
        pieces = hosts.replicas(hosts.root / "mnt-client1" / f"apart{number}")
        assert pieces
        assert all(in_both_racks(piece) for piece in pieces), pieces


@pytest.mark.timeout(300)
def test_the_local_server_is_written_to_and_read_from_first(hosts: Hosts) -> None:
    """By a mount on a host that has a chunkserver: one of five, so that chance would do it now and then, not always."""
    point = hosts.mount("storage4")
    names = [f"local{number}" for number in range(6)]
    contents = [write(point / name, 9 * MIB) for name in names]
    for name in names:
        assert all("storage4" in piece for piece in hosts.replicas(hosts.root / "mnt-client1" / name))
    subprocess.run(["umount", str(point)], check=True, timeout=120)
    hosts.mount("storage4")
    before = hosts.read_bytes()
    assert [(point / name).read_bytes() for name in names] == contents
    read = {name: count - before[name] for name, count in hosts.read_bytes().items()}
    # What is asked for before the mount knows any addresses, and what a slow machine hedges, goes elsewhere.
    assert read.pop("storage4") >= 46 * MIB, read
    assert sum(read.values()) <= 8 * MIB, read
    subprocess.run(["umount", str(point)], check=True, timeout=120)


def make_tree(path: Path, seed: int) -> None:
    chance = random.Random(seed)
    for folder in range(8):
        (path / f"folder{folder}").mkdir(parents=True)
        for number in range(20):
            size = chance.choice([0, 100, 5000, 70_000, 300_000])
            (path / f"folder{folder}/file{number}").write_bytes(chance.randbytes(size))
    (path / "large").write_bytes(chance.randbytes(20 * MIB))


class Copying(threading.Thread):
    """Copies a tree to a client's mount with rsync, again and again to new names, until told to stop."""

    def __init__(self, hosts: Hosts, client: str, source: Path) -> None:
        super().__init__()
        self.stop = threading.Event()
        self.problems: list[str] = []
        self.copies: list[str] = []
        self._hosts = hosts
        self._client = client
        self._source = source

    def run(self) -> None:
        while not self.stop.is_set() and not self.problems:
            name = f"{self._client}-{len(self.copies)}"
            target = self._hosts.root / f"mnt-{self._client}" / name
            command = ["rsync", "-a", "--fsync", f"{self._source}/", str(target)]
            done = subprocess.run(
                self._hosts.network.command(self._client, *command), capture_output=True, text=True, check=False
            )
            if done.returncode:
                self.problems.append(done.stderr)
            self.copies.append(name)


@pytest.mark.timeout(600)
def test_a_rack_is_cut_off_and_returns_under_rsync_from_both_clients(hosts: Hosts, tmp_path: Path) -> None:
    copying = []
    for seed, client in enumerate(CLIENTS):
        make_tree(tmp_path / client, seed)
        copying.append(Copying(hosts, client, tmp_path / client))
    for thread in copying:
        thread.start()
    try:
        wait_until(lambda: all(thread.copies for thread in copying), "both have copied once", 120)
        hosts.network.plug("rack2", connected=False)
        cut = {"storage4": "LOST", "storage5": "LOST"}
        wait_until(lambda: hosts.states().items() >= cut.items(), "the rack is missed", 120)
        during = [len(thread.copies) for thread in copying]
        wait_until(
            lambda: all(len(thread.copies) > count + 1 for thread, count in zip(copying, during, strict=True)),
            "both go on without it",
            240,
        )
        hosts.network.plug("rack2", connected=True)
        wait_until(lambda: set(hosts.states().values()) == {"UP"}, "the rack is back", 120)
    finally:
        hosts.network.plug("rack2", connected=True)
        for thread in copying:
            thread.stop.set()
        for thread in copying:
            thread.join()
    assert [thread.problems for thread in copying] == [[], []]
    # Each looks at what the other has written.
    for thread, client, other in zip(copying, CLIENTS, reversed(CLIENTS), strict=True):
        for name in thread.copies:
            compare = ["diff", "-r", str(tmp_path / client), str(hosts.root / f"mnt-{other}" / name)]
            done = subprocess.run(compare, capture_output=True, text=True, check=False, timeout=120)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    wait_until(lambda: hosts.asked("meta", "status", "--json")["healthy"], "every chunk has its copies", 180)
    check = hosts.asked("meta", "check", "--deep", "--json")
    assert (check["metadata"], check["data"]) == ([], [])
    assert check["replicas"] > 0
    # What was written meanwhile, in one rack only, is spread over both again.
    late = hosts.root / "mnt-client1" / copying[0].copies[-1] / "large"
    wait_until(lambda: all(in_both_racks(piece) for piece in hosts.replicas(late)), "copies are apart again", 180)

"""`dfs join-token` and `dfs join`, from outside, on a running cluster; tests/hosts has it with units of systemd."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from mount_cluster import RealCluster, module, running, wait_until

from dfsmount import dfs_processes
from metaserver.protocol import Status


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCluster]:
    """A cluster of one server, which others join."""
    with running(tmp_path_factory.mktemp("join"), servers=1, copies=1) as made:
        yield made


def token(cluster: RealCluster, *options: str) -> str:
    return cluster.dfs("join-token", "--data", cluster.data, *options).stdout.strip()


def http(cluster: RealCluster) -> str:
    return f"127.0.0.1:{cluster.wanted.http_port}"


def join(*words: str | Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    return module("dfsmount.dfs", "join", *words, check=check, env=environment)


def stop(cluster: RealCluster, top: Path, name: str) -> None:
    """Takes a server out of the cluster again."""
    cluster.dfs("drain", name, "--data", cluster.data)
    cluster.dfs("down", "--data", top)
    wait_until(lambda: state(cluster, name) in ("DOWN", "LOST"), f"{name} is missed")
    cluster.dfs("remove", name, "--data", cluster.data)


def state(cluster: RealCluster, name: str) -> str:
    return next((server.state for server in servers(cluster) if server.name == name), "")


def servers(cluster: RealCluster) -> list[object]:
    status: Status = cluster.status()
    return list(status.servers)


def test_a_host_joins_and_gets_data(small: RealCluster, tmp_path: Path) -> None:
    top = tmp_path / "disk"
    words = ("--data", top, "--name", "storage9", "--rack", "r9", "--label", "ssd", "--label", "big", "--json")
    joined = json.loads(join(http(small), token(small), *words).stdout)
    assert (joined["name"], joined["servers"], joined["data"]) == ("storage9", 2, str(top / "chunkserver"))
    assert (top / "cluster.key").read_text() == (small.data / "cluster.key").read_text()
    assert (top / "cluster.key").stat().st_mode & 0o777 == 0o600
    assert 'labels = ["ssd","big"]' in (top / "chunkserver.toml").read_text()
    small.dfs("set-copies", "2", small.mnt, "--data", small.data)
    (small.mnt / "both").write_bytes(os.urandom(100_000))
    shown = json.loads(small.dfs("chunks", small.mnt / "both", "--verify", "--json").stdout)
    assert {replica["server"] for piece in shown["pieces"] for replica in piece["replicas"]} >= {"storage9"}
    small.dfs("set-copies", "default", small.mnt, "--data", small.data)
    # After a crash (or a reboot), the same command without a token.
    pid = int((top / "run/chunkserver.pid").read_text())
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not dfs_processes.is_alive(pid), "it is gone")
    assert "runs: pid" in join("--data", top).stdout
    assert "runs already" in join("--data", top).stdout
    wait_until(lambda: state(small, "storage9") == "UP", "it is back")
    stop(small, top, "storage9")


def test_the_token_may_come_from_a_file_or_the_environment(small: RealCluster, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(token(small, "--once") + "\n")
    (tmp_path / "token").chmod(0o600)
    line = join(http(small), "--token-file", tmp_path / "token", "--data", tmp_path / "one", "--name", "one").stdout
    assert line.startswith("one has joined: pid ")
    assert line.count("\n") == 1
    assert line.endswith("the cluster has 2 servers now.\n")
    listed = small.dfs("join-token", "--list", "--data", small.data).stdout
    assert "one" not in [line.split()[-1] for line in listed.splitlines()[1:]]
    used = join(http(small), "--data", tmp_path / "two", check=False, DFS_JOIN_TOKEN=(tmp_path / "token").read_text())
    assert used.returncode == 1
    assert "was for one host, and " in used.stderr
    assert not (tmp_path / "two").exists()
    stop(small, tmp_path / "one", "one")


def test_what_is_wrong_is_one_line_and_leaves_nothing(small: RealCluster, tmp_path: Path) -> None:
    """Each is tried in the same directory, with a token that is still good at the end."""
    good = token(small, "--once")
    top, taken = tmp_path / "disk", tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    foreign = tmp_path / "foreign/chunkserver"
    foreign.mkdir(parents=True)
    (foreign / "identity.json").write_text('{"format":1,"server":7,"name":"x","cluster_id":"another"}')
    data_port = str(small.wanted.port)
    revoked = json.loads(small.dfs("join-token", "--json", "--data", small.data).stdout)
    small.dfs("join-token", "--revoke", revoked["id"], "--data", small.data)
    wrong: list[tuple[list[str | Path], str]] = [
        ([http(small), "dfsjoin1-x", "--data", top], "that is no join token"),
        ([http(small), revoked["token"], "--data", top], "was revoked"),
        ([http(small), good, "--data", taken], f"{taken} is not empty (it holds file)"),
        ([http(small), good, "--data", foreign.parent], "has chunks of another cluster (another)"),
        ([http(small), good, "--data", top, "--port", data_port], f"port {data_port} is in use by "),
        ([http(small), good, "--data", top, "--port", "80"], "--port 80: from 1024"),
        ([http(small), good, "--data", top, "--address", "192.0.2.77"], "no interface of this host has the address"),
        ([f"127.0.0.1:{data_port}", good, "--data", top], f"127.0.0.1:{data_port}"),
        (["127.0.0.1:1", good, "--data", top], "no metaserver at 127.0.0.1:1"),
        (["2001:db8::1:9401", good, "--data", top], "give an IPv6 address in brackets"),
        (["127.0.0.1:x", good, "--data", top], "give the metaserver as HOST:HTTPPORT"),
        ([http(small), "--data", top], "give a join token"),
        ([http(small), "--token-file", tmp_path / "none", "--data", top], "cannot read"),
        ([http(small), good, "--data", top, "--systemd"], "leave --data out"),
        ([http(small), good, "--data", top, "--instance", "a"], "--instance belongs to --systemd"),
        (["--data", top], "no server has joined from"),
    ]
    for words, text in wrong:
        done = join(*words, check=False)
        assert (done.returncode, done.stdout) == (1, ""), words
        assert done.stderr.startswith("dfs: ")
        assert text in done.stderr
        assert done.stderr.count("\n") == 1
    assert not top.exists()
    assert [entry.name for entry in taken.iterdir()] == ["file"]
    # Nothing of that has used the token; a name that is taken does, but is found before anything is written.
    clash = join(http(small), good, "--data", top, "--name", "chunkserver1", check=False)
    assert "a server called chunkserver1 already" in clash.stderr
    assert not top.exists()
    assert len(servers(small)) == 1


def test_a_server_that_does_not_start_leaves_nothing(small: RealCluster, tmp_path: Path) -> None:
    """What is wrong with its disk only the chunkserver itself finds out."""
    top = tmp_path / "disk"
    (top / "chunkserver").mkdir(parents=True)
    identity = f'{{"format":1,"server":7,"name":"x","cluster_id":"{small.status().cluster_id}","crc32c":"00000000"}}\n'
    for name in ("identity.json", "identity.copy.json"):
        (top / "chunkserver" / name).write_text(identity)
    done = join(http(small), token(small), "--data", top, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "its checksum is wrong" in done.stderr
    assert done.stderr.count("\n") == 1
    left = {str(path.relative_to(top)) for path in top.rglob("*")}
    assert left == {"chunkserver", "chunkserver/identity.json", "chunkserver/identity.copy.json"}


def test_a_disk_with_chunks_returns_to_its_cluster(small: RealCluster, tmp_path: Path) -> None:
    """Its host was installed anew: configuration and key are gone, the chunks are not."""
    top = tmp_path / "disk"
    join(http(small), token(small), "--data", top, "--name", "back")
    number = next(server.server for server in small.status().servers if server.name == "back")
    small.dfs("down", "--data", top)
    for path in top.iterdir():
        if path.name != "chunkserver":
            subprocess.run(["rm", "-r", str(path)], check=True)
    again = json.loads(join(http(small), token(small), "--data", top, "--name", "back", "--json").stdout)
    assert again["server"] == number
    stop(small, top, "back")


def test_tokens_are_made_listed_and_revoked(small: RealCluster) -> None:
    made = small.dfs("join-token", "--expires", "2d", "--once", "--data", small.data)
    assert made.stdout.startswith("dfsjoin1-")
    assert made.stdout.count("\n") == 1
    assert made.stderr.startswith("Valid for one host until ")
    listed = json.loads(small.dfs("join-token", "--list", "--json", "--data", small.data).stdout)
    newest = max(listed, key=lambda each: int(each["expires_ns"]))
    assert newest["once"] is True
    assert "cannot be used" in small.dfs("join-token", "--revoke", newest["id"], "--data", small.data).stdout
    again = small.dfs("join-token", "--revoke", newest["id"], "--data", small.data, check=False)
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    for expires in ("1w", "0s", "8d", "-1h"):
        assert small.dfs("join-token", f"--expires={expires}", "--data", small.data, check=False).returncode == 1

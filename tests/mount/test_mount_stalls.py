"""How long programs wait when servers freeze or become slow, and what a frozen mount or metaserver does on waking.

Exact bounds are those of the unit tests in virtual time; here the issue's 5 seconds have some slack for busy machines.
"""

import errno
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from mount_cluster import RealCluster, run, running, wait_until
from slow_proxy import Proxy, proxying

from dfsmount.dfs_layout import HOST

pytestmark = pytest.mark.timeout(180)

MIB = 1 << 20
LONGEST_STALL_SECONDS = 5.0
SLACK_SECONDS = 3.0
ELSEWHERE = "127.0.0.2"


@pytest.fixture(scope="module")
def stalling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCluster]:
    """For tests that leave it as it was."""
    with running(tmp_path_factory.mktemp("stalling")) as made:
        yield made


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def seconds_of(function: Callable[[], object]) -> float:
    started = time.monotonic()
    function()
    return time.monotonic() - started


class Appender:
    """Appends and syncs; remembers how long each step took."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb", buffering=0)
        self.steps: list[float] = []
        self.written = b""

    def once(self) -> None:
        piece = os.urandom(4096)

        def step() -> None:
            self.file.write(piece)
            os.fsync(self.file.fileno())

        self.steps.append(seconds_of(step))
        self.written += piece

    def until(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.once()


def servers_of(cluster: RealCluster, path: Path) -> set[str]:
    """Names of the servers that have the end of a file."""
    names = {server.server: server.name for server in cluster.status().servers}
    return {names[replica.server] for replica in cluster.file(path).extents[-1].replicas}


def all_up(cluster: RealCluster) -> None:
    wait_until(lambda: all(server.state == "UP" for server in cluster.status().servers), "all servers are up")


# -- writing -------------------------------------------------------------------------------------------------------


def test_a_chunkserver_freezes_in_the_middle_of_a_write(stalling: RealCluster) -> None:
    path = stalling.mnt / "appended"
    appender = Appender(path)
    appender.until(0.5)
    victim = sorted(servers_of(stalling, path))[0]
    with frozen(stalling.pid(victim)):
        before = len(appender.steps)
        appender.until(6)
        longest = max(appender.steps[before:])
        assert longest < LONGEST_STALL_SECONDS + SLACK_SECONDS
        # And then it goes on as usual.
        assert sorted(appender.steps[-20:])[10] < 0.5
        assert victim not in servers_of(stalling, path)
        appender.file.close()
        assert path.read_bytes() == appender.written
    all_up(stalling)


def test_a_chunkserver_is_slow_in_the_middle_of_a_write(own_cluster: RealCluster) -> None:
    """500 ms a request: each is behind a proxy, one of which becomes slow."""
    path = own_cluster.mnt / "appended"
    with ExitStack() as stack:
        proxies = {}
        for number in (1, 2, 3):
            name, port = f"chunkserver{number}", own_cluster.wanted.chunkserver_port(number)
            proxies[name] = stack.enter_context(proxying(Proxy(ELSEWHERE, port, HOST)))
            own_cluster.restart(name, advertise=ELSEWHERE)
        wait_until(
            lambda: all(s.host == ELSEWHERE and s.state == "UP" for s in own_cluster.status().servers),
            "all are behind it",
        )
        # The old mount remembers that they were all away a moment ago.
        own_cluster.remount()
        appender = Appender(path)
        appender.until(0.5)
        victim = sorted(servers_of(own_cluster, path))[0]
        proxies[victim].delay_seconds = 0.5
        before = len(appender.steps)
        appender.until(8)
        slow = [seconds for seconds in appender.steps[before:] if seconds > 0.4]
        assert slow, "nothing was slow: it does not test anything"
        assert sum(slow) < LONGEST_STALL_SECONDS + SLACK_SECONDS
        assert sorted(appender.steps[-20:])[10] < 0.4
        assert victim not in servers_of(own_cluster, path)
        appender.file.close()
        assert path.read_bytes() == appender.written


# -- reading -------------------------------------------------------------------------------------------------------


def test_a_tree_and_a_big_file_are_read_while_a_server_is_frozen(stalling: RealCluster) -> None:
    tree, big = stalling.mnt / "tree", stalling.mnt / "big"
    block = os.urandom(MIB)
    for folder in range(10):
        (tree / f"{folder}").mkdir(parents=True)
        for number in range(30):
            (tree / f"{folder}" / f"file{number}").write_bytes(block[: 1000 + number])
    with big.open("wb", buffering=0) as file:
        for _ in range(48):
            file.write(block)
        os.fsync(file.fileno())
    stalling.remount()

    def read_tree() -> None:
        for folder in range(10):
            for number in range(30):
                assert (tree / f"{folder}" / f"file{number}").read_bytes() == block[: 1000 + number]

    def read_big() -> None:
        assert big.read_bytes() == block * 48

    usual = seconds_of(read_tree) + seconds_of(read_big)
    for victim in ("chunkserver1", "chunkserver2", "chunkserver3"):
        stalling.remount()
        with frozen(stalling.pid(victim)):
            took = seconds_of(read_tree) + seconds_of(read_big)
        # Twice the promised second (one for each), and what a busy machine needs.
        assert took < 2 * usual + 2 + SLACK_SECONDS
        all_up(stalling)


# -- frozen mounts -------------------------------------------------------------------------------------------------


def test_a_mount_that_wakes_after_its_eviction_lands_no_byte(own_cluster: RealCluster) -> None:
    own_cluster.restart("metaserver", session_deadline_seconds=4, keep_alive_seconds=1)
    other, here = own_cluster.root / "other", own_cluster.mnt
    pid = own_cluster.mount_again(other)
    content = os.urandom(3 * MIB)
    for name in ("kept", "truncated", "overwritten"):
        (other / name).write_bytes(content)
    run("sync", other / "kept")
    wait_until(lambda: (here / "kept").read_bytes() == content, "the other mount's files are seen")
    files = [(other / name).open("r+b", buffering=0) for name in ("kept", "truncated", "overwritten")]
    for file in files:
        os.pwrite(file.fileno(), b"never" * 1000, 100)
        os.pwrite(file.fileno(), b"never" * 1000, 10 * MIB)
    with frozen(pid):
        # Others get at the files within the session's deadline, and see what was synced.
        def take_over() -> None:
            with (here / "truncated").open("r+b") as file:
                file.truncate(1000)
            with (here / "overwritten").open("r+b", buffering=0) as file:
                file.write(b"mine")
                os.fsync(file.fileno())

        assert seconds_of(take_over) < 60
        sessions = own_cluster.status().sessions
        wait_until(lambda: len(own_cluster.status().sessions) == 1, f"its session of {sessions} has ended")
    expected = {
        "kept": content,
        "truncated": content[:1000],
        "overwritten": b"mine" + content[4:],
    }
    # Each handle hears of the loss once; then the mount goes on in a new session.
    for file in files:
        with pytest.raises(OSError, match="error") as error:
            os.fsync(file.fileno())
        assert error.value.errno == errno.EIO
    for file in files:
        os.fsync(file.fileno())
        file.close()
    for name, right in expected.items():
        assert (here / name).read_bytes() == right, name
        wait_until(lambda name=name, right=right: (other / name).read_bytes() == right, f"{name} there")  # type: ignore[misc]
    (other / "new").write_bytes(b"new")
    run("sync", other / "new")
    assert (here / "new").read_bytes() == b"new"
    run("umount", other)
    own_cluster.remount()
    for name, right in expected.items():
        assert (here / name).read_bytes() == right, name


# -- changes that were given up ------------------------------------------------------------------------------------


def test_a_metaserver_that_wakes_does_nothing_that_was_given_up(own_cluster: RealCluster) -> None:
    other = own_cluster.root / "hasty"
    own_cluster.mount_again(other, "timeout=2")
    for name in ("unlinked", "renamed", "replaced", "truncated"):
        (other / name).write_bytes(b"content")
    run("sync", other / "truncated")
    os.listdir(other)
    errors: dict[str, int] = {}

    def attempt(name: str, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        errors[name] = done.returncode

    attempts = {
        "unlink": ("rm", "-f", f"{other}/unlinked"),
        "rename": ("mv", "-f", f"{other}/renamed", f"{other}/replaced"),
        "mkdir": ("mkdir", f"{other}/made"),
        "create": ("touch", f"{other}/created"),
        "truncate": ("truncate", "-s", "3", f"{other}/truncated"),
    }
    with frozen(own_cluster.pid("metaserver")):
        threads = [threading.Thread(target=attempt, args=(name, *command)) for name, command in attempts.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert all(errors.values()), errors
    # It has read all that was sent to it by the time it has answered something new.
    (other / "after").write_bytes(b"x")
    run("sync", other / "after")
    for place in (other, own_cluster.mnt):
        wait_until(
            lambda place=place: sorted(os.listdir(place)) == ["after", "renamed", "replaced", "truncated", "unlinked"],  # type: ignore[misc]
            "nothing has happened",
        )
        assert (place / "truncated").read_bytes() == b"content"
    # The same, done again, succeeds.
    for name, command in attempts.items():
        attempt(name, *command)
    assert not any(errors.values()), errors
    assert sorted(os.listdir(other)) == ["after", "created", "made", "replaced", "truncated"]
    run("umount", other)

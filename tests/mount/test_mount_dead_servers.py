"""Every handler has an end: what programs see while no server answers at all, and when the servers come back."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import every_call
import pytest
from mount_cluster import RealCluster, run, running, wait_until
from wire import wired

from dfsmount import dfs_processes

pytestmark = pytest.mark.timeout(240)

SERVERS = ("metaserver", "chunkserver1", "chunkserver2", "chunkserver3")
TIMEOUT_SECONDS = 2
# What a system call may take beyond the time-out (35 s at the default of 30), and what a busy machine adds.
MORE_SECONDS = 5
SLACK_SECONDS = 3
# After a restart of the metaserver.
RESUME_SECONDS = 10


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCluster]:
    """A cluster whose servers are stopped and started again and again."""
    with running(tmp_path_factory.mktemp("lonely")) as made:
        yield made


@pytest.fixture
def prepared(lonely: RealCluster, request: pytest.FixtureRequest) -> str:
    """The name of a directory of the cluster that is ready for :mod:`every_call`."""
    name = "".join(letter for letter in request.node.name if letter.isalnum())
    (lonely.mnt / name).mkdir()
    every_call.prepare(lonely.mnt / name)
    run("sync", lonely.mnt / name / "stat")
    return name


@contextmanager
def mounted(cluster: RealCluster, point: Path, *options: str) -> Iterator[int]:
    """Another mount, with options of its own. At the end it is gone whatever happened."""
    pid = cluster.mount_again(point, *options)
    try:
        yield pid
    finally:
        run("umount", "-i", "--lazy", "--force", point, check=False)
        end(pid)


def end(pid: int) -> None:
    """SIGTERM, and again: the second one does not wait for what is not written."""
    deadline = time.monotonic() + 40
    while dfs_processes.is_alive(pid):
        assert time.monotonic() < deadline, "the mount's process does not end"
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.5)


@contextmanager
def frozen(cluster: RealCluster) -> Iterator[None]:
    pids = [cluster.pid(name) for name in SERVERS]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextmanager
def dead(cluster: RealCluster) -> Iterator[None]:
    for name in SERVERS:
        cluster.kill(name)
    try:
        yield
    finally:
        cluster.up()


class Calls:
    """Every system call at once, below ``place``, begun by :meth:`go`."""

    def __init__(self, place: Path, *without: str) -> None:
        words = [sys.executable, every_call.__file__, str(place), *without]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._input, self._output = self.process.stdin, self.process.stdout
        assert self._input is not None
        assert self._output is not None
        assert self._output.readline() == "ready\n"

    def go(self) -> None:
        assert self._input is not None
        self._input.write("go\n")
        self._input.flush()

    def children(self) -> list[int]:
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(word) for word in found.split()]

    def results(self) -> dict[str, tuple[float, str]]:
        """When all have ended: seconds and outcome of each."""
        assert self._output is not None
        with self.process:
            lines = [line.split() for line in self._output]
        assert self.process.returncode == 0
        return {name: (float(seconds), outcome) for name, seconds, outcome in lines}


def is_mounted(point: Path) -> bool:
    """Without asking the mount."""
    return f" {point} " in Path("/proc/mounts").read_text()


def check_failures(results: dict[str, tuple[float, str]], seconds: float) -> None:
    assert len(results) > 45
    late = {name: told for name, told in results.items() if told[0] > seconds + MORE_SECONDS + SLACK_SECONDS}
    assert not late
    for name, (_, outcome) in results.items():
        if name in every_call.MAY_SUCCEED:
            assert outcome in ("0", "EIO"), (name, outcome)
        elif name == "mmap_read":
            assert outcome == "SIGBUS"
        else:
            assert outcome == "EIO", (name, outcome)


@pytest.mark.parametrize("stopped", [frozen, pytest.param(dead, marks=pytest.mark.soak)], ids=["frozen", "dead"])
def test_every_call_ends_with_an_error_when_no_server_answers(
    lonely: RealCluster, prepared: str, stopped: Callable[[RealCluster], object]
) -> None:
    point = lonely.root / prepared
    with mounted(lonely, point, f"timeout={TIMEOUT_SECONDS}"):
        calls = Calls(point / prepared)
        with stopped(lonely):  # type: ignore[attr-defined]
            calls.go()
            check_failures(calls.results(), TIMEOUT_SECONDS)
        # The same mount goes on.
        wait_until(lambda: works(point / prepared / "after"), "the mount works again")


def works(path: Path) -> bool:
    try:
        path.write_bytes(b"works")
        run("sync", path)
        path.unlink()
    except (OSError, AssertionError):
        return False
    return True


@pytest.mark.soak
def test_every_call_ends_with_an_error_when_packets_vanish(own_cluster: RealCluster) -> None:
    """Unlike a dead server's, an unreachable one's machine refuses nothing."""
    point = own_cluster.root / "far"
    (own_cluster.mnt / "prepared").mkdir()
    every_call.prepare(own_cluster.mnt / "prepared")
    run("sync", own_cluster.mnt / "prepared" / "stat")
    with wired(own_cluster.wanted.port) as wire:
        own_cluster.restart("metaserver", listen_host="0.0.0.0")
        for number in (1, 2, 3):
            listen = f"0.0.0.0:{own_cluster.wanted.chunkserver_port(number)}"
            own_cluster.restart(f"chunkserver{number}", listen=listen, advertise=wire.server)
        wire.mount(own_cluster, point, f"timeout={TIMEOUT_SECONDS}")
        try:
            calls = Calls(point / "prepared")
            with wire.cut():
                calls.go()
                check_failures(calls.results(), TIMEOUT_SECONDS)
            wait_until(lambda: works(point / "prepared" / "after"), "the mount works again")
        finally:
            run("umount", "-i", "--force", "--lazy", point, check=False)


@pytest.mark.soak
def test_those_who_wait_for_each_other_in_the_kernel_end_together(lonely: RealCluster, prepared: str) -> None:
    """Attributes are believed and names are not: all look up the same name, one after the other; and whoever changes a
    directory holds it while it waits."""
    point = lonely.root / prepared
    with mounted(lonely, point, f"timeout={TIMEOUT_SECONDS}", "attr_timeout=60", "entry_timeout=0"):
        calls = Calls(point / prepared)
        with frozen(lonely):
            calls.go()
            results = calls.results()
    assert max(seconds for seconds, _ in results.values()) < TIMEOUT_SECONDS + MORE_SECONDS + SLACK_SECONDS
    outcomes = {name: outcome for name, (_, outcome) in results.items()}
    assert {outcomes[name] for name in ("stat", "mkdir", "unlink", "rename", "create", "fsync")} == {"EIO"}


@pytest.mark.soak
def test_servers_that_come_back_in_time_are_a_delay_and_nothing_else(lonely: RealCluster, prepared: str) -> None:
    point = lonely.root / prepared
    with mounted(lonely, point):
        calls = Calls(point / prepared)
        with dead(lonely):
            calls.go()
            time.sleep(2)
        outcomes = {name: outcome for name, (_, outcome) in calls.results().items()}
    expected = {"stat_missing": "ENOENT", "getxattr": "ENODATA", "fgetxattr": "ENODATA", "removexattr": "ENODATA"}
    assert outcomes == {**dict.fromkeys(outcomes, "0"), **expected}


def test_hard_waits_until_the_process_is_killed(lonely: RealCluster, prepared: str) -> None:
    point = lonely.root / prepared
    with mounted(lonely, point, "hard") as pid:
        # Written pages of a mapping are nobody's: their writer would wait for the servers even when it is killed.
        calls = Calls(point / prepared, "msync")
        with frozen(lonely):
            calls.go()
            log = Path(f"{point}.log")
            wait_until(lambda: "operation waits" in log.read_text(), "it is said what is waited for")
            waiting = calls.children()
            assert len(waiting) > 35
            for child in waiting:
                os.kill(child, signal.SIGKILL)
            results = calls.results()
            assert {outcome for _, outcome in results.values()} == {"0", "SIGKILL"}
            text = log.read_text()
            for name in ("fsync", "read", "ask_attributes"):
                assert f"operation={name}" in text
            # Nothing waits any more, nothing is kept: it can be unmounted, forced, and its process ends.
            run("umount", "-i", "--force", point)
            assert not is_mounted(point)
            end(pid)


def test_whoever_waits_behind_a_killed_process_notices_nothing(lonely: RealCluster, prepared: str) -> None:
    """The kernel lets one after the other write or sync a file. The second is killed; the request is of the first."""
    point = lonely.root / prepared
    with mounted(lonely, point, "hard"):
        files = [(point / prepared / name).open("r+b", buffering=0) for name in ("fsync", "write_sync")]
        for file in files:
            file.write(b"dirty")
        synchronous = os.open(point / prepared / "write_sync", os.O_WRONLY | os.O_SYNC)

        def sync() -> None:
            os.fsync(files[0].fileno())

        def write() -> None:
            os.write(synchronous, b"written")

        with frozen(lonely):
            first = [every_call.start(call) for call in (sync, write)]
            time.sleep(1)
            second = [every_call.start(call) for call in (sync, write)]
            time.sleep(1)
            for pid in second:
                os.kill(pid, signal.SIGKILL)
            # They are looked at more than once. An EINTR would not be seen: Python repeats the call.
            time.sleep(2.5)
            assert "its process was killed" not in Path(f"{point}.log").read_text()
            assert [os.waitpid(pid, os.WNOHANG)[0] for pid in first] == [0, 0]
        assert [os.waitpid(pid, 0)[1] for pid in first] == [0, 0]
        assert [os.waitpid(pid, 0)[1] for pid in second] == [signal.SIGKILL] * 2
        os.close(synchronous)
        for file in files:
            file.close()


class Load(threading.Thread):
    """Names, data and attributes without end; the longest step, and what went wrong."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        folder.mkdir()
        self.folder = folder
        self.steps = 0
        self.longest = 0.0
        self.error: OSError | None = None
        self.stopping = False

    def run(self) -> None:
        try:
            while not self.stopping:
                for step in (self.write, self.look, self.move, self.remove):
                    started = time.monotonic()
                    step()
                    self.longest = max(self.longest, time.monotonic() - started)
                    self.steps += 1
        except OSError as error:
            self.error = error

    def write(self) -> None:
        with (self.folder / "new").open("wb") as file:
            file.write(b"content" * 1000)
            file.flush()
            os.fsync(file.fileno())

    def look(self) -> None:
        assert (self.folder / "new").stat().st_size == 7000
        assert os.listdir(self.folder) == ["new"]
        (self.folder / "new").chmod(0o600)

    def move(self) -> None:
        (self.folder / "new").rename(self.folder / "other")
        assert (self.folder / "other").read_bytes() == b"content" * 1000

    def remove(self) -> None:
        (self.folder / "directory").mkdir()
        (self.folder / "other").unlink()
        (self.folder / "directory").rmdir()


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.soak), signal.SIGKILL])
def test_a_restart_of_the_metaserver_is_a_short_delay(lonely: RealCluster, number: signal.Signals) -> None:
    (lonely.mnt / number.name).mkdir()
    loads = [Load(lonely.mnt / number.name / str(name)) for name in range(4)]
    for load in loads:
        load.start()
    try:
        wait_until(lambda: all(load.steps > 8 or load.error for load in loads), "all work")
        lonely.kill("metaserver", number)
        lonely.up()
        back = [load.steps for load in loads]
        wait_until(
            lambda: all(load.steps > steps + 1 or load.error for load, steps in zip(loads, back, strict=True)),
            "all work again",
            RESUME_SECONDS,
        )
    finally:
        for load in loads:
            load.stopping = True
        for load in loads:
            load.join(60)
    assert [load.error for load in loads] == [None] * 4
    assert max(load.longest for load in loads) < RESUME_SECONDS + SLACK_SECONDS


@contextmanager
def waiting_inside(point: Path) -> Iterator[None]:
    """A process waits there for an answer; at the end it has got an error."""
    child = subprocess.Popen(["stat", point / "not-there"], stderr=subprocess.DEVNULL)
    time.sleep(0.3)
    assert child.poll() is None
    yield
    assert child.wait(10) != 0


def test_a_mount_without_servers_is_unmounted_by_force(lonely: RealCluster, prepared: str) -> None:
    """Nobody has to end its process, which would otherwise wait for servers on behalf of nobody."""
    point = lonely.root / prepared
    with mounted(lonely, point, "hard") as pid, frozen(lonely):
        with waiting_inside(point):
            # Who is inside makes it busy at first; the force has thrown them out.
            done = run("umount", "-i", "-f", point, check=False, timeout=20)
        if done.returncode:
            run("umount", "-i", point, timeout=20)
        assert not is_mounted(point)
        wait_until(lambda: not dfs_processes.is_alive(pid), "its process ends")


@pytest.mark.parametrize("signals", [pytest.param(1, marks=pytest.mark.soak), 4])
def test_a_mount_without_servers_ends_when_it_is_told_to(lonely: RealCluster, prepared: str, signals: int) -> None:
    """The first signal waits a moment for those inside, the second does not, and those after it do no harm."""
    point = lonely.root / prepared
    with mounted(lonely, point, "hard") as pid, frozen(lonely), waiting_inside(point):
        for _ in range(signals):
            os.kill(pid, signal.SIGTERM)
            time.sleep(0.2)
        wait_until(lambda: not dfs_processes.is_alive(pid), "its process ends")
        assert not is_mounted(point)


@pytest.mark.soak
@pytest.mark.parametrize("command", [("umount", "-i", "-l"), ("fusermount3", "-u", "-z")], ids=["lazy", "fusermount"])
def test_a_mount_without_servers_can_be_detached(lonely: RealCluster, prepared: str, command: tuple[str, ...]) -> None:
    """Who is inside stays inside."""
    point = lonely.root / prepared
    with mounted(lonely, point, "hard") as pid, frozen(lonely):
        inside = subprocess.Popen(["stat", point / "not-there"], stderr=subprocess.DEVNULL)
        time.sleep(0.3)
        run(*command, point, timeout=20)
        assert not is_mounted(point)
        assert inside.poll() is None
        inside.kill()
        inside.wait(10)
        wait_until(lambda: not dfs_processes.is_alive(pid), "its process ends with the last who was inside")


@pytest.mark.soak
@pytest.mark.parametrize("stopped", [frozen, dead], ids=["frozen", "dead"])
def test_every_call_ends_within_35_seconds(
    lonely: RealCluster, prepared: str, stopped: Callable[[RealCluster], object]
) -> None:
    point = lonely.root / prepared
    with mounted(lonely, point):
        calls = Calls(point / prepared)
        with stopped(lonely):  # type: ignore[attr-defined]
            calls.go()
            results = calls.results()
    check_failures(results, 30)
    assert max(seconds for seconds, _ in results.values()) < 35

"""The command line as an operator meets it: real processes, one line for each failure, and a clean end."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
import trio
from typer.testing import CliRunner

from metaserver import cli, identity
from metaserver.config import Config, ConfigError, load, parse_address, with_flags
from metaserver.identity import DataDirectoryError
from metaserver.serve import StartError, serve
from metaserver.store import Store, StoreFull

ANYWHERE = ("--listen", "127.0.0.1:0", "--http", "127.0.0.1:0")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-bb", "-m", "metaserver", *arguments]


def run(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


class Server:
    """A running metaserver; its ports are in its log."""

    def __init__(self, data: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            command("--data", str(data), *(arguments or ANYWHERE)), stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        self.log = ""
        while "serving" not in self.log:
            line = self.process.stderr.readline()
            assert line, self.log
            self.log += line

    def http(self) -> str:
        found = re.search(r"http=(\S+)", self.log)
        assert found is not None
        return found[1]

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=30)
        self.log += errors
        return self.process.returncode


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path / "data")
    yield running
    if running.process.poll() is None:
        running.stop(signal.SIGKILL)


def one_line(text: str) -> str:
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("metaserver: ")
    return lines[0].removeprefix("metaserver: ")


def test_it_runs_until_told_to_stop_and_explains_what_is_wrong(server: Server, tmp_path: Path) -> None:
    data = tmp_path / "data"
    code, _, errors = run("--data", str(data), *ANYWHERE)
    assert (code, one_line(errors)) == (1, f"another metaserver process uses {data}")
    code, _, errors = run("check", "--data", str(data))
    assert (code, one_line(errors)) == (1, f"another metaserver process uses {data}")
    code, output, _ = run("snapshot", "--data", str(data), "--http", server.http())
    assert (code, Path(output.strip()).is_file()) == (0, True)
    key = data / "cluster.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.read_text().strip() not in server.log
    assert server.stop() == 0
    assert "stopping" in server.log
    code, output, _ = run("check", "--data", str(data))
    assert code == 0
    assert "0 problems" in output
    os.truncate(data / "data.mdb", 5000)
    code, _, errors = run("--data", str(data), *ANYWHERE)
    assert code == 65
    assert one_line(errors).endswith(f"run: metaserver recover --data {data}")
    code, output, _ = run("recover", "--data", str(data))
    assert code == 0
    assert output.splitlines()[-1].startswith("recovered ")
    assert run("check", "--data", str(data))[0] == 0


def test_it_survives_being_killed(tmp_path: Path) -> None:
    first = Server(tmp_path / "data")
    assert first.stop(signal.SIGKILL) == -signal.SIGKILL
    second = Server(tmp_path / "data")
    assert "epoch=2" in second.log
    assert second.stop(signal.SIGINT) == 0


def test_after_a_fatal_signal_the_whole_store_is_looked_through(tmp_path: Path) -> None:
    assert Server(tmp_path / "data").stop() == 0
    assert Server(tmp_path / "data").stop(signal.SIGBUS) == -signal.SIGBUS
    third = Server(tmp_path / "data")
    assert "ended by a fatal signal" in third.log
    assert "Bus error" in third.log
    assert third.stop() == 0
    fourth = Server(tmp_path / "data")
    assert "fatal" not in fourth.log
    assert fourth.stop() == 0


@pytest.mark.parametrize("which", ["listen_port", "http_port"])
async def test_a_port_in_use(tmp_path: Path, which: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = {"listen_port": 0, "http_port": 0, which: port}
        with pytest.RaisesGroup(
            pytest.RaisesExc(StartError, match=f"port {port} on 127.0.0.1 is in use"),
            allow_unwrapped=True,
            flatten_subgroups=True,
        ):
            await serve(with_flags(Config(data=str(tmp_path / "data")), ports), trio.Event())
    assert not (tmp_path / "data").exists(), "nothing is left behind"


def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "200000")
        server = Server(tmp_path / "data")
        seen = set()
        deadline = time.monotonic() + 20
        while seen != {b"READY=1", b"WATCHDOG=1"} and time.monotonic() < deadline:
            seen.add(manager.recv(100))
        assert seen == {b"READY=1", b"WATCHDOG=1"}
        assert server.stop() == 0
        while b"STOPPING=1" not in seen:
            seen.add(manager.recv(100))


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ((), 78, "no data directory"),
        (("--data", "x", "--listen", "nonsense"), 78, "--listen must be HOST:PORT"),
        (("--data", "x", "--http", "a:99999"), 78, "--http must be HOST:PORT"),
        (("run", "--data", "x", "--copies", "0"), 78, "copies"),
        (("--data", "x", "--log-level", "loud"), 78, "log level 'loud'"),
        (("--config", "/nonexistent.toml"), 78, "cannot read /nonexistent.toml"),
        (("check", "--data", "/nonexistent"), 1, "is not a metaserver's data directory"),
        (("rebuild", "--data", "x", "--chunkserver", "a:1", "--key-file", "/nonexistent"), 1, "no cluster key at"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], code: int, text: str) -> None:
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == code
    assert text in one_line(done.stderr)


# -- without a process -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("foo = 1", r"unknown key 'foo' \(there are: .*copies, .*window_seconds\)$"),
        ("copys = 1", r"unknown key 'copys' \(did you mean 'copies'\?\)$"),
        ("copies = 'two'", "'copies': expected int, got str$"),
        ("copies = 99", "'copies': expected int <= 16$"),
        ("listen_port = 70000", "'listen_port': expected int <= 65535$"),
        ("[log]\nlevel = 'loud'", "'log.level': "),
        ("[log]\nlevle = 1", r"unknown key 'log.levle' \(did you mean 'log.level'\?\)$"),
        ("log = 1", "'log': expected object, got int$"),
        ("not toml", "is not TOML"),
    ],
)
def test_a_configuration_that_cannot_be_used(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem) as caught:
        load(path)
    assert str(path) in str(caught.value)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError):
        load(path)


def test_values_that_do_not_fit_together() -> None:
    for config in (
        Config(),
        Config(data="x", copies=1, min_copies=2),
        Config(data="x", session_deadline_seconds=5.0),
    ):
        with pytest.raises(ConfigError):
            config.check()
    Config(data="x").check()
    assert Config(data="/a").key_path == Path("/a/cluster.key")
    assert Config(data="/a", key_file="/k").key_path == Path("/k")
    assert with_flags(Config(data="x"), {"copies": 3}).copies == 3


def test_addresses() -> None:
    assert parse_address("h:1", "x") == ("h", 1)
    assert parse_address("[::1]:9400", "x") == ("::1", 9400)
    for text in ("h", ":1", "h:", "h:x", "h:70000"):
        with pytest.raises(ConfigError):
            parse_address(text, "x")


def test_the_example_configuration_is_one() -> None:
    config = load(Path(__file__).parents[3] / "systemd" / "metaserver.toml")
    config.check()
    # It shows the defaults, but for the addresses and paths of an example.
    shown = with_flags(config, {"listen_host": "127.0.0.1", "http_host": "127.0.0.1", "key_file": "", "data": ""})
    assert shown == Config()


def test_data_directories_of_others_are_refused(tmp_path: Path) -> None:
    first = identity.open_directory(tmp_path / "new" / "deep")
    assert identity.open_directory(tmp_path / "new" / "deep") == first

    def refused(name: str, content: bytes, text: str) -> None:
        path = tmp_path / name
        path.mkdir()
        (path / "identity.json").write_bytes(content)
        with pytest.raises(DataDirectoryError, match=text):
            identity.open_directory(path)

    refused("chunkserver", b'{"format":1,"server":33,"name":"x","cluster_id":""}', "belongs to a chunkserver")
    other = b'{"format":1,"server":3,"cluster_id":"%s"}' % first.cluster_id.encode()
    refused("joined", other, "belongs to a chunkserver")
    refused("newer", b'{"format":9,"cluster_id":"%s","role":"metaserver"}' % first.cluster_id.encode(), "format 9")
    refused("garbage", b"garbage", "damaged")
    # Another cluster's id, to look at it: every chunkserver would be refused.
    whole = (tmp_path / "new" / "deep" / "identity.json").read_bytes()
    for number in range(8 * len(whole.rstrip())):
        flipped = bytearray(whole)
        flipped[number // 8] ^= 1 << number % 8
        (tmp_path / "flipped").mkdir(exist_ok=True)
        (tmp_path / "flipped" / "identity.json").write_bytes(flipped)
        try:
            assert identity.open_directory(tmp_path / "flipped").cluster_id == first.cluster_id
        except DataDirectoryError as error:
            assert "\n" not in str(error)
    # Written by an older version, or by hand.
    (tmp_path / "flipped" / "identity.json").write_bytes(
        b'{"format":1,"cluster_id":"%s","role":"metaserver"}' % first.cluster_id.encode()
    )
    assert identity.open_directory(tmp_path / "flipped").cluster_id == first.cluster_id
    full = tmp_path / "full"
    full.mkdir()
    (full / "holiday.jpg").touch()
    with pytest.raises(DataDirectoryError, match=r"not empty \(holiday.jpg\)"):
        identity.open_directory(full)
    with pytest.raises(DataDirectoryError, match="cannot use the data directory"):
        identity.open_directory(full / "holiday.jpg")


def test_a_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(DataDirectoryError, match="Permission denied"):
        identity.open_directory(tmp_path)


def test_a_start_on_a_full_disk_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise StoreFull

    monkeypatch.setattr(Store, "write", refuse)
    handlers = logging.getLogger().handlers[:]
    done = CliRunner().invoke(cli.app, ["--data", str(tmp_path / "data"), *ANYWHERE])
    # What it has set up writes to what is closed by now: all tests after this one would fail.
    structlog.reset_defaults()
    logging.getLogger().handlers[:] = handlers
    assert done.exit_code == 1
    assert "Traceback" not in done.output
    assert "the metaserver's disk is full: make some space" in done.output

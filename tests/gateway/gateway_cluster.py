"""A cluster of real processes without a mount, and gateways to it, asked with curl as anybody would."""

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mount_cluster import ROOT, RealCluster, run

READY = "Serving "


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes
    # curl's exit code.
    exit_code: int = 0

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return str(self.json["code"])


class Gateway:
    """One process of `dfs gateway`; it can be killed and started again."""

    def __init__(self, cluster: "MountlessCluster", *options: str, name: str = "test") -> None:
        self.cluster = cluster
        self.options = [*options, "--name", name]
        self.url = ""
        self.token = ""
        self.process: subprocess.Popen[str] | None = None
        self.log = cluster.root / f"gateway-{name}-{secrets.token_hex(3)}.log"

    def start(self) -> None:
        command = [
            sys.executable,
            "-bb",
            "-X",
            "dev",
            "-m",
            "dfsmount.dfs",
            "gateway",
            "--data",
            str(self.cluster.data),
        ]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, "--listen", "127.0.0.1:0", *self.options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith(READY), f"{line}{self.log.read_text()}"
        self.url = line.split()[-1]
        # None is made for a gateway that has its tokens from a file.
        made = self.cluster.data / "gateway.token"
        self.token = made.read_text().strip() if made.exists() else ""

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(timeout=60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def rss_bytes(self) -> int:
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) << 10

    # -- asking ------------------------------------------------------------------------------------------------

    def command(self, path: str, *options: str | Path, token: str | None = None) -> list[str]:
        known = self.token if token is None else token
        login = ["-H", f"Authorization: Bearer {known}"] if known else []
        return ["curl", "-sS", "--path-as-is", *login, *map(str, options), f"{self.url}{path}"]

    def curl(self, path: str, *options: str | Path, token: str | None = None, check: bool = True) -> Answer:
        head = self.cluster.root / f"head-{secrets.token_hex(4)}"
        command = self.command(path, "-m", "60", "-D", head, *options, token=token)
        done = subprocess.run(command, capture_output=True, check=False, timeout=90)
        assert not check or done.returncode == 0, f"{command}: {done.returncode} {done.stderr.decode()}"
        lines = head.read_text(encoding="latin-1").splitlines() if head.exists() else []
        head.unlink(missing_ok=True)
        # After 100 Continue the last answer counts.
        starts = [number for number, line in enumerate(lines) if line.startswith("HTTP/")]
        if not starts:
            return Answer(0, {}, done.stdout, done.returncode)
        fields = [line.partition(": ") for line in lines[starts[-1] + 1 :] if ": " in line]
        status = int(lines[starts[-1]].split()[1])
        return Answer(status, {name.lower(): value for name, _, value in fields}, done.stdout, done.returncode)

    def put(self, path: str, data: bytes, *options: str) -> Answer:
        file = self.cluster.root / f"body-{secrets.token_hex(4)}"
        file.write_bytes(data)
        try:
            return self.curl(path, "-T", file, *options)
        finally:
            file.unlink()

    def names(self, path: str = "/files/") -> list[str]:
        """All names of a directory, page by page."""
        found: list[str] = []
        while path:
            page = self.curl(path).json
            found += [entry["name"] for entry in page["entries"]]
            path = page["next"]
        return found


class MountlessCluster(RealCluster):
    """One metaserver and three chunkservers, two copies; no FUSE."""

    def start_servers(self) -> None:
        wanted = (self.wanted.port, self.wanted.servers, self.wanted.copies)
        self.script("start_servers.py", self.data, *map(str, wanted))

    def script(self, name: str, *words: str | Path) -> str:
        """What one of the programs beside this file prints."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return run(sys.executable, ROOT / "tests/gateway" / name, *words, env=environment).stdout

    @contextmanager
    def gateway(self, *options: str, name: str = "test") -> Iterator[Gateway]:
        """A gateway that runs for as long as the block, and ends cleanly."""
        gateway = Gateway(self, *options, name=name)
        try:
            gateway.start()
            yield gateway
            assert gateway.process is not None
            if gateway.process.poll() is None:
                assert gateway.stop() == 0, gateway.log.read_text()
            assert "Traceback" not in gateway.log.read_text(), gateway.log.read_text()
        finally:
            if gateway.process is not None and gateway.process.poll() is None:
                gateway.process.kill()
                gateway.process.wait()

    def raw_names(self) -> list[str]:
        """Every name below the root as the metaserver has it, hidden ones included."""
        return self.script("list_all.py", self.wanted.address, self.layout.key_file).splitlines()


@contextmanager
def running_without_mount(root: Path) -> Iterator[MountlessCluster]:
    cluster = MountlessCluster(root)
    try:
        cluster.start_servers()
        yield cluster
        cluster.check()
    finally:
        cluster.destroy()

"""A container with systemd as its first process, to try units for real: Debian 12 in a directory, booted by nspawn.

Only what the units need is in it: systemd, Python and FUSE from Debian, and the checkout with its virtual environment
under /opt/dfs. It has a network of its own without a way out, with 192.0.2.1 on its loopback device.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = "systemd,systemd-sysv,dbus,python3,python3-venv,fuse3,libfuse3-3,iproute2,procps,man-db"
MIRROR = "http://deb.debian.org/debian"
BOOT_SECONDS = 120.0
# What a network manager does elsewhere.
ADDRESS_UNIT = """[Unit]
DefaultDependencies=no
Before=network-online.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/ip address replace 192.0.2.1/24 dev lo
"""


def build(tree: Path) -> None:
    """Makes the tree; Debian's part of it only once."""
    if not (tree / "lib/systemd/systemd").exists():
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(tree), MIRROR]
        subprocess.run(command, check=True)
    home = tree / "opt/dfs"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    for name in ("dfsmount", "metaserver", "chunkserver", "systemd", "README.md"):
        subprocess.run(["cp", "-a", str(ROOT / name), str(home)], check=True)
    _virtual_environment(tree, home)
    unit = tree / "usr/lib/systemd/system/test-address.service"
    unit.write_text(ADDRESS_UNIT)
    wants = tree / "usr/lib/systemd/system/network-online.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / unit.name).unlink(missing_ok=True)
    (wants / unit.name).symlink_to(f"../{unit.name}")


def _virtual_environment(tree: Path, home: Path) -> None:
    """One for Debian's Python, with the packages of the one that runs this: installing anew needs a compiler."""
    subprocess.run(["chroot", str(tree), "python3", "-m", "venv", "--without-pip", "/opt/dfs/.venv"], check=True)
    own = Path(sys.prefix)
    packages = next((own / "lib").glob("python3*/site-packages"))
    there = next((home / ".venv/lib").glob("python3*/site-packages"))
    assert packages.parent.name == there.parent.name, f"this test needs {there.parent.name}, as Debian 12 has it"
    subprocess.run(["cp", "-a", f"{packages}/.", str(there)], check=True)
    for finder in there.glob("__editable__*finder.py"):
        finder.write_text(finder.read_text().replace(str(ROOT), "/opt/dfs"))
    for name in ("dfs", "dfsmount", "metaserver", "chunkserver", "mount.dfs", "umount.fuse.dfs"):
        lines = (own / "bin" / name).read_text().splitlines(keepends=True)
        script = home / ".venv/bin" / name
        script.write_text("#!/opt/dfs/.venv/bin/python3\n" + "".join(lines[1:]))
        script.chmod(0o755)


class Container:
    """A booted one. ``leader`` is its first process, seen from outside."""

    def __init__(self, leader: int, log: Path) -> None:
        self.leader = leader
        self.log = log

    def run(self, command: str, *, check: bool = True, seconds: float = 120.0) -> str:
        """What a command line prints (both streams) when root runs it inside."""
        environment = ["PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8"]
        inside = ["nsenter", "-t", str(self.leader), "-a", "env", "-i", *environment, "bash", "-c", command]
        done = subprocess.run(
            inside,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{command}: exit code {done.returncode}\n{done.stdout}")
        return done.stdout

    def wait(self, command: str, wanted: str, seconds: float = 60.0) -> None:
        """Until the command prints just that."""
        wait_until(lambda: self.run(command, check=False).strip() == wanted, f"{command} = {wanted}", seconds)


def wait_until(condition: Callable[[], bool], what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.2)


@contextmanager
def booted(tree: Path, name: str) -> Iterator[Container]:
    """Boots the tree until systemd has started everything, and shuts it down at the end."""
    log = tree.parent / f"{tree.name}.console"
    command = ["systemd-nspawn", "--quiet", "--directory", str(tree), "--machine", name, "--boot", "--register=no"]
    command += ["--keep-unit", "--private-network", "--bind=/dev/fuse", "--link-journal=no", "--console=read-only"]
    with log.open("ab") as output:
        host = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        wait_until(lambda: host.poll() is not None or _child(host.pid) > 0, "nspawn starts", BOOT_SECONDS)
        assert host.poll() is None, f"nspawn ended with {host.returncode}: see {log}"
        container = Container(_child(host.pid), log)
        states = ("running", "degraded")
        wait_until(
            lambda: container.run("systemctl is-system-running", check=False).strip() in states,
            "the container boots",
            BOOT_SECONDS,
        )
        yield container
        container.run("systemctl --no-block poweroff", check=False)
        host.wait(BOOT_SECONDS)
    finally:
        if host.poll() is None:
            host.terminate()  # nspawn then has the container power off
            try:
                host.wait(30)
            except subprocess.TimeoutExpired:
                host.kill()
                host.wait()


def _child(pid: int) -> int:
    """The first process of the container: nspawn's only child that is called systemd."""
    found = subprocess.run(["pgrep", "-P", str(pid), "systemd"], capture_output=True, text=True, check=False)
    return int(found.stdout.split()[0]) if found.stdout.split() else 0

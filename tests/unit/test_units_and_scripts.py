"""What operators touch: units, example configurations, set-up scripts, pins."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import msgspec
import pytest

import chunkserver.config
import dfsmount.config
import metaserver.config

ROOT = Path(__file__).resolve().parent.parent.parent
UNITS = {"metaserver.service": 2.0, "chunkserver@.service": 2.0, "dfsmount@.service": 4.5, "dfs-gateway@.service": 2.0}
SCRIPTS = ("quickstart.sh", "test.sh", ".ci/run", "scripts/setup.sh")


def run(*command: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **options)  # type: ignore[call-overload,no-any-return]


# -- systemd -------------------------------------------------------------------------------------------------------


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units with programs that exist here in place of /opt/dfs/.venv/bin."""
    for program in ("metaserver", "chunkserver", "dfsmount", "dfs"):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    for name in UNITS:
        text = (ROOT / "systemd" / name).read_text()
        assert "ExecStart=/opt/dfs/.venv/bin/" in text
        (tmp_path / name).write_text(text.replace("/opt/dfs/.venv/bin/", f"{tmp_path}/"))
    return tmp_path


@pytest.mark.parametrize("name", UNITS)
def test_systemd_finds_nothing_wrong_with_a_unit(units: Path, name: str) -> None:
    done = run("systemd-analyze", "verify", "--man=no", str(units / name.replace("@.", "@mnt-data.")))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(("name", "limit"), UNITS.items())
def test_units_are_hardened(name: str, limit: float) -> None:
    done = run("systemd-analyze", "security", "--offline=true", "--no-pager", str(ROOT / "systemd" / name))
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found, done.stderr
    assert float(found[1]) <= limit


@pytest.mark.skipif(os.geteuid() != 0, reason="drops capabilities")
def test_a_mount_as_a_service_sees_what_killed_processes_wait_for() -> None:
    """Those of other users, and of root with more capabilities than the unit leaves it."""
    text = (ROOT / "systemd/dfsmount@.service").read_text()
    found = re.search("^CapabilityBoundingSet=(.*)$", text, re.MULTILINE)
    assert found
    names = ",".join("+" + name.removeprefix("CAP_").lower() for name in found[1].split())
    waiting = subprocess.Popen(["sleep", "60"])
    try:
        files = [f"/proc/{waiting.pid}/{name}" for name in ("syscall", "wchan", "fdinfo/1", "mountinfo")]
        done = run("setpriv", f"--bounding-set=-all,{names}", "cat", *files)
        assert done.returncode == 0, done.stderr
    finally:
        waiting.kill()
        waiting.wait()


@pytest.mark.parametrize("name", UNITS)
def test_units_notify_and_are_watched(name: str) -> None:
    text = (ROOT / "systemd" / name).read_text()
    assert "\nType=notify\n" in text
    assert re.search(r"^WatchdogSec=\d+s$", text, re.MULTILINE)


@pytest.mark.parametrize("option", ["ProtectSystem", "PrivateTmp", "PrivateMounts", "ProtectHome", "PrivateDevices"])
def test_the_mount_is_made_where_everybody_sees_it(option: str) -> None:
    assert not re.search(rf"^{option}=", (ROOT / "systemd/dfsmount@.service").read_text(), re.MULTILINE)


# -- example configurations ----------------------------------------------------------------------------------------


def test_the_example_of_the_metaserver_is_complete() -> None:
    path = ROOT / "systemd/metaserver.toml"
    metaserver.config.load(path).check()
    fields = {field.name for field in msgspec.structs.fields(metaserver.config.Config)}
    assert set(tomllib.loads(path.read_text())) >= fields - {"copies_per_server"}


def test_the_example_shows_the_metaservers_defaults() -> None:
    example = tomllib.loads((ROOT / "systemd/metaserver.toml").read_text())
    defaults = msgspec.to_builtins(metaserver.config.Config())
    places = {"data", "key_file", "listen", "http", "listen_host", "http_host"}
    assert {key: value for key, value in example.items() if key not in places} == {
        key: defaults[key] for key in example if key not in places
    }


def test_the_example_of_a_chunkserver_is_complete() -> None:
    path = ROOT / "systemd/chunkserver.toml"
    chunkserver.config.make(chunkserver.config.read_file(path), str(path))
    fields = {field.name for field in msgspec.structs.fields(chunkserver.config.Config)}
    assert set(tomllib.loads(path.read_text())) >= fields - {"advertise"}


def test_the_example_of_a_mount_is_understood() -> None:
    lines = (ROOT / "systemd/mount.conf").read_text().splitlines()
    values = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert dfsmount.config.parse_source(values["SOURCE"]).port == 9400
    options = dfsmount.config.parse_options([values["OPTIONS"]])
    assert options.allow_other
    assert options.key_file == Path("/etc/dfs/cluster.key")


def test_the_example_of_a_gateway_is_understood() -> None:
    lines = (ROOT / "systemd/gateway.conf").read_text().splitlines()
    values = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    unit = (ROOT / "systemd/dfs-gateway@.service").read_text()
    assert set(re.findall(r"\$\{?([A-Z_]+)\}?", unit)) == set(values)
    done = run(sys.executable, "-m", "dfsmount.dfs", "gateway", "--help", cwd=str(ROOT))
    for option in re.findall(r"--[a-z-]+", values["OPTIONS"] + unit.partition("ExecStart=")[2].partition("\n")[0]):
        assert option in done.stdout


# -- scripts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_bash_without_mistakes_of_form(name: str) -> None:
    done = run("bash", "-n", str(ROOT / name))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", SCRIPTS[:3])
def test_scripts_stop_at_the_first_failure(name: str) -> None:
    assert "\nset -euo pipefail\n" in (ROOT / name).read_text()
    assert os.access(ROOT / name, os.X_OK)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--help"], 0, "usage: ./quickstart.sh MOUNTPOINT"),
        ([], 2, "usage: ./quickstart.sh MOUNTPOINT"),
        (["--nonsense"], 1, "quickstart.sh: unknown option --nonsense"),
        (["/a", "/b"], 1, "quickstart.sh: more than one mountpoint"),
        (["--data"], 1, "quickstart.sh: --data needs a directory"),
    ],
)
def test_quickstart_is_clear_about_its_arguments(arguments: list[str], code: int, text: str, tmp_path: Path) -> None:
    done = run(str(ROOT / "quickstart.sh"), *arguments, cwd=tmp_path)
    assert done.returncode == code
    assert text in done.stdout + done.stderr


class Machine:
    """A made-up machine for scripts/setup.sh: packages that are installed, and commands that only say they ran."""

    def __init__(self, root: Path, installed: list[str]) -> None:
        self.bin = root / "bin"
        self.log = root / "log"
        self.bin.mkdir()
        self.command(
            "dpkg-query", f'case " {" ".join(installed)} " in *" ${{@: -1}} "*) printf installed;; *) exit 1;; esac'
        )
        self.command("apt-get", f'echo "$@" >>{self.log}')

    def command(self, name: str, text: str) -> None:
        (self.bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (self.bin / name).chmod(0o755)

    def setup(self, text: str) -> subprocess.CompletedProcess[str]:
        script = f"set -euo pipefail; cd {ROOT}; source scripts/setup.sh; EXTRA=(); {text}"
        return run("bash", "-c", script, env={**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}"})

    def ran(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.mark.skipif(os.geteuid() != 0, reason="installing packages is for root")
def test_only_missing_packages_are_installed(tmp_path: Path) -> None:
    machine = Machine(tmp_path, ["fuse3", "gcc"])
    done = machine.setup("install_packages fuse3 gcc")
    assert (done.returncode, machine.ran()) == (0, [])
    done = machine.setup("install_packages fuse3 libfuse3-dev gcc pkg-config")
    assert done.returncode == 0, done.stderr
    assert machine.ran() == [
        "-q update",
        "-q -y -o DPkg::Lock::Timeout=300 --no-install-recommends install libfuse3-dev pkg-config",
    ]
    assert "Installing Debian packages: libfuse3-dev pkg-config ... done in" in done.stdout


def test_a_failing_step_shows_its_last_lines(tmp_path: Path) -> None:
    done = Machine(tmp_path, []).setup("step 'Doing it' bash -c 'echo because of this; exit 7'")
    assert done.returncode == 7
    assert "Doing it failed (exit code 7)" in done.stderr
    assert "because of this" in done.stderr


def test_an_unusable_python_is_seen(tmp_path: Path) -> None:
    machine = Machine(tmp_path, [])
    machine.command("oldpython", "exit 1")
    assert machine.setup("python_works oldpython").returncode == 1
    assert machine.setup("python_works /nonexistent").returncode != 0


# -- pins ----------------------------------------------------------------------------------------------------------


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {normal(name): version for name, version in (line.split("==") for line in lines if line)}


def test_everything_that_is_declared_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["dev"],
    ]
    names = {normal(re.split(r"[\[<>=~! ;]", requirement)[0]) for requirement in declared}
    assert names - set(pins()) == set()


def test_everything_that_is_installed_beside_the_project_is_pinned() -> None:
    stamp = ROOT / ".venv/.installed"
    if not stamp.exists() or not shutil.which("python", path=str(ROOT / ".venv/bin")):
        pytest.skip("no .venv made by the set-up here")
    found = distributions(path=[str(path) for path in (ROOT / ".venv/lib").glob("python3*/site-packages")])
    installed = {normal(d.metadata["Name"]): d.version for d in found}
    unpinned = set(installed) - set(pins()) - {"dfsmount", "pip", "setuptools"}
    assert unpinned == set()
    assert {name: installed[name] for name in installed if name in pins() and name != "setuptools"} == {
        name: pins()[name] for name in installed if name in pins() and name != "setuptools"
    }

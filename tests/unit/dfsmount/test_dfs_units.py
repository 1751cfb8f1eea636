"""`dfs install-units`, below a directory of its own; tests/hosts has the same in a booted container."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dfsmount import dfs_units
from dfsmount.dfs_layout import Problem

DFS = str(Path(sys.executable).parent / "dfs")
THERE = "/opt/dfs/.venv/bin"


def install(root: Path, *options: str, programs: str = THERE) -> subprocess.CompletedProcess[str]:
    command = [DFS, "install-units", "--root", str(root), "--programs", programs, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def tree(root: Path) -> set[str]:
    return {f"/{path.relative_to(root)}" for path in root.rglob("*") if path.is_symlink() or path.is_file()}


def test_everything_is_installed_once(tmp_path: Path) -> None:
    done = install(tmp_path, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["files"] == told["changed"]
    assert set(told["files"]) <= tree(tmp_path)
    assert "dfs:x:" in (tmp_path / "etc/passwd").read_text()
    assert (tmp_path / "etc/dfs").stat().st_mode & 0o777 == 0o750
    again = install(tmp_path)
    assert "none of them new or changed" in again.stdout


def test_units_run_the_programs_where_they_are(tmp_path: Path) -> None:
    assert install(tmp_path, programs="/srv/dfs 2/.venv/bin").returncode == 1
    assert install(tmp_path, programs="/usr/lib/dfs/bin").returncode == 0
    for unit in (tmp_path / "etc/systemd/system").iterdir():
        text = unit.read_text()
        assert "ExecStart=/usr/lib/dfs/bin/" in text
        assert "/opt/" not in text
    assert os.readlink(tmp_path / "sbin/mount.dfs") == "/usr/lib/dfs/bin/mount.dfs"


def test_what_others_have_there_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "usr/local/bin").mkdir(parents=True)
    (tmp_path / "usr/local/bin/dfs").write_text("another program")
    done = install(tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"dfs: {tmp_path}/usr/local/bin/dfs is another program already: remove it first\n"
    assert tree(tmp_path) == {"/usr/local/bin/dfs"}


def test_removing_leaves_configuration(tmp_path: Path) -> None:
    install(tmp_path)
    (tmp_path / "etc/dfs/metaserver.toml").write_text("copies = 3\n")
    (tmp_path / "usr/local/bin/dfs").unlink()
    (tmp_path / "usr/local/bin/dfs").write_text("another program")
    done = install(tmp_path, "--remove")
    assert (done.returncode, done.stderr) == (0, "")
    left = {path for path in tree(tmp_path) if "dfs" in path}
    assert left == {"/etc/dfs/metaserver.toml", "/usr/local/bin/dfs"}


@pytest.mark.parametrize("path", ["/root/dfs/.venv/bin", "/home/me/.venv/bin", "/home"])
def test_home_directories_are_refused(path: str, tmp_path: Path) -> None:
    done = install(tmp_path, programs=path)
    assert done.returncode == 1
    assert "home directories are hidden" in done.stderr
    assert tree(tmp_path) == set()


def test_a_directory_without_the_programs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(Problem, match="has no dfs"):
        dfs_units.own_programs()

"""The command lines of dfsmount and mount.dfs, and what they say when a mount cannot be made."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dfsmount import cli, mount, umountcli
from dfsmount.config import MountPlan, Options, Source, UsageError


def test_a_full_command_line() -> None:
    plan = cli.parse_command(["h:1/s", "/m", "-f", "-o", "ro,timeout=5", "-osync_close"])
    assert plan == MountPlan(
        Source("h", 1, "/s"), Path("/m"), Options(read_only=True, timeout=5.0, sync_close=True), foreground=True
    )


def test_debug_stays_in_the_foreground() -> None:
    plan = cli.parse_command(["-d", "h", "/m"])
    assert plan.options.debug
    assert plan.foreground
    assert not cli.parse_command(["h", "/m"]).foreground


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "a source and a mountpoint"),
        (["h"], "a source and a mountpoint"),
        (["h", "/m", "/n"], "/n"),
        (["h", "/m", "-x"], "-x"),
        (["h", "/m", "--frob"], "--frob"),
        (["h", "/m", "-o"], "-o"),
        (["h", "/m", "-o", "frob"], "frob"),
        (["h:x", "/m"], "x"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(words: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError):
        cli.parse_command(words)
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert said in err


def test_what_mount_passes_to_its_helper() -> None:
    plan, fake = cli.parse_helper(["h:1/s", "/m", "-sn", "-v", "-o", "rw,frob,noexec", "-t", "dfs"])
    assert plan == MountPlan(Source("h", 1, "/s"), Path("/m"), Options(kernel=("noexec",)))
    assert not fake
    assert cli.parse_helper(["h", "/m", "-f"])[1]
    assert cli.parse_helper(["h", "/m", "-r"])[0].options.read_only
    with pytest.raises(UsageError, match="frob"):
        cli.parse_helper(["h", "/m", "-o", "frob"])


def test_help_and_version(capfd: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["-h"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(words)
        assert caught.value.code == 0
        assert "key_file=PATH" in capfd.readouterr().out


# -- before anything is asked of anybody ---------------------------------------------------------------------------


def plan_at(path: Path, **options: object) -> MountPlan:
    return MountPlan(Source("127.0.0.1", 1), path, Options(**options))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def with_fuse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine on which mounts could be made, whatever this one is."""
    device = tmp_path / "fuse-device"
    device.touch()
    monkeypatch.setattr(mount, "FUSE_DEVICE", device)
    monkeypatch.setattr(mount, "FUSE_CONFIG", tmp_path / "fuse.conf")
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    return device


def test_a_good_mountpoint_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    assert mount.prepare(plan_at(Path("link"))).mountpoint == tmp_path / "real"


def test_a_mountpoint_that_is_missing_or_a_file_or_busy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(mount.MountError, match=r"missing does not exist: mkdir it$"):
        mount.prepare(plan_at(tmp_path / "missing"))
    with pytest.raises(mount.MountError, match="file is not a directory"):
        mount.prepare(plan_at(tmp_path / "file"))
    with pytest.raises(mount.MountError, match="Not a directory"):
        mount.prepare(plan_at(tmp_path / "file" / "x"))


def test_a_mountpoint_that_is_mounted_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dfsmount.dfs_mounts import Mount

    monkeypatch.setattr("dfsmount.dfs_mounts.mount_at", lambda point: Mount("h:1", point, "fuse.dfs"))
    with pytest.raises(mount.MountError, match=r"is busy: h:1 is already mounted there$"):
        mount.prepare(plan_at(tmp_path))


def test_no_fuse_device(tmp_path: Path, with_fuse: Path) -> None:
    with_fuse.unlink()
    with pytest.raises(mount.MountError, match="modprobe fuse"):
        mount.prepare(plan_at(tmp_path))


def test_allow_other_needs_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(mount.MountError, match="user_allow_other"):
        mount.prepare(plan_at(tmp_path, allow_other=True))
    mount.prepare(plan_at(tmp_path))
    (tmp_path / "fuse.conf").write_text("# comment\nuser_allow_other\n")
    mount.prepare(plan_at(tmp_path, allow_other=True))
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(mount.MountError, match="fusermount3"):
        mount.prepare(plan_at(tmp_path))


def test_key_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mount, "DEFAULT_KEY_FILE", tmp_path / "none")
    assert mount.find_key(Options()) is None
    key = tmp_path / "key"
    with pytest.raises(mount.MountError, match="no cluster key"):
        mount.find_key(Options(key_file=key))
    key.write_text("ab" * 32)
    key.chmod(0o644)
    with pytest.raises(mount.MountError, match="chmod 600"):
        mount.find_key(Options(key_file=key))
    key.chmod(0o600)
    assert mount.find_key(Options(key_file=key)) is not None
    key.write_text("xyz")
    with pytest.raises(mount.MountError, match="not a cluster key"):
        mount.find_key(Options(key_file=key))


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(mount.MountError, match=r"^cannot connect to 127.0.0.1:1: Connection refused$"):
        mount.run(plan_at(tmp_path), lambda: None)


@pytest.mark.parametrize("program", ["main", "mount_helper"])
def test_the_background_tells_why_it_failed(tmp_path: Path, program: str) -> None:
    """A real process, because it forks: the line of the last process comes out of the first."""
    script = f"""
import pathlib, sys
from dfsmount import cli, mount, umountcli
mount.FUSE_DEVICE = pathlib.Path("/dev/null")
mount.shutil.which = lambda name: name
cli.{program}(["127.0.0.1:1", {str(tmp_path)!r}, "-o", "log_file={tmp_path}/log"])
"""
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
    )
    assert done.returncode == (1 if program == "main" else 32)
    assert done.stdout == ""
    name = "dfsmount" if program == "main" else "mount.dfs"
    assert done.stderr == f"{name}: cannot connect to 127.0.0.1:1: Connection refused\n"


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    plan = plan_at(tmp_path, log_file=tmp_path / "none" / "log")
    with pytest.raises(mount.MountError, match="cannot write the log"):
        cli._redirect(plan.options)


def test_a_mount_in_the_foreground_logs_to_its_file_and_fails_on_the_terminal(tmp_path: Path) -> None:
    script = f"""
import pathlib
from dfsmount import cli, mount
mount.FUSE_DEVICE = pathlib.Path("/dev/null")
mount.shutil.which = lambda name: name

def run(plan, ready):
    mount.log.info("was here")
    raise mount.MountError("why not")

mount.run = run
cli.main(["-f", "127.0.0.1:1", {str(tmp_path)!r}, "-o", "log_file={tmp_path}/log"])
"""
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "dfsmount: why not\n")
    assert "was here" in (tmp_path / "log").read_text()


def test_syslog_gets_whole_lines() -> None:
    lines: list[tuple[int, str]] = []
    stream = cli.SyslogStream(lambda priority, line: lines.append((priority, line)))
    stream.write("one\n<4>tw")
    stream.write("o\n\n")
    stream.flush()
    assert lines == [(6, "one"), (4, "two")]


def test_options_for_the_kernel() -> None:
    plan = MountPlan(Source("h", 9, "/a,\u00e4"), Path("/m"), Options(read_only=True, kernel=("noexec",)))
    words = mount._fuse_options(plan)
    assert {"fsname=h:9/a??", "subtype=dfs", "default_permissions", "ro", "noexec"} <= words
    assert ("allow_other" in words) == (os.geteuid() == 0)
    plan.options.allow_other = False
    assert "allow_other" not in mount._fuse_options(plan)


# -- umount.fuse.dfs -----------------------------------------------------------------------------------------------


def test_what_umount_passes_to_its_helper() -> None:
    assert umountcli.parse(["/m", "-n", "-v", "-t", "fuse.dfs"]) == ("/m", ("-n", "-v"), False)
    assert umountcli.parse(["-fl", "/m"]) == ("/m", ("-f", "-l"), True)
    for words in ([], ["/m", "/n"], ["/m", "-x"], ["/m", "--frob"]):
        with pytest.raises(SystemExit) as caught:
            umountcli.main(words)
        assert caught.value.code == 2


def test_the_helper_does_not_call_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    request = umountcli.parse(["/m", "-l"])
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert umountcli.command(request)[1:] == ["-i", "-l", "/m"]
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert umountcli.command(request)[1:] == ["-u", "-z", "/m"]


@pytest.mark.parametrize(
    ("number", "problem"),
    [(errno.EIO, True), (errno.ENOSPC, True), (errno.EDQUOT, True), (errno.ENOTCONN, False), (errno.ENODATA, False)],
)
def test_only_a_failed_flush_keeps_the_mount(
    number: int, problem: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def getxattr(path: str, name: bytes) -> bytes:
        raise OSError(number, os.strerror(number))

    ran: list[list[str]] = []
    monkeypatch.setattr("os.getxattr", getxattr)
    monkeypatch.setattr("os.execv", lambda program, words: ran.append(words))
    if problem:
        with pytest.raises(SystemExit) as caught:
            umountcli.main(["/m"])
        assert caught.value.code == 32
        assert capfd.readouterr().err.count("\n") == 1
        umountcli.main(["/m", "-f"])
    else:
        umountcli.main(["/m"])
    assert len(ran) == 1

"""Access control lists with the programs people use for them, and enforced by the kernel."""

import os
import pwd
import shutil
import stat
import subprocess
from pathlib import Path

NOBODY = pwd.getpwnam("nobody")


def run(*command: str | Path) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True, timeout=60).stdout


def rights(path: Path) -> list[str]:
    """What getfacl says, without names and comments."""
    lines = run("getfacl", "-cEn", "--absolute-names", path).splitlines()
    return [line.split("#")[0].strip() for line in lines if line]


def as_nobody(command: str, place: Path) -> bool:
    """Whether the command, run in ``place`` (whose parents are closed) by somebody without rights, succeeds."""
    arguments = [
        "setpriv",
        f"--reuid={NOBODY.pw_uid}",
        f"--regid={NOBODY.pw_gid}",
        "--clear-groups",
        "sh",
        "-c",
        command,
    ]
    return subprocess.run(arguments, check=False, capture_output=True, timeout=60, cwd=place).returncode == 0


def test_who_is_named_may_and_others_may_not(place: Path) -> None:
    file = place / "f"
    file.write_text("secret")
    file.chmod(0o600)
    assert not as_nobody("cat f", place)
    run("setfacl", "-m", f"u:{NOBODY.pw_uid}:r", file)
    assert rights(file) == ["user::rw-", f"user:{NOBODY.pw_uid}:r--", "group::---", "mask::r--", "other::---"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert as_nobody("cat f", place)
    assert not as_nobody("echo x >> f", place)
    file.chmod(0o600)  # takes the mask away
    assert not as_nobody("cat f", place)
    run("setfacl", "-b", file)
    assert rights(file) == ["user::rw-", "group::---", "other::---"]


def test_defaults_are_handed_down_and_copied(place: Path) -> None:
    umask = os.umask(0o002)
    try:
        above = place / "d"
        above.mkdir()
        run("setfacl", "-d", "-m", "u:1234:rwx,g:5678:rx", above)
        (above / "sub").mkdir()
        (above / "sub" / "f").write_text("x")
    finally:
        os.umask(umask)
    named = ["user:1234:rwx", "group::rwx", "group:5678:r-x"]
    assert rights(above / "sub" / "f") == ["user::rw-", *named, "mask::rw-", "other::r--"]
    default = [f"default:{line}" for line in ("user::rwx", *named, "mask::rwx", "other::r-x")]
    assert rights(above / "sub")[-6:] == default
    run("cp", "-a", above, place / "copy")
    run("rsync", "-aAX", f"{above}/", f"{place}/synced/")
    shutil.copytree(above, place / "plain")
    for copy in ("copy", "synced"):
        assert rights(place / copy / "sub") == rights(above / "sub")
        assert rights(place / copy / "sub" / "f") == rights(above / "sub" / "f")

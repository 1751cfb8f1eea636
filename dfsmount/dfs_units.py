"""`dfs install-units`: what makes a checkout with its virtual environment a service of this host.

Units, users and directories for systemd, examples of configuration files, the programs under their names in the search
path, manual pages and completion. What is to be where is decided by :func:`plan`; nothing is changed before all of it
was found possible.
"""

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from dfsmount import dfs_completion
from dfsmount.dfs_layout import Problem

CHECKOUT = Path(__file__).resolve().parent.parent
# Where the files in systemd/ say that everything is.
EXAMPLE_PROGRAMS, EXAMPLE_README = "/opt/dfs/.venv/bin/", "file:///opt/dfs/README.md"
UNIT_DIRECTORY = "/etc/systemd/system"
EXAMPLE_DIRECTORY = "/etc/dfs/examples"
COMMANDS = ("dfs", "dfsmount", "metaserver", "chunkserver")
# What mount(8) and umount(8) call; they look in /sbin only.
HELPERS = ("mount.dfs", "umount.fuse.dfs")
COMPLETIONS = {
    "bash": "/usr/local/share/bash-completion/completions/dfs",
    "zsh": "/usr/local/share/zsh/site-functions/_dfs",
    "fish": "/usr/local/share/fish/vendor_completions.d/dfs.fish",
}
# ProtectHome= of the units hides these.
HIDDEN = ("/home/", "/root/", "/run/user/")


class Item(NamedTuple):
    """One thing to install: a file with this text, or a link to it."""

    path: str
    text: str
    is_link: bool = False


class Installed(msgspec.Struct):
    """``changed``: those of ``files`` that are new or were different before."""

    files: list[str]
    changed: list[str]


def plan(source: Path, programs: str, pages: Mapping[str, str]) -> list[Item]:
    """Everything that belongs to this installation; ``source`` is the checkout, ``programs`` the directory of the
    programs on the host that is installed to."""
    items = []
    for path in sorted((source / "systemd").iterdir()):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".service":
            readme = f"file://{Path(programs).parent.parent}/README.md"
            text = text.replace(EXAMPLE_PROGRAMS, f"{programs}/").replace(EXAMPLE_README, readme)
            items.append(Item(f"{UNIT_DIRECTORY}/{path.name}", text))
        elif path.suffix in (".sysusers", ".tmpfiles"):
            items.append(Item(f"/etc/{path.suffix[1:]}.d/dfs.conf", text))
        else:
            items.append(Item(f"{EXAMPLE_DIRECTORY}/{path.name}", text))
    items += [Item(f"/usr/local/bin/{name}", f"{programs}/{name}", True) for name in COMMANDS]
    items += [Item(f"/sbin/{name}", f"{programs}/{name}", True) for name in HELPERS]
    items += [Item(f"/usr/local/share/man/man1/{name}", text) for name, text in pages.items()]
    items += [Item(path, dfs_completion.script(shell) + "\n") for shell, path in COMPLETIONS.items()]
    return items


def install(items: Sequence[Item], root: Path) -> Installed:
    """Puts everything in its place below ``root``; :class:`Problem` before anything is changed if one is taken."""
    for item in items:
        _refuse_foreign(_place(item, root), item)
    changed = []
    for item in items:
        path = _place(item, root)
        try:
            if _put(path, item):
                changed.append(item.path)
        except OSError as error:
            raise Problem(f"cannot write {path}: {error.strerror}") from None
    return Installed([item.path for item in items], changed)


def remove(items: Iterable[Item], root: Path) -> list[str]:
    """Takes away what :func:`install` has put there; what others have put there stays."""
    removed = []
    for item in items:
        path = _place(item, root)
        if _is_ours(path, item):
            try:
                path.unlink()
            except OSError as error:
                raise Problem(f"cannot remove {path}: {error.strerror}") from None
            removed.append(item.path)
    return removed


def _place(item: Item, root: Path) -> Path:
    return root / item.path.removeprefix("/")


def _is_ours(path: Path, item: Item) -> bool:
    if item.is_link:
        return path.is_symlink() and Path(os.readlink(path)).name == Path(item.text).name
    return path.is_file() and not path.is_symlink()


def _refuse_foreign(path: Path, item: Item) -> None:
    if os.path.lexists(path) and not _is_ours(path, item):
        what = "another program" if item.is_link else "something else"
        raise Problem(f"{path} is {what} already: remove it first")


def _put(path: Path, item: Item) -> bool:
    """Whether that changed anything."""
    if item.is_link:
        if path.is_symlink() and os.readlink(path) == item.text:
            return False
    elif path.exists() and path.read_text(encoding="utf-8", errors="replace") == item.text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    if item.is_link:
        temporary.symlink_to(item.text)
    else:
        temporary.write_text(item.text, encoding="utf-8")
        temporary.chmod(0o644)
    temporary.replace(path)
    return True


def own_programs() -> Path:
    """The directory of the programs of this installation; :class:`Problem` if services could not run them."""
    programs = Path(sys.prefix) / "bin"
    for program in (*COMMANDS, *HELPERS):
        if not (programs / program).exists():
            raise Problem(f"{programs} has no {program}: install the package there first (pip install)")
    for path in (programs, Path(sys.executable).resolve(), CHECKOUT):
        check_visible(str(path))
    return programs


def check_visible(path: str) -> None:
    """:class:`Problem` unless services can run what is there."""
    if not path.startswith("/") or any(character.isspace() or character in "%\"\\'$" for character in path):
        raise Problem(f"{path!r} cannot be in a unit: give an absolute path without blanks or quotes")
    if f"{path}/".startswith(HIDDEN):
        text = f"services cannot see {path}: home directories are hidden from them"
        raise Problem(f"{text}. Install into another directory, such as /opt/dfs, with the system's python3")


def require_units(source: Path) -> None:
    if not (source / "systemd/metaserver.service").exists():
        raise Problem(f"{source} has no directory systemd: install-units runs from a checkout (pip install --editable)")


def install_here(pages: Mapping[str, str]) -> tuple[Installed, list[str]]:
    """All of it on this host, for the programs of this installation; and what could not be done."""
    require_units(CHECKOUT)
    return install(plan(CHECKOUT, str(own_programs()), pages), Path("/")), settle(Path("/"))


def settle(root: Path) -> list[str]:
    """Makes users and directories, and has systemd read its units again; returns what could not be done."""
    below = [] if root == Path("/") else [f"--root={root}"]
    steps = [
        ["systemd-sysusers", *below, str(root / "etc/sysusers.d/dfs.conf") if not below else "dfs.conf"],
        ["systemd-tmpfiles", "--create", *below, "dfs.conf"],
    ]
    if not below and Path("/run/systemd/system").is_dir():
        steps.append(["systemctl", "daemon-reload"])
    return [text for text in map(_run, steps) if text]


def _run(command: Sequence[str]) -> str:
    """ "" or why it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=60)
    except FileNotFoundError:
        return f"{command[0]} is not installed"
    except subprocess.TimeoutExpired:
        return f"{command[0]} does not end"
    said = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else f"{command[0]} failed: {said[-1] if said else done.returncode}"


def lines(installed: Installed, root: Path, troubles: Sequence[str]) -> list[str]:
    """What was done, and what comes next."""
    where = "" if root == Path("/") else f" below {root}"
    count = len(installed.changed)
    shown = [f"{len(installed.files)} files are installed{where}, {count or 'none'} of them new or changed."]
    shown += [f"Not done: {text}" for text in troubles]
    return [*shown, f"Examples of configuration files are in {EXAMPLE_DIRECTORY}; what each host needs: README.md."]

"""What `dfs` says of itself: examples, manual pages, completion; and that `dfs --help` imports little."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer._click import Command, Context
from typer.core import TyperGroup
from typer.main import get_command

from dfsmount import dfs_man, dfs_pages
from dfsmount.dfs import app
from metaserver.key import ClusterKey, save_key

DFS = get_command(app)
assert isinstance(DFS, TyperGroup)
COMMANDS = dict(dfs_man.commands(DFS))
PAGES = dfs_pages.pages(Context(DFS, info_name="dfs"))
PROGRAMS = Path(sys.executable).parent


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{PROGRAMS}:{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=variables)


# -- examples ------------------------------------------------------------------------------------------------------


def example_calls(lines: list[str]) -> Iterator[list[str]]:
    """The calls of `dfs` in examples, without what a shell does with their output."""
    for line in lines:
        for part in re.split(r"&&|\|\||[;|]", re.sub(r"\s#\s.*$", "", line)):
            words = shlex.split(part.partition(">")[0])
            if words and words[0] == "dfs":
                yield words[1:]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_that_it_understands(name: str) -> None:
    told = dfs_man.read_help(COMMANDS[name].help or "")
    assert told.examples, f"the help of `dfs {name}` has no block that begins with Example:"
    calls = list(example_calls(list(told.examples)))
    assert any(" ".join(call).startswith(name) for call in calls)
    for call in calls:
        words = 1 if call[0] in COMMANDS else 2
        verb = " ".join(call[:words])
        command: Command = COMMANDS[verb]
        # Parses, and refuses what it does not know; runs nothing.
        command.make_context(verb, call[words:])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_or_nothing_to_show(name: str) -> None:
    silent = {"up", "down", "token", "gateway", "completion", "man"}
    options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    assert ("--json" in options) != (name in silent), name


# -- manual pages --------------------------------------------------------------------------------------------------


def test_every_command_has_a_page_with_its_options_and_example() -> None:
    assert set(PAGES) == {"dfs.1", *(f"{dfs_man.page_name(name)}.1" for name in COMMANDS)}
    assert "dfs-quota-set.1" in PAGES
    assert "dfs-trash-list.1" in PAGES
    for name, command in COMMANDS.items():
        text = PAGES[f"{dfs_man.page_name(name)}.1"]
        assert ".SH EXAMPLES" in text
        for parameter in command.params:
            for option in parameter.opts if parameter.param_type_name == "option" else ():
                assert option.replace("-", r"\-") in text
        assert dfs_man.page_name(name).replace("-", r"\-") in PAGES["dfs.1"]


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_without_a_warning(page: str, tmp_path: Path) -> None:
    (tmp_path / page).write_text(PAGES[page])
    linted = run("mandoc", "-Tlint", "-Wwarning", str(tmp_path / page))
    assert (linted.returncode, linted.stdout) == (0, "")
    shown = run("man", "-l", "--warnings", "-Tutf8", str(tmp_path / page), LC_ALL="C.UTF-8", MANROFFOPT="-c")
    assert (shown.returncode, shown.stderr) == (0, "")


def test_a_page_shows_examples_to_the_letter(tmp_path: Path) -> None:
    """Quotes, dashes and dollars as they are to be typed, not as they look better in print."""
    (tmp_path / "dfs-token.1").write_text(PAGES["dfs-token.1"])
    shown = run("man", "-l", str(tmp_path / "dfs-token.1"), LC_ALL="C.UTF-8", MANWIDTH="200", MAN_KEEP_FORMATTING="")
    text = run("sh", "-c", 'printf "%s" "$0" | col -bx', shown.stdout).stdout if shutil.which("col") else shown.stdout
    for line in dfs_man.read_help(COMMANDS["token"].help or "").examples:
        assert line in text


def test_odd_text_is_shown_as_it_is() -> None:
    told = dfs_man.read_help("Sum up.\n\nMore\nof it.\n\n\b\nkept\n  so\n\n\b\nExample:\n  dfs a\n    -b\n")
    assert told.summary == "Sum up."
    assert list(told.paragraphs) == [("More\nof it.", False), ("kept\n  so", True)]
    assert list(told.examples) == ["dfs a", "  -b"]


def test_pages_are_written_and_shown(tmp_path: Path) -> None:
    done = run("dfs", "man", "--output", str(tmp_path / "man1"))
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in (tmp_path / "man1").iterdir()} == set(PAGES)
    assert run("dfs", "man", "drain").stdout == (tmp_path / "man1/dfs-drain.1").read_text()
    refused = run("dfs", "man", "nonsense")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == "dfs: there is no command 'nonsense': `dfs --help` lists them\n"


# -- completion ----------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Variables that name a metaserver which knows three servers and nothing else."""
    key = ClusterKey(bytes(32))
    save_key(tmp_path / "key", key)

    class Servers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == "/servers" and self.headers["Authorization"] == f"Bearer {key.http_token}"
            self.send_response(200 if known else 401)
            self.end_headers()
            self.wfile.write(json.dumps([{"name": f"storage{number}"} for number in (1, 2)] + [{"name": "x"}]).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Servers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield {"DFS_METASERVER": f"127.0.0.1:{server.server_port}", "DFS_KEY_FILE": str(tmp_path / "key")}
        server.shutdown()
        thread.join()


def bash_completes(*words: str, **environment: str) -> list[str]:
    """What bash offers for the last of the words."""
    script = 'source <(dfs completion bash); COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _dfs_completion dfs'
    done = run("bash", "-c", f'{script}; printf "%s\\n" "${{COMPREPLY[@]}}"', "bash", "dfs", *words, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_bash_completes_commands_options_and_servers(cluster: dict[str, str]) -> None:
    assert bash_completes("dra") == ["drain"]
    assert "--force" in bash_completes("drain", "--")
    assert bash_completes("drain", "st", **cluster) == ["storage1", "storage2"]
    assert bash_completes("scrub", "storage1", "", **cluster) == ["storage1", "storage2", "x"]


def test_fish_completes(cluster: dict[str, str], tmp_path: Path) -> None:
    script = "dfs completion fish | source; complete -C 'dfs rem'; complete -C 'dfs undrain st'"
    done = run("fish", "--no-config", "-c", script, HOME=str(tmp_path), **cluster)
    assert (done.returncode, done.stderr) == (0, "")
    offered = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert offered == ["remove", "storage1", "storage2"]


def test_zsh_gets_what_it_can_read(cluster: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "_dfs").write_text(run("dfs", "completion", "zsh").stdout)
    assert (tmp_path / "_dfs").read_text().startswith("#compdef dfs\n")
    assert run("zsh", "-n", str(tmp_path / "_dfs")).returncode == 0
    asked = {"_DFS_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "dfs remove st"}
    done = run("dfs", **cluster, **asked)
    assert done.stdout.split() == ["_arguments", "'*:", ':(("storage1"', '"storage2"))\'']


@pytest.mark.parametrize("metaserver", ["127.0.0.1:1", "no address at all", ""])
def test_completion_is_silent_when_there_is_no_cluster(metaserver: str, tmp_path: Path) -> None:
    where = {"DFS_METASERVER": metaserver, "DFS_KEY_FILE": str(tmp_path / "none"), "HOME": str(tmp_path)}
    assert bash_completes("drain", "st", **where) == []


def test_an_unknown_shell_is_refused() -> None:
    refused = run("dfs", "completion", "tcsh")
    assert refused.returncode == 2
    assert "'tcsh'" in refused.stderr


# -- speed ---------------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    """0.09 s of CPU; each of these would cost about as much again."""
    code = (
        "import sys; sys.argv = ['dfs', '--help']; from dfsmount import dfs\ntry: dfs.main()\nexcept SystemExit: pass\n"
    )
    done = run(sys.executable, "-c", code + "print(sorted({m.split('.')[0] for m in sys.modules}))")
    modules = set(re.findall(r"'(\w+)'", done.stdout.splitlines()[-1]))
    assert "typer" in modules
    assert modules.isdisjoint({"httpx", "trio", "rich", "starlette", "cryptography", "structlog", "lmdb"})

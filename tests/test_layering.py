"""The architecture as a test: who may import whom, and the one door to each library (docs/design.md, section 11).

Nothing is imported here: the sources are parsed, so that an import inside a function counts as well.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("metaserver", "chunkserver", "dfsmount")

METASERVER_PUBLISHED = {
    f"metaserver.{name}"
    for name in (
        "controlsocket",
        "errors",
        "exposition",
        "joining",
        "key",
        "wire",
        "transport",
        "connection",
        "protocol",
        "client",
        "httpranges",
        "httpserver",
        "logs",
        "settings",
        "systemd",
        "timings",
        "tracing",
        "version",
        "words",
    )
}
CHUNKSERVER_PUBLISHED = {f"chunkserver.{name}" for name in ("protocol", "chunkfile", "client", "pulse")}
# What each package may import of the others.
ALLOWED = {
    "metaserver": set[str](),
    "chunkserver": METASERVER_PUBLISHED,
    "dfsmount": METASERVER_PUBLISHED | CHUNKSERVER_PUBLISHED,
}

# The metaserver never connects to chunkservers, except when it has nothing else left to be rebuilt from.
EXCEPTIONS = {"metaserver/survey.py": CHUNKSERVER_PUBLISHED}

# The only files that may import a library.
DOORS = {
    "lmdb": {"metaserver/store.py"},
    "pyfuse3": {"dfsmount/mount.py", "dfsmount/operations.py"},
    "hypercorn": {"metaserver/httpserver.py"},
    "wsgidav": {"dfsmount/gateway_dav.py", "dfsmount/gateway_davtree.py"},
    "cryptography": {"metaserver/joining.py"},
}
# Beside these, command lines: each package's cli.py, and the modules of the `dfs` command.
HTTPX_DOORS = {"metaserver/client.py", "chunkserver/client.py", "dfsmount/client.py"}

# Pure: they decide, others act. No event loop, no sockets, no files.
PURE = {
    "metaserver/errors.py",
    "metaserver/placement.py",
    "metaserver/protocol.py",
    "metaserver/schema.py",
    "metaserver/wire.py",
    "chunkserver/chunkfile.py",
    "chunkserver/protocol.py",
    "dfsmount/extents.py",
    "dfsmount/dirty.py",
    "dfsmount/blocks.py",
    "dfsmount/readahead.py",
}
IMPURE_LIBRARIES = {"trio", "socket", "httpx", "lmdb", "pyfuse3", "subprocess", "threading", "asyncio", "os", "pathlib"}

# A chunkserver's file calls: only in disk.py. Command line and configuration read files before there is a disk.
FILE_CALL_FREE = {"cli.py", "config.py", "disk.py"}
OS_FILE_CALLS = {
    "open", "read", "write", "pread", "pwrite", "preadv", "pwritev", "readv", "writev", "fsync", "fdatasync",
    "rename", "replace", "unlink", "remove", "ftruncate", "truncate", "mkdir", "makedirs", "rmdir", "listdir",
    "scandir", "stat", "lstat", "statvfs", "fstatvfs", "posix_fallocate", "link", "symlink",
}  # fmt: skip
PATH_FILE_CALLS = {"read_bytes", "write_bytes", "read_text", "write_text", "iterdir", "touch"}

# Beginnings of a chain that nothing in the package may import: the top of "cli -> mount/serve -> ...".
TOPS = {"cli"}


class Import(NamedTuple):
    module: str
    line: int


class Source(NamedTuple):
    package: str
    path: str
    tree: ast.Module

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def sources() -> list[Source]:
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
            found.append(Source(package, path.relative_to(ROOT).as_posix(), tree))
    return found


SOURCES = sources()
MODULES = {source.module for source in SOURCES}


def imports(tree: ast.AST) -> Iterator[Import]:
    """Every imported module; ``from package import name`` counts as package.name if that is a module of ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}: imports name their package"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield Import(full if full in MODULES else node.module, node.lineno)


def violations_of_siblings(source: Source) -> list[str]:
    found = []
    allowed = ALLOWED[source.package] | EXCEPTIONS.get(source.path, set())
    for module, line in imports(source.tree):
        package = module.partition(".")[0]
        if package in PACKAGES and package != source.package and module not in allowed:
            found.append(f"{source.path}:{line} imports {module}")
    return found


def is_httpx_door(path: str) -> bool:
    return path in HTTPX_DOORS or path.endswith("/cli.py") or path.startswith("dfsmount/dfs")


def violations_of_doors(source: Source) -> list[str]:
    found = []
    for module, line in imports(source.tree):
        library = module.partition(".")[0]
        closed = library in DOORS and source.path not in DOORS[library]
        if closed or (library == "httpx" and not is_httpx_door(source.path)):
            found.append(f"{source.path}:{line} imports {library}")
    return found


def violations_of_purity(source: Source) -> list[str]:
    if source.path not in PURE:
        return []
    return [
        f"{source.path}:{line} imports {module}"
        for module, line in imports(source.tree)
        if module.partition(".")[0] in IMPURE_LIBRARIES
    ]


def is_file_call(node: ast.Call) -> bool:
    function = node.func
    if isinstance(function, ast.Name):
        return function.id == "open"
    if not isinstance(function, ast.Attribute):
        return False
    on_os = isinstance(function.value, ast.Name) and function.value.id == "os"
    return (on_os and function.attr in OS_FILE_CALLS) or function.attr in PATH_FILE_CALLS


def violations_of_disk(source: Source) -> list[str]:
    if source.package != "chunkserver" or Path(source.path).name in FILE_CALL_FREE:
        return []
    return [
        f"{source.path}:{node.lineno} calls {ast.unparse(node.func)}"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and is_file_call(node)
    ]


def violations_of_tops(source: Source) -> list[str]:
    if source.path.endswith("/__main__.py"):
        return []
    return [
        f"{source.path}:{line} imports {module}"
        for module, line in imports(source.tree)
        if module in MODULES and module.rpartition(".")[2] in TOPS
    ]


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """One line for each cycle a depth-first walk meets."""
    found: list[str] = []
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append(" -> ".join([*path[path.index(module) :], module]))
            return
        if module not in done:
            for imported in sorted(graph.get(module, ())):
                visit(imported, [*path, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def run_time_imports(source: Source) -> set[str]:
    """Modules of ours imported when the module is: imports only for annotations make no cycle."""
    tree = ast.Module([node for node in source.tree.body if not is_type_checking(node)], [])
    return {module for module, _ in imports(tree) if module in MODULES and module not in PACKAGES}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.path)
def test_packages_import_only_what_is_published(source: Source) -> None:
    assert violations_of_siblings(source) == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.path)
def test_each_library_has_one_door(source: Source) -> None:
    assert violations_of_doors(source) == []


def test_pure_modules_stay_pure() -> None:
    assert [line for source in SOURCES for line in violations_of_purity(source)] == []


def test_only_disk_touches_a_chunkservers_files() -> None:
    assert [line for source in SOURCES for line in violations_of_disk(source)] == []


def test_nothing_imports_a_command_line() -> None:
    assert [line for source in SOURCES for line in violations_of_tops(source)] == []


def test_imports_point_one_way() -> None:
    assert cycles({source.module: run_time_imports(source) for source in SOURCES}) == []


def test_nothing_but_trio_runs_the_event_loop() -> None:
    found = [f"{s.path}:{line}" for s in SOURCES for module, line in imports(s.tree) if module.startswith("asyncio")]
    assert found == []


# -- the rules themselves: each must be able to fail --------------------------------------------------------------


def made_up(path: str, text: str) -> Source:
    return Source(path.partition("/")[0], path, ast.parse(text))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("metaserver/x.py", "import chunkserver.protocol"),
        ("metaserver/x.py", "def f():\n    from dfsmount import mount"),
        ("chunkserver/x.py", "from metaserver import schema"),
        ("chunkserver/x.py", "from metaserver.schema import Inode"),
        ("dfsmount/x.py", "import chunkserver"),
    ],
)
def test_a_forbidden_import_is_found(path: str, text: str) -> None:
    assert violations_of_siblings(made_up(path, text))


@pytest.mark.parametrize(
    "text", ["from metaserver import errors", "from metaserver.errors import DfsError", "import metaserver.wire"]
)
def test_a_published_import_is_not(text: str) -> None:
    assert violations_of_siblings(made_up("chunkserver/x.py", text)) == []


@pytest.mark.parametrize("text", ["import lmdb", "from lmdb import open", "import httpx", "import pyfuse3.asyncio"])
def test_a_closed_door_is_found(text: str) -> None:
    assert violations_of_doors(made_up("metaserver/service.py", text))


@pytest.mark.parametrize("text", ["open('x')", "os.pwrite(1, b'', 0)", "path.read_bytes()"])
def test_a_file_call_is_found(text: str) -> None:
    assert violations_of_disk(made_up("chunkserver/store.py", text))


def test_a_cycle_is_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b -> c -> b"]

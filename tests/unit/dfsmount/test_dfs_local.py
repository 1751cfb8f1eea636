"""The parts of the `dfs` command that look at this machine: layout, mount table, processes, finding a cluster."""

import os
import socket
import time
from pathlib import Path

import pytest

from dfsmount import dfs_chunks, dfs_find, dfs_mounts, dfs_owner, dfs_processes, dfs_services
from dfsmount.dfs_layout import Cluster, Layout, Problem, write_toml
from dfsmount.dfs_mounts import Mount
from dfsmount.dfs_processes import Service

TABLE = """\
/dev/vda / ext4 rw,relatime 0 0
proc /proc proc rw 0 0
127.0.0.1:9400 /mnt/dfs fuse.dfs rw 0 0
host:9500/sub /mnt/with\\040blank fuse.dfs rw 0 0
tmpfs /mnt/dfs/inner tmpfs rw 0 0
"""


# -- layout --------------------------------------------------------------------------------------------------------


def test_a_cluster_file_is_read_as_written(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.prepare()
    assert layout.read_cluster() is None
    layout.write_cluster(Cluster(port=9700, servers=5, copies=3))
    assert layout.read_cluster() == Cluster(port=9700, servers=5, copies=3)


@pytest.mark.parametrize("text", ["port = ", "port = 'x'", "unknown = 1"])
def test_a_damaged_cluster_file_is_one_clear_line(tmp_path: Path, text: str) -> None:
    Layout(tmp_path).cluster_file.write_text(text)
    with pytest.raises(Problem, match=r"^.*cluster\.toml: [^\n]+$"):
        Layout(tmp_path).read_cluster()


def test_toml_strings_are_escaped(tmp_path: Path) -> None:
    import tomllib

    values = {"path": 'a "b" \\ c\u00e4\tx', "number": 7}
    write_toml(tmp_path / "x.toml", "comment", values)
    assert tomllib.loads((tmp_path / "x.toml").read_text()) == values


def test_a_data_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Problem, match="cannot make"):
        Layout(tmp_path / "file" / "data").prepare()


def test_ports_do_not_overlap() -> None:
    ports = Cluster(port=9400, servers=32).ports()
    assert len(set(ports)) == len(ports) == 66
    assert ports[:4] == [9400, 9401, 9410, 9411]


# -- mounts --------------------------------------------------------------------------------------------------------


def test_the_mount_table() -> None:
    table = dfs_mounts.parse_mounts(TABLE)
    ours = [mount for mount in table if mount.ours]
    assert ours == [
        Mount("127.0.0.1:9400", "/mnt/dfs", "fuse.dfs"),
        Mount("host:9500/sub", "/mnt/with blank", "fuse.dfs"),
    ]
    assert ours[1].address == "host:9500"


@pytest.mark.parametrize(
    ("path", "point"),
    [
        ("/mnt/dfs", "/mnt/dfs"),
        ("/mnt/dfs/a/b", "/mnt/dfs"),
        ("/mnt/dfs/inner/x", "/mnt/dfs/inner"),
        ("/mnt/dfsx", "/"),
        ("/mnt/with blank/f", "/mnt/with blank"),
    ],
)
def test_the_mount_of_a_path(path: str, point: str) -> None:
    mount = dfs_mounts.mount_of(path, dfs_mounts.parse_mounts(TABLE))
    assert mount is not None
    assert mount.point == point


def test_the_newest_of_two_mounts_on_one_point_counts() -> None:
    table = dfs_mounts.parse_mounts("a:1 /m fuse.dfs rw 0 0\nb:1 /m fuse.dfs rw 0 0\n")
    mount = dfs_mounts.mount_of("/m/f", table)
    assert mount is not None
    assert mount.source == "b:1"


def test_only_paths_on_a_mount_have_an_inode_there(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    whole, part = Mount("h:1", str(tmp_path), "fuse.dfs"), Mount("h:1/sub", str(tmp_path), "fuse.dfs")
    for mount in (whole, part):
        assert dfs_mounts.inode_below(tmp_path / "f", [mount]) == (tmp_path / "f").stat().st_ino
    assert dfs_mounts.inode_below(tmp_path, [whole]) == tmp_path.stat().st_ino
    with pytest.raises(Problem, match="a part mounted by itself"):
        dfs_mounts.inode_below(tmp_path, [part])
    with pytest.raises(Problem, match="is not on a dfs mount"):
        dfs_mounts.inode_below(tmp_path / "f", [Mount("/dev/x", "/", "ext4")])


def test_unusable_mountpoints(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Problem, match="is not a directory"):
        dfs_mounts.prepare_mountpoint(tmp_path / "file")
    with pytest.raises(Problem, match=r"is not empty \(it holds file\)"):
        dfs_mounts.prepare_mountpoint(tmp_path)
    with pytest.raises(Problem, match="in use already: proc"):
        dfs_mounts.prepare_mountpoint(Path("/proc"))
    dfs_mounts.prepare_mountpoint(tmp_path / "new" / "deeper")
    assert (tmp_path / "new" / "deeper").is_dir()


# -- processes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def service(tmp_path: Path) -> Service:
    arguments = ("--bind", "127.0.0.1", "--directory", str(tmp_path), "0")
    return Service("web", "http.server", arguments, str(tmp_path), tmp_path / "web.pid", tmp_path / "web.log")


def test_a_process_is_started_found_and_stopped(service: Service) -> None:
    assert dfs_processes.find(service) is None
    started = dfs_processes.start(service)
    try:
        wait_until(lambda: dfs_processes.find(service) is not None)
        found = dfs_processes.find(service)
        assert found is not None
        assert found.pid == started.pid
    finally:
        assert dfs_processes.stop(started, 10)
    assert dfs_processes.find(service) is None
    assert not service.pid_file.exists()


def test_a_pid_that_is_somebody_else_is_not_ours(service: Service) -> None:
    service.pid_file.write_text(f"{os.getpid()}\n")
    assert dfs_processes.find(service) is None


@pytest.mark.parametrize("text", ["", "x", "0", "4194399", "-1"])
def test_a_useless_pid_file_means_not_running(service: Service, text: str) -> None:
    service.pid_file.write_text(text)
    assert dfs_processes.find(service) is None


def test_the_last_words_of_a_process(service: Service, tmp_path: Path) -> None:
    bad = service._replace(arguments=("--no-such-option",))
    started = dfs_processes.start(bad)
    assert dfs_processes.wait_ended(started, 20)
    assert "--no-such-option" in dfs_processes.last_words(bad.log)
    assert dfs_processes.last_words(tmp_path / "none") == ""


def test_a_zombie_does_not_run() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    try:
        wait_until(lambda: not dfs_processes.is_alive(child))
        assert dfs_processes.command_line(child) == []
    finally:
        os.waitpid(child, 0)


def test_who_listens_on_a_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not dfs_processes.is_free("127.0.0.1", port)
        assert f"(pid {os.getpid()})" in dfs_processes.who_listens(port)
    assert dfs_processes.is_free("127.0.0.1", port)
    assert dfs_processes.who_listens(port) == "another program"


def test_who_uses_a_directory(tmp_path: Path) -> None:
    with (tmp_path / "open file").open("w"):
        child = os.fork()
        if child == 0:
            os.chdir(tmp_path)
            time.sleep(30)
            os._exit(0)
        try:
            wait_until(lambda: os.readlink(f"/proc/{child}/cwd") == str(tmp_path))
            users = dfs_processes.users_of(str(tmp_path))
            assert any(f"(pid {child}) works in {tmp_path}" in user for user in users)
            assert dfs_processes.users_of(str(tmp_path), ignore=[child]) == []
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)


# -- choosing ------------------------------------------------------------------------------------------------------


def test_a_new_cluster_is_recorded_with_what_was_wanted(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.prepare()
    chosen = dfs_services.choose(layout, dfs_services.Wanted(copies=1, servers=2, port=23450), print)
    assert chosen == Cluster(23450, 2, 1) == layout.read_cluster()
    assert dfs_services.choose(layout, dfs_services.Wanted(), print) == chosen


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (dfs_services.Wanted(copies=4), "--copies 4"),
        (dfs_services.Wanted(servers=0), "--servers 0|--copies"),
        (dfs_services.Wanted(servers=33), "--servers 33"),
        (dfs_services.Wanted(port=80), "--port 80"),
        (dfs_services.Wanted(port=65535), "--port 65535"),
    ],
)
def test_impossible_wishes(tmp_path: Path, wanted: dfs_services.Wanted, text: str) -> None:
    layout = Layout(tmp_path)
    layout.prepare()
    with pytest.raises(Problem, match=text):
        dfs_services.choose(layout, wanted, print)
    assert layout.read_cluster() is None


def test_servers_are_not_taken_away_from_a_cluster(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.prepare()
    layout.write_cluster(Cluster(servers=3))
    with pytest.raises(Problem, match="cannot be fewer"):
        dfs_services.choose(layout, dfs_services.Wanted(servers=2), print)


def test_a_port_in_use_is_named_and_others_are_taken() -> None:
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if port > 60000:
            pytest.skip("the system chose a port near the end of the range")
        assert dfs_services.free_port(Cluster(port), said.append) > port
    assert f"Port {port} is in use by" in said[0]


def test_one_command_at_a_time(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    with dfs_services.locked(layout), pytest.raises(Problem, match="another `dfs up`"), dfs_services.locked(layout):
        pass


# -- finding -------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without clusters, mounts or variables."""
    for name in ("DFS_DATA", "DFS_METASERVER", "DFS_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dfs_find, "registry", lambda: tmp_path / "registry")
    monkeypatch.setattr(dfs_find, "default_data", lambda: tmp_path / "default")
    monkeypatch.setattr(dfs_find, "mounts", lambda: dfs_mounts.parse_mounts(TABLE))
    return tmp_path


def make_cluster(data: Path, port: int) -> Path:
    Layout(data).prepare()
    Layout(data).write_cluster(Cluster(port))
    return data


def test_options_come_first(nothing_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_cluster(nothing_here / "one", 9700)
    monkeypatch.setenv("DFS_METASERVER", "elsewhere:1")
    found = dfs_find.find(dfs_find.Choice(str(data)))
    assert (found.http, found.key_file, found.data) == ("127.0.0.1:9701", data / "cluster.key", data)
    found = dfs_find.find(dfs_find.Choice(metaserver="host:9401", key_file="/k"))
    assert (found.http, found.key_file, found.data) == ("host:9401", Path("/k"), None)
    assert dfs_find.find(dfs_find.Choice()).http == "elsewhere:1"


def test_two_clusters_are_not_one(nothing_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_cluster(nothing_here / "one", 9700)
    with pytest.raises(Problem, match="give one of them"):
        dfs_find.find(dfs_find.Choice(str(data), "host:9401", "/k"))
    monkeypatch.setenv("DFS_DATA", str(data))
    monkeypatch.setenv("DFS_METASERVER", "host:9401")
    with pytest.raises(Problem, match="DFS_DATA and DFS_METASERVER"):
        dfs_find.find(dfs_find.Choice())
    assert dfs_find.find(dfs_find.Choice(metaserver="other:1")).http == "other:1"


def test_a_local_files_inode_number_is_nobodys_chunk_map(nothing_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever --metaserver or --data say: the number means another file there, or none."""
    monkeypatch.setattr(dfs_chunks, "mounts", lambda: dfs_mounts.parse_mounts(TABLE))
    local = nothing_here / "file"
    local.write_bytes(b"x")
    access = dfs_find.Access("127.0.0.1:1", nothing_here / "key")
    with pytest.raises(Problem, match="is not on a dfs mount"):
        dfs_chunks.look(local, lambda path: access, verify=False)


def test_the_mount_of_a_file_says_which_cluster(nothing_here: Path) -> None:
    found = dfs_find.find(dfs_find.Choice(), Path("/mnt/with blank/x"))
    assert (found.http, found.key_file) == ("host:9501", Path("/etc/dfs/cluster.key"))
    data = make_cluster(nothing_here / "one", 9400)
    dfs_find.register("127.0.0.1:9400", data)
    assert dfs_find.find(dfs_find.Choice(), Path("/mnt/dfs/x")).data == data
    with pytest.raises(Problem, match="/mnt/dfs/inner/x is not on a dfs mount"):
        dfs_find.find(dfs_find.Choice(), Path("/mnt/dfs/inner/x"))


def test_the_only_cluster_is_meant(nothing_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dfs_find, "mounts", list)
    with pytest.raises(Problem, match="no cluster found"):
        dfs_find.find(dfs_find.Choice())
    one, two = make_cluster(nothing_here / "one", 9700), make_cluster(nothing_here / "two", 9800)
    dfs_find.register("127.0.0.1:9700", one)
    assert dfs_find.find(dfs_find.Choice()).data == one
    dfs_find.register("127.0.0.1:9800", two)
    with pytest.raises(Problem, match="several clusters run here"):
        dfs_find.find(dfs_find.Choice())
    dfs_find.forget("127.0.0.1:9700")
    assert dfs_find.find(dfs_find.Choice()).data == two
    default = make_cluster(nothing_here / "default", 9400)
    assert dfs_find.find(dfs_find.Choice()).data == default


def test_what_cannot_be_found_says_what_to_do(nothing_here: Path) -> None:
    with pytest.raises(Problem, match=r"no cluster in .*: start one with"):
        dfs_find.find(dfs_find.Choice(str(nothing_here / "none")))
    with pytest.raises(Problem, match="HOST:HTTPPORT"):
        dfs_find.find(dfs_find.Choice(metaserver="host"))


def test_a_missing_key_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="no cluster key at"):
        dfs_find.Access("h:1", tmp_path / "none").key()


def wait_until(condition, seconds: float = 10.0) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)


def test_the_person_behind_sudo_is_the_starter(monkeypatch: pytest.MonkeyPatch) -> None:
    sudo = {"SUDO_UID": "1000", "SUDO_GID": "1001"}
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert dfs_owner.starter(sudo) == (1000, 1001)
    assert dfs_owner.starter({"SUDO_UID": "x"})[0] == 0
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert dfs_owner.starter(sudo)[0] == 1234


def test_a_directory_with_other_things_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "passwd").touch()
    with pytest.raises(Problem, match=r"not empty .* \(it holds passwd\)"):
        Layout(tmp_path).prepare()
    assert [path.name for path in tmp_path.iterdir()] == ["passwd"]
    (tmp_path / "passwd").unlink()
    (tmp_path / "chunkserver2").mkdir()
    Layout(tmp_path).prepare()
    Layout(tmp_path).prepare()

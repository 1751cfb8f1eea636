"""Tries the units for real: python tests/hosts/try_units.py DIRECTORY (root; Debian 12's Python; debootstrap, nspawn).

Boots a container with systemd (``container.py``), installs the units, runs a metaserver and two joined chunkservers,
mounts by fstab and by unit, kills and freezes, boots it again, and says what it found. Ends with 1 at the first
failure.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from container import Container, booted, build

FSTAB = (
    "192.0.2.1:9400 /mnt/data dfs _netdev,nofail,x-systemd.mount-timeout=60,x-systemd.requires=metaserver.service,"
    "key_file=/etc/dfs/cluster.key 0 0"
)
DFS = "/opt/dfs/.venv/bin/dfs"


def say(text: str) -> None:
    print(f"ok  {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    tree = parser.parse_args().directory / "tree"
    build(tree)
    # What an earlier attempt has left.
    for name in ("etc/dfs", "var/lib/dfs", "srv/dfs", "var/log/journal"):
        shutil.rmtree(tree / name, ignore_errors=True)
    for pattern in ("metaserver*", "chunkserver@*", "dfsmount@*"):
        for path in (tree / "etc/systemd/system").rglob(pattern):
            path.unlink()
    (tree / "etc/fstab").write_text("")
    with booted(tree, "dfsunits") as container:
        install(container)
        first_start(container)
        joined(container)
        mounted(container)
        journal(container)
        watched(container)
        refused(container)
    with booted(tree, "dfsunits") as container:
        after_boot(container)
    print("all of it works")


def install(container: Container) -> None:
    told = container.run(f"{DFS} install-units")
    assert "files are installed" in told, told
    again = container.run("dfs install-units")
    assert "none of them new or changed" in again, again
    container.run("man -w dfs-join && systemd-analyze verify metaserver.service chunkserver@a.service")
    say("install-units, twice; man finds the pages; systemd-analyze has nothing to say")


def first_start(container: Container) -> None:
    container.run("sed 's/^copies = .*/copies = 2/' /etc/dfs/examples/metaserver.toml > /etc/dfs/metaserver.toml")
    container.run("systemctl enable --now metaserver")
    container.run("install -m 0600 -o dfs -g dfs /var/lib/dfs/metaserver/cluster.key /etc/dfs/cluster.key")
    container.wait("systemctl is-active metaserver", "active")
    say("metaserver: Type=notify, as the user dfs")


def joined(container: Container) -> None:
    token = container.run("dfs join-token --metaserver 192.0.2.1:9401 2>/dev/null").strip()
    container.run("mv /etc/dfs/cluster.key /root/cluster.key")  # the metaserver has its own
    for name in ("a", "b"):
        line = container.run(f"dfs join 192.0.2.1 {token} --systemd --rack rack-{name}")
        assert f"chunkserver@{name} on 192.0.2.1:" in line, line
        assert line.count("\n") == 1, line
    owner = container.run("stat -c '%U %a' /etc/dfs/cluster.key").strip()
    assert owner == "dfs 600", owner
    container.run("cmp /root/cluster.key /etc/dfs/cluster.key")
    container.run("systemctl is-enabled chunkserver@a chunkserver@b")
    bad = container.run(f"dfs join 192.0.2.1 {token} --systemd --instance a", check=False)
    assert "chunkserver-a.toml is there already" in bad, bad
    say("two chunkservers joined as units, with the key, owner and ports they need")


def mounted(container: Container) -> None:
    container.run(f"mkdir -p /mnt/data /mnt/two && grep -q /mnt/data /etc/fstab || echo '{FSTAB}' >> /etc/fstab")
    container.run("systemctl daemon-reload && systemctl start mnt-data.mount")
    properties = container.run("systemctl show mnt-data.mount -p After -p Requires")
    for unit in ("network-online.target", "remote-fs-pre.target", "metaserver.service"):
        assert unit in properties, properties
    container.run("cp /etc/dfs/examples/mount.conf /etc/dfs/mount-mnt-two.conf")
    container.run("systemctl enable --now dfsmount@mnt-two")
    container.run("echo hello > /mnt/data/file && sync /mnt/data/file && grep -q hello /mnt/two/file")
    say("mounted by fstab (ordered after network and metaserver) and by dfsmount@mnt-two, with the same files")


def journal(container: Container) -> None:
    units = "-u metaserver -u chunkserver@a -u dfsmount@mnt-two"
    lines = [json.loads(line) for line in container.run(f"journalctl {units} -o json").splitlines()]
    ours = [line for line in lines if line.get("SYSLOG_IDENTIFIER") in ("metaserver", "chunkserver", "dfsmount")]
    messages = [str(line["MESSAGE"]) for line in ours]
    assert any(message.startswith("serving ") for message in messages), messages
    assert not any("\x1b" in message or message.startswith(("<", "20")) for message in messages), messages
    assert {line["PRIORITY"] for line in ours} <= {"3", "4", "6"}, messages
    say(f"{len(ours)} lines in the journal, with priorities, without colours or a second time")


def watched(container: Container) -> None:
    def restarts(unit: str) -> int:
        return int(container.run(f"systemctl show -p NRestarts --value {unit}"))

    before = restarts("metaserver")
    container.run("systemctl kill --kill-whom=main -s STOP metaserver")
    container.wait(f"[ $(systemctl show -p NRestarts --value metaserver) -gt {before} ] && echo yes", "yes", 90)
    container.wait("systemctl is-active metaserver", "active", 60)
    say("a frozen metaserver is restarted by the watchdog")
    for unit in ("chunkserver@a", "dfsmount@mnt-two"):
        container.run(f"systemctl kill --kill-whom=main -s KILL {unit}")
        container.wait(f"[ $(systemctl show -p NRestarts --value {unit}) -ge 1 ] && echo yes", "yes", 60)
        container.wait(f"systemctl is-active {unit}", "active", 60)
    container.run("grep -q hello /mnt/two/file && grep -q hello /mnt/data/file")
    say("a killed chunkserver and a killed mount are restarted; the files are there")


def refused(container: Container) -> None:
    container.run("cp /etc/dfs/metaserver.toml /root/; echo 'nonsense = 1' >> /etc/dfs/metaserver.toml")
    container.run("systemctl restart metaserver", check=False)
    container.wait("systemctl is-failed metaserver", "failed")
    line = container.run("journalctl -u metaserver -t metaserver -p err -n 1 -o cat")
    assert "unknown key 'log.nonsense'" in line, line
    container.run(
        "cp /root/metaserver.toml /etc/dfs/ && systemctl reset-failed metaserver && systemctl start metaserver"
    )
    say("a wrong configuration is left stopped, with the reason as an error in the journal")


def after_boot(container: Container) -> None:
    for unit in ("metaserver", "chunkserver@a", "chunkserver@b", "mnt-data.mount", "dfsmount@mnt-two"):
        container.wait(f"systemctl is-active {unit}", "active", 120)
    container.run("grep -q hello /mnt/data/file && grep -q hello /mnt/two/file")
    container.run("dfs check --deep --metaserver 192.0.2.1:9401")
    say("after a restart of the host everything is up and mounted again; dfs check --deep finds nothing")


if __name__ == "__main__":
    try:
        main()
    except AssertionError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        raise SystemExit(1) from None

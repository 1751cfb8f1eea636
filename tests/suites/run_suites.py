"""Suites that others wrote, on the mount and on a control (ext4) in one run; prints what docs/posix.md publishes.

    python tests/suites/run_suites.py MOUNT CONTROL --results DIR [--pjdfstest CHECKOUT] ...

MOUNT and CONTROL are directories in which each suite gets one of its own; see README.md beside this file.
"""

import argparse
import hashlib
import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# pjdfstest asks `df` which filesystem it is on, and tries some things only on ext4. This makes it try them.
DF_SAYING_EXT4 = """#!/bin/sh
env PATH="${PATH#*:}" df "$@" | sed 's/ fuse[.a-z]* / ext4 /'
"""
OPERATIONS = 200_000
FSX_KINDS = {
    "buffered": "-R -W",
    "with mmap": "",
    "with O_DIRECT": "-Z -r 4096 -w 4096 -R -W",
}
FSX_SEED, STRESS_SEED = 11, 12
STRESS_PROCESSES, STRESS_OPERATIONS = 4, 20_000

FILE_OF_TESTS = re.compile(r"^\S*/tests/(\S+\.t) \.\.")
WITHOUT = re.compile(r"filesystem does not support (.*), disabling")
ASSERTION = re.compile(r"^(ok|not ok) (\d+)(.*)")


@dataclass
class Row:
    """One line of the table: what was run, and what came of it on both sides."""

    suite: str
    command: str
    ours: str
    control: str
    good: bool

    def line(self) -> str:
        return f"| {self.suite} | `{self.command}` | {self.ours} | {self.control} |"


def commit_of(checkout: Path) -> str:
    words = ["git", "-C", str(checkout), "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def logged(words: list[str], log: Path, **options: object) -> int:
    """Runs a command with its output in a file; its exit code."""
    with log.open("w") as output:
        print("$", " ".join(words), file=output, flush=True)
        started = time.monotonic()
        done = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT, check=False, **options)  # type: ignore[call-overload]
        print(f"exit code {done.returncode} after {time.monotonic() - started:.0f} s", file=output)
    return int(done.returncode)


# -- pjdfstest -----------------------------------------------------------------------------------------------------


def assertions(output: Iterator[str]) -> dict[str, str]:
    """What `prove -v` printed, as "file number": "ok", "not ok", or "todo" (the suite expects it to fail on Linux)."""
    found: dict[str, str] = {}
    file = ""
    for line in output:
        if start := FILE_OF_TESTS.match(line):
            file = start[1]
        elif (said := ASSERTION.match(line)) and file:
            found[f"{file} {said[2]}"] = "todo" if said[1] == "not ok" and "# TODO" in said[3] else said[1]
    return found


def pjdfstest(checkout: Path, place: Path, results: Path, name: str, programs: Path) -> dict[str, str]:
    place.mkdir(parents=True)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    log = results / f"pjdfstest-{name}.log"
    logged(["prove", "-r", "-v", str(checkout / "tests")], log, cwd=place, env=environment)
    with log.open(errors="replace") as output:
        return assertions(output)


def passed(found: dict[str, str]) -> str:
    counted = [said for said in found.values() if said != "todo"]
    return f"{counted.count('ok'):,} of {len(counted):,}"


def run_pjdfstest(checkout: Path, mount: Path, control: Path, results: Path) -> Iterator[Row]:
    shim = results / "says-ext4"
    shim.mkdir()
    (shim / "df").write_text(DF_SAYING_EXT4)
    (shim / "df").chmod(0o755)
    ours = pjdfstest(checkout, mount / "pjdfstest", results, "mount", shim)
    theirs = pjdfstest(checkout, control / "pjdfstest", results, "control", shim)
    worse = [key for key, said in theirs.items() if said == "ok" and ours.get(key) != "ok"]
    for key in worse:
        print(f"passes on the control, on the mount: {ours.get(key, 'not tried')}: {key}")
    good = bool(theirs) and not worse
    yield Row(f"pjdfstest {commit_of(checkout)}", "prove -r tests", passed(ours), passed(theirs), good)


# -- fsx -----------------------------------------------------------------------------------------------------------


def fsx(checkout: Path, place: Path, options: str, log: Path) -> tuple[str, str]:
    """What came of it, and what the suite did without: it tries each kind of operation once before it begins."""
    place.mkdir(parents=True, exist_ok=True)
    records = log.with_suffix("")
    records.mkdir()
    command = f"{checkout}/ltp/fsx -N {OPERATIONS} -S {FSX_SEED} {options} -P {records} {place}/file"
    code = logged(command.split(), log)
    lines = log.read_text(errors="replace").splitlines()
    missing = [kind[1] for line in lines if (kind := WITHOUT.search(line))]
    # The exit code says whether all matched; this says that it also got to its end.
    whole = code == 0 and any("All" in line and "operations" in line and "A-OK" in line for line in lines)
    return ("no mismatch" if whole else f"exit code {code}, see {log.name}"), "; ".join(missing)


def run_fsx(checkout: Path, mount: Path, control: Path, results: Path) -> Iterator[Row]:
    for number, (kind, options) in enumerate(FSX_KINDS.items()):
        ours, without = fsx(checkout, mount / f"fsx{number}", options, results / f"fsx{number}-mount.log")
        theirs, _ = fsx(checkout, control / f"fsx{number}", options, results / f"fsx{number}-control.log")
        suite = f"fsx of xfstests {commit_of(checkout)}, {kind}"
        command = f"fsx -N {OPERATIONS} -S {FSX_SEED} {options}".rstrip()
        yield Row(suite, command, ours, theirs, ours == "no mismatch")
        print(f"fsx {kind} did without on the mount: {without or 'nothing'}")


# -- fsstress ------------------------------------------------------------------------------------------------------


def digest(root: Path) -> str:
    """Of all names, kinds, modes, owners, sizes and contents below."""
    total = hashlib.sha256()
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(folders + files):
            path = Path(folder, name)
            found = path.lstat()
            size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
            total.update(
                repr((str(path.relative_to(root)), found.st_mode, found.st_uid, found.st_nlink, size)).encode()
            )
            if stat.S_ISREG(found.st_mode):
                with path.open("rb") as file:
                    while block := file.read(1 << 20):
                        total.update(block)
    return total.hexdigest()


def fsstress(checkout: Path, place: Path, log: Path) -> str:
    place.mkdir(parents=True)
    words = f"-d {place} -p {STRESS_PROCESSES} -n {STRESS_OPERATIONS} -s {STRESS_SEED}"
    code = logged([f"{checkout}/ltp/fsstress", *words.split()], log)
    return "to its end" if code == 0 else f"exit code {code}, see {log.name}"


def run_fsstress(checkout: Path, mount: Path, control: Path, results: Path, data: Path | None) -> Iterator[Row]:
    ours = fsstress(checkout, mount / "fsstress", results / "fsstress-mount.log")
    theirs = fsstress(checkout, control / "fsstress", results / "fsstress-control.log")
    print(f"digest of what fsstress left on the mount: {digest(mount / 'fsstress')}")
    command = f"fsstress -p {STRESS_PROCESSES} -n {STRESS_OPERATIONS} -s {STRESS_SEED}"
    good = ours == "to its end"
    if data is not None:
        words = [sys.executable, "-m", "dfsmount.dfs", "check", "--deep", "--data", str(data)]
        code = logged(words, results / "check.log")
        ours += ", `dfs check --deep` finds nothing" if code == 0 else f", dfs check: exit code {code}, see check.log"
        good &= code == 0
    yield Row(f"fsstress of xfstests {commit_of(checkout)}", command, ours, theirs, good)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mount", type=Path, help="a directory on the mount")
    parser.add_argument("control", type=Path, help="a directory on ext4")
    parser.add_argument("--results", type=Path, required=True, help="a new directory for the suites' output")
    parser.add_argument("--pjdfstest", type=Path, help="a built checkout of pjd/pjdfstest")
    parser.add_argument("--xfstests", type=Path, help="a built checkout of kdave/xfstests")
    parser.add_argument("--data", type=Path, help="the cluster's data directory: `dfs check --deep` at the end")
    return parser.parse_args()


def suites(wanted: argparse.Namespace) -> Iterator[Row]:
    mount, control, results = wanted.mount.resolve(), wanted.control.resolve(), wanted.results.resolve()
    if wanted.xfstests:
        yield from run_fsx(wanted.xfstests.resolve(), mount, control, results)
        yield from run_fsstress(wanted.xfstests.resolve(), mount, control, results, wanted.data)
    if wanted.pjdfstest:
        yield from run_pjdfstest(wanted.pjdfstest.resolve(), mount, control, results)


def main() -> None:
    wanted = parsed()
    wanted.results.mkdir(parents=True)
    rows = []
    for row in suites(wanted):
        rows.append(row)
        print(row.line(), flush=True)
    print("\n| suite | command | mount | control |\n|---|---|---|---|")
    for row in rows:
        print(row.line())
    sys.exit(not all(row.good for row in rows))


if __name__ == "__main__":
    main()

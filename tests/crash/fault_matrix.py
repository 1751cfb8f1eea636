"""Damages every structure of a metaserver's data directory at random places, and looks what comes of it.

``python fault_matrix.py DIRECTORY ROUNDS SEED`` prints how often each outcome was seen, by structure and fault. Each
trial is a process of its own, because a damaged file may end it. The outcomes, of which the last three must not be:

* ``harmless``: it starts, and every change is there;
* ``cut``: it starts, and what is missing are changes at the end of the log that no later record calls durable;
* ``recovered``: it is refused with one clear line, and after `metaserver recover` every change is there;
* ``accepted``: it is refused, and so is recovering, until `--accept-loss`; then there is a prefix of all changes;
* ``lost``: not even that helps: no snapshot is whole and the log does not go back far enough;
* ``wrong``, ``unclear``, ``killed``: other rows than there should be, an exception that is not explained, a signal.
"""

import os
import random
import shutil
import struct
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import trio
from metaserver_load import create, prepare, remove

from metaserver.commit import Committer, EngineFailed, open_committer
from metaserver.logrecord import FIRST_RECORD, find_records
from metaserver.recover import recover
from metaserver.replay import CorruptLog
from metaserver.schema import Table
from metaserver.start import Options
from metaserver.store import CorruptStore

OPTIONS = Options(checkpoint_seconds=3600, segment_bytes=1 << 18, map_bytes=1 << 20, reserve_bytes=1 << 12)
PAGE = 4096
BOOT = b"b" * 16
# Changes after the last checkpoint that are durable, and some more of which nobody knows.
DURABLE_TAIL, LOOSE_TAIL = 120, 12


class Killed(Exception):
    """Stands for kill -9."""


# -- a directory with everything in it ---------------------------------------------------------------------------


async def fill(directory: Path) -> None:
    """Three lives: snapshots, checkpoints, free pages, several segments, and a tail that only the log has."""
    async with open_committer(directory, options=OPTIONS, boot_id=BOOT) as committer:
        prepare(committer)
        for number in range(2400):
            create(committer, b"%06d" % number, number + 1)
            if number % 400 == 399:
                await committer.checkpoint()
            if number == 700:
                await committer.snapshot()
    try:
        async with open_committer(directory, options=OPTIONS, boot_id=BOOT) as committer:
            for number in range(0, 1600, 2):
                remove(committer, b"%06d" % number)
                if number % 400 == 398:
                    await committer.checkpoint()
            await committer.snapshot()
            for number in range(300):
                create(committer, b"late %d" % number, 10_000 + number)
            await committer.checkpoint()
            for number in range(DURABLE_TAIL):
                create(committer, b"tail %06d" % number, 20_000 + number)
                await committer.wait_durable(committer.newest)
            for number in range(LOOSE_TAIL):
                create(committer, b"tail %06d" % (DURABLE_TAIL + number), 30_000 + number)
            raise Killed
    except BaseExceptionGroup as group:
        if group.split(Killed)[1] is not None:
            raise


State = dict[tuple[int, bytes], bytes]


def state_of(committer: Committer) -> State:
    """Every row that clients can see, read by key as well as in order."""

    def everything(tx: object) -> State:
        rows = {}
        for table in Table:
            if table < Table.COUNTERS:
                found = list(tx.scan(table, b"", b"\xff" * 300))  # type: ignore[attr-defined]
                for key, value in found:
                    rows[int(table), key] = value
                    if tx.get(table, key) != value:  # type: ignore[attr-defined]
                        raise AssertionError("a row is found in order, and not by its key")
        return rows

    return committer.read(0, everything)[0]


async def run_once(directory: Path, *, work: bool) -> State:
    """A life: everything read, some changes, a checkpoint. What was there at first."""
    async with open_committer(directory, options=OPTIONS, boot_id=BOOT) as committer:
        found = state_of(committer)
        if work:
            for number in range(60):
                create(committer, b"new %d" % number, 1_000_000 + committer.epoch * 1000 + number)
            await committer.checkpoint()
            if (await committer.check()).problems:
                raise AssertionError("the check finds problems")
    return found


def tail_of(state: State) -> int:
    """How many of the last changes are there; -1: not the first ones."""
    names = sorted(key[8:] for table, key in state if table == Table.DENTRIES and key[8:].startswith(b"tail "))
    return len(names) if names == [b"tail %06d" % number for number in range(len(names))] else -1


def without_tail(state: State) -> State:
    """What does not depend on how far the tail goes: all but its rows and the times of the directory."""
    tail = {
        int.from_bytes(value[:8], "little")
        for (table, key), value in state.items()
        if table == Table.DENTRIES and key[8:].startswith(b"tail ")
    }
    kept = {}
    for (table, key), value in state.items():
        if table == Table.INODES and (int.from_bytes(key, "big") in tail or int.from_bytes(key, "big") == 1):
            continue
        if (table == Table.DENTRIES and key[8:].startswith(b"tail ")) or (table == Table.LISTING and b"tail " in value):
            continue
        if table == Table.ANSWERS and int.from_bytes(key[8:], "big") >= 20_000:
            continue
        kept[table, key] = value
    return kept


# -- structures ----------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A range of a file that belongs to one structure."""

    path: str
    start: int
    length: int


class Pages(NamedTuple):
    branch: list[int]
    leaf: list[int]
    free: list[int]


def pages_of(path: Path) -> Pages:
    """Which pages of an LMDB file are what, walked from its newer meta page."""
    data = path.read_bytes()
    metas = [struct.unpack_from("<QQ", data, page * PAGE + 16 + 24 + 96) for page in (0, 1)]
    newest = max((0, 1), key=lambda page: metas[page][1])
    roots = [struct.unpack_from("<Q", data, newest * PAGE + 16 + 24 + 48 * number + 40)[0] for number in (0, 1)]
    found = Pages([], [], [])
    _walk(data, roots[0], found.free, found.free)
    _walk(data, roots[1], found.branch, found.leaf)
    return found


def _walk(data: bytes, page: int, branch: list[int], leaf: list[int]) -> None:
    if page == (1 << 64) - 1:
        return
    flags, lower = struct.unpack_from("<HH", data, page * PAGE + 10)
    (leaf if flags & 2 else branch).append(page)
    if flags & 1:
        for number in range((lower - 16) // 2):
            at = page * PAGE + struct.unpack_from("<H", data, page * PAGE + 16 + 2 * number)[0]
            low, high, top = struct.unpack_from("<HHH", data, at)
            _walk(data, low | high << 16 | top << 32, branch, leaf)


def places_of(directory: Path) -> dict[str, list[Place]]:
    pages = pages_of(directory / "data.mdb")
    segments = sorted((directory / "changelog").glob("*.log"))
    snapshots = sorted((directory / "snapshots").glob("*.mdb"))
    current = segments[-1]
    if not _records(current):
        current = segments[-2]
    records = _records(current)
    used = records[-1].start + records[-1].length
    log = f"changelog/{current.name}"
    size = current.stat().st_size

    def of(numbers: list[int]) -> list[Place]:
        return [Place("data.mdb", number * PAGE, PAGE) for number in numbers]

    return {
        "LMDB leaf page": of(pages.leaf),
        "LMDB branch page": of(pages.branch),
        "LMDB meta pages": [Place("data.mdb", 0, 160), Place("data.mdb", PAGE, 160)],
        "LMDB free-list page": of(pages.free),
        "LMDB lock file": [Place("data.mdb-lock", 0, 4096)],
        "changelog record in the middle": records[-LOOSE_TAIL - DURABLE_TAIL : -LOOSE_TAIL],
        "changelog record already stored": _records(segments[-2] if current == segments[-1] else segments[-3])[:200],
        "changelog record at the tail": records[-LOOSE_TAIL:],
        "segment header": [Place(f"changelog/{segment.name}", 0, 48) for segment in segments],
        "pre-zeroed rest": [Place(log, used, min(1 << 16, size - used))],
        "newest snapshot file": [Place(f"snapshots/{snapshots[-1].name}", 0, snapshots[-1].stat().st_size)],
        "older snapshot file": [Place(f"snapshots/{snapshots[0].name}", 0, snapshots[0].stat().st_size)],
        "lock file": [Place("lock", 0, 1)],
        "reserve file": [Place("reserve", 0, 1 << 12)],
    }


def _records(path: Path) -> list[Place]:
    data = path.read_bytes()
    ends = [FIRST_RECORD, *(end for _, end in find_records(data, int(path.stem, 16)))]
    name = f"changelog/{path.name}"
    return [Place(name, start, end - start) for start, end in pairwise(ends)]


# -- faults --------------------------------------------------------------------------------------------------------


def damage(path: Path, offset: int, change: Callable[[bytes], bytes], length: int) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(offset)
        data = file.read(length)
        file.seek(offset)
        file.write(change(data))
        file.truncate(max(size, offset + 1) if size else size)


def flip_bit(root: Path, place: Place, choose: random.Random) -> None:
    bit = 1 << choose.randrange(8)
    at = place.start + choose.randrange(max(1, place.length))
    damage(root / place.path, at, lambda data: bytes([(data or b"\0")[0] ^ bit]), 1)


def zero(root: Path, place: Place, choose: random.Random) -> None:
    at = place.start + choose.randrange(max(1, place.length))
    damage(root / place.path, at - at % PAGE, lambda data: bytes(len(data)), PAGE)


def junk(root: Path, place: Place, choose: random.Random) -> None:
    at = place.start + choose.randrange(max(1, place.length))
    damage(root / place.path, at - at % PAGE, lambda data: choose.randbytes(len(data)), PAGE)


def cut(root: Path, place: Place, choose: random.Random) -> None:
    os.truncate(root / place.path, place.start + choose.randrange(max(1, place.length)))


def remove_file(root: Path, place: Place, choose: random.Random) -> None:
    (root / place.path).unlink()


FAULTS: dict[str, Callable[[Path, Place, random.Random], None]] = {
    "bit flip": flip_bit,
    "zeroed 4 KiB": zero,
    "junk 4 KiB": junk,
    "truncation": cut,
    "deletion": remove_file,
}


# -- trials --------------------------------------------------------------------------------------------------------

REFUSALS = (CorruptStore, CorruptLog, EngineFailed)


def attempt(directory: Path, expected: State) -> str:
    """In a child: starts, compares, works."""
    try:
        found = trio.run(lambda: run_once(directory, work=True))
    except REFUSALS:
        return "refused"
    except BaseExceptionGroup as group:
        return "refused" if group.split(REFUSALS)[1] is None else f"unclear: {traceback.format_exc(limit=-3)}"
    except BaseException:
        return f"unclear: {traceback.format_exc(limit=-3)}"
    if found == expected:
        return "harmless"
    if without_tail(found) != without_tail(expected):
        return "wrong"
    return f"cut {tail_of(found)}"


def try_recover(directory: Path, expected: State) -> str:
    try:
        recover(directory)
    except (CorruptStore, CorruptLog) as error:
        return f"refused: {error}"
    except BaseException:
        return f"unclear: {traceback.format_exc(limit=-3)}"
    return attempt(directory, expected)


def try_accepting_loss(directory: Path, expected: State) -> str:
    """After this there is a beginning of history: none is missing that is older than others."""
    try:
        report = recover(directory, accept_loss=True)
    except CorruptStore as error:
        return f"lost: {error}"
    except BaseException:
        return f"unclear: {traceback.format_exc(limit=-3)}"
    if not any(line.startswith("LOST") for line in report.lines):
        return "wrong: nothing is said to be lost"
    try:
        found = trio.run(lambda: run_once(directory, work=True))
    except BaseException:
        return f"unclear: {traceback.format_exc(limit=-3)}"
    return "accepted" if tail_of(found) >= 0 else "wrong: no prefix"


def in_child(function: Callable[..., str], *arguments: object) -> str:
    """What the function returns, run in a process of its own; a signal ends only that."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nowhere, descriptor)
        os.write(writer, function(*arguments).encode()[:60_000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        outcome = pipe.read()
    _, status = os.waitpid(child, 0)
    return f"killed by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else outcome


def trial(whole: Path, copy: Path, place: Place, fault: str, choose: random.Random, expected: State) -> str:
    """One damaged copy: the outcome, see the module."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy, symlinks=True)
    FAULTS[fault](copy, place, choose)
    outcome = in_child(attempt, copy, expected)
    if outcome == "refused":
        again = in_child(try_recover, copy, expected)
        if again.startswith("refused"):
            again = in_child(try_accepting_loss, copy, expected)
        outcome = {"harmless": "recovered", "accepted": "accepted"}.get(again, again)
    if outcome.startswith("cut "):
        # Also after recovering: what no later record calls durable may have been cut.
        outcome = "cut" if int(outcome[4:]) >= DURABLE_TAIL else f"wrong: {outcome}"
    return outcome


def prepare_directory(work: Path) -> State:
    """A filled directory ``work/whole``; returns what is in it."""
    whole = work / "whole"
    shutil.rmtree(work, ignore_errors=True)
    whole.mkdir(parents=True)
    if in_child(lambda: str(trio.run(fill, whole))) != "None":
        raise RuntimeError("the directory could not be made")
    shutil.copytree(whole, work / "reading")
    return trio.run(lambda: run_once(work / "reading", work=False))


def main(work: Path, rounds: int, seed: int) -> int:
    expected = prepare_directory(work)
    assert tail_of(expected) == DURABLE_TAIL + LOOSE_TAIL
    choose = random.Random(seed)
    seen: dict[tuple[str, str], Counter[str]] = {}
    bad = 0
    for structure, places in places_of(work / "whole").items():
        for fault in FAULTS:
            counts = seen[structure, fault] = Counter()
            for number in range(1 if fault == "deletion" else rounds):
                outcome = trial(work / "whole", work / "copy", choose.choice(places), fault, choose, expected)
                if outcome.split()[0].rstrip(":") in ("wrong", "unclear", "killed", "lost", "refused"):
                    bad += 1
                    print(f"!! {structure}, {fault}, round {number}: {outcome}", flush=True)
                counts[outcome.split(":")[0]] += 1
            print(f"{structure:34} {fault:14} {dict(counts)}", flush=True)
    print(f"{sum(sum(counts.values()) for counts in seen.values())} faults, {bad} bad outcomes")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))

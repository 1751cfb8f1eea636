"""The kinds of file of the verifying load, each with its own promise; see ``verifying_load``."""

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

from load_manifest import Filesystem, Manifest, Tree

PAGE = 4096
RECORD = 256
BLOCK = 64 << 10
_STAMP = struct.Struct("<IQQ")


def pattern(kind: str, identity: int, version: int, length: int) -> bytes:
    """Bytes that say what they are and are different everywhere; at least 24 long."""
    body = Random(f"{kind}/{identity}/{version}").randbytes(min(length, 64) - _STAMP.size)
    data = _STAMP.pack(zlib.crc32(body), identity, version) + body
    return (data * (length // len(data) + 1))[:length]


def version_of(data: bytes, kind: str, identity: int) -> int | None:
    """The version whose pattern ``data`` is; None if it is none."""
    if len(data) < _STAMP.size:
        return None
    _, found, version = _STAMP.unpack_from(data)
    return version if found == identity and data == pattern(kind, identity, version, len(data)) else None


class Kind:
    """``step`` does one thing and has it acknowledged; ``verify`` says what is broken. ``directories`` are made first.

    After a step has failed nobody knows what of it has happened: every step looks first, or goes on to a state of its
    own.
    """

    directories: tuple[str, ...] = ()

    def __init__(self, fs: Filesystem, manifest: Manifest, random: Random) -> None:
        self.fs = fs
        self.manifest = manifest
        self.random = random
        self.broken: list[str] = []

    def step(self) -> None:
        raise NotImplementedError

    def verify(self, tree: Tree) -> Iterator[str]:
        raise NotImplementedError

    @contextmanager
    def opened(self, path: str, flags: int = 0) -> Iterator[int]:
        handle = self.fs.open(path, flags)
        try:
            yield handle
        finally:
            self.fs.close(handle)

    def write_whole(self, path: str, data: bytes) -> None:
        with self.opened(path, os.O_CREAT | os.O_TRUNC) as handle:
            for at in range(0, len(data), BLOCK):
                self.fs.write(handle, data[at : at + BLOCK], at)
            self.fs.fsync(handle)

    def next_version(self, key: str) -> int:
        return max(self.manifest.may_be(key, 0)) + 1


class Documents(Kind):
    """Saved as editors do: temporary file, fsync, rename over the old one, fsync of the directory. Always one whole
    version, never older than the newest acknowledged one."""

    count = 120
    directories = tuple(f"documents/{number}" for number in range(4))

    @staticmethod
    def length(number: int, version: int) -> int:
        return 64 + (number * 7919 + version * 104_729) % (200_000 if number % 10 == 0 else 12_000)

    @staticmethod
    def path(number: int) -> str:
        return f"documents/{number % 4}/{number}"

    def step(self) -> None:
        number = self.random.randrange(self.count)
        key, path = f"document{number}", self.path(number)
        version = self.next_version(key)
        self.manifest.intend({key: version})
        self.write_whole(path + ".tmp", pattern("document", number, version, self.length(number, version)))
        self.fs.rename(path + ".tmp", path)
        self.fs.sync_directory(f"documents/{number % 4}")
        self.manifest.acknowledge({key: version})

    def verify(self, tree: Tree) -> Iterator[str]:
        for number in range(self.count):
            states = self.manifest.may_be(f"document{number}", 0)
            data = tree.read(self.path(number))
            version = 0 if data is None else version_of(data, "document", number)
            if version is None or (data is not None and len(data) != self.length(number, version)):
                yield f"document {number}: {len(data or b'')} bytes that are no whole version"
            elif version not in states:
                yield f"document {number}: version {version}, {states[0]} was acknowledged"


class Journals(Kind):
    """Grow by records. Always a prefix of whole records, as long as the newest acknowledged one at least; the last
    record may be cut off."""

    count = 4
    directories = ("journals",)

    def step(self) -> None:
        number = self.random.randrange(self.count)
        key = f"journal{number}"
        with self.opened(f"journals/{number}", os.O_CREAT) as handle:
            size = self.fs.size(handle)
            if size // RECORD < self.manifest.get(key, 0):
                self.broken.append(f"{key}: {size} bytes, {self.manifest.get(key, 0)} records were acknowledged")
            if size % RECORD:
                self.fs.truncate(handle, size - size % RECORD)
            count = size // RECORD
            until = count + self.random.randrange(1, 20)
            self.manifest.intend({key: until})
            for record in range(count, until):
                self.fs.write(handle, pattern("journal", number, record, RECORD), record * RECORD)
            self.fs.fsync(handle)
        self.manifest.acknowledge({key: until})

    def verify(self, tree: Tree) -> Iterator[str]:
        for number in range(self.count):
            states = self.manifest.may_be(f"journal{number}", 0)
            data = tree.read(f"journals/{number}") or b""
            count = len(data) // RECORD
            if count < states[0]:
                yield f"journal {number}: {count} records, {states[0]} were acknowledged"
            for record in range(count):
                if data[record * RECORD : (record + 1) * RECORD] != pattern("journal", number, record, RECORD):
                    yield f"journal {number}: record {record} of {count} is wrong ({states[0]} acknowledged)"


class Table(Kind):
    """Overwritten in place, page by page. Every page is one whole version, never older than the newest acknowledged."""

    pages = 512

    def step(self) -> None:
        with self.opened("table", os.O_CREAT) as handle:
            facts: dict[str, int] = {}
            for page in sorted(self.random.sample(range(self.pages), self.random.randrange(1, 30))):
                key = f"page{page}"
                facts[key] = self.next_version(key)
                self.manifest.intend({key: facts[key]})
                self.fs.write(handle, pattern("table", page, facts[key], PAGE), page * PAGE)
            self.fs.fsync(handle)
        self.manifest.acknowledge(facts)

    def verify(self, tree: Tree) -> Iterator[str]:
        data = tree.read("table") or b""
        for page in range(self.pages):
            states = self.manifest.may_be(f"page{page}", 0)
            here = data[page * PAGE : (page + 1) * PAGE]
            version = version_of(here, "table", page) if any(here) else 0
            if version is None:
                yield f"table page {page}: no whole version"
            elif version not in states:
                yield f"table page {page}: version {version}, {states[0]} was acknowledged"


class Ledger(Kind):
    """A database as SQLite keeps one: the old pages go into a rollback journal, which is synced, then the pages are
    overwritten in place and synced, and removing the journal is the commit. After rolling back what the journal says
    all pages are those of one transaction, not older than the newest acknowledged."""

    pages = 64
    directories = ("ledger",)

    @staticmethod
    def touched(transaction: int) -> list[int]:
        """Page 0 has the number of the newest transaction, and is written by each."""
        return [0, *sorted(Random(f"ledger{transaction}").sample(range(1, Ledger.pages), 6))]

    def step(self) -> None:
        with self.opened("ledger/pages", os.O_CREAT) as handle:
            self._roll_back(handle)
            data = self.fs.read_at(handle, self.pages * PAGE, 0).ljust(self.pages * PAGE, b"\0")
            done = self._number(data[:PAGE])
            if done not in self.manifest.may_be("ledger", 0):
                self.broken.append(f"ledger: transaction {done}, may be {self.manifest.may_be('ledger', 0)}")
                raise OSError("the ledger is broken")
            self.manifest.intend({"ledger": done + 1})
            old = b"".join(
                struct.pack("<I", page) + data[page * PAGE : (page + 1) * PAGE] for page in self.touched(done + 1)
            )
            self.write_whole("ledger/pages-journal", old + struct.pack("<I", zlib.crc32(old)))
            self.fs.sync_directory("ledger")
            for page in self.touched(done + 1):
                self.fs.write(handle, pattern("ledger", page, done + 1, PAGE), page * PAGE)
            self.fs.fsync(handle)
            self.fs.unlink("ledger/pages-journal")
            self.fs.sync_directory("ledger")
        self.manifest.acknowledge({"ledger": done + 1})

    def _number(self, page: bytes) -> int:
        return (version_of(page, "ledger", 0) or 0) if any(page) else 0

    def _roll_back(self, handle: int) -> None:
        """As SQLite does on opening: a whole journal is played back, a torn one was never followed by a write."""
        try:
            journal = self.fs.open("ledger/pages-journal", 0)
        except FileNotFoundError:
            return
        try:
            old = self.fs.read_at(journal, self.fs.size(journal), 0)
        finally:
            self.fs.close(journal)
        for page, data in _journalled(old):
            self.fs.write(handle, data, page * PAGE)
        self.fs.fsync(handle)
        self.fs.unlink("ledger/pages-journal")
        self.fs.sync_directory("ledger")

    def verify(self, tree: Tree) -> Iterator[str]:
        states = self.manifest.may_be("ledger", 0)
        data = bytearray((tree.read("ledger/pages") or b"").ljust(self.pages * PAGE, b"\0"))
        for page, old in _journalled(tree.read("ledger/pages-journal") or b""):
            data[page * PAGE : (page + 1) * PAGE] = old
        done = self._number(bytes(data[:PAGE]))
        if done not in states:
            yield f"ledger: transaction {done}, {states[0]} was acknowledged"
        expected = dict.fromkeys(range(self.pages), 0)
        for transaction in range(1, done + 1):
            expected.update(dict.fromkeys(self.touched(transaction), transaction))
        for page, version in expected.items():
            right = pattern("ledger", page, version, PAGE) if version else bytes(PAGE)
            if data[page * PAGE : (page + 1) * PAGE] != right:
                yield f"ledger: page {page} is not that of transaction {version}, the newest is {done}"


def _journalled(data: bytes) -> list[tuple[int, bytes]]:
    """The pages of a rollback journal; none if it is torn."""
    body, checksum = data[:-4], data[-4:]
    if len(checksum) < 4 or struct.unpack("<I", checksum)[0] != zlib.crc32(body):
        return []
    step = 4 + PAGE
    return [(struct.unpack_from("<I", body, at)[0], body[at + 4 : at + step]) for at in range(0, len(body), step)]


class Truncated(Kind):
    """Cut and grown again; a state is the list of the generations of its records. After a crash it is a state that was
    intended, or on the way there: its first records."""

    count = 4
    limit = 200
    directories = ("truncated",)

    def step(self) -> None:
        number = self.random.randrange(self.count)
        key = f"truncated{number}"
        with self.opened(f"truncated/{number}", os.O_CREAT) as handle:
            data = self.fs.read_at(handle, self.limit * RECORD, 0)
            problem, now = self._judge(number, data)
            if problem:
                self.broken.append(problem)
                raise OSError(problem)
            if now != self.manifest.may_be(key, [])[-1]:
                self.manifest.intend({key: now})
            if len(now) * RECORD != len(data):
                self.fs.truncate(handle, len(now) * RECORD)
            if len(now) > self.limit // 2 or (now and self.random.random() < 0.4):
                now = now[: self.random.randrange(len(now))]
                self.manifest.intend({key: now})
                self.fs.truncate(handle, len(now) * RECORD)
            generation = 1 + max((max(state, default=0) for state in self.manifest.may_be(key, [])), default=0)
            more = self.random.randrange(1, 20)
            after = now + [generation] * more
            self.manifest.intend({key: after})
            for record in range(len(now), len(after)):
                self.fs.write(handle, self._record(number, record, generation), record * RECORD)
            self.fs.fsync(handle)
        self.manifest.acknowledge({key: after})

    @staticmethod
    def _record(number: int, record: int, generation: int) -> bytes:
        return pattern("truncated", number * 1000 + record, generation, RECORD)

    def _judge(self, number: int, data: bytes) -> tuple[str, list[int]]:
        """What is wrong with it, and the generations of its whole records."""
        found: list[int] = []
        for record in range(len(data) // RECORD):
            version = version_of(data[record * RECORD : (record + 1) * RECORD], "truncated", number * 1000 + record)
            if version is None:
                return f"truncated {number}: record {record} is no record", found
            found.append(version)
        states = self.manifest.may_be(f"truncated{number}", [])
        before: list[Any] = [states[0], *states]
        for last, state in zip(before, states, strict=False):
            on_the_way = found[: len(last)] == last and found == state[: len(found)] and len(last) <= len(state)
            if found == state or on_the_way:
                return "", found
        return f"truncated {number}: {_brief(found)} is none of {[_brief(state) for state in states]}", found

    def verify(self, tree: Tree) -> Iterator[str]:
        for number in range(self.count):
            problem, _ = self._judge(number, tree.read(f"truncated/{number}") or b"")
            if problem:
                yield problem


def _brief(generations: list[int]) -> str:
    return f"{len(generations)} records ({generations[-1:]})"


class Streams(Kind):
    """Large files, written from the beginning to the end and then replaced by the next; a state is version and number
    of blocks. What is there is a prefix, as long as acknowledged; the one before it goes when it has begun."""

    count = 2
    blocks = 160
    directories = ("streams",)

    def step(self) -> None:
        number = self.random.randrange(self.count)
        key = f"stream{number}"
        version, done = max(self.manifest.may_be(key, [1, 0]))
        if done >= self.blocks:
            version, done = version + 1, 0
        with self.opened(f"streams/{number}.{version}", os.O_CREAT) as handle:
            size = self.fs.size(handle)
            acknowledged = self.manifest.get(key, [1, 0])
            if acknowledged[0] == version and size < acknowledged[1] * BLOCK:
                self.broken.append(f"{key}: {size} bytes, {acknowledged} was acknowledged")
            done = size // BLOCK
            until = min(self.blocks, done + self.random.randrange(1, 48))
            self.manifest.intend({key: [version, until]})
            for block in range(done, until):
                self.fs.write(handle, pattern("stream", number << 32 | version, block, BLOCK), block * BLOCK)
            self.fs.fsync(handle)
        self.manifest.acknowledge({key: [version, until]})
        if version > 1 and self.manifest.get(f"gone{number}", 0) < version - 1:
            self._remove(number, version - 1)

    def _remove(self, number: int, version: int) -> None:
        self.manifest.intend({f"gone{number}": version})
        try:
            self.fs.unlink(f"streams/{number}.{version}")
        except FileNotFoundError:
            if self.manifest.get(f"gone{number}", 0) >= version:
                raise
        self.fs.sync_directory("streams")
        self.manifest.acknowledge({f"gone{number}": version})

    def verify(self, tree: Tree) -> Iterator[str]:
        for number in range(self.count):
            states = self.manifest.may_be(f"stream{number}", [1, 0])
            gone = self.manifest.may_be(f"gone{number}", 0)
            for version in range(1, max(states)[0] + 1):
                data = tree.read(f"streams/{number}.{version}")
                yield from self._verify_one(number, version, data, states[0], gone)

    def _verify_one(
        self, number: int, version: int, data: bytes | None, acknowledged: list[int], gone: list[int]
    ) -> Iterator[str]:
        name = f"stream {number}.{version}"
        if version <= gone[0]:
            if data is not None:
                yield f"{name}: there again after it was removed"
            return
        needed = self.blocks if version < acknowledged[0] else acknowledged[1] if version == acknowledged[0] else 0
        if version in gone and data is None:
            return
        data = data or b""
        if len(data) < needed * BLOCK:
            yield f"{name}: {len(data) // BLOCK} blocks, {needed} were acknowledged"
        for block in range(-(-len(data) // BLOCK)):
            here = data[block * BLOCK : (block + 1) * BLOCK]
            if here != pattern("stream", number << 32 | version, block, BLOCK)[: len(here)]:
                yield f"{name}: block {block} is wrong ({needed} acknowledged)"


class Links(Kind):
    """A file with a second name of its version, renamed over the one before: both names lead to the whole version, and
    the name of an older version goes later."""

    count = 6
    directories = ("links",)

    @staticmethod
    def length(number: int) -> int:
        return 500 + 37 * number

    def step(self) -> None:
        number = self.random.randrange(self.count)
        key, path = f"link{number}", f"links/{number}"
        version = self.next_version(key)
        before = self.manifest.may_be(key, 0)
        self.manifest.intend({key: version})
        self.write_whole(f"{path}.new", pattern("link", number, version, self.length(number)))
        self.fs.link(f"{path}.new", f"{path}.{version}")
        self.fs.rename(f"{path}.new", path)
        self.fs.sync_directory("links")
        self.manifest.acknowledge({key: version})
        for old in before:
            self._remove(number, old)

    def _remove(self, number: int, version: int) -> None:
        if version:
            try:
                self.fs.unlink(f"links/{number}.{version}")
            except FileNotFoundError:
                return  # this version never came to be
            self.fs.sync_directory("links")

    def verify(self, tree: Tree) -> Iterator[str]:
        for number in range(self.count):
            states = self.manifest.may_be(f"link{number}", 0)
            data = tree.read(f"links/{number}")
            whole = data is not None and len(data) == self.length(number)
            version = 0 if data is None else version_of(data, "link", number) if whole else None
            if version not in states:
                yield f"link {number}: version {version}, {states[0]} was acknowledged"
            if version and tree.read(f"links/{number}.{version}") != data:
                yield f"link {number}: its second name is not version {version}"


class Tokens(Kind):
    """Moved between two directories: always in exactly one of them, and where it was last acknowledged to be."""

    count = 8
    directories = ("left", "right")

    def step(self) -> None:
        number = self.random.randrange(self.count)
        key = f"token{number}"
        if self.manifest.get(key, None) is None:
            self.manifest.intend({key: "left"})
            self.write_whole(f"left/{number}", pattern("token", number, 1, 100))
            self.fs.sync_directory("left")
            self.manifest.acknowledge({key: "left"})
            return
        here = self._find(number)
        there = "right" if here == "left" else "left"
        self.manifest.intend({key: there})
        self.fs.rename(f"{here}/{number}", f"{there}/{number}")
        self.fs.sync_directory(there)
        self.manifest.acknowledge({key: there})

    def _find(self, number: int) -> str:
        for side in ("left", "right"):
            try:
                self.fs.close(self.fs.open(f"{side}/{number}", 0))
            except FileNotFoundError:
                continue
            return side
        self.broken.append(f"token {number}: nowhere")
        raise OSError("a token is nowhere")

    def verify(self, tree: Tree) -> Iterator[str]:
        for number in range(self.count):
            states = self.manifest.may_be(f"token{number}", None)
            found = {side: tree.read(f"{side}/{number}") for side in ("left", "right")}
            sides = [side for side, data in found.items() if data is not None]
            if states[0] is None:
                continue
            if len(sides) != 1 or sides[0] not in states:
                yield f"token {number}: in {sides}, may be in {states}"
            elif found[sides[0]] != pattern("token", number, 1, 100):
                yield f"token {number}: other contents"


class Scratch(Kind):
    """Made and removed: there if that was acknowledged, and not there if that was. A state is the version, 0: none."""

    count = 40
    directories = ("scratch",)

    def step(self) -> None:
        number = self.random.randrange(self.count)
        key, path = f"scratch{number}", f"scratch/{number}"
        states = self.manifest.may_be(key, 0)
        if len(states) == 1 and states[0]:
            self.manifest.intend({key: 0})
            self.fs.unlink(path)
            self.fs.sync_directory("scratch")
            self.manifest.acknowledge({key: 0})
            return
        version = max(max(states), self.manifest.get(f"{key}.last", 0)) + 1
        # It is written in place, so that until its fsync it may be there without its contents.
        self.manifest.intend({key: -version})
        self.write_whole(path, pattern("scratch", number, version, 300 + number))
        self.manifest.acknowledge({key: version, f"{key}.last": version})

    def verify(self, tree: Tree) -> Iterator[str]:
        for number in range(self.count):
            states = self.manifest.may_be(f"scratch{number}", 0)
            data = tree.read(f"scratch/{number}")
            if any(state < 0 for state in states[1:]):
                continue  # nothing is promised while it is being rewritten
            whole = data is not None and len(data) == 300 + number
            version = 0 if data is None else version_of(data, "scratch", number) if whole else None
            if version not in states:
                yield f"scratch {number}: version {version}, may be {states}"


KINDS: tuple[type[Kind], ...] = (
    Documents,
    Journals,
    Table,
    Ledger,
    Truncated,
    Streams,
    Links,
    Tokens,
    Scratch,
)
# How often each is chosen.
WEIGHTS = (8, 4, 4, 4, 4, 2, 4, 4, 6)

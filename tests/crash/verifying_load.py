"""A load that knows what must survive: every acknowledged fsync goes into a manifest outside the tested file system.

``python verifying_load.py run DIRECTORY MANIFEST SECONDS SEED`` works in DIRECTORY until SECONDS have passed. When a
call fails (the mount was killed) it waits until the directory answers again, checks what it finds and goes on.
``python verifying_load.py verify DIRECTORY MANIFEST`` reads everything and prints one line for each broken promise;
its exit code is 1 if there is one.

Three kinds of file, each with its own promise:

* documents are saved as editors do (temporary file, fsync, rename, fsync of the directory): the document is always one
  whole version, never older than the newest acknowledged one;
* journals grow by records (each appended, some fsynced): always a prefix of whole records as long as the newest
  acknowledged fsync, except that un-fsynced bytes at the end may be missing;
* tables are overwritten in place in pages: every page is one whole version, never older than the newest acknowledged.
"""

import json
import os
import random
import struct
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

PAGE = 4096
RECORD = 256
TABLE_PAGES = 512
DOCUMENTS = 40
_STAMP = struct.Struct("<IQQ")


def pattern(kind: int, identity: int, version: int, length: int) -> bytes:
    """Bytes that say what they are and are different everywhere; at least 24 long."""
    body = random.Random(f"{kind}/{identity}/{version}").randbytes(min(length, 64) - _STAMP.size)
    data = _STAMP.pack(zlib.crc32(body), identity, version) + body
    return (data * (length // len(data) + 1))[:length]


def version_of(data: bytes, kind: int, identity: int) -> int | None:
    """The version whose pattern ``data`` is; None if it is none."""
    if len(data) < _STAMP.size:
        return None
    _, found, version = _STAMP.unpack_from(data)
    return version if found == identity and data == pattern(kind, identity, version, len(data)) else None


class Manifest:
    """What was acknowledged: name -> version, count or page versions. One JSON line per acknowledgement."""

    def __init__(self, path: Path) -> None:
        self.acknowledged: dict[str, int] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                self.acknowledged.update(json.loads(line))
        self._file = path.open("a", buffering=1)

    def acknowledge(self, facts: dict[str, int]) -> None:
        self._file.write(json.dumps(facts) + "\n")
        self.acknowledged.update(facts)

    def get(self, name: str) -> int:
        return self.acknowledged.get(name, 0)


def document_length(number: int, version: int) -> int:
    return 64 + (number * 7919 + version * 104_729) % 200_000


class Load:
    def __init__(self, directory: Path, manifest: Manifest, seed: int) -> None:
        self.directory = directory
        self.manifest = manifest
        self.random = random.Random(seed)
        self.acknowledgements = 0
        self.errors = 0
        self.next_version: dict[str, int] = {}

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        steps: list[Callable[[], None]] = [self.save_document, self.append_journal, self.write_table]
        while time.monotonic() < end:
            try:
                self.random.choice(steps)()
                self.acknowledgements += 1
            except OSError as error:
                self.errors += 1
                print(f"error: {error}", file=sys.stderr, flush=True)
                self.wait_until_back(end)

    def wait_until_back(self, end: float) -> None:
        while time.monotonic() < end + 60:
            try:
                os.stat(self.directory / "ready")
                return
            except OSError:
                time.sleep(0.2)

    def version(self, name: str) -> int:
        version = max(self.next_version.get(name, 0), self.manifest.get(name)) + 1
        self.next_version[name] = version
        return version

    def save_document(self) -> None:
        number = self.random.randrange(DOCUMENTS)
        name = f"document{number}"
        version = self.version(name)
        temporary = self.directory / f"{name}.tmp"
        with temporary.open("wb") as file:
            file.write(pattern(1, number, version, document_length(number, version)))
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, self.directory / name)
        directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        self.manifest.acknowledge({name: version})

    def append_journal(self) -> None:
        number = self.random.randrange(4)
        name = f"journal{number}"
        with (self.directory / name).open("ab") as file:
            size = os.fstat(file.fileno()).st_size
            if size % RECORD:
                os.ftruncate(file.fileno(), size - size % RECORD)
            count = size // RECORD
            if count < self.manifest.get(name):
                print(f"BROKEN {name}: {count} records, {self.manifest.get(name)} acknowledged", flush=True)
            for record in range(count, count + self.random.randrange(1, 20)):
                file.write(pattern(2, number, record, RECORD))
                file.flush()
                count = record + 1
            os.fsync(file.fileno())
        self.manifest.acknowledge({name: count})

    def write_table(self) -> None:
        path = self.directory / "table"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            facts = {}
            for _ in range(self.random.randrange(1, 30)):
                page = self.random.randrange(TABLE_PAGES)
                version = self.version(f"page{page}")
                os.pwrite(descriptor, pattern(3, page, version, PAGE), page * PAGE)
                facts[f"page{page}"] = version
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.manifest.acknowledge(facts)


def verify(directory: Path, manifest: Manifest) -> list[str]:
    """Every broken promise, in words."""
    broken = []
    for number in range(DOCUMENTS):
        broken += verify_document(directory, manifest, number)
    for number in range(4):
        broken += verify_journal(directory, manifest, number)
    return broken + verify_table(directory, manifest)


def read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def verify_document(directory: Path, manifest: Manifest, number: int) -> list[str]:
    name, acknowledged = f"document{number}", manifest.get(f"document{number}")
    data = read(directory / name)
    if data is None:
        return [f"{name}: gone, version {acknowledged} was acknowledged"] if acknowledged else []
    version = version_of(data, 1, number)
    if version is None or len(data) != document_length(number, version):
        return [f"{name}: {len(data)} bytes that are no whole version"]
    return [f"{name}: version {version}, {acknowledged} was acknowledged"] if version < acknowledged else []


def verify_journal(directory: Path, manifest: Manifest, number: int) -> list[str]:
    name, acknowledged = f"journal{number}", manifest.get(f"journal{number}")
    data = read(directory / name) or b""
    broken = []
    if len(data) // RECORD < acknowledged:
        broken.append(f"{name}: {len(data) // RECORD} records, {acknowledged} were acknowledged")
    for record in range(len(data) // RECORD):
        if data[record * RECORD : (record + 1) * RECORD] != pattern(2, number, record, RECORD):
            broken.append(f"{name}: record {record} of {len(data) // RECORD} is wrong ({acknowledged} acknowledged)")
    return broken


def verify_table(directory: Path, manifest: Manifest) -> list[str]:
    data = read(directory / "table") or b""
    broken = []
    for page in range(TABLE_PAGES):
        acknowledged = manifest.get(f"page{page}")
        here = data[page * PAGE : (page + 1) * PAGE]
        if not any(here):
            if acknowledged:
                broken.append(f"table page {page}: empty, version {acknowledged} was acknowledged")
            continue
        version = version_of(here, 3, page)
        if version is None:
            broken.append(f"table page {page}: no whole version")
        elif version < acknowledged:
            broken.append(f"table page {page}: version {version}, {acknowledged} was acknowledged")
    return broken


def main(arguments: list[str]) -> int:
    verb, directory, manifest = arguments[0], Path(arguments[1]), Manifest(Path(arguments[2]))
    if verb == "run":
        (directory / "ready").touch()
        load = Load(directory, manifest, int(arguments[4]))
        load.run(float(arguments[3]))
        print(f"{load.acknowledgements} acknowledged, {load.errors} errors")
        return 0
    broken = verify(directory, manifest)
    for line in broken:
        print("BROKEN", line)
    print(f"{len(manifest.acknowledged)} facts checked, {len(broken)} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What a verifying load knows: what it was about to do, and what was acknowledged. And the files it works on.

Every object of a load (a document, a page of a table, ...) has a key and states, which are what JSON can say. A state
is *intended* before the first call that could bring it about, and *acknowledged* after the fsync that promises it.
What may be found after a crash is the newest acknowledged state or any that was intended since.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Filesystem(Protocol):
    """What a load asks for, paths being relative to its directory. Everything raises ``OSError``."""

    def open(self, path: str, flags: int) -> int:
        """open(2) for reading and writing; ``flags`` beside that."""

    def close(self, handle: int) -> None: ...

    def read_at(self, handle: int, length: int, offset: int) -> bytes: ...

    def write(self, handle: int, data: bytes, offset: int) -> None: ...

    def truncate(self, handle: int, length: int) -> None: ...

    def size(self, handle: int) -> int: ...

    def fsync(self, handle: int) -> None: ...

    def sync_directory(self, path: str) -> None: ...

    def make_directory(self, path: str) -> None: ...

    def rename(self, old: str, new: str) -> None: ...

    def link(self, old: str, new: str) -> None: ...

    def unlink(self, path: str) -> None: ...


class LocalFilesystem:
    """A directory, mounted or not, by the calls of the operating system."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def open(self, path: str, flags: int) -> int:
        return os.open(self._root / path, os.O_RDWR | flags, 0o644)

    def close(self, handle: int) -> None:
        os.close(handle)

    def read_at(self, handle: int, length: int, offset: int) -> bytes:
        return os.pread(handle, length, offset)

    def write(self, handle: int, data: bytes, offset: int) -> None:
        while data:
            done = os.pwrite(handle, data, offset)
            data, offset = data[done:], offset + done

    def truncate(self, handle: int, length: int) -> None:
        os.ftruncate(handle, length)

    def size(self, handle: int) -> int:
        return os.fstat(handle).st_size

    def fsync(self, handle: int) -> None:
        os.fsync(handle)

    def sync_directory(self, path: str) -> None:
        descriptor = os.open(self._root / path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def make_directory(self, path: str) -> None:
        os.makedirs(self._root / path, exist_ok=True)

    def rename(self, old: str, new: str) -> None:
        os.rename(self._root / old, self._root / new)

    def link(self, old: str, new: str) -> None:
        os.link(self._root / old, self._root / new)

    def unlink(self, path: str) -> None:
        os.unlink(self._root / path)


class Manifest:
    """See the module. A file of JSON lines outside of what is tested."""

    def __init__(self, path: Path) -> None:
        self.acknowledged: dict[str, Any] = {}
        self.possible: dict[str, list[Any]] = {}
        self.acknowledgements = 0
        if path.exists():
            for line in path.read_text().splitlines():
                self._take(json.loads(line))
        self._path = path

    def _take(self, line: dict[str, Any]) -> None:
        if "intended" in line:
            for key, state in line["intended"].items():
                self.possible.setdefault(key, []).append(state)
        else:
            self.acknowledged.update(line["acknowledged"])
            self.acknowledgements += 1
            for key in line["acknowledged"]:
                self.possible.pop(key, None)

    def intend(self, states: Mapping[str, Any]) -> None:
        self._note({"intended": states})

    def acknowledge(self, states: Mapping[str, Any]) -> None:
        self._note({"acknowledged": states})

    def _note(self, line: dict[str, Any]) -> None:
        self._take(line)
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def get(self, key: str, nothing: Any) -> Any:
        """The newest acknowledged state."""
        return self.acknowledged.get(key, nothing)

    def may_be(self, key: str, nothing: Any) -> list[Any]:
        """All states that may be found, the acknowledged one first."""
        return [self.acknowledged.get(key, nothing), *self.possible.get(key, ())]


class Recorded:
    """What was found of files, by path: to be verified once or, for each set of replicas, again."""

    def __init__(self, contents: Mapping[str, bytes]) -> None:
        self._contents = contents

    def read(self, path: str) -> bytes | None:
        return self._contents.get(path)


class Directory:
    """A directory to be verified, read as it is now."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, path: str) -> bytes | None:
        try:
            return (self._root / path).read_bytes()
        except FileNotFoundError:
            return None


class Tree(Protocol):
    """Where a verification finds contents; None: there is no such file."""

    def read(self, path: str) -> bytes | None: ...

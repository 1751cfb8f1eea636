"""What the files of one simulated program must be: what was acknowledged, what is pending, what a crash may leave.

A program works in a directory of its own, one operation after another, so that what it has done is a sequence of
states; promises P1 and P3 say which of them may be found after a crash. What others read is compared with the same.
"""

from typing import NamedTuple

from simtrace import Violation


class FileModel:
    """One file. ``versions`` are its contents from the last durable one (number ``first``) to the newest.

    ``torn``: an operation on it has failed, so that parts of several versions may be mixed.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.ino = 0
        self.versions: list[bytes] = [b""]
        self.first = 0
        self.torn = False

    def __repr__(self) -> str:
        return f"file {self.number} (ino {self.ino})"

    @property
    def newest(self) -> bytes:
        return self.versions[-1]

    @property
    def number_of_newest(self) -> int:
        return self.first + len(self.versions) - 1

    def change(self, content: bytes) -> None:
        self.versions.append(content)

    def durable(self, number: int) -> None:
        """Everything up to this version is on stable storage."""
        count = number - self.first
        if count > 0:
            del self.versions[:count]
            self.first = number

    def since(self, number: int) -> list[bytes]:
        return self.versions[max(0, number - self.first) :]

    def allows(self, content: bytes, floor: int, *, mixed: bool = False) -> bool:
        """Whether this may be found, when nothing before version ``floor`` may."""
        allowed = self.since(floor)
        if content in allowed:
            return True
        return (mixed or self.torn) and is_mixture(content, allowed, any_length=mixed)

    def adopt(self, content: bytes) -> None:
        """After a loss: this is what it is now. What is durable remains so."""
        if content in self.versions:
            last = len(self.versions) - 1 - self.versions[::-1].index(content)
            # Later versions never come back.
            del self.versions[last + 1 :]
        else:
            self.versions.append(content)
        self.torn = False


def is_mixture(content: bytes, versions: list[bytes], *, any_length: bool = False) -> bool:
    """Whether each byte is that of one of the versions (which are zero past their ends), and the length, too."""
    if len(content) > max(map(len, versions), default=0):
        return False
    if not any_length and len(content) not in {len(version) for version in versions}:
        return False
    size = len(content)
    padded = [version[:size].ljust(size, b"\0") for version in versions]
    if any(content == version for version in padded):
        return True
    return all(any(byte == version[at] for version in padded) for at, byte in enumerate(content))


class Place(NamedTuple):
    """A name: of a file, of which version ``floor`` was committed before the name was given; or of a directory."""

    file: FileModel | None
    floor: int = 0


Names = dict[str, Place]


class Tree:
    """The names of one program, as paths below its directory. ``states`` begin with the last durable one.

    ``maybe``: what the last operation would have led to, if it failed in a way that leaves that open.
    """

    def __init__(self) -> None:
        self.states: list[Names] = [{}]
        self.maybe: Names | None = None

    @property
    def now(self) -> Names:
        return self.states[-1]

    def change(self, names: Names) -> None:
        self.states.append(names)

    def durable(self) -> None:
        del self.states[:-1]

    def found(self, listing: frozenset[str], *, lost_tail: bool) -> Names:
        """Takes what is there after a crash or an error; ``lost_tail``: the metaserver may have lost some of it."""
        candidates = [*self.states] if lost_tail else [self.now]
        if self.maybe is not None:
            candidates.append(self.maybe)
        for names in reversed(candidates):
            if frozenset(names) == listing:
                self.maybe = None
                if names is not self.now:
                    self.change(names)
                return names
        shown = " or ".join(str(sorted(names)) for names in candidates)
        raise Violation(f"names {sorted(listing)} found, {shown} must be there")


class Model:
    """All files of all programs."""

    def __init__(self) -> None:
        self.by_ino: dict[int, FileModel] = {}
        self._count = 0

    def make(self) -> FileModel:
        self._count += 1
        return FileModel(self._count)

    def learn(self, file: FileModel, ino: int) -> None:
        file.ino = ino
        self.by_ino[ino] = file
